"""Memory that a step's result takes is used again, and never while somebody can read it."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tables import needs_extension
from torch import Tensor

import fastdiff
from fastdiff.integrations import diffusers as ours
from fastdiff.ops._results import _SMALLEST

STEPS = 8
SHAPE = (2, 4, 80, 80)
X = fastdiff.randn(range(2), SHAPE[1:])
assert X.nbytes >= _SMALLEST
# their noise samplers (torchsde) hold what they hold
SAMPLED = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' grids by numpy's and scipy's older ways
        yield


def names() -> list[str]:
    """The classes whose `step` has the usual arguments."""
    usual = ["model_output", "timestep", "sample"]
    return [
        name
        for name in sorted(ours._STATE)
        if name not in SAMPLED
        and list(inspect.signature(getattr(ours, name).step).parameters)[1:4] == usual
    ]


def run(name: str, hold: Callable[[Tensor], Any]) -> tuple[list[Any], list[Tensor]]:
    """What `hold` keeps of every sample of a run, and copies of the samples."""
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(2 if name == "SCMScheduler" else STEPS)  # it allows no other
    held, copies, x = [], [], X
    # the last of SCM's three timesteps is no step
    for i, t in enumerate(scheduler.timesteps[: 2 if name == "SCMScheduler" else None]):
        output = fastdiff.randn(range(9 * i, 9 * i + 2), SHAPE[1:])
        x = scheduler.step(output, t, x, return_dict=False)[0]
        held.append(hold(x))
        copies.append(x.clone())
    return held, copies


@pytest.mark.parametrize("name", names())
def test_samples_die_without_a_garbage_collection(name: str) -> None:
    # a cycle that holds a sample costs its memory, and the time to fault new memory in
    gc.collect()
    gc.disable()
    try:
        held, _ = run(name, weakref.ref)
        alive = sum(ref() is not None for ref in held)
    finally:
        gc.enable()
    assert alive == 0  # the scheduler is gone, and nobody else holds one


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "the sample": lambda x: x,
    "a view": lambda x: x[1, 2:],
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "numpy": lambda x: x.numpy(),
    "its storage": lambda x: x.untyped_storage(),
    "dlpack": lambda x: torch.utils.dlpack.to_dlpack(x),
    "shared with processes": lambda x: x.share_memory_().numpy().ctypes.data and x,
}


def whole(held: Any) -> Tensor:
    """What was held, as the samples' elements."""
    if isinstance(held, torch.UntypedStorage):
        return torch.empty(0).set_(held).view(SHAPE)
    if type(held).__name__ == "PyCapsule":
        return torch.utils.dlpack.from_dlpack(held)
    return torch.as_tensor(held)


@needs_extension
@pytest.mark.parametrize("name", ("DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"))
@pytest.mark.parametrize("way", HOLDS)
def test_what_is_held_keeps_its_content(way: str, name: str) -> None:
    held, copies = run(name, HOLDS[way])
    for kept, copy in zip(held, copies, strict=True):
        want = copy[1, 2:] if way == "a view" else copy
        assert torch.equal(whole(kept), want)


@needs_extension
def test_what_is_dropped_is_used_again() -> None:
    addresses, _ = run("DDIMScheduler", lambda x: x.data_ptr())
    assert len(set(addresses)) <= 3
