"""Trained weights as safetensors, with a card in JSON beside them.

The card says how to rebuild the model and its schedule and what the model predicts, where it was
trained and on what; `load("fashion")` reads the one that is shipped. `load` reads what diffusers
and guided-diffusion wrote too (`fastdiff.formats`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdiff import schedules
from fastdiff._files import written_whole
from fastdiff.formats import diffusers, guided_diffusion, hub
from fastdiff.formats.files import read_json, read_weights
from fastdiff.formats.schedulers import MOST_TIMES
from fastdiff.models import (
    VAE,
    Autoencoder,
    AutoencoderConfig,
    DiT,
    DiTConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)
from fastdiff.models._keys import require_fit
from fastdiff.reference.flow import RealNVP, RealNVPConfig
from fastdiff.schedules import Schedule

__all__ = [
    "ARCHITECTURES", "ASSETS", "fast_dtype", "load", "load_weights", "names", "read_weights",
    "save",
]  # fmt: skip

ASSETS = Path(__file__).parent / "assets"

# name in the card: what makes the module of its config, and the config, built from JSON alone
ARCHITECTURES: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
    "Autoencoder": (Autoencoder, AutoencoderConfig),
    "DiT": (DiT, DiTConfig),
    "LatentDiffusion": (LatentDiffusion, LatentDiffusionConfig),
    "RealNVP": (lambda config: RealNVP(**config.to_config()), RealNVPConfig),
    "UNet": (UNet, UNetConfig),
    "VAE": (VAE, VAEConfig),
}
# what no noise is added to
_WITHOUT_SCHEDULE = ("Autoencoder", "RealNVP", "VAE")


def names() -> list[str]:
    """The checkpoints that are shipped with the library."""
    return sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def save(
    path: str | Path, model: nn.Module, schedule: Schedule | None, card: Mapping[str, Any]
) -> Path:
    """Write weights in float16 and their card.

    Args:
        path: where to write, without suffix or with `.safetensors`.
        model: of a class in `ARCHITECTURES`; its `config` goes into the card.
        schedule: the schedule it was trained on; goes into the card. None for an autoencoder,
            a VAE or a flow.
        card: everything else, JSON-able; "prediction" must be there beside a schedule.

    Returns:
        The path of the `.safetensors` file; the card has the same name with `.json`.

    Raises:
        TypeError: the card holds what JSON has no type for, or schedule is none.
        ValueError: the class is unknown, the schedule or "prediction" is missing, a weight
        overflows float16, or a number of the card is not finite.
    """
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        raise ValueError(f"save: model must be one of {sorted(ARCHITECTURES)}, got {kind}")
    # others may have the name too, as the VAE of `fastdiff.reference` has
    if not isinstance(getattr(model, "config", None), ARCHITECTURES[kind][1]):
        rule = f"have a {ARCHITECTURES[kind][1].__name__} as its config, to be built from again"
        raise ValueError(f"save: model must {rule}, got {type(model).__module__}.{kind}")
    if not isinstance(schedule, (Schedule, type(None))):
        raise TypeError(f"save: schedule must be a Schedule or None, got {schedule!r}")
    if (schedule is None) != (kind in _WITHOUT_SCHEDULE):
        rule = "be None" if schedule is not None else "be a Schedule"
        raise ValueError(f"save: schedule must {rule} for a model of class {kind}, got {schedule}")
    if schedule is not None and "prediction" not in card:
        raise ValueError(f"save: card must hold 'prediction', got keys {sorted(card)}")
    state = {}
    for name, value in model.state_dict().items():
        state[name] = value.detach().to("cpu", torch.float16).contiguous()
        if not state[name].isfinite().all():
            raise ValueError(f"save: model must be finite in float16, got {name} that is not")
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    raw = to_bytes(state, {"format": "pt"})
    config: UNetConfig = model.config  # type: ignore[assignment]
    full = {
        **card,
        "architecture": {"class": kind, **config.to_config()},
        "schedule": None if schedule is None else schedule.to_config(),
        "dtype": "float16",
        "parameters": sum(value.numel() for value in state.values()),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    try:
        text = json.dumps(full, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise type(error)(f"save: card and schedule must be JSON, got {error}") from error
    # between the two renames the pair does not match, which the sha256 then tells
    with written_whole(path) as part, written_whole(path.with_suffix(".json")) as card_part:
        # not save_file, which leaves a file that only its owner may read
        part.write_bytes(raw)
        card_part.write_text(text, encoding="utf-8")
    return path


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into `model`, in the model's own dtypes.

    Raises:
        ValueError: names or shapes differ; the message lists every one. The model is then as it
        was.
    """
    model.load_state_dict(_fitting(model, weights))


def _fitting(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by today's names; errors as `load_weights`. The model may be on "meta"."""
    if isinstance(model, UNet):
        weights = model.upgrade_state_dict(weights)
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    require_fit("load", want, weights)
    return dict(weights)


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype of the weights in which sampling is fastest at no visible loss.

    bfloat16 on a CPU with instructions for it (AVX-512 BF16 or AMX), where a forward of the shipped
    model in channels_last takes 0.5 to 0.6 of float32's time (160 samples, one thread of an AMD
    EPYC); float32 elsewhere. Pictures of the two differ by roundings of bfloat16, so name a dtype
    where they must not depend on the machine.
    """
    # where torch does not say what the CPU has, nothing is assumed
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if torch.device(device).type != "cpu" or capabilities is None:
        return torch.float32
    has: Mapping[str, Any] = capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> tuple[nn.Module, Schedule | Any, dict[str, Any]]:
    """A trained model with its schedule and its card.

    Args:
        name_or_path: what to load. Nothing in it is run, and weights that do not fit are refused
            with every difference.

            - One of `names()`, or the path of a `.safetensors` (or `.pt`) file of `save`, which has
              its card beside it.
            - A folder of diffusers: of a pipeline (`model_index.json`), whose U-Net or transformer
              is taken with the schedule of its scheduler, or of one UNet2DModel,
              DiTTransformer2DModel or AutoencoderKL (`config.json`). diffusers is not needed.
            - "hf:owner/name", "hf:owner/name/part" or either with "@revision": such a folder on the
              Hugging Face Hub, by the package huggingface_hub.
            - A `.pt` file of guided-diffusion or improved-diffusion, with its flags in `config`.
        dtype: dtype of the weights in memory. "auto": `fast_dtype` of the device, and convolutions
            in channels_last on the CPU. float32 unless asked, so that a script gives the same
            pictures on a CPU with and without bfloat16 instructions.
        device: where the model goes.
        config: what the files do not tell. For guided-diffusion, the flags of its scripts by their
            names: image_size, diffusion_steps, noise_schedule, num_heads or num_head_channels, and
            what else was not left at its default; the weights tell the others. For a folder,
            options in place of those of the model's `config.json`, such as sample_size.
        variant: of a folder's weights, such as "fp16"; None: those without, or the only one.

    Returns:
        The model in evaluation mode, the schedule (None for an autoencoder, VAE or flow, and for a
        folder that has no scheduler), and the card: a dict as `save` wrote it, or with
        "prediction", "classes", "sampling" and "source" made from what was read.

    Raises:
        FileNotFoundError: the weights or the card are missing.
        ImportError: huggingface_hub is needed and missing.
        TypeError: `dtype` is neither a dtype nor "auto", or a flag has another type.
        ValueError: a file is damaged, says what has no counterpart here, or does not fit.
    """
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise TypeError(f"load: dtype must be a torch.dtype or 'auto', got {dtype!r}")
    model, schedule, card = _read(str(name_or_path), config, variant)
    if dtype == "auto":
        dtype = fast_dtype(device)
        if torch.device(device).type == "cpu":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device=device, dtype=dtype).eval(), schedule, card


def _read(
    name: str, config: Mapping[str, Any] | None, variant: str | None
) -> tuple[nn.Module, Schedule | None, dict[str, Any]]:
    """`load` on the CPU, in the dtypes of the file."""
    path = ASSETS / f"{name}.safetensors" if name in names() else Path(name)
    if name.startswith(hub.PREFIX):
        return diffusers.load_folder(hub.fetch(name, variant), name, variant, config or {})
    if path.is_dir():
        return diffusers.load_folder(path, name, variant, config or {})
    if not path.suffix:
        raise FileNotFoundError(
            f"load: name must be one of {names()}, a path or 'hf:owner/name', got {name!r}"
        )
    if variant is not None:
        raise ValueError(f"load: variant must be None for a file, got {variant!r}")
    weights = read_weights(path)
    card_path = path.with_suffix(".json")
    if config is not None or (not card_path.is_file() and guided_diffusion.is_guided(weights)):
        return guided_diffusion.load(weights, config or {}, name)
    return _read_own(path, weights, card_path)


def _read_own(
    path: Path, weights: Mapping[str, Tensor], card_path: Path
) -> tuple[nn.Module, Schedule | None, dict[str, Any]]:
    """What `save` wrote."""
    if not card_path.is_file():
        raise FileNotFoundError(f"load: path must have its card beside it, got no {card_path}")
    card = read_json(card_path)
    if path.suffix == ".safetensors":
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != card.get("sha256"):
            raise ValueError(
                f"load: weights must have the card's sha256 {card.get('sha256')}, got {digest}"
            )
    with diffusers.as_written(card_path, "save wrote"):
        written, described = card["architecture"], card["schedule"]
        if not isinstance(written, dict) or not isinstance(described, (dict, type(None))):
            raise TypeError("architecture and schedule must be objects")
        module, config_class = ARCHITECTURES[written["class"]]
        _check_times(described)
        schedule = None if described is None else schedules.from_config(described)
        config = config_class.from_config({k: v for k, v in written.items() if k != "class"})
        diffusers.require_bounds(config, weights, card_path)
        # a number in a card may be a billion: nothing is allocated that the weights do not fill
        with torch.device("meta"), _Unfilled():
            empty = module(config)
        weights = _fitting(empty, weights)
        model = module(config)
    model.load_state_dict(weights)
    return model, schedule, card


class _Unfilled(TorchFunctionMode):
    """Modules on the device "meta" without their values.

    torch fills and counts there in Python, and to do that imports its compiler, for a second.
    """

    _FILLS = (Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func in self._FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        if func is torch.arange and len(args) == 1:
            return torch.empty(args[0], dtype=given.get("dtype", torch.int64), device="meta")
        return func(*args, **given)


def _check_times(described: Any) -> None:
    """Refuse a schedule of more times than memory is taken for, at any depth."""
    while isinstance(described, Mapping):
        count = described.get("T", 1)
        if isinstance(count, (int, float)) and not count <= MOST_TIMES:
            raise ValueError(f"load: T of the schedule must be at most {MOST_TIMES}, got {count}")
        described = described.get("base")
