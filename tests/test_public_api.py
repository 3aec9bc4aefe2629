"""What users may rely on: the public names, one file an op in every tree, equal constants."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import table
from fastdiff.ops import COMPOSED, CPU_ONLY, OPS, _native
from fastdiff.reference.diffusion import PREDICTIONS

ROOT = Path(__file__).resolve().parents[1]

# Stable from the first release: names are added here, never renamed or removed.
PUBLIC = {
    "fastdiff": (
        "AdaptiveSampler", "BackendError", "Sampler", "StepTable", "__version__", "accelerate",
        "explain", "load", "ops", "randn", "restore", "schedules", "solvers", "use_backend",
    ),
    "fastdiff.ops": (
        "COMPOSED", "CPU_ONLY", "OPS", "Stream", "add_noise", "as_seeds", "brownian",
        "describe", "dynamic_threshold", "explain", "film", "film_conv2d", "film_norm",
        "gated_residual", "guidance_rescale", "modulate", "quantile_abs", "randn",
        "reparameterize", "reverse_step",
    ),
    "fastdiff.schedules": ("cosine", "edm", "flow", "from_betas", "linear", "scaled_linear",
                           "sigmoid"),
    "fastdiff.solvers": ("SOLVERS", "build"),
}  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist(module: str) -> None:
    found = importlib.import_module(module)
    assert [n for n in PUBLIC[module] if not hasattr(found, n)] == []


@pytest.mark.parametrize("module", ("fastdiff", "fastdiff.ops", "fastdiff.solvers"))
def test_all_is_complete(module: str) -> None:
    """A public name in `__all__` that is not in the list above was added without a promise."""
    found = importlib.import_module(module)
    assert set(PUBLIC[module]) <= set(found.__all__)
    assert [n for n in found.__all__ if not hasattr(found, n)] == []
    assert list(found.__all__) == sorted(set(found.__all__))


def test_facts_of_a_table_are_attributes() -> None:
    built = fastdiff.solvers.build("ddim", fastdiff.schedules.linear(), 5)
    facts = ("times", "sigmas", "rows", "nfe", "depth", "stochastic", "init_sigma")
    assert [f for f in facts if not hasattr(built, f)] == []


# --- one name, one operation ----------------------------------------------------------------

# Where an op has a file, and what else may lie there: not ops, but what ops share.
TREES = {
    "fastdiff/ops/{}.py": {"__init__"},
    "kernels/{}.py": {"__init__"},
    # the list of kernels of one instruction set, and what an integration alone calls
    "csrc/cpu/{}.cpp": {"table", "torch_noise", "brownian_tree"},
    "csrc/cuda/{}.cu": set(),
}
# these folders hold more than ops
ALSO = ("fastdiff/reference/{}.py", "tests/test_{}.py", "benchmarks/bench_{}.py")


@pytest.mark.parametrize("tree", (*TREES, *ALSO))
def test_every_op_has_its_file(tree: str) -> None:
    gpu = tree.startswith(("kernels", "csrc/cuda"))
    wanted = [op for op in OPS if not (gpu and op in CPU_ONLY)]
    missing = [tree.format(op) for op in wanted if not (ROOT / tree.format(op)).is_file()]
    assert missing == []


@pytest.mark.parametrize("tree", ("fastdiff/ops/{}.py", *ALSO))
def test_every_composed_op_has_its_file(tree: str) -> None:
    missing = [tree.format(op) for op in COMPOSED if not (ROOT / tree.format(op)).is_file()]
    assert missing == []


@pytest.mark.parametrize("tree", TREES)
def test_no_file_without_an_op(tree: str) -> None:
    folder, suffix = (ROOT / tree).parent, (ROOT / tree).suffix
    found = {p.stem for p in folder.glob(f"*{suffix}") if not p.stem.startswith("_")}
    composed = set(COMPOSED) if tree.startswith("fastdiff/ops/") else set()
    assert found - set(OPS) - composed - TREES[tree] == set()


def test_an_op_is_registered_under_its_own_name() -> None:
    assert {name: op.name for name, op in OPS.items()} == {name: name for name in OPS}
    # only the machine decides: every op has every backend, but for those that say so
    for name, op in OPS.items():
        expected = {"cpu", "reference"} if name in CPU_ONLY else set(fastdiff.backends.BACKENDS)
        assert set(op.backends) == expected, name


SOURCES = sorted(
    p
    for folder in ("fastdiff", "kernels", "csrc", "benchmarks", "tests")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
)


def test_no_file_is_too_long() -> None:
    """A file of more than 400 lines does two things; split it."""
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES}
    assert len(lengths) > 30
    assert {p: n for p, n in lengths.items() if n > 400} == {}


# --- constants that two languages share -----------------------------------------------------


def _enum(header: str, name: str) -> dict[str, int]:
    """The enumerators of a C enum, values counted as C does."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / header).read_text())
    body = re.search(rf"enum {name} : int \{{(.*?)\}}", text, re.S)
    assert body is not None, name
    values: dict[str, int] = {}
    for entry in body.group(1).split(","):
        if entry.strip():
            key, _, value = (part.strip() for part in entry.partition("="))
            values[key] = int(value) if value else max(values.values(), default=-1) + 1
    return values


def test_terms_are_those_of_the_header() -> None:
    got = _enum("step.h", "FdTerm")
    count = got.pop("kTerms")
    assert count == len(table.TERMS)
    for name, position in got.items():
        assert table.TERMS[position] == name[1:].lower(), name
    # h1 to h3 have no name of their own in C: they follow kH0
    assert set(range(count)) - set(got.values()) == {5, 6, 7}
    first = table.TERMS.index("h0")
    slots = tuple(f"h{k}" for k in range(table.HISTORY_SLOTS))
    assert table.TERMS[first : first + table.HISTORY_SLOTS] == slots


# C enumerator -> constant of table.py
ROW_FLOATS = {"kP": "P", "kQ": "Q", "kA": "A", "kB": "B", "kCIn": "C_IN", "kLvScale": "LV_SCALE",
              "kLvShift": "LV_SHIFT", "kPushX": "PUSH_X", "kPushD": "PUSH_D",
              "kRowFloats": "ROW_FLOATS"}  # fmt: skip
ROW_INTS = {"kFlags": "FLAGS", "kPush": "PUSH", "kStream1": "STREAM1", "kCounter1": "COUNTER1",
            "kStream2": "STREAM2", "kCounter2": "COUNTER2", "kRowInts": "ROW_INTS"}  # fmt: skip
FLAGS = {"kEvaluates": "EVALUATES", "kLearnedVariance": "LEARNED_VARIANCE"}


@pytest.mark.parametrize(
    ("enum", "names"),
    (("FdRowFloat", ROW_FLOATS), ("FdRowInt", ROW_INTS), ("FdRowFlag", FLAGS)),
    ids=("floats", "ints", "flags"),
)
def test_packed_rows_are_those_of_the_header(enum: str, names: dict[str, str]) -> None:
    expected = {names[key]: value for key, value in _enum("step.h", enum).items()}
    assert {name: getattr(table, name) for name in names.values()} == expected


def test_targets_are_those_of_the_header() -> None:
    names = {"kEpsilon": "epsilon", "kSample": "sample", "kVPrediction": "v_prediction",
             "kFlow": "flow"}  # fmt: skip
    got = {names[key]: value for key, value in _enum("step.h", "FdTarget").items()}
    assert got == {name: PREDICTIONS.index(name) for name in names.values()}


def test_dtypes_are_those_of_the_header() -> None:
    expected = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16, "kFloat16": torch.float16}
    got = {expected[k]: v for k, v in _enum("half.h", "FdDtype").items()}
    assert got == _native.DTYPES


def test_kernels_of_the_checkout_are_not_importable_by_a_second_name() -> None:
    """Two copies of one kernel module would each hold their own compiled kernels."""
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "kernels: must be imported as fastdiff.kernels, got kernels" in done.stderr
