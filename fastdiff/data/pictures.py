"""Images as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastdiff._files import written_whole

__all__ = ["encode_png", "picture_format", "save_grid", "save_image"]


def picture_format(path: Path, name: str = "data: path") -> str:
    """Pillow's name of the format that a file's ending asks for.

    Args:
        name: what gave the path, for the message.

    Raises:
        ValueError: it asks for none that can be written.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{name} must end like a picture, in .png or such, got {path}")
    return kind


def save_grid(images: Tensor, path: str | Path, columns: int) -> None:
    """Write images as one picture, `columns` in a row.

    Args:
        images: `(N, 1, h, w)` grey or `(N, 3, h, w)` RGB, in [-1, 1]; values outside are clamped.
        path: the file to write, in the format that its ending names.
        columns: images in a row, >= 1.

    Raises:
        ValueError: a rule is broken, or the ending names no format that can be written.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or columns < 1:
        raise ValueError(
            "data: images must have shape (N, 1, h, w) or (N, 3, h, w) and columns be >= 1, got "
            f"{tuple(images.shape)} and {columns}"
        )
    n, c, h, w = images.shape
    rows = -(-n // columns)
    grid = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    grid[:n] = _bytes(images)
    pixels = grid.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * h, columns * w, c).squeeze(-1)
    path = Path(path)
    kind = picture_format(path)
    with written_whole(path) as part:
        Image.fromarray(pixels.numpy()).save(part, format=kind)


def save_image(image: Tensor, path: str | Path) -> None:
    """Write one image as a PNG that is there whole or not at all.

    Args:
        image: `(1, h, w)` grey or `(3, h, w)` RGB, in [-1, 1]; values outside are clamped.
        path: the file to write or to replace, in an existing folder.
    """
    picture = _picture(image)
    with written_whole(Path(path)) as part:
        picture.save(part, format="PNG")


def encode_png(image: Tensor) -> bytes:
    """The PNG of an image.

    Args:
        image: `(1, h, w)` grey or `(3, h, w)` RGB, in [-1, 1]; values outside are clamped.

    Raises:
        ValueError: it has another shape.
    """
    file = io.BytesIO()
    _picture(image).save(file, format="PNG")
    return file.getvalue()


def _picture(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"data: image must have shape (1, h, w) or (3, h, w), got {tuple(image.shape)}"
        )
    pixels = _bytes(image).permute(1, 2, 0).squeeze(-1).contiguous()
    return Image.fromarray(pixels.numpy())


def _bytes(images: Tensor) -> Tensor:
    """[-1, 1] as 0 to 255, on the CPU."""
    return ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
