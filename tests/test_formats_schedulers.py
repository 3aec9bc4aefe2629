"""The schedule and the prediction of every scheduler's config as diffusers writes it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from budget import assert_within_budget

from fastdiff import schedules
from fastdiff.formats.schedulers import DISCRETE, EDM, FLOW, read_scheduler
from fastdiff.preconditioning import scalings

BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.01},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 8e-4, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    "trained": {"trained_betas": np.linspace(1e-3, 0.3, 100).tolist(), "num_train_timesteps": 100},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
}


def written(scheduler: object, folder: Path) -> dict[str, object]:
    """The config as `save_pretrained` writes it."""
    scheduler.save_pretrained(folder)
    return json.loads((folder / "scheduler_config.json").read_text())


@pytest.mark.parametrize("options", BETAS.values(), ids=BETAS)
def test_betas(options, tmp_path):
    theirs = diffusers.DDIMScheduler(**options)
    got = read_scheduler(written(theirs, tmp_path))
    assert got.prediction == options.get("prediction_type", "epsilon")
    abar = torch.from_numpy(got.schedule.alphas_cumprod.copy())
    # theirs is a product of up to 1,000 factors in float32, each rounded three times
    error = (theirs.alphas_cumprod.double() - abar).abs()
    assert (error <= 3 * len(abar) * torch.finfo(torch.float32).eps * abar.clamp(min=1e-4)).all()
    assert schedules.from_config(got.schedule.to_config()) == got.schedule


@pytest.mark.parametrize("name", DISCRETE)
def test_every_discrete_scheduler(name):
    """The options of each class, at its own defaults, give the alphabar of its betas."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    options = {n: p.default for n, p in parameters.items() if n not in ("self", "kwargs")}
    config = json.loads(json.dumps({"_class_name": name, **options}))
    got = read_scheduler(config)
    betas = {n: config[n] for n in ("beta_start", "beta_end", "beta_schedule")}
    theirs = diffusers.DDIMScheduler(**betas)
    abar = torch.from_numpy(got.schedule.alphas_cumprod.copy())
    error = (theirs.alphas_cumprod.double() - abar).abs()
    assert (error <= 3000 * torch.finfo(torch.float32).eps * abar).all()
    assert (got.prediction, got.time_scale) == ("epsilon", 1.0)
    clips = config.get("clip_sample", False)
    assert got.clip == (1.0 if clips else None)


@pytest.mark.parametrize("name", FLOW)
def test_flow(name, tmp_path):
    got = read_scheduler(written(getattr(diffusers, name)(shift=3.0), tmp_path))
    assert got.schedule == schedules.flow(3.0)
    assert (got.prediction, got.time_scale) == ("flow", 1000)


def test_flow_sigmas_of_a_multistep_solver(tmp_path):
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}
    for kind in (diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler):
        got = read_scheduler(written(kind(**options), tmp_path))
        assert got.schedule == schedules.flow(5.0) and got.prediction == "flow"


@pytest.mark.parametrize("name", EDM)
def test_edm(name, tmp_path):
    theirs = getattr(diffusers, name)(sigma_min=0.01, sigma_max=70.0, sigma_data=0.4)
    got = read_scheduler(written(theirs, tmp_path))
    assert got.schedule == schedules.edm(0.01, 70.0, 0.4) and got.prediction == "edm"
    # c_in, c_skip, c_out and c_noise of theirs are those of our "edm"
    c_skip, c_out, c_in, c_noise = scalings(got.schedule, "edm", 2.0)
    one, zero, sigma = torch.ones(()).double(), torch.zeros(()).double(), torch.tensor(2.0).double()
    for ours, value in (
        (c_in, theirs.precondition_inputs(one, sigma)),
        (c_skip, theirs.precondition_outputs(one, zero, sigma)),
        (c_out, theirs.precondition_outputs(zero, one, sigma)),
        (c_noise, theirs.precondition_noise(sigma)),
    ):
        exact = torch.tensor(ours, dtype=torch.float64)
        assert_within_budget(exact, value.double(), exact, ulps=4)


PLAIN = {
    "_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02,
    "beta_schedule": "linear", "num_train_timesteps": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "scheduler must be one of .* got 'ScoreSdeVe"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "scheduler must be one of"),
        ({"beta_schedule": "laplace"}, "beta_schedule of DDIMScheduler must be one of"),
        ({"prediction_type": "flow_prediction"}, "prediction_type of DDIMScheduler must be one of"),
        ({"timestep_type": "continuous"}, "timestep_type must be 'discrete', got 'continuous'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be num_train_timesteps=1000, got 2"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
         "prediction_type of EDMEulerScheduler must be one of"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
         r"use_dynamic_shifting must be False, .*schedules\.dynamic_shift\(tokens\)"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1},
         "shift_terminal must be None, got 0.1"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
         "prediction_type of UniPCMultistepScheduler must be one of"),
        ({"beta_end": 2.0}, "beta_end must obey"),
    ],
    # one row for each rule
)  # fmt: skip
def test_what_read_scheduler_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        read_scheduler({"prediction_type": "epsilon", **PLAIN, **change})


def test_betas_that_are_not_told_are_not_guessed():
    some = {k: v for k, v in PLAIN.items() if not k.startswith("beta")}
    with pytest.raises(ValueError, match=r"got no \['beta_start', 'beta_end', 'beta_schedule'\]"):
        read_scheduler(some)
