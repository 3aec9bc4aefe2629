"""Training by the processes of torchrun, each on its share of every batch
(`torch.nn.parallel.DistributedDataParallel`).

Every process draws the order of the images alike, and an image's noise goes by its place in the
whole batch; times and dropped labels go by process, evenly spaced in each. So a run is a function
of its seed and of the number of processes, and a resumed one repeats it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastdiff import _ranks
from fastdiff.training.config import TrainConfig

if TYPE_CHECKING:
    from fastdiff.training.objective import Objective

__all__ = ["Share"]

Loss = Callable[[Tensor, int], Tensor]


class _LossOf(nn.Module):
    """A loss as a module, so that all that it asks of the model happens in one forward pass."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self._objective = model, objective

    def forward(self, index: Tensor, step: int) -> Tensor:
        return self._objective.loss(self.model, index, step)


class Share:
    """The part of a run that this process does: all of it, unless torchrun started several.

    Args:
        config: of the whole run.

    Attributes:
        config: of this process: its device, its number of images, a seed of its own.
        rank, size: number of this process, and of all.

    Raises:
        ValueError: the batch is no multiple of the number of processes.
    """

    def __init__(self, config: TrainConfig) -> None:
        device = _ranks.local_device(config.device, "train")
        self._ranks = _ranks.join(device)
        self.rank, self.size = self._ranks.rank, self._ranks.size
        if config.batch % self.size:
            self.leave()
            raise ValueError(
                f"train: batch must be a multiple of the {self.size} processes, got {config.batch}"
            )
        # seed * batch, at which the noises of a batch start, is then the place of the share's
        # first image in the whole batch
        self.config = replace(
            config,
            device=device,
            seed=config.seed * self.size + self.rank,
            batch=config.batch // self.size,
        )

    def index(self, whole: Tensor) -> Tensor:
        """This process's images of a batch."""
        n = self.config.batch
        return whole[self.rank * n : (self.rank + 1) * n]

    def loss(self, model: nn.Module, objective: Objective) -> Loss:
        """The loss of images at a step; its gradients are means over all processes."""
        if self.size == 1:
            return lambda index, step: objective.loss(model, index, step)
        device = torch.device(self.config.device)
        ids = None if device.type == "cpu" else [device.index]
        return cast(Loss, nn.parallel.DistributedDataParallel(_LossOf(model, objective), ids))

    def mean(self, loss: Tensor) -> float:
        """The mean over all processes."""
        total = loss.detach().clone()
        self._ranks.sum(total)
        return total.item() / self.size

    def agreed(self, value: Any) -> Any:
        """The first process's value."""
        return self._ranks.share(lambda: value)

    def leave(self) -> None:
        """The end of the run, in all processes."""
        self._ranks.finish(lambda done: None)
