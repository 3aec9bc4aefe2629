"""Side-by-side timing in one process: functions called in rotation, ratios taken round by round.

A ratio of two medians measured minutes apart says as much about the machine's other jobs as about
the code, so every function of a comparison runs once a round and a ratio is the median over the
rounds. On a machine that others use, a thread that loses its core for one scheduler quantum makes
everybody's call as long as the quantum; `quiet` ratios, of the fastest round of each, say what the
code costs when that does not happen. Both are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

# one timing covers at least this long, so that the clock's own 50 ns do not show
_LEAST_SECONDS = 200e-6
# what takes longer has filled its caches and started its threads in a small part of that
_LONG_SECONDS = 0.2


@dataclass(frozen=True)
class Stats:
    """Seconds of one call.

    Attributes:
        samples: one mean time a round, in the order of the rounds.
        inner: calls a round.
    """

    samples: tuple[float, ...]
    inner: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p10(self) -> float:
        return float(np.quantile(self.samples, 0.1))

    @property
    def p90(self) -> float:
        return float(np.quantile(self.samples, 0.9))

    @property
    def best(self) -> float:
        return min(self.samples)

    def times(self, other: Stats) -> tuple[float, float, float]:
        """(median, p10, p90) over the rounds of how many times longer this takes than ``other``."""
        each = [a / b for a, b in zip(self.samples, other.samples, strict=True)]
        low, high = np.quantile(each, [0.1, 0.9])
        return statistics.median(each), float(low), float(high)


def _timed(function: Callable[[], object], calls: int) -> float:
    clock = time.perf_counter
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / calls


def interleaved(
    functions: dict[str, Callable[[], object]], repeats: int = 31, warmup: int = 3
) -> dict[str, Stats]:
    """Times of every function, called in rotation.

    Args:
        functions: by name; each is called without arguments and its result dropped.
        repeats: rounds that count.
        warmup: rounds before them; they also choose how many calls a round a fast function gets.
    """
    inner: dict[str, int] = {}
    long: set[str] = set()
    for name, function in functions.items():
        function()  # lazy set-up is nobody's step time
        once = min(_timed(function, 1) for _ in range(max(1, warmup)))
        inner[name] = max(1, round(_LEAST_SECONDS / max(once, 1e-9)))
        if once > _LONG_SECONDS:
            long.add(name)
    for _ in range(warmup):
        for name, function in functions.items():
            if name not in long:
                _timed(function, inner[name])
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(repeats):
        for name in order:
            if name not in long:
                functions[name]()  # everybody starts on the caches that its own last call left
            samples[name].append(_timed(functions[name], inner[name]))
        order.append(order.pop(0))  # nobody always runs on the caches of the same neighbour
    return {name: Stats(tuple(samples[name]), inner[name]) for name in functions}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def machine_info() -> dict[str, Any]:
    """What a reader needs to judge a number: machine, versions, threads, load, commit."""
    import fastdiff
    from fastdiff._machine import cpu_model
    from fastdiff.ops import _native

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "isa": _native.extension.isa() if _native.extension else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "diffusers": _version("diffusers"),
        "fastdiff": fastdiff.__version__,
        "commit": _commit(),
    }


def row(
    case: str,
    stats: dict[str, Stats],
    ours: str,
    targets: dict[str, tuple[str, float]] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """One JSON row: times of all functions of a case and the ratios to ``ours``.

    Args:
        ours: the key of ``stats`` that is this library.
        targets: by peer, ("at least" | "at most", ratio of the peer's time to ours).
        facts: shape, threads, bytes, ...
    """
    times = {
        name: {
            "best": s.best,
            "median": s.median,
            "p10": s.p10,
            "p90": s.p90,
            "rounds": len(s.samples),
        }
        for name, s in stats.items()
    }
    ratios = {
        name: {
            **dict(zip(("median", "p10", "p90"), s.times(stats[ours]), strict=True)),
            "quiet": s.best / stats[ours].best,
        }
        for name, s in stats.items()
        if name != ours
    }
    return {
        "case": case,
        "ours": ours,
        "seconds": times,
        "ratios": ratios,
        "targets": {k: list(v) for k, v in (targets or {}).items()},
        "machine": machine_info(),
        **facts,
    }


def beside_one_peer(
    cases: Mapping[str, Callable[[tuple[int, ...]], dict[str, Callable[[], object]]]],
    shapes: Sequence[tuple[int, ...]],
    targets: Mapping[str, float],
    repeats: int,
) -> list[dict[str, Any]]:
    """Rows of every case at every shape, float32 on two threads, printed as they come.

    Args:
        cases: by name, what gives two functions of a shape: "fastdiff" and the peer's.
        targets: by name of the case, how many times ours the peer's time should be at least.
        repeats: rounds; one more warms up, since a first call may make a tree, and a peer's
            call may take seconds.
    """
    torch.set_num_threads(2)
    rows = []
    for shape in shapes:
        for case, functions in cases.items():
            stats = interleaved(functions(shape), repeats=repeats, warmup=1)
            (peer,) = set(stats) - {"fastdiff"}
            target = {peer: ("at least", targets[case])}
            facts = {"shape": list(shape), "dtype": "float32", "threads": 2}
            rows.append(row(case, stats, "fastdiff", target, **facts))
            show(rows[-1])
    return rows


def show(row: dict[str, Any], *facts: str) -> None:
    """Print a row that `row` made: the case, our times, the facts, the peers' times over ours."""
    ours = row["seconds"][row["ours"]]
    ratios = [
        f"{name} takes {r['quiet']:.2f} times as long in the fastest round, {r['median']:.2f} "
        f"({r['p10']:.2f} to {r['p90']:.2f}) in the median"
        for name, r in row["ratios"].items()
        if name != "copy"  # its ratio is the roofline's
    ]
    shape = "x".join(map(str, row["shape"]))
    times = f"{ours['best'] * 1e6:.1f} us best, {ours['median'] * 1e6:.1f} us median"
    case = f"{row['threads']} threads {row['case']} {shape} {row.get('dtype', '')}".rstrip()
    print(f"{case}: {'; '.join([times, *facts, *ratios])}", flush=True)


# Variables that change times: of the allocator, the thread pools and the instruction sets.
_VARIABLES = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "OMP_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "FASTDIFF_CPU_ISA",
)


def command(module: str, argv: Sequence[str]) -> str:
    """How this process was started, for the rows that it makes."""
    variables = [f"{k}={shlex.quote(os.environ[k])}" for k in _VARIABLES if k in os.environ]
    return " ".join([*variables, f"python -m benchmarks.{module}", *map(shlex.quote, argv)])


def parser(
    doc: str | None, out: str, repeats: int, threads: Sequence[int]
) -> argparse.ArgumentParser:
    """The options of a benchmark with a compiled peer."""
    found = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    found.add_argument("--out", default=f"benchmarks/results/{out}.json")
    found.add_argument("--repeats", type=int, default=repeats)
    found.add_argument("--threads", type=int, nargs="+", default=list(threads))
    found.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return found


def write_json(path: str | Path, rows: Sequence[dict[str, Any]], command: str) -> None:
    """Rows to a file, each with the command that made it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = [{**r, "command": command} for r in rows]
    path.write_text(json.dumps(stamped, indent=1) + "\n")
