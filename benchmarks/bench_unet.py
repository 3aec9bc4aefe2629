"""One model evaluation of DDPM's CIFAR-10 U-Net: diffusers as it is, compiled, and accelerated;
and the library's own U-Net with the same weights, whose attention takes two products in bfloat16.

    python -m benchmarks.bench_unet --out benchmarks/results/unet.json

The model is `diffusers.UNet2DModel` in the configuration of Ho et al. 2020 (arXiv:2006.11239) for
CIFAR-10: 35.7 M parameters, random weights. The floor is what no fusion of the chains between them
can go below: its convolutions, matrix products and attentions alone, the very calls of one
evaluation with their own inputs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from benchmarks import measure
from fastdiff.models import UNet
from tests.budget import assert_within_budget

_FLOOR = ("aten.convolution", "aten.addmm", "aten.mm", "aten.bmm", "aten._scaled_dot_product")


def build() -> nn.Module:
    """The U-Net of DDPM for CIFAR-10."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )


class _Record(TorchDispatchMode):
    """Keeps every call of the heavy operators with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if str(func).startswith(_FLOOR):
            kw = kwargs or {}
            self.calls.append(lambda: func(*args, **kw))
        return func(*args, **(kwargs or {}))


def floor(model: nn.Module, x: Tensor, t: Tensor) -> Callable[[], object]:
    """A function that makes the heavy calls of one evaluation and nothing else."""
    with _Record() as record:
        model(x, t)
    calls = record.calls

    def run() -> None:
        for call in calls:
            call()

    return run


def models(compiled: bool) -> dict[str, tuple[nn.Module, torch.dtype, torch.memory_format]]:
    """By name: the model, the dtype and the memory order of its input."""
    torch.manual_seed(0)
    base = build().eval().requires_grad_(False)
    low = copy.deepcopy(base).bfloat16().to(memory_format=torch.channels_last)
    ours, frozen, single = copy.deepcopy(low), copy.deepcopy(low), copy.deepcopy(base)
    fastdiff.accelerate(ours)
    fastdiff.accelerate(frozen, freeze=True)
    fastdiff.accelerate(single)
    last, plain = torch.channels_last, torch.contiguous_format
    found = {
        "fastdiff": (ours, torch.bfloat16, last),
        "fastdiff frozen": (frozen, torch.bfloat16, last),
        "fastdiff UNet": (UNet.from_diffusers(low), torch.bfloat16, last),
        "diffusers bf16": (low, torch.bfloat16, last),
        "fastdiff f32": (single, torch.float32, plain),
        "diffusers f32": (base, torch.float32, plain),
    }
    if compiled:
        torch._inductor.config.freezing = True
        # its worker processes would still be starting while the first case is timed
        torch._inductor.config.compile_threads = 1
        found["compiled bf16"] = (torch.compile(low, dynamic=False), torch.bfloat16, last)  # type: ignore[assignment]
    return found


def _sample(output: Any) -> Tensor:
    """Of diffusers' models and of our own, which gives it bare."""
    return output if isinstance(output, Tensor) else output.sample  # type: ignore[no-any-return]


def gate(found: dict[str, tuple[nn.Module, torch.dtype, torch.memory_format]]) -> None:
    """Every model of ours is as exact as the one that it replaces, before anything is timed."""
    torch.manual_seed(1)
    for name, peer, ulps in (
        # the last convolution rounds its result, both times
        ("fastdiff", "diffusers bf16", 1),
        ("fastdiff frozen", "diffusers bf16", 1),
        # as tests/test_unet_diffusers.py has it
        ("fastdiff UNet", "diffusers bf16", 2),
        ("fastdiff f32", "diffusers f32", 1),
    ):
        model, dtype, order = found[name]
        x = torch.randn(1, 3, 32, 32).to(dtype).contiguous(memory_format=order)
        t = torch.tensor([500])
        exact = copy.deepcopy(found[peer][0]).double()(x.double(), t).sample
        plain = found[peer][0](x, t).sample
        assert_within_budget(_sample(model(x, t)), plain, exact, ulps=ulps)


def functions(
    found: dict[str, tuple[nn.Module, torch.dtype, torch.memory_format]], batch: int
) -> dict[str, Callable[[], object]]:
    """By name, what is timed side by side."""
    torch.manual_seed(2)
    image = torch.randn(batch, 3, 32, 32)
    t = torch.full((batch,), 500)
    who: dict[str, Callable[[], object]] = {}
    for name, (model, dtype, order) in found.items():
        x = image.to(dtype).contiguous(memory_format=order)
        who[name] = lambda m=model, x=x: m(x, t)
        if name == "diffusers bf16":
            who["floor"] = floor(model, x, t)
    return who


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = measure.parser(__doc__, "unet", 15, (2,))
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    args = parser.parse_args(argv)
    found = models(not args.no_compile)
    gate(found)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batch:
            torch._dynamo.reset()
            stats = measure.interleaved(functions(found, batch), repeats=args.repeats, warmup=1)
            facts = {"shape": [batch, 3, 32, 32], "threads": threads}
            r = measure.row(f"unet cifar10 batch {batch}", stats, "fastdiff", **facts)
            r["over_floor"] = stats["fastdiff"].best / stats["floor"].best
            rows.append(r)
            measure.show(r)
    measure.write_json(args.out, rows, measure.command("bench_unet", argv))


if __name__ == "__main__":
    main()
