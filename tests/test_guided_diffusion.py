"""The sampling methods of guided-diffusion against their transcription, option by option."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from guided_diffusion_cases import CASES, SHAPE, STEPS, make, model_of, numpy_of, start
from solver_cases import assert_same

from fastdiff import Sampler, schedules, solvers
from fastdiff.integrations import _guided_steps
from fastdiff.integrations.guided_diffusion import (
    GaussianDiffusion,
    create_gaussian_diffusion,
    space_timesteps,
)


def by_oracle(step, diffusion, oracle, x, **options):
    """The oracle's loop on torch's global generator."""
    states, x0s = [], []
    for t in reversed(range(diffusion.num_timesteps)):
        x, x0 = getattr(oracle, step)(
            model_of(diffusion), x, t, lambda x=x: torch.randn_like(x), **options
        )
        states.append(x)
        x0s.append(x0)
    return states, x0s


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("case", CASES)
def test_p_sample_loop(case, clip):
    diffusion, oracle = make(case)
    torch.manual_seed(3)
    steps = list(
        diffusion.p_sample_loop_progressive(
            model_of(diffusion), SHAPE, noise=start(), clip_denoised=clip,
            model_kwargs={"shift": 0.25},
        )
    )  # fmt: skip
    after = torch.get_rng_state()
    torch.manual_seed(3)
    states, x0s = by_oracle(
        "p_sample", diffusion, oracle, start(), clip=clip, kwargs={"shift": 0.25}
    )
    assert torch.equal(after, torch.get_rng_state())
    assert_same(numpy_of(s["sample"] for s in steps), numpy_of(states), case)
    largest = max(float(x0.abs().max()) for x0 in x0s)
    assert_same(numpy_of(s["pred_xstart"] for s in steps), numpy_of(x0s), case, largest)
    assert max(float(s["pred_xstart"].abs().max()) for s in steps) <= 1 or not clip


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0], ids=lambda e: f"eta{e}")
@pytest.mark.parametrize("case", CASES)
def test_ddim_sample_loop(case, eta):
    diffusion, oracle = make(case)
    torch.manual_seed(3)
    steps = list(
        diffusion.ddim_sample_loop_progressive(model_of(diffusion), SHAPE, noise=start(), eta=eta)
    )
    after = torch.get_rng_state()
    torch.manual_seed(3)
    states, x0s = by_oracle("ddim_sample", diffusion, oracle, start(), eta=eta)
    # it draws where eta is 0 too, so that the pictures after this one stay
    assert torch.equal(after, torch.get_rng_state())
    assert_same(numpy_of(s["sample"] for s in steps), numpy_of(states), (case, eta))
    assert_same(numpy_of(s["pred_xstart"] for s in steps), numpy_of(x0s), (case, eta), 1.0)


@pytest.mark.parametrize("case", ["default", "learned", "x0"])
def test_reverse(case):
    diffusion, oracle = make(case)
    model, x = model_of(diffusion), start()
    for clip in (True, False):
        for fn in (None, lambda x0: 0.9 * x0):
            for t in (0, 1, 30, diffusion.num_timesteps - 1):  # above the last there is no data
                got = diffusion.ddim_reverse_sample(
                    model, x, torch.full((2,), t), clip_denoised=clip, denoised_fn=fn
                )
                want, x0 = oracle.reverse(model, x, t, clip=clip, denoised_fn=fn)
                largest = float(x0.abs().max())
                assert_same([got["sample"].numpy()], [want.numpy()], (case, t), largest)
                assert_same([got["pred_xstart"].numpy()], [x0.numpy()], (case, t))


def gradient(x, t, shift=0.0):
    """What a classifier would give; random, as one on random crops is."""
    crop = torch.randn(SHAPE[-2:], dtype=x.dtype)
    return torch.sin(2 * x + t.to(x.dtype).view(-1, 1, 1, 1) + shift) + 0.1 * crop


# the hooks of a call, and why
HOOKS = {
    "denoised_fn": ({"denoised_fn": lambda x0: torch.sin(1.5 * x0) * 1.3}, "clipped after it"),
    "cond_fn": ({"cond_fn": gradient}, "guidance by a classifier"),
    "both": ({"denoised_fn": torch.tanh, "cond_fn": gradient}, "one after the other"),
}


@pytest.mark.parametrize("kind", ["p_sample", "ddim_sample"])
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("case", ["default", "small", "learned", "sections", "rescaled"])
def test_hooks(case, hooks, kind):
    diffusion, oracle = make(case)
    options, kwargs = HOOKS[hooks][0], {"shift": -0.5}
    torch.manual_seed(9)
    loop = getattr(diffusion, f"{kind}_loop_progressive")
    steps = list(loop(model_of(diffusion), SHAPE, noise=start(), model_kwargs=kwargs, **options))
    after = torch.get_rng_state()
    torch.manual_seed(9)
    states, x0s = by_oracle(kind, diffusion, oracle, start(), kwargs=kwargs, **options)
    assert torch.equal(after, torch.get_rng_state())
    assert_same(numpy_of(s["sample"] for s in steps), numpy_of(states), (case, hooks, kind))
    assert_same(numpy_of(s["pred_xstart"] for s in steps), numpy_of(x0s), (case, hooks), 1.0)


@pytest.mark.parametrize("kind", ["p_sample", "ddim_sample"])
@pytest.mark.parametrize("case", ["default", "learned", "cosine"])
def test_a_step_in_float32(case, kind):
    diffusion, oracle = make(case)
    exact = start().float().double()
    for t in (0, 1, 20, diffusion.num_timesteps - 1):
        index = torch.full((2,), t)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))
        wanted = [
            getattr(oracle, kind)(
                model_of(diffusion), x, t, lambda x=x, noise=noise: noise.to(x.dtype)
            )
            for x in (exact.float(), exact)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_guided_steps, "randn_like", lambda x, noise=noise: noise.to(x.dtype))
            got = getattr(diffusion, kind)(model_of(diffusion), exact.float(), index)
        for key, (same, true) in zip(
            ("sample", "pred_xstart"), zip(*wanted, strict=True), strict=True
        ):
            # four roundings of a sum of three terms
            assert_within_budget(got[key], same, true, ulps=4)


@pytest.mark.parametrize("kind", ["p_sample", "ddim_sample"])
def test_samples_of_a_batch_may_stand_at_different_times(kind):
    diffusion, oracle = make("learned")
    x = start()
    torch.manual_seed(1)
    got = getattr(diffusion, kind)(model_of(diffusion), x, torch.tensor([17, 0]))
    torch.manual_seed(1)
    noise = torch.randn_like(x)
    for i, t in enumerate((17, 0)):
        part = slice(i, i + 1)
        want, _ = getattr(oracle, kind)(
            model_of(diffusion), x[part], t, lambda part=part: noise[part]
        )
        assert_same([got["sample"][part].numpy()], [want.numpy()], t)


# method, its table and options, why
TABLES = {
    "ancestral": ("p_sample_loop", "ddpm", {"variance": "fixed_large"}, {}, "default"),
    "learned": ("p_sample_loop", "ddpm", {"variance": "learned_range"}, {}, "noise by element"),
    "ddim": ("ddim_sample_loop", "ddim", {"eta": 0.5}, {"eta": 0.5}, "a share of noise"),
}


@pytest.mark.parametrize("name", TABLES)
def test_seeds_give_the_sampler_bits(name):
    method, solver, options, arguments, _ = TABLES[name]
    diffusion, _ = make("learned" if name == "learned" else "default")
    model = model_of(diffusion)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    got = getattr(diffusion, method)(model, SHAPE, seeds=[4, 9], **arguments)
    assert torch.equal(before, torch.get_rng_state())
    schedule = schedules.linear(STEPS, 0.1 / STEPS, 20 / STEPS)
    times = list(range(STEPS))[::-1]
    table = solvers.build(solver, schedule, timesteps=times, **options)
    assert_same_bits(got, Sampler(model, table, clip=1.0)(SHAPE[1:], seeds=[4, 9]))
    alone = getattr(diffusion, method)(model, (1, *SHAPE[1:]), seeds=[9], **arguments)
    assert_same_bits(alone, got[1:])
    *_, last = getattr(diffusion, f"{method}_progressive")(model, SHAPE, seeds=[4, 9], **arguments)
    assert_same_bits(last["sample"], got)


def test_seeds_with_hooks_and_single_steps():
    diffusion, _ = make("learned")
    model, x, seeds = model_of(diffusion), start(torch.float32), [4, 9]
    plain = diffusion.p_sample(model, x, torch.tensor([7, 7]), seeds=seeds)
    mixed = diffusion.p_sample(model, x, torch.tensor([7, 3]), seeds=seeds)
    assert_same_bits(mixed["sample"][:1], plain["sample"][:1])
    hooked = diffusion.p_sample(
        model, x, torch.tensor([7, 7]), seeds=seeds, denoised_fn=lambda x0: x0
    )
    # the same numbers in another order of operations: a rounding for each of x0's two terms
    exact = diffusion.p_sample(model, x.double(), torch.tensor([7, 7]), seeds=seeds)
    assert_within_budget(hooked["sample"], plain["sample"], exact["sample"], ulps=4)
    assert_within_budget(hooked["pred_xstart"], plain["pred_xstart"], exact["pred_xstart"], ulps=0)


@pytest.mark.parametrize("seeds", [None, [4, 9]], ids=["torch", "seeds"])
@pytest.mark.parametrize("hook", [None, torch.tanh], ids=["plain", "hooked"])
def test_outputs_in_bfloat16_are_widened(hook, seeds):
    diffusion, _ = make("learned")
    model, got = model_of(diffusion), []

    def rounded(x, t):
        return model(x, t).bfloat16()

    for called in (rounded, lambda x, t: rounded(x, t).float()):
        torch.manual_seed(6)
        got.append(diffusion.p_sample_loop(called, SHAPE, denoised_fn=hook, seeds=seeds))
    assert_same_bits(*got)


def test_one_pass_a_step(monkeypatch):
    rows = []

    def counting(x, output, table, row, **options):
        rows.append((table.name, row))
        return step(x, output, table, row, **options)

    step = _guided_steps.reverse_step
    monkeypatch.setattr(_guided_steps, "reverse_step", counting)
    diffusion, _ = make("learned")
    diffusion.p_sample_loop(model_of(diffusion), SHAPE)
    assert rows == [("ddpm", i) for i in range(STEPS)]


def test_what_the_model_is_given():
    seen = []

    def model(x, t, y):
        seen.append((t, y))
        return x

    for rescale in (False, True):
        diffusion = create_gaussian_diffusion(
            steps=200, timestep_respacing="ddim4", rescale_timesteps=rescale
        )
        diffusion.ddim_sample_loop(model, (3, 1, 2, 2), model_kwargs={"y": "cat"})
    assert [t.tolist() for t, _ in seen[:4]] == [[i] * 3 for i in (150, 100, 50, 0)]
    assert [t.tolist() for t, _ in seen[4:]] == [[5.0 * i] * 3 for i in (150, 100, 50, 0)]
    assert {t.dtype for t, _ in seen[:4]} == {torch.int64}
    assert {t.dtype for t, _ in seen[4:]} == {torch.float32}
    assert {y for _, y in seen} == {"cat"}


def test_loops_keep_no_gradients_and_leave_the_mode_alone():
    net = torch.nn.Conv2d(3, 3, 1)
    diffusion = create_gaussian_diffusion(steps=40, timestep_respacing="3")
    for out in diffusion.p_sample_loop_progressive(lambda x, t: net(x), SHAPE, progress=True):
        assert not out["sample"].requires_grad and torch.is_grad_enabled()


def test_samples_lie_where_the_model_does():
    class Net(torch.nn.Linear):
        def forward(self, x, t):
            raise LookupError(f"{x.device} {t.device}")

    diffusion = create_gaussian_diffusion(steps=40, timestep_respacing="2")
    for place, options in (("meta", {}), ("cpu", {"device": "cpu"})):
        with pytest.raises(LookupError, match=f"{place} {place}"):
            diffusion.p_sample_loop(Net(1, 1, device="meta"), SHAPE, **options)
    with pytest.raises(LookupError, match="cpu cpu"):
        diffusion.p_sample_loop(Net(1, 1, device="meta"), SHAPE, noise=torch.zeros(SHAPE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: space_timesteps(10, "11"), "within the 10 steps of their section, got 11"),
        (lambda: space_timesteps(10, "-1"), "within the 10 steps of their section, got -1"),
        (lambda: space_timesteps(10, "ddim7"), "a whole stride over 10 gives, got 'ddim7'"),
        (lambda: space_timesteps(10, "ddim2,5"), "a whole stride over 10 gives, got 'ddim2,5'"),
        (lambda: space_timesteps(10, "some"), "be like '250', '10,20,30' or 'ddim50', got 'some'"),
        (lambda: space_timesteps(10, []), r"'ddim50', got \[\]"),
        (lambda: create_gaussian_diffusion(noise_schedule="sqrt"), "noise_schedule must be one"),
        (lambda: create_gaussian_diffusion(timestep_respacing="1"), "at least two, got \\[0\\]"),
        (lambda: GaussianDiffusion(schedules.edm()), "schedule must be discrete, got kind 'edm'"),
        (lambda: GaussianDiffusion(schedules.linear(), variance="learned"), "variance must be"),
        (lambda: GaussianDiffusion(schedules.linear(), prediction="flow"), "prediction must be"),
        (
            lambda: make("default")[0].p_sample_loop(torch.sin, SHAPE, noise=torch.zeros(1)),
            r"noise must have shape \(2, 3, 4, 5\), got \(1,\)",
        ),
        (
            lambda: make("learned")[0].p_sample_loop(lambda x, t: x, SHAPE),
            r"output must have shape \(2, 6, 4, 5\) for a learned variance, got \(2, 3, 4, 5\)",
        ),
        (
            lambda: make("default")[0].ddim_reverse_sample(
                torch.sin, start(), torch.zeros(2), eta=0.5
            ),
            "eta must be 0, got 0.5",
        ),
        (
            lambda: make("default")[0].p_sample_loop(torch.sin, SHAPE, seeds=[1]),
            r"seeds must have one entry a sample \(2\), got 1",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
