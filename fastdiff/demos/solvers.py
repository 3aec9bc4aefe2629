"""What a solver's evaluations buy: error at the end, and the way there."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff._plot import pyplot
from fastdiff.adaptive import AdaptiveSampler, AdaptiveStep
from fastdiff.demos import Options
from fastdiff.demos._mixture import F64, MIXTURE, SCHEDULE, density, path, table_of
from fastdiff.ops import Stream, randn

COUNTS = (5, 7, 10, 14, 20, 30, 45, 70)
SOLVERS = ("ddim", "heun", "dpm_2", "dpmpp_2m", "unipc", "deis")
SHOWN, FEW = ("ddim", "heun", "dpmpp_2m"), 7
STARTS, PATHS = 24, 5


def draw(options: Options) -> Any:
    """Error against evaluations of several solvers, and few-step paths beside the exact ones."""
    plt = pyplot("demo")
    seeds = list(range(options.seed, options.seed + STARTS))
    noise = randn(seeds, (2,), stream=Stream.INITIAL).to(F64)
    curves = [noise[:PATHS]]

    def keep(step: AdaptiveStep) -> None:
        curves.append(step.x[:PATHS].clone())

    exact = AdaptiveSampler(
        MIXTURE.network(SCHEDULE, "sample"), SCHEDULE, prediction="sample", rtol=1e-6, atol=1e-6
    )(noise=noise, callback=keep)

    figure = plt.figure(figsize=(12, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    errors = top.subplots()
    for k, name in enumerate(SOLVERS):
        points = []
        for steps in COUNTS[: 4 if options.quick else None]:
            nfe = table_of(name, steps).nfe
            away = path(MIXTURE, name, steps, seeds)[-1] - exact
            points.append((nfe, float(away.square().sum(1).mean().sqrt())))
        errors.loglog(*zip(*points, strict=True), "o-", ms=4, lw=1.2, color=f"C{k}", label=name)
    errors.set(xlabel="evaluations of the denoiser", ylabel="RMS distance from the exact end")
    errors.set(title=f"{STARTS} samples of a mixture with a known denoiser: only the solver errs")
    errors.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
    errors.set_xticks([], minor=True)
    errors.grid(alpha=0.3)
    errors.legend(ncols=2)

    true = torch.stack([*curves, exact[:PATHS]]).numpy()
    for axis, name in zip(bottom.subplots(1, len(SHOWN)), SHOWN, strict=True):
        density(axis, MIXTURE)
        states = path(MIXTURE, name, FEW, seeds[:PATHS]).numpy()
        for i in range(PATHS):
            first = i == 0
            axis.plot(*true[:, i].T, "-", color="k", lw=0.9, label="exact" if first else None)
            axis.plot(
                *states[:, i].T, ".-", color="C3", lw=1.1, ms=5, label=name if first else None
            )
        nfe = table_of(name, FEW).nfe
        axis.set_title(f"{name}: {FEW} steps, {nfe} evaluations", fontsize=10)
        axis.legend(fontsize=8, loc="upper right")
    return figure
