"""What `step` returns: the next sample at once, the predicted clean data when somebody asks.

No pipeline reads more than the next sample, and a second output would cost a third more memory
traffic.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, SupportsIndex

from torch import Tensor


def version(t: Tensor) -> int:
    """A number that grows with every write to a tensor; tensors of inference mode have none."""
    return -1 if t.is_inference() else t._version


class Later:
    """An output that has not been computed.

    One made of tensors of inference mode is computed at once: a write to these leaves no trace.

    Args:
        what: its name, for the error.
        make: computes output k.
        reads: the tensors that it is made of.
    """

    __slots__ = ("_made", "_reads", "_value", "_versions", "_what")

    def __init__(
        self, what: str, make: Callable[[int], Tensor], k: int, reads: tuple[Tensor, ...]
    ) -> None:
        self._what, self._made, self._reads = what, (make, k), reads
        self._versions = [version(t) for t in reads]
        self._value: Tensor | None = make(k) if -1 in self._versions else None

    def value(self) -> Tensor:
        """The output, computed once.

        Raises:
            RuntimeError: what it is made of was written to since the step.
        """
        if self._value is None:
            if [version(t) for t in self._reads] != self._versions:
                raise RuntimeError(
                    f"step: {self._what} must be read before the sample or the model output is "
                    "changed in place, got a change"
                )
            make, k = self._made
            self._value = make(k)
            del self._made, self._reads  # and with them the tensors
        return self._value


class LaterTuple(tuple):  # type: ignore[type-arg]
    """A tuple of outputs of which all but the first may be computed later."""

    __slots__ = ()

    def _at(self, i: int) -> Any:
        value = tuple.__getitem__(self, i)
        return value.value() if isinstance(value, Later) else value

    def _whole(self) -> tuple[Any, ...]:
        return tuple(self._at(i) for i in range(len(self)))

    def __getitem__(self, i: SupportsIndex | slice) -> Any:
        if isinstance(i, slice):
            return self._whole()[i]
        return self._at(i.__index__())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._whole())

    def __add__(self, other: Any) -> Any:
        return self._whole() + other

    def __radd__(self, other: Any) -> Any:
        return other + self._whole()

    def __repr__(self) -> str:
        return repr(self._whole())

    def __reduce__(self) -> Any:
        return tuple, (self._whole(),)


def _field(name: str) -> property:
    """A field of an output that may hold a `Later`."""
    at = f"_{name}"

    def get(self: Any) -> Any:
        value = self.__dict__.get(at)
        if isinstance(value, Later):
            self._fill()
            value = self.__dict__[at]
        return value

    def put(self: Any, value: Any) -> None:
        self.__dict__[at] = value

    return property(get, put)


class _LaterFields:
    """Turns every `Later` of an output into its tensor when something looks at it."""

    def _fill(self: Any) -> None:
        for name in OrderedDict.keys(self):
            value = OrderedDict.__getitem__(self, name)
            if isinstance(value, Later):
                OrderedDict.__setitem__(self, name, value.value())
                self.__dict__[f"_{name}"] = value.value()

    def get(self, key: Any, default: Any = None) -> Any:
        self._fill()
        return super().get(key, default)  # type: ignore[misc]

    def items(self) -> Any:
        self._fill()
        return super().items()  # type: ignore[misc]

    def values(self) -> Any:
        self._fill()
        return super().values()  # type: ignore[misc]

    def __repr__(self) -> str:
        self._fill()
        return super().__repr__()

    def __reduce__(self) -> Any:
        self._fill()
        return self._base, self.to_tuple()  # type: ignore[attr-defined]


_LATER: dict[type, Any] = {}


def _later_class(base: type) -> Any:
    found = _LATER.get(base)
    if found is None:
        body = {field.name: _field(field.name) for field in dataclasses.fields(base)}
        found = type(base.__name__, (_LaterFields, base), {**body, "_base": base})
        found.__module__, found.__qualname__ = base.__module__, base.__qualname__
        _LATER[base] = found
    return found


def later_output(base: type, values: tuple[Tensor | Later, ...]) -> Any:
    """One of diffusers' output objects whose fields may be computed later.

    Args:
        base: diffusers' class.
        values: of its fields, in their order.
    """
    cls = _later_class(base)
    out = cls.__new__(cls)
    for field, value in zip(dataclasses.fields(base), values, strict=True):
        OrderedDict.__setitem__(out, field.name, value)
        out.__dict__[f"_{field.name}"] = value
    return out
