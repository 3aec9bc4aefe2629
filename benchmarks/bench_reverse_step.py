"""`ops.reverse_step` against diffusers' own schedulers, torch.compile of them, lerp and copy.

    python -m benchmarks.bench_reverse_step --out benchmarks/results/reverse_step.json
    pytest benchmarks/bench_reverse_step.py --benchmark-only

One steady-state step in the middle of 50: the schedulers are set to it anew before every call, so
that they do no first-step or last-step work. Our side writes into buffers that exist, as `Sampler`
does; a row "allocating" says what the buffers are worth.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

import fastdiff
from benchmarks import measure
from fastdiff.ops import reverse_step
from fastdiff.solvers import build
from tests.budget import assert_within_budget

STEPS, ROW = 50, 24
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
# "trailing" is the spacing that all three schedulers and ours read in the same way
SPACING = "trailing"

# one image's latent (call overhead), a batch of 1024-pixel latents, a 5-second video latent
SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128), (1, 16, 21, 90, 160))
LARGE = SHAPES[1:]


@dataclass(frozen=True)
class Solver:
    """One solver on both sides.

    Attributes:
        passes: tensors moved a step at the least: reads of x, model output and history, writes of
            x' and history.
        speedup: target against diffusers at the large shapes, 2 threads.
        roofline: target of time over (passes moved at copy bandwidth).
        options: of our builder.
    """

    name: str
    scheduler: str
    passes: int
    speedup: float
    roofline: float
    options: dict[str, Any] = field(default_factory=dict)


SOLVERS = (
    # what DDIMScheduler does with a clipped x0 unless told otherwise
    Solver("ddim", "DDIMScheduler", 3, 5.0, 1.3, {"use_clipped_model_output": False}),
    Solver("dpmpp_2m", "DPMSolverMultistepScheduler", 5, 6.0, 1.3),
    Solver("ddpm", "DDPMScheduler", 3, 9.0, 3.0),
)
# clip_sample=True is the default of DDIMScheduler and DDPMScheduler; the multistep one has none
CASES = [(s, clip) for s in SOLVERS for clip in (False, True) if s.name != "dpmpp_2m" or not clip]
CASE_IDS = [f"{s.name}{'-clip' if clip else ''}" for s, clip in CASES]


class Peer:
    """A scheduler of diffusers that stands before one middle step."""

    def __init__(self, solver: Solver, clip: bool) -> None:
        kwargs = dict(SCHEDULE, beta_schedule="linear", timestep_spacing=SPACING)
        if solver.name != "dpmpp_2m":
            kwargs["clip_sample"] = clip
        self.multistep = solver.name == "dpmpp_2m"
        self.scheduler = getattr(diffusers, solver.scheduler)(**kwargs)
        self.scheduler.set_timesteps(STEPS)
        self.time = int(self.scheduler.timesteps[ROW])
        self.step: Callable[..., Any] = self.scheduler.step

    def in_float64(self) -> Peer:
        """The same scheduler with float64 tables, for the exact answer."""
        s = self.scheduler
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        s.alphas_cumprod = torch.cumprod(1 - betas, 0)
        if self.multistep:
            at = s.alphas_cumprod[s.timesteps]
            s.sigmas = torch.cat([((1 - at) / at).sqrt(), torch.zeros(1, dtype=torch.float64)])
        return self

    def __call__(self, output: torch.Tensor, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        if self.multistep:
            s = self.scheduler
            s._step_index, s.lower_order_nums = ROW, 2
            s.model_outputs = [past, past]  # the older one is dropped unread
        return self.step(output, self.time, x, return_dict=False)[0]


class Ours:
    """One row of our table with the buffers it needs."""

    def __init__(self, solver: Solver, clip: bool, inputs: Inputs) -> None:
        self.table = build(
            solver.name, fastdiff.schedules.linear(), STEPS, spacing=SPACING, **solver.options
        )
        self.clip = 1.0 if clip else None
        x = inputs.x
        self.history = inputs.past.expand(max(1, self.table.depth), *x.shape).clone()
        self.seeds = fastdiff.ops.as_seeds(0, len(x))
        self.out = torch.empty_like(x)

    def __call__(
        self, output: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        return reverse_step(
            x,
            output,
            self.table,
            ROW,
            clip=self.clip,
            history=self.history,
            seeds=self.seeds,
            out=out,
        )

    def noise(self) -> torch.Tensor:
        """The draw of the row, for the peer."""
        (draw,) = self.table.rows[ROW].draws
        shape = self.out.shape[1:]
        return fastdiff.randn(self.seeds, shape, stream=draw[0], step=draw[1])


class Inputs:
    """State, model output and last prediction; the values are those of a real step in size."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        g = torch.Generator().manual_seed(0)
        self.x, self.output, self.past = (torch.randn(shape, generator=g) for _ in range(3))


def gate(solver: Solver, clip: bool) -> None:
    """The same step as the peer's, within the float32 budget, given the same noise.

    Raises:
        AssertionError: it is not; nothing is timed then.
    """
    inputs = Inputs(SHAPES[0])
    ours = Ours(solver, clip, inputs)
    peer, exact = Peer(solver, clip), Peer(solver, clip).in_float64()
    if float(ours.table.times[ROW]) != peer.time:
        raise AssertionError(
            f"{solver.name}: row {ROW} is at time {ours.table.times[ROW]}, the peer at {peer.time}"
        )
    got = ours(inputs.output, inputs.x, None)
    drawn = ours.noise() if solver.name == "ddpm" else None

    def given(shape: Any, generator: Any, device: Any, dtype: torch.dtype) -> torch.Tensor:
        assert drawn is not None
        return drawn.to(dtype)

    with mock.patch.object(scheduling_ddpm, "randn_tensor", given):
        theirs = peer(inputs.output, inputs.x, inputs.past)
        truth = exact(inputs.output.double(), inputs.x.double(), inputs.past.double())
    # ours: at most 5 float32 operations and one rounding of each coefficient
    assert_within_budget(got, theirs, truth, ulps=8)


def compiled(peer: Peer, inputs: Inputs) -> tuple[Peer, int, int]:
    """The peer with its step under torch.compile, the graph breaks, and the graphs."""
    torch._dynamo.reset()
    torch._logging.set_logs(dynamo=logging.ERROR)  # a warning a graph break; they are counted
    counters = torch._dynamo.utils.counters
    counters.clear()
    peer.step = torch.compile(peer.scheduler.step, dynamic=False)
    graphs = -1
    for _ in range(10):  # until a call compiles nothing more
        peer(inputs.output, inputs.x, inputs.past)
        if counters["stats"]["unique_graphs"] == graphs:
            break
        graphs = counters["stats"]["unique_graphs"]
    return peer, sum(counters["graph_break"].values()), graphs


def functions(
    solver: Solver, clip: bool, inputs: Inputs, with_compile: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """What is timed side by side, and facts about it."""
    x, output, past = inputs.x, inputs.output, inputs.past
    ours, peer, target = Ours(solver, clip, inputs), Peer(solver, clip), torch.empty_like(inputs.x)
    timed: dict[str, Callable[[], object]] = {
        "fastdiff": lambda: ours(output, x, ours.out),
        "fastdiff, allocating": lambda: ours(output, x, None),
        "diffusers": lambda: peer(output, x, past),
        "torch.lerp": lambda: torch.lerp(x, output, 0.3, out=target),
        "copy": lambda: target.copy_(x),
    }
    facts: dict[str, Any] = {}
    if with_compile:
        fast, breaks, graphs = compiled(Peer(solver, clip), inputs)
        timed["diffusers, compiled"] = lambda: fast(output, x, past)
        facts = {"compiled_graph_breaks": breaks, "compiled_graphs": graphs}
    return timed, facts


def measure_case(
    solver: Solver, clip: bool, shape: tuple[int, ...], with_compile: bool, repeats: int
) -> dict[str, Any]:
    """One row of results at the present number of threads."""
    timed, facts = functions(solver, clip, Inputs(shape), with_compile)
    stats = measure.interleaved(timed, repeats=repeats)
    # one copy moves 2 tensors; the roofline is what `passes` tensors would take at its bandwidth
    share = solver.passes / 2
    over = [
        ours / (copy * share)
        for ours, copy in zip(stats["fastdiff"].samples, stats["copy"].samples, strict=True)
    ]
    size, threads = int(np.prod(shape)) * 4, torch.get_num_threads()
    aimed = threads == 2 and not clip  # the targets are for two threads
    large = aimed and shape in LARGE
    return measure.row(
        f"{solver.name}{'-clip' if clip else ''}",
        stats,
        "fastdiff",
        targets={"diffusers": ("at least", solver.speedup)} if large else {},
        shape=list(shape),
        dtype="float32",
        threads=threads,
        bytes=solver.passes * size,
        copy_gb_s=2 * size / stats["copy"].best / 1e9,
        over_roofline={
            "median": float(np.median(over)),
            "quiet": stats["fastdiff"].best / (stats["copy"].best * share),
            "at most": solver.roofline if large else None,
        },
        microseconds_at_most=15.0 if aimed and shape == SHAPES[0] else None,
        **facts,
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/reverse_step.json")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--no-compile", action="store_true", help="without the compiled peers")
    args = parser.parse_args(argv)
    for solver, clip in CASES:
        gate(solver, clip)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for solver, clip in CASES:
            for shape in SHAPES:
                # some 10 s of compilation each: clipping would only double that
                compiling = not (args.no_compile or clip)
                r = measure_case(solver, clip, shape, compiling, args.repeats)
                rows.append(r)
                # after every row: a run of minutes may be stopped
                measure.write_json(args.out, rows, measure.command("bench_reverse_step", argv))
                measure.show(r, f"{r['over_roofline']['quiet']:.2f} of roofline")


# --- pytest-benchmark -----------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "clip"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("who", ("fastdiff", "diffusers", "copy"))
def test_step(
    benchmark: Any,
    threads: int,
    who: str,
    shape: tuple[int, ...],
    solver: Solver,
    clip: bool,
) -> None:
    gate(solver, clip)
    timed, _ = functions(solver, clip, Inputs(shape), with_compile=False)
    benchmark.group = f"{solver.name}{'-clip' if clip else ''} {shape} {threads} threads"
    benchmark.pedantic(timed[who], rounds=31, iterations=5, warmup_rounds=3)


if __name__ == "__main__":
    main()
