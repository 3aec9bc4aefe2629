"""Compiled and captured loops on a CUDA device: eager mode's bits, and no wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same_bits
from solver_cases import home

from fastdiff import Sampler, schedules, solvers, use_backend
from fastdiff.backends import unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPE = (3, 16, 16)
LABEL, NULL = torch.tensor([1, 2]), torch.tensor([-1, -1])
BOTH: dict[str, Any] = {"cond": {"label": LABEL}, "uncond": {"label": NULL}}


@pytest.fixture(params=("triton", "cuda"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    reason = unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


def model(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    shift = 0.0 if label is None else label.to(x.dtype).view(-1, 1, 1, 1) * 0.125
    return torch.sin(x * 0.5) + (t.to(x.dtype) * 2.0**-10).view(-1, 1, 1, 1) - shift


def table(name: str = "dpmpp_2m", steps: int = 6, **options: Any) -> Any:
    return solvers.build(name, schedules.linear(), steps, **options)


MODES = {"looped": {}, "unrolled": {"unroll": True}}


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_every_solver(name: str, how: dict[str, Any]) -> None:
    schedule, prediction = home(name)
    rows = solvers.build(name, schedule, 6, prediction=prediction)
    given = BOTH if any(need.uncond for need in rows.needs) else {}
    eager = Sampler(model, rows, device="cuda")(SHAPE, seeds=[3, 9], **given)
    sampler = Sampler(model, rows, device="cuda", mode="graph", **how)
    for _ in range(2):
        assert_same_bits(sampler(SHAPE, seeds=[3, 9], **given), eager)


OPTIONS: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 3.0},
    "by row": {"guidance": lambda index, sigma: 1.0 + index % 3},
    "by sample": {"guidance": torch.tensor([1.0, 4.0]), "clip": torch.tensor([-1.0, 0.5])},
    "rescaled": {"guidance": 3.0, "guidance_rescale": 0.7},
    "bfloat16": {"dtype": torch.bfloat16, "guidance": 2.0, "clip": 0.5},
}


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], how: dict[str, Any]) -> None:
    eager = Sampler(model, table("ddpm"), device="cuda", **options)
    sampler = Sampler(model, table("ddpm"), device="cuda", mode="graph", **how, **options)
    for seeds in ([3, 9], [7, 1], [3, 9]):
        assert_same_bits(sampler(SHAPE, seeds=seeds, **BOTH), eager(SHAPE, seeds=seeds, **BOTH))
    for n in (1, 2):  # captured again, and again
        given = {part: {"label": label["label"][:n]} for part, label in BOTH.items()}
        if "by sample" not in options and not isinstance(options.get("guidance"), torch.Tensor):
            got = sampler(SHAPE, seeds=range(n), **given)
            assert_same_bits(got, eager(SHAPE, seeds=range(n), **given))


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_a_network_in_channels_last(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 3, 3, padding=1).to("cuda", torch.bfloat16).eval()
    net = net.to(memory_format=torch.channels_last)
    seen: list[torch.Tensor] = []

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return self.net(x)

    got = Sampler(Net(), table(), mode="graph", **how)(SHAPE, seeds=[1, 2])
    assert_same_bits(got, Sampler(Net(), table())(SHAPE, seeds=[1, 2]))
    for x in seen:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_thresholding_unrolled() -> None:
    with use_backend("auto"):  # thresholding has the reference alone on a device
        eager = Sampler(model, table(), thresholding=0.9, device="cuda")(SHAPE, seeds=[3, 9])
        sampler = Sampler(
            model, table(), thresholding=0.9, device="cuda", mode="graph", unroll=True
        )
        assert_same_bits(sampler(SHAPE, seeds=[3, 9]), eager)


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_no_step_waits_for_the_device(how: dict[str, Any]) -> None:
    """A run that was captured launches graphs, and asks the device for nothing."""
    sampler = Sampler(model, table("ddpm"), device="cuda", mode="graph", guidance=2.0, **how)
    given = {part: {"label": label["label"].cuda()} for part, label in BOTH.items()}
    seeds = torch.tensor([3, 9], device="cuda")
    noise = torch.zeros(2, *SHAPE, device="cuda")
    sampler(noise=noise, seeds=seeds, **given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(noise=noise, seeds=seeds, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile_gives_the_eager_picture() -> None:
    with use_backend("auto"):
        rows = table("ddim", 4)
        got = Sampler(model, rows, device="cuda", mode="compile")(SHAPE, seeds=[3, 9])
        eager = Sampler(model, rows, device="cuda")(SHAPE, seeds=[3, 9])
    # sin of inductor and of ATen: 2 ulp each of at most 1, four times, by coefficients below 4
    bound = 4 * 4 * 2 * torch.finfo(torch.float32).eps
    assert float((got - eager).abs().max()) <= bound * max(1.0, float(eager.abs().max()))
