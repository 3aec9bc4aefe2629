"""The loop that every model is trained by: AdamW with warm-up and cosine decay to zero, an
exponential moving average (EMA) of the weights, checkpoints that are whole or absent.

Everything random is a function of the seed and the step, so a resumed run repeats the
uninterrupted one, and a checkpoint needs no generator state.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff import checkpoints, data
from fastdiff._files import make_folder, written_whole
from fastdiff._machine import cpu_model
from fastdiff.training import saved, shards
from fastdiff.training.config import TrainConfig, progress_of
from fastdiff.training.diffusion import Diffusion
from fastdiff.training.latent import AutoencoderTraining, LatentDiffusionTraining
from fastdiff.training.objective import Objective, generator
from fastdiff.training.parallel import Share
from fastdiff.training.vae import VAETraining

__all__ = ["OBJECTIVES", "Run", "train"]

# a step never takes this long; a longer gap is a stopped process, and no training time
_PAUSE_SECONDS = 5.0

OBJECTIVES: dict[str, type[Objective]] = {
    "unet": Diffusion,
    "vae-mlp": VAETraining,
    "vae-conv": VAETraining,
    "autoencoder": AutoencoderTraining,
    "latent": LatentDiffusionTraining,
}


class Run:
    """The state of a training run: all that a checkpoint holds, and one optimizer step.

    Args:
        config: of the whole run.
        share: the part of this process; None: all.
    """

    def __init__(self, config: TrainConfig, share: Share | None = None) -> None:
        self.share = share or Share(config)
        self.config = config = replace(config, device=self.share.config.device)
        self.dataset = data.load(config.dataset, config.data, config.image_size)
        shape = self.dataset.images.shape
        if config.batch > shape[0]:
            raise ValueError(f"train: batch must be at most {shape[0]}, got {config.batch}")
        if shape[2] != shape[3]:
            raise ValueError(f"train: dataset must hold square images, got {tuple(shape[2:])}")
        if config.seed >= 1 << 64:
            raise ValueError(f"train: seed must be < 2**64, got {config.seed}")
        torch.manual_seed(config.seed)
        self.objective = OBJECTIVES[config.model](self.share.config, self.dataset)
        self.model, self.ema = (self.objective.build() for _ in range(2))
        self.ema.load_state_dict(self.model.state_dict())
        self.ema.requires_grad_(False).eval()
        self._loss = self.share.place(self.model, self.ema, self.objective)
        pairs = zip(self.model.parameters(), self.ema.parameters(), strict=True)
        trained = [(own, mean) for own, mean in pairs if own.requires_grad]
        self.parameters: list[nn.Parameter] = [own for own, _ in trained]
        self.means: list[Tensor] = [mean for _, mean in trained]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, (0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.elapsed = 0.0
        self.losses: list[float] = []

    @property
    def progress(self) -> float:
        return progress_of(self.config, self.step, self.elapsed)

    def advance(self) -> float:
        """One optimizer step and one EMA update; returns the loss."""
        c = self.config
        rate = c.lr * min(1.0, (self.step + 1) / max(c.warmup, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * self.progress))
        loss = self._loss(self.share.index(self.index()), self.step)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, c.clip)
        self.optimizer.step()
        decay = min(c.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.means, list(self.parameters), 1 - decay)
        self.step += 1
        self.losses.append(self.share.mean(loss))
        return self.losses[-1]

    def index(self) -> Tensor:
        """Which images the present step sees."""
        n = self.config.batch
        epoch, place = divmod(self.step, len(self.dataset.images) // n)
        return self._order(epoch)[place * n : (place + 1) * n]

    def _order(self, epoch: int) -> Tensor:
        """Which images an epoch draws, in order: each once or, of N images, one of weight w
        floor(N w) or ceil(N w) times."""
        draw, n = generator(self.config.seed, epoch, 1), len(self.dataset.images)
        order = torch.randperm(n, generator=draw)
        if self.config.balance == 1:
            return order
        # evenly spaced places from a random start: fewer repeats than independent draws have
        places = (torch.arange(n) + torch.rand(1, generator=draw, dtype=torch.float64)) / n
        ends = self.dataset.draw_weights(self.config.balance).cumsum(0)
        return torch.searchsorted(ends, places).clamp(max=n - 1)[order]

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all; the first process does, of what all have."""
        state = self.share.whole({
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "losses": torch.tensor(self.losses),
        })  # fmt: skip
        if state is None:
            return
        with written_whole(path) as part:
            try:
                torch.save(state, part)
            except RuntimeError as error:  # of torch's own writer, on a full disk for one
                reason = str(error).partition("\n")[0]
                raise OSError(f"train: {path} must have room on its disk, got {reason}") from error

    def load(self, path: Path) -> None:
        """Continue from a checkpoint that `save` wrote.

        Raises:
            FileNotFoundError: there is none. ValueError: it is damaged, or another model's; the run
            is then as it was.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"train: out must hold {path.name} to resume, got {path.parent}"
            )
        found = saved.read(path, self.config.model, self.model, self.optimizer, "cpu")
        for module, weights in ((self.model, found.model), (self.ema, found.ema)):
            own = module.state_dict()
            module.load_state_dict(
                {name: shards.like(own[name], value) for name, value in weights.items()}
            )
        # which torch would leave in the memory order of the file, and its fused step reads memory
        # as it lies
        for i, moments in found.optimizer["state"].items():
            for name, value in moments.items():
                if name != "step":
                    moments[name] = shards.like(self.parameters[i], value)
        self.optimizer.load_state_dict(found.optimizer)
        self.step, self.elapsed, self.losses = found.step, found.elapsed, found.losses

    def show(self, path: Path, rows: int = 8) -> None:
        """Write a grid of what the averaged weights make; the first process does."""
        model = self.averages()
        if model is not None:
            self.objective.show(model, path, rows)

    def averages(self) -> nn.Module | None:
        """The averaged weights, whole, in the first process; None in the others."""
        return self.share.whole_model(self.ema, self.objective)

    def card(self) -> dict[str, Any]:
        """What the reader of the weights should know; `metrics` is filled by the benchmarks."""
        c = self.config
        width = max(1, math.ceil(len(self.losses) / 200))
        curve = [self.losses[i : i + width] for i in range(0, len(self.losses), width)]
        return {
            "name": c.title,
            **self.objective.card(self.ema),
            "licence": "Apache-2.0",
            "data": {
                "name": self.dataset.name,
                "source": self.dataset.source,
                "licence": self.dataset.licence,
            },
            "training": {
                "command": c.command(),
                "class_share": f"in proportion to its number of images to the power {c.balance:g}",
                "steps": self.step,
                "images_seen": self.step * c.batch,
                **({"processes": self.share.size} if self.share.size > 1 else {}),
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
    return f"{cpu_model()}, threads: {torch.get_num_threads()}"


def train(config: TrainConfig) -> Path:
    """Train (or resume) and write the averaged weights and their card into `config.out`.

    Started by torchrun, every process takes its share of each batch, and the first one writes.

    Returns:
        The path of the `.safetensors` file; the card lies beside it as `.json`.

    Raises:
        FileNotFoundError: the data, the autoencoder or the checkpoint to resume are missing.
        ValueError: an option does not fit the data, the checkpoint or the number of processes.
    """
    share = Share(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    make_folder(out, "train: out")
    run, last = Run(config, share), out / "last.pt"

    if config.resume:
        run.load(last)
    bar = tqdm(
        total=config.steps, initial=run.step, unit="step", mininterval=2, file=sys.stderr,
        disable=share.rank > 0,
    )  # fmt: skip
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
        if config.max_minutes:  # the learning rate and the end go by it
            run.elapsed = share.agreed(run.elapsed)
    bar.close()
    path = (out / config.title).with_name(f"{config.title}.safetensors")
    run.save(last)
    run.show(out / f"{config.title}.png")
    averages = run.averages()
    if averages is not None:
        run.objective.finish(averages)
        path = checkpoints.save(out / config.title, averages, run.objective.schedule, run.card())
    share.leave()
    return path
