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


def _load(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _provenance(row: dict[str, Any]) -> str:
    m = row["machine"]
    return (
        f"`{row['command']}` on {m['cpu']}, {m['cores']} cores ({m['isa']}), "
        f"torch {m['torch']}, diffusers {m['diffusers']}."
    )


BENCHMARKS = (
    "reverse_step.json",
    "guidance_rescale.json",
    "noise.json",
    "reparameterize.json",
    "film_norm.json",
    "film_conv2d.json",
    "modulate.json",
    "unet.json",
)

# rows of the results that are no peers: the roofline, and our own other form
_NO_PEERS = ("copy", "clone", "fastdiff, allocating")


def benchmark_table() -> str:
    """Ratios of a peer's time to ours on two threads, from benchmarks/results."""
    parts = []
    for name in BENCHMARKS:
        found = _load(name)
        rows = [
            [
                r["case"],
                "x".join(map(str, r["shape"])),
                f"{r['seconds'][r['ours']]['median'] * 1e6:.0f} us",
                ", ".join(
                    f"{peer} {ratio['median']:.1f}x"
                    for peer, ratio in r["ratios"].items()
                    if peer not in _NO_PEERS
                ),
            ]
            for r in found
            if r["threads"] == 2
        ]
        if rows:
            head = ["case", "shape", "fastdiff", "how many times longer the peer takes"]
            parts.append(f"{_table(head, rows)}\n\n{_provenance(found[0])}")
    if not parts:
        return ""
    note = (
        "Two threads, float32 unless a row says otherwise, medians of rounds in which all "
        "functions of a row are called in turn in one process. More columns, the roofline and one "
        "thread: `python -m benchmarks.report benchmarks/results/*.json`."
    )
    return "\n\n".join([note, *parts])


def quality_table() -> str:
    """Accuracy and Frechet distance of the shipped model, by solver and steps."""
    found = _load("quality.json")
    if not found:
        return ""
    first = found[0]
    rows = [
        [
            f"`{r['solver']}`",
            str(r["steps"]),
            str(r["nfe"]),
            str(r["n"]),
            f"{100 * r['accuracy']:.1f} %",
            f"{r['frechet']:.2f}",
            f"{r['frechet_ratio']:.1f}",
            f"{r['frechet_ratio_same_n']:.2f}",
        ]
        for r in found
    ]
    head = [
        "solver",
        "steps",
        "evaluations",
        "samples",
        "classified as their label",
        "Frechet distance to the test images",
        "over that of 10,000 real images",
        "over that of as many real images",
    ]
    note = (
        f"Judged by a small CNN that labels {100 * first['classifier_accuracy']:.1f} % of the real "
        f"test images rightly; the distance is between its features, guidance "
        f"{first['guidance']:g}. Few samples make any set look farther from the test images, real "
        f"ones too: the last column divides by the distance of as many real training images."
    )
    return f"{note}\n\n{_table(head, rows)}\n\n{_provenance(first)}"


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
