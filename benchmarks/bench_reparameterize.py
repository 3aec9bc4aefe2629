"""`ops.reparameterize` against the chain of PyTorch operations that VAE code writes.

    python -m benchmarks.bench_reparameterize --out benchmarks/results/reparameterize.json
    pytest benchmarks/bench_reparameterize.py --benchmark-only

The chain is that of pytorch/examples (vae/main.py) with the divergence kept a sample:
`exp`, `randn_like`, multiply, add; `-0.5 * sum(1 + logvar - mu^2 - exp(logvar))`.

Predicted before it was measured, an element in float32:

- bytes: forward reads 8 and writes 4, backward reads 12 and writes 8, together 32 and 12 more where
  a store first fetches its line. The chain moves 24 passes of 4 bytes forward and about as many
  back, and draws its normals on one thread (3.5 ns each on the machine of the results).
- operations: 16 normals cost 62 vector instructions (30 Philox, 32 Box-Muller), exp 28, z 2, the
  divergence 6, the gradients 8: 98 forward and 98 backward for 16 elements. At two instructions of
  512 bits a cycle and 3 GHz that is 1.0 ns each way on one core, twice what the bytes take on it
  at 25 GB/s: arithmetic bounds both passes, and the second drawing of the noise is the price of
  saving none.

With 50 samples of each distribution (Burda et al. 2016, arXiv:1509.00519) the normals and the z are
all: 4 bytes an element, and 64 vector instructions for 16 of them. The chain holds its normals and
their product with the deviation beside z, so that its peak of memory is three times the op's; a
process of its own measures that for each.

So the floor of forward and backward is 1.05 ms at (256, 4096) on two cores, against 3.6 ms for the
chain's normals alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config

from benchmarks import measure
from fastdiff.ops import as_seeds, randn, reparameterize
from tests.budget import assert_within_budget

SHAPES = ((256, 4096), (16, 4, 64, 64))
SAMPLES = 50  # of each distribution, at the second shape
# the chain's time over ours, 2 threads, forward and backward
TARGET = 4.0
# bytes an element that cannot be avoided
BYTES = {"forward": 12, "forward+backward": 32}


def chain(
    mu: torch.Tensor, logvar: torch.Tensor, samples: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is replaced."""
    std = torch.exp(0.5 * logvar)
    if samples is None:
        z = mu + torch.randn_like(std) * std
    else:
        eps = torch.randn(mu.shape[0], samples, *mu.shape[1:])
        z = mu.unsqueeze(1) + eps * std.unsqueeze(1)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).flatten(1).sum(1)
    return z, kl


def gate() -> None:
    """z, kl and gradients within the error budget of autograd through the chain's own formula."""
    mu, logvar = (t.requires_grad_() for t in randn([1, 2], (3, 1100)))
    weight = randn([3], (3, 1100))[0]
    eps = randn([5, 6, 7], (1100,), stream=3)
    answers = []
    for dtype in (None, torch.float32, torch.float64):
        m, lv = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (mu, logvar))
        if dtype is None:
            z, kl = reparameterize(m, lv, 5)
        else:
            z = m + eps.to(dtype) * torch.exp(0.5 * lv)
            kl = -0.5 * (1 + lv - m.pow(2) - lv.exp()).sum(1)
        grads = torch.autograd.grad((weight.to(z.dtype) * z).sum() + kl.sum(), (m, lv))
        answers.append((z, kl, *grads))
    for got, plain, exact in zip(*answers, strict=True):
        assert_within_budget(got, plain, exact, ulps=2)  # two roundings after the exponential


def functions(
    shape: tuple[int, ...], compiled: bool = False, samples: int | None = None
) -> dict[str, Any]:
    """By pass, what is timed side by side; every call makes its outputs anew, as training does."""
    both = randn([1, 2], shape)
    mu, logvar = both[0], 0.5 * both[1]
    seeds = as_seeds(0, shape[0])
    several = () if samples is None else (samples,)
    wide = (shape[0], *several, *shape[1:])
    grads = (randn([3], wide)[0], torch.full((shape[0],), 1 / shape[0]))
    leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
    target = torch.empty_like(mu)

    def ours(m: torch.Tensor, lv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reparameterize(m, lv, seeds, samples=samples)

    def there_and_back(f: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(*leaves), leaves, grads)

    def eager(m: torch.Tensor, lv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return chain(m, lv, samples)

    who = {"fastdiff": ours, "eager": eager}
    if compiled:
        who["compiled"] = torch.compile(eager, dynamic=False)
    copy = {"copy": lambda: target.copy_(mu)}
    return {
        "forward": {name: (lambda f=f: f(mu, logvar)) for name, f in who.items()} | copy,
        "forward+backward": {name: there_and_back(f) for name, f in who.items()} | copy,
    }


def _peak(who: str) -> int:
    """Bytes by which one forward call of many samples raises the most memory of a new process."""
    code = (
        "from benchmarks.bench_reparameterize import *;"
        "mu, logvar = randn([1, 2], SHAPES[1]); seeds = as_seeds(0, SHAPES[1][0]);"
        "who = {'eager': lambda: chain(mu, logvar, SAMPLES),"
        " 'fastdiff': lambda: reparameterize(mu, logvar, seeds, samples=SAMPLES)};"
        "status = lambda: open('/proc/self/status').read().split('VmHWM:')[1].split()[0];"
        # the most so far is that of the imports, which is forgotten here
        "open('/proc/self/clear_refs', 'w').write('5');"
        f"before = int(status()); found = who[{who!r}](); print(1024 * (int(status()) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _bytes(what: str, samples: int | None) -> int:
    """Bytes an element of mu that cannot be avoided."""
    more = 0 if samples is None else 4 * (samples - 1)  # of z, and of its gradient
    return BYTES[what] + more * (1 if what == "forward" else 2)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/reparameterize.json")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args(argv)
    gate()
    # the compiler's worker processes would still be starting while the first case is timed
    torch._inductor.config.compile_threads = 1
    rows = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for shape, samples in ((SHAPES[0], None), (SHAPES[1], None), (SHAPES[1], SAMPLES)):
            torch._dynamo.reset()
            for what, who in functions(shape, not args.no_compile, samples).items():
                stats = measure.interleaved(who, repeats=args.repeats)
                hit = what == "forward" or shape == SHAPES[0]
                target = {"eager": ("at least", TARGET)} if hit and threads == 2 else {}
                size = torch.Size(shape).numel()
                facts: dict[str, Any] = {"shape": list(shape), "dtype": "float32"}
                if samples is not None and what == "forward":
                    facts["peak_bytes"] = {name: _peak(name) for name in ("fastdiff", "eager")}
                several = "" if samples is None else f" of {samples} samples"
                r = measure.row(
                    f"reparameterize {what}{several}",
                    stats,
                    "fastdiff",
                    target,
                    bytes=_bytes(what, samples) * size,
                    threads=threads,
                    **facts,
                )
                # a copy moves 8 bytes an element
                floor = stats["copy"].best * _bytes(what, samples) / 8
                r["roofline"] = stats["fastdiff"].best / floor
                r["nanoseconds_an_element"] = stats["fastdiff"].best / size * 1e9
                rows.append(r)
                nanoseconds = f"{r['nanoseconds_an_element']:.2f} ns an element"
                measure.show(r, nanoseconds, f"{r['roofline']:.1f} times its bytes at copy speed")
    measure.write_json(args.out, rows, measure.command("bench_reparameterize", argv))


@pytest.mark.parametrize("shape", SHAPES, ids=("256x4096", "16x4x64x64"))
@pytest.mark.parametrize("what", BYTES)
@pytest.mark.parametrize("who", ("fastdiff", "eager"))
def test_reparameterize(
    benchmark: Any, threads: int, who: str, what: str, shape: tuple[int, ...]
) -> None:
    gate()
    benchmark.group = f"{what} {shape}, {threads} threads"
    benchmark.pedantic(functions(shape)[what][who], rounds=21, warmup_rounds=2)


if __name__ == "__main__":
    main()
