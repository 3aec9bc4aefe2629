"""Weights and options of another implementation, taken whole or refused with every difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fill", "read_options", "rename_attention", "require_fit"]

Shape = tuple[int, ...]

# diffusers' attention before 0.15, whose names are still in published files
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_options(
    op: str,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    must: Mapping[str, tuple[Any, ...]],
) -> dict[str, Any]:
    """The options of a config of diffusers, with the defaults of those that it leaves out.

    Args:
        config: as diffusers writes it; keys with a leading underscore are not options.
        defaults: every option that is known.
        must: the values that an option may have, where others have no counterpart here.

    Raises:
        ValueError: an option is unknown or has another value.
    """
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f"{op}: config must hold known options only, got {unknown}")
    options = {**defaults, **given}
    for name, allowed in must.items():
        if options[name] not in allowed:
            rule = f"be one of {allowed}" if len(allowed) > 1 else f"be {allowed[0]!r}"
            raise ValueError(f"{op}: {name} must {rule}, got {options[name]!r}")
    return options


def require_fit(op: str, want: Mapping[str, Shape], got: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names, shapes or kinds than wanted, with a line for each.

    Raises:
        ValueError: the lines.
    """
    lines = [f"missing    {name} {want[name]}" for name in want if name not in got]
    lines += [f"unexpected {name} {tuple(w.shape)}" for name, w in got.items() if name not in want]
    for name, w in got.items():
        if name in want and want[name] != tuple(w.shape):
            lines.append(f"misshapen  {name} {want[name]}, got {tuple(w.shape)}")
        elif name in want and not w.is_floating_point():
            lines.append(f"mistyped   {name} floating point, got {w.dtype}")
    if lines:
        raise ValueError(f"{op}: weights must fit the model, got\n  " + "\n  ".join(lines))


def rename_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers with today's names of the layers of attention."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if len(parts) > 3 and parts[-4] == "attentions" and parts[-2] in _OLD_ATTENTION:
            parts[-2] = _OLD_ATTENTION[parts[-2]]
        renamed[".".join(parts)] = value
    return renamed


def fill(
    op: str,
    model: nn.Module,
    state: Mapping[str, Tensor],
    sources: Mapping[str, tuple[str, ...]],
    *,
    rows: Mapping[str, Sequence[int]] | None = None,
    copies: Mapping[str, str] | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda key, value: value,
) -> None:
    """Put a copy of the source's weights into `model`, which may be on the meta device.

    Args:
        sources: each key of ours: the keys of the source whose rows it holds, one after the other.
        rows: how many rows each source has, for the keys of ours where they are not equal parts.
        copies: keys of the source that must hold the same as another.
        change: the value of a key of ours from the rows as they stand in the source.

    Raises:
        ValueError: keys are missing, left over or misshapen, all of which the message names; or a
            copy is none.
    """
    rows, copies, given = rows or {}, copies or {}, dict(state)
    want: dict[str, Shape] = {}
    for ours, value in model.state_dict().items():
        theirs = sources[ours]
        counts = rows.get(ours, [len(value) // len(theirs)] * len(theirs))
        for name, count in zip(theirs, counts, strict=True):
            shape = want[name] = (count, *value.shape[1:])
            # a 1x1 convolution over the tokens is a linear layer
            if name in given and value.ndim == 2:
                part = given[name]
                if part.shape == (*shape, *(1,) * (part.ndim - 2)):
                    given[name] = part.reshape(shape)
    want |= {copy: want[name] for copy, name in copies.items()}
    require_fit(op, want, given)
    for copy, name in copies.items():
        if not torch.equal(given[copy], given[name]):
            raise ValueError(f"{op}: {copy} must be a copy of {name}, got another")
    filled = {}
    for ours in model.state_dict():
        parts = [given[name].detach() for name in sources[ours]]
        filled[ours] = change(ours, torch.cat(parts) if len(parts) > 1 else parts[0].clone())
    model.load_state_dict(filled, assign=True)
