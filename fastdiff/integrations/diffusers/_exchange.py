"""A scheduler that lives on with another class: diffusers' own one, or the drop-in for it."""

from __future__ import annotations

import copy
from typing import Any

from fastdiff.integrations.diffusers._plan import Runtime
from fastdiff.integrations.diffusers._scheduler import DropIn


def refuse(scheduler: Any) -> str | None:
    """Reason why a scheduler has no drop-in, or None."""
    from fastdiff.integrations import diffusers as drop_ins

    if isinstance(scheduler, DropIn):
        return None
    cls = type(scheduler)
    name = cls.__name__
    if name not in drop_ins._STATE:
        return f"{name} has no drop-in"
    if cls is not getattr(drop_ins, name)._fd_peer:
        return f"{name} of {cls.__module__} is not the class of diffusers"
    if "step" in vars(scheduler):
        return f"{name} has a step of its own"
    return None


def put_in(scheduler: Any) -> None:
    """Give a scheduler of diffusers the class of its drop-in; config, grid and state stay."""
    from fastdiff.integrations import diffusers as drop_ins

    if not isinstance(scheduler, DropIn):
        scheduler._fastdiff = Runtime(in_place=True)
        scheduler.__class__ = getattr(drop_ins, type(scheduler).__name__)


def take_out(scheduler: Any) -> None:
    """Undo `put_in`; a scheduler that was made as a drop-in stays one."""
    if isinstance(scheduler, DropIn) and scheduler._fastdiff.in_place:
        _bare(scheduler)


def _bare(scheduler: Any) -> None:
    del scheduler._fastdiff
    object.__setattr__(scheduler, "__class__", scheduler._fd_peer)


def to_diffusers(scheduler: Any) -> Any:
    """A copy of a drop-in scheduler that is of diffusers' own class.

    A pipeline that is saved with it loads where this library is not installed.

    Args:
        scheduler: a drop-in.

    Returns:
        A scheduler with the same config, `noise` left out, timesteps and state.

    Raises:
        TypeError: scheduler is no drop-in.
    """
    if not isinstance(scheduler, DropIn):
        raise TypeError(
            "to_diffusers: scheduler must be of a class in fastdiff.integrations.diffusers, "
            f"got {type(scheduler).__module__}.{type(scheduler).__name__}"
        )
    twin: Any = copy.deepcopy(scheduler)
    _bare(twin)
    config = twin._internal_dict
    twin._internal_dict = type(config)({k: v for k, v in config.items() if k != "noise"})
    return twin
