"""The samplers called as ComfyUI calls them, against transcriptions of ComfyUI's own."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import comfy_cases
import fake_comfy
import numpy as np
import pytest
import torch
from budget import assert_within_budget
from comfy_cases import SPACES, Drawn, levels, problem, run, start
from peers import k_sampling
from scopes import default_dtype
from solver_cases import CASES, assert_same

STEPS = 6
CHURN = {"s_churn": 8.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
OPTIONS = {"eta": 0.7, "s_noise": 1.01}
MORE = {"eta": 0.4, "s_noise": 1.01}


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    return fake_comfy.install(monkeypatch)


# name and options: (transcription, the kind in which ComfyUI's code runs on a flow, reason).
# "edm" on a flow: ComfyUI's code takes t for sigma there; None: its noise does not fit a flow.
EQUAL = [
    ("euler", {}, "euler", "edm", "deterministic"),
    ("euler", CHURN, "euler-churn", None, "churn"),
    ("heun", {}, "heun", "edm", "two stages"),
    ("heun", CHURN, "heun-churn", None, "churn"),
    ("heunpp2", {}, "heunpp2", "edm", "three stages"),
    ("dpm_2", {}, "dpm_2", "edm", "midpoint"),
    ("lms", {}, "ipndm_v", "edm", "ends in x0, as ComfyUI's alone does"),
    ("ipndm", {}, "ipndm", "edm", "history"),
    ("deis", {}, "deis", "edm", "history"),
    ("gradient_estimation", {}, "gradient_estimation", "edm", "history"),
    ("dpmpp_2m", {}, "dpmpp_2m", "edm", "the log of t on a flow"),
    ("res_multistep", {}, "res_multistep", "edm", "the log of t on a flow"),
    ("unipc", {}, "unipc", "edm", "a corrector"),
    ("euler_ancestral", {}, ("euler_ancestral", "euler_ancestral-rf"), "flow", "RF on a flow"),
    ("euler_ancestral", OPTIONS, ("euler_ancestral-options", "euler_ancestral-rf-options"),
     "flow", "options"),
    ("dpm_2_ancestral", {}, "dpm_2_ancestral", "flow", "RF on a flow"),
    ("dpm_2_ancestral", OPTIONS, "dpm_2_ancestral-options", "flow", "options"),
    ("dpmpp_2s_ancestral", {}, "dpmpp_2s_ancestral", "flow", "RF on a flow"),
    ("dpmpp_2s_ancestral", OPTIONS, "dpmpp_2s_ancestral-options", "flow", "options"),
    ("res_multistep_ancestral", {}, "res_multistep_ancestral", None, "history"),
    ("ddpm", {}, "ddpm", None, "posterior variance"),
    ("lcm", {}, "lcm", "flow", "x0 and new noise"),
    ("dpmpp_2m_sde", {}, "dpmpp_2m_sde", "flow", "a tree's increments"),
    ("dpmpp_2m_sde", {**MORE, "solver_type": "heun"}, "dpmpp_2m_sde-heun", "flow", "options"),
    ("dpmpp_2m_sde_heun", MORE, "dpmpp_2m_sde-heun", "flow", "ComfyUI's name for it"),
    ("dpmpp_3m_sde", {}, "dpmpp_3m_sde", "flow", "a tree's increments"),
    ("seeds_2", {}, "seeds_2", "flow", "noise carried from stage to stage"),
    ("seeds_3", {}, "seeds_3", "flow", "noise carried from stage to stage"),
    ("exp_heun_2_x0", {}, "exp_heun_2_x0", "flow", "ComfyUI's name for it"),
    ("exp_heun_2_x0_sde", {}, "exp_heun_2_x0_sde", "flow", "ComfyUI's name for it"),
    ("er_sde", {}, "er_sde", "flow", "exact integrals"),
    ("euler_cfg_pp", {}, "euler_cfg_pp", "flow", "the unconditional output"),
    ("euler_ancestral_cfg_pp", {}, "euler_ancestral_cfg_pp-ancestral", "flow", "it and noise"),
    ("dpmpp_2m_cfg_pp", {}, "dpmpp_2m_cfg_pp", "edm", "it and history"),
    ("res_multistep_cfg_pp", {}, "res_multistep_cfg_pp-ode", "edm", "it and history"),
    ("res_multistep_ancestral_cfg_pp", {}, "res_multistep_cfg_pp-ancestral", None, "all three"),
    ("gradient_estimation_cfg_pp", {}, "gradient_estimation_cfg_pp", "edm", "it and history"),
]  # fmt: skip
OFFSET = ("dpmpp_2m_sde", "dpmpp_3m_sde", "seeds", "exp_heun", "er_sde")


def _cases():
    for name, options, case, on_flow, _ in EQUAL:
        for space in SPACES:
            kind = on_flow if space == "flow" else "edm"
            if kind is not None:
                of = case if isinstance(case, str) else case[kind == "flow"]
                label = f"{name}{'-options' if options else ''}-{space}"
                yield pytest.param(name, options, space, of, kind, id=label)


def _oracle(space, case, kind, name, sigmas, drawn):
    """The result of the transcription, and the largest state on the way."""
    seen = sigmas.double()
    if space == "flow" and name.startswith(OFFSET):
        # ComfyUI moves the first level off t = 1, where the log of (1 - t)/t is infinite
        seen[0] = torch.tensor(SPACES[space][0]().percent_to_sigma(1e-4)).double()
    states = CASES[case].oracle(problem(kind, seen, drawn.oracle), start(space, sigmas).numpy())
    return states[-1], max(np.abs(s).max() for s in states)


@pytest.mark.parametrize(("name", "options", "space", "case", "kind"), list(_cases()))
def test_same_as_comfyui(name, options, space, case, kind, monkeypatch):
    sigmas, drawn = levels(space, STEPS), Drawn()
    drawn.put_in(monkeypatch)
    got = run(name, space, sigmas, **options)
    want, largest = _oracle(space, case, kind, name, sigmas, drawn)
    largest = max(largest, float(start(space, sigmas).abs().max()))
    assert_same([got.numpy()], [want], (name, space), largest)
    assert drawn.count == len(drawn.rows)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["euler", "dpm_2_ancestral", "seeds_3", "euler_ancestral_cfg_pp"])
def test_float32(name, space, monkeypatch):
    """The kernel's bits are those of the readable reference; float64 tells how good they are."""
    sigmas = levels(space, STEPS)

    def once(dtype):
        with monkeypatch.context() as patch:
            drawn = Drawn()
            drawn.put_in(patch)
            return run(name, space, sigmas, x=start(space, sigmas, dtype))

    got = comfy_cases.same_bits(lambda: once(torch.float32))
    # kernel and reference are the same bits, so the reference's error is what the budget allows
    assert_within_budget(got, once(torch.float32), once(torch.float64), 0)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("options", [{}, {"eta": 0.7, "s_noise": 1.01}, {"r": 1.0}, {"eta": 0.0}])
def test_dpmpp_sde_asks_a_tree_for_the_whole_step(space, options, monkeypatch):
    """Its stage and its step are increments of one path, which the tree must be asked for."""
    sigmas, asked = levels(space, STEPS), []
    path = {}

    def increment(a, b):
        a, b = float(a), float(b)
        asked.append((a, b))
        return torch.from_numpy(path.setdefault((a, b), Drawn().number(len(path))))

    sampling = sys.modules["comfy.k_diffusion.sampling"]
    monkeypatch.setattr(
        sampling, "BrownianTreeNoiseSampler", lambda *_, seed=None, cpu=False: increment
    )
    got = run("dpmpp_sde", space, sigmas, **options)
    seen = sigmas.clone()
    if space == "flow":
        seen[0] = SPACES[space][0]().percent_to_sigma(1e-4)
    r, eta = options.get("r", 0.5), options.get("eta", 1.0)
    spans, draws = list(asked), iter(asked)
    want = _dpmpp_sde(
        seen.double().numpy(), start(space, sigmas).numpy(), space == "flow", eta,
        options.get("s_noise", 1.0), r, lambda: path[next(draws)],
    )  # fmt: skip
    assert_same([got.numpy()], [want], (space, options), float(start(space, sigmas).abs().max()))
    if not eta:
        assert not spans
        return
    steps = [(float(a), float(b)) for a, b in list(pairwise(seen))[:-1]]
    assert [pair[0] for pair in spans[::2]] == [a for a, _ in steps]
    assert spans[1::2] == steps


def _dpmpp_sde(sigmas, x, is_flow, eta, s_noise, r, draw):
    """ComfyUI's step: half the log of the signal-to-noise ratio, both noises from the start."""

    def lam_of(s):
        return math.log((1 - s) / s) if is_flow else -math.log(s)

    def sigma_of(lam):
        return 1 / (1 + math.exp(lam)) if is_flow else math.exp(-lam)

    def ancestral(a, b):
        up = min(b, eta * (b**2 * (a**2 - b**2) / a**2) ** 0.5)
        return (b**2 - up**2) ** 0.5, up

    model = comfy_cases.network(None)
    for s, t in pairwise(sigmas):
        x0 = model(x, float(s))
        if t == 0:
            return x0
        lam_s, lam_t = lam_of(s), lam_of(t)
        lam_m = lam_s + r * (lam_t - lam_s)
        mid = sigma_of(lam_m)
        alphas = [1 - v if is_flow else 1.0 for v in (s, mid, t)]

        def move(x0, lam, alpha, lam_s=lam_s, x=x, alphas=alphas):
            down, up = ancestral(math.exp(-lam_s), math.exp(-lam))
            h = -math.log(down) - lam_s
            moved = alpha / alphas[0] * math.exp(-h) * x - alpha * math.expm1(-h) * x0
            return moved + alpha * s_noise * up * (draw() if eta else 0.0)

        middle = model(move(x0, lam_m, alphas[1]), mid)
        x = move((1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * middle, lam_t, alphas[2])
    return x


def _by_k_diffusion(name, sigmas, x, noise_sampler=None):
    """k-diffusion's own sampler on the same model."""
    sampling, options = k_sampling(), {"disable": True}

    def model(z, sigma):
        u, c = (comfy_cases.denoise(z, sigma, cond) for cond in ("negative", "positive"))
        return u + (c - u) * comfy_cases.CFG

    if noise_sampler is not None:
        options["noise_sampler"] = noise_sampler
    with default_dtype(x.dtype):
        if name == "dpm_fast":
            ends = float(sigmas[-2]), float(sigmas[0])
            return sampling.sample_dpm_fast(model, x, *ends, len(sigmas) - 1, **options)
        return getattr(sampling, f"sample_{name}")(model, x, sigmas.to(x.dtype), **options)


@pytest.mark.parametrize("name", ["dpm_fast", "dpmpp_2m", "heun"])
def test_same_as_k_diffusion(name):
    """The peer itself, in float64: it takes the end of the grid, a history, two stages."""
    sigmas = levels("ve", STEPS)
    x = start("ve", sigmas)
    want = _by_k_diffusion(name, sigmas, x)
    assert_same([run(name, "ve", sigmas).numpy()], [want.numpy()], name, float(x.abs().max()))


@pytest.mark.filterwarnings("ignore:Should have tb<=t1")  # torchsde, of its own rounded end
@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_same_as_k_diffusion_on_its_tree(name, monkeypatch):
    """Both ask torchsde's tree of one seed for the same increments, in float32."""
    sampling, sigmas = k_sampling(), levels("ve", STEPS)
    x = start("ve", sigmas, torch.float32)

    def tree(_, low, high, seed=None, cpu=False):
        return sampling.BrownianTreeNoiseSampler(x, low, high, seed=seed)

    module = sys.modules["comfy.k_diffusion.sampling"]
    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", tree)
    ends = sigmas[sigmas > 0].min(), sigmas.max()
    want = _by_k_diffusion(name, sigmas, x, tree(None, *ends, seed=comfy_cases.SEED))
    # exact where both compute in float32; no ulp beyond twice the peer's own error
    assert_within_budget(
        run(name, "ve", sigmas, x=x), want, run(name, "ve", sigmas, x=x.double()), 0
    )
