"""What a training run is told: the options of `fastdiff train`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastdiff.data import DATASETS


@dataclass(frozen=True)
class TrainConfig:
    """What `fastdiff train` takes; each field is an option of the same name.

    Args:
        out: folder for the checkpoint, the sample grids and the final weights.
        name: file name of the final weights and their card; empty: that of the dataset.
        dataset: what to train on, a name of `data.DATASETS`.
        data: folder of the dataset's files; empty: where its package puts them.
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
        channels: widths of the U-Net's levels.
        blocks: residual blocks a level.
        patch_size: space-to-depth factor of the U-Net.
        dtype: "bfloat16" (autocast) or "float32".
        device: where to train.
        threads: CPU threads, 0 for torch's choice.
        seed: of the weights, the order of the images, times, noises and dropped labels.
        save_every: steps between checkpoints.
        sample_every: steps between sample grids.
        resume: continue from the checkpoint in `out`.
    """

    out: str
    name: str = ""
    dataset: str = "fashion"
    data: str = ""
    balance: float = 1.0
    steps: int = 15000
    max_minutes: float = 0.0
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    label_dropout: float = 0.1
    guidance: float = 1.5
    gamma: float = 5.0
    schedule: str = "cosine"
    prediction: str = "v_prediction"
    channels: tuple[int, ...] = (64, 128)
    blocks: int = 1
    patch_size: int = 2
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int = 0
    seed: int = 0
    save_every: int = 500
    sample_every: int = 2000
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        for key in ("steps", "batch", "save_every", "sample_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"train: {key} must be >= 1, got {getattr(self, key)}")
        for key in (
            "balance",
            "max_minutes",
            "warmup",
            "weight_decay",
            "guidance",
            "gamma",
            "threads",
            "seed",
        ):
            if not getattr(self, key) >= 0:
                raise ValueError(f"train: {key} must be >= 0, got {getattr(self, key)}")
        for key in ("lr", "clip"):
            if not getattr(self, key) > 0:
                raise ValueError(f"train: {key} must be > 0, got {getattr(self, key)}")
        for key in ("ema", "label_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"train: {key} must lie in [0, 1), got {getattr(self, key)}")
        predictions = ("epsilon", "sample", "v_prediction")
        if self.prediction not in predictions:
            rule = f"be one of {predictions}, got {self.prediction!r}"
            raise ValueError(f"train: prediction must {rule}")
        if self.dataset not in DATASETS:
            rule = f"be one of {sorted(DATASETS)}, got {self.dataset!r}"
            raise ValueError(f"train: dataset must {rule}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"train: dtype must be 'bfloat16' or 'float32', got {self.dtype!r}")

    @property
    def title(self) -> str:
        """Name of the final weights."""
        return self.name or self.dataset

    def command(self) -> str:
        """The command line that gives this config, defaults left out."""
        words = ["fastdiff train"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "resume" or (f.name != "out" and value == f.default):
                continue
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--{f.name.replace('_', '-')} {text}")
        return " ".join(words)


def progress_of(config: TrainConfig, step: int, elapsed: float) -> float:
    """Share of the run that is done, in [0, 1]: of the steps or of the minutes, the larger."""
    share = step / config.steps
    if config.max_minutes:
        share = max(share, elapsed / (60 * config.max_minutes))
    return min(share, 1.0)
