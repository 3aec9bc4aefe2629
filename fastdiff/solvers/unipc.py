"""UniPC: a predictor and a corrector of any order that share one evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable

from fastdiff.solvers._checks import choice, flag, number
from fastdiff.solvers._final import checked, to_clean
from fastdiff.solvers._phi import adams
from fastdiff.solvers._walk import Step, Walk, epsilon
from fastdiff.table import StepTable

SOLVER_TYPES = ("bh1", "bh2")


def reach(steps: list[Step], count: int) -> list[float]:
    """Where the `count` predictions before the last step stand, in its own length: 0 is its start.

    One at alpha = 0 stands at -inf.
    """
    h, far, nodes = steps[-1].h, 0.0, []
    for step in reversed(steps[-1 - count : -1]):
        far += step.h
        nodes.append(-math.inf if math.isinf(far) else -far / h)
    return nodes


def _update(
    steps: list[Step], order: int, solver_type: str, predict_x0: bool, *, corrects: bool
) -> tuple[float, list[float]]:
    """Weights of the last of `steps`: of the state before it and of the predictions.

    The predictions run from the newest: the one at the step's end (a corrector's alone), the one
    at its start, and those before.
    """
    step = steps[-1]
    now, then, h = step.now, step.next, step.h
    z = -h if predict_x0 else h
    scale = then.alpha if predict_x0 else then.sigma
    gain = step.gain if predict_x0 else then.alpha / now.alpha
    nodes = [1.0] * corrects + reach(steps, order - 1)
    # the paper rounds the single coefficient of UniP-2 and UniC-1 to 1/2, its value at h = 0
    is_half = order == (1 if corrects else 2)
    half = (math.expm1(z) if solver_type == "bh2" else z) if is_half else None
    weights = [-scale * w for w in adams(z, nodes, half)]
    if corrects:
        weights[:2] = weights[1::-1]
    return gain, weights


def past(weights: list[float]) -> dict[str, float]:
    """Coefficients of predictions that were pushed, the newest first."""
    return {f"h{k}": w for k, w in enumerate(weights)}


def combine(*parts: tuple[float, dict[str, float]]) -> dict[str, float]:
    """A sum of rows of coefficients, each times a number."""
    total: dict[str, float] = {}
    for c, terms in parts:
        for k, v in terms.items():
            total[k] = total.get(k, 0.0) + c * v
    return total


def _lay(
    walk: Walk,
    steps: list[Step],
    orders: list[int],
    solver_type: str,
    predict_x0: bool,
    corrects: Callable[[int], bool],
    final_order: int,
) -> None:
    """A row a step.

    Predictor and corrector of a step start from one state with one gain, so the corrected state is
    the predicted one, which the model has just seen, plus the change of the predictions' weights:
    the state before needs no memory of its own.
    """
    guess: dict[str, float] = {}
    for i, step in enumerate(steps):
        e, f = (0.0, 1.0) if predict_x0 else epsilon(step.now)
        current = {"x": e, "d": f} if e else {"d": f}
        base = {"x": 1.0}
        if i and corrects(i - 1):
            _, weights = _update(steps[:i], orders[i - 1], solver_type, predict_x0, corrects=True)
            base = combine(
                (1.0, base), (weights[0], current), (1.0, past(weights[1:])), (-1.0, guess)
            )
        if step.next.sigma == 0:
            walk.evaluate(step.now, to_clean(walk, step, final_order, pushes_x0=predict_x0))
            break
        gain, weights = _update(steps[: i + 1], orders[i], solver_type, predict_x0, corrects=False)
        x = combine((gain, base), (weights[0], current), (1.0, past(weights[1:])))
        walk.evaluate(step.now, x, push=True if predict_x0 else (e, f))
        guess = past(weights)


def unipc(
    walk: Walk,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    corrector: bool = True,
    disable_corrector: tuple[int, ...] = (),
    lower_order_final: bool = True,
    final_order: int = 1,
) -> StepTable:
    """Zhao et al. 2023 (arXiv:2302.04867), algorithms 1 and 2 with B(h) of section 3.1.

    One evaluation a step, no noise, `order` predictions kept: the evaluation that corrects a step
    predicts the next. Order of accuracy `order`, with the corrector
    one more. Two things limit it to 2, though they show late, at hundreds of steps: a
    last step of order 1 (`lower_order_final`), and a start at alpha = 0. The step to clean data
    returns the x0 prediction. Other names: UniPCMultistepScheduler, uni_pc, uni_pc_bh2.

    Args:
        order: of the predictor, 1, 2 or 3.
        solver_type: B(h) is h for "bh1", exp(h) - 1 for "bh2".
        predict_x0: work on the x0 prediction; False on the noise prediction, which needs alpha > 0.
        corrector: False is UniP, the predictor alone.
        disable_corrector: steps, from 0, that are not corrected.
        lower_order_final: let the order fall to 1 over the last steps.
        final_order: of the step to clean data, 1 or 2, as in `dpmpp_2m`.
    """
    if order not in (1, 2, 3) or isinstance(order, bool):
        raise ValueError(f"build: order of unipc must be 1, 2 or 3, got {order!r}")
    choice("solver_type", solver_type, SOLVER_TYPES)
    predict_x0 = flag("predict_x0", predict_x0)
    corrector, falls = flag("corrector", corrector), flag("lower_order_final", lower_order_final)
    disabled = {number("disable_corrector", i, 0) for i in disable_corrector}
    steps = list(walk)
    if not predict_x0 and steps[0].now.alpha == 0:
        at = f"0 at time {steps[0].now.time:g}"
        raise ValueError(f"build: alpha must be > 0 for unipc with predict_x0=False, got {at}")

    def corrects(i: int) -> bool:  # step i; B(h) of bh1 is infinite from alpha = 0
        last = i == len(steps) - 1 or not corrector or i in disabled
        return not last and (solver_type == "bh2" or math.isfinite(steps[i].h))

    orders = [min(order, i + 1, len(steps) - i if falls else order) for i in range(len(steps))]
    _lay(walk, steps, orders, solver_type, predict_x0, corrects, checked(final_order))
    accuracy = order + (corrector and not disabled)
    low = falls or steps[0].now.alpha == 0
    return walk.table("unipc", min(accuracy, 2) if low else accuracy)
