"""The DiT: against diffusers and the paper's code, shapes, dtypes, the null class, messages."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

import fastdiff
from fastdiff.models import DiT, DiTConfig
from fastdiff.models.dit import CONFIGS, sincos_positions
from fastdiff.models.unet import timestep_embedding

# two blocks, so that a modulation reaches over the end of one
TINY = DiTConfig(in_channels=3, image_size=8, width=16, depth=2, heads=2, num_classes=5)
VARIANTS = {
    "tiny": TINY,
    "vector": DiTConfig(
        image_size=6, patch_size=3, width=24, depth=1, heads=3, num_classes=0, vector_dim=7,
        learn_sigma=False, positions="learned", mlp_ratio=2.5,
    ),
    "both conditions": DiTConfig(
        in_channels=1, image_size=4, patch_size=1, width=8, depth=3, heads=1, vector_dim=2,
        time_shift=1, time_scale=1000.0, mlp_eps=1e-5,
    ),
}  # fmt: skip


def randomize(model: torch.nn.Module) -> Any:
    """Weights without the zeros a model starts with, so that every layer counts."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=draw) / (p[0].numel() ** 0.5 if p.ndim > 1 else 4)
            )
    return model.eval()


def batch(config: DiTConfig, n: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    size = (n, config.in_channels, config.image_size, config.image_size)
    given = {"x": torch.randn(size, generator=draw), "t": torch.tensor([0.0, 37.0, 999.0])[:n]}
    if config.num_classes:
        given["label"] = torch.arange(n)
    if config.vector_dim:
        given["vector"] = torch.randn(n, config.vector_dim, generator=draw)
    return given


def double(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in given.items()}


# --- other implementations --------------------------------------------------------------------


def peer(**change: Any) -> Any:
    """diffusers' model with one embedder for all blocks, as its published weights have it."""
    diffusers = pytest.importorskip("diffusers")
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    model = randomize(diffusers.DiTTransformer2DModel(**{**config, **change}))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


class ExactSinusoids(torch.nn.Module):
    """diffusers' embedding of time, which is float32 in any model, in float64."""

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        frequency = 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 127)
        angle = t.double()[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    ({}, {"out_channels": 4, "norm_eps": 0.1}, {"patch_size": 4, "attention_head_dim": 16}),
    ids=("learned sigma", "other epsilon", "other patches"),
)
def test_equals_diffusers(change: dict[str, Any]) -> None:
    theirs = peer(**change)
    ours = DiT.from_diffusers(theirs)
    given = batch(ours.config)
    keywords = {"timestep": given["t"], "class_labels": given["label"]}
    want = theirs(given["x"], **keywords).sample
    theirs.double()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj = ExactSinusoids()
    exact = theirs(given["x"].double(), **keywords).sample
    assert_within_budget(ours(**given), want, exact, ulps=2)


def original_state(model: DiT) -> dict[str, torch.Tensor]:
    """A state dict with the keys of facebookresearch/DiT, written out one by one."""
    own, depth, width = model.state_dict(), model.config.depth, model.config.width
    state = {
        "pos_embed": model.positions[None],
        "y_embedder.embedding_table.weight": own["label.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"x_embedder.proj.{kind}"] = own[f"patches.{kind}"]
        state[f"t_embedder.mlp.0.{kind}"] = own[f"time.0.{kind}"]
        state[f"t_embedder.mlp.2.{kind}"] = own[f"time.2.{kind}"]
        state[f"final_layer.linear.{kind}"] = own[f"out.{kind}"]
        *films, last = own[f"modulation.{kind}"].split(6 * width)
        state[f"final_layer.adaLN_modulation.1.{kind}"] = last
        for i in range(depth):
            state[f"blocks.{i}.adaLN_modulation.1.{kind}"] = films[i]
            for theirs, name in (
                ("attn.qkv", "qkv"),
                ("attn.proj", "proj"),
                ("mlp.fc1", "fc1"),
                ("mlp.fc2", "fc2"),
            ):
                state[f"blocks.{i}.{theirs}.{kind}"] = own[f"blocks.{i}.{name}.{kind}"]
    return state  # fmt: skip


def as_in_the_paper(state: dict[str, torch.Tensor], config: DiTConfig, given: Any) -> torch.Tensor:
    """Peebles and Xie 2023, section 3.2, block by block from the published keys."""

    def linear(name: str, v: torch.Tensor) -> torch.Tensor:
        return F.linear(v, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(v: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(v, v.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    x, p = given["x"], config.patch_size
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=p)
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    time = timestep_embedding(given["t"], 256).to(x.dtype)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][given["label"]])
    for i in range(config.depth):
        films = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        n = norm(h, films[0], films[1])
        q, k, v = (
            part.unflatten(2, (config.heads, -1)).transpose(1, 2)
            for part in linear(f"blocks.{i}.attn.qkv", n).chunk(3, dim=2)
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        branch = linear(f"blocks.{i}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        h = h + films[2][:, None] * branch
        hidden = F.gelu(
            linear(f"blocks.{i}.mlp.fc1", norm(h, films[3], films[4])), approximate="tanh"
        )
        h = h + films[5][:, None] * linear(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    out = linear("final_layer.linear", norm(h, shift, scale))
    # every token is a patch of rows of pixels with their channels
    side = config.image_size // p
    image = out.new_zeros(len(x), config.out_channels, config.image_size, config.image_size)
    for row in range(side):
        for column in range(side):
            patch = out[:, row * side + column].view(-1, p, p, config.out_channels)
            area = image[:, :, row * p : row * p + p, column * p : column * p + p]
            area.copy_(patch.permute(0, 3, 1, 2))
    return image


@torch.no_grad()
@pytest.mark.parametrize("positions", ("sincos", "learned"))
def test_equals_the_paper_with_its_weights(positions: str) -> None:
    config = DiTConfig.from_config({**TINY.to_config(), "positions": positions})
    state = original_state(randomize(DiT(config)))
    model, given = DiT.from_original(state, config), batch(config)
    want = as_in_the_paper(state, config, given)
    exact = as_in_the_paper({k: v.double() for k, v in state.items()}, config, double(given))
    assert_within_budget(model(**given), want, exact, ulps=2)
    before = state["final_layer.linear.bias"].clone()
    model.out.bias.add_(1)
    assert torch.equal(state["final_layer.linear.bias"], before)


def test_positions_are_those_of_diffusers() -> None:
    peers = pytest.importorskip("diffusers.models.embeddings")
    exact = peers.get_2d_sincos_pos_embed(48, 7, base_size=7, output_type="pt").double()
    # half an ulp: both are rounded once
    assert_within_budget(sincos_positions(48, 7), exact.float(), exact, ulps=0.5)


# --- the model itself -------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_weight_is_used_and_learns(config: DiTConfig) -> None:
    model, given = randomize(DiT(config)), batch(config)
    out = model(**given)
    assert out.shape == (3, config.out_channels, config.image_size, config.image_size)
    out.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_kernels_and_reference_give_the_same_prediction(config: DiTConfig) -> None:
    model, given = randomize(DiT(config)), batch(config)
    with fastdiff.use_backend("reference"):
        plain = model(**given)
        exact = randomize(DiT(config)).double()(**double(given))
    assert_within_budget(model(**given), plain, exact, ulps=2)


@torch.no_grad()
def test_starts_at_zero() -> None:
    assert not DiT(TINY)(**batch(TINY)).any()


@torch.no_grad()
def test_one_matrix_product_makes_all_modulations() -> None:
    model, given = randomize(DiT(TINY)), batch(TINY)
    calls: list[int] = []
    model.modulation.register_forward_hook(lambda *_: calls.append(1))
    model(**given)
    assert calls == [1]
    assert model.modulation.out_features == (6 * TINY.depth + 2) * TINY.width


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision_weights(dtype: torch.dtype) -> None:
    given = batch(TINY)
    exact = randomize(DiT(TINY)).double()(**double(given))
    model = randomize(DiT(TINY)).to(dtype)
    with fastdiff.use_backend("reference"):
        plain = model(**given)
    assert_within_budget(model(**given), plain, exact, ulps=2)
    assert model(**{**given, "x": given["x"].to(dtype)}).dtype == dtype


def test_autocast_and_compile() -> None:
    model, given = randomize(DiT(TINY)), batch(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**given)
    assert low.dtype == torch.float32
    plain = model(**given)
    # one rounding to bfloat16 in each of some twenty products
    assert (low - plain).abs().max() < 20 * torch.finfo(torch.bfloat16).eps * plain.abs().max()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), plain)
    torch._dynamo.reset()


@torch.no_grad()
def test_null_class() -> None:
    model, given = randomize(DiT(TINY)), batch(TINY)
    x, t, label = given.values()
    null = model(x, t)
    assert torch.equal(null, model(x, t, torch.full((3,), -1)))
    assert torch.equal(null, model(x, t, torch.full((3,), model.null_label)))
    mixed = model(x, t, torch.tensor([0, -1, 2]))
    assert torch.equal(mixed[1], null[1])
    assert torch.equal(mixed[0], model(x, t, label)[0])
    assert not torch.equal(mixed[0], null[0])


def test_configs_have_the_sizes_of_the_paper() -> None:
    """Table 4 of the paper: millions of parameters."""
    for name, millions in {"S/2": 33, "B/2": 130, "L/2": 458, "XL/2": 675}.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in DiT(CONFIGS[name]).parameters())
        assert round(count / 1e6) == millions, name


def test_config_survives_json() -> None:
    for config in (*VARIANTS.values(), *CONFIGS.values()):
        assert DiTConfig.from_config(json.loads(json.dumps(config.to_config()))) == config


# --- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be an int >= 1, got 0"),
        ({"num_classes": -1}, "num_classes must be an int >= 0, got -1"),
        ({"width": 20, "heads": 3}, "width must be a multiple of heads=3 and of 4, got 20"),
        ({"width": 6, "heads": 3}, "width must be a multiple of heads=3 and of 4, got 6"),
        ({"image_size": 9}, "image_size must be a multiple of patch_size=2, got 9"),
        ({"mlp_ratio": 0}, "mlp_ratio must be > 0, got 0"),
        ({"positions": "rope"}, "positions must be 'sincos' or 'learned', got 'rope'"),
        ({"time_shift": 2}, "time_shift must be 0 or 1, got 2"),
        ({"layers": 3}, r"config must hold known keys only, got \['layers'\]"),
    ],
    # one row for each rule
)
def test_config_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^DiTConfig: {message}"):
        DiTConfig.from_config(change)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("tiny", {"x": torch.zeros(3, 3, 8, 7)}, ValueError, r"x must have shape \(N, 3, 8, 8\)"),
        ("tiny", {"x": torch.zeros(3, 3, 8, 8, dtype=torch.int32)}, TypeError, "x must be float"),
        ("tiny", {"t": torch.zeros(2)}, ValueError, r"t must have shape \(3,\), got \(2,\)"),
        ("tiny", {"t": 3}, TypeError, "t must be a tensor, got 3"),
        ("tiny", {"label": [1, 2, 3]}, TypeError, r"label must be a tensor, got \[1, 2, 3\]"),
        ("tiny", {"label": torch.zeros(3)}, TypeError, r"label must be int64, got torch\.float32"),
        ("tiny", {"label": torch.tensor([1])}, ValueError, r"label must have shape \(3,\)"),
        ("tiny", {"label": torch.tensor([0, 6, -2])}, ValueError,
         r"label must lie in \[-1, 5\], got \[6, -2\]"),
        ("tiny", {"vector": torch.zeros(3, 2)}, ValueError, "vector must be None for a model"),
        ("vector", {"label": torch.zeros(3).long()}, ValueError, "label must be None for a model"),
        ("vector", {"vector": None}, ValueError, r"vector must have shape \(3, 7\), got None"),
        ("vector", {"vector": torch.zeros(3, 6)}, ValueError, r"vector must have shape \(3, 7\)"),
    ],
    # one row for each rule
)  # fmt: skip
def test_call_errors(name: str, change: Any, error: type[Exception], message: str) -> None:
    model = DiT(VARIANTS[name])
    with pytest.raises(error, match=f"^DiT: {message}"):
        model(**{**batch(VARIANTS[name]), **change})


def test_what_from_diffusers_refuses() -> None:
    other = peer()
    with torch.no_grad():
        other.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.add_(1)
    name = r"transformer_blocks\.{}\.norm1\.emb\.timestep_embedder\.linear_1\.bias"
    rule = f"^DiT: {name.format(1)} must be a copy of {name.format(0)}, got another"
    with pytest.raises(ValueError, match=rule):
        DiT.from_diffusers(other)
    other = peer()
    other.transformer_blocks[2].norm1.emb.class_embedder.embedding_table = torch.nn.Embedding(3, 16)
    table = r"transformer_blocks\.2\.norm1\.emb\.class_embedder\.embedding_table\.weight"
    with pytest.raises(ValueError, match=rf"misshapen  {table} \(11, 16\), got \(3, 16\)"):
        DiT.from_diffusers(other)
    for change, message in (
        ({"attention_bias": False}, "attention_bias must be True, got False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine must be False"),
        ({"activation_fn": "gelu"}, "activation_fn must be 'gelu-approximate', got"),
        ({"out_channels": 5}, "out_channels must be 4 or 8, got 5"),
    ):
        with pytest.raises(ValueError, match=f"^DiT: {message}"):
            DiT.from_diffusers(peer(**change))


def test_what_from_original_refuses() -> None:
    state = original_state(DiT(TINY))
    bad = {k: v for k, v in state.items() if k != "blocks.1.attn.qkv.bias"}
    bad["extra"] = torch.zeros(1)
    wide = DiTConfig.from_config({**TINY.to_config(), "num_classes": 6})
    with pytest.raises(ValueError, match=r"^DiT: weights must fit the model, got") as caught:
        DiT.from_original(bad, wide)
    assert str(caught.value).splitlines()[1:] == [
        "  missing    blocks.1.attn.qkv.bias (48,)",
        "  unexpected extra (1,)",
        "  misshapen  y_embedder.embedding_table.weight (7, 16), got (6, 16)",
    ]
    learned = DiTConfig.from_config({**TINY.to_config(), "positions": "learned"})
    state["pos_embed"] = state["pos_embed"][:, 1:]
    with pytest.raises(ValueError, match=r"misshapen  pos_embed \(16, 16\), got \(15, 16\)"):
        DiT.from_original(state, learned)
