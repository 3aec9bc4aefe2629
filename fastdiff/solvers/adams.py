"""Adams-Bashforth methods on slopes: LMS, iPNDM, DEIS, gradient estimation.

They integrate dz/du in the straight frame of `_adams.Frame`: sigma/alpha with the noise prediction,
on a flow t with the velocity (as ComfyUI runs them there, too). The first steps have as many slopes
as there are, so the first one is of first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fastdiff.solvers._adams import Frame, log_rho_weights, rho_weights, vp_weights
from fastdiff.solvers._checks import choice, flag, number, whole
from fastdiff.solvers._walk import Walk
from fastdiff.table import StepTable

# weights of the older slopes for equal steps, in units of the step
EQUAL_STEPS = ((), (-1 / 2,), (-16 / 12, 5 / 12), (-59 / 24, 37 / 24, -9 / 24))

# weights of the slopes at nodes[1:] over the step from nodes[0] to u'
Weights = Callable[[float, Sequence[float]], Sequence[float]]


def lay_multistep(
    walk: Walk,
    frame: Frame,
    order: int,
    weights: Weights,
    *,
    needs_u: bool = True,
    clean_order: int = 4,
    afs: bool = False,
    lower_order_final: bool = False,
) -> None:
    """Rows of a multistep method: at most `order` slopes, `clean_order` in the step to clean data.

    Args:
        needs_u: whether the weights take the nodes: a slope at infinite u then has no place.
        afs: the first slope is analytic (where there is more than one step).
        lower_order_final: the last step is of first order, the one before of second at most.
    """
    afs = afs and walk.steps > 1  # the model has its say at least once
    nodes: list[float] = []
    terms = [f"h{age}" for age in range(4)]
    for i, step in enumerate(walk):
        if i == 0 and afs:
            frame.analytic(walk, step)
        else:
            n = min(order, len(nodes) + 1)
            if lower_order_final:
                n = min(n, walk.steps - i)
            if step.next.sigma == 0:
                n = min(n, clean_order)
            older = nodes[: n - 1]
            if needs_u and math.inf in older:
                older = older[: older.index(math.inf)]
            found = weights(frame.u(step.next), [frame.u(step.now), *older]) if older else ()
            used = terms[: len(found)]
            if afs and len(found) == i:
                used[-1] = "y"
            row = frame.row(step, dict(zip(used, found, strict=True)))
            walk.evaluate(step.now, row, push=frame.slope(step.now))
        nodes.insert(0, frame.u(step.now))


def _reached(walk: Walk, order: int) -> int:
    """The order that shows: the first step's error, of second order, is far below the others' where
    it starts at sigma/alpha near 100, so that the slope hardly turns; not on a flow."""
    return min(order, 2) if walk.schedule.kind == "flow" else order


def equal_weights(then: float, nodes: Sequence[float]) -> list[float]:
    """Those of equal steps, whatever the steps are."""
    return [(then - nodes[0]) * w for w in EQUAL_STEPS[len(nodes) - 1]]


def lms(walk: Walk, *, order: int = 4) -> StepTable:
    """Linear multistep of k-diffusion: Adams-Bashforth on the steps as they are, the slope's
    polynomial through the last points integrated exactly.

    Order as `order`, 2 at most on a flow (see `_reached`), one evaluation a step, no noise, up to
    three slopes kept, and the last step uses them too. Other names: sample_lms,
    LMSDiscreteScheduler; on a flow, explicit Adams in t.

    Args:
        order: most slopes in a step, 1 to 4.
    """
    order = whole("order", order, 1, 4)
    lay_multistep(walk, Frame(walk), order, rho_weights)
    return walk.table("lms", _reached(walk, order))


def ipndm(
    walk: Walk, *, max_order: int = 4, denoise_last: bool = True, afs: bool = False
) -> StepTable:
    """Improved PNDM, Zhang and Chen 2023 (arXiv:2204.13902): the Adams-Bashforth weights of equal
    steps, on whatever steps there are.

    Order 2 (1 with one slope), one evaluation a step, no noise, up to three slopes kept.
    Other names: sample_ipndm, ipndm_sampler, iplms of v-diffusion, IPNDMScheduler.

    Args:
        max_order: most slopes in a step, 1 to 4; 1 is Euler.
        denoise_last: the step to clean data ends on the last x0, as in ComfyUI; False takes the
            older slopes there too, as IPNDMScheduler and iplms do.
        afs: take the first slope from data of N(0, 1), without an evaluation (Dockhorn et al. 2022,
            arXiv:2210.05475). Its error does not fall with the step, so the order is 1. No effect
            on a single step.
    """
    max_order, afs = whole("max_order", max_order, 1, 4), flag("afs", afs)
    clean_order = 1 if flag("denoise_last", denoise_last) else max_order
    lay_multistep(
        walk, Frame(walk), max_order, equal_weights,
        needs_u=False, clean_order=clean_order, afs=afs,
    )  # fmt: skip
    return walk.table("ipndm", 1 if afs else min(max_order, 2))


def ipndm_v(walk: Walk, *, max_order: int = 4, afs: bool = False) -> StepTable:
    """Variable-step Adams-Bashforth of diff-sampler (after arXiv:2204.13902): `lms` but for the
    step to clean data, which is of first order here.

    The weights in the code of diff-sampler and ComfyUI have three slips, mended here: a bracket is
    missing around 1 - h/(3 (h + h1)), a sign is turned in the third-order term, and the fourth
    weight ends in h1/h2 for h2/h3, so that they do not even add up to 1 on uneven steps.

    Order, evaluations and history as `lms`, no noise. Other names: sample_ipndm_v, ipndm_v_sampler.

    Args:
        max_order: most slopes in a step, 1 to 4.
        afs: as in `ipndm`.
    """
    max_order, afs = whole("max_order", max_order, 1, 4), flag("afs", afs)
    lay_multistep(walk, Frame(walk), max_order, rho_weights, clean_order=1, afs=afs)
    return walk.table("ipndm_v", 1 if afs else _reached(walk, max_order))


def deis(
    walk: Walk,
    *,
    variant: str = "tab",
    max_order: int = 3,
    lower_order_final: bool = False,
    afs: bool = False,
) -> StepTable:
    """Zhang and Chen 2023 (arXiv:2204.13902), equations 14 and 15 and section 4: the slope's
    polynomial through the last points, in one or another variable, is integrated exactly.

    Order as `max_order`, 2 at most on a flow (see `_reached`), one evaluation a step, no noise, up
    to three slopes kept; the step to clean data is of first order. Other names: deis_sampler,
    sample_deis, DEISMultistepScheduler ("logrho").

    Args:
        variant: the variable. "tab": the time of the linear variance-preserving SDE that reaches
            sigma/alpha = 80 at t = 1, as diff-sampler and ComfyUI have it whatever the model;
            "rhoab": sigma/alpha; "logrho": its logarithm. On a flow, t takes the place of
            sigma/alpha in the first two, and the velocity that of the noise prediction, as in
            ComfyUI; "logrho" stays with sigma/alpha, as in diffusers.
        max_order: most slopes in a step, 1 to 4.
        lower_order_final: the last step is of first order and the one before of second at most;
            diffusers does so below 15 steps.
        afs: as in `ipndm`.
    """
    choice("variant", variant, tuple(_VARIANTS))
    max_order, afs = whole("max_order", max_order, 1, 4), flag("afs", afs)
    lower = flag("lower_order_final", lower_order_final)
    lay_multistep(
        walk, Frame(walk, ratio=variant == "logrho"), max_order, _VARIANTS[variant],
        clean_order=1, afs=afs, lower_order_final=lower,
    )  # fmt: skip
    return walk.table("deis", 1 if afs else _reached(walk, max_order))


_VARIANTS: dict[str, Weights] = {
    "tab": vp_weights,
    "rhoab": rho_weights,
    "logrho": log_rho_weights,
}


def gradient_estimation(walk: Walk, *, ge_gamma: float = 2.0) -> StepTable:
    """Permenter and Yuan 2024 (arXiv:2306.04848): Euler along gamma times the new slope plus
    (1 - gamma) times the one before.

    Order 1 (2 for gamma = 1.5 and equal steps), one evaluation a step, no noise, one slope kept;
    the first step and the step to clean data are Euler's. Other names: sample_gradient_estimation.

    Args:
        ge_gamma: 1 is Euler, the paper's choice is 2.
    """
    gamma = number("ge_gamma", ge_gamma, -math.inf)
    lay_multistep(
        walk, Frame(walk), 2, lambda then, nodes: [(then - nodes[0]) * (1 - gamma)],
        needs_u=False, clean_order=1,
    )  # fmt: skip
    return walk.table("gradient_estimation", 1)
