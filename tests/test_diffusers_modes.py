"""Drop-ins called in inference mode and where a derivative is wanted."""

import pytest
import torch
from torch.autograd import forward_ad

pytest.importorskip("diffusers")

from test_diffusers_calls import advance, output, pair, quiet, same, start  # noqa: F401


# those that copy to a buffer before a step, and one that does not
@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler", "UniPCMultistepScheduler", "SASolverScheduler",
        "DPMSolverMultistepScheduler",
    ],
)  # fmt: skip
def test_a_scheduler_goes_in_and_out_of_inference_mode(name):
    """Its buffers, made in inference mode, are written to outside of it."""
    theirs, ours = pair(name, 8)
    x = start(theirs)
    with torch.inference_mode():
        same(advance(ours, x), advance(theirs, x))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8)
    same(advance(ours, x), advance(theirs, x))


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_late_look_at_the_prediction_in_inference_mode(return_dict):
    """Tensors of inference mode do not tell that they were written to."""
    theirs, ours = pair("DDIMScheduler")
    t = ours.timesteps[0]
    with torch.inference_mode():
        x, m = output(0), output(1)
        want = theirs.step(m, t, x).pred_original_sample
        out = ours.step(m, t, x, return_dict=return_dict)
        x.mul_(2.0)
        m.zero_()
        same(out[1], want)


@pytest.mark.parametrize("what", ["noise", "number", "grid", "state"])
def test_a_derivative_by_what_is_neither_sample_nor_output(what):
    name = {"grid": "EulerDiscreteScheduler", "state": "DPMSolverMultistepScheduler"}.get(what)
    grads = []
    for scheduler in pair(name or "DDIMScheduler"):
        x, t = output(1), scheduler.timesteps[0]
        of, more, first = torch.tensor(0.5), {}, 0
        if what == "noise":
            of = output(2)
            more = {"eta": 1.0, "variance_noise": of}
        elif what == "number":
            more = {"eta": of, "variance_noise": output(2)}
        elif what == "grid":
            of = scheduler.sigmas = scheduler.sigmas.clone()
            scheduler.scale_model_input(x, t)
        else:
            of, first = output(2), 1
            scheduler.step(of.requires_grad_(), t, x)
        of.requires_grad_()
        y = scheduler.step(output(0), scheduler.timesteps[first], x, **more).prev_sample
        grads.append(torch.autograd.grad(y.square().sum(), of)[0])
    assert torch.equal(grads[1], grads[0]) and bool((grads[0] != 0).any())


def test_tangents_and_transforms_are_those_of_diffusers():
    found = []
    for scheduler in pair("DDIMScheduler"):
        t = scheduler.timesteps[1]

        def step(m, x, scheduler=scheduler, t=t):
            return scheduler.step(m, t, x).prev_sample

        with forward_ad.dual_level():
            dual = step(forward_ad.make_dual(output(0), output(1)), output(2))
            tangent = forward_ad.unpack_dual(dual).tangent
        pair_of = (output(0), output(2))
        found.append((
            tangent,
            torch.func.jvp(step, pair_of, (output(1), output(3)))[1],
            torch.func.vmap(step)(*pair_of),
        ))  # fmt: skip
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_get_of_an_output_that_is_not_computed_yet():
    theirs, ours = pair("DDIMScheduler")
    call = (output(0), ours.timesteps[0], output(1))
    for key in ("pred_original_sample", "prev_sample"):
        same(ours.step(*call).get(key), theirs.step(*call).get(key))
    assert ours.step(*call).get("absent", 3) == 3


@pytest.mark.parametrize(("rest", "named"), [((0.5,), {"eta": 0.3}), ((0.0,) * 9, {})])
def test_arguments_twice_and_too_many_are_refused_as_diffusers_does(rest, named):
    messages = []
    for scheduler in pair("DDIMScheduler"):
        with pytest.raises(TypeError, match=r"multiple values|positional arguments") as error:
            scheduler.step(output(0), scheduler.timesteps[0], output(1), *rest, **named)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
