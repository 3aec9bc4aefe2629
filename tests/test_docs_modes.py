"""The page on modes and devices: its block runs, the parsers take its commands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from fastdiff import Sampler, cli, sampler, training

PAGE = Path(__file__).resolve().parent.parent / "docs" / "modes_and_devices.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_block_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    scope: dict[str, object] = {}
    exec(compile(block, PAGE.name, "exec"), scope)
    assert scope["images"].shape == (2, 1, 32, 32) and scope["images"].isfinite().all()


def test_every_mode_is_named() -> None:
    named = re.findall(r"^\| `\"(\w+)\"`", TEXT, re.MULTILINE)
    assert tuple(dict.fromkeys(named)) == sampler.MODES
    assert "unroll" in inspect.signature(Sampler).parameters


def test_the_commands_are_taken() -> None:
    lines = re.findall(r"^torchrun --nproc-per-node \d -m fastdiff (.*)$", TEXT, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        words = line.split()
        if words[0] == "train":
            assert training.parse(words[1:]).out == "runs/fashion"
        else:
            args = cli._parser().parse_args(words)
            assert args.outdir == "images" and args.seeds == "0-49999"
