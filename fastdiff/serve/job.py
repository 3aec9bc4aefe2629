"""A request that was accepted, as its client sees it: a future of its images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.serve._batch import Sample
from fastdiff.serve.request import Plan


class DeadlineExceeded(TimeoutError):
    """The images were not ready in the time that their request allowed."""


class Progress(NamedTuple):
    """How far a job is.

    Attributes:
        done: rows that ran, of all its images; a row is a model evaluation and its step, or a step
            alone.
        total: rows of all its images.
    """

    done: int
    total: int


class Job(Future[Tensor]):
    """The images of a request, (N, *S) float32, when they are ready.

    A `concurrent.futures.Future`, so `result`, `exception`, `add_done_callback`,
    `concurrent.futures.wait` and `asyncio.wrap_future` work as on any other. `cancel` succeeds
    while the job is not done, at any step; the images of others are not touched.

    Attributes:
        plan: what was asked for.
        client: on whose account.
        expires: when, by the clock of the engine; None: never.
        samples: its images, as a batch runs them; none when it is done.
    """

    def __init__(
        self,
        plan: Plan,
        client: str,
        expires: float | None,
        callback: Callable[[Progress], object] | None,
    ) -> None:
        super().__init__()
        self.plan, self.client, self.expires = plan, client, expires
        self.samples: tuple[Sample, ...] = tuple(
            Sample(plan, i, self) for i in range(len(plan.seeds))
        )
        self._callback, self._images, self._left = callback, torch.empty(0), len(self.samples)
        self._last: Progress | None = None

    @property
    def progress(self) -> Progress:
        """How far it is, at any time."""
        total = len(self.plan.seeds) * len(self.plan.table)
        now = Progress(sum(sample.row for sample in self.samples), total)
        return self._last or now  # in this order: `release` may come between

    def release(self) -> None:
        """Let go of the samples, which know their job: a cycle that would hold on to images."""
        self._last = self.progress
        self.samples = ()

    def tell(self) -> None:
        """Tell the callback, if there is one."""
        if self._callback is not None:
            self._callback(self.progress)

    def keep(self, sample: Sample, image: Tensor) -> bool:
        """Copy an image that is ready; whether it was the last."""
        if len(self._images) == 0:
            self._images = image.new_empty(len(self.plan.seeds), *image.shape)
        self._images[sample.index] = image
        self._left -= 1
        return self._left == 0

    def settle(self, error: BaseException | None = None) -> None:
        """Give the images, or the reason why there are none, to whoever waits; the first holds."""
        # a client may cancel at any moment, so there is nothing to ask beforehand
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.set_result(self._images)
            else:
                self.set_exception(error)
