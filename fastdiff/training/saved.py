"""A training checkpoint as it is read: checked in full before a run takes any of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.formats.files import read_pickled, require_dense
from fastdiff.models._keys import require_fit

__all__ = ["Saved", "read"]


class Saved(NamedTuple):
    """What `Run.save` wrote.

    Attributes:
        model, ema: weights.
        optimizer: its state.
        step: optimizer steps.
        elapsed: seconds.
        losses: of each step.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    elapsed: float
    losses: list[float]


def read(
    path: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, device: str
) -> Saved:
    """The checkpoint of a run of the model called ``name``.

    Raises:
        ValueError: the file is not whole, holds something else than a run writes, or that of
        another model.
    """
    state = read_pickled("train", path, device)
    _require(path, isinstance(state, dict), "the checkpoint", "be an object", state)
    config = state.get("config")
    _require(path, isinstance(config, dict), "config", "be an object", config)
    # checkpoints from before there were other models do not name theirs
    written = config.get("model", "unet")
    if written != name:
        raise ValueError(f"train: model must be that of {path.name}, {written}, got {name}")
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = {part: _weights(path, part, state.get(part), want) for part in ("model", "ema")}
    _check_optimizer(path, state.get("optimizer"), optimizer)
    step, elapsed, losses = (state.get(key) for key in ("step", "elapsed", "losses"))
    _require(path, type(step) is int and step >= 0, "step", "be an integer, 0 or more", step)
    fits = type(elapsed) in (int, float) and 0 <= elapsed < math.inf
    _require(path, fits, "elapsed", "be seconds, 0 or more", elapsed)
    fits = isinstance(losses, Tensor) and losses.shape == (step,) and losses.is_floating_point()
    _require(path, fits, "losses", f"be one number for each of {step} steps", losses)
    require_dense("train", "losses", losses, path)
    return Saved(**weights, optimizer=state["optimizer"], step=step, elapsed=float(elapsed),
                 losses=losses.tolist())  # fmt: skip


def _require(path: Path, ok: bool, name: str, rule: str, got: object) -> None:
    if ok:
        return
    shown = f"a tensor {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)[:100]
    raise ValueError(f"train: {name} must {rule}, got {shown} in {path}")


def _weights(
    path: Path, part: str, found: Any, want: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    named = isinstance(found, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    )
    _require(path, named, part, "hold tensors by name", found)
    try:
        require_fit("train", want, found)
    except ValueError as error:
        raise ValueError(f"{error}\nin {part} of {path}") from None
    for key, value in found.items():
        require_dense("train", key, value, path)
    return dict(found)


def _check_optimizer(path: Path, found: Any, own: torch.optim.Optimizer) -> None:
    """torch takes moments of any shape, and fails, or worse, in the next step."""
    whole = isinstance(found, dict) and found.keys() == {"state", "param_groups"}
    _require(path, whole, "optimizer", "hold state and param_groups", found)
    groups, mine = found["param_groups"], own.state_dict()["param_groups"]
    listed = isinstance(groups, list) and len(groups) == len(mine)
    _require(path, listed, "param_groups", f"be a list of {len(mine)}", groups)
    for group, like in zip(groups, mine, strict=True):
        same = isinstance(group, dict) and group.get("params") == like["params"]
        _require(path, same, "param_groups", "name the parameters of the model", group)
        for key, value in like.items():
            fits = key not in group or _alike(group[key], value)
            _require(path, fits, key, f"be such as {value!r}", group.get(key))
    moments, tensors = found["state"], [p for group in own.param_groups for p in group["params"]]
    numbered = isinstance(moments, dict) and list(moments) in ([], list(range(len(tensors))))
    _require(path, numbered, "state", "have an entry for each parameter, or none", moments)
    for i, entry in moments.items():
        _require(path, isinstance(entry, dict), f"state {i}", "be an object", entry)
        shapes = {"step": (), "exp_avg": tensors[i].shape, "exp_avg_sq": tensors[i].shape}
        for key, shape in shapes.items():
            value = entry.get(key)
            fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
            rule = f"be a floating-point tensor {tuple(shape)}"
            _require(path, fits, f"{key} of state {i}", rule, value)
            require_dense("train", f"{key} of state {i}", value, path)
        _require(path, entry.keys() == shapes.keys(), f"state {i}", f"hold {[*shapes]}", [*entry])


def _alike(value: Any, like: Any) -> bool:
    """Whether an option of the optimizer has the type of our own."""
    if isinstance(like, bool) or like is None or isinstance(like, str):
        return type(value) is type(like)
    if isinstance(like, (int, float)):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(like, Sequence):
        return (
            isinstance(value, Sequence)
            and len(value) == len(like)
            and all(_alike(a, b) for a, b in zip(value, like, strict=True))
        )
    return True
