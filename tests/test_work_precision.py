"""The benchmark of work and precision measures what it says, in small."""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastdiff import solvers

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # last, so that an installed fastdiff wins over the checkout
    sys.path.append(ROOT)
tables = import_module("benchmarks.tables")
work_precision = import_module("benchmarks.work_precision")

STEPS = (40, 80, 160)


@pytest.mark.parametrize("problem", work_precision.PROBLEMS)
def test_exact_flow_keeps_the_marginal(problem):
    """The exact flow from the schedule's noise ends likelier under the data than under a shift."""
    schedule, _ = work_precision.PROBLEMS[problem]
    alpha, sigma = (float(f(schedule.t_min)) for f in (schedule.alpha, schedule.sigma))
    x = work_precision.exact(problem, "sigma_min")
    likely = work_precision.MIXTURE.log_prob(x, alpha, sigma).mean()
    drawn = work_precision.MIXTURE.sample(20_000, torch.Generator().manual_seed(0))
    want = work_precision.MIXTURE.log_prob(drawn)
    # five standard errors; the start is the schedule's noise, not the exact marginal
    assert abs(float(likely - want.mean())) < 5 * float(want.std()) / math.sqrt(len(x)) + 0.05


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1.0), ("heun", 2.0), ("dpmpp_2m", 2.0)])
def test_orders(solver, order):
    rows = list(work_precision.order_rows([solver], STEPS))
    assert [r["problem"] for r in rows] == list(work_precision.PROBLEMS)
    for row in rows:
        assert abs(row["order"] - order) < 0.25, row


def test_a_refusal_is_kept_with_its_reason():
    def build(n):
        return solvers.build("ddim", work_precision.PROBLEMS["vp"][0], n)

    found = work_precision.curve(build, (0, 3), lambda table: 0.0)
    assert found["steps"] == [3] and "at least 1" in found["refused"][0]


def test_every_solver_is_defined_somewhere():
    for name in solvers.SOLVERS:
        for _, options in work_precision.variants(name):
            work_precision.is_stochastic(name, options)


def test_weak_error_and_its_confidence():
    (row, *_) = work_precision.weak_rows(["ddpm"], (5, 20), 4096)
    assert row["error"][1] < row["error"][0]
    assert all(0 < w < 0.1 for w in row["half_width_95"])
    assert row["error"][1] > row["half_width_95"][1]


def test_a_default_loses_the_order_and_ours_keeps_it():
    """Third order in diffusers: 1 by default, a division by zero to sigma_min; what docs/solvers.md
    shows of the results is measured here again."""
    rows = {
        (r["solver"], r["library"], r["setting"]): r
        for r in work_precision.peer_rows((80, 160, 320))
    }
    for solver in ("2M", "3M", "UniPC-2", "UniPC-3"):
        theirs, ours = (rows[solver, lib, "default"] for lib in ("diffusers", "fastdiff"))
        assert theirs["order"] < 1.5 and ours["order"] > 1.75
        assert ours["error"][-1] < theirs["error"][-1] / 5
    for solver in ("3M", "UniPC-2", "UniPC-3"):
        last = rows[solver, "diffusers", "karras, to sigma_min"]["error"][-1]
        ours = rows[solver, "fastdiff", "karras, to sigma_min"]
        assert ours["order"] > 1.75
        assert last is None or ours["error"][-1] < last / 5
    assert rows["3M", "diffusers", "karras, to sigma_min"]["error"][-1] is None
    assert rows["2M", "fastdiff", "karras, to sigma_min"]["order"] > 1.75


def test_rows_make_a_table_and_a_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra: fastdiff-sampler[peers]")
    out, picture = tmp_path / "work_precision.json", tmp_path / "work_precision.png"
    work_precision.main([
        "--parts", "order", "weak", "--solvers", "ddim", "ddpm", "--steps", "5", "10", "20",
        "--weak-steps", "10", "20", "--paths", "64", "--out", str(out), "--plot", str(picture),
    ])  # fmt: skip
    assert {r["case"] for r in json.loads(out.read_text())} == {"order", "weak"}
    assert picture.stat().st_size > 10_000
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.work_precision_table()
    assert "`ddim` | vp | 1 | " in table and "`ddpm` | vp | 1 |" in table
