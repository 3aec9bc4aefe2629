"""`ResnetBlock2D` of diffusers: the residual block of its U-Nets and autoencoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations import _chains
from fastdiff.integrations._swap import Swapped, bypassable, fusable, keeps_forward, loaded


def _refuse(block: Any, /) -> str | None:
    (base,) = loaded("diffusers.models.resnet", "ResnetBlock2D")
    if not keeps_forward(block, base):
        return "has a forward of its own"
    if block.training and block.dropout.p > 0:
        return f"is in training mode with dropout {block.dropout.p}"
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if not bypassable(block.nonlinearity, nn.SiLU):
        return "its activation has hooks, which a fused pass would not call"
    for name in ("norm1", "norm2"):
        if not bypassable(getattr(block, name), nn.GroupNorm):
            return f"its {name} is not a GroupNorm without hooks"
    return None


class ResnetBlock2D(Swapped):
    """``x + conv2(act(film(norm2(conv1(act(norm1(x)))))))`` with the embedding of the time as FiLM
    or as an offset before norm2, and a 1x1 convolution of x where the width changes.
    """

    fused = "norm1 + SiLU; norm2 + FiLM + SiLU; sums in place"
    refuse = staticmethod(_refuse)

    def inside(self: Any) -> list[nn.Module]:
        return [self.norm1, self.norm2, self.nonlinearity]

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kw: Any) -> Any:
        x = input_tensor
        films = self.time_embedding_norm == "scale_shift"
        # an embedding for each sample, or none and no use for it
        if self.time_emb_proj is None:
            fits = temb is None and not films
        else:
            fits = temb is not None and temb.shape[:-1] == x.shape[:1]
        if args or kw or not fits or not fusable(x) or _refuse(self):
            return self.original.forward(self, x, temb, *args, **kw)
        h = _chains.apply(self.norm1, x, "silu")
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv1(h)

        scale = shift = None
        if temb is not None:
            film = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
            if films:
                scale, shift = film.chunk(2, dim=1)
            else:
                h = add(h, film[:, :, None, None], self.conv1)
        h = _chains.apply(self.norm2, h, "silu", scale, shift)
        h = self.conv2(self.dropout(h))

        if self.conv_shortcut is not None:
            # the layout that DDP saw while it trained
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        h = add(h, x, self.conv2)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def add(h: Tensor, x: Tensor, maker: nn.Module) -> Tensor:
    """``x + h``; into h, the result of ``maker``, where nobody else can hold h.

    Out of place too where that would change the dtype or the memory order of the sum.
    """
    fresh = bypassable(maker, nn.Conv2d) or bypassable(maker, nn.Linear)
    offset = x.shape[2:].numel() == 1
    alike = h.dtype == x.dtype and (offset or h.stride() == x.stride())
    if fresh and alike and not torch._C._are_functorch_transforms_active():
        return h.add_(x)
    return x + h
