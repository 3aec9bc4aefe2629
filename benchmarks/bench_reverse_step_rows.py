"""`ops.reverse_step` on rows of every shape that solvers have, against a copy of the same bytes.

    python -m benchmarks.bench_reverse_step_rows --out benchmarks/results/reverse_step_rows.json

bench_reverse_step.py has the peers; this says what a term, a second output and guidance cost. The
rows are written out, so that no solver's schedule decides what is measured.

Predicted before it was measured: without noise a row of k tensors takes k / 2 copies where they lie
in memory, since 16 elements of the longest row cost 30 instructions of 512 bits, 5 ns, and their
bytes 30 ns. Two draws cost 16 elements 124 instructions: twice the bytes of their row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

import fastdiff
from benchmarks import measure
from fastdiff.ops import as_seeds, reverse_step
from fastdiff.table import Row, StepTable

SHAPES = ((8, 4, 128, 128), (1, 16, 21, 90, 160))
AT_MOST = 1.35  # times a copy of the row's bytes, 2 threads

# name: (the last row of a table, tensors that it reads and writes)
ROWS: dict[str, tuple[dict[str, Any], int]] = {
    "first order": ({"x": {"x": 0.9, "m": 0.1}}, 3),
    "guided": ({"x": {"x": 0.9, "m": 0.1}}, 4),
    "with model input": ({"x": {"x": 0.9, "m": 0.1}}, 4),
    "two past": ({"x": {"x": 0.9, "d": 0.1, "h0": 0.2, "h1": 0.3}, "push": True}, 6),
    "three past": ({"x": {"x": 0.9, "d": 0.1, "h0": 0.2, "h1": 0.3, "h2": 0.1}, "push": True}, 7),
    "slope pushed": ({"x": {"x": 0.9, "d": 0.1, "h0": 0.2, "h1": 0.3}, "push": (0.5, -0.5)}, 6),
    "two outputs, sample": (
        {
            "x": {"y": 0.9, "d": 0.1, "h0": 0.2, "h1": 0.3},
            "y": {"y": 0.8, "d": 0.2, "h0": 0.1, "h1": 0.1},
            "convert": (0.0, 1.0),
            "push": True,
        },
        7,
    ),
    "two outputs, epsilon": (
        {
            "x": {"y": 0.9, "d": 0.1, "h0": 0.2, "h1": 0.3},
            "y": {"y": 0.8, "d": 0.2, "h0": 0.1, "h1": 0.1},
            "push": True,
        },
        8,
    ),
    "two outputs, two draws": (
        {
            "x": {"y": 0.9, "d": 0.1, "h0": 0.2, "h1": 0.3, "n1": 0.1},
            "y": {"y": 0.8, "d": 0.2, "h0": 0.1, "h1": 0.1, "n2": 0.1},
            "draws": ((1, 1), (2, 1)),
            "push": True,
        },
        8,
    ),
}


def table(row: dict[str, Any]) -> StepTable:
    """Rows that push and write the anchor, the row, and one that reads what it pushed."""
    first = [Row(x={"x": 1.0}, y={"x": 1.0}, time=9.0 - i, push=True) for i in range(3)]
    given = {"convert": (1.1, -0.4), "time": 5.0, **row}
    after = Row(x={"x": 1.0, "h0": 0.1, "h1": 0.1}, time=4.0)
    return StepTable("row", (*first, Row(**given), after))


def functions(name: str, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    rows, row = table(ROWS[name][0]), 3
    x, m, u, y = (fastdiff.randn(range(k, k + shape[0]), shape[1:]) for k in (1, 100, 200, 300))
    history = torch.stack([m] * max(1, rows.depth))
    out, target = torch.empty_like(x), torch.empty_like(x)
    more: dict[str, Any] = {"uncond": u, "guidance": 3.0} if name == "guided" else {}
    if name == "with model input":
        more["model_input"] = torch.empty_like(x)
    seeds = as_seeds(0, shape[0])
    return {
        "fastdiff": lambda: reverse_step(
            x, m, rows, row, y=y, history=history, seeds=seeds, out=out, **more
        ),
        "copy": lambda: target.copy_(x),
    }


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/reverse_step_rows.json")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    args = parser.parse_args(argv)
    found = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for name, (row, passes) in ROWS.items():
                stats = measure.interleaved(functions(name, shape), repeats=args.repeats)
                ours, copy = stats["fastdiff"], stats["copy"]
                share = passes / 2  # a copy moves two tensors
                over = {
                    "median": ours.times(copy)[0] / share,
                    "quiet": ours.best / copy.best / share,
                    "at most": AT_MOST if threads == 2 and "draws" not in row else None,
                }
                size = torch.Size(shape).numel()
                found.append(
                    measure.row(
                        f"row: {name}", stats, "fastdiff", shape=list(shape), dtype="float32",
                        threads=threads, bytes=4 * passes * size, over_roofline=over,
                    )
                )  # fmt: skip
                print(
                    f"{threads} threads {shape!s:<22} {name:<24} {ours.best * 1e6:8.1f} us, "
                    f"{over['quiet']:.2f} of roofline in the fastest rounds, "
                    f"{over['median']:.2f} in the median",
                    flush=True,
                )
    measure.write_json(args.out, found, measure.command("bench_reverse_step_rows", argv))


if __name__ == "__main__":
    main()
