"""``fastdiff eval``: which images are scored, colour, and latents."""

import json
import math
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import write_smooth
from torch import nn

from fastdiff import _eval_data, checkpoints, cli, data, schedules
from fastdiff._eval_diffusion import summary
from fastdiff.data import Dataset
from fastdiff.likelihood import DiffusionLikelihood
from fastdiff.models import (
    Autoencoder,
    AutoencoderConfig,
    DiTConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    UNet,
    UNetConfig,
)


@pytest.fixture
def folder(tmp_path):
    """A test split in the format of Fashion-MNIST."""
    made = tmp_path / "data"
    made.mkdir()
    return write_smooth(made, 8)


def run(*words):
    return cli.main(["eval", *map(str, words)])


def test_page():
    """Its commands are taken, and it names no method that is not there."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "likelihood.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.partition("#")[0] for line in block.splitlines()]
    commands = [part.split()[1:] for line in lines for part in line.split("&&")]
    parsed = [cli._parser().parse_args(words) for words in commands]
    assert [args.command for args in parsed] == ["eval", "demo", "eval"]
    options = {f"--{name.replace('_', '-')}" for name in vars(parsed[0])} | {"--dataset"}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= options | {"--save"}  # of the others
    named = re.findall(r"`(\w+)`", text.rpartition("DiffusionLikelihood(")[2])
    assert named and all(callable(getattr(DiffusionLikelihood, name)) for name in named)


def test_padding_is_counted_apart(folder):
    """32x32: the bits of the padding count for the pixels, of which there are fewer."""
    found = _eval_data.load(Namespace(data=str(folder), images=4), [1, 32, 32])
    assert found.images.shape == (4, 1, 32, 32) and found.labels.tolist() == [0, 1, 2, 0]
    assert found.dims == {"dim": 1024, "pixel": 784} and found.facts["split"] == "test"
    bits = summary(torch.full((4,), 1024 * math.log(2)), found.dims)
    assert abs(bits["bits_per_dim"] - 1) < 1e-6
    assert abs(bits["bits_per_pixel"] - 1024 / 784) < 1e-6


# --- colour -----------------------------------------------------------------------------------


@pytest.fixture
def colours(monkeypatch):
    """Thirteen images of quarter levels, as means of four pixels are, in place of the emoji."""
    quarters = np.random.default_rng(0).integers(0, 1021, (13, 3, 8, 8)) / 4
    made = Dataset(
        torch.from_numpy(quarters / 127.5 - 1).float(), torch.arange(13) % 10,
        tuple("abcdefghij"), "Quarters", "nowhere", "none",
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(data, "load", lambda *words: asked.append(words) or made)
    return made, quarters, asked


def test_colour_is_on_levels_and_in_a_fixed_random_order(colours):
    made, quarters, asked = colours
    found = _eval_data.load(Namespace(data=None, images=4), [3, 8, 8])
    index = torch.randperm(13, generator=torch.Generator().manual_seed(0))[:4].tolist()
    fewer = _eval_data.load(Namespace(data=None, images=2), [3, 8, 8])
    assert torch.equal(fewer.images, found.images[:2]) and index != sorted(index)
    assert asked == [("emoji", "", 8)] * 2 and found.labels.tolist() == made.labels[index].tolist()
    # a float32 quarter level is off by far less than the quarter to the next half
    levels = (found.images.double() + 1).numpy() * 127.5
    assert np.abs(levels - levels.round()).max() < 1e-4
    assert np.abs(levels.round() - quarters[index]).max() <= 0.5
    assert found.dims == {"dim": 192} and found.facts["levels"] == 256
    assert "no test figure" in found.facts["split"] and "Quarters" in found.facts["note"]


def test_a_colour_model(colours, tmp_path, capsys):
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=3, image_size=8, channels=(8, 8), num_classes=10, embed_dim=16, head_dim=8
    )
    card = {
        "prediction": "v_prediction", "classes": list("abcdefghij"),
        "sampling": {"guidance": 1.5, "shape": [3, 8, 8], "clip": 1.0},
    }  # fmt: skip
    path = checkpoints.save(tmp_path / "hues", UNet(config), schedules.cosine(12), card)
    words = [path, "--images", 4, "--draws", 0, "--ode-images", 2, "--rtol", 1e-2, "--check", 0]
    assert run(*words, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "4 images of Noto Emoji, split: all, the images that the model was trained" in printed
    assert "bits/dim (192)" in printed and "pixel" not in printed
    (row,) = json.loads((tmp_path / "eval_hues.json").read_text())
    scored = _eval_data.load(Namespace(data=None, images=4), [3, 8, 8])
    model, schedule, _ = checkpoints.load(path)
    by_hand = DiffusionLikelihood(model, schedule, prediction="v_prediction", clip=1.0)
    want = by_hand.bound(scored.images, 0, {"label": scored.labels}).total.mean()
    # a float32 network in batches of another memory format
    assert abs(row["vlb"]["nats"] / float(want) - 1) <= 1e-4
    assert row["dims"] == {"dim": 192} and row["vlb_minus_ode"]["images"] == 2
    assert run(path, "--images", 14) == 2
    assert "images must be at most 13, got 14" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape",
    [(3, 24, 24), (3, 32, 16), (4, 32, 32), (1, 16, 16)],
    ids=["no divisor of 64", "no square", "neither grey nor colour", "smaller than the images"],
)
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"eval: checkpoint must be of grey squares .* got shape"):
        _eval_data.load(Namespace(data=None, images=4), list(shape))


# --- latents ----------------------------------------------------------------------------------


@pytest.fixture
def latent():
    """An untrained pair for 32x32 images, of which the class matters."""
    torch.manual_seed(0)
    denoiser = DiTConfig(
        in_channels=2, image_size=8, patch_size=4, width=16, depth=1, heads=2, num_classes=3,
        learn_sigma=False,
    )  # fmt: skip
    autoencoder = AutoencoderConfig(
        in_channels=1, channels=(8, 8, 8), latent_channels=2, latent_shift=(0.5, -1.0),
        latent_scale=(2.0, 0.25),
    )  # fmt: skip
    model = LatentDiffusion(LatentDiffusionConfig(denoiser, autoencoder))
    for weights in model.denoiser.parameters():  # no prediction is 0 by its initialization
        nn.init.normal_(weights, std=0.1)
    return model


CARD = {
    "prediction": "v_prediction", "classes": ["a", "b", "c"],
    "sampling": {"guidance": 1.5, "shape": [2, 8, 8], "clip": None},
}  # fmt: skip


def test_latents_are_scored_as_latents(latent, folder, tmp_path, capsys):
    path = checkpoints.save(tmp_path / "pair", latent, schedules.cosine(12), CARD)
    words = [path, "--data", folder, "--images", 5, "--batch", 3, "--draws", 0, "--seed", 4]
    assert run(*words, "--ode-images", 2, "--rtol", 1e-2, "--check", 1, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "reconstruction from the mean of q(z|x): PSNR" in printed
    assert "not of pixels" in printed and "bits/latent_dim (128)" in printed
    assert "bits/dim" not in printed and (tmp_path / "eval_pair.png").is_file()
    (row,) = json.loads((tmp_path / "eval_pair.json").read_text())
    assert (row["kind"], row["dims"]) == ("latent diffusion", {"latent_dim": 128})
    assert "not of pixels" in row["data"]["space"] and row["data"]["levels"] is None

    # the same by hand
    model, schedule, _ = checkpoints.load(path)
    images, labels = data.fashion_mnist("test", folder, 32)
    x, given = images[:5], {"label": labels[:5]}
    with torch.no_grad():
        z = model.autoencoder.scale(model.autoencoder.sample(x, range(4, 9))[0])
    by_hand = DiffusionLikelihood(model, schedule, prediction="v_prediction", bins=None)
    want = float(by_hand.bound(z, range(4, 9), given).total.mean())
    # a float32 network in batches of another memory format
    assert abs(row["vlb"]["nats"] - want) <= 1e-4 * max(abs(want), 128)
    again = model.decode(model.encode(x)).double().detach()
    error = (again - x.double()).square().flatten(1).mean(1)
    near = row["reconstruction"]
    assert near["images"] == 5 and near["kl"]["nats"] > 0
    assert abs(near["rmse"] / float(error.sqrt().mean()) - 1) <= 1e-5
    assert abs(near["psnr"] / float((10 * torch.log10(4 / error)).mean()) - 1) <= 1e-5


def test_latents_have_no_bins(latent, folder, tmp_path, capsys):
    path = checkpoints.save(tmp_path / "pair", latent, schedules.cosine(12), CARD)
    assert run(path, "--data", folder, "--images", 2, "--start", "uniform") == 2
    assert "start must be decoder for latents" in capsys.readouterr().err


def test_an_autoencoder_that_halves_its_input(folder, tmp_path, monkeypatch):
    """Half of every number is lost."""

    class Halves(Autoencoder):
        def encode(self, x):
            return x, torch.zeros_like(x)

        def decode(self, z):
            return z / 2

    model = Halves(AutoencoderConfig(in_channels=1, channels=(8,), latent_channels=1))
    card = {"sampling": {"shape": [1, 28, 28]}}
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: (model, None, card))
    assert run("half", "--data", folder, "--images", 4, "--out", tmp_path) == 0
    (row,) = json.loads((tmp_path / "eval_half.json").read_text())
    x = data.fashion_mnist("test", folder, 28)[0][:4].double().flatten(1)
    mean_square = x.square().mean(1) / 4
    assert row["kind"] == "autoencoder" and "vlb" not in row
    near = row["reconstruction"]
    assert abs(near["rmse"] / float(mean_square.sqrt().mean()) - 1) <= 1e-6
    assert abs(near["psnr"] / float((10 * torch.log10(4 / mean_square)).mean()) - 1) <= 1e-6
    # KL of N(x, 1) from N(0, 1) is x^2 / 2
    assert abs(near["kl"]["nats"] / float(x.square().sum(1).mean() / 2) - 1) <= 1e-5
