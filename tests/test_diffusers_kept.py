"""The rest of docs/diffusers_defects.md: rows that are no run against an oracle."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import test_diffusers_mended
import torch
from diffusers_defects import DEPARTS, FAILS, SD
from diffusers_defects_page import KEPT, MORE, tables
from peers import EPS, schedule_of
from rows import run

from fastdiff import solvers
from fastdiff.integrations import diffusers as drop_in
from fastdiff.schedules import Grid

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning",
    "ignore:Should have t:UserWarning",
)  # fmt: skip
SHAPE = (1, 3, 4, 4)
BOTH = [pytest.param(False, id="default"), pytest.param(True, id="corrected")]


def outputs_of(scheduler, seed=3, channels=3):
    g = torch.Generator().manual_seed(seed)
    n = len(scheduler.timesteps)
    return [torch.randn(1, channels, 4, 4, generator=g, dtype=torch.float64) for _ in range(n)]


def walk(scheduler, outputs, x=None, dtype=torch.float64, **options):
    """The states of a run."""
    if x is None:
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    x, states = x.to(dtype), []
    for t, m in zip(scheduler.timesteps, outputs, strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(m.to(dtype), t, x, **options)[0]
        states.append(x)
    return states


def pair(name, steps, corrected=False, **config):
    """diffusers' scheduler and the drop-in, set to a number of steps."""
    theirs = getattr(diffusers, name)(**config)
    ours = getattr(drop_in, name)(**config, corrected=corrected)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
    return theirs, ours


def test_the_page():
    page = (Path(__file__).parent.parent / "docs/diffusers_defects.md").read_text()
    assert page.endswith(tables()), "python tests/diffusers_defects_page.py writes it"
    here = {**globals(), **vars(test_diffusers_mended)}
    assert all(row[-1] in here for row in [*MORE, *KEPT])
    assert not set(FAILS) & set(DEPARTS)


# --- mended -------------------------------------------------------------------------------------

ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("corrected", BOTH)
@pytest.mark.parametrize("name", ["DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "CogVideoXDDIM",
                                  "LCM", "TCD"])  # fmt: skip
def test_nothing_but_noise(name, corrected):
    clips = {} if name == "CogVideoXDDIM" else {"clip_sample": False}
    theirs, ours = pair(f"{name}Scheduler", 4, corrected, **ZERO, **clips)
    outputs = outputs_of(ours)
    assert not walk(theirs, outputs, dtype=torch.float32)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"prediction_type must be 'v_prediction' or 'sample' at"):
        walk(ours, outputs)
    if clips and name != "TCD":  # a picture, of a kind
        theirs, ours = pair(f"{name}Scheduler", 4, corrected, **ZERO, clip_sample=True)
        if corrected:
            with pytest.raises(ValueError, match="leaves noise alone"):
                walk(ours, outputs)
            return
        noise = torch.Generator
        first = [
            s.step(outputs[0].float(), s.timesteps[0], torch.ones(SHAPE),
                   generator=noise().manual_seed(0))[0]
            for s in (theirs, ours)
        ]  # fmt: skip
        assert torch.equal(*first)


@pytest.mark.parametrize("corrected", BOTH)
def test_nothing_but_data(corrected):
    theirs, ours = pair("DDIMInverseScheduler", 4, corrected, prediction_type="sample")
    outputs = outputs_of(ours)
    assert not walk(theirs, outputs, dtype=torch.float32)[0].isfinite().all()
    with pytest.raises(ValueError, match="must be 'epsilon' or 'v_prediction' to leave clean data"):
        walk(ours, outputs)


@pytest.mark.parametrize("corrected", BOTH)
@pytest.mark.parametrize(
    "name, config",
    [
        ("DPMSolverSinglestepScheduler",
         {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        ("SASolverScheduler", {"algorithm_type": "noise_prediction"}),
    ],
)  # fmt: skip
def test_thresholding_of_the_noise_form(name, config, corrected):
    config = {**config, "thresholding": True, "dynamic_thresholding_ratio": 0.9}
    theirs, ours = pair(name, 6, corrected, **config)
    outputs = outputs_of(ours)
    with pytest.raises(RuntimeError, match="size of tensor"):
        walk(theirs, outputs)
    x = torch.full(SHAPE, 0.5, dtype=torch.float64)
    before = x
    for i, (t, m) in enumerate(zip(ours.timesteps, outputs, strict=True)):
        x = ours.step(m, t, before)[0]
        sigma = float(ours.sigmas[i])
        alpha, sigma = 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma)
        x0 = (before - sigma * m) / alpha
        bound = max(float(torch.quantile(x0.abs().flatten(), 0.9)), 1.0)
        bound = min(bound, ours.config.sample_max_value)
        want = (before - alpha * x0.clamp(-bound, bound) / bound) / sigma
        kept = ours.model_outputs[-1]
        if name == "DPMSolverSinglestepScheduler" and kept is None:
            continue
        # the limit is taken in float32, of terms of the size of x0's
        assert (kept - want).abs().max() <= 8 * EPS * float(x0.abs().max()) * alpha / sigma
        assert bool(x.isfinite().all())
        before = x


@pytest.mark.parametrize("corrected", BOTH)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_cosine_ends_at_sigma_min(steps, corrected):
    theirs, ours = pair("CosineDPMSolverMultistepScheduler", steps, corrected,
                        final_sigmas_type="sigma_min", sigma_min=0.02, sigma_max=30.0)  # fmt: skip
    outputs = outputs_of(ours)
    generator = torch.Generator().manual_seed(0)
    try:
        failed = not walk(theirs, outputs, generator=generator)[-1].isfinite().all()
    except RecursionError:
        failed = True
    assert failed, "mended upstream?"
    states = walk(ours, outputs, generator=generator)
    if steps > 1:
        assert (states[-1] - states[-2]).abs().max() <= EPS * states[-2].abs().max()
    assert bool(states[-1].isfinite().all())


@pytest.mark.parametrize("corrected", BOTH)
def test_edm_sde_ends_at_sigma_min(corrected):
    """In float64 a last level that float32 rounded up would be a step backwards."""
    rises = 0
    for steps in range(4, 24):
        for order in (2, 3):
            theirs, ours = pair(
                "EDMDPMSolverMultistepScheduler", steps, corrected, solver_order=order,
                algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min",
                sigma_schedule="exponential", lower_order_final=False,
            )  # fmt: skip
            outputs = outputs_of(ours)
            if order == 3:
                with pytest.raises(UnboundLocalError):
                    walk(theirs, outputs)
            if order == 2 or theirs.sigmas[-1] < theirs.sigmas[-2]:
                assert walk(ours, outputs)[-1].isfinite().all()
                continue
            rises += bool(theirs.sigmas[-1] > theirs.sigmas[-2])
            states = walk(ours, outputs)
            assert (states[-1] - states[-2]).abs().max() <= EPS * states[-2].abs().max()
    assert rises, "mended upstream?"


@pytest.mark.parametrize("corrected", BOTH)
def test_unipc_ends_twice(corrected):
    """The step of length 0 is what steps of falling length go to, each ten times nearer."""
    config = {**SD, "solver_order": 3, "lower_order_final": False, "use_karras_sigmas": True,
              "final_sigmas_type": "sigma_min"}  # fmt: skip
    theirs, ours = pair("UniPCMultistepScheduler", 10, corrected, **config)
    outputs = outputs_of(ours)
    assert not walk(theirs, outputs, dtype=torch.float32)[-1].isfinite().all()
    got, off = walk(ours, outputs)[-1], []
    for h in (1e-2, 1e-3, 1e-4):
        near = diffusers.UniPCMultistepScheduler(**config)
        near.set_timesteps(10)
        near.sigmas = near.sigmas.double()
        near.sigmas[-1] *= 1 - h
        off.append(float((walk(near, outputs)[-1] - got).abs().max()))
    assert 9 < off[0] / off[1] < 11 and 9 < off[1] / off[2] < 11, off


@pytest.mark.parametrize("sigmas", [{}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}])
def test_levels_below_an_ancestral_step(sigmas):
    for steps in (2, 5, 10):
        theirs, ours = pair("KDPM2AncestralDiscreteScheduler", steps,
                            beta_schedule="squaredcos_cap_v2", **sigmas)  # fmt: skip
        if theirs.timesteps.isfinite().all():
            assert torch.equal(theirs.timesteps, ours.timesteps)
            continue
        levels = ours.sigmas.double()
        sigma = torch.cat([levels[:1], levels[1:-1:2]])
        then = torch.cat([sigma[1:], sigma.new_zeros(1)])
        down = torch.cat([ours.sigmas_down[:1], ours.sigmas_down[1:-1:2]]).double()
        up = torch.cat([ours.sigmas_up[:1], ours.sigmas_up[1:-1:2]]).double()
        assert (down[:-1] * sigma[:-1] - then[:-1] ** 2).abs().max() <= EPS * (then**2).max()
        assert ((down**2 + up**2 - then**2).abs() <= 2 * EPS * then**2).all()
        times = ours.timesteps
        # interpolated between logarithms in float32, of a thousand times
        assert float(times.diff().max()) <= 1000 * EPS, times
        assert bool(walk(ours, outputs_of(ours))[-1].isfinite().all())
    theirs, _ = pair("KDPM2AncestralDiscreteScheduler", 10, beta_schedule="squaredcos_cap_v2")
    assert not theirs.timesteps.isfinite().all(), "mended upstream?"


def test_dpm_2_begins_at_the_first_level():
    config = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    theirs, ours = pair("KDPM2DiscreteScheduler", 10, **config)
    outputs = outputs_of(ours)
    assert not walk(theirs, outputs, dtype=torch.float32)[-1].isfinite().all(), "mended upstream?"
    levels = ours.sigmas.double().numpy()
    levels = np.concatenate([levels[:1], levels[1:][np.diff(levels) != 0]])
    grid = Grid(np.append(np.linspace(1, 0.5, 10), 0.0), 1 / np.hypot(1, levels),
                levels / np.hypot(1, levels))  # fmt: skip
    table = solvers.build_on("dpm_2", schedule_of(ours), grid)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x * float(ours.init_noise_sigma)
    feed = iter([m.numpy() for m in outputs])
    want = run(table, x.numpy() * grid.alphas[0], lambda *_: next(feed), None)[-1]
    got = walk(ours, outputs, x)[-1].numpy()
    # the middles are its own float32 levels, the table's are exact
    assert np.abs(got - want).max() <= 8 * EPS * float(x.abs().max())


ONE_STEP = [
    ("EulerDiscreteScheduler", {}), ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", {}), ("LMSDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("DDPMScheduler", {"timestep_spacing": "linspace"}),
]  # fmt: skip


@pytest.mark.parametrize("name, config", ONE_STEP)
def test_one_step_begins_at_the_noisiest(name, config):
    theirs, ours = pair(name, 1, True, **config)
    _, default = pair(name, 1, False, **config)
    assert float(theirs.timesteps[0]) == float(default.timesteps[0]) == 0, "mended upstream?"
    assert float(ours.timesteps[0]) == 999
    assert ours.config.timestep_spacing == "linspace"
    if hasattr(ours, "sigmas"):
        abar = float(ours.alphas_cumprod[-1].double())
        assert abs(float(ours.sigmas[0]) / ((1 - abar) / abar) ** 0.5 - 1) <= 8 * EPS


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep", "CosineDPMSolverMultistep"])
def test_first_noise_of_edm(name):
    theirs, ours = pair(f"{name}Scheduler", 4, True)
    _, default = pair(f"{name}Scheduler", 4)
    assert theirs.init_noise_sigma == default.init_noise_sigma > ours.init_noise_sigma
    assert ours.init_noise_sigma == theirs.config.sigma_max


# --- kept ---------------------------------------------------------------------------------------


def test_rounded_times():
    for corrected in (False, True):
        theirs, ours = pair("DPMSolverMultistepScheduler", 7, corrected, use_karras_sigmas=True)
        assert torch.equal(theirs.timesteps, ours.timesteps)
        assert not theirs.timesteps.is_floating_point()


@pytest.mark.parametrize("corrected", BOTH)
def test_churn_comes_after_the_network(corrected):
    theirs, ours = pair("EulerDiscreteScheduler", 5, corrected)
    t, x, m = theirs.timesteps[2], torch.full(SHAPE, 3.0), torch.full(SHAPE, 0.5)
    new = []
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(2)
        told = scheduler.scale_model_input(x, t)
        new.append(scheduler.step(m, t, x, s_churn=100.0, s_noise=0.0)[0])
        sigma = float(scheduler.sigmas[2])
        assert torch.allclose(told, x / (sigma**2 + 1) ** 0.5, rtol=4 * EPS, atol=0)
    assert (new[0] - new[1]).abs().max() <= 4 * EPS * new[0].abs().max()


def test_one_evaluation_too_many():
    for corrected in (False, True):
        theirs, ours = pair("DPMSolverMultistepScheduler", 7, corrected, **SD,
                            use_karras_sigmas=True, final_sigmas_type="sigma_min")  # fmt: skip
        assert theirs.sigmas[-1] == theirs.sigmas[-2]
        assert len(ours.timesteps) == len(theirs.timesteps) == 7
        states = walk(ours, outputs_of(ours))
        assert torch.equal(states[-1], states[-2])


@pytest.mark.parametrize("corrected", BOTH)
def test_cogvideox_never_clips(corrected):
    for scheduler in pair("CogVideoXDDIMScheduler", 1, corrected, prediction_type="sample"):
        assert scheduler.config.clip_sample
        x = torch.full(SHAPE, 3.0)
        assert float(scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)[1].max()) == 3


@pytest.mark.parametrize("corrected", BOTH)
def test_pndm_needs_four_steps(corrected):
    for module, more in ((diffusers, {}), (drop_in, {"corrected": corrected})):
        with pytest.raises(ValueError, match="broadcast"):
            module.PNDMScheduler(**more).set_timesteps(3)


@pytest.mark.parametrize("corrected", BOTH)
def test_no_timestep_1000(corrected):
    for scheduler in pair("DDIMScheduler", 1000, corrected, steps_offset=1):
        with pytest.raises(IndexError):
            walk(scheduler, outputs_of(scheduler))


@pytest.mark.parametrize("corrected", BOTH)
def test_no_inverse_of_an_sde(corrected):
    for algorithm in ("sde-dpmsolver++", "sde-dpmsolver"):
        for scheduler in pair("DPMSolverMultistepInverseScheduler", 5, corrected,
                              algorithm_type=algorithm):  # fmt: skip
            states = walk(scheduler, outputs_of(scheduler), dtype=torch.float32)
            assert not states[-1].isfinite().all()


@pytest.mark.parametrize("corrected", BOTH)
def test_sa_solver_has_a_corrector(corrected):
    for scheduler in pair("SASolverScheduler", 5, corrected, corrector_order=0):
        with pytest.raises(AssertionError):
            walk(scheduler, outputs_of(scheduler))


def test_batch_step_is_theirs():
    theirs, ours = pair("DDIMParallelScheduler", 7, True, timestep_spacing="trailing")
    x, m = torch.ones(7, 3, 4, 4), torch.full((7, 3, 4, 4), 0.5)
    new = [s.batch_step_no_noise(m, s.timesteps, x) for s in (theirs, ours)]
    assert torch.equal(*new)


# --- the option ---------------------------------------------------------------------------------


def test_the_option_is_saved(tmp_path):
    made = drop_in.DDIMScheduler(corrected=True)
    made.save_pretrained(tmp_path)
    assert drop_in.DDIMScheduler.from_pretrained(tmp_path).config["corrected"] is True
    assert '"corrected": true' in (tmp_path / "scheduler_config.json").read_text()
    other = drop_in.PNDMScheduler.from_config(made.config)
    assert other.config["corrected"] is True
    off = drop_in.DDIMScheduler.from_config(made.config, corrected=False)
    again = drop_in.DDIMScheduler.from_config(drop_in.DDIMScheduler().config)
    for plain in (off, again):  # the file of a default is the file that diffusers saves
        assert "corrected" not in plain.config
    with pytest.raises(TypeError, match="DDIMScheduler: corrected must be a bool, got 1"):
        drop_in.DDIMScheduler(corrected=1)


def test_gradients_are_refused_with_the_option():
    theirs, ours = pair("DDIMScheduler", 5, True)
    x = torch.ones(SHAPE, requires_grad=True)
    with pytest.raises(ValueError, match="must not record gradients with corrected=True"):
        ours.step(x, ours.timesteps[0], x)
    with torch.no_grad():
        ours.step(x, ours.timesteps[0], x)
    assert theirs.step(x, theirs.timesteps[0], x)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_of_diffusers_own_keeps_the_dtype(dtype):
    """Kept tensors are float32 here, and diffusers' own code would return what is widest."""
    config = {"thresholding": True, "algorithm_type": "dpmsolver", "solver_order": 2,
              "final_sigmas_type": "sigma_min"}  # fmt: skip
    theirs, ours = pair("DPMSolverMultistepScheduler", 6, **config)
    outputs = outputs_of(ours)
    for a, b in zip(*(walk(s, outputs, dtype=dtype) for s in (theirs, ours)), strict=True):
        assert a.dtype == b.dtype == dtype
    # one that begins as a row: what it has kept is in its float32 ring
    theirs, ours = pair("PNDMScheduler", 6, skip_prk_steps=True)
    outputs, x = outputs_of(ours), torch.ones(SHAPE, dtype=dtype)
    x = ours.step(outputs[0].to(dtype), ours.timesteps[0], x)[0]
    ours._fastdiff.plan.moves.clear()
    ours._fastdiff.plan.traces = Refusing()
    got = ours.step(outputs[1].to(dtype), ours.timesteps[1], x)[0]
    assert got.dtype == dtype


class Refusing(dict):
    """Traces none of which is a row."""

    def get(self, key, default=None):
        return "refused"
