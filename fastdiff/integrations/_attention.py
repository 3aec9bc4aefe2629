"""`Attention` of diffusers over the pixels of a grid, as its U-Nets and autoencoders have it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations import _chains
from fastdiff.integrations._resnet import add
from fastdiff.integrations._swap import Swapped, bypassable, fusable, keeps_forward, loaded


def _refuse(module: Any, /) -> str | None:
    (base, processor) = loaded(
        "diffusers.models.attention_processor", "Attention", "AttnProcessor2_0"
    )
    if not keeps_forward(module, base):
        return "has a forward of its own"
    if type(module.processor) is not processor:
        return f"its processor is {type(module.processor).__name__}, not AttnProcessor2_0"
    if module.group_norm is None:
        return "has no group_norm: nothing to fuse"
    if not bypassable(module.group_norm, nn.GroupNorm):
        return "its group_norm is not a GroupNorm without hooks"
    for name in ("spatial_norm", "norm_q", "norm_k"):
        if getattr(module, name) is not None:
            return f"has {name}"
    return None


class Attention(Swapped):
    """``x + out(attend(q, k, v of norm(x)))`` with the tokens side by side in memory.

    What is won beside the normalisation: it reads the grid as it lies, where the tokens that the
    processor normalises are a transposed view that is copied first, and the projections read
    tokens that are contiguous, so that each is one product with its bias.

    The attention itself stays `scaled_dot_product_attention`. On the CPU two products around a
    softmax take 6.5 ms against 17.3 at (16 x 1 head, 256 tokens, 256 channels) in bfloat16, one
    thread; but their scores are rounded to bfloat16, and the error of the result is 3.6 times that
    of the flash kernel (2.8e-2 against 7.9e-3 at scores of deviation 2), beyond the budget of
    twice. With the scores' remainder added back it is 1.6 times, but takes 14.4 ms, and with
    8 heads of 40 channels 225 ms against 41; in float32 the flash kernel is the faster one.
    """

    fused = "group_norm; contiguous tokens; residual in place"
    refuse = staticmethod(_refuse)

    def inside(self: Any) -> list[nn.Module]:
        return [self.group_norm]

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kw: Any,
    ) -> Any:
        x = hidden_states
        # a processor of this kind reads temb only for a spatial norm
        plain = (
            encoder_hidden_states is None and attention_mask is None and not kw.keys() - {"temb"}
        )
        if not plain or x.ndim != 4 or not fusable(x) or _refuse(self):
            return self.original.forward(self, x, encoder_hidden_states, attention_mask, **kw)
        height, width = x.shape[2:]
        h = _chains.apply(self.group_norm, x, None)
        tokens = h.flatten(2).transpose(1, 2).contiguous()
        q, k, v = (
            project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        project, dropout = self.to_out
        h = dropout(project(h)).transpose(1, 2).unflatten(2, (height, width))
        if self.residual_connection:
            h = add(h, x, project)
        return h if self.rescale_output_factor == 1 else h / self.rescale_output_factor
