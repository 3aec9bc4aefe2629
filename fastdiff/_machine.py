"""The processor's name, for the cards and figures that say where they were made."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_model() -> str:
    """As Linux names it, else as the platform does."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
