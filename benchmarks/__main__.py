"""Run the benchmarks, and write their tables, their plot and the README's.

    python -m benchmarks                              # every bench_*.py of this folder
    python -m benchmarks --only film_norm noise       # some
    python -m benchmarks --only noise --base HEAD~1   # this checkout against another commit

Each benchmark is a process of its own, so that none runs on the memory and the threads that another
left, and its peers stand beside it in that process. `--base` builds both commits afresh and runs
them in turn, round by round; it writes no results, but prints how many times longer the base takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.readme import ROOT

_ABOUT = (__doc__ or "").split("\n")[0]
RESULTS = ROOT / "benchmarks" / "results"

# Runs a benchmark of this checkout on the library of a folder. The import hook of an editable
# install would find the checkout's first.
_LAUNCH = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path.insert(0, sys.argv.pop(1))
module = sys.argv[1]
sys.argv[:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def names() -> list[str]:
    """The benchmarks of this folder."""
    return sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))


def run(name: str, rest: Sequence[str], out: Path, library: Path | None = None) -> bool:
    """Run one; whether it ended well.

    Args:
        rest: its own options.
        out: the JSON.
        library: folder of an installed fastdiff; None: the one that this process has.
    """
    module, more = f"benchmarks.bench_{name}", ["--out", str(out), *rest]
    words = ["-m", module, *more]
    if library is not None:
        words = ["-c", _LAUNCH, str(library), module, *more]
    print(f"+ {module} {' '.join(more)}", flush=True)
    return subprocess.run([sys.executable, *words], cwd=ROOT).returncode == 0


def build(ref: str | None, folder: Path) -> Path:
    """Install a commit, or the checkout as it is, into a folder.

    Raises:
        RuntimeError: there is no such commit, or it does not build.
    """
    source, target = ROOT, folder / "library"
    if ref is not None:
        # an archive leaves nothing in the repository where this is killed, as a worktree would
        source, packed = folder / "source", folder / "source.zip"
        _do("git", "-C", str(ROOT), "archive", "--format=zip", "--output", str(packed), ref)
        shutil.unpack_archive(packed, source)
    how = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(target)]
    print(f"+ pip install {ref or 'the checkout'}", flush=True)
    _do(sys.executable, "-m", "pip", "install", *how, str(source))
    return target


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks: {' '.join(words)}: {done.stderr.strip()}")


def compared(pairs: Sequence[tuple[list[report.Row], list[report.Row]]]) -> list[tuple[str, float]]:
    """(case, base's time over ours) of runs in pairs, from the fastest round of all.

    Args:
        pairs: rows of the base and of the head, a pair a round.
    """

    def best(which: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for pair in pairs:
            for r in pair[which]:
                shape = "x".join(map(str, r["shape"]))
                key = f"{r['case']} {shape} {r.get('dtype', '')} {r['threads']} threads"
                found[key] = min(found.get(key, float("inf")), r["seconds"][r["ours"]]["best"])
        return found

    base, head = best(0), best(1)
    return [(key, base[key] / head[key]) for key in head if key in base]


def compare(only: Sequence[str], ref: str, rest: Sequence[str], rounds: int) -> int:
    """Print base over head for the chosen benchmarks."""
    failed = 0
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        libraries = build(ref, Path(a)), build(None, Path(b))
        for name in only:
            pairs = []
            for _ in range(rounds):
                rows = []
                for folder, library in zip((a, b), libraries, strict=True):
                    out = Path(folder) / f"{name}.json"
                    out.unlink(missing_ok=True)
                    ended = run(name, rest, out, library)
                    rows.append(json.loads(out.read_text()) if ended and out.exists() else [])
                failed += not all(rows)
                pairs.append((rows[0], rows[1]))
            print(f"\n{name}: {ref} over this checkout, fastest of {rounds} runs")
            for key, ratio in compared(pairs):
                print(f"  {ratio:6.2f}  {key}")
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--base", metavar="REF", help="compare this commit with the checkout")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each commit with --base")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument(
        "rest", nargs="*", help="options of the benchmarks themselves, behind --", default=[]
    )
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(names()))
        return 0
    if args.base is not None:
        return compare(args.only, args.base, args.rest, args.rounds)
    failed = [n for n in args.only if not run(n, args.rest, args.out / f"{n}.json")]
    # all that are there, so that a run of some keeps the others' rows
    rows = report.load(sorted(args.out.glob("*.json")))
    if rows:
        args.out.joinpath("report.md").write_text(report.table(rows), encoding="utf-8")
        try:
            report.plot(rows, args.out / "report.svg")
        except RuntimeError as error:
            print(error, file=sys.stderr)
    if args.out.resolve() == RESULTS:
        _do(sys.executable, "-m", "benchmarks.readme")
    if failed:
        print(f"benchmarks: failed: {' '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
