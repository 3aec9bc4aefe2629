"""What docs/k_diffusion.md says can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastdiff.integrations import k_diffusion as K

TEXT = (Path(__file__).parents[1] / "docs" / "k_diffusion.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_block_runs():
    """As it stands, and its comment on seeds is true."""
    (block,) = blocks("python")
    scope = {}
    exec(compile(block, "docs/k_diffusion.md", "exec"), scope)
    for name in ("same", "own", "path"):
        assert scope[name].shape == (2, 4, 64, 64) and scope[name].isfinite().all()
    alone = K.sample_euler_ancestral(
        scope["model"], scope["x"][1:], scope["sigmas"], {"label": scope["label"][1:]},
        disable=True, noise="counter", seeds=8,
    )  # fmt: skip
    assert torch.equal(alone, scope["own"][1:])


def test_change_of_one_line():
    """The new import, and the call that stays."""
    (diff,) = blocks("diff")
    lines = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    sigmas = K.get_sigmas_karras(3, 0.1, 10.0)
    scope = {"model": lambda x, sigma, label: x * label, "x": torch.ones(1, 2), "label": 0.5}
    exec("\n".join(lines), {**scope, "sigmas": sigmas}, scope)
    assert scope["x"].isfinite().all()
    assert diff.count("\n-") + diff.startswith("-") == 1


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:sample|get)_\w+|[A-Z]\w+)`", TEXT))))
def test_names_exist(name):
    assert name == "UnboundLocalError" or hasattr(K, name)
