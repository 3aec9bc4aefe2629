"""The command line, run as a user runs it: pictures, lists, and errors with their reason."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import checkpoints, cli, schedules, solvers


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


def test_strip_shows_x0_at_each_evaluation(tiny, tmp_path):
    out, strip, arrays = (tmp_path / name for name in ("grid.png", "strip.png", "arrays.npz"))
    words = ["--model", tiny, "--solver", "heun", "--steps", 3, "--seeds", "4,6", "--label", 1]
    assert run("sample", *words, "--out", out, "--save", arrays, "--strip", strip) == 0
    with Image.open(strip) as picture:
        pixels = np.asarray(picture)
    table = solvers.build("heun", schedules.cosine(), 3, prediction="v_prediction")
    assert pixels.shape == (2 * 16, table.nfe * 16)  # an image a row, an evaluation a column
    images = np.load(arrays)["images"][:, 0]
    last = np.rint((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8)  # it ends in that x0
    assert np.array_equal(pixels[:, -16:].reshape(2, 16, 16), last)
    assert not np.array_equal(pixels[:, :16], pixels[:, -16:])


def test_options_reach_the_solver_and_the_spacing(tiny, tmp_path):
    def arrays(*words):
        out = tmp_path / "a.npz"
        base = ["--model", tiny, "--steps", 4, "--seeds", 3, "--out", tmp_path / "a.png"]
        assert run("sample", *base, "--save", out, *words) == 0
        return np.load(out)["images"]

    ddim = arrays("--solver", "ddim")
    assert np.array_equal(ddim, arrays("--solver", "ddim", "--option", "eta=0"))
    assert not np.array_equal(ddim, arrays("--solver", "ddim", "--option", "eta=1.0"))
    karras = ["--solver", "euler", "--spacing", "karras", "--option", "final=sigma_min"]
    assert not np.array_equal(arrays(*karras), arrays(*karras, "--option", "rho=3"))


def test_class_is_another_word_for_label(tiny, tmp_path):
    for word in ("--label", "--class"):
        saved = tmp_path / f"{word[2:]}.npz"
        words = ["--model", tiny, "--steps", 1, "--seeds", 3, "--out", tmp_path / "a.png"]
        assert run("sample", *words, word, "bag", "--save", saved) == 0
    one, other = (np.load(tmp_path / f"{name}.npz") for name in ("label", "class"))
    assert np.array_equal(one["images"], other["images"]) and other["label"].tolist() == [1]


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
        (["--option", "eta"], "option must be like eta=0.5, got 'eta'"),
        (["--option", "eta=0.5"], "options of dpmpp_2m must be among"),
        (["--out", "x.txt"], "sample: out must end like a picture, in .png or such, got x.txt"),
        (["--out", "x"], "sample: out must end like a picture, in .png or such, got x"),
        (["--strip", "x.fits"], "sample: strip must end like a picture"),  # which is read alone
        (["--strip", "no/such/folder/x.png"], "strip must lie in an existing folder"),
        (["--subdirs"], "subdirs must be given with --outdir, got True"),
        (["--batch", "4"], "batch must be given with --outdir, got 4"),
        (["--resume"], "resume must be given with --outdir, got True"),
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


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["solvers"], ["doctor"], ["--help"], ["train", "--help"]])
def test_a_reader_that_leaves_early_is_no_error(words, unbuffered):
    """As in `fastdiff solvers | head -1`: here the pipe is closed before anything is written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdiff", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    # argparse ends well where its own write of a help text fails
    assert process.wait() == 1 or words[-1] == "--help"
