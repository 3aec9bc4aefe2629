"""Train the small class-conditional U-Net on Fashion-MNIST, on a CPU, in about an hour.

The recipe: discrete schedule, v-prediction (Salimans & Ho 2022, arXiv:2202.00512), min-SNR
weighting (Hang et al. 2023, arXiv:2303.09556), AdamW with warm-up and cosine decay to zero, an
exponential moving average (EMA) of the weights, label dropout for classifier-free guidance.

Everything random is a function of the seed and the step, so a resumed run repeats the
uninterrupted one, and a checkpoint needs no generator state.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff import checkpoints, data, schedules, solvers
from fastdiff._files import written_whole
from fastdiff._train_config import TrainConfig, progress_of
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.ops import add_noise
from fastdiff.reference.diffusion import min_snr_weight, simple_loss
from fastdiff.sampler import Sampler

__all__ = ["TrainConfig", "main", "noised", "parse", "progress_of", "train"]

# a step never takes this long; a longer gap is a stopped process, and no training time
_PAUSE_SECONDS = 5.0


def _generator(seed: int, counter: int, stream: int) -> torch.Generator:
    """The generator of one step (stream 0) or of one epoch's order (stream 1)."""
    # torch's CPU generator takes 32 bits of a seed and drops the rest, so the seeds are folded in
    # by a multiplication (Knuth's, of odd 2^31 / golden ratio) rather than by a shift
    return torch.Generator().manual_seed((stream << 31) + (seed * 1327217885 + counter) % (1 << 31))


def noised(
    schedule: schedules.Schedule,
    x0: Tensor,
    t: Tensor,
    seeds: Any,
    *,
    target: str = "epsilon",
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Data at the times `t` of a schedule, and the training target: `ops.add_noise` at alpha(t).

    Args:
        schedule: gives alpha and sigma.
        x0: (N, *S), as `ops.add_noise` takes it.
        t: (N,) times as the schedule counts them, on any device: the coefficients are made on the
            CPU, in float64.
        seeds, target, step: as `ops.add_noise` takes them.

    Returns:
        x and the target, as `ops.add_noise` returns them.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"noised: t must be a tensor, got {type(t).__name__}")
    times = t.detach().cpu().numpy()
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    return add_noise(x0, seeds, alpha, sigma, target=target, step=step)


class _Run:
    """The state of a training run: all that a checkpoint holds, and one optimizer step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        if config.schedule not in schedules.NAMES:
            rule = f"name a schedule of {sorted(schedules.NAMES)}, got {config.schedule!r}"
            raise ValueError(f"train: schedule must {rule}")
        self.schedule = schedules.NAMES[config.schedule]()
        if self.schedule.alphas_cumprod is None:
            raise ValueError(f"train: schedule must be discrete, got {config.schedule!r}")
        self.images, self.labels = data.fashion_mnist("train", config.data)
        if config.batch > len(self.images):
            raise ValueError(f"train: batch must be at most {len(self.images)}, got {config.batch}")
        torch.manual_seed(config.seed)
        arch = UNetConfig(
            channels=config.channels, blocks=config.blocks, patch_size=config.patch_size
        )
        layout: dict[str, Any] = {"memory_format": torch.channels_last, "device": config.device}
        self.model, self.ema = UNet(arch).to(**layout), UNet(arch).to(**layout)
        self.ema.load_state_dict(self.model.state_dict())
        self.ema.requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.lr, (0.9, 0.99),
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        times = torch.arange(len(self.schedule.alphas_cumprod))
        alphas = torch.from_numpy(self.schedule.alpha(times.numpy()))
        sigmas = torch.from_numpy(self.schedule.sigma(times.numpy()))
        self.weights = torch.ones_like(alphas)
        if config.gamma:
            self.weights = min_snr_weight(config.prediction, alphas, sigmas, config.gamma)
        self.step = 0
        self.elapsed = 0.0
        self.losses: list[float] = []

    @property
    def progress(self) -> float:
        return progress_of(self.config, self.step, self.elapsed)

    def advance(self) -> float:
        """One optimizer step and one EMA update; returns the weighted loss."""
        c = self.config
        x0, label, t = self._batch()
        x0, times, label = (a.to(c.device) for a in (x0, t.float(), label))
        x, target = self._noisy(x0, t)
        rate = c.lr * min(1.0, (self.step + 1) / max(c.warmup, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * self.progress))
        with torch.autocast(c.device.split(":")[0], torch.bfloat16, c.dtype == "bfloat16"):
            output = self.model(x.contiguous(memory_format=torch.channels_last), times, label)
        loss = simple_loss(output.float(), target, self.weights[t].float().to(c.device))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        decay = min(c.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.model.parameters()), 1 - decay
            )
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels (-1 where dropped) and integer times of the present step."""
        c, n = self.config, self.config.batch
        epoch, place = divmod(self.step, len(self.images) // n)
        order = _generator(c.seed, epoch, 1)
        index = torch.randperm(len(self.images), generator=order)[place * n : (place + 1) * n]
        draw = _generator(c.seed, self.step, 0)
        x0 = self.images[index]
        # one time in each n-th of the range: the loss varies less than with independent times
        share = (torch.arange(n) + torch.rand(n, generator=draw, dtype=torch.float64)) / n
        t = (share * len(self.weights)).long()
        dropped = torch.rand(n, generator=draw) < c.label_dropout
        label = self.labels[index].masked_fill(dropped, -1)
        return x0, label, t

    def _noisy(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the model sees of the images at the present step, and what it should answer."""
        c = self.config
        # a seed is an image's place in the batch; runs of other seeds have places of their own
        first = c.seed * c.batch % (1 << 62)
        return noised(self.schedule, x0, t, first, target=c.prediction, step=self.step)

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "losses": torch.tensor(self.losses),
        }
        with written_whole(path) as part:
            try:
                torch.save(state, part)
            except RuntimeError as error:  # of torch's own writer, on a full disk for one
                reason = str(error).partition("\n")[0]
                raise OSError(f"train: {path} must have room on its disk, got {reason}") from error

    def load(self, path: Path) -> None:
        """Continue from a checkpoint that `save` wrote."""
        if not path.is_file():
            raise FileNotFoundError(
                f"train: out must hold {path.name} to resume, got {path.parent}"
            )
        state = torch.load(path, weights_only=True, map_location=self.config.device)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.losses = state["losses"].tolist()

    def show(self, path: Path, rows: int = 8) -> None:
        """Write a grid of samples of the averaged weights, a column a class."""
        how, classes = self.sampling(), len(data.LABELS)
        table = solvers.build(
            how["solver"], self.schedule, how["steps"], prediction=self.config.prediction
        )
        label = torch.arange(classes).repeat(rows)
        images = Sampler(self.ema, table, guidance=how["guidance"], clip=how["clip"])(
            how["shape"], cond={"label": label}, uncond={"label": torch.full_like(label, -1)}
        )
        data.save_grid(images, path, classes)

    def sampling(self) -> dict[str, Any]:
        """How the card says to sample."""
        c = self.ema.config
        shape = [c.in_channels, c.image_size, c.image_size]
        return {
            "solver": "dpmpp_2m",
            "steps": 20,
            "guidance": self.config.guidance,
            "clip": 1.0,
            "shape": shape,
        }

    def card(self) -> dict[str, Any]:
        """What the reader of the weights should know; `metrics` is filled by the benchmarks."""
        c = self.config
        width = max(1, math.ceil(len(self.losses) / 200))
        curve = [self.losses[i : i + width] for i in range(0, len(self.losses), width)]
        return {
            "name": c.name,
            "prediction": c.prediction,
            "classes": list(data.LABELS),
            "sampling": self.sampling(),
            "licence": "Apache-2.0",
            "data": {
                "name": "Fashion-MNIST, training split, 60,000 images, padded to 32x32, [-1, 1]",
                "source": "https://github.com/zalandoresearch/fashion-mnist",
                "licence": "MIT, (c) 2017 Zalando SE",
            },
            "training": {
                "command": c.command(),
                "steps": self.step,
                "images_seen": self.step * c.batch,
                "minutes": round(self.elapsed / 60, 1),
                "dtype": f"{c.dtype} autocast, float32 weights",
                "machine": _machine(c.device),
                "torch": torch.__version__,
                "loss_every": width,
                "loss": [round(sum(part) / len(part), 5) for part in curve],
            },
            "metrics": {},
        }


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [s.split(":")[1] for s in info.read_text().splitlines() if "model name" in s]
        cpu = names[0].strip() if names else cpu
    return f"{cpu}, threads: {torch.get_num_threads()}"


def train(config: TrainConfig) -> Path:
    """Train (or resume) and write the averaged weights and their card into `config.out`.

    Returns:
        The path of the `.safetensors` file; the card lies beside it as `.json`.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run, last = _Run(config), out / "last.pt"

    if config.resume:
        run.load(last)
    bar = tqdm(total=config.steps, initial=run.step, unit="step", mininterval=2, file=sys.stderr)
    mark, usual = time.perf_counter(), 0.0
    while run.progress < 1:
        loss = run.advance()
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}", minutes=f"{run.elapsed / 60:.1f}", refresh=False)
        if run.step % config.save_every == 0:
            run.save(last)
        if run.step % config.sample_every == 0:
            run.show(out / f"samples-{run.step:06d}.png")
        now = time.perf_counter()
        usual = now - mark if now - mark < _PAUSE_SECONDS else usual
        run.elapsed, mark = run.elapsed + usual, now
    bar.close()
    run.save(last)
    run.show(out / f"{config.name}.png")
    return checkpoints.save(out / config.name, run.ema, run.schedule, run.card())


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config that a command line gives; `TrainConfig.command` inverts it."""
    parser = argparse.ArgumentParser("fastdiff train", description=(__doc__ or "").split("\n")[0])
    for f in fields(TrainConfig):
        flag = f"--{f.name.replace('_', '-')}"
        if f.name == "out":
            parser.add_argument(flag, required=True, help="folder of the results")
        elif isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true")
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, type=int, nargs="+", default=f.default)
        else:
            parser.add_argument(flag, type=type(f.default), default=f.default)
    return TrainConfig(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `fastdiff train`."""
    path = train(parse(argv))
    print(json.dumps({"weights": str(path), "card": str(path.with_suffix(".json"))}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
