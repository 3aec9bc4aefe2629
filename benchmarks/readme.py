"""Write the generated parts of README.md: ``python -m benchmarks.readme`` (``--check`` compares).

Everything between ``<!-- generated: NAME -->`` and ``<!-- end -->`` comes from the registries and
from the JSON in benchmarks/results, so the README cannot drift from either.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdiff import ops, schedules, solvers
from fastdiff.backends import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def solver_table() -> str:
    """One row a solver, from the tables themselves."""
    rows = []
    for name, builder in solvers.SOLVERS.items():
        table = solvers.build(name, schedules.cosine(), 20, prediction="v_prediction")
        source = (builder.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        rows.append(
            [
                f"`{name}`",
                str(table.order),
                str(table.nfe),
                "yes" if table.stochastic else "no",
                str(table.depth),
                source,
            ]
        )
    head = ["solver", "order", "evaluations at 20 steps", "noise", "history", "source"]
    return _table(head, rows)


def backend_table() -> str:
    """Which op has which backend."""
    rows = [
        [f"`{name}`", *("yes" if backend in op.backends else "no" for backend in BACKENDS)]
        for name, op in ops.OPS.items()
    ]
    return _table(["op", *BACKENDS], rows)


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _provenance(results: dict[str, Any]) -> str:
    m = results["machine"]
    return (
        f"`{results['command']}` on {m['cpu']}, {m['cores']} cores ({m['isa']}), "
        f"torch {m['torch']}, diffusers {m['diffusers']}."
    )


def benchmark_table() -> str:
    """Ratios of a peer's time to ours, from benchmarks/results."""
    parts = []
    for name in ("reverse_step.json", "noise.json", "reparameterize.json"):
        if not (RESULTS / name).exists():
            continue
        results = _load(name)
        rows = []
        for r in results["rows"]:
            ours = r["seconds"][r["ours"]]["median"]
            ratios = [
                f"{peer} {ratio['median']:.1f}x"
                for peer, ratio in r["ratios"].items()
                if peer not in ("copy", "fastdiff, allocating")
            ]
            rows.append([r["case"], f"{ours * 1e6:.0f} us", ", ".join(ratios)])
        head = ["case", "fastdiff", "how many times longer a peer takes, median of the rounds"]
        parts.append(f"{_table(head, rows)}\n\n{_provenance(results)}")
    return "\n\n".join(parts)


def quality_table() -> str:
    """Accuracy and Frechet distance of the shipped model, by solver and steps."""
    if not (RESULTS / "quality.json").exists():
        return ""
    results = _load("quality.json")
    rows = [
        [
            f"`{r['solver']}`",
            str(r["steps"]),
            f"{100 * r['accuracy']:.1f} %",
            f"{r['frechet_ratio']:.1f}",
        ]
        for r in results["rows"]
    ]
    head = ["solver", "steps", "classified as its label", "Frechet distance"]
    return f"{results['summary']}\n\n{_table(head, rows)}\n\n{_provenance(results)}"


PARTS: dict[str, Callable[[], str]] = {
    "solvers": solver_table,
    "backends": backend_table,
    "benchmarks": benchmark_table,
    "quality": quality_table,
}


def render(text: str) -> str:
    """The README with every generated part made anew."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
        body = make().strip()
        body = f"\n{body}\n\n" if body else ""
        text, count = re.subn(
            pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"readme: README.md must have one part {name!r}, got {count}")
    return text


def main() -> int:
    """Write or compare; exit status 1 where ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old)
    if check:
        if new != old:
            print("README.md is out of date: python -m benchmarks.readme", file=sys.stderr)
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
