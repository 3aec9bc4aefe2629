"""`scheduler.step` of every drop-in against the step of diffusers' own class.

    python -m benchmarks.bench_schedulers --out benchmarks/results/schedulers.json
    pytest benchmarks/bench_schedulers.py --benchmark-only

Timed are the steps of a run of 20 on model outputs that are there already; a run begins from the
state that `set_timesteps` left. Predicted before it was measured, on large float32 tensors: a
deterministic step of one history tensor takes 5 passes over memory where diffusers' takes 15 to 28,
UniPC 8 against 57; a step with torch's noise cannot gain more than about twice, since torch draws
it serially; with counter noise it does not wait for that. On a small latent it is the interpreter:
a step has to come to under 10 us in all, where diffusers' have 20 to 150 us of calls.
`torch.compile` of diffusers' step takes a graph for each of the first eight steps, whose index is a
Python number, and runs the others as they are.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
import torch._inductor.config

import fastdiff
from benchmarks import measure
from fastdiff.integrations import diffusers as ours

SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128), (1, 16, 21, 90, 160))
STEPS = 20
BROWNIAN = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
# geometric means that are asked for: of the large shapes, and of the small one over all classes
TARGETS = {"deterministic": 5.0, "counter": 9.0, "generator": 1.8, "small": 3.0}


def names() -> list[str]:
    """The drop-ins; the classes are made when they are asked for."""
    return [name for name in sorted(ours._STATE) if hasattr(getattr(ours, name), "step")]


class Run:
    """The steps of a run, again and again."""

    def __init__(self, scheduler: Any, shape: Sequence[int], compiled: bool = False) -> None:
        self.scheduler = scheduler
        if "intermediate_timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(STEPS, intermediate_timesteps=None)  # SCM: else it takes two
        else:
            scheduler.set_timesteps(STEPS)
        scheduler.is_scale_input_called = True
        self.times = list(scheduler.timesteps)
        if scheduler.__class__.__name__ == "SCMScheduler":  # its last time is where the run ends
            del self.times[-1]
        self.x = fastdiff.randn(range(shape[0]), shape[1:])
        self.outputs = [fastdiff.randn(range(9 * k, 9 * k + shape[0]), shape[1:]) for k in (1, 2)]
        self.begin = {k: list(v) if type(v) is list else v for k, v in vars(scheduler).items()}
        self.step = torch.compile(scheduler.step) if compiled else scheduler.step
        parameters = inspect.signature(scheduler.step).parameters
        self.remembers = "old_pred_original_sample" in parameters
        self.options: dict[str, Any] = {"return_dict": False}
        if "generator" in parameters:
            self.options["generator"] = torch.Generator().manual_seed(0)

    def __call__(self) -> torch.Tensor:
        for name, value in self.begin.items():
            setattr(self.scheduler, name, list(value) if type(value) is list else value)
        x, old = self.x, None
        for i, t in enumerate(self.times):
            output = self.outputs[i % 2]
            if self.remembers:  # the pipeline of CogVideoX keeps what others keep themselves
                back = self.times[i - 1] if i else None
                x, old = self.step(output, old, t, back, x, **self.options)
            else:
                x = self.step(output, t, x, **self.options)[0]
        return x


def stochastic(name: str) -> bool:
    """Whether a class draws noise with its default arguments."""
    scheduler = getattr(diffusers, name)()
    run = Run(scheduler, (1, 1, 2, 2))
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        if "generator" in run.options:
            run.options["generator"].manual_seed(seed)
        ends.append(run())
    return not torch.equal(*ends)


def contestants(name: str, shape: Sequence[int], compiled: bool) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {
        "fastdiff": Run(getattr(ours, name)(), shape),
        "diffusers": Run(getattr(diffusers, name)(), shape),
    }
    if stochastic(name):
        found["fastdiff, counter noise"] = Run(getattr(ours, name)(noise="counter"), shape)
    if compiled:
        torch._dynamo.reset()
        found["torch.compile"] = Run(getattr(diffusers, name)(), shape, compiled=True)
    return found


def gate(name: str) -> None:
    """Both give the same picture."""
    ends = []
    for module in (ours, diffusers):
        run = Run(getattr(module, name)(), (2, 4, 8, 8))
        torch.manual_seed(0)
        ends.append(run())
    miss = float((ends[0] - ends[1]).abs().max() / ends[1].abs().max())
    if not miss < 2e-5:  # 20 float32 steps of diffusers' own rounding
        raise AssertionError(f"{name}: a run of {STEPS} steps differs by {miss:.1e}")


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = measure.parser(__doc__, "schedulers", repeats=9, threads=(2,))
    parser.add_argument("--only", nargs="+", default=names())
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)))
    args: argparse.Namespace = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    # the compiler's worker processes would still be starting while the first case is timed
    torch._inductor.config.compile_threads = 1
    rows: list[dict[str, Any]] = []
    means: dict[tuple[int, str], list[float]] = {}
    with torch.no_grad():
        for name in args.only:
            gate(name)
            for threads in args.threads:
                torch.set_num_threads(threads)
                for k in args.shapes:
                    if name in BROWNIAN and SHAPES[k] == SHAPES[-1]:
                        continue  # a run of diffusers' own takes a minute there
                    who = contestants(name, SHAPES[k], not args.no_compile)
                    stats = measure.interleaved(who, repeats=args.repeats)
                    noisy = "fastdiff, counter noise" in who
                    row = measure.row(
                        name, stats, "fastdiff", threads=threads, shape=list(SHAPES[k]),
                        dtype="float32", steps=STEPS, stochastic=noisy,
                    )  # fmt: skip
                    quiet = row["ratios"]["diffusers"]["quiet"]
                    means.setdefault((k, "generator" if noisy else "deterministic"), []).append(
                        quiet
                    )
                    if noisy:
                        counter = stats["diffusers"].best / stats["fastdiff, counter noise"].best
                        row["counter"] = counter
                        means.setdefault((k, "counter"), []).append(counter)
                    rows.append(row)
                    each = ", ".join(
                        f"{who} {s.best / STEPS * 1e6:.1f}" for who, s in stats.items()
                    )
                    print(f"{threads} threads {SHAPES[k]} {name}: us a step: {each}", flush=True)
    for (k, kind), values in means.items():
        print(f"{SHAPES[k]} {kind}: {geometric_mean(values):.2f} over {len(values)} classes")
    measure.write_json(args.out, rows, measure.command("bench_schedulers", argv))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("who", ("fastdiff", "diffusers"))
def test_steps(benchmark: Any, who: str, name: str) -> None:
    gate(name)
    benchmark.group = name
    with torch.no_grad():
        benchmark.pedantic(contestants(name, SHAPES[0], False)[who], rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
