"""Weights and JSON from files that may come from strangers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = [
    "STEM", "find_weights", "read_json", "read_pickled", "read_shards", "read_weights",
    "require_dense", "shards_of",
]  # fmt: skip

STEM = "diffusion_pytorch_model"  # of the files of diffusers
_MOST_JSON = 1 << 25  # bytes: the index of a model of 100,000 tensors has a third of it
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PICKLED = (".pt", ".bin")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pt` or `.bin` file, the latter without pickle's code.

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
    if path.suffix not in _PICKLED:
        raise ValueError(f"load: path must end in .safetensors, .pt or .bin, got {path}")
    state = read_pickled("load", path)
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ValueError(f"load: path must hold a dict of tensors, got {path}")
    for name, value in state.items():
        require_dense("load", name, value, path)
    return state


def read_pickled(where: str, path: Path, device: str | torch.device = "cpu") -> Any:
    """What `torch.save` wrote: tensors in containers of Python, without pickle's code.

    Args:
        where: the first word of an error.

    Raises:
        ValueError: the file is not whole, or holds more than that.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    # what damaged bytes raise has no common type
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{where}: path must be a whole {path.suffix} file of plain tensors, got {path} "
            f"({reason})"
        ) from error


def require_dense(where: str, name: str, value: Tensor, path: Path) -> None:
    """Refuse a stride of 0, which makes a terabyte of a few bytes, and a sparse tensor, which is a
    list of places.

    Raises:
        ValueError: it is one.
    """
    if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(
            f"{where}: {name} must be a dense tensor of its own memory, got {value.layout} "
            f"{tuple(value.shape)} in {path}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load: path must hold {path.name}, got no {path}")
    if path.stat().st_size > _MOST_JSON:
        raise ValueError(
            f"load: {path.name} must have at most {_MOST_JSON} bytes, got {path.stat().st_size}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    # a RecursionError is brackets within brackets
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"load: {path.name} must be JSON, got {path} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"load: {path.name} must hold a JSON object, got {path}")
    return found


def find_weights(folder: Path, variant: str | None) -> Path:
    """The file of weights of a folder of diffusers, or the index of its parts.

    Args:
        variant: the word before the suffix, such as "fp16"; None: none, or the only one there is.

    Raises:
        FileNotFoundError: there are none, or several variants. ValueError: `variant` is no word.
    """
    if variant is not None and not _PLAIN.fullmatch(variant):
        raise ValueError(f"load: variant must be a word such as 'fp16', got {variant!r}")
    tag = f".{variant}" if variant else ""
    for suffix in ("safetensors", "bin"):
        for name in (f"{STEM}{tag}.{suffix}", f"{STEM}.{suffix}.index{tag}.json"):
            if (folder / name).is_file():
                return folder / name
    pattern = rf"{STEM}(?:\.(?:safetensors|bin)\.index)?\.([A-Za-z0-9_]+)\.(?:safetensors|bin|json)"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    matches = (re.fullmatch(pattern, name) for name in names)
    variants = sorted({match[1] for match in matches if match})
    if variant is None and len(variants) == 1:
        return find_weights(folder, variants[0])
    rule = f"hold {STEM}{tag}.safetensors or .bin, or the index of its parts"
    if variants:
        raise FileNotFoundError(
            f"load: folder must {rule}, or variant be one of {variants}, got variant {variant!r} "
            f"for {folder}"
        )
    raise FileNotFoundError(f"load: folder must {rule}, got {names} in {folder}")


def shards_of(index: Path) -> dict[str, str]:
    """Each weight's file, by an index of diffusers.

    Raises:
        ValueError: the index names something other than plain files of weights beside it.
    """
    kind = ".safetensors" if ".safetensors.index." in index.name else ".bin"
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"load: {index.name} must hold a 'weight_map', got none in {index}")
    for name in shards.values():
        # a path would lead out of the folder
        if not isinstance(name, str) or not _PLAIN.fullmatch(name) or not name.endswith(kind):
            raise ValueError(
                f"load: {index.name} must name {kind} files beside it, without a path, got {name!r}"
            )
    return shards


def read_shards(path: Path) -> dict[str, Tensor]:
    """The tensors of what `find_weights` found.

    Raises:
        FileNotFoundError: a part is missing. ValueError: as `read_weights`, or the parts do not
        hold what the index says; the message lists every weight.
    """
    if path.suffix != ".json":
        return read_weights(path)
    shards, found = shards_of(path), {}
    lines = []
    for file in sorted(set(shards.values())):
        part = read_weights(path.with_name(file))
        lines += [
            f"missing    {n} of {file}" for n, f in shards.items() if f == file and n not in part
        ]
        lines += [f"unexpected {n} in {file}" for n in part if shards.get(n) != file]
        found.update(part)
    if lines:
        raise ValueError(
            f"load: weights must be those of {path.name}, got\n  " + "\n  ".join(lines)
        )
    return found
