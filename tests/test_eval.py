"""``fastdiff eval``: what is written, against closed forms, on data made here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import write_smooth
from PIL import Image
from torch import nn
from torch.distributions import MultivariateNormal

from fastdiff import checkpoints, cli, data, schedules
from fastdiff.likelihood import DiffusionLikelihood
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.models.vae import VAE as TrainedVAE
from fastdiff.models.vae import VAEConfig
from fastdiff.reference.flow import RealNVP
from fastdiff.reference.vae import VAE

COUNT = 12


@pytest.fixture
def folder(tmp_path):
    """A test split in the format of Fashion-MNIST."""
    made = tmp_path / "data"
    made.mkdir()
    return write_smooth(made, COUNT)


@pytest.fixture
def small(tmp_path):
    """An untrained class-conditional checkpoint of few times, on 28x28."""
    torch.manual_seed(0)
    config = UNetConfig(image_size=28, channels=(8, 8), num_classes=3, embed_dim=16, head_dim=8)
    card = {
        "prediction": "v_prediction",
        "classes": ["a", "b", "c"],
        "sampling": {"guidance": 1.5, "shape": [1, 28, 28], "clip": 1.0},
    }
    return checkpoints.save(tmp_path / "small", UNet(config), schedules.cosine(20), card)


def run(*words):
    return cli.main(["eval", *map(str, words)])


def row_of(folder, name="small"):
    (row,) = json.loads((folder / f"eval_{name}.json").read_text())
    return row


def test_a_diffusion_model(small, folder, tmp_path, capsys):
    words = [small, "--data", folder, "--images", 6, "--ode-images", 4, "--batch", 4]
    words += ["--pilot", 2, "--draws", 5, "--rtol", 1e-2, "--check", 2, "--out", tmp_path]
    assert run(*words, "--start", "decoder", "uniform") == 0
    row = row_of(tmp_path)
    assert {"command", "machine", "sha256", "seconds", "data", "clip", "labels"} <= set(row)
    assert row["command"].startswith("fastdiff eval ") and "--draws 5" in row["command"]
    assert {"cpu", "threads", "torch", "fastdiff", "python"} <= set(row["machine"])
    assert (row["kind"], row["clip"], row["labels"]) == ("diffusion", 1.0, "given")
    assert row["dims"] == {"dim": 784, "pixel": 784}

    # the same by hand: two images at every time, the others at drawn ones, then the ODE
    images, labels = data.fashion_mnist("test", folder, 28)
    model, schedule, card = checkpoints.load(small)
    scored = DiffusionLikelihood(model, schedule, prediction=card["prediction"], clip=1.0)
    full = scored.bound(images[:2], 0, {"label": labels[:2]})
    assert full.terms.shape == (2, 20)
    vlb = row["vlb"]
    assert (vlb["images"], vlb["images_at_every_time"], vlb["draws_of_the_others"]) == (6, 2, 5)
    assert len(vlb["terms"]) == 20 and vlb["variance"] == "small"
    flow = scored.flow(images[:4], 0, {"label": labels[:4]}, rtol=1e-2, atol=1e-2).nats
    ode = row["ode"]["decoder"]
    # sums over pixels of float32, in batches of another size
    assert abs(ode["nats"] / float(flow.mean()) - 1) <= 1e-4
    assert abs(ode["bits_per_dim"] * 784 * math.log(2) - ode["nats"]) <= 1e-9 * abs(ode["nats"])
    error = float(flow.std()) / 2
    assert abs(ode["nats_standard_error"] / error - 1) <= 1e-2
    assert ode["error_control"]["images"] == 2
    assert 0 <= ode["error_control"]["largest_change_nats"] < 0.05 * ode["nats"]
    assert row["ode"]["uniform"]["images"] == row["vlb_minus_ode"]["images"] == 4
    parts = vlb["bits_per_dim_of"]
    assert abs(sum(parts.values()) - vlb["bits_per_dim"]) <= 1e-9
    printed = capsys.readouterr().out
    assert "VLB: " in printed and "the bound lies" in printed and "bits/pixel" in printed
    with Image.open(tmp_path / "eval_small.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_every_time_of_every_image(small, folder, tmp_path):
    words = [small, "--data", folder, "--images", 3, "--draws", 0, "--method", "vlb"]
    made = tmp_path / "not" / "there"
    assert run(*words, "--no-labels", "--no-clip", "--out", made) == 0
    row = row_of(made)
    images, _ = data.fashion_mnist("test", folder, 28)
    model, schedule, card = checkpoints.load(small)
    scored = DiffusionLikelihood(model, schedule, prediction=card["prediction"])
    found = scored.bound(images[:3], 0)
    assert abs(row["vlb"]["nats"] / float(found.total.mean()) - 1) <= 1e-5
    assert (row["clip"], row["labels"]) == (None, "null class")
    assert "ode" not in row and "vlb_minus_ode" not in row
    sums = np.array(row["vlb"]["terms"]) * 784 * math.log(2)
    assert np.abs(sums / found.terms.mean(0).numpy() - 1).max() <= 1e-3


class LinearEncoder(nn.Module):
    """The true posterior of x = W z + noise, with orthogonal columns in W."""

    def __init__(self, w, scale):
        super().__init__()
        self.w, self.variance = w, 1 / (1 + w.square().sum(0) / scale**2)
        self.gain = self.variance / scale**2

    def forward(self, x):
        mu = (x.flatten(1) @ self.w) * self.gain
        return mu, self.variance.log().expand_as(mu)


class LinearDecoder(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, z):
        return (z @ self.w.T).view(-1, 1, 28, 28)


def test_a_vae_whose_posterior_is_true_gives_the_likelihood(folder, tmp_path, monkeypatch, capsys):
    """ELBO = IWAE = log p(x) of the Gaussian N(0, W W^T + scale^2)."""
    scale = 0.5
    w = torch.linalg.qr(torch.randn(784, 2, generator=torch.Generator().manual_seed(1)))[0] * 3
    model = VAE(LinearEncoder(w, scale), LinearDecoder(w), "gaussian", scale)
    card = {"sampling": {"shape": [1, 28, 28]}}
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: (model, None, card))
    words = ["linear.safetensors", "--data", folder, "--images", 5, "--samples", 7]
    assert run(*words, "--out", tmp_path) == 0
    row = row_of(tmp_path, "linear")
    images, _ = data.fashion_mnist("test", folder, 28)
    wide = w.double()
    covariance = wide @ wide.T + scale**2 * torch.eye(784, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(784, dtype=torch.float64), covariance)
    want = -float(exact.log_prob(images[:5].double().flatten(1)).mean())
    assert (row["kind"], row["likelihood"]) == ("vae", "gaussian")
    for name in ("negative_elbo", "negative_iwae"):
        # sums of 784 squares in float32
        assert abs(row[name]["nats"] / want - 1) <= 1e-4
        assert "bits_per_dim" not in row[name]  # a density has no bits
    assert row["negative_iwae"]["samples"] == 7
    assert "negative elbo: " in capsys.readouterr().out
    assert not (tmp_path / "eval_linear.png").exists()


def test_a_decoder_that_ignores_its_latent_gives_independent_pixels(folder, tmp_path, monkeypatch):
    """Then log p(x) is theirs, and where q is the prior both bounds are it, with no divergence."""
    model = TrainedVAE(VAEConfig(hidden=8, latent=3))
    for weights in model.parameters():
        nn.init.zeros_(weights)
    bias = model.decoder.body[-2].bias
    nn.init.normal_(bias, generator=torch.Generator().manual_seed(0))
    card = {"sampling": {"shape": [1, 28, 28]}}
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: (model, None, card))
    images = data.fashion_mnist("test", folder, 28)[0][:6]
    x = model.observe(images, torch.Generator().manual_seed(0)).double()
    p = bias.detach().double().sigmoid().view(1, 28, 28)
    want = -float((x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1).mean())
    words = ["v", "--data", folder, "--images", 6, "--samples", 4, "--batch", 4]
    assert run(*words, "--out", tmp_path) == 0
    row = row_of(tmp_path, "v")
    # a sum of 784 terms below 4 in float32, in pairs: 10 roundings of the partial sums
    bound = 10 * torch.finfo(torch.float32).eps * want
    assert abs(row["negative_elbo"]["nats"] - want) <= bound
    assert abs(row["negative_iwae"]["nats"] - want) <= bound
    assert row["kl"]["nats"] == 0.0 and row["observed"] == "binarized by the seed 0"


def test_iwae_is_no_looser_than_the_elbo_and_bits_are_those_of_levels(
    folder, tmp_path, monkeypatch
):
    w = torch.randn(784, 2, generator=torch.Generator().manual_seed(1)) / 28
    model = VAE(LinearEncoder(w, 0.5), LinearDecoder(w), "discretized_logistic", 0.4)
    card = {"sampling": {"shape": [1, 28, 28]}}
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: (model, None, card))
    words = ["v", "--data", folder, "--images", 4, "--samples", 20, "--batch", 3]
    assert run(*words, "--out", tmp_path) == 0
    row = row_of(tmp_path, "v")
    elbo, iwae = row["negative_elbo"], row["negative_iwae"]
    assert iwae["nats"] < elbo["nats"]
    assert abs(elbo["bits_per_dim"] * 784 * math.log(2) / elbo["nats"] - 1) <= 1e-9


def test_a_vae_is_given_what_it_observes(folder, tmp_path, monkeypatch):
    """Grey levels as probabilities, or binarized by a model that says so, by the seed."""

    class Binary(VAE):
        def observe(self, images, generator):
            return torch.bernoulli((images + 1) / 2, generator=generator)

    w = torch.randn(784, 2, generator=torch.Generator().manual_seed(1)) / 28
    parts = LinearEncoder(w, 0.5), LinearDecoder(w), "bernoulli"
    card = {"sampling": {"shape": [1, 28, 28]}}
    images = (data.fashion_mnist("test", folder, 28)[0][:4] + 1) / 2
    drawn = torch.bernoulli(images, generator=torch.Generator().manual_seed(3))
    told = "levels as probabilities of 1", "binarized by the seed 3"
    for model, x, what in ((VAE(*parts), images, told[0]), (Binary(*parts), drawn, told[1])):
        monkeypatch.setattr(checkpoints, "load", lambda *_, m=model, **__: (m, None, card))
        words = ["v", "--data", folder, "--images", 4, "--samples", 1, "--seed", 3]
        assert run(*words, "--out", tmp_path) == 0
        with torch.no_grad():
            want = -float(model.log_weights(x, 3, 1).double().mean())
        row = row_of(tmp_path, "v")
        assert row["observed"] == what
        # sums of 784 logarithms in float32
        assert abs(row["negative_elbo"]["nats"] / want - 1) <= 1e-4


def test_a_flow_that_was_saved(tmp_path, capsys):
    torch.manual_seed(0)
    flow = RealNVP(2, 4, 8)
    path = checkpoints.save(tmp_path / "nvp", flow, None, {"name": "nvp"})
    loaded, schedule, card = checkpoints.load(path)
    assert schedule is None and card["architecture"] == {
        "class": "RealNVP", "dim": 2, "layers": 4, "hidden": 8,
    }  # fmt: skip
    points = np.random.default_rng(0).normal(size=(5000, 2))
    np.save(tmp_path / "points.npy", points)
    assert run(path, "--data", tmp_path / "points.npy", "--out", tmp_path) == 0
    row = row_of(tmp_path, "nvp")["negative_log_likelihood"]
    with torch.no_grad():
        want = -loaded.log_prob(torch.from_numpy(points).float()).double()
    assert row["images"] == 5000
    assert abs(row["nats"] - float(want.mean())) <= 1e-5
    # no model of these points is better, on the average, than the normal they came from
    entropy = 1 + math.log(2 * math.pi)
    assert row["nats"] > entropy - 5 * row["nats_standard_error"]
    assert "nats a point" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((0, 2)), "data must hold at least 2 points, got 0"),
        (np.zeros((1, 2)), "data must hold at least 2 points, got 1"),
        (
            np.array([[0, 0], [np.nan, 0]]),
            r"log-likelihood is finite in float32, got [nan, 0",
        ),
        (np.array([[1e300, 0], [0, 0]]), "log-likelihood is finite in float32, got [1e+300, 0.0]"),
        (np.zeros((3, 2), ">f8"), None),
        (np.zeros((3, 2), np.longdouble), None),
    ],
)
def test_points_that_have_figures_and_others(tmp_path, capsys, points, message):
    path = checkpoints.save(tmp_path / "nvp", RealNVP(2, 2, 8), None, {"name": "nvp"})
    np.save(tmp_path / "points.npy", points)
    words = [path, "--data", tmp_path / "points.npy", "--out", tmp_path]
    assert run(*words) == (0 if message is None else 2)
    assert message is None or message in capsys.readouterr().err


def test_the_shipped_model_is_scored_and_its_bound_lies_above_its_ode():
    """benchmarks/results holds figures of the weights that are shipped."""
    results = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    row = row_of(results, "fashion")
    card = json.loads((checkpoints.ASSETS / "fashion.json").read_text())
    assert row["sha256"] == card["sha256"] and row["dims"] == {"dim": 1024, "pixel": 784}
    vlb, ode, gap = row["vlb"], row["ode"], row["vlb_minus_ode"]
    # bounds of the entropy of levels, which is at most that of an even choice
    assert 0 < ode["decoder"]["bits_per_pixel"] < vlb["bits_per_pixel"] < 8
    # what the bounds demand of an exact score, on the same images and draws
    assert gap["nats"] > 5 * gap["nats_standard_error"] > 0
    for start in ("decoder", "uniform"):
        moved = ode[start]["error_control"]["largest_change_nats"]
        assert moved < ode[start]["nats_standard_error"]
    assert (results / "eval_fashion.png").is_file()


@pytest.mark.parametrize(("name", "unit"), [("emoji", "dim"), ("latent", "latent_dim")])
def test_other_shipped_models_are_scored_for_what_they_are(name, unit):
    results = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    row = row_of(results, name)
    card = json.loads((checkpoints.ASSETS / f"{name}.json").read_text())
    assert row["sha256"] == card["sha256"] and list(row["dims"]) == [unit]
    gap = row["vlb_minus_ode"]
    assert gap["nats"] > 5 * gap["nats_standard_error"] > 0
    said = row["data"]["split"] if name == "emoji" else row["data"]["space"]
    assert ("no test figure" if name == "emoji" else "not of pixels") in said
    assert (results / f"eval_{name}.png").is_file()


def test_without_matplotlib_the_figures_are_written(small, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = [small, "--data", folder, "--images", 2, "--method", "vlb", "--out", tmp_path]
    assert run(*words) == 0
    assert "no picture: eval: matplotlib must be installed" in capsys.readouterr().out
    assert row_of(tmp_path)["vlb"]["images"] == 2
    assert not (tmp_path / "eval_small.png").exists()


def test_the_cpu_by_its_number_is_the_cpu(small, folder, tmp_path):
    words = [small, "--data", folder, "--images", 2, "--method", "vlb", "--draws", 2]
    for name in ("cpu", "cpu:0"):
        assert run(*words, "--device", name, "--out", tmp_path / name) == 0
    one, other = (row_of(tmp_path / name) for name in ("cpu", "cpu:0"))
    assert one["machine"] == other["machine"] and one["vlb"] == other["vlb"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", 1], "eval: images must be at least 2, got 1"),
        (["--images", 13], "eval: images must be at most 12, got 13"),
        (["--draws", 1], "draws must be 0 or at least 2"),
        (["--batch", 0], "batch must be at least 1"),
        (["--ode-images", 7], "ode-images must lie between 2 and images 6, got 7"),
        (["--out", __file__], "eval: out must be a folder, or one that can be made, got"),
        (["--data", "no/such/folder"], "data: folder must hold t10k-images"),
        (["--rtol", 0], "rtol and atol must be above 0"),
    ],
)
def test_errors_say_the_rule_and_the_value(small, folder, capsys, words, message):
    base = [small, "--data", folder, "--images", 6, "--method", "ode"]
    assert run(*base, *words) == 2
    assert message in capsys.readouterr().err


def test_what_has_no_likelihood_here_is_refused(tiny, folder, tmp_path, monkeypatch, capsys):
    assert run(tiny, "--data", folder) == 2
    assert "must be of grey squares of 28 pixels or more" in capsys.readouterr().err
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: (nn.Linear(2, 2), None, {}))
    assert run("x") == 2
    assert (
        "must hold a diffusion model, an autoencoder, a VAE or a flow, got Linear"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: (RealNVP(3), None, {}))
    assert run("x") == 2
    assert "data must be a .npy file of points for a flow" in capsys.readouterr().err
    np.save(tmp_path / "p.npy", np.zeros((4, 2)))
    assert run("x", "--data", tmp_path / "p.npy") == 2
    assert "data must be floating-point (N, 3), got float64 (4, 2)" in capsys.readouterr().err
    for damaged in (b"", b"hello", (tmp_path / "p.npy").read_bytes()[:100]):
        (tmp_path / "q.npy").write_bytes(damaged)
        assert run("x", "--data", tmp_path / "q.npy") == 2
        assert "data must be a whole .npy file, got" in capsys.readouterr().err


def test_an_ode_that_cannot_be_solved_ends_in_a_line(small, folder, monkeypatch, capsys):
    model, schedule, card = checkpoints.load(small)
    model.conv_out.bias.data.fill_(math.nan)
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: (model, schedule, card))
    assert run("small", "--data", folder, "--images", 2, "--no-clip", "--method", "ode") == 2
    told = capsys.readouterr().err
    assert told.startswith("fastdiff: error: eval: rtol must be one that this model can meet")
    assert told.count("\n") == 1
