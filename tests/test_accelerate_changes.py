"""What may happen to a module after `accelerate`: hooks, other weights, copies, training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from accelerated import (
    CASES,
    DTYPES,
    TEMB,
    X,
    attention,
    block,
    case,
    filled,
)
from budget import assert_within_budget
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import _convolution, _swap

# --- what may happen to an accelerated module -------------------------------------------------


@torch.no_grad()
def test_twice_is_once():
    model, x, call = case("unet")
    first = fastdiff.accelerate(model, freeze=True)
    out, classes = call(model, x), [type(m) for m in model.modules()]
    again = fastdiff.accelerate(model, freeze=True)
    assert again == first and repr(again) == repr(first)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(call(model, x), out)
    fastdiff.restore(model)
    fastdiff.restore(model)
    assert not any(isinstance(m, _swap.Swapped) for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_accelerated_and_independent(copied):
    model, x, call = case("unet")
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    plain = call(model, x)
    fastdiff.accelerate(model, freeze=True)
    out = call(model, x)
    twin = copied(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert all(m._fastdiff_packed.entry is None for m in twin.modules() if packs(m))
    assert torch.equal(call(twin, x), out)
    assert model.conv_norm_out._fastdiff_act[0] is model.conv_act
    assert twin.conv_norm_out._fastdiff_act[0] is twin.conv_act
    fastdiff.restore(twin)
    assert torch.equal(call(twin, x), plain)
    assert torch.equal(call(model, x), out)


def packs(module: nn.Module) -> bool:
    return isinstance(module, _convolution.Conv2d)


def load(model: nn.Module) -> None:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})


def in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(1.125)


def assigned(model: nn.Module) -> None:
    model.conv_in.weight = nn.Parameter(model.conv_in.weight + 1)


@torch.no_grad()
@pytest.mark.parametrize("change", [load, in_place, assigned, nn.Module.bfloat16])
def test_changed_weights_take_effect(change):
    """As if the model had been accelerated after the change."""
    model, x, call = case("unet")
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    fresh = copy.deepcopy(model)
    fastdiff.accelerate(model, freeze=True)
    before = call(model, x)
    assert any(packs(m) and m._fastdiff_packed.entry is not None for m in model.modules())
    for m in (model, fresh):
        change(m)
    fastdiff.accelerate(fresh, freeze=True)
    x = x.to(next(model.parameters()).dtype)
    assert torch.equal(call(model, x), call(fresh, x))
    assert not torch.equal(call(model, x).float(), before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_packed_weight_of_one_size_serves_another(dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, stride=2, padding=1, dilation=2, groups=2).to(dtype)
    chain = nn.Sequential(conv)
    exact = copy.deepcopy(chain).double()
    fastdiff.accelerate(chain, freeze=True)
    packed = []
    # the last one is beyond the largest grid that is packed, the one before not in channels_last
    for size in ((1, 16, 8, 8), (5, 16, 7, 9), (2, 16, 40, 40), (1, 16, 8, 8), (8, 16, 40, 40)):
        x = fastdiff.randn(range(size[0]), size[1:]).to(dtype).to(memory_format=torch.channels_last)
        x = x.contiguous() if size == (1, 16, 8, 8) and packed else x
        plain = nn.Conv2d.forward(conv, x)
        assert_within_budget(chain(x), plain, exact(x.double()), ulps=1)
        packed.append(_convolution._packable(conv, x))
    assert packed == [True, True, True, False, False]


@torch.no_grad()
def test_frozen_memory_is_given_back():
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    fastdiff.accelerate(model, freeze=True)
    model(fastdiff.randn([0], (4, 8, 8)).to(memory_format=torch.channels_last))
    assert model[0]._fastdiff_packed.entry is not None
    fastdiff.restore(model)
    assert not hasattr(model[0], "_fastdiff_packed")


@torch.no_grad()
def test_hooks_see_what_they_saw():
    """Also those that come after acceleration, and a convolution's result is not written over."""
    modules = ("norm1", "nonlinearity", "conv1", "norm2", "conv2")
    seen: list[list[Tensor]] = [[], []]
    for got in seen:
        b = block()
        if got is seen[1]:
            assert fastdiff.accelerate(b).fused
        for name in modules:
            b.get_submodule(name).register_forward_hook(lambda m, i, o, got=got: got.append(o))
        got.append(b(X, TEMB))
    # the activation runs three times: twice on pixels, once on the embedding
    assert len(seen[0]) == len(seen[1]) == len(modules) + 3
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_result_of_a_hooked_convolution_is_kept(name):
    b = block()
    fastdiff.accelerate(b)
    out = []
    b.get_submodule(name).register_forward_hook(lambda m, i, o: out.append((o, o.clone())))
    b(X, TEMB)
    assert torch.equal(*out[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act"])
def test_hook_on_the_head(name, film_norms):
    model, x, call = case("unet")
    plain = call(model, x)
    seen = []
    model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    call(model, x)
    report = fastdiff.accelerate(model)
    assert "hooks" in report.left["conv_norm_out"] and "conv_norm_out" not in report.fused
    fastdiff.restore(model)
    hooks = model.get_submodule(name)._forward_hooks.copy()
    model.get_submodule(name)._forward_hooks.clear()
    fastdiff.accelerate(model)
    model.get_submodule(name)._forward_hooks.update(hooks)
    film_norms.clear()
    got = call(model, x)
    # all but the head's
    assert film_norms.count(None) == 4 and len(film_norms) == CASES["unet"][4] - 1
    given, made = seen[-1]
    apart = {"conv_norm_out": nn.GroupNorm, "conv_act": nn.SiLU}[name]
    assert torch.equal(made, apart.forward(model.get_submodule(name), given))
    assert_within_budget(got, plain, call(copy.deepcopy(model).double(), x.double()), ulps=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act"])
def test_half_of_the_head_restored(name):
    model, x, call = case("unet")
    plain, exact = call(model, x), call(copy.deepcopy(model).double(), x.double())
    fastdiff.accelerate(model)
    fastdiff.restore(model.get_submodule(name))
    assert_within_budget(call(model, x), plain, exact, ulps=1)


def test_training_with_dropout():
    b = block(dropout=0.5).train()
    assert fastdiff.accelerate(b).left == {"": "is in training mode with dropout 0.5"}
    assert type(b) is ResnetBlock2D
    fastdiff.accelerate(b.eval())
    b.train()
    with torch.no_grad():
        torch.manual_seed(0)
        got = b(X, TEMB)
        fastdiff.restore(b)
        torch.manual_seed(0)
        assert torch.equal(got, b(X, TEMB))


# what the fused forward does not cover runs as it did, bit for bit
NOT_FUSED: dict[str, Callable[[nn.Module], Tensor]] = {
    "float64": lambda b: copy.deepcopy(b).double()(X.double(), TEMB.double()),
    "one time for all": lambda b: b(X, TEMB[:1]),
    "one image, many times": lambda b: b(X[:1], TEMB),
    "autocast": lambda b: torch.autocast("cpu", torch.bfloat16)(b)(X, TEMB),
    "deprecated scale": lambda b: b(X, TEMB, scale=None),
    "another norm": lambda b: setattr(b, "norm1", nn.BatchNorm2d(16).eval()) or b(X, TEMB),
    "another activation": lambda b: setattr(b, "nonlinearity", nn.ReLU()) or b(X, TEMB),
    "wants a gradient": lambda b: torch.enable_grad()(b)(X, TEMB).detach(),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused(name, film_norms):
    plain = NOT_FUSED[name](block())
    b = block()
    fastdiff.accelerate(b)
    got = NOT_FUSED[name](b)
    assert torch.equal(got, plain) and not film_norms


@torch.no_grad()
@pytest.mark.parametrize("kind", ["default", "group"])
def test_no_embedding_for_a_block_that_wants_none(kind):
    b = block(temb_channels=None, time_embedding_norm=kind)
    plain, exact = b(X, None), copy.deepcopy(b).double()(X.double(), None)
    assert fastdiff.accelerate(b).fused
    assert_within_budget(b(X, None), plain, exact, ulps=1)


@torch.no_grad()
@pytest.mark.parametrize("make", ["block", "attention", "chain"])
def test_compiles_as_one_graph(make):
    if make == "block":
        module, args = block(time_embedding_norm="scale_shift"), (X, TEMB)
    elif make == "attention":
        module, args = filled(lambda: attention()), (X,)
    else:
        module, args = filled(CASES["chain"][0]), (fastdiff.randn([0, 1], (3, 9, 9)),)
    assert fastdiff.accelerate(module).fused
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), module(*args))
