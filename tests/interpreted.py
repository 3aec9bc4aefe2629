"""Cases for Triton's interpreter, which a process has for all of its kernels or for none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

TESTS = Path(__file__).parent


def report(cases: Mapping[str, Callable[[], None]]) -> None:
    """Run the cases that argv names, all without one, and print a line of JSON for each."""
    # Triton reads the variable as it is imported, which a script does before it comes here
    from fastdiff.kernels import _common

    assert _common.INTERPRET.value, "TRITON_INTERPRET=1 must be set"
    for name in sys.argv[1:] or cases:
        start, error = time.perf_counter(), ""
        try:
            cases[name]()
        except Exception:
            error = traceback.format_exc()
        seconds = time.perf_counter() - start
        print(json.dumps({"case": name, "error": error, "seconds": seconds}), flush=True)


def interpreted(script: str, *names: str) -> dict[str, str]:
    """Run a script of this folder with the interpreter on: the error of each case, "" for none."""
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *names],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr  # a wrong offset mostly leaves the process here
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line["error"] for line in lines}
