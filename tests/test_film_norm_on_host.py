"""film_norm.cu on the host: every way through it that needs no cluster of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same_bits
from film_cases import (
    BF16,
    CASES,
    CHUNKS,
    F16,
    F32,
    LAST,
    PLAIN,
    Case,
    check,
    check_not_finite,
    make,
    not_finite,
    outlier,
    silu_at_its_ends,
)
from on_host import COMPILER, Host

from fastdiff.ops import _film_launches, _native
from fastdiff.ops._film_checks import FilmNorm
from fastdiff.ops._film_launches import Chip

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing)),
]

ROOMY = Chip(2, 166912, False)  # every case fits
TIGHT = Chip(2, 0, False)  # none does
BUSY = Chip(64, 0, False)  # nor here, and the pixels are split among many blocks


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(tmp_path_factory.mktemp("film_on_host"))


def _run(host: Host, call: FilmNorm, chip: Chip) -> list[str]:
    launches, _memory = _film_launches.film_norm(call, chip)
    host.run(launches)
    return [launch.kernel for launch in launches]


APPLIED = ["film_norm_apply"]
RESIDENT = ["film_norm_resident"]
TWO_READS = ["film_norm_statistics", "film_norm_merge", "film_norm_apply"]


@pytest.mark.parametrize("name", CASES)
def test_one_read(host: Host, name: str) -> None:
    call = make(CASES[name])
    assert _run(host, call, ROOMY) == (RESIDENT if call.groups else APPLIED)
    check(call, CASES[name].mean)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.groups])
def test_two_reads(host: Host, name: str) -> None:
    call = make(CASES[name])
    assert _run(host, call, TIGHT) == TWO_READS
    check(call, CASES[name].mean)


@pytest.mark.parametrize("name", CHUNKS)
def test_many_chunks(host: Host, name: str) -> None:
    call = make(CHUNKS[name])
    assert _run(host, call, BUSY) == TWO_READS
    check(call, CHUNKS[name].mean)
    first = call.out.clone()
    call.out.fill_(float("nan"))
    _run(host, call, BUSY)
    assert_same_bits(call.out, first)


def test_views_that_are_not_aligned(host: Host) -> None:
    call = make(Case((1, 16, 5, 5), 4, LAST, BF16))
    parts: dict[str, Any] = {}
    for name in ("x", "residual", "out"):
        memory = torch.full((call.x.numel() + 2,), float("nan"), dtype=BF16)
        view = memory[1:-1].view(1, 5, 5, 16).permute(0, 3, 1, 2)
        parts[name] = view.copy_(getattr(call, name))
        parts[f"{name} around"] = memory[:: call.x.numel() + 1]
    call = call._replace(**{name: parts[name] for name in ("x", "residual", "out")})
    for chip in (ROOMY, TIGHT):
        call.out.fill_(float("nan"))
        _run(host, call, chip)
        check(call)
        assert bool(parts["out around"].isnan().all())


@pytest.mark.parametrize("fmt", (LAST, PLAIN), ids=("channels_last", "contiguous"))
def test_outlier(host: Host, fmt: torch.memory_format) -> None:
    for chip in (ROOMY, TIGHT, BUSY):
        call = outlier(fmt)
        _run(host, call, chip)
        check(call)


def test_not_finite(host: Host) -> None:
    for chip in (ROOMY, TIGHT):
        call = not_finite()
        _run(host, call, chip)
        check_not_finite(call)


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_silu_at_its_ends(host: Host, dtype: torch.dtype) -> None:
    call = silu_at_its_ends(dtype)
    _run(host, call, ROOMY)
    check(call)


def test_launches_cover_every_pixel_once() -> None:
    """What only a cluster runs: its blocks' pixels are whole packs and add up."""
    h200, seen = Chip(132, 232448, True), set()
    for fmt in (LAST, PLAIN):
        for shape in ((1, 320, 64, 64), (16, 320, 64, 64), (2, 640, 31, 33), (1, 64, 7, 7)):
            call = make(Case(shape, 32, fmt, BF16))
            (launch,) = _film_launches.film_norm(call, h200)[0]
            channels, pixels, runs, run, _width, share = launch.args[-7:-1]
            macros = dict(launch.macros)
            assert isinstance(share, int) and isinstance(pixels, int)
            assert launch.cluster * share >= pixels and launch.shared <= h200.shared
            assert fmt == LAST or share % macros["FD_PACK"] == 0
            assert channels == runs * run and launch.grid[0] == shape[0] * runs * launch.cluster
            assert launch.grid[0] % launch.cluster == 0 and macros["FD_CLUSTER"] == launch.cluster
            seen.add(launch.cluster)
    assert seen == {1, 2, 4}
