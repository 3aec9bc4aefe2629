"""What a training set is to the trainer, whatever files it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dataset"]


@dataclass(frozen=True)
class Dataset:
    """Labelled images, whole in memory, and what a model card says of them.

    Args:
        images: `(N, C, H, W)` float32 in [-1, 1].
        labels: `(N,)` int64, each an index of `classes`.
        classes: their names.
        name: what the images are, and how they were prepared.
        source: address of the original.
        licence: of the images.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    source: str
    licence: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.float32 or labels.dtype != torch.int64:
            rule = "images must be float32 and labels int64"
            raise TypeError(f"data: {rule}, got {images.dtype} and {labels.dtype}")
        if images.ndim != 4 or not len(images):
            raise ValueError(
                f"data: images must have shape (N, C, H, W) with N >= 1, got {tuple(images.shape)}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"data: labels must have shape ({len(images)},), got {tuple(labels.shape)}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            rule = f"labels must lie in [0, {len(self.classes) - 1}]"
            raise ValueError(f"data: {rule}, got {low} to {high}")

    def draw_weights(self, balance: float) -> Tensor:
        """How often to draw each image: a class of n images gets a share of all draws
        proportional to `n ** balance`, the same for each of its images.

        Args:
            balance: 1 draws every image alike, 0 every class that has images alike.

        Returns:
            `(N,)` float64, of sum 1.
        """
        sizes = self.labels.bincount(minlength=len(self.classes)).double()
        weights = sizes.pow(balance - 1)[self.labels]
        return weights / weights.sum()
