"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) from its IDX files, whole in memory."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastdiff._files import written_whole

__all__ = [
    "DEFAULT_FOLDER", "LABELS", "fashion_mnist", "read_idx", "save_grid", "save_image",
    "to_unit_range",
]  # fmt: skip

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def read_idx(path: str | Path) -> Tensor:
    """Read a (gzipped) IDX file of unsigned bytes.

    Args:
        path: the file; gunzipped where its name ends in `.gz`.

    Returns:
        uint8, with the shape the file's header gives.

    Raises:
        ValueError: the header is not that of an IDX file of bytes, or the length contradicts it.
    """
    path = Path(path)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
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


def save_grid(images: Tensor, path: str | Path, columns: int) -> None:
    """Write images as one grey PNG, `columns` in a row.

    Args:
        images: `(N, 1, h, w)` in [-1, 1]; values outside are clamped.
        path: the file to write.
        columns: images in a row, >= 1.
    """
    if images.ndim != 4 or images.shape[1] != 1 or columns < 1:
        raise ValueError(
            "data: images must have shape (N, 1, h, w) and columns be >= 1, got "
            f"{tuple(images.shape)} and {columns}"
        )
    n, _, h, w = images.shape
    rows = -(-n // columns)
    grid = torch.zeros(rows * columns, h, w, dtype=torch.uint8)
    grid[:n] = _bytes(images[:, 0])
    pixels = grid.view(rows, columns, h, w).transpose(1, 2).reshape(rows * h, columns * w)
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"data: path must end like a picture, in .png or such, got {path}")
    with written_whole(path) as part:
        Image.fromarray(pixels.numpy()).save(part, format=kind)


def save_image(image: Tensor, path: str | Path) -> None:
    """Write one image as a PNG that is there whole or not at all.

    Args:
        image: `(1, h, w)` grey or `(3, h, w)` RGB, in [-1, 1]; values outside are clamped.
        path: the file to write or to replace, in an existing folder.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"data: image must have shape (1, h, w) or (3, h, w), got {tuple(image.shape)}"
        )
    pixels = _bytes(image).permute(1, 2, 0).squeeze(-1).contiguous()
    with written_whole(Path(path)) as part:
        Image.fromarray(pixels.numpy()).save(part, format="PNG")


def _bytes(images: Tensor) -> Tensor:
    """[-1, 1] as 0 to 255, on the CPU."""
    return ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
