"""Every op on the CPU with more than 2^31 elements in one sample: `pytest -m large`.

Results have memory of their own, so that no two elements stand for each other; inputs repeat one
piece of memory (test_large.py), whose period is known. Each test takes at most 9 GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from test_large import PERIOD, SIZE, Repeated

from fastdiff import ops, randn, use_backend
from fastdiff.ops import _native
from fastdiff.ops.brownian import prepare as prepare_brownian
from fastdiff.reference.modulate import modulate as plain_modulate
from fastdiff.reference.noise import normals
from fastdiff.table import Row, StepTable

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(_native.extension is None, reason=str(_native.missing)),
]

BF16 = torch.bfloat16
MEMORY = 9 << 30  # bytes that a test may take
RUN = 5000  # elements that are compared at a place


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Fails, and does not skip, where the memory is not there: who asks for these tests has it."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    assert free > MEMORY + (1 << 30), f"{free >> 20} MiB of memory are free"
    with use_backend("cpu"):
        yield


def places() -> Iterator[slice]:
    """Around 0, around 2^31 and at the end."""
    for first in (0, 2**31 - RUN // 2, SIZE - RUN):
        yield slice(first, first + RUN)


def drawn(at: slice, step: int = 0, stream: int = 0, first: int = 0) -> torch.Tensor:
    """Normals of seed 7, by the reference; `first` is added to the place."""
    seeds, begin = np.array([7], np.uint64), first + at.start
    return torch.from_numpy(normals(seeds, at.stop - at.start, step, stream, first=begin))[0]


def filled(flat: torch.Tensor, at: slice | None = None) -> torch.Tensor:
    """Writes the period of a repeated tensor; or what stands at a place of it, as float32."""
    if at is None:
        flat[:PERIOD] = (torch.arange(PERIOD) % 251 - 125).to(flat.dtype) / 64
        return flat
    return ((torch.arange(at.start, at.stop) % PERIOD) % 251 - 125).float() / 64


def test_randn() -> None:
    out = torch.empty(1, SIZE, dtype=BF16)
    randn([7], (SIZE,), out=out)
    for at in places():
        assert_same_bits(out[0, at], drawn(at).to(BF16), str(at))


def test_add_noise() -> None:
    with Repeated(BF16) as x0:
        filled(x0)
        x, target = ops.add_noise(x0.view(1, SIZE), [7], 0.5, 2.0, target="flow")
        for at in places():
            clean, eps = filled(x0, at), drawn(at, stream=4)
            assert_same_bits(x[0, at], (0.5 * clean + 2.0 * eps).to(BF16), str(at))
            assert_same_bits(target[0, at], (eps - clean).to(BF16), str(at))


def test_add_noise_to_one_element_for_all() -> None:
    """A stride of 0, which the op copies."""
    x0 = torch.ones(1, 1, dtype=BF16).expand(1, SIZE)
    x, _ = ops.add_noise(x0, [7], 0.5, 2.0, target="sample")
    for at in places():
        assert_same_bits(x[0, at], (0.5 + 2.0 * drawn(at, stream=4)).to(BF16), str(at))


def test_brownian() -> None:
    out = torch.empty(1, SIZE, dtype=BF16)
    given: dict[str, Any] = {"depth": 1, "dtype": BF16}
    ops.brownian([7], (SIZE,), 0.0, 0.5, out=out, **given)
    call = prepare_brownian([7], (4,), 0.0, 0.5, **given)
    for at in places():
        total = torch.zeros(RUN)
        for counter, weight in zip(call.counters, call.weights, strict=True):
            total = total + weight * drawn(at, int(counter), call.stream)
        assert_same_bits(out[0, at], total.to(BF16), str(at))


def test_reparameterize() -> None:
    """z and the divergence; the log-variance is 0, so a term of it is mu^2 / 2."""
    with Repeated(BF16) as mu, Repeated(BF16) as logvar:
        filled(mu)
        logvar[:PERIOD] = 0.0
        shape = (1, SIZE)
        z, kl = ops.reparameterize(mu.view(shape), logvar.view(shape), [7])
        for at in places():
            assert_same_bits(z[0, at], (filled(mu, at) + drawn(at, stream=3)).to(BF16), str(at))
        exact = 0.5 * mu[:PERIOD].double().square().sum() * (SIZE // PERIOD)
        # sums of 64 float32 terms below 4, and float64 from there on
        assert_within_budget(kl, exact.float().view(1), exact.view(1), ulps=4)


def test_reparameterize_several_draws() -> None:
    """Three draws of a third: z and its noise pass 2^31, the sample alone does not."""
    size = SIZE // 3 // PERIOD * PERIOD + PERIOD
    apart, at = (size + 3) // 4 * 4, slice(size - RUN, size)
    with Repeated(BF16) as mu, Repeated(BF16) as logvar:
        filled(mu)
        logvar[:PERIOD] = 0.0
        shape = (1, size)
        z, _ = ops.reparameterize(mu[:size].view(shape), logvar[:size].view(shape), [7], samples=3)
        for k in range(3):
            eps = drawn(at, stream=3, first=k * apart)
            assert_same_bits(z[0, k, at], (filled(mu, at) + eps).to(BF16), f"draw {k}")


def test_reparameterize_backward() -> None:
    """Through the divergence, whose gradient is mu."""
    with Repeated(BF16) as mu, Repeated(BF16) as logvar:
        filled(mu)
        logvar[:PERIOD] = 0.0
        a = mu.view(1, SIZE).requires_grad_()
        kl = ops.reparameterize(a, logvar.view(1, SIZE), [7])[1]
        (grad,) = torch.autograd.grad(kl, a, torch.tensor([2.0]))
        for at in places():
            assert_same_bits(grad[0, at], (2.0 * filled(mu, at)).to(BF16), str(at))


def _shape(channels: int) -> tuple[int, ...]:
    return (1, channels, SIZE // channels)


# groups that pass 2^31 elements, and channels by pixels that do
@pytest.mark.parametrize("groups", (1, 16))
def test_film_norm(groups: int) -> None:
    channels = 64
    scale, shift = torch.full((1, channels), 0.5), torch.full((1, channels), 0.25)
    with Repeated(BF16) as x:
        filled(x)
        got = ops.film_norm(x.view(_shape(channels)), groups, scale=scale, shift=shift)
        for at in places():
            _same_map(got.flatten()[at], x, at, lambda t: 1.5 * t + 0.25)


def _same_map(
    got: torch.Tensor, x: torch.Tensor, at: slice, of: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """`of` the normalised x, whose mean and deviation over a group are those of the period."""
    whole = x[:PERIOD].double()
    exact = of((filled(x, at).double() - whole.mean()) * (whole.var(correction=0) + 1e-5).rsqrt())
    # a group that is no multiple of the period has other sums by a hundred of 10^8 terms
    assert_within_budget(got, exact.to(BF16), exact, ulps=1)


def test_film() -> None:
    channels = 64
    scale = ((torch.arange(channels) + 1) / 32.0).view(1, channels)
    with Repeated(BF16) as x:
        filled(x)
        got = ops.film(x.view(_shape(channels)), scale, None)
        for at in places():
            by = scale[0, torch.arange(at.start, at.stop) // (SIZE // channels)]
            assert_same_bits(got.flatten()[at], (filled(x, at) * by).to(BF16), str(at))


def test_film_norm_channels_last() -> None:
    channels, side = 32, 8198  # 2^31 + 3.2 million elements
    plain = torch.empty(1, channels, side, side, dtype=BF16)
    x = plain.as_strided(plain.shape, (plain.numel(), 1, channels * side, channels))
    x.zero_()
    x[:, :, -1] = 1.0
    got = ops.film_norm(x, channels)
    tail = torch.stack([x[0, :, -2:, 0], x[0, :, -2:, -1]])
    n = side * side
    mean = side / n
    exact = (tail.double() - mean) * (mean - mean**2 + 1e-5) ** -0.5
    found = torch.stack([got[0, :, -2:, 0], got[0, :, -2:, -1]])
    assert_within_budget(found, exact.to(BF16), exact, ulps=1)


def test_modulate_and_gated_residual() -> None:
    channels = 4096
    tokens = SIZE // channels
    gate = torch.full((1, channels), 0.5)
    with Repeated(BF16) as x, Repeated(BF16) as h:
        filled(x)
        filled(h)
        shape = (1, tokens, channels)
        total = ops.gated_residual(x.view(shape), h.view(shape), gate)
        chosen = [0, 2**31 // channels - 1, 2**31 // channels, tokens - 1]
        for token in chosen:
            at = slice(token * channels, (token + 1) * channels)
            assert_same_bits(total[0, token], (1.5 * filled(x, at)).to(BF16), f"token {token}")
        del total
        out = ops.modulate(x.view(shape), norm="layer")
        for token in chosen:
            t = x.view(shape)[:, token]
            exact = plain_modulate(t.double())[0]
            # the sums of 4,096 terms are float32, the result is rounded to 8 bits
            assert_within_budget(out[:, token], plain_modulate(t)[0], exact, ulps=1)


def test_guidance_rescale() -> None:
    with Repeated(BF16) as c, Repeated(BF16) as u:
        filled(c)
        u[:PERIOD] = (torch.arange(PERIOD) % 13 - 6).to(BF16) / 8
        shape = (1, SIZE)
        got = ops.guidance_rescale(c.view(shape), u.view(shape), 2.0, 0.5)
        a, b = c[:PERIOD].double(), u[:PERIOD].double()
        exact = 0.5 * a.std() / (b + 2.0 * (a - b)).std() + 0.5
        # sums are float64
        assert_within_budget(got, exact.float().view(1), exact.view(1), ulps=1)


# a whole number of ranks, so that nothing is interpolated
@pytest.mark.parametrize("rank", (0, SIZE // 2, SIZE - 1))
def test_dynamic_threshold(rank: int) -> None:
    with Repeated(torch.float32) as x:
        filled(x)
        x[:PERIOD] *= 8  # above 1, where it is divided
        sizes = x[:PERIOD].abs().sort().values.double()
        out, s = ops.dynamic_threshold(x.view(1, SIZE), rank / (SIZE - 1), out=torch.empty(1, SIZE))
        wanted = max(1.0, float(sizes[rank // (SIZE // PERIOD)]))
        assert s.tolist() == [wanted]
        for at in places():
            values = (8 * filled(x, at)).clamp(-wanted, wanted) / wanted
            assert_same_bits(out[0, at], values, str(at))


def test_reverse_step_with_noise() -> None:
    """x' over its own memory: 8 GiB of float32."""
    table = StepTable("t", (Row(x={"m": 2.0, "n1": 4.0}, time=0.0, draws=((1, 5),)),))
    x = torch.empty(1, SIZE)
    with Repeated(BF16) as m:
        filled(m)
        seeds = torch.tensor([7])
        ops.reverse_step(x, m.view(1, SIZE), table, 0, seeds=seeds, out=x)
        for at in places():
            expected = 2.0 * filled(m, at) + 4.0 * drawn(at, 5, 1)
            assert_same_bits(x[0, at], expected, str(at))
