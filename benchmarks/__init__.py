"""Benchmarks against real peers; `python -m benchmarks` runs them."""

import sys

# transformers, which some of diffusers' models import, looks for a package of that name, and the
# root of a checkout has such a folder
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
