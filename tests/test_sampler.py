"""The loop: what it hands to the model, what it returns, what it refuses."""

from collections import Counter

import numpy as np
import pytest
import torch
from solver_cases import home
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import Sampler, ops, schedules, solvers

from .bits import assert_same_bits

SHAPE = (3, 8, 8)


def model(x, t, label=None):
    """Elementwise, so that a batch and its parts give the same bits."""
    shift = 0.0 if label is None else label.to(x.dtype).view(-1, 1, 1, 1) * 0.125
    return x * 0.5 + (t.to(x.dtype) * 2.0**-10).view(-1, 1, 1, 1) - shift


def table(name="dpmpp_2m", steps=4, **options):
    return solvers.build(name, schedules.linear(), steps, **options)


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_loop_is_the_rows_in_turn(name):
    schedule, prediction = home(name)
    rows = solvers.build(name, schedule, 4, prediction=prediction)
    with_uncond = any(need.uncond for need in rows.needs)
    label = {"label": torch.tensor([1, 2])} if with_uncond else {}
    none = {"label": torch.tensor([0, 0])} if with_uncond else {}
    got = Sampler(model, rows)(SHAPE, seeds=[3, 9], cond=label, uncond=none)
    seeds = ops.as_seeds([3, 9])
    x = fastdiff.randn(seeds, SHAPE) * rows.init_sigma
    history = torch.empty(max(rows.depth, 1), *x.shape)
    y = torch.empty_like(x)
    for i, row in enumerate(rows.rows):
        t = torch.full((2,), row.time)
        output = model(x, t, **label) if row.evaluates else None
        uncond = model(x, t, **none) if row.evaluates and with_uncond else None
        x = ops.reverse_step(x, output, rows, i, uncond=uncond, y=y, history=history, seeds=seeds)
    assert_same_bits(got, x)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun"])  # plain, stochastic, two-stage
def test_image_depends_on_its_seed_alone(name):
    sampler = Sampler(model, table(name), guidance=3.0, clip=1.0)
    label = torch.arange(80) % 10
    null = torch.full((80,), -1)
    many = sampler(SHAPE, seeds=0, cond={"label": label}, uncond={"label": null})
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            one = sampler(
                SHAPE, seeds=[41], cond={"label": label[41:42]}, uncond={"label": null[:1]}
            )
            assert_same_bits(one, many[41:42])
    finally:
        torch.set_num_threads(threads)


def test_one_call_and_two_calls_guide_alike():
    label, null = torch.tensor([1, 2]), torch.tensor([-1, -1])
    batches = []

    def counting(x, t, label):
        batches.append(len(x))
        return model(x, t, label)

    args = {"seeds": [1, 2], "cond": {"label": label}, "uncond": {"label": null}}
    one = Sampler(counting, table(), guidance=2.0)(SHAPE, **args)
    two = Sampler(counting, table(), guidance=2.0, batched=False)(SHAPE, **args)
    assert_same_bits(one, two)
    assert batches == [4] * 4 + [2] * 8


def test_guidance_a_sample():
    label, null = torch.tensor([1, 2]), torch.tensor([-1, -1])
    args = {"cond": {"label": label}, "uncond": {"label": null}}
    both = Sampler(model, table(), guidance=torch.tensor([1.0, 4.0]))(SHAPE, seeds=[5, 6], **args)
    plain = Sampler(model, table())(SHAPE, seeds=[5], cond={"label": label[:1]})
    assert_same_bits(both[:1], plain)
    strong = Sampler(model, table(), guidance=4.0)(SHAPE, seeds=[5, 6], **args)
    assert_same_bits(both[1:], strong[1:])
    assert not torch.equal(both[:1], strong[:1])


def test_iter_and_callback_see_every_step():
    sampler = Sampler(model, table("heun"))
    seen = []
    result = sampler(SHAPE, seeds=[4], callback=seen.append)
    steps = list(sampler.iter(SHAPE, seeds=[4]))
    assert [s.index for s in steps] == [s.index for s in seen] == list(range(len(sampler.table)))
    assert_same_bits(steps[-1].x, result)
    for a, b in zip(steps, seen, strict=True):
        assert_same_bits(a.x, b.x)
    # kept states are their own: none was overwritten by a later step
    assert len({s.x.data_ptr() for s in steps}) == len(steps)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_denoised_is_x0(prediction):
    rows = table("ddim", prediction=prediction)
    x = fastdiff.randn([4], SHAPE).double()
    for step in Sampler(model, rows).iter(SHAPE, seeds=[4]):
        row = rows.rows[step.index]
        m = model(x, torch.full((1,), row.time, dtype=torch.float64))
        a, s = row.alpha, row.sigma
        x0 = {"epsilon": (x - s * m) / a, "sample": m, "v_prediction": a * x - s * m}[prediction]
        # float32 against float64: an ulp of the largest term for each of the four operations
        largest = max(x.abs().max() / a, m.abs().max() * s / a, x0.abs().max())
        bound = (step.index + 1) * 4 * torch.finfo(torch.float32).eps * largest
        assert (step.denoised.double() - x0).abs().max() <= bound
        x = step.x.double()


def test_denoised_is_clipped_and_guided():
    label, null = torch.tensor([7]), torch.tensor([-1])
    sampler = Sampler(model, table("ddim"), guidance=2.0, clip=0.5)
    for step in sampler.iter(SHAPE, seeds=[4], cond={"label": label}, uncond={"label": null}):
        assert step.denoised.abs().max() <= 0.5
    plain = Sampler(model, table("ddim"), clip=0.5)
    first = next(iter(plain.iter(SHAPE, seeds=[4], cond={"label": label}))).denoised
    guided = next(
        iter(sampler.iter(SHAPE, seeds=[4], cond={"label": label}, uncond={"label": null}))
    ).denoised
    assert not torch.equal(first, guided)


def test_rows_without_a_model_call():
    rows = table("euler", s_churn=1.0)
    calls = []

    def counting(x, t):
        calls.append(float(t[0]))
        return model(x, t)

    steps = list(Sampler(counting, rows).iter(SHAPE, seeds=[1]))
    assert len(calls) == rows.nfe < len(rows)
    assert [s.denoised is None for s in steps] == [not row.evaluates for row in rows.rows]


def test_learned_variance_splits_the_output():
    rows = table("ddpm", variance="learned_range")

    def learned(x, t):
        return torch.cat([model(x, t), torch.full_like(x, -1.0)], dim=1)

    # frac = (v + 1) / 2 = 0 everywhere is the lower bound of the variance, beta~
    got = Sampler(learned, rows)(SHAPE, seeds=[2])
    small = Sampler(model, table("ddpm", variance="fixed_small"))(SHAPE, seeds=[2])
    # the noise scale goes through a polynomial exp of 2 ulp; three rows draw
    bound = 3 * 2 * torch.finfo(torch.float32).eps * small.abs().max() * 8
    assert (got - small).abs().max() <= bound


def test_model_dtype_and_edm_input_scale():
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x, t):
            seen.append((x.dtype, t.dtype, float(x.float().std())))
            return x * self.weight * 0.1

    rows = solvers.build("heun", schedules.edm(), 4, prediction="edm")
    x = Sampler(Net(), rows)((64, 64), seeds=[0])
    assert x.dtype == torch.float32
    assert all(dtype == torch.bfloat16 and t == torch.float32 for dtype, t, _ in seen)
    # x starts with sigma_max = 80 and c_in = 1 / hypot(80, 0.5): unit variance to 5 standard errors
    assert abs(seen[0][2] - 1) < 5 / (2 * 64 * 64) ** 0.5


def test_given_noise_replaces_the_initial_draw():
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    kept = noise.clone()
    a = Sampler(model, table("ddim"))(noise=noise)
    assert_same_bits(noise, kept)
    x = noise
    for step in Sampler(model, table("ddim")).iter(noise=noise):
        x = step.x
    assert_same_bits(a, x)
    last = noise.to(memory_format=torch.channels_last)
    assert_same_bits(
        Sampler(model, table("dpmpp_2m"))(noise=last).contiguous(),
        Sampler(model, table("dpmpp_2m"))(noise=noise),
    )


@pytest.mark.parametrize("axes", ((0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0)), ids=str)
def test_noise_in_any_memory_order(axes):
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).permute(axes)
    got = Sampler(model, table("dpmpp_2m"))(noise=noise)
    assert_same_bits(got, Sampler(model, table("dpmpp_2m"))(noise=noise.contiguous()))


@pytest.mark.parametrize("guided", ({}, {"guidance": 2.0}, {"guidance": 2.0, "batched": False}))
@pytest.mark.parametrize("output", ((torch.zeros(1),), None), ids=("a tuple", "nothing"))
def test_what_is_no_tensor_is_no_output(output, guided):
    sampler = Sampler(lambda x, t, label: output, table(), **guided)
    with pytest.raises(TypeError, match=r"model must return a tensor, got (tuple|NoneType)"):
        sampler(SHAPE, cond={"label": 1}, uncond={"label": 0})


def test_the_state_lies_as_the_model_does():
    """No tensor is brought into another order between the model and the step."""
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 1)  # whose weights lie in both orders
            self.conv = torch.nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x, t):
            seen.append(x)
            return self.conv(self.first(x))

    torch.manual_seed(0)
    net, noise = Net(), fastdiff.randn([5, 6], SHAPE)
    plain = Sampler(net, table("dpmpp_2m"))(SHAPE, seeds=[5, 6])
    assert all(x.is_contiguous() for x in seen)
    net.to(memory_format=torch.channels_last)
    expected = Sampler(net, table("dpmpp_2m"))(noise=noise, seeds=[5, 6])
    seen.clear()
    got = Sampler(net, table("dpmpp_2m"))(SHAPE, seeds=[5, 6])
    for x in (*seen, got):
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous() and plain.is_contiguous()
    assert_same_bits(got.contiguous(), expected)


def test_int_seed_counts_up():
    label = torch.tensor([1, 2, 3])
    a = Sampler(model, table())(SHAPE, seeds=10, cond={"label": label})
    b = Sampler(model, table())(SHAPE, seeds=[10, 11, 12], cond={"label": label})
    assert_same_bits(a, b)
    assert len(Sampler(model, table())(SHAPE)) == 1


def test_progress_bar(capsys):
    Sampler(model, table())(SHAPE, progress=True)
    assert "dpmpp_2m" in capsys.readouterr().err


def test_gaussian_data_comes_out():
    """The exact model of N(0, s^2) data turns noise into that data."""
    schedule, s = schedules.linear(), 0.5

    def exact(x, t):
        a = torch.from_numpy(np.asarray(schedule.alpha(t.double().numpy()))).view(-1, 1, 1, 1)
        v = a**2 * s**2 + (1 - a**2)
        return (x.double() * (1 - a**2).sqrt() / v).float()  # epsilon = sigma x / var(x)

    rows = solvers.build("dpmpp_2m", schedule, 50)
    x = Sampler(exact, rows)((1, 64, 64), seeds=range(16))
    n = x.numel()
    # five standard errors of the sample's deviation, plus the solver's own second-order error,
    # which the convergence tests bound: at 50 steps below 2 %
    assert abs(float(x.std()) / s - 1) < 5 / (2 * n) ** 0.5 + 0.02
    assert abs(float(x.mean())) < 5 * s / n**0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sampler(3, table()), TypeError, "Sampler: model must be callable, got int"),
        (lambda: Sampler(model, "ddim"), TypeError, "table must be a StepTable, got str"),
        (lambda: Sampler(model, table(), mode="warp"), ValueError, "mode must be one of eager, "),
        (lambda: Sampler(model, table(), clip=float("nan")), ValueError, "clip must be finite"),
        (lambda: Sampler(model, table(), clip=-1.0), ValueError, "clip must not be negative"),
        (lambda: Sampler(model, table(), guidance="7"), TypeError, "guidance must be a number"),
        (lambda: Sampler(model, table())(), ValueError, "shape or noise must be given"),
        (
            lambda: Sampler(model, table(), guidance=2.0)(SHAPE),
            ValueError,
            "uncond must be given for guidance 2.0",
        ),
        (
            lambda: Sampler(model, table())(noise=torch.zeros(2, *SHAPE), seeds=[1]),
            ValueError,
            r"seeds must have one entry a sample \(2\), got 1",
        ),
        (
            lambda: Sampler(model, table())(
                SHAPE, seeds=[1, 2], cond={"label": torch.zeros(3, dtype=torch.int64)}
            ),
            ValueError,
            r"label must have one entry a sample \(2\), got \(3,\)",
        ),
        (
            lambda: Sampler(lambda x, t: x[:, :1], table())(SHAPE),
            ValueError,
            r"output must have the shape of x \(1, 3, 8, 8\), got \(1, 1, 8, 8\)",
        ),
        (lambda: Sampler(model, table())(SHAPE, seeds=[1.5]), TypeError, "seeds must be integers"),
        (lambda: Sampler(model, table())(SHAPE, seeds=[-1]), ValueError, "seeds must lie in"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


class _Calls(TorchDispatchMode):
    """Counts the ATen calls by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# each takes another way through the loop
LOOPS = {
    "plain": {},
    "clipped": {"clip": 1.0},
    "guided": {"guidance": 3.0},
    "by-row": {"guidance": lambda index, sigma: 1.0 + index % 3},
    "by-sample": {"guidance": torch.tensor([1.0, 4.0]), "clip": torch.tensor([-1.0, 1.0])},
    "rescaled": {"guidance": 3.0, "guidance_rescale": 0.7, "guidance_interval": (0.1, 50.0)},
}


@pytest.mark.parametrize("options", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "ddpm"])
def test_no_row_copies_to_the_host_or_waits_for_it(name, options):
    """What may copy between devices or read a value is called as often for 12 steps as for 4."""
    touches = ("_to_copy", "_local_scalar_dense", "copy_", "item", "is_nonzero", "equal", "nonzero")
    counts = []
    for steps in (4, 12):
        with _Calls() as calls:
            Sampler(model, table(name, steps), **options)(
                SHAPE, seeds=[3, 9], cond={"label": torch.tensor([1.0, 2.0])},
                uncond={"label": torch.tensor([-1.0, -1.0])},
            )  # fmt: skip
        counts.append(calls.count)
    assert counts[1]["mul"] >= counts[0]["mul"] + 8  # the mode sees the model's calls
    for touch in touches:
        assert counts[0][touch] == counts[1][touch], touch
