"""The CUDA C++ kernels without a GPU: what NVRTC makes of them, and the cache of cubins."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gpu_compile
import pytest
from gpu_cases import CASES, EXACT, STORES_BF16
from gpu_compile import CUDA_ARCHS, TABLE

from fastdiff.ops import _cuda


def _nvrtc_reason() -> str | None:
    try:
        import cuda.core  # noqa: F401
        import triton  # noqa: F401
        from cuda.bindings import nvrtc
    except ImportError as error:
        return str(error)
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # the library is found at the first call, and the error is its own
        return f"NVRTC cannot be loaded: {error}"
    return None


_REASON = _nvrtc_reason()
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


@pytest.mark.parametrize("arch", CUDA_ARCHS)
@pytest.mark.parametrize("case", EXACT)
def test_compiles_to_exact_arithmetic(case: str, arch: str, table: dict[str, Any]) -> None:
    for kernel in gpu_compile.compile_cuda(case, arch):
        what = f"{kernel.case} {kernel.kernel} {kernel.arch}"
        assert kernel.spills == 0, what
        assert kernel.registers <= 128, what  # two blocks of 256 threads an SM, at the least
        # contraction, an approximate function, or a flush to zero would change bits
        for pattern in (r"\bfma\.rn\.f32", r"\bfma\.rn\.f64", r"\.approx", r"\.ftz"):
            assert not re.search(pattern, kernel.ptx), f"{what}: {pattern} in the PTX"
        if case in STORES_BF16 and kernel.kernel != "reparameterize_sum":
            assert "cvt.rn.bf16" in kernel.ptx, what  # in one instruction
        if kernel.kernel != "reparameterize_sum":  # 16 bytes an access; cases are aligned
            assert re.search(r"st\.global\.v4\.[bfu]32", kernel.ptx), what
        if table["versions"]["nvrtc"] == gpu_compile.versions()["nvrtc"]:
            assert kernel.listed(table["cuda"]), f"{what}: run {table['command']}"


@pytest.mark.parametrize("arch", CUDA_ARCHS)
@pytest.mark.parametrize("case", ("guidance_rescale f32", "guidance_rescale bf16"))
def test_sums_compile_without_spills(case: str, arch: str, table: dict[str, Any]) -> None:
    found = gpu_compile.compile_cuda(case, arch)
    assert [k.kernel for k in found] == ["guidance_rescale", "guidance_rescale_sum"]
    for kernel in found:
        what = f"{kernel.case} {kernel.kernel} {kernel.arch}"
        assert kernel.spills == 0 and kernel.registers <= 128, what
        if table["versions"]["nvrtc"] == gpu_compile.versions()["nvrtc"]:
            assert kernel.listed(table["cuda"]), f"{what}: run {table['command']}"


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the path")
@pytest.mark.parametrize(
    "case",
    ("noise f32", "step rows bf16", "reparameterize backward bf16", "film_norm bf16 channels_last"),
)
def test_toolkit_compiles_both_sides(case: str, tmp_path: Path) -> None:
    """nvcc compiles a file for the host too, which NVRTC does not."""
    launch = gpu_compile.launches(case)[0]
    folder = _cuda.sources()
    subprocess.run(
        [
            str(NVCC), "-std=c++17", "-arch=sm_90", "--fmad=false", "-c", f"-I{folder}",
            *(f"-D{name}={value}" for name, value in launch.macros),
            str(folder / "cuda" / launch.source), "-o", str(tmp_path / "kernel.o"),
        ],
        check=True,
    )  # fmt: skip


def test_every_source_is_compiled() -> None:
    compiled = {launch.source for case in CASES for launch in gpu_compile.launches(case)}
    assert compiled == {f.name for f in (_cuda.sources() / "cuda").glob("*.cu")}


def test_table_is_whole(table: dict[str, Any]) -> None:
    assert {(r["case"], r["arch"]) for r in table["cuda"]} == {
        (c, a) for c in CASES for a in CUDA_ARCHS
    }
    assert {(r["case"], r["arch"]) for r in table["triton"]} == {
        (c, a) for c in CASES for a in gpu_compile.TRITON_ARCHS
    }
    assert all(r["spills"] == 0 for r in table["cuda"] + table["triton"])


# --- the cache ------------------------------------------------------------------------------

LAUNCH = gpu_compile.launches("noise f32")[0]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes what is compiled, in place of the compiler."""
    made: list[str] = []

    def compile_source(source: str, macros: Any, arch: str) -> bytes:
        made.append(arch)
        return f"{source} {macros} {arch}".encode()

    monkeypatch.setattr(_cuda, "compile_source", compile_source)
    return made


def _cubin(arch: str = "sm_90", **how: Any) -> bytes:
    return _cuda.cubin(LAUNCH.source, LAUNCH.macros, arch, **how)


def test_cache_keeps_what_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", str(tmp_path / "new" / "folder"))
    first = _cubin()
    assert _cubin() == first and compilations == ["sm_90"]
    assert _cubin("sm_80") != first and compilations == ["sm_90", "sm_80"]
    assert _cubin(fresh=True) == first and len(compilations) == 3
    files = [p.name for p in (tmp_path / "new" / "folder").iterdir()]
    assert len(files) == 2 and all(re.fullmatch(r"noise-[0-9a-f]{64}\.cubin", f) for f in files)


def test_cache_depends_on_sources_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", str(tmp_path))
    _cubin()
    monkeypatch.setattr(_cuda, "_all_sources", lambda: b"another")
    _cubin()
    monkeypatch.setattr(_cuda, "_versions", lambda: "another")
    _cubin()
    assert len(compilations) == 3


@pytest.mark.parametrize("damage", ("cut", "flipped", "empty", "folder"))
def test_cache_survives_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str], damage: str
) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", str(tmp_path))
    first = _cubin()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(
            {"cut": content[:-1], "flipped": content[:-1] + b"\0", "empty": b""}[damage]
        )
    assert _cubin() == first and len(compilations) == 2
    assert [p.suffix for p in tmp_path.iterdir()] == [".cubin"]  # no part is left behind


def test_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert _cubin() == _cubin() and len(compilations) == 2


def test_cache_without_a_home(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    for name in ("FASTDIFF_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert _cuda.cache_folder() is None
    assert _cubin() == _cubin() and len(compilations) == 2


def test_real_cubin_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", os.fspath(tmp_path))
    first = _cubin()
    assert first[:4] == b"\x7fELF" and _cubin() == first
