"""Test ELBO and IWAE bound of a VAE that `fastdiff train` made.

    python -m benchmarks.elbo --model runs/vae-mlp/vae-mlp.safetensors

The test images of the Bernoulli likelihood are binarized once, by the seed 0. The ELBO is the mean
over the images of the mean of `--draws` one-draw estimates; the IWAE bound of K draws (Burda et al.
2016, arXiv:1509.00519, equation 8) is the usual estimate of the log-likelihood for large K.
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
from tqdm import tqdm

from benchmarks import measure
from fastdiff import checkpoints, data
from fastdiff.models import VAE


@torch.no_grad()
def bounds(model: VAE, x: Tensor, draws: int, batch: int) -> dict[str, float]:
    """Means over the images, in nats: the ELBO, its KL, the IWAE bound, and standard errors.

    One set of `draws` weights an image gives both bounds: their mean logarithm is the ELBO, and
    the logarithm of their mean is IWAE's.
    """
    elbo, iwae, kl = [], [], []
    for first in tqdm(range(0, len(x), batch), unit="batch", disable=not sys.stderr.isatty()):
        part = x[first : first + batch]
        weights = model.log_weights(part, first, draws)
        elbo.append(weights.double().mean(dim=1))
        iwae.append(weights.double().logsumexp(dim=1) - torch.tensor(draws).double().log())
        kl.append(model.terms(part, first)[1].double())
    found: dict[str, float] = {}
    for name, parts in (("elbo", elbo), ("iwae", iwae), ("kl", kl)):
        each = torch.cat(parts)
        found[name] = float(each.mean())
        found[f"{name}_error"] = float(each.std() / len(each) ** 0.5)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="shipped name or .safetensors path")
    parser.add_argument("--data", default=str(data.DEFAULT_FOLDER))
    parser.add_argument("--draws", type=int, default=500, help="K of the IWAE bound")
    parser.add_argument("--n", type=int, default=10_000, help="the first n test images")
    parser.add_argument("--batch", type=int, default=20, help="images at a time")
    parser.add_argument("--out", default=None, help="write the row as JSON")
    parser.add_argument("--card", default=None, help="write the row into this card's metrics")
    args = parser.parse_args(argv)
    model, _, card = checkpoints.load(args.model)
    if not isinstance(model, VAE):
        parser.error(f"--model must be a VAE, got {type(model).__name__}")
    images = data.fashion_mnist("test", args.data, model.config.image_size)[0][: args.n]
    x = model.observe(images, torch.Generator().manual_seed(0))
    found = bounds(model, x, args.draws, args.batch)
    row: dict[str, Any] = {
        "case": "elbo", "model": card["name"], "likelihood": model.likelihood, "n": len(x),
        "draws": args.draws, "dims": x[0].numel(), **found,
    }  # fmt: skip
    print(
        f"{card['name']}, {model.likelihood}, {len(x)} test images: ELBO {found['elbo']:.2f} "
        f"(standard error {found['elbo_error']:.2f}), KL {found['kl']:.2f}, IWAE of {args.draws} "
        f"draws {found['iwae']:.2f} nats"
    )
    command = f"python -m benchmarks.elbo {' '.join(argv)}"
    if args.out:
        measure.write_json(args.out, [{**row, "machine": measure.machine_info()}], command)
    if args.card:
        path = Path(args.card)
        filled = json.loads(path.read_text())
        filled["metrics"] = {**row, "command": command}
        path.write_text(json.dumps(filled, indent=1) + "\n")


if __name__ == "__main__":
    main()
