"""Requests that join and leave a batch at any step: each image has the bits that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from serve_cases import NULL, REQUESTS, SHAPE, model
from torch import Tensor

from fastdiff import Sampler, checkpoints, schedules, solvers, use_backend
from fastdiff.backends import unavailable
from fastdiff.schedules import Schedule
from fastdiff.serve import Engine, FixedSizes
from fastdiff.serve._batch import Batch, Sample
from fastdiff.serve.request import Plan, Planner

CPU = torch.device("cpu")


def planner(schedule: Schedule | None = None, prediction: str = "epsilon") -> Planner:
    return Planner(schedule or schedules.scaled_linear(), prediction, NULL, {}, 1000)


def batch_of(call: Callable[..., Tensor], slots: int = 4) -> Batch:
    return Batch(FixedSizes(call, range(1, 2 * slots + 1)), SHAPE, slots, NULL, torch.float32, CPU)


def run(batch: Batch, plans: Sequence[Plan]) -> dict[Plan, Tensor]:
    """The images of all plans; a sample joins at each step, as far as there is room."""
    waiting = [Sample(plan, i, plan) for plan in plans for i in range(len(plan.seeds))]
    images = {plan: torch.full((len(plan.seeds), *SHAPE), torch.nan) for plan in plans}
    sizes = set()
    while waiting or batch:
        if waiting and len(batch) < batch.slots:
            batch.add(waiting.pop(0))
        sizes.add(len(batch))
        assert batch.step() == []
        for sample in [s for s in batch.samples if s.done]:
            images[sample.owner][sample.index] = batch.image(sample)
            batch.drop(sample)
    assert sizes == set(range(1, batch.slots + 1))  # it was full, and it was not
    return images


def alone(call: Callable[..., Tensor], plan: Plan, **fields: Any) -> Tensor:
    """Each image by the library's own loop."""
    of_loop = {k: v for k, v in fields.items() if k.startswith("guidance") or k == "clip"}
    sampler = Sampler(call, plan.table, **of_loop)
    single = [
        sampler(SHAPE, seeds=s[None], cond={"label": c[None]}, uncond={"label": u[None]})
        for s, c, u in zip(plan.seeds, plan.cond["label"], plan.uncond["label"], strict=True)
    ]
    return torch.cat(single)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_each_request_has_the_bits_of_its_solo_run(backend: str) -> None:
    if unavailable(backend):
        pytest.skip(f"backend {backend}: {unavailable(backend)}")
    plan = planner()
    requests = [{**r, "cond": {"label": i}} for i, r in enumerate(REQUESTS)]
    # by image, with an unconditional one of its own, and none
    requests[0]["cond"], requests[2]["uncond"] = {"label": [1, 2]}, {"label": 7}
    del requests[4]["cond"]
    plans = [plan(**request) for request in requests]
    with use_backend(backend):
        images = run(batch_of(model), plans)
        for p, request in zip(plans, requests, strict=True):
            assert_same_bits(images[p], alone(model, p, **request), f"{request['solver']}")


@pytest.mark.parametrize("kind", ("scaled_linear", "flow", "edm"))
def test_every_solver(kind: str) -> None:
    """On a schedule of each kind, every solver that takes it, all in one batch."""
    schedule = getattr(schedules, kind)()
    plan = planner(schedule, "sample")
    plans = {}
    for name in solvers.SOLVERS:
        try:
            plans[name] = plan(solver=name, steps=5, seeds=len(plans), guidance=1.5)
        except ValueError:  # of another kind of schedule
            continue
    assert len(plans) > 30
    images = run(batch_of(model), list(plans.values()))
    for name, p in plans.items():
        assert_same_bits(images[p], alone(model, p, guidance=1.5), name)


def test_learned_variance() -> None:
    def learned(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.cat([model(x, t, label), x * 0.25], dim=1)

    plan = planner()
    fields: list[dict[str, Any]] = [
        {"solver": "ddpm", "options": {"variance": "learned_range"}, "steps": 5, "guidance": 2.0},
        {"solver": "dpmpp_2m", "steps": 4},
        {"solver": "ddpm", "options": {"variance": "learned_range"}, "steps": 3, "seeds": [5, 6]},
    ]
    plans = [plan(**f) for f in fields]
    images = run(batch_of(learned), plans)
    for p, f in zip(plans, fields, strict=True):
        assert_same_bits(images[p], alone(learned, p, **f), str(f))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_shipped_model(dtype: torch.dtype) -> None:
    """Through the engine, against `Sampler` on one image; in bfloat16, as the model is plain."""
    requests: list[dict[str, Any]] = [
        {"seeds": [1, 2], "steps": 6, "cond": {"label": [9, 3]}},
        {"seeds": 3, "solver": "heun", "steps": 3, "guidance": None, "cond": {"label": 1}},
        {"seeds": 4, "solver": "euler_ancestral", "steps": 5, "guidance": 2.3},
        {"seeds": 5, "solver": "unipc", "steps": 4, "clip": None, "cond": {"label": 0}},
        {"seeds": 6, "solver": "euler", "steps": 3, "options": {"s_churn": 2.0}},
        {"seeds": [7, 8], "solver": "ddpm", "steps": 7, "guidance_rescale": 0.5},
    ]
    torch.set_num_threads(1)
    with Engine.from_checkpoint("fashion", slots=4, dtype=dtype) as engine:
        jobs = [engine.submit(**request) for request in requests]
        for job, request in zip(jobs, requests, strict=True):
            images = job.result(timeout=120)
            assert_same_bits(images, engine.alone(**request), str(request))
        sizes = engine.model.sizes
        job = engine.submit(seeds=9, steps=4, guidance=1.5, cond={"label": 2})
        table = job.plan.table
        for call in [engine.model, *([engine.model.model] if {1, 2} <= set(sizes) else [])]:
            sampler = Sampler(call, table, guidance=1.5, clip=1.0)
            label = {"label": torch.tensor([2])}
            null = {"label": torch.tensor([-1])}
            solo = sampler(engine.shape, seeds=9, cond=label, uncond=null)
            assert_same_bits(job.result(timeout=120), solo, f"sizes {sizes}")


def test_memory_is_taken_once() -> None:
    """What outlasts a step is what was there at the start, however many came and went."""
    batch = batch_of(model)

    def held() -> dict[str, int]:
        return {k: v.data_ptr() for k, v in vars(batch).items() if isinstance(v, Tensor)}

    before, names = held(), set(vars(batch))
    run(batch, [planner()(seeds=range(9), solver=s, steps=3) for s in ("heun", "dpmpp_2m")])
    assert held() == before and len(before) > 4
    assert set(vars(batch)) == names and batch.samples == []


def test_a_model_that_fails_for_one() -> None:
    """The others lose nothing, at whatever step it fails."""
    steps = {"n": 0}

    def failing(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        if (label == 13).any() and steps["n"] >= 3:
            raise ValueError("13 is no label")
        return model(x, t, label)

    plan = planner()
    good = [plan(seeds=s, steps=6, guidance=2.0, cond={"label": s}) for s in (1, 2)]
    bad = plan(seeds=3, steps=6, cond={"label": 13})
    batch = batch_of(failing)
    for p in (good[0], bad, good[1]):
        batch.add(Sample(p, 0, p))
    images, failures = {}, []
    for steps["n"] in range(6):
        for sample, error in batch.step():
            failures.append((steps["n"], sample.owner, str(error)))
            batch.drop(sample)
    assert failures == [(3, bad, "13 is no label")]
    images = {s.owner: batch.image(s)[None].clone() for s in batch.samples}
    for p in good:
        assert_same_bits(images[p], alone(model, p, guidance=2.0))


def test_an_output_of_another_shape_is_refused() -> None:
    batch = batch_of(lambda x, t, label: x[:, :1])
    batch.add(Sample(planner()(steps=2), 0))
    ((_, error),) = batch.step()
    assert str(error) == "Engine: model must return (1, 3, 4, 5), got (1, 1, 4, 5)"


def test_the_card_gives_defaults(tiny: Any) -> None:
    torch.set_num_threads(1)
    with Engine.from_checkpoint(str(tiny), slots=1, dtype=torch.float32) as engine:
        plan = engine.submit(seeds=1, steps=2).plan
        assert plan.request.guidance == 1.5 and plan.request.solver == "dpmpp_2m"
        assert engine.shape == (1, 16, 16) and checkpoints.load(tiny)[2]["classes"]
