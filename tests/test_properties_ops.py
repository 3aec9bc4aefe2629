"""Laws of every op on random shapes, strides, dtypes and values: see properties.py."""

from __future__ import annotations

import numpy as np
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from properties import BATCHES, DTYPES, SEEDS, SIZES, VIEWS, assert_laws, lay, more, values
from tables import Guard, needs_extension

from fastdiff import ops, use_backend
from fastdiff.ops import (
    add_noise,
    brownian,
    dynamic_threshold,
    film,
    film_conv2d,
    film_norm,
    gated_residual,
    guidance_rescale,
    modulate,
    quantile_abs,
    randn,
    reparameterize,
)

pytestmark = needs_extension

COUNTERS = st.sampled_from((0, 1, 2**31 - 1, 2**32 - 1))


def seeds_of(rng, count):
    """64-bit seeds, the ends of their range among them."""
    found = rng.integers(0, 2**64, count, dtype=np.uint64)
    found[:2] = (0, 2**64 - 1)[: len(found[:2])]
    return ops.as_seeds([int(s) for s in found])


def test_every_op_has_its_laws_here() -> None:
    """Registered ops, and those that are made of others, by the names that are called below."""
    known = {"add_noise", "brownian", "dynamic_threshold", "film_norm", "guidance_rescale"}
    known |= {"modulate", "noise", "reparameterize", "reverse_step"}
    assert set(ops.OPS) == known and set(ops.COMPOSED) == {"film_conv2d"}


@more
@given(SEEDS, BATCHES, SIZES, DTYPES, COUNTERS, COUNTERS)
def test_randn(seed, n, size, dtype, step, stream):
    seeds = seeds_of(np.random.default_rng(seed), n)

    def run(seeds):
        guard = Guard((len(seeds), size), dtype=dtype)
        randn(seeds, (size,), step=step, stream=stream, out=guard.tensor)
        guard.check("out")
        return (guard.tensor,)

    assert_laws(run, {"seeds": seeds})
    with use_backend("reference"):
        expected = randn(seeds, (size,), step=step, stream=stream, dtype=dtype)
    assert_same_bits(run(seeds)[0], expected)


@more
@given(SEEDS, BATCHES, SIZES, VIEWS, st.booleans(), st.floats(0, 1), st.floats(-1e30, 1e30))
def test_brownian(seed, n, size, view, edges, t, scale):
    rng = np.random.default_rng(seed)
    given = {"seeds": seeds_of(rng, n), "x": lay(values(rng, (n, size), edges), view)}
    t0, t1 = (0.0, t) if t > 2**-20 else (0.5, 1.0)

    def run(seeds, x, out=None):
        return (brownian(seeds, (size,), t0, t1, add_to=x, scale=scale, out=out),)

    assert_laws(run, given)
    guard = Guard((n, size))
    run(**given, out=guard.tensor)
    guard.check("out")
    with use_backend("reference"):
        assert_same_bits(guard.tensor, run(**given)[0])


@more
@given(SEEDS, BATCHES, SIZES, VIEWS, DTYPES, st.booleans(), st.sampled_from(
    ("epsilon", "v_prediction", "flow", "sample")))  # fmt: skip
def test_add_noise(seed, n, size, view, dtype, edges, target):
    rng = np.random.default_rng(seed)
    given = {
        "x0": lay(values(rng, (n, size), edges).to(dtype), view), "seeds": seeds_of(rng, n),
        "alpha": values(rng, (n,), False), "sigma": 10 ** values(rng, (n,), False).clamp(-30, 30),
    }  # fmt: skip

    def run(x0, seeds, alpha, sigma):
        return add_noise(x0, seeds, alpha, sigma, target=target)

    assert_laws(run, given)
    with use_backend("reference"):
        expected = run(**given)
    for got, want in zip(run(**given), expected, strict=True):
        assert_same_bits(got, want)


@more
@given(SEEDS, BATCHES, SIZES, VIEWS, DTYPES, st.booleans(), st.sampled_from((None, 1, 3)))
def test_reparameterize(seed, n, size, view, dtype, edges, samples):
    rng = np.random.default_rng(seed)
    mu, logvar = (lay(values(rng, (n, size), edges).to(dtype), view) for _ in range(2))
    given = {"mu": mu, "logvar": logvar, "seeds": seeds_of(rng, n)}

    def run(mu, logvar, seeds):
        return reparameterize(mu, logvar, seeds, samples=samples)

    assert_laws(run, given)
    with use_backend("reference"):
        assert_same_bits(run(**given)[0], reparameterize(**given, samples=samples)[0])


@more
@given(SEEDS, BATCHES, SIZES.filter(bool), VIEWS, st.booleans(), st.floats(0, 1))
def test_dynamic_threshold(seed, n, size, view, edges, ratio):
    x = lay(values(np.random.default_rng(seed), (n, size), edges), view)

    def run(x):
        guard = Guard(tuple(x.shape))
        out, s = dynamic_threshold(x, ratio, out=guard.tensor)
        guard.check("out")
        return out, s, quantile_abs(x, ratio)

    assert_laws(run, {"x": x})
    with use_backend("reference"):
        expected = run(x)
    for got, want in zip(run(x), expected, strict=True):
        assert_same_bits(got, want)


@more
@given(SEEDS, BATCHES, SIZES, VIEWS, DTYPES, st.booleans())
def test_guidance_rescale(seed, n, size, view, dtype, edges):
    rng = np.random.default_rng(seed)
    names = ("output", "uncond")
    given = {k: lay(values(rng, (n, size), edges).to(dtype), view) for k in names}
    given |= {k: values(rng, (n,), False) for k in ("guidance", "phi")}

    def run(output, uncond, guidance, phi):
        return (guidance_rescale(output, uncond, guidance, phi),)

    assert_laws(run, given)


def modulated(rng, n, c, dtype, edges):
    """scale and shift of a batch."""
    return {k: values(rng, (n, c), edges).to(dtype) for k in ("scale", "shift")}


@more
@given(SEEDS, BATCHES, st.sampled_from((1, 3, 8, 17)), SIZES, VIEWS, DTYPES, st.booleans(),
       st.booleans())  # fmt: skip
def test_film_norm(seed, n, c, size, view, dtype, edges, silu):
    rng = np.random.default_rng(seed)
    each = {k: lay(values(rng, (n, c, size), edges).to(dtype), view) for k in ("x", "residual")}
    each |= modulated(rng, n, c, dtype, edges)
    shared = {k: values(rng, (c,), False) for k in ("weight", "bias")}
    act = "silu" if silu else None

    def run(x, residual, scale, shift, weight, bias):
        normed = film_norm(x, c, weight, bias, scale, shift, act, residual)
        return normed, film(x, scale, shift, act=act, residual=residual)

    assert_laws(run, each, shared)
    if edges or not each["x"].numel():
        return
    assert_near_reference(run, each, shared)


def assert_near_reference(run, each, shared):
    """Every result within the budget, in units of the largest term that was added."""
    with use_backend("reference"):
        plain = run(**each, **shared)
        exact = run(**{k: t.double() for k, t in (each | shared).items()})
    top = max((float(t.abs().amax()) for t in each.values() if t.numel()), default=0.0)
    for got, reference, wide in zip(run(**each, **shared), plain, exact, strict=True):
        # a sum whose terms may cancel, and the product before it
        assert_within_budget(got, reference, wide, 4, at=wide.abs() + top + top * top)


@more
@given(SEEDS, BATCHES, st.sampled_from((1, 2, 5)), SIZES.filter(bool), VIEWS, DTYPES,
       st.booleans(), st.sampled_from((None, "layer", "rms")))  # fmt: skip
def test_modulate(seed, n, tokens, c, view, dtype, edges, norm):
    rng = np.random.default_rng(seed)
    names = ("x", "residual")
    each = {k: lay(values(rng, (n, tokens, c), edges).to(dtype), view) for k in names}
    each |= modulated(rng, n, c, dtype, edges) | {"gate": values(rng, (n, c), edges).to(dtype)}

    def run(x, residual, scale, shift, gate):
        out, total = modulate(x, scale, shift, norm=norm, residual=residual, gate=gate)
        return out, total, gated_residual(x, residual, gate)

    assert_laws(run, each)
    if edges or not each["x"].numel():
        return
    assert_near_reference(run, each, {})


@more
@given(SEEDS, st.sampled_from((1, 2, 3)), st.sampled_from((1, 3, 8)), st.sampled_from((1, 4, 7)))
def test_film_conv2d(seed, n, c, side):
    """The convolution is the vendor's, whose bits may depend on the batch: a repeat alone."""
    rng = np.random.default_rng(seed)
    x, residual = (values(rng, (n, c, side, side), False) for _ in range(2))
    weight, gate = values(rng, (c, c, 3, 3), False), values(rng, (n, c), False)
    how = {"num_groups": c, **modulated(rng, n, c, torch.float32, False), "padding": 1}
    tensors = (x, residual, weight, gate)
    before = [t.clone() for t in tensors]
    first = film_conv2d(x, weight, residual=residual, gate=gate, **how)
    assert_same_bits(film_conv2d(x, weight, residual=residual, gate=gate, **how), first)
    for t, was in zip(tensors, before, strict=True):
        assert_same_bits(t, was)
    assert first.shape == x.shape
