"""Pseudo numerical methods: Liu et al. 2022 (arXiv:2202.09778).

Their transfer (equation 9) is a step along a slope in the straight frame of `_adams.Frame`.
"""

from __future__ import annotations

import math

from fastdiff.solvers._adams import Frame
from fastdiff.solvers._checks import whole
from fastdiff.solvers._walk import Step, Walk
from fastdiff.solvers.adams import EQUAL_STEPS
from fastdiff.table import StepTable


def _pseudo_linear(walk: Walk, frame: Frame, step: Step, known: int) -> None:
    """Adams-Bashforth for equal steps with the new slope and `known` older ones."""
    h = frame.u(step.next) - frame.u(step.now)
    older = {f"h{age}": h * w for age, w in enumerate(EQUAL_STEPS[known])}
    walk.evaluate(step.now, frame.row(step, older), push=frame.slope(step.now))


def _can_correct(frame: Frame, step: Step) -> bool:
    """Whether slopes at both ends exist and lie a finite way apart."""
    return step.next.sigma > 0 and math.isfinite(frame.u(step.now))


def plms(walk: Walk, *, order: int = 4) -> StepTable:
    """Liu et al. 2022 (arXiv:2202.09778), pseudo linear multistep as in Stable Diffusion: a pseudo
    improved Euler step, then as many slopes as there are, up to `order`; all with the weights of
    equal steps.

    Order 2 (3 on a flow's equal steps), one evaluation a step and one more for the first, no noise,
    up to three slopes kept, and the last step uses them too. A first step from alpha = 0 or to
    clean data is of first order. Other names: PNDMScheduler with skip_prk_steps, PLMSSampler.

    Args:
        order: most slopes in a step, 2 to 4; 2 is the paper's S-PNDM, plms2 of v-diffusion.
    """
    order, frame = whole("order", order, 2, 4), Frame(walk)
    for i, step in enumerate(walk):
        _pseudo_linear(walk, frame, step, min(i, order - 1))
        if i == 0 and _can_correct(frame, step):
            then, half = step.next, frame.transfer(step.now, step.next)[1] / 2
            e, f = frame.slope(then)
            walk.evaluate(then, {"x": 1 + half * e, "d": half * f, "h0": -half})
    return walk.table("plms", 2)


def pndm(walk: Walk) -> StepTable:
    """Liu et al. 2022 (arXiv:2202.09778), algorithm 2, F-PNDM: three pseudo Runge-Kutta steps
    (equation 13), then pseudo linear multistep with four slopes (equation 12).

    Order 2 (4 on a flow's equal steps), four evaluations in each of the first three steps and one
    in each other, no noise, three slopes kept, and the last step uses them too. The middle of a
    step is that of its times. A step from alpha = 0 or to clean data is of first order among the
    three. Other names: PNDMScheduler.
    """
    frame = Frame(walk)
    for i, step in enumerate(walk):
        if i < 3 and _can_correct(frame, step):
            _runge_kutta(walk, frame, step)
        else:
            _pseudo_linear(walk, frame, step, 3 if i >= 3 else 0)
    return walk.table("pndm", 2)


def _runge_kutta(walk: Walk, frame: Frame, step: Step) -> None:
    """Rows of the four evaluations; the first slope alone is pushed, as the later steps read it.

    The second slope has no slot when the third is there: it is what separates the third's state
    from the base y, e2 = (x/c - y/c0)/g, g the way to the middle.
    """
    now, then = step.now, step.next
    middle = walk.at_time((now.time + then.time) / 2)
    a, b = frame.transfer(now, middle)
    whole, h = frame.transfer(now, then)
    walk.evaluate(now, frame.row(Step(now, middle), {}), y={"x": 1.0}, push=frame.slope(now))
    e, f = frame.slope(middle)
    walk.evaluate(middle, {"y": a, "x": b * e, "d": b * f})
    third = h / (3 * b)
    walk.evaluate(
        middle,
        {"y": whole, "x": h * e, "d": h * f},
        y={"y": whole - third * a, "x": third + h / 3 * e, "d": h / 3 * f, "h0": h / 6},
    )
    e, f = frame.slope(then)
    walk.evaluate(then, {"y": 1.0, "x": h / 6 * e, "d": h / 6 * f})
