"""`ops.guidance_rescale` with a guided step against diffusers' `rescale_noise_cfg` and its step.

    python -m benchmarks.bench_guidance_rescale --out benchmarks/results/guidance_rescale.json
    pytest benchmarks/bench_guidance_rescale.py --benchmark-only

Predicted before it was measured, an element in float32: the factor reads 8 bytes, which is what a
copy moves, and costs 16 instructions of 512 bits for 16 elements; so it takes as long as a copy
(measured: 0.4 ns an element on one core, four copies where both outputs lie in a cache).
The guided step after it reads both outputs again and moves 16 bytes. diffusers' chain makes the
guided output, two deviations, the rescaled and the mixed output: 14 passes before its step begins.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

import fastdiff
from benchmarks import measure
from fastdiff.ops import guidance_rescale, reverse_step
from fastdiff.reference.guidance_rescale import guidance_rescale as plain
from tests.budget import assert_within_budget

SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128), (1, 16, 21, 90, 160))
WEIGHT, PHI, ROW, STEPS = 7.5, 0.7, 24, 50
# the factor's bytes over those of a copy, 2 threads, large shapes
ROOFLINE = 1.35


def gate() -> None:
    """The factor is within the error budget of the formula in float64."""
    c, u = fastdiff.randn([1, 2], (4, 100, 100)), fastdiff.randn([3, 4], (4, 100, 100))
    exact = plain(c.double(), u.double(), WEIGHT, PHI)
    got = guidance_rescale(c, u, WEIGHT, PHI)
    assert_within_budget(got, plain(c, u, WEIGHT, PHI), exact, ulps=4)


def functions(shape: tuple[int, ...]) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed side by side: the factor alone, and the whole guided step."""
    x, c, u = (fastdiff.randn(range(k, k + shape[0]), shape[1:]) for k in (1, 100, 200))
    out, target = torch.empty_like(x), torch.empty_like(x)
    table = fastdiff.solvers.build("ddim", fastdiff.schedules.linear(), STEPS, spacing="trailing")
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(STEPS)
    time = int(scheduler.timesteps[ROW])

    def theirs() -> torch.Tensor:
        m = u + WEIGHT * (c - u)
        return rescale_noise_cfg(m, c, guidance_rescale=PHI)

    def ours() -> torch.Tensor:
        scale = guidance_rescale(c, u, WEIGHT, PHI)
        return reverse_step(x, c, table, ROW, uncond=u, guidance=WEIGHT, scale=scale, out=out)

    copy = {"copy": lambda: target.copy_(x)}
    return {
        "factor": {"fastdiff": lambda: guidance_rescale(c, u, WEIGHT, PHI), **copy},
        "rescaled step": {
            "fastdiff": ours,
            "diffusers": lambda: scheduler.step(theirs(), time, x, return_dict=False)[0],
            **copy,
        },
    }


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/guidance_rescale.json")
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args(argv)
    gate()
    rows = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for what, who in functions(shape).items():
                stats = measure.interleaved(who, repeats=args.repeats)
                facts: dict[str, Any] = {"shape": list(shape), "dtype": "float32"}
                ours, copy = stats["fastdiff"], stats["copy"]
                if what == "factor":
                    large = threads == 2 and shape != SHAPES[0]
                    facts["over_roofline"] = {
                        "median": ours.times(copy)[0],
                        "quiet": ours.best / copy.best,
                        "at most": ROOFLINE if large else None,
                    }
                rows.append(
                    measure.row(
                        f"guidance_rescale {what}", stats, "fastdiff", threads=threads, **facts
                    )
                )
                measure.show(rows[-1])
    measure.write_json(args.out, rows, measure.command("bench_guidance_rescale", argv))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("who", ("fastdiff", "diffusers"))
def test_rescaled_step(benchmark: Any, threads: int, who: str, shape: tuple[int, ...]) -> None:
    gate()
    benchmark.group = f"rescaled step {shape}, {threads} threads"
    benchmark.pedantic(functions(shape)["rescaled step"][who], rounds=21, warmup_rounds=2)


if __name__ == "__main__":
    main()
