"""Drop-ins called in inference mode and where a derivative is wanted."""

import pytest
import torch

pytest.importorskip("diffusers")

from test_diffusers_calls import advance, pair, quiet, same, start  # noqa: E402, F401


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
