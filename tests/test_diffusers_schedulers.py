"""Every drop-in against diffusers' own class, over covering designs of its options."""

import functools
import importlib
import inspect
import pkgutil

import pytest
import torch
from budget import assert_within_budget
from scopes import quiet_diffusers

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("scipy", reason="diffusers' beta grids and LMS need scipy")

import scipy.stats  # noqa: E402
from diffusers_cases import FACTORS, cases, made, split  # noqa: E402
from diffusers_runs import compared  # noqa: E402

import fastdiff.integrations.diffusers as drop_ins  # noqa: E402

# A step is one rounding of each of its up to six terms and of their sum; that is within twice the
# error of diffusers, which rounds more often, but for elements that its roundings happen to spare.
ULPS = 8


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No warnings of diffusers on odd options; its beta quantiles, slow and pure, only once."""
    monkeypatch.setattr(scipy.stats.beta, "ppf", functools.cache(scipy.stats.beta.ppf))
    with quiet_diffusers():
        yield


def said(row):
    """A case in the words of diffusers."""
    return ", ".join(f"{k}={v}" for part in split(row) for k, v in part.items())


# Ours gets past diffusers' first fault (a noise of the wrong shape) and meets the next
TWO_FAULTS = {"SASolverScheduler"}


def defective(name, row):
    """Whether a step that is always mended (docs/diffusers_defects.md) happens to be finite."""
    config = {k: v for part in split(row) for k, v in part.items()}
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
    # its first timestep comes twice, and diffusers begins in the middle of a step
    twice = name.startswith("KDPM2") and cosine and config.get("use_karras_sigmas", False)
    return twice or config.get("variance_type") == "fixed_large_log"


def check(name, row):
    """One case: all outputs within the budget, as far as diffusers goes.

    Returns whether diffusers failed, or made a number that is none, and the drop-in did not.
    """
    theirs, ours, exact = compared(getattr(diffusers, name), getattr(drop_ins, name), row)
    finite = [all(bool(t.isfinite().all()) for t in step) for step in theirs.outputs]
    fails = theirs.error is not None or not all(finite)
    # where diffusers fails, ours fails too, says why it must, or is right (test_diffusers_mended)
    if ours.error is not None:
        alike = type(ours.error) is type(theirs.error) or name in TWO_FAULTS
        assert alike or (fails and isinstance(ours.error, ValueError)), ours.error
    if not fails:
        assert len(ours.outputs) == len(theirs.outputs)
        assert torch.equal(ours.state, theirs.state), "the generator was drawn from otherwise"
    # of a run that diffusers can not end, ours may take other steps from the first
    other = theirs.error is not None or defective(name, row)
    steps = [] if other else zip(theirs.outputs, ours.outputs, exact.outputs, strict=False)
    for k, (peer, own, e) in enumerate(steps):
        assert len(own) == len(peer)
        if not finite[k]:
            break
        for p, o, x in zip(peer, own, e, strict=True):
            # clipping hides how large the terms were
            reach = torch.full_like(x, exact.reach).maximum(x.abs())
            assert_within_budget(o, p, x, ULPS, at=reach)
    right = all(bool(t.isfinite().all()) for step in ours.outputs for t in step)
    return fails and ours.error is None and right


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_every_pair_of_options(name):
    rows, refused = cases(name)
    failures = []
    for row in rows:
        try:
            check(name, row)
        except AssertionError as error:
            failures.append(f"{said(row)}: {error}")
    assert not failures, f"{len(failures)} of {len(rows)} cases\n" + "\n".join(failures[:5])
    for row in refused:
        with pytest.raises(Exception) as theirs:
            made(getattr(diffusers, name), row)
        if theirs.type is ZeroDivisionError:  # UnCLIP in one step, which is mended
            made(getattr(drop_ins, name), row)
            continue
        with pytest.raises(theirs.type):
            made(getattr(drop_ins, name), row)


def test_eta_past_the_cosine_schedule_is_mended():
    # diffusers takes the root of a variance that float32 made negative
    row = {
        "config": {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "sample",
            "timestep_spacing": "linspace",
            "steps_offset": 1,
            "rescale_betas_zero_snr": True,
            "set:num_inference_steps": 3,
            "step:eta": 1.0,
        }
    }
    assert check("DDIMScheduler", row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(FACTORS))
def test_16_bit(name, dtype):
    rows, _ = cases(name)
    shape = (2, 3, 16, 16)
    mine = theirs = 0.0
    elements = 0
    # every tenth case: the options have been covered in float32
    for row in rows[::10]:
        one, two, exact = compared(
            getattr(diffusers, name), getattr(drop_ins, name), row, dtype, shape
        )
        for peer, own, e in zip(one.outputs, two.outputs, exact.outputs, strict=False):
            assert [t.dtype for t in own] == [t.dtype for t in peer], said(row)
            if not (bool(peer[0].isfinite().all()) and bool(e[0].isfinite().all())):
                break  # past the range of the type
            size = float(e[0].square().mean()) or 1.0
            theirs += float((peer[0].double() - e[0]).square().mean()) / size
            mine += float((own[0].double() - e[0]).square().mean()) / size
            elements = e[0].numel()
    assert elements, "no case ran"
    # The mean square of n independent errors is known to sqrt(2/n). Of two runs that both round
    # once a step the difference has that twice over; three times that is chance.
    chance = 3 * (2 * 2 / elements) ** 0.5
    assert mine <= theirs * (1 + chance)


def test_every_scheduler_of_diffusers_is_a_drop_in_or_listed():
    package = diffusers.schedulers
    names = set()
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.endswith("_flax"):  # classes of another framework
            continue
        found = importlib.import_module(module.name)
        names |= {
            name
            for name, cls in vars(found).items()
            if inspect.isclass(cls)
            and issubclass(cls, diffusers.SchedulerMixin)
            and cls is not diffusers.SchedulerMixin
        }
    covered = {name for name in names if hasattr(drop_ins, name)}
    assert names - covered == set(drop_ins.LEFT_OUT) & names
    assert not covered & set(drop_ins.LEFT_OUT)
    assert covered == set(FACTORS)
