"""What CFG++ and the stages of a flow do, beyond the transcriptions of test_solvers.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rows import run
from solver_cases import SCHEDULES, SHAPE, assert_same, draws, problem_of, start

import fastdiff
from fastdiff import Sampler, schedules, solvers

# solver with CFG++, its options, the one without it, and its options
PLAIN = {
    "euler_cfg_pp": ({}, "ddim", {}),
    "euler_ancestral_cfg_pp": ({}, "euler_ancestral", {}),
    "dpmpp_2m_cfg_pp": ({}, "dpmpp_2m", {}),
    "res_multistep_cfg_pp": ({}, "dpmpp_2m", {"solver_type": "heun"}),
    "gradient_estimation_cfg_pp": ({"ge_gamma": 1.0}, "ddim", {}),
}


@pytest.mark.parametrize("solver", PLAIN)
def test_without_a_difference_it_is_the_plain_solver(solver):
    """RES of second order is 2M with the exact weight of a linear change."""
    options, plain, plain_options = PLAIN[solver]
    for name, (schedule, _) in SCHEDULES.items():
        p = problem_of(schedule, schedule.points(8), "sample")
        tables = [
            solvers.build(n, schedule, 8, prediction="sample", **o)
            for n, o in ((solver, options), (plain, plain_options))
        ]
        x = start(schedule)
        got, want = (run(t, x, p.network, draws, uncond=p.network) for t in tables)
        assert_same(got, want, (solver, name))


def test_guided_x0_with_unconditional_noise():
    """Algorithm 2 of Chung et al. 2024: x' = alpha' D(guided) + sigma' eps(unconditional)."""
    schedule = schedules.linear()
    table = solvers.build("euler_cfg_pp", schedule, 5)
    rng = np.random.default_rng(1)
    x, m, u = (rng.normal(size=SHAPE) for _ in range(3))
    (got, *_) = run(table, x, lambda *_: m, draws, uncond=lambda *_: u)
    a, s = table.alphas, table.sigmas
    want = a[1] * (x - s[0] * m) / a[0] + s[1] * u
    assert_same([got], [want], "one step", float(np.abs(x / a[0]).max()))


@pytest.mark.parametrize("solver", PLAIN)
def test_the_sampler_runs_it(solver):
    """The loop hands the unconditional output on beside the guided one."""
    schedule = schedules.linear()
    table = solvers.build(solver, schedule, 4)
    seen = []

    def model(x, t, shift):
        seen.append(float(shift.reshape(-1)[0]))
        return torch.tanh(x + shift.reshape(-1, 1))

    sampler = Sampler(model, table, guidance=0.6)
    shifts = {"cond": {"shift": torch.full((2,), 0.5)}, "uncond": {"shift": torch.full((2,), -0.5)}}
    got = sampler((3,), seeds=[1, 2], **shifts).double().numpy()

    def network(shift):
        return lambda x, _: np.tanh(x + shift)

    def guided(x, t):
        return network(-0.5)(x, t) + 0.6 * (network(0.5)(x, t) - network(-0.5)(x, t))

    def noise(stream, step):
        return fastdiff.randn([1, 2], (3,), step=step, stream=stream).double().numpy()

    x = noise(0, 0) * table.init_sigma
    want = run(table, x, guided, noise, uncond=network(-0.5))
    # float32: a row rounds terms of the size of x0 = (x - sigma m)/alpha, 8 times at most
    sizes = [np.abs(s).max() / a for s, a in zip([x, *want], [*table.alphas, 1.0], strict=True)]
    assert np.abs(got - want[-1]).max() <= 8 * float(np.finfo(np.float32).eps) * sum(sizes)


@pytest.mark.parametrize("solver", ["flow_midpoint", "flow_heun3", "flow_rk4"])
def test_the_sampler_runs_stages_on_a_flow(solver):
    """Slopes in the history and the state in the anchor, on the backend that it chooses."""
    table = solvers.build(solver, schedules.flow(), 4, prediction="flow")
    got = Sampler(lambda x, t: torch.sin(x), table)((3,), seeds=[1, 2]).double().numpy()
    x = fastdiff.randn([1, 2], (3,)).double().numpy()
    want = run(table, x, lambda x, _: np.sin(x), lambda *_: None)
    # float32, with slopes (x - x0)/t: a row rounds terms of the size of x/t, 8 times at most
    sizes = [np.abs(s).max() / t for s, t in zip([x, *want[:-1]], table.sigmas, strict=True)]
    assert np.abs(got - want[-1]).max() <= 8 * float(np.finfo(np.float32).eps) * sum(sizes)
