"""Trained weights as safetensors, with a card in JSON beside them.

The card says how to rebuild the model and its schedule and what the model predicts, where it was
trained and on what; `load("fashion")` reads the one that is shipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fastdiff import schedules
from fastdiff.models._keys import require_fit
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.schedules import Schedule

__all__ = [
    "ARCHITECTURES", "ASSETS", "fast_dtype", "load", "load_weights", "names", "read_weights",
    "save",
]  # fmt: skip

ASSETS = Path(__file__).parent / "assets"

# name in the card: the module and its config, both built from JSON alone
ARCHITECTURES: dict[str, tuple[type[nn.Module], Any]] = {"UNet": (UNet, UNetConfig)}


def names() -> list[str]:
    """The checkpoints that are shipped with the library."""
    return sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def save(path: str | Path, model: nn.Module, schedule: Schedule, card: Mapping[str, Any]) -> Path:
    """Write weights in float16 and their card.

    Args:
        path: where to write, without suffix or with `.safetensors`.
        model: of a class in `ARCHITECTURES`; its `config` goes into the card.
        schedule: the schedule it was trained on; goes into the card.
        card: everything else, JSON-able; "prediction" must be there.

    Returns:
        The path of the `.safetensors` file; the card has the same name with `.json`.

    Raises:
        ValueError: the class is unknown, "prediction" is missing, or a weight overflows float16.
    """
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        raise ValueError(f"save: model must be one of {sorted(ARCHITECTURES)}, got {kind}")
    if "prediction" not in card:
        raise ValueError(f"save: card must hold 'prediction', got keys {sorted(card)}")
    state = {}
    for name, value in model.state_dict().items():
        state[name] = value.detach().to("cpu", torch.float16).contiguous()
        if not state[name].isfinite().all():
            raise ValueError(f"save: model must be finite in float16, got {name} that is not")
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    part = path.with_name(path.name + ".part")
    raw = to_bytes(state, {"format": "pt"})
    # not save_file, which leaves a file that only its owner may read
    part.write_bytes(raw)
    config: UNetConfig = model.config  # type: ignore[assignment]
    full = {
        **card,
        "architecture": {"class": kind, **config.to_config()},
        "schedule": schedule.to_config(),
        "dtype": "float16",
        "parameters": sum(value.numel() for value in state.values()),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    text = json.dumps(full, indent=1, allow_nan=False) + "\n"
    # between the two renames the pair does not match, which the sha256 then tells
    card_part = path.with_suffix(".json.part")
    card_part.write_text(text, encoding="utf-8")
    os.replace(card_part, path.with_suffix(".json"))
    os.replace(part, path)
    return path


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a `.pt` file, which is read without pickle's code.

    Raises:
        FileNotFoundError: no such file. ValueError: the suffix is unknown, or the file is not
        whole, or it holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: path must be a file, got {path}")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(
                f"load: path must be a whole safetensors file, got {path} ({error})"
            ) from error
    if path.suffix != ".pt":
        raise ValueError(f"load: path must end in .safetensors or .pt, got {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"load: path must be a whole .pt file of plain tensors, got {path} ({reason})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"load: path must hold a dict of tensors, got {path}")
    return state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into `model`, in the model's own dtypes.

    Raises:
        ValueError: names or shapes differ; the message lists every one. The model is then as it
        was.
    """
    if isinstance(model, UNet):
        weights = model.upgrade_state_dict(weights)
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    require_fit("load", want, weights)
    model.load_state_dict(dict(weights))


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
) -> tuple[nn.Module, Schedule, dict[str, Any]]:
    """A trained model with its schedule and its card.

    Args:
        name_or_path: one of `names()`, or the path of a `.safetensors` (or `.pt`) file that has its
            card beside it.
        dtype: dtype of the weights in memory; on disk they are float16. "auto": `fast_dtype` of the
            device, and convolutions in channels_last on the CPU. float32 unless asked, so that a
            script gives the same pictures on a CPU with and without bfloat16 instructions.
        device: where the model goes.

    Returns:
        The model in evaluation mode, the schedule, and the card (a dict, as `save` wrote it).

    Raises:
        FileNotFoundError: the weights or the card are missing.
        TypeError: `dtype` is neither a dtype nor "auto".
        ValueError: a file is damaged, or the weights do not fit the card.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = ASSETS / f"{name_or_path}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"load: name must be one of {names()} or a path, got {str(name_or_path)!r}"
            )
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise TypeError(f"load: dtype must be a torch.dtype or 'auto', got {dtype!r}")
    weights = read_weights(path)
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        raise FileNotFoundError(f"load: path must have its card beside it, got no {card_path}")
    try:
        card: dict[str, Any] = json.loads(card_path.read_text(encoding="utf-8"))
        architecture = dict(card["architecture"])
        module, config = ARCHITECTURES[architecture.pop("class")]
        schedule = schedules.from_config(card["schedule"])
        model = module(config.from_config(architecture))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"load: card must be as save wrote it, got {card_path} ({reason})"
        ) from error
    if path.suffix == ".safetensors":
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != card.get("sha256"):
            raise ValueError(
                f"load: weights must have the card's sha256 {card.get('sha256')}, got {digest}"
            )
    load_weights(model, weights)
    if dtype == "auto":
        dtype = fast_dtype(device)
        if torch.device(device).type == "cpu":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device=device, dtype=dtype).eval(), schedule, card
