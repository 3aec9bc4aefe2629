"""`pytest benchmarks/bench_<op>.py` finds the same modules as `python -m benchmarks.bench_<op>`,
and the fixtures that they share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# last, so that an installed fastdiff wins over the checkout, as it does for the tests
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.append(ROOT)


@pytest.fixture(params=(2, 1), ids=("2threads", "1thread"))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads of torch and of the kernels during a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
