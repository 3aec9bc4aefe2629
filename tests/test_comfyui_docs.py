"""docs/comfyui.md: its commands and its code run, and its lists are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import fake_comfy
import pytest
import test_comfyui_pictures as pictures

from fastdiff.integrations.comfyui import NODE_CLASS_MAPPINGS, OFFERS
from fastdiff.integrations.comfyui.__main__ import FOLDER, TEXT, main

ROOT = Path(__file__).resolve().parent.parent
TEXT_OF_DOCS = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT_OF_DOCS, re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^```sh\n(.*?)^```", TEXT_OF_DOCS, re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    return TEXT_OF_DOCS.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def listed(text: str) -> set[str]:
    """The names of the paragraphs that hold nothing else."""
    plain = [p for p in text.split("\n\n") if re.fullmatch(r"(`\w+`\s*)+", p.strip())]
    return set(re.findall(r"`(\w+)`", "\n".join(plain)))


def test_commands(tmp_path):
    package, install = SHELL[0].splitlines()
    name = re.search(r'^name = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert shlex.split(package) == ["pip", "install", name[1]]
    words = shlex.split(install)
    assert words[:3] == ["python", "-m", "fastdiff.integrations.comfyui"]
    (tmp_path / "custom_nodes").mkdir()
    assert main([str(tmp_path) if w == "PATH_TO_COMFYUI" else w for w in words[3:]]) == 0
    assert f"custom_nodes/{FOLDER}/__init__.py" in TEXT_OF_DOCS


def test_code(monkeypatch):
    fake_comfy.install(monkeypatch)
    assert PYTHON[0] == TEXT
    scope: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(block, "docs/comfyui.md", "exec"), scope)
    assert isinstance(scope["sampler"], fake_comfy.KSAMPLER)


def test_list_of_nodes():
    nodes = section("Nodes")
    assert listed(nodes) == set(OFFERS)
    shown = {f"FastdiffScheduler{n}" for n in re.findall(r"`(?:FastdiffScheduler)?(_\w+)`", nodes)}
    assert shown == {n for n in NODE_CLASS_MAPPINGS if n.startswith("FastdiffScheduler_")}


def test_same_pictures_are_those_that_are_checked():
    same, _, other = section("Which pictures are the same").partition("What is not the same")
    # these have tests of their own, the others are held to what is exact
    own = {"dpmpp_sde", "dpm_fast"}
    exact = {"deis", "er_sde", "unipc"}
    assert listed(same) == {name for name, *_ in pictures.EQUAL} - exact | own
    rows = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| ([^|]*)", other, re.MULTILINE))))
    assert rows <= set(OFFERS)
    fits_no_flow = {name for name, options, _, on_flow, _ in pictures.EQUAL
                    if on_flow is None and not options}  # fmt: skip
    assert fits_no_flow <= rows


@pytest.mark.parametrize("name", sorted(set(re.findall(r"fastdiff_(\w+)", TEXT_OF_DOCS))))
def test_names_of_the_ksampler_node(name):
    assert name in OFFERS
