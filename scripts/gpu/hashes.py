"""SHA-256 of noise and of whole loops, written on a CPU and compared on a GPU.

    python scripts/gpu/hashes.py compare               # what this machine has with the file
    python scripts/gpu/hashes.py write                 # the loops anew, after a new solver
    python scripts/gpu/hashes.py write --normals 4294967296    # the normals too

The file is scripts/gpu/hashes.json, and what is written comes from the CPU backend.
`compare` ends with 1 where a hash differs, and prints each. What is hashed is float32 in C order,
which the library promises as bits: 2^32 normals of seeds, steps and streams up to the ends of their
ranges, and what every solver makes in twenty steps of a model that multiplies and adds, so that
each row of each table went through the step kernel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff import cli
from fastdiff.backends import unavailable, use_backend

FILE = Path(__file__).with_name("hashes.json")
CHUNK = 1 << 26  # normals that are drawn at a time, 256 MiB
SHAPE = (4, 16, 24)
BATCH = 3
# the ends of the ranges, and what lies between: seed, step, stream
CORNERS = (
    (0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), ((1 << 63) - 1, 0, 0), (1 << 63, 0, 0),
    ((1 << 64) - 1, 0, 0), (7, (1 << 32) - 1, 0), (7, 0, (1 << 32) - 1), (7, 1 << 31, 1 << 31),
)  # fmt: skip


def digest(tensor: torch.Tensor) -> str:
    """Of a float32 tensor's bytes in C order."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().data).hexdigest()


def normals(device: str, count: int) -> Iterator[tuple[str, str]]:
    """(what, hash) of each chunk of `count` normals in all."""
    out = torch.empty(1, CHUNK, device=device)
    for i in range(count // CHUNK):
        seed, step, stream = CORNERS[i] if i < len(CORNERS) else (1000 + i, i, i % 5)
        fastdiff.randn([seed], (CHUNK,), step=step, stream=stream, out=out)
        yield f"normals: seed {seed}, step {step}, stream {stream}", digest(out)


def model(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    """Rounded operation by operation, each of them alike on every device."""
    y = 0.75 * x
    return y if label is None else y + label[:, None, None, None]


def loops(device: str, **how: Any) -> Iterator[tuple[str, str]]:
    """(what, hash) of every solver's pictures, plain, and with guidance and a bound.

    Args:
        how: options of the `Sampler`.
    """
    label = torch.linspace(-1, 1, BATCH)
    guided: dict[str, Any] = {"cond": {"label": label}, "uncond": {"label": 0 * label}}
    for name, table, _ in cli.overview():
        plain = fastdiff.Sampler(model, table, device=device, **how)
        yield f"{name}", digest(plain(SHAPE, seeds=range(BATCH), **guided))
        bounded = fastdiff.Sampler(model, table, device=device, guidance=1.5, clip=1.0, **how)
        made = bounded(SHAPE, seeds=range(BATCH), **guided)
        yield f"{name}, guidance 1.5, clip 1", digest(made)


def ways(backends: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, backend, options of the sampler)."""
    for backend in backends:
        reason = unavailable(backend)
        if reason is not None:
            raise SystemExit(f"hashes: backend must be able to run, got {backend}: {reason}")
        yield backend, backend, {}
        if backend == "cpu":
            continue
        yield f"{backend}, graph", backend, {"mode": "graph"}
        yield f"{backend}, unrolled graph", backend, {"mode": "graph", "unroll": True}


def compare(found: Iterator[tuple[str, str]], want: dict[str, str], way: str) -> list[str]:
    """What differs, or is in one of the two alone."""
    wrong, seen = [], set()
    for what, value in found:
        seen.add(what)
        if want.get(what) != value:
            wrong.append(f"{way}: {what}")
    missing = [f"{way}: {what} is missing" for what in want if what not in seen]
    print(f"{way}: {len(seen)} hashes, {len(wrong) + len(missing)} differ", flush=True)
    return wrong + missing


def check(backends: Sequence[str], want: dict[str, Any], count: int) -> list[str]:
    """Every difference between the hashes of backends and the file's."""
    wrong: list[str] = []
    drawn = dict(list(want["normals"].items())[: count // CHUNK])
    for way, backend, how in ways(backends):
        device = "cpu" if backend == "cpu" else "cuda"
        with use_backend(backend):
            if not how:
                wrong += compare(normals(device, count), drawn, f"{way}, normals")
            wrong += compare(loops(device, **how), want["loops"], f"{way}, loops")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("--file", type=Path, default=FILE)
    every = ("triton", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--backends", nargs="+", default=every, help="to compare")
    parser.add_argument(
        "--normals", type=int, help="how many, a multiple of 2^26; the default is those of the file"
    )
    args = parser.parse_args(argv)
    if args.what == "compare":
        want = json.loads(args.file.read_text(encoding="utf-8"))
        count = CHUNK * len(want["normals"]) if args.normals is None else args.normals
        wrong = check(args.backends, want, count)
        print("\n".join(wrong) or "all hashes are those of the file")
        return int(bool(wrong))
    with use_backend("cpu"):
        if args.normals is None:
            drawn = json.loads(args.file.read_text(encoding="utf-8"))["normals"]
        else:
            drawn = dict(normals("cpu", args.normals))
        found = {"normals": drawn, "loops": dict(loops("cpu"))}
    facts = {"fastdiff": fastdiff.__version__, "torch": torch.__version__}
    args.file.write_text(json.dumps({**facts, **found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
