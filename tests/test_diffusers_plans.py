"""What a drop-in knows of a run must go stale with whatever it was made of."""

import copy
import gc
import itertools

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from test_diffusers_calls import advance, output, pair, quiet, same, start  # noqa: E402, F401

import fastdiff.integrations.diffusers as drop_ins  # noqa: E402


def both(name, change, steps=6, begin=3, **config):
    """A run of each class, changed before step `begin`, after one that was not."""
    theirs, ours = pair(name, steps, **config)
    x = start(theirs)
    same(advance(ours, x), advance(theirs, x))
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
        y = advance(scheduler, x, 0, begin)
        change(scheduler)
        results.append(advance(scheduler, y, begin))
    same(results[1], results[0])
    plain = pair(name, steps, **config)[1]
    assert not torch.equal(advance(plain, x), results[1]), "the change has no effect"


def attribute(name, value):
    return lambda scheduler: setattr(scheduler, name, value(scheduler))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("EulerDiscreteScheduler", lambda s: s.sigmas.mul_(1.1)),
        ("DPMSolverMultistepScheduler", lambda s: s.sigmas[-1:].copy_(s.sigmas[-2:-1])),
        ("DDIMScheduler", lambda s: s.alphas_cumprod.mul_(0.9)),
        ("DDIMScheduler", lambda s: s.timesteps[:-1].sub_(1)),
        ("DDIMScheduler", attribute("final_alpha_cumprod", lambda s: torch.tensor(0.99995))),
        ("DDIMScheduler", attribute("alphas_cumprod", lambda s: s.alphas_cumprod * 0.9)),
        ("DDIMScheduler", attribute("num_inference_steps", lambda s: 7)),
        ("DDIMScheduler", lambda s: s.register_to_config(prediction_type="v_prediction")),
        ("DDPMScheduler", lambda s: s.register_to_config(clip_sample=False)),
        ("KDPM2DiscreteScheduler", attribute("sigmas_interpol", lambda s: s.sigmas_interpol * 0.9)),
        ("UniPCMultistepScheduler", lambda s: s.model_outputs[-1].mul_(2.0)),
        ("UniPCMultistepScheduler", lambda s: s.model_outputs.__setitem__(-1, output(77))),
        ("UniPCMultistepScheduler", attribute("last_sample", lambda s: output(78))),
        ("UniPCMultistepScheduler", attribute("lower_order_nums", lambda s: 0)),
        ("UniPCMultistepScheduler", attribute("disable_corrector", lambda s: [3, 4])),
        ("SASolverScheduler", attribute("tau_func", lambda s: lambda t: 0.5)),
        ("HeunDiscreteScheduler", attribute("dt", lambda s: s.dt * 0.5)),
        ("HeunDiscreteScheduler", attribute("prev_derivative", lambda s: output(79))),
        ("PNDMScheduler", lambda s: s.ets.__setitem__(-1, output(76))),
    ],
)  # one for each kind: tables in place and replaced, config, state in place and replaced, callables
def test_a_change_in_the_middle_of_a_run(name, change):
    options = {
        "PNDMScheduler": {"skip_prk_steps": True},
        # a derivative that hangs on the sample
        "KDPM2DiscreteScheduler": {"prediction_type": "v_prediction"},
    }
    both(name, change, **options.get(name, {}))


def test_the_counter_set_back():
    theirs, ours = pair("EulerDiscreteScheduler")
    x = start(theirs)
    results = []
    for scheduler in (theirs, ours):
        y = advance(scheduler, x, 0, 3)
        scheduler._step_index -= 1
        results.append(advance(scheduler, y, 2))
    same(results[1], results[0])


def test_a_callable_at_the_place_of_one_that_is_gone():
    seen = []
    for value in (0.0, 0.3, 0.6, 0.9, 1.0):
        theirs, ours = pair("SASolverScheduler", tau_func=lambda t, value=value: value)
        x = start(theirs)
        got = advance(ours, x)
        same(got, advance(theirs, x))
        seen.append(got)
        del theirs, ours
        gc.collect()
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_the_state_of_one_run_against_the_options_of_another():
    # the second stage of Heun takes a step size that the first one left; with churn it is another
    theirs, ours = pair("FlowMatchHeunDiscreteScheduler")
    x = start(theirs)
    same(advance(ours, x), advance(theirs, x))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6)
    results = []
    for scheduler in (theirs, ours):
        y = x
        for i in range(len(scheduler.timesteps)):
            churn = {"s_churn": 3.0} if i % 2 == 0 else {}
            y = advance(scheduler, y, i, i + 1, **churn)
        results.append(y)
    same(results[1], results[0])


def test_options_that_change_from_call_to_call():
    theirs, ours = pair("DDIMScheduler")
    x = start(theirs)
    for eta in (0.0, 1.0, 0.5, torch.tensor(0.25), 0.0):
        same(advance(ours, x, eta=eta), advance(theirs, x, eta=eta))
    theirs, ours = pair("LMSDiscreteScheduler")
    for order in (4, 2, 4):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(6)
        same(advance(ours, x, order=order), advance(theirs, x, order=order))


def test_betas_that_agree_where_a_repr_shows_them():
    import numpy as np

    one = np.linspace(1e-4, 0.02, 2000)
    two = one.copy()
    two[400:1200] *= 2
    x = output(0)
    results = []
    for betas in (one, two):
        theirs, ours = pair("DDIMScheduler", num_train_timesteps=2000, trained_betas=betas)
        results.append(advance(ours, x))
        same(results[-1], advance(theirs, x))
    assert not torch.equal(*results)


def test_a_size_that_grows_in_the_run():
    theirs, ours = pair("FlowMatchLCMScheduler", 3, scale_factors=[0.75, 1.0])
    for side in (8, 16, 8):
        results = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(3)
            results.append(advance(scheduler, output(1, (1, 2, side, side))[:, :, :, :], 0, 1))
        same(results[1], results[0])
    theirs, ours = pair("FlowMatchLCMScheduler", 3)
    x = output(1, (1, 2, 8, 8))
    same(advance(ours, x), advance(theirs, x))
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(3)
        scheduler.set_scale_factors([0.75, 1.0], "bicubic")
        results.append(advance(scheduler, x, 0, 1))
    same(results[1], results[0])


def test_the_same_sample_twice():
    theirs, ours = pair("HeunDiscreteScheduler")
    x = start(theirs)
    advance(theirs, x, 0, 1), advance(ours, x, 0, 1)
    same(advance(ours, x, 1, 2), advance(theirs, x, 1, 2))


def test_a_shallow_copy_keeps_what_it_had():
    _, ours = pair("HeunDiscreteScheduler")
    x = start(ours)
    y = advance(ours, x, 0, 3)
    twin = copy.copy(ours)
    held = twin.prev_derivative.clone()
    advance(ours, y, 3)
    assert torch.equal(twin.prev_derivative, held)


def test_a_scheduler_inside_a_scheduler():
    results = []
    for module in (diffusers, drop_ins):
        scheduler = module.UniPCMultistepScheduler(solver_p=module.DEISMultistepScheduler())
        scheduler.set_timesteps(6)
        results.append(advance(scheduler, output(0)))
    same(results[1], results[0])
