"""Every model that `fastdiff train` makes: it learns, resumes to the same bits, and loads again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import COUNT, write_squares
from PIL import Image
from training_runs import losses

from fastdiff import checkpoints, cli, data, training
from fastdiff.models import VAE, Autoencoder, LatentDiffusion, UNet
from fastdiff.ops import reparameterize
from fastdiff.training import TrainConfig
from fastdiff.training.config import DEFAULTS

# models of a few thousand weights; the kinds of "latent" and "autoencoder" are two halves of one
SMALL = {
    "unet": {"channels": (32,), "patch_size": 4},
    "vae-mlp": {"hidden": 16, "latent": 3},
    "vae-conv": {"hidden": 16, "latent": 3, "channels": (4,)},
    "autoencoder": {"channels": (8, 8, 8), "latent": 2},
    "latent": {"width": 16, "depth": 1, "heads": 2},
}
KINDS = {
    "unet": UNet, "vae-mlp": VAE, "vae-conv": VAE, "autoencoder": Autoencoder,
    "latent": LatentDiffusion,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("idx"))


def tiny(model, folder, out, **options):
    base = {
        "data": str(folder), "steps": 6, "batch": 8, "warmup": 2, "save_every": 3,
        "sample_every": 100, "dtype": "float32", "seed": 5, **SMALL[model],
    }  # fmt: skip
    return TrainConfig.of(model, str(out), **{**base, **options})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """An autoencoder of a few steps, on which "latent" is trained."""
    return training.train(tiny("autoencoder", folder, tmp_path_factory.mktemp("ae"), steps=40))


@pytest.fixture
def of(folder, tmp_path, trained):
    """A small config of a model, by name."""

    def make(model, out=None, **options):
        if model == "latent":
            options.setdefault("autoencoder", str(trained))
        return tiny(model, folder, out or tmp_path / model, **options)

    return make


def test_every_model_is_here():
    assert set(SMALL) == set(KINDS) == set(DEFAULTS) == set(training.OBJECTIVES)


@pytest.mark.parametrize("model", SMALL)
def test_it_learns(of, model):
    # the prediction of x0 is learnt soonest, and from the start is far from 0
    extra = {"prediction": "sample", "gamma": 0.0} if model in ("unet", "latent") else {}
    config = of(model, steps=60, save_every=100, lr=3e-3, **extra)
    training.train(config)
    curve = losses(config)
    assert np.mean(curve[-10:]) < np.mean(curve[:3]) - 0.2 * abs(np.mean(curve[:3]))


@pytest.mark.parametrize("model", SMALL)
def test_interrupted_run_resumes_to_the_same_bits(of, model, tmp_path, monkeypatch):
    config = of(model)
    whole = training.train(config)
    cut = replace(config, out=str(tmp_path / "cut"))
    advance = training.Run.advance

    def stop(run):
        if run.step == 5:
            raise KeyboardInterrupt
        return advance(run)

    monkeypatch.setattr(training.Run, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(cut)
    monkeypatch.undo()
    assert len(losses(cut)) == 3
    resumed = training.train(replace(cut, resume=True))
    assert losses(cut) == losses(config)
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("model", SMALL)
def test_result_and_card(of, model):
    config = of(model)
    path = training.train(config)
    assert path.stem == ("fashion" if model == "unet" else model)
    loaded, schedule, card = checkpoints.load(path)
    assert type(loaded) is KINDS[model]
    assert (schedule is None) == (model not in ("unet", "latent"))
    assert card["training"]["steps"] == 6
    assert card["training"]["command"] == config.command()
    assert card["data"]["licence"].startswith("MIT")
    assert card["metrics"] == {}
    # the weights are the average, not the last step's
    state = torch.load(Path(config.out) / "last.pt", weights_only=True)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state["ema"][name].half().float()), name
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.size[0] == 10 * config.image_size
        assert np.asarray(picture).std() > 0


@pytest.mark.parametrize("model", SMALL)
def test_command_gives_the_config_back(of, model):
    assert TrainConfig.of(model, "x").command().split()[2:4] == ["--out", "x"]
    for config in (of(model), TrainConfig.of(model, "x"), of(model, lr=2.5e-4, steps=7)):
        assert training.parse(config.command().split()[2:]) == config


def test_defaults_of_the_model_reach_the_command_line():
    config = training.parse(["--model", "vae-mlp", "--out", "x"])
    assert (config.image_size, config.batch, config.dtype) == (28, 128, "float32")
    assert config == TrainConfig.of("vae-mlp", "x")
    assert training.parse(["--out", "x"]) == TrainConfig("x")


def test_bfloat16_trains(of):
    for model in SMALL:
        config = of(model, dtype="bfloat16", steps=2)
        training.train(config)
        assert np.isfinite(losses(config)).all()


@pytest.mark.parametrize("likelihood", ["gaussian", "discretized_logistic"])
def test_other_likelihoods_train(of, likelihood):
    config = of("vae-mlp", likelihood=likelihood, scale=0.3, steps=60, lr=3e-3)
    model, _, card = checkpoints.load(training.train(config))
    assert (model.likelihood, model.scale) == (likelihood, 0.3)
    assert "as they are" in card["objective"]
    assert card["sampling"]["shape"] == [1, 28, 28]
    curve = losses(config)
    assert np.mean(curve[-10:]) < np.mean(curve[:10])


def test_beta_weighs_the_divergence(of):
    one, four = (training.Run(of("vae-mlp", beta=beta)) for beta in (1.0, 4.0))
    x = one.model.observe(one.dataset.images[one.index()], training.objective.generator(5, 0, 0))
    with torch.no_grad():
        log_likelihood, kl = one.model.terms(x, one.objective.first_seed)
    for run, beta in ((one, 1.0), (four, 4.0)):
        assert run.advance() == float((beta * kl - log_likelihood).mean())


def test_binarization_is_drawn_anew_at_each_step_and_is_a_function_of_it(of):
    run = training.Run(of("vae-mlp"))
    index = torch.arange(8)
    first, again = (run.objective.loss(run.model, index, 3).item() for _ in range(2))
    assert first == again
    assert first != run.objective.loss(run.model, index, 4).item()


def test_latents_are_scaled_to_mean_0_and_variance_1(of, trained):
    model, _, card = checkpoints.load(trained)
    assert len(model.config.latent_shift) == len(model.config.latent_scale) == 2
    run = training.Run(of("latent"))
    drawn = torch.cat([run.objective.clean(torch.arange(COUNT), step) for step in range(50)])
    each = drawn.double().transpose(0, 1).flatten(1)
    # means over 2,000 latents of 64 places, whose q has at most unit variance after scaling
    bound = 5 / (50 * COUNT * 64) ** 0.5
    assert each.mean(dim=1).abs().max() < bound
    # the variance of the squares of a normal is 2
    assert (each.var(dim=1) - 1).abs().max() < 2**0.5 * bound
    assert card["objective"].endswith("+ 0.1 KL, nats; gaussian likelihood of scale 0.1")


def test_latents_are_draws_of_the_posterior(of, trained):
    run = training.Run(of("latent"))
    model, _, _ = checkpoints.load(trained)
    index = torch.tensor([3, 7, 11])
    with torch.no_grad():
        mu, logvar = model.encode(run.dataset.images)
    z, _ = reparameterize(mu[index], logvar[index], run.objective.first_seed, step=9)
    found = run.objective.clean(index, 9)
    assert torch.equal(found, model.scale(z))
    assert not torch.equal(found, run.objective.clean(index, 10))


def test_a_trained_autoencoder_is_scored(trained, folder, tmp_path):
    words = ["eval", str(trained), "--data", str(folder), "--images", "4", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert (tmp_path / "eval_autoencoder.json").is_file()


@pytest.mark.parametrize("count", (40, 25, 3))
def test_an_autoencoder_is_shown_on_the_images_that_there_are(of, tmp_path, count):
    objective = training.Run(of("autoencoder")).objective
    objective.images = objective.images[:count]
    objective.show(objective.build(), tmp_path / "shown.png")
    size = {40: (320, 256), 25: (320, 128), 3: (96, 64)}[count]
    with Image.open(tmp_path / "shown.png") as shown:
        assert shown.size == size


def test_the_autoencoder_stays_as_it_was(of, trained):
    config = of("latent", steps=3)
    model, _, card = checkpoints.load(training.train(config))
    before, _, source = checkpoints.load(trained)
    state = before.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.autoencoder.state_dict().items())
    assert model.config.autoencoder == before.config
    assert card["autoencoder"]["training"] == source["training"]
    assert card["sampling"]["shape"] == [2, 8, 8] and card["sampling"]["clip"] is None
    # and what was made of it can stand in its place
    again = training.Run(of("latent", autoencoder=str(Path(config.out) / "latent.safetensors")))
    assert again.objective.source["autoencoder"] == card["autoencoder"]
    assert torch.equal(again.objective.mu, training.Run(config).objective.mu)


def test_command_line_samples_what_it_trained(of, tmp_path):
    path = training.train(of("latent", steps=2))
    out, strip, arrays = (tmp_path / name for name in ("x.png", "strip.png", "x.npz"))
    words = ["sample", "--model", path, "--steps", 3, "--seeds", "0-2", "--label", "bag,boot"]
    words += ["--out", out, "--strip", strip, "--save", arrays]
    assert cli.main([str(w) for w in words]) == 0
    images = np.load(arrays)["images"]
    assert images.shape == (6, 1, 32, 32) and np.abs(images).max() <= 1
    with Image.open(strip) as picture:
        assert picture.size == (3 * 32, 6 * 32)
        last = np.asarray(picture)[:, -32:]
    shown = np.rint((images[:, 0] + 1) * 127.5).astype(np.uint8).reshape(-1, 32)
    assert np.array_equal(last, shown)  # the run ends in its last estimate
    folder = tmp_path / "many"
    words = ["sample", "--model", path, "--steps", 2, "--seeds", "4,5", "--outdir", folder]
    assert cli.main([str(w) for w in words]) == 0
    assert sorted(p.name for p in folder.glob("*.png")) == ["000004.png", "000005.png"]


def test_a_checkpoint_of_another_model_is_refused(of):
    config = of("vae-mlp")
    training.train(config)
    message = r"model must be that of last\.pt, vae-mlp, got vae-conv"
    with pytest.raises(ValueError, match=message):
        training.train(of("vae-conv", out=config.out, resume=True))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("vae", {}, "model must be one of unet, vae-mlp"),
        ("vae-mlp", {"patch_size": 4}, "patch_size must be left out for vae-mlp, got 4"),
        ("unet", {"hidden": 64}, "hidden must be left out for unet, got 64"),
        ("vae-mlp", {"likelihood": "poisson"}, "likelihood must be one of bernoulli, gaussian"),
        ("vae-mlp", {"scale": 0.0}, "scale must be > 0, got 0"),
        ("vae-mlp", {"beta": -1.0}, "beta must be >= 0, got -1"),
        ("vae-conv", {"latent": 0}, "latent must be >= 1, got 0"),
        ("latent", {"heads": 0}, "heads must be >= 1, got 0"),
    ],
    # a model that is not, an option of another model, and a value for each new rule
)
def test_config_errors(model, options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.of(model, "x", **options)


def test_run_errors(of):
    with pytest.raises(ValueError, match="likelihood must be gaussian or discretized_logistic"):
        training.train(of("autoencoder", likelihood="bernoulli"))
    with pytest.raises(ValueError, match="autoencoder must name a checkpoint of an Autoencoder"):
        path = training.train(of("vae-mlp", steps=1))
        training.train(of("latent", autoencoder=str(path)))
    with pytest.raises(FileNotFoundError, match="name must be one of"):
        training.train(of("latent", autoencoder="absent"))
    with pytest.raises(ValueError, match="image_size must be a multiple of 8"):
        training.train(of("vae-conv", channels=(4, 4, 4)))
    with pytest.raises(ValueError, match="size must be at least 28, got 27"):
        training.train(of("vae-mlp", image_size=27))


def test_size_of_a_data_set(folder):
    small, large = (data.load("fashion", folder, size) for size in (28, 32))
    assert small.images.shape == (COUNT, 1, 28, 28)
    assert torch.equal(small.images, large.images[..., 2:30, 2:30])
    assert f"{COUNT} images" in small.name
    assert "28x28" in small.name and "padded to 32x32" in large.name
