"""fastdiff's solvers, spacings and noise as nodes of ComfyUI.

In ``custom_nodes/<folder>/__init__.py`` one line is all::

    from fastdiff.integrations.comfyui import *

``python -m fastdiff.integrations.comfyui install PATH_TO_COMFYUI`` writes that file. Where ComfyUI
is running (its ``comfy.samplers`` is imported) the names also enter the lists of its KSampler
node, see `register`. Nothing here imports ComfyUI by itself; see docs/comfyui.md.
"""

from __future__ import annotations

import sys

from fastdiff.integrations.comfyui._names import OFFERS
from fastdiff.integrations.comfyui._nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from fastdiff.integrations.comfyui._noise import CounterNoise
from fastdiff.integrations.comfyui._register import register
from fastdiff.integrations.comfyui._samplers import sampler_function
from fastdiff.integrations.comfyui._schedules import sigmas

__all__ = [
    "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "OFFERS", "CounterNoise", "register",
    "sampler_function", "sigmas",
]  # fmt: skip

if "comfy.samplers" in sys.modules:
    register()
