"""What the tests of training read from a run's folder."""

from pathlib import Path

import torch

from fastdiff.training import TrainConfig


def losses(config: TrainConfig) -> list[float]:
    """The loss of every step of a run, as its last checkpoint has them."""
    state = torch.load(Path(config.out) / "last.pt", weights_only=True)
    found: list[float] = state["losses"].tolist()
    return found
