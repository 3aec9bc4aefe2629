"""No step of a drop-in scheduler waits for a device or passes over memory more than once."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from tables import needs_extension
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.integrations import diffusers as drop_ins

STEPS = 6
X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)

# what makes the host wait, or copies from one device to the other
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy", "aten::equal")
# of these, what diffusers' noise samplers do by themselves (torchsde), and the ends of their spans
SAMPLED = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
# makes room, or another view, and reads nothing
ALLOCATES = ("aten::empty", "aten::empty_like", "aten::unbind", "aten::detach", "aten::view")
# the noise, and the caller's tensors where diffusers keeps them and a row has to write them
COPIES = ("aten::randn", "aten::copy_", "aten::clone")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' grids by numpy's and scipy's older ways
        yield


class Ops(TorchDispatchMode):
    """Counts torch's operations; ``large`` those on tensors of the sample's size."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.large: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        self.all[name] += 1
        leaves = tree_leaves((args, kwargs or {}, out))
        if any(isinstance(t, Tensor) and t.numel() >= X.numel() for t in leaves):
            self.large[name] += 1
        return out


def _run(scheduler: Any, device: str = "cpu", debug: bool = False) -> Ops:
    """The operations of all steps of a run; the model's are not among them.

    Args:
        debug: CUDA raises where the host waits for it; the caller sets that back.
    """
    two = isinstance(scheduler, drop_ins.SCMScheduler)  # diffusers' class allows no other number
    steps = 2 if two else STEPS
    place = {"device": device} if device != "cpu" else {}
    scheduler.set_timesteps(steps, **place)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    named = inspect.signature(scheduler.step).parameters
    more: dict[str, Any] = {"eta": 1.0} if "eta" in named else {}
    if "generator" in named:
        more["generator"] = torch.Generator().manual_seed(0)
    x, ops = X.to(device), Ops()
    if debug:
        torch.cuda.set_sync_debug_mode("error")
    for t in scheduler.timesteps[: steps if two else None]:
        m = torch.tanh(x)
        with ops:
            if "timestep_back" in named:
                more["old_pred_original_sample"] = None
                x = scheduler.step(m, timestep=t, timestep_back=None, sample=x, **more)[0]
            else:
                x = scheduler.step(m, t, x, **more, return_dict=False)[0]
    if debug:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x).all()
    return ops


def _make(name: str, noise: str) -> Any:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="diffusers' class needs it")
    return getattr(drop_ins, name)(noise=noise)


NAMES = sorted(drop_ins._STATE)


@needs_extension  # the reference is made of torch's operations
@pytest.mark.parametrize("noise", ["generator", "counter"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_wait_for_nothing(name: str, noise: str) -> None:
    """Once a step has been met: at the first run, or at the second with what was kept from that."""
    scheduler = _make(name, noise)
    first, _, third = (_run(scheduler) for _ in range(3))
    allowed = {*ALLOCATES, *COPIES}
    if name not in SAMPLED:
        assert {op: third.all[op] for op in WAITS if third.all[op]} == {}
        # the very first run traces diffusers' code, on tensors of a few elements
        assert set(first.large) <= allowed
    elif noise == "generator":
        return  # torchsde's tree is thousands of passes
    assert set(third.large) <= allowed
    assert third.large["aten::randn"] == 0 or noise == "generator"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAMPLED])
def test_steps_wait_for_no_gpu(name: str) -> None:
    """CUDA's own count: from the second run on, any synchronisation is an error."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scheduler = _make(name, "counter")
    _run(scheduler, "cuda")
    _run(scheduler, "cuda")
    before = torch.cuda.get_sync_debug_mode()
    try:
        _run(scheduler, "cuda", debug=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)
