"""Checkpoints: what goes in comes out, and nothing damaged or foreign gets in."""

import json
import math
import os
import pickle

import numpy as np
import pytest
import torch

from fastdiff import checkpoints, schedules
from fastdiff.models import UNet, UNetConfig
from fastdiff.reference.vae import VAE

TINY = UNetConfig(image_size=8, channels=(16,), embed_dim=16, groups=4, head_dim=16)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = UNet(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    card = {"prediction": "v_prediction", "metrics": {}}
    return model, checkpoints.save(tmp_path / "m.tiny", model, schedules.cosine(T=50), card)


def test_round_trip(saved):
    model, path = saved
    assert path.name == "m.tiny.safetensors"
    again, schedule, card = checkpoints.load(path)
    assert isinstance(again, UNet) and again.config == TINY and not again.training
    assert schedule == schedules.cosine(T=50)
    assert card["prediction"] == "v_prediction"
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    # float16 on disk, float32 in memory: rounded once
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float()), name
    # anyone may read the weights who may read the card
    assert path.stat().st_mode == path.with_suffix(".json").stat().st_mode
    assert sorted(os.listdir(path.parent)) == ["m.tiny.json", "m.tiny.safetensors"]


def test_dtype(saved):
    model, _, _ = checkpoints.load(saved[1], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# what torch says of a CPU, and the dtype that is then the fast one
@pytest.mark.parametrize(
    ("has", "want"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
    ids=["avx512_bf16", "amx_bf16", "avx512", "unknown"],
)
def test_auto_dtype(saved, monkeypatch, has, want):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert checkpoints.fast_dtype("cpu") == want
    assert checkpoints.fast_dtype("cuda:1") == torch.float32
    model, _, _ = checkpoints.load(saved[1], dtype="auto")
    assert {p.dtype for p in model.parameters()} == {want}
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    # what is not asked for does not depend on the machine
    assert next(checkpoints.load(saved[1])[0].parameters()).dtype == torch.float32


def test_a_torch_that_does_not_tell_its_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert checkpoints.fast_dtype() == torch.float32


def test_dtype_of_another_type(saved):
    with pytest.raises(TypeError, match=r"load: dtype must be a torch\.dtype or 'auto', got"):
        checkpoints.load(saved[1], dtype="bf16")


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    model, path = saved
    card = {"prediction": "v_prediction", "metrics": {}}
    again = checkpoints.save(tmp_path / "twice.safetensors", model, schedules.cosine(T=50), card)
    assert again.name == "twice.safetensors"
    assert again.read_bytes() == path.read_bytes()
    assert again.with_suffix(".json").read_text() == path.with_suffix(".json").read_text()


# the header's length, the header, the first tensor, the last byte
@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1], ids=str)
def test_truncated(saved, keep):
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="load: path must be a whole safetensors file, got"):
        checkpoints.load(path)


def test_one_flipped_bit(saved):
    _, path = saved
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="weights must have the card's sha256"):
        checkpoints.load(path)


def test_weights_that_do_not_fit_are_listed():
    model = UNet(TINY)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {k: torch.ones_like(v) for k, v in before.items()}
    del weights["stem.bias"]
    weights["stem.weight"] = torch.ones(3, 3)
    weights["extra"] = torch.ones(2)
    with pytest.raises(ValueError, match="load: weights must fit the model") as caught:
        checkpoints.load_weights(model, weights)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["missing", "stem.bias", "(16,)"],
        ["unexpected", "extra", "(2,)"],
        ["misshapen", "stem.weight", "(16,", "4,", "3,", "3),", "got", "(3,", "3)"],
    ]
    # a failed call leaves the model as it was
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_pt_file(saved):
    model, path = saved
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    again, _, _ = checkpoints.load(path.with_suffix(".pt"))
    # a .pt keeps the dtype it was saved in
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


class Trap:
    """Unpickling it makes a folder: a stand-in for code that a stranger's file would run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_does_not_run(saved):
    _, path = saved
    sprung = path.parent / "sprung"
    bad = path.with_suffix(".pt")
    for write in (lambda: torch.save({"w": Trap(sprung)}, bad),
                  lambda: bad.write_bytes(pickle.dumps(Trap(sprung), 2))):  # fmt: skip
        write()
        with pytest.raises(ValueError, match=r"load: path must be a whole \.pt file"):
            checkpoints.load(bad)
        assert not sprung.exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}], ids=["list", "not_tensors"])
def test_pt_of_something_else(saved, content):
    bad = saved[1].with_suffix(".pt")
    torch.save(content, bad)
    with pytest.raises(ValueError, match="load: path must hold a dict of tensors"):
        checkpoints.load(bad)


def test_missing_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"name must be one of .* got 'nobody'"):
        checkpoints.load("nobody")
    with pytest.raises(FileNotFoundError, match="load: path must be a file"):
        checkpoints.load(tmp_path / "nobody.safetensors")
    saved[1].with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="load: path must have its card beside it"):
        checkpoints.load(saved[1])
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt or \.bin, got"):
        checkpoints.load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "damage",
    [
        lambda card: "{",
        lambda card: json.dumps({k: v for k, v in card.items() if k != "schedule"}),
        lambda card: json.dumps({**card, "architecture": {"class": "Net"}}),
        lambda card: json.dumps({**card, "schedule": 3}),
    ],
    ids=["cut", "no_schedule", "unknown_class", "wrong_type"],
)
def test_damaged_card(saved, damage):
    path = saved[1].with_suffix(".json")
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"load: .*json must be (as save wrote it|JSON), got"):
        checkpoints.load(saved[1])


def test_what_save_refuses(saved, tmp_path):
    model, _ = saved
    with pytest.raises(ValueError, match="card must hold 'prediction'"):
        checkpoints.save(tmp_path / "x", model, schedules.cosine(), {})
    with pytest.raises(ValueError, match="model must be one of"):
        checkpoints.save(tmp_path / "x", torch.nn.Linear(1, 1), schedules.cosine(), {})
    with pytest.raises(ValueError, match=r"VAEConfig as its config.*, got fastdiff\.refer"):
        checkpoints.save(tmp_path / "x", VAE(torch.nn.Identity(), torch.nn.Identity()), None, {})
    with pytest.raises(TypeError, match="schedule must be a Schedule or None, got 'cosine'"):
        checkpoints.save(tmp_path / "x", model, "cosine", {"prediction": "sample"})
    wrong = ((np.float32(1), TypeError, "float32 is not"), (math.nan, ValueError, "Out of range"))
    for value, kind, message in wrong:
        card = {"prediction": "sample", "metrics": value}
        with pytest.raises(kind, match=f"save: card and schedule must be JSON, got .*{message}"):
            checkpoints.save(tmp_path / "x", model, schedules.cosine(), card)
    with torch.no_grad():
        model.stem.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"finite in float16, got stem\.bias"):
        checkpoints.save(tmp_path / "x", model, schedules.cosine(), {"prediction": "sample"})
    assert not (tmp_path / "x.safetensors").exists()


# bytes that each may take of what a user downloads
LARGEST = {"emoji": 12_000_000, "fashion": 6_000_000, "latent": 8_000_000, "vae-mlp": 3_000_000}


@pytest.mark.parametrize(("name", "most"), LARGEST.items())
def test_shipped_checkpoints(name, most):
    assert checkpoints.names() == sorted(LARGEST)
    model, schedule, card = checkpoints.load(name)
    assert (checkpoints.ASSETS / f"{name}.safetensors").stat().st_size <= most
    assert card["name"] == name
    assert {"name", "source", "licence"} <= set(card["data"])
    assert {"command", "machine", "steps", "minutes"} <= set(card["training"])
    x = torch.zeros(1, *card["sampling"]["shape"])
    if schedule is None:
        assert model.elbo((x + 1) / 2, 0).isfinite().all()
        return
    t = torch.tensor([schedule.t_max])
    for label in (-1, len(card["classes"]) - 1):
        assert model(x, t, torch.tensor([label])).isfinite().all()
