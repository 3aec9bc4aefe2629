"""Models and requests for the tests of `fastdiff.serve`."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from fastdiff import schedules
from fastdiff.serve import Engine

SHAPE = (3, 4, 5)
NULL = {"label": torch.tensor(-1)}

# one to three terms of history, noise, two evaluations a step, rows without a model call, a state
# kept beside x, learned steps ("u" of CFG++), every kind of guidance, clipping, several images
REQUESTS: tuple[dict[str, Any], ...] = (
    {"seeds": [3, 2**64 - 1], "solver": "dpmpp_2m", "steps": 9, "guidance": 1.3},
    {"seeds": 4, "solver": "heun", "steps": 4},
    {"seeds": 5, "solver": "unipc", "steps": 7, "guidance": 3.0, "guidance_rescale": 0.7},
    {"seeds": 6, "solver": "euler", "steps": 6, "options": {"s_churn": 2.0}, "clip": 1.0},
    {"seeds": 7, "solver": "dpmpp_2m_sde", "steps": 5, "guidance": 2.0, "clip": 0.5},
    {"seeds": 8, "solver": "ddpm", "steps": 12, "guidance": [1.0, 1.5] * 6},
    {"seeds": 9, "solver": "dpmpp_3m_sde", "steps": 6, "guidance": lambda i, level: 1.0 + level},
    {"seeds": 10, "solver": "euler_cfg_pp", "steps": 5, "guidance": 1.0},
    {"seeds": 11, "solver": "sa_solver", "steps": 5, "guidance": 2.5,
     "guidance_interval": (0.1, 3.0)},
    {"seeds": 12, "solver": "restart", "steps": 5},
)  # fmt: skip


def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Elementwise, so of the same bits in every batch."""
    column = (-1, 1, 1, 1)
    return x * 0.5 + t.view(column) * 2.0**-10 + label.view(column) * 2.0**-3


def engine(of: Any = model, **options: Any) -> Engine:
    """An engine of four slots for a model that needs no sizes of its own."""
    options = {"slots": 4, "sizes": range(1, 9), "null": NULL, **options}
    return Engine(of, schedules.scaled_linear(), SHAPE, **options)


class Clock:
    """Time as a test sets it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """`model` that runs only when it is let: as many calls as there were `open`s.

    Attributes:
        entered: is set while a call waits or has run since it was last cleared.
        batches: labels of each call's samples.
    """

    def __init__(self) -> None:
        self.permits, self.entered = threading.Semaphore(0), threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.batches.append(label.tolist())
        self.entered.release()
        if not self.permits.acquire(timeout=60):
            raise TimeoutError("Gate: nobody opened it")
        return model(x, t, label)

    def open(self, calls: int) -> None:
        for _ in range(calls):
            self.permits.release()

    def wait(self) -> None:
        """Until the next call has begun."""
        if not self.entered.acquire(timeout=60):
            raise TimeoutError("Gate: nobody came")
