"""scripts/gpu: what it runs on a GPU, as far as a CPU can tell."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff import solvers
from fastdiff.ops import _native

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "gpu"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hashes = script("hashes")


@pytest.fixture
def want() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(hashes.FILE.read_text())
    return found


def test_the_file_is_whole(want: dict[str, Any]) -> None:
    assert len(want["normals"]) * hashes.CHUNK == 1 << 32
    assert len(set(want["normals"].values())) == len(want["normals"])
    assert len(want["loops"]) == 2 * len(solvers.SOLVERS)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_the_hashes_are_those_of_this_machine(
    want: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first 2^26 normals, and all loops
    assert hashes.check(["cpu"], want, hashes.CHUNK) == []

    # what differs, and what is gone, is named
    monkeypatch.setattr(hashes, "loops", lambda device: iter([("ddim", "0"), ("new", "1")]))
    loops = {"ddim": want["loops"]["ddim"], "euler": want["loops"]["euler"]}
    assert hashes.check(["cpu"], {"normals": {}, "loops": loops}, 0) == [
        "cpu, loops: ddim", "cpu, loops: new", "cpu, loops: euler is missing",
    ]  # fmt: skip


def test_a_machine_that_lacks_a_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "unavailable", lambda name: None if name == "triton" else "gone")
    found = hashes.ways(["triton", "cuda"])
    assert [next(found)[0] for _ in range(3)] == [
        "triton",
        "triton, graph",
        "triton, unrolled graph",
    ]
    with pytest.raises(SystemExit, match="backend must be able to run, got cuda: gone"):
        next(found)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_the_benchmark_on_small_tensors(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert (
        script("bench").main(["--device", "cpu", "--small", "--rounds", "1", "--out", str(out)])
        == 0
    )
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    cases = [row["case"] for row in found["kernels"]]
    assert cases[:2] == ["step ddim", "node ddim"] and cases.count("film_norm") == 5
    assert all(row.get("of_copy", row.get("microseconds", 0)) > 0 for row in found["kernels"])
    assert found["loops"]["fastdiff eager"]["best"] > 0
    assert found["machine"]["torch"] == torch.__version__


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_a_part_that_is_none(tmp_path: Path) -> None:
    words = ["bash", str(FOLDER / "run.sh"), "nothing", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    parts = "wheels, all, build, tests, triton, cuda, bench or sanitize"
    assert f"part must be {parts}, got nothing" in done.stderr
