"""Training sets by name, and images as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastdiff.data import emoji, fashion
from fastdiff.data._dataset import Dataset
from fastdiff.data.fashion import DEFAULT_FOLDER, LABELS, fashion_mnist, read_idx, to_unit_range
from fastdiff.data.pictures import encode_png, save_grid, save_image

__all__ = [
    "DATASETS", "DEFAULT_FOLDER", "LABELS", "Dataset", "encode_png", "fashion_mnist", "load",
    "read_idx", "save_grid", "save_image", "to_unit_range",
]  # fmt: skip

# name: what reads it from a folder, and the folder where its package puts it
DATASETS: dict[str, tuple[Callable[[str | Path, int], Dataset], Path]] = {
    "fashion": (fashion.load, fashion.DEFAULT_FOLDER),
    "emoji": (emoji.load, emoji.DEFAULT_FOLDER),
}


def load(name: str, folder: str | Path = "", size: int = 32) -> Dataset:
    """A training set.

    Args:
        name: a key of `DATASETS`.
        folder: where its files lie; empty: where its package puts them.
        size: height and width of the images; each set says which it takes.

    Raises:
        ValueError: the name is unknown, the set has no such size, or a file is malformed.
        FileNotFoundError: a file is missing; the message says how to get it.
    """
    if name not in DATASETS:
        raise ValueError(f"data: dataset must be one of {sorted(DATASETS)}, got {name!r}")
    read, default = DATASETS[name]
    return read(folder or default, size)
