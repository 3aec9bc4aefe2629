"""The whole loop in every mode: eager, compiled, one captured step, all steps captured.

    python -m benchmarks.sampler_modes --out benchmarks/results/sampler_modes.json

On a CUDA device all four; on the CPU the first two. Two models: one that costs nothing, so that
the loop's own time is seen, at the state of a latent diffusion model, and the U-Net of DDPM's
CIFAR-10 configuration with random weights. Beside the times stands how far each mode's picture is
from the eager one: nothing for the free model, and for the network what inductor and the libraries'
choice of kernels make of its sums.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastdiff
from benchmarks import measure
from fastdiff.models.unet import UNet, UNetConfig

STEPS = 20
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compile": {"mode": "compile"},
    "graph": {"mode": "graph"},
    "graph, unrolled": {"mode": "graph", "unroll": True},
}


def free(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A model that costs nothing."""
    return x


def ddpm_cifar10(device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Ho et al. 2020 (arXiv:2006.11239), appendix B: 35.7 M parameters."""
    config = UNetConfig(
        in_channels=3, channels=(128, 256, 256, 256), blocks=2, attention=(16,), num_classes=0,
        patch_size=1, embed_dim=512, time_dim=128, groups=32, head_dim=256, eps=1e-6,
        modulation="add", upsample="conv",
    )  # fmt: skip
    torch.manual_seed(0)
    net = UNet(config).to(device, dtype).eval()
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def compare(
    case: str, model: Any, shape: tuple[int, ...], batch: int, device: str, repeats: int
) -> dict[str, Any]:
    """One row: seconds of a whole run in each mode that the device has."""
    table = fastdiff.solvers.build("dpmpp_2m", fastdiff.schedules.linear(), STEPS)
    cuda = device == "cuda"
    runs: dict[str, Callable[[], object]] = {}
    apart: dict[str, float] = {}
    expected = None
    for name, how in MODES.items():
        if how.get("mode") == "graph" and not cuda:
            continue
        sampler = fastdiff.Sampler(model, table, device=device, **how)

        def run(sampler: fastdiff.Sampler = sampler) -> torch.Tensor:
            result = sampler(shape, seeds=range(batch))
            if cuda:
                torch.cuda.synchronize()
            return result

        got = run()
        expected = got if expected is None else expected
        apart[name] = float((got - expected).abs().max() / expected.abs().max())
        if model is free and apart[name] != 0.0:
            raise RuntimeError(f"{case}: mode {name} must give the eager picture, got {apart}")
        runs[name] = run
    stats = measure.interleaved(runs, repeats=repeats)
    best = "graph, unrolled" if cuda else "compile"
    facts = {"shape": [batch, *shape], "steps": STEPS, "device": device, "apart": apart}
    if cuda:
        facts["gpu"] = torch.cuda.get_device_name()
    return measure.row(case, stats, best, **facts)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--batch", type=int, default=None, help="default: 64 on CUDA, 16 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--out", default=None)
    args = parser.parse_args(argv)
    batch = args.batch or (64 if args.device == "cuda" else 16)
    dtype = getattr(torch, args.dtype)
    latent = compare("a free model", free, (4, 64, 64), 1, args.device, args.repeats)
    net = ddpm_cifar10(args.device, dtype)
    whole = compare("DDPM CIFAR-10", net, (3, 32, 32), batch, args.device, args.repeats)
    for row in (latent, whole):
        print(row["case"], row["shape"], f"{row['device']}, {STEPS} steps")
        for name, times in row["seconds"].items():
            print(
                f"  {name:<16} {1e3 * times['median']:9.3f} ms, "
                f"{1e6 * times['median'] / STEPS:9.1f} us a step, {row['apart'][name]:.1e} apart"
            )
    if args.out:
        measure.write_json(args.out, [latent, whole], measure.command("sampler_modes", argv))


if __name__ == "__main__":
    main()
