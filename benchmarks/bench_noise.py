"""`fastdiff.randn` against `torch.randn`, both into a tensor that exists.

python -m benchmarks.bench_noise --out benchmarks/results/noise.json
pytest benchmarks/bench_noise.py --benchmark-only
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff
from benchmarks import measure
from fastdiff.reference.noise import normals
from tests.bits import assert_same_bits

# 4 MiB, which stays in cache, and 32 MiB, which does not
SIZES = (2**20, 2**23)
# target of torch's time over ours, by number of threads; torch draws on one thread whatever it has
TARGETS = {1: 2.5, 2: 4.0}


def gate() -> None:
    """The bits of the readable reference, which the tests hold to published vectors."""
    got = fastdiff.randn([1], (4099,), step=2, stream=1)
    expected = torch.from_numpy(normals(np.array([1], np.uint64), 4099, 2, 1))
    assert_same_bits(got, expected, "randn")


def functions(size: int) -> dict[str, Callable[[], object]]:
    """What is timed side by side for one size."""
    out = torch.empty(1, size)
    seeds = fastdiff.ops.as_seeds(0, 1)
    target = torch.empty(1, size)
    return {
        "fastdiff": lambda: fastdiff.randn(seeds, (size,), out=out),
        "torch.randn": lambda: torch.randn(1, size, out=target),
        "copy": lambda: target.copy_(out),
    }


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/noise.json")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, nargs="+", default=list(reversed(TARGETS)))
    args = parser.parse_args(argv)
    gate()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size in SIZES:
            stats = measure.interleaved(functions(size), repeats=args.repeats)
            aim = {"torch.randn": ("at least", TARGETS[threads])} if threads in TARGETS else {}
            facts = {"shape": [1, size], "dtype": "float32", "threads": threads}
            r = measure.row("randn", stats, "fastdiff", aim, bytes=4 * size, **facts)
            r["nanoseconds_a_normal"] = stats["fastdiff"].best / size * 1e9
            rows.append(r)
            measure.show(r, f"{r['nanoseconds_a_normal']:.3f} ns each")
    measure.write_json(args.out, rows, measure.command("bench_noise", argv))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", ("fastdiff", "torch.randn", "copy"))
def test_randn(benchmark: Any, threads: int, who: str, size: int) -> None:
    gate()
    benchmark.group = f"{size} normals, {threads} threads"
    benchmark.pedantic(functions(size)[who], rounds=21, warmup_rounds=2)


if __name__ == "__main__":
    main()
