"""`ops.modulate` against what DiT code writes between two matrix products.

    python -m benchmarks.bench_modulate --out benchmarks/results/modulate.json
    pytest benchmarks/bench_modulate.py --benchmark-only

Three jobs at the shapes of DiT-S/2 and DiT-XL/2: the norm with scale and shift alone; the same
after a gated residual (one call a half block); and diffusers' AdaLayerNormZero whole, with the
linear layer that makes its modulation, against the same layer and `modulate`.

Predicted before it was measured: eager passes over memory three times for the first job and five
for the second, where one pass of two and of four tensors would do: 3 and 3.5 times the bytes. A
copy of these tensors stays in the third-level cache, 60 GB/s and more on one core of the machine of
the results, which is 0.4 cycles an element in float32. The sums and the modulation take 0.3 cycles
an element with vectors of 512 bits, and reading the token from the first-level cache in each pass
as much again. So the floor is the copy where that reaches memory, and about twice the copy in
cache; conversions of 16-bit elements, a dozen integer instructions for 16 of them, come on top of
half the bytes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

from benchmarks import measure
from fastdiff.ops import modulate, randn
from tests.budget import assert_within_budget

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.models.normalization import AdaLayerNormZero

SHAPES = {"S/2": (8, 256, 384), "XL/2": (2, 256, 1152)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# tensors of the size of x that must be read and written
TENSORS = {"norm": 2, "residual": 4, "adaLN-Zero": 2}
Functions = dict[str, Callable[[], Any]]


def plain(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """What is replaced: `modulate` of facebookresearch/DiT around torch's norm."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def plain_residual(
    x: torch.Tensor, h: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + gate[:, None] * h
    return plain(total, scale, shift), total


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, residual, and the six chunks of a modulation."""
    x, h = randn([1, 2], shape).to(dtype)
    film = 0.3 * randn([3], (shape[0], 6 * shape[-1]))[0]
    return (x, h, *film.to(dtype).chunk(6, dim=1))


def gate() -> None:
    """Both results within the error budget of the plain formula in the same dtype."""
    for dtype in DTYPES.values():
        x, h, shift, scale, g, *_ = tensors((2, 5, 384), dtype)
        got = modulate(x, scale, shift, residual=h, gate=g)
        args = (x, h, g, scale, shift)
        exact = plain_residual(*(t.double() for t in args))
        for a, b, c in zip(got, plain_residual(*args), exact, strict=True):
            assert_within_budget(a, b, c, ulps=1.5)  # the last rounding, and one before it


def functions(
    shape: tuple[int, ...], dtype: torch.dtype, compiled: bool = False
) -> dict[str, Functions]:
    """By job, what is timed side by side; every call makes its results anew."""
    x, h, shift, scale, g, *_ = tensors(shape, dtype)
    target = torch.empty_like(x)
    layer = AdaLayerNormZero(shape[-1]).to(dtype).eval()
    embedding = randn([4], (shape[0], shape[-1]))[0].to(dtype)

    def ours_with_linear() -> torch.Tensor:
        film = layer.linear(F.silu(embedding)).chunk(6, dim=1)
        return modulate(x, film[1], film[0])

    jobs: dict[str, Functions] = {
        "norm": {
            "fastdiff": lambda: modulate(x, scale, shift),
            "eager": lambda: plain(x, scale, shift),
        },
        "residual": {
            "fastdiff": lambda: modulate(x, scale, shift, residual=h, gate=g),
            "eager": lambda: plain_residual(x, h, g, scale, shift),
        },
        "adaLN-Zero": {
            "fastdiff": ours_with_linear,
            "diffusers": lambda: layer(x, emb=embedding)[0],
        },
    }
    if compiled:
        norm = torch.compile(plain, dynamic=False)
        residual = torch.compile(plain_residual, dynamic=False)
        whole = torch.compile(layer, dynamic=False)
        jobs["norm"]["compiled"] = lambda: norm(x, scale, shift)
        jobs["residual"]["compiled"] = lambda: residual(x, h, g, scale, shift)
        jobs["adaLN-Zero"]["compiled"] = lambda: whole(x, emb=embedding)[0]
    for who in jobs.values():
        who["copy"] = lambda: target.copy_(x)
    return jobs


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = measure.parser(__doc__, "modulate", 31, (2, 1)).parse_args(argv)
    gate()
    # the compiler's worker processes would still be starting while the first case is timed
    torch._inductor.config.compile_threads = 1
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for model, shape in SHAPES.items():
            for kind, dtype in DTYPES.items():
                torch._dynamo.reset()
                for job, who in functions(shape, dtype, not args.no_compile).items():
                    stats = measure.interleaved(who, repeats=args.repeats)
                    size = torch.Size(shape).numel() * dtype.itemsize
                    facts = {"model": model, "shape": list(shape), "dtype": kind}
                    r = measure.row(
                        f"modulate {job}",
                        stats,
                        "fastdiff",
                        bytes=TENSORS[job] * size,
                        threads=threads,
                        **facts,
                    )
                    # a copy moves two tensors
                    r["roofline"] = stats["fastdiff"].best / (stats["copy"].best * TENSORS[job] / 2)
                    rows.append(r)
                    measure.show(r, f"{r['roofline']:.1f} times its bytes at copy speed")
    measure.write_json(args.out, rows, measure.command("bench_modulate", argv))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("job", "who"),
    [(j, w) for j in TENSORS for w in ("fastdiff", "diffusers" if "ada" in j else "eager")],
)
def test_modulate(benchmark: Any, job: str, who: str, shape: Any, dtype: torch.dtype) -> None:
    with torch.no_grad():
        gate()
        benchmark.group = f"{job} {shape} {dtype}"
        benchmark.pedantic(functions(shape, dtype)[job][who], rounds=21, warmup_rounds=2)


if __name__ == "__main__":
    main()
