"""What `reverse_step` refuses, in which words, and that it then has written nothing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from tables import LEARNED, random_inputs, random_table
from torch.autograd import forward_ad

from fastdiff import BackendError, use_backend
from fastdiff.backends import unavailable
from fastdiff.ops import reverse_step


def _arguments() -> dict[str, Any]:
    """A call of the row that needs everything."""
    rng = np.random.default_rng(11)
    inputs, table = random_inputs(rng, (3, 2, 4, 4)), random_table(rng)
    return {
        "x": inputs.x, "output": inputs.outputs[0], "table": table, "row": LEARNED,
        "uncond": inputs.unconds[0], "guidance": 2.0, "clip": 1.0, "variance": inputs.variance,
        "y": torch.ones(3, 2, 4, 4), "history": torch.ones(4, 3, 2, 4, 4),
        "seeds": inputs.seeds, "out": torch.zeros(3, 2, 4, 4),
        "model_input": torch.zeros(3, 2, 4, 4),
    }  # fmt: skip


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


IMAGE = (3, 2, 4, 4)
OTHER_ORDER = _zeros(*IMAGE).contiguous(memory_format=torch.channels_last)
# one case a rule, in the order of the arguments
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-type": ({"x": [1.0]}, TypeError, "x must be a float32 or float64 tensor, got list"),
    "x-dtype": (
        {"x": _zeros(*IMAGE, dtype=torch.int64)}, TypeError,
        "x must be a float32 or float64 tensor, got torch.int64"),
    "x-half": (
        {"x": _zeros(*IMAGE, dtype=torch.bfloat16)}, TypeError,
        "x must be a float32 or float64 tensor, got torch.bfloat16"),
    "x-scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must have shape (N, *S), got ()"),
    "output-type": (
        {"output": np.zeros(IMAGE, np.float32)}, TypeError,
        "output must be a floating-point tensor, got ndarray"),
    "output-integer": (
        {"output": _zeros(*IMAGE, dtype=torch.int64)}, TypeError,
        "output must be a floating-point tensor, got torch.int64"),
    "scale-number": ({"scale": 2.0}, TypeError, "scale must be a tensor, got float"),
    "scale-shape": (
        {"scale": _zeros(2)}, ValueError, "scale must have one factor a sample (3,), got (2,)"),
    "row-float": ({"row": 0.0}, TypeError, "row must be an int or an int64 tensor, got float"),
    "row-bool": ({"row": True}, TypeError, "row must be an int or an int64 tensor, got bool"),
    "output-none": (
        {"output": None}, ValueError,
        "output must be given, the row evaluates the model, got None"),
    "output-shape": (
        {"output": _zeros(3, 4, 4, 4)}, ValueError,
        "output must have the shape of x (3, 2, 4, 4), got (3, 4, 4, 4)"),
    "row-low": ({"row": -1}, ValueError, "row must lie in [0, 7), got -1"),
    "row-high": ({"row": 7}, ValueError, "row must lie in [0, 7), got 7"),
    "rows-dtype": (
        {"row": _zeros(3, dtype=torch.int32)}, ValueError,
        "row must be an int or an int64 tensor (3,), got torch.int32 (3,)"),
    "rows-shape": (
        {"row": _zeros(2, dtype=torch.int64)}, ValueError,
        "row must be an int or an int64 tensor (3,), got torch.int64 (2,)"),
    "rows-range": (
        {"row": torch.tensor([0, 7, 1])}, ValueError, "row must lie in [0, 7), got [0, 7, 1]"),
    "uncond-none": ({"uncond": None}, ValueError, "uncond must be given, the row reads it"),
    "uncond-dtype": (
        {"uncond": _zeros(*IMAGE, dtype=torch.float16)}, TypeError,
        "uncond must be torch.float32, got torch.float16"),
    "guidance-nan": ({"guidance": float("nan")}, ValueError, "guidance must be finite in"),
    "guidance-type": ({"guidance": "2"}, TypeError, "guidance must be a number, got str"),
    "guidance-bool": ({"guidance": True}, TypeError, "guidance must be a number, got bool"),
    "guidance-shape": (
        {"guidance": _zeros(2)}, ValueError,
        "guidance must be a number or one a sample (3,), got (2,)"),
    "guidance-gradient": (
        {"guidance": _zeros(3).requires_grad_()}, ValueError,
        "guidance must not record gradients, got requires_grad"),
    "clip-gradient": (
        {"clip": _zeros(3).requires_grad_()}, ValueError,
        "clip must not record gradients, got requires_grad"),
    "clip-negative": ({"clip": -0.5}, ValueError, "clip must not be negative, got -0.5"),
    "clip-infinite": ({"clip": float("inf")}, ValueError, "clip must be finite in float32"),
    "clip-shape": (
        {"clip": _zeros(3, 1)}, ValueError, "clip must be a number or one a sample (3,)"),
    "variance-none": (
        {"variance": None}, ValueError, "variance must be given, its variance is learned"),
    "variance-shape": (
        {"variance": _zeros(3, 1, 4, 4)}, ValueError, "variance must have the shape of x"),
    "y-none": ({"y": None}, ValueError, "y must be given, the row uses the anchor state"),
    "y-dtype": (
        {"y": _zeros(*IMAGE, dtype=torch.float64)}, TypeError,
        "y must be torch.float32, got torch.float64"),
    "y-order": ({"y": OTHER_ORDER}, ValueError, "y must have the memory order of x, got strides"),
    "history-none": ({"history": None}, ValueError, "history must have 4 slots, got None"),
    "history-depth": (
        {"history": _zeros(3, *IMAGE)}, ValueError,
        "history must have shape (4, 3, 2, 4, 4), got (3, 3, 2, 4, 4)"),
    "history-shape": (
        {"history": _zeros(4, 3, 2, 16)}, ValueError, "history must have shape (4, 3, 2, 4, 4)"),
    "history-dtype": (
        {"history": _zeros(4, *IMAGE, dtype=torch.float16)}, TypeError,
        "history must be torch.float32 on cpu, got torch.float16 on cpu"),
    "seeds-none": (
        {"seeds": None}, ValueError, "seeds must be given, the row draws noise, got None"),
    "seeds-list": ({"seeds": [1, 2, 3]}, TypeError, "seeds must be an int64 tensor, got list"),
    "guidance-none": ({"guidance": None}, TypeError, "guidance must be a number, got NoneType"),
    "history-shared": (
        {"history": _zeros(*IMAGE).expand(4, *IMAGE)}, ValueError,
        "history must have slots of their own, got strides (0, "),
    "seeds-dtype": (
        {"seeds": _zeros(3, dtype=torch.int32)}, ValueError,
        "seeds must be an int64 tensor (3,), got torch.int32 (3,)"),
    "seeds-count": (
        {"seeds": _zeros(2, dtype=torch.int64)}, ValueError, "seeds must be an int64 tensor (3,)"),
    "out-shape": ({"out": _zeros(3, 2, 4, 5)}, ValueError, "out must have the shape of x"),
    "out-dtype": (
        {"out": _zeros(*IMAGE, dtype=torch.float64)}, TypeError,
        "out must be torch.float32, got torch.float64"),
    "out-order": ({"out": OTHER_ORDER}, ValueError, "out must have the memory order of x"),
    "model_input-shape": (
        {"model_input": _zeros(1)}, ValueError, "model_input must have the shape of x"),
    "model_input-order": (
        {"model_input": OTHER_ORDER}, ValueError, "model_input must have the memory order of x"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_leave_everything_as_it_was(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {**_arguments(), **change}
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error, match="^" + re.escape("reverse_step: " + message)):
        reverse_step(**arguments)
    for name, value in before.items():
        assert_same_bits(arguments[name].double(), value.double(), name)


def _overlapping(case: str) -> dict[str, Any]:
    arguments = _arguments()
    both = torch.zeros(2 * arguments["x"].numel())
    a, b = both[:96].view(IMAGE), both[4:100].view(IMAGE)
    if case == "out-x":
        return {**arguments, "x": a, "out": b}
    first, second = case.split("-")
    return {**arguments, first: a, second: b}


# every pair of which one is written; `out` may be `x` itself, which other tests use
@pytest.mark.parametrize("case", ["out-x", "y-out", "out-model_input", "y-model_input"])
def test_overlapping_memory_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"reverse_step: \w+ must not overlap \w+, got shared"):
        reverse_step(**_overlapping(case))


def test_gradients_are_kept_or_refused() -> None:
    """No kernel drops a gradient in silence: "auto" takes the reference, a forced kernel raises."""
    arguments = _arguments()
    for name in ("x", "output", "uncond"):
        arguments[name].requires_grad_()
    del arguments["out"], arguments["model_input"]
    # the ring and the anchor are buffers, written in place
    reverse_step(**arguments).sum().backward()
    assert all(arguments[name].grad is not None for name in ("x", "output", "uncond"))
    if unavailable("cpu") is None:
        with use_backend("cpu"), pytest.raises(BackendError, match="no backward pass"):
            reverse_step(**arguments)
        with use_backend("cpu"), torch.no_grad():
            reverse_step(**arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inside forward mode
def test_tangents_are_kept_or_refused() -> None:
    arguments = _arguments()
    for name in ("y", "history"):  # written in place
        arguments[name] = arguments[name].double()
    read = {n: arguments[n].double() for n in ("x", "output", "uncond", "variance")}
    ways = {name: torch.randn_like(t) for name, t in read.items()}
    for name in ("out", "model_input"):
        del arguments[name]

    def step(*tensors: torch.Tensor) -> torch.Tensor:
        buffers = {name: arguments[name].clone() for name in ("y", "history")}
        given = dict(zip(read, tensors, strict=True))
        return reverse_step(**{**arguments, **buffers, **given})

    _, twice_backward = torch.autograd.functional.jvp(
        step, tuple(read.values()), tuple(ways.values())
    )
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, ways[name]) for name, t in read.items()]
        tangent = forward_ad.unpack_dual(step(*duals)).tangent
        if unavailable("cpu") is None:
            dual = forward_ad.make_dual(torch.ones(3, 2, 4, 4), torch.ones(3, 2, 4, 4))
            with use_backend("cpu"), pytest.raises(BackendError, match="no backward pass or tan"):
                reverse_step(**{**_arguments(), "x": dual})
    assert tangent is not None
    assert_same_bits(tangent, twice_backward)


def test_inputs_are_not_written(isa: str) -> None:
    arguments = _arguments()
    read = ("x", "output", "uncond", "variance", "seeds")
    before = {k: arguments[k].clone() for k in read}
    with use_backend("cpu"):
        got = reverse_step(**arguments)
    assert got is arguments["out"]
    for name in read:
        assert torch.equal(arguments[name], before[name]), name
