"""Share of the loop outside the model in the default ``fastdiff sample``.

    python -m benchmarks.sampler_overhead --out benchmarks/results/sampler_overhead.json

The model is timed inside the loop; everything else of the call (noise, steps, concatenation for
guidance, Python) is the overhead. Floor: 20 steps over 80 x 1 x 32 x 32 float32 move 20 x 5 passes
x 328 kB = 33 MB, a few milliseconds, beside 3,200 forward passes of the U-Net.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

import fastdiff
from benchmarks import measure


def overhead(rounds: int) -> dict[str, object]:
    """Seconds of the whole loop and of the model in it, one pair a round."""
    model, schedule, card = fastdiff.load("fashion")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    how = card["sampling"]
    table = fastdiff.solvers.build(
        how["solver"], schedule, how["steps"], prediction=card["prediction"]
    )
    inside = 0.0

    def timed(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        nonlocal inside
        start = time.perf_counter()
        output: torch.Tensor = model(x, t, label)
        inside += time.perf_counter() - start
        return output

    sampler = fastdiff.Sampler(timed, table, guidance=how["guidance"], clip=how["clip"])
    label = torch.arange(10).repeat_interleave(8)
    pairs = []
    for _ in range(rounds):
        inside = 0.0
        start = time.perf_counter()
        sampler(
            how["shape"],
            seeds=list(range(8)) * 10,
            cond={"label": label},
            uncond={"label": torch.full_like(label, -1)},
        )
        pairs.append((time.perf_counter() - start, inside))
    shares = sorted(1 - model_s / total_s for total_s, model_s in pairs)
    return {
        "case": "sampler overhead",
        "total_seconds": [total_s for total_s, _ in pairs],
        "model_seconds": [model_s for _, model_s in pairs],
        "share": shares[len(shares) // 2],
        "target": ["at most", 0.02],
        "machine": measure.machine_info(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=None)
    args = parser.parse_args(argv)
    result = overhead(args.rounds)
    print(f"loop outside the model: {100 * float(str(result['share'])):.2f} % of the wall time")
    if args.out:
        command = f"python -m benchmarks.sampler_overhead {' '.join(argv)}"
        measure.write_json(args.out, [result], command)


if __name__ == "__main__":
    main()
