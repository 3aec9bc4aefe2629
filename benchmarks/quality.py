"""Sample quality by solver and steps: label accuracy and Frechet distance under a small CNN.

    python -m benchmarks.classifier --out classifier.safetensors
    python -m benchmarks.quality --classifier classifier.safetensors --n 1000

Accuracy is the share of samples that the CNN gives the label they were asked for. The Frechet
distance is between Gaussians fitted to the CNN's features of the samples and of the 10,000 test
images (as FID, Heusel et al. 2017, arXiv:1706.08500, has it with Inception's), and is reported as a
multiple of the distance between 10,000 real training images and the test images. Fewer samples
give a larger distance, so the multiple of n real images is reported beside it.

Solvers whose tables are the same in float32 make the same images (Euler on a variance-preserving
schedule is DDIM), so they share a run: the later one's row names the other in `same_table_as`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff
from benchmarks import classifier, measure
from fastdiff import checkpoints, data
from fastdiff.models import LatentDiffusion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to features `(N, F)` and `(M, F)`.

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64. C_a C_b is similar to
    the symmetric r C_b r with r = C_a^(1/2), whose eigenvalues are real.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2 * cross)


def as_bytes(images: Tensor) -> Tensor:
    """Round to the 256 levels that the real images have, so that the CNN cannot tell by that."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def draw(
    sampler: fastdiff.Sampler,
    labels: Tensor,
    first_seed: int,
    batch: int,
    shape: Sequence[int],
    decode: Callable[[Tensor], Tensor],
) -> Tensor:
    """One sample a label; sample i is drawn from seed `first_seed + i` whatever the batch.

    `shape` is that of what the sampler makes, and `decode` makes images of it.
    """
    parts = []
    for part in classifier.batches(len(labels), batch):
        label = labels[part]
        parts.append(
            decode(sampler(
                shape,
                seeds=list(range(first_seed + part.start, first_seed + part.stop)),
                cond={"label": label},
                uncond={"label": torch.full_like(label, -1)},
            ))
        )  # fmt: skip
    return as_bytes(torch.cat(parts))


def same_table(a: fastdiff.StepTable, b: fastdiff.StepTable, clip: bool) -> bool:
    """Whether two tables step alike to the bit, from the same start."""
    if len(a) != len(b) or a.init_sigma != b.init_sigma or list(a.times) != list(b.times):
        return False
    one, two = a.packed(clip=clip), b.packed(clip=clip)
    return torch.equal(one.floats, two.floats) and torch.equal(one.ints, two.ints)


class Judge:
    """The CNN with the real images it compares samples to."""

    def __init__(self, path: str | Path, folder: str | Path, n: int) -> None:
        self.model, self.accuracy = classifier.load(path)
        _, self.test = classifier.judge(self.model, data.fashion_mnist("test", folder)[0])
        images = data.fashion_mnist("train", folder)[0]
        shuffled = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        _, real = classifier.judge(self.model, shuffled[: max(n, 10_000)])
        self.real = frechet(real[:10_000], self.test)
        self.real_n = frechet(real[:n], self.test)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        predicted, features = classifier.judge(self.model, images)
        right = (predicted == labels).double()
        distance = frechet(features, self.test)
        return {
            "accuracy": float(right.mean()),
            "accuracy_by_class": [round(float(right[labels == c].mean()), 3) for c in range(10)],
            "frechet": distance,
            "frechet_ratio": distance / self.real,
            "frechet_ratio_same_n": distance / self.real_n,
        }


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="fashion", help="shipped name or .safetensors path")
    parser.add_argument("--classifier", required=True, help="from benchmarks.classifier")
    parser.add_argument("--data", default=str(data.DEFAULT_FOLDER))
    parser.add_argument("--solvers", nargs="+", default=["dpmpp_2m", "ddim"])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50])
    parser.add_argument("--n", type=int, default=1000, help="samples, the classes in turn")
    parser.add_argument("--guidance", type=float, default=None, help="default: the card's")
    parser.add_argument("--spacing", default=None)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the model")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--out", default=None, help="write the rows as JSON")
    parser.add_argument("--png", default=None, help="write the first samples of each row here")
    parser.add_argument("--card", default=None, help="write the rows into this card's metrics")
    args = parser.parse_args(argv)
    if args.n < 100:
        parser.error(f"--n must be >= 100, to fit a covariance, got {args.n}")

    model, schedule, card = checkpoints.load(args.model, dtype=DTYPES[args.dtype])
    model = model.to(memory_format=torch.channels_last)
    how = card["sampling"]
    decode = model.decode if isinstance(model, LatentDiffusion) else (lambda x: x)
    guidance = card["sampling"]["guidance"] if args.guidance is None else args.guidance
    judge = Judge(args.classifier, args.data, args.n)
    print(f"classifier: {judge.accuracy:.4f} of the test images; {args.n} samples, "
          f"guidance {guidance}")  # fmt: skip
    real = {
        "classifier_accuracy": judge.accuracy,
        "frechet_of_real": judge.real,
        "frechet_of_n_real": judge.real_n,
    }
    labels = torch.arange(args.n) % 10
    rows: list[dict[str, Any]] = []
    tables: dict[tuple[str, int], fastdiff.StepTable] = {}
    for name in args.solvers:
        for steps in args.steps:
            table = fastdiff.solvers.build(
                name, schedule, steps, prediction=card["prediction"], spacing=args.spacing
            )
            clipped = how["clip"] is not None
            same = [key for key, other in tables.items() if same_table(table, other, clipped)]
            if same:
                (run,) = (r for r in rows if (r["solver"], r["steps"]) == same[0])
                rows.append({**run, "solver": name, "same_table_as": same[0][0]})
                print(f"{name:>16} {steps:>3} steps: the same table as {same[0][0]}")
                continue
            tables[name, steps] = table
            start = time.perf_counter()
            sampler = fastdiff.Sampler(model, table, guidance=guidance, clip=how["clip"])
            images = draw(sampler, labels, args.seed, args.batch, how["shape"], decode)
            seconds = time.perf_counter() - start
            facts = {"solver": name, "steps": steps, "nfe": table.nfe, "n": args.n,
                     "guidance": guidance, "spacing": args.spacing, "clip": how["clip"],
                     "dtype": args.dtype}  # fmt: skip
            row = {"case": "quality", **facts, **judge(images, labels), "seconds": seconds}
            print(
                f"{name:>16} {steps:>3} steps: accuracy {row['accuracy']:.3f}, Frechet "
                f"{row['frechet']:.3f}, {row['frechet_ratio']:.1f} times real images' "
                f"({row['frechet_ratio_same_n']:.1f} times that of {args.n}), {seconds:.0f} s",
                flush=True,
            )
            rows.append({**row, **real, "machine": measure.machine_info()})
            if args.png:
                data.save_grid(images[:100], f"{args.png}-{name}-{steps}.png", 10)
    command = f"python -m benchmarks.quality {' '.join(argv)}"
    if args.out:
        measure.write_json(args.out, rows, command)
    if args.card:
        path = Path(args.card)
        filled = json.loads(path.read_text())
        filled["metrics"] = {
            **real,
            "rows": [
                {k: row[k] for k in ("solver", "steps", "n", "guidance", "dtype", "accuracy",
                                     "frechet", "frechet_ratio")}
                for row in rows
            ],
            "command": command,
        }  # fmt: skip
        path.write_text(json.dumps(filled, indent=1) + "\n")


if __name__ == "__main__":
    main()
