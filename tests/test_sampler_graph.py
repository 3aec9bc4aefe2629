"""Graph mode: what is captured, what is replayed, and that its pictures are those of eager mode.

The graphs are recorded and replayed on the CPU (fake_cuda_graph.py); test_sampler_gpu.py has them
on a device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same_bits
from fake_cuda_graph import FakeGraph, FakeStream
from fake_cuda_graph import graphs as graphs
from solver_cases import home

from fastdiff import BackendError, Sampler, schedules, solvers, use_backend

SHAPE = (3, 8, 8)
LABEL, NULL = torch.tensor([1, 2]), torch.tensor([-1, -1])
BOTH = {"cond": {"label": LABEL}, "uncond": {"label": NULL}}


def model(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    shift = 0.0 if label is None else label.to(x.dtype).view(-1, 1, 1, 1) * 0.125
    return torch.sin(x * 0.5) + (t.to(x.dtype) * 2.0**-10).view(-1, 1, 1, 1) - shift


def learned(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    return torch.cat([model(x, t, label), torch.cos(x)], dim=1)


def table(name: str = "dpmpp_2m", steps: int = 4, **options: Any) -> Any:
    return solvers.build(name, schedules.linear(), steps, **options)


@pytest.mark.parametrize("unroll", (False, True), ids=("looped", "unrolled"))
@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_every_solver(graphs: list[FakeGraph], name: str, unroll: bool) -> None:
    schedule, prediction = home(name)
    rows = solvers.build(name, schedule, 4, prediction=prediction)
    given: dict[str, Any] = BOTH if any(need.uncond for need in rows.needs) else {}
    expected = Sampler(model, rows)(SHAPE, seeds=[3, 9], **given)
    sampler = Sampler(model, rows, mode="graph", unroll=unroll)
    assert_same_bits(sampler(SHAPE, seeds=[3, 9], **given), expected)
    # the memory of one run is not in the next
    assert_same_bits(sampler(SHAPE, seeds=[3, 9], **given), expected)
    kinds = {(need.output, need.uncond) for need in rows.needs}
    assert len(graphs) == (1 if unroll else len(kinds))


OPTIONS: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 3.0},
    "two calls": {"guidance": 3.0, "batched": False},
    "another model": {"guidance": 3.0, "guide_model": lambda x, t, label: 0.5 * model(x, t)},
    "by row": {"guidance": lambda index, sigma: 1.0 + index % 3},  # with rows of weight 1
    "by sample": {"guidance": torch.tensor([1.0, 4.0])},
    "by row and sample": {"guidance": [2.0, torch.tensor([1.0, 4.0]), 3.0, 1.5]},
    "clipped": {"clip": 0.5},
    "clipped by sample": {"clip": torch.tensor([-1.0, 0.5]), "guidance": 2.0},
    "rescaled": {"guidance": 3.0, "guidance_rescale": 0.7},
    "rescaled in an interval": {
        "guidance": 3.0,
        "guidance_rescale": torch.tensor([0.7, 0.0]),
        "guidance_interval": (0.1, 5.0),
    },
    "bfloat16": {"dtype": torch.bfloat16, "guidance": 2.0},
}


@pytest.mark.parametrize("unroll", (False, True), ids=("looped", "unrolled"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ("dpmpp_2m", "ddpm"))
def test_options(graphs: list[FakeGraph], name: str, options: dict[str, Any], unroll: bool) -> None:
    expected = Sampler(model, table(name), **options)(SHAPE, seeds=[3, 9], **BOTH)
    sampler = Sampler(model, table(name), mode="graph", unroll=unroll, **options)
    for _ in range(2):
        assert_same_bits(sampler(SHAPE, seeds=[3, 9], **BOTH), expected)


@pytest.mark.parametrize("unroll", (False, True), ids=("looped", "unrolled"))
def test_learned_variance_edm_inputs_and_channels_last(
    graphs: list[FakeGraph], unroll: bool
) -> None:
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    last = noise.contiguous(memory_format=torch.channels_last)
    edm = solvers.build("heun", schedules.edm(), 4, prediction="edm", s_churn=2.0)
    for net, rows in (
        (learned, table("ddpm", variance="learned_range")),
        (learned, table("ddim")),
        (model, edm),
    ):
        for given in (noise, last):
            expected = Sampler(net, rows)(noise=given, seeds=[5, 6])
            got = Sampler(net, rows, mode="graph", unroll=unroll)(noise=given, seeds=[5, 6])
            assert_same_bits(got.contiguous(), expected.contiguous())


def test_thresholding_unrolled(graphs: list[FakeGraph]) -> None:
    expected = Sampler(model, table(), thresholding=0.9)(SHAPE, seeds=[3, 9])
    sampler = Sampler(model, table(), thresholding=0.9, mode="graph", unroll=True)
    assert_same_bits(sampler(SHAPE, seeds=[3, 9]), expected)


@pytest.mark.parametrize("unroll", (False, True), ids=("looped", "unrolled"))
def test_captured_again_only_where_shapes_change(graphs: list[FakeGraph], unroll: bool) -> None:
    calls = []

    def counting(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return model(x, t, label)

    weights = [2.0]
    options: dict[str, Any] = {"guidance": lambda index, sigma: weights[0]}
    sampler = Sampler(counting, table("ddpm"), mode="graph", unroll=unroll, **options)
    plain = Sampler(model, table("ddpm"), **options)

    def both(**given: Any) -> None:
        assert_same_bits(sampler(SHAPE, **given), plain(SHAPE, **given))

    both(seeds=[3, 9], **BOTH)
    python = len(calls)
    both(seeds=[7, 1], **BOTH)
    both(seeds=[7, 1], cond={"label": LABEL + 3}, uncond={"label": NULL})
    weights[0] = 5.0
    both(seeds=[7, 1], **BOTH)
    # no Python ran in those, and the numbers of each call were its own
    assert len(graphs) == 1 and len(calls) == python
    one = {"cond": {"label": LABEL[:1]}, "uncond": {"label": NULL[:1]}}
    both(seeds=[7], **one)
    assert len(graphs) == 2
    both(seeds=[8], **one)
    both(seeds=[8], cond={"label": LABEL[:1].int()}, uncond={"label": NULL[:1].int()})
    assert len(graphs) == 3
    with use_backend("reference"):
        both(seeds=[8], **one)
    assert len(graphs) == 4


@pytest.mark.parametrize("which", ("model", "guide_model"))
@pytest.mark.parametrize("unroll", (False, True), ids=("looped", "unrolled"))
def test_weights_in_new_memory_are_captured_again(
    graphs: list[FakeGraph], unroll: bool, which: str
) -> None:
    class Net(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    nets = {"model": Net(3, 3, 1), "guide_model": Net(3, 3, 1)}
    rest: dict[str, Any] = {"guide_model": nets["guide_model"], "guidance": 2.0}
    plain = Sampler(nets["model"], table(), **rest)
    sampler = Sampler(nets["model"], table(), mode="graph", unroll=unroll, **rest)

    def both() -> None:
        assert_same_bits(sampler(SHAPE, seeds=[3, 9]), plain(SHAPE, seeds=[3, 9]))

    net = nets[which]
    both()
    with torch.no_grad():
        net.weight.mul_(0.5)  # where it lies
    both()
    assert len(graphs) == 1
    net.weight = torch.nn.Parameter(net.weight.detach() * 0.5)
    both()
    assert len(graphs) == 2
    net.eval()  # a module may compute something else then
    both()
    assert len(graphs) == 3


@pytest.mark.parametrize("unroll", (False, True), ids=("looped", "unrolled"))
def test_autocast(graphs: list[FakeGraph], unroll: bool) -> None:
    """Captured anew, with the casts of the weights: outside they would be freed memory."""

    class Net(torch.nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    net = Net(8, 8)
    plain, sampler = (
        Sampler(net, table(), **how)  # type: ignore[arg-type]
        for how in ({}, {"mode": "graph", "unroll": unroll})
    )
    found = []
    for on in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found.append(plain(SHAPE, seeds=[3, 9]))
            assert_same_bits(sampler(SHAPE, seeds=[3, 9]), found[-1])
    assert not torch.equal(found[0], found[1])
    assert len(graphs) == 3
    with torch.autocast("cpu", torch.bfloat16):
        sampler(SHAPE, seeds=[3, 9])
        with torch.no_grad():
            net.weight.mul_(0.5)
        got = sampler(SHAPE, seeds=[3, 9])
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(got, plain(SHAPE, seeds=[3, 9]))


def test_a_run_waits_for_the_last_one_on_another_stream(
    graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(model, table(), mode="graph")
    first, second = FakeStream(), FakeStream()
    for now in (first, first, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None, now=now: now)
        sampler(SHAPE, seeds=[3, 9])
    assert second.waited_for == [first]
    # after the warm-ups, which have a stream of their own
    assert first.waited_for[-1] is second and len(first.waited_for) == 2
    assert len(graphs) == 1


def test_a_step_has_few_nodes(graphs: list[FakeGraph]) -> None:
    """What the module's text says that a row costs beside the model and the step kernel."""

    def nodes(**options: Any) -> list[str]:
        graphs.clear()
        Sampler(lambda x, t, **_: x, table(), mode="graph", **options)(SHAPE, seeds=[1, 2], **BOTH)
        return graphs[0].nodes

    assert nodes() == ["index_select", "kernel", "add_"]
    assert nodes(guidance=2.0) == ["index_select", "cat", "gather", "kernel", "add_"]
    # the input that the model sees, at the first row
    assert nodes(unroll=True) == ["kernel"] * 4


def test_callback_and_iter(graphs: list[FakeGraph]) -> None:
    options: dict[str, Any] = {"guidance": 2.0, "guidance_rescale": 0.5, "clip": 0.8}
    given: dict[str, Any] = {"seeds": [3, 9], **BOTH}
    for name in ("heun", "dpmpp_2m", "dpm_2_ancestral"):
        plain = list(Sampler(model, table(name), **options).iter(SHAPE, **given))
        sampler = Sampler(model, table(name), mode="graph", **options)
        seen: list[Any] = []
        result = sampler(SHAPE, **given, callback=seen.append)
        for steps in (seen, list(sampler.iter(SHAPE, **given))):
            for got, expected in zip(steps, plain, strict=True):
                assert (got.index, got.sigma) == (expected.index, expected.sigma)
                assert_same_bits(got.x, expected.x)
                if expected.denoised is not None:
                    assert_same_bits(got.denoised, expected.denoised)
        assert_same_bits(result, plain[-1].x)


def test_results_are_not_the_static_memory(graphs: list[FakeGraph]) -> None:
    for unroll in (False, True):
        sampler = Sampler(model, table(), mode="graph", unroll=unroll)
        first = sampler(SHAPE, seeds=[1])
        kept = first.clone()
        sampler(SHAPE, seeds=[2])
        assert_same_bits(first, kept)


@pytest.mark.parametrize("unroll", (False, True), ids=("looped", "unrolled"))
def test_calls_in_and_out_of_inference_mode(graphs: list[FakeGraph], unroll: bool) -> None:
    sampler = Sampler(model, table("ddpm"), mode="graph", unroll=unroll, guidance=2.0)
    with torch.inference_mode():
        inside = sampler(SHAPE, seeds=[3, 9], **BOTH)
    assert_same_bits(sampler(SHAPE, seeds=[3, 9], **BOTH), inside.clone())
    assert len(graphs) == 1


def test_nothing_to_do(graphs: list[FakeGraph]) -> None:
    empty = Sampler(model, table(), mode="graph")(noise=torch.zeros(0, *SHAPE), seeds=[])
    assert empty.shape == (0, *SHAPE) and not graphs


def test_one_run_at_a_time(graphs: list[FakeGraph]) -> None:
    sampler = Sampler(model, table(), mode="graph")
    half = sampler.iter(SHAPE, seeds=[1])
    next(half)
    with pytest.raises(RuntimeError, match="must be 'eager' for runs at the same time"):
        sampler(SHAPE, seeds=[2])
    half.close()
    sampler(SHAPE, seeds=[2])


def test_a_failing_model_leaves_the_sampler_usable(graphs: list[FakeGraph]) -> None:
    broken = [True]

    def sometimes(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if broken[0]:
            raise FloatingPointError("lost")
        return model(x, t)

    sampler = Sampler(sometimes, table(), mode="graph")
    with pytest.raises(FloatingPointError):
        sampler(SHAPE, seeds=[1])
    broken[0] = False
    assert_same_bits(sampler(SHAPE, seeds=[1]), Sampler(model, table())(SHAPE, seeds=[1]))


def test_a_model_that_asks_for_a_value_is_told(graphs: list[FakeGraph]) -> None:
    def looking(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * 0.5 if float(t[0]) > 1 else x

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        Sampler(looking, table(), mode="graph")(SHAPE, seeds=[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Sampler(model, table(), mode="graph", device="cpu"),
            "mode must be 'eager' or 'compile' on device cpu, got 'graph'",
        ),
        (
            lambda: Sampler(model, table(), mode="graph")(SHAPE),
            "mode must be 'eager' or 'compile' on device cpu, got 'graph'",
        ),
        (
            lambda: Sampler(model, table("ddpm"), mode="graph", noise="brownian"),
            "noise must be 'counter' in mode 'graph', got 'brownian'",
        ),
        (
            lambda: Sampler(model, table(), mode="graph", thresholding=0.9),
            "thresholding must come with unroll in mode 'graph', got unroll=False",
        ),
        (
            lambda: Sampler(model, table(), unroll=True),
            "unroll must be False in mode 'eager', got True",
        ),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unrolled_has_no_steps_to_show(graphs: list[FakeGraph]) -> None:
    sampler = Sampler(model, table(), mode="graph", unroll=True)
    with pytest.raises(ValueError, match="unroll must be False with a callback or iter, got True"):
        sampler(SHAPE, seeds=[1], callback=print)
    with pytest.raises(ValueError, match="unroll must be False with a callback or iter, got True"):
        next(sampler.iter(SHAPE, seeds=[1]))


def test_graphs_need_a_gpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff import _graph_loop

    device = torch.device("cuda:0")
    monkeypatch.setattr(_graph_loop, "unavailable", lambda name: f"no {name} here")
    with pytest.raises(BackendError, match=r"triton or cuda, got auto \(triton: no"):
        _graph_loop.require_cuda(device)
    monkeypatch.setattr(_graph_loop, "unavailable", lambda name: None)
    _graph_loop.require_cuda(device)
    with use_backend("reference"), pytest.raises(BackendError, match="got reference"):
        _graph_loop.require_cuda(device)
