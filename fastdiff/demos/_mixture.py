"""The mixture that several demos draw from, and paths of solvers on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff import schedules, solvers
from fastdiff.ops import Stream, randn
from fastdiff.reference.gmm import GaussianMixture
from fastdiff.sampler import Sampler
from fastdiff.table import StepTable

F64 = torch.float64

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.25, 0.3, 0.15], dtype=F64),
    torch.tensor([[-1.6, 0.9], [1.3, 1.4], [0.9, -1.2], [-1.1, -1.5]], dtype=F64),
    torch.tensor(
        [[[0.20, 0.16], [0.16, 0.20]], [[0.16, -0.11], [-0.11, 0.14]],
         [[0.36, 0.0], [0.0, 0.05]], [[0.06, 0.0], [0.0, 0.06]]],
        dtype=F64,
    ),
)  # fmt: skip


# no spacing is best for all solvers; on this one each shows its order from few steps on
SCHEDULE, SPACING = schedules.linear(), "karras"


def table_of(solver: str, steps: int) -> StepTable:
    """The solver on the schedule above."""
    return solvers.build(solver, SCHEDULE, steps, prediction="sample", spacing=SPACING)


def path(mixture: GaussianMixture, solver: str, steps: int, seeds: list[int]) -> Tensor:
    """States of a run with the exact denoiser, start and end included: `(rows + 1, N, D)`."""
    sampler = Sampler(mixture.network(SCHEDULE, "sample"), table_of(solver, steps))
    start = randn(seeds, (mixture.dim,), stream=Stream.INITIAL)
    states = [step.x.clone() for step in sampler.iter((mixture.dim,), seeds=seeds)]
    return torch.stack([start, *states])


def density(axis: Any, mixture: GaussianMixture, reach: float = 3.2) -> None:
    """Shade the square from -reach to reach by the density, with equal axes."""
    line = torch.linspace(-reach, reach, 160, dtype=F64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    value = mixture.log_prob(grid).exp().sqrt()  # the root shows the tails too
    axis.contourf(line.numpy(), line.numpy(), value.numpy(), levels=12, cmap="Greys", alpha=0.6)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axis.set_xticks([-2, 0, 2])
    axis.set_yticks([-2, 0, 2])
