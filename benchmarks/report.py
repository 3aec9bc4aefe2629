"""Benchmark JSON to tables, one a file, and one plot of all.

    python -m benchmarks.report benchmarks/results/*.json --out report.md --plot report.svg

Needs matplotlib for the plot alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load(paths: Iterable[str | Path]) -> list[Row]:
    """Timed rows of all files, each with the name of its file; others are passed over."""
    rows: list[Row] = []
    for path in map(Path, paths):
        found = json.loads(path.read_text(encoding="utf-8"))
        timed = [
            r for r in found if isinstance(r, dict) and {"case", "seconds", "ratios"} <= set(r)
        ]
        # a row that names no threads had those of its process
        rows += [{"threads": r["machine"].get("threads"), **r, "file": path.stem} for r in timed]
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
    if roofline and roofline.get("at most") is not None:
        got, aim = roofline["quiet"], roofline["at most"]
        found.append((f"ours / roofline, at most {aim:g}", got, aim, got <= aim))
    if row.get("microseconds_at_most") is not None:
        got, aim = row["seconds"][row["ours"]]["best"] * 1e6, row["microseconds_at_most"]
        found.append((f"microseconds, at most {aim:g}", got, aim, got <= aim))
    return found


def by_file(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each file."""
    return {name: [r for r in rows if r["file"] == name] for name in _unique(rows, "file")}


def _unique(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(r[key] for r in rows if r.get(key) is not None))


def _peers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(p for r in rows for p in r["ratios"]))


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each file a line a row, then the targets, the commands and the machines."""
    lines = [
        "# Benchmarks",
        "",
        "Fastest round, and in brackets the median round. A column with a peer's name: how many "
        "times longer the peer takes. Roofline: the bytes that the step must move, at the "
        "bandwidth of `copy` in the same run. Written by `python -m benchmarks.report`.",
    ]
    for name, its in by_file(rows).items():
        lines += ["", f"## {name}", "", *_lines(its)]
        aimed = [(r, *t) for r in its for t in targets(r)]
        if aimed:
            lines += ["", "| case | shape | threads | target | got | met |", "|" + " --- |" * 6]
        for r, what, got, _, met in aimed:
            cells = [r["case"], _shape(r), str(r["threads"]), what, f"{got:.2f}"]
            lines.append("| " + " | ".join([*cells, "yes" if met else "no"]) + " |")
        lines += ["", *(f"`{command.strip()}`" for command in _unique(its, "command"))]
        lines += [f"on {facts}." for facts in dict.fromkeys(_machine(r) for r in its)]
    return "\n".join(lines) + "\n"


def _lines(rows: Sequence[Row]) -> list[str]:
    """The table of one file, without the columns that it has nothing for."""
    peers, timed = _peers(rows), any(r.get("over_roofline") for r in rows)
    facts = [key for key in ("dtype", "solver", "steps") if len(_unique(rows, key)) > 1]
    head = ["case", "shape", *facts, "threads", "ours", *(["of roofline"] if timed else []), *peers]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        ours = r["seconds"][r["ours"]]
        cells = [r["case"], _shape(r), *(str(r.get(key, "")) for key in facts), str(r["threads"])]
        cells.append(f"{_time(ours['best'])} ({_time(ours['median'])})")
        if timed:
            roofline = r.get("over_roofline")
            cells.append(f"{roofline['quiet']:.2f} ({roofline['median']:.2f})" if roofline else "")
        lines.append("| " + " | ".join([*cells, *(_ratio(r, p) for p in peers)]) + " |")
    return lines


def _machine(row: Row) -> str:
    shown = {k: v for k, v in row["machine"].items() if k not in ("threads", "load")}
    return ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None)


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """A line for each peer of each file: a dot a row at the peer's time over ours, and the median.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise RuntimeError(
            "report: --plot needs matplotlib (pip install 'fastdiff-sampler[peers]')"
        ) from error
    threads, shown, labels = sorted(_unique(rows, "threads")), set(), []
    # names in the file that change with each run would make another picture of the same rows
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(layout="constrained")
        for k, (name, its) in enumerate(by_file(rows).items()):
            start = len(labels)
            for peer in _peers(its):
                found = [(r["ratios"][peer]["quiet"], r) for r in its if peer in r["ratios"]]
                for n in threads:
                    across = [ratio for ratio, r in found if r["threads"] == n]
                    if across:
                        style = {"color": f"C{threads.index(n)}", "alpha": 0.6, "linewidths": 0}
                        label = None if n in shown else f"{n} thread{'s' if n > 1 else ''}"
                        height = [len(labels)] * len(across)
                        axes.scatter(across, height, s=16, label=label, **style)
                        shown.add(n)
                middle = statistics.median(ratio for ratio, _ in found)
                axes.plot(middle, len(labels), marker="|", color="black", markersize=9)
                labels.append(f"{name}: {peer}")
            if k % 2 and len(labels) > start:
                axes.axhspan(start - 0.5, len(labels) - 0.5, color="0.94", zorder=0)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("time over ours, fastest rounds; a dot a row, | their median")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="x", linewidth=0.3)
        axes.legend(loc="upper right", fontsize=8)
        figure.set_size_inches(9, 1.2 + 0.17 * len(labels))
        metadata = {"Date": None} if Path(path).suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=metadata)
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
        Path(args.out).write_text(text, encoding="utf-8")
    else:
        print(text)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
