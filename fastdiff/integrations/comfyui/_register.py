"""Names in the lists of ComfyUI's own KSampler node."""

from __future__ import annotations

import functools
from typing import Any

from fastdiff.integrations.comfyui import _schedules
from fastdiff.integrations.comfyui._names import DISCARD_PENULTIMATE, OFFERS, PREFIX
from fastdiff.integrations.comfyui._samplers import sampler_function


def register() -> list[str]:
    """Add ``fastdiff_<name>`` for each sampler and spacing to ComfyUI's lists.

    A second call changes nothing, and a name that is there already keeps its meaning.

    Returns:
        the names added.

    Raises:
        ImportError: ComfyUI's ``comfy`` can not be imported.
    """
    import comfy.samplers as known  # type: ignore[import-not-found]
    from comfy.k_diffusion import sampling  # type: ignore[import-not-found]

    added = []
    for name in OFFERS:
        full = PREFIX + name
        if full in known.SAMPLER_NAMES or hasattr(sampling, f"sample_{full}"):
            continue
        setattr(sampling, f"sample_{full}", sampler_function(name))
        _append(full, known.KSAMPLER_NAMES, known.SAMPLER_NAMES, known.KSampler.SAMPLERS)
        if name in DISCARD_PENULTIMATE:
            known.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS.add(full)
        added.append(full)
    for spacing in _schedules.NAMES:
        full = PREFIX + spacing
        if full in known.SCHEDULER_HANDLERS:
            continue
        handler = functools.partial(_handler, spacing)
        known.SCHEDULER_HANDLERS[full] = known.SchedulerHandler(handler)
        _append(full, known.SCHEDULER_NAMES, known.KSampler.SCHEDULERS)
        added.append(full)
    return added


def _handler(spacing: str, model_sampling: Any, steps: int) -> Any:
    """What ComfyUI calls a scheduler, by its argument names."""
    return _schedules.sigmas(model_sampling, spacing, steps)


def _append(name: str, *lists: list[str]) -> None:
    """To each list once; some of them are one and the same."""
    for names in lists:
        if name not in names:
            names.append(name)
