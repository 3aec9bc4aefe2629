"""Which solvers ComfyUI is given, under which names, with which options."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, NamedTuple

from fastdiff.solvers import SOLVERS
from fastdiff.solvers._exponential import SOLVER_TYPES as DPM_TYPES
from fastdiff.solvers.adams import _VARIANTS
from fastdiff.solvers.dpmpp import SOLVER_TYPES as DPMPP_TYPES
from fastdiff.solvers.er_sde import NOISE_SCALERS
from fastdiff.solvers.flow import RK4
from fastdiff.solvers.seeds import SOLVER_TYPES as SEEDS_TYPES
from fastdiff.solvers.unipc import SOLVER_TYPES as UNIPC_TYPES

PREFIX = "fastdiff_"
NOISES = ("comfyui", "counter", "brownian")

# names of ComfyUI that are a solver with options
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "exp_heun_2_x0": (
        "seeds_2",
        {"eta": 0.0, "s_noise": 1.0, "r": 1.0, "solver_type": "phi_2"},
    ),
    "exp_heun_2_x0_sde": ("seeds_2", {"r": 1.0, "solver_type": "phi_2"}),
    "res_multistep_ancestral_cfg_pp": ("res_multistep_cfg_pp", {"eta": 1.0}),
    "sa_solver_pece": ("sa_solver", {"pece": True}),
    "uni_pc": ("unipc", {"order": 3, "solver_type": "bh1"}),
    "uni_pc_bh2": ("unipc", {"order": 3, "solver_type": "bh2"}),
}

# ComfyUI's plain KSampler leaves out the last level but 0 for these of its own
DISCARD_PENULTIMATE = ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2")

# what the adapter sets itself, what is no number, word or flag, and what has no effect here
_HIDDEN = {
    "rf", "min_alpha", "restarts", "disable_corrector", "tau_start", "tau_end", "timestep_scaling",
    "use_clipped_model_output",
}  # fmt: skip

_CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("ddpm", "variance"): ("fixed_small", "fixed_large"),  # a denoiser predicts no variance
    ("dpmpp_2m", "solver_type"): DPMPP_TYPES,
    ("dpmpp_2m_sde", "solver_type"): DPMPP_TYPES,
    ("dpmpp_multistep", "solver_type"): DPM_TYPES,
    ("dpm_multistep", "solver_type"): DPM_TYPES,
    ("dpmpp_singlestep", "solver_type"): DPM_TYPES,
    ("dpm_singlestep", "solver_type"): DPM_TYPES,
    ("unipc", "solver_type"): UNIPC_TYPES,
    ("seeds_2", "solver_type"): SEEDS_TYPES,
    ("deis", "variant"): tuple(_VARIANTS),
    ("er_sde", "noise_scaler"): tuple(NOISE_SCALERS),
    ("flow_rk4", "variant"): tuple(RK4),
}
_WHOLE: dict[tuple[str, str], tuple[int, int]] = {
    ("lms", "order"): (1, 4),
    ("plms", "order"): (2, 4),
    ("ipndm", "max_order"): (1, 4),
    ("ipndm_v", "max_order"): (1, 4),
    ("deis", "max_order"): (1, 4),
    ("sa_solver", "corrector_order"): (0, 4),
}
_UNIT = (0.001, 1.0)
_RANGES: dict[str, tuple[float, float]] = {
    "r": _UNIT,
    "r_1": _UNIT,
    "r_2": _UNIT,
    "gamma": (0.0, 1.0),
    "ge_gamma": (-5.0, 5.0),
}
MOST = 100_000.0  # in place of infinity, which JSON has not


class Offer(NamedTuple):
    """A solver under a name.

    Attributes:
        solver: key of `fastdiff.solvers.SOLVERS`.
        fixed: options that the name stands for.
    """

    solver: str
    fixed: dict[str, Any]


OFFERS: dict[str, Offer] = {name: Offer(name, {}) for name in SOLVERS} | {
    name: Offer(solver, fixed) for name, (solver, fixed) in _PRESETS.items()
}


@functools.cache
def defaults(name: str) -> dict[str, Any]:
    """The options that a node of this name shows, with their defaults."""
    offer = OFFERS[name]
    named = list(inspect.signature(SOLVERS[offer.solver]).parameters.values())[1:]
    shown = {p.name: p.default for p in named if p.name not in _HIDDEN | set(offer.fixed)}
    return {k: MOST if v == math.inf else v for k, v in shown.items()}


def draws(name: str) -> bool:
    """Whether the solver of this name may draw noise."""
    solver, fixed = OFFERS[name]
    can = {"eta", "s_noise"} & set(inspect.signature(SOLVERS[solver]).parameters)
    return (bool(can) or solver == "ddpm") and fixed.get("eta") != 0.0


def widget(name: str, option: str) -> tuple[Any, dict[str, Any]]:
    """ComfyUI's input type of an option: (type or choices, settings)."""
    solver, default = OFFERS[name].solver, defaults(name)[option]
    if isinstance(default, str):
        return list(_CHOICES[solver, option]), {"default": default}
    if isinstance(default, bool):
        return "BOOLEAN", {"default": default}
    if isinstance(default, int):
        low, high = _WHOLE.get((solver, option), (1, 2 if option == "final_order" else 3))
        return "INT", {"default": default, "min": low, "max": high}
    low_f, high_f = _RANGES.get(option, (0.0, MOST if option[:3] == "s_t" else 100.0))
    # round=False: ComfyUI would round 1/3 to its step
    settings = {"default": default, "min": low_f, "max": high_f, "step": 0.01, "round": False}
    return "FLOAT", settings
