"""Ops that no dispatcher sees refuse tensors without memory, and keep nothing of a tracer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastdiff
from fastdiff import ops, schedules, solvers
from fastdiff.ops import _results

SHAPE = (2, 3, 4, 4)


def table() -> fastdiff.StepTable:
    """With nothing packed yet."""
    return solvers.build("ddim", schedules.linear(), 4, eta=1.0)


def step(x: Tensor, rows: fastdiff.StepTable | None = None, **change: Any) -> Tensor:
    given = {"x": x, "output": x, "seeds": ops.as_seeds([1, 2]), **change}
    return ops.reverse_step(table=rows or table(), row=0, **given)


PLAIN = torch.ones(SHAPE)
CASES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "reverse_step": ("x", step),
    "reverse_step, output": ("output", lambda t: step(PLAIN, output=t)),
    "reverse_step, uncond": ("uncond", lambda t: step(PLAIN, uncond=t, guidance=2.0)),
    "reverse_step, out": ("out", lambda t: step(PLAIN, out=t)),
    "guidance_rescale": ("output", lambda t: ops.guidance_rescale(t, t, 2.0, 0.5)),
    "dynamic_threshold": ("x", ops.dynamic_threshold),
    "dynamic_threshold, out": ("out", lambda t: ops.dynamic_threshold(PLAIN, out=t)),
    "brownian": ("add_to", lambda t: ops.brownian([1, 2], SHAPE[1:], 0.1, 0.9, add_to=t)),
    "randn": ("out", lambda t: fastdiff.randn([1, 2], SHAPE[1:], out=t)),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_of_tensors_are_refused(name: str) -> None:
    argument, call = CASES[name]
    with pytest.raises(TypeError, match=rf"\w+: {argument} must have memory of its own, got TwoT"):
        call(TwoTensor(PLAIN.clone(), PLAIN.clone()))


@pytest.mark.parametrize("name", CASES)
def test_tracers_are_refused(name: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(PLAIN)
        with pytest.raises(
            TypeError, match=r"\w+: \w+ must have memory of its own, got FakeTensor"
        ):
            CASES[name][1](fake)


def test_subclasses_with_memory_are_taken() -> None:
    class Image(torch.Tensor):
        pass

    x = fastdiff.randn([1, 2], SHAPE[1:])
    assert_same_bits(step(x.as_subclass(Image)).as_subclass(torch.Tensor), step(x))


def test_nothing_of_a_tracer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    results = _results.Results()  # without memory from before
    monkeypatch.setattr(_results, "RESULTS", results)
    x, rows = fastdiff.randn([1, 2], (3, 96, 96)), table()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(TypeError, match="must have memory of its own"):
            step(mode.from_tensor(x), rows, clip=torch.ones(2))
        rows.packed(), rows.packed(clip=True), rows.packed_each()
        results.empty_like(x)
    assert type(results.empty_like(x)) is Tensor
    assert_same_bits(step(x, rows), step(x))
    assert all(type(t) is Tensor for packed in rows._packed.values() for t in packed)
