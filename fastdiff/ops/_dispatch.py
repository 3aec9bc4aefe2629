"""Which way a call of a differentiable op goes: straight to its kernel where nothing but the values
is wanted, else through autograd or torch's dispatcher, which cost microseconds more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)


# Loops, for a generator takes three times as long: these are asked at every call.
def traced(tensors: Sequence[Any]) -> bool:
    """Whether torch's dispatcher has to see the call: something records it, or a tensor is of a
    class that the dispatcher alone knows, or has no memory."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() != 0:
        return True
    for t in tensors:  # noqa: SIM110
        if t is not None and (type(t) not in _PLAIN or t.is_meta):
            return True
    return False


def values_only(tensors: Sequence[Any]) -> bool:
    """Whether no derivative, transform or trace is under way; arguments may be unchecked still."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() != 0
        or transformed(tensors)
    )


def transformed(tensors: Iterable[Any]) -> bool:
    """Whether a derivative is wanted, or a transform of torch.func is under way."""
    if (
        # a tensor that a transform wraps has no memory of its own
        torch._C._are_functorch_transforms_active()
        # forward mode is refused by the Functions: a tangent must not be lost in silence
        or forward_ad._current_level >= 0
    ):
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                return True
    return False


class Differentiable:
    """An op in every form that torch calls it in.

    Args:
        dispatched: the overload that is registered with torch.
        forward: the op on checked arguments: a tensor or a tuple of them.
        setup_context, backward: as `torch.autograd.Function` has them.
        vmap: whether `torch.vmap` may call the op for one entry after the other, which is not so
            where its values are drawn.
    """

    def __init__(
        self,
        dispatched: Any,
        forward: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        *,
        vmap: bool,
    ) -> None:
        class Function(torch.autograd.Function):
            """What `register_autograd` builds, without the dispatcher around it."""

            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = forward(*inputs)
                setup_context(ctx, inputs, output)
                return output

        class Transformable(torch.autograd.Function):
            """The same in the form that torch.func needs, which costs 20 us more a call."""

        functions: tuple[Any, Any] = (Function, Transformable)
        for function in functions:
            function.backward = staticmethod(backward)
        functions[1].forward = staticmethod(forward)
        functions[1].setup_context = staticmethod(setup_context)
        if vmap:
            functions[1].vmap = staticmethod(self._one_by_one)
        self._dispatched, self._forward = dispatched, forward
        self._function, self._transformable = functions

    def _one_by_one(self, info: Any, in_dims: Sequence[int | None], *inputs: Any) -> Any:
        calls = [
            self._transformable.apply(
                *(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    def __call__(self, tensors: Sequence[Any], inputs: Sequence[Any], direct: bool) -> Any:
        """The op on checked arguments.

        Args:
            tensors: those among the inputs that may be differentiated.
            direct: what `values_only` says of them.
        """
        if traced(tensors):
            return self._dispatched(*inputs)
        if direct:
            return self._forward(*inputs)
        transformed = torch._C._are_functorch_transforms_active()
        return (self._transformable if transformed else self._function).apply(*inputs)
