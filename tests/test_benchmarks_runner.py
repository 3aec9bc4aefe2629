"""`python -m benchmarks`: it knows every benchmark, and compares the same cases of two commits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import __main__ as runner  # noqa: E402


def row(case: str, seconds: float, threads: int = 2) -> dict[str, Any]:
    times = {"best": seconds, "median": 2 * seconds}
    return {"case": case, "shape": [2, 3], "threads": threads, "ours": "fastdiff",
            "seconds": {"fastdiff": times, "torch": {"best": 9.0, "median": 9.0}}}  # fmt: skip


def test_every_benchmark_is_known_and_takes_out() -> None:
    found = runner.names()
    assert {"reverse_step", "loop", "schedulers", "startup", "unet"} <= set(found)
    for name in found:
        text = (ROOT / "benchmarks" / f"bench_{name}.py").read_text()
        assert "--out" in text or "measure.parser" in text


def test_the_base_is_compared_case_by_case_from_the_fastest_round() -> None:
    pairs = [
        ([row("a", 3.0), row("b", 1.0), row("gone", 1.0)], [row("a", 2.0), row("b", 4.0)]),
        ([row("a", 6.0), row("b", 2.0)], [row("a", 1.5), row("b", 5.0), row("new", 1.0)]),
    ]
    assert runner.compared(pairs) == [("a 2x3  2 threads", 2.0), ("b 2x3  2 threads", 0.25)]


def test_cases_of_other_threads_are_others() -> None:
    pairs = [([row("a", 3.0, 1)], [row("a", 2.0, 1), row("a", 1.0, 2)])]
    assert runner.compared(pairs) == [("a 2x3  1 threads", 1.5)]


def test_an_unknown_commit_is_named(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    with pytest.raises(RuntimeError, match="no-such-commit"):
        runner.build("no-such-commit", tmp_path)


def test_a_commit_is_built_from_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    really, built = runner._do, []

    def do(*words: str) -> None:
        if words[0] == "git":
            really(*words)
        else:
            built.append(words)

    monkeypatch.setattr(runner, "_do", do)
    target = runner.build("HEAD", tmp_path)
    show = ["git", "-C", str(ROOT), "show", "HEAD:fastdiff/version.py"]
    committed = subprocess.run(show, capture_output=True, check=True).stdout
    assert (tmp_path / "source" / "fastdiff" / "version.py").read_bytes() == committed
    assert built[0][-2:] == (str(target), str(tmp_path / "source"))
    assert runner.build(None, tmp_path) == target
    assert built[1][-2:] == (str(target), str(ROOT))


def test_a_benchmark_runs_on_the_library_of_its_folder(tmp_path: Path) -> None:
    """Not on the checkout, nor on what an editable install would find."""
    library = tmp_path / "library"
    (library / "fastdiff").mkdir(parents=True)
    (library / "fastdiff" / "__init__.py").write_text("WHO = 'of the folder'")
    (tmp_path / "probe_bench.py").write_text(
        "import sys, fastdiff\nprint(__name__, fastdiff.WHO, sys.argv[1:])"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", runner._LAUNCH, str(library), "probe_bench", "--out", "x"],
        env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "__main__ of the folder ['--out', 'x']\n", done.stderr


@pytest.mark.parametrize("ended", (True, False), ids=("ends", "fails"))
def test_one_that_fails_is_named(
    ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = {**row("a", 1.0), "ratios": {}, "targets": {}, "machine": {}, "command": "c"}

    def start(words: list[str], **how: Any) -> Any:
        Path(words[words.index("--out") + 1]).write_text(json.dumps([made]))
        return subprocess.CompletedProcess(words, 0 if ended else 1)

    monkeypatch.setattr(runner.subprocess, "run", start)
    monkeypatch.setattr(runner.report, "plot", lambda rows, path: None)
    assert runner.main(["--only", "noise", "--out", str(tmp_path)]) == (0 if ended else 1)
    assert ("failed: noise" in capfd.readouterr().err) is not ended
    assert "| a | 2x3 |" in (tmp_path / "report.md").read_text()


def test_the_list() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == runner.names()
