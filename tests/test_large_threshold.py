"""dynamic_threshold's kernel where a bucket counts more than 2^32 elements: `pytest -m large`.

Compiled here by itself, on one thread; the sample is one piece of memory mapped many times.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from test_headers import COMPILER, ROOT
from test_large import PERIOD, Repeated

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

SOURCE = """
#include "cpu/dynamic_threshold.cpp"
bool fd_forked = false;
extern "C" __attribute__((visibility("default")))
float quantile(const float* x, int64_t size, int64_t rank) {
  float found = 0.0f;
  fd::probe::dynamic_threshold({x, 1, size, rank, 0.0, 1.0f, &found, nullptr});
  return found;
}
"""
SIZE = 523 * PERIOD  # 2 % more than 2^32
ZEROS = int(0.985 * PERIOD)  # of each period: more than 2^32 in all, in one bucket


def test_a_bucket_of_more_than_2_32_elements(tmp_path: Path) -> None:
    (tmp_path / "threshold.cpp").write_text(SOURCE)
    library = tmp_path / "threshold.so"
    subprocess.run(
        [
            str(COMPILER), "-std=c++17", "-O2", "-w", "-DFD_ISA=probe", "-shared", "-fPIC",
            f"-I{ROOT / 'csrc'}", str(tmp_path / "threshold.cpp"), "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    quantile = ctypes.CDLL(str(library)).quantile
    quantile.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    quantile.restype = ctypes.c_float
    zeros, middle = ZEROS * (SIZE // PERIOD), (ZEROS + PERIOD) // 2
    assert zeros > 2**32
    with Repeated(torch.float32, SIZE) as x:
        x[:ZEROS], x[ZEROS:middle], x[middle:PERIOD] = 0.0, 2.0, -3.0
        assert quantile(x.data_ptr(), SIZE, zeros) == 2.0
        assert quantile(x.data_ptr(), SIZE, SIZE - 1) == 3.0
