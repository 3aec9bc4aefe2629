"""Where diffusers is wrong the drop-in is right: always where diffusers has no picture, and by
corrected=True where it has one. That it is still wrong is tested as well."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers_defects import DEPARTS, FAILS, V
from peers import EPS, fixed_draw
from solver_cases import SHAPE, assert_same

from fastdiff.integrations import diffusers as drop_in
from fastdiff.integrations.diffusers import _noise
from fastdiff.integrations.diffusers._scheduler import DropIn

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning"
)


def each(table):
    return [
        pytest.param(defect, name, id=f"{key}-{name}")
        for key, defect in table.items()
        for name in defect.schedulers
    ]


def made(module, defect, name, **more):
    scheduler = getattr(module, f"{name}Scheduler")(**defect.config, **more)
    if name == "IPNDM":  # its own tables are float32 roots
        scheduler.set_timesteps(defect.steps)
        scheduler.betas = scheduler.betas.double()
        scheduler.alphas = (1 - scheduler.betas**2) ** 0.5
    else:
        scheduler.set_timesteps(defect.steps)
    return scheduler


def state(scheduler):
    """The first state and one output a call, in float64."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=SHAPE) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    return x, [rng.normal(size=SHAPE) for _ in scheduler.timesteps]


def states(scheduler, x, outputs, defect, monkeypatch, dtype=torch.float64):
    """The states of a run, and the noise of call i is that of a table's row i."""
    module = importlib.import_module(type(scheduler).__module__)
    if isinstance(scheduler, DropIn):  # its peer's own draws are read off, not made
        module = _noise
    sample, passed = torch.from_numpy(x).to(dtype), []
    with monkeypatch.context() as patched:
        if hasattr(module, "randn_tensor"):
            patched.setattr(module, "randn_tensor", lambda shape, **_: noise.reshape(shape))
            patched.setattr(_noise, "_FAST", ())  # so that all of it comes from there
        for i, (t, m) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
            noise = torch.from_numpy(fixed_draw(1, i)).to(dtype)
            if defect.learned:
                m = np.concatenate([m, V], axis=1)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, t)
            m = torch.from_numpy(m).to(dtype)
            sample = scheduler.step(m, t, sample, **defect.options)[0]
            passed.append(sample.double().numpy())
    return passed


def assert_right(got, scheduler, x, outputs, defect):
    wanted, largest = defect.oracle(scheduler, x, outputs), np.abs(x).max()
    if defect.learned:
        # the exponential is taken in float32: its argument, of up to 10, is rounded to EPS/2 of it
        scale = max(float(np.abs(w).max()) for w in wanted)
        worst = [float(np.abs(g - w).max()) for g, w in zip(got, wanted, strict=True)]
        assert max(worst) <= len(got) * 10 * EPS * scale, worst
    else:
        assert_same(got, wanted, defect.schedulers, largest)


ERRORS = (UnboundLocalError, IndexError, AssertionError, ZeroDivisionError, RuntimeError)


@pytest.mark.parametrize(("defect", "name"), each(FAILS))
def test_diffusers_still_fails(defect, name, monkeypatch):
    try:
        scheduler = made(diffusers, defect, name)
        x, outputs = state(scheduler)
        got = states(scheduler, x, outputs, defect, monkeypatch, torch.float32)
        failure = "NaN or infinity" if not np.isfinite(got[-1]).all() else "none: mended upstream?"
    except ERRORS as error:
        failure = type(error).__name__.lstrip("_")
    assert failure == defect.theirs


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("defect", "name"), each(FAILS))
def test_mended(defect, name, corrected, monkeypatch):
    scheduler = made(drop_in, defect, name, corrected=corrected)
    x, outputs = state(scheduler)
    got = states(scheduler, x, outputs, defect, monkeypatch)
    assert_right(got, scheduler, x, outputs, defect)


@pytest.mark.parametrize(("defect", "name"), each(DEPARTS))
def test_corrected(defect, name, monkeypatch):
    scheduler = made(drop_in, defect, name, corrected=True)
    x, outputs = state(scheduler)
    got = states(scheduler, x, outputs, defect, monkeypatch)
    assert_right(got, scheduler, x, outputs, defect)


@pytest.mark.parametrize(("defect", "name"), each(DEPARTS))
def test_default_keeps_the_picture(defect, name, monkeypatch):
    """diffusers still departs, and without the flag so does the drop-in, in the same way."""
    runs = []
    for module, more in ((diffusers, {}), (drop_in, {}), (drop_in, {"corrected": True})):
        scheduler = made(module, defect, name, **more)
        x, outputs = state(made(diffusers, defect, name))
        runs.append(np.stack(states(scheduler, x, outputs, defect, monkeypatch)))
    theirs, ours, right = runs
    assert np.isfinite(right).all()
    assert (np.isnan(theirs) == np.isnan(ours)).all()
    if np.isnan(theirs).any():
        return  # of a learned variance below 0, as in the table
    departure = np.abs(theirs - right).max()
    # diffusers' tables are float32; the departure is of another size than their rounding
    assert departure > 100 * EPS * np.abs(right).max(), "mended upstream?"
    assert np.abs(ours - theirs).max() < departure / 10


def test_the_code_of_the_page():
    page = (Path(__file__).parent.parent / "docs/diffusers_defects.md").read_text()
    scope = {"pipe": SimpleNamespace(scheduler=diffusers.PNDMScheduler(beta_end=0.012))}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/diffusers_defects.md", "exec"), scope)
    made = scope["pipe"].scheduler.config
    assert made.corrected and made.beta_end == 0.012
