"""Group normalisation with the activation after it: alone, in `nn.Sequential`, at the end of the
diffusers models, whose forward calls `conv_norm_out` and then `conv_act`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations._swap import Swapped, bypassable, fusable, keeps_forward
from fastdiff.ops.film_norm import film_norm


def apply(
    norm: nn.GroupNorm,
    x: Tensor,
    act: str | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The normalisation with what follows it, as one op."""
    return film_norm(x, norm.num_groups, norm.weight, norm.bias, scale, shift, act, eps=norm.eps)


class GroupNorm(Swapped):
    """A normalisation that no fused chain takes in."""

    fused = "GroupNorm"

    @staticmethod
    def refuse(module: Any, /) -> str | None:
        return None if keeps_forward(module, nn.GroupNorm) else "has a forward of its own"

    def forward(self: Any, x: Tensor) -> Tensor:
        if not fusable(x):
            return self.original.forward(self, x)  # type: ignore[no-any-return]
        return apply(self, x, None)


class Sequential(Swapped):
    """`nn.Sequential` in which a SiLU follows a GroupNorm."""

    fused = "GroupNorm + SiLU"

    @staticmethod
    def refuse(module: Any, /) -> str | None:
        if not keeps_forward(module, nn.Sequential):
            return "has a forward of its own"
        return None if any(_pairs(module)) else "no GroupNorm is followed by a SiLU"

    def inside(self: Any) -> list[nn.Module]:
        return [m for m, starts_pair in zip(self, _pairs(self), strict=True) if starts_pair]

    def forward(self: Any, x: Any) -> Any:
        starts = _pairs(self)
        skip = False
        for module, starts_pair in zip(self, starts, strict=True):
            if skip:
                skip = False
            elif starts_pair and isinstance(x, Tensor) and fusable(x):
                x = apply(module, x, "silu")
                skip = True
            else:
                x = module(x)
        return x


def _pairs(chain: nn.Sequential) -> list[bool]:
    """For every position whether a chain starts there that one op does."""
    modules = list(chain)
    first = [bypassable(m, nn.GroupNorm) for m in modules]
    then = [bypassable(m, nn.SiLU) for m in modules[1:]]
    return [a and b for a, b in zip(first, [*then, False], strict=True)]


def hooked(norm: nn.Module, act: nn.Module) -> str | None:
    """Reason why a norm and the activation that is called right after it may not be one op."""
    if norm._forward_hooks or act._forward_hooks or act._forward_pre_hooks:
        return "has hooks between norm and activation, where a fused pass has no tensor"
    own = "forward" in norm.__dict__ or "forward" in act.__dict__
    return "has a forward of its own" if own else None


class NormBeforeAct(Swapped):
    """`conv_norm_out`, which does the activation too and marks its result as activated.

    `conv_act` passes on what is marked. The mark is on the tensor, so the two agree on every call:
    where the norm ran its own forward, or something replaced its result, the activation is done.
    What cannot be seen is another module assigned to `conv_act`: restore the model before that.
    """

    fused = "GroupNorm + SiLU"
    # in a tuple, for a module would be registered as a child
    _fastdiff_act: tuple[nn.Module]

    @staticmethod
    def refuse(module: Any, /) -> str | None:
        act: Any = module._fastdiff_act[0]
        # restored alone, it would activate a second time
        return (
            hooked(module, act)
            if ActAfterNorm in type(act).__mro__
            else "its activation is restored"
        )

    def forward(self: Any, x: Tensor) -> Tensor:
        # a compiler fuses the two by itself, and cannot follow the mark
        if torch.compiler.is_compiling() or not fusable(x) or self.refuse(self):
            return self.original.forward(self, x)  # type: ignore[no-any-return]
        out = apply(self, x, "silu")
        out._fastdiff_activated = True  # type: ignore[attr-defined]
        return out


class ActAfterNorm(Swapped):
    """`conv_act`, which passes on what is activated already."""

    fused = "in conv_norm_out"

    @staticmethod
    def refuse(module: Any, /) -> str | None:
        return None if keeps_forward(module, nn.SiLU) else "has a forward of its own"

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and getattr(x, "_fastdiff_activated", False):
            return x
        return self.original.forward(self, x)  # type: ignore[no-any-return]
