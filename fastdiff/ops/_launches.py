"""CUDA launches of each op as plain data: source, macros, grid, block, arguments.

Needs no driver and no compiler: `_cuda` compiles and runs what stands here, and the tests run the
same launches on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdiff.ops._layout import channels as channels_of
from fastdiff.ops._layout import memory_format
from fastdiff.ops._native import DTYPES, address
from fastdiff.ops._presence import presence
from fastdiff.ops._step_checks import Step
from fastdiff.ops.add_noise import AddNoise
from fastdiff.ops.brownian import Increment
from fastdiff.ops.guidance_rescale import GuidanceRescale
from fastdiff.ops.noise import Draw
from fastdiff.ops.reparameterize import Reparameterize, ReparameterizeBackward
from fastdiff.reference.diffusion import PREDICTIONS

THREADS = 256  # of a block; the launch bound of every kernel in csrc/cuda
_MAX_Y = 65535  # the most blocks along y that a grid may have
Macros = tuple[tuple[str, int], ...]


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        source: file in csrc/cuda.
        kernel: its entry point.
        macros: what the source is compiled with.
        args: int for a 64-bit integer or an address, float for a float32.
        shared: bytes of dynamic shared memory of a block.
        cluster: consecutive blocks that read each other's shared memory; divides the grid.
    """

    source: str
    kernel: str
    macros: Macros
    grid: tuple[int, int]
    block: tuple[int, int]
    args: tuple[int | float, ...]
    shared: int = 0
    cluster: int = 1


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _cover(samples: int, units: int, blocks: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block for `units` threads a sample: small samples share a block.

    Every kernel strides over what the grid does not cover, so the number of blocks is bounded: by
    `blocks` in all, where there is more to do than that.
    """
    x = min(THREADS, _power_of_two(units))
    y = THREADS // x
    rows = min(-(-samples // y), _MAX_Y)
    columns = min(-(-units // x), max(1, blocks // rows))
    return (columns, rows), (x, y)


def _aligned(pack: int, *tensors: torch.Tensor | None) -> bool:
    """Whether packs of consecutive elements may move as one, in every sample of every tensor."""
    return all(
        t.data_ptr() % min(16, pack * t.element_size()) == 0
        and (t.shape[0] < 2 or t.stride(0) % pack == 0)
        for t in tensors
        if t is not None
    )


class _Shape(NamedTuple):
    """How a kernel walks a sample: packs in memory order, or quads of pixels by channels."""

    size: int
    channels: int
    pixels: int
    units: int
    pack: int
    last: bool


def _shape(t: torch.Tensor, fmt: torch.memory_format, pack: int, draws: bool) -> _Shape:
    size = t[0].numel()
    channels = channels_of(t, fmt) if draws else 0
    if channels == 0:
        return _Shape(size, 0, 0, -(-size // pack), pack, False)
    pixels = size // channels
    shifted = pixels % 4 != 0
    # channels move together only where all of them start at the same place of a Philox block
    pack = 1 if shifted or channels % 4 else 4
    units = (pixels + (3 if shifted else 0) + 3) // 4 * (channels // pack)
    return _Shape(size, channels, pixels, units, pack, True)


def _walk_macros(shape: _Shape, *tensors: torch.Tensor | None) -> Macros:
    whole = shape.size % shape.pack == 0 and shape.pack > 1
    return (
        ("FD_PACK", shape.pack),
        ("FD_VECTOR", int(whole and _aligned(shape.pack, *tensors))),
        ("FD_CHANNELS_LAST", int(shape.last)),
    )


def _pack_of(t: torch.Tensor) -> int:
    """Elements in 16 bytes: a thread of a kernel whose tensors have one type moves that many."""
    return 16 // t.element_size()


def noise(draw: Draw, blocks: int) -> list[Launch]:
    """Launches that fill ``draw.out``, which must have elements."""
    out = draw.out
    fmt = memory_format(out)
    assert fmt is not None  # the op refuses other layouts
    shape = _shape(out, fmt, _pack_of(out), True)
    grid, block = _cover(out.shape[0], shape.units, blocks)
    macros = (("FD_DTYPE", DTYPES[out.dtype]), *_walk_macros(shape, out))
    args = (
        draw.seeds.data_ptr(),
        draw.step,
        draw.stream,
        out.shape[0],
        shape.size,
        shape.channels,
        shape.pixels,
        out.data_ptr(),
    )
    return [Launch("noise.cu", "noise", macros, grid, block, args)]


def add_noise(call: AddNoise, blocks: int) -> list[Launch]:
    """Launches that fill ``call.x`` and ``call.wanted``, which must have elements."""
    x = call.x
    fmt = memory_format(x)
    assert fmt is not None  # the op makes no other
    shape = _shape(x, fmt, _pack_of(x), True)
    grid, block = _cover(x.shape[0], shape.units, blocks)
    macros = (
        ("FD_DTYPE", DTYPES[x.dtype]),
        ("FD_TARGET", PREDICTIONS.index(call.target)),
        *_walk_macros(shape, call.x0, x, call.wanted),
    )
    args = (
        call.x0.data_ptr(),
        call.alpha.data_ptr(),
        call.sigma.data_ptr(),
        call.seeds.data_ptr(),
        call.step,
        call.stream,
        x.shape[0],
        shape.size,
        shape.channels,
        shape.pixels,
        x.data_ptr(),
        address(call.wanted),
    )
    return [Launch("add_noise.cu", "add_noise", macros, grid, block, args)]


def brownian(call: Increment, blocks: int) -> list[Launch]:
    """Launches that fill ``call.out``, which must have elements."""
    out, x = call.out, call.x
    fmt = memory_format(out)
    assert fmt is not None  # the op refuses other layouts
    shape = _shape(out, fmt, _pack_of(out), True)
    grid, block = _cover(out.shape[0], shape.units, blocks)
    macros = (
        ("FD_DTYPE", DTYPES[out.dtype]),
        ("FD_ADD", int(x is not None)),
        *_walk_macros(shape, out, x),
    )
    args = (
        call.seeds.data_ptr(),
        call.counters.data_ptr(),
        call.weights.data_ptr(),
        len(call.counters),
        call.stream,
        address(x),
        float(call.scale),
        out.shape[0],
        shape.size,
        shape.channels,
        shape.pixels,
        out.data_ptr(),
    )
    return [Launch("brownian.cu", "brownian", macros, grid, block, args)]


def _stride(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def reverse_step(step: Step, blocks: int) -> list[Launch]:
    """Launches of one row over a batch, which must have elements."""
    x, output, history = step.x, step.output, step.history
    flags = presence(step)
    # float32 is among the tensors of every step: 16 bytes of it, 8 of a 16-bit model tensor
    shape = _shape(x, step.format, 4, flags.draws)
    grid, block = _cover(x.shape[0], shape.units, blocks)
    slots = () if history is None else tuple(history)
    touched = (x, output, step.uncond, step.variance, step.y, step.out, step.model_input, *slots)
    model_input = step.model_input
    macros = (
        ("FD_ROWS", int(step.rows is not None)),
        ("FD_A", flags.a),
        ("FD_B", flags.b),
        ("FD_P", int(flags.p)),
        ("FD_Q", int(flags.q)),
        ("FD_EVALUATES", int(flags.evaluates)),
        ("FD_PUSH", flags.push),
        ("FD_PUSH_X", int(flags.push_x)),
        ("FD_PUSH_D", int(flags.push_d)),
        ("FD_GUIDED", int(flags.guided)),
        ("FD_SCALED", int(flags.scaled)),
        ("FD_CLIP", int(flags.clip)),
        ("FD_LEARNED", int(flags.learned)),
        ("FD_OUTPUT_DTYPE", 0 if output is None else DTYPES[output.dtype]),
        ("FD_INPUT_DTYPE", -1 if model_input is None else DTYPES[model_input.dtype]),
        *_walk_macros(shape, *touched),
    )
    guidance, clip = step.guidance, step.clip
    args = (
        x.data_ptr(),
        address(output),
        address(step.uncond),
        address(step.variance),
        _stride(output),
        _stride(step.uncond),
        _stride(step.variance),
        address(step.y),
        address(history),
        _stride(history),
        step.packed.floats.data_ptr(),
        step.packed.ints.data_ptr(),
        address(step.rows),
        step.row,
        address(step.seeds),
        guidance.data_ptr() if isinstance(guidance, torch.Tensor) else 0,
        1.0 if isinstance(guidance, torch.Tensor) else float(guidance),
        address(step.scale),
        clip.data_ptr() if isinstance(clip, torch.Tensor) else 0,
        float(clip) if isinstance(clip, (int, float)) else -1.0,
        step.out.data_ptr(),
        address(model_input),
        x.shape[0],
        shape.size,
        shape.channels,
        shape.pixels,
    )
    return [Launch("reverse_step.cu", "reverse_step", macros, grid, block, args)]


_PER_THREAD = 16  # elements that a thread adds up before the block does


def guidance_rescale(call: GuidanceRescale, blocks: int) -> tuple[list[Launch], list[torch.Tensor]]:
    """Launches that fill the factors, and the memory that must live until they ran."""
    output, uncond = call.output, call.uncond
    samples = output.shape[0]
    shape = _shape(output, torch.contiguous_format, _pack_of(output), False)
    macros = (
        ("FD_DTYPE", DTYPES[output.dtype]),
        ("FD_UNITS", _PER_THREAD // shape.pack),
        *_walk_macros(shape, output, uncond),
    )
    (_, rows), block = _cover(samples, shape.units, blocks)
    chunks = -(-shape.units // (block[0] * (_PER_THREAD // shape.pack)))
    grid = (min(chunks, max(1, blocks // rows)), rows)
    partial = call.out.new_empty(4 * samples * chunks)
    args = (
        output.data_ptr(),
        uncond.data_ptr(),
        output.stride(0),
        uncond.stride(0),
        call.guidance.data_ptr(),
        samples,
        shape.size,
        partial.data_ptr(),
    )
    sums = (partial.data_ptr(), call.phi.data_ptr(), samples, shape.size, chunks)
    total = (min(samples, max(1, blocks)), 1)
    file = "guidance_rescale.cu"
    return [
        Launch(file, "guidance_rescale", macros, grid, block, args),
        Launch(
            file, "guidance_rescale_sum", macros, total, (THREADS, 1), (*sums, call.out.data_ptr())
        ),
    ], [partial]


def _vae_macros(
    call: Reparameterize | ReparameterizeBackward, shape: _Shape, *tensors: torch.Tensor | None
) -> Macros:
    through_z = isinstance(call, ReparameterizeBackward) and call.grad_z is not None
    through_kl = isinstance(call, ReparameterizeBackward) and call.grad_kl is not None
    return (
        ("FD_DTYPE", DTYPES[call.mu.dtype]),
        ("FD_UNITS", _PER_THREAD // shape.pack),
        ("FD_THROUGH_Z", int(through_z)),
        ("FD_THROUGH_KL", int(through_kl)),
        *_walk_macros(shape, call.mu, call.logvar, *tensors),
    )


def reparameterize(call: Reparameterize, blocks: int) -> tuple[list[Launch], list[torch.Tensor]]:
    """Launches that fill z and kl, and the memory that must live until they ran."""
    mu = call.mu
    samples = mu.shape[0]
    shape = _shape(mu, torch.contiguous_format, _pack_of(mu), True)
    macros = _vae_macros(call, shape, call.z)
    (_, rows), block = _cover(samples, shape.units, blocks)
    chunks = -(-shape.units // (block[0] * (_PER_THREAD // shape.pack)))
    grid = (min(chunks, max(1, blocks // rows)), rows)
    partial = call.kl if chunks == 1 else call.kl.new_empty(samples * chunks)
    args = (
        mu.data_ptr(),
        call.logvar.data_ptr(),
        call.seeds.data_ptr(),
        call.step,
        call.stream,
        float(call.low),
        float(call.high),
        call.draws,
        samples,
        shape.size,
        call.z.data_ptr(),
        partial.data_ptr(),
    )
    launches = [Launch("reparameterize.cu", "reparameterize", macros, grid, block, args)]
    if chunks > 1:
        sums = (partial.data_ptr(), samples, chunks, call.kl.data_ptr())
        grid, block = (min(samples, max(1, blocks)), 1), (THREADS, 1)
        launches.append(
            Launch("reparameterize.cu", "reparameterize_sum", macros, grid, block, sums)
        )
    return launches, [partial]


def reparameterize_backward(call: ReparameterizeBackward, blocks: int) -> list[Launch]:
    """Launches that fill both gradients."""
    mu = call.mu
    shape = _shape(mu, torch.contiguous_format, _pack_of(mu), True)
    macros = _vae_macros(call, shape, call.grad_z, call.grad_mu, call.grad_logvar)
    grid, block = _cover(mu.shape[0], shape.units, blocks)
    args = (
        address(call.grad_z),
        address(call.grad_kl),
        mu.data_ptr(),
        call.logvar.data_ptr(),
        call.seeds.data_ptr(),
        call.step,
        call.stream,
        float(call.low),
        float(call.high),
        call.draws,
        mu.shape[0],
        shape.size,
        call.grad_mu.data_ptr(),
        call.grad_logvar.data_ptr(),
    )
    return [Launch("reparameterize.cu", "reparameterize_backward", macros, grid, block, args)]
