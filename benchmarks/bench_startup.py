"""Time to import, time and memory to the first image, and bytes on disk.

    python -m benchmarks.bench_startup --out benchmarks/results/startup.json

Every call is a process of its own, from `exec` to exit. Predicted before it was measured: torch is
most of an import, and of the rest numpy's is torch's too; a first image of 20 evaluations of a
2.6 M U-Net takes 0.1 s beside that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastdiff
from benchmarks import measure
from fastdiff.ops import _native

_PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def _process(*words: str) -> str:
    # not where the checkout is: what is timed is the installed package
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, check=True, capture_output=True, text=True
        )
    return done.stdout


def _sample(out: Path) -> tuple[str, ...]:
    return "-m", "fastdiff", "sample", "--seeds", "0", "--label", "0", "--out", str(out)


def _python(code: str) -> Callable[[], object]:
    return lambda: _process("-c", code)


def cases(folder: Path) -> dict[str, tuple[dict[str, Callable[[], object]], dict[str, Any]]]:
    """By case: what is timed side by side, and targets."""
    return {
        "import": (
            {
                "fastdiff": _python("import torch, fastdiff"),
                "torch alone": _python("import torch"),
                "diffusers scheduler": _python("from diffusers import DPMSolverMultistepScheduler"),
            },
            {},
        ),
        "first image": ({"fastdiff": lambda: _process(*_sample(folder / "one.png"))}, {}),
    }


def peak_bytes(code: str) -> int:
    """Largest resident memory of a process that runs code."""
    unit = 1 if sys.platform == "darwin" else 1024
    return int(_process("-c", f"{code}\n{_PEAK}").split()[-1]) * unit


def disk_bytes() -> dict[str, int]:
    """Of the compiled extension, the checkpoints, and the whole package."""
    root = Path(fastdiff.__file__).parent
    files = [p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    library = Path(_native.extension.__file__).stat().st_size if _native.extension else 0
    return {
        "extension": library,
        "checkpoints": sum(p.stat().st_size for p in files if p.suffix == ".safetensors"),
        "package": sum(p.stat().st_size for p in files if p.suffix != ".so") + library,
    }


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = measure.parser(__doc__, "startup", 7, (2,))
    args = parser.parse_args(argv)
    rows = []
    before = os.environ.get("OMP_NUM_THREADS")
    with tempfile.TemporaryDirectory() as folder:
        for threads in args.threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes
            torch.set_num_threads(threads)
            for case, (who, targets) in cases(Path(folder)).items():
                stats = measure.interleaved(who, repeats=args.repeats, warmup=1)
                facts: dict[str, Any] = {}
                if case == "import":
                    both = stats["fastdiff"].best, stats["torch alone"].best
                    facts["beyond_torch_seconds"] = both[0] - both[1]
                else:
                    sample = [str(Path(folder) / "two.png") if w.endswith(".png") else w
                              for w in _sample(Path("two.png"))[2:]]  # fmt: skip
                    code = f"from fastdiff import cli\ncli.main({sample!r})"
                    facts["peak_bytes"] = peak_bytes(code)
                    facts["peak_bytes_of_torch"] = peak_bytes("import torch")
                    facts["disk_bytes"] = disk_bytes()
                row = measure.row(
                    case, stats, "fastdiff", targets, shape=[1, 1, 32, 32], threads=threads, **facts
                )
                rows.append(row)
                measure.show(row, *(f"{name}: {value}" for name, value in facts.items()))
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    measure.write_json(args.out, rows, measure.command("bench_startup", argv))


if __name__ == "__main__":
    main()
