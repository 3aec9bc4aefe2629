"""``fastdiff eval``: how probable a checkpoint finds data that it has not seen."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import _cards, _eval_diffusion, checkpoints, data
from fastdiff._eval_diffusion import summary
from fastdiff._files import written_whole
from fastdiff._machine import cpu_model
from fastdiff.likelihood import STARTS, VARIANCES
from fastdiff.ops import as_seeds
from fastdiff.reference.flow import RealNVP
from fastdiff.reference.vae import VAE
from fastdiff.version import __version__

METHODS = ("vlb", "ode", "both")


def add_arguments(s: argparse.ArgumentParser) -> None:
    """The options of the command."""
    s.add_argument("checkpoint", help="shipped name or .safetensors path")
    s.add_argument(
        "--data", default=str(data.DEFAULT_FOLDER),
        help="folder of Fashion-MNIST, whose test images are scored; for a flow, a .npy of points",
    )  # fmt: skip
    s.add_argument("--images", type=int, default=100, help="the first of the test split")
    s.add_argument("--batch", type=int, default=32, help="images at a time")
    s.add_argument("--seed", type=int, default=0, help="of the first image's draws")
    s.add_argument("--device", default="auto")
    s.add_argument("--out", default=None, help="folder for eval_NAME.json and eval_NAME.png")
    d = s.add_argument_group("diffusion models")
    d.add_argument("--method", default="both", choices=METHODS, help="bound, ODE or both")
    d.add_argument("--ode-images", type=int, default=None, help="of the ODE, default: --images")
    d.add_argument(
        "--draws", type=int, default=64,
        help="times of the bound an image, drawn by the size of their terms; 0: every time",
    )  # fmt: skip
    d.add_argument("--pilot", type=int, default=16, help="images that are given every time")
    d.add_argument(
        "--start", nargs="+", default=["decoder"], choices=STARTS,
        help="of the ODE: the noised image with the bound's L_0, or uniform dequantisation",
    )  # fmt: skip
    d.add_argument("--rtol", type=float, default=1e-4, help="of an ODE step, absolute as well")
    d.add_argument("--exact", action="store_true", help="divergence without Hutchinson's estimate")
    d.add_argument("--check", type=int, default=4, help="images solved again at rtol / 10")
    d.add_argument("--variance", default="auto", choices=VARIANCES, help="of the reverse steps")
    d.add_argument("--no-clip", action="store_true", help="leave the predicted data as they are")
    d.add_argument("--no-labels", action="store_true", help="score by the null class")
    v = s.add_argument_group("VAEs")
    v.add_argument("--samples", type=int, default=50, help="importance samples K of the IWAE bound")
    s.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score the checkpoint, print what was found and write it."""
    for name, least in (
        ("images", 2), ("batch", 1), ("draws", 0), ("pilot", 1), ("check", 0), ("samples", 1),
    ):  # fmt: skip
        if getattr(args, name) < least:
            raise ValueError(f"eval: {name} must be at least {least}, got {getattr(args, name)}")
    if args.draws == 1:
        raise ValueError("eval: draws must be 0 or at least 2, got 1")
    if args.ode_images is not None and not 2 <= args.ode_images <= args.images:
        raise ValueError(
            f"eval: ode-images must lie between 2 and images {args.images}, got {args.ode_images}"
        )
    if args.out is not None and not (Path(args.out).is_dir() and os.access(args.out, os.W_OK)):
        raise OSError(f"eval: out must be an existing folder to write to, got {args.out}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    model, schedule, card = checkpoints.load(args.checkpoint, device=args.device)
    model.requires_grad_(False)
    start = time.perf_counter()
    if schedule is not None:
        _, classes = _cards.advice("eval", card)
        images, labels, facts = _images(args, _cards.image_shape("eval", card))
        wanted = bool(classes) and not args.no_labels
        found = _eval_diffusion.evaluate(
            args, model, schedule, card, images, labels if wanted else None, facts
        )
    elif isinstance(model, VAE):
        found = _vae(args, model, card)
    elif isinstance(model, RealNVP):
        found = _flow(args, model)
    else:
        raise ValueError(
            "eval: checkpoint must hold a diffusion model, a VAE or a flow, got "
            f"{type(model).__name__}"
        )
    row = {
        "case": "eval",
        "checkpoint": args.checkpoint,
        "sha256": card.get("sha256"),
        **found,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(args.device),
        "command": f"fastdiff {shlex.join(args.words)}",
    }
    if args.out is not None:
        _write(args, row)
    return 0


def _write(args: argparse.Namespace, row: dict[str, Any]) -> None:
    path = Path(args.out) / f"eval_{Path(args.checkpoint).stem}.json"
    with written_whole(path) as part:
        part.write_text(json.dumps([row], indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written: {path}")
    if "vlb" in row:
        picture = path.with_suffix(".png")
        try:
            _eval_diffusion.plot(row, picture)
        except ImportError as error:  # the figures are worth more than their picture
            print(f"no picture: {error}")
        else:
            print(f"written: {picture}")


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to judge a figure and its time."""
    return {
        "cpu": cpu_model(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fastdiff": __version__,
    }


def _images(
    args: argparse.Namespace, shape: list[int]
) -> tuple[Tensor, Tensor, dict[str, dict[str, Any]]]:
    """Test images and labels as the model wants them, and what is to be said of them."""
    channels, height, width = shape
    if channels != 1 or height != width or height < 28:
        raise ValueError(
            "eval: checkpoint must be of grey squares of 28 pixels or more, as Fashion-MNIST, got "
            f"shape {tuple(shape)}"
        )
    images, labels = data.fashion_mnist("test", args.data, height)
    if args.images > len(images):
        raise ValueError(f"eval: images must be at most {len(images)}, got {args.images}")
    facts = {
        "data": {
            "name": "Fashion-MNIST",
            "split": "test",
            "images": args.images,
            "levels": 256,
            "note": "per dim: of all elements that the model sees; per pixel: the same bits, those "
            "of the padding too, over the 28x28 pixels of the image, whose own are no more",
        },
        "dims": {"dim": height * width, "pixel": 28 * 28},
    }
    return images[: args.images], labels[: args.images], facts


def _vae(args: argparse.Namespace, model: VAE, card: dict[str, Any]) -> dict[str, Any]:
    """ELBO and IWAE bound of test images."""
    images, _, facts = _images(args, _cards.image_shape("eval", card))
    observe = getattr(model, "observe", None)  # of models that say what their likelihood is of
    binary = model.likelihood == "bernoulli"
    if observe is not None:
        images = observe(images, torch.Generator().manual_seed(args.seed))
        observed = f"binarized by the seed {args.seed}" if binary else "levels"
    else:
        images = (images + 1) / 2 if binary else images
        observed = "levels as probabilities of 1" if binary else "levels"
    seeds = as_seeds(args.seed, len(images), where="eval")
    elbo, iwae = [], []
    from tqdm import tqdm

    bar = tqdm(total=len(images), unit="image", disable=not sys.stderr.isatty())
    with bar, torch.no_grad():
        for first in range(0, len(images), args.batch):
            part = slice(first, first + args.batch)
            x = images[part].to(args.device)
            weights = model.log_weights(x, seeds[part], args.samples).double().cpu()
            # the ELBO is the expected log-weight
            elbo.append(-weights.mean(1))
            iwae.append(math.log(args.samples) - weights.logsumexp(1))
            bar.update(len(x))
    dims = facts["dims"] if model.likelihood == "discretized_logistic" else {}
    found: dict[str, Any] = {
        "kind": "vae",
        "data": facts["data"],
        "likelihood": model.likelihood,
        "observed": observed,
        "negative_elbo": summary(torch.cat(elbo), dims),
        "negative_iwae": {**summary(torch.cat(iwae), dims), "samples": args.samples},
    }
    for name in ("negative_elbo", "negative_iwae"):
        value = found[name]
        print(
            f"{name.replace('_', ' ')}: {value['nats']:.2f} nats an image, standard error "
            f"{value['nats_standard_error']:.2f} ({value['images']} images)"
        )
    return found


def _flow(args: argparse.Namespace, model: RealNVP) -> dict[str, Any]:
    """Exact log-likelihood of points."""
    path = Path(args.data)
    if path.suffix != ".npy" or not path.is_file():
        raise FileNotFoundError(f"eval: data must be a .npy file of points for a flow, got {path}")
    try:
        # mapped: a header may declare more than the file has, and nothing is taken for it
        points = np.load(path, mmap_mode="r", allow_pickle=False)
    # what damaged bytes raise has no common type
    except Exception as error:
        raise ValueError(
            f"eval: data must be a whole .npy file, got {path} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(points, np.ndarray):
        raise ValueError(f"eval: data must hold one array, got an archive in {path}")
    points = np.array(points)
    if points.ndim != 2 or points.shape[1] != model.dim or points.dtype.kind != "f":
        raise ValueError(
            f"eval: data must be floating-point (N, {model.dim}), got {points.dtype} {points.shape}"
        )
    with torch.no_grad():
        parts = torch.split(torch.from_numpy(points).float(), 4096)
        nats = -torch.cat([model.log_prob(part.to(args.device)).double().cpu() for part in parts])
    found: dict[str, Any] = {
        "kind": "flow",
        "data": {"name": path.name, "images": len(points)},
        "negative_log_likelihood": summary(nats, {"dim": model.dim}),
    }
    value = found["negative_log_likelihood"]
    print(
        f"negative log-likelihood: {value['nats']:.4f} nats a point, standard error "
        f"{value['nats_standard_error']:.4f} ({len(points)} points)"
    )
    return found
