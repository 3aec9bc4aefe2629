"""One step of the longer rows (UniPC, SA-Solver, third order, DEIS) against diffusers' schedulers.

    python -m benchmarks.bench_reverse_step_solvers

A scheduler is run to the middle of 20 steps, what it keeps is put back before every call, and the
same step is timed again; ours runs the row of the same step. diffusers draws SA-Solver's noise from
torch's generator and ours from counters, both inside the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import numpy as np
import torch

import fastdiff
from benchmarks import measure
from fastdiff import schedules, solvers
from fastdiff.ops import as_seeds, reverse_step
from fastdiff.schedules import Grid
from fastdiff.table import StepTable
from tests.budget import assert_within_budget

STEPS, ROW = 20, 10
SHAPES = ((1, 16, 21, 90, 160), (8, 4, 128, 128))
GATE = (2, 4, 8, 8)
BETAS = {"beta_schedule": "scaled_linear", "timestep_spacing": "linspace"}


class Case(NamedTuple):
    """A solver on both sides.

    Attributes:
        speedup: target against diffusers at the video shape, 2 threads.
    """

    scheduler: str
    config: dict[str, Any]
    solver: str
    options: dict[str, Any]
    speedup: float | None


THIRD = {"solver_order": 3}
CASES = {
    "unipc-2": Case("UniPCMultistepScheduler", {}, "unipc", {}, 9.0),
    "unipc-3": Case("UniPCMultistepScheduler", THIRD, "unipc", {"order": 3}, 9.0),
    "sa_solver": Case(
        "SASolverScheduler",
        {},
        "sa_solver",
        {"predictor_order": 2, "corrector_order": 2, "tau_start": 800.0, "tau_end": 200.0},
        9.0,
    ),
    "dpmpp-3": Case("DPMSolverMultistepScheduler", THIRD, "dpmpp_multistep", {"order": 3}, None),
    "deis-3": Case(
        "DEISMultistepScheduler", THIRD, "deis", {"variant": "logrho", "max_order": 3}, None
    ),
}


def grid_of(scheduler: Any) -> Grid:
    """The points of a scheduler that counts in sigma/alpha, which ends at clean data."""
    levels = scheduler.sigmas.double().numpy()
    times = np.append(scheduler.timesteps.double().numpy(), -1.0)
    return Grid(times, 1 / np.hypot(1, levels), levels / np.hypot(1, levels))


class Peer:
    """A scheduler that stands before one middle step, with what it keeps."""

    def __init__(self, case: Case, x: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        self.scheduler = getattr(diffusers, case.scheduler)(**BETAS, **case.config)
        self.scheduler.set_timesteps(STEPS)
        self.grid = grid_of(self.scheduler)
        for t, output in zip(self.scheduler.timesteps[:ROW], outputs, strict=False):
            x = self.scheduler.step(output, t, x).prev_sample
        self.x, self.output = x, outputs[ROW]
        self.time = self.scheduler.timesteps[ROW]
        self.kept = {
            k: list(v) if isinstance(v, list) else v for k, v in vars(self.scheduler).items()
        }

    def __call__(self) -> torch.Tensor:
        for k, v in self.kept.items():
            setattr(self.scheduler, k, list(v) if isinstance(v, list) else v)
        return self.scheduler.step(self.output, self.time, self.x, return_dict=False)[0]


class Ours:
    """The same row with its buffers, after the same steps."""

    def __init__(
        self, table: StepTable, x: torch.Tensor, outputs: list[torch.Tensor], last: int = ROW
    ) -> None:
        self.table, self.output = table, outputs[last]
        self.seeds = as_seeds(0, len(x))
        self.history = torch.zeros(max(1, table.depth), *x.shape, dtype=x.dtype)
        self.y = torch.zeros_like(x) if table.anchored else None
        self.x, self.out = x, torch.empty_like(x)
        for row in range(last):
            self.x = self.step(row, outputs[row], None)

    def step(self, row: int, output: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return reverse_step(
            self.x, output, self.table, row,
            y=self.y, history=self.history, seeds=self.seeds, out=out,
        )  # fmt: skip

    def __call__(self) -> torch.Tensor:
        return self.step(ROW, self.output, self.out)

    @property
    def passes(self) -> int:
        """Tensors that the row reads and writes."""
        row, need = self.table.rows[ROW], self.table.needs[ROW]
        read = {k for out in (row.x, row.y or {}) for k, c in out.items() if c} - {"n1", "n2", "d"}
        pushes = self.table.ints[ROW, 1] >= 0
        if "d" in row.x or pushes:
            read |= {name for name, c in zip("xm", row.convert, strict=True) if c}
        return len(read) + 1 + int(pushes) + int(need.writes_anchor)


def build(case: Case, grid: Grid) -> StepTable:
    abar = schedules.scaled_linear(beta_start=1e-4, beta_end=0.02)
    return solvers.build_on(case.solver, abar, grid, **case.options)


def inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    # three outputs in turn: a tensor a step would fill the memory at the video shape
    several = [torch.randn(shape, generator=g) for _ in range(3)]
    return torch.randn(shape, generator=g), [several[i % 3] for i in range(STEPS)]


def gate(case: Case) -> None:
    """The states after the timed step agree within the float32 budget, given the same noise.

    Raises:
        AssertionError: they do not; nothing is timed then.
    """
    x, outputs = inputs(GATE)
    drawn = iter(range(STEPS))

    def given(shape: Any, **_: Any) -> torch.Tensor:
        return fastdiff.randn(as_seeds(0, GATE[0]), GATE[1:], stream=1, step=next(drawn))

    module = sys.modules[getattr(diffusers, case.scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", given, create=True):
        peer = Peer(case, x, outputs)
        theirs = peer()
    table = build(case, peer.grid)
    got = Ours(table, x, outputs)()
    with fastdiff.use_backend("reference"):
        exact = Ours(table, x.double(), [o.double() for o in outputs])()
    assert_within_budget(got, theirs, exact, ulps=32)  # of ten steps


def measure_case(name: str, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """One row of results at the present number of threads."""
    case, (x, outputs) = CASES[name], inputs(shape)
    peer = Peer(case, x, outputs)
    ours, target = Ours(build(case, peer.grid), x, outputs), torch.empty_like(x)
    timed: dict[str, Callable[[], object]] = {
        "fastdiff": ours, "diffusers": peer, "copy": lambda: target.copy_(x),
    }  # fmt: skip
    stats = measure.interleaved(timed, repeats=repeats)
    share = ours.passes / 2  # one copy moves 2 tensors
    over = [
        mine / (copy * share)
        for mine, copy in zip(stats["fastdiff"].samples, stats["copy"].samples, strict=True)
    ]
    large = shape == SHAPES[0] and torch.get_num_threads() == 2 and case.speedup is not None
    return measure.row(
        name, stats, "fastdiff",
        targets={"diffusers": ("at least", case.speedup)} if large else {},
        shape=list(shape),
        dtype="float32",
        threads=torch.get_num_threads(),
        passes=ours.passes,
        over_roofline={
            "median": float(np.median(over)),
            "quiet": stats["fastdiff"].best / (stats["copy"].best * share),
        },
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/reverse_step_solvers.json")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    given = parser.parse_args(args)
    for case in CASES.values():
        gate(case)
    rows = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for name in CASES:
            for shape in SHAPES:
                r = measure_case(name, shape, given.repeats)
                rows.append(r)
                command = measure.command("bench_reverse_step_solvers", args)
                measure.write_json(given.out, rows, command)
                over = r["over_roofline"]["median"]
                measure.show(r, f"{over:.2f} of its {r['passes']} passes")


if __name__ == "__main__":
    main()
