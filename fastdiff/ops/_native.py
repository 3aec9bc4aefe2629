"""The CPU extension, or the reason why it is missing, and what its callers share."""

from __future__ import annotations

import os
from typing import Any

import torch  # first: its libgomp must be in the process before the extension's

from fastdiff.ops._results import RESULTS

extension: Any = None
missing: str | None = None
try:
    import fastdiff._cpu

    extension = fastdiff._cpu
except ImportError as error:
    missing = (
        f"the C++ extension fastdiff._cpu cannot be imported ({error}); "
        "install with a C++ compiler present to build it"
    )
else:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=extension.forked)
    if "FASTDIFF_CPU_ISA" in os.environ:
        extension.set_isa(os.environ["FASTDIFF_CPU_ISA"])

# Whether C++ can read tensors itself (DLPack's exchange table, in every torch that we support).
reads_tensors = extension is not None and extension.use_torch(
    torch.Tensor, torch.nn.Parameter, RESULTS.empty_like
)

# Equal to FdDtype in csrc/half.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(tensor: torch.Tensor | None) -> int:
    """Where the data of a tensor starts; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def refuse_cuda(x: torch.Tensor) -> str | None:
    """Reason why a CUDA kernel cannot take a tensor of this device, or None."""
    return None if x.device.type == "cuda" else f"tensors must be on a CUDA device, got {x.device}"


def refuse_triton(x: torch.Tensor) -> str | None:
    """The same for a Triton kernel, which its interpreter runs on CPU tensors too."""
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return refuse_cuda(x)
