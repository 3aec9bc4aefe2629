"""Diffusion transformers of diffusers: adaptive layer norms, and the blocks that gate and add
between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations._swap import Swapped, bypassable, fusable, keeps_forward, loaded
from fastdiff.ops.modulate import OP, gated_residual, modulate

BLOCKS = "diffusers.models.attention"
MODEL = "diffusers.models.transformers.dit_transformer_2d"
NORMS = "diffusers.models.normalization"
_ADAPTIVE = ("AdaLayerNormZero", "AdaLayerNormZeroSingle", "AdaLayerNormContinuous")


# --- parts ----------------------------------------------------------------------------------


def _is_layer_norm(norm: Any) -> bool:
    """Over the channels alone; the one that computes in float32 does what every kernel does."""
    kinds: tuple[type[nn.Module], ...] = (nn.LayerNorm, *loaded(NORMS, "FP32LayerNorm"))
    return any(bypassable(norm, kind) for kind in kinds) and len(norm.normalized_shape) == 1


def _is_adaptive(norm: Any, *names: str) -> bool:
    """One of these adaptive norms, around a plain layer norm."""
    kinds = loaded(NORMS, *names)
    return any(bypassable(norm, kind) for kind in kinds) and _is_layer_norm(norm.norm)


def _normalize(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return modulate(x, scale, shift, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def _fits(x: Tensor, *vectors: Tensor) -> bool:
    """Tokens that the op is for, and vectors of one entry a sample in their dtype."""
    return (
        x.ndim == 3
        and fusable(x, OP)
        and all(v.dtype == x.dtype and v.shape[:-1] == x.shape[:1] for v in vectors)
    )


def _films(norm: Any, emb: Tensor, count: int) -> tuple[Tensor, ...]:
    """The vectors that an adaptive norm makes of the embedding, of which its layer norm takes some
    and its block the rest."""
    return norm.linear(norm.silu(emb)).chunk(count, dim=1)  # type: ignore[no-any-return]


def _feed_forward(
    x: Tensor, h: Tensor, gate: Tensor | None, norm: Any, film: Sequence[Tensor], ff: nn.Module
) -> Tensor:
    """The second half of a block: ``x' = x + gate h``, and then ``x' + gate' ff(norm(x'))``.

    Args:
        h: what the attention gave.
        film: shift, scale and the second gate.
    """
    shift, scale, second = film
    h, x = modulate(
        x, scale, shift, weight=norm.weight, bias=norm.bias, residual=h, gate=gate, eps=norm.eps
    )
    return gated_residual(x, ff(h), second)


# --- adaptive norms alone -------------------------------------------------------------------


class _Adaptive(Swapped):
    """An adaptive norm in a block that nothing here knows."""

    fused = "LayerNorm + modulation"

    @staticmethod
    def refuse(module: Any, /) -> str | None:
        if not any(keeps_forward(module, kind) for kind in loaded(NORMS, *_ADAPTIVE)):
            return "has a forward of its own"
        return None if _is_layer_norm(module.norm) else "its norm is not a LayerNorm without hooks"


class AdaLayerNormZero(_Adaptive):
    def forward(
        self: Any,
        x: Tensor,
        timestep: Any = None,
        class_labels: Any = None,
        hidden_dtype: Any = None,
        emb: Tensor | None = None,
    ) -> Any:
        given = emb
        if self.emb is not None:
            given = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        if given is None or not _fits(x, given) or self.refuse(self):
            return self.original.forward(self, x, timestep, class_labels, hidden_dtype, emb)
        shift, scale, gate, *rest = _films(self, given, 6)
        return (_normalize(self.norm, x, scale, shift), gate, *rest)


class AdaLayerNormZeroSingle(_Adaptive):
    def forward(self: Any, x: Tensor, emb: Tensor | None = None) -> Any:
        if emb is None or not _fits(x, emb) or self.refuse(self):
            return self.original.forward(self, x, emb)
        shift, scale, gate = _films(self, emb, 3)
        return _normalize(self.norm, x, scale, shift), gate


class AdaLayerNormContinuous(_Adaptive):
    def forward(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Any:
        if not _fits(x, conditioning_embedding) or self.refuse(self):
            return self.original.forward(self, x, conditioning_embedding)
        scale, shift = _films(self, conditioning_embedding, 2)
        return _normalize(self.norm, x, scale, shift)


# --- blocks ---------------------------------------------------------------------------------


class _Block(Swapped):
    fused = "LayerNorm + modulation; gated residuals"


class BasicTransformerBlock(_Block):
    """The block of DiT (Peebles and Xie 2023, arXiv:2212.09748), whose modulation each block makes
    ("ada_norm_zero"), and of PixArt (Chen et al. 2024, arXiv:2310.00426), where the timestep
    arrives as the modulation of all blocks and a table is added to it ("ada_norm_single").
    """

    @staticmethod
    def refuse(block: Any, /) -> str | None:
        (base,) = loaded(BLOCKS, "BasicTransformerBlock")
        if not keeps_forward(block, base):
            return "has a forward of its own"
        if block.norm_type not in ("ada_norm_zero", "ada_norm_single"):
            return f"its norm_type is {block.norm_type}, not ada_norm_zero or ada_norm_single"
        if block.pos_embed is not None:
            return "adds positions to what the norm gives"
        if block._chunk_size is not None:
            return "its feed-forward runs in chunks"
        if block.norm_type == "ada_norm_single":
            plain = _is_layer_norm(block.norm1) and _is_layer_norm(block.norm2)
        else:
            plain = _is_adaptive(block.norm1, "AdaLayerNormZero") and _is_layer_norm(block.norm3)
        return None if plain else "a norm is not a LayerNorm without hooks"

    def inside(self: Any) -> list[nn.Module]:
        return [self.norm1] if self.norm_type == "ada_norm_zero" else []

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Any:
        x = hidden_states

        def unfused() -> Any:
            return self.original.forward(
                self, x, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip

        if cross_attention_kwargs or not _fits(x) or BasicTransformerBlock.refuse(self):
            return unfused()
        single = self.norm_type == "ada_norm_single"
        if single:
            table = self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
            if table.dtype != x.dtype:
                return unfused()
            films = table.unbind(1)
        else:
            emb = self.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
            if not _fits(x, emb):
                return unfused()
            films = _films(self.norm1, emb, 6)
        shift, scale, gate, *film = films
        h = _normalize(self.norm1 if single else self.norm1.norm, x, scale, shift)
        tokens = encoder_hidden_states if self.only_cross_attention else None
        h = self.attn1(h, encoder_hidden_states=tokens, attention_mask=attention_mask)
        if self.attn2 is not None:
            x = gated_residual(x, h, gate)
            h = self.attn2(
                x if single else self.norm2(x),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
            )
            gate = None
        norm = self.norm2 if single else self.norm3
        return _feed_forward(x, h, gate, norm, film, self.ff)


class JointTransformerBlock(_Block):
    """The block of Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206): the tokens of image
    and text, each with their own modulation, in one attention; in 3.5 the image's own beside it."""

    @staticmethod
    def refuse(block: Any, /) -> str | None:
        (base,) = loaded(BLOCKS, "JointTransformerBlock")
        if not keeps_forward(block, base):
            return "has a forward of its own"
        if block._chunk_size is not None:
            return "its feed-forward runs in chunks"
        first = "SD35AdaLayerNormZeroX" if block.use_dual_attention else "AdaLayerNormZero"
        second = "AdaLayerNormContinuous" if block.context_pre_only else "AdaLayerNormZero"
        plain = (
            _is_adaptive(block.norm1, first)
            and _is_adaptive(block.norm1_context, second)
            and _is_layer_norm(block.norm2)
            and (block.context_pre_only or _is_layer_norm(block.norm2_context))
        )
        return None if plain else "a norm is not a LayerNorm without hooks"

    def inside(self: Any) -> list[nn.Module]:
        return [self.norm1, self.norm1_context]

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: Any = None,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        if not (_fits(x, temb) and _fits(text, temb)) or JointTransformerBlock.refuse(self):
            return self.original.forward(self, x, text, temb, joint_attention_kwargs)
        more = joint_attention_kwargs or {}
        film = _films(self.norm1, temb, 9 if self.use_dual_attention else 6)
        text_film = _films(self.norm1_context, temb, 2 if self.context_pre_only else 6)
        # the continuous norm has its two the other way round
        shift, scale = text_film[1::-1] if self.context_pre_only else text_film[:2]
        h, text_h = self.attn(
            hidden_states=_normalize(self.norm1.norm, x, film[1], film[0]),
            encoder_hidden_states=_normalize(self.norm1_context.norm, text, scale, shift),
            **more,
        )
        gate = film[2]
        if self.use_dual_attention:
            own = _normalize(self.norm1.norm, x, film[7], film[6])
            x = gated_residual(x, h, gate)
            h, gate = self.attn2(hidden_states=own, **more), film[8]
        x = _feed_forward(x, h, gate, self.norm2, film[3:6], self.ff)
        if self.context_pre_only:
            return None, x
        rest = (text_film[2], self.norm2_context, text_film[3:], self.ff_context)
        return _feed_forward(text, text_h, *rest), x


# --- the model ------------------------------------------------------------------------------


class DiTTransformer2DModel(Swapped):
    """The whole model, for the norm before its last product, which its own forward modulates."""

    fused = "norm_out + modulation"

    @staticmethod
    def refuse(model: Any, /) -> str | None:
        (base,) = loaded(MODEL, "DiTTransformer2DModel")
        if not keeps_forward(model, base):
            return "has a forward of its own"
        plain = _is_layer_norm(model.norm_out)
        return None if plain else "its norm_out is not a LayerNorm without hooks"

    def forward(
        self: Any,
        hidden_states: Tensor,
        timestep: Any = None,
        class_labels: Any = None,
        cross_attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if not fusable(hidden_states, OP) or DiTTransformer2DModel.refuse(self):
            return self.original.forward(
                self, hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict
            )
        x = self.pos_embed(hidden_states)
        for block in self.transformer_blocks:
            x = block(
                x,
                attention_mask=None,
                encoder_hidden_states=None,
                encoder_attention_mask=None,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        emb = self.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        film = self.proj_out_1(F.silu(emb))
        shift, scale = film.expand(len(x), -1).chunk(2, dim=1)
        x = self.proj_out_2(_normalize(self.norm_out, x, scale, shift))
        side, patch = int(x.shape[1] ** 0.5), self.patch_size
        x = x.reshape(-1, side, side, patch, patch, self.out_channels)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side * patch, side * patch)
        (output,) = loaded("diffusers.models.modeling_outputs", "Transformer2DModelOutput")
        return output(sample=x) if return_dict else (x,)
