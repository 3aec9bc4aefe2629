"""Compile mode on the CPU: one graph a kind of call, none anew between steps or samplers.

inductor may round a model's sums otherwise than eager mode, so pictures are held to the error
budget; where the compiler leaves the arithmetic as it is, to bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from torch._dynamo.utils import counters

from fastdiff import Sampler, schedules, solvers
from fastdiff.models.unet import UNet, UNetConfig

SHAPE = (3, 8, 8)


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """Sizes of the batches whose graphs were compiled; a graph compiled anew is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield []
    torch._dynamo.reset()


@pytest.fixture
def as_they_are(monkeypatch: pytest.MonkeyPatch, graphs: list[int]) -> list[int]:
    """A backend that runs each graph as it was traced."""

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(max(len(t) for t in inputs if t.dim() == 4))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compile_(model, backend=backend, **options)
    )
    return graphs


def model(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    shift = 0.0 if label is None else label.to(x.dtype).view(-1, 1, 1, 1) * 0.125
    return torch.sin(x * 0.5) + (t.to(x.dtype) * 2.0**-10).view(-1, 1, 1, 1) - shift


def table(name: str, steps: int) -> Any:
    return solvers.build(name, schedules.linear(), steps)


BOTH = {"cond": {"label": torch.tensor([1, 2])}, "uncond": {"label": torch.tensor([-1, -1])}}
# options, and the batches that the model sees
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "plain": ({}, [2]),
    "guided": ({"guidance": 3.0}, [4]),
    "guided at some rows": ({"guidance": 3.0, "guidance_interval": (0.1, 5.0)}, [2, 4]),
    "two calls": ({"guidance": 3.0, "batched": False}, [2, 2]),
}


@pytest.mark.parametrize(("options", "batches"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ("dpmpp_2m", "heun", "ddpm"))
def test_one_graph_a_kind_of_call(
    as_they_are: list[int], name: str, options: dict[str, Any], batches: list[int]
) -> None:
    for steps in (4, 12):
        as_they_are.clear()
        sampler = Sampler(model, table(name, steps), mode="compile", **options)
        expected = Sampler(model, table(name, steps), **options)
        for seeds in ([3, 9], [1, 4]):
            got = sampler(SHAPE, seeds=seeds, **BOTH)
            assert_same_bits(got, expected(SHAPE, seeds=seeds, **BOTH))
        assert sorted(as_they_are) == batches
        assert counters["stats"]["unique_graphs"] == len(batches)
        counters.clear()


def test_samplers_share_no_limit(as_they_are: list[int]) -> None:
    """torch gives up after some graphs of one code object; every sampler has its own."""
    count = torch._dynamo.config.recompile_limit + 2
    for i in range(count):
        net = torch.nn.Conv2d(3, 3, 1 + 2 * (i % 3), padding=i % 3)
        with torch.no_grad():
            Sampler(lambda x, t, net=net: net(x), table("ddim", 2), mode="compile")(SHAPE)
    assert len(as_they_are) == count


def test_a_second_batch_size_and_further_ones() -> None:
    """The second size makes the graph one of any size: no third one."""
    torch._dynamo.reset()
    counters.clear()
    sizes: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sizes.append(len(inputs))
        return graph.forward

    real = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda m, **o: real(m, backend=backend, **o))
        sampler = Sampler(model, table("ddim", 3), mode="compile")
    for n in range(2, 14):
        assert_same_bits(
            sampler(SHAPE, seeds=range(n)), Sampler(model, table("ddim", 3))(SHAPE, seeds=range(n))
        )
    assert len(sizes) == 2
    torch._dynamo.reset()


def test_the_unet_is_one_graph(as_they_are: list[int]) -> None:
    torch.manual_seed(0)
    config = UNetConfig(image_size=8, channels=(8,), num_classes=3, embed_dim=16, head_dim=8)
    net = UNet(config).eval()
    rows = solvers.build("dpmpp_2m", schedules.cosine(), 4, prediction="v_prediction")
    given: dict[str, Any] = {"guidance": 2.0}
    shape = (config.in_channels, 8, 8)
    got = Sampler(net, rows, mode="compile", **given)(shape, seeds=[1, 2], **BOTH)
    assert_same_bits(got, Sampler(net, rows, **given)(shape, seeds=[1, 2], **BOTH))
    assert len(as_they_are) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inside inductor
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor has no compiler"
)
def test_through_inductor(graphs: list[int]) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            shift = (t.to(x.dtype) * 2.0**-10 + label).view(-1, 1, 1, 1)
            return torch.nn.functional.silu(self.mix(x) + shift)

    torch.manual_seed(0)
    net, rows = Net(), table("dpmpp_2m", 4)
    given: dict[str, Any] = {"seeds": [1, 2], **BOTH}
    got = Sampler(net, rows, guidance=2.0, mode="compile")(SHAPE, **given)
    eager = Sampler(net, rows, guidance=2.0)(SHAPE, **given)
    assert counters["stats"]["unique_graphs"] == 1
    exact = Sampler(net.double(), rows, guidance=2.0, dtype=torch.float64)(SHAPE, **given)
    # inductor has a sigmoid of its own, of 2 ulp, in each of four steps
    assert_within_budget(
        got, eager, exact.double(), ulps=8, at=exact.double().abs().max().expand_as(exact)
    )
