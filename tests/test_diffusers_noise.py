"""`noise="counter"`: noise of a drop-in by seed, step and element."""

import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from test_diffusers_calls import output, quiet  # noqa: E402, F401

import fastdiff.integrations.diffusers as drop_ins  # noqa: E402
from fastdiff.integrations.diffusers._noise import CounterPath  # noqa: E402

# every way to noise: by timestep, by level, twice a step, learned variance, on a Brownian path
STOCHASTIC = {
    "DDPMScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {"num_train_timesteps": 60},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "SASolverScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "UnCLIPScheduler": {"variance_type": "learned_range"},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
    "DPMSolverSDEScheduler": {"num_train_timesteps": 60},
    "CosineDPMSolverMultistepScheduler": {},
}
# whose step takes no generator, so that the seeds come from torch's global one
GLOBAL = ("DPMSolverSDEScheduler",)


def run(name, x, generator, *, steps=5, rows=slice(None)):
    scheduler = getattr(drop_ins, name)(**STOCHASTIC[name], noise="counter")
    scheduler.set_timesteps(steps)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    learned = "variance_type" in STOCHASTIC[name]
    for i, t in enumerate(scheduler.timesteps):
        m = output(i, (3, 3 * (1 + learned), 4, 4))[rows]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        more = {} if name in GLOBAL else {"generator": generator}
        x = scheduler.step(m, t, x, **more).prev_sample
    return x, scheduler


def seeded(*seeds):
    several = [torch.Generator().manual_seed(s) for s in seeds]
    return several


@pytest.mark.parametrize("name", sorted(set(STOCHASTIC) - set(GLOBAL)))
def test_a_sample_hangs_on_its_seed_alone(name):
    x = output(99, (3, 3, 4, 4))
    whole, _ = run(name, x, seeded(5, 6, 2**40))
    for k, seed in enumerate((5, 6, 2**40)):
        alone, _ = run(name, x[k : k + 1], seeded(seed), rows=slice(k, k + 1))
        assert torch.equal(alone, whole[k : k + 1])
    again, _ = run(name, x, seeded(5, 6, 2**40))
    assert torch.equal(again, whole)
    # one generator: its seed and those behind it
    following, _ = run(name, x, torch.Generator().manual_seed(5))
    assert torch.equal(following[:2], whole[:2])
    assert not torch.equal(following[2], whole[2])


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_without_a_generator_the_global_one_gives_the_seeds(name):
    x = output(99, (3, 3, 4, 4))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(name, x, None)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_second_run_has_noise_of_its_own():
    scheduler = drop_ins.DDPMScheduler(noise="counter")
    x, generator = output(0), torch.Generator()
    results = []
    for seed in (1, 2, 1, None, None):
        scheduler.set_timesteps(4)
        g = None if seed is None else generator.manual_seed(seed)
        results.append(scheduler.step(output(1), scheduler.timesteps[0], x, generator=g)[0])
    assert torch.equal(results[0], results[2])
    others = [results[i] for i in (0, 1, 3, 4)]
    assert len({tuple(r.flatten().tolist()) for r in others}) == 4


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
def test_brownian_samplers_take_the_path_of_the_library(name):
    torch.manual_seed(3)
    _, scheduler = run(name, output(99, (3, 3, 4, 4)), torch.Generator().manual_seed(3))
    assert isinstance(scheduler.noise_sampler, CounterPath)


def test_moments():
    # Euler ancestral on a model that predicts no noise: the sample is a sum of its noises, whose
    # variance the coefficients of diffusers give
    shape = (4, 4, 64, 64)
    scheduler = drop_ins.EulerAncestralDiscreteScheduler(noise="counter")
    scheduler.set_timesteps(4)
    x, variance = torch.zeros(shape), 0.0
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.zeros(shape), t, x, generator=generator).prev_sample
        a, b = (float(s) ** 2 for s in scheduler.sigmas[i : i + 2])
        variance += b * (a - b) / a
    n = x.numel()
    assert abs(float(x.mean())) < 4 * (variance / n) ** 0.5
    assert abs(float(x.var()) / variance - 1) < 4 * (2 / n) ** 0.5
    fourth = float((x / variance**0.5).pow(4).mean())
    assert abs(fourth - 3) < 4 * (96 / n) ** 0.5


def test_the_source_of_noise_is_part_of_the_config():
    scheduler = drop_ins.DDPMScheduler(noise="counter")
    assert drop_ins.DDIMScheduler.from_config(scheduler.config).config.noise == "counter"
    assert drop_ins.DDPMScheduler.from_config(scheduler.config).config.noise == "counter"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusers.DDPMScheduler.from_config(drop_ins.DDPMScheduler().config)
    with pytest.raises(ValueError, match="noise must be one of"):
        drop_ins.DDPMScheduler(noise="philox")


def test_generators_that_are_seeded_anew_without_a_new_grid():
    """DDPM goes by the timestep, so that several pictures may follow one `set_timesteps`."""
    scheduler = drop_ins.DDPMScheduler(noise="counter")
    scheduler.set_timesteps(4)
    x, t = output(0), scheduler.timesteps[0]

    def step(generator):
        return scheduler.step(output(1), t, x, generator=generator).prev_sample

    one, several = torch.Generator(), seeded(1, 2)
    first, second = (step(one.manual_seed(seed)) for seed in (1, 7))
    assert torch.equal(step(one.manual_seed(1)), first)
    assert not torch.equal(second, first)
    before = step(several)
    several[0] = torch.Generator().manual_seed(7)
    assert torch.equal(before[:1], first[:1])
    assert torch.equal(step(several)[:1], second[:1])


@pytest.mark.parametrize(("generator", "got"), [(7, "int"), ([torch.Generator(), None], "one of ")])
def test_what_is_no_generator_is_refused(generator, got):
    scheduler = drop_ins.DDPMScheduler(noise="counter")
    scheduler.set_timesteps(4)
    rule = r"step: generator must be a torch\.Generator or a list of them, got " + got
    with pytest.raises(TypeError, match=rule):
        scheduler.step(output(1), scheduler.timesteps[0], output(0), generator=generator)
