"""fastdiff: samplers for diffusion models and VAEs, with their own kernels.

A solver is a table (`solvers.build`), one fused kernel runs any row of any table
(`ops.reverse_step`), one loop walks the rows (`Sampler`), and noise is a function of seed, stream,
step and element (`randn`).
"""

from typing import TYPE_CHECKING, Any

from fastdiff import ops, schedules, solvers
from fastdiff.adaptive import AdaptiveSampler
from fastdiff.backends import BackendError, use_backend
from fastdiff.checkpoints import load
from fastdiff.ops import explain, randn
from fastdiff.sampler import Sampler
from fastdiff.table import StepTable
from fastdiff.version import __version__

if TYPE_CHECKING:
    from fastdiff.integrations.accelerate import accelerate, restore

__all__ = [
    "AdaptiveSampler",
    "BackendError",
    "Sampler",
    "StepTable",
    "__version__",
    "accelerate",
    "explain",
    "load",
    "ops",
    "randn",
    "restore",
    "schedules",
    "solvers",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # sampling alone has no use for the integrations
    if name in ("accelerate", "restore"):
        from fastdiff.integrations import accelerate

        return getattr(accelerate, name)
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
