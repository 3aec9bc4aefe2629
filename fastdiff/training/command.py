"""The command line of `fastdiff train`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import fields

from fastdiff import _ranks
from fastdiff._options import Parser
from fastdiff.training.config import DEFAULTS, TrainConfig, defaults_of
from fastdiff.training.run import train

__all__ = ["main", "parse"]


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config that a command line gives; `TrainConfig.command` inverts it."""
    what = "Train a model on a CPU: the small U-Net unless another is named, in about an hour."
    # the model first: the other options have its defaults
    first = Parser("fastdiff train", add_help=False)
    first.add_argument("--model", default="unet", choices=list(DEFAULTS))
    known, _ = first.parse_known_args(argv)
    defaults = defaults_of(known.model)
    parser = Parser(
        "fastdiff train", description=what,
        epilog="Options that the model does not read are refused. The defaults are those of "
        f"--model {known.model}; give another with --help to see its own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    described = _described()
    for f in fields(TrainConfig):
        flag = f"--{f.name.replace('_', '-')}"
        models = f.metadata.get("models")
        note = described.get(f.name, "") + ("" if models is None else f" ({', '.join(models)})")
        if f.name == "out":
            parser.add_argument(flag, required=True, default=argparse.SUPPRESS, help=note)
        elif f.name == "model":
            parser.add_argument(flag, default="unet", choices=list(DEFAULTS), help=note)
        elif isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", help=note)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, type=int, nargs="+", default=defaults[f.name], help=note)
        else:
            parser.add_argument(flag, type=type(f.default), default=defaults[f.name], help=note)
    return TrainConfig(**vars(parser.parse_args(argv)))


def _described() -> dict[str, str]:
    """What the docstring of the config says of each field, for the help."""
    # "name, name: text", whose further lines are indented more
    entry = re.compile(r"^ {8}(\w+(?:, \w+)*): (.*(?:\n {12}.*)*)", re.MULTILINE)
    arguments = (TrainConfig.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    found = {}
    for names, text in entry.findall(arguments):
        told = " ".join(text.split()).rstrip(".").replace("%", "%%")
        found.update(dict.fromkeys(names.split(", "), told))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says, and print where the results are."""
    path = train(parse(argv))
    if _ranks.first():
        print(json.dumps({"weights": str(path), "card": str(path.with_suffix(".json"))}))
    return 0
