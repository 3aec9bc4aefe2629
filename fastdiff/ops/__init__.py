"""The operations: contract, argument checks and choice of backend, one file an op."""

from collections.abc import Callable
from typing import Any

from fastdiff import backends
from fastdiff.backends import Op
from fastdiff.ops import add_noise as _add_noise
from fastdiff.ops import brownian as _brownian
from fastdiff.ops import dynamic_threshold as _dynamic_threshold
from fastdiff.ops import film_norm as _film_norm
from fastdiff.ops import guidance_rescale as _guidance_rescale
from fastdiff.ops import modulate as _modulate
from fastdiff.ops import noise as _noise
from fastdiff.ops import reparameterize as _reparameterize
from fastdiff.ops import reverse_step as _reverse_step
from fastdiff.ops.add_noise import add_noise
from fastdiff.ops.brownian import brownian
from fastdiff.ops.dynamic_threshold import dynamic_threshold, quantile_abs
from fastdiff.ops.film_conv2d import film_conv2d
from fastdiff.ops.film_norm import film, film_norm
from fastdiff.ops.guidance_rescale import guidance_rescale
from fastdiff.ops.modulate import gated_residual, modulate
from fastdiff.ops.noise import Stream, as_seeds, randn
from fastdiff.ops.reparameterize import reparameterize
from fastdiff.ops.reverse_step import reverse_step

# Every op by name; a test walks it and fails where a folder lacks a listed file.
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        _add_noise.OP,
        _brownian.OP,
        _dynamic_threshold.OP,
        _film_norm.OP,
        _guidance_rescale.OP,
        _modulate.OP,
        _noise.OP,
        _reparameterize.OP,
        _reverse_step.OP,
    )
}

# Ops without a GPU kernel: there the reference runs, of a vendor's selection and copies.
CPU_ONLY: tuple[str, ...] = ("dynamic_threshold",)

# Ops made of others and of a vendor's call, without kernels of their own.
COMPOSED: tuple[str, ...] = ("film_conv2d",)

_PREPARE: dict[str, Callable[..., Any]] = {
    "add_noise": _add_noise.prepare,
    "brownian": _brownian.prepare,
    "dynamic_threshold": _dynamic_threshold.prepare,
    "film_norm": _film_norm.prepare,
    "guidance_rescale": _guidance_rescale.prepare,
    "modulate": _modulate.prepare,
    "noise": _noise.prepare,
    "reparameterize": _reparameterize.prepare,
    "reverse_step": _reverse_step.prepare,
}


def describe(op: str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Backend name -> "chosen", "able" or the reason why it refuses these arguments.

    Args:
        op: a name of `OPS`; the arguments are those of the op ("noise": of `randn`).

    Raises:
        ValueError: no such op. TypeError, ValueError: the op refuses the arguments.
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    return backends.describe(OPS[op], _PREPARE[op](*args, **kwargs))


def explain(op: str, *args: Any, **kwargs: Any) -> None:
    """Print which backend runs the op on these arguments, and why not the others.

    Args and errors: as `describe`.
    """
    for name, answer in describe(op, *args, **kwargs).items():
        print(f"{op}: {name:<10} {answer}")


__all__ = [
    "COMPOSED",
    "CPU_ONLY",
    "OPS",
    "Stream",
    "add_noise",
    "as_seeds",
    "brownian",
    "describe",
    "dynamic_threshold",
    "explain",
    "film",
    "film_conv2d",
    "film_norm",
    "gated_residual",
    "guidance_rescale",
    "modulate",
    "quantile_abs",
    "randn",
    "reparameterize",
    "reverse_step",
]
