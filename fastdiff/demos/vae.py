"""A VAE with a latent plane, trained on the spot on Fashion-MNIST."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff import data
from fastdiff._plot import pyplot
from fastdiff.demos import Options
from fastdiff.reference.vae import VAE, Decoder, Encoder

HIDDEN, STEPS, BATCH, RATE = 256, 3000, 128, 2e-3
SIDE, REACH = 17, 3.0  # of the grid of decoded latents
BETWEEN = 9  # images of an interpolation, its ends included
PAIRS = ((9, 7), (7, 5), (8, 0), (1, 3), (2, 4), (6, 9))  # classes of the ends
SHOWN = 2500


def fit(options: Options) -> tuple[VAE, list[float]]:
    """The trained VAE and its loss by step: -ELBO in nats an image, grey levels as probabilities.

    Raises:
        FileNotFoundError: the images are missing; the message says how to get them.
    """
    images = (data.fashion_mnist("train", options.data, 28)[0] + 1) / 2
    shape = tuple(images.shape[1:])
    generator = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model = VAE(Encoder(shape, 2, HIDDEN), Decoder(shape, 2, HIDDEN))
    steps = STEPS // 100 if options.quick else STEPS
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        x = images[torch.randint(len(images), (BATCH,), generator=generator)]
        loss = model.loss(x, options.seed, step=step).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return model.eval().requires_grad_(False), losses


def draw(options: Options) -> Any:
    """The codes of test images, what the plane decodes to, and interpolations."""
    plt = pyplot("demo")
    model, losses = fit(options)
    images, labels = data.fashion_mnist("test", options.data, 28)
    images = (images + 1) / 2
    elbo = torch.cat([model.elbo(part, options.seed) for part in torch.split(images[:SHOWN], 500)])
    codes = model.encoder(images[:SHOWN])[0]

    figure = plt.figure(figsize=(13, 7.6), layout="constrained")
    places = figure.add_gridspec(2, 2, height_ratios=(2.1, 1))
    axis = figure.add_subplot(places[0, 0])
    for k, name in enumerate(data.LABELS):
        axis.scatter(*codes[labels[:SHOWN] == k].numpy().T, s=5, lw=0, color=f"C{k}", label=name)
    axis.legend(fontsize=7, markerscale=2.5, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set(title=f"means of q(z|x) of {SHOWN} test images", xlabel="$z_1$", ylabel="$z_2$")
    axis.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")

    axis = figure.add_subplot(places[0, 1])
    line = torch.linspace(-REACH, REACH, SIDE)
    plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    tiles = _tiles(model.decode(plane), SIDE, upwards=True).numpy()
    edge = REACH * SIDE / (SIDE - 1)
    axis.imshow(tiles, cmap="gray", vmin=0, vmax=1, extent=(-edge, edge, -edge, edge))
    axis.set(title="means of p(x|z) over the latent plane", xlabel="$z_1$", ylabel="$z_2$")

    lower = figure.add_subplot(places[1, :])
    share = torch.linspace(0, 1, BETWEEN)[:, None]
    rows = []
    for first, last in PAIRS:
        one, other = (int((labels == k).nonzero()[0]) for k in (first, last))
        ends, _ = model.encoder(images[[one, other]])
        between = model.decode((1 - share) * ends[0] + share * ends[1])
        rows.append(torch.cat([images[one][None], between, images[other][None]]))
    half = len(PAIRS) // 2
    gap = torch.zeros(half * images.shape[-2], images.shape[-1])
    columns = [_tiles(torch.cat(part), BETWEEN + 2) for part in (rows[:half], rows[half:])]
    lower.imshow(torch.cat([columns[0], gap, columns[1]], 1).numpy(), cmap="gray", vmin=0, vmax=1)
    lower.set_axis_off()
    lower.set_title(
        "interpolations of codes, a test image at either end of a row; "
        f"{len(losses)} steps, test ELBO {float(elbo.mean()):.1f} nats an image"
    )
    return figure


def _tiles(images: Tensor, columns: int, upwards: bool = False) -> Tensor:
    """`(rows h, columns w)` of `(N, 1, h, w)`, row by row from the top or from below."""
    h, w = images.shape[-2:]
    grid = images.view(-1, columns, h, w)
    grid = grid.flip(0) if upwards else grid
    return grid.transpose(1, 2).reshape(-1, columns * w)
