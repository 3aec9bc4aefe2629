"""What the pictures of ``fastdiff eval`` and ``fastdiff demo`` share: matplotlib, an extra."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["pyplot", "save"]


def pyplot(where: str) -> Any:
    """matplotlib's pyplot, without a window.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{where}: matplotlib must be installed for pictures, got none "
            "(pip install 'fastdiff-sampler[demo]')"
        ) from error
    return plt


def save(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure as a PNG that is there whole or not at all, and forget it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, dpi=dpi, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        pyplot("plot").close(figure)
