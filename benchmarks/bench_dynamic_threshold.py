"""Dynamic thresholding against diffusers' `_threshold_sample`, and its quantile against torch's.

python -m benchmarks.bench_dynamic_threshold --out benchmarks/results/dynamic_threshold.json
pytest benchmarks/bench_dynamic_threshold.py --benchmark-only
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import measure
from fastdiff.ops import dynamic_threshold, quantile_abs
from tests.bits import assert_same_bits

# an image of pixels, for which it was made, a batch of small ones, a large one
SHAPES = ((1, 3, 256, 256), (16, 3, 64, 64), (4, 3, 1024, 1024))
RATIO = 0.995
TARGETS = {"threshold": 8.0, "quantile": 8.0}


def gate() -> None:
    """The quantile is torch's in float64, rounded."""
    x = torch.randn(3, 10_007, generator=torch.Generator().manual_seed(0))
    exact = torch.quantile(x.double().abs(), RATIO, dim=1).float()
    assert_same_bits(quantile_abs(x, RATIO), exact, "quantile_abs")


def thresholds(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """The whole operation; the peer allocates its results, so ours does."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=RATIO, sample_max_value=100.0
    )
    x = torch.randn(shape) * 2
    return {
        "fastdiff": lambda: dynamic_threshold(x, RATIO, max_value=100.0),
        "diffusers": lambda: scheduler._threshold_sample(x),
    }


def quantiles(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """The quantile alone."""
    x = torch.randn(shape) * 2
    flat = x.flatten(1)
    return {
        "fastdiff": lambda: quantile_abs(x, RATIO),
        "torch.quantile": lambda: torch.quantile(flat.abs(), RATIO, dim=1),
    }


CASES = {"threshold": thresholds, "quantile": quantiles}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/dynamic_threshold.json")
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args(argv)
    gate()
    rows = measure.beside_one_peer(CASES, SHAPES, TARGETS, args.repeats)
    measure.write_json(args.out, rows, measure.command("bench_dynamic_threshold", argv))


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("who", (0, 1), ids=("fastdiff", "peer"))
def test_dynamic_threshold(
    benchmark: Any, threads: int, who: int, shape: tuple[int, ...], case: str
) -> None:
    gate()
    benchmark.group = f"{case} {shape}, {threads} threads"
    benchmark.pedantic(list(CASES[case](shape).values())[who], rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
