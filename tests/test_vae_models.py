"""The VAEs that the library trains, and the model that pairs an autoencoder with a denoiser."""

import json
from pathlib import Path

import pytest
import torch
from budget import assert_within_budget

from fastdiff import checkpoints, randn, schedules
from fastdiff.models import (
    VAE,
    AutoencoderConfig,
    DiTConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    VAEConfig,
)
from fastdiff.reference import vae as reference
from fastdiff.training import parse

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SMALL = {
    "mlp": VAEConfig(hidden=8, latent=3, image_size=12),
    "conv": VAEConfig(kind="conv", hidden=8, latent=3, image_size=12, channels=(4, 6)),
}


def pair(**options):
    denoiser = DiTConfig(
        in_channels=2, image_size=4, patch_size=2, width=8, depth=1, heads=2, num_classes=3,
        learn_sigma=False,
    )  # fmt: skip
    autoencoder = AutoencoderConfig(
        in_channels=1, channels=(8, 8), latent_channels=2, latent_shift=(0.5, -1.0),
        latent_scale=(2.0, 0.25), **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LatentDiffusion(LatentDiffusionConfig(denoiser, autoencoder))
    for weights in model.parameters():  # so that no prediction is 0 by its initialization
        torch.nn.init.normal_(weights, std=0.3)
    return model


def uniform(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=SMALL)
def vae(request):
    torch.manual_seed(0)
    return VAE(SMALL[request.param])


def test_vae_shapes(vae):
    x = uniform(5, 1, 12, 12)
    mu, logvar = vae.encoder(x)
    assert mu.shape == logvar.shape == (5, 3)
    assert vae.decoder(mu).shape == x.shape
    assert vae.elbo(x, 0).shape == (5,)
    images = vae.images([3, 4])
    assert images.shape == (2, 1, 12, 12) and images.abs().max() <= 1
    assert torch.equal(images, vae.images([3, 4])) and not torch.equal(images[0], images[1])


def test_the_mlp_is_the_published_one():
    """Two layers of 300 gated units on each side and 40 latent numbers: the weights counted."""
    gated = 2 * (784 * 300 + 300) + 2 * (300 * 300 + 300), 2 * (40 * 300 + 300) + 2 * (300 * 301)
    heads = 300 * 80 + 80, 300 * 784 + 784
    count = sum(p.numel() for p in VAE().parameters())
    assert count == sum(gated) + sum(heads)


def test_gated_units(vae):
    """(W x + b) sigmoid(V x + c), from the weights of the last gated layer of the encoder."""
    layer = vae.encoder.body[-3]
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    vae.encoder.body[-1].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    vae.encoder(uniform(2, 1, 12, 12))
    (x, _), gated = seen
    exact, same = (
        (x.to(d) @ w.T + b) * torch.sigmoid(x.to(d) @ v.T + c)
        for d in (torch.float64, torch.float32)
        for w, v in [layer.weight.to(d).chunk(2)]
        for b, c in [layer.bias.to(d).chunk(2)]
    )
    # two sums, a sigmoid and a product round once each
    assert_within_budget(gated.detach(), same.detach(), exact.detach(), ulps=4)


def test_vae_comes_back_from_its_card(vae, tmp_path):
    vae.half().float()
    path = checkpoints.save(tmp_path / "vae", vae, None, {"name": "vae"})
    loaded, schedule, card = checkpoints.load(path)
    assert schedule is None and loaded.config == vae.config
    assert isinstance(loaded, reference.VAE) and card["architecture"]["class"] == "VAE"
    x = uniform(3, 1, 12, 12)
    with torch.no_grad():
        assert torch.equal(loaded.elbo(x, 7), vae.elbo(x, 7))
    with pytest.raises(ValueError, match="schedule must be None for a model of class VAE"):
        checkpoints.save(tmp_path / "x", vae, schedules.cosine(), {"prediction": "epsilon"})


def test_observed_pixels_are_0_or_1_with_the_grey_value_as_probability():
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.8, 1.0])
    images = levels.view(1, 1, 5, 1).expand(1, 1, 5, 20000)
    drawn = VAE().observe(images, torch.Generator().manual_seed(1))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    share, p = drawn.mean(dim=(0, 1, 3)).double(), (levels.double() + 1) / 2
    # five standard deviations of a mean of 20,000 draws
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt() + 1e-12).all()
    grey = VAE(VAEConfig(likelihood="gaussian"))
    assert grey.observe(images, torch.Generator()) is images


def test_shipped_vae():
    path = checkpoints.ASSETS / "vae-mlp.safetensors"
    assert path.stat().st_size <= 3_000_000
    model, _, card = checkpoints.load("vae-mlp")
    assert model.config == VAEConfig()
    training, metrics = card["training"], card["metrics"]
    elbo, iwae = (metrics[f"negative_{name}"] for name in ("elbo", "iwae"))
    assert "threads: 1" in training["machine"] and training["minutes"] <= 45
    assert parse(training["command"].split()[2:]).model == "vae-mlp"
    # of the whole test split, and no bound above the one that it bounds
    assert elbo["images"] == 10_000 and elbo["nats"] >= iwae["nats"] > 0
    (row,) = json.loads((RESULTS / "eval_vae-mlp.json").read_text())
    assert row["sha256"] == card["sha256"] and metrics == {name: row[name] for name in metrics}
    # unseen images are found less probable than those it learnt from, but not by much
    learnt = sum(training["loss"][-10:]) / 10
    assert 0 < elbo["nats"] - learnt < 0.03 * learnt
    images = model.images(range(16))
    # black around things that are not
    assert images[..., :2, :].mean() < -0.8 and images[:, :, 10:18, 10:18].mean() > -0.3


def test_latent_diffusion_decodes_what_it_encodes():
    model = pair()
    assert model.latent_shape == (2, 4, 4)
    x = uniform(3, 1, 8, 8) * 2 - 1
    z = model.encode(x)
    mu, _ = model.autoencoder.encode(x)
    shift, scale = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.25])
    assert torch.equal(z, (mu - shift.view(2, 1, 1)) * scale.view(2, 1, 1))
    y = model.decode(z)
    # scales of powers of two are undone without a rounding
    back = z / scale.view(2, 1, 1) + shift.view(2, 1, 1)
    assert torch.equal(y, model.autoencoder.decode(back).clamp(-1, 1))
    assert y.shape == x.shape and not y.requires_grad and y.abs().max() <= 1


def test_latent_diffusion_is_its_denoiser():
    model, (x, t) = pair(), (randn([1, 2], (2, 4, 4)), torch.tensor([10.0, 500.0]))
    label = torch.tensor([2, -1])
    with torch.no_grad():
        assert torch.equal(model(x, t, label), model.denoiser(x, t, label))
        assert not torch.equal(model(x, t, label)[0], model(x, t)[0])
        assert torch.equal(model(x, t, label)[1], model(x, t)[1])


def test_latent_diffusion_comes_back_from_its_card(tmp_path):
    model = pair().half().float()
    how = {"prediction": "epsilon"}
    path = checkpoints.save(tmp_path / "latent", model, schedules.cosine(), how)
    for dtype in (torch.float32, torch.bfloat16):
        loaded, schedule, card = checkpoints.load(path, dtype=dtype)
        assert loaded.config == model.config and schedule.name == "cosine"
        assert card["architecture"]["class"] == "LatentDiffusion"
        want, z = model.to(dtype), randn([5], (2, 4, 4))
        assert torch.equal(loaded.decode(z), want.decode(z))
        assert loaded.decode(z).dtype == torch.float32
    with pytest.raises(ValueError, match="schedule must be a Schedule"):
        checkpoints.save(path, model, None, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rnn"}, "kind must be one of"),
        ({"latent": 0}, "latent must be an int >= 1, got 0"),
        ({"hidden": 2.0}, "hidden must be an int >= 1, got 2.0"),
        ({"channels": (4, 0)}, "channels must be an int >= 1, got 0"),
        ({"kind": "conv", "image_size": 30}, "image_size must be a multiple of 4"),
        ({"kind": "conv", "channels": ()}, "image_size must be a multiple of 1 for 0"),
    ],
    # a row for each rule; the likelihood's own are the reference's
)
def test_vae_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**options)


def test_config_errors():
    with pytest.raises(ValueError, match="config must hold known keys only, got \\['depth'\\]"):
        VAEConfig.from_config({"depth": 2})
    with pytest.raises(ValueError, match="likelihood must be one of"):
        VAE(VAEConfig(likelihood="poisson"))
    with pytest.raises(ValueError, match="denoiser must take the autoencoder's 4 latent channels"):
        LatentDiffusionConfig(DiTConfig(in_channels=2), AutoencoderConfig())
    with pytest.raises(ValueError, match="config must hold denoiser and autoencoder"):
        LatentDiffusionConfig.from_config({"denoiser": {}})
