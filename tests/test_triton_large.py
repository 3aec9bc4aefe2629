"""Triton's offsets beyond 2^31 elements, without a GPU and the memory; see triton_large.py."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from interpreted import interpreted

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    # 13 GiB of addresses in one piece, which a system that counts them as memory may refuse
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory on demand"),
]
_FILE = Path(__file__).with_name("triton_large.py")


def test_few_programs_of_a_grid_beyond_2_31_elements() -> None:
    errors = interpreted(_FILE.name)
    wanted = re.findall(r"^@case\ndef (\w+)", _FILE.read_text(), re.MULTILINE)
    assert list(errors) == wanted
    assert not any(errors.values()), "\n".join(errors.values())
