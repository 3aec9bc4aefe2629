"""The reference VAE: the bound it computes is the bound, and training raises it.

A linear decoder with Gaussian noise has a Gaussian evidence and a Gaussian posterior, so ELBO,
log p(x) and the gap between them are known in closed form. Where the decoder's columns are
orthogonal the posterior is diagonal, and q can be the posterior itself: the gap is then 0.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn

from fastdiff.ops import randn, reparameterize
from fastdiff.reference.vae import VAE, ConvDecoder, ConvEncoder, Decoder, Encoder

D, L, SCALE = 5, 2, 0.7
DRAWS = 20000
SIGMAS = 5.0  # two-sided; random noise would fail a right implementation once in 1.7 million


class Fixed(nn.Module):
    """q(z|x) = N(gain (x - offset), exp(logvar)), whatever the gain: right or wrong on purpose."""

    def __init__(self, gain: Tensor, offset: Tensor, logvar: Tensor) -> None:
        super().__init__()
        self.gain, self.offset, self.logvar = gain, offset, logvar

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = (x - self.offset) @ self.gain.T
        return mu, self.logvar.expand_as(mu).contiguous()


class Linear(nn.Module):
    def __init__(self, weight: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.weight, self.offset = weight, offset

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.offset


class Problem:
    """x = W z + b + SCALE n, with its evidence and its posterior, in float64."""

    def __init__(self) -> None:
        drawn = randn([1, 2, 3], (D, L)).double()
        self.weight = torch.linalg.qr(drawn[0])[0] * torch.tensor([1.5, 0.6])
        self.offset = drawn[1][:, 0]
        self.x = 2 * drawn[2].T.contiguous()  # two data points
        eye = torch.eye(D, dtype=torch.float64)
        self.evidence = torch.distributions.MultivariateNormal(
            self.offset, self.weight @ self.weight.T + SCALE**2 * eye
        )
        # precision of p(z|x) = I + W'W / SCALE^2, diagonal as the columns are orthogonal
        precision = 1 + (self.weight**2).sum(0) / SCALE**2
        self.gain = (self.weight / SCALE**2 / precision).T
        self.logvar = -precision.log()

    def vae(self, gain: Tensor, logvar: Tensor) -> VAE:
        encoder = Fixed(gain, self.offset, logvar)
        return VAE(encoder, Linear(self.weight, self.offset), "gaussian", SCALE)

    def exact_elbo(self, vae: VAE) -> Tensor:
        """E_q log p(x|z) by the moments of a quadratic form, less the divergence."""
        mu, logvar = vae.encoder(self.x)
        residual = ((self.x - vae.decoder(mu)) ** 2).sum(1)
        spread = ((self.weight**2).sum(0) * logvar.exp()).sum(1)
        constant = D * (math.log(SCALE) + 0.5 * math.log(2 * math.pi))
        expected = -0.5 * (residual + spread) / SCALE**2 - constant
        q = torch.distributions.Normal(mu, (logvar / 2).exp())
        prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
        return expected - torch.distributions.kl_divergence(q, prior).sum(1)

    def posterior_gap(self, vae: VAE) -> Tensor:
        """KL(q(z|x) || p(z|x))."""
        mu, logvar = vae.encoder(self.x)
        q = torch.distributions.Normal(mu, (logvar / 2).exp())
        mean = (self.x - self.offset) @ self.gain.T
        p = torch.distributions.Normal(mean, (self.logvar / 2).exp().expand_as(mean))
        return torch.distributions.kl_divergence(q, p).sum(1)


def _encoders() -> dict[str, VAE]:
    p = Problem()
    return {
        "posterior": p.vae(p.gain, p.logvar),
        "mean off": p.vae(0.5 * p.gain, p.logvar),
        "too wide": p.vae(p.gain, p.logvar + 1),
        "prior": p.vae(torch.zeros_like(p.gain), torch.zeros_like(p.logvar)),
    }


@pytest.mark.parametrize("name", _encoders())
def test_elbo_has_the_expectation_of_the_closed_form(name: str) -> None:
    """The mean of many one-draw estimates, within 5 of its own standard errors."""
    p, vae = Problem(), _encoders()[name]
    exact = p.exact_elbo(vae)
    for i in (0, 1):
        draws = vae.elbo(p.x[i].expand(DRAWS, D), 1000)
        error = float(draws.std()) / math.sqrt(DRAWS)
        assert error > 0
        assert abs(float(draws.mean() - exact[i])) < SIGMAS * error


@pytest.mark.parametrize("name", _encoders())
def test_evidence_is_elbo_plus_the_divergence_from_the_posterior(name: str) -> None:
    p, vae = Problem(), _encoders()[name]
    exact, gap = p.exact_elbo(vae), p.posterior_gap(vae)
    log_p = p.evidence.log_prob(p.x)
    # some 30 float64 operations on numbers below 100: an error of 100 ulp would be a wrong formula
    room = 100 * torch.finfo(torch.float64).eps * log_p.abs()
    assert ((exact + gap - log_p).abs() < room).all()
    if name == "posterior":
        assert ((exact - log_p).abs() < room).all()
    else:
        assert (exact < log_p - 0.01).all()


def test_elbo_is_a_lower_bound_and_tight_at_the_posterior() -> None:
    """The estimate itself, not the closed form: below log p(x), by the right amount."""
    p = Problem()
    log_p = p.evidence.log_prob(p.x)
    for name, vae in _encoders().items():
        for i in (0, 1):
            draws = vae.elbo(p.x[i].expand(DRAWS, D), 5000)
            error = float(draws.std()) / math.sqrt(DRAWS)
            gap = float(log_p[i] - draws.mean())
            assert gap > -SIGMAS * error
            if name != "posterior":
                assert gap > SIGMAS * error, name


def test_bernoulli_likelihood_is_the_probability_of_the_pixels() -> None:
    vae = VAE(Encoder((3,), 2), Decoder((3,), 2))
    z = randn(range(8), (2,))
    x = torch.tensor([[i >> k & 1 for k in range(3)] for i in range(8)], dtype=torch.float32)
    each = torch.stack([vae.log_likelihood(x, one.expand(8, 2)).exp().sum() for one in z])
    # the probabilities of all images of 3 pixels: 8 exponentials and sums, a few ulp
    assert (each - 1).abs().max() < 16 * torch.finfo(torch.float32).eps
    p = vae.decode(z)
    assert_same_bits(p, vae.decoder(z).sigmoid())


def test_discretized_likelihood_is_the_probability_of_the_levels() -> None:
    vae = VAE(Encoder((2,), 2), Decoder((2,), 2), "discretized_logistic", 0.4, bins=4)
    z, levels = randn(range(8), (2,)), torch.linspace(-1, 1, 4)
    x = torch.cartesian_prod(levels, levels)
    each = torch.stack([vae.log_likelihood(x, one.expand(16, 2)).exp() for one in z])
    # all images of 2 pixels and 4 levels: 16 exponentials of a few operations each
    assert (each.sum(1) - 1).abs().max() < 32 * torch.finfo(torch.float32).eps
    # a level between the ends, by the difference of CDFs as it is defined
    y = vae.decoder(z)
    cdf = [torch.sigmoid((x[6] + side / 3 - y) / 0.4) for side in (1, -1)]
    room = 64 * torch.finfo(torch.float32).eps  # of two numbers up to 1, whose difference is small
    assert ((cdf[0] - cdf[1]).prod(1) - each[:, 6]).abs().max() < room
    assert_same_bits(vae.decode(z), y)


@pytest.mark.parametrize("scale", (1.0, 0.25))
def test_gaussian_likelihood_is_a_squared_error_summed_over_the_pixels(scale: float) -> None:
    """The network's view: a loss that averages over the pixels has chosen another scale."""
    vae = VAE(Encoder((6,), 2), Decoder((6,), 2), "gaussian", scale).double()
    x, z = randn(range(5), (6,)).double(), randn(range(5, 10), (2,)).double()
    error = (x - vae.decode(z)).square().mean(1)
    constant = 6 * math.log(scale * math.sqrt(2 * math.pi))
    got = vae.log_likelihood(x, z)
    want = -6 * error / (2 * scale**2) - constant
    assert ((got - want).abs() < 64 * torch.finfo(torch.float64).eps * want.abs().clamp(1)).all()


def test_weights_of_the_posterior_are_the_evidence_at_every_draw() -> None:
    """p(x, z) / p(z|x) = p(x), whatever z: the probability model's view without any variance."""
    p = Problem()
    vae = p.vae(p.gain, p.logvar)
    weights = vae.log_weights(p.x, 7, 50)
    log_p = p.evidence.log_prob(p.x)
    assert weights.shape == (2, 50)
    # some 50 operations on squares up to a few hundred
    room = 1e4 * torch.finfo(torch.float64).eps
    assert ((weights - log_p[:, None]).abs() < room).all()
    assert ((vae.iwae(p.x, 7, 50) - log_p).abs() < room).all()


@pytest.mark.parametrize("name", ("too wide", "prior"))
def test_importance_weighted_bound_rises_with_the_draws_to_the_evidence(name: str) -> None:
    p, vae = Problem(), _encoders()[name]
    log_p, exact = p.evidence.log_prob(p.x), p.exact_elbo(vae)
    weights = vae.log_weights(p.x, 7, DRAWS)
    for i in (0, 1):
        # one draw: the ELBO, whose closed form has the other view
        error = float(weights[i].std()) / math.sqrt(DRAWS)
        assert abs(float(weights[i].mean() - exact[i])) < SIGMAS * error
        # the weights are unbiased
        ratio = (weights[i] - log_p[i]).exp()
        error = float(ratio.std()) / math.sqrt(DRAWS)
        assert abs(float(ratio.mean()) - 1) < SIGMAS * error
        bounds = []
        for draws in (1, 4, 16, 64):
            x = p.x[i].expand(1000, D)
            each = vae.iwae(x, 1000, draws)
            bounds.append((float(each.mean()), float(each.std()) / math.sqrt(1000)))
        for (low, _), (high, error) in itertools.pairwise(bounds):
            assert high > low
            assert high < float(log_p[i]) + SIGMAS * error
        # each four times as many leave less of the gap
        gaps = [float(log_p[i]) - bound for bound, _ in bounds]
        assert gaps[3] < 0.2 * gaps[0]


def test_first_draw_of_the_weights_is_that_of_the_bound() -> None:
    p = Problem()
    vae = p.vae(0.5 * p.gain, p.logvar)
    mu, logvar = vae.encoder(p.x)
    z, kl = reparameterize(mu, logvar, 11, step=3)
    want = vae.log_likelihood(p.x, z)
    weight = vae.log_weights(p.x, 11, 1, step=3)[:, 0]
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    ratio = (prior.log_prob(z) - q.log_prob(z)).sum(1)
    room = 1e3 * torch.finfo(torch.float64).eps
    assert ((weight - want - ratio).abs() < room * (1 + want.abs())).all()
    # more draws begin with the same ones
    more = vae.log_weights(p.x, [11, 12], 5, step=3)
    assert ((more[:, 0] - weight).abs() < room * (1 + weight.abs())).all()
    # the two views differ draw by draw, and the loss weighs the divergence of the network's
    assert not (kl == -ratio).any()
    for beta in (0.0, 1.0, 4.0):
        loss = vae.loss(p.x, 11, step=3, beta=beta)
        assert ((loss - (beta * kl - want)).abs() < room * (1 + want.abs())).all()
    assert_same_bits(vae.loss(p.x, 11), -vae.elbo(p.x, 11))


@pytest.mark.parametrize("likelihood", ("bernoulli", "gaussian", "discretized_logistic"))
def test_shapes(likelihood: str) -> None:
    x = randn(range(3), (1, 8, 8)).sigmoid()
    for vae, latent in (
        (VAE(Encoder((1, 8, 8), 4, 16), Decoder((1, 8, 8), 4, 16), likelihood), (4,)),
        (VAE(ConvEncoder(1, 4, 8), ConvDecoder(1, 4, 8), likelihood), (4, 2, 2)),
    ):
        mu, logvar = vae.encoder(x)
        assert mu.shape == logvar.shape == (3, *latent)
        log_likelihood, kl = vae.terms(x, 0)
        assert log_likelihood.shape == kl.shape == (3,)
        assert_same_bits(vae.elbo(x, 0), log_likelihood - kl)
        assert (kl >= 0).all()
        if likelihood != "gaussian":
            assert (log_likelihood <= 0).all()
        assert vae.sample([1, 2], latent).shape == (2, 1, 8, 8)
        vae.elbo(x, 0).sum().backward()
        assert all(w.grad is not None and w.grad.any() for w in vae.parameters())


def _train(seed: int, steps: int = 100) -> tuple[VAE, list[float]]:
    torch.manual_seed(seed)
    vae = VAE(Encoder((1, 8, 8), 4, 32), Decoder((1, 8, 8), 4, 32))
    # images of one bright row or column: 16 kinds, as many nats as a code of 4 can carry
    kinds = torch.zeros(16, 1, 8, 8)
    for k in range(8):
        kinds[k, 0, k], kinds[8 + k, 0, :, k] = 1, 1
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = -vae.elbo(kinds, 0, step=step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return vae, losses


def test_training_raises_the_bound_and_is_determined_by_its_seeds() -> None:
    vae, losses = _train(0)
    # untrained, each of the 64 pixels costs about ln 2 nats; a model without a code pays at best
    # the entropy of a pixel lit 1 time in 8, so what is below that went through the latents
    without_code = -64 * (math.log(1 / 8) / 8 + 7 * math.log(7 / 8) / 8)
    assert losses[0] > 40
    assert sum(losses[-10:]) / 10 < without_code
    again, other_losses = _train(0)
    assert losses == other_losses
    for a, b in zip(vae.parameters(), again.parameters(), strict=True):
        assert_same_bits(a, b)


def test_the_draw_depends_on_seed_and_step_and_on_nothing_else() -> None:
    vae, _ = _train(1, steps=2)
    x = randn(range(4), (1, 8, 8)).sigmoid()
    with torch.no_grad():
        first = vae.terms(x, 3)[0]
        assert_same_bits(vae.terms(x, [3, 4, 5, 6])[0], first)
        assert not (vae.terms(x, 3, step=1)[0] == first).any()
        assert not (vae.terms(x, 100)[0] == first).any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="VAE: likelihood must be one of bernoulli, gaussian"):
        VAE(nn.Identity(), nn.Identity(), "poisson")
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="VAE: scale must be positive"):
            VAE(nn.Identity(), nn.Identity(), "gaussian", scale)
    with pytest.raises(ValueError, match="VAE: bins must be at least 2, got 1"):
        VAE(nn.Identity(), nn.Identity(), "discretized_logistic", bins=1)
    with pytest.raises(ValueError, match="VAE: draws must be positive, got 0"):
        VAE(Encoder((3,), 2), Decoder((3,), 2)).iwae(torch.zeros(1, 3), 0, 0)
    with pytest.raises(ValueError, match="VAE: x must have the shape of the decoder's output"):
        VAE(Encoder((3,), 2), Decoder((4,), 2)).elbo(torch.zeros(1, 3), 0)
