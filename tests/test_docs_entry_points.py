"""The pages for users of guided-diffusion and EDM: their code runs, and only an import changes."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

from fastdiff import cli

DOCS = Path(__file__).resolve().parent.parent / "docs"


def net(x, sigma, class_labels):
    return torch.tanh(x / (1 + sigma)).float()


def model(x, t, y):
    h = torch.tanh(x + y.view(-1, 1, 1, 1))
    return torch.cat([h, h], dim=1)


# page, names that it takes for given, what it leaves behind
PAGES = {
    "guided_diffusion": (
        {
            "model": model,
            "classes": torch.tensor([1, 0]),
            "classifier": lambda x, t: torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], dim=1),
        },
        (2, 3, 16, 16),
    ),
    "edm": (
        {"device": "cpu", "seeds": [1, 2, 5, 6], "labels": torch.eye(4), "net": net},
        (4, 3, 16, 16),
    ),
}


def blocks_of(page, language):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_in_turn(page):
    given, shape = PAGES[page]
    scope = dict(given)
    for block in blocks_of(page, "python"):
        exec(compile(block, page, "exec"), scope)
    assert scope["images"].shape == shape and scope["images"].isfinite().all()
    if page == "guided_diffusion":
        assert torch.equal(scope["pair"][1:], scope["last"])


@pytest.mark.parametrize("page", PAGES)
def test_only_the_import_changes(page):
    before, after = (ast.parse(blocks_of(page, kind)[0]).body for kind in ("text", "python"))
    assert len(before) == len(after) == 3
    assert [ast.unparse(line) for line in before[1:]] == [ast.unparse(line) for line in after[1:]]
    assert before[0].module != after[0].module
    assert ast.unparse(before[0]).split(" import ")[1] == ast.unparse(after[0]).split(" import ")[1]


def test_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks_of("edm", "sh") for line in block.splitlines()]
    assert len(commands) == 1
    assert cli.main(shlex.split(commands[0])[1:]) == 0
    names = sorted(path.name for path in (tmp_path / "out" / "000000").iterdir())
    assert names == [f"{seed:06d}.png" for seed in range(4)]
