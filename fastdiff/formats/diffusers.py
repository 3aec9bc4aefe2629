"""Models and schedules from folders that diffusers' `save_pretrained` writes, without diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdiff.formats.files import find_weights, read_json, read_shards
from fastdiff.formats.schedulers import Scheduler, read_scheduler
from fastdiff.models import (
    Autoencoder,
    AutoencoderConfig,
    DiT,
    DiTConfig,
    LatentDiffusionConfig,
    UNet,
    UNetConfig,
    VAEConfig,
    _autoencoder_keys,
    _dit_keys,
    _unet_sources,
)
from fastdiff.schedules import Schedule

__all__ = [
    "CONFIG", "PIPELINE", "SCHEDULER", "as_written", "load_folder", "part_of", "require_bounds",
]  # fmt: skip

PIPELINE, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
MOST_PATCHES = 1024  # a side
PARTS = ("unet", "transformer")  # of a pipeline: the model that denoises


class _Kind(NamedTuple):
    """How a class of diffusers becomes one of ours: its config and the module."""

    config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, Mapping[str, Tensor]], nn.Module]


def require_bounds(config: Any, weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse what no weights bound, before anything is built: a number may be a billion.

    Args:
        config: of a class in `checkpoints.ARCHITECTURES`.
        path: the file that it was read from.

    Raises:
        ValueError: more layers than weights, or positions without end.
    """
    if isinstance(config, LatentDiffusionConfig):
        for part in (config.denoiser, config.autoencoder):
            require_bounds(part, weights, path)
        return
    if isinstance(config, (UNetConfig, AutoencoderConfig)):
        depth = config.blocks * len(config.channels)
    elif isinstance(config, VAEConfig):
        depth = len(config.channels)
    else:
        depth = config.depth if isinstance(config, DiTConfig) else config.layers
    if depth > len(weights):
        raise ValueError(
            f"load: {path.name} must fit the weights, got {depth} layers for "
            f"{len(weights)} tensors in {path.parent}"
        )
    # positions are computed, so no weight says how many there are
    if isinstance(config, DiTConfig) and config.image_size // config.patch_size > MOST_PATCHES:
        raise ValueError(
            f"load: images of {path.name} must be at most {MOST_PATCHES} patches a side, got "
            f"{config.image_size // config.patch_size}"
        )


KINDS: dict[str, _Kind] = {
    "AutoencoderKL": _Kind(
        lambda c: AutoencoderConfig(**_autoencoder_keys.diffusers_config(c)),
        lambda config, state: _autoencoder_keys.from_diffusers_weights(Autoencoder, config, state),
    ),
    "DiTTransformer2DModel": _Kind(
        lambda c: DiTConfig(**_dit_keys.diffusers_config(c)),
        DiT._with_diffusers,
    ),
    "UNet2DModel": _Kind(
        _unet_sources.diffusers_config,
        lambda config, state: _unet_sources.from_diffusers_weights(UNet, config, state),
    ),
}

# why a class that people will try is not among them
REFUSED = {
    "UNet2DConditionModel": "its blocks attend to a text, and models.UNet has no such layers; ",
}


def part_of(folder: Path) -> Path:
    """The folder of the model that denoises, of a pipeline's folder, or the folder itself.

    Raises:
        FileNotFoundError: neither a pipeline nor a model. ValueError: a pipeline without one.
    """
    if not (folder / PIPELINE).is_file():
        return folder
    index = read_json(folder / PIPELINE)
    # [null, null] stands for a part that is left out
    entries = {name: index.get(name) for name in PARTS}
    named = [name for name, entry in entries.items() if isinstance(entry, list) and any(entry)]
    if len(named) != 1:
        raise ValueError(
            f"load: {PIPELINE} must name one of {list(PARTS)}, got {named} in {folder}; a part's "
            f"own folder can be loaded too"
        )
    # the first releases of diffusers kept a pipeline's only model beside its index
    return folder / named[0] if (folder / named[0]).is_dir() else folder


def load_folder(
    folder: Path, source: str, variant: str | None, options: Mapping[str, Any]
) -> tuple[nn.Module, Schedule | None, dict[str, Any]]:
    """The model, schedule and card of a folder.

    Args:
        folder: of a pipeline, which has `model_index.json`, or of one of its models.
        source: where it is from, for the card.
        variant: of the weights, see `find_weights`.
        options: in place of those of the model's `config.json`.

    Returns:
        The model in the dtypes of the file, in evaluation mode; the schedule, None where no
        scheduler's config is there; the card.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged, or says what has no
        counterpart here, or the weights do not fit; the message lists all of them.
    """
    part, index = part_of(folder), {}
    if (folder / PIPELINE).is_file():
        index = read_json(folder / PIPELINE)
    written = read_json(part / CONFIG)
    kind = _kind(written, part / CONFIG)
    scheduler, described = _scheduler(folder, kind)
    with as_written(part / CONFIG):
        config = KINDS[kind].config({**written, **options})
        if scheduler is not None and scheduler.time_scale != 1:
            config = replace(config, time_scale=float(scheduler.time_scale))
    weights = read_shards(find_weights(part, variant))
    with as_written(part / CONFIG):
        require_bounds(config, weights, part / CONFIG)
        model = KINDS[kind].build(config, weights)
    card: dict[str, Any] = {"name": folder.name, "source": source, "class": kind}
    if kind != "AutoencoderKL":
        card["classes"] = _classes(config.num_classes, index)
        shape = [config.in_channels, config.image_size, config.image_size]
        card["sampling"] = {"shape": shape, "guidance": 1.0}
    if scheduler is None:
        return model, None, card
    card |= {"prediction": scheduler.prediction, "scheduler": described}
    card["sampling"]["clip"] = scheduler.clip
    return model, scheduler.schedule, card


def _kind(config: Mapping[str, Any], path: Path) -> str:
    kind = config.get("_class_name")
    if kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return "DiTTransformer2DModel"  # once an option of the other
    if not isinstance(kind, str) or kind not in KINDS:
        reason = REFUSED.get(str(kind), "")
        raise ValueError(
            f"load: _class_name must be one of {sorted(KINDS)}, got {kind!r} in {path}: {reason}"
            f"load it with diffusers and make it fast in place by fastdiff.accelerate(module)"
        )
    return kind


def _scheduler(folder: Path, kind: str) -> tuple[Scheduler | None, dict[str, Any]]:
    """The scheduler of a folder, and what its config says."""
    if kind == "AutoencoderKL":
        return None, {}
    for path in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER):
        if path.is_file():
            config = read_json(path)
            with as_written(path):
                return read_scheduler(config), config
    return None, {}


def _classes(count: int, index: Mapping[str, Any]) -> list[str]:
    """The names of the classes, their numbers where the pipeline does not say."""
    names = index.get("id2label") or {}
    if not isinstance(names, dict):
        raise ValueError(f"load: id2label must be an object, got {type(names).__name__}")
    return [str(names.get(str(i), i)) for i in range(count)]


@contextmanager
def as_written(path: Path, by: str = "diffusers writes") -> Iterator[None]:
    """Says which config it was that holds something of another type than was written."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"load: {path.name} must be as {by} it, got {path} ({reason})") from error
