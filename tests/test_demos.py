"""``fastdiff demo``: every picture is drawn, is not blank, and says why where it cannot be."""

from __future__ import annotations

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import cli, demos
from fastdiff.demos import Options, _mixture, flow


def run(*words):
    return cli.main(["demo", *map(str, words)])


@pytest.fixture
def folder(tmp_path):
    """Fashion-MNIST in its format: both splits, every class, few random pictures."""
    made = tmp_path / "data"
    made.mkdir()
    draw = np.random.default_rng(0)
    for split, count in (("train", 200), ("t10k", 60)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = struct.pack(f">{array.ndim}I", *array.shape)
            raw = b"\x00\x00\x08" + bytes([array.ndim]) + sizes + array.tobytes()
            (made / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(raw))
    return made


@pytest.mark.parametrize("name", demos.DEMOS)
def test_every_picture(name, folder, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert run(name, "--quick", "--out", out, "--data", folder) == 0
    with Image.open(out) as picture:
        assert min(picture.size) > 600
        grey = np.asarray(picture.convert("L"))
    # something is drawn in every ninth of it
    for part in (p for rows in np.array_split(grey, 3) for p in np.array_split(rows, 3, axis=1)):
        assert part.std() > 5
    assert demos.DEMOS[name] in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_the_registry_is_the_folder():
    files = {p.stem for p in demos.Path(demos.__file__).parent.glob("[a-z]*.py")}
    assert files == set(demos.DEMOS)


def test_the_flow_is_a_checkpoint_that_eval_scores(tmp_path, capsys):
    out, save = tmp_path / "flow.png", tmp_path / "moons"
    assert run("flow", "--quick", "--out", out, "--save", save) == 0
    points = tmp_path / "moons.npy"
    assert np.load(points).shape == (flow.HELD_OUT, 2)
    assert cli.main(["eval", f"{save}.safetensors", "--data", str(points)]) == 0
    assert "nats a point" in capsys.readouterr().out


def test_training_of_the_flow_lowers_its_loss_and_depends_on_the_seed_alone():
    before = torch.random.get_rng_state()
    model, points, losses = flow.fit(Options(quick=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert losses[-1] < losses[0] - 0.1
    again, same, repeated = flow.fit(Options(quick=True))
    assert repeated == losses and torch.equal(same, points)
    assert torch.equal(again.log_prob(points), model.log_prob(points))
    assert flow.fit(Options(seed=1, quick=True))[2] != losses


def test_moons_lie_on_their_circles():
    points = flow.moons(4000, torch.Generator().manual_seed(0)).double()
    low = torch.tensor([0.5, 0.25], dtype=torch.float64)
    away = torch.stack([(points + low).norm(dim=1) - 1, (points - low).norm(dim=1) - 1])
    nearest = away.abs().min(0).values
    # a blur of 0.08 across the curve; its ends are blurred along it, too
    assert 0.05 < float(nearest.square().mean().sqrt()) < 0.09


def test_paths_begin_at_the_noise_and_end_in_the_data():
    states = _mixture.path(_mixture.MIXTURE, "dpmpp_2m", 20, list(range(300)))
    assert states.shape == (21, 300, 2)
    assert abs(float(states[0].square().mean()) - 1) < 5 * (2 / 600) ** 0.5
    likely = _mixture.MIXTURE.log_prob(states[-1].double())
    drawn = _mixture.MIXTURE.log_prob(
        _mixture.MIXTURE.sample(20000, torch.Generator().manual_seed(0))
    )
    assert abs(float(likely.mean() - drawn.mean())) < 5 * float(drawn.std()) / 300**0.5


def test_without_matplotlib_or_data(tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.png"
    assert run("vae", "--out", out, "--data", tmp_path) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("gmm", "--out", out) == 2
    assert "pip install 'fastdiff-sampler[demo]'" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "no/such/folder/x.png"], "demo: out must lie in an existing folder"),
        (["--out", "."], "demo: out must be a file, got the folder ."),
        (["--seed", -1], "demo: seed must lie in [0, 2**62), got -1"),
        (["--save", "moons"], "demo: save must be given with flow alone, got moons"),
    ],
)
def test_errors_say_the_rule_and_the_value(words, message, capsys):
    assert run("gmm", *words) == 2
    assert message in capsys.readouterr().err
