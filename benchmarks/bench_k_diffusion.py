"""A step of `integrations.k_diffusion` against the same step of k-diffusion, with a free model.

    python -m benchmarks.bench_k_diffusion --out benchmarks/results/k_diffusion.json

A function is called as its user calls it, on 20 Karras levels of float32, with a model that hands
out one tensor, so that the time is the function's own: arithmetic, noise, and what it does a call.
The noise of a step is torch's on both sides, drawn by the same calls; for the "sde" functions it is
one tensor that is handed out too, since an increment of torchsde's tree, the default of both, would
hide all else, and in rows of their own that tree: torchsde's there, ours of the same bits here.
"counter" is ours on ours.

Predicted, in passes over the state: DPM-Solver++(2M) reads x, the answer and the last one and
writes x and the history, 5 passes; k-diffusion's expression makes 7 tensors and reads 11. Euler is
3 passes to 9, but its draw, which k-diffusion makes and does not use, costs more than either.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

import fastdiff
from benchmarks import measure
from benchmarks.peer_samplers import k_sampling
from fastdiff.integrations import k_diffusion
from tests.budget import assert_within_budget

STEPS = 20
SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128))
SIGMAS = k_diffusion.get_sigmas_karras(STEPS, 0.03, 14.6)

# function, and what is special: what draws its noise on both sides, None where it takes none
CASES = {
    "sample_euler": "torch",
    "sample_euler_ancestral": "torch",
    "sample_heun": "torch",
    "sample_dpm_2_ancestral": "torch",
    "sample_lms": None,
    "sample_dpmpp_2s_ancestral": "torch",
    "sample_dpmpp_2m": None,
    "sample_dpmpp_sde": "given",
    "sample_dpmpp_2m_sde": "given",
    "sample_dpmpp_3m_sde": "given",
    "sample_dpmpp_sde on its tree": "tree",
    "sample_dpmpp_2m_sde on its tree": "tree",
}
CHURNED = ("sample_euler", "sample_heun")  # they take no noise sampler, and add no noise here


def bound(
    function: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *,
    given: bool = False,
    sigmas: torch.Tensor = SIGMAS,
    **options: Any,
) -> Callable[[], torch.Tensor]:
    """The function's call on a model that costs nothing, with noise that does if it is `given`."""
    answer, noise = (
        fastdiff.randn(range(k, k + len(x)), x.shape[1:]).to(x.dtype) for k in (50, 90)
    )
    if given:
        options["noise_sampler"] = lambda sigma, sigma_next: noise
    levels = sigmas.to(x.dtype)
    return lambda: function(lambda x, sigma: answer, x, levels, disable=True, **options)


def gate(name: str, peer: Any) -> None:
    """Equal results on levels that end above 0, within the budget of float32.

    Raises:
        AssertionError: they are not; nothing is timed then.
    """
    x = fastdiff.randn(range(4), (4, 8, 8)) * 14.6
    given = CASES[name] is not None and name not in CHURNED
    exact, theirs, got = (
        bound(getattr(where, name.split()[0]), state, given=given, sigmas=SIGMAS[:-1])()
        for where, state in ((peer, x.double()), (peer, x), (k_diffusion, x))
    )
    assert_within_budget(got, theirs, exact, ulps=STEPS)


def measure_case(name: str, shape: tuple[int, ...], peer: Any, repeats: int) -> dict[str, Any]:
    """One row of results at the present number of threads; seconds of a whole call."""
    x = fastdiff.randn(range(shape[0]), shape[1:]) * 14.6
    function, given = name.split()[0], CASES[name] == "given"
    ours = getattr(k_diffusion, function)
    timed = {
        "fastdiff": bound(ours, x, given=given),
        "k-diffusion": bound(getattr(peer, function), x, given=given),
    }
    if CASES[name] is not None:
        timed["fastdiff, counter noise"] = bound(ours, x, noise="counter")
    stats = measure.interleaved(timed, repeats=repeats)
    return measure.row(
        name, stats, "fastdiff",
        shape=list(shape), dtype="float32", threads=torch.get_num_threads(), steps=STEPS,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/k_diffusion.json")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    given = parser.parse_args(args)
    peer = k_sampling()
    if peer is None:
        raise SystemExit("bench_k_diffusion: k-diffusion must be installed to compare with it")
    for name in CASES:
        gate(name, peer)
    rows = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for name in CASES:
                r = measure_case(name, shape, peer, given.repeats)
                rows.append(r)
                measure.write_json(given.out, rows, measure.command("bench_k_diffusion", args))
                each = {k: t["median"] / STEPS * 1e6 for k, t in r["seconds"].items()}
                print(
                    f"{threads} threads {name:<26} {shape!s:<18} us a step: "
                    + ", ".join(f"{who} {t:.1f}" for who, t in each.items())
                    + f"; {r['ratios']['k-diffusion']['median']:.2f} times ours",
                    flush=True,
                )


if __name__ == "__main__":
    main()
