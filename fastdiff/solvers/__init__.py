"""Solvers as tables: a builder computes a `StepTable` on the host, in float64, once.

``SOLVERS`` maps names to builders; `build` picks the grid from a noise schedule, `build_on` takes
one. Nothing here needs torch or a backend.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastdiff.schedules import SPACINGS, Grid, Schedule
from fastdiff.solvers._checks import choice
from fastdiff.solvers._walk import PREDICTIONS, Walk
from fastdiff.solvers.adams import deis, gradient_estimation, ipndm, ipndm_v, lms
from fastdiff.solvers.cfg_pp import (
    dpmpp_2m_cfg_pp,
    dpmpp_2s_ancestral_cfg_pp,
    euler_ancestral_cfg_pp,
    euler_cfg_pp,
    gradient_estimation_cfg_pp,
    res_multistep_cfg_pp,
)
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.distilled import consistency, lcm, tcd
from fastdiff.solvers.dpm_2 import dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral
from fastdiff.solvers.dpm_fast import dpm_fast
from fastdiff.solvers.dpm_multistep import dpm_multistep, dpmpp_3m_sde, dpmpp_multistep
from fastdiff.solvers.dpm_singlestep import dpm_singlestep, dpmpp_singlestep
from fastdiff.solvers.dpmpp import dpmpp_2m, dpmpp_2m_sde
from fastdiff.solvers.er_sde import er_sde
from fastdiff.solvers.euler import euler, euler_ancestral
from fastdiff.solvers.flow import flow_heun3, flow_midpoint, flow_rk4
from fastdiff.solvers.heun import heun
from fastdiff.solvers.heunpp import heunpp2
from fastdiff.solvers.inverse import (
    ddim_inverse,
    dpm_multistep_inverse,
    dpmpp_multistep_inverse,
)
from fastdiff.solvers.pndm import plms, pndm
from fastdiff.solvers.res import res_multistep, res_multistep_ancestral
from fastdiff.solvers.restart import restart
from fastdiff.solvers.sa_solver import sa_solver
from fastdiff.solvers.seeds import dpmpp_sde, seeds_2, seeds_3
from fastdiff.solvers.unipc import unipc
from fastdiff.spacings import OPTIONS
from fastdiff.table import StepTable

__all__ = ["INVERSES", "PREDICTIONS", "SOLVERS", "build", "build_inverse", "build_on"]

_FAMILIES: tuple[tuple[Callable[..., StepTable], ...], ...] = (
    (ddpm, ddim),
    (euler, euler_ancestral, heun, restart),
    (dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral),
    (dpmpp_2m, dpmpp_2m_sde, dpmpp_multistep, dpm_multistep, dpmpp_3m_sde),
    (dpmpp_singlestep, dpm_singlestep, dpm_fast),
    (lms, plms, pndm, ipndm, ipndm_v, deis, gradient_estimation),
    (unipc, sa_solver),
    (dpmpp_sde, seeds_2, seeds_3, er_sde),
    (res_multistep, res_multistep_ancestral, heunpp2),
    (flow_midpoint, flow_heun3, flow_rk4),
    (lcm, tcd, consistency),
    (euler_cfg_pp, euler_ancestral_cfg_pp, dpmpp_2s_ancestral_cfg_pp),
    (dpmpp_2m_cfg_pp, res_multistep_cfg_pp, gradient_estimation_cfg_pp),
)
SOLVERS: dict[str, Callable[..., StepTable]] = {
    builder.__name__: builder for family in _FAMILIES for builder in family
}

# from the image up to noise; kept apart, as their first state is no noise
INVERSES: dict[str, Callable[..., StepTable]] = {
    f.__name__: f for f in (ddim_inverse, dpmpp_multistep_inverse, dpm_multistep_inverse)
}

MANY = 10  # steps from which `build` chooses for the order of convergence

# the kinds of schedule on which a prediction has its meaning
_KINDS = {"v_prediction": "discrete", "flow": "flow", "edm": "edm"}


def build(
    name: str,
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    spacing: str | None = None,
    final: str = "zero",
    sigmas: ArrayLike | None = None,
    timesteps: ArrayLike | None = None,
    **options: Any,
) -> StepTable:
    """The table of a solver on a noise schedule.

    Args:
        name: a key of `SOLVERS`.
        schedule: from `fastdiff.schedules`.
        steps: number of steps, at least 1; a step may take more than one model evaluation. May be
            left out where `sigmas` or `timesteps` say it.
        prediction: what the model predicts: "epsilon" (the noise), "sample" (x0), "v_prediction"
            (alpha*noise - sigma*x0, discrete schedules), "flow" (noise - x0, flow schedules),
            "edm" (the raw network of Karras et al. 2022, with its c_in, c_skip, c_out and
            t = ln(sigma)/4, EDM schedules).
        spacing: as in `Schedule.points`; None for fastdiff's own choice. That is the schedule's
            default, which is good at few steps, but from ten steps a solver that keeps its order
            only on a grid that is fine at its end (those with `final_order`; of order 2 or more,
            without noise) takes "exponential" on a discrete schedule, whose times are fractional,
            and there and on "edm" a last step of second order. A spacing that is named is taken
            with the plain last step, as other libraries have it.
        final: "zero" ends at clean data, "sigma_min" at the schedule's least noisy time.
        sigmas, timesteps: the points themselves in place of a spacing, see `Schedule.custom`.
        options: of the solver, see its builder; and of the spacing (`rho`, `steps_offset`, ...).

    Returns:
        The table; its state is x = alpha*x0 + sigma*noise in the scales of the schedule.

    Raises:
        TypeError, ValueError: an argument breaks its rule, or the two do not go together.
    """
    choice("solver", name, tuple(SOLVERS))
    if sigmas is None and timesteps is None:
        count = _count(steps)
        if spacing is None:
            spacing = _own_choice(SOLVERS[name], schedule, count, prediction, options)
        grid = _grid_of(SOLVERS[name], schedule, count, spacing, final, options)
    else:
        grid = _custom(SOLVERS[name], schedule, steps, spacing, final, sigmas, timesteps, options)
    return build_on(name, schedule, grid, prediction=prediction, **options)


def build_inverse(
    name: str,
    schedule: Schedule,
    steps: int,
    *,
    prediction: str = "epsilon",
    spacing: str | None = None,
    final: str = "sigma_min",
    **options: Any,
) -> StepTable:
    """The table of an inversion, which walks the grid from its end, the image, to its start.

    Its `init_sigma` is 1: the image is given as ``Sampler(model, table)(noise=image)``.

    Args:
        name: a key of `INVERSES`.
        final: where it starts: "sigma_min" takes the image for a state of the least noisy time,
            "zero" for clean data, from which only `ddim_inverse` goes up.
        schedule, steps, prediction, spacing, options: as in `build`.

    Returns:
        The table; its last state is x = alpha*x0 + sigma*noise at the noisiest time.

    Raises:
        TypeError, ValueError: as `build`.
    """
    choice("inverse", name, tuple(INVERSES))
    grid = _grid_of(INVERSES[name], schedule, _count(steps), spacing, final, options)
    return INVERSES[name](_walk_of(schedule, grid, prediction), **options)


def build_on(
    name: str, schedule: Schedule, grid: Grid, *, prediction: str = "epsilon", **options: Any
) -> StepTable:
    """The table of a solver on a grid of the caller's; arguments and errors as in `build`.

    The grid holds at least two points of falling sigma/alpha; alpha may be 0 at the first, sigma at
    the last.
    """
    choice("solver", name, tuple(SOLVERS))
    _check_options(SOLVERS[name], options)
    with _taken(name, options):
        return SOLVERS[name](_walk_of(schedule, grid, prediction), **options)


@contextmanager
def _taken(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Names whose options they were that Python's own arithmetic refuses."""
    try:
        yield
    except ArithmeticError as error:
        rule = f"options and schedule must be of a size to compute with, got {dict(options)}"
        raise ValueError(f"{name}: {rule} ({error})") from error
    except TypeError as error:
        if ": " in str(error):  # our own message
            raise
        raise TypeError(
            f"{name}: options must be of the types that it documents, got {dict(options)} ({error})"
        ) from error


def _check(
    builder: Callable[..., StepTable],
    schedule: Schedule,
    spacing: str | None,
    final: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The options of the grid, taken out of the builder's."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"build: schedule must be a Schedule, got {type(schedule).__name__}")
    if spacing is not None:
        choice("spacing", spacing, SPACINGS[schedule.kind])
    choice("final", final, ("zero", "sigma_min"))
    _check_options(builder, options, OPTIONS)
    return {k: options.pop(k) for k in OPTIONS if k in options}


def _own_choice(
    builder: Callable[..., StepTable],
    schedule: Schedule,
    steps: int,
    prediction: str,
    options: dict[str, Any],
) -> str | None:
    """The spacing of a `build` that names none, and the `final_order` put among its options.

    The times of a discrete schedule's default are even in (sigma/alpha)^2 near clean data. There
    the last few steps in log(sigma/alpha) do not get shorter with their number, so that the error
    of any solver that is polynomial in it falls as 1/steps; and at a fixed least level a plain last
    step leaves an error that does not fall.
    """
    known = inspect.signature(builder).parameters
    if steps < MANY or "final_order" not in known or not isinstance(schedule, Schedule):
        return None
    if schedule.kind == "flow" or not math.isfinite(float(schedule.ratio(schedule.t_max))):
        return None
    own = {k: v for k, v in options.items() if k in known}
    one_step = schedule.points(1, final="sigma_min")
    with _taken(builder.__name__, own):
        probe = builder(_walk_of(schedule, one_step, prediction), **own)
    if probe.order < 2 or probe.stochastic:
        return None
    options.setdefault("final_order", 2)
    return "exponential" if schedule.kind == "discrete" else None


def _grid_of(
    builder: Callable[..., StepTable],
    schedule: Schedule,
    steps: int,
    spacing: str | None,
    final: str,
    options: dict[str, Any],
) -> Grid:
    """The grid of a spacing."""
    of_grid = _check(builder, schedule, spacing, final, options)
    with _taken(spacing or "build", of_grid):
        return schedule.points(steps, spacing, final, **of_grid)  # type: ignore[arg-type]


def _custom(
    builder: Callable[..., StepTable],
    schedule: Schedule,
    steps: int | None,
    spacing: str | None,
    final: str,
    sigmas: ArrayLike | None,
    timesteps: ArrayLike | None,
    options: dict[str, Any],
) -> Grid:
    """The grid of given points."""
    of_grid = _check(builder, schedule, spacing, final, options)
    if spacing is not None or of_grid:
        got = spacing or ", ".join(of_grid)
        raise ValueError(f"build: spacing must be left out with sigmas or timesteps, got {got}")
    grid = schedule.custom(sigmas=sigmas, timesteps=timesteps, final=final)  # type: ignore[arg-type]
    if steps is not None and _count(steps) != len(grid.times) - 1:
        raise ValueError(
            f"build: steps must be the {len(grid.times) - 1} of the given list, got {steps}"
        )
    return grid


def _walk_of(schedule: Schedule, grid: Grid, prediction: str) -> Walk:
    """A walk on a grid, if the prediction has its meaning there."""
    _check_grid(grid)
    check_prediction(prediction, schedule, float(grid.times[0]), float(grid.alphas[0]))
    return Walk(schedule, grid, prediction)


def check_prediction(
    prediction: str, schedule: Schedule, time: float, alpha: float, where: str = "build"
) -> None:
    """Refuse what has no meaning on a schedule, or not at the first point of a table."""
    choice("prediction", prediction, PREDICTIONS)
    fit = [p for p in PREDICTIONS if _KINDS.get(p, schedule.kind) == schedule.kind]
    on = f"on a {schedule.kind} schedule"
    if alpha == 0:  # pure noise; its noise says nothing of x0
        fit.remove("epsilon")
        on += f" whose alpha is 0 at time {time:g}"
    if prediction not in fit:
        raise ValueError(
            f"{where}: prediction must be one of {', '.join(fit)} {on}, got {prediction!r}"
        )


def _count(steps: Any) -> int:
    if isinstance(steps, bool) or not hasattr(type(steps), "__index__"):
        raise TypeError(f"build: steps must be an integer of at least 1, got {steps!r}")
    if operator.index(steps) < 1:
        raise ValueError(f"build: steps must be an integer of at least 1, got {steps}")
    return operator.index(steps)


def _check_options(
    builder: Callable[..., StepTable], options: dict[str, Any], more: tuple[str, ...] = ()
) -> None:
    name, known = builder.__name__, list(inspect.signature(builder).parameters)[1:]
    for option in options:
        if option not in (*known, *more):
            allowed = ", ".join((*known, *more)) or "none"
            raise TypeError(f"build: options of {name} must be among {allowed}, got {option!r}")


def check_names(where: str, options: Mapping[str, Any]) -> None:
    """For fronts that pass a stranger's options to `build` beside arguments of their own.

    Raises:
        TypeError: an option has the name of such an argument.
    """
    for option in options:
        if option in ("name", "schedule", "steps", "prediction", "spacing"):
            raise TypeError(f"{where}: options must be of the solver or its grid, got {option!r}")


def _check_grid(grid: Grid) -> None:
    a, s = np.asarray(grid.alphas), np.asarray(grid.sigmas)
    if not (len(a) == len(s) == len(grid.times) >= 2):
        raise ValueError(f"build: grid must have at least two points, got {len(grid.times)}")
    angle = np.arctan2(s, a)  # sigma/alpha without its infinity
    ok = (a >= 0).all() and (s >= 0).all() and a[-1] > 0 and (np.diff(angle) < 0).all()
    if not (ok and math.isfinite(float(a.sum() + s.sum()))):
        raise ValueError(f"build: grid must have falling sigma/alpha, got {s} / {a}")
