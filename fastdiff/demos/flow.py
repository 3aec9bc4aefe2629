"""RealNVP trained on two moons by maximum likelihood."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import checkpoints
from fastdiff._plot import pyplot
from fastdiff.demos import Options
from fastdiff.reference.flow import RealNVP

LAYERS, HIDDEN, STEPS, BATCH, RATE = 8, 64, 1800, 256, 5e-3
HELD_OUT = 4000


def moons(n: int, generator: torch.Generator) -> Tensor:
    """`(n, 2)`: two half circles of radius 1 that reach into each other, blurred by 0.08."""
    angle = math.pi * torch.rand(n, generator=generator)
    side = torch.randint(2, (n,), generator=generator)
    x = torch.where(side == 0, angle.cos(), 1 - angle.cos())
    y = torch.where(side == 0, angle.sin(), 0.5 - angle.sin())
    points = torch.stack([x - 0.5, y - 0.25], 1)
    return points + 0.08 * torch.randn(n, 2, generator=generator)


def fit(options: Options) -> tuple[RealNVP, Tensor, list[float]]:
    """The trained flow, points that it has not seen, and the loss by step in nats."""
    generator = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model = RealNVP(2, LAYERS, HIDDEN)
    steps = STEPS // 100 if options.quick else STEPS
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = -model.log_prob(moons(BATCH, generator)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return model.eval().requires_grad_(False), moons(HELD_OUT, generator), losses


def draw(options: Options) -> Any:
    """Data, samples, density and the warped grid of the latent plane."""
    plt = pyplot("demo")
    model, points, losses = fit(options)
    nats = -model.log_prob(points)
    if options.save is not None:
        card = {
            "name": options.save.name,
            "data": {"name": "two moons, blurred by 0.08"},
            "training": {"steps": len(losses), "batch": BATCH, "loss": losses[-1]},
        }
        checkpoints.save(options.save, model, None, card)
        np.save(options.save.with_name(options.save.name + ".npy"), points.numpy())

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    shown = {"xlim": (-2.1, 2.1), "ylim": (-1.35, 1.35), "aspect": "equal"}
    data_axis, sample_axis, density_axis, grid_axis = axes.flat
    data_axis.scatter(*points[:1500].numpy().T, s=4, lw=0, color="C0")
    data_axis.set(title="data: two moons", **shown)

    seeds = list(range(options.seed, options.seed + 1500))
    sample_axis.scatter(*model.sample(seeds).numpy().T, s=4, lw=0, color="C1")
    sample_axis.set(title="samples: noise through the inverse", **shown)

    line, column = torch.linspace(-2.1, 2.1, 280), torch.linspace(-1.35, 1.35, 180)
    plane = torch.stack(torch.meshgrid(line, column, indexing="xy"), -1)
    value = model.log_prob(plane.view(-1, 2)).view(plane.shape[:2]).exp()
    drawn = density_axis.pcolormesh(
        line.numpy(), column.numpy(), value.numpy(), cmap="viridis", shading="auto"
    )
    figure.colorbar(drawn, ax=density_axis, label="p(x)", shrink=0.85)
    mean, error = float(nats.mean()), float(nats.std()) / math.sqrt(len(nats))
    density_axis.set(
        title=f"density; held out, $-\\log p$ = {mean:.3f} $\\pm$ {error:.3f} nats", **shown
    )

    fine = torch.linspace(-2.5, 2.5, 240)
    for place in torch.linspace(-2.5, 2.5, 21):
        still = torch.full_like(fine, float(place))
        across = model.inverse(torch.stack([fine, still], 1))
        along = model.inverse(torch.stack([still, fine], 1))
        grid_axis.plot(*across.numpy().T, lw=0.7, color="C2")
        grid_axis.plot(*along.numpy().T, lw=0.7, color="C4")
    grid_axis.set(title="a square grid of latents $z$, seen in $x$", **shown)
    for axis in axes.flat:
        axis.set(xlabel="$x_1$", ylabel="$x_2$")
    return figure
