"""Which implementation of an op runs, and why not the others.

Capability is data: every op lists its backends with a `refuse` function that returns a reason or
None. A forced backend runs or raises; only "auto" chooses.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any


class BackendError(RuntimeError):
    """A backend cannot do what was asked; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    Attributes:
        load: returns the function, importing what it needs.
        refuse: reason why this backend cannot take these arguments, or None.
    """

    load: Callable[[], Callable[..., Any]]
    refuse: Callable[..., str | None]


@dataclass(frozen=True)
class Op:
    """An operation and its backends in the order in which "auto" tries them."""

    name: str
    backends: dict[str, Implementation]

    @cached_property
    def live(self) -> list[tuple[str, Implementation]]:
        """The backends that this machine can run at all, found once: a step takes microseconds."""
        return [(n, i) for n, i in self.backends.items() if unavailable(n) is None]


def _cpu_reason() -> str | None:
    from fastdiff.ops import _native

    return _native.missing


def _broken(module: str) -> str | None:
    """Why a module that is there cannot be imported, or None. A package may fail in any way: built
    for another Python, cut short by a full disk, at odds with the driver."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} cannot be imported ({type(error).__name__}: {error})"
    return None


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import torch

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return _broken("triton") or _broken("fastdiff.kernels._common")
    return "no CUDA device is present (TRITON_INTERPRET=1 runs it on the CPU, slowly)"


def _cuda_reason() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is present"
    try:  # find_spec imports the parent package, which may be missing
        found = importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return "cuda-core is not installed (pip install 'fastdiff-sampler[cuda]')"
    return _broken("cuda.core")


# Name -> reason why it cannot run on this machine at all, or None.
BACKENDS: dict[str, Callable[[], str | None]] = {
    "cpu": _cpu_reason,
    "triton": _triton_reason,
    "cuda": _cuda_reason,
    "reference": lambda: None,
}

_forced: ContextVar[str] = ContextVar("fastdiff_backend", default="auto")


def forced() -> str:
    """The backend in force in this context: a name of `BACKENDS`, or "auto"."""
    return _forced.get()


@cache
def unavailable(name: str) -> str | None:
    """Reason why the backend cannot run on this machine, or None; asked once a process."""
    return BACKENDS[name]()


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"use_backend: name must be one of auto, {', '.join(BACKENDS)}, got {name!r}"
        )


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every op runs on this backend or raises `BackendError`.

    Args:
        name: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: the name is none of these.
    """
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _refusals(op: Op, args: Any) -> Iterator[tuple[str, str | None]]:
    for name, implementation in op.backends.items():
        reason = unavailable(name)
        yield name, reason if reason is not None else implementation.refuse(args)


def choose(op: Op, args: Any) -> tuple[str, Callable[..., Any]]:
    """The name and function that run ``op`` on these arguments in this context.

    Raises:
        BackendError: the forced backend, or every backend, refuses; the message has the reasons.
    """
    name = _forced.get()
    if name != "auto":
        if name not in op.backends:
            raise BackendError(f"{op.name}: has no backend {name!r}, only {', '.join(op.backends)}")
        reason = unavailable(name) or op.backends[name].refuse(args)
        if reason is not None:
            raise BackendError(f"{op.name}: backend {name} refused: {reason}")
        return name, op.backends[name].load()
    for candidate, implementation in op.live:
        if implementation.refuse(args) is None:
            return candidate, implementation.load()
    reasons = "; ".join(f"{n}: {reason}" for n, reason in _refusals(op, args))
    raise BackendError(f"{op.name}: no backend takes these arguments ({reasons})")


def describe(op: Op, args: Any) -> dict[str, str]:
    """Backend name -> "chosen", "able" or the reason for its refusal."""
    answers: dict[str, str] = {}
    chosen = _forced.get()
    for name, reason in _refusals(op, args):
        if reason is not None:
            answers[name] = reason
        elif chosen in (name, "auto"):
            answers[name], chosen = "chosen", name
        else:
            answers[name] = "able"
    return answers
