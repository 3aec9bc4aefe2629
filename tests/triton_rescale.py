"""`guidance_rescale` in Triton's interpreter, on CPU tensors; see triton_cases.py."""

from __future__ import annotations

import numpy as np
import torch
from budget import assert_within_budget
from fastdiff.kernels import _common
from fastdiff.kernels import guidance_rescale as kernel
from interpreted import report

from fastdiff import use_backend
from fastdiff.ops import guidance_rescale
from fastdiff.reference.guidance_rescale import guidance_rescale as exact_rescale

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def rescale() -> None:
    rng = np.random.default_rng(0)
    weights, phi = torch.tensor([1.0, 7.5, -2.0]), torch.tensor([0.7, 1.0, 0.0])
    make = _common.tiles
    for block in (1 << 18, 128):  # one tile a sample, and several with 64-bit offsets
        _common._INTERPRETER_BLOCK = block
        kernel.tiles = lambda *a, wide=block == 128, **k: make(*a, **k)._replace(WIDE=wide)
        for n, dtype in ((1, F32), (3, F16), (1025, F32), (1000, BF16)):
            c, u = (torch.from_numpy(rng.normal(3.0, 1.0, (3, n))).to(dtype) for _ in "cu")
            u[2] = c[2] = 5.0  # without contrast
            found = {}
            for backend in ("triton", "reference"):
                with use_backend(backend):
                    found[backend] = guidance_rescale(c, u, weights, phi)
            exact = exact_rescale(c.double(), u.double(), weights, phi)
            # float32 sums in a tile of at most 2^18 positive terms, in a tree: 18 levels
            assert_within_budget(found["triton"], found["reference"], exact, ulps=18)
            assert found["triton"][2] == 1


if __name__ == "__main__":
    report({"rescale": rescale})
