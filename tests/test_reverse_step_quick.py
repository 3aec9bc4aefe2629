"""The C++ checks of `reverse_step` take the calls of a sampling loop, and nothing that is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from solver_cases import home
from tables import LEARNED, ROWS, needs_extension, random_inputs, random_table

from fastdiff import solvers
from fastdiff.ops import _native, _step_cpu, reverse_step

pytestmark = needs_extension

SHAPE = (3, 2, 4, 4)
WRITTEN = ("out", "y", "history", "model_input")


def _ramp(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def _call(row: int = LEARNED, shape: tuple[int, ...] = SHAPE, **other: Any) -> dict[str, Any]:
    """Arguments that give the row everything it may need, so any one of them can be spoilt."""
    rng = np.random.default_rng(5)
    inputs, table = random_inputs(rng, shape), random_table(rng)
    return {
        "x": inputs.x, "output": inputs.outputs[0], "table": table, "row": row,
        "uncond": inputs.unconds[0], "guidance": 2.0, "clip": 1.0, "variance": inputs.variance,
        "y": torch.ones(shape), "history": _ramp(4, *shape), "seeds": inputs.seeds,
        "out": torch.zeros(shape), "model_input": torch.zeros(shape), **other,
    }  # fmt: skip


def _run(call: dict[str, Any]) -> dict[str, torch.Tensor] | Exception:
    """What the call wrote, or what it raised."""
    try:
        result = reverse_step(**call)
    except Exception as error:
        return error
    return {"result": result, **{k: call[k] for k in WRITTEN if call[k] is not None}}


def _spy(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    taken: list[bool] = []
    inner = _step_cpu.quick

    def quick(*args: Any) -> torch.Tensor | None:
        done = inner(*args)
        taken.append(done is not None)
        return done

    monkeypatch.setattr(_step_cpu, "quick", quick)
    return taken


def _assert_same(
    call: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, quickly: bool
) -> None:
    """The same bits or the same error as with the checks in Python, by the path that is told."""
    taken = _spy(monkeypatch)
    got = _run(call())
    assert any(taken) == quickly
    with monkeypatch.context() as patch:
        patch.setattr(_native, "reads_tensors", False)
        expected = _run(call())
    assert taken.count(True) == int(quickly)
    if isinstance(expected, Exception):
        assert not quickly
        assert (type(got), str(got)) == (type(expected), str(expected))
        return
    assert isinstance(got, dict), got
    for name in expected:
        assert_same_bits(got[name], expected[name], name)


@pytest.mark.parametrize("row", range(ROWS), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_takes_every_kind_of_row(
    row: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> dict[str, Any]:
        given = _call(row)
        model = ("output", "uncond", "variance")
        return {**given, **{k: given[k].to(dtype) for k in model},
                "model_input": torch.zeros(SHAPE, dtype=dtype)}  # fmt: skip

    _assert_same(call, monkeypatch, quickly=True)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_takes_the_rows_of_every_solver(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, prediction = home(name)
    table = solvers.build(name, schedule, 6, prediction=prediction)
    uncond = _ramp(*SHAPE) if any(need.uncond for need in table.needs) else None

    def call(row: int) -> Callable[[], dict[str, Any]]:
        return lambda: _call(row, table=table, uncond=uncond, guidance=1.0, variance=None,
                             clip=None if row % 2 else 1)  # fmt: skip

    for row in range(len(table)):
        _assert_same(call(row), monkeypatch, quickly=True)


def _last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


PLAIN: dict[str, Callable[[], dict[str, Any]]] = {
    "new-output": lambda: _call(out=None),
    "in-place": lambda: (lambda c: {**c, "out": c["x"]})(_call()),
    "no-model-input": lambda: _call(model_input=None),
    "integer-guidance": lambda: _call(guidance=3),
    "one-sample": lambda: _call(shape=(1, 2, 4, 4)),
    "one-pixel": lambda: _call(shape=(3, 5, 1, 1)),
    "vector": lambda: _call(shape=(4,)),
    "clip-0": lambda: _call(clip=0.0),
    "more-slots": lambda: _call(history=_ramp(6, *SHAPE)),
    "beside-each-other": lambda: (lambda both: {**_call(), "x": both[0], "out": both[1]})(
        torch.ones(2, *SHAPE)
    ),
}


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN)
def test_takes_plain_calls(
    call: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _assert_same(call, monkeypatch, quickly=True)


@pytest.mark.parametrize("row", range(ROWS), ids=str)
def test_takes_channels_last(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> dict[str, Any]:
        given = _call(row)
        images = ("x", "output", "uncond", "variance", "y", "out", "model_input")
        slots = _ramp(4, 3, 4, 4, 2).permute(0, 1, 4, 2, 3)
        return {**given, "history": slots, **{k: _last(given[k]) for k in images}}

    _assert_same(call, monkeypatch, quickly=True)


class Named(torch.Tensor):
    """A subclass, which may mean anything by its operators."""


def _overlap() -> dict[str, Any]:
    memory = torch.ones(4, 2, 4, 4)
    return {**_call(), "x": memory[:3], "out": memory[1:]}


# one argument spoilt a case: by the rules of the op wrong, or right but not plain
OTHER: dict[str, Callable[[], dict[str, Any]]] = {
    "x-list": lambda: _call(x=[1.0]),
    "x-float64": lambda: _call(x=torch.ones(SHAPE, dtype=torch.float64)),
    "x-scalar": lambda: _call(x=torch.tensor(1.0)),
    "x-strided": lambda: _call(x=torch.ones(3, 2, 4, 8)[..., ::2]),
    "x-other-order": lambda: _call(x=_last(torch.ones(SHAPE))),
    "x-meta": lambda: _call(x=torch.ones(SHAPE, device="meta")),
    "x-empty": lambda: _call(shape=(3, 0)),
    "x-subclass": lambda: _call(x=torch.ones(SHAPE).as_subclass(Named)),
    "x-wants-gradient": lambda: _call(x=torch.ones(SHAPE, requires_grad=True)),
    "output-wants-gradient": lambda: _call(output=torch.ones(SHAPE, requires_grad=True)),
    "output-none": lambda: _call(output=None),
    "output-shape": lambda: _call(output=torch.ones(3, 2, 4, 5)),
    "output-more-axes": lambda: _call(output=torch.ones(3, 2, 4, 4, 1)),
    "output-samples-apart": lambda: _call(output=torch.ones(3, 4, 4, 4)[:, :2]),
    "output-integer": lambda: _call(output=torch.ones(SHAPE, dtype=torch.int64)),
    "output-float64": lambda: _call(output=torch.ones(SHAPE, dtype=torch.float64)),
    "uncond-dtype": lambda: _call(uncond=torch.ones(SHAPE, dtype=torch.bfloat16)),
    "variance-none": lambda: _call(variance=None),
    "guidance-nan": lambda: _call(guidance=float("nan")),
    "guidance-bool": lambda: _call(guidance=True),
    "guidance-text": lambda: _call(guidance="2"),
    "guidance-beyond-float64": lambda: _call(guidance=10**400),
    "guidance-each": lambda: _call(guidance=torch.ones(3)),
    "scale-each": lambda: _call(scale=torch.tensor([1.0, 0.5, 2.0])),
    "clip-negative": lambda: _call(clip=-1.0),
    "clip-nan": lambda: _call(clip=float("nan")),
    "clip-each": lambda: _call(clip=torch.ones(3)),
    "y-none": lambda: _call(y=None),
    "history-none": lambda: _call(history=None),
    "history-short": lambda: _call(history=torch.ones(1, *SHAPE)),
    "history-shape": lambda: _call(history=torch.ones(4, 3, 2, 4, 5)),
    "history-order": lambda: _call(history=_last(_ramp(4 * 3, 2, 4, 4)).view(4, *SHAPE)),
    "history-expanded": lambda: _call(history=_ramp(1, *SHAPE).expand(4, *SHAPE)),
    "history-dtype": lambda: _call(history=torch.ones(4, *SHAPE, dtype=torch.float64)),
    "seeds-none": lambda: _call(seeds=None),
    "seeds-int32": lambda: _call(seeds=torch.ones(3, dtype=torch.int32)),
    "seeds-few": lambda: _call(seeds=torch.ones(2, dtype=torch.int64)),
    "seeds-strided": lambda: _call(seeds=torch.arange(6)[::2]),
    "seeds-list": lambda: _call(seeds=[1, 2, 3]),
    "row-above": lambda: _call(row=99),
    "row-below": lambda: _call(row=-1),
    "row-bool": lambda: _call(row=True),
    "row-each": lambda: _call(row=torch.tensor([0, 1, 2])),
    "out-shape": lambda: _call(out=torch.ones(3, 2, 4, 5)),
    "out-order": lambda: _call(out=_last(torch.ones(SHAPE))),
    "out-overlaps": _overlap,
    "y-overlaps": lambda: (lambda c: {**c, "y": c["x"]})(_call()),
    "model-input-overlaps": lambda: (lambda c: {**c, "model_input": c["out"]})(_call()),
    "history-overlaps": lambda: (lambda c: {**c, "out": c["history"][1]})(_call()),
    "model-input-integer": lambda: _call(model_input=torch.ones(SHAPE, dtype=torch.int32)),
}  # fmt: skip


@pytest.mark.parametrize("call", OTHER.values(), ids=OTHER)
def test_leaves_the_rest_to_the_checks(
    call: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _assert_same(call, monkeypatch, quickly=False)
