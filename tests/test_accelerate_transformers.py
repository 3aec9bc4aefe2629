"""`accelerate` on parts of diffusion transformers: what runs fused, what is left, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerated import DTYPES, case, filled, flux, forward_of_its_own, pixart, transformer
from budget import assert_within_budget
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
)
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import _swap

DIM = 16
X, TEXT, TEMB = (
    fastdiff.randn([k, k + 1], shape) for k, shape in enumerate(((9, DIM), (5, DIM), (DIM,)))
)
TIMES, LABELS = torch.tensor([3, 9]), torch.tensor([1, 2])


def zero(**change: Any) -> nn.Module:
    config = {"num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero", "attention_bias": True}
    return filled(lambda: BasicTransformerBlock(DIM, 2, 8, **{**config, **change}))


def single(**change: Any) -> nn.Module:
    return zero(**{"num_embeds_ada_norm": None, "norm_type": "ada_norm_single", **change})


def joint(**change: Any) -> nn.Module:
    return filled(lambda: JointTransformerBlock(DIM, 2, 8, **change))


def call_zero(b: nn.Module, x: Tensor = X, **more: Any) -> Tensor:
    return b(x, timestep=TIMES, class_labels=LABELS, **more)


def call_single(b: nn.Module, x: Tensor = X, **more: Any) -> Tensor:
    return b(x, timestep=torch.linspace(-1, 1, 12 * DIM, dtype=x.dtype).view(2, 6 * DIM), **more)


def call_joint(b: nn.Module, x: Tensor = X, **more: Any) -> Tensor:
    text, image = b(x, TEXT.to(x.dtype), TEMB.to(x.dtype), **more)
    return image if text is None else torch.cat([text, image], dim=1)


def call_norm(n: nn.Module, x: Tensor = X) -> Tensor:
    found = n(x, TEMB.to(x.dtype)) if not isinstance(n, AdaLayerNormZero) else n(x, emb=TEMB.to(x))
    return found if isinstance(found, Tensor) else torch.cat([t.flatten() for t in found])


def call_text(b: nn.Module, x: Tensor = X) -> Tensor:
    call = call_single if b.norm_type == "ada_norm_single" else call_zero
    return call(b, x, encoder_hidden_states=TEXT.to(x.dtype))


# build, call, calls of the fused ops
PARTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], int]] = {
    "zero": (zero, call_zero, 3),
    # an affine norm before the modulation
    "affine": (lambda: zero(norm_elementwise_affine=True), call_zero, 3),
    "eps": (lambda: zero(norm_eps=0.25), call_zero, 3),
    "float32 norm": (
        lambda: joint_of(lambda: AdaLayerNormZero(DIM, norm_type="fp32_layer_norm")),
        call_joint,
        6,
    ),
    "single": (single, call_single, 3),
    "to text": (lambda: zero(cross_attention_dim=DIM), call_text, 4),
    "single to text": (lambda: single(cross_attention_dim=DIM), call_text, 4),
    "only text": (
        lambda: single(cross_attention_dim=DIM, only_cross_attention=True),
        call_text,
        4,
    ),
    "joint": (joint, call_joint, 6),
    "joint, text dropped": (lambda: joint(context_pre_only=True), call_joint, 4),
    "joint, two attentions": (lambda: joint(use_dual_attention=True), call_joint, 8),
    "norm": (lambda: filled(lambda: AdaLayerNormZero(DIM)), call_norm, 1),
    "norm of three": (lambda: filled(lambda: AdaLayerNormZeroSingle(DIM)), call_norm, 1),
    "last norm": (lambda: filled(lambda: AdaLayerNormContinuous(DIM, DIM)), call_norm, 1),
}


def joint_of(make: Callable[[], nn.Module]) -> nn.Module:
    """A block with other norms of the same kind."""
    block = joint()
    block.norm1, block.norm1_context = filled(make), filled(make)
    return block


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PARTS)
def test_within_budget(name, dtype, modulations):
    build, call, calls = PARTS[name]
    module = build().to(DTYPES[dtype])
    x = X.to(DTYPES[dtype])
    plain, exact = call(module, x), call(copy.deepcopy(module).double(), x.double())
    report = fastdiff.accelerate(module)
    assert "" in report.fused
    assert_within_budget(call(module, x), plain, exact, ulps=1)
    assert len(modulations) == calls
    fastdiff.restore(module)
    assert torch.equal(call(module, x), plain)


# what the fused forward does not cover runs as it did, bit for bit
NOT_FUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "float64": (zero, lambda b: call_zero(copy.deepcopy(b).double(), X.double())),
    "autocast": (zero, lambda b: torch.autocast("cpu", torch.bfloat16)(call_zero)(b)),
    "wants a gradient": (zero, lambda b: torch.enable_grad()(call_zero)(b).detach()),
    "one time for all": (zero, lambda b: b(X, timestep=TIMES[:1], class_labels=LABELS[:1])),
    "options of attention": (zero, lambda b: call_zero(b, cross_attention_kwargs={"scale": None})),
    "table of another type": (
        lambda: single(norm_elementwise_affine=False), lambda b: call_single(low(b), X.bfloat16())),
    "norm replaced": (
        zero, lambda b: setattr(b, "norm3", nn.RMSNorm(DIM)) or call_zero(b)),
    "chunks": (zero, lambda b: b.set_chunk_feed_forward(3, 1) or call_zero(b)),
    "joint, one time": (joint, lambda b: b(X, TEXT, TEMB[:1])[1]),
    "four axes": (
        lambda: filled(lambda: AdaLayerNormZero(DIM)), lambda n: n(X[:, None], emb=TEMB)[0]),
}  # fmt: skip


def low(block: nn.Module) -> nn.Module:
    """In bfloat16 but for the table, and what multiplies the tokens that it makes float32."""
    block.bfloat16()
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    block.attn1.float()
    block.ff.float()
    return block


@torch.no_grad()
@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused(name, modulations):
    build, call = NOT_FUSED[name]
    plain = call(build())
    module = build()
    assert "" in fastdiff.accelerate(module).fused
    got = call(module)
    assert torch.equal(got, plain) and not modulations


@torch.no_grad()
def test_embedding_of_its_own_has_the_dtype_that_is_asked_for(modulations):
    norm = filled(lambda: AdaLayerNormZero(DIM, 10))
    arguments = (X, TIMES, LABELS, X.dtype, TEMB)
    plain, exact = norm(*arguments)[0], copy.deepcopy(norm).double()
    exact = exact(X.double(), TIMES, LABELS, torch.float64)[0]
    fastdiff.accelerate(norm)
    assert_within_budget(norm(*arguments)[0], plain, exact, ulps=1)
    assert modulations == ["modulate"]


def hooked(module: nn.Module, name: str) -> nn.Module:
    module.get_submodule(name).register_forward_hook(lambda *_: None)
    return module


NORMS = "a norm is not a LayerNorm without hooks"
LEFT = {
    "layer norm": (
        lambda: single(norm_type="layer_norm"),
        "its norm_type is layer_norm, not ada_norm_zero or ada_norm_single",
    ),
    "positions": (
        lambda: zero(positional_embeddings="sinusoidal", num_positional_embeddings=9),
        "adds positions to what the norm gives",
    ),
    "forward": (lambda: forward_of_its_own(zero()), "has a forward of its own"),
    "hook on norm1": (lambda: hooked(zero(), "norm1"), NORMS),
    "hook in norm1": (lambda: hooked(zero(), "norm1.norm"), NORMS),
    "hook on norm3": (lambda: hooked(zero(), "norm3"), NORMS),
    "hook on norm2": (lambda: hooked(single(), "norm2"), NORMS),
    "joint hook": (lambda: hooked(joint(), "norm2_context"), NORMS),
    "joint forward": (lambda: forward_of_its_own(joint()), "has a forward of its own"),
    "model": (
        lambda: hooked(transformer(), "norm_out"),
        "its norm_out is not a LayerNorm without hooks",
    ),
    "model's forward": (lambda: forward_of_its_own(transformer()), "has a forward of its own"),
    "rms": (
        lambda: AdaLayerNormContinuous(DIM, DIM, norm_type="rms_norm"),
        "its norm is not a LayerNorm without hooks",
    ),
    "norm's forward": (
        lambda: forward_of_its_own(AdaLayerNormZero(DIM)),
        "has a forward of its own",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    make, reason = LEFT[name]
    module = make().eval()
    report = fastdiff.accelerate(module)
    assert report.left[""] == reason and "" not in report.fused
    assert not isinstance(module, _swap.Swapped)
    # a block that is left alone is left whole; a model's blocks are not
    assert not report.fused or "model" in name


def test_chunks_are_left_alone():
    for block in (zero(), joint()):
        block.set_chunk_feed_forward(3, 1)
        assert fastdiff.accelerate(block).left[""] == "its feed-forward runs in chunks"


@torch.no_grad()
def test_hooks_that_come_later_see_what_they_saw():
    for name in ("norm1", "norm1.norm", "norm3"):
        block, seen = zero(), []
        plain = call_zero(block)
        fastdiff.accelerate(block)
        assert not torch.equal(call_zero(block), plain)
        block.get_submodule(name).register_forward_hook(lambda m, i, o, s=seen: s.append(o))
        assert torch.equal(call_zero(block), plain) and len(seen) == 1


@torch.no_grad()
def test_reports():
    report = fastdiff.accelerate(flux())
    assert set(report.fused) == {
        "transformer_blocks.0.norm1", "transformer_blocks.0.norm1_context",
        "single_transformer_blocks.0.norm", "norm_out",
    }  # fmt: skip
    assert report.left["transformer_blocks.0"] == (
        "FluxTransformerBlock: its gated residuals are not fused, its norms are"
    )
    assert report.left["single_transformer_blocks.0"].startswith("FluxSingleTransformerBlock: ")
    report = fastdiff.accelerate(pixart())
    assert set(report.fused) == {"transformer_blocks.0", "transformer_blocks.1"}
    report = fastdiff.accelerate(transformer())
    assert set(report.fused) == {"", "transformer_blocks.0", "transformer_blocks.1"}


@torch.no_grad()
def test_model_gives_a_tuple_where_it_is_asked_for_one():
    model, x, call = case("transformer")
    fastdiff.accelerate(model)
    times, labels = torch.tensor([1, 9]), torch.tensor([1, 2])
    (got,) = model(x, times, labels, return_dict=False)
    assert torch.equal(got, call(model, x)) and got.shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["zero", "single to text", "joint", "last norm"])
def test_compiles_as_one_graph(name):
    build, call, _ = PARTS[name]
    module = build()
    assert fastdiff.accelerate(module).fused
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    call_compiled = {
        "zero": lambda: compiled(X, timestep=TIMES, class_labels=LABELS),
        "single to text": lambda: compiled(X, timestep=randn_times(), encoder_hidden_states=TEXT),
        "joint": lambda: torch.cat(compiled(X, TEXT, TEMB), dim=1),
        "last norm": lambda: compiled(X, TEMB),
    }[name]
    assert torch.equal(call_compiled(), call(module))
    torch._dynamo.reset()


def randn_times() -> Tensor:
    return torch.linspace(-1, 1, 12 * DIM).view(2, 6 * DIM)
