"""The U-Net on the fused ops: against plain PyTorch, compiled, with weights of the older format."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from bits import assert_same_bits
from budget import assert_within_budget
from torch.utils._python_dispatch import TorchDispatchMode
from unets import filled

from fastdiff import checkpoints, randn, use_backend
from fastdiff.models import UNet, UNetConfig, _attention

TINY = UNetConfig(
    image_size=16, channels=(8, 16), embed_dim=32, groups=4, head_dim=8, attention=(8,)
)
# every way to change the grid, and modulation by addition
RESBLOCKS = UNetConfig.from_config(
    {**TINY.to_config(), "downsample": "resblock", "upsample": ["resblock"], "modulation": "add"}
)


def batch(config: UNetConfig, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw, size = torch.Generator().manual_seed(0), config.image_size
    x = torch.randn(n, config.in_channels, size, size, generator=draw)
    return x, torch.tensor([999.0, 250.5, 3.0])[:n], torch.tensor([0, -1, 7])[:n]


def plain(state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, label: torch.Tensor):
    """The shipped network, one linear layer a block, in the dtype of the weights.

    Patches of 2, two levels of one block, groups of 8, attention of heads of 32 in the middle.
    """

    def conv(h, name, **how):
        return F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], **how)

    def linear(h, name):
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(h, name):
        return F.group_norm(h, 8, state[f"{name}.weight"], state[f"{name}.bias"])

    def block(h, name):
        scale, shift = linear(embedding, f"{name}.film")[:, :, None, None].chunk(2, dim=1)
        g = conv(F.silu(norm(h, f"{name}.norm1")), f"{name}.conv1", padding=1)
        g = F.silu(norm(g, f"{name}.norm2") * (1 + scale) + shift)
        skip = conv(h, f"{name}.skip") if f"{name}.skip.weight" in state else h
        return skip + conv(g, f"{name}.conv2", padding=1)

    def attend(h, name):
        tokens = norm(h, f"{name}.norm").flatten(2).mT
        q, k, v = linear(tokens, f"{name}.qkv").unflatten(2, (3, -1, 32)).permute(2, 0, 3, 1, 4)
        out = (torch.softmax(q @ k.mT / 32**0.5, dim=-1) @ v).transpose(1, 2).flatten(2)
        return h + linear(out, f"{name}.out").mT.unflatten(2, h.shape[2:])

    frequency = torch.exp(-torch.arange(64, dtype=t.dtype) / 64 * torch.log(t.new_tensor(10000.0)))
    angles = t[:, None] * frequency
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    embedding = linear(F.silu(linear(sinusoids, "time.0")), "time.2")
    embedding = F.silu(embedding + state["label.weight"][label])
    first = conv(F.pixel_unshuffle(x, 2), "stem", padding=1)
    fine = block(first, "down.0.res")
    coarse = conv(fine, "shrink.0", stride=2, padding=1)
    low = block(coarse, "down.1.res")
    h = attend(block(low, "middle.0.res"), "middle.0.attention")
    h = block(h, "middle.1.res")
    h = block(torch.cat([h, low], 1), "up.0.res")
    h = block(torch.cat([h, coarse], 1), "up.1.res")
    h = F.interpolate(conv(h, "grow.0"), scale_factor=2)
    h = block(torch.cat([h, fine], 1), "up.2.res")
    h = block(torch.cat([h, first], 1), "up.3.res")
    return F.pixel_shuffle(conv(F.silu(norm(h, "norm_out")), "conv_out", padding=1), 2)


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shipped_checkpoint_gives_what_it_gave(dtype, layout):
    """The file has a linear layer a block, and plain PyTorch reads it so."""
    state = checkpoints.read_weights(checkpoints.ASSETS / "fashion.safetensors")
    assert "down.0.res.film.weight" in state
    x, t, label = batch(UNetConfig())
    x, label = x.to(dtype).contiguous(memory_format=layout), label.where(label >= 0, 10)
    model, _, _ = checkpoints.load("fashion", dtype=dtype)
    got = model.to(memory_format=layout)(x, t, label)
    # weights of the same layout: torch's convolution with channels-last float32 weights has twice
    # the error of the other
    laid = {
        k: v.to(dtype).contiguous(memory_format=layout) if v.dim() == 4 else v.to(dtype)
        for k, v in state.items()
    }
    reference = plain(laid, x, t, label)
    double = {k: v.to(dtype).double() for k, v in state.items()}
    # the rounding of the result itself, in a few elements twice
    assert_within_budget(got, reference, plain(double, x.double(), t.double(), label), ulps=2)


def split(model: UNet, prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict as it was before the modulating layers were one."""
    state = {f"{prefix}{k}": v for k, v in model.state_dict().items()}
    for kind in ("weight", "bias"):
        rows = state.pop(f"{prefix}film.{kind}").split(model.film_widths)
        for name, part in zip(model.film_blocks, rows, strict=True):
            state[f"{prefix}{name}.film.{kind}"] = part.clone()
    return state


def test_older_state_dicts_are_stacked_when_loaded():
    model, fresh = filled(TINY), UNet(TINY)
    older = split(model)
    kept = dict(older)
    fresh.load_state_dict(older)
    assert older.keys() == kept.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    # inside another module, and in a copy, whose hook must read its own blocks
    outer = torch.nn.ModuleDict({"net": copy.deepcopy(UNet(TINY))})
    outer.load_state_dict(split(model, "net."))
    assert torch.equal(outer["net"].film.weight, model.film.weight)
    again = UNet(TINY)
    checkpoints.load_weights(again, older)
    assert torch.equal(again.film.bias, model.film.bias)


def test_an_older_state_dict_with_a_gap_is_named():
    older = split(filled(TINY))
    del older["middle.1.res.film.bias"]
    with pytest.raises(ValueError, match=r"missing +film\.bias") as caught:
        checkpoints.load_weights(UNet(TINY), older)
    assert "unexpected middle.0.res.film.bias" in str(caught.value)


class Count(TorchDispatchMode):
    """Matrix products of two axes: what a linear layer on the embedding is."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            self.rows.append(len(out))
        return out


@torch.no_grad()
def test_one_product_modulates_every_block():
    model = filled(UNetConfig.from_config({**TINY.to_config(), "attention": [], "middle": "plain"}))
    assert len(model.film_blocks) == 8
    with Count() as count:
        model(*batch(TINY))
    # two layers of the embedding and one of all blocks
    assert count.rows == [3, 3, 3]


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, RESBLOCKS], ids=["film", "add_resblocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_compiles_without_a_graph_break(config, dtype):
    model, (x, t, label) = filled(config).to(dtype), batch(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, t, label), model(x, t, label))


@pytest.mark.parametrize("config", [TINY, RESBLOCKS], ids=["film", "add_resblocks"])
@pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
def test_gradients_are_those_of_float64(config, autocast):
    """Of the sum of squares, by every weight; the reference is the ops' plain PyTorch."""

    def gradients(model: UNet, x: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        model(x, t, label).square().sum().backward()
        return [p.grad for p in model.parameters()]

    x, t, label = batch(config)
    exact = gradients(filled(config).double(), x.double(), t.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = gradients(filled(config), x, t)
        with use_backend("reference"):
            reference = gradients(filled(config), x, t)
    # by a power of two each, so that no weight's gradient hides behind a larger one's
    scales = [torch.frexp(g.abs().max())[1] for g in exact]

    def joined(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.ldexp(g, -e).flatten() for g, e in zip(parts, scales, strict=True)])

    assert min(float(g.abs().max()) for g in exact) > 0
    assert_within_budget(joined(got), joined(reference), joined(exact), ulps=1)


def test_dropout_is_for_training():
    config = UNetConfig.from_config({**TINY.to_config(), "dropout": 0.5})
    model, inputs = filled(config), batch(config)
    assert torch.equal(model(*inputs), filled(TINY)(*inputs))
    model.train()
    first, second = model(*inputs), model(*inputs)
    assert not torch.equal(first, second)
    # kept activations count double, so that without any dropped the branch is as in evaluation
    block = model.down[0].res
    block.dropout = 2.0**-60
    h, film = randn([0, 1], (8, 4, 4)), randn([2, 3], (16,))
    trained = block(h, film)
    ulps = 8 * torch.finfo(torch.float32).eps * trained.abs().max()
    assert (trained - block.eval()(h, film)).abs().max() <= ulps


# one shape on either side of every clause of the rule
@pytest.mark.parametrize(
    ("shape", "dtype", "matmul"),
    [
        ((2, 4, 64, 64), torch.bfloat16, True),
        ((2, 4, 64, 64), torch.float32, False),
        ((2, 4, 64, 64), torch.float16, False),
        ((2, 32, 63, 64), torch.bfloat16, False),
        ((2, 16, 64, 31), torch.bfloat16, False),
        ((1, 1, 64, 32), torch.bfloat16, True),  # the batch has no say
        ((1, 2, 2897, 32), torch.bfloat16, False),
    ],
    ids=str,
)
def test_attention_is_computed_as_the_rule_says(shape, dtype, matmul):
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    assert not _attention._by_matmul(q)  # gradients are on
    with torch.no_grad():
        assert _attention._by_matmul(q) is matmul
        if q.shape[2] > 1000:
            return
        got = _attention.attention(q, k, v)

    def written_out(q, k, v):
        return torch.softmax(q @ k.mT / shape[-1] ** 0.5, dim=-1) @ v

        # samples that go in turn have the bits that they have together
        with mock.patch.object(_attention, "_MOST_SCORES", shape[1] * shape[2] ** 2):
            assert_same_bits(_attention.attention(q, k, v), got)

    # the probabilities are rounded once more than in the reference, by half an ulp of a mean of v
    exact = written_out(q.double(), k.double(), v.double())
    assert_within_budget(got, written_out(q, k, v), exact, ulps=1)
