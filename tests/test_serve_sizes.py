"""Models whose bits depend on the batch: which sizes agree, and calls with those alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff.serve import FixedSizes, agreeing_sizes
from fastdiff.serve.sizes import _candidates, _work

SHAPE = (1, 4, 4)


def kernel_of(size: int, edges: tuple[int, ...]) -> int:
    """Which of several kernels a library chooses: another from each edge on."""
    return sum(size >= edge for edge in edges)


def chosen(*edges: int, split: tuple[int, ...] = ()) -> Callable[..., Tensor]:
    """A model of several kernels, each with other roundings; at sizes ``split``, two in a batch."""

    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        size = len(x)
        bits = torch.full((size, 1, 1, 1), float(kernel_of(size, edges)))
        if size in split:
            bits[size // 2 :] += 100
        told = t.view(-1, 1, 1, 1) * 2.0**-10 + label.view(-1, 1, 1, 1)
        return x * (1 + bits * 2.0**-20) + told

    return model


def found(model: Callable[..., Tensor], limit: int) -> tuple[int, ...]:
    return agreeing_sizes(model, limit, SHAPE, {"label": torch.tensor(-1)}, times=(0.0, 999.0))


@pytest.mark.parametrize(
    ("model", "limit", "sizes"),
    (
        # one kernel for all
        (chosen(), 8, (1, 2, 3, 4, 5, 6, 7, 8)),
        # single samples apart, as matrix-vector products are
        (chosen(2), 8, (2, 3, 4, 5, 6, 7, 8)),
        # float32 convolutions of the shipped model on one thread: at 16 another kernel, and not
        # worth having alone, since small batches would be filled up to it
        (chosen(2, 4, 16), 16, (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
        # on two threads: sizes at which a sample's bits depend on its place, the limit among them
        (chosen(4, split=(5, 6, 7, 16)), 16, (4, 8, 9, 10, 11, 12, 13, 14, 15)),
        # every size for itself: (2,) takes 3, 3, 6 and 6 for 1 to 4 samples, (4,) 5 each
        (chosen(*range(2, 9)), 4, (2,)),
        (chosen(), 1, (1,)),
    ),
)
def test_sizes_that_agree(model: Callable[..., Tensor], limit: int, sizes: tuple[int, ...]) -> None:
    got = found(model, limit)
    assert got == sizes
    # what was promised, of other samples at all places
    fixed = FixedSizes(model, got)
    x, t = fastdiff.randn(range(50, 50 + 3 * limit), SHAPE), torch.arange(3.0 * limit)
    label = torch.arange(3 * limit)
    single = [fixed(x[i : i + 1], t[i : i + 1], label=label[i : i + 1]) for i in range(3 * limit)]
    for n in range(1, 3 * limit + 1):
        assert_same_bits(fixed(x[-n:], t[-n:], label=label[-n:]), torch.cat(single[-n:]), f"{n}")


def test_a_model_that_does_not_repeat_is_refused() -> None:
    def random(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.rand_like(x)

    def broken(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x * torch.nan

    for model in (random, broken):
        with pytest.raises(ValueError, match="agreeing_sizes: model must repeat its output"):
            found(model, 4)


def test_calls_have_the_given_sizes_alone() -> None:
    calls: list[int] = []

    def counting(x: Tensor, t: Tensor, scale: float, label: Tensor | None = None) -> Tensor:
        assert len(t) == len(x) and (label is None or len(label) == len(x)) and scale == 3.0
        calls.append(len(x))
        return x * scale

    fixed = FixedSizes(counting, (8, 3))
    for n in range(20):
        calls.clear()
        x = fastdiff.randn(range(n), SHAPE)
        label = torch.arange(n) if n % 2 else None
        assert_same_bits(fixed(x, torch.zeros(n), scale=3.0, label=label), x * 3.0, f"{n}")
        assert set(calls) <= {3, 8} or n == 0
        assert len(calls) == max(1, -(-n // 8))
    assert _candidates(32)[:3] == [32, 30, 28] and _candidates(32)[-3:] == [4, 2, 1]
    # 1 to 3 in a call of 3, and 4 in two of 3 or one of 8: each call counts one more
    assert _work(4, (3,)) == 3 * 4 + 8 and _work(4, (3, 8)) == 3 * 4 + 9


def test_fixed_sizes_take_dtype_and_device_of_the_model() -> None:
    """`Sampler` finds them by its first parameter."""
    plain = torch.nn.Linear(2, 2).to(torch.bfloat16)
    assert next(FixedSizes(plain, (1,)).parameters()).dtype == torch.bfloat16
    assert list(FixedSizes(lambda x, t: x, (1,)).parameters()) == []


@pytest.mark.parametrize(
    ("model", "sizes", "kind", "message"),
    (
        (3, (1,), TypeError, "FixedSizes: model must be callable, got int"),
        (chosen(), (1.0,), TypeError, r"FixedSizes: sizes must be integers, got \(1.0,\)"),
        (chosen(), (0, 1), ValueError, r"FixedSizes: sizes must be at least 1, got \(0, 1\)"),
    ),
)
def test_fixed_sizes_refuses(model: Any, sizes: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FixedSizes(model, sizes)


def test_a_model_that_returns_other_samples_is_told() -> None:
    fixed = FixedSizes(lambda x, t: x[:1], (4,))
    with pytest.raises(ValueError, match=r"FixedSizes: model must return one entry a sample \(4\)"):
        fixed(torch.zeros(2, *SHAPE), torch.zeros(2))
