"""Statistical tests of the counter noise: as many bytes as asked, read in several orders.

    python scripts/noise_battery/run.py --feed elements mixed --log2-bytes 36
    python scripts/noise_battery/run.py --feed elements --rounds 2 --log2-bytes 26   # a control

Feeds: `elements` (one stream in the order of a tensor's elements), `steps`, `seeds` (neighbouring
steps or seeds of one element), `mixed` (streams, steps, seeds and elements interleaved); each also
as `normals-...`, the normals mapped back to uniforms by their distribution function, 16 bits each.
`lcg64` and `xorshift128` are controls, as are fewer than the 10 rounds of the library: they must
fail. Needs a C++ compiler and scipy. The exit code is 1 where a p-value is below 1e-6.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scipy import stats

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FAIL = 1e-6  # some 30 statistics a feed: a good generator fails once in 15,000 feeds


class Result(NamedTuple):
    """One statistic: `p` is two-sided, since too even a count is as suspect as too uneven a one."""

    test: str
    kind: str
    value: float
    of: float
    p: float


def compiler() -> str | None:
    """The C++ compiler's path, or None."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def build(folder: Path) -> Path:
    """The compiled battery, in `folder`."""
    program = folder / "battery"
    command = [
        str(compiler()), "-std=c++17", "-O3", "-march=native", "-ffp-contract=off",
        "-fno-math-errno", "-Wall", "-Wextra", f"-I{CSRC}", str(HERE / "battery.cpp"),
        "-o", str(program),
    ]  # fmt: skip
    if os.uname().machine == "x86_64":
        command.append("-mprefer-vector-width=512")
    subprocess.run(command, check=True)
    return program


def p_value(kind: str, value: float, of: float) -> float:
    """Of a chi2 with `of` degrees of freedom, a z score, or a Poisson count of mean `of`."""
    if kind == "z":
        return float(2 * stats.norm.sf(abs(value)))
    if kind == "chi2":
        tails = stats.chi2.sf(value, of), stats.chi2.cdf(value, of)
    else:
        tails = stats.poisson.sf(value - 1, of), stats.poisson.cdf(value, of)
    return float(min(1.0, 2 * min(tails)))


def run(program: Path, feed: str, seed: int, rounds: int, log2_bytes: int) -> list[Result]:
    """Every statistic of one feed."""
    out = subprocess.run(
        [str(program), feed, str(seed), str(rounds), str(log2_bytes)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    results = []
    for line in out.splitlines():
        test, kind, value, of = line.split("\t")
        p = p_value(kind, float(value), float(of))
        results.append(Result(test, kind, float(value), float(of), p))
    return results


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that choose the words."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--feed", nargs="+", default=["elements", "steps", "seeds", "mixed"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10)
    return parser


def each_feed(
    args: argparse.Namespace,
    build: Callable[[Path], Path],
    look: Callable[[Path, str], tuple[int, str, list[str]]],
) -> int:
    """Prints what `look` finds in each feed (failures, a line, lines below it); the exit code."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for feed in args.feed:
            start = time.perf_counter()
            bad, line, more = look(program, feed)
            failed += bad
            print(f"{line} ({time.perf_counter() - start:.0f} s)", *more, sep="\n  ", flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--log2-bytes", type=int, default=30)
    args = parser.parse_args()

    def look(program: Path, feed: str) -> tuple[int, str, list[str]]:
        results = run(program, feed, args.seed, args.rounds, args.log2_bytes)
        bad = sum(r.p < FAIL for r in results)
        more = []
        for r in results:
            of = {"chi2": "dof", "poisson": "mean", "z": "sd"}[r.kind]
            more.append(f"{r.test:26} {r.kind:7} {r.value:13.6g} ({of} {r.of:g})  p {r.p:.3g}")
        line = (
            f"{feed}: seed {args.seed}, {args.rounds} rounds, 2^{args.log2_bytes} bytes, "
            f"{len(results)} statistics, {bad} failed, least p {min(r.p for r in results):.2g}"
        )
        return bad, line, more

    return each_feed(args, build, look)


if __name__ == "__main__":
    raise SystemExit(main())
