"""SA-Solver: stochastic Adams predictor and corrector."""

from __future__ import annotations

import math
from collections.abc import Callable

from fastdiff.solvers._checks import flag, number
from fastdiff.solvers._exponential import needs_signal
from fastdiff.solvers._phi import adams
from fastdiff.solvers._walk import Step, Walk, epsilon
from fastdiff.solvers.unipc import combine, past, reach
from fastdiff.table import StepTable

# where tau is not 0 by default, as times of the kind: the authors' choice
INTERVALS = {"discrete": (0.8, 0.2), "flow": (0.8, 0.2), "edm": (1.0, 0.05)}


def _update(
    steps: list[Step], count: int, tau: float, simple: bool, predict_x0: bool, *, corrects: bool
) -> tuple[float, list[float], float]:
    """Weights of the last of `steps`: of the state, of the predictions from the newest, of noise.

    Equations 14 and 17, or those of the noise form, for a tau that is constant over the step;
    `count` predictions.
    """
    now, then, h = steps[-1].now, steps[-1].next, steps[-1].h
    if predict_x0:
        z, scale, gain = -(1 + tau**2) * h, then.alpha, steps[-1].gain
        if tau:
            gain *= math.exp(-(tau**2) * h)
    else:
        z, scale, gain = h, (1 + tau**2) * then.sigma, then.alpha / now.alpha
    nodes = [1.0] * corrects + reach(steps, count - 1 - corrects)
    half = z if simple and math.isfinite(z) else None
    weights = [-scale * w for w in adams(z, nodes, half)]
    if corrects:
        weights[:2] = weights[1::-1]
    up = 0.0
    if tau:
        part = -math.expm1(-2 * tau**2 * h) if predict_x0 else tau**2 * math.expm1(2 * h)
        up = then.sigma * math.sqrt(part)
    return gain, weights, up


def _strength(
    walk: Walk, tau: float | Callable[[float], float], start: float | None, end: float | None
) -> Callable[[float], float]:
    """tau of a step, by the time at which it begins."""
    if callable(tau):
        if not (start is None and end is None):
            got = f"tau_start {start}, tau_end {end}"
            raise ValueError(f"build: tau of sa_solver, a function, must come without, got {got}")
        return lambda t: number("tau", tau(t), 0.0)
    most = number("tau", tau, 0.0)
    high, low = INTERVALS[walk.schedule.kind]
    if walk.schedule.kind == "discrete":  # of T times
        count = walk.schedule.t_max + 1
        high, low = high * count, low * count
    high = high if start is None else number("tau_start", start, 0.0)
    low = low if end is None else number("tau_end", end, 0.0)
    if high < low:
        raise ValueError(f"build: tau_start of sa_solver must be at least tau_end, got {high}")
    return lambda t: most if low <= t <= high else 0.0


def _one_of(name: str, value: int, allowed: tuple[int, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"build: {name} of sa_solver must be one of {allowed}, got {value!r}")


def _lay(
    walk: Walk,
    steps: list[Step],
    dirty: int,
    update: Callable[[int, bool], tuple[float, list[float], float]],
    corrects: bool,
    twice: bool,
    predict_x0: bool,
) -> None:
    """Rows of the `dirty` first steps, and one to clean data where there is one more.

    In PEC a row corrects the state it is given and predicts from it; in PECE it corrects, and the
    next evaluates and predicts. Predictor and corrector of a step share the state that they start
    from, its gain and the noise, so the corrected state is the predicted one plus the change of the
    predictions' weights: neither that state nor the noise is wanted again.
    """
    guess: dict[str, float] = {}
    for i, step in enumerate(steps):
        e, f = (0.0, 1.0) if predict_x0 else epsilon(step.now)
        current = {"x": e, "d": f} if e else {"d": f}
        base = {"x": 1.0}
        if i and corrects:
            _, weights, _ = update(i - 1, True)
            base = combine(
                (1.0, base), (weights[0], current), (1.0, past(weights[1:])), (-1.0, guess)
            )
            if twice:
                walk.evaluate(step.now, base)
                base = {"x": 1.0}
        if i == dirty:
            walk.evaluate(step.now, {"d": step.next.alpha})
            break
        gain, weights, up = update(i, False)
        x = combine((gain, base), (weights[0], current), (1.0, past(weights[1:])))
        walk.evaluate(step.now, x, noise=up, push=True if predict_x0 else (e, f))
        guess = past(weights)


def sa_solver(
    walk: Walk,
    *,
    predictor_order: int = 3,
    corrector_order: int = 4,
    tau: float | Callable[[float], float] = 1.0,
    tau_start: float | None = None,
    tau_end: float | None = None,
    s_noise: float = 1.0,
    simple_order_2: bool = False,
    pece: bool = False,
    lower_order_final: bool = True,
    predict_x0: bool = True,
) -> StepTable:
    """Xue et al. 2023 (arXiv:2309.05019), algorithm 1, in its x0 form or its noise form.

    One evaluation a step (PEC) or two (PECE), one draw a step where tau is not 0. Up to three
    predictions kept.
    Order min(predictor_order + 1, corrector_order), without a corrector predictor_order, and
    at most 2 with noise (weak, measured on Gaussian data), from alpha = 0, or where a last step is
    of order 1; these limits may show only at hundreds of steps. The step to clean data returns the
    x0 prediction, and `lower_order_final` counts to the step before it. Other names:
    SASolverScheduler, sa_solver, sa_solver_pece.

    Args:
        predictor_order: predictions the predictor uses, 1 to 3.
        corrector_order: predictions the corrector uses with the newest, 2 to 4; 0 for no corrector.
        tau: stochasticity within the interval, at least 0; outside it the step is the ODE's. Or a
            function from the time at which a step begins to its tau, without an interval.
        tau_start, tau_end: times of the schedule, the noisier first, between which a step that
            begins there has tau; None for 0.8 and 0.2 of all times, on EDM schedules 1 and 0.05.
        s_noise: scale of the noise.
        simple_order_2: round the one coefficient of two predictions to its value for h = 0
            (appendix D, for few steps), as diffusers does; of the x0 form.
        pece: evaluate the corrected state too.
        lower_order_final: let the orders fall over the last steps.
        predict_x0: work on the x0 prediction; False on the noise prediction (diffusers'
            algorithm_type "noise_prediction"), which needs alpha > 0 and whose noise of a step is
            tau*sigma'*sqrt(e^{2h} - 1), more than sigma' where h is large.

    Raises:
        ValueError: the noise form on a grid from alpha 0, or with `simple_order_2`.
    """
    _one_of("predictor_order", predictor_order, (1, 2, 3))
    _one_of("corrector_order", corrector_order, (0, 2, 3, 4))
    s_noise, strength = number("s_noise", s_noise, 0.0), _strength(walk, tau, tau_start, tau_end)
    simple, twice = flag("simple_order_2", simple_order_2), flag("pece", pece)
    falls, predict_x0 = flag("lower_order_final", lower_order_final), flag("predict_x0", predict_x0)
    if not predict_x0:
        needs_signal(walk, "sa_solver", "with predict_x0=False")
        if simple:
            raise ValueError(
                "build: simple_order_2 of sa_solver must be False with predict_x0=False, got True"
            )
    steps = list(walk)
    dirty = len(steps) - (steps[-1].next.sigma == 0)  # steps that do not end at clean data

    def update(i: int, corrects: bool) -> tuple[float, list[float], float]:
        order, seen = (corrector_order, i + 2) if corrects else (predictor_order, i + 1)
        count = min(order, seen, dirty - i + corrects if falls else seen)
        now = strength(steps[i].now.time)
        gain, weights, up = _update(
            steps[: i + 1], count, now, simple, predict_x0, corrects=corrects
        )
        return gain, weights, s_noise * up

    _lay(walk, steps, dirty, update, corrector_order > 0, twice, predict_x0)
    full = min(predictor_order + 1, corrector_order) if corrector_order else predictor_order
    limited = falls or steps[0].now.alpha == 0 or any(row.draws for row in walk.rows)
    return walk.table("sa_solver", min(full, 2) if limited else full)
