"""Train a model on a CPU, the small class-conditional U-Net in about an hour.

One loop (`run`) trains every kind of model; a kind is an `Objective`: its network, its loss, its
sample grid and its part of the card.
"""

from fastdiff.training.command import main, parse
from fastdiff.training.config import TrainConfig, progress_of
from fastdiff.training.diffusion import noised
from fastdiff.training.run import OBJECTIVES, Run, train

__all__ = ["OBJECTIVES", "Run", "TrainConfig", "main", "noised", "parse", "progress_of", "train"]
