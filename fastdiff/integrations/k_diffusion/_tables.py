"""The tables behind k-diffusion's functions, and where those functions ask for noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastdiff.schedules import Grid, edm
from fastdiff.solvers import SOLVERS
from fastdiff.solvers._walk import Walk
from fastdiff.table import Row, StepTable

# one evaluation a step; in the others a row that reads h0 is a later stage of its step
_MULTISTEP = ("lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")
# no noise sampler is called without eta
_ASKS_WITH_ETA = ("dpmpp_2m_sde", "dpmpp_3m_sde")
_DRAWS = ("n1", "n2")


class Plan(NamedTuple):
    """How a function runs on one list of sigmas; shared by all of its calls, never written to.

    Attributes:
        drawn: the solver's table, whose draws the kernel makes itself.
        given: the same rows, where noise that is given enters by the term u.
        churn: by step, the coefficient of the noise before its first evaluation, 0 for none.
        steps: by step, its rows that evaluate the model.
        asks: by row, whether k-diffusion calls its noise sampler there.
    """

    drawn: StepTable
    given: StepTable
    churn: tuple[float, ...]
    steps: tuple[tuple[int, ...], ...]
    asks: tuple[bool, ...]


def levels_of(where: str, sigmas: Any) -> np.ndarray:
    """The sigmas as float64 on the host, checked."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point() or sigmas.dim() != 1:
        got = f"{sigmas.dim()}-D {sigmas.dtype}" if isinstance(sigmas, Tensor) else type(sigmas)
        raise TypeError(f"{where}: sigmas must be a 1-D floating-point tensor, got {got}")
    levels = sigmas.detach().cpu().double().numpy()
    if not (np.isfinite(levels).all() and (levels >= 0).all()):
        raise ValueError(f"{where}: sigmas must be finite and not negative, got {levels}")
    return levels


def number(where: str, name: str, value: Any) -> float:
    """An option that may be a number or a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def ends_of(where: str, sigma_min: Any, sigma_max: Any) -> tuple[float, float]:
    """(sigma_min, sigma_max), checked."""
    ends = number(where, "sigma_min", sigma_min), number(where, "sigma_max", sigma_max)
    if not all(0 < end < math.inf for end in ends):
        got = f"{ends[0]} and {ends[1]}"
        raise ValueError(f"{where}: sigma_min and sigma_max must be above 0 and finite, got {got}")
    return ends


def plan_of(where: str, name: str, levels: np.ndarray, options: Mapping[str, Any]) -> Plan:
    """The plan of a solver on levels sigma, as `levels_of` gives them.

    The sigmas fall, the last may be 0; without noise they may also rise from above 0, which runs
    the ODE towards noise.
    """
    rises = bool((np.diff(levels) > 0).all()) and levels[0] > 0
    if not ((np.diff(levels) < 0).all() or (rises and not options.get("eta"))):
        rule = "sigmas must fall, or rise from above 0 where no noise is added"
        raise ValueError(f"{where}: {rule}, got {levels}")
    # with their types: 4 and 4.0 are equal keys, and one of them may be an error
    typed = tuple((k, type(v), v) for k, v in sorted(options.items()))
    return _plan(name, levels.tobytes(), typed)


@lru_cache(maxsize=128)
def _plan(name: str, levels: bytes, typed: tuple[tuple[str, type, Any], ...]) -> Plan:
    options = {k: v for k, _, v in typed}
    sigmas = np.frombuffer(levels)
    walk = Walk(edm(), Grid(sigmas, np.ones_like(sigmas), sigmas), "sample")
    drawn = SOLVERS[name](walk, **options)
    steps: list[list[int]] = []
    churn: list[float] = []
    waiting = 0.0
    for i, row in enumerate(drawn.rows):
        if not row.evaluates:
            waiting = row.x["n1"]
        elif name in _MULTISTEP or "h0" not in row.x:
            steps.append([i])
            churn.append(waiting)
            waiting = 0.0
        else:
            steps[-1].append(i)
    asks = [False] * len(drawn)
    eta = options.get("eta")
    if eta is not None and (eta or name not in _ASKS_WITH_ETA):
        ends = sigmas[1:] if name != "dpm_fast" else np.full(len(steps), sigmas[-1])
        for rows, end in zip(steps, ends, strict=True):
            # where its lower level is 0 k-diffusion's dpm_2_ancestral leaves its noise out
            if end > 0 and not (name == "dpm_2_ancestral" and len(rows) == 1):
                for i in rows if name == "dpmpp_sde" else rows[-1:]:
                    asks[i] = True
    given = dataclasses.replace(drawn, rows=tuple(map(_taking, drawn.rows, asks)))
    return Plan(drawn, given, tuple(churn), tuple(map(tuple, steps)), tuple(asks))


def _taking(row: Row, asks: bool) -> Row:
    """The row with one tensor of noise in place of its draws.

    Two draws of a row are parts of one increment, of which k-diffusion gives the whole.
    """
    x = {term: c for term, c in row.x.items() if term not in _DRAWS}
    weight = math.hypot(*(row.x.get(term, 0.0) for term in _DRAWS))
    if asks and weight:
        x["u"] = weight
    return dataclasses.replace(row, x=x, draws=())
