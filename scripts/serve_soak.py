"""A long run of the serving engine under random requests: is anything lost, does anything grow?

    python scripts/serve_soak.py --minutes 60 --threads 1 > scripts/logs/serve_soak.log

Requests of one to three images come at random times, in turns too few and too many for the engine,
of many solvers, guided or not. Some are cancelled, some have a deadline (a few of them hopeless),
some a callback that raises. Once a minute: resident memory, open files, threads, and how the
requests ended. One image in a hundred is made again alone (`Engine.alone`) and compared by sha256.

The exit code is 1 where a request has no end or a wrong one, an image differs, or, in the second
half of the run, open files or threads become more or memory rises: its slope by least squares, less
two standard errors, is above 1 MiB an hour. In the first half caches fill: 64 tables of rows, the
shapes that the model's libraries keep.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import os
import platform
import random
import threading
import time
from typing import Any

import numpy as np
import torch

from fastdiff.serve import DeadlineExceeded, Engine, Job, Progress, QueueFull

# one evaluation a step and two, history of none to three rows, noise, a corrector, rows without a
# model call
SOLVERS = (
    "dpmpp_2m", "unipc", "ddim", "euler_ancestral", "heun", "dpmpp_2m_sde", "dpmpp_3m_sde",
    "ddpm", "sa_solver", "deis", "euler_cfg_pp", "restart",
)  # fmt: skip
CHECKED = 100  # one image in so many
SLOPE = 1.0  # MiB an hour
LOADS = (0.4, 0.8, 2.5)  # of what the engine can do, in turn


class Refused(Exception):
    """What the callbacks of some requests raise."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request of the trace: its fields, how it is meant to end early, and the pause behind it."""

    fields: dict[str, Any]
    client: str
    deadline: float | None
    cancel_after: float | None
    raises_at: int | None
    pause: float


def trace(draw: random.Random, rate: float) -> Ask:
    """The next request, at so many images a second on average."""
    count = draw.choice((1, 1, 1, 2, 3))
    guided = draw.random() < 0.6
    solver = draw.choice(SOLVERS)
    fields: dict[str, Any] = {
        "seeds": [draw.getrandbits(64) for _ in range(count)],
        "solver": solver,
        "steps": draw.randint(3, 24),
        "clip": draw.choice((None, 1.0)),
        "guidance": draw.uniform(1.0, 3.0) if guided or solver == "euler_cfg_pp" else None,
        "cond": {"label": draw.randrange(-1, 10)},
    }
    if guided and draw.random() < 0.2:
        fields["guidance_rescale"] = 0.7
    if guided and draw.random() < 0.2:
        fields["guidance_interval"] = (0.2, 5.0)
    fate = draw.random()
    return Ask(
        fields,
        f"client {draw.randrange(6)}",
        deadline=draw.choice((0.01, 1.0, 5.0, 60.0)) if draw.random() < 0.3 else None,
        cancel_after=draw.uniform(0, 3) if fate < 0.1 else None,
        raises_at=draw.randrange(6) if fate > 0.97 else None,
        pause=draw.expovariate(rate / count),
    )


class Ledger:
    """How requests ended; called from the engine's thread, the cancellers' and this one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: collections.Counter[str] = collections.Counter()
        self.images = 0
        self.checks: list[tuple[dict[str, Any], int, str]] = []
        self.wrong: list[str] = []

    def count(self, what: str, by: int = 1) -> None:
        with self.lock:
            self.ends[what] += by

    def end(self, ask: Ask, job: Job) -> None:
        """Of a job that is done: as it was meant to, or wrong."""
        if job.cancelled():
            self.count("cancelled")
            if ask.cancel_after is None:
                self.wrong.append(f"cancelled by nobody: {ask.fields}")
            return
        error = job.exception()
        if isinstance(error, DeadlineExceeded) and ask.deadline is not None:
            self.count("late")
        elif isinstance(error, Refused) and ask.raises_at is not None:
            self.count("callback raised")
        elif error is not None:
            self.wrong.append(f"{type(error).__name__}: {error}: {ask.fields}")
            self.count("failed")
        else:
            self.deliver(ask, job)

    def deliver(self, ask: Ask, job: Job) -> None:
        images = job.result()
        self.count("delivered")
        if len(images) != len(ask.fields["seeds"]) or not bool(torch.isfinite(images).all()):
            self.wrong.append(f"{tuple(images.shape)}, or not finite: {ask.fields}")
        with self.lock:
            for i in range(len(images)):
                self.images += 1
                if self.images % CHECKED == 0:
                    self.checks.append((ask.fields, i, digest(images[i])))


def digest(image: torch.Tensor) -> str:
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


def submit(engine: Engine, ask: Ask, ledger: Ledger) -> None:
    """One request, and whoever cancels it."""
    left = [ask.raises_at or 0]

    def raise_later(_: Progress) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Refused

    callback = None if ask.raises_at is None else raise_later
    try:
        job = engine.submit(
            client=ask.client, deadline=ask.deadline, callback=callback, **ask.fields
        )
    except QueueFull:
        ledger.count("refused: queue full")
        return
    ledger.count("accepted")
    job.add_done_callback(lambda done: ledger.end(ask, done))
    if ask.cancel_after is not None:
        timer = threading.Timer(ask.cancel_after, job.cancel)
        timer.daemon = True
        job.add_done_callback(lambda _: timer.cancel())
        timer.start()


def check(engine: Engine, ledger: Ledger) -> None:
    """Make again, alone, what is noted for it; a request's other images are left out."""
    with ledger.lock:
        checks, ledger.checks = ledger.checks, []
    for fields, i, expected in checks:
        alone = engine.alone(**{**fields, "seeds": fields["seeds"][i : i + 1]})
        ledger.count("compared")
        if digest(alone[0]) != expected:
            ledger.wrong.append(f"image {i} is not the one made alone: {fields}")


def rate_of(engine: Engine) -> float:
    """Images a second that the engine makes of requests as the trace has them."""
    draw, images, start = random.Random(1), 0, time.perf_counter()
    for _ in range(4):
        jobs = [engine.submit(**trace(draw, 1.0).fields) for _ in range(32)]
        images += sum(len(job.result()) for job in jobs)
    return images / (time.perf_counter() - start)


def memory() -> float:
    """Resident, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def slope(minutes: list[float], values: list[float]) -> tuple[float, float]:
    """Of a line through the values, an hour, and its standard error."""
    t, y = np.asarray(minutes) / 60, np.asarray(values)
    t = t - t.mean()
    found = float((t * (y - y.mean())).sum() / (t * t).sum())
    rest = y - y.mean() - found * t
    return found, float(np.sqrt((rest * rest).sum() / (len(t) - 2) / (t * t).sum()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=60, help="seconds between samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="fashion")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine, ledger = Engine.from_checkpoint(args.model, slots=8, queue=64), Ledger()
    rate, draw = rate_of(engine), random.Random(args.seed)
    print(
        f"# seed {args.seed}, {args.threads} threads, {args.model}, {rate:.1f} images a second; "
        f"Python {platform.python_version()}, torch {torch.__version__}, {engine.dtype}",
        "minute\tMiB\tfiles\tthreads\twaiting\trunning\timages\tends",
        sep="\n",
        flush=True,
    )
    rows: list[tuple[float, float, int, int]] = []
    start = sampled = time.perf_counter()
    while (now := time.perf_counter()) < start + args.minutes * 60:
        if now >= sampled + args.every:
            sampled = now
            files, tasks = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            # a timer is a thread for as long as its request waits to be cancelled
            tasks -= sum(isinstance(t, threading.Timer) for t in threading.enumerate())
            rows.append(((now - start) / 60, memory(), files, tasks))
            stats = engine.stats()
            print(
                f"{rows[-1][0]:.1f}\t{rows[-1][1]:.1f}\t{files}\t{tasks}\t{stats.waiting}\t"
                f"{stats.running}\t{ledger.images}\t{dict(sorted(ledger.ends.items()))}",
                flush=True,
            )
        turn = int((now - start) / 60) % len(LOADS)
        ask = trace(draw, rate * LOADS[turn])
        submit(engine, ask, ledger)
        check(engine, ledger)
        time.sleep(ask.pause)
    engine.shutdown()
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer):
            timer.join()
    check(engine, ledger)
    return verdict(engine, ledger, rows)


def verdict(engine: Engine, ledger: Ledger, rows: list[tuple[float, float, int, int]]) -> int:
    ends, faults = ledger.ends, list(ledger.wrong)
    lost = ends["accepted"] - sum(
        ends[end] for end in ("delivered", "cancelled", "late", "callback raised", "failed")
    )
    stats = engine.stats()
    if lost or stats.waiting or stats.running:
        faults.append(f"{lost} requests without an end; {stats}")
    settled = rows[len(rows) // 2 :]
    rise, error = slope([row[0] for row in settled], [row[1] for row in settled])
    if rise - 2 * error > SLOPE:
        faults.append(f"memory rises by {rise:.2f} +- {error:.2f} MiB an hour")
    part = max(1, len(settled) // 4)
    for name, at in (("files", 2), ("threads", 3)):
        first, last = (min(row[at] for row in rows) for rows in (settled[:part], settled[-part:]))
        if last > first:
            faults.append(f"{name} rose from {first} to {last}")
    print(f"# {ledger.images} images, {dict(sorted(ends.items()))}, {lost} lost")
    print(f"# memory: {rise:+.2f} +- {error:.2f} MiB an hour from minute {settled[0][0]:.0f} on")
    for fault in faults:
        print(f"# WRONG {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
