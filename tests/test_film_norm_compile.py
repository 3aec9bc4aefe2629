"""What the GPU kernels of film_norm compile to: spills, wide accesses, instructions an element."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from typing import Any

import gpu_compile
import pytest
from gpu_cases import CASES
from gpu_compile import CUDA_ARCHS, TABLE, TRITON_ARCHS, Compiled

FILM = tuple(case for case in CASES if case.startswith("film_norm"))

needs_triton = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="TRITON_INTERPRET=1 is set: kernels cannot be compiled",
    ),
]


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


# A kernel is bound by memory as long as a device issues its instructions while the bytes move. A
# multiprocessor issues 128 lanes a clock: in the time of one byte
#
#   A100  108 x 128 x 1.41 GHz / 1.7 TB/s = 11    H200  132 x 128 x 1.9 GHz / 4.3 TB/s = 7.5
#   B200  148 x 128 x 1.9 GHz / 7 TB/s = 5.1
#
# instructions of a lane (the bandwidths are those of a copy, by data sheets and others' figures).
SLOTS = {"sm_80": 11.0, "sm_90": 7.5, "sm_90a": 7.5, "sm_100": 5.1}
# Tensors that move, all of the dtype of x: in one read x, residual and out.
PASSES = {
    "film_norm_resident": 3,
    "film_norm_statistics": 1,
    "film_norm_apply": 3,
    "statistics_kernel": 1,
    "apply_kernel": 3,
}
# Bytes of local memory by NVRTC 13.0 (torch 2.11 brings it); 13.2 and 13.5 need none.
SPILLED = {
    "film_norm f32 channels_last film_norm_resident sm_90a": 16,
    "film_norm f32 huge film_norm_statistics sm_80": 20,
}
MERGES = {"film_norm_merge", "merge_kernel"}  # of a few sums a group: not worth a budget


def _loops(kernel: Compiled) -> list[list[str]]:
    """The innermost loops, from the target of a backward branch to the branch."""
    lines = gpu_compile.sass(kernel.cubin, kernel.kernel)
    ranges = []
    for at, text in lines:
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            ranges.append((int(jump[1], 16), at))
    return [
        [text for at, text in lines if begin <= at <= end]
        for begin, end in ranges
        if not any((a, b) != (begin, end) and begin <= a and b <= end for a, b in ranges)
    ]


def per_element(kernel: Compiled) -> float:
    """Instructions an element of the loops that walk x, each divided by what it loads or stores.

    Loops of the sums over threads, which store to shared memory, are none of them; the mean of the
    first tile of a chunk multiplies nothing.
    """
    in_pack = 4 if " f32" in kernel.case else 8

    def cost(what: str, *, also: str = "", without: str = r"\bSTS\b") -> float:
        found = []
        for loop in _loops(kernel):
            packs = sum(bool(re.search(what, text)) for text in loop)
            body = "\n".join(loop)
            if packs and re.search(also, body) and not re.search(without, body):
                found.append(len(loop) / (packs * in_pack))
        assert found, f"{kernel.kernel} {kernel.arch}: no loop with {what}"
        return max(found)

    store, shared = r"\bSTG\S*\.128", r"\bLDS\S*\.128"
    if (
        kernel.kernel == "film_norm_resident"
    ):  # a copy, the mean, the variance around it, the result
        return (
            cost(r"\bLDGSTS\S*\.128")
            + cost(shared, without=rf"{store}|\bSTS\b|FFMA")
            + cost(shared, also="FFMA", without=rf"{store}|\bSTS\b")
            + cost(store)
        )
    return cost(r"\bLDG\S*\.128", also="FFMA") if "statistics" in kernel.kernel else cost(store)


def _gate(kernel: Compiled, listed: list[dict[str, Any]] | None) -> None:
    what = f"{kernel.case} {kernel.kernel} {kernel.arch}"
    spilled = SPILLED.get(what, 0) if gpu_compile.versions()["nvrtc"] == "13.0" else 0
    assert kernel.spills <= spilled, what
    assert kernel.registers <= 128, what  # 512 threads, the most of a block, have 65536
    if "bf16" in kernel.case and re.search("apply|resident", kernel.kernel):
        assert "cvt.rn.bf16" in kernel.ptx, what
    assert not re.search(r"\b(atom|red)\.", kernel.ptx), what
    if kernel.kernel not in MERGES:
        passes = PASSES[kernel.kernel] - ("film_norm film" in kernel.case)  # has no residual
        bytes_moved = passes * (4 if " f32" in kernel.case else 2)
        assert per_element(kernel) <= SLOTS[kernel.arch] * bytes_moved, what
    if listed is not None:
        assert kernel.listed(listed), f"{what}: run {gpu_compile.COMMAND}"


@pytest.mark.parametrize("arch", TRITON_ARCHS)
@pytest.mark.parametrize("case", FILM)
def test_triton(case: str, arch: str, table: dict[str, Any]) -> None:
    same = table["versions"]["triton"] == gpu_compile.versions()["triton"]
    for kernel in gpu_compile.compile_triton(case, arch):
        _gate(kernel, table["triton"] if same else None)


@pytest.mark.parametrize("arch", CUDA_ARCHS)
@pytest.mark.parametrize("case", FILM)
def test_cuda(case: str, arch: str, table: dict[str, Any]) -> None:
    same = table["versions"]["nvrtc"] == gpu_compile.versions()["nvrtc"]
    for kernel in gpu_compile.compile_cuda(case, arch):
        _gate(kernel, table["cuda"] if same else None)
        clusters = dict(gpu_compile.launches(case, arch)[0].macros)["FD_CLUSTER"] > 1
        if kernel.kernel == "film_norm_resident":
            assert ("barrier.cluster" in kernel.ptx) == clusters
            assert "cp.async" in kernel.ptx


def test_every_way_is_compiled() -> None:
    ways = {
        (launch.kernel, launch.cluster)
        for case in FILM
        for arch in CUDA_ARCHS
        for launch in gpu_compile.launches(case, arch)
    }
    kernels = ("resident", "statistics", "merge", "apply")
    assert {f"film_norm_{kernel}" for kernel in kernels} == {kernel for kernel, _ in ways}
    assert {1, 4} <= {cluster for _, cluster in ways}
