"""Multistep solvers with a last step of second order to clean data, and their cases."""

from __future__ import annotations

import oracles
from last_step import with_line
from oracles import Case
from oracles_dpm import multistep
from oracles_unipc import unipc

LINE = {"final_order": 2}


def case(solver, reason, oracle, **options):
    """Cases that count for their end alone: to sigma_min they are measured under other names."""
    noise = options.get("predict_x0") is False
    return Case(
        solver, options | LINE, with_line(oracle), reason,
        kinds=("discrete", "edm") if noise else ("discrete", "edm", "flow"),
        signal=noise, converges=False, ends_in_x0="line",
    )  # fmt: skip


CASES = {
    "dpmpp_2m-line": case(
        "dpmpp_2m", "one prediction kept", lambda p, x: oracles.dpmpp_2m(p, x, "midpoint")
    ),
    "dpmpp_multistep-line": case(
        "dpmpp_multistep", "two kept, and a lowered order before the end",
        lambda p, x: multistep(p, x, 3, "midpoint", "dpmsolver++"), order=3,
    ),
    "dpm_multistep-line": case(
        "dpm_multistep", "noise is pushed, x0 kept apart",
        lambda p, x: multistep(p, x, 2, "midpoint", "dpmsolver"),
    ),
    "unipc-line": case(
        "unipc", "the last prediction is not of the corrected state", lambda p, x: unipc(p, x, 2)
    ),
    "unipc-noise-line": case(
        "unipc", "noise is pushed; step 0 as in oracles_unipc",
        lambda p, x: unipc(p, x, 2, predict_x0=False, corrected=lambda i: i > 0),
        predict_x0=False, disable_corrector=(0,),
    ),
}  # fmt: skip
