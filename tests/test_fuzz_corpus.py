"""The kept inputs of the fuzzers, each within seconds: see scripts/fuzz/targets.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "fuzz"))
import targets  # noqa: E402

CORPUS = ROOT / "tests" / "corpus"
KEPT = sorted(p.relative_to(CORPUS).as_posix() for p in CORPUS.glob("*/*"))


def test_every_target_has_a_corpus() -> None:
    assert {name.split("/")[0] for name in KEPT} == set(targets.TARGETS)


@pytest.mark.parametrize("name", KEPT)
def test_is_taken_or_refused_by_name(name: str) -> None:
    targets.TARGETS[name.split("/")[0]]((CORPUS / name).read_bytes())


# a rule that takes everything would find nothing
@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("x: y"), ValueError("no name")])
def test_the_rule_can_fail(error: Exception) -> None:
    with pytest.raises((AssertionError, KeyError, RuntimeError)), targets.refusing():
        raise error
