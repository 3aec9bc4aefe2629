"""The moments, attributes and timesteps of guided-diffusion's process against the transcription."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from guided_diffusion_cases import CASES, SHAPE, STEPS, make, model_of, start
from guided_diffusion_oracle import betas_of
from solver_cases import assert_same

from fastdiff.integrations.guided_diffusion import space_timesteps


@pytest.mark.parametrize("case", CASES)
def test_moments(case):
    diffusion, oracle = make(case)
    model, x0, x = model_of(diffusion), start(), 0.5 * start().flip(0)
    for t in (0, 1, diffusion.num_timesteps - 1):
        index, bar = torch.full((2,), t), oracle.bar[t]
        got = diffusion.p_mean_variance(model, x, index)
        want, variance, log = oracle.evaluate(model, x, t, True, None, {})
        expected = {
            "mean": oracle.mean(want, x, t),
            "variance": variance,
            "log_variance": log,
            "pred_xstart": want,
        }
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert got[key].shape == SHAPE
            assert_same([got[key].numpy()], [value.numpy()], (case, t, key))
        mean, variance, log = diffusion.q_posterior_mean_variance(x0, x, index)
        assert_same([mean.numpy()], [oracle.mean(x0, x, t).numpy()], (case, t))
        tilde = [oracle.beta_tilde(s) for s in (t, max(t, 1))]
        assert_same([variance.numpy()], [np.full(SHAPE, tilde[0])], (case, t))
        assert_same([log.numpy()], [np.log(np.full(SHAPE, tilde[1]))], (case, t))
        mean, variance, log = diffusion.q_mean_variance(x0, index)
        assert_same([mean.numpy()], [bar**0.5 * x0.numpy()], (case, t))
        assert_same([variance.numpy()], [np.full(SHAPE, 1 - bar)], (case, t))
        assert_same([log.numpy()], [np.log(np.full(SHAPE, 1 - bar))], (case, t))
        noisy = bar**0.5 * x0 + (1 - bar) ** 0.5 * x
        assert_same([diffusion.q_sample(x0, index, x).numpy()], [noisy.numpy()], (case, t))
    torch.manual_seed(2)
    drawn = diffusion.q_sample(x0, torch.tensor([0, 1]))
    torch.manual_seed(2)
    assert torch.equal(drawn, diffusion.q_sample(x0, torch.tensor([0, 1]), torch.randn_like(x0)))


@pytest.mark.parametrize("case", CASES)
def test_attributes(case):
    diffusion, oracle = make(case)
    times = range(diffusion.num_timesteps)
    assert diffusion.timestep_map == oracle.kept
    assert diffusion.original_num_steps == STEPS
    for got, want in (
        (diffusion.alphas_cumprod, oracle.bar),
        (diffusion.alphas_cumprod_prev, [oracle.before(t) for t in times]),
        (diffusion.alphas_cumprod_next, [oracle.after(t) for t in times]),
        (diffusion.betas, [oracle.beta(t) for t in times]),
        (diffusion.posterior_variance, [oracle.beta_tilde(t) for t in times]),
    ):
        assert_same([got], [np.array(want)], case)
    if not CASES[case][0].get("timestep_respacing"):
        name = CASES[case][0].get("noise_schedule", "linear")
        assert_same([diffusion.betas], [np.array(betas_of(name, STEPS))], case)


# steps, counts, the timesteps, why
SPACED = (
    (10, "10", range(10), "all"),
    (10, "4", (0, 3, 6, 9), "both ends"),
    (8, [3], (0, 4, 7), "3.5 is rounded to the even 4"),
    (300, "1,2,3", (0, 100, 199, 200, 250, 299), "250 is a half rounded to even"),
    (11, "2,2", (0, 5, 6, 10), "the first section is the longer"),
    (9, "3,0,1", (0, 1, 2, 6), "a section left out"),
    (1000, "ddim50", range(0, 1000, 20), "a whole stride"),
    (1000, "ddim3", (0, 334, 668), "a stride that leaves a rest"),
)


@pytest.mark.parametrize(("steps", "counts", "want"), [case[:3] for case in SPACED])
def test_space_timesteps(steps, counts, want):
    assert space_timesteps(steps, counts) == set(want)


def test_halves_follow_the_sum():
    """Where a product and a sum differ in the last bit, the sum decides."""
    differs = 0
    for count in range(2, 251):
        at, want = 0.0, set()
        for _ in range(count):
            want.add(round(at))
            at += 249 / (count - 1)
        assert space_timesteps(250, str(count)) == want
        differs += want != {round(i * 249 / (count - 1)) for i in range(count)}
    assert differs > 0  # so that the case is met at all
