"""Continuous batching against static batching on one trace of Poisson arrivals.

    python -m benchmarks.bench_serve --out benchmarks/results/serve.json

Requests of one image each arrive at random times, most with 20 steps, some drafts of 8 and some
with 50, of five solvers, guided or not. Three ways to serve them, with the same model, the same
step kernel and at most the same batch:

- continuous: `fastdiff.serve.Engine`; an image joins at the next step and leaves when it is done;
- static: what waits is collected, up to a full batch or for a moment, and run to its longest
  request, the batch as large as it began; an image is handed out when it is ready;
- shrinking: static, but an image that is ready leaves the batch, so that only its free place is
  lost. This needs a row for each sample, as the step kernel here has; it is no usual baseline.

Arrivals come at 0.9 of what the continuous engine can do, from the time of a full step measured
first. Throughput is images over the time from the first arrival to the last image; latency is from
an image's arrival. Predicted before it was measured: static runs 50 rows for a mean of 22, so it
does 22/50 of the work of a full batch, and continuous 2.2 times its throughput; shrinking loses
only what a smaller batch costs, some tenths.
"""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import measure
from fastdiff.serve import Engine, FixedSizes
from fastdiff.serve._batch import Batch, Sample
from fastdiff.serve.request import Plan

STEPS, SHARES = (8, 20, 50), (0.3, 0.5, 0.2)
# solver, and its evaluations a step: requests of one length take about as long
SOLVERS = (("dpmpp_2m", 1), ("unipc", 1), ("ddim", 1), ("euler_ancestral", 1), ("heun", 2))
GUIDED = 0.8  # of the requests
LOAD = 0.9  # of what the engine can do
COLLECT = 0.05  # seconds for which static batching waits for more


@dataclass(frozen=True)
class Arrival:
    """A request of the trace, at a time in seconds."""

    at: float
    fields: dict[str, Any]


@dataclass
class Run:
    """What a way of serving gave: seconds from the start, and the images, by request."""

    done: list[float]
    images: list[Tensor]


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """The fields of each request, from one seed."""
    draw, found = np.random.default_rng(seed), []
    for i in range(count):
        solver, evaluations = SOLVERS[draw.integers(len(SOLVERS))]
        steps = int(draw.choice(STEPS, p=SHARES))
        found.append(
            {
                "seeds": i,
                "solver": solver,
                "steps": max(1, steps // evaluations),
                "guidance": 1.5 if draw.random() < GUIDED else None,
                "cond": {"label": int(draw.integers(10))},
            }
        )
    return found


def arrivals(fields: Sequence[dict[str, Any]], rate: float, seed: int) -> list[Arrival]:
    """A Poisson process of so many a second."""
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, len(fields))
    return [Arrival(float(t), f) for t, f in zip(np.cumsum(gaps) - gaps[0], fields, strict=True)]


class Clock:
    """Seconds of a run, on the thread that makes its images.

    Args:
        kind: "wall"; or "cpu", the time of that thread alone, in which waiting takes none: what the
            wall shows on one thread where nothing else runs.
    """

    def __init__(self, kind: str) -> None:
        self._read = time.perf_counter if kind == "wall" else time.thread_time
        self._sleeps = kind == "wall"
        self.start()

    def start(self) -> None:
        self._zero = self._read()

    def __call__(self) -> float:
        return self._read() - self._zero

    def wait(self, until: float) -> None:
        gap = max(0.0, until - self())
        if self._sleeps:
            time.sleep(gap)
        else:
            self._zero -= gap


def continuous(engine: Engine, trace: Sequence[Arrival], kind: str) -> Run:
    """The engine. What has arrived is submitted after each step, before it looks for more."""
    clock, done, jobs = Clock(kind), [0.0] * len(trace), []
    over = threading.Event()

    def submit(_: object) -> None:
        while len(jobs) < len(trace) and trace[len(jobs)].at <= clock():
            job = engine.submit(callback=submit, **trace[len(jobs)].fields)
            jobs.append(job)
            job.add_done_callback(functools.partial(finish, len(jobs) - 1))

    def finish(i: int, _: object) -> None:
        done[i] = clock()
        if not all(job.done() for job in jobs):
            return
        if len(jobs) == len(trace):
            over.set()
        else:
            clock.wait(trace[len(jobs)].at)  # nothing is there to do
            submit(None)

    def begin(_: object) -> None:
        clock.start()
        submit(None)

    engine.submit(steps=1, callback=begin)  # so that all of it is on the engine's thread
    over.wait()
    return Run(done, [job.result() for job in jobs])


class Padded(nn.Module):
    """Runs at least ``floor`` samples, as a batch does that keeps those which are ready."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.floor = model, 0

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        n, more = len(x), max(0, self.floor - len(x))
        if more:
            x, t = (torch.cat([v, v[:1].expand(more, *v.shape[1:])]) for v in (x, t))
            cond = {k: torch.cat([v, v[:1].expand(more)]) for k, v in cond.items()}
        out: Tensor = self.model(x, t, **cond)
        return out[:n]


def static(
    engine: Engine, plans: Sequence[Plan], trace: Sequence[Arrival], kind: str, *, shrinks: bool
) -> Run:
    """Collect, run to the longest, begin again; in this thread."""
    slots, padded = engine.stats().slots, Padded(engine.model)
    null = {"label": torch.tensor(-1)}
    model = FixedSizes(padded, range(1, 2 * slots + 1))  # `engine.model` chooses the sizes
    batch = Batch(model, engine.shape, slots, null, engine.dtype, engine.device)
    done, images = [0.0] * len(trace), [torch.empty(0)] * len(trace)
    clock, taken = Clock(kind), 0
    while taken < len(trace):
        # it begins when it is full or has waited, but not before it is free
        full = trace[min(taken + slots, len(trace)) - 1].at
        clock.wait(min(full, trace[taken].at + COLLECT))
        now = clock()
        while taken < len(trace) and len(batch) < slots and trace[taken].at <= now:
            batch.add(Sample(plans[taken], 0, taken))
            taken += 1
        guided = sum(any(sample.plan.calls) for sample in batch.samples)
        padded.floor = 0 if shrinks else len(batch) + guided
        while batch:
            for _, error in batch.step():
                raise error
            for sample in [s for s in batch.samples if s.done]:
                images[sample.owner] = batch.image(sample)[None].clone()
                done[sample.owner] = clock()
                batch.drop(sample)
    return Run(done, images)


def capacity(engine: Engine, plans: Sequence[Plan], kind: str) -> float:
    """Images a second of a batch that is always full: by samples through the model."""
    n = 2 * engine.stats().slots
    x = torch.zeros(n, *engine.shape, dtype=engine.dtype)
    t, label = torch.full((n,), 500.0), torch.zeros(n, dtype=torch.int64)
    times = []
    for _ in range(9):
        clock = Clock(kind)
        with torch.no_grad():
            engine.model(x, t, label=label)
        times.append(clock())
    evaluations = sum(plan.cost for plan in plans) / len(plans)
    return n / float(np.median(times)) / evaluations


def summary(run: Run, trace: Sequence[Arrival]) -> dict[str, float]:
    late = np.array(run.done) - np.array([arrival.at for arrival in trace])
    p50, p95 = np.quantile(late, [0.5, 0.95])
    throughput = len(trace) / max(run.done)
    return {"images_per_second": throughput, "p50_seconds": float(p50), "p95_seconds": float(p95)}


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/serve.json")
    parser.add_argument("--count", type=int, default=120, help="requests of the trace")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    fields = requests(args.count, args.seed)
    with Engine.from_checkpoint("fashion", slots=args.slots, queue=args.count) as engine:
        plans = [engine.plan(**f) for f in fields]
        able = capacity(engine, plans, args.clock)
        trace = arrivals(fields, LOAD * able, args.seed)
        ways: dict[str, Callable[[], Run]] = {
            "continuous": lambda: continuous(engine, trace, args.clock),
            "static": lambda: static(engine, plans, trace, args.clock, shrinks=False),
            "shrinking": lambda: static(engine, plans, trace, args.clock, shrinks=True),
        }
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                runs[name].append(way())
        solo = [engine.alone(**f) for f in fields]
    unlike = {
        name: sum(
            not torch.equal(image, alone)
            for run in several
            for image, alone in zip(run.images, solo, strict=True)
        )
        for name, several in runs.items()
    }
    found = {
        name: {
            key: float(np.median([summary(run, trace)[key] for run in several]))
            for key in summary(several[0], trace)
        }
        for name, several in runs.items()
    }
    ours = found["continuous"]
    ratios = {
        name: {
            "throughput": ours["images_per_second"] / other["images_per_second"],
            "p95": ours["p95_seconds"] / other["p95_seconds"],
        }
        for name, other in found.items()
        if name != "continuous"
    }
    for name, values in found.items():
        print(name, *(f"{key} {value:.3f}" for key, value in values.items()), sep="  ")
    for name, of in ratios.items():
        print(f"continuous over {name}: throughput {of['throughput']:.2f}, p95 {of['p95']:.2f}")
    print(f"images that differ from their solo run: {unlike}")
    row = {
        "case": "poisson",
        "ways": found,
        "ratios_of_continuous": ratios,
        "targets": {"throughput": ["at least", 1.5], "p95": ["at most", 1.0]},
        "images_unlike_solo": unlike,
        "requests": args.count,
        "slots": args.slots,
        "rounds": args.rounds,
        "clock": args.clock,
        "threads": args.threads,
        "arrivals_per_second": LOAD * able,
        "sizes": list(engine.model.sizes),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "machine": measure.machine_info(),
    }
    measure.write_json(args.out, [row], measure.command("bench_serve", argv))
    if any(unlike.values()):
        raise SystemExit(f"bench_serve: images must be those of their solo runs, got {unlike}")


if __name__ == "__main__":
    main()
