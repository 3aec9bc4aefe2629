"""What a checkpoint's card says of sampling, checked: cards come from strangers, as weights do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST_ELEMENTS = 1 << 26  # of one sample: a card may say anything
_LARGEST = 3e38  # below the end of float32


def image_shape(where: str, card: Mapping[str, Any]) -> list[int]:
    """(C, H, W) of an image.

    Raises:
        ValueError: the card has none.
    """
    sampling = card.get("sampling")
    _require(where, isinstance(sampling, dict), "sampling", "be an object", sampling)
    assert isinstance(sampling, dict)  # as required
    shape: Any = sampling.get("shape")
    sized = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    sized = sized and len(shape) == 3 and math.prod(shape) <= MOST_ELEMENTS
    rule = f"be three sizes of at most {MOST_ELEMENTS} elements"
    _require(where, sized, "shape", rule, shape)
    return shape  # type: ignore[no-any-return]


def advice(
    where: str, card: Mapping[str, Any], needed: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[str]]:
    """How a diffusion model's card says to sample, and its classes.

    Args:
        where: what the card is read for, the first word of an error.
        needed: numbers that must be there.

    Raises:
        ValueError: it does not, or not in the words of `checkpoints.save`.
    """
    classes, predicts = card.get("classes"), card.get("prediction")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    _require(where, named, "classes", "be a list of names", classes)
    _require(where, isinstance(predicts, str), "prediction", "be a word", predicts)
    image_shape(where, card)
    sampling: dict[str, Any] = card["sampling"]
    for name, least in (("guidance", -_LARGEST), ("clip", 0.0)):
        value: Any = sampling.get(name)
        number = type(value) in (int, float) and least <= value <= _LARGEST
        absent = value is None and name not in needed
        _require(where, number or absent, name, "be a finite number", value)
    assert isinstance(classes, list)  # as required
    return sampling, classes


def _require(where: str, ok: bool, name: str, rule: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{where}: {name} of the card must {rule}, got {got!r}")
