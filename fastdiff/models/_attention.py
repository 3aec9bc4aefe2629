"""Softmax attention, and the one place that chooses how it is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention"]

_MOST_SCORES = 1 << 24  # 32 MB of them in bfloat16; more samples go in turn


def _by_matmul(q: Tensor) -> bool:
    """Whether two batched products and a softmax are expected to beat torch's fused attention.

    On one thread of an AMD EPYC with AVX-512 BF16, torch 2.13, the fused one took 1.3 to 3.2 times
    as long in bfloat16 where this says yes ((16, 4, 64, 32): 1.6, (1, 1, 256, 256): 1.7, (16, 12,
    64, 64): 2.3, (1, 16, 256, 72): 3.2), and 0.3 to 0.9 times on fewer tokens or narrower heads
    ((16, 1, 16, 256), (8, 32, 256, 8)). In float32 it was ahead on every shape (0.3 to 1.03). The
    batch has no say, though one small sample alone ((1, 4, 64, 32)) is done sooner by the fused
    one: an image must not change with the batch that it is drawn in.
    """
    _, heads, tokens, width = q.shape
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        # the products would keep every score for the backward pass
        and not torch.is_grad_enabled()
        and tokens >= 64
        and width >= 32
        and heads * tokens * tokens <= _MOST_SCORES
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    Args:
        q, k, v: `(N, heads, T, D)`, one floating dtype.

    Returns:
        `(N, heads, T, D)`, dtype of `q`. In bfloat16 on the CPU the scores may be rounded to
        bfloat16 before the softmax.
    """
    if not _by_matmul(q):
        return F.scaled_dot_product_attention(q, k, v)
    n, heads, tokens, _ = q.shape
    each = max(1, _MOST_SCORES // (heads * tokens * tokens))
    if n <= each:
        return _products(q, k, v)
    parts = [slice(i, i + each) for i in range(0, n, each)]
    return torch.cat([_products(q[p], k[p], v[p]) for p in parts])


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, heads, tokens, width = q.shape
    q, k, v = (a.reshape(n * heads, tokens, width) for a in (q, k, v))
    # beta 0: what the first argument holds is not read
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(n, heads, tokens, width)
