"""Work and precision: the error of every solver against its number of evaluations.

    python -m benchmarks.work_precision --out benchmarks/results/work_precision.json \
        --plot benchmarks/results/work_precision.png

The data is a Gaussian mixture, whose denoiser is known, so that only the solver errs:

- "order": deterministic solvers in float64, the RMS error of the end state against the exact
  probability flow (DOP853) from the same noise;
- "weak": solvers with noise in float32, the error of E |x|^2 over many paths, with the half-width
  of its 95 % confidence interval;
- "peer": the multistep solvers of diffusers and ours side by side, at each one's default and at
  settings that are meant to be better;
- "time": seconds an image of the shipped model, beside diffusers and k-diffusion with the same
  solver and steps, after a check that they draw the same picture.

Solvers are taken from the registry; where one is not defined, the row says why.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import fastdiff
from benchmarks import measure, peer_samplers
from fastdiff import StepTable, schedules, solvers
from fastdiff.ops import as_seeds, reverse_step
from fastdiff.reference.gmm import GaussianMixture
from fastdiff.schedules import Schedule

F64 = torch.float64
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=F64),
    torch.tensor([[-1.0, 0.4], [0.8, 0.6], [0.1, -1.1]], dtype=F64),
    torch.tensor(
        [[[0.20, 0.05], [0.05, 0.10]], [[0.12, -0.06], [-0.06, 0.15]], [[0.08, 0.0], [0.0, 0.2]]],
        dtype=F64,
    ),
)
# what is measured on: schedule, spacing
PROBLEMS: dict[str, tuple[Schedule, str]] = {
    "vp": (schedules.linear(), "karras"),
    "edm": (schedules.edm(), "karras"),
    "flow": (schedules.flow(sigma_min=0.02), "linspace"),
}
STEPS = (5, 8, 10, 15, 20, 30, 50, 80, 120, 200)
PEER_STEPS = (10, 20, 40, 80, 160, 320)  # the loss of order shows late
WEAK_STEPS = (5, 10, 20, 40, 80)
STARTS = 256
FLOOR = 1e-11  # errors below are float64's


def variants(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A solver with its defaults and, where its order is an option, of order 3."""
    yield name, {}
    order = inspect.signature(solvers.SOLVERS[name]).parameters.get("order")
    if order is not None and isinstance(order.default, int) and order.default < 3:
        yield f"{name}, order 3", {"order": 3}


def end_state(table: StepTable, x: Tensor, seeds: Sequence[int]) -> Tensor:
    """The last state of a table run on the mixture's own denoiser, in the dtype of x."""
    history = torch.empty((max(table.depth, 1), *x.shape), dtype=x.dtype)
    y, values = torch.empty_like(x), as_seeds(list(seeds))
    backend = "reference" if x.dtype == F64 else "auto"
    with fastdiff.use_backend(backend):
        for i, row in enumerate(table.rows):
            output = None
            if row.evaluates:  # at the exact level: a time in float32 would show
                output = MIXTURE.denoise(x.double(), row.alpha, row.sigma).to(x.dtype)
            x = reverse_step(x, output, table, i, uncond=output, history=history, y=y, seeds=values)
    return x


def start_noise() -> Tensor:
    """`(STARTS, 2)` unit normals, the same for all."""
    return fastdiff.randn(range(STARTS), (2,)).double()


@functools.cache
def exact(name: str, final: str) -> Tensor:
    """The probability flow from `start_noise` to clean data or to the least noisy time.

    dz/dr = E[n | z] for z = x/alpha, r = sigma/alpha; dx/dt = E[n | x] - E[x0 | x] on a flow, whose
    r is infinite at the start.
    """
    schedule = PROBLEMS[name][0]
    first, last = schedule.t_max, schedule.t_min if final == "sigma_min" else schedule.t_clean
    x = schedule.init_sigma * start_noise()
    if schedule.kind == "flow":
        span = first, last

        def slope(t: float, flat: np.ndarray) -> np.ndarray:
            at = torch.from_numpy(flat).view_as(x)
            return (MIXTURE.epsilon(at, 1 - t, t) - MIXTURE.denoise(at, 1 - t, t)).numpy().ravel()

        back = 1.0
    else:
        span = float(schedule.ratio(first)), float(schedule.ratio(last))
        x = x / float(schedule.alpha(first))
        back = float(schedule.alpha(last))

        def slope(r: float, flat: np.ndarray) -> np.ndarray:
            return MIXTURE.epsilon(torch.from_numpy(flat).view_as(x), 1.0, r).numpy().ravel()

    found = solve_ivp(slope, span, x.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    return back * torch.from_numpy(found.y[:, -1]).view_as(x)


def rms(x: Tensor, want: Tensor) -> float | None:
    """Root of the mean square difference; None where it is not finite."""
    error = float((x.double() - want).square().mean().sqrt())
    return error if math.isfinite(error) else None


def order_of(nfe: Sequence[int], errors: Sequence[float | None], floor: float) -> float | None:
    """Slope over the last three counts whose errors stand above the rounding."""
    fit = [(n, e) for n, e in zip(nfe, errors, strict=True) if e is not None and e > floor]
    if len(fit) < 3:
        return None
    counts, found = np.log(np.array(fit[-3:], dtype=float)).T
    return -float(np.polyfit(counts, found, 1)[0])


def curve(
    build: Callable[[int], StepTable], steps: Sequence[int], error: Callable[[StepTable], Any]
) -> dict[str, Any]:
    """Errors by the number of steps, and the counts that the solver refuses with its reason."""
    found: dict[str, Any] = {"steps": [], "nfe": [], "error": [], "refused": {}}
    for n in steps:
        try:
            table = build(n)
        except ValueError as reason:
            found["refused"][n] = str(reason)
            continue
        found["steps"].append(n)
        found["nfe"].append(table.nfe)
        found["error"].append(error(table))
        found["stated_order"] = table.order
    return found


def is_stochastic(name: str, options: dict[str, Any]) -> bool:
    """Whether a solver draws noise, on the first problem where it is defined."""
    for schedule, spacing in PROBLEMS.values():
        try:
            return _build(name, schedule, spacing, options)(10).stochastic
        except ValueError:
            continue
    raise ValueError(f"work_precision: {name} is defined on none of {', '.join(PROBLEMS)}")


def _build(
    name: str,
    schedule: Schedule,
    spacing: str | None,
    options: dict[str, Any],
    final: str = "sigma_min",
) -> Callable[[int], StepTable]:
    return lambda n: solvers.build(
        name, schedule, n, prediction="sample", spacing=spacing, final=final, **options
    )


def order_rows(names: Sequence[str], steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Deterministic solvers against the exact flow."""
    for name in names:
        for label, options in variants(name):
            if is_stochastic(name, options):
                continue
            for problem, (schedule, spacing) in PROBLEMS.items():
                x, want = schedule.init_sigma * start_noise(), exact(problem, "sigma_min")

                def error(table: StepTable, x: Tensor = x, want: Tensor = want) -> float | None:
                    return rms(end_state(table, x, range(STARTS)), want)

                found = curve(_build(name, schedule, spacing, options), steps, error)
                measured = order_of(found["nfe"], found["error"], FLOOR)
                yield {
                    "case": "order", "solver": label, "problem": problem, "spacing": spacing,
                    **found, "order": measured,
                }  # fmt: skip


def second_moment(alpha: float, sigma: float) -> float:
    """E |alpha x0 + sigma n|^2 of the mixture."""
    own = MIXTURE.means.square().sum(1) + MIXTURE.covariances.diagonal(dim1=1, dim2=2).sum(1)
    return alpha**2 * float((MIXTURE.weights * own).sum()) + MIXTURE.dim * sigma**2


def weak_rows(names: Sequence[str], steps: Sequence[int], paths: int) -> Iterator[dict[str, Any]]:
    """Solvers with noise: E |x|^2 at the end of paths that start in the exact marginal."""
    samples = 64  # seeds; the paths of one are elements of one sample
    shape = (samples, max(1, paths // samples), MIXTURE.dim)
    for name in names:
        for label, options in variants(name):
            if not is_stochastic(name, options):
                continue
            for problem, (schedule, spacing) in PROBLEMS.items():
                generator = torch.Generator().manual_seed(0)
                clean = MIXTURE.sample(shape[0] * shape[1], generator).view(shape)
                noise = torch.randn(shape, dtype=F64, generator=generator)
                first, last = schedule.t_max, schedule.t_min
                x = float(schedule.alpha(first)) * clean + float(schedule.sigma(first)) * noise
                want = second_moment(float(schedule.alpha(last)), float(schedule.sigma(last)))
                widths: list[float] = []

                def error(
                    table: StepTable, x: Tensor = x, want: float = want, widths: list = widths
                ) -> float | None:
                    ends = end_state(table, x.float(), range(samples)).double()
                    squares = ends.square().sum(-1)
                    widths.append(1.96 * float(squares.std()) / math.sqrt(squares.numel()) / want)
                    off = abs(float(squares.mean()) - want) / want
                    return off if math.isfinite(off) else None

                found = curve(_build(name, schedule, spacing, options), steps, error)
                yield {
                    "case": "weak", "solver": label, "problem": problem, "spacing": spacing,
                    **found, "half_width_95": widths, "paths": shape[0] * shape[1],
                }  # fmt: skip


# --- where a default loses the order ---------------------------------------------------------

# diffusers' scheduler, ours
SAME = {
    "2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpmpp_2m", {}),
    "3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_multistep", {"order": 3}),
    "UniPC-2": ("UniPCMultistepScheduler", {"solver_order": 2}, "unipc", {"order": 2}),
    "UniPC-3": ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc", {"order": 3}),
}
# (diffusers' options, our spacing, final)
SETTINGS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "default": ({}, None, "zero"),
    "karras": ({"use_karras_sigmas": True}, "karras", "zero"),
    "karras, to sigma_min": (
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, "karras", "sigma_min"
    ),
}  # fmt: skip


def peer_rows(steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """diffusers' multistep solvers and ours from the same noise, each at three settings."""
    schedule = PROBLEMS["vp"][0]
    for label, (scheduler, config, name, options) in SAME.items():
        for setting, (more, spacing, final) in SETTINGS.items():
            want = exact("vp", final)
            theirs = {
                n: rms(
                    peer_samplers.run_diffusers(
                        scheduler, config | more, n, MIXTURE, schedule, start_noise()
                    ),
                    want,
                )
                for n in steps
            }
            nfe, errors = list(theirs), list(theirs.values())
            yield {
                "case": "peer", "solver": label, "library": "diffusers", "setting": setting,
                "scheduler": scheduler, "options": config | more, "nfe": nfe, "error": errors,
                "order": order_of(nfe, errors, 1e-5),  # it computes in float32
            }  # fmt: skip

            def error(table: StepTable, want: Tensor = want) -> float | None:
                return rms(end_state(table, start_noise(), range(STARTS)), want)

            ours = curve(_build(name, schedule, spacing, options, final), steps, error)
            yield {
                "case": "peer", "solver": label, "library": "fastdiff", "setting": setting,
                "scheduler": name, "options": options | {"spacing": spacing, "final": final},
                **ours, "order": order_of(ours["nfe"], ours["error"], FLOOR),
            }  # fmt: skip


# --- time ------------------------------------------------------------------------------------

# of images in [-1, 1]: k-diffusion's state is x/alpha, 2e4 at the noisiest time of this schedule
GATE = 0.02


def time_rows(steps: Sequence[int], batch: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Seconds an image of the shipped model, each library's own loop around the same model."""
    model, schedule, card = fastdiff.load("fashion")
    shape = tuple(card["sampling"]["shape"])
    label = torch.arange(batch) % 10
    noise = fastdiff.randn(range(batch), shape)
    for name, case in peer_samplers.TIMED.items():
        for n in steps:
            table = solvers.build(
                name, schedule, n, prediction=card["prediction"], spacing=case.spacing
            )
            sampler = fastdiff.Sampler(model, table)

            def ours(sampler: Any = sampler) -> Tensor:
                return sampler(noise=noise, cond={"label": label})

            task = peer_samplers.Task(model, schedule, card["prediction"], n, noise, label)
            functions: dict[str, Callable[[], Tensor]] = {"fastdiff": ours}
            functions |= peer_samplers.functions(case, task)
            images = {library: f() for library, f in functions.items()}
            apart = {
                library: float((image - images["fastdiff"]).abs().max())
                for library, image in images.items()
            }
            wrong = {k: v for k, v in apart.items() if not v <= GATE}
            if wrong:
                raise SystemExit(f"work_precision: {name} at {n} steps: other pictures, {wrong}")
            stats = measure.interleaved(functions, repeats=repeats, warmup=1)
            yield measure.row(
                "time", stats, "fastdiff", solver=name, steps=n, nfe=table.nfe, batch=batch,
                shape=[batch, *shape], largest_difference=apart,
                seconds_an_image={k: s.median / batch for k, s in stats.items()},
            )  # fmt: skip


PARTS = ("order", "weak", "peer", "time")


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--solvers", nargs="+", default=list(solvers.SOLVERS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--peer-steps", nargs="+", type=int, default=list(PEER_STEPS))
    parser.add_argument("--weak-steps", nargs="+", type=int, default=list(WEAK_STEPS))
    parser.add_argument("--paths", type=int, default=1 << 20, help="of the weak errors")
    parser.add_argument("--time-steps", nargs="+", type=int, default=[10, 20])
    parser.add_argument("--batch", type=int, default=16, help="images a call, of the times")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, of the times")
    parser.add_argument("--out", default=None, help="write the rows as JSON")
    parser.add_argument("--plot", default=None, help="write the plot (needs matplotlib)")
    args = parser.parse_args(argv)
    makers = {
        "order": lambda: order_rows(args.solvers, args.steps),
        "weak": lambda: weak_rows(args.solvers, args.weak_steps, args.paths),
        "peer": lambda: peer_rows(args.peer_steps),
        "time": lambda: time_rows(args.time_steps, args.batch, args.repeats),
    }
    machine = measure.machine_info()
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        for row in makers[part]():
            rows.append({"machine": machine, **row})
            shown = {k: row.get(k) for k in ("solver", "problem", "library", "setting", "order")}
            print(part, *(f"{v:.2f}" if isinstance(v, float) else v
                          for v in shown.values() if v is not None), flush=True)  # fmt: skip
    if args.out:
        command = f"python -m benchmarks.work_precision {' '.join(argv)}"
        measure.write_json(args.out, rows, command)
    if args.plot:
        from benchmarks.work_precision_plot import plot

        plot(rows, args.plot)


if __name__ == "__main__":
    main()
