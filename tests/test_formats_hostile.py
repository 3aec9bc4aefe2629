"""Damaged and hostile files are refused with their reason; nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import struct

import diffusers
import pytest
import torch
from test_checkpoints import Trap

import fastdiff
from fastdiff.formats.files import read_json, read_weights

STEM = "diffusion_pytorch_model"
VAE = {
    "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder inside another, which no name in a file may reach."""
    path = tmp_path / "outer" / "vae"
    diffusers.AutoencoderKL(**VAE).save_pretrained(path)
    return path


@pytest.fixture
def sharded(tmp_path):
    path = tmp_path / "outer" / "vae"
    diffusers.AutoencoderKL(**VAE).save_pretrained(path, max_shard_size="20KB")
    return path


def index_of(folder):
    return folder / f"{STEM}.safetensors.index.json"


def rename_first(folder, name):
    """The index with another file for the file of its first weight."""
    index = json.loads(index_of(folder).read_text())
    first = next(iter(index["weight_map"].values()))
    index["weight_map"] = {k: name if f == first else f for k, f in index["weight_map"].items()}
    index_of(folder).write_text(json.dumps(index))
    return first


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# a file of weights that exists there is refused all the same
@pytest.mark.parametrize("where", ["..", "sub", "absolute"])
def test_an_index_that_leads_out_of_its_folder(where, sharded, monkeypatch):
    outside = {"..": sharded.parent, "sub": sharded / "sub", "absolute": sharded.parent}[where]
    outside.mkdir(exist_ok=True)
    name = {"..": "../w.safetensors", "sub": "sub/w.safetensors"}.get(where)
    name = name or str(outside / "w.safetensors")
    first = rename_first(sharded, name)
    (sharded / first).rename(outside / "w.safetensors")
    read = []
    monkeypatch.setattr("fastdiff.formats.files.load_file", lambda path: read.append(path))
    with pytest.raises(ValueError, match=r"must name .safetensors files beside it, without a path"):
        fastdiff.load(sharded)
    assert read == []


@pytest.mark.parametrize(
    "name",
    ["..\\w.safetensors", ".w.safetensors", "w.bin", "", "w.safetensors\n", 3, None],
    ids=["backslash", "hidden", "another suffix", "empty", "newline", "number", "null"],
)
def test_names_in_an_index(name, sharded):
    rename_first(sharded, name)
    with pytest.raises(ValueError, match=r"must name .safetensors files beside it, without a path"):
        fastdiff.load(sharded)


def test_shards_that_are_not_as_the_index_says(sharded):
    index = json.loads(index_of(sharded).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(k for k, f in index["weight_map"].items() if f == files[0])
    index["weight_map"][moved] = files[1]
    index_of(sharded).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weights must be those of .*index") as caught:
        fastdiff.load(sharded)
    assert str(caught.value).splitlines()[1:] == [
        f"  unexpected {moved} in {files[0]}",
        f"  missing    {moved} of {files[1]}",
    ]
    (sharded / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"path must be a file, got .*{files[1]}"):
        fastdiff.load(sharded)
    for content in ({}, {"weight_map": {}}, {"weight_map": ["a"]}):
        index_of(sharded).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"index.json must hold a 'weight_map'"):
            fastdiff.load(sharded)


def test_pickled_code_in_a_bin_does_not_run(folder):
    sprung = folder / "sprung"
    (folder / f"{STEM}.safetensors").unlink()
    bad = folder / f"{STEM}.bin"
    for write in (lambda: torch.save({"w": Trap(sprung)}, bad),
                  lambda: bad.write_bytes(pickle.dumps(Trap(sprung), 2)),
                  lambda: torch.save(torch.nn.Linear(1, 1), bad)):  # fmt: skip
        write()
        with pytest.raises(ValueError, match=r"must be a whole \.bin file of plain tensors"):
            fastdiff.load(folder)
        assert not sprung.exists()


def test_pickled_code_in_a_guided_pt_does_not_run(tmp_path):
    bad = tmp_path / "m.pt"
    torch.save({"w": Trap(tmp_path / "sprung")}, bad)
    with pytest.raises(ValueError, match=r"must be a whole \.pt file of plain tensors"):
        fastdiff.load(bad, config={"image_size": 64})
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("cut", [0, 1, 7, 64, 1000, -1], ids=str)
def test_truncated_pickles(cut, tmp_path):
    """At the start, in the zip's headers, in the data."""
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(2000)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"must be a whole \.pt file of plain tensors"):
        read_weights(path)


def test_keys_that_are_no_names(tmp_path):
    torch.save({3: torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="path must hold a dict of tensors"):
        read_weights(tmp_path / "m.pt")


def _safetensors(length: int, header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + header + data


ENTRY = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
HEADERS = {
    "longer than memory": _safetensors((1 << 64) - 1, b"{}"),
    "longer than the file": _safetensors(1 << 30, b"{}"),
    "no JSON": _safetensors(4, b"{{{{"),
    "offsets beyond the end": _safetensors(len(ENTRY % (4, 16)), ENTRY % (4, 16), b"\0" * 8),
    "a shape that is not the data": _safetensors(
        len(ENTRY % (1 << 40, 16)), ENTRY % (1 << 40, 16), b"\0" * 16
    ),
    "brackets within brackets": _safetensors(100_000, b"[" * 100_000),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers_of_safetensors(content, folder):
    (folder / f"{STEM}.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole safetensors file, got"):
        fastdiff.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json must be JSON"),
        (b"\xff\xfe", "config.json must be JSON"),
        (b"[" * 200_000, "config.json must be JSON"),
        (b"[1]", "config.json must hold a JSON object"),
        (b"{}", "_class_name must be one of .* got None"),
    ],
    ids=["cut", "no text", "deep", "a list", "empty"],
)
def test_configs_that_are_none(content, message, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        fastdiff.load(folder)


def test_a_config_of_many_bytes(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no disk
    with pytest.raises(
        ValueError, match=r"config.json must have at most .* bytes, got 1099511627776"
    ):
        read_json(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 10**12}, "must fit the weights, got 2000000000000 layers for"),
        ({"block_out_channels": [8, 1 << 16]}, "misshapen  encoder.down_blocks.1"),
        ({"block_out_channels": [8, 1 << 40]}, "must be as diffusers writes it"),
        ({"block_out_channels": [8, 10**40]}, "must be as diffusers writes it"),
        ({"block_out_channels": "8"}, "down_block_types must be"),
        ({"block_out_channels": 3}, "must be as diffusers writes it"),
        ({"layers_per_block": "1"}, "blocks must be an int >= 1, got '1'"),
        ({"layers_per_block": -1}, "blocks must be an int >= 1, got -1"),
        ({"norm_num_groups": 0}, "groups must be an int >= 1, got 0"),
        ({"latents_mean": [0] * 4, "latents_std": [0] * 4}, "must be as diffusers writes it"),
        ({"norm_type": "spatial"}, r"config must hold known options only, got \['norm_type'\]"),
    ],
    # numbers that would take memory or time, types and values that no model has
)
def test_configs_of_other_content(changes, message, folder):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        fastdiff.load(folder)


def test_a_transformer_of_a_billion_blocks(tmp_path):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4,
        num_embeds_ada_norm=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    edit(tmp_path, num_layers=10**9)
    with pytest.raises(ValueError, match="must fit the weights, got 1000000000 layers for"):
        fastdiff.load(tmp_path)
    edit(tmp_path, num_layers=1, sample_size=10**6)
    with pytest.raises(ValueError, match="must be at most 1024 patches a side, got 500000"):
        fastdiff.load(tmp_path)


def test_a_scheduler_of_other_content(tmp_path):
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"beta_start": "x"}, "beta_start must be a number, got 'x'"),
        ({"beta_start": None}, "beta_start must be a number, got None"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps must be an int in"),
        ({"num_train_timesteps": 10**15}, "num_train_timesteps must be"),
        ({"trained_betas": 3}, "trained_betas must be a list of numbers, got int"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            fastdiff.load(tmp_path)


def test_weights_that_do_not_fit_are_listed(folder):
    path = folder / f"{STEM}.safetensors"
    state = read_weights(path)
    torch.save(
        {
            **{k: v for k, v in state.items() if k != "quant_conv.bias"},
            "decoder.conv_in.bias": torch.zeros(3),
            "decoder.conv_out.bias": torch.zeros(3, dtype=torch.int64),
            "loss.weight": torch.zeros(2),
        },
        folder / f"{STEM}.bin",
    )
    path.unlink()
    with pytest.raises(ValueError, match="weights must fit the model, got") as caught:
        fastdiff.load(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  missing    quant_conv.bias (8,)",
        "  unexpected loss.weight (2,)",
        "  misshapen  decoder.conv_in.bias (16,), got (3,)",
        "  mistyped   decoder.conv_out.bias floating point, got torch.int64",
    ]


def test_what_is_not_there(folder):
    (folder / f"{STEM}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"folder must hold {STEM}\.safetensors or .bin"):
        fastdiff.load(folder)
    os.remove(folder / "config.json")
    with pytest.raises(FileNotFoundError, match=r"path must hold config.json, got no"):
        fastdiff.load(folder)
    with pytest.raises(ValueError, match="variant must be None for a file, got 'fp16'"):
        fastdiff.load("fashion", variant="fp16")
