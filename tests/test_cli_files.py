"""``fastdiff sample --outdir``: one file a seed, as EDM's generate.py writes them."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import _cli_files, checkpoints, cli, data, schedules
from fastdiff._cli_sample import labels_of
from fastdiff.reference.noise import philox


class Elementwise(torch.nn.Module):
    """A guided model whose images do not depend on its batch in any bit, as no sum runs in it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, label):
        shade = self.weight * (label.to(x.dtype) + 1).view(-1, 1, 1, 1) * 0.25
        return torch.tanh(x + t.to(x.dtype).view(-1, 1, 1, 1) / 700 - shade)


@pytest.fixture
def elementwise(monkeypatch):
    card = {
        "prediction": "sample",
        "classes": [f"class{i}" for i in range(4)],
        "sampling": {"guidance": 1.5, "shape": [3, 8, 8], "clip": 1.0},
    }
    monkeypatch.setattr(
        checkpoints, "load", lambda *_, **__: (Elementwise(), schedules.cosine(), card)
    )


def run(folder, *words, solver="ddpm"):
    base = ["sample", "--outdir", folder, "--solver", solver, "--steps", 3]
    return cli.main([str(w) for w in (*base, *words)])


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def test_an_image_depends_on_its_seed_alone(elementwise, tmp_path, capsys):
    assert run(tmp_path / "all", "--seeds", "0-9", "--batch", 4) == 0
    whole = hashes(tmp_path / "all")
    assert list(whole) == [f"{seed:06d}.png" for seed in range(10)]
    assert len(set(whole.values())) == 10
    assert "10 images, ddpm with 3 steps (3 model evaluations)" in capsys.readouterr().out
    # another batch size, other seeds beside it, another order
    for name, words in {
        "one": ["--seeds", "0-9", "--batch", 1],
        "default": ["--seeds", "0-9"],
        "few": ["--seeds", "7,2,5", "--batch", 2],
    }.items():
        assert run(tmp_path / name, *words) == 0
        assert hashes(tmp_path / name).items() <= whole.items()


def test_the_unet_differs_by_a_level_at_most(tiny, tmp_path):
    """Sums of a network may round otherwise in another batch, which moves a pixel by one level."""
    for batch in (1, 5):
        words = ["--model", tiny, "--seeds", "0-4", "--batch", batch, "--dtype", "float32"]
        assert run(tmp_path / str(batch), *words, solver="dpmpp_2m") == 0
    for seed in range(5):
        one, other = (
            np.asarray(Image.open(tmp_path / str(batch) / f"{seed:06d}.png")).astype(int)
            for batch in (1, 5)
        )
        assert one.shape == (16, 16) and np.abs(one - other).max() <= 1


def test_folders_of_a_thousand_seeds(elementwise, tmp_path):
    assert run(tmp_path / "out", "--seeds", "999-1001,123456", "--subdirs") == 0
    assert list(hashes(tmp_path / "out")) == [
        "000000/000999.png", "001000/001000.png", "001000/001001.png", "123000/123456.png",
    ]  # fmt: skip
    assert run(tmp_path / "flat", "--seeds", "1001") == 0
    flat, nested = (hashes(tmp_path / name) for name in ("flat", "out"))
    assert flat["001001.png"] == nested["001000/001001.png"]
    with Image.open(tmp_path / "flat" / "001001.png") as picture:
        assert picture.mode == "RGB" and picture.size == (8, 8)


def test_resume_keeps_what_is_there(elementwise, tmp_path, monkeypatch, capsys):
    folder, written, save = tmp_path / "out", [], data.save_image

    def failing(image, path):
        if len(written) == 3:
            raise OSError("no space left")
        written.append(path)
        save(image, path)

    monkeypatch.setattr(_cli_files, "save_image", failing)
    assert run(folder, "--seeds", "0-4", "--batch", 2) == 2
    assert "no space left" in capsys.readouterr().err
    first = hashes(folder)
    assert list(first) == ["000000.png", "000001.png", "000002.png"]
    (folder / "000001.png").write_bytes(b"mine")
    monkeypatch.setattr(_cli_files, "save_image", save)
    assert run(folder, "--seeds", "0-4", "--batch", 2, "--resume") == 0
    assert "2 images" in (printed := capsys.readouterr().out) and "3 kept" in printed
    assert (folder / "000001.png").read_bytes() == b"mine"
    assert run(folder, "--seeds", "0-4") == 0  # generate.py writes anew
    again = hashes(folder)
    assert first.items() <= again.items() and len(again) == 5
    assert run(folder, "--seeds", "0-4", "--resume") == 0
    assert "0 images" in capsys.readouterr().out


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    image, path = torch.zeros(1, 4, 4), tmp_path / "a.png"
    data.save_image(image, path)
    before = path.read_bytes()

    def half(self, target, format):
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="no space left"):
        data.save_image(torch.ones(1, 4, 4), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_save_image_scales_and_refuses(tmp_path):
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 7.0]).view(1, 2, 3)
    data.save_image(values, tmp_path / "grey.png")
    grey = np.asarray(Image.open(tmp_path / "grey.png"))
    assert grey.tolist() == [[0, 0, 128], [191, 255, 255]]
    data.save_image(torch.cat([values, -values, values]), tmp_path / "colour.png")
    colour = np.asarray(Image.open(tmp_path / "colour.png"))
    assert colour.shape == (2, 3, 3) and np.array_equal(colour[..., 0], grey)
    for shape in ((2, 4, 4), (4, 4)):
        with pytest.raises(ValueError, match=r"\(1, h, w\) or \(3, h, w\), got"):
            data.save_image(torch.zeros(shape), tmp_path / "x.png")


def test_the_seed_draws_the_class():
    many = labels_of(range(4000), range(10))
    counts = Counter(many)
    # 400 of each, within five standard deviations
    assert all(abs(counts[i] - 400) <= 5 * (4000 * 0.1 * 0.9) ** 0.5 for i in range(10))
    assert labels_of([17, 3], range(10)) == [many[17], many[3]]
    assert set(labels_of(range(100), [7, 2])) == {7, 2}
    assert labels_of(range(5), [6]) == [6] * 5
    assert labels_of([2**64 - 1], range(10))[0] in range(10)
    # the definition, so that no release changes a picture's class
    word = philox(np.array([0, 0, 0, 6], np.uint64), np.uint64(17))[0]
    assert many[17] == int(word) * 10 >> 32


def test_label_chooses_among_classes(elementwise, tmp_path):
    seen = {}
    for name, words in {"any": [], "two": ["--class", "1,3"], "one": ["--label", "class3"]}.items():
        assert run(tmp_path / name, "--seeds", "0-7", *words) == 0
        seen[name] = hashes(tmp_path / name)
    drawn = {"any": labels_of(range(8), range(4)), "two": labels_of(range(8), [1, 3])}
    for name, labels in drawn.items():
        for seed, label in enumerate(labels):
            file = f"{seed:06d}.png"
            assert (seen[name][file] == seen["one"][file]) == (label == 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", 0], "batch must be at least 1, got 0"),
        (["--out", "a.png"], "out must be given without --outdir, got a.png"),
        (["--save", "a.npz"], "save must be given without --outdir, got a.npz"),
        (["--strip", "a.png"], "strip must be given without --outdir, got a.png"),
        (["--steps", 0], "steps must be"),
        (["--seeds", "18446744073709551616"], r"seeds must lie in [0, 2**64)"),
    ],
)
def test_refusals(elementwise, tmp_path, capsys, words, message):
    assert run(tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_that_cannot_be(elementwise, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", "--seeds", 1) == 2
    assert "fastdiff: error:" in capsys.readouterr().err
