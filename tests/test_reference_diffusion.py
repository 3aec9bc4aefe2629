"""The written-out diffusion process against numerical integration, algebra and diffusers."""

import diffusers
import numpy as np
import pytest
import torch

from fastdiff import schedules
from fastdiff.reference import diffusion as ref

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

SCHEDULE = schedules.linear()
ABAR = torch.tensor(SCHEDULE.alphas_cumprod)
BETAS = torch.tensor(SCHEDULE.betas)
ALPHA, SIGMA = ABAR.sqrt(), (1 - ABAR).sqrt()

# the first step with a posterior, an early, a middle and the last one
TIMES = (1, 7, 300, 999)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return x0, noise


def test_steps_compose_to_the_marginal():
    scale, variance = ref.forward_chain(BETAS)
    # each of the T steps rounds a few times, and never magnifies what came before
    bound = 8 * EPS * torch.arange(1, len(BETAS) + 1)
    assert ((scale - ALPHA).abs() <= bound).all()
    assert ((variance - (1 - ABAR)).abs() <= bound).all()
    # the same for the drawing functions, with the noise switched off and on
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x = one
    for beta in BETAS[:100]:
        x = ref.forward_step(x, beta, zero)
    assert abs(x - ref.marginal(one, ABAR[99], zero)) <= bound[99]
    assert abs(ref.forward_step(zero, BETAS[5], one) ** 2 - BETAS[5]) <= 4 * EPS
    assert abs(ref.marginal(zero, ABAR[5], one) ** 2 - (1 - ABAR[5])) <= 4 * EPS


def test_only_scaled_steps_lead_to_a_unit_normal():
    """The variance after all steps, of data with variance 1/4, and of what notes give instead."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    variance, unscaled = 0.25, 0.25
    for beta in BETAS:
        of_data, of_noise = ref.forward_step(one, beta, zero), ref.forward_step(zero, beta, one)
        variance = float(of_data) ** 2 * variance + float(of_noise) ** 2
        unscaled += float(beta)
    # all that is left of the data is alphabar_T
    assert abs(variance - 1 + 0.75 * float(ABAR[-1])) <= 1e4 * EPS
    assert unscaled > 10  # the sum of the betas; 1 a step in N(x_{t-1}, I), 1000 in all


@pytest.mark.parametrize("t", TIMES, ids=str)
def test_posterior_is_the_product_of_two_gaussians(t):
    abar, abar_prev, beta = float(ABAR[t]), float(ABAR[t - 1]), float(BETAS[t])
    x0, x = 0.6, float(ABAR[t]) ** 0.5 * 0.6 + (1 - abar) ** 0.5 * 0.8
    # the trapezoidal rule converges exponentially on a Gaussian: 20,000 points over 24 prior
    # deviations leave over 100 points a deviation of even the narrowest posterior here
    center, spread = abar_prev**0.5 * x0, (1 - abar_prev) ** 0.5
    grid = center + spread * torch.linspace(-12, 12, 20001, dtype=torch.float64)
    log_q = -((x - (1 - beta) ** 0.5 * grid) ** 2) / (2 * beta)
    log_q = log_q - (grid - center) ** 2 / (2 * spread**2)
    weights = torch.softmax(log_q, 0)
    want_mean = float((weights * grid).sum())
    want_variance = float((weights * (grid - want_mean) ** 2).sum())

    mean, variance = ref.posterior(
        torch.tensor(x0, dtype=torch.float64), torch.tensor(x, dtype=torch.float64), abar, abar_prev
    )
    # a rounding of the grid, of size eps, shifts the exponent by its slope, at most a few times
    # 1 / sqrt(variance); beta and 1 - alphabar_{t-1} come from subtractions from 1
    slope = 8 / want_variance**0.5 + 1 / beta + 1 / (1 - abar_prev)
    assert abs(float(mean) - want_mean) <= 16 * EPS * slope
    assert abs(variance - want_variance) <= 64 * EPS * slope * want_variance
    # what notes give that forget beta_t
    forgotten = (1 - abar_prev) / (1 - abar)
    assert abs(forgotten - want_variance) > 10 * want_variance
    assert want_variance < beta < forgotten


def test_posterior_is_that_of_diffusers():
    peer = diffusers.DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    for t in TIMES:
        _, variance = ref.posterior(
            torch.ones(1), torch.ones(1), float(ABAR[t]), float(ABAR[t - 1])
        )
        theirs = float(peer._get_variance(t))
        # diffusers subtracts float32 numbers near 1, each off by T eps at the most
        bound = 2 * EPS32 * (t + 2) * (1 / (1 - ABAR[t - 1]) + 1 / (1 - ABAR[t]) + 1 / BETAS[t])
        assert abs(theirs - variance) <= variance * float(bound)


def test_posterior_at_the_first_step_is_the_data():
    x0, x = pair(5)
    mean, variance = ref.posterior(x0, x, float(ABAR[0]), 1.0)
    assert ((mean - x0).abs() <= 4 * EPS * x0.abs()).all()
    assert variance == 0


@pytest.mark.parametrize("kind", ref.PREDICTIONS)
@pytest.mark.parametrize("t", [0, *TIMES], ids=str)
def test_predictions_round_trip(kind, t):
    x0, noise = pair(64)
    # with floats as coefficients and with tensors
    for alpha, sigma in ((float(ALPHA[t]), float(SIGMA[t])), (ALPHA[t], SIGMA[t])):
        x = alpha * x0 + sigma * noise
        output = ref.to_prediction(kind, x0, noise, alpha, sigma)
        x0_again, noise_again = ref.from_prediction(kind, x, output, alpha, sigma)
        # dividing by a small alpha or sigma magnifies the rounding of x
        bound = 16 * EPS * (1 + x0.abs() + noise.abs()) / min(float(alpha), float(sigma))
        assert ((x0_again - x0).abs() <= bound).all()
        assert ((noise_again - noise).abs() <= bound).all()


def test_v_and_flow_are_defined_at_both_ends():
    x0, noise = pair(8)
    for kind in ("v_prediction", "flow"):
        for alpha, sigma in ((1.0, 0.0), (0.0, 1.0)):
            x = alpha * x0 + sigma * noise
            output = ref.to_prediction(kind, x0, noise, alpha, sigma)
            x0_again, noise_again = ref.from_prediction(kind, x, output, alpha, sigma)
            assert ((x0_again - x0).abs() <= 4 * EPS * (x0.abs() + noise.abs())).all()
            assert ((noise_again - noise).abs() <= 4 * EPS * (x0.abs() + noise.abs())).all()


def test_v_is_the_derivative_by_the_angle():
    x0, noise = pair(8)
    angle = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for i in range(8):
        (slope,) = torch.autograd.grad(angle.cos() * x0[i] + angle.sin() * noise[i], angle)
        cos, sin = float(angle.detach().cos()), float(angle.detach().sin())
        v = ref.to_prediction("v_prediction", x0[i], noise[i], cos, sin)
        assert abs(slope - v) <= 4 * EPS * (abs(x0[i]) + abs(noise[i]))


def test_noising_and_velocity_are_those_of_diffusers():
    peer = diffusers.DDPMScheduler()
    x0, noise = pair(len(TIMES), 10)
    t = torch.tensor(TIMES)
    x = ref.marginal(x0, ABAR[t][:, None], noise)
    v = ref.to_prediction("v_prediction", x0, noise, ALPHA[t][:, None], SIGMA[t][:, None])
    # their float32 alphabar is off by T eps, and so is 1 - alphabar, absolutely
    bound = 4 * EPS32 * (t + 2)[:, None] * (x0.abs() + noise.abs())
    bound = bound / SIGMA[t][:, None].clamp(max=1)
    assert ((peer.add_noise(x0, noise, t) - x).abs() <= bound).all()
    assert ((peer.get_velocity(x0, noise, t) - v).abs() <= bound).all()


@pytest.mark.parametrize("kind", ref.PREDICTIONS)
def test_min_snr_weighs_the_data_error_alike(kind):
    t = torch.tensor([0, *TIMES])
    alpha, sigma = ALPHA[t], SIGMA[t]
    x0, noise = pair(len(t))
    x, error = alpha * x0 + sigma * noise, 0.5
    # two answers at the same x, whose data differ by `error`
    other = x0 + error
    other_noise = (x - alpha * other) / sigma
    outputs = [ref.to_prediction(kind, a, b, alpha, sigma) for a, b in
               ((x0, noise), (other, other_noise))]  # fmt: skip
    weighted = ref.min_snr_weight(kind, alpha, sigma) * (outputs[1] - outputs[0]).square()
    want = (alpha / sigma).square().clamp(max=5.0) * error**2
    # the difference of the outputs cancels digits of x / sigma
    bound = 64 * EPS * (1 + (x0.abs() + noise.abs() + 1) / (sigma * error)) * want
    bound = bound + 64 * EPS * want / torch.minimum(alpha, sigma).square()
    assert ((weighted - want).abs() <= bound).all()


def test_min_snr_of_v_is_the_papers():
    snr = ABAR / (1 - ABAR)
    want = snr.clamp(max=5.0) / (snr + 1)
    got = ref.min_snr_weight("v_prediction", ALPHA, SIGMA)
    # 1 - alphabar is known to eps absolutely
    assert ((got - want).abs() <= 16 * EPS * want / (1 - ABAR)).all()


def test_simple_loss_weighs_samples():
    output, target = pair(3, 2, 4)
    each = (output - target).square().mean(dim=(1, 2))
    weight = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
    assert abs(ref.simple_loss(output, target) - each.mean()) <= 8 * EPS
    assert abs(ref.simple_loss(output, target, weight) - (weight * each).mean()) <= 16 * EPS


@pytest.mark.parametrize("t", TIMES, ids=str)
def test_ancestral_step_keeps_the_marginal(t):
    """DDPM, section 3.2: "large" is exact for unit normal data, "small" for data at a point."""
    abar, prev = float(ABAR[t]), float(ABAR[t - 1])
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    bound = 16 * EPS * (1 + 1 / (1 - abar))
    # unit normal data: the best estimate of x0 is sqrt(alphabar) x, and x has variance 1
    scale = ref.ancestral_step(one, abar**0.5 * one, abar, prev, zero, "large")
    spread = ref.ancestral_step(zero, zero, abar, prev, one, "large")
    assert abs(scale**2 + spread**2 - 1) <= bound
    # data at 0: x has variance 1 - alphabar_t and must come to have 1 - alphabar_{t-1}
    scale = ref.ancestral_step(one, zero, abar, prev, zero, "small")
    spread = ref.ancestral_step(zero, zero, abar, prev, one, "small")
    assert abs(scale**2 * (1 - abar) + spread**2 - (1 - prev)) <= bound
    # and its mean, for data at 1
    mean = ref.ancestral_step(abar**0.5 * one, one, abar, prev, zero, "small")
    assert abs(mean - prev**0.5) <= bound


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_last_step_draws_no_noise(variance):
    x0, x = pair(5)
    noise = torch.full_like(x, 1e6)
    mean, _ = ref.posterior(x0, x, float(ABAR[0]), 1.0)
    assert torch.equal(ref.ancestral_step(x, x0, float(ABAR[0]), 1.0, noise, variance), mean)
    # a batch at different times, one of them the last
    abar, prev = ABAR[[0, 300]].view(2, 1), torch.stack([torch.ones_like(ABAR[0]), ABAR[299]])
    both = ref.ancestral_step(
        x.expand(2, 5), x0.expand(2, 5), abar, prev.view(2, 1), noise.expand(2, 5), variance
    )
    assert ((both[0] - mean).abs() <= 4 * EPS * mean.abs()).all()
    assert (both[1].abs() > 1e3).all()


def test_step_is_that_of_diffusers():
    peer = diffusers.DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    peer.set_timesteps(1000)
    x0, noise = pair(3, 1, 4, 4)
    for t in TIMES:
        x = ref.marginal(x0, ABAR[t], noise)
        draw = torch.Generator().manual_seed(2)
        theirs = peer.step(noise, t, x, generator=draw).prev_sample
        fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        estimate, _ = ref.from_prediction("epsilon", x, noise, float(ALPHA[t]), float(SIGMA[t]))
        ours = ref.ancestral_step(x, estimate, float(ABAR[t]), float(ABAR[t - 1]), fresh)
        # their float32 alphabar is off by T eps relatively; 1 - alphabar and beta divide it, and
        # x0 is recovered by dividing by alpha
        size = 1 / (1 - ABAR[t]) + 1 / BETAS[t] + 1 / ALPHA[t]
        assert float((theirs - ours).abs().max()) <= float(4 * EPS32 * (t + 2) * size)


def test_dtype_is_kept():
    x = torch.ones(3, dtype=torch.float32)
    mean, _ = ref.posterior(x, x, 0.5, 0.75)
    assert mean.dtype == torch.float32
    assert ref.forward_step(x, 0.1, x).dtype == torch.float32
    assert ref.ancestral_step(x, x, 0.5, 0.75, x).dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda: ref.to_prediction("noise", torch.ones(1), torch.ones(1), 1.0, 0.0),
        lambda: ref.from_prediction("noise", torch.ones(1), torch.ones(1), 1.0, 0.0),
        lambda: ref.min_snr_weight("noise", torch.ones(1), torch.ones(1)),
        lambda: ref.ancestral_step(*[torch.ones(1)] * 2, 0.5, 0.6, torch.ones(1), "learned"),
    ],
    # each function that takes a name
    ids=["to", "from", "min_snr", "ancestral"],
)
def test_errors(call):
    with pytest.raises(ValueError, match=r"must be .* got"):
        call()


def test_schedule_and_reference_agree_at_the_ends():
    # alphabar_{-1} = 1 is what `posterior` is given at t = 0
    assert SCHEDULE.alpha(-1) == 1
    assert np.all(SCHEDULE.sigma(-1) == 0)
