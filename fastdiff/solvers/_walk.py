"""What every builder shares: the grid of a table, the x0 conversion, and the rows laid on it.

Solvers live in the schedule's own space, x = alpha*x0 + sigma*noise. A formula written for
x_ve = x0 + r*noise (k-diffusion, Karras et al. 2022) is rescaled: x = alpha*x_ve, r = sigma/alpha.
The converted prediction d of every row is x0, so that clipping d clips x0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastdiff.schedules import Grid, Schedule
from fastdiff.table import Row, StepTable

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow", "edm")
STEP, CHURN = 1, 2  # noise streams, as in fastdiff.ops.noise.Stream


@dataclass(frozen=True)
class Point:
    """A time with its scales; alpha may be 0 at the first point, sigma at the last."""

    time: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma/alpha, infinite where alpha is 0."""
        return self.sigma / self.alpha if self.alpha else math.inf


@dataclass(frozen=True)
class Step:
    """From one point to the next.

    Attributes:
        h: growth of log(alpha/sigma), infinite where the step leaves alpha 0 or enters sigma 0;
            negative in an inversion, and -inf where that enters alpha 0.
        gain: sigma'/sigma.
    """

    now: Point
    next: Point

    @property
    def h(self) -> float:
        below = self.now.alpha * self.next.sigma
        if not below:
            return math.inf
        return math.log(self.next.alpha * self.now.sigma / below) if self.next.alpha else -math.inf

    @property
    def gain(self) -> float:
        return self.next.sigma / self.now.sigma


def x0_conversion(prediction: str, at: Point, sigma_data: float) -> tuple[float, float]:
    """(p, q) of x0 = p*x + q*m for the model output m at a point."""
    a, s = at.alpha, at.sigma
    if prediction == "epsilon":
        return 1 / a, -s / a
    if prediction == "v_prediction":  # v = alpha*noise - sigma*x0 with alpha^2 + sigma^2 = 1
        return a, -s
    if prediction == "flow":  # noise - x0 with alpha + sigma = 1
        return 1.0, -s
    if prediction == "edm":  # Karras et al. 2022 (arXiv:2206.00364), table 1
        total = math.hypot(s, sigma_data)
        return (sigma_data / total) ** 2, s * sigma_data / total
    return 0.0, 1.0


def epsilon(at: Point) -> tuple[float, float]:
    """(e, f) of the noise prediction e*x + f*d at a point with x0 prediction d.

    It is also the slope dx_ve/dr of k-diffusion, where x_ve = x/alpha and r = sigma/alpha.
    """
    return 1 / at.sigma, -at.alpha / at.sigma


def velocity(at: Point) -> tuple[float, float]:
    """(e, f) of the slope dx/dt = noise - x0 of a flow (alpha = 1 - t, sigma = t)."""
    return 1 / at.sigma, -1 / at.sigma


class Walk:
    """The points a solver visits and the rows it has laid so far."""

    def __init__(self, schedule: Schedule, grid: Grid, prediction: str) -> None:
        self.schedule = schedule
        self.prediction = prediction
        self.points = tuple(
            Point(float(t), float(a), float(s))
            for t, a, s in zip(grid.times, grid.alphas, grid.sigmas, strict=True)
        )
        self.rows: list[Row] = []

    def __iter__(self) -> Iterator[Step]:
        return (Step(a, b) for a, b in zip(self.points, self.points[1:], strict=False))

    def conversion(self, at: Point) -> tuple[float, float]:
        """(p, q) of the x0 prediction at a point."""
        return x0_conversion(self.prediction, at, self.schedule.sigma_data)

    @property
    def steps(self) -> int:
        return len(self.points) - 1

    def evaluate(
        self,
        at: Point,
        x: Mapping[str, float],
        *,
        y: Mapping[str, float] | None = None,
        noise: float = 0.0,
        draws: tuple[tuple[int, int], ...] = (),
        push: bool | tuple[float, float] = False,
        log_variance: tuple[float, float] | None = None,
        convert: tuple[float, float] | None = None,
    ) -> None:
        """A row that evaluates the model at a point and, where `noise` is not 0, adds a draw.

        A row with draws of its own (two, or an earlier row's again) names them in `draws` and
        gives their coefficients in x as "n1" and "n2". `convert` is (p, q) of a d that is not the
        x0 prediction.
        """
        time, c_in = at.time, 1.0
        if self.prediction == "edm":
            time, c_in = math.log(at.sigma) / 4, 1 / math.hypot(at.sigma, self.schedule.sigma_data)
        self.rows.append(
            Row(
                x={**x, "n1": noise} if noise else dict(x),
                y=y,
                time=time,
                alpha=at.alpha,
                sigma=at.sigma,
                convert=self.conversion(at) if convert is None else convert,
                push=push,
                draws=((STEP, len(self.rows)),) if noise else draws,
                log_variance=log_variance if noise else None,
                c_in=c_in,
            )
        )

    def renoise(self, now: Point, then: Point, s_noise: float) -> None:
        """A row without an evaluation, to a noisier point: the churn of Karras et al."""
        added = then.alpha * math.sqrt((then.ratio - now.ratio) * (then.ratio + now.ratio))
        x = {"x": then.alpha / now.alpha, "n1": s_noise * added}
        draws = ((CHURN, len(self.rows)),)
        row = Row(x=x, alpha=now.alpha, sigma=now.sigma, draws=draws, evaluates=False)
        self.rows.append(row)

    def at_ratio(self, ratio: float) -> Point:
        """The point of a finite sigma/alpha.

        Beyond the noisiest time of a discrete schedule the scales go on and the time stays, as
        k-diffusion has it.
        """
        time = float(self.schedule.time(ratio))
        if self.schedule.kind == "edm":
            return Point(time, 1.0, ratio)
        if self.schedule.kind == "flow":
            return Point(time, 1 / (1 + ratio), ratio / (1 + ratio))
        return Point(time, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))

    def at_time(self, time: float) -> Point:
        """The point of a time of the schedule."""
        return Point(time, float(self.schedule.alpha(time)), float(self.schedule.sigma(time)))

    def table(self, name: str, order: int, *, init_sigma: float | None = None) -> StepTable:
        """The finished table; `init_sigma` where it does not start with noise."""
        if init_sigma is None:
            # a grid of given levels may begin below the noisiest, where x is less spread
            exploding = self.schedule.kind == "edm"
            init_sigma = self.points[0].sigma if exploding else self.schedule.init_sigma
        return StepTable(
            name,
            tuple(self.rows),
            prediction=self.prediction,
            init_sigma=init_sigma,
            order=order,
            sigma_data=self.schedule.sigma_data,
        )
