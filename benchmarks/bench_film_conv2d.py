"""`ops.film_conv2d` against the bare convolution and the eager block around it.

    python -m benchmarks.bench_film_conv2d --out benchmarks/results/film_conv2d.json
    pytest benchmarks/bench_film_conv2d.py --benchmark-only

GroupNorm, FiLM, SiLU, 3x3 convolution from C to C channels, residual: the floor is the convolution
alone, which is the vendor's on both sides; what stands around it is one pass before and one in
place behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

from benchmarks import measure
from fastdiff.ops import film_conv2d
from fastdiff.reference import film_conv2d as reference
from tests.budget import assert_within_budget

GROUPS = 32
SHAPES = ((16, 128, 32, 32), (16, 256, 16, 16), (4, 320, 64, 64), (64, 128, 32, 32))
# time over ours, 2 threads, bf16: at most 1.35 times the bare convolution
TARGET = {"convolution": ("at least", 1 / 1.35)}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    n, c = shape[:2]

    def normal(*size: int) -> torch.Tensor:
        t = torch.randn(size, generator=generator).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if len(size) == 4 else t

    return {"x": normal(*shape), "weight": normal(c, c, 3, 3) / (3 * c**0.5), "bias": normal(c),
            "norm_weight": normal(c), "norm_bias": normal(c), "scale": normal(n, c),
            "shift": normal(n, c), "residual": normal(*shape)}  # fmt: skip


def block(given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is replaced."""
    h = F.group_norm(given["x"], GROUPS, given["norm_weight"], given["norm_bias"])
    h = h * (1 + given["scale"][..., None, None]) + given["shift"][..., None, None]
    return F.conv2d(F.silu(h), given["weight"], given["bias"], padding=1) + given["residual"]


def ours(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return film_conv2d(**given, num_groups=GROUPS, act="silu", padding=1)


def gate(dtype: torch.dtype) -> None:
    given = inputs((2, 64, 8, 8), dtype)
    exact = block({k: v.double() for k, v in given.items()})
    plain = reference.film_conv2d(**given, num_groups=GROUPS, act="silu", padding=1)
    assert_within_budget(ours(given), plain, exact, ulps=4)  # as tests/test_film_conv2d.py has it


def functions(
    shape: tuple[int, ...], dtype: torch.dtype, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    given = inputs(shape, dtype)
    target = torch.empty_like(given["x"])
    who: dict[str, Callable[[], object]] = {
        "fastdiff": lambda: ours(given),
        "convolution": lambda: F.conv2d(given["x"], given["weight"], given["bias"], padding=1),
        "eager": lambda: block(given),
        "copy": lambda: target.copy_(given["x"]),
    }
    if compiled:
        fused = torch.compile(block, dynamic=False)
        who["compiled"] = lambda: fused(given)
    return who


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = measure.parser(__doc__, "film_conv2d", 15, (2,)).parse_args(argv)
    # the compiler's worker processes would still be starting while the first case is timed
    torch._inductor.config.compile_threads = 1
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.bfloat16, torch.float32):
            gate(dtype)
            for shape in SHAPES:
                torch._dynamo.reset()
                who = functions(shape, dtype, not args.no_compile)
                stats = measure.interleaved(who, repeats=args.repeats)
                hit = threads == 2 and dtype == torch.bfloat16
                row = measure.row(
                    "film_conv2d channels_last",
                    stats,
                    "fastdiff",
                    TARGET if hit else {},
                    shape=list(shape),
                    dtype=str(dtype).removeprefix("torch."),
                    threads=threads,
                )
                # multiplications of the convolution over the time of the whole block
                n, c, h, w = shape
                row["tflops"] = 2 * n * h * w * c * c * 9 / stats["fastdiff"].median / 1e12
                rows.append(row)
                measure.show(row, f"{row['tflops']:.2f} TFLOP/s")
    measure.write_json(args.out, rows, measure.command("bench_film_conv2d", argv))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("who", ("fastdiff", "convolution", "eager"))
def test_film_conv2d(benchmark: Any, who: str, shape: tuple[int, ...]) -> None:
    gate(torch.bfloat16)
    benchmark.group = f"film_conv2d {shape}"
    with torch.no_grad():
        run = functions(shape, torch.bfloat16)[who]
        benchmark.pedantic(run, rounds=7, warmup_rounds=1)


if __name__ == "__main__":
    main()
