"""Laws of tables, of `reverse_step` on their rows, and of the loop: see properties.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from properties import BATCHES, DTYPES, SEEDS, SIZES, VIEWS, assert_laws, lay, more, values
from tables import ROWS, Guard, needs_extension, random_inputs, random_table, walk

from fastdiff import Sampler, schedules, solvers, use_backend
from fastdiff.ops import reverse_step
from fastdiff.table import Row, StepTable, join

NAMES = st.sampled_from(sorted(solvers.SOLVERS))
ALONE = NAMES.filter(lambda name: "cfg_pp" not in name)  # those want an unconditional output too
# 1 to 1,000, where long tables are drawn seldom: they take a second
STEPS = st.one_of(st.integers(1, 40), st.sampled_from((1, 2, 999, 1000)))


@needs_extension
@more
@given(SEEDS, BATCHES, SIZES, st.integers(0, ROWS - 1), VIEWS, DTYPES, st.booleans(),
       st.sampled_from((None, 0.0, 1.0)))  # fmt: skip
def test_reverse_step(seed, n, size, row, view, dtype, edges, clip):
    rng = np.random.default_rng(seed)
    table = random_table(rng)
    shape = (n, size)
    given = {k: lay(values(rng, shape, edges).to(dtype), view) for k in ("output", "uncond", "v")}
    given["x"] = lay(values(rng, shape, edges), view)
    given |= {"y": values(rng, shape, edges), "seeds": random_inputs(rng, shape).seeds}
    given["history"] = values(rng, (n, table.depth, size), edges)  # the batch first, to be split

    def run(x, output, uncond, v, y, seeds, history):
        # what a step updates in place is written into copies, between sentinels
        guards = [Guard(tuple(x.shape)), Guard(tuple(x.shape)), Guard(tuple(x.shape), dtype=dtype)]
        out, anchor, model_input = guards
        anchor.tensor.copy_(y)
        ring = Guard((table.depth, *x.shape))
        ring.tensor.copy_(history.transpose(0, 1))
        reverse_step(
            x, output, table, row, uncond=uncond, guidance=1.5, clip=clip, variance=v,
            y=anchor.tensor, history=ring.tensor, seeds=seeds, out=out.tensor,
            model_input=model_input.tensor,
        )  # fmt: skip
        for guard in (*guards, ring):
            guard.check("outputs")
        return *(g.tensor for g in guards), ring.tensor.transpose(0, 1)

    assert_laws(run, given)
    with use_backend("reference"):
        expected = run(**given)
    for got, want in zip(run(**given), expected, strict=True):
        assert_same_bits(got, want)


@needs_extension
@more
@given(SEEDS, st.sampled_from((1, 2, 7)), SIZES.filter(bool), st.integers(-40, 1100))
def test_overlapping_memory_gives_the_right_bits_or_a_refusal(seed, n, size, shift):
    """`out` and `model_input` in the memory of the model's output, moved by any distance."""
    rng = np.random.default_rng(seed)
    table = random_table(rng)
    memory = torch.empty(n * size + 2200)
    where = 1100
    for target in ("out", "model_input", "y"):
        x, y = values(rng, (n, size), False), values(rng, (n, size), False)
        seeds = random_inputs(rng, (n, size)).seeds
        history = torch.zeros(table.depth, n, size)
        output = memory[where : where + n * size].view(n, size).copy_(values(rng, (n, size), False))
        how = {"uncond": output.clone(), "variance": output.clone(), "seeds": seeds}
        expected = {"out": torch.empty_like(x), "model_input": torch.empty_like(x), "y": y.clone()}
        reverse_step(x, output.clone(), table, 4, history=history.clone(), **how, **expected)
        written = memory[where + shift : where + shift + n * size].view(n, size)
        given = {"out": torch.empty_like(x), "model_input": torch.empty_like(x), "y": y.clone()}
        given[target] = written if target != "y" or abs(shift) < n * size else written.copy_(y)
        before = memory.clone()
        apart = abs(shift) >= n * size
        if apart or (shift == 0 and target != "y"):
            reverse_step(x, output, table, 4, history=history, **how, **given)
            for name, t in given.items():
                assert_same_bits(t, expected[name], name)
        else:
            rule = f"reverse_step: {target} must not overlap output"
            with pytest.raises(ValueError, match=rule):
                reverse_step(x, output, table, 4, history=history, **how, **given)
            assert_same_bits(memory, before)


@more
@given(NAMES, STEPS)
def test_every_solver_at_any_number_of_steps(name, steps):
    """Rows that float32 holds, ends that are reached, and the same table again."""
    built = None
    for schedule in (schedules.cosine(), schedules.edm(), schedules.flow()):
        try:
            built = solvers.build(name, schedule, steps, prediction="sample")
        except ValueError as error:
            assert ": " in str(error)  # the solver says why not
            continue
        again = solvers.build(name, schedule, steps, prediction="sample")
        assert built.floats.tobytes() == again.floats.tobytes()
        assert built.ints.tobytes() == again.ints.tobytes()
        for clip in (False, True):
            assert bool(built.packed(clip=clip).floats.isfinite().all())
        assert built.nfe >= 1 and len(built.times) == len(built.rows)
        whole, offsets = join((built, again))
        assert offsets == (0, len(built)) and len(whole) == 2 * len(built)
    if steps <= 40:
        assert built is not None


@more
@given(ALONE.filter(lambda name: not name.startswith(("er_sde", "flow_"))), st.integers(1, 12),
       st.sampled_from((2.0**-40, 2.0**-7, 2.0**7, 2.0**40)))  # fmt: skip
def test_scaling_of_the_edm_form(name, steps, factor):
    """With x = x0 + sigma*noise, data and all sigmas times a power of two give x times it.

    Nothing in a row knows a length, but for er_sde, whose noise scale is a function of sigma; the
    "flow_" solvers want another schedule.
    """
    one, scaled = (
        solvers.build(
            name, schedules.edm(0.002 * k, 80.0 * k, 0.5 * k), steps, prediction="sample",
            spacing="karras",
        )
        for k in (1.0, factor)
    )  # fmt: skip
    rng = np.random.default_rng(steps)
    x, target = values(rng, (2, 33), False), values(rng, (2, 33), False)
    ends = []
    for table, k in ((one, 1.0), (scaled, factor)):
        sampler = Sampler(lambda x, t, k=k: (target * k).to(x.dtype), table)
        ends.append(sampler(noise=x, seeds=[3, 4]))
    near = (ends[1].double() / factor - ends[0].double()).abs().max()
    top = 80.0 * float(x.abs().max()) + float(target.abs().max())
    # float32 coefficients of logarithms that differ in their last bits, added up over the rows
    assert float(near) <= len(one) * top * torch.finfo(torch.float32).eps


@more
@given(SEEDS, st.sampled_from((1, 2, 5)), SIZES.filter(bool), ALONE, st.integers(1, 9))
def test_loop(seed, n, size, name, steps):
    """The same pictures from a batch, its samples in another order, and its halves."""
    try:
        table = solvers.build(name, schedules.cosine(), steps, prediction="epsilon")
    except ValueError as error:
        assert ": " in str(error)
        return
    seeds = [int(s) for s in np.random.default_rng(seed).integers(0, 2**63, n)]
    sampler = Sampler(lambda x, t: 0.5 * x, table)

    def run(seeds):
        return (sampler((size,), seeds=seeds),)

    assert_laws(run, {"seeds": torch.tensor(seeds)})


@needs_extension
@more
@given(st.sampled_from((1e-30, 1e-6, 1.0, 1e6, 1e30)), SEEDS, st.booleans())
def test_huge_and_tiny_coefficients(scale, seed, clip):
    """Sigmas from 1e-30 to 1e30: overflow and underflow as in the reference, bit for bit."""
    rng = np.random.default_rng(seed)
    rows = [Row(x={"x": scale, "d": 1 / scale, "n1": scale}, convert=(1.0, -scale), time=scale,
                draws=((1, i),), c_in=1 / math.hypot(1, scale)) for i in range(ROWS)]  # fmt: skip
    table = StepTable("scales", tuple(rows), init_sigma=scale)
    inputs = random_inputs(rng, (2, 65), clip=scale if clip else None)
    got = walk(table, inputs)
    with use_backend("reference"):
        expected = walk(table, inputs)
    for name in ("x", "model_input"):
        assert_same_bits(got[name], expected[name], name)
