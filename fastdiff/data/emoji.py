"""Noto Emoji (Google) in ten categories, from the sheet of the npm package that carries them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastdiff.data._dataset import Dataset

__all__ = ["CATEGORIES", "DEFAULT_FOLDER", "load"]

# where `npm install emoji-datasource-google` puts it
DEFAULT_FOLDER = Path("node_modules/emoji-datasource-google")
TABLE, SHEET = "emoji.json", "img/google/sheets-256/64.png"
# the package's category: the class, a word that is easily given to a command line
CATEGORIES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Component": "component",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
# a cell is an image with a transparent border
_IMAGE, _BORDER = 64, 1
_CELL = _IMAGE + 2 * _BORDER


def load(folder: str | Path = DEFAULT_FOLDER, size: int = 32) -> Dataset:
    """Every image of the sheet, skin tones included, on white.

    Args:
        folder: holds `emoji.json` and `img/google/sheets-256/64.png`.
        size: height and width of the result, a divisor of 64: a pixel is the mean of those that
            it covers.

    Returns:
        `(N, 3, size, size)` in [-1, 1], in the order of the table, an emoji before its skin tones.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ValueError: `size` breaks its rule, or a file is malformed.
    """
    if size < 1 or _IMAGE % size:
        raise ValueError(f"data: size must divide {_IMAGE}, got {size}")
    table, sheet = Path(folder) / TABLE, Path(folder) / SHEET
    for path, name in ((table, TABLE), (sheet, SHEET)):
        if not path.is_file():
            raise FileNotFoundError(
                f"data: folder must hold {name}, got {folder}; "
                "`npm install emoji-datasource-google` gets it"
            )
    pixels = _on_white(sheet)
    kinds, names = list(CATEGORIES), list(CATEGORIES.values())
    images, labels = [], []
    for category, column, row in _places(table):
        top, left = row * _CELL + _BORDER, column * _CELL + _BORDER
        image = pixels[top : top + _IMAGE, left : left + _IMAGE]
        if min(row, column) < 0 or image.shape[:2] != (_IMAGE, _IMAGE):
            rule = f"name cells of a sheet of {pixels.shape[1]} x {pixels.shape[0]} pixels"
            raise ValueError(f"data: {table} must {rule}, got column {column}, row {row}")
        step = _IMAGE // size
        images.append(image.reshape(size, step, size, step, 3).mean((1, 3), np.float32))
        labels.append(kinds.index(category))
    if not images:
        raise ValueError(f"data: {table} must name an image, got none")
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Dataset(
        images=stack / 127.5 - 1,
        labels=torch.tensor(labels),
        classes=tuple(names),
        name=(
            f"Noto Emoji as in emoji-datasource-google, {len(images):,} images with their skin "
            f"tones, 256 colours, on white, {_IMAGE}x{_IMAGE} averaged to {size}x{size}, [-1, 1]"
        ),
        source="https://www.npmjs.com/package/emoji-datasource-google",
        licence="Apache-2.0 (Noto Emoji, Google); table MIT, (c) 2013 Cal Henderson",
    )


def _on_white(sheet: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(height, width, 3) bytes of the sheet over a white ground."""
    try:
        with Image.open(sheet) as file:
            over = file.convert("RGBA")
    # what damaged pictures raise has no common type
    except Exception as error:
        raise ValueError(f"data: {sheet} must be a picture, got one unread ({error})") from error
    ground = Image.new("RGBA", over.size, "white")
    ground.alpha_composite(over)
    return np.asarray(ground.convert("RGB"))


def _places(table: Path) -> Iterator[tuple[str, int, int]]:
    """Category, column and row of every image, an emoji before its skin tones."""
    try:
        entries = json.loads(table.read_text(encoding="utf-8"))
        for entry in entries:
            category = entry["category"]
            if category not in CATEGORIES:
                rule = f"have categories of {list(CATEGORIES)}, got {category!r}"
                raise ValueError(f"data: {table} must {rule}")
            for image in (entry, *entry.get("skin_variations", {}).values()):
                yield category, _number(image, "sheet_x"), _number(image, "sheet_y")
    # a RecursionError is brackets within brackets
    except (
        json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError,
        RecursionError,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"data: {table} must be as the package has it, got {reason}") from error


def _number(image: Mapping[str, Any], key: str) -> int:
    value = image[key]
    if type(value) is not int:
        raise TypeError(f"{key} {value!r}")
    return value
