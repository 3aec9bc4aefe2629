"""`accelerate` and `restore`: the same model within the error budget, undone bit for bit."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerated import (
    CASES,
    DTYPES,
    LAYOUTS,
    X,
    attention,
    block,
    case,
    filled,
    forward_of_its_own,
    randn,
    scale_shift,
    unet,
)
from budget import assert_within_budget
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import fastdiff
from fastdiff.integrations import _swap

# --- the same model -------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_within_budget(name, dtype, layout, film_norms, modulations):
    model, x, call = case(name)
    order, freeze = LAYOUTS[layout]
    model = model.to(DTYPES[dtype]).to(memory_format=order)
    x = x.to(DTYPES[dtype])
    if x.ndim == 4:  # tokens have one order
        x = x.contiguous(memory_format=order)
    plain, exact = call(model, x), call(copy.deepcopy(model).double(), x.double())
    kept = x.clone()
    report = fastdiff.accelerate(model, freeze=freeze)
    # the last convolution rounds its result, both times
    assert_within_budget(call(model, x), plain, exact, ulps=1)
    assert torch.equal(x, kept)
    fused, calls = CASES[name][3:]
    assert len(film_norms) + len(modulations) == calls
    assert sum("weight" not in text for text in report.fused.values()) == fused


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_restore_bit_for_bit(name):
    model, x, call = case(name)
    before = call(model, x)
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    fastdiff.accelerate(model, freeze=True)
    call(model, x)
    assert [type(m) for m in model.modules()] != classes or not CASES[name][3]
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    now = model.state_dict()
    assert list(now) == list(state)
    for key, (where, value) in state.items():
        assert now[key].data_ptr() == where and torch.equal(now[key], value), key
    fastdiff.restore(model)
    assert torch.equal(call(model, x), before)
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(m.__dict__) for m in model.modules()] == attributes


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["unet", "scale_shift", "transformer"])
def test_gradients_are_those_of_the_model(name, checkpointing):
    model, x, call = case(name)
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    grads = []
    for swap in (False, True):
        if swap:
            assert fastdiff.accelerate(model).fused
        torch.manual_seed(0)  # labels that training drops
        leaf = x.clone().requires_grad_()
        call(model, leaf).square().mean().backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    # torch's own backward runs, which is faster than that of the op; only a checkpointed forward,
    # whose result is thrown away, is fused
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_cifar10_size():
    """The 35.7 M parameters of DDPM's CIFAR-10 model, one image."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    x, times = torch.randn(1, 3, 32, 32), torch.tensor([500])
    for dtype, layout in ((torch.float32, "nchw"), (torch.bfloat16, "frozen")):
        order, freeze = LAYOUTS[layout]
        rounded = model.to(dtype).to(memory_format=order)
        noisy = x.to(dtype).contiguous(memory_format=order)
        exact = copy.deepcopy(rounded).double()(noisy.double(), times).sample
        plain = rounded(noisy, times).sample
        report = fastdiff.accelerate(rounded, freeze=freeze)
        assert len(report.fused) - sum("weight" in t for t in report.fused.values()) == 29
        assert_within_budget(rounded(noisy, times).sample, plain, exact, ulps=1)
        fastdiff.restore(model)


# --- the report and the errors ----------------------------------------------------------------


def test_report():
    report = fastdiff.accelerate(filled(scale_shift))
    assert report.fused["conv_norm_out"] == "GroupNorm + SiLU"
    assert report.fused["mid_block.resnets.0"].startswith("norm1 + SiLU; norm2 + FiLM + SiLU")
    assert report.fused["mid_block.attentions.0"].startswith("group_norm")
    assert not any("norm1" in name or name.endswith("conv_act") for name in report.fused)
    text = repr(report)
    assert text.startswith("fused: 15 modules\n  ") and text.endswith("left: 0 modules")
    assert "down_blocks.0.resnets.0" in text and "(10 in all)" in text


LEFT = {
    "mish": (lambda: block(non_linearity="mish"), "its activation is Mish, not SiLU"),
    "film": (lambda: AdaGroupNorm(8, 16, 4), "AdaGroupNorm: no fused op covers it yet"),
    "no norm": (lambda: attention(norm_num_groups=None), "has no group_norm: nothing to fuse"),
    "qk norm": (lambda: attention(qk_norm="layer_norm"), "has norm_q"),
    "subclass": (lambda: type("Own", (ResnetBlock2D,), {"forward": lambda s, x: x})(
        in_channels=16, groups=4), "has a forward of its own"),
    "hooked": (lambda: forward_of_its_own(block()), "has a forward of its own"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.GroupNorm(2, 4), dim=0),
        "is parametrized, which is a class of its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("build", LEFT)
def test_left_alone(build):
    make, reason = LEFT[build]
    module = make().eval()
    report = fastdiff.accelerate(module)
    assert report.left[""] == reason and "" not in report.fused
    assert not isinstance(module, _swap.Swapped)
    if build != "qk norm":
        assert report.fused == {}


def test_processor_is_respected():
    a = attention()
    a.set_processor(diffusers.models.attention_processor.AttnProcessor())
    reason = "its processor is AttnProcessor, not AttnProcessor2_0"
    assert fastdiff.accelerate(a).left == {"": reason}


@torch.no_grad()
def test_rescaled_attention():
    a = filled(lambda: attention(rescale_output_factor=3.0, residual_connection=False))
    plain, exact = a(X), copy.deepcopy(a).double()(X.double())
    fastdiff.accelerate(a)
    assert_within_budget(a(X), plain, exact, ulps=1)
    # to other tokens, or with a mask, it is not the pixels' own attention
    for extra in ({"encoder_hidden_states": randn(2, 5, 16)}, {"attention_mask": randn(2, 1, 64)}):
        fused = a(X, **extra)
        fastdiff.restore(a)
        assert torch.equal(fused, a(X, **extra))
        fastdiff.accelerate(a)


def test_pipeline():
    model = filled(unet)
    pipeline = SimpleNamespace(components={"unet": model, "scheduler": object(), "nothing": None})
    report = fastdiff.accelerate(pipeline)
    assert "unet.conv_norm_out" in report.fused
    fastdiff.restore(pipeline)
    assert not any(isinstance(m, _swap.Swapped) for m in model.modules())


@pytest.mark.parametrize("module", ["unet", SimpleNamespace(components={"scheduler": 1})])
@pytest.mark.parametrize("function", [fastdiff.accelerate, fastdiff.restore])
def test_not_a_module(function, module):
    message = (
        rf"^{function.__name__}: module must be a torch\.nn\.Module or a pipeline with components "
        rf"that are, got {type(module).__name__}$"
    )
    with pytest.raises(TypeError, match=message):
        function(module)


def test_freeze_is_a_bool():
    with pytest.raises(TypeError, match=r"^accelerate: freeze must be a bool, got int$"):
        fastdiff.accelerate(nn.SiLU(), freeze=1)


def test_restore_under_another_class():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
    fastdiff.accelerate(model)
    nn.utils.parametrizations.weight_norm(model[1], dim=0)
    with pytest.raises(ValueError, match=r"^restore: module must have the classes .* got Param"):
        fastdiff.restore(model)


def test_diffusers_is_not_imported():
    code = (
        "import sys, torch, fastdiff; assert 'fastdiff.integrations' not in sys.modules;"
        "m = torch.nn.Sequential(torch.nn.GroupNorm(1, 2), torch.nn.SiLU());"
        "print(fastdiff.accelerate(m).fused); assert 'diffusers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "{'': 'GroupNorm + SiLU'}\n", done.stderr
