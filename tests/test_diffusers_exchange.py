"""Swapping a scheduler in place and back, saving it, and what diffusers' own code asks of it."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from budget import assert_within_budget
from diffusers_float64 import Float32Draws, in_float64
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import diffusers as drop_ins

# kept lists, a second state by name, nothing at all, a flow, noise
KINDS = (
    "UniPCMultistepScheduler", "HeunDiscreteScheduler", "DDIMScheduler", "PNDMScheduler",
    "FlowMatchEulerDiscreteScheduler", "SASolverScheduler",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of configs that it then changes
        yield


class Holder:
    """All of a pipeline that `accelerate` looks at."""

    def __init__(self, **components: Any) -> None:
        self.components = {"unet": nn.Conv2d(1, 1, 1), **components}


def _walk(scheduler: Any, x: Tensor, first: int, last: int) -> Tensor:
    generator = torch.Generator().manual_seed(first)
    more = (
        {"generator": generator}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for t in scheduler.timesteps[first:last]:
        x = scheduler.step(torch.sin(3 * x), t, x, **more).prev_sample
    return x


def _exact(name: str, steps: int, parts: tuple[tuple[int, int], ...], **config: Any) -> Tensor:
    """The walk by diffusers' own scheduler in float64."""
    scheduler = in_float64(getattr(diffusers, name)(**config))
    scheduler.set_timesteps(steps)
    x = X.double()
    with Float32Draws():
        for first, last in parts:
            x = _walk(scheduler, x, first, last)
    return x


X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


# --- accelerate and restore --------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_swap_in_the_middle_of_a_run(name: str) -> None:
    """The state of diffusers' scheduler goes on in ours, and ours in diffusers'."""
    peer, whole = getattr(diffusers, name)(), getattr(diffusers, name)()
    for scheduler in (peer, whole):
        scheduler.set_timesteps(8)
    steps = len(peer.timesteps)
    holder = Holder(scheduler=peer)
    x, want = _walk(peer, X, 0, 3), _walk(whole, X, 0, 3)
    fastdiff.accelerate(holder)
    x, want = _walk(peer, x, 3, 6), _walk(whole, want, 3, 6)
    fastdiff.restore(holder)
    assert type(peer) is getattr(diffusers, name)
    x, want = _walk(peer, x, 6, steps), _walk(whole, want, 6, steps)

    # the last operation of diffusers' own steps, with which the run ends
    assert_within_budget(x, want, _exact(name, 8, ((0, 3), (3, 6), (6, steps))), ulps=2)


def test_accelerate_swaps_the_scheduler_in_place_and_reports_it() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=3)
    scheduler.set_timesteps(5)
    config, timesteps = scheduler.config, scheduler.timesteps
    holder = Holder(scheduler=scheduler)
    report = fastdiff.accelerate(holder)
    assert report.fused["scheduler"] == "step of the scheduler"
    assert type(scheduler) is drop_ins.UniPCMultistepScheduler
    assert isinstance(scheduler, diffusers.UniPCMultistepScheduler)
    assert scheduler.config is config and scheduler.timesteps is timesteps
    assert fastdiff.accelerate(holder).fused == report.fused
    fastdiff.restore(holder)
    assert type(scheduler) is diffusers.UniPCMultistepScheduler
    assert not any("fastdiff" in key for key in vars(scheduler))
    fastdiff.restore(holder)
    assert type(scheduler) is diffusers.UniPCMultistepScheduler


def test_a_scheduler_made_as_a_drop_in_stays_one() -> None:
    holder = Holder(scheduler=drop_ins.DDIMScheduler(noise="counter"))
    assert "scheduler" in fastdiff.accelerate(holder).fused
    fastdiff.restore(holder)
    assert type(holder.components["scheduler"]) is drop_ins.DDIMScheduler
    assert holder.components["scheduler"].config.noise == "counter"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_swapped_scheduler_is_swapped_and_restored(duplicate: Any) -> None:
    name = "DPMSolverMultistepScheduler"
    scheduler, peer = (getattr(diffusers, name)(solver_order=3) for _ in range(2))
    for each in (scheduler, peer):
        each.set_timesteps(6)
    fastdiff.accelerate(Holder(scheduler=scheduler))
    middle, want = _walk(scheduler, X, 0, 3), _walk(peer, X, 0, 3)
    twin = duplicate(scheduler)
    assert type(twin) is getattr(drop_ins, name)
    exact, want = _exact(name, 6, ((0, 3), (3, 6)), solver_order=3), _walk(peer, want, 3, 6)
    for each in (scheduler, twin):
        assert_within_budget(_walk(each, middle, 3, 6), want, exact, ulps=1)  # the step rounds once
    fastdiff.restore(Holder(scheduler=twin))
    assert type(twin) is getattr(diffusers, name)
    assert type(scheduler) is getattr(drop_ins, name)


class DDIMScheduler(diffusers.DDIMScheduler):
    """A user's own, which may do anything."""


def _with_step_of_its_own() -> Any:
    scheduler = diffusers.DDIMScheduler()
    scheduler.step = scheduler.step
    return scheduler


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (diffusers.AmusedScheduler, "AmusedScheduler has no drop-in"),
        (DDIMScheduler, "is not the class of diffusers"),
        (_with_step_of_its_own, "DDIMScheduler has a step of its own"),
    ],
)
def test_a_scheduler_without_drop_in_is_left_with_the_reason(make: Any, reason: str) -> None:
    scheduler = make(mask_token_id=1) if make is diffusers.AmusedScheduler else make()
    before = type(scheduler)
    report = fastdiff.accelerate(Holder(scheduler=scheduler))
    assert reason in report.left["scheduler"] and type(scheduler) is before


def test_accelerate_of_a_model_imports_no_diffusers() -> None:
    code = (
        "import sys, torch, fastdiff\n"
        "class Pipe: components = {'m': torch.nn.GroupNorm(2, 4), 'scheduler': object()}\n"
        "fastdiff.accelerate(torch.nn.GroupNorm(2, 4))\n"
        "fastdiff.restore(Pipe) if fastdiff.accelerate(Pipe) else None\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'diffusers']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_requirement_of_one_scheduler_does_not_hide_the_others() -> None:
    code = (
        "import sys; sys.modules.update(torchsde=None, scipy=None)\n"
        "from fastdiff.integrations import diffusers as d\n"
        "d.DDIMScheduler()\n"
        "for name, needs in ('DPMSolverSDE', 'torchsde'), ('LMSDiscrete', 'scipy'):\n"
        "    assert name + 'Scheduler' in dir(d)\n"
        "    try: getattr(d, name + 'Scheduler')\n"
        "    except ImportError as error: assert needs in str(error)\n"
        "    else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchScheduler'"):
        drop_ins.NoSuchScheduler  # noqa: B018


# --- config and class --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(drop_ins._STATE))
def test_what_is_asked_of_a_class(name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="diffusers' class needs it")
    peer, ours = getattr(diffusers, name), getattr(drop_ins, name)
    assert issubclass(ours, peer)
    assert getattr(ours, "order", None) == getattr(peer, "order", None)
    # eta and generator are passed by pipelines to the steps that name them
    assert inspect.signature(ours.step) == inspect.signature(peer.step)
    assert inspect.signature(ours.set_timesteps) == inspect.signature(peer.set_timesteps)
    scheduler = ours()
    assert scheduler.compatibles == peer().compatibles
    assert getattr(scheduler, "init_noise_sigma", None) == getattr(peer(), "init_noise_sigma", None)
    assert dict(scheduler.config).keys() == dict(peer().config).keys()
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'does_not_exist'"):
        scheduler.does_not_exist  # noqa: B018


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_scheduler_loads_here_and_there(name: str, tmp_path: Path) -> None:
    peer, ours = getattr(diffusers, name), getattr(drop_ins, name)
    scheduler = ours(num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path / "ours")
    peer(num_train_timesteps=500).save_pretrained(tmp_path / "theirs")
    files = [(tmp_path / d / "scheduler_config.json").read_text() for d in ("ours", "theirs")]
    assert files[0] == files[1]
    for cls in (peer, ours):
        loaded = cls.from_pretrained(tmp_path / "ours")
        assert type(loaded) is cls and loaded.config.num_train_timesteps == 500
    ours(noise="counter").save_pretrained(tmp_path / "counter")
    assert ours.from_pretrained(tmp_path / "counter").config.noise == "counter"
    assert type(peer.from_pretrained(tmp_path / "counter")) is peer
    # from class to class and back
    other = drop_ins.EulerDiscreteScheduler.from_config(ours(noise="counter").config)
    assert ours.from_config(other.config).config.noise == "counter"
    assert "noise" not in ours.from_config(peer().config).config


def test_to_diffusers_keeps_config_and_state() -> None:
    name = "DPMSolverMultistepScheduler"
    scheduler = drop_ins.DPMSolverMultistepScheduler(solver_order=3, noise="counter")
    peer = diffusers.DPMSolverMultistepScheduler(solver_order=3)
    for each in (scheduler, peer):
        each.set_timesteps(6)
    middle, want = _walk(scheduler, X, 0, 3), _walk(peer, X, 0, 3)
    twin = drop_ins.to_diffusers(scheduler)
    assert type(twin) is getattr(diffusers, name)
    assert type(scheduler) is getattr(drop_ins, name) and scheduler.config.noise == "counter"
    assert dict(twin.config) == {k: v for k, v in scheduler.config.items() if k != "noise"}
    assert not any("fastdiff" in key for key in vars(twin))
    exact = _exact(name, 6, ((0, 3), (3, 6)), solver_order=3)
    # the last operation of diffusers' own step
    assert_within_budget(_walk(twin, middle, 3, 6), _walk(peer, want, 3, 6), exact, ulps=2)


def test_to_diffusers_of_another_object() -> None:
    with pytest.raises(TypeError, match=r"to_diffusers: scheduler must be of a class in fastdiff"):
        drop_ins.to_diffusers(diffusers.DDIMScheduler())
