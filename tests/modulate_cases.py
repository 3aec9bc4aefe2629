"""Calls of `modulate` that every GPU backend is held to, against float64 and the reference."""

from __future__ import annotations

from typing import Any

import torch
from bits import assert_same_bits
from budget import assert_within_budget

from fastdiff import randn, use_backend
from fastdiff.ops import gated_residual, modulate

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Case = tuple[tuple[int, ...], torch.dtype, dict[str, Any]]

# shape, dtype of x, options: "each" modulation by token, "film" its dtype, "offset" misaligned,
# "without" parts; the rest goes to the op. Sizes: one channel, odd, aligned packs in one warp and
# in several, tokens that share a block, and tokens that registers do not hold (9,000).
BACKEND_CASES: dict[str, Case] = {
    "f32 1": ((2, 3, 1), F32, {}),
    "f32 3": ((2, 3, 3), F32, {"norm": "rms"}),
    "f32 100": ((2, 9, 100), F32, {}),
    "bf16 100": ((2, 3, 100), BF16, {"norm": "rms"}),
    "bf16 1152": ((2, 3, 1152), BF16, {}),
    "f16 384 by token": ((2, 5, 384), F16, {"each": True}),
    "f32 without tokens": ((5, 64), F32, {}),
    "bf16 float32 film": ((2, 3, 128), BF16, {"film": F32}),
    "f32 misaligned 65": ((2, 3, 65), F32, {"offset": 1}),
    "bf16 misaligned 64": ((2, 3, 64), BF16, {"offset": 1}),
    "f32 9000": ((1, 2, 9000), F32, {}),
    "bf16 9000": ((1, 2, 9000), BF16, {"norm": "rms"}),
    "no norm 100": ((2, 3, 100), F32, {"norm": None, "without": ("weight", "bias")}),
    "no residual 100": ((2, 3, 100), F32, {"without": ("residual", "gate")}),
    "no gate 100": ((2, 3, 100), BF16, {"without": ("gate",)}),
    "norm alone": ((2, 3, 48), F32, {"without": ("residual", "gate", "scale", "shift", "weight")}),
    "mean above the deviation 100": ((2, 3, 100), F32, {"offset_of_x": 3e4}),
}  # fmt: skip


def tensors(case: Case, device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a call by name, and its other options."""
    shape, dtype, options = case
    options = dict(options)
    film = options.pop("film", dtype)
    each, skip = options.pop("each", False), options.pop("offset", 0)
    above, without = options.pop("offset_of_x", 0.0), options.pop("without", ())
    wide = (*(shape[:-1] if each else shape[:1]), 4 * shape[-1])
    scale, shift, gate, _ = (0.5 * randn([3], wide)[0]).to(film).chunk(4, dim=-1)
    x, residual = randn([1, 2], shape)
    weight, bias = randn([4, 5], shape[-1:])
    t = {"x": (x + above).to(dtype), "residual": residual.to(dtype), "scale": scale,
         "shift": shift, "gate": gate, "weight": weight, "bias": bias}  # fmt: skip
    moved = {}
    for name, v in t.items():
        if name in without:
            continue
        # memory that starts `skip` elements late; a chunk stays a chunk
        room = torch.empty(v.stride(0) * v.shape[0] + skip, dtype=v.dtype, device=device)
        moved[name] = room.as_strided(v.shape, v.stride(), skip).copy_(v)
    return moved, options


def assert_backend_is_right(
    backend: str, device: torch.device, shape: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Both results within the budget of the reference, the same on a second run."""
    t, rest = tensors((shape, dtype, options), device)

    def run(name: str, kind: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        with use_backend(name):
            found = modulate(**{k: v if kind is None else v.to(kind) for k, v in t.items()}, **rest)
        return found if isinstance(found, tuple) else (found,)

    got, plain, exact = run(backend), run("reference"), run("reference", torch.float64)
    assert len(got) == len(plain)
    for g, p, e in zip(got, plain, exact, strict=True):
        # the last rounding, and half an ulp each of the two reductions' factors
        assert_within_budget(g, p, e, ulps=1.5)
    for g, again in zip(got, run(backend), strict=True):
        assert_same_bits(g, again, "a second run")
    if "residual" in t:
        with use_backend(backend):
            alone = gated_residual(t["x"], t["residual"], t.get("gate"))
        assert_same_bits(alone, got[1], "the gated residual alone")


def assert_constant_tokens_become_the_shift(backend: str, device: torch.device) -> None:
    """Their mean has no exact float32: what it is off by, over sqrt(eps) = 1e-3, must not show."""
    values = torch.tensor([0.1, 0.7, 10.1, 333.3, 1000.1], device=device)
    x = values[None, :, None].expand(1, 5, 1152).contiguous()
    shift = 1 + randn([3], (1152,)).abs().to(device)
    with use_backend(backend):
        got = modulate(x, None, shift)
    assert_same_bits(got, shift[:, None].expand_as(x))
