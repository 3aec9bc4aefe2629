"""The step to clean data at second order.

Along the probability flow of a smooth density the x0 prediction is x0 + c q + O(q^2) for small
q = (sigma/alpha)^2: with z = x/alpha and r = sigma/alpha, dz/dr = -r s(z, r), s the score of the
data with noise r, and D = z + r^2 s. A last step that returns the prediction leaves c q, which on a
grid with a fixed least level does not fall with the number of steps. The line through two
predictions, at q = 0, leaves O(q^2); where the prediction does not move it changes nothing.
"""

from __future__ import annotations

import dataclasses

from fastdiff.solvers._checks import whole
from fastdiff.solvers._walk import Step, Walk

# How much larger q is, at least, where the other prediction stands: the weights are then at most
# 3/2 and -1/2, so that no rounding of the network grows with the number of steps.
FAR = 3.0


def checked(final_order: object, eta: float = 0.0) -> int:
    """The option, which is of the flow without noise."""
    order = whole("final_order", final_order, 1, 2)
    if order > 1 and eta:
        raise ValueError(f"build: final_order must be 1 with eta > 0, got {order}")
    return order


def to_clean(walk: Walk, step: Step, final_order: int, *, pushes_x0: bool) -> dict[str, float]:
    """Coefficients of the last row: alpha' times x0 by one prediction or, at order 2, by two.

    The other one is the nearest that stands far enough; it is the last push or kept in y. Where
    there is none the step is of first order.
    """
    alpha, q = step.next.alpha, step.now.ratio**2
    rows = list(enumerate(walk.rows)) if final_order == 2 else []
    far = [i for i, row in rows if row.alpha and (row.sigma / row.alpha) ** 2 >= FAR * q]
    if not far:
        return {"d": alpha}
    row = walk.rows[far[-1]]
    weight = alpha * q / ((row.sigma / row.alpha) ** 2 - q)
    term = "h0" if pushes_x0 and far[-1] == len(walk.rows) - 1 else "y"
    if term == "y":
        walk.rows[far[-1]] = dataclasses.replace(row, y={"d": 1.0})
    return {"d": alpha + weight, term: -weight}
