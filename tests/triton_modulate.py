"""Cases of `modulate` for Triton's interpreter, run as triton_cases.py runs those of other ops.

TRITON_INTERPRET=1 python tests/triton_modulate.py NAME...
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastdiff.kernels import modulate as kernel
from interpreted import report
from modulate_cases import (
    BACKEND_CASES,
    assert_backend_is_right,
    assert_constant_tokens_become_the_shift,
)

CASES: dict[str, Callable[[], None]] = {
    name: lambda case=case: assert_backend_is_right("triton", torch.device("cpu"), *case)
    for name, case in BACKEND_CASES.items()
}


def longer_than_a_tile() -> None:
    before = kernel._WIDEST, kernel._NARROW
    kernel._WIDEST = 64
    try:
        for kernel._NARROW in (before[1], 0):  # channels counted in 32 bits, and in 64
            for name in BACKEND_CASES:
                if "100" in name:
                    CASES[name]()
            constant_tokens()
    finally:
        kernel._WIDEST, kernel._NARROW = before


def constant_tokens() -> None:
    assert_constant_tokens_become_the_shift("triton", torch.device("cpu"))


CASES["longer than a tile"] = longer_than_a_tile
CASES["constant tokens"] = constant_tokens


if __name__ == "__main__":
    report(CASES)
