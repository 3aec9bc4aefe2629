"""Builders are float64 maths on the host: what they import, and how long they take."""

from __future__ import annotations

import ast
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import schedules, solvers

FOLDER = Path(fastdiff.__file__).parent / "solvers"
# besides the standard library: arrays, the schedule that is walked, and what a row is
ALLOWED = ("numpy", "fastdiff.schedules", "fastdiff.solvers", "fastdiff.table")
SECONDS = 0.25


def _imported(tree: ast.AST) -> set[str]:
    """Full names, a name for each thing that is taken from a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _foreign(name: str) -> bool:
    """Whether the import is neither allowed nor of the standard library."""
    first = name.partition(".")[0]
    inside = any(name == a or name.startswith(f"{a}.") for a in ALLOWED)
    return not inside and first not in sys.stdlib_module_names


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda f: f.stem)
def test_builders_import_neither_torch_nor_a_backend(file: Path) -> None:
    names = _imported(ast.parse(file.read_text(encoding="utf-8")))
    assert [name for name in sorted(names) if _foreign(name)] == []


def test_foreign_imports_are_seen() -> None:
    code = "import torch.nn\nfrom fastdiff.ops import noise\nfrom fastdiff import table, backends"
    names = _imported(ast.parse(code))
    assert {n for n in names if _foreign(n)} == {
        "torch.nn", "fastdiff.ops.noise", "fastdiff.backends",
    }  # fmt: skip


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_thousand_steps_build_in_a_quarter_of_a_second(name: str) -> None:
    """Best of three: other jobs of the machine may hold up one."""
    schedule, taken = schedules.linear(), []
    for _ in range(3):
        start = time.process_time()
        table = solvers.build(name, schedule, 1000)
        taken.append(time.process_time() - start)
        assert len(table) >= 1000
    assert min(taken) < SECONDS


def test_tables_hold_no_tensor_until_they_are_packed() -> None:
    table = solvers.build("dpmpp_2m", schedules.linear(), 10)
    assert isinstance(table.floats, np.ndarray) and table._packed == {}
    assert isinstance(table.packed().floats, torch.Tensor)
