"""Models and schedules from state dicts of guided-diffusion and improved-diffusion.

Dhariwal and Nichol 2021 (arXiv:2105.05233), Nichol and Dhariwal 2021 (arXiv:2102.09672). The files
hold weights alone; what they were trained with stands in the flags of those projects' scripts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff import schedules
from fastdiff.formats.schedulers import MOST_TIMES
from fastdiff.models import UNet
from fastdiff.models._unet_sources import CHANNEL_MULT, from_guided_diffusion, numbers
from fastdiff.schedules import Schedule

__all__ = ["infer", "is_guided", "load"]

_PARAMETERS = inspect.signature(from_guided_diffusion).parameters.values()
_MODEL = {p.name: p.default for p in _PARAMETERS if p.kind is p.KEYWORD_ONLY}
_DIFFUSION = {
    "diffusion_steps": 1000, "noise_schedule": "linear", "predict_xstart": False,
    "rescale_timesteps": False, "sigma_small": False, "num_heads_upsample": -1,
}  # fmt: skip
# how those scripts train and sample: they change nothing of the model or its schedule
_RUNS = ("timestep_respacing", "use_kl", "rescale_learned_sigmas", "use_checkpoint", "use_fp16")
MOST_PIXELS = 1 << 16  # a side
_NEEDED = ("image_size", "diffusion_steps", "noise_schedule")


def is_guided(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of these projects' U-Net."""
    return {"input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight"} <= set(state)


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The flags that weights tell by their names and shapes.

    Returns:
        num_channels, num_res_blocks, learn_sigma, class_cond, use_scale_shift_norm,
        resblock_updown, conv_resample and in_channels; "widths" of the levels and "attended", the
        levels with attention, finest first.

    Raises:
        ValueError: the blocks are not those of a U-Net of these projects.
    """
    try:
        return _infer(state)
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"load: weights must be those of guided-diffusion's UNetModel, got no {error}"
        ) from error


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    def size(name: str, axis: int = 0) -> int:
        return int(state[f"{name}.weight"].shape[axis])

    places = {tuple(key.split(".", 3)[:3]) for key in state}
    downs = {int(n) for part, n, _ in (p for p in places if len(p) == 3) if part == "input_blocks"}
    ups = sorted({int(p[1]) for p in places if p[0] == "output_blocks"})
    # what doubles the grid stands behind the block, and the attention, of a place
    grown = [
        key for key in state
        if key.startswith("output_blocks.") and key.split(".")[2] != "0"
        and key.endswith((".conv.weight", ".in_layers.0.weight"))
    ]  # fmt: skip
    # pooling has no weights: its places are missing
    steps = len(grown) or max(downs) + 1 - len(downs)
    each, left = divmod(len(ups), steps + 1)
    if left or each < 2:
        raise ValueError(f"equal parts of {len(ups)} blocks on {steps + 1} levels")
    channels, width = size("input_blocks.0.0", 1), size("input_blocks.1.0.in_layers.2")
    firsts = [each * level for level in reversed(range(steps + 1))]  # on the way up, finest first
    return {
        "num_channels": size("time_embed.0", 1),
        "num_res_blocks": each - 1,
        "learn_sigma": size("out.2") == 2 * channels,
        "class_cond": "label_emb.weight" in state,
        "use_scale_shift_norm": size("input_blocks.1.0.emb_layers.1") == 2 * width,
        "resblock_updown": any(key.endswith(".in_layers.0.weight") for key in grown),
        "conv_resample": bool(grown) or steps == 0,
        "in_channels": channels,
        "widths": [size(f"output_blocks.{n}.0.out_layers.3") for n in firsts],
        "attended": [i for i, n in enumerate(firsts) if f"output_blocks.{n}.1.qkv.weight" in state],
    }


def load(
    state: Mapping[str, Tensor], flags: Mapping[str, Any], source: str
) -> tuple[UNet, Schedule, dict[str, Any]]:
    """The model, schedule and card of a state dict.

    Args:
        flags: of the scripts, by their names; those that the weights tell may be left out.
        source: where the weights are from, for the card.

    Raises:
        ValueError: a flag is unknown, is missing, or says what the weights do not; the message
        lists all of them.
    """
    _check_names(flags)
    found = infer(state)
    _check_agreement(found, flags)
    given = {**_MODEL, **_DIFFUSION, **flags}
    size, widths = given["image_size"], found.pop("widths")
    if size % (1 << (len(widths) - 1)):
        raise ValueError(
            f"load: image_size must be a multiple of {1 << (len(widths) - 1)} for {len(widths)} "
            f"levels, got {size}"
        )
    attended = [size >> level for level in found.pop("attended")]
    told = {
        # exact, so that the widths come out as they are
        "channel_mult": [Fraction(width, found["num_channels"]) for width in widths],
        "attention_resolutions": attended,
        **found,
    }
    model = UNet.from_guided_diffusion(state, **{n: {**given, **told}[n] for n in _MODEL})
    steps = given["diffusion_steps"]
    if given["rescale_timesteps"]:
        config = replace(model.config, time_scale=1000.0 / steps)
        model.config = config
    prediction = "sample" if given["predict_xstart"] else "epsilon"
    fixed = "fixed_small" if given["sigma_small"] else "fixed_large"
    count = model.config.num_classes
    card = {
        "name": Path(source).stem,
        "source": source,
        "class": "UNetModel",
        "prediction": prediction,
        "classes": [str(i) for i in range(count)],
        "sampling": {
            "shape": [found["in_channels"], size, size],
            "guidance": 1.0,
            "clip": 1.0,
            "variance": "learned_range" if found["learn_sigma"] else fixed,
        },
        "flags": dict(flags),
    }
    return model, _schedule(given["noise_schedule"], steps), card


def _schedule(name: str, steps: int) -> Schedule:
    if name == "cosine":
        return schedules.cosine(steps)
    if name != "linear":
        raise ValueError(f"load: noise_schedule must be 'linear' or 'cosine', got {name!r}")
    # the scripts keep the whole process as noisy as that of 1000 steps
    return schedules.linear(steps, 0.1 / steps, 20.0 / steps)


def _check_names(flags: Mapping[str, Any]) -> None:
    """Refuse flags that are unknown, of another type, or not enough."""
    known = {**_MODEL, **_DIFFUSION, **dict.fromkeys(_RUNS)}
    unknown = sorted(set(flags) - set(known))
    if unknown:
        raise ValueError(f"load: config must hold flags among {sorted(known)}, got {unknown}")
    missing = [name for name in _NEEDED if name not in flags]
    if "num_heads" not in flags and flags.get("num_head_channels", -1) == -1:
        missing.append("num_heads or num_head_channels")
    if flags.get("diffusion_steps", 1000) != 1000 and "rescale_timesteps" not in flags:
        missing.append("rescale_timesteps")  # the two projects' defaults differ
    if missing:
        raise ValueError(
            f"load: config must hold the flags {missing}, which the weights of guided-diffusion do "
            f"not tell (and use_new_attention_order and predict_xstart, where they were True), got "
            f"{sorted(flags)}"
        )
    for name, value in flags.items():
        whole = isinstance(known[name], int) and not isinstance(known[name], bool)
        kind = int if whole else type(known[name])
        if kind in (bool, int) and type(value) is not kind:
            raise TypeError(f"load: {name} must be of type {kind.__name__}, got {value!r}")
    for name, most in (("image_size", MOST_PIXELS), ("diffusion_steps", MOST_TIMES)):
        if not 1 <= flags[name] <= most:
            raise ValueError(f"load: {name} must lie in [1, {most}], got {flags[name]}")
    if flags.get("num_heads_upsample", -1) not in (-1, flags.get("num_heads")):
        rule = "be -1 or num_heads, since the way up has the heads of the way down"
        raise ValueError(f"load: num_heads_upsample must {rule}, got {flags['num_heads_upsample']}")


def _check_agreement(found: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Refuse flags that say what the weights do not, all of them at once."""
    said = {"in_channels": 3, **{name: flags[name] for name in found if name in flags}}
    size, base = flags["image_size"], flags.get("num_channels", found["num_channels"])
    multiples = flags.get("channel_mult") or CHANNEL_MULT.get(size)
    if "channel_mult" in flags and multiples:
        said["widths"] = [int(m * base) for m in numbers(multiples)]
    if "attention_resolutions" in flags:
        rates = {size // int(s) for s in numbers(flags["attention_resolutions"]) if s >= 1}
        levels = range(len(found["widths"]))
        said["attended"] = [i for i in levels if 1 << i in rates]
    lines = [
        f"{name} {found[name]}, got {value}" for name, value in said.items() if value != found[name]
    ]
    if lines:
        raise ValueError(
            "load: config must agree with the weights, which say\n  " + "\n  ".join(lines)
        )
