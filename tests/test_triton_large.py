"""Triton's offsets beyond 2^31 elements, without a GPU and the memory; see triton_large.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    # 13 GiB of addresses in one piece, which a system that counts them as memory may refuse
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory on demand"),
]
_FILE = Path(__file__).with_name("triton_large.py")


def test_few_programs_of_a_grid_beyond_2_31_elements() -> None:
    done = subprocess.run(
        [sys.executable, str(_FILE)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr  # a wrong offset mostly leaves the process here
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wanted = re.findall(r"^@case\ndef (\w+)", _FILE.read_text(), re.MULTILINE)
    assert [line["case"] for line in lines] == wanted
    assert not any(line["error"] for line in lines), "\n".join(line["error"] for line in lines)
