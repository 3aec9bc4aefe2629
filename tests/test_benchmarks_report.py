"""`python -m benchmarks.report`: a table a file and a plot, of whatever the benchmarks wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import report  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def row(case: str, peers: dict[str, float], **more: Any) -> dict[str, Any]:
    """A row of one second, fastest and median."""
    times = {
        name: {"best": ratio, "median": ratio} for name, ratio in {"ours": 1.0, **peers}.items()
    }
    ratios = {name: {"quiet": ratio, "median": ratio} for name, ratio in peers.items()}
    return {
        "case": case, "shape": [2, 3], "ours": "ours", "seconds": times, "ratios": ratios,
        "targets": {}, "machine": {"cpu": "C", "threads": 4}, "command": f"run {case}", **more,
    }  # fmt: skip


def written(folder: Path, **files: Any) -> list[Path]:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return sorted(folder.glob("*.json"))


def test_a_table_a_file(tmp_path: Path) -> None:
    roofline = {"quiet": 1.5, "median": 1.6}
    paths = written(
        tmp_path,
        a=[row("x", {"torch": 3.0}, threads=1, dtype="float32", targets={"torch": ["at least", 4]}),
           row("y", {"torch": 5.0}, threads=2, dtype="bfloat16", over_roofline=roofline)],
        b=[row("z", {"other": 0.5}, over_roofline={**roofline, "at most": 2.0})],
        c={"compiled": 1},
        d=[{"case": "quality", "label_accuracy": 0.9}],
    )  # fmt: skip
    rows = report.load(paths)
    # a row that names no threads had those of its process
    assert [(r["file"], r["threads"]) for r in rows] == [("a", 1), ("a", 2), ("b", 4)]
    text = report.table(rows)
    first, second = text.split("\n## ")[1:]
    assert "| x | 2x3 | float32 | 1 | 1000.00 ms (1000.00 ms) |  | 3.00 (3.00) |" in first
    assert "| y | 2x3 | bfloat16 | 2 | 1000.00 ms (1000.00 ms) | 1.50 (1.60) | 5.00" in first
    assert "| x | 2x3 | 1 | torch / ours, at least 4 | 3.00 | no |" in first
    assert "other" not in first and "torch" not in second and "dtype" not in second
    assert "| z | 2x3 | 4 | ours / roofline, at most 2 | 1.50 | yes |" in second
    assert "`run x`\n`run y`\non cpu C." in first and "`run z`\non cpu C." in second


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot(suffix: str, tmp_path: Path) -> None:
    paths = written(tmp_path, a=[row("x", {"torch": 3.0})], b=[row("alone", {})])
    one, again = (tmp_path / f"{name}.{suffix}" for name in ("one", "again"))
    for path in (one, again):
        report.main([*map(str, paths), "--out", str(tmp_path / "t.md"), "--plot", str(path)])
    # the same rows give the same file
    assert one.read_bytes() == again.read_bytes()
    if suffix == "svg":
        text = one.read_text()
        assert "a: torch" in text and "4 threads" in text and "b: " not in text


def test_the_committed_report_is_of_the_committed_rows() -> None:
    found = (ROOT / "benchmarks" / "results" / "report.md").read_text(encoding="utf-8")
    assert found == report.table(report.load(RESULTS))
