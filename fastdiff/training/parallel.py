"""Training by the processes of torchrun, each on its share of every batch, and with all weights
(`torch.nn.parallel.DistributedDataParallel`) or with its part of them (`fastdiff.training.shards`).

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
from fastdiff.training import shards
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
        # torch brings the arguments of a sharded module to its device; the images stay on the CPU
        return self._objective.loss(self.model, index.cpu(), step)


class Share:
    """The part of a run that this process does: all of it, unless torchrun started several.

    Args:
        config: of the whole run.

    Attributes:
        config: of this process: its device, its number of images, a seed of its own.
        rank, size: number of this process, and of all.
        sharded: whether it has a part of the weights alone.

    Raises:
        ValueError: the batch is no multiple of the number of processes.
    """

    def __init__(self, config: TrainConfig) -> None:
        device = _ranks.local_device(config.device, "train")
        self._ranks = _ranks.join(device)
        self.rank, self.size = self._ranks.rank, self._ranks.size
        self.sharded = config.shard and self.size > 1
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

    def place(self, model: nn.Module, ema: nn.Module, objective: Objective) -> Loss:
        """Bring both models to the device, in place.

        Returns:
            The loss of images at a step; its gradients are means over all processes.
        """
        if self.sharded:
            device = torch.device(self.config.device)
            shards.cut(ema, device)
            return cast(Loss, shards.cut(_LossOf(model, objective), device))
        for each in (model, ema):
            self._to_device(each, objective)
        if self.size == 1:
            return lambda index, step: objective.loss(model, index, step)
        return cast(Loss, nn.parallel.DistributedDataParallel(_LossOf(model, objective)))

    def _to_device(self, model: nn.Module, objective: Objective) -> nn.Module:
        layout: dict[str, Any] = {
            "memory_format": objective.memory_format, "device": self.config.device,
        }  # fmt: skip
        return model.to(**layout)

    def whole(self, state: Any) -> Any:
        """Nested state with all tensors whole, in the first process; None in the others."""
        if self.sharded:
            state = shards.whole(state, self.rank == 0)
        return state if self.rank == 0 else None

    def whole_model(self, model: nn.Module, objective: Objective) -> nn.Module | None:
        """The model with its weights whole, in the first process; None in the others."""
        if not self.sharded:
            return model if self.rank == 0 else None
        state = self.whole(model.state_dict())
        if state is None:
            return None
        found = objective.build()
        found.load_state_dict(state)
        return self._to_device(found, objective).requires_grad_(False).eval()

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
