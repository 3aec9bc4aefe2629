"""fastdiff: samplers for diffusion models and VAEs, with their own kernels.

A solver is a table (`solvers.build`), one fused kernel runs any row of any table
(`ops.reverse_step`), one loop walks the rows (`Sampler`), and noise is a function of seed, stream,
step and element (`randn`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdiff import ops, schedules, solvers
from fastdiff.backends import BackendError, use_backend
from fastdiff.ops import explain, randn
from fastdiff.sampler import Sampler
from fastdiff.table import StepTable
from fastdiff.version import __version__

if TYPE_CHECKING:
    from fastdiff.adaptive import AdaptiveSampler
    from fastdiff.checkpoints import load
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


# What a loop over a given model has no use for is imported when it is asked for.
_LATER = {
    "AdaptiveSampler": "fastdiff.adaptive",
    "accelerate": "fastdiff.integrations.accelerate",
    "load": "fastdiff.checkpoints",
    "restore": "fastdiff.integrations.accelerate",
}
_LATER_MODULES = ("adaptive", "checkpoints", "formats", "models")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in _LATER_MODULES:
        return import_module(f"fastdiff.{name}")
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
