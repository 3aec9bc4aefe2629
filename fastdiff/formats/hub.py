"""Folders of diffusers from the Hugging Face Hub, through the package `huggingface_hub`."""

from __future__ import annotations

import re
from pathlib import Path

from fastdiff.formats.diffusers import CONFIG, PIPELINE, SCHEDULER, part_of
from fastdiff.formats.files import STEM, find_weights, shards_of

__all__ = ["PREFIX", "fetch"]

PREFIX = "hf:"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"hf:({_WORD}/{_WORD})(?:/({_WORD}))?(?:@([A-Za-z0-9_][A-Za-z0-9_./-]*))?")


def fetch(name: str, variant: str | None) -> Path:
    """The local folder of a model on the Hub, downloaded where the cache does not have it.

    Only the configs and one file of weights (or its parts) are downloaded; `HF_HOME`,
    `HF_HUB_OFFLINE` and the other settings of huggingface_hub hold.

    Args:
        name: "hf:owner/name", "hf:owner/name/part" for one part of a pipeline, and "@revision"
            (a branch, tag or commit) behind either.
        variant: of the weights, see `find_weights`.

    Raises:
        ValueError: the name is not of this form. ImportError: huggingface_hub is missing.
        FileNotFoundError: the repository has no weights that can be read.
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name:
        raise ValueError(
            f"load: name must be like hf:owner/name, hf:owner/name/part or hf:owner/name@revision, "
            f"got {name!r}"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"load: the package huggingface_hub must be installed for {name!r} (pip install "
            f"huggingface_hub), got none; or give the path of a folder that is already here"
        ) from error
    repo, part, revision = match.groups()

    def download(*patterns: str) -> Path:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
        return root / part if part else root

    inside = f"{part}/" if part else ""
    index = f"{STEM}.*.index*.json"
    files = [PIPELINE, CONFIG, SCHEDULER, f"*/{CONFIG}", f"*/{SCHEDULER}", index, f"*/{index}"]
    folder = download(*(inside + file for file in files))
    model = part_of(folder)
    below = inside + (f"{model.name}/" if model != folder else "")
    tag = f".{variant}" if variant else ""
    tries = [f"{STEM}{tag}.safetensors", f"{STEM}{tag}.bin"]  # in the order of find_weights
    if variant is None:
        tries += [f"{STEM}.*.safetensors", f"{STEM}.*.bin"]
    for pattern in tries:
        try:
            found = find_weights(model, variant)
        except FileNotFoundError:
            download(below + pattern)
            continue
        break
    found = find_weights(model, variant)
    if found.suffix == ".json":
        download(*(below + shard for shard in set(shards_of(found).values())))
    return folder
