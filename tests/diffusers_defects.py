"""What diffusers does wrongly or not at all, one entry each: how to meet it, and what is right.

An oracle gives the states of a run from the scheduler's own grid, the first state and the model
outputs: from a table of `fastdiff.solvers` (held against its paper in the tests of the solvers) or
a transcription of the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import oracles_adams
import torch
from peers import fixed_draw, schedule_of
from rows import run
from solver_cases import SHAPE, problem_of

from fastdiff import schedules, solvers
from fastdiff.schedules import Grid

V = np.tanh(np.random.default_rng(11).normal(size=SHAPE))  # a learned variance, as the network's


@dataclass
class Defect:
    """One row of docs/diffusers_defects.md.

    Args:
        schedulers: of diffusers, names without "Scheduler".
        config: of the constructor. ``steps``: to `set_timesteps`; ``options``: to `step`.
        theirs: what diffusers does, for the table.
        oracle: states of the run, from (scheduler, x, outputs).
        reason: what is right, for the table.
        learned: whether the model output carries a variance.
    """

    schedulers: tuple[str, ...]
    config: dict[str, Any]
    steps: int
    theirs: str
    oracle: Callable[..., list]
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    learned: bool = False


def fed(table, x, outputs, variance=V):
    feed = iter(outputs)
    return run(table, x, lambda *_: next(feed), fixed_draw, variance=lambda *_: variance)


def on_spacing(solver, spacing, **options):
    """A table on the library's own grid of that name."""

    def states(s, x, outputs):
        prediction = s.config.prediction_type
        if "DDIM" in type(s).__name__ or "DDPM" in type(s).__name__:
            options.setdefault("prediction", prediction)
        table = solvers.build(solver, schedule_of(s), s.num_inference_steps, spacing=spacing,
                              **options)  # fmt: skip
        return fed(table, x, outputs)

    return states


def scales(s):
    """alpha and sigma of the levels of a scheduler that counts in sigma/alpha, and a schedule."""
    levels = s.sigmas.double().numpy()
    if "EDM" in type(s).__name__:
        c = s.config
        return np.ones_like(levels), levels, schedules.edm(c.sigma_min, c.sigma_max, c.sigma_data)
    return 1 / np.hypot(1, levels), levels / np.hypot(1, levels), schedule_of(s)


def on_levels(solver, **options):
    """A table on the scheduler's levels; where one comes twice the state stays, and the solver
    begins anew behind it: it has no slope from before."""

    def states(s, x, outputs):
        alphas, sigmas, schedule = scales(s)
        outputs, found, begin = list(outputs), [], 0
        prediction = "edm" if schedule.kind == "edm" else s.config.prediction_type
        cuts = [i for i, (a, b) in enumerate(pairwise(sigmas)) if a == b]
        for cut in [*cuts, len(sigmas) - 1]:
            if cut > begin:
                piece = slice(begin, cut + 1)
                times = np.linspace(1, 0.5, cut + 1 - begin)
                if schedule.kind == "edm":
                    times = sigmas[piece]
                grid = Grid(times, alphas[piece], sigmas[piece])
                table = solvers.build_on(solver, schedule, grid, prediction=prediction, **options)
                draw = lambda stream, i, begin=begin: fixed_draw(stream, begin + i)  # noqa: E731
                feed = iter(outputs[begin:cut])
                found += run(table, x, lambda *_, feed=feed: next(feed), draw)
                x = found[-1]
            if cut < len(sigmas) - 1:
                found.append(x)
            begin = cut + 1
        return found

    return states


def near_zero(s, x, outputs):
    """diffusers' own steps to a sigma near 0, in float64: what they go to."""
    peer = next(c for c in type(s).__mro__ if c.__module__.startswith("diffusers."))
    twin = peer(**{k: v for k, v in s.config.items() if k not in ("noise", "corrected")})
    twin.set_timesteps(s.num_inference_steps)
    twin.sigmas = twin.sigmas.double()
    twin.sigmas[-1] = 1e-15
    x, states = torch.from_numpy(x), []
    for t, m in zip(twin.timesteps, outputs, strict=True):
        x = twin.step(torch.from_numpy(m), t, x)[0]
        states.append(x.numpy())
    return states


def inverse(s, x, outputs):
    table = solvers.build_inverse(
        "ddim_inverse", schedule_of(s), s.num_inference_steps, spacing="trailing", final="zero"
    )
    return fed(table, x, outputs)


def learned(s, x, outputs):
    """Nichol and Dhariwal 2021: the network gives the log of the variance itself."""
    table = solvers.build("ddpm", schedule_of(s), s.num_inference_steps, spacing="leading")
    states = []
    for i, (row, m) in enumerate(zip(table.rows, outputs, strict=True)):
        d = row.convert[0] * x + row.convert[1] * m
        x = row.x.get("x", 0.0) * x + row.x.get("m", 0.0) * m + row.x.get("d", 0.0) * d
        if row.draws:
            x = x + np.exp(0.5 * V) * fixed_draw(1, i)
        states.append(x)
    return states


def _pndm_problem(s, outputs, told):
    schedule = schedule_of(s)
    times = np.array([*told, -1.0])
    grid = Grid(times, schedule.alpha(times), schedule.sigma(times))
    p = problem_of(schedule, grid, s.config.prediction_type)
    feed = iter(outputs)
    p.network = lambda *_: next(feed)
    return p


def plms(s, x, outputs):
    p = _pndm_problem(s, outputs, dict.fromkeys(s.timesteps.tolist()))
    return oracles_adams.plms(p, x, 4)


def pndm(s, x, outputs):
    """Algorithm 2 of Liu et al. 2022 on the times that the network is told, middles as well."""
    told = s.timesteps.tolist()
    p = _pndm_problem(s, outputs, [*told[:12:4], *told[12:]])
    middles, states, ets = told[1:12:4], [], []
    feed = iter(outputs)
    transfer = oracles_adams._transfer
    for i in range(p.steps):
        now, then = p.at(i), p.at(i + 1)

        def slope(z, at):
            m, (_, alpha, sigma) = next(feed), at
            return m if p.prediction == "epsilon" else alpha * m + sigma * z

        ets = [*ets, slope(x, now)][-4:]
        if len(ets) > 3:
            x = transfer(p, x, now, then, oracles_adams._mixed(ets))
        else:
            t = middles[i]
            mid = (t, *p.scales_at(t))
            stages = [ets[-1]]
            for at in (mid, mid, then):
                states.append(transfer(p, x, now, at, stages[-1]))
                stages.append(slope(states[-1], at))
            a, b, c, d = stages
            x = transfer(p, x, now, then, (a + 2 * b + 2 * c + d) / 6)
        states.append(x)
    return states


def ipndm(s, x, outputs):
    alphas, sigmas = s.alphas.double().numpy(), s.betas.double().numpy()
    grid = Grid(np.arange(len(sigmas) - 1, -1.0, -1), alphas, sigmas)
    table = solvers.build_on(
        "ipndm", schedules.linear(), grid, prediction="v_prediction", denoise_last=False
    )
    return fed(table, x, outputs)


def constant(c):
    """The one step of a run that ends in c of (x, output)."""
    return lambda s, x, outputs: [c(s, x, outputs[0])]


def clean_at_once(s, x, m):
    """The prediction of x0, clipped to 1; the variance of 1e-20 that is added is of no size."""
    abar = float(s.alphas_cumprod[-1].double())
    x0 = np.clip((x - math.sqrt(1 - abar) * m) / math.sqrt(abar), -1, 1)
    return x0 + 1e-10 * fixed_draw(1, 0)


SD = {"beta_schedule": "scaled_linear"}
ZERO = {
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}  # fmt: skip
NAN = "NaN or infinity"
COSINE = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
KARRAS_END = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
NO_CLIP = {"clip_sample": False}
DDIM = ("DDIM", "DDIMParallel")
DDPM = ("DDPM", "DDPMParallel")

# no picture to keep: mended always
FAILS = {
    "ddpm-large-log": Defect(
        DDPM, {"variance_type": "fixed_large_log", **NO_CLIP}, 10, NAN,
        on_spacing("ddpm", "leading", variance="fixed_large"),
        "the standard deviation is the exponential of half the log, not its root",
    ),
    "ddim-zero-snr-eta": Defect(
        DDIM, {**ZERO, **SD, **NO_CLIP}, 10, NAN, on_spacing("ddim", "trailing", eta=1.0),
        "1 - abar' - std^2 is 0 and rounds to below it", {"eta": 1.0},
    ),
    "dpm-3-karras": Defect(
        ("DPMSolverMultistep",), {**SD, **KARRAS_END, "solver_order": 3}, 20, NAN,
        on_levels("dpmpp_multistep", order=3, lower_order_final=False),
        "the last sigma comes twice: a step of length 0 changes nothing",
    ),
    "dpm-2-beta": Defect(
        ("DPMSolverMultistep",),
        {**SD, "use_beta_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        50, NAN,
        on_levels("dpmpp_multistep", order=2, solver_type="heun", lower_order_final=False),
        "sigmas that come twice: behind one the solver begins anew",
    ),
    "dpm-3-noise-sde": Defect(
        ("DPMSolverMultistep",),
        {**SD, "algorithm_type": "sde-dpmsolver", "solver_order": 3,
         "final_sigmas_type": "sigma_min"},
        20, "UnboundLocalError",
        on_levels("dpm_multistep", order=3, eta=1.0, lower_order_final=False),
        "the third order of the SDE in terms of the noise",
    ),
    "edm-3-sde": Defect(
        ("EDMDPMSolverMultistep",), {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, 20,
        "UnboundLocalError",
        on_levels("dpmpp_multistep", order=3, eta=1.0, lower_order_final=False),
        "the third order of the SDE",
    ),
    "unipc-bh1": Defect(
        ("UniPCMultistep",), {**SD, "solver_type": "bh1"}, 10, NAN,
        on_levels("unipc", solver_type="bh1"), "to sigma 0: the predicted clean data",
    ),
    "unipc-noise": Defect(
        ("UniPCMultistep",), {**SD, "predict_x0": False}, 10, NAN,
        near_zero, "to sigma 0: the corrected state without its noise",
    ),
    "unipc-noise-bh1-3": Defect(
        ("UniPCMultistep",), {**SD, "predict_x0": False, "solver_type": "bh1", "solver_order": 3},
        10, NAN, near_zero, "to sigma 0: the corrected state without its noise",
    ),
    "unipc-full": Defect(
        ("UniPCMultistep",), {**SD, "lower_order_final": False}, 10, NAN,
        on_levels("unipc", lower_order_final=False), "to sigma 0: the predicted clean data",
    ),
    "unipc-full-3": Defect(
        ("UniPCMultistep",), {**SD, "lower_order_final": False, "solver_order": 3}, 10,
        "LinAlgError", on_levels("unipc", lower_order_final=False, order=3),
        "to sigma 0: the predicted clean data",
    ),
    "first-timestep-twice": Defect(
        ("DPMSolverMultistep",), COSINE, 50, "IndexError",
        on_levels("dpmpp_2m"),
        "the run begins at its first level, not at the second",
    ),
    "first-timestep-twice-unipc": Defect(
        ("UniPCMultistep",), COSINE, 20, "AssertionError", on_levels("unipc"), "the same",
    ),
    "first-timestep-twice-single": Defect(
        ("DPMSolverSinglestep",), COSINE, 20, "IndexError", on_levels("dpmpp_singlestep"),
        "the same",
    ),
    "unclip-one-step": Defect(
        ("UnCLIP",), {}, 1, "ZeroDivisionError", constant(clean_at_once),
        "one step, from the last timestep to clean data",
    ),
    "flow-terminal-one-step": Defect(
        ("FlowMatchEulerDiscrete", "FlowMatchLCM"), {"shift_terminal": 0.1}, 1, "IndexError",
        constant(lambda s, x, m: x - m),
        "its sigma is 0/0; one step begins at 1, and nothing is there to stretch",
    ),
}  # fmt: skip

PREVIOUS = "a step ends at the next timestep, not T // steps before"
# a picture that departs from the method: kept, and mended by corrected=True
DEPARTS = {
    "ddim-linspace": Defect(
        DDIM, {"timestep_spacing": "linspace", **NO_CLIP}, 10, "steps back by 100, not 111",
        on_spacing("ddim", "linspace"), PREVIOUS,
    ),
    "ddim-trailing": Defect(
        DDIM, {"timestep_spacing": "trailing", **NO_CLIP}, 7, "steps back by 142, not 143",
        on_spacing("ddim", "trailing"), PREVIOUS,
    ),
    "cogvideox-trailing": Defect(
        ("CogVideoXDDIM",), {"timestep_spacing": "trailing"}, 7, "steps back by 142, not 143",
        on_spacing("ddim", "trailing"), PREVIOUS,
    ),
    "ddim-inverse-trailing": Defect(
        ("DDIMInverse",), {"timestep_spacing": "trailing", **NO_CLIP}, 7,
        "begins 142 before, not 143", inverse, "a step begins where the one before ended",
    ),
    "plms-linspace": Defect(
        ("PNDM",), {"skip_prk_steps": True, "timestep_spacing": "linspace",
                    "set_alpha_to_one": True}, 10, "steps back by 100, not 111", plms, PREVIOUS,
    ),
    "plms-trailing": Defect(
        ("PNDM",), {"skip_prk_steps": True, "timestep_spacing": "trailing",
                    "set_alpha_to_one": True}, 7, "steps back by 142, not 143", plms, PREVIOUS,
    ),
    "plms-v": Defect(
        ("PNDM",), {"skip_prk_steps": True, "prediction_type": "v_prediction",
                    "set_alpha_to_one": True}, 10, "mixes v of different times", plms,
        "the slopes that are mixed are noise predictions",
    ),
    "pndm-v": Defect(
        ("PNDM",), {"prediction_type": "v_prediction", "set_alpha_to_one": True}, 10,
        "mixes v of different times", pndm, "the slopes that are mixed are noise predictions",
    ),
    "pndm-middle": Defect(
        ("PNDM",), {"set_alpha_to_one": True}, 40, "goes to t - 12 and tells the network t - 13",
        pndm, "a stage ends at the time that the network is told",
    ),
    "pndm-linspace": Defect(
        ("PNDM",), {"timestep_spacing": "linspace", "set_alpha_to_one": True}, 10,
        "steps back by 100, not 111", pndm, PREVIOUS,
    ),
    "ipndm-first": Defect(
        ("IPNDM",), {}, 10, "ignores its first output: 0/1e-8", ipndm,
        "x0 is -v where alpha is 0",
    ),
    "ddpm-large-end": Defect(
        DDPM, {"variance_type": "fixed_large", "timestep_spacing": "trailing", **NO_CLIP}, 10,
        "adds noise of variance beta to clean data",
        on_spacing("ddpm", "trailing", variance="fixed_large"), "clean data get no noise",
    ),
    "ddpm-range-end": Defect(
        DDPM, {"variance_type": "learned_range", "timestep_spacing": "trailing", **NO_CLIP}, 10,
        "adds noise to clean data", on_spacing("ddpm", "trailing", variance="learned_range"),
        "clean data get no noise", learned=True,
    ),
    "ddpm-learned": Defect(
        DDPM, {"variance_type": "learned", **NO_CLIP}, 10,
        "takes the root of a log variance, NaN where it is negative", learned,
        "the standard deviation is the exponential of half the log", learned=True,
    ),
    "dpm-3-sde": Defect(
        ("DPMSolverMultistep",),
        {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3,
         "final_sigmas_type": "sigma_min", "lower_order_final": False}, 12,
        "weighs the curvature with - 1/2 for + 1/2",
        on_levels("dpmpp_multistep", order=3, eta=1.0, lower_order_final=False),
        "its weight goes to 0 with the step, as h/3",
    ),
    "dpm-single-3-sde": Defect(
        ("DPMSolverSinglestep",),
        {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun",
         "final_sigmas_type": "sigma_min", "lower_order_final": False}, 12,
        "weighs the curvature with - 1/2 for + 1/2",
        on_levels("dpmpp_singlestep", order=3, eta=1.0, solver_type="heun",
                  lower_order_final=False),
        "its weight goes to 0 with the step, as h/3",
    ),
    "one-step": Defect(
        DDIM, {"timestep_spacing": "linspace", **NO_CLIP}, 1, "begins at timestep 0",
        on_spacing("ddim", "trailing"), "the one step begins at the last timestep",
    ),
}  # fmt: skip
