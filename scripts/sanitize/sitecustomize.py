"""`fastdiff` from the folder of $FASTDIFF_SITE alone, whatever the environment has installed.

The finder of an editable install stands before every path, so $PYTHONPATH would not be asked, and
the tests would run on an extension without sanitizers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class Sanitized:
    """Finds `fastdiff` and what is in it."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "fastdiff":
            return None
        return PathFinder.find_spec(name, path or [os.environ["FASTDIFF_SITE"]], target)


if "FASTDIFF_SITE" in os.environ:
    sys.meta_path.insert(0, Sanitized)  # type: ignore[arg-type]
