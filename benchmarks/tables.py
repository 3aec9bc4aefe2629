"""The tables of README.md and docs, from the registries and the JSON in benchmarks/results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdiff import cli, ops
from fastdiff.backends import BACKENDS

RESULTS = Path(__file__).resolve().parent / "results"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def solver_table() -> str:
    """One row a solver, from the tables themselves."""
    rows = [
        [
            f"`{name}`",
            str(table.order),
            str(table.nfe),
            "yes" if table.stochastic else "no",
            str(table.depth),
            source,
        ]
        for name, table, source in cli.overview()
    ]
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
    "reverse_step_solvers.json",
    "guidance_rescale.json",
    "brownian.json",
    "dynamic_threshold.json",
    "noise.json",
    "add_noise.json",
    "reparameterize.json",
    "film_norm.json",
    "film_conv2d.json",
    "modulate.json",
    "unet.json",
    "loop.json",
    "schedulers.json",
    "k_diffusion.json",
    "torch_noise.json",
    "startup.json",
)

# rows of the results that are no peers: the roofline, and our own other form
_NO_PEERS = ("copy", "clone", "fastdiff, allocating", "fastdiff, counter noise")

# what the README shows: words, file, case, shape, peers
_STEP, _VIDEO = [8, 4, 128, 128], [1, 16, 21, 90, 160]
_PEERS = ("diffusers", "diffusers, compiled")
_CHAIN = ("eager", "compiled")
HEADLINES: tuple[tuple[str, str, str, list[int], tuple[str, ...]], ...] = (
    ("DDIM step", "reverse_step", "ddim", _STEP, _PEERS),
    ("DPM-Solver++ 2M step", "reverse_step", "dpmpp_2m", _STEP, _PEERS),
    ("DDPM step with its noise", "reverse_step", "ddpm", _STEP, _PEERS),
    ("UniPC step", "reverse_step_solvers", "unipc-2", _VIDEO, ("diffusers",)),
    ("SDE step on a Brownian path", "brownian", "step", [4, 4, 128, 128], ("diffusers",)),
    ("normals", "noise", "randn", [1, 1048576], ("torch.randn",)),
    ("torch's own normals, bit for bit", "torch_noise", "torch_noise", [524288], ("torch",)),
    ("`add_noise`", "add_noise", "add_noise epsilon", [64, 3, 64, 64], ("eager", "diffusers")),
    (
        "`reparameterize` and its gradient", "reparameterize", "reparameterize forward+backward",
        [256, 4096], _CHAIN,
    ),
    (
        "GroupNorm, FiLM, SiLU in bfloat16", "film_norm", "film_norm bf16 channels_last",
        [16, 128, 32, 32], _CHAIN,
    ),
    (
        "the same before a 3x3 convolution", "film_conv2d", "film_conv2d channels_last",
        [16, 128, 32, 32], _CHAIN,
    ),
    ("LayerNorm, modulate, residual", "modulate", "modulate residual", [8, 256, 384], _CHAIN),
    ("dynamic thresholding", "dynamic_threshold", "threshold", [16, 3, 64, 64], ("diffusers",)),
    (
        "20 steps of DDPM's CIFAR-10 U-Net", "loop", "loop cifar10", [16, 3, 32, 32],
        ("diffusers f32", "diffusers bf16", "compiled bf16"),
    ),
)  # fmt: skip


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def headline_table() -> str:
    """A row an op from the fastest rounds, then the means over the drop-in schedulers."""
    rows = []
    for words, name, case, shape, peers in HEADLINES:
        found = [
            r
            for r in _load(f"{name}.json")
            if r["case"] == case and r["shape"] == shape and r["threads"] == 2
        ]
        if not found:
            raise ValueError(f"tables: {name}.json must have {case!r} at {shape}, got no such row")
        best = found[0]["seconds"][found[0]["ours"]]["best"]
        ratios = found[0]["ratios"]
        rows.append(
            [
                words,
                "x".join(map(str, shape)),
                _time(best),
                ", ".join(f"{peer} {ratios[peer]['quiet']:.1f}x" for peer in peers),
            ]
        )
    head = ["what", "shape", "fastdiff", "how many times longer the peer takes"]
    machine = found[0]["machine"]
    note = (
        f"Two threads of {machine['cpu']} ({machine['isa']}), torch {machine['torch']}, float32 "
        "unless a row says otherwise; fastest of many rounds in which all functions of a row are "
        "called in turn in one process. Every row, with medians, machine and command: "
        "[docs/benchmarks.md](docs/benchmarks.md)."
    )
    return "\n\n".join([note, _table(head, rows), _scheduler_means()])


def _scheduler_means() -> str:
    """Geometric means over the drop-in schedulers at each shape."""
    found = _load("schedulers.json")

    def mean(rows: list[dict[str, Any]], pick: Callable[[dict[str, Any]], float]) -> str:
        logs = [math.log(pick(r)) for r in rows]
        return f"{math.exp(sum(logs) / len(logs)):.1f}x ({len(logs)})" if logs else "-"

    rows = []
    for shape in dict.fromkeys(tuple(r["shape"]) for r in found):
        here = [r for r in found if tuple(r["shape"]) == shape]
        plain = [r for r in here if not r["stochastic"]]
        noisy = [r for r in here if r["stochastic"]]
        rows.append(
            [
                "x".join(map(str, shape)),
                mean(plain, lambda r: r["ratios"]["diffusers"]["quiet"]),
                mean(noisy, lambda r: r["ratios"]["diffusers"]["quiet"]),
                mean(noisy, lambda r: r["counter"]),
                mean(
                    [r for r in here if "torch.compile" in r["ratios"]],
                    lambda r: r["ratios"]["torch.compile"]["quiet"],
                ),
            ]
        )
    head = ["shape", "without noise", "torch's noise", "counter noise", "against `torch.compile`"]
    note = (
        "`scheduler.step` of the drop-ins against diffusers' own: how many times longer diffusers "
        "takes, geometric means, and over how many classes."
    )
    return f"{note}\n\n{_table(head, rows)}"


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
        f"ones too: the last column divides by the distance of as many real training images. On "
        f"this model's schedule `euler` has the table of `ddim` to the bit, and `euler_ancestral` "
        f"that of `ddpm`: they make the same images."
    )
    return f"{note}\n\n{_table(head, rows)}\n\n{_provenance(first)}"


COUNTS = (10, 20, 50)  # evaluations in the table of errors
PEER_COUNTS = (20, 80, 320)  # in that of the peers, whose order shows late
WEAK_COUNTS = (10, 20, 40)  # steps in that of the weak errors


def _at(row: dict[str, Any], count: int) -> str:
    """Error at the largest number of evaluations up to a count."""
    found = [e for n, e in zip(row["nfe"], row["error"], strict=True) if n <= count]
    return f"{found[-1]:.1e}" if found and found[-1] is not None else "-"


def _weak(row: dict[str, Any], steps: int) -> str:
    """Error and half-width at a number of steps."""
    found = zip(row["steps"], row["error"], row["half_width_95"], strict=True)
    at = [f"{e:.1e} ± {h:.0e}" for n, e, h in found if n == steps and e is not None]
    return at[0] if at else "-"


def _slope(row: dict[str, Any]) -> str:
    return "-" if row.get("order") is None else f"{row['order']:.1f}"


def work_precision_table() -> str:
    """Errors by evaluations on data with a known denoiser, peers' orders, time an image."""
    found = _load("work_precision.json")
    if not found:
        return ""
    head = [f"error at {n} evaluations" for n in COUNTS]
    late = [f"at {n}" for n in PEER_COUNTS]
    first: dict[str, dict[str, Any]] = {}  # the first problem where a solver is defined
    for r in found:
        if r["case"] == "order" and r["nfe"]:
            first.setdefault(r["solver"], r)
    orders = [
        [f"`{name}`", r["problem"], str(r["stated_order"]), _slope(r), *(_at(r, n) for n in COUNTS)]
        for name, r in first.items()
    ]
    peers = [
        [r["solver"], r["setting"], r["library"], _slope(r), *(_at(r, n) for n in PEER_COUNTS)]
        for r in found
        if r["case"] == "peer"
    ]
    times = [
        [f"`{r['solver']}`", str(r["steps"])]
        + [f"{1e3 * r['seconds_an_image'][k]:.1f} ms" if k in r["seconds_an_image"] else "-"
           for k in ("fastdiff", "diffusers", "k-diffusion")]
        for r in found
        if r["case"] == "time"
    ]  # fmt: skip
    weak: dict[str, dict[str, Any]] = {}
    for r in found:
        if r["case"] == "weak" and r["nfe"]:
            weak.setdefault(r["solver"], r)
    noisy = [
        [f"`{name}`", r["problem"], str(r["stated_order"]), *(_weak(r, n) for n in WEAK_COUNTS)]
        for name, r in weak.items()
    ]
    sections = [
        (
            "Data is a mixture of three Gaussians in two dimensions, so the denoiser is exact and "
            "the solver alone errs. Deterministic solvers: RMS error of the end state against the "
            "exact probability flow, to the schedule's least noisy time.",
            ["solver", "schedule", "stated order", "measured", *head],
            orders,
        ),
        (
            "The same solver in diffusers and here on DDPM's schedule, RMS error. By default "
            "diffusers' falls to order 1 and ours keeps its own (said why above). On a "
            "Karras grid that is named, either library takes a plain last step to sigma 0, whose "
            "error no number of steps lowers. To sigma_min ours keeps its order; diffusers "
            "rounds the times of the grid and computes in float32, so its error stops "
            "falling, and its third order divides by zero.",
            ["solver", "setting", "library", "measured order", *late],
            peers,
        ),
        (
            "Solvers with noise: relative error of E |x|^2, with the half-width of its 95 % "
            "confidence interval.",
            ["solver", "schedule", "stated order", *(f"{n} steps" for n in WEAK_COUNTS)],
            noisy,
        ),
        (
            "Time an image of the shipped model, each library's own loop around the same model.",
            ["solver", "steps", "fastdiff", "diffusers", "k-diffusion"],
            times,
        ),
    ]
    parts = [f"{text}\n\n{_table(names, rows)}" for text, names, rows in sections if rows]
    picture = "![error against evaluations](../benchmarks/results/work_precision.png)"
    return "\n\n".join([picture, *parts, _provenance(found[0])])


def orders_table() -> str:
    """Measured orders of the multistep solvers to clean data, diffusers beside ours."""
    found = {
        (r["solver"], r["library"], r["setting"]): r
        for r in _load("work_precision.json")
        if r["case"] == "peer"
    }
    columns = [
        (library, setting)
        for library in ("diffusers", "fastdiff")
        for setting in ("default", "karras")
    ]
    head = [f"{library}, {setting}" for library, setting in columns]
    rows = [
        [name, *(f"{_slope(r)} ({_at(r, PEER_COUNTS[-1])})" for r in map(found.get, keys) if r)]
        for name in dict.fromkeys(solver for solver, *_ in found)
        for keys in [[(name, *column) for column in columns]]
    ]
    return f"{_table(['solver', *head], rows)}\n\n{_provenance(next(iter(found.values())))}"


def spacings_table() -> str:
    """Frechet distance of the shipped model's samples by spacing and steps."""
    found = _load("quality_spacing.json")
    steps = sorted({r["steps"] for r in found})
    distance = {(r["solver"], r["spacing"], r["steps"]): f"{r['frechet']:.2f}" for r in found}
    names = dict.fromkeys((r["solver"], r["spacing"]) for r in found)
    rows = [[f"`{n}`", f'"{s}"', *(distance[n, s, k] for k in steps)] for n, s in names]
    head = ["solver", "spacing", *(f"Frechet distance at {k} steps" for k in steps)]
    first = found[0]
    note = f"From {first['n']} samples; as many real images have {first['frechet_of_n_real']:.2f}."
    return f"{_table(head, rows)}\n\n{note}\n\n{_provenance(first)}"
