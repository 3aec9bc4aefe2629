"""The tree where it is used: in diffusers' two classes, k-diffusion's functions and ComfyUI's."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from k_functions import start, takes_sampler
from peers import k_sampling

from fastdiff.integrations import k_diffusion as K
from fastdiff.integrations._brownian_tree import BrownianTreeNoiseSampler
from fastdiff.integrations.comfyui._noise import quicken

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde's own

SHAPE = (2, 3, 8, 9)  # 432 values: the kernel, with a tail for each of two seeds
LEVELS = K.get_sigmas_karras(12, 0.03, 14.6)
NAMES = [n for n in K.sampling.__all__ if n.startswith("sample_") and takes_sampler(n[7:])]


# --- k-diffusion ----------------------------------------------------------------------------


def run_k(name: str, sampler: Any, x: torch.Tensor) -> None:
    ends = (0.03, 14.6) if "dpm_fast" in name or "adaptive" in name else (LEVELS,)
    more: dict[str, Any] = {"n": 24} if "dpm_fast" in name else {}
    if "fast" in name or "adaptive" in name:
        more["eta"] = 0.7
    run = getattr(k_sampling(), name)
    run(lambda x, sigma: torch.tanh(x), x, *ends, disable=True, noise_sampler=sampler, **more)


@pytest.mark.parametrize("seed", [5, [5, 2**40]], ids=["one", "each"])
@pytest.mark.parametrize("name", NAMES)
def test_the_spans_of_every_function(name: str, seed: Any) -> None:
    """What k-diffusion's own function asks: midpoints, two spans a step, a step that is refused."""
    x, asked = start(LEVELS, torch.float32, SHAPE), 0
    own, theirs = (
        where.BrownianTreeNoiseSampler(x, 0.03, 14.6, seed) for where in (K, k_sampling())
    )

    def both(sigma: Any, sigma_next: Any) -> torch.Tensor:
        nonlocal asked
        asked += 1
        want = theirs(sigma, sigma_next)
        assert_same_bits(own(sigma, sigma_next), want)
        return want

    run_k(name, both, x)
    assert asked >= 7


# --- diffusers ------------------------------------------------------------------------------

Drawn = list[tuple[tuple[float, ...], torch.Tensor]]


def recorded(patch: pytest.MonkeyPatch, cls: Any) -> Drawn:
    """Spans and values of every draw of this class."""
    made: Drawn = []
    call = cls.__call__

    def recording(self: Any, *span: Any) -> torch.Tensor:
        value = call(self, *span)
        made.append((tuple(float(s) for s in span), value))
        return value

    patch.setattr(cls, "__call__", recording)
    return made


def run_diffusers(scheduler: Any, generator: Any, steps: int) -> torch.Tensor:
    """The last state, on outputs that hang on no state."""
    torch.manual_seed(6)
    scheduler.set_timesteps(steps)
    named = "generator" in inspect.signature(scheduler.step).parameters
    more = {"generator": generator} if named else {}
    outputs = torch.Generator().manual_seed(1)
    x = torch.zeros(SHAPE)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        m = torch.randn(SHAPE, generator=outputs)
        x = scheduler.step(m, t, x, **more).prev_sample
    return x


# how a user gives the seed, steps of a short and of a long run
SEEDED = {
    "sde-none": ("DPMSolverSDEScheduler", {}, None),
    "sde-one": ("DPMSolverSDEScheduler", {"noise_sampler_seed": 0}, None),
    "sde-each": ("DPMSolverSDEScheduler", {"noise_sampler_seed": [9, 2**50]}, None),
    "cosine-none": ("CosineDPMSolverMultistepScheduler", {}, None),
    "cosine-one": ("CosineDPMSolverMultistepScheduler", {}, 2**40),
    "cosine-each": ("CosineDPMSolverMultistepScheduler", {}, [3, 4]),
}


@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize("case", SEEDED)
def test_every_draw_of_diffusers(case: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trajectories themselves: test_diffusers_schedulers."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_dpmsolver_sde as theirs

    from fastdiff.integrations import diffusers as drop_ins

    name, config, seeds = SEEDED[case]
    runs = []
    for where, cls in (
        (drop_ins, BrownianTreeNoiseSampler),
        (diffusers, theirs.BrownianTreeNoiseSampler),
    ):
        drawn = recorded(monkeypatch, cls)
        generator: Any = None
        if isinstance(seeds, list):
            generator = [torch.Generator().manual_seed(s) for s in seeds]
        elif seeds is not None:
            generator = torch.Generator().manual_seed(seeds)
        run_diffusers(getattr(where, name)(**config), generator, steps)
        runs.append((drawn, torch.get_rng_state()))
    (ours, our_state), (want, state) = runs
    # the cosine class draws for its last step too, which weighs that by 0
    assert len(want) - ("cosine" in case) <= len(ours) <= len(want)
    assert len(ours) >= steps - 1
    for (our_span, value), (span, expected) in zip(ours, want, strict=False):
        assert our_span == span
        assert_same_bits(value, expected)
    assert torch.equal(our_state, state)


# --- ComfyUI --------------------------------------------------------------------------------


def comfy_sampler(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """k-diffusion's, of which ComfyUI's is a copy that moves the values."""
    return k_sampling().BrownianTreeNoiseSampler(torch.zeros(SHAPE, dtype=dtype), 0.03, 14.6, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_comfyuis_tree_is_quickened(dtype: torch.dtype) -> None:
    want, got = (comfy_sampler(12, dtype) for _ in range(2))
    quicken(got, 0.03, 14.6, 12)
    assert type(got.tree.trees[0]).__module__.startswith("fastdiff")
    for span in ((14.6, 3.0), (3.0, 0.7), (0.7, 3.0)):
        assert_same_bits(got(*span), want(*span))


def test_another_tree_in_its_place_stays() -> None:
    other = comfy_sampler(13)
    strange = SimpleNamespace(tree=SimpleNamespace(trees=[lambda a, b: a]))
    for sampler in (other, strange, lambda a, b: a):
        before = getattr(getattr(sampler, "tree", None), "trees", None)
        quicken(sampler, 0.03, 14.6, 12)
        assert getattr(getattr(sampler, "tree", None), "trees", None) is before
