"""What the sanitizers must stop: `address` writes beyond a tensor, `thread` writes one from two."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch

from fastdiff.ops import _native


def fill(out: torch.Tensor, count: int) -> None:
    seeds = torch.zeros(1, dtype=torch.int64)
    _native.extension.noise(seeds.data_ptr(), 0, 0, 1, count, 0, out.data_ptr(), 0)


built = Path(os.environ["FASTDIFF_SITE"])
if not Path(_native.extension.__file__).is_relative_to(built):
    # without sanitizers of its own, a write by memcpy would be seen all the same
    sys.exit(f"control: the extension must be that of {built}, got {_native.extension.__file__}")
out = torch.empty(1_000_000)
if sys.argv[1] == "address":
    fill(out, len(out) + 1)
else:
    team = [threading.Thread(target=fill, args=(out, len(out))) for _ in range(2)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
