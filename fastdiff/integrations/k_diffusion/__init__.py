"""k-diffusion's sampling functions and model wrappers, with its signatures, on this library.

In place of ``import k_diffusion as K``: ``from fastdiff.integrations import k_diffusion as K``. The
functions stand in modules of the names that k-diffusion has (`sampling`, `external`, `layers`) and
here too; k-diffusion itself is not needed.
"""

from fastdiff.integrations.k_diffusion import external, layers, sampling
from fastdiff.integrations.k_diffusion.external import *  # noqa: F403
from fastdiff.integrations.k_diffusion.layers import *  # noqa: F403
from fastdiff.integrations.k_diffusion.sampling import *  # noqa: F403

__all__ = [
    "external",
    "layers",
    "sampling",
    *external.__all__,
    *layers.__all__,
    *sampling.__all__,
]
