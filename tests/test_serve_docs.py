"""docs/serve.md: its code runs, and its commands are answered as it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_cases import engine
from test_serve_http import serving

PAGE = (Path(__file__).resolve().parent.parent / "docs/serve.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_code_runs() -> None:
    torch.set_num_threads(1)
    scope: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/serve.md", "exec"), scope)
    assert scope["images"].shape == (2, 1, 32, 32) and scope["images"].isfinite().all()


def test_the_commands_are_answered() -> None:
    """Each line of curl, as the request that it makes."""
    (commands,) = blocks("sh")
    answers, name = [], ""
    with serving(engine(classes=("bag", "boot"))) as client:
        for line in commands.splitlines():
            words = shlex.split(line, comments=True)
            assert words.pop(0) == "curl"
            (url,) = (word for word in words if word.startswith("localhost:8000/"))
            method, body = "GET", None
            if "-d" in words:
                method, body = "POST", words[words.index("-d") + 1].encode()
            if "-X" in words:
                method = words[words.index("-X") + 1]
            path = url.removeprefix("localhost:8000").replace("ID", name)
            answers.append(client.call(method, path, body))
            name = name or answers[0][1]["id"]
    assert [status for status, _ in answers] == [202, 200, 200, 409]
    assert answers[1][1].startswith(b"event: ") and answers[2][1].startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ("thresholding", "noise", "guide_model"))
def test_what_is_not_for_the_engine_is_refused(name: str) -> None:
    with engine() as made, pytest.raises(TypeError, match=f"fields must be among .* got '{name}'"):
        made.submit(**{name: None})
