"""What a kind of model brings to the loop that all of them share."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.data import Dataset
from fastdiff.schedules import Schedule
from fastdiff.training.config import TrainConfig

__all__ = ["Objective", "generator"]


def generator(seed: int, counter: int, stream: int) -> torch.Generator:
    """The generator of one step (stream 0) or of one epoch's order (stream 1)."""
    # torch's CPU generator takes 32 bits of a seed and drops the rest, so the seeds are folded in
    # by a multiplication (Knuth's, of odd 2^31 / golden ratio) rather than by a shift
    return torch.Generator().manual_seed((stream << 31) + (seed * 1327217885 + counter) % (1 << 31))


class Objective(abc.ABC):
    """A model, its loss, and what its card says.

    Args:
        config: of the run.
        dataset: what it trains on.
    """

    # channels_last where the model convolves images
    memory_format: ClassVar[torch.memory_format] = torch.channels_last
    schedule: Schedule | None = None

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        self.config = config
        self.images, self.labels = dataset.images, dataset.labels
        self.classes = dataset.classes

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """A new model on the CPU; parameters that need no gradient stay as they are."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, index: Tensor, step: int) -> Tensor:
        """The loss of the images `index` at a step, a scalar; a function of these, the weights
        and the seed alone."""

    @abc.abstractmethod
    def show(self, model: nn.Module, path: Path, rows: int = 8) -> None:
        """Write a grid of what the model makes."""

    @abc.abstractmethod
    def card(self, model: nn.Module) -> dict[str, Any]:
        """Entries of the card beside those of every run."""

    def finish(self, model: nn.Module) -> None:
        """What is measured once, with the final weights; nothing unless there is something."""
        return None

    def autocast(self) -> torch.autocast:
        """The arithmetic of the forward pass."""
        c = self.config
        return torch.autocast(c.device.split(":")[0], torch.bfloat16, c.dtype == "bfloat16")

    @property
    def first_seed(self) -> int:
        """Of a batch's noises: a seed is an image's place in the batch; runs of other seeds have
        places of their own."""
        return self.config.seed * self.config.batch % (1 << 62)
