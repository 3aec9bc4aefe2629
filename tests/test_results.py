"""Memory that results of ops take is used again, and never while somebody can read it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import needs_extension
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastdiff
from fastdiff import ops
from fastdiff.ops import _results
from fastdiff.ops._results import _MOST, _SMALLEST, RESULTS, Results

SHAPE = (2, 4, 80, 80)
X = fastdiff.randn(range(2), SHAPE[1:])
assert X.nbytes >= _SMALLEST


@pytest.mark.parametrize("first", (True, False), ids=("inference first", "inference last"))
def test_results_can_be_written_to_outside_of_inference_mode(first: bool) -> None:
    results = Results()
    for inside in (first, not first):
        with torch.inference_mode(inside):
            x = results.empty_like(X)
            x.zero_()
        del x
    x = results.empty_like(X)
    assert not x.is_inference()
    x.add_(1)


def test_what_is_dropped_is_taken_again() -> None:
    results = Results()
    at = results.empty_like(X).data_ptr()
    assert results.empty_like(X).data_ptr() == at
    assert results.new_empty(X, SHAPE).data_ptr() == at
    last = results.empty_like(X.to(memory_format=torch.channels_last))
    assert last.data_ptr() != at and last.is_contiguous(memory_format=torch.channels_last)


def test_more_than_four_of_a_layout_are_held_by_who_took_them() -> None:
    results = Results()
    taken = [results.empty_like(X).fill_(i) for i in range(_MOST + 2)]
    assert len({t.data_ptr() for t in taken}) == len(taken)
    del taken[-1]
    results.empty_like(X).fill_(9)
    assert [float(t[-1, -1, -1, -1]) for t in taken] == [0, 1, 2, 3, 4]
    assert len(results._blocks) == 1 and len(next(iter(results._blocks.values()))) == _MOST


def test_no_more_memory_is_kept_than_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_results, "_BYTES", 3 * X.nbytes + 100)
    results = Results()
    held = []
    for n in range(60, 81):
        for _ in range(3):
            held.append(results.new_empty(X, (2, 4, 80, n)).fill_(n))
            kept = [b.whole.nbytes for blocks in results._blocks.values() for b in blocks]
            assert results._bytes == sum(kept) <= _results._BYTES
    assert all(float(t.min()) == float(t.max()) == t.shape[-1] for t in held)
    results.new_empty(X, (4, 4, 80, 80, 2))  # larger than all that may be kept
    assert results._bytes <= 3 * X.nbytes


@pytest.mark.parametrize(
    "x",
    (X[:1, :1, :40], X[:, :, ::2], X[:1].expand(4, -1, -1, -1), X.double()[:, :, :, 1:]),
    ids=("small", "strided", "expanded", "a window"),
)
def test_other_layouts_are_as_torch_makes_them(x: Tensor) -> None:
    got = RESULTS.empty_like(x)
    want = torch.empty_like(x)
    assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_memory_that_was_moved_is_not_taken_again() -> None:
    results = Results()
    taken = results.empty_like(X)
    at = taken.data_ptr()
    again: Any = taken.share_memory_()
    moved = again.data_ptr()
    assert moved != at
    del taken, again
    assert results.empty_like(X).data_ptr() != moved


def test_memory_that_was_given_up_is_not_taken_again() -> None:
    results = Results()
    taken = results.empty_like(X)
    taken.untyped_storage().resize_(0)  # as sharded training does
    del taken
    assert results.empty_like(X).fill_(1).sum() == X.numel()


def test_tracing_gets_no_memory() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
        assert type(RESULTS.empty_like(fake)) is type(fake)
        assert type(RESULTS.new_empty(fake, SHAPE)) is type(fake)


def test_threads_get_memory_of_their_own() -> None:
    results, wrong = Results(), []
    start = threading.Barrier(4)

    def work(me: int) -> None:
        start.wait()
        for _ in range(300):
            mine = results.empty_like(X).fill_(me)
            if float(mine.min()) != me or float(mine.max()) != me:
                wrong.append(me)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_wait_for_the_parent_s_threads() -> None:
    with RESULTS._lock:  # as another thread would at that moment
        child = os.fork()
        if child == 0:  # pragma: no cover
            RESULTS.empty_like(X)
            os._exit(0)
        for _ in range(200):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            threading.Event().wait(0.05)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child waits for the lock of a thread that it does not have")
    assert status == 0


TABLE = fastdiff.solvers.build("ddim", fastdiff.schedules.cosine(), 4)
WIDE = fastdiff.randn(range(2), (32, 24, 24))
BIG: dict[str, Callable[[], Any]] = {
    "randn": lambda: fastdiff.randn(range(2), SHAPE[1:]),
    "add_noise": lambda: ops.add_noise(X, 0, 0.8, 0.6),
    "add_noise, strided": lambda: ops.add_noise(X.transpose(2, 3), 0, 0.8, 0.6),
    "reparameterize": lambda: ops.reparameterize(X, X, 0)[0],
    "reparameterize, two samples": lambda: ops.reparameterize(X, X, 0, samples=2)[0],
    "reverse_step": lambda: ops.reverse_step(X, X, TABLE, 0),
    "brownian": lambda: ops.brownian(range(2), SHAPE[1:], 0.2, 0.7),
    "dynamic_threshold": lambda: ops.dynamic_threshold(X),
    "film_norm": lambda: ops.film_norm(WIDE, 4),
    "modulate": lambda: ops.modulate(WIDE.flatten(2), norm="layer"),
    "gated_residual": lambda: ops.gated_residual(X[0], X[1], X[0, :, 0]),
}


def _tensors(got: Any) -> list[Tensor]:
    return [t for t in (got if isinstance(got, tuple) else (got,)) if t.nbytes >= _SMALLEST]


@needs_extension
@pytest.mark.parametrize("name", BIG)
def test_ops_take_what_was_dropped_and_nothing_that_is_held(name: str) -> None:
    run = BIG[name]
    first = {t.data_ptr() for t in _tensors(run())}
    held = _tensors(run())
    assert {t.data_ptr() for t in held} == first
    copies = [t.clone() for t in held]
    for _ in range(_MOST + 1):
        other = _tensors(run())
        for t in other:
            assert t.data_ptr() not in first
            t.fill_(7)
    assert all(torch.equal(t, c) for t, c in zip(held, copies, strict=True))


@needs_extension
def test_what_autograd_keeps_is_held() -> None:
    x = X.clone().requires_grad_()
    y = ops.film_norm(x, 2, act="silu")
    kept = y.detach().clone()
    z = y.square()  # which keeps y for its gradient
    del y
    for _ in range(_MOST + 1):
        ops.film_norm(X, 2).fill_(7)
    (got,) = torch.autograd.grad(z.sum(), x)
    again = X.clone().requires_grad_()
    (want,) = torch.autograd.grad((ops.film_norm(again, 2, act="silu") * (2 * kept)).sum(), again)
    assert torch.equal(got, want)
