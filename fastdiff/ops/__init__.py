"""The operations: contract, argument checks and choice of backend, one file an op."""

from fastdiff.backends import Op
from fastdiff.ops import noise as _noise
from fastdiff.ops import reverse_step as _reverse_step
from fastdiff.ops.noise import Stream, as_seeds, randn
from fastdiff.ops.reverse_step import reverse_step

# Every op by name; a test walks it and fails where a folder lacks a listed file.
OPS: dict[str, Op] = {op.name: op for op in (_noise.OP, _reverse_step.OP)}

__all__ = ["OPS", "Stream", "as_seeds", "randn", "reverse_step"]
