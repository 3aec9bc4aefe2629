"""The statistical battery reads the library's own words, passes them, and fails what is bad."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fastdiff.reference.noise import philox

PATH = Path(__file__).parents[1] / "scripts" / "noise_battery" / "run.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("noise_battery", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


battery = _load()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if battery.compiler() is None:
        pytest.skip("no C++ compiler")
    built: Path = battery.build(tmp_path_factory.mktemp("battery"))
    return built


# feed: (block, step, stream, seed) of its n-th counter
COUNTERS: dict[str, Callable[[int], tuple[int, int, int, int]]] = {
    "elements": lambda n: (n, 0, 0, 7),
    "steps": lambda n: (0, n, 1, 7),
    "seeds": lambda n: (0, 0, 0, 7 + n),
    "mixed": lambda n: (n >> 10, n >> 3 & 7, n & 7, 7 + (n % 1024 >> 6)),
}


@pytest.mark.parametrize("feed", COUNTERS)
def test_a_feed_reads_the_words_that_the_reference_draws(program: Path, feed: str) -> None:
    """Two groups of 1,024 counters, so that what changes from group to group is seen too."""
    process = subprocess.Popen([program, feed, "7", "10", "0"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    raw = process.stdout.read(2 * 4096 * 4)
    process.kill()
    process.communicate()
    places = np.array([COUNTERS[feed](n) for n in range(2048)], np.uint64)
    counters = places.copy()
    counters[:, 1], counters[:, 2], counters[:, 3] = 0, places[:, 1], places[:, 2]
    words = philox(counters, places[:, 3]).astype(np.uint32)
    if feed != "elements":  # word 0 of every counter of a group, then word 1, ...
        words = words.reshape(2, 1024, 4).transpose(0, 2, 1)
    np.testing.assert_array_equal(np.frombuffer(raw, np.uint32), words.ravel())


@pytest.mark.parametrize("feed", [*COUNTERS, *(f"normals-{name}" for name in COUNTERS)])
def test_the_noise_passes(program: Path, feed: str) -> None:
    """16 MiB of raw words, or 8 MiB of uniforms: a small part of what the logs hold."""
    results = battery.run(program, feed, 0, 10, 23 if feed.startswith("normals") else 24)
    assert len(results) == (31 if feed.startswith("normals") else 23)
    assert [r for r in results if r.p < battery.FAIL] == []


# a control of each kind, and a test that must see it
CONTROLS: list[Any] = [
    pytest.param("elements", 4, "pairs-of-low-bytes-256", id="four rounds: a stream"),
    pytest.param("mixed", 5, "correlations-64", id="five rounds: neighbours of every kind"),
    pytest.param("normals-mixed", 3, "bits-32", id="three rounds, seen through the normals"),
    pytest.param("lcg64", 10, "half-0", id="LCG: its low bits"),
    pytest.param("xorshift128", 10, "ranks-256", id="linear over GF(2): ranks"),
]


@pytest.mark.parametrize(("feed", "rounds", "test"), CONTROLS)
def test_a_bad_generator_fails(program: Path, feed: str, rounds: int, test: str) -> None:
    results = {r.test: r.p for r in battery.run(program, feed, 0, rounds, 24)}
    assert results[test] < battery.FAIL


def test_p_values_count_both_tails() -> None:
    """Of a chi2, a z score and a Poisson count at, far above and far below what is expected."""
    assert battery.p_value("chi2", 99.3, 100) > 0.9
    assert max(battery.p_value("chi2", x, 100) for x in (200.0, 30.0)) < 1e-7
    assert battery.p_value("z", 0.0, 1) == 1.0 and battery.p_value("z", -6.0, 1) < 1e-8
    assert battery.p_value("poisson", 50, 50) > 0.9
    assert max(battery.p_value("poisson", x, 50) for x in (100, 10)) < 1e-6
