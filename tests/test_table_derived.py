"""What StepTable derives of the rows of a solver."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff import schedules, solvers

# name, options: rows, evaluations, depth, stochastic of 5 steps to clean data
DERIVED = {
    "ddpm": ("ddpm", {}, (5, 5, 0, True)),
    "ddpm-learned": ("ddpm", {"variance": "learned_range"}, (5, 5, 0, True)),
    "ddim": ("ddim", {}, (5, 5, 0, False)),
    "ddim-eta": ("ddim", {"eta": 0.1}, (5, 5, 0, True)),
    "euler": ("euler", {}, (5, 5, 0, False)),
    "euler-churn": ("euler", {"s_churn": 1.0}, (10, 5, 0, True)),
    "euler_ancestral": ("euler_ancestral", {}, (5, 5, 0, True)),
    "euler_ancestral-0": ("euler_ancestral", {"eta": 0.0}, (5, 5, 0, False)),
    "heun": ("heun", {}, (9, 9, 1, False)),
    "heun-churn": ("heun", {"s_churn": 1.0}, (14, 9, 1, True)),
    "dpmpp_2m": ("dpmpp_2m", {}, (5, 5, 1, False)),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, (5, 5, 1, True)),
    "dpmpp_2m_sde-0": ("dpmpp_2m_sde", {"eta": 0.0}, (5, 5, 1, False)),
    "dpmpp_multistep": ("dpmpp_multistep", {}, (5, 5, 1, False)),
    "dpmpp_multistep-3-sde": ("dpmpp_multistep", {"order": 3, "eta": 1.0}, (5, 5, 2, True)),
    "dpm_multistep": ("dpm_multistep", {}, (5, 5, 1, False)),
    "dpm_multistep-3-sde": ("dpm_multistep", {"order": 3, "eta": 1.0}, (5, 5, 2, True)),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}, (5, 5, 2, True)),
    "dpmpp_singlestep": ("dpmpp_singlestep", {}, (5, 5, 1, False)),
    "dpmpp_singlestep-sde": ("dpmpp_singlestep", {"order": 3, "eta": 1.0}, (5, 5, 2, True)),
    "dpm_singlestep": ("dpm_singlestep", {"order": 3}, (5, 5, 2, False)),
    "dpm_fast": ("dpm_fast", {}, (5, 5, 2, False)),
    "dpm_fast-eta": ("dpm_fast", {"eta": 1.0}, (5, 5, 2, True)),
    "dpm_2": ("dpm_2", {}, (9, 9, 1, False)),
    "dpm_2-churn": ("dpm_2", {"s_churn": 1.0}, (14, 9, 1, True)),
    "dpm_2_ancestral": ("dpm_2_ancestral", {}, (9, 9, 1, True)),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}, (9, 9, 1, True)),
    "unipc": ("unipc", {}, (5, 5, 2, False)),
    "unip": ("unipc", {"corrector": False}, (5, 5, 1, False)),
    "sa_solver": ("sa_solver", {}, (5, 5, 2, True)),
    "sa_solver_pece": ("sa_solver", {"pece": True}, (9, 9, 2, True)),
    "dpmpp_sde": ("dpmpp_sde", {}, (9, 9, 0, True)),
    "dpmpp_sde-late": ("dpmpp_sde", {"r": 0.7}, (9, 9, 1, True)),
    "seeds_2": ("seeds_2", {}, (9, 9, 1, True)),
    "seeds_3": ("seeds_3", {}, (13, 13, 2, True)),
    "heunpp2": ("heunpp2", {}, (12, 12, 2, False)),
    "er_sde": ("er_sde", {}, (5, 5, 2, True)),
    "res_multistep": ("res_multistep", {}, (5, 5, 1, False)),
    "res_multistep_ancestral": ("res_multistep_ancestral", {}, (5, 5, 1, True)),
}
ANCHORED = {"dpmpp_sde", "dpmpp_sde-late", "heunpp2"}
REPEATS = {"heunpp2"}  # looks a level ahead before h0 is read


@pytest.mark.parametrize("case", DERIVED)
def test_derived_facts(case):
    name, options, (rows, nfe, depth, stochastic) = DERIVED[case]
    t = solvers.build(name, schedules.linear(), 5, **options)
    assert (len(t), t.nfe, t.depth, t.stochastic, t.anchored) == (
        rows, nfe, depth, stochastic, case in ANCHORED,
    )  # fmt: skip
    assert t.name == name and t.prediction == "epsilon" and t.sigma_data == 0.5
    evaluates = np.array([r.evaluates for r in t.rows])
    assert (np.isfinite(t.times) == evaluates).all() and evaluates.sum() == nfe
    plain = [i for i, r in enumerate(t.rows) if r.evaluates and "h0" not in r.x]
    falls = np.diff(t.sigmas[plain] / t.alphas[plain]) < 0
    assert falls.all() == (case not in REPEATS)
    for r, need in zip(t.rows, t.needs, strict=True):
        assert need.output == r.evaluates and need.seeds == bool(r.draws)
        assert need.variance == (r.log_variance is not None)
        assert not need.uncond and (not (need.anchor or need.writes_anchor) or t.anchored)
