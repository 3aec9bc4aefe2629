"""What the tests of spacings share."""

from __future__ import annotations

import numpy as np

from fastdiff import schedules

EPS, EPS32 = float(np.finfo(np.float64).eps), float(np.finfo(np.float32).eps)
STEPS = [1, 2, 3, 7, 10, 50]  # one, the fewest of a ramp, no divisor of T, a divisor, many
SD, LINEAR, EDM, FLOW = (
    schedules.scaled_linear(), schedules.linear(), schedules.edm(), schedules.flow(),
)  # fmt: skip


def levels_of(schedule, grid):
    """What a peer calls sigmas."""
    return grid.sigmas if schedule.kind == "flow" else grid.sigmas / grid.alphas


def hops(schedule):
    """Relative error of a level that went through a time of the schedule and back, in float64."""
    if schedule.alphas_cumprod is None:
        return 0.0
    logs = np.log(schedule.ratio(np.arange(len(schedule.alphas_cumprod))))
    return 8 * EPS * (1 + np.abs(logs).max() + len(logs) * np.diff(logs).max())


def ends(schedule):
    return float(schedule.ratio(schedule.t_min)), float(schedule.ratio(schedule.t_max))


def assert_levels(schedule, grid, want, bound, label=None):
    got = levels_of(schedule, grid)
    assert len(got) == len(want), label
    assert (np.abs(got - want) <= np.abs(want) * (bound + hops(schedule))).all(), (label, got, want)
