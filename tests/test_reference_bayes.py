"""Conjugate posteriors against SciPy, torch.distributions and integrals; the identities of KL."""

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import distributions as peers

from fastdiff.reference import bayes
from fastdiff.reference.gmm import GaussianMixture

F64 = torch.float64
EPS = torch.finfo(F64).eps


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


X = torch.tensor([1.2, -0.3, 2.2, 0.8], dtype=F64)
COUNTS = torch.tensor([3.0, 0.0, 7.0, 2.0, 2.0], dtype=F64)


def normal_pair():
    prior, noise = bayes.Normal(number(-0.5), number(0.8)), 0.3
    posterior, evidence = bayes.update_normal(prior, X, noise)

    def log_joint(z):
        likelihood = peers.Normal(z[:, None], math.sqrt(noise)).log_prob(X).sum(1)
        return likelihood + peers.Normal(prior.mean, prior.variance.sqrt()).log_prob(z)

    peer = peers.Normal(posterior.mean, posterior.variance.sqrt())
    return prior, posterior, evidence, log_joint, peer, (-math.inf, math.inf), bayes.kl_normal


def beta_pair():
    prior = bayes.Beta(number(2.0), number(3.5))
    posterior, evidence = bayes.update_bernoulli(prior, number(7.0), number(2.0))

    def log_joint(z):
        bits = torch.tensor([1.0] * 7 + [0.0] * 2, dtype=F64)
        likelihood = peers.Bernoulli(z[:, None]).log_prob(bits).sum(1)
        return likelihood + peers.Beta(prior.a, prior.b).log_prob(z)

    peer = peers.Beta(posterior.a, posterior.b)
    return prior, posterior, evidence, log_joint, peer, (0.0, 1.0), bayes.kl_beta


def gamma_pair():
    prior = bayes.Gamma(number(1.5), number(0.7))
    posterior, evidence = bayes.update_poisson(prior, COUNTS)

    def log_joint(z):
        likelihood = peers.Poisson(z[:, None]).log_prob(COUNTS).sum(1)
        return likelihood + peers.Gamma(prior.shape, prior.rate).log_prob(z)

    peer = peers.Gamma(posterior.shape, posterior.rate)
    return prior, posterior, evidence, log_joint, peer, (0.0, math.inf), bayes.kl_gamma


PAIRS = {"normal": normal_pair, "beta": beta_pair, "gamma": gamma_pair}
# exponentially convergent integrals of 2000 nodes; a sum of terms of size up to 100
ROOM = 1e-11


@pytest.mark.parametrize("name", PAIRS)
def test_posterior_and_evidence(name):
    _, _, evidence, log_joint, peer, support, _ = PAIRS[name]()
    assert abs(float(bayes.log_evidence(log_joint, *support) - evidence)) <= ROOM
    # SciPy's adaptive rule over the bulk of the posterior, where all the evidence is
    low = max(float(peer.mean - 12 * peer.stddev), support[0])
    high = min(float(peer.mean + 30 * peer.stddev), support[1])
    value, _ = scipy.integrate.quad(
        lambda z: math.exp(float(log_joint(number(z)[None])) - float(evidence)), low, high,
        epsabs=1e-12, epsrel=1e-12,
    )  # fmt: skip
    assert abs(value - 1) <= 1e-9
    # Bayes' rule at any point
    z = peer.mean + peer.stddev * torch.tensor([-0.7, 0.0, 0.4, 1.5], dtype=F64)
    assert float((log_joint(z) - evidence - peer.log_prob(z)).abs().max()) <= 1e3 * EPS


@pytest.mark.parametrize("name", PAIRS)
def test_evidence_is_elbo_plus_divergence(name):
    """For q the prior, the posterior, and one between; the divergence by its closed form."""
    prior, posterior, evidence, log_joint, _, support, divergence = PAIRS[name]()
    family = {"normal": lambda m, v: peers.Normal(m, v.sqrt()), "beta": peers.Beta,
              "gamma": peers.Gamma}[name]  # fmt: skip
    between = type(prior)(*[(a + b) / 2 for a, b in zip(prior, posterior, strict=True)])
    for q in (prior, between, posterior):
        bound = float(bayes.elbo(log_joint, family(*q).log_prob, *support))
        gap = float(divergence(q, posterior))
        assert abs(bound + gap - float(evidence)) <= ROOM
        if q is posterior:
            assert abs(gap) <= 16 * EPS
        else:
            assert gap > 0.01
            assert bound < float(evidence) - 0.01


@pytest.mark.parametrize("name", PAIRS)
def test_divergences_are_those_of_torch_and_of_an_integral(name):
    prior, posterior, _, _, _, support, divergence = PAIRS[name]()
    family = {"normal": lambda m, v: peers.Normal(m, v.sqrt()), "beta": peers.Beta,
              "gamma": peers.Gamma}[name]  # fmt: skip
    for q, p in ((prior, posterior), (posterior, prior)):
        got = float(divergence(q, p))
        want = float(peers.kl_divergence(family(*q), family(*p)))
        # digamma and lgamma of about 20
        assert abs(got - want) <= 1e3 * EPS * (1 + want)
        integral = bayes.kl(family(*q).log_prob, family(*p).log_prob, *support)
        assert abs(float(integral) - want) <= ROOM * (1 + want)
    # not symmetric
    assert abs(float(divergence(prior, posterior) - divergence(posterior, prior))) > 0.1


def test_updates_one_by_one_are_the_update_at_once():
    """Today's posterior is tomorrow's prior, and the evidences multiply: p(x) p(y | x)."""
    whole, evidence = bayes.update_normal(bayes.Normal(number(1.0), number(2.0)), X, 0.3)
    belief, total = bayes.Normal(number(1.0), number(2.0)), number(0.0)
    for x in X:
        belief, step = bayes.update_normal(belief, x[None], 0.3)
        total = total + step
    assert abs(float(belief.mean - whole.mean)) <= 16 * EPS
    assert abs(float(belief.variance - whole.variance)) <= 16 * EPS
    assert abs(float(total - evidence)) <= 64 * EPS

    counts, evidence = bayes.update_poisson(bayes.Gamma(number(1.5), number(0.7)), COUNTS)
    rate, total = bayes.Gamma(number(1.5), number(0.7)), number(0.0)
    for x in COUNTS:
        rate, step = bayes.update_poisson(rate, x[None])
        total = total + step
    assert tuple(map(float, rate)) == pytest.approx(tuple(map(float, counts)), abs=16 * EPS)
    assert abs(float(total - evidence)) <= 256 * EPS
    # one count: a negative binomial, as SciPy has it
    _, step = bayes.update_poisson(bayes.Gamma(number(1.5), number(0.7)), COUNTS[2:3])
    want = scipy.stats.nbinom.logpmf(7, 1.5, 0.7 / 1.7)
    assert abs(float(step) - want) <= 64 * EPS


def test_evidence_of_the_normal_is_the_dense_gaussian():
    prior = bayes.Normal(number(-0.5), number(0.8))
    covariance = 0.3 * torch.eye(4, dtype=F64) + 0.8
    want = peers.MultivariateNormal(torch.full((4,), -0.5, dtype=F64), covariance).log_prob(X)
    _, got = bayes.update_normal(prior, X, 0.3)
    assert abs(float(got - want)) <= 64 * EPS * abs(float(want))
    # a batch of problems, each with its prior and its noise
    many = bayes.Normal(torch.tensor([-0.5, 3.0], dtype=F64), torch.tensor([0.8, 5.0], dtype=F64))
    noise = torch.tensor([0.3, 2.0], dtype=F64)
    posterior, each = bayes.update_normal(many, X.expand(2, 4), noise)
    single, other = bayes.update_normal(bayes.Normal(number(3.0), number(5.0)), X, 2.0)
    assert abs(float(each[0] - got)) <= 16 * EPS
    assert abs(float(each[1] - other)) <= 16 * EPS
    assert abs(float(posterior.mean[1] - single.mean)) <= 4 * EPS


def test_posterior_of_one_image_is_the_denoiser():
    """x = alpha x0 + sigma n tells of x0 what x / alpha with noise sigma / alpha does."""
    alpha, sigma, x = 0.8, 0.6, torch.tensor([[1.3]], dtype=F64)
    mixture = GaussianMixture(
        torch.ones(1, dtype=F64), number(-0.5).view(1, 1), number(0.8).view(1, 1)
    )
    posterior, _ = bayes.update_normal(
        bayes.Normal(number(-0.5), number(0.8)), x[0] / alpha, (sigma / alpha) ** 2
    )
    want = float(mixture.denoise(x, alpha, sigma))
    assert abs(float(posterior.mean) - want) <= 16 * EPS


def test_categorical():
    prior = bayes.Dirichlet(torch.tensor([0.5, 2.0, 1.0], dtype=F64))
    counts = torch.tensor([4.0, 0.0, 3.0], dtype=F64)
    posterior, evidence = bayes.update_categorical(prior, counts)
    assert torch.equal(posterior.a, prior.a + counts)
    # the chance of the sequence, predicted one by one from what was seen (Polya's urn)
    urn, want = prior.a.clone(), 0.0
    for k in (0, 2, 2, 0, 0, 2, 0):
        want += math.log(float(urn[k] / urn.sum()))
        urn[k] += 1
    assert abs(float(evidence) - want) <= 64 * EPS
    # SciPy counts the orders too
    orders = math.lgamma(8) - math.lgamma(5) - math.lgamma(4)
    want = scipy.stats.dirichlet_multinomial.logpmf([4, 0, 3], prior.a.numpy(), 7)
    assert abs(float(evidence) + orders - want) <= 64 * EPS
    # the divergence, and two values as a Beta
    want = peers.kl_divergence(peers.Dirichlet(prior.a), peers.Dirichlet(posterior.a))
    assert abs(float(bayes.kl_dirichlet(prior, posterior) - want)) <= 64 * EPS
    two, of_two = bayes.update_categorical(
        bayes.Dirichlet(torch.tensor([2.0, 3.5], dtype=F64)), torch.tensor([7.0, 2.0], dtype=F64)
    )
    beta, of_beta = bayes.update_bernoulli(
        bayes.Beta(number(2.0), number(3.5)), number(7.0), number(2.0)
    )
    assert (float(beta.a), float(beta.b)) == tuple(two.a.tolist())
    assert abs(float(of_two - of_beta)) <= 16 * EPS


def test_quadrature():
    cases = [
        ((-1.0, 3.0), lambda z: z**4, (3**5 + 1) / 5),
        ((0.0, 1.0), lambda z: z**0.5, 2 / 3),  # infinite slope at an end
        ((0.0, math.inf), lambda z: z**2.5 * torch.exp(-z), math.gamma(3.5)),
        ((-math.inf, math.inf), lambda z: 1 / (1 + z * z), math.pi),  # heavy tails
        ((-math.inf, 2.0), lambda z: torch.exp(z - 2) * (2 - z), 1.0),
    ]
    for (low, high), f, want in cases:
        z, weights = bayes.quadrature(low, high)
        assert bool(((z >= low) & (z <= high)).all())
        assert abs(float(weights @ f(z)) - want) <= 1e-12 * want


@pytest.mark.parametrize("low, high, n", [(1.0, 1.0, 10), (0.0, 1.0, 1), (math.nan, 1.0, 9)])
def test_quadrature_refuses(low, high, n):
    with pytest.raises(ValueError, match="quadrature: low must be below high and n at least 2"):
        bayes.quadrature(low, high, n)
