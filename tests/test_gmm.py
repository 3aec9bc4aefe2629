"""The Gaussian mixture against torch.distributions, autograd, quadrature and itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import fastdiff
from fastdiff import schedules, solvers
from fastdiff.reference import gmm
from fastdiff.reference.gmm import GaussianMixture

D, K = 3, 4
F64 = torch.float64
LEVELS = [
    (1.0, 0.0, "clean data"),
    (1.0, 5.0, "variance exploding"),
    (0.6, 0.8, "variance preserving"),
    (0.0, 1.0, "pure noise"),
]
EXACT = {"rtol": 0.0, "atol": 1e-12}


def mixture(covariance: str, dim: int = D) -> GaussianMixture:
    rng = torch.Generator().manual_seed(1)
    weights = torch.rand(K, dtype=F64, generator=rng) + 0.2
    means = torch.randn(K, dim, dtype=F64, generator=rng)
    root = torch.randn(K, dim, dim, dtype=F64, generator=rng)
    covariances = {
        "full": root @ root.mT / 3 + 0.1 * torch.eye(dim, dtype=F64),
        "diagonal": root[:, 0].square() + 0.1,
        "isotropic": root[:, 0, 0].square() + 0.1,
    }[covariance]
    return GaussianMixture(weights / weights.sum(), means, covariances)


def by_torch(m: GaussianMixture, alpha: float, sigma: float) -> MixtureSameFamily:
    c = m.covariances
    if c.dim() < 3:
        c = torch.diag_embed(c.view(K, -1).expand(K, m.dim))
    noised = alpha**2 * c + sigma**2 * torch.eye(m.dim, dtype=F64)
    return MixtureSameFamily(Categorical(m.weights), MultivariateNormal(alpha * m.means, noised))


def points(dim: int = D) -> torch.Tensor:
    return 2 * torch.randn(5, 7, dim, dtype=F64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("covariance", gmm.COVARIANCES)
@pytest.mark.parametrize(("alpha", "sigma", "reason"), LEVELS)
def test_density_and_responsibilities(covariance, alpha, sigma, reason):
    m, x = mixture(covariance), points()
    other = by_torch(m, alpha, sigma)
    torch.testing.assert_close(m.log_prob(x, alpha, sigma), other.log_prob(x), **EXACT)
    each = other.component_distribution.log_prob(x.unsqueeze(-2)) + m.weights.log()
    bayes = (each - other.log_prob(x).unsqueeze(-1)).exp()
    torch.testing.assert_close(m.responsibilities(x, alpha, sigma), bayes, **EXACT)


@pytest.mark.parametrize("covariance", gmm.COVARIANCES)
@pytest.mark.parametrize(("alpha", "sigma", "reason"), LEVELS)
def test_score_is_the_gradient(covariance, alpha, sigma, reason):
    m, x = mixture(covariance), points().requires_grad_()
    (gradient,) = torch.autograd.grad(by_torch(m, alpha, sigma).log_prob(x).sum(), x)
    torch.testing.assert_close(m.score(x, alpha, sigma), gradient, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(m.epsilon(x, alpha, sigma), -sigma * gradient, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("covariance", gmm.COVARIANCES)
@pytest.mark.parametrize(("alpha", "sigma", "reason"), LEVELS)
def test_x0_and_noise_add_up(covariance, alpha, sigma, reason):
    """alpha E[x0 | x] + sigma E[n | x] = x; the two are computed by separate formulas."""
    m, x = mixture(covariance), points()
    total = alpha * m.denoise(x, alpha, sigma) + sigma * m.epsilon(x, alpha, sigma)
    torch.testing.assert_close(total, x, **EXACT)
    if alpha == 0:
        mean = (m.weights[:, None] * m.means).sum(0).expand_as(x)
        torch.testing.assert_close(m.denoise(x, alpha, sigma), mean, **EXACT)


@pytest.mark.parametrize(("alpha", "sigma", "reason"), LEVELS[1:])
def test_posterior_mean_by_quadrature(alpha, sigma, reason):
    """Bayes' rule by number: integral of x0 p(x0) N(x; alpha x0, sigma^2) over that of the rest."""
    m = mixture("diagonal", dim=1)
    w, mu, var = (t.numpy().ravel() for t in (m.weights, m.means, m.covariances))

    def joint(x0: float, x: float) -> float:
        prior = (w / np.sqrt(2 * math.pi * var) * np.exp(-((x0 - mu) ** 2) / (2 * var))).sum()
        return float(prior * math.exp(-((x - alpha * x0) ** 2) / (2 * sigma**2)))

    for x in (-2.5, 0.3, 4.0):
        options = {"epsabs": 0.0, "epsrel": 1e-11, "limit": 400, "points": [-2.0, 0.0, 2.0]}
        top = quad(lambda x0, x=x: x0 * joint(x0, x), -15, 15, **options)[0]
        bottom = quad(joint, -15, 15, args=(x,), **options)[0]
        got = float(m.denoise(torch.tensor([x], dtype=F64), alpha, sigma))
        assert abs(got - top / bottom) < 1e-9


def test_scales_may_differ_by_point():
    m, x = mixture("full"), points()[0]
    alpha, sigma = torch.linspace(0, 1, 7, dtype=F64), torch.linspace(2, 0.1, 7, dtype=F64)
    for what in (m.log_prob, m.responsibilities, m.score, m.epsilon, m.denoise):
        one_by_one = [what(x[i], float(alpha[i]), float(sigma[i])) for i in range(7)]
        torch.testing.assert_close(what(x, alpha, sigma), torch.stack(one_by_one), **EXACT)


@pytest.mark.parametrize("covariance", gmm.COVARIANCES)
def test_samples_have_the_moments(covariance):
    """Mean and second moments within five standard errors."""
    m, n = mixture(covariance), 200_000
    x = m.sample(n, torch.Generator().manual_seed(3))
    other = by_torch(m, 1.0, 0.0)
    assert bool(((x.mean(0) - other.mean).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    product = x[:, :, None] * x[:, None, :]
    full = other.component_distribution.covariance_matrix
    second = full + m.means[:, :, None] * m.means[:, None, :]
    want = (m.weights[:, None, None] * second).sum(0)
    assert bool(((product.mean(0) - want).abs() < 5 * product.std(0) / math.sqrt(n)).all())


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(schedules.linear(), p) for p in ("epsilon", "sample", "v_prediction")]
    + [(schedules.flow(), p) for p in ("sample", "flow")]
    + [(schedules.edm(), p) for p in ("epsilon", "sample", "edm")],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_network_leads_the_sampler_to_the_data(schedule, prediction):
    """Every prediction takes the same noise to the same points, at likely places of the data."""
    m = GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=F64),
        torch.tensor([[-1.0, 0.5, 0.0, 0.2], [0.8, -0.2, 0.4, -0.6]], dtype=F64),
        torch.tensor([0.04, 0.09], dtype=F64),
    )
    ends = []
    for p in dict.fromkeys(("sample", prediction)):
        table = solvers.build("heun", schedule, 60, prediction=p)
        sampler = fastdiff.Sampler(m.network(schedule, p), table)
        ends.append(sampler((1, 2, 2), seeds=list(range(400))).flatten(1).double())
    size = float(ends[0].abs().max())
    for row_error in (ends[0] - ends[-1]).abs().max(dim=1).values:
        assert row_error < 2e-4 * size  # float32 over the steps; a wrong formula is off by size
    # the mean log density of the data is its negative entropy; five standard errors either side
    want = m.log_prob(m.sample(100_000, torch.Generator().manual_seed(4)))
    got = m.log_prob(ends[-1])
    assert abs(float(got.mean() - want.mean())) < 5 * float(want.std()) / math.sqrt(400) + 0.05


# --- EM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", gmm.COVARIANCES)
@pytest.mark.parametrize("seed", [0, 1, 2])  # starts, some of them bad
def test_elbo_never_falls(covariance, seed):
    x = mixture("full").sample(500, torch.Generator().manual_seed(5))
    m, bounds = gmm.fit(
        x, K, steps=60, covariance=covariance, generator=torch.Generator().manual_seed(seed)
    )
    assert bounds.shape == (120,)
    assert float(bounds.diff().min()) > -1e-12
    assert float(bounds[-1] - bounds[0]) > 0.1
    # the E step makes the bound tight
    q = m.responsibilities(x)
    torch.testing.assert_close(gmm.elbo(m, x, q), m.log_prob(x).mean(), **EXACT)
    other = torch.full_like(q, 1 / K)
    gap = (other * (other / q).log()).sum(-1).mean()
    torch.testing.assert_close(gmm.elbo(m, x, other), m.log_prob(x).mean() - gap, **EXACT)


def test_elbo_never_falls_at_the_bound():
    """More components than distinct points: every one collapses onto the least variance."""
    x = torch.tensor([[0.0, 1.0], [2.0, 2.0], [5.0, -1.0]], dtype=F64).repeat(4, 1)
    for covariance in gmm.COVARIANCES:
        m, bounds = gmm.fit(x, 4, steps=40, covariance=covariance, min_variance=1e-3)
        assert float(bounds.diff().min()) > -1e-11
        assert float(m._spectrum.min()) > 0.999e-3 and float(m._spectrum.min()) < 1.001e-3


@pytest.mark.parametrize("covariance", gmm.COVARIANCES)
def test_em_recovers_the_mixture(covariance):
    truth = GaussianMixture(
        torch.tensor([0.2, 0.5, 0.3], dtype=F64),
        torch.tensor([[-4.0, 0.0], [0.0, 3.0], [4.0, -1.0]], dtype=F64),
        torch.tensor([0.3, 0.6, 0.4], dtype=F64),
    )
    n = 20_000
    x = truth.sample(n, torch.Generator().manual_seed(6))
    m, _ = gmm.fit(x, 3, covariance=covariance, generator=torch.Generator().manual_seed(0))
    order = m.means[:, 0].argsort()
    error = 5 / math.sqrt(0.2 * n)  # five standard errors, in units of a deviation, at most
    assert float((m.weights[order] - truth.weights).abs().max()) < error * 0.5
    assert float((m.means[order] - truth.means).abs().max()) < error
    full = torch.diag_embed(truth.covariances[:, None].expand(3, 2))
    got = m.covariances[order]
    if got.dim() < 3:
        got = torch.diag_embed(got.view(3, -1).expand(3, 2))
    assert float((got - full).abs().max()) < error
    # and no mixture is likelier on its own points than the maximum
    assert float(m.log_prob(x).mean()) > float(truth.log_prob(x).mean())


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "words"),
    [
        ([1.0], [[0.0, 1.0]], [[1.0]], "covariances must be"),
        ([0.5], [0.0], [1.0], "weights and means must be"),
        ([0.5, 0.4], [[0.0], [1.0]], [1.0, 1.0], "of sum 1"),
        ([1.0], [[0.0, 1.0]], [[[1.0, 2.0], [2.0, 1.0]]], "positive definite"),
    ],
)
def test_refuses(weights, means, covariances, words):
    parts = (torch.tensor(v, dtype=F64) for v in (weights, means, covariances))
    with pytest.raises(ValueError, match=words):
        GaussianMixture(*parts)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"covariance": "tied"}, "covariance must"), ({"k": 9}, "N >= k"), ({"steps": 0}, "positive")],
)
def test_fit_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        gmm.fit(torch.zeros(5, 2), **{"k": 2, **options})
