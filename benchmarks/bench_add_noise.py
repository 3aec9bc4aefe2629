"""`ops.add_noise` against what training code writes: `randn_like` and the scheduler of diffusers.

    python -m benchmarks.bench_add_noise --out benchmarks/results/add_noise.json
    pytest benchmarks/bench_add_noise.py --benchmark-only

The peers, each with its own noise: `DDPMScheduler.add_noise` and `get_velocity` from the package,
and the chain of PyTorch operations, eager and compiled, with its coefficients at hand.

Predicted before it was measured, an element in float32: the op reads 4 bytes and writes 8, and 8
more where a store first fetches its line; 16 normals cost 62 vector instructions and the two
results 6 more, which at two instructions of 512 bits a cycle and 3 GHz is 0.7 ns on one core, as
long as 20 bytes take on it at 28 GB/s. The chain for v_prediction draws its normals on one thread
(3.5 ns each) and moves 17 passes of 4 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from diffusers import DDPMScheduler

from benchmarks import measure
from fastdiff import schedules
from fastdiff.ops import add_noise, as_seeds, randn
from tests.budget import assert_within_budget

# a batch of small images, and of latents
SHAPES = ((64, 3, 64, 64), (16, 4, 64, 64))
TARGETS = ("epsilon", "v_prediction")
TARGET = 6.0  # the chain's time over ours, 2 threads
_BYTES = 12  # an element that cannot be avoided

Coefficients = tuple[torch.Tensor, torch.Tensor]


def _times(count: int) -> tuple[torch.Tensor, Coefficients]:
    """A time a sample over the whole schedule, with its float32 coefficients."""
    t = torch.linspace(0, 999, count).long()
    schedule = schedules.linear()
    both = (torch.from_numpy(f(t.numpy())).float() for f in (schedule.alpha, schedule.sigma))
    return t, (next(both), next(both))


def chain(x0: torch.Tensor, coefficients: Coefficients, target: str) -> Any:
    """What is replaced."""
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in coefficients)
    noise = torch.randn_like(x0)
    x = alpha * x0 + sigma * noise
    return x, noise if target == "epsilon" else alpha * noise - sigma * x0


def scheduler(peer: DDPMScheduler, x0: torch.Tensor, t: torch.Tensor, target: str) -> Any:
    """The same by diffusers."""
    noise = torch.randn_like(x0)
    x = peer.add_noise(x0, noise, t)
    return x, noise if target == "epsilon" else peer.get_velocity(x0, noise, t)


def gate() -> None:
    """Both results within the error budget of the formula in float64, on the op's own noise."""
    x0, noise = randn([1, 2, 3], (700,)), randn([5, 6, 7], (700,), stream=4)
    alpha, sigma = _times(3)[1]
    for target in TARGETS:
        answers = []
        for dtype in (torch.float32, torch.float64):
            a, s = (c.to(dtype).view(3, 1) for c in (alpha, sigma))
            x = a * x0.to(dtype) + s * noise.to(dtype)
            v = a * noise.to(dtype) - s * x0.to(dtype)
            answers.append((x, noise.to(dtype) if target == "epsilon" else v))
        got = add_noise(x0, 5, alpha, sigma, target=target)
        for g, plain, exact in zip(got, *answers, strict=True):
            assert_within_budget(g, plain, exact, ulps=0)


def functions(
    shape: tuple[int, ...], target: str, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """What is timed side by side; every call makes its outputs anew, as training does."""
    x0 = randn(range(shape[0]), shape[1:])
    t, coefficients = _times(shape[0])
    seeds, peer, to = as_seeds(0, shape[0]), DDPMScheduler(), torch.empty_like(x0)
    who: dict[str, Callable[[], object]] = {
        "fastdiff": lambda: add_noise(x0, seeds, *coefficients, target=target),
        "eager": lambda: chain(x0, coefficients, target),
        "diffusers": lambda: scheduler(peer, x0, t, target),
    }
    if compiled:
        fused = torch.compile(chain, dynamic=False)
        who["compiled"] = lambda: fused(x0, coefficients, target)
    return who | {"copy": lambda: to.copy_(x0)}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = measure.parser(__doc__, "add_noise", 41, (2, 1)).parse_args(argv)
    gate()
    # the compiler's worker processes would still be starting while the first case is timed
    torch._inductor.config.compile_threads = 1
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for target in TARGETS:
                torch._dynamo.reset()
                who = functions(shape, target, not args.no_compile)
                stats = measure.interleaved(who, repeats=args.repeats)
                size = torch.Size(shape).numel()
                r = measure.row(
                    f"add_noise {target}",
                    stats,
                    "fastdiff",
                    {"eager": ("at least", TARGET)} if threads == 2 else {},
                    bytes=_BYTES * size,
                    shape=list(shape),
                    dtype="float32",
                    threads=threads,
                )
                # a copy moves 8 bytes an element
                r["roofline"] = stats["fastdiff"].best / (stats["copy"].best * _BYTES / 8)
                r["nanoseconds_an_element"] = stats["fastdiff"].best / size * 1e9
                rows.append(r)
                nanoseconds = f"{r['nanoseconds_an_element']:.2f} ns an element"
                measure.show(r, nanoseconds, f"{r['roofline']:.1f} times its bytes at copy speed")
    measure.write_json(args.out, rows, measure.command("bench_add_noise", argv))


@pytest.mark.parametrize("shape", SHAPES, ids=("64x3x64x64", "16x4x64x64"))
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("who", ("fastdiff", "eager", "diffusers"))
def test_add_noise(
    benchmark: Any, threads: int, who: str, target: str, shape: tuple[int, ...]
) -> None:
    gate()
    benchmark.group = f"{target} {shape}, {threads} threads"
    benchmark.pedantic(functions(shape, target)[who], rounds=21, warmup_rounds=2)


if __name__ == "__main__":
    main()
