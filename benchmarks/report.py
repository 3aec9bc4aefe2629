"""Benchmark JSON to one markdown table and one plot.

    python -m benchmarks.report benchmarks/results/*.json --plot benchmarks/results/ops.svg

Needs matplotlib for the plot alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load(paths: Iterable[str | Path]) -> list[Row]:
    """Rows of all files that `measure.write_json` wrote; others are passed over."""
    rows: list[Row] = []
    for path in paths:
        found = json.loads(Path(path).read_text())
        rows += [
            r for r in found if isinstance(r, dict) and {"case", "seconds", "ratios"} <= set(r)
        ]
    return rows


def _shape(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _ratio(row: Row, peer: str) -> str:
    found = row["ratios"].get(peer)
    return "" if found is None else f"{found['quiet']:.2f} ({found['median']:.2f})"


def targets(row: Row) -> list[tuple[str, float, float, bool]]:
    """(what, got, aimed at, met) of a row, from the fastest rounds."""
    found = []
    for peer, (sense, aim) in row["targets"].items():
        got = row["ratios"][peer]["quiet"]
        met = got >= aim if sense == "at least" else got <= aim
        found.append((f"{peer} / ours, {sense} {aim:g}", got, aim, met))
    roofline = row.get("over_roofline")
    if roofline and roofline["at most"] is not None:
        got, aim = roofline["quiet"], roofline["at most"]
        found.append((f"ours / roofline, at most {aim:g}", got, aim, got <= aim))
    if row.get("microseconds_at_most") is not None:
        got, aim = row["seconds"][row["ours"]]["best"] * 1e6, row["microseconds_at_most"]
        found.append((f"microseconds, at most {aim:g}", got, aim, got <= aim))
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line a row, then the targets, then machine and commands."""
    peers = list(dict.fromkeys(p for r in rows for p in r["ratios"]))
    head = ["case", "shape", "threads", "ours", "of roofline", *peers]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        roofline = r.get("over_roofline")
        of_roofline = f"{roofline['quiet']:.2f} ({roofline['median']:.2f})" if roofline else ""
        ours = r["seconds"][r["ours"]]
        cells = [r["case"], _shape(r), str(r["threads"])]
        cells += [f"{_time(ours['best'])} ({_time(ours['median'])})", of_roofline]
        lines.append("| " + " | ".join([*cells, *(_ratio(r, p) for p in peers)]) + " |")
    lines += [
        "",
        "Fastest round, and in brackets the median round. A column with a peer's name: how many "
        "times longer the peer takes. Roofline: the bytes that the step must move, at the "
        "bandwidth of `copy` in the same run.",
    ]
    aimed = [(r, *t) for r in rows for t in targets(r)]
    if aimed:
        lines += ["", "| case | shape | threads | target | got | met |", "|" + " --- |" * 6]
        for r, what, got, _, met in aimed:
            cells = [r["case"], _shape(r), str(r["threads"]), what, f"{got:.2f}"]
            lines.append("| " + " | ".join([*cells, "yes" if met else "no"]) + " |")
    lines.append("")
    for command in dict.fromkeys(r["command"] for r in rows):
        lines.append(f"`{command.strip()}`")
    for facts in dict.fromkeys(_machine(r) for r in rows):
        lines.append(f"on {facts}.")
    return "\n".join(lines) + "\n"


def _machine(row: Row) -> str:
    shown = {k: v for k, v in row["machine"].items() if k not in ("threads", "load")}
    return ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None)


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Bars of every peer's time over ours, a group for each case and shape, a panel for threads.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError as error:
        raise RuntimeError(
            "report: --plot needs matplotlib (pip install 'fastdiff-sampler[peers]')"
        ) from error
    peers = list(dict.fromkeys(p for r in rows for p in r["ratios"] if p != "fastdiff, allocating"))
    threads = sorted({r["threads"] for r in rows}, reverse=True)
    figure, panels = pyplot.subplots(
        len(threads), 1, figsize=(11, 3.6 * len(threads)), squeeze=False, layout="constrained"
    )
    for panel, n in zip(panels[:, 0], threads, strict=True):
        mine = [r for r in rows if r["threads"] == n]
        width = 0.8 / len(peers)
        for k, peer in enumerate(peers):
            at = [i + k * width for i, r in enumerate(mine) if peer in r["ratios"]]
            high = [r["ratios"][peer]["quiet"] for r in mine if peer in r["ratios"]]
            # a colour by name: bars without data would leave theirs to the next peer
            panel.bar(at, high, width, color=f"C{k}")
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_ylabel("time over ours")
        panel.set_title(f"{n} thread{'s' if n > 1 else ''}")
        labels = [f"{r['case']}\n{_shape(r)}" for r in mine]
        panel.set_xticks([i + 0.4 for i in range(len(mine))], labels, rotation=60, fontsize=6)
    keys = [Patch(color=f"C{k}", label=peer) for k, peer in enumerate(peers)]
    figure.legend(handles=keys, loc="outside upper center", fontsize=7, ncols=len(peers))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", help="JSON files")
    parser.add_argument("--out", help="markdown file; the default is to print it")
    parser.add_argument("--plot", help="SVG or PNG file")
    args = parser.parse_args(argv)
    rows = load(args.results)
    if not rows:
        parser.error("no rows in these files")
    text = table(rows)
    if args.out:
        Path(args.out).write_text(text)
    else:
        print(text)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
