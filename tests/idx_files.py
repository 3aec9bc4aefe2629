"""A made-up Fashion-MNIST on disk: small, and of a structure that is quickly learnt."""

import gzip
import struct
from pathlib import Path

import numpy as np

COUNT = 40


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_squares(folder: Path) -> Path:
    """Forty images of ten classes: a bright square whose place is the label."""
    labels = np.arange(COUNT) % 10
    images = np.zeros((COUNT, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 8, 4:20] = 255 - label
    for split, n in (("train", COUNT), ("t10k", 10)):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images[:n])
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels[:n])
    return folder


def write_smooth(folder: Path, count: int) -> Path:
    """A test split of random pictures, smooth over 4x4 pixels, of three classes."""
    images = np.random.default_rng(0).integers(0, 256, (count, 7, 7))
    write_idx(folder / "t10k-images-idx3-ubyte.gz", np.kron(images, np.ones((1, 4, 4))))
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.arange(count) % 3)
    return folder
