"""Triton kernels beyond 2^31 elements, in the interpreter: a few programs of a grid that is real.

    TRITON_INTERPRET=1 python tests/triton_large.py NAME...

prints a line of JSON for each case. Tensors are of full size, but memory is theirs only where it is
touched; of each grid the first program, the one at element 2^31 and the last one run. An offset of
32 bits then reads or writes far below its tensor, and noise of a wrong counter has other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from fastdiff.kernels import _common
from fastdiff.kernels import add_noise as add_noise_module
from fastdiff.kernels import brownian as brownian_module
from fastdiff.kernels import film_norm as film_module
from fastdiff.kernels import guidance_rescale as rescale_module
from fastdiff.kernels import modulate as modulate_module
from fastdiff.kernels import noise as noise_module
from fastdiff.kernels import reparameterize as vae_module
from fastdiff.kernels import reverse_step as step_module
from interpreted import report
from triton.runtime import interpreter

from fastdiff import use_backend
from fastdiff.ops import add_noise, brownian, guidance_rescale, modulate, reverse_step
from fastdiff.ops._film_checks import FilmNorm
from fastdiff.ops.brownian import prepare as prepare_brownian
from fastdiff.ops.noise import randn
from fastdiff.ops.reparameterize import ReparameterizeBackward, reparameterize
from fastdiff.reference.modulate import modulate as plain_modulate
from fastdiff.reference.noise import normals
from fastdiff.table import Row, StepTable

F32, BF16 = torch.float32, torch.bfloat16
BLOCK = _common._INTERPRETER_BLOCK
SIZE = 2**31 + 2**19 + 1005  # of one sample; program 2^31 / BLOCK begins at element 2^31
MIDDLE = 2**31 // BLOCK
CASES: dict[str, Callable[[], None]] = {}


def case(run: Callable[[], None]) -> Callable[[], None]:
    CASES[run.__name__] = run
    return run


@contextmanager
def only(module: Any, *programs: int) -> Iterator[list[tuple[Any, ...]]]:
    """Each kernel of the module runs these programs of its grid, negative ones from its end.

    Gives the arguments of the launches.
    """
    builder, executor, calls = interpreter.interpreter_builder, interpreter.GridExecutor, []
    kernels = {n: k for n, k in vars(module).items() if n.endswith("_kernel")}
    before = builder.set_grid_idx, executor._restore_args_dev

    class Some:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            chosen = sorted({p % grid[0] for p in programs if p < grid[0]})

            def run(*args: Any, **keywords: Any) -> None:
                calls.append(args)
                builder.set_grid_idx = lambda x, y, z: setattr(
                    builder, "grid_idx", (chosen[x], 0, 0)
                )
                self.kernel[(len(chosen),)](*args, **keywords)

            return run

    # nothing to bring back: the tensors are the host's own, and a copy would touch all of them
    executor._restore_args_dev = lambda *_: None
    try:
        for name, kernel in kernels.items():
            setattr(module, name, Some(kernel))
        with use_backend("triton"):
            yield calls
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
        builder.set_grid_idx, executor._restore_args_dev = before


def places(size: int = SIZE, n: int = 1000) -> Iterator[slice]:
    """Runs at the begin of the first program, from 2^31 on, and at the end."""
    for first in (0, 2**31, size - n):
        yield slice(first, first + n)


def small(n: int, seed: int) -> torch.Tensor:
    """Integers that every dtype has, and whose sums are exact."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, n)).float()


def drawn(seed: int, at: slice, step: int = 0, stream: int = 0) -> torch.Tensor:
    seeds = np.array([seed], np.uint64)
    return torch.from_numpy(normals(seeds, at.stop - at.start, step, stream, first=at.start))[0]


@case
def noise() -> None:
    out = torch.empty(1, SIZE, dtype=BF16)
    with only(noise_module, 0, MIDDLE, -1):
        randn([7], (SIZE,), out=out)
    for at in places():
        assert_same_bits(out[0, at], drawn(7, at).to(BF16), str(at))


@case
def noise_of_many_samples() -> None:
    size = 2**30 + 1007  # no offset in a sample needs 64 bits, but where the third one begins does
    out = torch.empty(3, size, dtype=BF16)
    with only(noise_module, -1):
        randn([7, 8, 9], (size,), out=out)
    at = slice(size - 100, size)
    assert_same_bits(out[2, at], drawn(9, at).to(BF16))


@case
def noise_channels_last() -> None:
    channels, height, width = 3, 26755, 26757  # 2^31 + 166,957 elements, pixels no multiple of 4
    pixels = height * width
    out = torch.empty(1, channels, height, width, dtype=BF16).contiguous(
        memory_format=torch.channels_last
    )
    with only(noise_module, 0, -1):
        randn([7], (channels, height, width), out=out)
    flat = out.permute(0, 2, 3, 1).reshape(pixels, channels)
    for first in (0, pixels - 500):
        for c in range(channels):
            at = slice(c * pixels + first, c * pixels + first + 500)
            assert_same_bits(flat[first : first + 500, c].contiguous(), drawn(7, at).to(BF16))


@case
def add_noise_and_target() -> None:
    x0 = torch.empty(1, SIZE, dtype=BF16)
    for i, at in enumerate(places()):
        x0[0, at] = small(1000, i).to(BF16)
    with only(add_noise_module, 0, MIDDLE, -1):
        x, target = add_noise(x0, [7], 0.5, 2.0, target="flow")
    for at in places():
        eps, clean = drawn(7, at, stream=4), x0[0, at].float()
        assert_same_bits(x[0, at], (0.5 * clean + 2.0 * eps).to(BF16), str(at))
        assert_same_bits(target[0, at], (eps - clean).to(BF16), str(at))


@case
def brownian_path() -> None:
    out = torch.empty(1, SIZE, dtype=BF16)
    given: dict[str, Any] = {"dtype": BF16, "depth": 4}
    with only(brownian_module, 0, MIDDLE, -1):
        brownian([7], (SIZE,), 0.25, 0.5, out=out, **given)
    call = prepare_brownian([7], (4,), 0.25, 0.5, **given)
    for at in places():
        total = torch.zeros(1000)
        for counter, weight in zip(call.counters, call.weights, strict=True):
            total = total + weight * drawn(7, at, int(counter) % 2**32, call.stream)
        assert_same_bits(out[0, at], total.to(BF16), str(at))


@case
def reparameterize_draws() -> None:
    """Three draws of 2^30 elements: their blocks and z need 64 bits, a sample alone does not."""
    size = 2**30 + 1005
    mu, logvar = torch.empty(1, size, dtype=BF16), torch.empty(1, size, dtype=BF16)
    at, given = slice(size - 1000, size), small(1000, 1)
    mu[0, at], logvar[0, at] = given.to(BF16), 0.0
    with only(vae_module, -1):
        z, _ = reparameterize(mu, logvar, [7], samples=3)
        grads = torch.empty_like(mu), torch.empty_like(mu)
        one = torch.ones(1)
        vae_module.reparameterize_backward(
            ReparameterizeBackward(
                z, one, mu, logvar, torch.tensor([7]), 0, 3, -1e9, 1e9, 3, *grads
            )
        )
    apart = (size + 3) // 4 * 4
    total, weighted = torch.zeros(1000), torch.zeros(1000)
    for k in range(3):
        eps = drawn(7, slice(k * apart + at.start, k * apart + at.stop), stream=3)
        assert_same_bits(z[0, k, at], (given + eps).to(BF16), f"draw {k}")
        # of the kernel's own z, which it was given as a gradient
        total = total + z[0, k, at].float()
        weighted = weighted + z[0, k, at].float() * eps
    assert_same_bits(grads[0][0, at], (total + given).to(BF16))
    assert_same_bits(grads[1][0, at], (0.5 * weighted).to(BF16))


@case
def reverse_step_with_history() -> None:
    first = Row(x={"x": 1.0}, time=2.0, push=True)
    row = Row(x={"x": 0.5, "m": 2.0, "n1": 4.0}, time=1.0, push=True, draws=((1, 5),))
    last = Row(x={"x": 1.0, "h0": 1.0, "h1": 1.0}, time=0.0)
    table = StepTable("t", (first, row, last))  # the second one pushes to slot 1
    x, m = torch.empty(1, SIZE), torch.empty(1, SIZE, dtype=BF16)
    history = torch.empty(2, 1, SIZE)
    before = []
    for i, at in enumerate(places()):
        x[0, at], m[0, at] = small(1000, i), small(1000, i + 9).to(BF16)
        before.append((x[0, at].clone(), m[0, at].float()))
    with only(step_module, 0, MIDDLE, -1):
        reverse_step(x, m, table, 1, history=history, seeds=torch.tensor([7]), out=x)
    for (old, output), at in zip(before, places(), strict=True):
        assert_same_bits(x[0, at], (0.5 * old + 2.0 * output) + 4.0 * drawn(7, at, 5, 1), str(at))
        assert_same_bits(history[1, 0, at], output, str(at))


@case
def guidance_rescale_sums() -> None:
    c, u = torch.empty(1, SIZE, dtype=BF16), torch.empty(1, SIZE, dtype=BF16)
    begins = (0, 2**31, SIZE // BLOCK * BLOCK)
    for i, first in enumerate(begins):
        at = slice(first, min(first + BLOCK, SIZE))
        n = at.stop - at.start
        c[0, at], u[0, at] = small(n, i).to(BF16), small(n, i + 9).to(BF16)
    c[0, 0], u[0, 0] = 1.0, 0.0  # sums are of differences to these
    with only(rescale_module, 0, MIDDLE, -1) as calls:
        guidance_rescale(c, u, 2.0, 0.7)
    partial = calls[0][3].view(-1, 4)
    for first in begins:
        at = slice(first, min(first + BLOCK, SIZE))
        a, b = c[0, at].double(), u[0, at].double()
        g = b + 2.0 * (a - b)
        sums = [t.sum().float() for t in (a - 1, (a - 1) ** 2, g - 2, (g - 2) ** 2)]
        assert_same_bits(partial[first // BLOCK], torch.stack(sums), f"from {first}")


def _film(shape: tuple[int, ...], fmt: torch.memory_format, groups: int) -> FilmNorm:
    x = torch.empty(shape, dtype=BF16, memory_format=fmt)
    weight, bias = small(shape[1], 0), small(shape[1], 1)
    out = torch.empty_like(x)
    return FilmNorm(x, groups, weight, bias, None, None, None, None, 1e-5, True, out, fmt)


@case
def film_norm_offsets() -> None:
    """Either order of memory."""
    # channels that the last program has, of those compared
    for shape, fmt, seen in (
        ((1, 1025, 2**21, 1), torch.contiguous_format, 1),
        ((1, 1024, 1449, 1449), torch.channels_last, 100),
    ):
        call = _film(shape, fmt, 0)
        x, out = (t.flatten(2)[0, -seen:, -100:] for t in (call.x, call.out))
        values = small(seen * 100, 2).view(seen, 100)
        x.copy_(values)
        with only(film_module, -1):
            film_module.film_norm(call)
        assert call.weight is not None and call.bias is not None
        expected = values * call.weight[-seen:, None] + call.bias[-seen:, None]
        assert_same_bits(out.contiguous(), expected.to(BF16), str(shape))


@case
def film_norm_of_many_groups() -> None:
    """More than 2^31 / 3 groups, each of which has three numbers."""
    call = _film((2**20, 700, 2, 1), torch.contiguous_format, 700)
    call.x[-1] = small(1400, 3).view(700, 2, 1).to(BF16)
    call.x[-1, -1, :, 0] = torch.tensor([1.0, 3.0])
    with only(film_module, -1):
        film_module.film_norm(call)
    expected = torch.tensor([-1.0, 1.0]) * call.weight[-1] + call.bias[-1]
    assert_same_bits(call.out[-1, -1, :, 0], expected.to(BF16))


@case
def modulate_tokens() -> None:
    tokens, channels = 2**19 + 3, 4096
    x = torch.empty(1, tokens, channels, dtype=BF16)
    chosen = (0, 2**19, tokens - 1)
    for token in chosen:
        x[0, token] = small(channels, token).to(BF16)
    with only(modulate_module, *chosen):
        out = modulate(x, norm="layer")
    for token in chosen:
        t = x[:, token]
        exact = plain_modulate(t.double())[0]
        # the sums of 4,096 terms are float32; the result is rounded to 8 bits
        assert_within_budget(out[:, token], plain_modulate(t)[0], exact, ulps=1)


if __name__ == "__main__":
    report(CASES)
