"""Increments of a Brownian path, and an SDE step with one, against the peers' Brownian trees.

The peer of an increment is torchsde, through the BrownianTreeNoiseSampler that diffusers has of
k-diffusion: "increment" is one of this library's path, "tree" one of torchsde's own tree, by our
kernel. Each call asks for the next step of a schedule of 20, as a sampler does, and starts over at
its end; the tree itself is made once.

The floor of "tree": 45 nodes an increment, each a normal of torch's stream a value, 0.7 ns on one
thread, which is 0.5 ms at the small shape; torchsde draws 55, always on one thread, at 4 ns or
more, and makes 4 passes over memory for each. The nodes are 0.1 ms of interpreter.

python -m benchmarks.bench_brownian --out benchmarks/results/brownian.json
pytest benchmarks/bench_brownian.py --benchmark-only
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff
from benchmarks import measure
from fastdiff.integrations._brownian_tree import BrownianTreeNoiseSampler
from fastdiff.ops import brownian, reverse_step
from fastdiff.path_noise import PathNoise
from fastdiff.reference.brownian import Tree, increment, weighted_normals
from tests.bits import assert_same_bits

# an image latent, a batch of them, a video latent
SHAPES = ((1, 4, 64, 64), (4, 4, 128, 128), (1, 16, 21, 90, 160))
STEPS = 20
# the acceptance of the SDE step, and what the increment alone takes of it; none slower than a peer
TARGETS = {"step": 20.0, "increment": 20.0, "tree": 1.0}


def gate() -> None:
    """The bits of the readable reference, which the tests hold to the law of Brownian motion; and
    of torchsde."""
    got = brownian([1], (4099,), 0.3, 0.4, depth=16)
    numbers, weights = increment(Tree(0.0, 1.0, 16, False), 0.3, 0.4)
    expected = weighted_normals(np.array([1], np.uint64), 4099, numbers, weights, 5)
    assert_same_bits(got, torch.from_numpy(expected), "brownian")
    both = tree((2, 4, 33, 33))
    for _ in range(STEPS):
        assert_same_bits(both["fastdiff"](), both["torchsde"](), "tree")


def _spans() -> list[tuple[float, float]]:
    sigmas = torch.linspace(math.log(14.6), math.log(0.03), STEPS).exp().tolist()
    return list(itertools.pairwise(sigmas))


def tree(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """One normalised increment of torchsde's tree, a seed a sample."""
    peer: Any = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    spans, x, seeds = _spans(), torch.empty(shape), list(range(shape[0]))
    ends = spans[-1][1], spans[0][0]
    own, theirs = itertools.cycle(spans), itertools.cycle(spans)
    ours = BrownianTreeNoiseSampler(x, *ends, seeds)
    torchsde = peer.BrownianTreeNoiseSampler(x, *ends, seeds)
    return {"fastdiff": lambda: ours(*next(own)), "torchsde": lambda: torchsde(*next(theirs))}


def increments(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """One normalised increment, into a tensor that exists where the interface lets it."""
    peer: Any = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    spans, out = _spans(), torch.empty(shape)
    seeds = fastdiff.ops.as_seeds(0, shape[0])
    low, high = spans[-1][1], spans[0][0]
    torchsde = peer.BrownianTreeNoiseSampler(out, low, high, seed=list(range(len(out))))
    own, theirs = itertools.cycle(spans), itertools.cycle(spans)
    end = {"low": low, "high": high, "depth": 20, "geometric": True}

    def ours() -> object:
        return brownian(seeds, shape[1:], *next(own), out=out, **end)

    return {"fastdiff": ours, "torchsde": lambda: torchsde(*next(theirs))}


def steps(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """One call of an SDE solver with its noise: a row of dpmpp_2m_sde, and one of the two calls
    that a step of DPMSolverSDEScheduler takes."""
    from diffusers import DPMSolverSDEScheduler

    table = fastdiff.solvers.build("dpmpp_2m_sde", fastdiff.schedules.scaled_linear(), STEPS)
    path = PathNoise(table)
    x, output = torch.randn(shape), torch.randn(shape)
    states = [x.clone(), x.clone()]
    history = torch.zeros(table.depth, *shape)
    seeds = fastdiff.ops.as_seeds(0, shape[0])
    rows = itertools.cycle(range(len(table) - 1))

    def ours() -> object:
        i = next(rows)
        reverse_step(states[0], output, path.table, i, history=history, out=states[1])
        path.add(i, states[1], None, seeds, None)
        return states[1]

    scheduler = DPMSolverSDEScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, noise_sampler_seed=0
    )
    scheduler.set_timesteps(STEPS)
    calls = len(scheduler.timesteps)
    count = itertools.count()

    def theirs() -> object:
        i = next(count) % (calls - 1)  # the last call enters clean data and draws nothing
        if i == 0:
            tree = scheduler.noise_sampler
            scheduler.set_timesteps(STEPS)
            scheduler.noise_sampler = tree
        return scheduler.step(output, scheduler.timesteps[i], x).prev_sample

    return {"fastdiff": ours, "diffusers": theirs}


CASES = {"increment": increments, "tree": tree, "step": steps}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/brownian.json")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the last so many")
    args = parser.parse_args(argv)
    gate()
    rows = measure.beside_one_peer(CASES, SHAPES[-args.shapes :], TARGETS, args.repeats)
    measure.write_json(args.out, rows, measure.command("bench_brownian", argv))


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("who", (0, 1), ids=("fastdiff", "peer"))
def test_brownian(
    benchmark: Any, threads: int, who: int, shape: tuple[int, ...], case: str
) -> None:
    gate()
    benchmark.group = f"{case} {shape}, {threads} threads"
    benchmark.pedantic(list(CASES[case](shape).values())[who], rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
