"""``fastdiff sample``: one picture of many samples, or one file a seed."""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import _cards, _ranks, backends, checkpoints, ops, schedules, solvers
from fastdiff._files import written_whole
from fastdiff.data import save_grid
from fastdiff.data.pictures import picture_format
from fastdiff.models import LatentDiffusion
from fastdiff.ops.noise import Stream, as_seeds
from fastdiff.reference.noise import philox
from fastdiff.sampler import Sampler, SampleStep
from fastdiff.table import StepTable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH = 64
MOST_SEEDS = 1_000_000
_RANGE = re.compile(r"([0-9]{1,20})(?:-([0-9]{1,20}))?")  # 2**64 has 20 digits


def add_arguments(s: argparse.ArgumentParser) -> None:
    """The options of the command."""
    s.add_argument("--model", default="fashion", help="shipped name or .safetensors path")
    s.add_argument(
        "--solver", default=None,
        help="see `fastdiff solvers`; default: the card's, or dpmpp_2m if it names none",
    )  # fmt: skip
    s.add_argument("--steps", type=int, default=20)
    names = dict.fromkeys(name for every in schedules.SPACINGS.values() for name in every)
    s.add_argument("--spacing", default=None, help=f"of the steps in time: {', '.join(names)}")
    s.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="of the solver or the spacing, such as eta=0.5 or rho=5; may be repeated",
    )  # fmt: skip
    s.add_argument("--seeds", default="0-7", help="like 0-7,42")
    s.add_argument(
        "--label", "--class", default=None, help="classes by number or name, all if none"
    )
    s.add_argument("--guidance", type=float, default=None, help="default: the card's")
    one = s.add_argument_group("one picture, a row a class and a column a seed")
    one.add_argument("--out", default=None, help="default: samples.png")
    one.add_argument("--save", default=None, help="also write the arrays as .npz")
    one.add_argument(
        "--strip", default=None, help="also write a picture of x0 as predicted at each evaluation"
    )
    many = s.add_argument_group("one file a seed, of a class that the seed draws")
    many.add_argument("--outdir", default=None, help="folder for 000000.png, 000001.png, ...")
    many.add_argument("--subdirs", action="store_true", help="a folder in it for each 1000 seeds")
    many.add_argument("--batch", type=int, default=None, help=f"seeds at a time, default {BATCH}")
    many.add_argument("--resume", action="store_true", help="continue a run of the same settings")
    s.add_argument("--device", default="auto")
    s.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the model; auto: bfloat16 on a CPU with instructions for it (AVX-512 BF16, AMX), "
        "float32 elsewhere; pictures of two dtypes differ in the last bits",
    )  # fmt: skip
    s.add_argument("--backend", default="auto", choices=["auto", *backends.BACKENDS])
    s.set_defaults(run=run)


def parse_seeds(text: str) -> list[int]:
    """Seeds of a list such as ``0-7,42``: whole numbers and ranges, both ends included.

    Raises:
        ValueError: the text is no such list, or it names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"sample: seeds must be like 0-7,42, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_SEEDS - len(seeds):
            raise ValueError(
                f"sample: seeds must be rising ranges of {MOST_SEEDS} in all, got {part!r}"
            )
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
    return [parse_label(part, classes) for part in text.split(",")]


def parse_label(text: str, classes: list[str]) -> int:
    """The class of one number or name, in which a comma is part of the name.

    Raises:
        ValueError: it is no class of the model.
    """
    part, lower = text.strip().lower(), [name.lower() for name in classes]
    if part in lower:
        return lower.index(part)
    if part.isascii() and part.isdigit() and int(part) < len(classes):
        return int(part)
    raise ValueError(
        f"sample: label must be 0 to {len(classes) - 1} or one of "
        f"{', '.join(classes)}, got {part!r}"
    )


def check_writable(path: Path, name: str = "out") -> Path:
    """The path, if a file can be made there; asked before the work, not after it.

    Raises:
        OSError: its folder is missing or takes no file.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OSError(f"sample: {name} must lie in an existing folder, got {path}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise OSError(f"sample: {name} must be writable, got {path}")
    return path


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a solver, each ``name=value`` with a Python number, True, False, None or a word.

    Raises:
        TypeError: it names what has an option of the command.
        ValueError: a text is no such pair.
    """
    options = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"sample: option must be like eta=0.5, got {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        # a word; what is nested too deep, or no value that Python has
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[name] = value
    solvers.check_names("sample", options)
    return options


def labels_of(seeds: Sequence[int], labels: Sequence[int | None]) -> list[int | None]:
    """The class that each seed draws: ``labels[floor(n w / 2**32)]`` of n, with w the first word
    of its stream `Stream.LABEL`; other seeds have no part in it."""
    counter = np.array([0, 0, 0, Stream.LABEL], np.uint64)
    keys = as_seeds(seeds, where="sample").numpy().view(np.uint64)
    words = philox(np.broadcast_to(counter, (len(keys), 4)), keys)[:, 0]
    at = words * np.uint64(len(labels)) >> np.uint64(32)
    return [labels[int(i)] for i in at]


class Job(NamedTuple):
    """What was loaded, and how to call it."""

    sampler: Sampler
    table: StepTable
    shape: Sequence[int]
    labels: Sequence[int | None]  # None alone: the model has no classes
    guidance: float
    dtype: torch.dtype
    latents: Callable[[Tensor], Tensor] | None  # from latents to images; None: of a pixel model

    def images(
        self,
        seeds: list[int],
        labels: Sequence[int | None],
        *,
        callback: Callable[[SampleStep], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """One image a seed, on the CPU."""
        cond: dict[str, Tensor] = {}
        uncond: dict[str, Tensor] = {}
        if None not in labels:
            label = torch.tensor(labels)
            cond, uncond = {"label": label}, {"label": torch.full_like(label, -1)}
        made = self.sampler(
            self.shape, seeds=seeds, cond=cond, uncond=uncond, callback=callback, progress=progress
        )
        return self.decode(made)

    def decode(self, made: Tensor) -> Tensor:
        """What the sampler made as images, on the CPU."""
        return (made if self.latents is None else self.latents(made)).cpu()


def run(args: argparse.Namespace) -> int:
    """Class-conditional samples of a shipped or given checkpoint."""
    grid_only = {"out": args.out, "save": args.save, "strip": args.strip}
    many_only = {"subdirs": args.subdirs, "batch": args.batch, "resume": args.resume}
    wrong = grid_only if args.outdir else many_only
    for name, value in wrong.items():
        if value not in (None, False):
            state = "without" if args.outdir else "with"
            raise ValueError(f"sample: {name} must be given {state} --outdir, got {value}")
    if args.outdir:
        from fastdiff import _cli_files

        return _cli_files.run(args)
    processes = int(os.environ["WORLD_SIZE"]) if _ranks.launched() else 1
    if processes > 1:
        raise ValueError(f"sample: outdir must be given for {processes} processes, got none")
    return _picture(args)


def load_job(args: argparse.Namespace) -> Job:
    """The model and the table that the options name."""
    args.device = _ranks.local_device(args.device, "sample")
    dtype = checkpoints.fast_dtype(args.device) if args.dtype == "auto" else DTYPES[args.dtype]
    model, schedule, card = checkpoints.load(args.model, dtype=dtype, device=args.device)
    if torch.device(args.device).type == "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if schedule is None:
        raise ValueError(f"sample: model must have a noise schedule, got {args.model} without one")
    sampling, classes = _cards.advice("sample", card, needed=("guidance",))
    if not classes and args.label is not None:
        raise ValueError(f"sample: label must not be given, {args.model} has no classes")
    table = solvers.build(
        args.solver or sampling.get("solver", "dpmpp_2m"),
        schedule,
        args.steps,
        prediction=card["prediction"],
        spacing=args.spacing,
        **parse_options(args.option),
    )
    guidance = sampling["guidance"] if args.guidance is None else args.guidance
    clip = sampling.get("clip")
    sampler = Sampler(model, table, guidance=guidance, clip=clip, device=args.device)
    labels = parse_labels(args.label, classes) if classes else [None]
    decode = model.decode if isinstance(model, LatentDiffusion) else None
    return Job(sampler, table, sampling["shape"], labels, guidance, dtype, decode)


def _picture(args: argparse.Namespace) -> int:
    """All samples as one picture: a row a class, a column a seed."""
    clock = time.perf_counter
    start = clock()
    seeds = parse_seeds(args.seeds)
    out = check_writable(Path(args.out or "samples.png"))
    picture_format(out, "sample: out")
    save = check_writable(Path(args.save), "save") if args.save else None
    strip = check_writable(Path(args.strip), "strip") if args.strip else None
    if strip is not None:
        picture_format(strip, "sample: strip")
    job = load_job(args)
    loaded = clock()
    label = [n for n in job.labels for _ in seeds]
    every_seed = seeds * len(job.labels)
    x0s: list[Tensor] = []

    def keep(step: SampleStep) -> None:
        if step.denoised is not None:
            x0s.append(job.decode(step.denoised))

    with backends.use_backend(args.backend):
        images = job.images(
            every_seed, label, callback=keep if strip else None, progress=sys.stderr.isatty()
        )
    sampled = clock()
    save_grid(images, out, len(seeds))
    if strip is not None:
        save_grid(torch.stack(x0s, dim=1).flatten(0, 1), strip, len(x0s))
    if save is not None:
        # through a handle: np.savez would add a suffix to the name that was checked
        with written_whole(save) as part, part.open("wb") as handle:
            of: dict[str, Any] = {} if None in label else {"label": np.array(label)}
            np.savez(handle, images=images.numpy(), seed=every_seed, **of)
    done = clock()
    report(args, job, f"{len(images)} images")
    print(
        f"load {loaded - start:.2f} s, sample {sampled - loaded:.2f} s "
        f"({(sampled - loaded) / len(images) * 1e3:.1f} ms an image), "
        f"write {done - sampled:.2f} s: {out}"
    )
    return 0


def report(args: argparse.Namespace, job: Job, made: str) -> None:
    """Print what was done, and on what."""
    print(
        f"{args.model}: {made}, {job.table.name} with {args.steps} steps "
        f"({job.table.nfe} model evaluations), guidance {job.guidance:g}, seeds {args.seeds}"
    )
    print(
        f"on {args.device} in {str(job.dtype)[6:]}, {torch.get_num_threads()} threads, "
        f"step kernel: {_backend_of(args, job.table)}"
    )


def _backend_of(args: argparse.Namespace, table: StepTable) -> str:
    x = torch.zeros(1, 1, 4, 4, device=args.device)
    seeds = torch.zeros(1, dtype=torch.int64, device=args.device)
    history = torch.zeros(max(table.depth, 1), *x.shape, device=args.device)
    with backends.use_backend(args.backend):
        answers = ops.describe(
            "reverse_step", x, x, table, 0,
            uncond=x, y=x.clone(), seeds=seeds, history=history, clip=1.0,
        )  # fmt: skip
    return next(name for name, answer in answers.items() if answer == "chosen")
