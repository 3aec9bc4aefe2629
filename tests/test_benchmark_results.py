"""The results in the repository are what the commands beside them make."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {
    path.stem: [r for r in json.loads(path.read_text()) if isinstance(r, dict)]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))
}
# rows of several functions timed in turn, as `measure.row` makes them
TIMED = {k: rows for k, rows in RESULTS.items() if rows and all("ratios" in r for r in rows)}


def options(command: str) -> tuple[str, dict[str, list[str]]]:
    """The module that a command runs, and its arguments by name."""
    words = shlex.split(command)
    module, given = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    found: dict[str, list[str]] = {}
    for word in given:
        if word.startswith("--"):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return module, found


def test_there_are_results() -> None:
    assert {"film_conv2d", "film_norm", "modulate", "reverse_step", "unet"} <= set(TIMED)


@pytest.mark.parametrize("name", TIMED)
def test_rows_can_be_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for row in TIMED[name]:
        measure.show(row, "a fact")
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and row["case"] in line and "; a fact" in line
        for peer, ratio in row["ratios"].items():
            told = f"; {peer} takes {ratio['quiet']:.2f} times as long in the fastest round"
            assert (told in line) is (peer != "copy")


@pytest.mark.parametrize("name", TIMED)
def test_rows_are_those_of_their_command(name: str) -> None:
    rows: list[dict[str, Any]] = TIMED[name]
    (command,) = {r["command"] for r in rows}
    module, given = options(command)
    assert module == f"benchmarks.bench_{name}"
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert given.get("--out", [f"benchmarks/results/{name}.json"])[0].endswith(f"{name}.json")
    rounds = {t["rounds"] for r in rows for t in r["seconds"].values()}
    assert len(rounds) == 1
    if "--repeats" in given:
        assert rounds == set(map(int, given["--repeats"]))
    if "--threads" in given:
        assert {r["threads"] for r in rows} == set(map(int, given["--threads"]))
    assert all(r["machine"]["threads"] == r["threads"] for r in rows)
    if "--no-compile" in given:
        assert not any("compiled" in who for r in rows for who in r["seconds"])
    # a run that writes its rows as it goes changes the checkout itself
    assert len({r["machine"]["commit"].removesuffix("+changes") for r in rows}) == 1
