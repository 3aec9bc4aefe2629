"""Another forward for a module that lives on: its class becomes a subclass of its class.

Of the two ways to give one instance another `forward`, an attribute on the instance does not
pickle and binds the old object in a copy; it also hides from libraries that put their own `forward`
there (accelerate's offloading hooks). A subclass keeps `isinstance`, the class name, hooks,
`state_dict`, `.to()` and `deepcopy` as they are, holds no state, and undoing it is one assignment.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from fastdiff.backends import Op
from fastdiff.ops import _native
from fastdiff.ops.film_norm import OP


class Swapped:
    """What the new class adds; subclasses define `forward`, `refuse` and `fused`.

    Attributes:
        original: the class before, whose forward runs whatever the fused one does not cover.
        mixin: the class of this library that was put before it.
        fused: what runs as one pass, for the report.
    """

    original: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Swapped]]
    fused: ClassVar[str]

    @staticmethod
    def refuse(module: Any, /) -> str | None:
        """Reason why the fused forward would not do exactly what the module does now, or None.

        Asked when the module is swapped and again at every call: hooks, training mode and
        submodules may change in between.
        """
        raise NotImplementedError

    def inside(self: Any) -> list[nn.Module]:
        """The submodules whose work the fused forward does."""
        return []

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class made at run time has no name to be found by; what it was made of has
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuild, (self.original, self.mixin), *reduced[2:])


# one class for each pair, so that dynamo and pickle meet the same one again
_MADE: dict[tuple[Any, Any], Any] = {}


def _subclass(original: Any, mixin: Any) -> Any:
    made = _MADE.get((original, mixin))
    if made is None:
        # the old names, as device maps and regional compilation find blocks by class name
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        facts = {**names, "__doc__": original.__doc__, "original": original, "mixin": mixin}
        made = _MADE.setdefault(
            (original, mixin), type(original.__name__, (mixin, original), facts)
        )
    return made


def _rebuild(original: type[nn.Module], mixin: type[Swapped]) -> Any:
    return copyreg.__newobj__(_subclass(original, mixin))  # type: ignore[attr-defined]


def swap(module: nn.Module, mixin: type[Swapped], **kept: Any) -> None:
    """``kept``: attributes of the instance that the new forward needs, named `_fastdiff_*`."""
    module.__dict__.update(kept)
    module.__class__ = _subclass(type(module), mixin)


def covered(module: nn.Module) -> bool:
    """Whether something, such as a parametrisation, put a class of its own over ours."""
    return isinstance(module, Swapped) and "original" not in type(module).__dict__


def unswap(module: nn.Module) -> None:
    if isinstance(module, Swapped):
        target: Any = module
        target.__class__ = module.original
        for name in [n for n in module.__dict__ if n.startswith("_fastdiff_")]:
            del module.__dict__[name]


# --- what every refusal asks ----------------------------------------------------------------


def loaded(module: str, *names: str) -> tuple[type[nn.Module], ...]:
    """Those classes of a module if it is imported already."""
    found = sys.modules.get(module)
    return tuple(c for c in (getattr(found, n, None) for n in names) if isinstance(c, type))


def keeps_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether ``base`` alone says what a call of the module does: a subclass may be anything."""
    forward: Callable[..., Any] = type(module).forward
    if isinstance(module, Swapped):
        forward = module.original.forward
    return forward is base.forward and "forward" not in module.__dict__


def bypassable(module: nn.Module, kind: type[nn.Module], hooks: bool = False) -> bool:
    """Whether reading the weights of a submodule tells all of what a call of it would do.

    Args:
        kind: the class itself: a subclass may do more.
        hooks: whether it may have hooks, as it is called nevertheless.
    """
    its = module.original if isinstance(module, Swapped) else type(module)
    return (
        its is kind
        and "forward" not in module.__dict__
        and (
            hooks
            or not (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            )
        )
    )


_GPU = ("triton", "cuda")


def fusable(x: torch.Tensor, op: Op = OP) -> bool:
    """Whether the fused forward, by this op, is the faster one for this input.

    Not where a gradient is wanted: the op's backward is plain PyTorch, 2 to 15 times slower than
    that of `native_group_norm` (forward and backward of (16, 256, 16, 16) in bfloat16: 45 ms
    against 23, in float32 52 against 8). Not under autocast, which chooses a dtype op by op. Not
    where the op would fall back to its readable reference.
    """
    if torch.is_grad_enabled() or x.dtype not in _native.DTYPES:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    if x.is_cpu:
        return bool(_native.reads_tensors)
    return x.is_cuda and any(name in _GPU for name, _ in op.live)
