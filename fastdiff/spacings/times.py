"""Spacings of times: indices 0 to T-1 of a schedule's table of noise levels.

For a flow the table is u = 1/T, ..., 1 warped by its shift, as ComfyUI has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastdiff.spacings._beta import beta_ppf
from fastdiff.spacings._rules import integer, require, shapes

if TYPE_CHECKING:
    from fastdiff.schedules import Schedule

Array = NDArray[np.float64]


def linspace(s: Schedule, n: int, to_zero: bool, *, shift_terminal: float | None = None) -> Array:
    """Integer times from T-1 to 0; of a flow, from 1 to 0 before the shift.

    `shift_terminal` (flows with `final="zero"`) stretches 1 - t so that the last time above 0 is
    that, as LTX-Video and diffusers have it.
    """
    if s.kind == "flow":
        # the last point is t_min itself after the warp, so it is unwarped first
        last = 0.0 if to_zero else s.t_min / (s.shift + (1 - s.shift) * s.t_min)
        times = _warp(s, np.linspace(1.0, last, n + 1))
        times[-1] = 0.0 if to_zero else s.t_min
        if shift_terminal is not None:
            rule = "lie in (0, 1), with final='zero' and at least two steps"
            fits = 0 < shift_terminal < 1 and to_zero and n > 1
            require(fits, "points", "shift_terminal", rule, shift_terminal)
            times[:-1] = 1 - (1 - times[:-1]) * ((1 - shift_terminal) / (1 - times[-2]))
        return times
    rule = "be left out unless the schedule is a flow"
    require(shift_terminal is None, "points", "shift_terminal", rule, shift_terminal)
    count = n if to_zero else n + 1
    total = _enough(s, n, count, "linspace")
    # one point is the noisiest; np.linspace would give the least noisy
    return np.linspace(0, total - 1, count).round()[::-1] if count > 1 else np.array([total - 1.0])


def leading(s: Schedule, n: int, to_zero: bool, *, steps_offset: int = 0) -> Array:
    count = n if to_zero else n + 1
    total = _enough(s, n, count, "leading")
    times = (np.arange(count) * (total // count))[::-1].astype(np.float64) + steps_offset
    rule = f"keep the times below {total}, and be 0 with final='sigma_min'"
    fits = times[0] < total and (to_zero or not steps_offset)
    require(fits, "points", "steps_offset", rule, steps_offset)
    return times


def trailing(s: Schedule, n: int, to_zero: bool) -> Array:
    total = _enough(s, n, n, "trailing")
    # as diffusers writes it, sums and all, so that halves round the same way
    times = np.round(np.arange(total, 0, -total / n))[:n] - 1
    return times if to_zero else np.append(times, s.t_min)


def simple(s: Schedule, n: int, to_zero: bool, *, T: int = 1000) -> Array:
    """ComfyUI's simple_scheduler: every T/n-th level of the table, rounded down, from the top."""
    total = _table(s, T)
    require(n <= total, "points", "steps", f"be at most {total} for spacing='simple'", n)
    index = total - 1 - np.array([int(i * (total / n)) for i in range(n)], np.float64)
    return _of_table(s, index, total, to_zero)


def ddim_uniform(s: Schedule, n: int, to_zero: bool, *, T: int = 1000) -> Array:
    """ComfyUI's ddim_scheduler: every (T//n)-th level of the table, counted up from index 1.

    Where T//n steps do not fill the table it has more levels than asked for, and is refused.
    """
    total = _table(s, T)
    index = np.arange(1, total, max(total // n, 1), dtype=np.float64)[::-1]
    rule = f"be such that T // steps fits into T = {total} that often, for 'ddim_uniform'"
    require(len(index) == n, "points", "steps", rule, f"{n}, which gives {len(index)} steps")
    return _of_table(s, index, total, to_zero)


def normal(s: Schedule, n: int, to_zero: bool, *, T: int = 1000) -> Array:
    """ComfyUI's normal_scheduler: uniform (fractional) times from the top of the table to its end.

    On a flow the end is the table's lowest level, warped again on the way back: the grid of
    diffusers' FlowMatchEulerDiscreteScheduler, where that is so too.
    """
    return _uniform(s, n if to_zero else n + 1, 0, to_zero, T)


def sgm_uniform(s: Schedule, n: int, to_zero: bool, *, T: int = 1000) -> Array:
    """As `normal` with one point more, whose last is left out (Stability's generative-models)."""
    times = _uniform(s, n + 1, 1, to_zero, T)
    return times if to_zero else np.append(times, s.t_min)


def lcm(s: Schedule, n: int, to_zero: bool, *, original_inference_steps: int = 50) -> Array:
    """Luo et al. 2023 (arXiv:2310.04378), as diffusers' LCMScheduler and TCDScheduler have it: n of
    the times k - 1, 2k - 1, ..., k = T // original_inference_steps, on which the network was
    distilled, evenly spread and rounded up.
    """
    total = int(s.t_max) + 1
    least = "original_inference_steps"
    original = integer("points", least, original_inference_steps, 1)
    require(original <= total, "points", least, f"be at most {total}", original)
    require(n <= original, "points", "steps", f"be at most {original} for spacing='lcm'", n)
    known = (np.arange(1.0, original + 1) * (total // original) - 1)[::-1]
    times = known[np.floor(np.linspace(0, original, n, endpoint=False)).astype(np.int64)]
    return times if to_zero else np.append(times, s.t_min)


def beta_times(
    s: Schedule, n: int, to_zero: bool, *, alpha: float = 0.6, beta: float = 0.6, T: int = 1000
) -> Array:
    """ComfyUI's beta_scheduler: quantiles of Beta(alpha, beta) of the probabilities 1, ..., 1/n,
    rounded to whole indices of the table. Where two coincide ComfyUI drops one and returns fewer
    steps; here that is refused.
    """
    shapes(alpha, beta)
    total = _table(s, T)
    quantiles = [beta_ppf(p, alpha, beta) for p in 1 - np.linspace(0.0, 1.0, n, endpoint=False)]
    return _of_table(s, np.rint(np.array(quantiles) * (total - 1)), total, to_zero)


def _enough(s: Schedule, steps: int, count: int, name: str) -> int:
    total = int(s.t_max) + 1
    rule = f"be at most {total - count + steps} for spacing={name!r}"
    require(count <= total, "points", "steps", rule, steps)
    return total


def _warp(s: Schedule, u: Array) -> Array:
    return np.asarray(s.shift * u / (1 + (s.shift - 1) * u))


def _table(s: Schedule, T: int) -> int:
    """The number of noise levels in a model's table."""
    return int(s.t_max) + 1 if s.kind == "discrete" else integer("points", "T", T, 2)


def _of_table(s: Schedule, index: Array, total: int, to_zero: bool) -> Array:
    times = index if s.kind == "discrete" else _warp(s, (index + 1) / total)
    return times if to_zero else np.append(times, s.t_min)


def _uniform(s: Schedule, count: int, drop: int, to_zero: bool, T: int) -> Array:
    total = _table(s, T)
    if s.kind == "discrete":
        times = np.linspace(total - 1.0, 0.0, count)
    else:
        lowest = float(_warp(s, np.array(1 / total)))
        times = _warp(s, np.linspace(1.0, lowest, count))
        if not to_zero and not drop:
            times[-1] = s.t_min
    return times[: count - drop]
