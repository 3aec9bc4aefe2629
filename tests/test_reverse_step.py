"""`reverse_step`: the bits of the reference on every instruction set, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from tables import LEARNED, ROWS, Guard, Inputs, needs_extension, random_inputs, random_table, walk

from fastdiff import use_backend
from fastdiff.backends import unavailable
from fastdiff.ops import reverse_step
from fastdiff.table import Row, StepTable

CHANNELS_LAST = torch.channels_last
CHANNELS_LAST_3D = torch.channels_last_3d
Results = dict[str, torch.Tensor]


def _both(table: StepTable, inputs: Inputs, **how: Any) -> tuple[Results, Results]:
    with use_backend("cpu"):
        got = walk(table, inputs, **how)
    with use_backend("reference"):
        return got, walk(table, inputs, **how)


def _assert_equal(got: Results, expected: Results) -> None:
    for name in expected:
        assert_same_bits(got[name], expected[name], name)


# no clip and a clip differ in the folding of d; per-sample values reach other code; -1 is no clip
SETTINGS = {
    "plain": (1.0, None),
    "guided-clipped": (2.5, 1.5),
    "per-sample": (torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0.5, -1.0, 2.0])),
}
# 1 to 3 elements; below, at and above one chunk of 1,024; primes, so that no chunk ends on a pixel
SHAPES = {
    "one": (3, 1),
    "three": (3, 3),
    "1023": (3, 1023),
    "1024": (3, 1024),
    "1025": (3, 1025),
    "2049": (3, 2049),
    "image": (3, 5, 19, 23),
    "video": (3, 3, 5, 7, 11),
    "empty-batch": (0, 3, 4, 4),
    "empty-sample": (3, 0),
}


@pytest.mark.parametrize(("guidance", "clip"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_bits_of_the_reference(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], guidance: Any, clip: Any
) -> None:
    """Guards in `walk` poison every output with NaN and watch for writes beyond it."""
    if shape[0] == 0 and isinstance(clip, torch.Tensor):
        guidance, clip = guidance[:0], clip[:0]
    rng = np.random.default_rng(len(shape) + shape[-1])
    inputs = random_inputs(rng, shape, dtype, guidance=guidance, clip=clip)
    _assert_equal(*_both(random_table(rng), inputs))


# a prime number of channels; more channels than a chunk has elements; one pixel; many channels
LAST = {
    "prime": (3, 7, 13, 11),
    "wide": (3, 1500, 1, 2),
    "pixel": (3, 6, 1, 1),
    "latent": (3, 64, 8, 9),
    "video": (3, 5, 3, 7, 9),
}


@pytest.mark.parametrize("in_place", (False, True), ids=("out", "in-place"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", LAST.values(), ids=LAST)
def test_channels_last_gives_the_same_values(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, in_place: bool
) -> None:
    fmt = CHANNELS_LAST if len(shape) == 4 else CHANNELS_LAST_3D
    table = random_table(np.random.default_rng(1))
    settings = {"guidance": 2.5, "clip": 1.5}
    last = random_inputs(np.random.default_rng(2), shape, dtype, fmt, **settings)
    plain = random_inputs(np.random.default_rng(2), shape, dtype, **settings)
    got, expected = _both(table, last, in_place=in_place)
    _assert_equal(got, expected)
    with use_backend("cpu"):
        _assert_equal(got, walk(table, plain, in_place=in_place))


# many small random cases find what the lists above do not name
@pytest.mark.parametrize("seed", range(12))
def test_random_tables(isa: str, seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    shape = (3, *(int(n) for n in rng.integers(1, (20, 40, 33))))
    fmt = CHANNELS_LAST if seed % 2 else torch.contiguous_format
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    guidance, clip = list(SETTINGS.values())[seed % 3]
    inputs = random_inputs(rng, shape, dtype, fmt, guidance, clip)
    _assert_equal(*_both(random_table(rng), inputs, in_place=seed % 4 == 1))


@needs_extension
def test_two_threads_give_the_bits_of_one() -> None:
    rng = np.random.default_rng(3)
    table, inputs = random_table(rng), random_inputs(rng, (2, 3, 97, 101), clip=1.0)
    with use_backend("cpu"):
        torch.set_num_threads(1)
        one = walk(table, inputs)
        torch.set_num_threads(2)
        _assert_equal(walk(table, inputs), one)


def test_order_and_size_of_the_batch_do_not_change_a_sample(isa: str) -> None:
    rng = np.random.default_rng(4)
    guidance = torch.tensor([1.0, 2.0, 0.0, 7.5, 3.0])
    clip = torch.tensor([1.0, 0.5, -1.0, 2.0, 1.0])
    table = random_table(rng)
    inputs = random_inputs(rng, (5, 3, 17, 19), guidance=guidance, clip=clip)
    order = torch.tensor([3, 0, 4, 1, 2])
    with use_backend("cpu"):
        whole = walk(table, inputs)
        permuted = walk(table, inputs.take(order))
        for i in range(5):
            alone = walk(table, inputs.take(torch.tensor([i])))
            for name, batch in (("x", 0), ("y", 0), ("model_input", 0), ("history", 1)):
                part = whole[name].narrow(batch, i, 1)
                assert_same_bits(alone[name], part, f"{name} of {i}")
    for name in ("x", "y", "model_input"):
        assert_same_bits(permuted[name], whole[name][order], name)
    assert_same_bits(permuted["history"], whole["history"][:, order], "history")


def test_guidance_weight_one_is_the_conditional_output(isa: str) -> None:
    """Bit for bit, even where the unconditional output is not finite."""
    table = StepTable("t", (Row(x={"x": 0.5, "m": -1.25}, time=0.0),))
    rng = np.random.default_rng(5)
    inputs = random_inputs(rng, (2, 1000))
    x, output = inputs.x, inputs.outputs[0]
    uncond = torch.full_like(output, float("nan"))
    with use_backend("cpu"):
        alone = reverse_step(x, output, table, 0)
        assert_same_bits(reverse_step(x, output, table, 0, uncond=uncond, guidance=1.0), alone)
        mixed = torch.tensor([1.0, 0.0])
        both = reverse_step(x, output, table, 0, uncond=inputs.unconds[0], guidance=mixed)
        assert_same_bits(both[:1], alone[:1], "weight 1")
        unguided = reverse_step(x[1:], inputs.unconds[0][1:], table, 0)
        # weight 0: u + 0*(c - u) is u
        assert_same_bits(both[1:], unguided, "weight 0")


@pytest.mark.parametrize("clip", (None, 1.5), ids=("no-clip", "clip"))
def test_rows_of_their_own(isa: str, clip: float | None) -> None:
    """Samples at different rows in one call: each as if it were alone."""
    rng = np.random.default_rng(6)
    table, shape = random_table(rng), (ROWS, 4, 9, 11)
    inputs = random_inputs(rng, shape, clip=clip)
    y0 = torch.from_numpy(rng.standard_normal(shape)).float()
    h0 = torch.from_numpy(rng.standard_normal((4, *shape))).float()
    rows = torch.tensor([5, 3, 0, 6, 2, 4, 1])

    def step(part: slice, row: Any) -> Results:
        y, h = y0[part].clone(), h0[:, part].clone()
        model_input = torch.full_like(y, float("nan"))
        evaluates = not isinstance(row, int) or table.rows[row].evaluates
        x = reverse_step(
            inputs.x[part],
            inputs.outputs[0][part] if evaluates else None,
            table,
            row,
            uncond=inputs.unconds[0][part],
            guidance=2.5,
            clip=clip,
            variance=inputs.variance[part],
            y=y,
            history=h,
            seeds=inputs.seeds[part],
            model_input=model_input,
        )
        return {"x": x, "y": y, "history": h, "model_input": model_input}

    with use_backend("cpu"):
        got = step(slice(None), rows)
        for i, row in enumerate(rows.tolist()):
            alone = step(slice(i, i + 1), row)
            part = {k: v[:, i : i + 1] if k == "history" else v[i : i + 1] for k, v in got.items()}
            _assert_equal(part, alone)
    with use_backend("reference"):
        _assert_equal(got, step(slice(None), rows))


def _simple() -> StepTable:
    """State, output, history and noise: enough to see a wrong stride."""
    first = Row(x={"x": 1.0}, time=1.0, push=True)
    second = Row(
        x={"x": 0.5, "d": -1.5, "h0": 0.25, "n1": 0.1}, time=0.0, push=True, draws=((1, 4),)
    )
    return StepTable("simple", (first, second, second))


# what a slice, a transpose, a broadcast and a channel split of the model output look like
STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every-other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "split": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "split-last": lambda t: torch.cat([t, t + 1], 1)
    .contiguous(memory_format=CHANNELS_LAST)[:, : t.shape[1]],
    "split-offset": lambda t: torch.cat([t + 1, t], 1)[:, t.shape[1] :],
    "channels-last": lambda t: t.contiguous(memory_format=CHANNELS_LAST),
    "one-sample-for-all": lambda t: t[:1].expand_as(t),
}  # fmt: skip


@pytest.mark.parametrize("change", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_inputs_of_any_strides(
    isa: str, dtype: torch.dtype, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    rng = np.random.default_rng(7)
    inputs, table = random_inputs(rng, (3, 4, 10, 6), dtype), _simple()
    past = torch.from_numpy(rng.standard_normal((1, 3, 4, 10, 6))).float()

    def step(x: torch.Tensor, output: torch.Tensor, uncond: torch.Tensor) -> Results:
        h = past.clone()
        out = reverse_step(
            x, output, table, 1, uncond=uncond, guidance=3.0, history=h, seeds=inputs.seeds
        )
        return {"x": out, "history": h}

    with use_backend("cpu"):
        output, uncond = change(inputs.outputs[0]), change(inputs.unconds[0])
        expected = step(inputs.x, output.contiguous(), uncond.contiguous())
        _assert_equal(step(inputs.x, output, uncond), expected)
        x = change(inputs.x)
        if x.is_contiguous(memory_format=CHANNELS_LAST):  # the history must then be so too
            past = past[0].contiguous(memory_format=CHANNELS_LAST)[None]
        got = step(x, output, uncond)
        past = past.contiguous()
        _assert_equal(got, step(x.contiguous(), output, uncond))


def test_learned_variance_reads_both_halves_of_the_output(isa: str) -> None:
    """(N, 2C, H, W) split into views: the sample stride is not the sample size."""
    rng = np.random.default_rng(8)
    table = random_table(rng)
    inputs = random_inputs(rng, (3, 4, 9, 7))
    both = torch.cat([inputs.outputs[LEARNED], inputs.variance], 1)
    output, variance = both.chunk(2, 1)
    assert not output.is_contiguous()
    y, h = torch.ones_like(inputs.x), torch.ones(4, *inputs.x.shape)

    def step(o: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reverse_step(
            inputs.x, o, table, LEARNED, uncond=inputs.unconds[0], guidance=2.0, variance=v,
            y=y.clone(), history=h.clone(), seeds=inputs.seeds,
        )  # fmt: skip

    with use_backend("cpu"):
        got = step(output, variance)
        assert_same_bits(got, step(output.contiguous(), variance.contiguous()))
    with use_backend("reference"):
        assert_same_bits(got, step(output, variance))


def test_strided_seeds_and_deep_history(isa: str) -> None:
    """Seeds that are a view, and a history with more slots than a table can name."""
    rng = np.random.default_rng(9)
    inputs, table = random_inputs(rng, (3, 50)), _simple()
    seeds = torch.stack([inputs.seeds, inputs.seeds + 1], 1).flatten()[::2]
    slots = torch.ones(9, 3, 50)
    with use_backend("cpu"):
        got = reverse_step(inputs.x, inputs.outputs[0], table, 1, history=slots, seeds=seeds)
        expected = reverse_step(
            inputs.x, inputs.outputs[0], table, 1, history=torch.ones(1, 3, 50), seeds=inputs.seeds
        )
    assert_same_bits(got, expected)
    assert bool((slots[1:] == 1).all())


def test_absent_terms_are_not_read(isa: str) -> None:
    """A row without a term works where the term's tensor is missing or holds NaN."""
    table = StepTable(
        "t",
        (
            Row(x={"n1": 1.0}, evaluates=False, draws=((1, 0),)),
            Row(x={"x": 2.0, "d": 0.0, "m": 0.0}, time=0.0, convert=(1.0, 1.0)),
        ),
    )
    nan, out = torch.full((2, 70), float("nan")), Guard((2, 70))
    with use_backend("cpu"):
        got = reverse_step(nan, None, table, 0, seeds=torch.arange(2), out=out.tensor)
        assert bool(got.isfinite().all())
        got = reverse_step(torch.ones(2, 70), nan, table, 1, out=out.tensor)
    assert bool((got == 2).all())
    out.check("out")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_clipped_and_unclipped_samples_share_a_batch(backend: str) -> None:
    """Each keeps the bits that it has alone: a bound for all, none for all, and mixed."""
    if unavailable(backend):
        pytest.skip(f"backend {backend}: {unavailable(backend)}")
    rng = np.random.default_rng(3)
    row = Row(x={"x": 0.9, "d": 0.3}, time=1.0, convert=(0.7, -1.3))
    table = StepTable("ddim", (row,))
    x, output = (torch.from_numpy(rng.normal(size=(3, 500)).astype(np.float32)) for _ in "xo")
    bounds = torch.tensor([0.5, -1.0, 2.0])
    with use_backend(backend):
        mixed = reverse_step(x, output, table, 0, clip=bounds)
        for i, bound in enumerate(bounds.tolist()):
            alone = reverse_step(
                x[i : i + 1], output[i : i + 1], table, 0, clip=None if bound < 0 else bound
            )
            assert_same_bits(mixed[i : i + 1], alone)
