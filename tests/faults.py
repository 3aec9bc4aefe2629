"""Processes to be killed, interrupted or started at once, for the tests of faults."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LIMIT = 300.0  # seconds that no step takes on a machine that is not stuck


def start(
    code: str,
    *words: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    """A Python process that runs `code` with `words` as its arguments and one OpenMP thread."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        # this process may have fastdiff by its folder alone
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths(), **(env or {})},
    )


def paths() -> str:
    """The search path of this process, and the folder of the tests' helpers."""
    return os.pathsep.join([str(TESTS), *(p for p in sys.path if p)])


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What the process printed; it must end with this exit code, below zero for a signal."""
    try:
        out, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code, (process.returncode, out, errors)
    return out + errors


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until it happened; the process must live so long."""
    end = time.monotonic() + LIMIT
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
