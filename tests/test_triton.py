"""The Triton kernels without a GPU: their bits in the interpreter, and what they compile to."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import gpu_compile
import pytest
from gpu_cases import EXACT, STORES_BF16
from gpu_compile import TABLE, TRITON_ARCHS
from interpreted import interpreted

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="TRITON_INTERPRET=1 is set: kernels cannot be compiled",
    ),
]

# names of the functions that triton_cases.py marks as cases; it says where one is missing here
INTERPRETED = (
    "philox_known_answers",
    "noise_sizes",
    "noise_channels_last",
    "noise_2_24",
    "noise_beyond_32_bits",
    "brownian_path",
    "add_noise_targets",
    "step_every_feature",
    "step_channels_last",
    "step_sum_starts_at_zero",
    "step_many_tiles",
    "step_per_sample_rows",
    "reparameterize_sizes",
    "reparameterize_samples",
    "reparameterize_many_tiles",
    "film_norm_shapes",
    "film_norm_many_tiles",
    "film_norm_not_finite",
    "film_norm_through_the_op",
)
_FILE = Path(__file__).with_name("triton_cases.py")


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest) -> dict[str, str]:
    """Errors by name of the selected cases, all run in one process with the interpreter on."""
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and "errors" in getattr(item, "fixturenames", ())
    ]
    return interpreted(_FILE.name, *wanted)


def test_cases_are_all_listed() -> None:
    marked = re.findall(r"^@case\ndef (\w+)", _FILE.read_text(), re.MULTILINE)
    assert tuple(marked) == INTERPRETED


@pytest.mark.parametrize("name", INTERPRETED)
def test_bits_in_the_interpreter(errors: dict[str, str], name: str) -> None:
    assert errors[name] == "", errors[name]


# --- compiled for devices that are not here ---------------------------------------------------


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


@pytest.mark.parametrize("arch", TRITON_ARCHS)
@pytest.mark.parametrize("case", EXACT)
def test_compiles_to_exact_arithmetic(case: str, arch: str, table: dict[str, Any]) -> None:
    for kernel in gpu_compile.compile_triton(case, arch):
        what = f"{kernel.case} {kernel.kernel} {kernel.arch}"
        assert kernel.spills == 0, what
        # contraction, an approximate function, or a flush to zero would change bits
        for pattern in (r"\bfma\.rn\.f32", r"\.approx", r"\.ftz"):
            assert not re.search(pattern, kernel.ptx), f"{what}: {pattern} in the PTX"
        if kernel.case in STORES_BF16 and kernel.kernel != "sum_kernel":
            # in one instruction; the interpreter's way around it is not compiled in
            assert "cvt.rn.bf16" in kernel.ptx, what
        # one wide load or store, where memory order is logical order
        if "channels_last" not in kernel.case and kernel.kernel != "sum_kernel":
            assert re.search(r"\.v4\.b32", kernel.ptx), what
        if table["versions"]["triton"] == gpu_compile.versions()["triton"]:
            assert kernel.listed(table["triton"]), f"{what}: run {table['command']}"
