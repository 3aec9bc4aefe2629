"""``fastdiff demo``: one picture a topic, each drawn in under a minute on two cores.

A demo is a module with ``draw(options)``, which returns a matplotlib figure.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff import data
from fastdiff._plot import pyplot, save

__all__ = ["DEMOS", "Options", "add_arguments", "draw"]

# name: what the picture shows
DEMOS = {
    "gmm": "a mixture fitted by EM, and solvers on its exact denoiser",
    "vae": "a VAE trained on the spot: its latent plane and interpolations (Fashion-MNIST)",
    "flow": "RealNVP trained on two moons: density, samples, warped grid",
    "forward": "an image of the shipped model noised, its SNR and its likelihood term by term",
    "solvers": "error by solver and evaluations, and the paths, on a mixture",
}


@dataclass(frozen=True)
class Options:
    """What a demo may be told.

    Attributes:
        seed: of all that is random.
        data: folder of Fashion-MNIST.
        save: of flow alone: where its checkpoint and held-out points go, without suffix.
        quick: a hundredth of the training, to see that it runs.
    """

    seed: int = 0
    data: Path = data.DEFAULT_FOLDER
    save: Path | None = None
    quick: bool = False


def add_arguments(s: argparse.ArgumentParser) -> None:
    """The options of the command."""
    listed = "; ".join(f"{name}: {what}" for name, what in DEMOS.items())
    s.add_argument("name", choices=list(DEMOS), help=listed)
    s.add_argument("--out", default=None, help="PNG, default: demo_NAME.png")
    s.add_argument("--seed", type=int, default=0)
    s.add_argument("--data", default=str(data.DEFAULT_FOLDER), help="Fashion-MNIST, for vae")
    s.add_argument(
        "--save", default=None,
        help="flow: also write this checkpoint and .npy of points, for `fastdiff eval`",
    )  # fmt: skip
    s.add_argument("--quick", action="store_true", help="train a hundredth, to see that it runs")
    s.set_defaults(run=run)


def draw(name: str, options: Options) -> Any:
    """The figure of a demo.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: the data of the demo are missing; the message says how to get them.
    """
    pyplot("demo")  # before the work, not after it
    return importlib.import_module(f"fastdiff.demos.{name}").draw(options)


def run(args: argparse.Namespace) -> int:
    """Draw one and write it."""
    if not 0 <= args.seed < 1 << 62:
        raise ValueError(f"demo: seed must lie in [0, 2**62), got {args.seed}")
    if args.save is not None and args.name != "flow":
        raise ValueError(f"demo: save must be given with flow alone, got {args.save}")
    out = Path(args.out or f"demo_{args.name}.png")
    for name, path in (("out", out), ("save", None if args.save is None else Path(args.save))):
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise OSError(f"demo: {name} must lie in an existing folder to write to, got {path}")
    if out.is_dir():
        raise OSError(f"demo: out must be a file, got the folder {out}")
    start = time.perf_counter()
    options = Options(
        args.seed, Path(args.data), None if args.save is None else Path(args.save), args.quick
    )
    save(draw(args.name, options), out)
    print(f"{args.name}, {DEMOS[args.name]}: {time.perf_counter() - start:.1f} s: {out}")
    return 0
