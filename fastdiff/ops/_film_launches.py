"""CUDA launches of `film_norm` as plain data, and the choice between one read of x and two."""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import torch

from fastdiff.ops._film_checks import FilmNorm
from fastdiff.ops._launches import THREADS, Launch, Macros
from fastdiff.ops._native import DTYPES, address

_SOURCE = "film_norm.cu"
# A block that leaves no room for a second one beside it, and must fill a multiprocessor alone.
_MANY_THREADS = 512
_CLUSTERS = (1, 2, 4)
_ROW = 128  # bytes of a pixel that a block takes, if it can: a line of the cache
_SECTOR = 32  # bytes that the memory moves at least
_HEADS = 64  # a chunk is at most so many times the pixels that its pivot is the mean of
_WORK = 8192  # bytes of x that keep a block busy for longer than its barriers take
_WAVES = 8  # blocks for each multiprocessor that a kernel of the second kind is split into


class Chip(NamedTuple):
    """What the choice depends on.

    Attributes:
        multiprocessors: of the device.
        shared: bytes of shared memory that a block may ask for.
        clusters: whether blocks can read each other's shared memory (sm_90 and above).
    """

    multiprocessors: int
    shared: int
    clusters: bool


class _Run(NamedTuple):
    """Channels of a block, all whole groups, and how its threads take them."""

    channels: int
    pack: int
    fixed: bool  # a thread keeps to the channels of one pack


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _pack(call: FilmNorm, along: int) -> int:
    """Elements of one access along an axis of that length: 16 bytes, 8, or one element."""
    size = call.x.element_size()
    tensors = [t for t in (call.x, call.residual, call.out) if t is not None]
    for width in (16, 8):
        if along % (width // size) == 0 and all(t.data_ptr() % width == 0 for t in tensors):
            return width // size
    return 1


class _Shape(NamedTuple):
    samples: int
    channels: int
    pixels: int
    group: int  # channels of a group
    last: bool
    size: int  # bytes of an element


def _shape(call: FilmNorm) -> _Shape:
    x = call.x
    n, c = x.shape[:2]
    last = call.format != torch.contiguous_format
    return _Shape(n, c, x[0, 0].numel(), c // max(call.groups, 1), last, x.element_size())


def _runs(call: FilmNorm, s: _Shape) -> list[_Run]:
    """Every way to give a block whole groups."""
    if not s.last:
        return [_Run(s.group, _pack(call, s.pixels), False)]
    pack = _pack(call, s.channels)
    unit = lcm(s.group, pack)
    widths = range(unit, min(s.channels, THREADS * pack) + 1, unit)
    found = [_Run(w, pack, True) for w in widths if s.channels % w == 0]
    # a group too wide for a pack a thread, or whose packs straddle too many others
    return found or [_Run(s.group, pack if s.group % pack == 0 else 1, False)]


def _block(s: _Shape, run: _Run, pixels: int, threads: int) -> tuple[int, int]:
    """Threads along the inner and the outer axis, for that many pixels."""
    packs = (run.channels if s.last else pixels) // run.pack
    x = packs if run.fixed else min(threads, _power_of_two(packs))
    return x, max(1, min(threads // x, pixels if s.last else run.channels))


def _macros(call: FilmNorm, s: _Shape, run: _Run, cluster: int, threads: int) -> Macros:
    params = call.weight if call.weight is not None else call.bias
    film = call.scale if call.scale is not None else call.shift
    return (
        ("FD_CONTRACT", 1),
        ("FD_DTYPE", DTYPES[call.x.dtype]),
        ("FD_PARAM_DTYPE", 0 if params is None else DTYPES[params.dtype]),
        ("FD_FILM_DTYPE", 0 if film is None else DTYPES[film.dtype]),
        ("FD_GROUPS", int(call.groups > 0)),
        ("FD_WEIGHT", int(call.weight is not None)),
        ("FD_BIAS", int(call.bias is not None)),
        ("FD_SCALE", int(call.scale is not None)),
        ("FD_SHIFT", int(call.shift is not None)),
        ("FD_PLUS_ONE", int(call.plus_one)),
        ("FD_SILU", int(call.act == "silu")),
        ("FD_RESIDUAL", int(call.residual is not None)),
        ("FD_LAST", int(s.last)),
        ("FD_FIXED", int(run.fixed)),
        ("FD_CLUSTER", cluster),
        ("FD_THREADS", threads),
        ("FD_PACK", run.pack),
        ("FD_VECTOR", int(run.pack > 1)),
    )


def _film(call: FilmNorm) -> tuple[int, ...]:
    """The arguments that both ways of applying share."""
    return (
        address(call.weight),
        address(call.bias),
        address(call.scale),
        0 if call.scale is None else call.scale.stride(0),
        address(call.shift),
        0 if call.shift is None else call.shift.stride(0),
        address(call.residual),
        call.out.data_ptr(),
    )


# --- one read -------------------------------------------------------------------------------


class _Resident(NamedTuple):
    run: _Run
    cluster: int
    share: int  # pixels of a block
    threads: int
    block: tuple[int, int]
    shared: int
    blocks: int


def _fit(s: _Shape, run: _Run, cluster: int, chip: Chip) -> _Resident | None:
    """That run in the shared memory of a cluster of that many blocks, or None."""
    share = -(-s.pixels // cluster)
    if not s.last:
        share = -(-share // run.pack) * run.pack
    slab = -(-share * run.channels * s.size // 16) * 16
    threads = THREADS if 2 * slab < chip.shared else _MANY_THREADS
    x, y = _block(s, run, share, threads)
    groups = run.channels // s.group
    lanes = run.pack if run.fixed else 1
    # as the kernel lays it out: slab, sums of the threads, six numbers a group, three a channel
    shared = slab + 4 * (x * y * lanes + 6 * groups + 3 * run.channels)
    blocks = s.samples * (s.channels // run.channels) * cluster
    found = _Resident(run, cluster, share, threads, (x, y), shared, blocks)
    return found if shared <= chip.shared else None


def _resident(call: FilmNorm, s: _Shape, chip: Chip) -> _Resident | None:
    """The best way to keep whole groups in shared memory, or None where they do not fit.

    First of all nearly every multiprocessor should have a block, where there is work for it. Then
    the bytes that a block takes of a pixel should be whole sectors, or another block moves some of
    them again, and half a line of the cache at the least. A block alone is better than a cluster,
    which costs two barriers; and a whole line is better than half of one.
    """
    clusters = [k for k in _CLUSTERS if k == 1 or chip.clusters]
    found = [_fit(s, run, k, chip) for run in _runs(call, s) for k in clusters]
    wanted = min(9 * chip.multiprocessors // 10, call.x.numel() * s.size // _WORK + 1)

    def worth(r: _Resident) -> tuple[int, ...]:
        row = (r.run.channels if s.last else r.share) * s.size
        filled = min(r.blocks, wanted)
        whole = int(row % _SECTOR == 0)
        return filled, whole, min(row, _ROW // 2), -r.cluster, min(row, _ROW), -r.run.channels

    return max((r for r in found if r is not None), key=worth, default=None)


def _one_read(call: FilmNorm, s: _Shape, r: _Resident) -> Launch:
    macros = _macros(call, s, r.run, r.cluster, r.threads)
    args = (
        call.x.data_ptr(),
        *_film(call),
        s.channels,
        s.pixels,
        s.channels // r.run.channels,
        r.run.channels,
        s.group,
        r.share,
        call.eps,
    )
    grid = (r.blocks, 1)
    return Launch(_SOURCE, "film_norm_resident", macros, grid, r.block, args, r.shared, r.cluster)


# --- two reads ------------------------------------------------------------------------------


def _split(s: _Shape, runs: int, least: int, most: int, chip: Chip, pack: int) -> int:
    """Pixels of a block, so that the device is full, within the bounds; whole packs of them."""
    blocks = _WAVES * chip.multiprocessors
    chunks = max(1, blocks // (s.samples * runs))
    share = min(max(-(-s.pixels // chunks), least), most)
    return share if s.last else -(-share // pack) * pack


def _statistics(
    call: FilmNorm, s: _Shape, chip: Chip
) -> tuple[list[Launch], list[torch.Tensor], int]:
    """Launches that leave mean and deviation of every group, their memory, and where they are."""
    run = max(_runs(call, s), key=lambda r: (min(r.channels * s.size, _ROW), -r.channels))
    x, y = _block(s, run, s.pixels, THREADS)
    head = y if s.last else x * run.pack
    runs = s.channels // run.channels
    least = 4 * head if s.last else head  # by pixels, a step of the loop takes but one channel
    share = _split(s, runs, least, _HEADS * head, chip, run.pack)
    chunks = -(-s.pixels // share)
    macros = _macros(call, s, run, 1, THREADS)
    groups = s.samples * call.groups
    partial = call.x.new_empty(3 * groups * chunks, dtype=torch.float32)
    norms = call.x.new_empty(3 * groups, dtype=torch.float32)
    lanes = run.pack if run.fixed else 1
    shared = 4 * (x * y * lanes + 3 * run.channels // s.group)
    shape = (s.channels, s.pixels, runs, chunks, run.channels, s.group, share)
    sums: tuple[int | float, ...] = (call.x.data_ptr(), partial.data_ptr(), *shape)
    merge = (partial.data_ptr(), norms.data_ptr(), s.pixels, s.group, chunks, share, call.eps)
    grid, merging = (s.samples * runs * chunks, 1), (min(THREADS, _power_of_two(chunks)), 1)
    launches = [
        Launch(_SOURCE, "film_norm_statistics", macros, grid, (x, y), sums, shared),
        Launch(_SOURCE, "film_norm_merge", macros, (groups, 1), merging, merge),
    ]
    return launches, [partial, norms], norms.data_ptr()


def _apply(call: FilmNorm, s: _Shape, chip: Chip, norms: int) -> Launch:
    pack = _pack(call, s.channels if s.last else s.pixels)
    if s.last:
        packs = s.channels // pack
        runs = -(-packs // 64)  # of 4 rows of threads at the least
        run = _Run(-(-packs // runs) * pack, pack, True)
        least, most = 4 * (THREADS // (run.channels // pack)), s.pixels
    else:
        x = min(THREADS, _power_of_two(s.pixels // pack))
        run = _Run(min(THREADS // x, s.channels), pack, False)
        least, most = 4 * x * pack, s.pixels
    runs = -(-s.channels // run.channels)
    share = _split(s, runs, min(least, most), most, chip, pack)
    chunks = -(-s.pixels // share)
    grid = (s.samples * runs * chunks, 1)
    shape = (s.channels, s.pixels, runs, chunks, run.channels, call.groups, s.group, share)
    args = (call.x.data_ptr(), norms, *_film(call), *shape)
    block = _block(s, run, share, THREADS)
    macros = _macros(call, s, run, 1, THREADS)
    return Launch(_SOURCE, "film_norm_apply", macros, grid, block, args, 12 * run.channels)


def film_norm(call: FilmNorm, chip: Chip) -> tuple[list[Launch], list[torch.Tensor]]:
    """Launches that fill ``call.out``, which must have elements, and the memory that must live
    until they ran.

    One read of x where whole groups fit into shared memory, for a device that is not full too: a
    block fills and empties it in about the time of one more launch.
    """
    s = _shape(call)
    if not call.groups:
        return [_apply(call, s, chip, 0)], []
    resident = _resident(call, s, chip)
    if resident is not None:
        return [_one_read(call, s, resident)], []
    launches, memory, norms = _statistics(call, s, chip)
    return [*launches, _apply(call, s, chip, norms)], memory
