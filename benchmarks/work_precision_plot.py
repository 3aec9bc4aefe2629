"""The plot of `benchmarks.work_precision`.

python -m benchmarks.work_precision_plot benchmarks/results/work_precision.json out.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELLED = 8  # solvers with a name of their own in a panel: the best at the middle count


def plot(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A panel for each problem of the deterministic solvers, one for noise, one for the peers.

    Args:
        rows: of the JSON, any of its cases.
        path: of the PNG or SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problems = list(dict.fromkeys(r["problem"] for r in rows if r["case"] == "order"))
    noisy = [r for r in rows if r["case"] == "weak"]
    noisy = [r for r in noisy if r["problem"] == noisy[0]["problem"]]
    peers = [r for r in rows if r["case"] == "peer"]
    panels = [*problems, *(["weak"] if noisy else []), *(["peer"] if peers else [])]
    if not panels:
        raise ValueError(
            "work_precision_plot: rows must hold an order, weak or peer case, got none"
        )
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 4.0 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        if panel == "peer":
            _peers(axis, peers)
        elif panel == "weak":
            _curves(axis, noisy, "with noise: error of E |x|$^2$, 95 % band")
        else:
            chosen = [r for r in rows if r["case"] == "order" and r["problem"] == panel]
            _curves(axis, chosen, f"deterministic, {panel}: RMS error")
        axis.set(xscale="log", yscale="log", xlabel="model evaluations")
        ticks = [n for n in (5, 10, 20, 50, 100, 200, 500) if n <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    if str(path).endswith(".png"):
        from PIL import Image

        with Image.open(path) as image:  # lines need few colours: a quarter of the bytes
            small = image.convert("RGB").quantize(160)
        small.save(path, optimize=True)


def _curves(axis: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    """A line a solver, coloured by its stated order; names for the best."""
    drawn = [(r, [(n, e) for n, e in zip(r["nfe"], r["error"], strict=True) if e]) for r in rows]
    drawn = [(r, points) for r, points in drawn if points]

    def at_middle(item: tuple[dict[str, Any], list[tuple[int, float]]]) -> float:
        return min(item[1], key=lambda point: abs(point[0] - 40))[1]

    named = sorted(drawn, key=at_middle)[:LABELLED]
    for r, points in drawn:
        counts, errors = zip(*points, strict=True)
        is_named = any(r is other for other, _ in named)
        colour = None if is_named else "0.75"
        label = f"{r['solver']} ({r['stated_order']})" if is_named else None
        (line,) = axis.plot(
            counts, errors, ".-", lw=1.2 if is_named else 0.7, ms=3, color=colour, label=label,
            zorder=2 if is_named else 1,
        )  # fmt: skip
        if "half_width_95" in r and is_named:
            low = [max(e - h, e / 10) for e, h in zip(r["error"], r["half_width_95"], strict=True)]
            high = [e + h for e, h in zip(r["error"], r["half_width_95"], strict=True)]
            axis.fill_between(r["nfe"], low, high, color=line.get_color(), alpha=0.15)
    axis.set_title(f"{title}\n(stated order in brackets, other solvers grey)", fontsize=8)


def _peers(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """diffusers dashed, ours solid; a colour a solver; the default and the best setting."""
    names = list(dict.fromkeys(r["solver"] for r in rows))
    marks = {"default": "o", "karras, to sigma_min": "s"}
    for r in rows:
        points = [(n, e) for n, e in zip(r["nfe"], r["error"], strict=True) if e]
        if r["setting"] not in marks or not points:
            continue
        counts, errors = zip(*points, strict=True)
        colour = f"C{names.index(r['solver'])}"
        axis.plot(
            counts, errors, marker=marks[r["setting"]], ms=3, lw=1, color=colour,
            ls="--" if r["library"] == "diffusers" else "-",
            label=r["solver"] if (r["setting"], r["library"]) == ("default", "fastdiff") else None,
        )  # fmt: skip
    for library, dash in (("fastdiff", "-"), ("diffusers", "--")):
        for setting, mark in marks.items():
            axis.plot(
                [], [], marker=mark, ls=dash, ms=3, lw=1, color="k", label=f"{library}, {setting}"
            )
    axis.set_title("the same solver in diffusers and here", fontsize=8)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
