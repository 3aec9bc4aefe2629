"""What an import brings with it: time to the first picture is spent in imports above all.

Seconds depend on the machine and its load, so modules are counted; `python -X importtime -c "import
fastdiff"` has the seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff
from fastdiff import checkpoints

ROOT = Path(__file__).resolve().parents[1]

LOADED = """
import json, sys
import torch
before = set(sys.modules)
{code}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def added(code: str, folder: Path) -> set[str]:
    """Modules that the code imports beside those of torch."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(code=code)],
        env={**os.environ, "PYTHONPATH": path}, cwd=folder, check=True, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    """Their packages, but for Python's own."""
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)


def under(modules: set[str], *names: str) -> list[str]:
    return sorted(m for m in modules for name in names if m == name or m.startswith(f"{name}."))


# of the library, what a loop over a given model does not need
LATER = (
    "fastdiff._cli_files", "fastdiff._cli_sample", "fastdiff._ranks", "fastdiff.adaptive",
    "fastdiff.checkpoints", "fastdiff.cli", "fastdiff.data", "fastdiff.formats",
    "fastdiff.integrations", "fastdiff.kernels", "fastdiff.models", "fastdiff.training",
)  # fmt: skip
# of torch, what takes a second and more
COMPILER = ("torch._dynamo", "torch._inductor", "torch._export", "torch.onnx")


def test_import_of_the_library(tmp_path: Path) -> None:
    modules = added("import fastdiff", tmp_path)
    assert "fastdiff.sampler" in modules
    # nothing beside torch and numpy, which torch imports
    assert packages(modules) <= {"fastdiff", "numpy"}
    assert under(modules, *LATER) == []


def test_a_picture_from_the_command_line(tiny: Path, tmp_path: Path) -> None:
    words = ["sample", "--model", str(tiny), "--steps", "2", "--seeds", "0", "--label", "0"]
    code = f"from fastdiff import cli\nassert cli.main({words!r}) == 0"
    modules = added(code, tmp_path)
    assert (tmp_path / "samples.png").is_file() and "PIL" in modules
    # what reads weights, draws a bar and writes a PNG
    needed = {"fastdiff", "numpy", "torch", "safetensors", "PIL", "tqdm"}
    assert packages(modules) - needed == set()
    assert under(modules, *COMPILER, "fastdiff.training", "fastdiff.integrations") == []
    assert under(modules, "fastdiff._cli_files", "torch.distributed.run") == []


@pytest.mark.parametrize("name", checkpoints.names())
def test_a_checkpoint_is_read_without_a_compiler(name: str, tmp_path: Path) -> None:
    # sizes are compared on the device "meta", where torch computes in Python
    modules = added(f"import fastdiff\nfastdiff.load({name!r})", tmp_path)
    assert under(modules, *COMPILER, "sympy", "triton") == []


def test_names_that_come_later(tmp_path: Path) -> None:
    names = ("AdaptiveSampler", "accelerate", "load", "restore")
    modules = ("adaptive", "checkpoints", "formats", "models")
    code = "import fastdiff\n" + "\n".join(f"fastdiff.{name}" for name in (*names, *modules))
    assert {f"fastdiff.{name}" for name in modules} <= added(code, tmp_path)
    with pytest.raises(AttributeError, match="module 'fastdiff' has no attribute 'lod'"):
        _ = fastdiff.lod
