"""The forward process: an image noised, how much signal is left, and what each time costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastdiff import checkpoints, solvers
from fastdiff._plot import pyplot
from fastdiff.demos import Options
from fastdiff.likelihood import DiffusionLikelihood
from fastdiff.ops import Stream, add_noise, randn
from fastdiff.sampler import Sampler
from fastdiff.solvers._walk import Point, x0_conversion

SHOWN = (0, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
LABEL = 9  # a boot


def draw(options: Options) -> Any:
    """A strip of noised images over their denoised ones, the SNR, and the terms of the bound."""
    plt = pyplot("demo")
    model, schedule, card = checkpoints.load("fashion")
    model.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    how, label = card["sampling"], torch.tensor([LABEL])
    table = solvers.build(how["solver"], schedule, how["steps"], prediction=card["prediction"])
    sampler = Sampler(model, table, guidance=how["guidance"], clip=how["clip"])
    none = torch.full_like(label, -1)
    x0 = sampler(how["shape"], seeds=options.seed, cond={"label": label}, uncond={"label": none})
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1  # on the levels of a picture

    alpha, sigma = schedule.alpha(SHOWN), schedule.sigma(SHOWN)
    many = x0.expand(len(SHOWN), -1, -1, -1)
    # one seed: the same noise at every time, growing
    x, _ = add_noise(many.contiguous(), [options.seed] * len(SHOWN), alpha, sigma)
    with torch.no_grad():
        output = model(x, torch.tensor(SHOWN).float(), label.expand(len(SHOWN)))
    guess = []
    for i, (t, a, s) in enumerate(zip(SHOWN, alpha, sigma, strict=True)):
        p, q = x0_conversion(card["prediction"], Point(t, float(a), float(s)), schedule.sigma_data)
        guess.append(p * x[i] + q * output[i])

    figure = plt.figure(figsize=(13, 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    axes = top.subplots(2, len(SHOWN))
    for i, t in enumerate(SHOWN):
        ratio = round(20 * math.log10(float(alpha[i] / sigma[i])))
        axes[0, i].set_title(f"t = {t}\n{ratio} dB", fontsize=9)
        for axis, image in ((axes[0, i], x[i, 0] / 2), (axes[1, i], guess[i][0])):
            axis.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("$x_t$, at half\ncontrast", fontsize=9)
    axes[1, 0].set_ylabel("$x_0$ as\npredicted", fontsize=9)
    top.suptitle("an image noised to time t, its signal-to-noise ratio, and the model's guess")

    left, right = bottom.subplots(1, 2)
    times = np.arange(int(schedule.t_max) + 1)
    left.plot(times, schedule.alpha(times), label="signal $\\alpha$")
    left.plot(times, schedule.sigma(times), label="noise $\\sigma$")
    left.set(xlabel="t", ylabel="scale", title=f"schedule: {schedule.name}")
    left.grid(alpha=0.3)
    other = left.twinx()
    decibels = -20 * np.log10(schedule.ratio(times))
    other.plot(times, decibels, "--", color="C2", label="SNR (right)")
    other.set(ylabel="dB", ylim=(-60, 60))
    lines = left.get_lines() + other.get_lines()
    left.legend(lines, [one.get_label() for one in lines], loc="lower center")

    # as far from each other as the axis shows
    chosen = sorted(
        {round(float(t)) - 1 for t in torch.logspace(0, 3, 13 if options.quick else 251)}
    )
    scored = DiffusionLikelihood(
        model, schedule, prediction=card["prediction"], clip=how["clip"]
    )  # fmt: skip
    parts = []
    for part in torch.split(torch.tensor(chosen), 64):
        seeds = list(range(options.seed, options.seed + len(part)))
        noise = randn(seeds, how["shape"], step=int(part[0]), stream=Stream.FORWARD)
        same = x0.expand(len(part), -1, -1, -1)
        parts.append(scored.term(same, part, noise, {"label": label.expand(len(part))}))
    bits = torch.cat(parts).numpy() / (x0.numel() * math.log(2))
    places = np.array(chosen) + 1
    right.loglog(places[1:], bits[1:], ".-", ms=3, lw=0.8, label="$L_{t-1}$, one draw each")
    right.loglog(places[:1], bits[:1], "o", color="C3", label="$L_0$, the decoder")
    right.set(xlabel="t + 1", ylabel="bits / dim", title="terms of the image's variational bound")
    right.grid(alpha=0.3)
    right.legend()
    return figure
