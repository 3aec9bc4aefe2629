"""Tables against k-diffusion's own samplers, in float64 on the same network and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peers import denoiser, k_sampling
from rows import run
from solver_cases import SPACINGS, assert_same, draws, problem_of, start

from fastdiff import schedules, solvers

CHURN = {"s_churn": 3.0, "s_noise": 1.003}
K_CASES = {
    "euler": ({}, "deterministic"),
    "euler-churn": (CHURN, "noise at every level"),
    "euler_ancestral": ({"eta": 0.7, "s_noise": 1.01}, "options"),
    "heun": ({}, "deterministic"),
    "heun-churn": (CHURN, "noise at every level"),
    "dpmpp_2m": ({}, "deterministic"),
    "dpmpp_2m_sde": ({}, "default"),
    "dpmpp_2m_sde-heun": ({"eta": 0.4, "s_noise": 1.01, "solver_type": "heun"}, "options"),
}


@pytest.mark.parametrize("name", ["linear", "edm"])
@pytest.mark.parametrize("case", K_CASES)
def test_k_diffusion(case, name, monkeypatch):
    sampling = k_sampling()
    solver, (options, _) = case.split("-")[0], K_CASES[case]
    schedule = {"linear": schedules.linear(), "edm": schedules.edm()}[name]
    for prediction in ("epsilon", "sample"):
        for spacing in SPACINGS[schedule.kind]:
            for steps in (1, 2, 10, 30):
                if steps == 1 and "sde" in case:
                    continue  # UnboundLocalError in k-diffusion 0.1.1: h of a lone last step
                grid = schedule.points(steps, spacing)
                p = problem_of(schedule, grid, prediction)
                table = solvers.build(
                    solver, schedule, steps, prediction=prediction, spacing=spacing, **options
                )
                x = start(schedule)
                got = run(table, x, p.network, draws)
                denoise = denoiser(p, p.levels, grid.times)
                calls = iter(range(10**6))
                stride = len(table.rows) // steps + ("heun" in case)
                kind = 2 if "churn" in case else 1

                def noise(*_, calls=calls, stride=stride, kind=kind):
                    return torch.from_numpy(draws(kind, next(calls) * (stride if kind == 2 else 1)))

                monkeypatch.setattr(torch, "randn_like", noise)
                more = {} if "ancestral" not in case and "sde" not in case else {
                    "noise_sampler": noise
                }  # fmt: skip
                want = getattr(sampling, f"sample_{solver}")(
                    denoise, torch.from_numpy(x / grid.alphas[0]), torch.tensor(p.levels),
                    disable=True, **options, **more,
                )  # fmt: skip
                sizes = (
                    np.abs(g).max() / a for g, a in zip(got[:-1], table.alphas[1:], strict=True)
                )
                largest = max([np.abs(x).max() / grid.alphas[0], *sizes])
                label = (case, name, prediction, spacing, steps)
                assert_same([got[-1]], [want.numpy()], label, largest)
