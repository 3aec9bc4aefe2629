"""The command line, run as a user runs it: pictures, lists, and errors with their reason."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import checkpoints, cli, schedules, solvers
from fastdiff.models.unet import UNet, UNetConfig


@pytest.fixture
def tiny(tmp_path):
    """A small untrained checkpoint on disk."""
    torch.manual_seed(0)
    config = UNetConfig(image_size=16, channels=(8, 8), num_classes=3, embed_dim=16, head_dim=8)
    card = {
        "prediction": "v_prediction",
        "classes": ["Coat", "Bag", "Boot"],
        "sampling": {"guidance": 1.5, "shape": [1, 16, 16]},
    }
    return checkpoints.save(tmp_path / "tiny", UNet(config), schedules.cosine(), card)


def run(*words):
    return cli.main([str(w) for w in words])


def test_sample_writes_picture_and_arrays(tiny, tmp_path, capsys):
    out, arrays = tmp_path / "grid.png", tmp_path / "arrays.npz"
    args = ["--model", tiny, "--steps", 3, "--seeds", "0-2,9", "--label", "bag,0"]
    assert run("sample", *args, "--out", out, "--save", arrays) == 0
    with Image.open(out) as picture:
        assert picture.size[0] >= 4 * 16 and picture.size[1] >= 2 * 16
    saved = np.load(arrays)
    assert saved["images"].shape == (8, 1, 16, 16)
    assert saved["label"].tolist() == [1] * 4 + [0] * 4
    assert saved["seed"].tolist() == [0, 1, 2, 9] * 2
    printed = capsys.readouterr().out
    assert "dpmpp_2m with 3 steps (3 model evaluations)" in printed
    assert "sample" in printed and " s " in printed


@pytest.mark.parametrize("solver", sorted(solvers.SOLVERS))
def test_every_solver_samples(tiny, tmp_path, solver):
    out = tmp_path / "a.npz"
    args = ["--solver", solver, "--model", tiny, "--steps", 2, "--seeds", 1, "--label", "boot"]
    try:
        solvers.build(solver, schedules.cosine(), 2, prediction="sample")
    except ValueError:  # of a flow or an EDM schedule alone; the model has neither
        assert run("sample", *args, "--out", tmp_path / "a.png") == 2
        return
    assert run("sample", *args, "--out", tmp_path / "a.png", "--save", out) == 0
    assert np.isfinite(np.load(out)["images"]).all()


def test_same_seed_same_image_across_runs_and_backends(tiny, tmp_path):
    images = {}
    for name, extra in {
        "alone": ["--seeds", "5"],
        "again": ["--seeds", "5"],
        "reference": ["--seeds", "5", "--backend", "reference"],
    }.items():
        out = tmp_path / f"{name}.npz"
        words = ["--model", tiny, "--solver", "ddpm", "--steps", 4, "--label", "0", *extra]
        assert run("sample", *words, "--out", tmp_path / "x.png", "--save", out) == 0
        images[name] = np.load(out)["images"]
    assert np.array_equal(images["alone"], images["again"])
    assert np.array_equal(images["alone"], images["reference"])


# the option and what torch says of the CPU: the dtype it samples in
@pytest.mark.parametrize(
    ("words", "bf16", "want"),
    [
        ([], True, "bfloat16"),
        ([], False, "float32"),
        (["--dtype", "auto"], True, "bfloat16"),
        (["--dtype", "float32"], True, "float32"),
        (["--dtype", "bfloat16"], False, "bfloat16"),
    ],
)
def test_dtype(tiny, tmp_path, capsys, monkeypatch, words, bf16, want):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16}, raising=False)
    dtypes = []
    load = checkpoints.load

    def watched(*args, **kwargs):
        dtypes.append(str(kwargs["dtype"]))
        return load(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "load", watched)
    words = ["--model", tiny, "--steps", 1, "--device", "cpu", "--out", tmp_path / "x.png", *words]
    assert run("sample", *words) == 0
    assert dtypes == [f"torch.{want}"]
    assert f"on cpu in {want}, " in capsys.readouterr().out


def test_solvers_lists_all(capsys):
    assert run("solvers") == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in solvers.SOLVERS)


def test_doctor_names_every_backend_and_the_cost(capsys):
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    for name in ("cpu", "triton", "cuda", "reference"):
        assert f"backend {name}" in printed
    if not torch.cuda.is_available():
        assert "no CUDA device" in printed and "cost:" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solver", "magic"], "solver must be one of"),
        (["--steps", "0"], "steps must be"),
        (["--seeds", "7-3"], "seeds must be rising ranges"),
        (["--seeds", "a"], "seeds must be like 0-7,42, got 'a'"),
        (["--seeds", "1,1"], "seeds must differ"),
        (["--label", "hat"], "label must be 0 to 2 or one of Coat, Bag, Boot, got 'hat'"),
        (["--label", "3"], "got '3'"),
        (["--guidance", "nan"], "guidance must be finite, got nan"),
        (["--out", "no/such/folder/x.png"], "out must lie in an existing folder"),
        (["--model", "absent"], "name must be one of"),
        (["--backend", "cuda"], "backend cuda refused"),
        (["--spacing", "wavy"], "spacing must be one of"),
    ],
)
def test_errors_say_the_rule_and_the_value(tiny, tmp_path, capsys, words, message):
    if words == ["--backend", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so the backend is not refused")
    base = ["--model", tiny, "--steps", 2, "--out", tmp_path / "x.png"]
    assert run("sample", *base, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_unwritable_output_is_found_before_the_work(tiny, tmp_path, capsys):
    assert run("sample", "--model", tiny, "--out", tmp_path) == 2
    assert "out must be writable" in capsys.readouterr().err


def test_corrupt_checkpoint(tiny, tmp_path, capsys):
    tiny.write_bytes(tiny.read_bytes()[:100])
    assert run("sample", "--model", tiny, "--out", tmp_path / "x.png") == 2
    assert "load: path must be a whole safetensors file" in capsys.readouterr().err


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fastdiff ")
