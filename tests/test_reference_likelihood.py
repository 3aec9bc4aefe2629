"""The variational bound against chains whose likelihood is known, and its losses."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastdiff import schedules
from fastdiff.reference import diffusion, distributions, likelihood

EPS = torch.finfo(torch.float64).eps
F64 = torch.float64


def hermite(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of an expectation over a unit normal, exact for degree 2n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def expected(reverse, x0: float, abars: torch.Tensor, nodes: int = 3, **options) -> float:
    """L_VLB of one number, the expectation over x_t taken by quadrature."""
    node, weight = hermite(nodes)
    data = torch.full((nodes, 1), x0, dtype=F64)
    noise = node.view(1, nodes, 1).expand(len(abars), -1, -1)
    return float(weight @ likelihood.bound(reverse, data, abars, noise, **options).total)


def true_reverse(abars: torch.Tensor, mean: float, var: float):
    """p(x_{t-1} | x_t) of the chain that starts from N(mean, var), by Bayes' rule."""

    def reverse(x, t):
        before = torch.cat([torch.ones(1, dtype=F64), abars[:-1]])[t].view(-1, 1)
        a = abars[t].view(-1, 1) / before
        m, v = before.sqrt() * mean, before * var + 1 - before
        gain = v * a.sqrt() / (a * v + 1 - a)
        return m + gain * (x - a.sqrt() * m), (v * (1 - a) / (a * v + 1 - a)).log()

    return reverse


ABARS = torch.tensor(schedules.linear().alphas_cumprod)
# as the cosine schedule's, but ending without any signal: x_T is N(0, I) whatever the data
TO_NOISE = torch.cos(torch.linspace(0.1, math.pi / 2, 20, dtype=F64)).square()
TO_NOISE[-1] = 0.0


@pytest.mark.parametrize(
    "abars, mean, var",
    [
        # unit normal data stay so at every time, also where signal is left
        (ABARS[::20], 0.0, 1.0),
        (ABARS[:10], 0.0, 1.0),
        (TO_NOISE, 0.7, 0.09),  # no signal at the end: any Gaussian
        (TO_NOISE, -2.0, 4.0),
    ],
    ids=["linear", "short", "narrow", "wide"],
)
def test_bound_of_the_true_reverse_is_the_exact_likelihood(abars, mean, var):
    reverse = true_reverse(abars, mean, var)
    for x0 in (-1.5, 0.0, 0.4, 3.0):
        data = torch.tensor([x0, mean, math.sqrt(var)], dtype=F64)
        want = -float(Normal(data[1], data[2]).log_prob(data[0]))
        got = expected(reverse, x0, abars, bins=None)
        # 1 - alphabar and beta lose digits of 1 where little noise was added: 1 / beta_0 of EPS a
        # term, most of it in the first ones
        room = 64 * EPS * float((1 / (1 - abars)).sum()) * (1 + x0 * x0 / var)
        assert abs(got - want) <= room + 1e-13 * len(abars)
    # any other mean or variance costs more, on the average over the data, than their entropy
    entropy = 0.5 * math.log(2 * math.pi * math.e * var)
    data = [mean + math.sqrt(var) * float(node) for node in hermite(3)[0]]

    def average(shift, widen):
        def other(x, t):
            at, logvar = reverse(x, t)
            return at + shift, logvar + widen

        each = [expected(other, x0, abars, bins=None) for x0 in data]
        return float(hermite(3)[1] @ torch.tensor(each, dtype=F64))

    assert abs(average(0.0, 0.0) - entropy) <= 64 * EPS * float((1 / (1 - abars)).sum())
    assert average(0.05, 0.0) > entropy + 1e-3
    assert average(0.0, 0.1) > entropy + 1e-3


def test_gap_of_a_wrong_reverse_is_the_divergence_of_the_chains():
    """-log p(x_0) and KL(q(x_{1:T} | x_0) || p(x_{1:T} | x_0)) from dense joint Gaussians."""
    betas = torch.tensor([0.1, 0.3, 0.2, 0.5], dtype=F64)
    abars, times = torch.cumprod(1 - betas, 0), 4
    gains = torch.tensor([0.9, 0.6, 1.1, 0.4], dtype=F64)
    shifts = torch.tensor([0.1, -0.2, 0.05, 0.3], dtype=F64)
    logvars = torch.tensor([-2.0, -1.0, -1.5, -0.5], dtype=F64)

    def reverse(x, t):
        return gains[t].view(-1, 1) * x + shifts[t].view(-1, 1), logvars[t].view(-1, 1)

    # index 0 is the data, i + 1 the image of time i; each row is its weights of unit normals
    p, p_mean = torch.zeros(times + 1, times + 1, dtype=F64), torch.zeros(times + 1, dtype=F64)
    p[times, times] = 1.0
    for i in reversed(range(times)):
        p[i] = gains[i] * p[i + 1]
        p[i, i] = (0.5 * logvars[i]).exp()
        p_mean[i] = gains[i] * p_mean[i + 1] + shifts[i]
    p_cov = p @ p.T
    for x0 in (-1.0, 0.3, 2.0):
        q, q_mean = torch.zeros(times + 1, times + 1, dtype=F64), torch.zeros(times + 1, dtype=F64)
        q_mean[0] = x0
        for i in range(times):
            q[i + 1] = (1 - betas[i]).sqrt() * q[i]
            q[i + 1, i + 1] = betas[i].sqrt()
            q_mean[i + 1] = (1 - betas[i]).sqrt() * q_mean[i]
        gain = p_cov[1:, 0] / p_cov[0, 0]
        p_given = MultivariateNormal(
            p_mean[1:] + gain * (x0 - p_mean[0]), p_cov[1:, 1:] - torch.outer(gain, p_cov[0, 1:])
        )
        q_given = MultivariateNormal(q_mean[1:], (q @ q.T)[1:, 1:])
        nll = -Normal(p_mean[0], p_cov[0, 0].sqrt()).log_prob(torch.tensor(x0, dtype=F64))
        gap = float(kl_divergence(q_given, p_given))
        assert gap > 0.1
        # inverses of matrices whose condition is about 100
        assert abs(expected(reverse, x0, abars, bins=None) - float(nll) - gap) <= 1e-12


def test_bound_with_the_discretized_decoder():
    """At least -log P of each level, P by quadrature, and no more than a little above it."""
    betas = torch.tensor([0.02, 0.1, 0.4, 1.0], dtype=F64)
    abars = torch.cumprod(1 - betas, 0)
    mean, var = 0.2, 0.16
    reverse = true_reverse(abars, mean, var)
    grid = torch.linspace(-8, 8, 4001, dtype=F64)[:, None]
    # the images of time 0 under the model, which is the true chain
    prior = Normal(abars[0].sqrt() * mean, (abars[0] * var + 1 - abars[0]).sqrt())
    at, logvar = reverse(grid, torch.zeros(1, dtype=torch.int64))
    masses, bits = 0.0, []
    for level in range(16):
        x0 = -1 + 2 * level / 15
        edges = torch.tensor([x0 - 1 / 15, x0 + 1 / 15], dtype=F64)
        edges = torch.where(torch.tensor([level == 0, level == 15]), edges.sign() * math.inf, edges)
        cdf = 0.5 * torch.erfc(-(edges - at) / (0.5 * logvar).exp() / math.sqrt(2))
        mass = prior.log_prob(grid).exp()[:, 0] * (cdf[:, 1] - cdf[:, 0])
        exact = -math.log(float(mass.sum()) * 16 / 4000)
        got = expected(reverse, x0, abars, nodes=80, bins=16)
        # a bin narrower than the decoder costs little; an open one stands for many values
        assert exact < got < exact + (0.2 if level in (0, 15) else 0.005)
        masses += math.exp(-exact)
        bits.append(got)
    assert abs(masses - 1) <= 1e-10
    assert sum(math.exp(-b) for b in bits) < 1


def test_terms_are_those_of_torchs_distributions():
    draw = torch.Generator().manual_seed(3)
    mean, mean_p, logvar, logvar_p = torch.randn(4, 5, 6, dtype=F64, generator=draw)
    want = kl_divergence(
        Normal(mean, (logvar / 2).exp()), Normal(mean_p, (logvar_p / 2).exp())
    )  # fmt: skip
    got = distributions.kl_normal(mean, logvar, mean_p, logvar_p)
    assert bool(((got - want).abs() <= 64 * EPS * (1 + want)).all())
    # variances that are nearly alike: (exp(r) - 1 - r) / 2 is r^2 / 4
    near = distributions.kl_normal(mean, logvar, mean, logvar + 1e-5)
    assert bool((near / 2.5e-11 - 1).abs().max() <= 1e-4)
    # L_T of images, by the sum over their elements
    x0 = torch.randn(2, 3, 4, dtype=F64, generator=draw)
    peer = Normal(0.3**0.5 * x0, torch.full_like(x0, 0.7).sqrt())
    want = kl_divergence(peer, Normal(torch.zeros_like(x0), torch.ones_like(x0))).sum((1, 2))
    got = likelihood.prior_term(x0, 0.3)
    assert got.shape == (2,)
    assert bool(((got - want).abs() <= 64 * EPS * (1 + want)).all())


def test_bits_per_dim():
    # an even choice of 256 levels costs 8 bits a pixel
    nats = torch.tensor([12 * math.log(256)], dtype=F64)
    assert abs(float(likelihood.bits_per_dim(nats, 12)) - 8) <= 8 * EPS


@pytest.mark.parametrize("t", [1, 7, 300, 999], ids=str)
def test_weight_of_the_data_is_the_difference_of_snr(t):
    """The divergence with the posterior's variance, for an error of 0.3 in x_0."""
    x0 = torch.tensor([[0.4, -0.9]], dtype=F64)
    x, time = 0.7 * x0 + 0.2, torch.tensor([t])
    moments = likelihood.reverse_moments(x0 + 0.3, x, time, ABARS, "small")
    term = likelihood.step_term(x0, x, time, ABARS, *moments)
    weight = likelihood.data_weight(ABARS[t], ABARS[t - 1])
    # the means differ by 0.3 of a small number, and beta and 1 - alphabar are differences from 1
    beta = 1 - ABARS[t] / ABARS[t - 1]
    room = 64 * EPS * float(1 / beta + 1 / (1 - ABARS[t - 1]))
    size = float((moments[0].abs() * torch.exp(-0.5 * moments[1])).max())
    assert abs(float(term / (weight * 2 * 0.3**2)) - 1) <= room * (1 + size)
    half = (likelihood.snr(ABARS[t - 1]) - likelihood.snr(ABARS[t])) / 2
    cancel = float(likelihood.snr(ABARS[t]) / half)
    assert abs(float(half / weight) - 1) <= room * (1 + cancel)
    # DDPM, equation 12: the same in units of the noise
    variance = (1 - ABARS[t - 1]) / (1 - ABARS[t]) * beta
    a = ABARS[t] / ABARS[t - 1]
    of_noise = beta**2 / (2 * variance * a * (1 - ABARS[t]))
    ours = weight / likelihood.snr(ABARS[t])
    assert abs(float(ours / of_noise) - 1) <= room


def test_learned_variance_lies_between_the_two_bounds():
    v = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
    x, t = torch.zeros(3, 1, dtype=F64), torch.full((3,), 500)
    _, logvar = likelihood.reverse_moments(x, x, t, ABARS, v)
    _, small = diffusion.posterior(x, x, float(ABARS[500]), float(ABARS[499]))
    large = float(schedules.linear().betas[500])
    want = [small, math.sqrt(small * large), large]
    room = 64 * EPS / large
    for got, w in zip(logvar[:, 0].exp().tolist(), want, strict=True):
        assert abs(got - w) <= room * w
    for name, w in (("small", small), ("large", large)):
        _, fixed = likelihood.reverse_moments(x, x, t, ABARS, name)
        assert abs(float(fixed[0].exp()) - w) <= room * w
    # the first time takes the small variance of the second, 0.5 beta_1 or so, and stays finite
    _, first = likelihood.reverse_moments(x, x, torch.zeros(3, dtype=torch.int64), ABARS, "small")
    _, second = diffusion.posterior(x, x, float(ABARS[1]), float(ABARS[0]))
    assert bool(((first.exp() / second - 1).abs() <= 1e-11).all())


@pytest.mark.parametrize("t", [1, 5, 12])
def test_best_learned_variance_is_the_true_one(t):
    """The expected term is least where the reverse step has the variance Bayes' rule gives."""
    var = 0.25
    abars = TO_NOISE[:-1]
    node, weight = hermite(5)
    # x_0 and noise over a grid of their own
    x0 = (math.sqrt(var) * node).repeat_interleave(5)[:, None]
    noise, weight = node.repeat(5)[:, None], torch.outer(weight, weight).flatten()
    time = torch.full((25,), t)
    x = diffusion.marginal(x0, abars[t], noise)
    mean, true_logvar = true_reverse(abars, 0.0, var)(x, time)
    v = torch.zeros((), dtype=F64, requires_grad=True)
    for _ in range(40):  # Newton
        _, logvar = likelihood.reverse_moments(x0, x, time, abars, v.expand(25, 1))
        loss = weight @ likelihood.step_term(x0, x, time, abars, mean, logvar)
        (slope,) = torch.autograd.grad(loss, v, create_graph=True)
        (curve,) = torch.autograd.grad(slope, v)
        v = (v - slope / curve.abs()).detach().requires_grad_()
    assert -1 < float(v.detach()) < 1
    assert abs(float((logvar[0] - true_logvar[0]).detach())) <= 1e-10


def test_hybrid_loss_teaches_the_variance_by_the_bound_alone():
    draw = torch.Generator().manual_seed(5)
    x0, noise = torch.rand(6, 1, 2, 2, dtype=F64, generator=draw), torch.randn(
        6, 1, 2, 2, dtype=F64, generator=draw
    )  # fmt: skip
    t = torch.tensor([0, 1, 2, 300, 700, 999])
    alphabar = ABARS[t].view(6, 1, 1, 1)
    x = diffusion.marginal(x0, alphabar, noise)
    output = (noise + 0.1).requires_grad_()
    v = torch.full_like(x, 0.2).requires_grad_()
    estimate, _ = diffusion.from_prediction(
        "epsilon", x, output, alphabar.sqrt(), (1 - alphabar).sqrt()
    )
    mean, logvar = likelihood.reverse_moments(estimate, x, t, ABARS, v)
    term = likelihood.step_term(x0, x, t, ABARS, mean.detach(), logvar)
    simple = (output - noise).square().flatten(1).mean(1)
    loss = likelihood.hybrid_loss(simple, term, len(ABARS), 4)
    of_output, of_v = torch.autograd.grad(loss.sum(), (output, v))
    # the noise error, 0.1, teaches the mean: 2 * 0.1 / 4 an element
    assert bool(((of_output - 0.05).abs() <= 1e-15 / 0.05).all())
    assert bool((of_v.isfinite() & (of_v != 0)).all())
    bits = term / (4 * math.log(2))
    assert bool(((loss - simple - bits).abs() <= 16 * EPS * (1 + bits.abs())).all())


def test_times_are_drawn_by_the_size_of_their_losses():
    sampler = likelihood.TimeSampler(4, history=2, uniform=0.0)
    even = torch.full((4,), 0.25, dtype=F64)
    t, losses = torch.arange(4), torch.tensor([8.0, 1.0, 0.5, 0.5], dtype=F64)
    sampler.update(t, torch.full((4,), 1e6))
    assert torch.equal(sampler.probabilities(), even)  # not all times are known yet
    sampler.update(t, losses)
    sampler.update(t, losses)  # the first losses are forgotten
    p = sampler.probabilities()
    assert float((p - losses / 10).abs().max()) <= 4 * EPS
    # root mean square of unequal losses
    sampler.update(t[:1], torch.tensor([6.0]))
    assert abs(float(sampler.probabilities()[0]) - 50**0.5 / (50**0.5 + 2)) <= 4 * EPS
    drawn, weight = sampler.sample(20000, torch.Generator().manual_seed(1))
    p = sampler.probabilities()
    share = torch.bincount(drawn, minlength=4) / 20000
    assert bool(((share - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt()).all())
    # unbiased for any losses, as p * weight is even; and with these losses without any variance
    assert float((p * (1 / (4 * p)) - even).abs().max()) <= EPS
    assert float((weight - 1 / (4 * p[drawn])).abs().max()) == 0
    size = torch.tensor([50**0.5, 1.0, 0.5, 0.5], dtype=F64)
    estimate = weight * size[drawn]
    assert float((estimate - size.mean()).abs().max()) <= 16 * EPS * float(size.mean())


def test_no_time_is_forgotten():
    sampler = likelihood.TimeSampler(4, history=1, uniform=0.01)
    sampler.update(torch.arange(4), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert abs(float(sampler.probabilities()[3]) - 0.0025) <= EPS
    # no losses at all: as even as before
    sampler.update(torch.arange(4), torch.zeros(4))
    assert float(sampler.probabilities()[0]) == 0.25


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, t: likelihood.reverse_moments(x, x, t, ABARS, "learned"), "variance must be"),
        (lambda x, t: likelihood.reverse_moments(x, x, t, ABARS[:1]), "alphabars must have 2"),
        (lambda x, t: likelihood.bound(None, x, ABARS, x[None]), "noise must have the shape"),
        (lambda x, t: likelihood.TimeSampler(0), "times and history must be positive"),
        (lambda x, t: likelihood.TimeSampler(5, uniform=1.5), "uniform must be in"),
    ],
    # each rule that an argument can break
    ids=["name", "times", "noise", "count", "share"],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, 3), torch.tensor([1, 2]))
