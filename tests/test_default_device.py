"""What was given on the CPU stays there where torch's default device is another one.

The meta device stands in for a GPU: it has no memory, so that nothing can be computed there unseen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff import AdaptiveSampler, Sampler, StepTable, schedules, solvers
from fastdiff.likelihood import DiffusionLikelihood
from fastdiff.ops import _results

SCHEDULE = schedules.linear(T=20)
X = torch.linspace(-1.0, 1.0, 8).view(2, 1, 2, 2)
EVEN = torch.full((19,), 1 / 19)


def model(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.1


def euler(denoiser: Callable[..., Tensor], x: Tensor, sigmas: Sequence[Any]) -> Tensor:
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * (x - denoiser(x, now * torch.ones(len(x)))) / now
    return x


def table(name: str = "euler_ancestral") -> StepTable:
    return solvers.build(name, SCHEDULE, 4)


def likelihood() -> DiffusionLikelihood:
    return DiffusionLikelihood(model, SCHEDULE)


def adaptive_sigmas() -> Tensor:
    seen: list[Tensor] = []
    sampler = AdaptiveSampler(model, SCHEDULE, rtol=0.1, atol=0.1)
    sampler((3, 4), callback=lambda step: seen.append(step.sigma))
    return torch.stack(seen)


CASES: dict[str, Callable[[], Tensor]] = {
    "Sampler": lambda: Sampler(model, table(), thresholding=0.9, noise="brownian")((3, 8, 8)),
    "AdaptiveSampler": adaptive_sigmas,
    "from_callable": lambda: torch.tensor(
        StepTable.from_callable(euler, [8.0, 2.0, 0.5, 0.0]).floats, device="cpu"
    ),
    "bound": lambda: likelihood().bound(X, 0).total,
    "bound, some": lambda: likelihood().bound(X, 0, probabilities=EVEN, draws=4).total,
    "flow": lambda: likelihood().flow(X, 0).nats,
    "flow, uniform": lambda: likelihood().flow(X, 0, start="uniform", exact=True).decoder,
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_under_another_default(name: str) -> None:
    expected = CASES[name]()
    with torch.device("meta"):
        got = CASES[name]()
    assert_same_bits(got, expected)


def test_memory_of_results_is_on_the_cpu() -> None:
    results = _results.Results()  # without memory from before
    x = fastdiff.randn(0, (1 << 16,))
    with torch.device("meta"):
        assert results.empty_like(x).is_cpu
        assert results.new_empty(x, (1 << 17,), device="cpu").is_cpu
