"""Our autoencoder with the weights of diffusers' AutoencoderKL computes what that model does."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from budget import assert_within_budget
from diffusers import AutoencoderKL

from fastdiff import ops, randn, use_backend
from fastdiff.models import Autoencoder, AutoencoderConfig
from fastdiff.models._autoencoder_keys import sources
from fastdiff.reference.vae import VAE

TINY = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip

# each adds what the ones before it lack
CONFIGS = {
    "two_levels": {},
    "one_level": {
        "block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
    "three_levels_two_blocks": {
        "block_out_channels": (8, 16, 12), "layers_per_block": 2, "in_channels": 1,
        "out_channels": 2, "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    "no_quant_conv_no_attention": {
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
        "latent_channels": 3, "shift_factor": 0.1,
    },
}  # fmt: skip


def peer(**options: object) -> AutoencoderKL:
    """A random model in which no two weights are alike, those of the normalisations included."""
    torch.manual_seed(0)
    model = AutoencoderKL(**{**TINY, **options}).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def images(channels: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def compare(model: AutoencoderKL, dtype: torch.dtype, size: tuple[int, int]) -> None:
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    exact = copy.deepcopy(model).to(dtype).double()
    model = model.to(dtype=dtype, memory_format=layout)
    ours = Autoencoder.from_diffusers(model)
    x = images(model.config.in_channels, size).to(dtype).contiguous(memory_format=layout)
    mu, logvar = ours.encode(x)
    peer_says = model.encode(x).latent_dist
    truth = exact.encode(x.double()).latent_dist
    # the rounding of the result itself, in a few elements twice
    assert_within_budget(mu, peer_says.mean, truth.mean, ulps=2)
    assert_within_budget(logvar, peer_says.logvar, truth.logvar, ulps=2)
    z = peer_says.mean
    got, want = ours.decode(z), model.decode(z).sample
    assert_within_budget(got, want, exact.decode(z.double()).sample, ulps=2)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_same_output(options, dtype):
    compare(peer(**options), dtype, (16, 16))


def test_same_output_of_an_odd_and_oblong_image():
    compare(peer(), torch.float32, (13, 22))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_every_key_is_used_once(options):
    model = peer(**options)
    ours = Autoencoder.from_diffusers(model)
    found = sources(ours)
    assert sorted(key for keys in found.values() for key in keys) == sorted(model.state_dict())
    assert set(found) == set(ours.state_dict())
    again = AutoencoderConfig.from_config(json.loads(json.dumps(ours.config.to_config())))
    assert again == ours.config


@torch.no_grad()
def test_draws_are_those_of_the_seeds():
    ours = Autoencoder.from_diffusers(peer())
    x = images(3)
    mu, logvar = ours.encode(x)
    z, kl = ours.sample(x, [5, 9], step=3)
    want, nats = ops.reparameterize(mu, logvar, [5, 9], step=3)
    assert torch.equal(z, want) and torch.equal(kl, nats)
    assert not torch.equal(z, ours.sample(x, [5, 9], step=4)[0])
    y, same_kl = ours(x, [5, 9], step=3)
    assert torch.equal(y, ours.decode(z)) and torch.equal(same_kl, kl)


def test_it_is_the_pair_of_the_reference_vae():
    """Both terms of the bound come out, and every weight learns from them."""
    ours = Autoencoder.from_diffusers(peer())
    bound = VAE(ours.encoder, ours.decoder, "gaussian").elbo(images(3), 0)
    assert bound.shape == (2,)
    (-bound.mean()).backward()
    for name, p in ours.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@torch.no_grad()
def test_kernels_and_reference_give_the_same():
    ours = Autoencoder.from_diffusers(peer())
    x = images(3)
    y = ours(x, 0)[0]
    with use_backend("reference"):
        plain, exact = ours(x, 0)[0], copy.deepcopy(ours).double()(x.double(), 0)[0]
    assert_within_budget(y, plain, exact, ulps=2)


@torch.no_grad()
def test_a_new_one_starts_near_the_identity_of_its_blocks():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig())
    y, kl = model(images(3), 0)
    assert y.shape == (2, 3, 16, 16) and kl.shape == (2,)
    block = model.encoder.down[0]
    h = randn([0], (32, 4, 4))
    assert torch.equal(block(h), h)


def test_log_variance_is_bounded():
    model = Autoencoder(AutoencoderConfig(quant_conv=False))
    with torch.no_grad():
        model.encoder.conv_out.bias[4:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
        logvar = model.encode(images(3))[1]
    assert logvar.amin() == -30 and logvar.amax() == 20


def test_latents_as_the_pipelines_scale_them():
    z, mean, std = images(4), [0.5, -1.0, 0.25, 2.0], [2.0, 4.0, 0.5, 1.0]
    columns = [torch.tensor(values).view(-1, 1, 1) for values in (mean, std)]
    for options, (shift, spread), factor in (
        ({"scaling_factor": 1.5, "shift_factor": 0.25}, (0.25, 1.0), 1.5),
        ({"scaling_factor": 0.5, "latents_mean": mean, "latents_std": std}, columns, 0.5),
    ):
        model = Autoencoder.from_diffusers(peer(**options))
        # powers of two, or no division: no product rounds
        assert torch.equal(model.scale(z), (z - shift) * factor / spread)
        exact = z.double() * spread / factor + shift
        # as the pipelines write it
        assert_within_budget(model.unscale(z), z * spread / factor + shift, exact, ulps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_fn": "gelu"}, r"act_fn must be one of \('silu', 'swish'\), got 'gelu'"),
        ({"down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D")},
         r"down_block_types must be \['DownEncoderBlock2D', .*got \['AttnDownEncoderBlock2D'"),
        ({"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")},
         r"up_block_types must be .* 'AttnUpDecoderBlock2D'\]"),
        ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std must be both given"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.5},
         "shift_factor None beside them, got"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
         "AutoencoderConfig: latent_shift must be a number or 4 of them"),
    ],
    # one row for each rule
)  # fmt: skip
def test_options_without_a_counterpart(options, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder.from_diffusers(peer(**options))


def test_weights_that_do_not_fit_are_listed():
    model = peer()
    model.quant_conv = None
    model.extra = torch.nn.Linear(1, 1, bias=False)
    with pytest.raises(ValueError, match=r"^from_diffusers: weights must fit") as caught:
        Autoencoder.from_diffusers(model)
    assert str(caught.value).splitlines()[1:] == [
        "  missing    quant_conv.weight (8, 8, 1, 1)",
        "  missing    quant_conv.bias (8,)",
        "  unexpected extra.weight (1, 1)",
    ]
    with pytest.raises(TypeError, match="model must be an AutoencoderKL, got Linear"):
        Autoencoder.from_diffusers(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": 0}, "blocks must be an int >= 1, got 0"),
        ({"channels": ()}, r"channels must be multiples of groups=8, at least one, got \(\)"),
        ({"channels": (8, 12)}, r"channels must be multiples of groups=8.*got \(8, 12\)"),
        ({"eps": -1.0}, "eps must be >= 0, got -1.0"),
        ({"latent_scale": (1.0, 2.0)}, "latent_scale must be a number or 4 of them"),
        ({"layers": 3}, r"config must hold known keys only, got \['layers'\]"),
    ],
    # one row for each rule
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=f"^AutoencoderConfig: {message}"):
        AutoencoderConfig.from_config(change)


def test_call_errors():
    model = Autoencoder(AutoencoderConfig())
    with pytest.raises(TypeError, match=r"Autoencoder: x must be floating point, got torch\.int64"):
        model.encode(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, H, W\) with H and W at least"):
        model.encode(torch.zeros(1, 3, 8, 1))
    with pytest.raises(ValueError, match=r"z must have shape \(N, 4, H, W\)"):
        model.decode(torch.zeros(1, 3, 8, 8))
