"""The part of ``fastdiff eval`` that scores diffusion models: the bound, the ODE, their picture."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff._adaptive_methods import StuckError
from fastdiff._eval_data import Scored
from fastdiff._plot import pyplot, save
from fastdiff.likelihood import DiffusionLikelihood
from fastdiff.ops import as_seeds
from fastdiff.reference.likelihood import TimeSampler
from fastdiff.schedules import Schedule


def evaluate(
    args: argparse.Namespace,
    model: nn.Module,
    schedule: Schedule,
    card: Mapping[str, Any],
    data: Scored,
) -> dict[str, Any]:
    """What the command line asks of a diffusion model, as JSON.

    Raises:
        ValueError: uniform dequantisation of data that are on no levels.
    """
    levels = data.facts["levels"]
    if levels is None and "uniform" in args.start and args.method != "vlb":
        raise ValueError("eval: start must be decoder for latents, on no levels, got uniform")
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    clip = None if args.no_clip else card["sampling"].get("clip")
    scored = DiffusionLikelihood(
        model, schedule,
        prediction=card["prediction"], clip=clip, variance=args.variance, bins=levels,
    )  # fmt: skip
    labels = data.labels if card["classes"] and not args.no_labels else None
    job = _Job(args, scored, data.images, labels, data.dims)
    found: dict[str, Any] = {
        "kind": "diffusion",
        "data": data.facts,
        "dims": data.dims,
        "labels": "null class" if labels is None else "given",
        "clip": clip,
        "dtype": "float32 network, float64 state",
    }
    bound, flows = None, {}
    if args.method != "ode":
        found["vlb"], bound = job.bound()
    if args.method != "vlb":
        found["ode"] = {}
        for start in dict.fromkeys(args.start):
            found["ode"][start], flows[start] = job.flow(start)
    if bound is not None and "decoder" in flows:
        gap = bound[: len(flows["decoder"])] - flows["decoder"]
        found["vlb_minus_ode"] = summary(gap, data.dims)
    _report(found)
    return found


def summary(nats: Tensor, dims: dict[str, int]) -> dict[str, Any]:
    """Mean and standard error over images, in nats and in bits an element, each count of them."""
    mean, error = float(nats.mean()), float(nats.std()) / math.sqrt(len(nats))
    found: dict[str, Any] = {"images": len(nats), "nats": mean, "nats_standard_error": error}
    for name, count in dims.items():
        found[f"bits_per_{name}"] = mean / (count * math.log(2))
        found[f"bits_per_{name}_standard_error"] = error / (count * math.log(2))
    return found


class _Job:
    """Images with their seeds, in batches."""

    def __init__(
        self,
        args: argparse.Namespace,
        scored: DiffusionLikelihood,
        images: Tensor,
        labels: Tensor | None,
        dims: dict[str, int],
    ) -> None:
        self.args, self.scored, self.images, self.labels = args, scored, images, labels
        self.dims, self.seeds = dims, as_seeds(args.seed, len(images), where="eval")
        self.unit = next(iter(dims))  # the numbers that the model sees
        self.bits = dims[self.unit] * math.log(2)

    def _bar(self, total: int, unit: str, what: str) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, unit=unit, desc=what, disable=not sys.stderr.isatty())

    def _batches(self, first: int, end: int) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        parts = []
        for at in range(first, end, self.args.batch):
            part = slice(at, min(at + self.args.batch, end))
            given = {} if self.labels is None else {"label": self.labels[part].to(self.args.device)}
            parts.append((self.images[part].to(self.args.device), self.seeds[part], given))
        return parts

    def bound(self) -> tuple[dict[str, Any], Tensor]:
        """L_VLB: every time for the pilot images, then times by the size of the pilot's terms."""
        args, times = self.args, len(self.scored.alphabars)
        full = len(self.images) if not args.draws else min(args.pilot, len(self.images))
        rest = len(self.images) - full
        bar = self._bar(full * times + rest * args.draws, "evaluation", "bound")
        sizes = TimeSampler(times - 1, history=full, uniform=0.1)
        sums, counts = (torch.zeros(times, dtype=torch.float64) for _ in range(2))
        parts = []
        with bar:
            for x, seeds, given in self._batches(0, full):
                found = self.scored.bound(x, seeds, given, progress=bar.update)
                for one in found.terms[:, 1:]:
                    sizes.update(torch.arange(times - 1), one)
                parts.append(found)
            p = sizes.probabilities()
            for x, seeds, given in self._batches(full, len(self.images)):
                found = self.scored.bound(
                    x, seeds, given, probabilities=p, draws=args.draws, progress=bar.update
                )
                parts.append(found)
        for found in parts:
            sums.index_add_(0, found.times.flatten(), found.terms.flatten())
            counts.index_add_(0, found.times.flatten(), torch.ones(found.terms.numel()).double())
        total = torch.cat([found.total for found in parts])
        prior = torch.cat([found.prior for found in parts]).mean()
        bits = self.bits
        mean = sums / counts
        variance = args.variance
        if variance == "auto":
            variance = "learned" if self.scored.learned else "small"
        facts = {
            **summary(total, self.dims),
            "variance": variance,
            "images_at_every_time": full,
            "draws_of_the_others": args.draws if rest else None,
            f"bits_per_{self.unit}_of": {
                "L_T": float(prior) / bits,
                "L_0": float(mean[0]) / bits,
                "between": (float(total.mean() - prior) - float(mean[0])) / bits,
            },
            # of every time, the mean over the images that were noised to it
            "terms": [float(f"{v:.5g}") for v in (mean / bits).tolist()],
        }
        return facts, total

    def flow(self, start: str) -> tuple[dict[str, Any], Tensor]:
        """-log P under the ODE, and how far a tenth of the tolerance moves it."""
        args = self.args
        count = args.ode_images or len(self.images)
        parts = []
        with self._bar(count, "image", f"ODE, {start}") as bar:
            for x, seeds, given in self._batches(0, count):
                parts.append(self._solve(x, seeds, given, start, args.rtol))
                bar.update(len(x))
        nats = torch.cat([found.nats for found in parts])
        nfe = torch.cat([found.nfe for found in parts])
        moved = None
        again = min(args.check, args.batch, count)
        if again:
            x, seeds, given = self._batches(0, again)[0]
            finer = self._solve(x, seeds, given, start, args.rtol / 10).nats
            moved = float((finer - nats[: len(finer)]).abs().max())
        facts = {
            **summary(nats, self.dims),
            "divergence": "exact" if args.exact else "Hutchinson, one probe an image",
            "rtol": args.rtol,
            "atol": args.rtol,
            "evaluations": float(nfe.double().mean()),
            "error_control": {
                "images": again, "rtol": args.rtol / 10, "largest_change_nats": moved,
                f"largest_change_bits_per_{self.unit}": None
                if moved is None else moved / self.bits,
            },
        }  # fmt: skip
        return facts, nats

    def _solve(
        self, x: Tensor, seeds: Tensor, given: dict[str, Tensor], start: str, tol: float
    ) -> Any:
        try:
            return self.scored.flow(
                x, seeds, given, start=start, exact=self.args.exact, rtol=tol, atol=tol
            )
        except StuckError as error:
            raise ValueError(
                f"eval: rtol must be one that this model can meet, got {tol:g} ({error})"
            ) from error


def _report(found: dict[str, Any]) -> None:
    """The figures, a line each."""
    first = next(iter(found["dims"]))

    def line(name: str, value: dict[str, Any]) -> None:
        each = ", ".join(
            f"{value[f'bits_per_{unit}']:.4f} +- {value[f'bits_per_{unit}_standard_error']:.4f} "
            f"bits/{unit} ({count})"
            for unit, count in found["dims"].items()
        )
        print(f"{name}: {each}; {value['images']} images")

    if "vlb" in found:
        line("VLB", found["vlb"])
        shares = ", ".join(f"{k} {v:.4f}" for k, v in found["vlb"][f"bits_per_{first}_of"].items())
        print(f"  of which in bits/{first}: {shares}")
    for start, value in found.get("ode", {}).items():
        line(f"ODE, {start}", value)
        print(f"  {value['evaluations']:.0f} evaluations an image, {value['divergence']}")
        check = value["error_control"]
        if check["images"]:
            print(
                f"  at rtol {check['rtol']:g}: {check['images']} images move by at most "
                f"{check[f'largest_change_bits_per_{first}']:.2g} bits/{first}"
            )
    if "vlb_minus_ode" in found:
        line("VLB - ODE, decoder", found["vlb_minus_ode"])
        gap, error = (found["vlb_minus_ode"][k] for k in ("nats", "nats_standard_error"))
        told = "above" if gap > 2 * error else "below" if gap < -2 * error else "within 2 errors of"
        print(f"  the bound lies {told} the ODE's figure; with an exact score it must not be below")


def plot(row: Mapping[str, Any], path: Path) -> None:
    """The terms of the bound by time, and what they add up to.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = pyplot("eval")
    vlb, unit = row["vlb"], next(iter(row["dims"]))
    name = unit.replace("_", " ")
    terms = np.array(vlb["terms"])
    times = np.arange(len(terms)) + 1  # t = 0 has a place on a logarithmic axis
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.loglog(times[1:], np.maximum(terms[1:], 1e-12), lw=1, color="C0", label="$L_{t-1}$")
    # of a density, L_0 may be below 0, where a logarithmic axis has no place
    shown = f"$L_0$ = {terms[0]:.3g}, the decoder"
    left.loglog(times[:1], terms[:1], "o", ms=5, color="C3", label=shown)
    left.set(xlabel="t + 1", ylabel=f"bits / {name}", title="terms of the bound, means over images")
    left.legend()
    whole = terms.cumsum()
    right.semilogx(times, whole, color="C0", label="$L_0 + ... + L_t$")
    right.axhline(vlb[f"bits_per_{unit}"], color="C0", ls="--", lw=1, label="$L_{VLB}$")
    for k, (start, value) in enumerate(row.get("ode", {}).items()):
        right.axhline(value[f"bits_per_{unit}"], color=f"C{k + 1}", ls=":", label=f"ODE, {start}")
    right.set(xlabel="t + 1", ylabel=f"bits / {name}", title="their sum, and the ODE")
    if row["data"]["levels"]:  # which have probabilities
        right.set_ylim(0)
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    count = f"{vlb['images']} images of {row['data']['name']}, {row['data']['split']}"
    figure.suptitle(f"{Path(row['checkpoint']).stem}: {count}; {row['dims'][unit]} {name}s")
    save(figure, path)
