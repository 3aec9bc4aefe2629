"""The command line: ``fastdiff sample``, ``solvers``, ``doctor`` and ``train``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff import backends, checkpoints, ops, schedules, solvers
from fastdiff.data import save_grid
from fastdiff.ops import _native
from fastdiff.sampler import Sampler
from fastdiff.table import StepTable
from fastdiff.version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_seeds(text: str) -> list[int]:
    """Seeds of a list such as ``0-7,42``: whole numbers and ranges, both ends included.

    Raises:
        ValueError: the text is no such list, or it names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isascii() or not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"sample: seeds must be like 0-7,42, got {text!r}")
        first, last = int(low), int(high) if dash else int(low)
        if last < first or last - first >= 1_000_000:
            raise ValueError(f"sample: seeds must be rising ranges below 1e6 long, got {part!r}")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"sample: seeds must differ, got {text!r}")
    return seeds


def parse_labels(text: str | None, classes: list[str]) -> list[int]:
    """Class numbers or names, separated by commas; None: all of them.

    Raises:
        ValueError: a label is no class of the model.
    """
    if text is None:
        return list(range(len(classes)))
    lower = [name.lower() for name in classes]
    labels = []
    for part in (p.strip().lower() for p in text.split(",")):
        if part in lower:
            labels.append(lower.index(part))
        elif part.isascii() and part.isdigit() and int(part) < len(classes):
            labels.append(int(part))
        else:
            raise ValueError(
                f"sample: label must be 0 to {len(classes) - 1} or one of "
                f"{', '.join(classes)}, got {part!r}"
            )
    return labels


def check_writable(path: Path) -> Path:
    """The path, if a file can be made there; asked before the work, not after it.

    Raises:
        OSError: its folder is missing or takes no file.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OSError(f"sample: out must lie in an existing folder, got {path}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise OSError(f"sample: out must be writable, got {path}")
    return path


def sample(args: argparse.Namespace) -> int:
    """Class-conditional samples of a shipped or given checkpoint, as one picture."""
    clock = time.perf_counter
    start = clock()
    seeds = parse_seeds(args.seeds)
    out = check_writable(Path(args.out))
    save = check_writable(Path(args.save)) if args.save else None
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = checkpoints.fast_dtype(args.device) if args.dtype == "auto" else DTYPES[args.dtype]
    model, schedule, card = checkpoints.load(args.model, dtype=dtype, device=args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    labels = parse_labels(args.label, list(card["classes"]))
    table = solvers.build(
        args.solver,
        schedule,
        args.steps,
        prediction=card["prediction"],
        spacing=args.spacing,
    )
    guidance = card["sampling"]["guidance"] if args.guidance is None else args.guidance
    clip = card["sampling"].get("clip")
    sampler = Sampler(model, table, guidance=guidance, clip=clip, device=args.device)
    loaded = clock()

    # one row of the picture a class, one column a seed
    label = torch.tensor(labels).repeat_interleave(len(seeds))
    every_seed = seeds * len(labels)
    null = torch.full_like(label, -1)
    with backends.use_backend(args.backend):
        images = sampler(
            card["sampling"]["shape"],
            seeds=every_seed,
            cond={"label": label},
            uncond={"label": null},
            progress=sys.stderr.isatty(),
        ).cpu()
    sampled = clock()
    save_grid(images, out, len(seeds))
    if save is not None:
        # through a handle: np.savez would add a suffix to the name that was checked
        with save.open("wb") as handle:
            np.savez(handle, images=images.numpy(), label=label.numpy(), seed=every_seed)
    done = clock()

    print(
        f"{args.model}: {len(images)} images, {table.name} with {args.steps} steps "
        f"({table.nfe} model evaluations), guidance {guidance:g}, seeds {args.seeds}"
    )
    print(
        f"on {args.device} in {str(dtype)[6:]}, {torch.get_num_threads()} threads, step kernel: "
        f"{_backend_of(args, table)}"
    )
    print(
        f"load {loaded - start:.2f} s, sample {sampled - loaded:.2f} s "
        f"({(sampled - loaded) / len(images) * 1e3:.1f} ms an image), "
        f"write {done - sampled:.2f} s: {out}"
    )
    return 0


def _backend_of(args: argparse.Namespace, table: Any) -> str:
    x = torch.zeros(1, 1, 4, 4, device=args.device)
    seeds = torch.zeros(1, dtype=torch.int64, device=args.device)
    history = torch.zeros(max(table.depth, 1), *x.shape, device=args.device)
    with backends.use_backend(args.backend):
        answers = ops.describe(
            "reverse_step", x, x, table, 0,
            uncond=x, y=x.clone(), seeds=seeds, history=history, clip=1.0,
        )  # fmt: skip
    return next(name for name, answer in answers.items() if answer == "chosen")


def overview() -> Iterator[tuple[str, StepTable, str]]:
    """Name, table of 20 steps and source of every solver, on the first schedule that it takes."""
    for name, builder in solvers.SOLVERS.items():
        for schedule in (schedules.cosine(), schedules.edm(), schedules.flow()):
            try:
                table = solvers.build(name, schedule, 20, prediction="sample")
            except ValueError:
                continue
            yield name, table, (builder.__doc__ or "").strip().partition("\n")[0].rstrip(".")
            break


def list_solvers(args: argparse.Namespace) -> int:
    """A line a solver: what it costs and needs."""
    print(f"{'solver':<27}{'order':>6}{'NFE at 20 steps':>17}{'noise':>7}{'history':>9}  source")
    for name, table, source in overview():
        print(
            f"{name:<27}{table.order:>6}{table.nfe:>17}"
            f"{'yes' if table.stochastic else 'no':>7}{table.depth:>9}  {source}"
        )
    return 0


_COST = {
    "cpu": "steps on the CPU run on the PyTorch reference, 10 to 100 times slower",
    "triton": "no Triton kernels on a GPU",
    "cuda": "no CUDA C++ kernels on a GPU",
}


def doctor(args: argparse.Namespace) -> int:
    """What this machine can run, what is missing, and what that costs."""
    print(f"fastdiff {__version__}, torch {torch.__version__}, numpy {np.__version__}")
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, ", end="")
    print(f"{torch.get_num_threads()} threads, CUDA device: {torch.cuda.is_available()}")
    if _native.extension is not None:
        isas = ", ".join(_native.extension.isas())
        print(f"CPU kernels: {_native.extension.isa()} (this CPU has {isas})")
    for name in backends.BACKENDS:
        reason = backends.unavailable(name)
        print(f"backend {name:<10} {'ok' if reason is None else f'missing: {reason}'}")
        if reason is not None:
            print(f"{'':<18} cost: {_COST[name]}")
    print(f"checkpoints: {', '.join(checkpoints.names()) or 'none shipped in this install'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fastdiff", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fastdiff {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    s = commands.add_parser("sample", help="write a picture of samples")
    s.add_argument("--model", default="fashion", help="shipped name or .safetensors path")
    s.add_argument("--solver", default="dpmpp_2m", help="see `fastdiff solvers`")
    s.add_argument("--steps", type=int, default=20)
    names = dict.fromkeys(name for every in schedules.SPACINGS.values() for name in every)
    s.add_argument("--spacing", default=None, help=f"of the steps in time: {', '.join(names)}")
    s.add_argument("--seeds", default="0-7", help="like 0-7,42")
    s.add_argument("--label", default=None, help="classes by number or name, default all")
    s.add_argument("--guidance", type=float, default=None, help="default: the card's")
    s.add_argument("--out", default="samples.png")
    s.add_argument("--save", default=None, help="also write the arrays as .npz")
    s.add_argument("--device", default="auto")
    s.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the model; auto: bfloat16 on a CPU with instructions for it (AVX-512 BF16, AMX), "
        "float32 elsewhere; pictures of two dtypes differ in the last bits",
    )  # fmt: skip
    s.add_argument("--backend", default="auto", choices=["auto", *backends.BACKENDS])
    s.set_defaults(run=sample)

    commands.add_parser("solvers", help="list the solvers").set_defaults(run=list_solvers)
    commands.add_parser("doctor", help="what this machine can run").set_defaults(run=doctor)
    commands.add_parser("train", help="train the small U-Net", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, 2 for what the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        from fastdiff import training

        return training.main(words[1:])
    args = _parser().parse_args(words)
    try:
        return int(args.run(args))
    except (ValueError, TypeError, OSError, backends.BackendError) as error:
        print(f"fastdiff: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
