"""A diffusion model's bound and its ODE against data whose likelihood is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from fastdiff import schedules
from fastdiff.likelihood import STARTS, DiffusionLikelihood
from fastdiff.reference.gmm import GaussianMixture

F64 = torch.float64
EPS = torch.finfo(F64).eps

# levels of signal from nearly all to none, in few steps
SHORT = schedules.rescale_zero_terminal_snr(schedules.linear(12, 0.02, 0.5))
MIXTURE = GaussianMixture(
    torch.tensor([0.6, 0.4], dtype=F64),
    torch.tensor([[-0.5, 0.4], [0.5, -0.2]], dtype=F64),
    torch.tensor([[[0.05, 0.02], [0.02, 0.04]], [[0.03, 0.0], [0.0, 0.08]]], dtype=F64),
)
LINE = GaussianMixture(
    torch.tensor([0.5, 0.5], dtype=F64),
    torch.tensor([[-0.4], [0.5]], dtype=F64),
    torch.tensor([0.04, 0.01], dtype=F64),
)


def hermite(n):
    """Nodes and weights of an expectation over a unit normal, exact for degree 2n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def expected(scored, value):
    """L_VLB of one number, the expectation over x_t by quadrature (its terms are quadratic)."""
    node, weight = hermite(3)
    x0 = torch.full((3, 1), value, dtype=F64)
    total = scored.bound(x0[:1], 0).prior[0]
    for t in range(len(scored.alphabars)):
        total = total + weight @ scored.term(x0, torch.full((3,), t), node[:, None])
    return float(total)


# each prediction of a network on the schedules that it fits
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", [schedules.cosine(30), schedules.linear(20)])
def test_bound_of_unit_normal_data_is_their_likelihood(schedule, prediction):
    """Unit normal data stay so at every time, and "large" is the true reverse variance."""
    data = GaussianMixture(
        torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64)
    )
    scored = DiffusionLikelihood(
        data.network(schedule, prediction), schedule,
        prediction=prediction, variance="large", bins=None,
    )  # fmt: skip
    # 1 - alphabar and beta are differences from 1, and epsilon divides by alpha
    room = 256 * EPS * float((1 / (1 - scored.alphabars)).sum() + (1 / scored.alphabars).max())
    for value in (-1.5, 0.0, 0.4):
        want = -float(Normal(0.0, 1.0).log_prob(torch.tensor(value, dtype=F64)))
        assert abs(expected(scored, value) - want) <= room


def test_decoder_of_unit_normal_numbers_gives_their_density():
    """Without bins L_0 is the true posterior's density there, and the ODE stands still."""
    data = GaussianMixture(
        torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64)
    )
    schedule = schedules.cosine(30)
    scored = DiffusionLikelihood(
        data.network(schedule, "v_prediction"), schedule,
        prediction="v_prediction", variance="large", bins=None,
    )  # fmt: skip
    x0 = torch.tensor([[-1.5], [0.0], [0.4]], dtype=F64)
    tol = 1e-9
    found = scored.flow(x0, 3, exact=True, rtol=tol, atol=tol)
    want = -Normal(0.0, 1.0).log_prob(x0[:, 0])
    # a step of the ODE is off by tol (1 + |value|) at most, and each takes 6 evaluations at least;
    # log sigma of the first time and its square in the density are differences from 1
    steps = found.nfe.double() / 6
    room = steps * tol * (1 + want) + 256 * EPS / (1 - scored.alphabars[0])
    assert ((found.nats - want).abs() <= room).all()
    assert (found.decoder != 0).all()


def test_bound_of_the_true_posterior_with_a_learned_variance_is_the_likelihood():
    """Narrow data off the origin, down to no signal: the network gives mean and variance."""
    mean, var = 0.7, 0.09
    data = GaussianMixture(
        torch.ones(1, dtype=F64),
        torch.full((1, 1), mean, dtype=F64),
        torch.full((1,), var, dtype=F64),
    )
    predict = data.network(SHORT, "sample")
    abars = torch.tensor(SHORT.alphas_cumprod)
    before = torch.cat([torch.ones(1, dtype=F64), abars[:-1]])

    def network(x, t):
        now, prev = abars[t.long()], before[t.long()]
        beta = 1 - now / prev
        small = (1 - prev) / (1 - now) * beta
        small = torch.where(
            small > 0, small, (1 - abars[0]) / (1 - abars[1]) * (1 - abars[1] / abars[0])
        )
        spread = prev * var + 1 - prev
        true = spread * beta / (now / prev * spread + beta)
        v = 2 * (true / small).log() / (beta / small).log() - 1
        return torch.cat([predict(x, t), v[:, None]], 1)

    scored = DiffusionLikelihood(network, SHORT, prediction="sample", bins=None)
    other = DiffusionLikelihood(network, SHORT, prediction="sample", variance="small", bins=None)
    for value in (-0.1, 0.7, 1.2):
        want = -float(data.log_prob(torch.tensor([value], dtype=F64)))
        assert abs(expected(scored, value) - want) <= 1e-12 / (1 - float(abars[0]))
        assert abs(expected(other, value) - want) > 1e-3
    assert scored.learned and not GOOD.learned


def test_every_time_and_drawn_times_have_one_expectation(monkeypatch):
    scored = DiffusionLikelihood(LINE.network(SHORT, "sample"), SHORT, prediction="sample")
    size = torch.linspace(5.0, 0.1, 12, dtype=F64).square()
    monkeypatch.setattr(scored, "term", lambda x0, t, noise, cond=None: size[t])
    x0 = torch.zeros(4000, 1)
    full = scored.bound(x0[:1], 0)
    assert full.times.tolist() == [list(range(12))]
    assert abs(float(full.total[0] - full.prior[0] - size.sum())) <= 16 * EPS * float(size.sum())
    # probabilities as the terms are: no variance at all
    best = scored.bound(x0, 0, probabilities=size[1:] / size[1:].sum(), draws=4)
    away = best.total - best.prior - size.sum()
    assert float(away.abs().max()) <= 64 * EPS * float(size.sum())
    # any others: unbiased
    even = scored.bound(x0, 0, probabilities=torch.full((11,), 1 / 11), draws=4)
    assert bool((even.times[:, 0] == 0).all()) and int(even.times.max()) == 11
    away = even.total - even.prior - size.sum()
    assert float(away.std()) > 0.1
    assert abs(float(away.mean())) <= 5 * float(away.std()) / math.sqrt(4000)


def test_an_image_is_scored_alike_in_every_batch():
    scored = DiffusionLikelihood(LINE.network(SHORT, "sample"), SHORT, prediction="sample")
    x0 = torch.tensor([[-0.5], [0.1], [0.6]])
    bound, flow = scored.bound(x0, [3, 5, 9]), scored.flow(x0, [3, 5, 9])
    for i, seed in enumerate((3, 5, 9)):
        assert torch.equal(scored.bound(x0[i : i + 1], seed).terms[0], bound.terms[i])
        assert torch.equal(scored.flow(x0[i : i + 1], seed).nats[0], flow.nats[i])
    assert torch.equal(bound.terms[:, 0], flow.decoder)  # the same draw of the first time


# schedules of each kind, with the predictions that tell them apart
CASES = (
    (schedules.rescale_zero_terminal_snr(schedules.linear()), "v_prediction"),
    (schedules.flow(), "flow"),
    (schedules.cosine(), "epsilon"),
    (schedules.edm(), "edm"),
)


@pytest.mark.parametrize(("schedule", "prediction"), CASES, ids=[c[0].name for c in CASES])
def test_density_of_the_ode_is_that_of_the_noised_data(schedule, prediction):
    x = torch.tensor([[-0.5, 0.4], [0.0, 0.0], [1.2, -0.9]], dtype=F64)
    scored = DiffusionLikelihood(
        MIXTURE.network(schedule, prediction), schedule, prediction=prediction
    )
    ends = [(float(schedule.alpha(t)), float(schedule.sigma(t)))
            for t in (schedule.t_min, schedule.t_max)]  # fmt: skip
    want = MIXTURE.log_prob(x, *ends[0])
    got, nfe = scored.log_prob(x, 0, exact=True, rtol=1e-9, atol=1e-9)
    # what is left of the means at the end, of length 0.65, seen 3 deviations out
    left = 3 * 0.65 * ends[1][0] / ends[1][1]
    assert float((got - want).abs().max()) <= left + 1e-7
    # the tolerance is what is asked: a hundred times less of it, ten times less error or better
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        rough, fewer = scored.log_prob(x, 0, exact=True, rtol=tolerance, atol=tolerance)
        assert bool((fewer < nfe).all())
        errors.append(float((rough - got).abs().max()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0


def test_random_signs_give_the_divergence_on_the_average():
    schedule = schedules.flow()
    scored = DiffusionLikelihood(MIXTURE.network(schedule, "flow"), schedule, prediction="flow")
    x = torch.tensor([[-0.3, 0.1]], dtype=F64).expand(400, -1)
    exact, _ = scored.log_prob(x[:1], 0, exact=True)
    away = scored.log_prob(x, 0)[0] - exact
    assert float(away.std()) > 1e-3
    assert abs(float(away.mean())) <= 5 * float(away.std()) / 20 + 1e-3


@pytest.mark.parametrize("start", STARTS)
def test_dequantised_figure_bounds_the_probability_of_a_level(start):
    """8 levels of one number: P by quadrature over the exact density."""
    scored = DiffusionLikelihood(LINE.network(SHORT, "sample"), SHORT, prediction="sample", bins=8)
    alpha, sigma = float(SHORT.alpha(0)), float(SHORT.sigma(0))
    total, slack = 0.0, []
    grid = torch.linspace(-6, 6, 20001, dtype=F64)[:, None]
    density = LINE.log_prob(grid, alpha, sigma).exp()
    step = float(grid[1, 0] - grid[0, 0])
    for level in range(8):
        value = -1 + 2 * level / 7
        if start == "uniform":
            inside = ((grid[:, 0] / alpha - value).abs() <= 1 / 7).to(F64)
        else:
            many = torch.full_like(grid, value)
            noise = (grid - alpha * many) / sigma
            inside = (-scored.term(many, torch.zeros(len(grid), dtype=torch.int64), noise)).exp()
        mass = float((density * inside).sum()) * step
        total += mass
        x0 = torch.full((200, 1), value)
        nats = scored.flow(x0, level * 1000, start=start).nats
        error = float(nats.std()) / math.sqrt(200)
        slack.append(float(nats.mean()) + math.log(mass))
        # an upper bound, and its gap is the divergence between two densities of one number
        assert -5 * error - 1e-3 < slack[-1]
    assert total <= 1 + 1e-3
    if start == "decoder":
        assert abs(total - 1) <= 1e-6  # its end bins are open: the levels are all there is
    assert min(slack) < 0.3


def test_bound_lies_above_the_ode_where_the_score_is_exact():
    """The gap is a difference of divergences that is not negative, and goes with the steps."""
    gaps = []
    x0 = LINE.sample(400, torch.Generator().manual_seed(2)).clamp(-1, 1)
    x0 = ((x0 + 1) * 15.5).round() / 15.5 - 1
    for steps in (25, 250):
        schedule = schedules.linear(steps, 0.1 / steps, min(20 / steps, 0.9))
        scored = DiffusionLikelihood(
            LINE.network(schedule, "v_prediction"), schedule, prediction="v_prediction", bins=32
        )
        gap = scored.bound(x0, 0).total - scored.flow(x0, 0).nats
        gaps.append((float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))))
    (few, error), (many, _) = gaps
    assert few > 5 * error
    assert many < few / 2


def test_a_dense_gaussian_of_images():
    """Correlated pixels in (1, 2, 2): the exact divergence of images, and their decoder figure."""
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, dtype=F64, generator=draw) / 4
    covariance = root @ root.T + 0.02 * torch.eye(4, dtype=F64)
    data = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 4, dtype=F64), covariance[None])
    schedule = schedules.flow()
    scored = DiffusionLikelihood(data.network(schedule, "flow"), schedule, prediction="flow")
    x = torch.randn(3, 1, 2, 2, dtype=F64, generator=draw) / 4
    got, _ = scored.log_prob(x, 0, exact=True, rtol=1e-9, atol=1e-9)
    a, s = 1 - schedule.t_min, schedule.t_min
    noised = a * a * covariance + s * s * torch.eye(4, dtype=F64)
    want = MultivariateNormal(torch.zeros(4, dtype=F64), noised).log_prob(x.flatten(1))
    assert float((got - want).abs().max()) <= 1e-6


def test_clip_is_part_of_the_model():
    def far(x, t):
        return torch.full_like(x, 3.0)

    def edge(x, t):
        return torch.ones_like(x)

    x0 = torch.tensor([[0.9], [1.0]])
    clipped = DiffusionLikelihood(far, SHORT, prediction="sample", clip=1.0)
    same = DiffusionLikelihood(edge, SHORT, prediction="sample")
    assert torch.equal(clipped.bound(x0, 0).terms, same.bound(x0, 0).terms)
    assert torch.equal(clipped.flow(x0, 0).nats, same.flow(x0, 0).nats)


def test_conditions_go_with_their_images():
    def network(x, t, label):
        return torch.tanh(x + label.to(x).view(-1, 1))

    scored = DiffusionLikelihood(network, SHORT, prediction="sample")
    x0, label = torch.tensor([[0.2], [0.2], [-0.7]]), torch.tensor([0, 2, 1])
    both = scored.flow(x0, [4, 4, 6], {"label": label})
    assert float((both.nats[0] - both.nats[1]).abs()) > 1e-3
    alone = scored.flow(x0[1:2], 4, {"label": label[1:2]})
    assert torch.equal(alone.nats[0], both.nats[1])


GOOD = DiffusionLikelihood(LINE.network(SHORT, "sample"), SHORT, prediction="sample")
EVEN = torch.full((11,), 1 / 11, dtype=F64)
SMOOTH = DiffusionLikelihood(
    LINE.network(schedules.flow(), "flow"), schedules.flow(), prediction="flow", bins=None
)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: DiffusionLikelihood(None, SHORT), "model must be callable"),
        (lambda x: DiffusionLikelihood(abs, SHORT), "likelihood: prediction must be one of"),
        (lambda x: DiffusionLikelihood(abs, SHORT, variance="big"), "variance must be one of"),
        (lambda x: DiffusionLikelihood(abs, SHORT, clip=0.0), "clip must be above 0"),
        (lambda x: DiffusionLikelihood(abs, SHORT, bins=1), "bins must be at least 2, got 1"),
        (lambda x: SMOOTH.flow(x, 0), "schedule must be discrete .* got kind 'flow'"),
        (lambda x: SMOOTH.bound(x, 0), "schedule must be discrete .* got kind 'flow'"),
        (lambda x: SMOOTH.flow(x, 0, start="uniform"), "bins must be a number"),
        (lambda x: GOOD.flow(x, 0, start="noise"), "start must be one of"),
        (lambda x: GOOD.flow(x, 0, rtol=0.0), "rtol and atol must be above 0"),
        (lambda x: GOOD.bound(x, [1]), "seeds"),
        (lambda x: GOOD.bound(x, 0, probabilities=EVEN * 2), "probabilities must be .* of sum 2"),
        (lambda x: GOOD.bound(x, 0, probabilities=EVEN, draws=1), "draws must be at least 2"),
    ],
    # each rule that an argument can break
)
def test_errors(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(torch.zeros(2, 1))
