"""How near samples lie to the training set: is the model's answer a copy of what it has seen?

    python -m benchmarks.nearest --model emoji --data FOLDER

The distance of two images is the root of the mean squared difference over pixels and channels, in
[-1, 1], so that black and white are 2 apart. Beside the samples' distances to their nearest
training image stand those of the training images to the nearest other one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff
from benchmarks import measure
from fastdiff import checkpoints, data


def nearest(images: Tensor, among: Tensor, *, others: bool = False) -> tuple[Tensor, Tensor]:
    """Distance to the nearest of `among`, and which it is.

    Args:
        images: `(N, C, H, W)`.
        among: `(M, C, H, W)`.
        others: `images` is `among`, and an image is no neighbour of itself.

    Returns:
        `(N,)` root mean square distances, float64, and `(N,)` indices, int64.
    """
    flat = among.flatten(1).double()
    distances, indices = [], []
    for start in range(0, len(images), 256):
        part = images[start : start + 256].flatten(1).double()
        # not by |a|^2 + |b|^2 - 2ab, which has no digits left where two images are equal
        apart = torch.cdist(part, flat, compute_mode="donot_use_mm_for_euclid_dist")
        if others:
            rows = torch.arange(len(part))
            apart[rows, start + rows] = torch.inf
        least, index = apart.min(dim=1)
        distances.append(least / flat.shape[1] ** 0.5)
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


def summary(distances: Tensor) -> dict[str, float]:
    """Median, and the range of the middle eight tenths."""
    low, middle, high = distances.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    return {"median": round(middle, 4), "p10": round(low, 4), "p90": round(high, 4)}


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="emoji", help="shipped name or .safetensors path")
    parser.add_argument("--dataset", default="emoji", choices=sorted(data.DATASETS))
    parser.add_argument("--data", default="", help="folder of the data set")
    parser.add_argument("--n", type=int, default=160, help="samples, the classes in turn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--png", default=None, help="draw samples, each above its nearest image")
    parser.add_argument("--card", default=None, help="write the result into this card's metrics")
    args = parser.parse_args(argv)
    if args.n < 10 or args.n % 10:
        parser.error(f"--n must be a multiple of 10, to fill rows of the picture, got {args.n}")

    images = data.load(args.dataset, args.data).images
    model, schedule, card = checkpoints.load(args.model)
    how = card["sampling"]
    table = fastdiff.solvers.build(
        how["solver"], schedule, args.steps, prediction=card["prediction"]
    )
    sampler = fastdiff.Sampler(model, table, guidance=how["guidance"], clip=how["clip"])
    label = torch.arange(args.n) % len(card["classes"])
    samples = sampler(
        how["shape"],
        seeds=0,
        cond={"label": label},
        uncond={"label": torch.full_like(label, -1)},
        progress=sys.stderr.isatty(),
    ).clamp(-1, 1)
    distance, index = nearest(samples, images)
    result: dict[str, Any] = {
        "n": args.n,
        "solver": how["solver"],
        "steps": args.steps,
        "guidance": how["guidance"],
        "samples_to_training": summary(distance),
        "training_to_other_training": summary(nearest(images, images, others=True)[0]),
        "distance": "root mean square over pixels and channels in [-1, 1]",
        "command": measure.command("nearest", argv),
    }
    print(json.dumps(result, indent=1))
    if args.png:
        pairs = torch.stack([samples, images[index]], dim=1).unflatten(0, (-1, 10))
        data.save_grid(pairs.transpose(1, 2).flatten(0, 2), args.png, 10)
    if args.card:
        path = Path(args.card)
        filled = json.loads(path.read_text(encoding="utf-8"))
        filled["metrics"]["nearest"] = result
        path.write_text(json.dumps(filled, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
