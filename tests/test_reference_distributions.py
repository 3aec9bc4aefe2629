"""Densities and masses against mpmath's 60 digits, SciPy, torch.distributions and quadrature."""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from fastdiff.reference import distributions as ref

EPS = torch.finfo(torch.float64).eps
FAR = 1e-6  # what the logarithms promise in float32, of their size; float64 keeps 1e-14
LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)

mpmath.mp.dps = 60


def exact(value) -> mpmath.mpf:
    return mpmath.mpf(float(value))


def phi(z: mpmath.mpf) -> mpmath.mpf:
    return mpmath.erfc(-z / mpmath.sqrt(2)) / 2


def logistic(z: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-z))


CDFS = {"logistic": logistic, "normal": phi}
BINNED = {"logistic": ref.discretized_logistic, "normal": ref.discretized_normal}


def log_mass(kind: str, x, mean, scale) -> mpmath.mpf:
    """log P(x) as it is defined, from a difference of 60 digits on the side of small CDFs."""
    cdf, half, x = CDFS[kind], mpmath.mpf(1) / 255, mpmath.mpf(float(x))
    if x < -1 + half:
        return mpmath.log(cdf((x - mean + half) / scale))
    if x > 1 - half:
        return mpmath.log(cdf((half - x + mean) / scale))
    away = -abs(x - mean)
    return mpmath.log(cdf((away + half) / scale) - cdf((away - half) / scale))


def assert_close(got: torch.Tensor, want: list, room: float) -> None:
    """Each within `room` of the larger of 1 and the wanted logarithm: finite, for a start."""
    assert bool(got.isfinite().all())
    for i, (g, w) in enumerate(zip(got.flatten().tolist(), want, strict=True)):
        assert abs(mpmath.mpf(g) - w) <= room * max(abs(w), 1), (i, g, mpmath.nstr(w, 10))


# scales from far below a bin's width to far above the range; 1e-4 puts the other end 20,000
# deviations away. Means on a level, near the middle of the range, off the middle of a bin, and out
# of the range.
SCALES = (1e-4, 1e-3, 4e-3, 0.03, 0.2, 1.0, 30.0)
MEANS = (-1.0, 0.001, 0.3, 1.7)


@pytest.mark.parametrize("kind", BINNED)
@pytest.mark.parametrize("dtype, room", [(torch.float32, FAR), (torch.float64, 1e-14)])
def test_mass_of_a_bin_is_right_in_the_tails(kind, dtype, room):
    # both ends, their neighbours, and levels between
    x = LEVELS[[0, 1, 2, 60, 127, 128, 166, 200, 253, 254, 255]].to(dtype)
    for mean in MEANS:
        for scale in SCALES:
            m, s = torch.tensor(mean, dtype=dtype), torch.tensor(scale, dtype=dtype)
            got = BINNED[kind](x, m, s)
            assert got.dtype == dtype
            # no mean lies on an edge of a bin, where a scale far below its width makes the very
            # rounding of x to float32 count
            assert_close(got, [log_mass(kind, v, exact(m), exact(s)) for v in x], room)


@pytest.mark.parametrize("kind", BINNED)
def test_mass_is_a_distribution_over_the_levels(kind):
    for bins in (2, 3, 256):
        x = torch.linspace(-1, 1, bins, dtype=torch.float64)
        for mean in MEANS:
            for scale in SCALES:
                total = torch.logsumexp(BINNED[kind](x, mean, scale, bins=bins), 0)
                # each logarithm is right to 1e-14, and neighbours agree on their edge to an ulp
                assert abs(float(total)) <= 1e-14 + 2 * EPS / scale
    # another range: 0 to 255, as bytes
    x = torch.arange(256, dtype=torch.float64)
    got = BINNED[kind](x, 100.0, 12.0, low=0.0, high=255.0)
    same = BINNED[kind](LEVELS, -1 + 2 * 100 / 255, 12 * 2 / 255)
    assert float((got - same).abs().max()) <= 1e-11  # the grids are rounded differently


@pytest.mark.parametrize("kind", BINNED)
def test_mass_of_a_bin_in_the_middle_is_that_of_scipy(kind):
    """Where a plain difference of CDFs is good: the middle of the range."""
    cdf = {"logistic": scipy.stats.logistic.cdf, "normal": scipy.stats.norm.cdf}[kind]
    x = LEVELS[1:-1].numpy()
    want = np.log(cdf(x + 1 / 255, 0.1, 0.5) - cdf(x - 1 / 255, 0.1, 0.5))
    got = BINNED[kind](LEVELS[1:-1], 0.1, 0.5).numpy()
    # the difference of two numbers near 1 loses the digits of its size, about 1e-4
    assert np.abs(got - want).max() <= 1e4 * EPS


@pytest.mark.parametrize("kind", BINNED)
@pytest.mark.parametrize("dtype, room", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_gradients_are_right_in_the_tails(kind, dtype, room):
    """Against differences of the exact logarithm with a step of 1e-25."""
    step = mpmath.mpf(10) ** -25
    # a narrow bin near and far, a wide one near and far, and both open ones far
    cases = [(0.5, 1.0), (-0.9, 30.0), (0.3, 1e-3), (-0.7, 1e-3), (-1.0, 1e-3), (1.0, 1e-3)]
    for x, scale in cases:
        x = torch.tensor(x, dtype=dtype)
        m = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        s = torch.tensor(scale, dtype=dtype, requires_grad=True)
        got = torch.autograd.grad(BINNED[kind](x, m, s), (m, s))
        for i in range(2):
            at = [exact(m.detach()), exact(s.detach())]
            ends = []
            for sign in (1, -1):
                moved = list(at)
                moved[i] += sign * step
                ends.append(log_mass(kind, x, *moved))
            want = (ends[0] - ends[1]) / (2 * step)
            # slopes by the scale sum terms that cancel where the bin holds nearly all the mass
            size = max(abs(want), mpmath.mpf(1) / mpmath.mpf(scale) * mpmath.mpf("1e-3"))
            assert abs(mpmath.mpf(float(got[i])) - want) <= room * size, (x, scale, i)


@pytest.mark.parametrize("dtype, room", [(torch.float32, FAR), (torch.float64, 1e-14)])
def test_log_ndtr(dtype, room):
    z = torch.cat([-torch.logspace(4, -6, 60), torch.zeros(1), torch.logspace(-6, 1, 40)]).to(dtype)
    z.requires_grad_()
    got = ref.log_ndtr(z)
    assert_close(got.detach(), [mpmath.log(phi(exact(v))) for v in z.detach()], room)
    (slope,) = torch.autograd.grad(got.sum(), z)
    for v, g in zip(z.detach(), slope.tolist(), strict=True):
        want = mpmath.npdf(exact(v)) / phi(exact(v))
        assert abs(mpmath.mpf(g) - want) <= 4 * room * max(want, 1)


def test_torchs_own_gradient_of_log_ndtr_loses_its_digits():
    """Why `log_ndtr` is written out. The slope of log Phi at -3000 is 3000.0003."""
    z = torch.tensor(-3000.0, requires_grad=True)
    (theirs,) = torch.autograd.grad(torch.special.log_ndtr(z), z)
    (ours,) = torch.autograd.grad(ref.log_ndtr(z), z)
    assert abs(float(ours) / 3000 - 1) <= 1e-6
    assert abs(float(theirs) / 3000 - 1) > 1e-3


@pytest.mark.parametrize("dtype, room", [(torch.float32, FAR), (torch.float64, 1e-15)])
def test_log1mexp(dtype, room):
    x = torch.logspace(-6, 1.9, 50).to(dtype)
    for v, g in zip(x, ref.log1mexp(x).tolist(), strict=True):
        want = mpmath.log(-mpmath.expm1(-exact(v)))
        # of its own size at both ends, the tiny one too; one operation's ulp of exp(-x) at large x
        assert abs(mpmath.mpf(g) - want) <= room * abs(want) + mpmath.mpf(10) ** -45


@pytest.mark.parametrize("dtype, room", [(torch.float32, FAR), (torch.float64, 1e-14)])
def test_continuous_logarithms_in_the_tails(dtype, room):
    x = torch.tensor([-3e4, -500.0, -2.0, 0.0, 0.25, 7.0, 2e3, 1e5], dtype=dtype)
    mean, scale = torch.tensor(0.3, dtype=dtype), torch.tensor(1.7, dtype=dtype)
    z = [(exact(v) - exact(mean)) / exact(scale) for v in x]
    log_scale = mpmath.log(exact(scale))
    want = [-(v**2) / 2 - log_scale - mpmath.log(2 * mpmath.pi) / 2 for v in z]
    assert_close(ref.normal_log_pdf(x, mean, scale), want, room)
    want = [mpmath.log(phi(v)) for v in z]
    assert_close(ref.normal_log_cdf(x, mean, scale), want, room)
    want = [-abs(v) - 2 * mpmath.log1p(mpmath.exp(-abs(v))) - log_scale for v in z]
    assert_close(ref.logistic_log_pdf(x, mean, scale), want, room)
    want = [-mpmath.log1p(mpmath.exp(-v)) for v in z]
    assert_close(ref.logistic_log_cdf(x, mean, scale), want, room)
    want = [-mpmath.log1p(mpmath.exp(-exact(v))) for v in x]
    assert_close(ref.bernoulli_log_pmf(torch.ones_like(x), x), want, room)
    assert_close(ref.bernoulli_log_pmf(torch.zeros_like(x), -x), want, room)


def test_densities_are_those_of_scipy_and_torch():
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    n = x.numpy()
    # a dozen operations, and an exponent of at most 20 in front of the rounding
    room = 64 * EPS
    for got, want in (
        (ref.normal_pdf(x, 0.5, 1.5), scipy.stats.norm.pdf(n, 0.5, 1.5)),
        (ref.normal_cdf(x, 0.5, 1.5), scipy.stats.norm.cdf(n, 0.5, 1.5)),
        (ref.logistic_pdf(x, 0.5, 1.5), scipy.stats.logistic.pdf(n, 0.5, 1.5)),
        (ref.logistic_cdf(x, 0.5, 1.5), scipy.stats.logistic.cdf(n, 0.5, 1.5)),
        (ref.uniform_pdf(x, -1.1, 2.3), scipy.stats.uniform.pdf(n, -1.1, 3.4)),
        (ref.uniform_cdf(x, -1.1, 2.3), scipy.stats.uniform.cdf(n, -1.1, 3.4)),
    ):
        np.testing.assert_allclose(got.numpy(), want, rtol=room, atol=EPS)
    normal = torch.distributions.Normal(x.new_tensor(0.5), x.new_tensor(1.5))
    assert float((ref.normal_log_pdf(x, 0.5, 1.5) - normal.log_prob(x)).abs().max()) <= room
    # a mean and a scale for each value
    means, scales = x.flip(0), torch.linspace(0.1, 3, 41, dtype=torch.float64)
    normal = torch.distributions.Normal(means, scales)
    theirs = normal.log_prob(x)
    assert bool(((ref.normal_log_pdf(x, means, scales) - theirs).abs() <= room * 1e3).all())


def test_bernoulli():
    p = torch.tensor([0.0, 1e-9, 0.3, 0.5, 1 - 1e-9, 1.0], dtype=torch.float64)
    peer = torch.distributions.Bernoulli(p)
    for x in (0.0, 1.0):
        assert torch.equal(ref.bernoulli_pmf(torch.full_like(p, x), p), p if x else 1 - p)
    assert torch.equal(ref.bernoulli_mean(p), peer.mean)
    assert torch.equal(ref.bernoulli_variance(p), peer.variance)
    # a grey level: the expectation of the logarithm over the bit it stands for
    x = torch.tensor([0.25], dtype=torch.float64)
    logits = torch.tensor([1.3], dtype=torch.float64)
    q = float(torch.sigmoid(logits))
    want = 0.25 * math.log(q) + 0.75 * math.log(1 - q)
    assert abs(float(ref.bernoulli_log_pmf(x, logits)) - want) <= 8 * EPS


def test_moments_by_quadrature():
    """Densities integrate to 1 and have the moments that are said; 40 scales hold all but 1e-17."""
    scale = torch.tensor(0.7, dtype=torch.float64)
    grid = torch.linspace(-28, 28, 100001, dtype=torch.float64) + 0.4
    step = float(grid[1] - grid[0])
    # the trapezoidal rule is exponentially accurate on smooth densities; 1e5 terms are summed
    for pdf, variance in (
        (ref.normal_pdf(grid, 0.4, 0.7), scale.square()),
        (ref.logistic_pdf(grid, 0.4, 0.7), ref.logistic_variance(scale)),
    ):
        assert abs(float(pdf.sum()) * step - 1) <= 1e-12
        assert abs(float((pdf * grid).sum()) * step - 0.4) <= 1e-12
        spread = float((pdf * (grid - 0.4).square()).sum()) * step
        assert abs(spread - float(variance)) <= 1e-12
    # midpoints of a linear and a quadratic integrand: exact, and 1/12 of a step squared off
    low, high = torch.tensor(-1.5, dtype=torch.float64), torch.tensor(2.25, dtype=torch.float64)
    n = 10**4
    mid = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    width = float(high - low) / n
    density = ref.uniform_pdf(mid, low, high)
    mean, variance = float(ref.uniform_mean(low, high)), float(ref.uniform_variance(low, high))
    assert abs(float((density * mid).sum()) * width - mean) <= 1e-12
    assert (
        abs(float((density * (mid - mean) ** 2).sum()) * width + width**2 / 12 - variance) <= 1e-12
    )
    peer = torch.distributions.Uniform(low, high)
    assert abs(mean - float(peer.mean)) <= EPS
    assert abs(variance - float(peer.variance)) <= 4 * EPS


@pytest.mark.parametrize("dtype, room", [(torch.float32, FAR), (torch.float64, 1e-14)])
def test_mixture_of_discretized_logistics(dtype, room):
    """PixelCNN++: a value far from all components stays finite, and is the binned mixture."""
    logits = torch.tensor([2.0, -1.0, 0.5], dtype=dtype)
    means = torch.tensor([-0.8, 0.1, 0.6], dtype=dtype)
    scales = torch.tensor([1e-3, 2e-3, 5e-2], dtype=dtype)
    x = LEVELS[::15].to(dtype)
    got = ref.mixture(logits, ref.discretized_logistic(x[:, None], means, scales))
    total = sum(mpmath.exp(exact(v)) for v in logits)
    want = []
    for v in x:
        each = [
            mpmath.exp(exact(c)) / total * mpmath.exp(log_mass("logistic", v, exact(m), exact(s)))
            for c, m, s in zip(logits, means, scales, strict=True)
        ]
        want.append(mpmath.log(sum(each)))
    assert_close(got, want, room)
    # components along another dimension
    turned = ref.mixture(
        logits[:, None], ref.discretized_logistic(x, means[:, None], scales[:, None]), 0
    )
    assert torch.equal(turned, got)


def test_mixture_of_normals_is_torchs():
    logits = torch.tensor([2.0, -1.0], dtype=torch.float64)
    means, scales = torch.tensor([[-1.0, 3.0], [0.5, 2.0]], dtype=torch.float64)
    x = torch.linspace(-60, 60, 31, dtype=torch.float64)
    peer = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits), torch.distributions.Normal(means, scales)
    )
    want = peer.log_prob(x)
    got = ref.mixture(logits, ref.normal_log_pdf(x[:, None], means, scales))
    assert bool(((got - want).abs() <= 16 * EPS * want.abs()).all())


def test_errors():
    x = torch.zeros(1)
    for call in BINNED.values():
        with pytest.raises(ValueError, match="bins must be at least 2, got 1"):
            call(x, 0.0, 1.0, bins=1)
        with pytest.raises(TypeError, match="bins must be an int, got float"):
            call(x, 0.0, 1.0, bins=256.0)
        with pytest.raises(ValueError, match=r"low must be below high, got 1.0 and 0.0"):
            call(x, 0.0, 1.0, low=1.0, high=0.0)
