"""Models by their names on the Hub, from a local cache and through a download that is counted."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch

import fastdiff
from fastdiff.formats import hub
from fastdiff.models import Autoencoder, UNet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VAE = {
    "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def write_repository(folder: Path, **how: object) -> Path:
    """A pipeline with an autoencoder and files that are of no use here."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder, **how)
    diffusers.AutoencoderKL(**VAE).save_pretrained(folder / "vae", **how)
    (folder / "README.md").write_text("...")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"large")
    return folder


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A stand-in for snapshot_download: copies from a local folder, and notes what it was asked."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    asked: list[tuple[str, str | None]] = []
    copied: list[str] = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        cache.mkdir(exist_ok=True)
        for path in sorted(remote.rglob("*")):
            name = path.relative_to(remote).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                if not (cache / name).exists():
                    copied.append(name)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote, asked, copied


STEM = "diffusion_pytorch_model"


def test_pipeline(downloads):
    remote, asked, copied = downloads
    write_repository(remote)
    model, schedule, card = fastdiff.load("hf:owner/some.name")
    assert isinstance(model, UNet) and schedule == fastdiff.schedules.linear()
    assert card["source"] == "hf:owner/some.name"
    assert set(asked) == {("owner/some.name", None)}
    # of all that is there, the configs and one file of weights
    assert [n for n in copied if not n.endswith(".json")] == [f"unet/{STEM}.safetensors"]
    own, _, _ = fastdiff.load(remote)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), model.parameters(), strict=True))


def test_part_and_revision(downloads):
    remote, asked, copied = downloads
    write_repository(remote)
    model, schedule, _ = fastdiff.load("hf:owner/name/vae@refs/pr/3")
    assert isinstance(model, Autoencoder) and schedule is None
    assert set(asked) == {("owner/name", "refs/pr/3")}
    assert sorted(copied) == ["vae/config.json", f"vae/{STEM}.safetensors"]


@pytest.mark.parametrize(
    ("how", "variant", "files"),
    [
        ({"safe_serialization": False}, None, [f"{STEM}.bin"]),
        ({"variant": "fp16"}, "fp16", [f"{STEM}.fp16.safetensors"]),
        ({"variant": "fp16"}, None, [f"{STEM}.fp16.safetensors"]),
    ],
    ids=["pickled tensors", "a variant", "the only variant"],
)
def test_one_file_of_weights(how, variant, files, downloads):
    remote, _, copied = downloads
    write_repository(remote, **how)
    fastdiff.load("hf:owner/name/vae", variant=variant)
    assert sorted(copied) == ["vae/config.json", *(f"vae/{file}" for file in files)]


def test_every_part_of_sharded_weights(downloads):
    remote, _, copied = downloads
    diffusers.AutoencoderKL(**VAE).save_pretrained(remote, max_shard_size="20KB")
    fastdiff.load("hf:owner/name")
    assert sorted(copied) == sorted(path.name for path in remote.iterdir())


def test_a_repository_without_weights(downloads):
    remote, _, _ = downloads
    write_repository(remote)
    (remote / "unet" / f"{STEM}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"folder must hold {STEM}"):
        fastdiff.load("hf:owner/name")


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:owner", "hf:/owner/name", "hf:owner/name/", "hf:../name", "hf:owner/..",
     "hf:owner/name/..", "hf:owner/name/a/b", "hf:owner/name@", "hf:owner/name@a/../../x"],
)  # fmt: skip
def test_names_of_another_form(name, downloads):
    with pytest.raises(ValueError, match="load: name must be like hf:owner/name"):
        fastdiff.load(name)
    assert downloads[1] == []


def test_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="package huggingface_hub must be installed for 'hf:a/b'"):
        hub.fetch("hf:a/b", None)


def test_a_name_without_the_prefix_downloads_nothing(downloads):
    with pytest.raises(
        FileNotFoundError, match=r"name must be one of .*, a path or 'hf:owner/name'"
    ):
        fastdiff.load("owner/name")
    assert downloads[1] == []


def test_the_cache_of_the_package_itself(tmp_path):
    """Its own snapshot_download, offline, finds a model in a cache of its own layout."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--name"
    write_repository(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    # as the package keeps them: the files are links to blobs
    weights = repository / "snapshots" / COMMIT / "unet" / f"{STEM}.safetensors"
    (repository / "blobs").mkdir()
    weights.rename(repository / "blobs" / "abc")
    weights.symlink_to("../../../blobs/abc")
    code = "import fastdiff; print(type(fastdiff.load('hf:owner/name')[0]).__name__)"
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "UNet\n", done.stderr
