"""The latent diffusion model that is shipped, and the page that says how to train one."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fastdiff
from fastdiff import checkpoints, cli
from fastdiff.models import LatentDiffusion
from fastdiff.training import parse
from fastdiff.training.config import DEFAULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")


def draw(labels, seeds):
    model, schedule, card = fastdiff.load("latent")
    how = card["sampling"]
    table = fastdiff.solvers.build(how["solver"], schedule, 8, prediction=card["prediction"])
    label = torch.tensor([card["classes"].index(name) for name in labels])
    latents = fastdiff.Sampler(model, table, guidance=how["guidance"], clip=how["clip"])(
        how["shape"], seeds=seeds, cond={"label": label}, uncond={"label": label * 0 - 1}
    )
    return model.decode(latents)


def test_size_and_card():
    path = checkpoints.ASSETS / "latent.safetensors"
    assert path.stat().st_size <= 8_000_000  # both halves together
    model, schedule, card = fastdiff.load("latent")
    assert isinstance(model, LatentDiffusion) and schedule.name == "cosine"
    assert len(card["classes"]) == 10 and card["licence"] == "Apache-2.0"
    for facts in (card, card["autoencoder"]):
        training = facts["training"]
        assert facts["data"]["licence"].startswith("MIT")
        assert training["minutes"] > 0 and "threads: 1" in training["machine"]
        assert len(training["loss"]) > 50
        assert np.mean(training["loss"][-20:]) < np.mean(training["loss"][:5])
        config = parse(training["command"].split()[2:])
        assert config.device == "cpu"
    assert parse(card["training"]["command"].split()[2:]).model == "latent"
    assert card["metrics"]["rows"][0]["n"] >= 1000


def test_samples_are_of_their_class_and_in_range():
    seeds = list(range(6))
    images = torch.cat([draw(["trouser"] * 6, seeds), draw(["sneaker"] * 6, seeds)])
    assert images.shape == (12, 1, 32, 32) and images.abs().max() <= 1
    trousers, sneakers = (images[:, 0] + 1).split(6)
    # trousers fill the middle columns from top to bottom, sneakers the lower rows from side to side
    for image in trousers:
        assert image[:, 8:24].sum() > 0.9 * image.sum() and image[:12].sum() > 0.2 * image.sum()
    for image in sneakers:
        assert image[:, 8:24].sum() < 0.8 * image.sum() and image[:12].sum() < 0.2 * image.sum()


def test_a_sample_is_its_seed_alone():
    one, many = draw(["bag"], [3]), draw(["bag", "coat", "boot"], [3, 4, 5])
    # the matrix products of another batch size may round otherwise
    assert (one - many[:1]).abs().max() < 0.05
    assert not torch.equal(many[0], many[1])


def test_command_line(tmp_path, capsys):
    out, arrays = tmp_path / "grid.png", tmp_path / "grid.npz"
    words = [
        "sample",
        "--model",
        "latent",
        "--steps",
        "4",
        "--seeds",
        "0-2",
        "--label",
        "bag,dress",
    ]
    assert cli.main([*words, "--out", str(out), "--save", str(arrays)]) == 0
    with Image.open(out) as picture:
        assert picture.size == (3 * 32, 2 * 32)
    images = np.load(arrays)["images"]
    assert images.shape == (6, 1, 32, 32) and np.abs(images).max() <= 1
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"checkpoints: .*\blatent\b", printed)


def test_page():
    """The page's table, its commands and its block of Python."""
    named = re.findall(r"^\| `([a-z][a-z-]*)`", TEXT, re.MULTILINE)
    assert named == list(DEFAULTS)
    commands = re.findall(r"^fastdiff train (.*)$", TEXT, re.MULTILINE)
    assert [parse(words.split()).model for words in commands] == [
        "vae-mlp", "autoencoder", "latent",
    ]  # fmt: skip
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    scope: dict[str, object] = {}
    exec(compile(block, PAGE.name, "exec"), scope)
    images = scope["images"]
    assert isinstance(images, torch.Tensor) and images.shape == (2, 1, 32, 32)
    assert images.abs().max() <= 1 and images.std() > 0.3
