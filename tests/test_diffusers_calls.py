"""The ways in which pipelines and trainers call a scheduler, on the drop-ins."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from scopes import quiet_diffusers

diffusers = pytest.importorskip("diffusers")

from diffusers_cases import FACTORS  # noqa: E402
from diffusers_runs import LEARNED, arguments  # noqa: E402

import fastdiff.integrations.diffusers as drop_ins  # noqa: E402

SHAPE = (2, 3, 4, 4)
# all but CogVideoXDPM, whose step has arguments of its own
NAMES = sorted(set(FACTORS) - {"CogVideoXDPMScheduler"})
# one that counts timesteps, one that counts sigmas, two that keep tensors, one with noise
FEW = (
    "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with quiet_diffusers():
        yield


def pair(name, steps=6, **config):
    """diffusers' scheduler and the drop-in, set to a grid."""
    both = []
    for module in (diffusers, drop_ins):
        scheduler = getattr(module, name)(**config)
        scheduler.set_timesteps(2 if name == "SCMScheduler" else steps)
        both.append(scheduler)
    return both


def output(i, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(50 + i)).to(dtype)


def advance(scheduler, x, first=0, last=None, **options):
    """Steps over a part of the grid; the generator is seeded by the step."""
    assert scheduler.config.get("variance_type") not in LEARNED
    grid = scheduler.timesteps[: len(getattr(scheduler, "sigmas", scheduler.timesteps))]
    if type(scheduler).__name__ == "SCMScheduler":
        grid = grid[:-1]
    takes = inspect.signature(scheduler.step).parameters
    for i, t in list(enumerate(grid))[first:last]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        more = {"generator": torch.Generator().manual_seed(i)} if "generator" in takes else {}
        torch.manual_seed(9)
        m = output(i, x.shape, x.dtype)
        x = scheduler.step(m, t, x, **{**more, **options}, return_dict=False)[0]
    return x


def same(ours, theirs):
    """Equal but for roundings, of which a run of six steps makes a few hundred."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    eps = torch.finfo(theirs.dtype).eps
    size = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    assert float((ours - theirs).abs().max() if theirs.numel() else 0.0) <= 200 * eps * size


def start(scheduler, shape=SHAPE):
    return output(99, shape) * float(getattr(scheduler, "init_noise_sigma", 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_after_set_timesteps_and_one_from_the_middle(name):
    theirs, ours = pair(name)
    x = start(theirs)
    same(advance(ours, x), advance(theirs, x))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(2 if name == "SCMScheduler" else 4)
    same(advance(ours, x), advance(theirs, x))
    if hasattr(theirs, "set_begin_index") and name != "SCMScheduler":
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(5)
            scheduler.set_begin_index(2)
        same(advance(ours, x, 2), advance(theirs, x, 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_timestep_of_another_step(name):
    # sigma-indexed schedulers count their steps; some read the timestep as well
    theirs, ours = pair(name, 6)
    x = start(theirs)
    a, b = advance(theirs, x, 0, 1), advance(ours, x, 0, 1)
    takes = inspect.signature(theirs.step).parameters
    results = []
    for scheduler, sample in ((theirs, a), (ours, b)):
        more = {"generator": torch.Generator().manual_seed(3)} if "generator" in takes else {}
        torch.manual_seed(9)
        try:
            t = scheduler.timesteps[0]
            results.append(scheduler.step(output(1), t, sample, **more, return_dict=False)[0])
        except Exception as error:
            results.append(type(error))
    if isinstance(results[0], torch.Tensor):
        same(results[1], results[0])
    else:
        assert results[1] is results[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_output_by_name_by_place_and_by_attribute(name):
    theirs, ours = pair(name)
    x = start(theirs)
    advance(theirs, x, 0, 1), advance(ours, x, 0, 1)
    takes = inspect.signature(theirs.step).parameters

    def call(scheduler):
        more = {"generator": torch.Generator().manual_seed(3)} if "generator" in takes else {}
        torch.manual_seed(9)
        return scheduler.step(output(1), scheduler.timesteps[1], x, **more)

    p, o = call(theirs), call(ours)
    assert type(o).__name__ == type(p).__name__ and isinstance(o, type(p))
    assert list(o.keys()) == list(p.keys()) and len(o.to_tuple()) == len(p.to_tuple())
    for key in p:
        same(o[key], p[key])
        same(getattr(o, key), p[key])
    assert pickle.loads(pickle.dumps(o)).keys() == p.keys()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    "shape",
    # a batch of one and of none, video, sequences, a size that no vector width divides
    [(1, 3, 4, 4), (0, 3, 4, 4), (2, 3, 2, 4, 4), (2, 7, 5), (1, 1, 1, 1), (3, 5, 7, 11)],
    ids=str,
)
def test_shapes(name, shape):
    theirs, ours = pair(name)
    x = start(theirs, shape)
    same(advance(ours, x), advance(theirs, x))


@pytest.mark.parametrize("name", FEW)
def test_layouts_and_float64(name):
    theirs, ours = pair(name)
    x = start(theirs)
    # float64 is reduced to float32 by the classes that upcast: ours must not be worse
    wide = advance(ours, x.double())
    assert wide.dtype == torch.float64
    same(wide.float(), advance(theirs, x.double()).float())
    for y in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], 1)[:, ::2],
        x[:1].expand(2, 3, 4, 4),
    ):
        theirs, ours = pair(name)
        before = y.clone()
        want = advance(theirs, y)
        same(advance(ours, y), want)
        assert torch.equal(y, before)


@pytest.mark.parametrize(
    ("name", "config"),
    # one that keeps the sample beside its noise, two that keep predictions beside it
    [
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("SASolverScheduler", {}),
    ],
)
def test_runs_in_one_memory_order_after_another(name, config):
    theirs, ours = pair(name, **config)
    x = start(theirs)
    turned = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for y in (x, turned, x.contiguous(memory_format=torch.channels_last), x):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(6)
        same(advance(ours, y), advance(theirs, y))


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_generators(name):
    x = start(pair(name)[0])
    for kind in ("list", "global"):
        both = []
        for scheduler in pair(name):
            torch.manual_seed(11)
            several = [torch.Generator().manual_seed(k) for k in (5, 6)]
            y = x
            for i, t in enumerate(scheduler.timesteps):
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(y, t)
                g = several if kind == "list" else None
                y = scheduler.step(output(i), t, y, generator=g).prev_sample
            both.append((y, torch.randn(3), [g.get_state() for g in several]))
        same(both[1][0], both[0][0])
        assert torch.equal(both[1][1], both[0][1])
        assert all(map(torch.equal, both[1][2], both[0][2]))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler"])
def test_given_noise(name):
    noise = output(7)
    for given in (noise, noise[:1], noise.double()):
        theirs, ours = pair(name)
        x = start(theirs)
        options = {"eta": 1.0, "variance_noise": given, "generator": None}
        want, got = advance(theirs, x, **options), advance(ours, x, **options)
        assert got.dtype == want.dtype
        same(got.float(), want.float())  # the tables of diffusers are float32
    theirs, ours = pair("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    options = {"variance_noise": noise, "generator": None}
    same(advance(ours, x, **options), advance(theirs, x, **options))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_training_steps_at_any_timestep(name):
    theirs, ours = getattr(diffusers, name)(), getattr(drop_ins, name)()
    x = output(0)
    for t in (999, 500, torch.tensor(3), 0):  # DDPM steps by one before set_timesteps
        results = []
        for scheduler in (theirs, ours):
            more = {"generator": torch.Generator().manual_seed(3)}
            try:
                results.append(scheduler.step(output(1), t, x, **more).prev_sample)
            except ValueError as error:  # DDIM asks for a grid
                results.append(type(error))
        if isinstance(results[0], torch.Tensor):
            same(results[1], results[0])
        else:
            assert results[1] is results[0]


@pytest.mark.parametrize("name", FEW)
def test_gradients_are_those_of_diffusers(name):
    theirs, ours = pair(name)
    x = start(theirs)
    grads = []
    for scheduler in (theirs, ours):
        sample, m = x.clone().requires_grad_(), output(0).requires_grad_()
        scheduler.scale_model_input(sample, scheduler.timesteps[0])
        takes = inspect.signature(scheduler.step).parameters
        more = {"generator": torch.Generator().manual_seed(3)} if "generator" in takes else {}
        y = scheduler.step(m, scheduler.timesteps[0], sample, **more).prev_sample
        grads.append(torch.autograd.grad(y.square().sum(), (sample, m)))
    for p, o in zip(*grads, strict=True):
        assert torch.equal(p, o)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_in_the_middle_of_a_run_goes_on_alone(name, how):
    theirs, ours = pair(name)
    if how not in (copy.copy, copy.deepcopy) and name == "SASolverScheduler":
        # diffusers keeps a lambda
        with pytest.raises((AttributeError, pickle.PicklingError)):
            how(theirs)
        return
    x = start(theirs)
    a, b = advance(theirs, x, 0, 3), advance(ours, x, 0, 3)
    if getattr(ours, "noise_sampler", None) is not None and how is not copy.copy:
        ours.noise_sampler = theirs.noise_sampler = None  # a tree can not be copied
        theirs.noise_sampler_seed = ours.noise_sampler_seed = 3
    twin = how(ours)
    want = advance(theirs, a, 3)
    advance(ours, b + 1, 3)
    ours.set_timesteps(2 if name == "SCMScheduler" else 6)
    advance(ours, x)
    same(advance(twin, b, 3), want)


@pytest.mark.parametrize("name", FEW)
def test_interleaved_and_in_threads(name):
    theirs, _ = pair(name)
    x = start(theirs)
    want = advance(theirs, x)
    results = {}

    def run(k):
        results[k] = [advance(pair(name)[1], x) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    if "generator" in inspect.signature(theirs.step).parameters or name in FEW:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for k in range(4):
        for got in results[k]:
            same(got, want)
    (_, one), (_, two) = pair(name), pair(name)
    y, z = x, -x
    for i in range(len(one.timesteps)):
        y, z = advance(one, y, i, i + 1), advance(two, z, i, i + 1)
    same(y, want)
    same(z, advance(pair(name)[0], -x))


def test_the_signature_of_the_first_arguments_of_cogvideox_dpm():
    theirs, ours = pair("CogVideoXDPMScheduler")
    x, before = start(theirs), [None, None]
    for return_dict in (False, True):
        y = [x, x]
        for i, t in enumerate(theirs.timesteps):
            for k, scheduler in enumerate((theirs, ours)):
                more = arguments(scheduler, i, t, before[k] if i else None)
                back, old = more["timestep_back"], more["old_pred_original_sample"]
                g = torch.Generator().manual_seed(i)
                out = scheduler.step(
                    output(i), old, t, back, y[k], generator=g, return_dict=return_dict
                )
                before[k] = tuple(out) if isinstance(out, tuple) else out.to_tuple()
                y[k] = before[k][0]
            assert isinstance(out, tuple) == (not return_dict or i == 0 or int(t) < 166)
            same(before[1][0], before[0][0])
            same(before[1][1], before[0][1])


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_refused_as_diffusers_does(name):
    theirs, ours = pair(name)
    known = inspect.signature(theirs.step).parameters
    sample = torch.zeros(SHAPE)
    for word in ("generator", "etta"):
        if word in known:
            continue
        messages = []
        for scheduler in (theirs, ours):
            with pytest.raises(TypeError, match=word) as error:
                scheduler.step(sample, scheduler.timesteps[0], sample, **{word: None})
            messages.append(str(error.value))
        assert messages[0] == messages[1]
