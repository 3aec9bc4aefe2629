"""Whole sampling loops around the same weights: ours, diffusers' as its README runs it, diffusers'
in bfloat16 channels-last, and that compiled.

    python -m benchmarks.bench_loop --out benchmarks/results/loop.json

DPM-Solver++ 2M, 20 steps unless ``--steps`` says otherwise, random weights but for the shipped
model: `cifar10` is the U-Net of Ho et al. 2020 (arXiv:2006.11239), batch 16; `dit-s` and `dit-xl`
are DiT-S/2 and DiT-XL/2 of Peebles and Xie 2023 (arXiv:2212.09748) on 32x32 latents; `fashion` is
the shipped model in both loops, so that only the loop differs.

Predicted before it was measured: the model is nearly all of the time, so a loop gains what the
model gains (`bench_unet`), and of ours less than 1 % lies outside of the model: 20 steps of 5
passes over 200 kB against 20 evaluations of half a second.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

import fastdiff
from benchmarks import bench_unet, measure
from fastdiff.models import DiT, UNet

Loop = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A model in its loops.

    Attributes:
        batch: samples.
        shape: of one.
        make: (diffusers' model in float32, its counterpart here for a model of diffusers).
        label: whether the model takes a class.
        targets: by peer, how many times longer it is to take at least.
    """

    batch: int
    shape: tuple[int, ...]
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], nn.Module]]]
    label: bool = False
    targets: tuple[tuple[str, float], ...] = ()


def _cifar10() -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    return bench_unet.build(), UNet.from_diffusers


def _dit(heads: int, width: int, depth: int) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4,
        out_channels=4, num_layers=depth, sample_size=32,
    )  # fmt: skip
    # a checkpoint of DiT holds one embedding, which diffusers repeats in every block
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model, DiT.from_diffusers


CASES = {
    "cifar10": Case(
        16, (3, 32, 32), _cifar10,
        targets=(("diffusers f32", 6.0), ("diffusers bf16", 1.7), ("compiled bf16", 1.3)),
    ),
    "dit-s": Case(4, (4, 32, 32), lambda: _dit(6, 384, 12), label=True),
    "dit-xl": Case(1, (4, 32, 32), lambda: _dit(16, 1152, 28), label=True),
}  # fmt: skip


class Ours:
    """Our loop; the seconds spent inside of the model are counted."""

    def __init__(
        self, model: nn.Module, schedule: Any, case: tuple[int, tuple[int, ...]], steps: int,
        cond: dict[str, Tensor], prediction: str = "epsilon",
    ) -> None:  # fmt: skip
        self.inside = 0.0

        def timed(x: Tensor, t: Tensor, **given: Tensor) -> Tensor:
            start = time.perf_counter()
            output: Tensor = model(x, t, **given)
            self.inside += time.perf_counter() - start
            return output

        table = fastdiff.solvers.build("dpmpp_2m", schedule, steps, prediction=prediction)
        dtype = next(model.parameters()).dtype
        self._sampler = fastdiff.Sampler(timed, table, dtype=dtype)
        batch, self._shape = case
        # channels-last, as the model's weights are: the state keeps the order of its noise
        self._noise = fastdiff.randn(range(batch), self._shape)
        if dtype == torch.bfloat16:
            self._noise = self._noise.contiguous(memory_format=torch.channels_last)
        self._cond = cond

    def __call__(self) -> Tensor:
        return self._sampler(noise=self._noise, cond=self._cond)

    def outside(self) -> float:
        """Share of one call that is not the model's."""
        self.inside = 0.0
        start = time.perf_counter()
        self()
        return 1 - self.inside / (time.perf_counter() - start)


def theirs(
    predict: Callable[[Tensor, Tensor], Tensor],
    case: tuple[int, tuple[int, ...]],
    steps: int,
    dtype: torch.dtype,
    order: torch.memory_format,
    **config: Any,
) -> Loop:
    """The loop of diffusers' pipelines."""
    scheduler = DPMSolverMultistepScheduler(**config)
    batch, shape = case
    noise = fastdiff.randn(range(batch), shape).to(dtype).contiguous(memory_format=order)

    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        return x

    return run


def loops(name: str, steps: int, compiled: bool) -> tuple[dict[str, Loop], Ours]:
    """By name, what is timed side by side; and ours among them."""
    case = CASES[name]
    torch.manual_seed(0)
    base, convert = case.make()
    base.eval().requires_grad_(False)
    for p in base.parameters():  # adaLN-Zero begins with zeros, which would be no work to check
        if not p.any():
            nn.init.normal_(p, std=0.02)
    low = copy.deepcopy(base).bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    label = torch.arange(case.batch)
    given = {"class_labels": label} if case.label else {}
    size = case.batch, case.shape

    def predict(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def call(x: Tensor, t: Tensor) -> Tensor:
            return model(x, t.expand(len(x)) if case.label else t, **given).sample  # type: ignore[no-any-return]

        return call

    last = torch.channels_last
    ours = Ours(
        convert(low).to(memory_format=last), fastdiff.schedules.linear(), size, steps,  # type: ignore[call-overload]
        {"label": label} if case.label else {},
    )  # fmt: skip
    found: dict[str, Loop] = {
        "fastdiff": ours,
        "diffusers f32": theirs(predict(base), size, steps, torch.float32, torch.contiguous_format),
        "diffusers bf16": theirs(predict(low), size, steps, torch.bfloat16, last),
    }
    if compiled:
        torch._inductor.config.freezing = True
        torch._inductor.config.compile_threads = 1
        model = torch.compile(low, dynamic=False)
        found["compiled bf16"] = theirs(predict(model), size, steps, torch.bfloat16, last)
    return found, ours


def shipped(steps: int) -> tuple[dict[str, Loop], Ours]:
    """The shipped model in both loops."""
    model, schedule, card = fastdiff.load("fashion", dtype=torch.bfloat16)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    label = torch.arange(80) % 10
    size = 80, tuple(card["sampling"]["shape"])
    ours = Ours(model, schedule, size, steps, {"label": label}, card["prediction"])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t.float().expand(len(x)), label)  # type: ignore[no-any-return]

    peer = theirs(
        predict, size, steps, torch.bfloat16, torch.channels_last,
        beta_schedule="squaredcos_cap_v2", prediction_type=card["prediction"],
    )  # fmt: skip
    return {"fastdiff": ours, "diffusers bf16": peer}, ours


def gate(found: dict[str, Loop]) -> None:
    """All loops end at the same pictures, to the rounding of their dtypes."""
    ends = {name: loop().float() for name, loop in found.items()}
    reference = ends.get("diffusers f32", ends["diffusers bf16"])
    scale = float(reference.abs().max())
    for name, end in ends.items():
        miss = float((end - reference).abs().mean()) / scale
        if not miss < 0.05:  # a random network amplifies the last bits of bfloat16
            raise AssertionError(f"loop: {name} ends {miss:.1e} of the range from the peer")


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = measure.parser(__doc__, "loop", 5, (2,))
    names = ["fashion", *CASES]
    parser.add_argument("--only", nargs="+", choices=names, default=["fashion", "cifar10", "dit-s"])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.only:
            torch._dynamo.reset()
            if name == "fashion":
                (found, ours), targets = shipped(args.steps), ()
                batch, shape = 80, (1, 32, 32)
            else:
                case = CASES[name]
                found, ours = loops(name, args.steps, not args.no_compile)
                targets, batch, shape = case.targets, case.batch, case.shape
            gate(found)
            stats = measure.interleaved(found, repeats=args.repeats, warmup=1)
            row = measure.row(
                f"loop {name}", stats, "fastdiff",
                {peer: ("at least", times) for peer, times in targets if peer in found},
                shape=[batch, *shape], threads=threads, steps=args.steps,
                outside_the_model=min(ours.outside() for _ in range(3)),
                images_a_second={who: batch / s.best for who, s in stats.items()},
            )  # fmt: skip
            rows.append(row)
            outside = f"{100 * row['outside_the_model']:.2f} % of ours outside the model"
            measure.show(row, f"{batch / stats['fastdiff'].best:.2f} images/s", outside)
    measure.write_json(args.out, rows, measure.command("bench_loop", argv))


if __name__ == "__main__":
    main()
