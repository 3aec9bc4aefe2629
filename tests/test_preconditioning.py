"""Denoisers of networks: against the published formulas, the sampler's own x0, and backwards."""

from __future__ import annotations

import math

import pytest
import torch
from budget import assert_within_budget

import fastdiff
from fastdiff import Sampler, randn, schedules, solvers
from fastdiff.models import UNet, UNetConfig
from fastdiff.preconditioning import denoiser, network, scalings

DISCRETE, EDM, FLOW = schedules.scaled_linear(), schedules.edm(sigma_data=0.7), schedules.flow()

# every prediction on every kind of schedule where it has a meaning
PAIRS = {
    "epsilon": (DISCRETE, "epsilon"),
    "sample": (DISCRETE, "sample"),
    "v_prediction": (DISCRETE, "v_prediction"),
    "edm": (EDM, "edm"),
    "edm_epsilon": (EDM, "epsilon"),
    "edm_sample": (EDM, "sample"),
    "flow": (FLOW, "flow"),
    "flow_epsilon": (FLOW, "epsilon"),
    "flow_sample": (FLOW, "sample"),
}


def model(x: torch.Tensor, t: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """Depends on both arguments, smoothly and in their own dtype."""
    column = t.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return torch.sin(1.3 * x + 0.01 * column) + 0.2 * x + shift


def published(
    pair: str, x: torch.Tensor, sigma: torch.Tensor, call: object = model
) -> torch.Tensor:
    """D(x, sigma) as the papers write it, in the dtype of x."""
    schedule, prediction = PAIRS[pair]
    s = sigma.view(-1, 1, 1, 1)
    if prediction == "edm":  # Karras et al. 2022, table 1, last column
        d = 0.7
        root = (s**2 + d**2).sqrt()
        c_noise = sigma.log() / 4
        return d**2 / (s**2 + d**2) * x + s * d / root * call(x / root, c_noise)
    if schedule is EDM:  # x = x0 + sigma noise, seen as it is
        output = call(x, sigma)
        return output if prediction == "sample" else x - s * output
    if schedule is FLOW:  # x = (1 - t) x0 + t noise
        output = call(x, sigma)
        return {
            "flow": x - s * output,
            "epsilon": (x - s * output) / (1 - s),
            "sample": output,
        }[prediction]
    t = torch.from_numpy(schedule.time(sigma.double().numpy())).to(x.dtype)
    root = (s**2 + 1).sqrt()
    output = call(x / root, t)
    if prediction == "sample":
        return output
    if prediction == "epsilon":  # Karras et al. 2022, table 1, iDDPM
        return x - s * output
    return x / (s**2 + 1) - s / root * output  # v, with sigma_data 1


def levels(pair: str) -> torch.Tensor:
    """Low, middle and high noise, within the schedule."""
    return torch.tensor([0.05, 0.4, 0.93] if PAIRS[pair][0] is FLOW else [0.1, 1.7, 9.0])


def states(pair: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(3, 2, 4, 5, generator=draw)
    return x * (1 + levels(pair).view(-1, 1, 1, 1))


@pytest.mark.parametrize("pair", PAIRS)
def test_denoiser_is_the_published_formula(pair):
    x, sigma = states(pair), levels(pair)
    exact = published(pair, x.double(), sigma.double())
    denoise = denoiser(model, *PAIRS[pair])
    # c_noise reaches the model in the dtype of x: half an ulp of it, as in the formula
    assert_within_budget(denoise(x, sigma), published(pair, x, sigma), exact, ulps=2)
    fine = denoise(x.double(), sigma.double())
    assert_within_budget(fine, exact, exact, ulps=64)  # the order of float64 products
    one = denoise(x[:1], float(sigma[0]))
    assert torch.equal(one, denoise(x[:1], sigma[:1]))
    assert torch.equal(denoise(x, sigma, shift=0.0), denoise(x, sigma))
    assert not torch.equal(denoise(x, sigma, shift=1.0), denoise(x, sigma))


@pytest.mark.parametrize("pair", PAIRS)
def test_denoiser_is_the_x0_of_the_sampler(pair):
    schedule, prediction = PAIRS[pair]
    # from where alpha is not 0
    options = {"sigmas": [0.9, 0.6, 0.2]} if schedule is FLOW else {"steps": 4}
    table = solvers.build("ddim", schedule, prediction=prediction, **options)
    denoise, before = denoiser(model, schedule, prediction), None
    for step in Sampler(model, table).iter((2, 4, 5), seeds=[3, 4]):
        alpha, sigma = (float(v[step.index]) for v in (table.alphas, table.sigmas))
        if before is not None:
            ratio = sigma if schedule is FLOW else sigma / alpha
            # the sampler's state is alpha times the denoiser's, but for a flow
            given = before if schedule is FLOW else before / alpha
            exact = denoise(given.double(), ratio)
            plain = published(pair, given, torch.full((2,), ratio))
            # one rounding more of the state, which alpha divides
            assert_within_budget(step.denoised, plain, exact, ulps=8)
        before = step.x


@pytest.mark.parametrize("pair", PAIRS)
def test_network_inverts_denoiser(pair):
    schedule, prediction = PAIRS[pair]
    x, sigma = states(pair), levels(pair)
    scales = torch.tensor([scalings(schedule, prediction, float(s)) for s in sigma])
    c_skip, c_out, c_in, t = (column.view(-1, 1, 1, 1) for column in scales.unbind(1))
    heard: list[torch.Tensor] = []

    def denoise(state: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        heard.append(level)
        return published(pair, state, sigma)

    got = network(denoise, schedule, prediction)(x * c_in, t.flatten())
    # c_noise is a logarithm, whose rounding the exponential makes that of sigma
    assert_within_budget(heard[0], (4 * t.flatten()).exp() if prediction == "edm" else sigma,
                         sigma.double(), ulps=8)  # fmt: skip
    plain = (published(pair, x, sigma) - c_skip * x) / c_out
    exact = model((x * c_in).double(), t.flatten().double())
    assert_within_budget(got, plain, exact, ulps=2)


def test_any_denoiser_is_sampled():
    """One denoiser runs through tables of every prediction to the same picture."""
    spread = 0.7

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Of data N(0, 0.7^2)."""
        return x * (spread**2 / (spread**2 + sigma**2)).view(-1, 1, 1, 1)

    grid = EDM.points(20)
    # Euler's steps on it, each a factor
    s, then = torch.tensor(grid.sigmas[:-1]), torch.tensor(grid.sigmas[1:])
    factor = (1 + (then - s) * s / (spread**2 + s**2)).prod() * s[0]
    exact = fastdiff.randn(range(4), (1, 8, 8)).double() * factor
    table = solvers.build("euler", EDM, 20, prediction="sample")
    plain = Sampler(denoise, table)((1, 8, 8), seeds=range(4))
    assert torch.equal(Sampler(network(denoise, EDM), table)((1, 8, 8), seeds=range(4)), plain)
    for prediction in ("epsilon", "edm"):
        table = solvers.build("euler", EDM, 20, prediction=prediction)
        got = Sampler(network(denoise, EDM, prediction), table)((1, 8, 8), seeds=range(4))
        # a division and a product more in each of 20 steps
        assert_within_budget(got, plain, exact, ulps=20)


@torch.no_grad()
def test_a_network_in_bfloat16_with_learned_variance():
    config = UNetConfig(
        image_size=8, channels=(16,), embed_dim=16, groups=4, head_dim=16, out_channels=2,
        num_classes=3,
    )  # fmt: skip
    torch.manual_seed(0)
    unet = UNet(config).to(torch.bfloat16).eval()
    torch.nn.init.normal_(unet.conv_out.weight)
    x, label = randn([0, 1], (1, 8, 8)), torch.tensor([0, 2])
    got = denoiser(unet, DISCRETE)(x, 2.0, label=label)
    t = torch.full((2,), float(DISCRETE.time(2.0)))
    seen = (x / math.sqrt(5)).to(torch.bfloat16)
    want = x - 2 * unet(seen, t, label)[:, :1].float()
    assert got.dtype == torch.float32
    assert_within_budget(got, want, want.double(), ulps=2)


def test_errors():
    with pytest.raises(TypeError, match="denoiser: model must be callable, got int"):
        denoiser(3, DISCRETE)
    with pytest.raises(ValueError, match=r"denoiser: prediction must be one of .* got 'edm'"):
        denoiser(model, DISCRETE, "edm")
    with pytest.raises(ValueError, match=r"network: prediction must be one of .* got 'v_predic"):
        network(model, EDM, "v_prediction")
    denoise = denoiser(model, DISCRETE)
    x = torch.zeros(3, 1, 2, 2)
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scalings: sigma must be finite and > 0, got"):
            denoise(x, sigma)
    with pytest.raises(ValueError, match=r"denoiser: sigma must be one number or \(3,\), got 2"):
        denoise(x, torch.ones(2))
    with pytest.raises(TypeError, match=r"denoiser: x must be floating point, got torch\.int64"):
        denoise(x.long(), 1.0)
    # at t = 1 a flow is noise alone
    with pytest.raises(ValueError, match=r"scalings: prediction must be one of .* alpha is 0"):
        denoiser(model, FLOW, "epsilon")(x, 1.0)
    zero_snr = schedules.rescale_zero_terminal_snr(DISCRETE)
    with pytest.raises(ValueError, match="scalings: sigma must be finite"):
        network(model, zero_snr)(x, torch.full((3,), 999.0))
