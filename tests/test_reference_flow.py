"""Flows against densities in closed form, and flow matching against exact expectations."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import LogNormal, MultivariateNormal, Normal

from fastdiff import randn, schedules
from fastdiff.reference import flow
from fastdiff.reference.gmm import GaussianMixture

F64 = torch.float64
EPS = torch.finfo(F64).eps


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, with weights that bend space well."""
    module = module.double()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for w in module.parameters():
            w.add_(0.3 * torch.randn(w.shape, dtype=F64, generator=draw))
    return module


def test_change_of_variables():
    x = drawn(7, 3).exp()
    # log x is normal
    want = LogNormal(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)).log_prob(x).sum(1)
    assert float((flow.change_of_variables(torch.log, x) - want).abs().max()) <= 64 * EPS
    # L z + m is normal with covariance L L^T, and f its inverse
    lower = torch.tensor([[1.5, 0.0, 0.0], [0.4, 0.2, 0.0], [-1.0, 0.3, 2.0]], dtype=F64)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    got = flow.change_of_variables(lambda x: torch.linalg.solve(lower, (x - mean).T).T, x)
    want = MultivariateNormal(mean, scale_tril=lower).log_prob(x)
    # a condition of about 20, squares of up to 1000
    assert bool(((got - want).abs() <= 1e3 * EPS * want.abs()).all())


def test_coupling_has_the_determinant_of_its_jacobian():
    layer = perturbed(flow.AffineCoupling(torch.tensor([True, False, True, False, False]), 16))
    x = drawn(6, 5)
    with torch.no_grad():
        z, log_det = layer(x)
    assert torch.equal(z[:, [0, 2]], x[:, [0, 2]])
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: layer(one[None])[0][0]))(x).detach()
    assert bool((jacobian[:, 0, 1:] == 0).all())  # what is kept depends on nothing else
    want = torch.linalg.slogdet(jacobian).logabsdet
    assert float((log_det - want).abs().max()) <= 256 * EPS
    assert float(log_det.abs().min()) > 1e-3
    with torch.no_grad():
        again = layer.inverse(z)
    assert float((again - x).abs().max()) <= 256 * EPS * float(z.abs().max() + 1)


def test_realnvp_is_a_density():
    model = perturbed(flow.RealNVP(2, 4, 8))
    line = torch.linspace(-25, 25, 601, dtype=F64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        density = model.log_prob(grid).exp()
        # the trapezoidal rule on a smooth density whose narrowest width is several steps
        assert abs(float(density.sum()) * float(line[1] - line[0]) ** 2 - 1) <= 1e-4
        x = grid[::7919]
        got, (z, _) = model.log_prob(x), model(x)
        assert float((model.inverse(z) - x).abs().max()) <= 1e-9
        want = flow.change_of_variables(lambda x: model(x)[0], x)
        assert bool(((got - want).abs() <= 1e-12 * want.abs().clamp(min=1)).all())
        z, _ = model(model.sample([3, 4, 5]))
        assert float((z - randn([3, 4, 5], (2,), dtype=F64)).abs().max()) <= 1e-9


def test_realnvp_learns_a_bent_density():
    """x_2 = x_1^2 + noise: no Gaussian, but a shift by a function of the other coordinate."""

    def data(n: int, seed: int) -> torch.Tensor:
        z = drawn(n, 2, seed=seed).float()
        return torch.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1]], 1)

    torch.manual_seed(0)
    model = flow.RealNVP(2, 4, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(300):
        loss = -model.log_prob(data(256, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = data(20000, 10**6)
    with torch.no_grad():
        got = model.log_prob(x)
    true = Normal(0.0, 1.0).log_prob(x[:, 0]) + Normal(x[:, 0] ** 2, 0.3).log_prob(x[:, 1])
    gap = true - got
    # no model beats the truth on the average, but for the chance of the draw
    assert float(gap.mean()) > -5 * float(gap.std()) / math.sqrt(len(x))
    assert float(gap.mean()) < 0.2
    normal = MultivariateNormal(x.mean(0), torch.cov(x.T))
    assert float((true - normal.log_prob(x)).mean()) > 1.0


MEAN, SCALE = torch.tensor([0.7, -2.0, 0.0], dtype=F64), torch.tensor([0.3, 1.7, 1.0], dtype=F64)


def test_velocity_of_a_gaussian_is_that_of_a_mixture_of_one():
    mixture = GaussianMixture(torch.ones(1, dtype=F64), MEAN[None], SCALE.square()[None])
    network = mixture.network(schedules.flow(), "flow")
    x, t = 2 * drawn(5, 3), torch.tensor([0.0, 0.01, 0.5, 0.9, 1.0], dtype=F64)
    got = flow.gaussian_velocity(x, t, MEAN, SCALE)
    want = network(x, t)
    assert float((got - want).abs().max()) <= 64 * EPS * float(want.abs().max())
    # at the data's end the noise says nothing of x, and at the other the data do not
    assert float((got[0] + x[0]).abs().max()) <= 16 * EPS * float(x[0].abs().max() + 2)
    assert float((got[4] - (x[4] - MEAN)).abs().max()) <= 16 * EPS * float(x[4].abs().max() + 2)


def gaussian_flow(steps: int) -> flow.ContinuousFlow:
    return flow.ContinuousFlow(lambda x, t: flow.gaussian_velocity(x, t, MEAN, SCALE), steps)


def test_continuous_flow_of_a_gaussian_is_exact_and_of_order_four():
    x = MEAN + 1.5 * SCALE * drawn(9, 3)
    want = Normal(MEAN, SCALE).log_prob(x).sum(1)
    errors = {}
    for steps in (40, 80):
        model = gaussian_flow(steps)
        with torch.no_grad():
            errors[steps] = float((model.log_prob(x) - want).abs().max())
            # the distance from the mean scales with the spread: to a unit normal at t = 1
            z = model.encode(x)
            assert float((z - (x - MEAN) / SCALE).abs().max()) <= 1e-4
            assert float((model.decode(z) - x).abs().max()) <= 1e-4
            assert not model.log_prob(x).requires_grad
    assert errors[80] <= 1e-6
    assert 3.5 <= math.log2(errors[40] / errors[80]) <= 5


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.5, 0.5, 0.0], [1.0, 1.0, -1.0]], dtype=F64)
    root = torch.tensor([[0.6, 0.2, 0.0], [0.0, 0.5, 0.1], [0.3, 0.0, 0.7]], dtype=F64)
    covariances = torch.stack([root @ root.T, torch.eye(3, dtype=F64) * 0.25])
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=F64), means, covariances)


def test_continuous_flow_has_the_density_of_a_mixture():
    """The exact velocity carries a mixture to N(0, I): the likelihood must be the mixture's."""
    data = mixture()
    model = flow.ContinuousFlow(data.network(schedules.flow(), "flow"), 64)
    x = data.means.repeat(3, 1) + 0.5 * drawn(6, 3)
    with torch.no_grad():
        exact = model.log_prob(x)
        # what the method of order 4 leaves with this number of steps
        assert float((exact - data.log_prob(x)).abs().max()) <= 1e-5
        # over all sign vectors, Hutchinson's estimate has the trace as its mean, without error
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=F64)
        each = model.log_prob(x.repeat(8, 1), signs.repeat_interleave(6, 0)).view(8, 6)
    assert float((each.mean(0) - exact).abs().max()) <= 1e-12
    assert float(each.std(0).min()) > 1e-3


def test_a_gradient_flows_through_the_likelihood():
    """d log N(x; m, s) / dm = (x - m) / s^2, by way of every step of the ODE."""
    mean, scale = MEAN.clone().requires_grad_(), SCALE.clone().requires_grad_()
    x = MEAN + SCALE * torch.tensor([[0.5, -1.0, 2.0]], dtype=F64)
    model = flow.ContinuousFlow(lambda y, t: flow.gaussian_velocity(y, t, mean, scale), 80)
    of_mean, of_scale = torch.autograd.grad(model.log_prob(x).sum(), (mean, scale))
    z = (x[0] - MEAN) / SCALE
    assert float((of_mean - z / SCALE).abs().max()) <= 1e-4
    assert float((of_scale - (z * z - 1) / SCALE).abs().max()) <= 1e-4


def test_divergence_in_closed_form():
    def velocity(x, t):
        a, b = x[:, 0, 0], x[:, 1, 0]
        return torch.stack([a * a * b + t, torch.sin(a * b), a, b * b * b], 1).view_as(x)

    # image-shaped: (N, 4, 1), of which only the first two feel themselves
    x, t = drawn(5, 4, 1), torch.linspace(0, 1, 5, dtype=F64)
    v, got = flow.divergence(velocity, x, t)
    a, b = x[:, 0, 0], x[:, 1, 0]
    want, got = 2 * a * b + a * torch.cos(a * b), got.detach()
    assert v.shape == x.shape
    assert float((got - want).abs().max()) <= 32 * EPS * float(want.abs().max())
    # a velocity of the time alone has none
    probe = torch.ones_like(x)
    for v, none in (
        flow.divergence(lambda x, t: t.view(-1, 1, 1).expand_as(x), x, t),
        flow.hutchinson(lambda x, t: t.view(-1, 1, 1).expand_as(x), x, t, probe),
    ):
        assert v.shape == x.shape
        assert not none.any()


def test_signs_have_the_least_variance():
    matrix = drawn(4, 4)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=F64)
    x, t = torch.zeros(16, 4, dtype=F64), torch.zeros(16, dtype=F64)
    _, each = flow.hutchinson(lambda x, t: x @ matrix.T, x, t, signs)
    each = each.detach()
    symmetric = (matrix + matrix.T) / 2
    off = symmetric - torch.diag(symmetric.diagonal())
    assert abs(float(each.mean() - matrix.trace())) <= 64 * EPS
    assert abs(float(each.var(correction=0) - 2 * off.square().sum())) <= 256 * EPS
    # normal probes, over a product of quadrature nodes exact for their fourth moments
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    probes = torch.tensor(list(itertools.product(nodes, repeat=4)), dtype=F64)
    weight = torch.tensor([math.prod(w) for w in itertools.product(weights, repeat=4)], dtype=F64)
    weight = weight / weight.sum()
    x, t = torch.zeros(81, 4, dtype=F64), torch.zeros(81, dtype=F64)
    _, each = flow.hutchinson(lambda x, t: x @ matrix.T, x, t, probes)
    each = each.detach()
    mean = float(weight @ each)
    assert abs(mean - float(matrix.trace())) <= 256 * EPS
    variance = float(weight @ each.square()) - mean**2
    assert abs(variance - 2 * float(symmetric.square().sum())) <= 4096 * EPS


@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 1.0], ids=str)
def test_flow_matching_finds_the_conditional_mean(t):
    """E loss(v) = E loss(u) + E |v - u|^2, exactly, by quadrature over data and noise."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    node, weight = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    mean, scale = torch.tensor(0.7, dtype=F64), torch.tensor(0.4, dtype=F64)
    x0 = (mean + scale * node).repeat_interleave(3)[:, None]
    noise, weight = node.repeat(3)[:, None], torch.outer(weight, weight).flatten()
    time = torch.full((9,), t, dtype=F64)

    def best(x, time):
        return flow.gaussian_velocity(x, time, mean, scale)

    def other(x, time):
        return 0.8 * x + 0.3

    x = (1 - t) * x0 + t * noise
    away = float(weight @ (best(x, time) - other(x, time)).square()[:, 0])
    least = float(weight @ flow.flow_matching_loss(best, x0, noise, time))
    got = float(weight @ flow.flow_matching_loss(other, x0, noise, time))
    assert away > 0.01
    assert abs(got - least - away) <= 64 * EPS * (1 + got)
    # what is left is the variance of noise - x0 given x_t: that of data and of noise, less x_t's
    spread = (1 - t) ** 2 * 0.16 + t * t
    assert abs(least - (1.16 - (t - (1 - t) * 0.16) ** 2 / spread)) <= 64 * EPS


def test_flow_matching_loss_is_a_mean_over_elements():
    x0, noise = drawn(2, 3, 4, 4)
    x0, noise = x0[None].repeat(2, 1, 1, 1), noise[None].repeat(2, 1, 1, 1)
    loss = flow.flow_matching_loss(lambda x, t: x * 0, x0, noise, torch.tensor([0.1, 0.9]))
    want = (noise - x0).square().mean((1, 2, 3))
    assert loss.shape == (2,)
    assert bool(((loss - want).abs() <= 64 * EPS * want).all())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: flow.AffineCoupling(torch.ones(3, dtype=torch.bool)), "keep must be"),
        (lambda: flow.AffineCoupling(torch.ones(3)), "keep must be"),
        (lambda: flow.RealNVP(1), "dim and layers must be at least 2, got 1"),
        (lambda: flow.ContinuousFlow(torch.add, 0), "steps must be positive, got 0"),
    ],
    # each rule that an argument can break
    ids=["all", "dtype", "dim", "steps"],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
