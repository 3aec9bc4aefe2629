"""What StepTable derives of the solvers that keep an anchor, or are of one kind of schedule."""

from __future__ import annotations

import pytest

from fastdiff import schedules, solvers

LINEAR, EDM, FLOW = schedules.linear(), schedules.edm(), schedules.flow()
# solver, options, schedule, then rows, evaluations, history, noise, anchor and uncond of 5 steps
FAMILIES = {
    "flow_midpoint": ("flow_midpoint", {}, FLOW, (10, 10, 0, False, True, False)),
    "flow_heun3": ("flow_heun3", {}, FLOW, (15, 15, 2, False, True, False)),
    "flow_rk4": ("flow_rk4", {}, FLOW, (19, 19, 3, False, True, False)),
    "lcm": ("lcm", {}, LINEAR, (5, 5, 0, True, False, False)),
    "tcd": ("tcd", {}, LINEAR, (5, 5, 0, True, False, False)),
    "tcd-0": ("tcd", {"gamma": 0.0}, LINEAR, (5, 5, 0, False, False, False)),
    "consistency": ("consistency", {}, EDM, (5, 5, 0, True, False, False)),
    "euler_cfg_pp": ("euler_cfg_pp", {}, LINEAR, (5, 5, 0, False, False, True)),
    "euler_a_cfg_pp": ("euler_ancestral_cfg_pp", {}, LINEAR, (5, 5, 0, True, False, True)),
    "2s_a_cfg_pp": ("dpmpp_2s_ancestral_cfg_pp", {}, LINEAR, (9, 9, 0, True, True, True)),
    "2m_cfg_pp": ("dpmpp_2m_cfg_pp", {}, LINEAR, (5, 5, 0, False, True, True)),
    "res_cfg_pp": ("res_multistep_cfg_pp", {}, LINEAR, (5, 5, 0, False, True, True)),
    "ge_cfg_pp": ("gradient_estimation_cfg_pp", {}, LINEAR, (5, 5, 0, False, True, True)),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_derived_facts(case):
    name, options, schedule, facts = FAMILIES[case]
    t = solvers.build(name, schedule, 5, prediction="sample", **options)
    uncond = any(need.uncond for need in t.needs)
    assert (len(t), t.nfe, t.depth, t.stochastic, t.anchored, uncond) == facts
    assert t.name == name
