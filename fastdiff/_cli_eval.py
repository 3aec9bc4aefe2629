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

from fastdiff import _cards, _eval_data, _eval_diffusion, _eval_latent, _ranks, checkpoints, data
from fastdiff._eval_data import Scored
from fastdiff._eval_diffusion import summary
from fastdiff._files import make_folder, written_whole
from fastdiff._machine import cpu_model
from fastdiff.likelihood import STARTS, VARIANCES
from fastdiff.models import Autoencoder, LatentDiffusion
from fastdiff.ops import as_seeds, reparameterize
from fastdiff.reference.flow import RealNVP
from fastdiff.reference.vae import VAE
from fastdiff.version import __version__

METHODS = ("vlb", "ode", "both")


def add_arguments(s: argparse.ArgumentParser) -> None:
    """The options of the command."""
    s.add_argument("checkpoint", help="shipped name or .safetensors path")
    emoji = data.DATASETS["emoji"][1]
    s.add_argument(
        "--data", default=None,
        help=f"folder of Fashion-MNIST for grey images, default {data.DEFAULT_FOLDER}, of Noto "
        f"Emoji for colour, default {emoji}; for a flow, a .npy of points",
    )  # fmt: skip
    s.add_argument(
        "--images", type=int, default=100,
        help="the first of Fashion-MNIST's test split, or of the emoji in a fixed random order",
    )  # fmt: skip
    s.add_argument("--batch", type=int, default=32, help="images at a time")
    s.add_argument("--seed", type=int, default=0, help="of the first image's draws")
    s.add_argument("--device", default="auto")
    s.add_argument(
        "--out",
        default=None,
        help="folder for eval_NAME.json and eval_NAME.png, made if it is missing",
    )
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
    args.device = _ranks.local_device(args.device, "eval")
    if args.out is not None:  # before the work, not after it
        make_folder(Path(args.out), "eval: out")
        if not os.access(args.out, os.W_OK):
            raise OSError(f"eval: out must be a folder to write to, got {args.out}")
    model, schedule, card = checkpoints.load(args.checkpoint, device=args.device)
    model.requires_grad_(False)
    start = time.perf_counter()
    if schedule is not None:
        _cards.advice("eval", card)
    if isinstance(model, LatentDiffusion):
        shape = _eval_latent.image_shape(model.autoencoder, model.latent_shape[-1])
        scored = _images(args, shape)
        near, latents = _eval_latent.reconstruction(args, model.autoencoder, scored)
        scored = _eval_latent.of_latents(latents, scored)
        print(f"density of {_eval_latent.SPACE}")
        found = _eval_diffusion.evaluate(args, model, schedule, card, scored)
        found = {**found, "kind": "latent diffusion", "reconstruction": near}
    elif schedule is not None:
        scored = _images(args, _cards.image_shape("eval", card))
        found = _eval_diffusion.evaluate(args, model, schedule, card, scored)
    elif isinstance(model, Autoencoder):
        scored = _images(args, _cards.image_shape("eval", card))
        near, _ = _eval_latent.reconstruction(args, model, scored)
        found = {"kind": "autoencoder", "data": scored.facts, "reconstruction": near}
    elif isinstance(model, VAE):
        found = _vae(args, model, card)
    elif isinstance(model, RealNVP):
        found = _flow(args, model)
    else:
        raise ValueError(
            "eval: checkpoint must hold a diffusion model, an autoencoder, a VAE or a flow, got "
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
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fastdiff": __version__,
    }


def _images(args: argparse.Namespace, shape: list[int]) -> Scored:
    """What is scored, and a line that says what it is."""
    scored = _eval_data.load(args, shape)
    print(f"data: {args.images} images of {scored.facts['name']}, split: {scored.facts['split']}")
    return scored


def _vae(args: argparse.Namespace, model: VAE, card: dict[str, Any]) -> dict[str, Any]:
    """ELBO, the KL divergence in it, and IWAE bound of test images."""
    scored = _images(args, _cards.image_shape("eval", card))
    images = scored.images
    observe = getattr(model, "observe", None)  # of models that say what their likelihood is of
    binary = model.likelihood == "bernoulli"
    if observe is not None:
        images = observe(images, torch.Generator().manual_seed(args.seed))
        observed = f"binarized by the seed {args.seed}" if binary else "levels"
    else:
        images = (images + 1) / 2 if binary else images
        observed = "levels as probabilities of 1" if binary else "levels"
    seeds = as_seeds(args.seed, len(images), where="eval")
    elbo, iwae, kl = [], [], []
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
            mu, logvar = model.encoder(x)
            kl.append(reparameterize(mu, logvar, seeds[part])[1].double().cpu())
            bar.update(len(x))
    dims = scored.dims if model.likelihood == "discretized_logistic" else {}
    found: dict[str, Any] = {
        "kind": "vae",
        "data": scored.facts,
        "likelihood": model.likelihood,
        "observed": observed,
        "negative_elbo": summary(torch.cat(elbo), dims),
        "negative_iwae": {**summary(torch.cat(iwae), dims), "samples": args.samples},
        "kl": summary(torch.cat(kl), {}),
    }
    for name in ("negative_elbo", "negative_iwae", "kl"):
        value = found[name]
        print(
            f"{name.replace('_', ' ')}: {value['nats']:.2f} nats an image, standard error "
            f"{value['nats_standard_error']:.2f} ({value['images']} images)"
        )
    return found


def _flow(args: argparse.Namespace, model: RealNVP) -> dict[str, Any]:
    """Exact log-likelihood of points."""
    path = Path(args.data or "")
    if path.suffix != ".npy" or not path.is_file():
        rule = "data must be a .npy file of points for a flow"
        raise FileNotFoundError(f"eval: {rule}, got {args.data}")
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
    if len(points) < 2:  # a standard error is asked of them
        raise ValueError(f"eval: data must hold at least 2 points, got {len(points)}")
    with np.errstate(over="ignore"):  # torch knows neither other byte orders nor longer floats
        every = torch.from_numpy(points.astype(np.float32))
    with torch.no_grad():
        parts = torch.split(every, 4096)
        nats = -torch.cat([model.log_prob(part.to(args.device)).double().cpu() for part in parts])
    wrong = (~nats.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            "eval: data must be points whose log-likelihood is finite in float32, got "
            f"{points[wrong[0]].tolist()} at {wrong[0]}"
        )
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
