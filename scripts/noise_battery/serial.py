"""dieharder's sts_serial on our words and on its own AES, equally often: whose fault are the weak?

    python scripts/noise_battery/serial.py --runs 24 > scripts/noise_battery/logs/serial.log

Runs of ours take the orders `elements` and `mixed` in turn. Their seeds lie 2^32 apart, so that no
two runs share a counter; `mixed` takes neighbouring seeds, and runs on seeds 0, 1 and 2 share most
of their words. A line a run: its 30 p-values. Then of each generator the weak ones (below 0.005 or
above 0.995, 1 % of uniform p-values) with their binomial p-value, the Kolmogorov-Smirnov p-value of
all against uniform ones, and whether the two generators differ by weak ones a run: permutations of
the runs, as the 30 p-values of one come from the same words. Needs dieharder, a compiler and scipy.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from run import build
from scipy import stats

APART = 1 << 32
SHUFFLES = 20_000


def p_values(report: str) -> list[float]:
    """Of every line of dieharder's report that is a result."""
    return [float(line.split("|")[4]) for line in report.splitlines() if "sts_serial" in line]


def of_ours(program: Path, order: str, seed: int) -> list[float]:
    """A run on our words from standard input."""
    words = subprocess.Popen([str(program), order, str(seed), "10", "0"], stdout=subprocess.PIPE)
    tested = subprocess.run(
        ["dieharder", "-d", "102", "-g", "200"],
        stdin=words.stdout, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words.kill()
    words.wait()
    return p_values(tested.stdout)


def of_aes(seed: int) -> list[float]:
    """A run on AES_OFB, a generator of dieharder's."""
    command = ["dieharder", "-d", "102", "-g", "205", "-S", str(seed)]
    return p_values(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def weak(p: np.ndarray) -> np.ndarray:
    return (p < 0.005) | (p > 0.995)


def summary(ours: np.ndarray, aes: np.ndarray) -> list[str]:
    """Of (runs, 30) p-values each."""
    lines = []
    for name, p in (("ours", ours), ("aes", aes)):
        count = int(weak(p).sum())
        binomial = stats.binomtest(count, p.size, 0.01, alternative="greater").pvalue
        uniform = stats.kstest(p.ravel(), "uniform").pvalue
        lines.append(
            f"# {name}: {len(p)} runs, {count} of {p.size} weak ({int((p > 0.995).sum())} high), "
            f"binomial p {binomial:.2g} at 1 %, uniform p {uniform:.2g}"
        )
    rng = np.random.default_rng(0)
    a, b = weak(ours).sum(1), weak(aes).sum(1)
    both, seen = np.concatenate([a, b]), abs(a.mean() - b.mean())
    as_far = 0
    for _ in range(SHUFFLES):
        rng.shuffle(both)
        as_far += abs(both[: len(a)].mean() - both[len(a) :].mean()) >= seen - 1e-12
    lines.append(f"# weak ones a run: {a.mean():.2f} and {b.mean():.2f}, p {as_far / SHUFFLES:.2g}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=24, help="of each generator")
    args = parser.parse_args()
    ours, aes = [], []
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for i in range(1, args.runs + 1):
            order = ("mixed", "elements")[i % 2]
            ours.append(of_ours(program, order, i * APART))
            print(f"ours {order} {i * APART}", *ours[-1], flush=True)
            aes.append(of_aes(100 + i))
            print(f"aes {100 + i}", *aes[-1], flush=True)
    print(*summary(np.array(ours), np.array(aes)), sep="\n")


if __name__ == "__main__":
    main()
