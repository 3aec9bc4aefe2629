"""docs/diffusers.md: its code runs, what it promises of it holds, and no scheduler is missing."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from budget import assert_within_budget
from diffusers_float64 import Float32Draws, in_float64

from fastdiff.integrations import diffusers as drop_ins

PAGE = Path(__file__).resolve().parent.parent / "docs" / "diffusers.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_blocks_run_in_turn() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    scope: dict[str, Any] = {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), scope)
    assert scope["report"].fused["scheduler"] and len(scope["report"].fused) > 5
    assert (scope["pictures"]() == scope["pictures"]()).all()
    # the same model and noise in float64, for the error of the run before
    pipe, unet = scope["pipe"], scope["unet"]
    pipe.scheduler = in_float64(diffusers.DDIMScheduler())
    unet.double()
    with Float32Draws():
        exact = scope["pictures"]()
    got, want = (torch.from_numpy(scope[name]) for name in ("after", "before"))
    # fused norms sum in another order, ten times over
    assert_within_budget(got, want, torch.from_numpy(exact).double(), ulps=16)
    assert scope["fewer"].shape == scope["counted"].shape == scope["before"].shape
    assert type(scope["theirs"]) is diffusers.DDIMScheduler
    assert scope["theirs"].config.num_train_timesteps == 500
    assert torch.equal(scope["out"][0], scope["out"].prev_sample)
    assert scope["out"].pred_original_sample.abs().max() <= 1  # clipped


def test_a_late_look_at_the_prediction_says_what_is_wrong() -> None:
    scheduler = drop_ins.DDIMScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = scheduler.step(torch.tanh(x), scheduler.timesteps[0], x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="step: pred_original_sample must be read before"):
        out.pred_original_sample  # noqa: B018


def test_every_scheduler_of_diffusers_is_a_drop_in_or_in_the_table() -> None:
    listed = re.findall(r"^\| `(\w+Scheduler)` \| \w", TEXT, re.MULTILINE)
    theirs = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert sorted(listed) == sorted(theirs - {*drop_ins._STATE})
