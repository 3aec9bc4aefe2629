"""`pytest benchmarks/bench_<op>.py` finds the same modules as `python -m benchmarks.bench_<op>`."""

from __future__ import annotations

import sys
from pathlib import Path

# last, so that an installed fastdiff wins over the checkout, as it does for the tests
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.append(ROOT)
