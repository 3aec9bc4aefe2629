"""Guidance in the loop against plain PyTorch and diffusers: weights, intervals, rescaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

import fastdiff
from fastdiff import Sampler, schedules, solvers
from fastdiff.ops import as_seeds, guidance_rescale, reverse_step

SHAPE, SEEDS, N = (3, 6, 6), [3, 9], 2
LABELS, NULLS = {"label": torch.tensor([1, 2])}, {"label": torch.tensor([-1, -1])}


def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Elementwise, so that a batch and its parts give the same bits; labels change the contrast."""
    shift = label.to(x.dtype).view(-1, 1, 1, 1) * 0.125
    return x * (0.5 - 0.25 * shift) + (t.to(x.dtype) * 2.0**-10).view(-1, 1, 1, 1) - shift


def weak(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return model(x, t, label) * 0.75 + 0.1


def table(name: str = "dpmpp_2m", steps: int = 6, **options: Any) -> fastdiff.StepTable:
    return solvers.build(name, schedules.linear(), steps, **options)


class Counted:
    """A model that notes how many samples each call had."""

    def __init__(self, inner: Callable[..., Tensor] = model) -> None:
        self.inner, self.calls = inner, []

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.calls.append(len(x))
        return self.inner(x, t, **cond)


def by_hand(
    rows: fastdiff.StepTable,
    guided: Callable[[int, Tensor, Tensor], Tensor],
    other: Callable[..., Tensor] = model,
    under: dict[str, Tensor] = NULLS,
) -> Tensor:
    """The loop with guidance in plain PyTorch: m = guided(row, c, u), and no weight in the op."""
    seeds = as_seeds(SEEDS)
    x = fastdiff.randn(seeds, SHAPE) * rows.init_sigma
    history = torch.empty(max(rows.depth, 1), *x.shape)
    for i, row in enumerate(rows.rows):
        t = torch.full((N,), row.time)
        m = guided(i, model(x, t, **LABELS), other(x, t, **under))
        x = reverse_step(x, m, rows, i, history=history, seeds=seeds)
    return x


def levels(rows: fastdiff.StepTable) -> list[float]:
    return (rows.sigmas / rows.alphas).tolist()


def run(rows: fastdiff.StepTable, inner: Callable[..., Tensor] = model, **options: Any) -> Tensor:
    return Sampler(inner, rows, **options)(SHAPE, seeds=SEEDS, cond=LABELS, uncond=NULLS)


def test_weights_by_row() -> None:
    rows, weights = table(), [1.0, 3.0, 1.0, 0.0, 7.5, 2.0]
    expected = by_hand(rows, lambda i, c, u: c if weights[i] == 1 else u + weights[i] * (c - u))
    counted = Counted()
    assert_same_bits(run(rows, counted, guidance=weights), expected)
    assert counted.calls == [N, 2 * N, N, 2 * N, 2 * N, 2 * N]  # weight 1 needs one output
    assert_same_bits(run(rows, guidance=tuple(weights), batched=False), expected)
    seen: list[tuple[int, float]] = []

    def weight(index: int, sigma: float) -> float:
        seen.append((index, sigma))
        return weights[index]

    assert_same_bits(run(rows, guidance=weight), expected)
    assert seen == list(enumerate(levels(rows)))


def test_weights_by_row_and_sample() -> None:
    rows = table()
    weights = [torch.tensor([1.0, 0.5 * i]) for i in range(len(rows))]
    expected = by_hand(
        rows,
        lambda i, c, u: torch.stack([c[0], u[1] + weights[i][1] * (c[1] - u[1])]),
    )
    # weight 1 of a sample is exactly its conditional output; row 2 has it for both
    assert_same_bits(run(rows, guidance=lambda i, sigma: weights[i]), expected)
    assert_same_bits(run(rows, guidance=weights), expected)


def test_interval() -> None:
    """Low is out, high is in, as in the paper; outside the model is called once."""
    rows = table()
    sigmas = levels(rows)
    low, high = sigmas[4], sigmas[1]
    inside = [low < s <= high for s in sigmas]
    assert inside == [False, True, True, True, False, False]
    expected = by_hand(rows, lambda i, c, u: u + 3.0 * (c - u) if inside[i] else c)
    counted = Counted()
    got = run(rows, counted, guidance=3.0, guidance_interval=(low, high))
    assert_same_bits(got, expected)
    assert counted.calls == [2 * N if i else N for i in inside]
    weights = torch.tensor([3.0, 3.0])
    assert_same_bits(run(rows, guidance=weights, guidance_interval=(low, high)), expected)
    # from pure noise on, whose sigma / alpha is infinite
    flow = solvers.build("euler", schedules.flow(), 4, prediction="flow")
    counted = Counted()
    run(flow, counted, guidance=3.0, guidance_interval=(0.5, float("inf")))
    assert counted.calls[0] == 2 * N and counted.calls[-1] == N


def test_interval_on_rows_that_read_the_unconditional_output() -> None:
    """Such a row calls for it at every level; its weight outside is 1."""
    raw = fastdiff.table.Row(x={"x": 0.9, "m": -0.2, "u": 0.1}, time=5.0, alpha=0.5, sigma=0.8)
    rows = fastdiff.StepTable("raw", (raw,))
    counted = Counted()
    got = run(rows, counted, guidance=3.0, guidance_interval=(0.1, 0.2))
    assert counted.calls == [2 * N]
    x = fastdiff.randn(as_seeds(SEEDS), SHAPE)
    t = torch.full((N,), 5.0)
    c, u = model(x, t, **LABELS), model(x, t, **NULLS)
    assert_same_bits(got, reverse_step(x, c, rows, 0, uncond=u))


@pytest.mark.parametrize("phi", (0.7, 1.0), ids=str)
def test_rescaled_is_diffusers_formula(phi: float) -> None:
    """Of one row, in float64 the exact answer, in float32 diffusers' own for the budget."""
    rows = table("ddim", 1)
    c, u = fastdiff.randn([1, 2], SHAPE), fastdiff.randn([5, 6], SHAPE)
    x = fastdiff.randn([7, 8], SHAPE)
    w = 7.5
    scale = guidance_rescale(c, u, w, phi)
    got = reverse_step(x, c, rows, 0, uncond=u, guidance=w, scale=scale)
    answers = []
    for dtype in (torch.float32, torch.float64):
        pos, neg = c.to(dtype), u.to(dtype)
        m = rescale_noise_cfg(neg + w * (pos - neg), pos, guidance_rescale=phi)
        a = rows.floats[0]
        assert rows.rows[0].push is False
        p, q, d = a[0], a[1], a[2 + 3]
        answers.append((a[2] + d * p) * x.to(dtype) + (a[4] + d * q) * m)
    # the product with the factor, and the rounding of the two coefficients
    assert_within_budget(got, answers[0], answers[1], ulps=4)


@pytest.mark.parametrize("weights", (4.0, torch.tensor([1.0, 5.0])), ids=("all", "each"))
@pytest.mark.parametrize("phi", (0.7, torch.tensor([0.0, 1.0])), ids=("all", "each"))
def test_rescaled_loop(weights: Any, phi: Any) -> None:
    """The factor of each row and sample; a sample of weight 1 or share 0 keeps its bits."""
    rows = table()

    def guided(i: int, c: Tensor, u: Tensor) -> Tensor:
        w = torch.as_tensor(weights).expand(N).view(-1, 1, 1, 1)
        m = torch.where(w == 1, c, u + w * (c - u))
        return guidance_rescale(c, u, weights, phi).view(-1, 1, 1, 1) * m

    got = run(rows, guidance=weights, guidance_rescale=phi)
    assert_same_bits(got, by_hand(rows, guided))
    assert not torch.equal(got, run(rows, guidance=weights))
    if isinstance(weights, Tensor) or isinstance(phi, Tensor):
        assert_same_bits(got[0], run(rows, guidance=weights)[0])
    assert_same_bits(run(rows, guidance=weights, guidance_rescale=0.0), run(rows, guidance=weights))


def test_guided_by_another_model() -> None:
    """With the condition of the first unless it is given its own."""
    rows = table()

    def guided(i: int, c: Tensor, u: Tensor) -> Tensor:
        return u + 2.0 * (c - u)

    sampler = Sampler(model, rows, guidance=2.0, guide_model=weak)
    got = sampler(SHAPE, seeds=SEEDS, cond=LABELS)
    assert_same_bits(got, by_hand(rows, guided, weak, LABELS))
    got = sampler(SHAPE, seeds=SEEDS, cond=LABELS, uncond=NULLS)
    assert_same_bits(got, by_hand(rows, guided, weak, NULLS))
    strong, second = Counted(), Counted(weak)
    Sampler(strong, rows, guidance=1.0, guide_model=second)(SHAPE, seeds=SEEDS, cond=LABELS)
    assert strong.calls == [N] * len(rows) and second.calls == []


def test_a_variance_of_one_model_alone_is_dropped() -> None:
    """The guide need not predict a variance because the model does."""
    rows = table("ddim")

    def learned(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.cat([model(x, t, label), x], 1)

    plain = Sampler(model, rows, guidance=2.0, guide_model=weak)(SHAPE, seeds=SEEDS, cond=LABELS)
    mixed = Sampler(learned, rows, guidance=2.0, guide_model=weak)(SHAPE, seeds=SEEDS, cond=LABELS)
    assert_same_bits(mixed, plain)


def test_everything_together_is_each_sample_alone() -> None:
    rows = table("heun", 4)
    weights, phi = torch.tensor([4.0, 1.5]), torch.tensor([0.3, 0.9])
    interval = (levels(rows)[5], levels(rows)[1])
    options = {"guidance_interval": interval, "guide_model": weak, "clip": 1.0}
    both = run(rows, guidance=weights, guidance_rescale=phi, **options)
    for i in range(N):
        part = slice(i, i + 1)
        alone = Sampler(
            model, rows, guidance=float(weights[i]), guidance_rescale=float(phi[i]), **options
        )(
            SHAPE,
            seeds=SEEDS[part],
            cond={"label": LABELS["label"][part]},
            uncond={"label": NULLS["label"][part]},
        )
        assert_same_bits(alone, both[part])


def test_denoised_is_guided_and_rescaled() -> None:
    rows = table("ddim", 3)
    sampler = Sampler(model, rows, guidance=3.0, guidance_rescale=0.7)
    x = fastdiff.randn(as_seeds(SEEDS), SHAPE)
    for i, step in enumerate(sampler.iter(SHAPE, seeds=SEEDS, cond=LABELS, uncond=NULLS)):
        t = torch.full((N,), step.time)
        c, u = model(x, t, **LABELS).double(), model(x, t, **NULLS).double()
        m = rescale_noise_cfg(u + 3.0 * (c - u), c, guidance_rescale=0.7)
        row = rows.rows[i]
        exact = (x.double() - row.sigma * m) / row.alpha
        c32, u32 = c.float(), u.float()
        same = rescale_noise_cfg(u32 + 3.0 * (c32 - u32), c32, guidance_rescale=0.7)
        same = (x - row.sigma * same) / row.alpha
        assert step.denoised is not None
        # the factor, and the two coefficients of x0, one rounding each
        assert_within_budget(step.denoised, same, exact, ulps=4)
        x = step.x


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "few-weights": ({"guidance": [1.0, 2.0]}, ValueError, r"must have one weight a row \(6"),
    "a-weight": ({"guidance": [1.0] * 5 + ["2"]}, TypeError, "guidance must be a number, got str"),
    "no-weight": ({"guidance": [1.0, None] * 3}, TypeError, "must be a number, got NoneType"),
    "returned-none": ({"guidance": lambda i, s: None}, TypeError, "must be a number, got NoneType"),
    "returned": ({"guidance": lambda i, s: "2"}, TypeError, "guidance must be a number, got str"),
    "not-finite": ({"guidance": lambda i, s: 1e999}, ValueError, "guidance must be finite"),
    "beyond-float64": ({"guidance": 10**400}, ValueError, "guidance must be finite"),
    "beyond-float32": ({"guidance": 1e39}, ValueError, "guidance must be finite"),
    "matrix": ({"guidance": torch.ones(2, 2)}, ValueError, r"one a sample \(N,\), got \(2, 2\)"),
    "interval": ({"guidance_interval": 0.5}, TypeError, r"must be two numbers \(low, high\)"),
    "three": ({"guidance_interval": (1, 2, 3)}, TypeError, r"must be two numbers \(low, high\)"),
    "reversed": ({"guidance_interval": (2.0, 1.0)}, ValueError, "must have 0 <= low < high"),
    "phi": ({"guidance": 2.0, "guidance_rescale": 1.5}, ValueError, r"must lie in \[0, 1\]"),
    "guide": ({"guide_model": 3}, TypeError, "guide_model must be callable, got int"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Sampler: .*{message}"):
        run(table(), **options)


def test_a_missing_condition_is_named() -> None:
    with pytest.raises(ValueError, match="Sampler: uncond must be given for guidance"):
        Sampler(model, table(), guidance=[1.0] * 5 + [2.0])(SHAPE, seeds=SEEDS, cond=LABELS)


def shifted(
    x: Tensor, t: Tensor, label: Tensor | None = None, shift: Any = 0.0, words: Any = ()
) -> Tensor:
    out = x * 0.5 + shift + 0.25 * len(words)
    return out if label is None else model(out, t, label)


TELLING: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "numbers": ({"shift": 3.0}, {"shift": 0.0}, 2),
    "the same number": ({"shift": 3.0}, {"shift": 3.0}, 1),
    "scalars": ({"shift": torch.tensor(3.0)}, {"shift": torch.tensor(0.0)}, 2),
    "words": ({"words": ["a", "cat"]}, {"words": [""]}, 2),
    "None": (LABELS, {"label": None}, 2),
    "not None": ({"label": None}, NULLS, 2),
    "one more": ({**LABELS, "shift": 1.0}, NULLS, 2),
    "one less": (LABELS, {**NULLS, "shift": torch.ones(N, 1, 1, 1)}, 2),
    "other shapes": ({"shift": torch.ones(N, 3, 1, 1)}, {"shift": torch.zeros(N, 1, 1, 1)}, 2),
    "other dtypes": (LABELS, {"label": NULLS["label"].float()}, 2),
}


@pytest.mark.parametrize(("cond", "uncond", "calls"), TELLING.values(), ids=TELLING)
def test_conditions_that_make_no_batch(
    cond: dict[str, Any], uncond: dict[str, Any], calls: int
) -> None:
    rows, given = table(), {"seeds": SEEDS, "cond": cond, "uncond": uncond}
    counted = Counted(shifted)
    got = Sampler(counted, rows, guidance=2.0)(SHAPE, **given)
    assert_same_bits(got, Sampler(shifted, rows, guidance=2.0, batched=False)(SHAPE, **given))
    assert counted.calls == [2 * N if calls == 1 else N] * calls * len(rows)
