"""torch's own CPU stream drawn by our kernel against `Tensor.normal_`, into a tensor that exists.

python -m benchmarks.bench_torch_noise --out benchmarks/results/torch_noise.json
pytest benchmarks/bench_torch_noise.py --benchmark-only
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import measure
from fastdiff.integrations import _torch_noise
from fastdiff.ops import _native
from tests.bits import assert_same_bits

# the latents of one image, of a large batch, and pixels of a batch, which leave the cache
SIZES = (16_384, 524_288, 4_838_400)
DTYPES = (torch.float32, torch.bfloat16)
# torch's time over ours, by number of threads; torch draws on one thread whatever it has
TARGETS = {1: 2.0, 2: 2.0}


def gate(draws: int = 10**6) -> None:
    """Our kernel runs, and gives the bits of torch and leaves its state."""
    for dtype in DTYPES:
        if not _torch_noise._agrees(dtype, _native.extension.isa()):
            raise RuntimeError("this torch draws another stream: nothing to measure")
        ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        done = 0
        while done < draws:
            size = SIZES[done % len(SIZES)] + done % 19
            got = _torch_noise.randn((size,), ours, dtype)
            expected = torch.randn(size, generator=theirs, dtype=dtype)
            assert_same_bits(got, expected, f"{dtype} from {done}")
            done += size
        if not torch.equal(ours.get_state(), theirs.get_state()):
            raise AssertionError(f"the states differ after {done} values of {dtype}")


def functions(size: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed side by side for one size."""
    out, target = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    return {
        "fastdiff": lambda: _torch_noise.fill_(out, ours),
        "torch": lambda: target.normal_(generator=theirs),
    }


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/torch_noise.json")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--draws", type=int, default=10**8, help="values compared before timing")
    args = parser.parse_args(argv)
    gate(args.draws)
    rows = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for dtype in DTYPES:
            for size in SIZES:
                stats = measure.interleaved(functions(size, dtype), repeats=args.repeats)
                target = {"torch": ("at least", TARGETS[threads])}
                kind = str(dtype).removeprefix("torch.")
                facts = {"shape": [size], "dtype": kind, "threads": threads}
                r = measure.row("torch_noise", stats, "fastdiff", target, **facts)
                r["nanoseconds_a_normal"] = stats["fastdiff"].best / size * 1e9
                rows.append(r)
                measure.show(r, f"{r['nanoseconds_a_normal']:.3f} ns each")
    measure.write_json(args.out, rows, measure.command("bench_torch_noise", argv))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("who", ("fastdiff", "torch"))
def test_torch_noise(benchmark: Any, threads: int, who: str, dtype: torch.dtype, size: int) -> None:
    gate()
    benchmark.group = f"{size} normals, {dtype}, {threads} threads"
    benchmark.pedantic(functions(size, dtype)[who], rounds=21, warmup_rounds=2)


if __name__ == "__main__":
    main()
