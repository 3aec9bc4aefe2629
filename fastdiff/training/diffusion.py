"""Diffusion of images by the class-conditional U-Net.

Discrete schedule, v-prediction (Salimans & Ho 2022, arXiv:2202.00512), min-SNR weighting (Hang et
al. 2023, arXiv:2303.09556), label dropout for classifier-free guidance (Ho and Salimans 2022,
arXiv:2207.12598).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import data, schedules, solvers
from fastdiff.data import Dataset
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.ops import add_noise
from fastdiff.reference.diffusion import min_snr_weight, simple_loss
from fastdiff.sampler import Sampler
from fastdiff.training.config import TrainConfig
from fastdiff.training.objective import Objective, generator

__all__ = ["Diffusion", "noised"]

_WITH_ARGUMENTS = {"from_betas", "rescale_zero_terminal_snr"}


def noised(
    schedule: schedules.Schedule,
    x0: Tensor,
    t: Tensor,
    seeds: Any,
    *,
    target: str = "epsilon",
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Data at the times `t` of a schedule, and the training target: `ops.add_noise` at alpha(t).

    Args:
        schedule: gives alpha and sigma.
        x0: (N, *S), as `ops.add_noise` takes it.
        t: (N,) times as the schedule counts them, on any device: the coefficients are made on the
            CPU, in float64.
        seeds, target, step: as `ops.add_noise` takes them.

    Returns:
        x and the target, as `ops.add_noise` returns them.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"noised: t must be a tensor, got {type(t).__name__}")
    times = t.detach().cpu().numpy()
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    return add_noise(x0, seeds, alpha, sigma, target=target, step=step)


class Diffusion(Objective):
    """Weighted squared error of the prediction at a random time of a discrete schedule."""

    schedule: schedules.Schedule

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        names = sorted(set(schedules.NAMES) - _WITH_ARGUMENTS)
        if config.schedule not in names:
            rule = f"name a schedule of {names}, got {config.schedule!r}"
            raise ValueError(f"train: schedule must {rule}")
        self.schedule = schedules.NAMES[config.schedule]()
        if self.schedule.alphas_cumprod is None:
            raise ValueError(f"train: schedule must be discrete, got {config.schedule!r}")
        times = torch.arange(len(self.schedule.alphas_cumprod))
        alphas = torch.from_numpy(self.schedule.alpha(times.numpy()))
        sigmas = torch.from_numpy(self.schedule.sigma(times.numpy()))
        self.weights = torch.ones_like(alphas)
        if config.gamma:
            self.weights = min_snr_weight(config.prediction, alphas, sigmas, config.gamma)

    def build(self) -> nn.Module:
        c = self.config
        return UNet(UNetConfig(
            in_channels=self.images.shape[1], image_size=self.images.shape[2],
            num_classes=len(self.classes),
            channels=c.channels, blocks=c.blocks, patch_size=c.patch_size,
        ))  # fmt: skip

    def loss(self, model: nn.Module, index: Tensor, step: int) -> Tensor:
        c = self.config
        x0, label, t = self.batch(index, step)
        x0, times, label = (a.to(c.device) for a in (x0, t.float(), label))
        x, target = self.noisy(x0, t, step)
        with self.autocast():
            output = model(x.contiguous(memory_format=torch.channels_last), times, label)
        return simple_loss(output.float(), target, self.weights[t].float().to(c.device))

    def clean(self, index: Tensor, step: int) -> Tensor:
        """The data that the step noises."""
        return self.images[index]

    def batch(self, index: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Data, labels (-1 where dropped) and integer times of a step."""
        c, n = self.config, len(index)
        draw = generator(c.seed, step, 0)
        # one time in each n-th of the range: the loss varies less than with independent times
        share = (torch.arange(n) + torch.rand(n, generator=draw, dtype=torch.float64)) / n
        t = (share * len(self.weights)).long()
        dropped = torch.rand(n, generator=draw) < c.label_dropout
        label = self.labels[index].masked_fill(dropped, -1)
        return self.clean(index, step), label, t

    def noisy(self, x0: Tensor, t: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the model sees of the data, and what it should answer."""
        return noised(
            self.schedule, x0, t, self.first_seed, target=self.config.prediction, step=step
        )

    def show(self, model: nn.Module, path: Path, rows: int = 8) -> None:
        """A column a class."""
        data.save_grid(self.samples(model, rows), path, len(self.classes))

    def samples(self, model: nn.Module, rows: int) -> Tensor:
        """Samples as the card says, the classes in turn."""
        how, classes = self.sampling(model), len(self.classes)
        table = solvers.build(
            how["solver"], self.schedule, how["steps"], prediction=self.config.prediction
        )
        label = torch.arange(classes).repeat(rows)
        return Sampler(model, table, guidance=how["guidance"], clip=how["clip"])(
            how["shape"], cond={"label": label}, uncond={"label": torch.full_like(label, -1)}
        )

    def sampling(self, model: nn.Module) -> dict[str, Any]:
        """How the card says to sample."""
        c: Any = model.config
        return {
            "solver": "dpmpp_2m",
            "steps": 20,
            "guidance": self.config.guidance,
            "clip": 1.0,
            "shape": [c.in_channels, c.image_size, c.image_size],
        }

    def card(self, model: nn.Module) -> dict[str, Any]:
        return {
            "prediction": self.config.prediction,
            "classes": list(self.classes),
            "sampling": self.sampling(model),
        }
