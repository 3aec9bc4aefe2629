"""Arguments that once came through wrong, crashed, or were refused without a name."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from bits import assert_same_bits

import fastdiff
from fastdiff import checkpoints, cli, ops, solvers
from fastdiff._cli_sample import MOST_SEEDS, parse_options, parse_seeds
from fastdiff.formats.files import read_weights
from fastdiff.reference.flow import RealNVP
from fastdiff.table import Row, StepTable

X = torch.linspace(-2, 2, 24).view(2, 12)
ONE = torch.zeros(1)
HUGE = 10**400  # an int beyond every float
PLAIN = StepTable("t", (Row(x={"x": 1.0, "m": 2.0}, time=0.0),))
PUSHES = StepTable(
    "t",
    (
        Row(x={"d": 1.0}, y={"x": 1.0}, time=0.0, push=True),
        Row(x={"x": 1.0, "h0": 1.0}, time=0.0, push=True),
        Row(x={"x": 1.0, "h1": 1.0}, time=0.0),
    ),
)


def step(**how):
    return ops.reverse_step(
        X.clone(), how.pop("output", X.clone()), how.pop("table", PLAIN), 0, **how
    )


def in_slots():
    """An anchor in the last slot of a history whose slots stand apart."""
    memory = torch.zeros(3, 5, 12)
    return step(table=PUSHES, history=memory[:, :2], y=memory[1, :2])


REFUSED = {
    "anchor within a slot": (in_slots, ValueError, "reverse_step: history must not overlap y"),
    "history of a list": (
        lambda: step(table=PUSHES, y=X.clone(), history=[X]), TypeError, "history must be a tensor",
    ),
    "history of no axis": (
        lambda: step(table=PUSHES, y=X.clone(), history=ONE[0]), ValueError, "history must have sh",
    ),
    "no table": (lambda: step(table=None), TypeError, "table must be a StepTable, got NoneType"),
    "weight beyond float32": (
        lambda: step(uncond=X, guidance=1e300), ValueError, "guidance must be finite in float32",
    ),
    "clip beyond float64": (lambda: step(clip=HUGE), ValueError, "clip must be finite in float32"),
    "complex weight": (
        lambda: step(uncond=X, guidance=torch.zeros(2, dtype=torch.complex64)), TypeError,
        "guidance must be real",
    ),
    "sparse output": (
        lambda: step(output=X.to_sparse()), TypeError, "output must be a dense tensor",
    ),
    "randn into one element": (
        lambda: ops.randn([1], (3,), out=ONE.expand(1, 3)), ValueError, "out must have memory for",
    ),
    "randn of a dtype's name": (
        lambda: ops.randn(0, (3,), dtype="float32"), TypeError, "dtype must be a floating-point",
    ),
    "size beyond 64 bits": (lambda: ops.randn(0, (1 << 70,)), ValueError, "shape must lie in"),
    "seeds in a set": (lambda: ops.randn({1, 2}, (3,)), TypeError, "seeds must be a sequence"),
    "seeds of no kind": (lambda: ops.randn(object(), (3,)), TypeError, "seeds must be a sequence"),
    "threshold into one element": (
        lambda: ops.dynamic_threshold(X, 0.5, out=ONE.expand(2, 12)), ValueError,
        "out must have memory for",
    ),
    "time beyond float64": (
        lambda: ops.brownian(0, (3,), 0.0, HUGE), ValueError, "t1 must be finite",
    ),
    "alpha beyond float32": (
        lambda: ops.add_noise(X, 0, 1e300, 1.0), ValueError, "alpha must be finite in",
    ),
    "act in a list": (lambda: ops.film(X, None, None, act=["silu"]), ValueError, "act must be one"),
    "groups beyond 64 bits": (
        lambda: ops.film_norm(X, 1 << 70), ValueError, "num_groups must divide the 12 channels",
    ),
    "eps beyond float64": (lambda: ops.modulate(X, eps=HUGE), ValueError, "eps must be finite"),
    "clamp beyond float64": (
        lambda: ops.reparameterize(X, X, 0, clamp=(-HUGE, 1)), ValueError, "clamp must fit float64",
    ),
    "factor beyond float64": (
        lambda: ops.guidance_rescale(X, X, HUGE, 0.5), ValueError, "guidance must be finite",
    ),
    "row that is none": (lambda: StepTable("t", ("a",)), TypeError, "row 0 must be a Row, got str"),
    "coefficient that is none": (
        lambda: StepTable("t", (Row(x={"x": "a"}, time=0.0),)), TypeError, "x of row 0 must map",
    ),
    "draw that is no integer": (
        lambda: StepTable("t", (Row(x={"n1": 1.0}, time=0.0, draws=((0.5, 0),)),)), TypeError,
        "draws of row 0 must be pairs of integers",
    ),
    "prediction that overflows when it is folded": (
        lambda: StepTable("t", (Row(x={"d": 1e30}, convert=(1e30, 1.0), time=0.0),)), ValueError,
        "row 0 of t must be finite in float32",
    ),
    "option of another type": (
        lambda: solvers.build("ddim", fastdiff.schedules.edm(), 9, prediction="sample", rho="a"),
        TypeError, "build: options must be of the types",
    ),
    "sigma beyond the noise scale": (
        lambda: solvers.build("er_sde", fastdiff.schedules.edm(0.1, 1e14), 3, prediction="sample"),
        ValueError, "er_sde: options",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# both ways, by one element and by more than a vector
@pytest.mark.parametrize("shift", [-40, -1, 1, 40])
def test_moved_memory_is_refused_and_left_alone(shift):
    memory = torch.linspace(-2, 2, 200)
    x, out = (memory[at : at + 100].view(2, 50) for at in (50, 50 + shift))
    before = memory.clone()
    for call in (
        lambda: ops.dynamic_threshold(x, 0.5, out=out),
        lambda: ops.brownian([1, 2], (50,), 0.0, 0.5, add_to=x, out=out),
    ):
        with pytest.raises(ValueError, match="or not overlap it, got shared memory"):
            call()
        assert_same_bits(memory, before)


def test_arrays_of_any_float():
    want = ops.add_noise(X, 0, 0.5, 0.25)[0]
    for dtype in (">f4", "f2", "f8", "g"):
        got = ops.add_noise(X, 0, np.full(2, 0.5, dtype), np.full(2, 0.25, dtype))[0]
        assert_same_bits(got, want)


@pytest.mark.parametrize("text", ["0-²", "٣", "9" * 5000, "0-999999,1000000", "0-", "-1", ""])
def test_seeds(text):
    with pytest.raises(ValueError, match="sample: seeds must be"):
        parse_seeds(text)
    assert len(parse_seeds(f"0-{MOST_SEEDS - 1}")) == MOST_SEEDS


@pytest.mark.parametrize("value", ["{[]:1}", "(" * 500, "[" * 100_000], ids=["key", "deep", "long"])
def test_options_that_are_no_value_are_words(value):
    assert parse_options([f"a={value}"]) == {"a": value}


@pytest.mark.parametrize("name", ["name", "schedule", "steps", "prediction", "spacing"])
def test_options_that_the_command_has_itself(name):
    with pytest.raises(TypeError, match=f"sample: options must be of .*, got '{name}'"):
        parse_options(["eta=0.5", f"{name}=1"])


def test_weights_of_memory_that_is_not_there(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)  # 4 TiB in 2 KiB
    with pytest.raises(ValueError, match="w must be a dense tensor of its own memory"):
        read_weights(path)


CARDS = {
    "deep": ("[" * 100_000, "must be JSON"),
    "layers": ({"architecture": {"blocks": 10**12}}, "must fit the weights, got 2000000000000 lay"),
    "width": ({"architecture": {"channels": [1 << 16, 1 << 16]}}, "weights must fit the model"),
    "bytes": ({"architecture": {"embed_dim": 1 << 62}}, "must be as save wrote it|must fit"),
    "times": ({"schedule": {"name": "linear", "T": 10**12}}, "T of the schedule must be at most"),
    "text": ({"architecture": "UNet"}, "must be as save wrote it"),
}


@pytest.mark.parametrize(("change", "message"), CARDS.values(), ids=CARDS)
def test_cards_of_strangers(change, message, tiny):
    path = tiny.with_suffix(".json")
    card = json.loads(path.read_text())
    if isinstance(change, str):
        path.write_text(change)
    else:
        ((key, value),) = change.items()
        new = {**card[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps({**card, key: new}))
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tiny)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("latent", {"denoiser": {"depth": 10**9}}),
        ("latent", {"autoencoder": {"blocks": 10**9}}),
        ("vae-mlp", {"hidden": 1 << 20}),
        ("vae-mlp", {"channels": [8] * 4096}),
        ("flow", {"layers": 10**9}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_cards_of_strangers_for_other_models(name, change, tmp_path):
    if name == "flow":
        path = checkpoints.save(tmp_path / name, RealNVP(2, 2, 4), None, {"name": name})
    else:
        path = tmp_path / f"{name}.safetensors"
        for suffix in (".safetensors", ".json"):
            source = checkpoints.ASSETS / f"{name}{suffix}"
            path.with_suffix(suffix).write_bytes(source.read_bytes())
    card = json.loads(path.with_suffix(".json").read_text())
    for key, value in change.items():
        inner = isinstance(value, dict)
        card["architecture"][key] = {**card["architecture"][key], **value} if inner else value
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"must fit the|must be as save wrote it"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    "change",
    [{"sampling": None}, {"classes": 3}, {"sampling": {"guidance": "a", "shape": [1, 16, 16]}},
     {"sampling": {"guidance": 1.0, "shape": [1, 1 << 20, 1 << 20]}}, {"prediction": None}],
    ids=["no advice", "no classes", "a word", "a terabyte", "no prediction"],
)  # fmt: skip
def test_advice_of_strangers(change, tiny, tmp_path, capsys):
    path = tiny.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert cli.main(["sample", "--model", str(tiny), "--out", str(tmp_path / "a.png")]) == 2
    assert "of the card must" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_bounds_that_mean_none():
    out, s = ops.dynamic_threshold(X, 0.5, max_value=math.inf)
    assert bool(out.isfinite().all()) and bool((s >= 1).all())
