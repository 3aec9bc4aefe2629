"""The command line: ``fastdiff sample``, ``eval``, ``demo``, ``serve``, ``solvers``, ``doctor`` and
``train``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fastdiff import (
    _cli_eval,
    _cli_sample,
    _cli_serve,
    backends,
    checkpoints,
    demos,
    schedules,
    solvers,
)
from fastdiff._options import Parser
from fastdiff.ops import _native
from fastdiff.table import StepTable
from fastdiff.version import __version__


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
    parser = Parser("fastdiff", description="Samplers for diffusion models and VAEs.")
    parser.add_argument("--version", action="version", version=f"fastdiff {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="command", help="`fastdiff COMMAND --help` says more"
    )

    sample = commands.add_parser("sample", help="write samples, as one picture or a file a seed")
    _cli_sample.add_arguments(sample)
    _cli_eval.add_arguments(commands.add_parser("eval", help="likelihood of a checkpoint"))
    demos.add_arguments(commands.add_parser("demo", help="draw a picture that explains"))
    commands.add_parser("solvers", help="list the solvers").set_defaults(run=list_solvers)
    commands.add_parser("doctor", help="what this machine can run").set_defaults(run=doctor)
    serve = commands.add_parser("serve", help="answer requests over HTTP")
    _cli_serve.add_arguments(serve)
    commands.add_parser("train", help="train a model", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 2 for what the user can mend, 130 after Ctrl-C."""
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except OSError as error:
        # of the output itself: what is left in the buffer is flushed at exit, to nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has gone
            return 1
        print(f"fastdiff: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdiff: interrupted; what was written is whole", file=sys.stderr)
        return 130  # as a shell says of a program that Ctrl-C ended


def _main(words: list[str]) -> int:
    try:
        if words[:1] == ["train"]:
            from fastdiff import training

            return training.main(words[1:])
        args = _parser().parse_args(words)
        args.words = words
        return int(args.run(args))
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, backends.BackendError) as error:
        print(f"fastdiff: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
