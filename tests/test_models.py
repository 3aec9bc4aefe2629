"""The U-Net: shapes, dtypes, the null class, independence of samples, messages."""

import json

import pytest
import torch
import torch.nn.functional as F
from unets import filled

from fastdiff.models import UNet, UNetConfig
from fastdiff.models.unet import FilmNorm, timestep_embedding

# two levels, attention, patches: every kind of layer at the least cost
TINY = UNetConfig(image_size=16, channels=(16, 32), embed_dim=32, groups=4, head_dim=16)

CONFIGS = {
    "tiny": TINY,
    "one_level": UNetConfig(image_size=8, channels=(32,), patch_size=1, num_classes=0),
    "three_levels": UNetConfig(
        image_size=16, channels=(8, 16, 16), blocks=2, attention=(4, 2), patch_size=2, groups=4,
        head_dim=8, in_channels=3,
    ),
}  # fmt: skip


def batch(config: UNetConfig, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    size = config.image_size
    x = torch.randn(n, config.in_channels, size, size, generator=draw)
    t = torch.rand(n, generator=draw) * 999
    label = torch.arange(n) % config.num_classes if config.num_classes else None
    return x, t, label


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).abs().max())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_layer_is_used_and_learns(config):
    model = filled(config)
    x, t, label = batch(config)
    out = model(x, t, label)
    assert out.shape == x.shape
    out.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@torch.no_grad()
def test_starts_at_zero():
    x, t, label = batch(TINY)
    assert torch.equal(UNet(TINY)(x, t, label), torch.zeros_like(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_low_precision_weights(dtype):
    model, (x, t, label) = filled(TINY), batch(TINY)
    exact = filled(TINY).double()(x.double(), t.double(), label)
    got = model.to(dtype)(x.to(dtype), t, label)
    assert got.dtype == dtype
    # the longest path rounds fewer than 60 times, each at most by eps of the largest activation
    # that meets it; the zero model would be off by the whole of `exact`
    bound = 60 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert error(got, exact) <= bound < float(exact.abs().max())


@torch.no_grad()
def test_input_dtype_comes_back():
    model, (x, t, label) = filled(TINY), batch(TINY)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert model(x.to(dtype), t.to(dtype), label).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t, label).dtype == torch.float32


@torch.no_grad()
def test_channels_last_and_batches_change_only_roundings():
    model, (x, t, label) = filled(TINY), batch(TINY)
    exact = filled(TINY).double()(x.double(), t.double(), label)
    plain = error(model(x, t, label), exact)
    ulp = torch.finfo(torch.float32).eps * float(exact.abs().max())
    last = filled(TINY).to(memory_format=torch.channels_last)
    got = last(x.contiguous(memory_format=torch.channels_last), t, label)
    assert error(got, exact) <= 2 * plain + 8 * ulp
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(3)])
    assert error(alone, exact) <= 2 * plain + 8 * ulp


@torch.no_grad()
def test_null_class():
    model, (x, t, label) = filled(TINY), batch(TINY)
    null = model(x, t)
    assert torch.equal(null, model(x, t, torch.full((3,), -1)))
    assert torch.equal(null, model(x, t, torch.full((3,), model.null_label)))
    assert not torch.equal(null, model(x, t, label))
    # one sample may drop its label alone
    mixed = model(x, t, torch.tensor([0, -1, 2]))
    assert torch.equal(mixed[1], null[1])
    assert torch.equal(mixed[0], model(x, t, label)[0])


@torch.no_grad()
def test_label_and_x_are_left_alone():
    model, (x, t, _) = filled(TINY), batch(TINY)
    label = torch.tensor([-1, 0, 1])
    before = x.clone(), t.clone(), label.clone()
    model(x, t, label)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, t, label), strict=True))


@torch.no_grad()
def test_time_is_told_apart_in_bfloat16():
    model, (x, _, label) = filled(TINY).bfloat16(), batch(TINY)
    times = torch.tensor([996.0, 999.0, 996.5])
    same = model(x[:1].expand(3, -1, -1, -1), times, label[:1].expand(3))
    # bfloat16 would round all three times to 996 or 1000
    assert not torch.equal(same[0], same[1])
    embedding = timestep_embedding(torch.tensor([996.0, 996.5]), 32)
    assert not torch.equal(*embedding)


def test_timestep_embedding_in_float64():
    t = torch.tensor([0.0, 1.0, 999.0, 3.25], dtype=torch.float64)
    got = timestep_embedding(t, 8)
    frequency = torch.tensor([10000.0 ** (-k / 4) for k in range(4)], dtype=torch.float64)
    want = torch.cat([(t[:, None] * frequency).cos(), (t[:, None] * frequency).sin()], 1)
    eps = torch.finfo(torch.float64).eps
    # an angle of size a is off by a eps
    assert ((got - want).abs() <= 8 * eps * (1 + t[:, None])).all()


@torch.no_grad()
def test_time_scale_multiplies_time():
    scaled = filled(UNetConfig.from_config({**TINY.to_config(), "time_scale": 1000.0}))
    x, t, label = batch(TINY)
    assert torch.equal(scaled(x, t / 1024, label), filled(TINY)(x, t / 1024 * 1000, label))


@torch.no_grad()
def test_film_norm_in_float64():
    torch.manual_seed(0)
    norm = FilmNorm(4, 16)
    norm.weight.copy_(torch.randn(16))
    norm.bias.copy_(torch.randn(16))
    x, scale, shift = torch.randn(2, 16, 5, 5), torch.randn(2, 16), torch.randn(2, 16)

    def written_out(dtype: torch.dtype) -> torch.Tensor:
        groups = x.to(dtype).view(2, 4, 100)
        centered = groups - groups.mean(2, keepdim=True)
        h = centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()
        h = h.view(x.shape) * norm.weight.to(dtype).view(16, 1, 1)
        h = h + norm.bias.to(dtype).view(16, 1, 1)
        h = (1 + scale.to(dtype)[..., None, None]) * h + shift.to(dtype)[..., None, None]
        return F.silu(h)

    exact = written_out(torch.float64)
    ulp = torch.finfo(torch.float32).eps * float(exact.abs().max())
    got = error(norm(x, scale, shift), exact)
    assert got <= 2 * error(written_out(torch.float32), exact) + 2 * ulp


def test_heads_are_cut_only_where_there_is_attention():
    """A width that heads do not divide is no error at a level without attention."""
    config = UNetConfig(image_size=8, channels=(24, 32), patch_size=1)
    assert filled(config)(*batch(config)).shape == (3, 1, 8, 8)


def test_a_card_of_before_gives_the_same_network():
    """Cards hold the fields that were there when they were written."""
    first = {k: v for k, v in UNetConfig().to_config().items() if k in (
        "in_channels", "image_size", "channels", "blocks", "attention", "num_classes",
        "patch_size", "embed_dim", "groups", "head_dim", "time_scale",
    )}  # fmt: skip
    assert UNetConfig.from_config(first) == UNetConfig()


def test_shipped_size():
    """The default is the architecture of the shipped checkpoint: at most 6 MB in float16."""
    count = sum(p.numel() for p in UNet().parameters())
    assert 1_500_000 <= count <= 3_000_000


def test_config_survives_json():
    for config in CONFIGS.values():
        assert UNetConfig.from_config(json.loads(json.dumps(config.to_config()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ()}, r"channels must be ints >= 1, at least one, got \(\)"),
        ({"channels": (0,)}, r"channels must be ints >= 1, at least one, got \(0,\)"),
        ({"channels": (20,)}, "channels must be multiples of groups=8 and head_dim=32"),
        ({"image_size": 30}, "image_size must be a multiple of 4"),
        ({"attention": (5,)}, r"attention must name grid sizes among \[16, 8\]"),
        ({"blocks": 0}, "blocks must be an int >= 1, got 0"),
        ({"embed_dim": 30}, "embed_dim must be a multiple of 4"),
        ({"num_classes": -1}, "num_classes must be >= 0"),
        ({"heads": 0}, "heads must be None or an int >= 1, got 0"),
        ({"heads": 5}, "channels must be multiples of groups=8 and heads=5"),
        ({"channels": (40, 64), "attention": (16,)}, "multiples of groups=8 and head_dim=32"),
        ({"channels": (40, 64), "up_attention": (16,)}, "multiples of groups=8 and head_dim=32"),
        ({"time_dim": 7}, "time_dim must be even, got 7"),
        ({"time_dim": 2, "freq_shift": 1}, "freq_shift must be below 1, half the sinusoids, got 1"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"modulation": "scale"}, r"modulation must be one of \('film', 'add'\), got 'scale'"),
        ({"downsample": ["conv", "pool"]}, r"downsample must hold 1 names, got \('conv', 'pool'\)"),
        ({"upsample": ("bilinear",)}, "upsample must be one of .*, got 'bilinear'"),
        ({"downsample_padding": 2}, r"downsample_padding must be one of \(0, 1\), got 2"),
        ({"middle": "mlp"}, "middle must be one of"),
        ({"middle_groups": 3}, "middle_groups must divide 128, got 3"),
        ({"up_attention": (5,)}, r"up_attention must name grid sizes among \[16, 8\]"),
        ({"depth": 3}, r"config must hold known keys only, got \['depth'\]"),
    ],
    # one row for each rule
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_config(change)


@pytest.mark.parametrize(
    ("x", "t", "label", "error_type", "message"),
    [
        ((3, 1, 16, 15), (3,), None, ValueError, r"x must have shape \(N, 1, 16, 16\), got"),
        ((1, 16, 16), (1,), None, ValueError, "x must have shape"),
        ((3, 1, 16, 16), (1,), None, ValueError, r"t must have shape \(3,\), got \(1,\)"),
        ((3, 1, 16, 16), (3,), [1, 2], ValueError, r"label must have shape \(3,\)"),
        ((3, 1, 16, 16), (3,), [1, 2, 11], ValueError, r"label must lie in \[-1, 10\], got \[11\]"),
        ((3, 1, 16, 16), (3,), [1.0, 2.0, 3.0], TypeError, "label must be int64"),
    ],
    # one row for each rule
)
def test_call_errors(x, t, label, error_type, message):
    model = UNet(TINY)
    label = None if label is None else torch.tensor(label)
    with pytest.raises(error_type, match=message):
        model(torch.zeros(x), torch.zeros(t), label)


def test_more_call_errors():
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        UNet(TINY)(torch.zeros(1, 1, 16, 16, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(TypeError, match=r"UNet: t must be a tensor, got 3\.0"):
        UNet(TINY)(torch.zeros(1, 1, 16, 16), 3.0)
    with pytest.raises(TypeError, match=r"UNet: label must be a tensor, got \[1\]"):
        UNet(TINY)(torch.zeros(1, 1, 16, 16), torch.zeros(1), [1])
    config = CONFIGS["one_level"]
    with pytest.raises(ValueError, match="label must be None for an unconditional model"):
        UNet(config)(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
