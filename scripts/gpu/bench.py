"""Kernels and whole loops on a GPU: share of the bandwidth of a copy, microseconds a graph node,
and a loop's time beside diffusers'.

    python scripts/gpu/bench.py --out bench.json

Kernels are captured as graphs of many nodes, so that the host's part of a launch is not in their
times. A share is the bytes that must move over what a copy of a tensor as large moves in the same
time. Peers of the loop need diffusers, and are left out with a word where it is missing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff import backends
from fastdiff.models import UNet, UNetConfig
from fastdiff.ops import film_norm, reverse_step

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import measure

ROW, STEPS = 10, 20
# name -> tensors that a step reads and writes: x, model output, history, x', history
SOLVERS = {"ddim": 3, "dpmpp_2m": 5, "ddpm": 3}
LARGE, SMALL = (16, 4, 1024, 1024), (1, 4, 64, 64)  # 256 MiB, 64 KiB in float32
FILM = (
    (16, 128, 32, 32),
    (16, 256, 16, 16),
    (4, 320, 64, 64),
    (64, 128, 32, 32),
    (16, 320, 64, 64),
)
AIMS = {"step": 0.90, "film_norm": 0.85, "node": 3.0}


class Clock:
    """Seconds of one call of a function on a device."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds, self.cuda = device, rounds, device.startswith("cuda")

    def kernel(self, body: Callable[[], object], nodes: int) -> float:
        """The fastest round of a graph of so many calls, over their number."""
        body()  # compiles
        if not self.cuda:
            return min(self._host(body) for _ in range(self.rounds))
        body()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(nodes):
                body()
        graph.replay()
        return min(self._events(graph.replay) for _ in range(self.rounds)) / nodes

    def loop(self, body: Callable[[], object]) -> dict[str, float]:
        """The fastest and the median of whole calls, from the host's side."""
        for _ in range(2):
            body()
        times = [self._host(body) for _ in range(self.rounds)]
        return {"best": min(times), "median": statistics.median(times)}

    def _events(self, body: Callable[[], object]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        body()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def _host(self, body: Callable[[], object]) -> float:
        start = time.perf_counter()
        body()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def copying(clock: Clock, like: torch.Tensor, nodes: int) -> float:
    """Bytes a second of a copy, read and written."""
    target = torch.empty_like(like)
    seconds = clock.kernel(lambda: target.copy_(like), nodes)
    return 2 * like.numel() * like.element_size() / seconds


def step(clock: Clock, solver: str, shape: tuple[int, ...], nodes: int) -> dict[str, Any]:
    """A row in the middle of a run."""
    table = fastdiff.solvers.build(solver, fastdiff.schedules.linear(), STEPS)
    x, output = (torch.randn(shape, device=clock.device) for _ in range(2))
    given: dict[str, Any] = {
        "history": torch.randn(max(1, table.depth), *shape, device=clock.device),
        "seeds": fastdiff.ops.as_seeds(0, shape[0]).to(clock.device),
        "out": torch.empty_like(x),
    }
    seconds = clock.kernel(lambda: reverse_step(x, output, table, ROW, **given), nodes)
    moved = SOLVERS[solver] * x.numel() * x.element_size()
    return {
        "seconds": seconds,
        "bytes": moved,
        "of_copy": moved / seconds / copying(clock, x, nodes),
    }


def norm(clock: Clock, shape: tuple[int, ...], nodes: int) -> dict[str, Any]:
    """GroupNorm, FiLM and SiLU in bfloat16: one read and one write are the floor."""
    x = torch.randn(shape, device=clock.device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, *shape[:2], device=clock.device, dtype=torch.bfloat16)

    def body() -> object:
        return film_norm(x, 32, scale=scale, shift=shift, act="silu")

    seconds = clock.kernel(body, nodes)
    moved = 2 * x.numel() * x.element_size()
    return {
        "seconds": seconds,
        "bytes": moved,
        "of_copy": moved / seconds / copying(clock, x, nodes),
    }


def kernels(clock: Clock, backend: str, small: bool) -> list[dict[str, Any]]:
    """Rows of one backend; `small` for a trial on small tensors."""
    rows = []

    def add(case: str, shape: tuple[int, ...], aim: float, found: dict[str, Any]) -> None:
        rows.append({"case": case, "backend": backend, "shape": shape, "aim": aim, **found})
        print(rows[-1], flush=True)

    large = SMALL if small else LARGE
    with backends.use_backend(backend):
        for solver in SOLVERS:
            add(f"step {solver}", large, AIMS["step"], step(clock, solver, large, 20))
            found = step(clock, solver, SMALL, 200)
            add(f"node {solver}", SMALL, AIMS["node"], {"microseconds": 1e6 * found["seconds"]})
        for shape in FILM:
            shape = (1, 64, 8, 8) if small else shape
            add("film_norm", shape, AIMS["film_norm"], norm(clock, shape, 50))
    return rows


def loops(clock: Clock, batch: int, config: UNetConfig) -> dict[str, Any]:
    """DPM-Solver++ 2M, 20 steps of a U-Net in bfloat16, every mode, and diffusers' loop."""
    torch.manual_seed(0)
    shape = (config.in_channels, config.image_size, config.image_size)
    net = UNet(config).to(clock.device, torch.bfloat16).eval().requires_grad_(False)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    table = fastdiff.solvers.build("dpmpp_2m", fastdiff.schedules.linear(), STEPS)
    modes: dict[str, dict[str, Any]] = {"eager": {}}
    if clock.cuda:
        modes |= {"graph": {"mode": "graph"}, "unrolled": {"mode": "graph", "unroll": True}}
    found: dict[str, Any] = {}
    for name, how in modes.items():
        sampler = fastdiff.Sampler(net, table, device=clock.device, **how)
        found[f"fastdiff {name}"] = clock.loop(lambda s=sampler: s(shape, seeds=range(batch)))  # type: ignore[misc]
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed: its loops are left out", flush=True)
        return found
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02)
    noise = fastdiff.randn(range(batch), shape, device=clock.device).bfloat16()
    noise = noise.contiguous(memory_format=torch.channels_last)

    def theirs(model: Any) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            scheduler.set_timesteps(STEPS, device=clock.device)
            x = noise
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t.expand(batch)), t, x).prev_sample
            return x

        return run

    # the same network in all: these rows are the loop's alone; benchmarks.bench_unet has the models
    found["diffusers' loop"] = clock.loop(theirs(net))
    if clock.cuda:
        compiled = torch.compile(copy.deepcopy(net), mode="reduce-overhead", fullgraph=True)
        found["diffusers' loop, compiled"] = clock.loop(theirs(compiled))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="a trial of the script itself")
    args = parser.parse_args(argv)
    clock = Clock(args.device, args.rounds)
    names = ("triton", "cuda") if clock.cuda else ("cpu",)
    facts = {**measure.machine_info(), "cuda": torch.version.cuda}
    if clock.cuda:
        facts["gpu"] = torch.cuda.get_device_name(args.device)
    rows = [row for name in names for row in kernels(clock, name, args.small)]
    cifar10 = UNetConfig(
        in_channels=3, channels=(128, 256, 256, 256), blocks=2, attention=(16,), num_classes=0,
        patch_size=1, embed_dim=512, time_dim=128, groups=32, head_dim=256, eps=1e-6,
        modulation="add", upsample="conv",
    )  # fmt: skip
    tiny = UNetConfig(in_channels=3, image_size=8, channels=(32,), patch_size=2, num_classes=0)
    config, batch = (tiny, 2) if args.small else (cifar10, 64)
    result = {"machine": facts, "kernels": rows, "loops": loops(clock, batch, config)}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
