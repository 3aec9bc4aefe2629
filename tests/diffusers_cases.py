"""Factors of the covering designs: for each scheduler of diffusers the options it takes.

A level is a dict whose entries are merged into a case: plain keys go to the constructor, keys that
start with "set:" to `set_timesteps`, with "step:" to every `step`. Level 0 of every factor is
diffusers' default.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import numpy as np
from covering import Row, covering

Level = dict[str, Any]


def _levels(name: str, *values: Any) -> list[Level]:
    return [{}, *({name: v} for v in values)]


def _flag(name: str, value: Any = True) -> list[Level]:
    return _levels(name, value)


# 1 to 3 are the short runs that multistep rules treat apart; 50 is the longest in common use
STEPS: list[Level] = [{"set:num_inference_steps": n} for n in (10, 1, 2, 3, 21, 50)]
# the linear default, Stable Diffusion's and the cosine one, which ends in alphas near 0
BETAS: list[Level] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
]
SPACING = _levels("timestep_spacing", "linspace", "leading", "trailing")
OFFSET = _flag("steps_offset", 1)
ZERO_SNR = _flag("rescale_betas_zero_snr")
EPSILON_V = _flag("prediction_type", "v_prediction")
EPSILON_V_SAMPLE = [*EPSILON_V, {"prediction_type": "sample"}]
# diffusers drops a variance from epsilon alone
WITH_FLOW = [
    *EPSILON_V_SAMPLE,
    {"prediction_type": "flow_prediction"},
    {"variance_type": "learned_range"},
]
WITHOUT_VARIANCE = WITH_FLOW[:-1]
ONE_TO_ONE = _flag("set_alpha_to_one", False)
THRESHOLD: Level = {
    "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5,
}  # fmt: skip
CLIPS: list[Level] = [{}, {"clip_sample": False}, {"clip_sample_range": 2.0}]
KARRAS: list[Level] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
SIGMAS: list[Level] = [
    *KARRAS,
    {"use_flow_sigmas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0},
]
DYNAMIC: list[Level] = [
    *SIGMAS,
    {"use_flow_sigmas": True, "use_dynamic_shifting": True, "set:mu": 0.9},
]
FINAL = _flag("final_sigmas_type", "sigma_min")
CHURN: list[Level] = [
    {},
    {"step:s_churn": 3.0, "step:s_noise": 1.007},
    {"step:s_churn": 0.4, "step:s_tmin": 0.05, "step:s_tmax": 50.0},
]
_LADDER = [999, 850, 700, 500, 250, 100, 20]
# a grid of the caller's own replaces the number of steps
OWN_TIMESTEPS: Level = {"set:timesteps": _LADDER, "set:num_inference_steps": None}
OWN_SIGMAS: Level = {
    "set:sigmas": [1.0, 0.9, 0.75, 0.5, 0.2, 0.05], "set:num_inference_steps": None,
}  # fmt: skip

_DDIM = {
    "steps": STEPS,
    "betas": BETAS,
    "prediction": EPSILON_V_SAMPLE,
    "spacing": SPACING,
    "offset": OFFSET,
    "zero_snr": ZERO_SNR,
    "one": ONE_TO_ONE,
    "clip": CLIPS,
}
_ETA: dict[str, list[Level]] = {
    "clip": [*CLIPS, {**THRESHOLD, "clip_sample": False}],
    "eta": [{}, {"step:eta": 0.5}, {"step:eta": 1.0}],
    "corrected": _flag("step:use_clipped_model_output"),
}
_DDPM = {
    "steps": [*STEPS, OWN_TIMESTEPS],
    "betas": [*BETAS, {"beta_schedule": "sigmoid"}],
    "prediction": EPSILON_V_SAMPLE,
    "spacing": SPACING,
    "offset": OFFSET,
    "zero_snr": ZERO_SNR,
    "clip": [*CLIPS, {**THRESHOLD, "clip_sample": False}],
    "variance": _levels(
        "variance_type",
        "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range",
    ),
}  # fmt: skip
_K = {
    "steps": STEPS,
    # some constructors set the longest grid, in a second if it has 1000 steps
    "train": [{"num_train_timesteps": 60, "beta_end": 0.15}],
    "betas": BETAS,
    "prediction": EPSILON_V_SAMPLE,
    "spacing": SPACING,
    "offset": OFFSET,
    "sigmas": KARRAS,
}
_DPM = {
    "steps": STEPS,
    "betas": BETAS,
    "prediction": WITH_FLOW,
    "spacing": SPACING,
    "offset": OFFSET,
    "sigmas": SIGMAS,
    "order": _levels("solver_order", 1, 3),
    "threshold": [{}, THRESHOLD],
    "lower": _flag("lower_order_final", False),
    "algorithm": [
        {},
        {"algorithm_type": "dpmsolver"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver"},
    ],
    "solver": _flag("solver_type", "heun"),
    "lambda": _flag("lambda_min_clipped", -5.1),
}
_FLOW = {
    "steps": [*STEPS, OWN_SIGMAS],
    "shift": _flag("shift", 3.0),
    "dynamic": [{}, {"use_dynamic_shifting": True, "set:mu": 0.9}],
    "time_shift": _flag("time_shift_type", "linear"),
    "terminal": _flag("shift_terminal", 0.1),
    "invert": _flag("invert_sigmas"),
    "sigmas": KARRAS,
}
_EDM = {
    "steps": STEPS,
    "prediction": EPSILON_V,
    "schedule": _flag("sigma_schedule", "exponential"),
    "data": _flag("sigma_data", 1.0),
    "range": [{}, {"sigma_min": 0.02, "sigma_max": 30.0, "rho": 5.0}],
    "final": FINAL,
}
_LCM = {
    "steps": [
        *STEPS,
        {"set:timesteps": [999, 759, 499, 259], "set:num_inference_steps": None},
    ],
    "betas": BETAS,
    "prediction": EPSILON_V_SAMPLE,
    "zero_snr": ZERO_SNR,
    "one": ONE_TO_ONE,
    "clip": [{}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 2.0}, THRESHOLD],
    "scaling": _flag("timestep_scaling", 5.0),
    "strength": _flag("set:strength", 0.6),
    "origin": _flag("set:original_inference_steps", 100),
}

FACTORS: dict[str, dict[str, list[Level]]] = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": {**_DDIM, **_ETA},
    "DDIMParallelScheduler": {**_DDIM, **_ETA},
    "DDIMInverseScheduler": _DDIM,
    "CogVideoXDDIMScheduler": {**_DDIM, "snr_shift": _flag("snr_shift_scale", 1.0)},
    "CogVideoXDPMScheduler": {**_DDIM, "snr_shift": _flag("snr_shift_scale", 1.0)},
    "PNDMScheduler": {
        "steps": [{"set:num_inference_steps": n} for n in (10, 4, 21, 50, 1, 2)],
        "betas": BETAS,
        "prediction": EPSILON_V,
        "spacing": SPACING,
        "offset": OFFSET,
        "prk": _flag("skip_prk_steps"),
        "one": _flag("set_alpha_to_one"),
    },
    "LMSDiscreteScheduler": {**_K, "order": _levels("step:order", 1, 2, 3)},
    "IPNDMScheduler": {
        "steps": STEPS,
        "betas": [{}, {"trained_betas": [0.001 * i for i in range(1, 41)]}],
    },
    "EulerDiscreteScheduler": {
        **_K,
        "train": [{}],
        "steps": [*STEPS, OWN_TIMESTEPS],
        "interpolation": _flag("interpolation_type", "log_linear"),
        "range": [{}, {"sigma_min": 0.1, "sigma_max": 12.0}],
        "type": _flag("timestep_type", "continuous"),
        "zero_snr": ZERO_SNR,
        "final": FINAL,
        "churn": CHURN,
    },
    "EulerAncestralDiscreteScheduler": {
        **{k: v for k, v in _K.items() if k != "sigmas"},
        "prediction": EPSILON_V,
        "zero_snr": ZERO_SNR,
    },
    "EDMEulerScheduler": {**_EDM, "churn": CHURN},
    "HeunDiscreteScheduler": {
        **_K,
        "steps": [*STEPS, {"set:timesteps": [59, 40, 30, 8], "set:num_inference_steps": None}],
        "clip": [{}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 2.0}],
    },
    "KDPM2DiscreteScheduler": {**_K, "prediction": EPSILON_V},
    "KDPM2AncestralDiscreteScheduler": {**_K, "prediction": EPSILON_V},
    "DPMSolverMultistepScheduler": {
        **_DPM,
        "steps": [*STEPS, OWN_TIMESTEPS],
        "sigmas": [*DYNAMIC, {"use_lu_lambdas": True}],
        "euler": _flag("euler_at_final"),
        "final": FINAL,
        "algorithm": [
            {},
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            {"algorithm_type": "sde-dpmsolver++"},
            {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        ],
        "zero_snr": ZERO_SNR,
    },
    "DPMSolverMultistepInverseScheduler": _DPM,
    "DPMSolverSinglestepScheduler": {
        **{k: v for k, v in _DPM.items() if k not in ("spacing", "offset")},
        "steps": [*STEPS, OWN_TIMESTEPS],
        "algorithm": [
            {},
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            {"algorithm_type": "sde-dpmsolver++"},
        ],
        "final": FINAL,
        "sigmas": DYNAMIC,
    },
    "DPMSolverSDEScheduler": {
        **_K,
        "prediction": EPSILON_V,
        # its Brownian tree takes milliseconds a query
        "steps": [{"set:num_inference_steps": n} for n in (3, 1, 2, 10)],
        "noise": _flag("step:s_noise", 1.007),
        "seed": _flag("noise_sampler_seed", 3),
    },
    "DEISMultistepScheduler": {
        **{k: v for k, v in _DPM.items() if k not in ("algorithm", "solver", "lambda")},
        "prediction": WITHOUT_VARIANCE,
        "sigmas": DYNAMIC,
        "time_shift": _flag("time_shift_type", "linear"),
    },
    "EDMDPMSolverMultistepScheduler": {
        **_EDM,
        "order": _levels("solver_order", 1, 3),
        "threshold": [{}, THRESHOLD],
        "algorithm": _flag("algorithm_type", "sde-dpmsolver++"),
        "solver": _flag("solver_type", "heun"),
        "lower": _flag("lower_order_final", False),
        "euler": _flag("euler_at_final"),
    },
    "CosineDPMSolverMultistepScheduler": {
        **_EDM,
        "steps": [{"set:num_inference_steps": n} for n in (3, 1, 2, 10)],
        "prediction": _flag("prediction_type", "epsilon"),
        "schedule": _flag("sigma_schedule", "karras"),
        "data": _flag("sigma_data", 0.5),
        "order": _flag("solver_order", 1),
        "solver": _flag("solver_type", "heun"),
        "lower": _flag("lower_order_final", False),
        "euler": _flag("euler_at_final"),
    },
    "UniPCMultistepScheduler": {
        **{k: v for k, v in _DPM.items() if k not in ("algorithm", "lambda")},
        "prediction": WITHOUT_VARIANCE,
        "sigmas": [
            *DYNAMIC,
            {
                "use_flow_sigmas": True,
                "set:sigmas": np.array([1.0, 0.9, 0.75, 0.5, 0.2, 0.05]),
                "set:num_inference_steps": None,
            },
        ],
        "solver": _flag("solver_type", "bh1"),
        "x0": _flag("predict_x0", False),
        "corrector": _levels("disable_corrector", [0], [0, 2, 3]),
        "p": [{}, {"solver_p": diffusers.DEISMultistepScheduler}],
        "final": FINAL,
        "zero_snr": ZERO_SNR,
        "range": [{}, {"sigma_min": 0.1, "sigma_max": 12.0}],
    },
    "SASolverScheduler": {
        **{k: v for k, v in _DPM.items() if k not in ("algorithm", "order", "solver")},
        "predictor": _levels("predictor_order", 1, 3, 4),
        "corrector": _levels("corrector_order", 0, 1, 3, 4),
        "algorithm": _flag("algorithm_type", "noise_prediction"),
        "tau": _flag("tau_func", (lambda t: 0.3)),
    },
    "LCMScheduler": _LCM,
    "TCDScheduler": {**_LCM, "eta": [{}, {"step:eta": 0.0}, {"step:eta": 1.0}]},
    "CMStochasticIterativeScheduler": {
        "steps": [
            *STEPS,
            {"set:timesteps": [39, 22, 5, 0], "set:num_inference_steps": None},
        ],
        "range": [{}, {"sigma_min": 0.02, "sigma_max": 40.0, "rho": 5.0}],
        "data": _flag("sigma_data", 1.0),
        "noise": _flag("s_noise", 1.01),
        "clip": _flag("clip_denoised", False),
    },
    "UnCLIPScheduler": {
        "steps": STEPS,
        "variance": _flag("variance_type", "learned_range"),
        "clip": CLIPS,
        "prediction": _flag("prediction_type", "sample"),
        "previous": _flag("step:prev_timestep", 0),
    },
    "SCMScheduler": {
        "steps": [
            {"set:num_inference_steps": 2},
            *(
                {"set:num_inference_steps": n, "set:intermediate_timesteps": None}
                for n in (1, 2, 3, 10, 21, 50)
            ),
        ],
        "data": _flag("sigma_data", 1.0),
        "top": _flag("set:max_timesteps", 1.4),
    },
    "FlowMatchEulerDiscreteScheduler": {**_FLOW, "stochastic": _flag("stochastic_sampling")},
    "FlowMatchHeunDiscreteScheduler": {
        "steps": STEPS, "shift": _flag("shift", 3.0), "churn": CHURN,
    },
    "FlowMatchLCMScheduler": {
        **_FLOW, "scales": _flag("scale_factors", [0.5, 1.0]),
    },
    "FlowMapEulerDiscreteScheduler": {
        "steps": [*STEPS, OWN_SIGMAS], "shift": _flag("shift", 3.0),
        "target": _levels("step:r_timestep", 0.0, 123.0),
    },
    "LTXEulerAncestralRFScheduler": {
        "steps": [
            *STEPS,
            {"set:sigmas": [1.0, 0.9, 0.6, 0.3, 0.0], "set:num_inference_steps": None},
        ],
        "eta": _levels("eta", 0.0, 0.5),
        "noise": _levels("s_noise", 0.0, 1.01),
    },
    "MiniMaxH3Scheduler": {
        "steps": [
            *STEPS,
            {"set:sigmas": [1.0, 0.7, 0.3, 0.1, 0.0], "set:num_inference_steps": None},
        ],
        "shift": _flag("shift", 3.0),
    },
}  # fmt: skip


def split(row: Row) -> tuple[Level, Level, Level]:
    """What a case gives to the constructor, to `set_timesteps` and to `step`."""
    merged: Level = {}
    for level in row.values():
        merged |= level
    parts: tuple[Level, Level, Level] = ({}, {}, {})
    for key, value in merged.items():
        kind, _, name = key.rpartition(":")
        parts[("", "set", "step").index(kind)][name] = value
    return parts


def made(cls: Any, row: Row) -> Any:
    """A scheduler of a case, its grid set."""
    config, grid, _ = split(row)
    if "scale_factors" in config:  # one for each step but the last
        n = grid.get("num_inference_steps") or len(grid["sigmas"])
        config["scale_factors"] = [1.0] * (n - 1)
    if "solver_p" in config:
        config["solver_p"] = config["solver_p"]()
    scheduler = cls(**config)
    scheduler.set_timesteps(**grid)
    return scheduler


@functools.cache
def cases(name: str) -> tuple[list[Row], list[Row]]:
    """The rows of a class that diffusers takes, and those that it refuses."""
    peer = getattr(diffusers, name)

    def valid(row: Row) -> bool:
        try:
            made(peer, row)
        except Exception:  # whatever it is: that ours raises the same is a test of its own
            return False
        return True

    return covering(FACTORS[name], valid)
