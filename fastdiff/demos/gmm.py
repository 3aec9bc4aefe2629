"""A mixture fitted by EM, whose exact denoiser then drives four solvers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastdiff._plot import pyplot
from fastdiff.demos import Options
from fastdiff.demos._mixture import MIXTURE, density, path
from fastdiff.reference import gmm

POINTS, PATHS = 600, 10
# with their steps: each step of noise leaves the path, so the one that adds it takes many
SOLVERS = {"ddim": 16, "heun": 16, "dpmpp_2m": 16, "ddpm": 120}


def draw(options: Options) -> Any:
    """Data with the fitted components, the ELBO by half step, and paths of the solvers."""
    plt = pyplot("demo")
    generator = torch.Generator().manual_seed(options.seed)
    x = MIXTURE.sample(POINTS, generator)
    fitted, climb = gmm.fit(x, len(MIXTURE.weights), steps=30, generator=generator)
    figure = plt.figure(figsize=(12, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.4))

    owner = fitted.responsibilities(x).argmax(1)
    left.scatter(*x.numpy().T, c=[f"C{int(k)}" for k in owner], s=5, alpha=0.6, lw=0)
    angle = torch.linspace(0, 2 * math.pi, 100, dtype=x.dtype)
    circle = torch.stack([angle.cos(), angle.sin()])
    for k, (mean, covariance) in enumerate(zip(fitted.means, fitted.covariances, strict=True)):
        ellipse = mean[:, None] + 2 * torch.linalg.cholesky(covariance) @ circle
        left.plot(*ellipse.numpy(), color=f"C{k}", lw=1.5)
        left.plot(*mean.numpy(), "+", color="k", ms=8)
    left.set(title=f"EM on {POINTS} points: ellipses of 2 deviations", aspect="equal")
    left.set(xlabel="$x_1$", ylabel="$x_2$")

    bounds = climb.numpy()
    half = np.arange(1, len(bounds) + 1) / 2
    right.plot(half, bounds, "-", color="0.7", lw=1)
    right.plot(half[::2], bounds[::2], "o", ms=3, label="after an E step: the log-likelihood")
    right.plot(half[1::2], bounds[1::2], "s", ms=3, label="after an M step")
    truth = float(MIXTURE.log_prob(x).mean())
    right.axhline(truth, color="k", ls=":", label="log-likelihood of the true mixture")
    right.set(title="EM climbs the ELBO and never descends")
    right.set(xlabel="step of EM", ylabel="nats a point")
    right.legend(loc="lower right")
    right.grid(alpha=0.3)

    seeds = list(range(options.seed, options.seed + PATHS))
    for axis, (name, steps) in zip(bottom.subplots(1, len(SOLVERS)), SOLVERS.items(), strict=True):
        density(axis, fitted)
        states = path(fitted, name, steps, seeds).numpy()
        for i in range(PATHS):
            axis.plot(*states[:, i].T, "-", color="C0", lw=0.9 if steps < 100 else 0.4)
        axis.plot(*states[0].T, "o", color="C1", ms=4, label="noise")
        axis.plot(*states[-1].T, "o", color="C3", ms=4, label="sample")
        noisy = ", with noise" if name == "ddpm" else ""
        axis.set_title(f"{name}, {steps} steps{noisy}", fontsize=10)
    axis.legend(fontsize=8, loc="upper right")
    bottom.suptitle("the same noise taken to samples of the fitted mixture", fontsize=11)
    return figure
