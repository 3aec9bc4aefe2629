"""Nodes, names, schedules and noise, on ComfyUI's own interface objects."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import subprocess
import sys

import comfy_cases
import fake_comfy
import numpy as np
import pytest
import test_spacings_comfy
import torch
from comfy_cases import SPACES, levels

import fastdiff
from fastdiff.integrations import comfyui
from fastdiff.integrations.comfyui import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    OFFERS,
    CounterNoise,
)
from fastdiff.integrations.comfyui.__main__ import FOLDER, main
from fastdiff.integrations.comfyui._names import draws
from fastdiff.solvers import SOLVERS

SEED = 11


@pytest.fixture
def comfy(monkeypatch):
    return fake_comfy.install(monkeypatch)


def pointwise(x, sigma, cond):
    """A model whose answer for an image depends on that image alone."""
    level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x)
    return torch.tanh(x / (1 + level) + (0.3 if cond == "negative" else 0.0))


def latent_noise(shape, seed=SEED):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sampled(sampler, space, shape=(2, 4, 4, 4), *, seed=SEED, cfg=1.7, noise=None, **more):
    """What SamplerCustomAdvanced does with a SAMPLER."""
    sampling, steps = SPACES[space][0](), more.pop("steps", 5)
    guider = comfy_cases.guider_of(sampling, cfg, pointwise)
    noise = latent_noise(shape) if noise is None else noise
    latent = more.pop("latent", torch.zeros(noise.shape))
    return guider.sample(noise, latent, sampler, levels(space, steps), seed=seed, **more)


def node(name, **options):
    return NODE_CLASS_MAPPINGS[f"FastdiffSampler_{name}"]().get_sampler(**options)[0]


# --- nodes ----------------------------------------------------------------------------------


def test_nodes_are_what_comfyui_reads():
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    assert {f"FastdiffSampler_{name}" for name in SOLVERS} <= set(NODE_CLASS_MAPPINGS)
    for key, cls in NODE_CLASS_MAPPINGS.items():
        inputs = cls.INPUT_TYPES()["required"]
        json.dumps(inputs, allow_nan=False)  # a browser reads it
        assert len(cls.RETURN_TYPES) == 1 and cls.CATEGORY.startswith("fastdiff"), key
        assert callable(getattr(cls, cls.FUNCTION)), key
        for kind, *settings in inputs.values():
            if isinstance(kind, list):
                assert settings[0]["default"] in kind, key
            elif settings and "min" in settings[0]:
                low, value, high = (settings[0][k] for k in ("min", "default", "max"))
                assert low <= value <= high, key


@pytest.mark.parametrize("name", OFFERS)
def test_every_sampler_node_samples(name, comfy):
    """With each choice of its words, and each whole number from end to end."""
    inputs = NODE_CLASS_MAPPINGS[f"FastdiffSampler_{name}"].INPUT_TYPES()["required"]
    assert ("noise" in inputs) == draws(name)
    base = {k: settings[0]["default"] for k, (_, *settings) in inputs.items()}
    tries = [base]
    for option, (kind, settings) in inputs.items():
        if isinstance(kind, list):
            tries += [base | {option: word} for word in kind]
        elif kind == "INT":
            tries += [base | {option: settings[end]} for end in ("min", "max")]
    flow_alone, edm_alone = name.startswith("flow_"), name == "consistency"
    space = "flow" if flow_alone else "ve"
    for options in tries:
        steps = {"steps": 6}
        got = sampled(node(name, **options), space, **steps)
        assert got.shape == (2, 4, 4, 4) and bool(got.isfinite().all()), options
    for other in ("flow", "ve"):
        refused = (flow_alone and other == "ve") or (edm_alone and other == "flow")
        if refused:
            with pytest.raises(ValueError, match=r"must have an? (flow|EDM) schedule"):
                sampled(node(name, **base), other)
        else:
            assert bool(sampled(node(name, **base), other).isfinite().all())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["euler", "seeds_2", "euler_ancestral_cfg_pp"])
def test_inpainting_keeps_what_is_outside_the_mask(name, space, comfy):
    latent = latent_noise((2, 4, 4, 4), 5)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1.0
    got = sampled(node(name), space, latent=latent, denoise_mask=mask)
    # the last step ends in the x0 prediction, which is the latent there
    assert torch.equal(got[..., 2:], latent[..., 2:].expand_as(got[..., 2:]))
    assert not torch.equal(got[..., :2], latent[..., :2])


def test_callback_and_arguments_are_as_comfyui_has_them(comfy):
    """Every step is told, and nothing that was handed in is changed."""
    told = []
    sampler = node("dpmpp_2s_ancestral_cfg_pp")
    noise, latent = latent_noise((1, 4, 8)), torch.ones(1, 4, 8)
    copies = noise.clone(), latent.clone()
    sampled(
        sampler, "ve", noise=noise, latent=latent,
        callback=lambda i, x0, x, total: told.append((i, x0.shape, x.shape, total)),
    )  # fmt: skip
    assert told == [(i, (1, 4, 8), (1, 4, 8), 5) for i in range(5)]
    assert torch.equal(noise, copies[0]) and torch.equal(latent, copies[1])
    extra = {"model_options": {"transformer_options": {}}, "seed": 1, "denoise_mask": None}
    guider = comfy_cases.guider_of(SPACES["ve"][0](), 1.7, pointwise)
    model = fake_comfy.Inpaint(guider, None, None, None)
    sampler.sampler_function(model, latent, levels("ve", 2), extra_args=extra, disable=True)
    assert extra["model_options"] == {"transformer_options": {}}


def test_cfg_pp_asks_for_the_unconditional_output_at_scale_1(comfy):
    """ComfyUI would leave it out there, and give zeros."""
    asked = {}
    for name in ("euler", "euler_cfg_pp"):
        calls = asked[name] = []

        def counting(x, sigma, cond, calls=calls):
            calls.append(cond)
            return pointwise(x, sigma, cond)

        guider = comfy_cases.guider_of(SPACES["ve"][0](), 1.0, counting)
        noise = latent_noise((2, 4, 4, 4))
        guider.sample(noise, torch.zeros_like(noise), node(name), levels("ve", 3), seed=1)
    assert asked["euler"] == ["positive"] * 3
    assert sorted(asked["euler_cfg_pp"]) == ["negative"] * 3 + ["positive"] * 3


def test_few_levels_and_wrong_ones(comfy):
    function = comfyui.sampler_function("euler")
    model = fake_comfy.Inpaint(comfy_cases.guider_of(SPACES["flow"][0]()), None, None, None)
    x, extra = torch.ones(1, 4), {"model_options": {}, "seed": 0, "denoise_mask": None}
    for few in (torch.zeros(0), torch.ones(1)):
        assert function(model, x, few, extra_args=extra) is x
    for wrong in ([0.1, 0.5], [0.5, 0.5], [0.5, -0.1], [float("inf"), 0.0]):
        with pytest.raises(ValueError, match="sigmas must fall from step to step"):
            function(model, x, torch.tensor(wrong), extra_args=extra)
    with pytest.raises(ValueError, match="sigmas of a flow must be at most 1, got 3"):
        function(model, x, torch.tensor([3.0, 0.0]), extra_args=extra)
    with pytest.raises(ValueError, match="noise must be one of comfyui, counter, brownian"):
        function(model, x, torch.tensor([0.5, 0.0]), extra_args=extra, noise="gaussian")
    with pytest.raises(TypeError, match="options of euler must be among"):
        function(model, x, torch.tensor([0.5, 0.0]), extra_args=extra, eta=1.0)


def test_noise_scale_of_a_model(comfy):
    """Step noise has the scale of the noise that the model was trained with."""
    sigmas = torch.tensor([0.9, 0.5, 0.0])
    tables = [
        comfyui._samplers.plan("lcm", sigmas, fake_comfy.sampling_of("flow", 1.0, scale), {}).table
        for scale in (1.0, 3.0)
    ]
    assert tables[1].rows[0].x["n1"] == 3 * tables[0].rows[0].x["n1"] == 1.5


# --- noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["counter", "brownian"])
@pytest.mark.parametrize("space", SPACES)
def test_an_image_does_not_depend_on_its_batch(kind, space, comfy):
    """Image 2 of four, alone: the same bits, from the noise node and the sampler's noise."""
    sampler = node("euler_ancestral", noise=kind)

    def images(latent):
        noise = CounterNoise(SEED)
        return sampled(sampler, space, noise=noise.generate_noise(latent), seed=noise.seed)

    four = images({"samples": torch.zeros(4, 4, 4, 4)})
    alone = images({"samples": torch.zeros(1, 4, 4, 4), "batch_index": [2]})
    assert torch.equal(four[2:3], alone)
    assert len({tuple(image.flatten().tolist()) for image in four}) == 4
    seeded = CounterNoise(SEED + 2)
    other = sampled(
        sampler, space, noise=seeded.generate_noise({"samples": torch.zeros(1, 4, 4, 4)}),
        seed=seeded.seed,
    )  # fmt: skip
    assert torch.equal(other, alone)


def test_comfyuis_noise_is_the_default(comfy):
    """The stream of its generator, which another seed or another kind changes."""
    want = sampled(node("euler_ancestral"), "ve")
    assert torch.equal(want, sampled(node("euler_ancestral", noise="comfyui"), "ve"))
    for other in ({"seed": SEED + 1}, {}):
        kind = "comfyui" if other else "counter"
        got = sampled(node("euler_ancestral", noise=kind), "ve", **other)
        assert not torch.equal(want, got)


def test_counter_noise_object():
    """NOISE has a seed and makes the noise of a latent; near 2**64 the seeds wrap."""
    noise = NODE_CLASS_MAPPINGS["FastdiffNoise"]().get_noise(2**64 - 1)[0]
    assert noise.seed == 2**64 - 1
    got = noise.generate_noise({"samples": torch.zeros(2, 3, 2)})
    assert torch.equal(got, fastdiff.randn([2**64 - 1, 0], (3, 2)))
    assert got.dtype == torch.float32 and noise.seed == 2**64 - 1
    # ComfyUI copies what it caches
    assert copy.deepcopy(noise.seed).images == noise.seed.images == (0, 1)


# --- schedules ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "flow", "flux"])
@pytest.mark.parametrize("name", test_spacings_comfy.COMFY)
def test_spacings_are_comfyuis_on_its_models(name, kind, comfy):
    """ComfyUI's own functions on the model's float32 table."""
    sampling = fake_comfy.sampling_of(*((kind, 3.0) if kind == "flow" else (kind,)))
    for steps in (1, 4, 20):
        want = np.array(test_spacings_comfy.COMFY[name](_InFloats(sampling), steps))
        got = comfyui.sigmas(sampling, name, steps)
        assert got.dtype == torch.float32 and got[-1] == 0 and len(got) == steps + 1
        # the table is rounded to float32, and a warp or a logarithm of it again
        assert (np.abs(got.numpy() - want) <= 16 * np.finfo(np.float32).eps * want).all()


class _InFloats:
    """A model's sampling for the transcriptions, which count in plain numbers."""

    def __init__(self, sampling):
        self.own, self.sigmas = sampling, sampling.sigmas.double().numpy()

    def timestep(self, sigma):
        found = self.own.timestep(torch.tensor([sigma], dtype=torch.float64))
        return found.item()

    def sigma(self, t):
        return float(self.own.sigma(torch.tensor(float(t))))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["karras", "exponential", "kl_optimal"])
def test_ramps_run_between_the_models_ends(name, space, comfy):
    """As ComfyUI calls them: sigma_max to sigma_min, a shift or none, and 0."""
    sampling = SPACES[space][0]()
    got = comfyui.sigmas(sampling, name, 7)
    assert len(got) == 8 and got[-1] == 0 and bool((got.diff() < 0).all())
    ends = torch.stack([sampling.sigma_max, sampling.sigma_min])
    # through a time of the schedule and back
    assert float((got[[0, -2]] / ends - 1).abs().max()) <= 1e-6
    if name == "karras":
        high, low = (float(end) ** (1 / 7) for end in ends)
        want = (high + np.linspace(0, 1, 7) * (low - high)) ** 7
        assert np.abs(got[:-1].numpy() / want - 1).max() <= 1e-6


def test_scheduler_nodes(comfy):
    """With the options of the spacing, and the tail that a lower denoise leaves."""
    patcher = fake_comfy.ModelPatcher(fake_comfy.Model(SPACES["ve"][0](), pointwise))
    any_of = NODE_CLASS_MAPPINGS["FastdiffScheduler"]()
    for name in any_of.INPUT_TYPES()["required"]["spacing"][0]:
        # vp has levels of its own, and laplace's coincide at the ends
        if name in fastdiff.schedules.SPACINGS["discrete"] and name not in ("vp", "laplace"):
            (got,) = any_of.get_sigmas(patcher, 5, 1.0, spacing=name)
            assert len(got) == 6 and got[-1] == 0, name
    steep = NODE_CLASS_MAPPINGS["FastdiffScheduler_karras"]()
    (of_7,), (of_3,) = (steep.get_sigmas(patcher, 5, 1.0, rho=rho) for rho in (7.0, 3.0))
    assert torch.equal(of_7, any_of.get_sigmas(patcher, 5, 1.0, spacing="karras")[0])
    assert not torch.equal(of_7, of_3)
    (whole,) = steep.get_sigmas(patcher, 10, 1.0, rho=7.0)
    (tail,) = steep.get_sigmas(patcher, 5, 0.5, rho=7.0)
    assert torch.equal(tail, whole[-6:])
    assert len(steep.get_sigmas(patcher, 5, 0.0, rho=7.0)[0]) == 0


def test_schedules_refuse_what_they_do_not_know(comfy):
    odd = fake_comfy.sampling_of("flow", 3.0)
    odd.sigmas[500] = 0.9
    with pytest.raises(ValueError, match="sigmas of a flow must be a shifted ramp"):
        comfyui.sigmas(odd, "normal", 5)
    with pytest.raises(ValueError, match="spacing must be one of"):
        comfyui.sigmas(SPACES["flow"][0](), "trailing", 5)


# --- names and installation -----------------------------------------------------------------


def test_register_adds_each_name_once(comfy):
    added = comfyui.register()
    assert added and comfyui.register() == []
    for names in (comfy.KSAMPLER_NAMES, comfy.SAMPLER_NAMES, comfy.KSampler.SAMPLERS):
        assert len(names) == len(set(names)) and "fastdiff_euler" in names
    assert "fastdiff_karras" in comfy.SCHEDULER_NAMES and "euler" in comfy.SAMPLER_NAMES
    assert list(comfy.SCHEDULER_HANDLERS) == comfy.SCHEDULER_NAMES
    handler = comfy.SCHEDULER_HANDLERS["fastdiff_karras"]
    assert handler.use_ms and len(handler.handler(SPACES["edm"][0](), 4)) == 5
    discard = comfy.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    assert {"dpm_2", "fastdiff_dpm_2", "fastdiff_uni_pc"} <= discard
    assert "fastdiff_euler" not in discard


def test_register_overrides_nothing(comfy):
    sampling = sys.modules["comfy.k_diffusion.sampling"]
    theirs = sampling.sample_fastdiff_euler = lambda *_: None
    handler = comfy.SCHEDULER_HANDLERS["fastdiff_karras"] = comfy.SchedulerHandler(None)
    added = comfyui.register()
    assert sampling.sample_fastdiff_euler is theirs
    assert comfy.SCHEDULER_HANDLERS["fastdiff_karras"] is handler
    assert not {"fastdiff_euler", "fastdiff_karras"} & set(added)


def test_the_ksampler_node_finds_the_names(comfy):
    """By the attribute that ComfyUI looks up, with the names alone."""
    comfyui.register()
    got = sampled(comfy.ksampler("fastdiff_dpmpp_2m"), "ve")
    assert torch.equal(got, sampled(node("dpmpp_2m"), "ve"))


def _load(file, name):
    """As ComfyUI loads a folder of custom_nodes: by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_install(tmp_path, comfy, monkeypatch, capsys):
    assert main(["install", str(tmp_path)]) == 2
    assert "must hold a custom_nodes folder" in capsys.readouterr().err
    (tmp_path / "custom_nodes").mkdir()
    assert main(["install", str(tmp_path)]) == main(["install", str(tmp_path)]) == 0
    file = tmp_path / "custom_nodes" / FOLDER / "__init__.py"
    assert str(file) in capsys.readouterr().out
    # ComfyUI is there first: the import of the package registers, and so the one line does
    for module in [m for m in sys.modules if m.startswith("fastdiff.integrations.comfyui")]:
        monkeypatch.delitem(sys.modules, module)
    loaded = _load(file, "custom_nodes.some_path")
    assert set(loaded.NODE_CLASS_MAPPINGS) == set(NODE_CLASS_MAPPINGS)
    assert set(loaded.NODE_DISPLAY_NAME_MAPPINGS) == set(loaded.NODE_CLASS_MAPPINGS)
    assert "fastdiff_euler" in comfy.SAMPLER_NAMES
    file.write_text("mine\n", encoding="utf-8")
    assert main(["install", str(tmp_path)]) == 2 and file.read_text(encoding="utf-8") == "mine\n"


def test_comfyui_is_not_imported():
    """Nor needed: the nodes can be listed without it."""
    code = (
        "import sys, fastdiff.integrations.comfyui as c; print(len(c.NODE_CLASS_MAPPINGS),"
        "[m for m in sys.modules if m.split('.')[0] == 'comfy'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(NODE_CLASS_MAPPINGS)), "[]"]
