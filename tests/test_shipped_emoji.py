"""The colour model as a user meets it: its card, its pictures, its classes."""

import numpy as np
import pytest
from PIL import Image

from fastdiff import checkpoints, cli


def sample(tmp_path, *words):
    """The picture and the arrays that a command writes."""
    out, arrays = tmp_path / "emoji.png", tmp_path / "emoji.npz"
    command = ["sample", "--model", "emoji", *words, "--out", str(out), "--save", str(arrays)]
    assert cli.main(command) == 0
    with Image.open(out) as picture:
        return np.asarray(picture), np.load(arrays)["images"]


def test_card():
    _, _, card = checkpoints.load("emoji")
    assert card["classes"] == [
        "smileys", "people", "component", "animals", "food", "travel", "activities", "objects",
        "symbols", "flags",
    ]  # fmt: skip
    assert "Apache-2.0" in card["data"]["licence"] and "Noto Emoji" in card["data"]["name"]
    assert "--dataset emoji" in card["training"]["command"]
    near = card["metrics"]["nearest"]
    assert 0 < near["samples_to_training"]["median"] < 2
    assert "python -m benchmarks.nearest" in near["command"]


def test_pictures_are_in_colour_and_in_range(tmp_path, capsys):
    picture, images = sample(tmp_path, "--class", "food,flags", "--seeds", "0-2", "--steps", "8")
    assert images.shape == (6, 3, 32, 32) and np.isfinite(images).all()
    assert np.abs(images).max() <= 1  # the card's clip
    assert picture.shape == (2 * 32, 3 * 32, 3)
    assert "dpmpp_2m_sde with 8 steps" in capsys.readouterr().out  # the card's solver
    spread = picture.max(axis=-1).astype(int) - picture.min(axis=-1)
    assert spread.mean() > 16  # of 255 between the channels of a pixel; 0 is grey


def test_a_class_is_what_its_name_says(tmp_path):
    """A yellow face and a square of skin."""
    _, images = sample(
        tmp_path, "--class", "smileys,component", "--seeds", "0-5", "--steps", "8",
    )  # fmt: skip
    red, _, blue = images[:6, :, 8:24, 8:24].mean(axis=(0, 2, 3))
    assert red - blue > 0.4
    # white ground around a face, none around a square
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=(1, 2))
    assert np.median(corners[:6]) > 0.8
    inner = images[6:, :, 4:28, 4:28]
    assert inner.std(axis=(2, 3)).mean() < images[:6, :, 4:28, 4:28].std(axis=(2, 3)).mean() / 2


def test_doctor_lists_it(capsys):
    assert cli.main(["doctor"]) == 0
    (line,) = [w for w in capsys.readouterr().out.splitlines() if w.startswith("checkpoints: ")]
    assert "emoji" in line.removeprefix("checkpoints: ").split(", ")


@pytest.mark.parametrize("words", (["--class", "sneaker"], ["--class", "10"]))
def test_a_class_of_another_model_is_refused(tmp_path, capsys, words):
    out = str(tmp_path / "x.png")
    assert cli.main(["sample", "--model", "emoji", *words, "--out", out]) == 2
    assert "label must be 0 to 9 or one of smileys, people, component" in capsys.readouterr().err
