"""TestU01 (L'Ecuyer and Simard 2007, doi:10.1145/1268776.1268777) on the noise, order by order.

    python scripts/noise_battery/testu01.py --battery SmallCrush --feed elements steps seeds mixed
    python scripts/noise_battery/testu01.py --battery Crush --feed mixed
    python scripts/noise_battery/testu01.py --battery SmallCrush --feed mixed --rounds 5  # control

Orders are those of run.py. `--bits low` turns every word round, as the batteries look at the upper
bits far more. Needs a C++ compiler and libtestu01-0-dev (Debian, section non-free). SmallCrush
takes seconds, Rabbit and Alphabit (2^32 bits) minutes, Crush half an hour and 2^35 words or so,
BigCrush hours and 2^38. The exit code is 1 where a p-value is below 1e-6 on either side, run.py's.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from run import CSRC, FAIL, HERE, compiler, each_feed, parser_of

BATTERIES = ("SmallCrush", "Crush", "BigCrush", "Rabbit", "Alphabit")


def build(folder: Path) -> Path:
    """The compiled driver, in `folder`."""
    program = folder / "testu01"
    subprocess.run(
        [str(compiler()), "-std=c++17", "-O3", "-march=native", "-ffp-contract=off",
         "-fno-math-errno", f"-I{CSRC}", str(HERE / "testu01.cpp"), "-o", str(program),
         "-ltestu01", "-ltestu01probdist", "-ltestu01mylib", "-lm"],
        check=True,
    )  # fmt: skip
    return program


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--battery", default="SmallCrush", choices=BATTERIES)
    parser.add_argument("--bits", default="high", choices=("high", "low"))
    args = parser.parse_args()

    def look(program: Path, feed: str) -> tuple[int, str, list[str]]:
        lines = subprocess.run(
            [str(program), feed, str(args.seed), str(args.rounds), args.bits, args.battery],
            check=True, stderr=subprocess.PIPE, text=True,
        ).stderr.splitlines()  # fmt: skip
        *tests, (_, words) = (line.split("\t") for line in lines)
        found = sorted((min(float(p), 1 - float(p)), name, p) for name, p in tests)
        bad = sum(entry[0] < FAIL for entry in found)
        odd = [entry for entry in found if entry[0] < 1e-3]
        line = (
            f"{args.battery} {feed}: seed {args.seed}, {args.rounds} rounds, {args.bits} bits "
            f"first, {int(words)} words, {len(found)} p-values, {bad} failed, {len(odd)} "
            f"outside [0.001, 0.999], nearest to an end {found[0][2]} {found[0][1]}"
        )
        return bad, line, [f"{name}: {p}" for _, name, p in odd]

    return each_feed(args, build, look)


if __name__ == "__main__":
    raise SystemExit(main())
