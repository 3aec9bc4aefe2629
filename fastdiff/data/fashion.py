"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) from its IDX files, whole in memory."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data._dataset import Dataset

__all__ = ["DEFAULT_FOLDER", "LABELS", "fashion_mnist", "load", "read_idx", "to_unit_range"]

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
_MOST_BYTES = 1 << 30  # of an unpacked file; the largest of Fashion-MNIST has 47 million


def read_idx(path: str | Path) -> Tensor:
    """Read a (gzipped) IDX file of unsigned bytes.

    Args:
        path: the file; gunzipped where its name ends in `.gz`.

    Returns:
        uint8, with the shape the file's header gives.

    Raises:
        ValueError: the file is not whole, the header is not that of an IDX file of bytes, or the
            length contradicts it.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)  # a few packed bytes may hold any number
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"data: {path} must be a whole .gz file, got {error}") from error
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"data: {path} must hold at most {_MOST_BYTES} bytes, got more")
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"data: {path} must be an IDX file of uint8, got header {raw[:4].hex()}")
    rank = raw[3]
    start = 4 + 4 * rank
    if len(raw) < start:
        raise ValueError(f"data: {path} must hold {rank} sizes, got {len(raw)} bytes in all")
    shape = struct.unpack(f">{rank}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"data: {path} must hold {math.prod(shape)} bytes for shape {shape}, "
            f"got {len(raw) - start}"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).copy()).view(shape)


def to_unit_range(images: Tensor, size: int = 32) -> Tensor:
    """Scale bytes to [-1, 1] and pad with -1 (black).

    Args:
        images: `(N, h, w)` uint8, `h` and `w` at most `size`.
        size: height and width of the result.

    Returns:
        `(N, 1, size, size)` float32.
    """
    height, width = images.shape[-2:]
    if max(height, width) > size:
        raise ValueError(f"data: size must be at least {max(height, width)}, got {size}")
    top, left = (size - height) // 2, (size - width) // 2
    pad = (left, size - width - left, top, size - height - top)
    return F.pad(images[:, None].float() / 127.5 - 1, pad, value=-1.0)


def fashion_mnist(
    split: str = "train", folder: str | Path = DEFAULT_FOLDER, size: int = 32
) -> tuple[Tensor, Tensor]:
    """The images and labels of one split.

    Args:
        split: "train" (60,000) or "test" (10,000).
        folder: holds `train-images-idx3-ubyte.gz` and its three companions.
        size: images are padded to this height and width.

    Returns:
        images `(N, 1, size, size)` float32 in [-1, 1], labels `(N,)` int64.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
    """
    names = {"train": "train", "test": "t10k"}
    if split not in names:
        raise ValueError(f"data: split must be one of {sorted(names)}, got {split!r}")
    parts = []
    for kind in ("images-idx3", "labels-idx1"):
        path = Path(folder) / f"{names[split]}-{kind}-ubyte.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"data: folder must hold {path.name}, got {folder}; on Debian "
                "`apt-get install dataset-fashion-mnist` installs it"
            )
        parts.append(read_idx(path))
    images, labels = parts
    if len(images) != len(labels):
        raise ValueError(f"data: labels must number {len(images)}, got {len(labels)}")
    return to_unit_range(images, size), labels.long()


def load(folder: str | Path = DEFAULT_FOLDER, size: int = 32) -> Dataset:
    """The training split, as `fashion_mnist` reads it, with the facts of its card."""
    images, labels = fashion_mnist("train", folder, size)
    shape = f"padded to {size}x{size}" if size > 28 else "28x28"
    return Dataset(
        images=images,
        labels=labels,
        classes=LABELS,
        name=f"Fashion-MNIST, training split, {len(images):,} images, {shape}, [-1, 1]",
        source="https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT, (c) 2017 Zalando SE",
    )
