"""The images that ``fastdiff eval`` scores, and what is to be said of them."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import data

# of `fastdiff train`, which takes every emoji
_TRAINED_ON = "all, the images that the model was trained on: no test figure"


class Scored(NamedTuple):
    """Images with their labels.

    Attributes:
        images: `(N, C, H, W)` float32 in [-1, 1], on 256 levels.
        labels: `(N,)` int64.
        facts: name, split, number and notes, as JSON.
        dims: by name, how many numbers bits are shared out to.
    """

    images: Tensor
    labels: Tensor
    facts: dict[str, Any]
    dims: dict[str, int]


def load(args: argparse.Namespace, shape: list[int]) -> Scored:
    """Test images of Fashion-MNIST for a model of grey ones, Noto Emoji for one of colour.

    Args:
        args: ``data``, the folder or None, and ``images``, how many.
        shape: channels, height and width of the model's images.

    Raises:
        ValueError: the model is of other images, or there are fewer.
        FileNotFoundError: a file is missing; the message says how to get it.
    """
    channels, height, width = shape
    grey = channels == 1 and height >= 28
    if height != width or not (grey or (channels == 3 and 64 % height == 0)):
        raise ValueError(
            "eval: checkpoint must be of grey squares of 28 pixels or more, as Fashion-MNIST, or "
            f"of colour squares whose side divides 64, as Noto Emoji, got shape {tuple(shape)}"
        )
    return _fashion(args, height) if grey else _emoji(args, height)


def _enough(wanted: int, there: int) -> None:
    if wanted > there:
        raise ValueError(f"eval: images must be at most {there}, got {wanted}")


def _fashion(args: argparse.Namespace, side: int) -> Scored:
    images, labels = data.fashion_mnist("test", args.data or data.DEFAULT_FOLDER, side)
    _enough(args.images, len(images))
    facts = {
        "name": "Fashion-MNIST",
        "split": "test",
        "images": args.images,
        "levels": 256,
        "note": "per dim: of all elements that the model sees; per pixel: the same bits, those "
        "of the padding too, over the 28x28 pixels of the image, whose own are no more",
    }
    dims = {"dim": side * side, "pixel": 28 * 28}
    return Scored(images[: args.images], labels[: args.images], facts, dims)


def _emoji(args: argparse.Namespace, side: int) -> Scored:
    """Drawn without return: the table is in the order of the categories."""
    known = data.load("emoji", args.data or "", side)
    _enough(args.images, len(known.images))
    draw = torch.Generator().manual_seed(0)
    index = torch.randperm(len(known.images), generator=draw)[: args.images]
    # a mean of 2 x 2 pixels lies between levels, and a probability is one of levels
    levels = ((known.images[index] + 1) * 127.5).round()
    facts = {
        "name": "Noto Emoji",
        "split": _TRAINED_ON,
        "images": args.images,
        "levels": 256,
        "note": f"{known.name}, then rounded to 256 levels; the first of a fixed random order",
    }
    return Scored(levels / 127.5 - 1, known.labels[index], facts, {"dim": 3 * side * side})
