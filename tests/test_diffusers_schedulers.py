"""Every drop-in against diffusers' own class, over covering designs of its options."""

import functools
import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch
from budget import assert_within_budget, ulp

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
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    diffusers.utils.logging.set_verbosity(level)


def said(row):
    """A case in the words of diffusers."""
    return ", ".join(f"{k}={v}" for part in split(row) for k, v in part.items())


# Runs in which diffusers fails and the drop-in does not: (class, what diffusers raises)
BETTER = {
    # the noise is drawn in the shape of a model output that still carries the variance
    ("SASolverScheduler", "RuntimeError"),
}


def check(name, row):
    """One case: the same failures, and else all outputs within the budget.

    Returns whether diffusers made a number that is none where the drop-in is right.
    """
    theirs, ours, exact = compared(getattr(diffusers, name), getattr(drop_ins, name), row)
    if theirs.error is not None and ours.error is None:
        assert (name, type(theirs.error).__name__) in BETTER
        assert all(bool(t.isfinite().all()) for step in ours.outputs for t in step)
        return True
    assert type(ours.error) is type(theirs.error), (theirs.error, ours.error)
    assert len(ours.outputs) == len(theirs.outputs)
    if theirs.error is None:
        assert torch.equal(ours.state, theirs.state), "the generator was drawn from otherwise"
    mended = False
    for peer, own, e in zip(theirs.outputs, ours.outputs, exact.outputs, strict=False):
        assert len(own) == len(peer)
        for p, o, x in zip(peer, own, e, strict=True):
            if bool(x.isfinite().all()) and not bool(p.isfinite().all()):
                mended = True
                p = x.float()  # diffusers has no error to compare with
            if not bool(x.isfinite().all()):
                # a root of less than nothing, by a rounding: diffusers' float32 is all there is
                finite = p.isfinite()
                assert torch.equal(o.isfinite(), finite)
                p, o = p[finite], o[finite]
                assert bool(((o - p).abs() <= ULPS * ulp(p.double(), p.dtype)).all())
                continue
            # clipping hides how large the terms were
            reach = torch.full_like(x, exact.reach).maximum(x.abs())
            assert_within_budget(o, p, x, ULPS, at=reach)
    return mended


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
