"""Every block of the README and of docs/solvers.md runs; tables are those of the registries."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_turn(capsys):
    assert len(PYTHON) >= 5
    scope: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), scope)
    assert "x0 in [" in capsys.readouterr().out


def test_python_of_the_solvers_page_runs():
    page = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(block, "docs/solvers.md", "exec"), {})


def _fastdiff_commands():
    lines = [line.partition("#")[0].strip() for block in SHELL for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("fastdiff ")]


@pytest.mark.parametrize("command", _fastdiff_commands())
def test_commands_run(command, tmp_path):
    words = shlex.split(command)[1:]
    if words[0] == "train":  # the hours of training are not: its options are
        words += ["--help"]
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "--outdir" in words:
        assert len(list((tmp_path / words[words.index("--outdir") + 1]).rglob("*.png"))) == 16
    elif words[0] == "sample":
        name = words[words.index("--out") + 1] if "--out" in words else "samples.png"
        assert (tmp_path / name).stat().st_size > 0


def test_two_commands_do_the_set_up():
    marked = re.findall(r"<!-- command: (\w+) -->\n```sh\n(.*?)\n```", README)
    assert [name for name, _ in marked] == ["run", "test"]
    assert all("-c constraints.txt" in command for _, command in marked)


def test_generated_parts_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.readme", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
