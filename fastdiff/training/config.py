"""What a training run is told: the options of `fastdiff train`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastdiff.data import DATASETS
from fastdiff.reference.vae import LIKELIHOODS

__all__ = ["DEFAULTS", "TrainConfig", "defaults_of", "progress_of"]

# what each model's run does unless told otherwise, where that is not what the fields say
DEFAULTS: dict[str, dict[str, Any]] = {
    "unet": {},
    "vae-mlp": {
        "image_size": 28, "steps": 40000, "batch": 128, "warmup": 1000, "clip": 1000.0,
        "dtype": "float32", "save_every": 5000, "sample_every": 10000,
    },
    "vae-conv": {
        "image_size": 28, "steps": 15000, "warmup": 1000, "clip": 1000.0, "channels": (32, 64),
        "hidden": 256, "dtype": "float32", "save_every": 2500, "sample_every": 5000,
    },
    "autoencoder": {
        "steps": 3000, "batch": 32, "lr": 2e-3, "clip": 1000.0, "channels": (16, 32, 32),
        "latent": 4, "likelihood": "gaussian", "scale": 0.1, "beta": 0.1, "sample_every": 500,
    },
    "latent": {"steps": 18000, "save_every": 1000, "sample_every": 3000},
}  # fmt: skip

_VAES = ("vae-mlp", "vae-conv")
_DIFFUSION = ("unet", "latent")


def _of(default: Any, *models: str) -> Any:
    """A field that the runs of these models alone read."""
    return field(default=default, metadata={"models": models})


@dataclass(frozen=True)
class TrainConfig:
    """What `fastdiff train` takes; each field is an option of the same name.

    The defaults here are those of the U-Net. The other models have some of their own, in
    `DEFAULTS`, which the command line and `TrainConfig.of` take.

    Args:
        out: folder for the checkpoint, the sample grids and the final weights.
        name: file name of the final weights and their card; empty: that of the dataset for a
            U-Net, that of the model for another.
        model: what to train, a key of `DEFAULTS`: "unet", a diffusion model of images; "vae-mlp"
            or "vae-conv", a variational autoencoder; "autoencoder", the one whose latents
            "latent", a diffusion transformer, is trained on.
        dataset: what to train on, a name of `data.DATASETS`.
        data: folder of the dataset's files; empty: where its package puts them.
        image_size: height and width that the images are brought to.
        balance: a class of n images gets a share of all draws proportional to n to this power: 1
            leaves the data as it is, 0 draws every class alike.
        steps: optimizer steps.
        max_minutes: end after this much training time, the learning rate decayed by then; 0 for no
            limit. Pauses of the process are not counted.
        batch: images a step.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights, reached as (1 + step) / (10 + step).
        label_dropout: share of images trained as the null class.
        guidance: weight of classifier-free guidance in the sample grids, and the card's advice.
        gamma: min-SNR clips the signal-to-noise ratio here; 0 weighs every time alike.
        schedule: a name of `schedules.NAMES` that needs no arguments and is discrete.
        prediction: what the model predicts: epsilon, sample or v_prediction.
        channels: widths of the levels of the U-Net, the autoencoder or the convolutional VAE.
        blocks: residual blocks a level.
        patch_size: space-to-depth factor of the U-Net, side of the transformer's patches.
        width, depth, heads: of the transformer.
        autoencoder: whose latents the transformer learns: the path of a trained autoencoder, or a
            checkpoint that holds one.
        likelihood: of a VAE's pixels: bernoulli (of images binarized anew at each step),
            gaussian or discretized_logistic.
        scale: standard deviation of that Gaussian, or scale of that logistic distribution.
        beta: weight of the KL divergence in the loss.
        hidden: width of the hidden layers of a VAE.
        latent: numbers of a VAE's latent, channels of the autoencoder's.
        dtype: "bfloat16" (autocast) or "float32".
        device: where to train.
        threads: CPU threads, 0 for torch's choice.
        seed: of the weights, the order of the images, times, noises and dropped labels.
        save_every: steps between checkpoints.
        sample_every: steps between sample grids.
        resume: continue from the checkpoint in `out`.
        shard: among the processes of torchrun, cut the weights, their gradients, averages and
            moments into a part for each, by `torch.distributed.fsdp.fully_shard`, for a model
            that is too large to be kept whole in every one. One process has all parts.

    Raises:
        ValueError: a value breaks its rule, or belongs to another model.
    """

    out: str
    name: str = ""
    model: str = "unet"
    dataset: str = "fashion"
    data: str = ""
    image_size: int = 32
    balance: float = 1.0
    steps: int = 15000
    max_minutes: float = 0.0
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    label_dropout: float = _of(0.1, *_DIFFUSION)
    guidance: float = _of(1.5, *_DIFFUSION)
    gamma: float = _of(5.0, *_DIFFUSION)
    schedule: str = _of("cosine", *_DIFFUSION)
    prediction: str = _of("v_prediction", *_DIFFUSION)
    channels: tuple[int, ...] = _of((64, 128), "unet", "autoencoder", "vae-conv")
    blocks: int = _of(1, "unet", "autoencoder")
    patch_size: int = _of(2, *_DIFFUSION)
    width: int = _of(192, "latent")
    depth: int = _of(4, "latent")
    heads: int = _of(3, "latent")
    autoencoder: str = _of("latent", "latent")
    likelihood: str = _of("bernoulli", "autoencoder", *_VAES)
    scale: float = _of(1.0, "autoencoder", *_VAES)
    beta: float = _of(1.0, "autoencoder", *_VAES)
    hidden: int = _of(300, *_VAES)
    latent: int = _of(40, "autoencoder", *_VAES)
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int = 0
    seed: int = 0
    save_every: int = 500
    sample_every: int = 2000
    resume: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.model not in DEFAULTS:
            rule = f"be one of {', '.join(DEFAULTS)}, got {self.model!r}"
            raise ValueError(f"train: model must {rule}")
        for f in fields(self):
            value, models = getattr(self, f.name), f.metadata.get("models", DEFAULTS)
            if self.model not in models and value != f.default:
                rule = f"be left out for {self.model}, got {value}"
                raise ValueError(f"train: {f.name} must {rule}")
        for key in (
            "steps", "batch", "save_every", "sample_every", "image_size", "width", "depth", "heads",
            "hidden", "latent",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise ValueError(f"train: {key} must be >= 1, got {getattr(self, key)}")
        for key in (
            "balance", "max_minutes", "warmup", "weight_decay", "guidance", "gamma", "beta",
            "threads", "seed",
        ):  # fmt: skip
            if not getattr(self, key) >= 0:
                raise ValueError(f"train: {key} must be >= 0, got {getattr(self, key)}")
        for key in ("lr", "clip", "scale"):
            if not getattr(self, key) > 0:
                raise ValueError(f"train: {key} must be > 0, got {getattr(self, key)}")
        # of the others, infinity has a meaning: no clipping, no limit
        for key in ("balance", "weight_decay", "guidance", "beta", "lr", "scale"):
            if not math.isfinite(getattr(self, key)):
                raise ValueError(f"train: {key} must be finite, got {getattr(self, key)}")
        for key in ("ema", "label_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"train: {key} must lie in [0, 1), got {getattr(self, key)}")
        # Path("..").name is ".." too
        if self.name and (Path(self.name).name != self.name or self.name == ".."):
            raise ValueError(f"train: name must be that of a file in out, got {self.name!r}")
        choices = {
            "prediction": ("epsilon", "sample", "v_prediction"),
            "likelihood": LIKELIHOODS,
            "dataset": tuple(DATASETS),
        }
        for key, names in choices.items():
            if getattr(self, key) not in names:
                rule = f"be one of {', '.join(names)}, got {getattr(self, key)!r}"
                raise ValueError(f"train: {key} must {rule}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"train: dtype must be 'bfloat16' or 'float32', got {self.dtype!r}")

    @classmethod
    def of(cls, model: str, out: str, **options: Any) -> TrainConfig:
        """The config of a model with its own defaults, as the command line gives it.

        Raises:
            ValueError: as the class.
        """
        return cls(**{**DEFAULTS.get(model, {}), "out": out, "model": model, **options})

    @property
    def title(self) -> str:
        """Name of the final weights."""
        return self.name or (self.dataset if self.model == "unet" else self.model)

    def command(self) -> str:
        """The command line that gives this config, defaults left out."""
        words, own = ["fastdiff", "train"], DEFAULTS[self.model]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "resume" or (f.name != "out" and value == own.get(f.name, f.default)):
                continue
            words.append(f"--{f.name.replace('_', '-')}")
            if not isinstance(value, bool):
                words.extend(map(str, value if isinstance(value, tuple) else (value,)))
        return shlex.join(words)


def defaults_of(model: str) -> Mapping[str, Any]:
    """What each option is for a model unless given; no entry for `out`."""
    own = DEFAULTS.get(model, {})
    return {f.name: own.get(f.name, f.default) for f in fields(TrainConfig) if f.name != "out"}


def progress_of(config: TrainConfig, step: int, elapsed: float) -> float:
    """Share of the run that is done, in [0, 1]: of the steps or of the minutes, the larger."""
    share = step / config.steps
    if config.max_minutes:
        share = max(share, elapsed / (60 * config.max_minutes))
    return min(share, 1.0)
