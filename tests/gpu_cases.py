"""The calls whose GPU kernels are compiled without a GPU: see gpu_compile.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import film_cases
import torch

from fastdiff.table import Row, StepTable

# importlib: `fastdiff.ops.noise` is a module, but for `reverse_step` the function hides it
add_noise_op = importlib.import_module("fastdiff.ops.add_noise")
brownian_op = importlib.import_module("fastdiff.ops.brownian")
noise_op = importlib.import_module("fastdiff.ops.noise")
step_op = importlib.import_module("fastdiff.ops.reverse_step")
vae_op = importlib.import_module("fastdiff.ops.reparameterize")
rescale_op = importlib.import_module("fastdiff.ops.guidance_rescale")
modulate_op = importlib.import_module("fastdiff.ops.modulate")

F32, BF16 = torch.float32, torch.bfloat16
LAST = torch.channels_last
_SHAPE = (4, 64, 32, 32)


def _noise(dtype: torch.dtype, fmt: torch.memory_format = torch.contiguous_format) -> Any:
    out = torch.empty(_SHAPE, dtype=dtype).contiguous(memory_format=fmt)
    return noise_op.prepare(range(4), _SHAPE[1:], out=out)


def _brownian(
    dtype: torch.dtype, fmt: torch.memory_format = torch.contiguous_format, *, added: bool = False
) -> Any:
    out = torch.empty(_SHAPE, dtype=dtype).contiguous(memory_format=fmt)
    more = {"add_to": out.clone(), "scale": 0.5} if added else {}
    return brownian_op.prepare(range(4), _SHAPE[1:], 0.3, 0.4, out=out, **more)


def _add_noise(
    dtype: torch.dtype, target: str, fmt: torch.memory_format = torch.contiguous_format
) -> Any:
    x0 = torch.empty(_SHAPE, dtype=dtype).contiguous(memory_format=fmt)
    return add_noise_op.prepare(x0, range(4), 0.8, 0.6, target=target)


_EVERY = dict.fromkeys(("x", "m", "d", "h0", "n1", "n2", "u"), 0.5)
_TABLE = StepTable(
    "shapes",
    (
        Row(x={"x": 0.9, "m": 0.1}, time=4.0),  # DDIM
        Row(x={"x": 0.9, "d": 0.1}, push=True, time=3.0),
        Row(x={"x": 0.9, "d": 0.1, "h0": 0.3}, push=True, time=2.0),  # DPM-Solver++(2M)
        Row(x={"x": 0.9, "m": 0.1, "n1": 0.3}, draws=((1, 3),), time=1.0),  # DDPM
        Row(
            x={**_EVERY},
            y={**_EVERY},
            draws=((1, 4), (2, 4)),
            push=(0.5, -0.5),
            log_variance=(0.3, 0.4),
            time=0.5,
        ),
        Row(x={**_EVERY, "y": 0.5, "h1": 0.5, "h2": 0.5}, draws=((1, 5), (2, 5)), time=0.1),
    ),
)


def _step(
    row: int | list[int],
    dtype: torch.dtype,
    fmt: torch.memory_format = torch.contiguous_format,
    *,
    guided: bool = False,
    every: bool = False,
) -> Any:
    x = torch.empty(_SHAPE).contiguous(memory_format=fmt)
    model = x.to(dtype)
    ring = torch.empty(4, *x.permute(0, 2, 3, 1).shape) if fmt == LAST else torch.empty(4, *_SHAPE)
    history = ring.permute(0, 1, 4, 2, 3) if fmt == LAST else ring
    given: dict[str, Any] = {"history": history, "seeds": torch.arange(4)}
    if guided or every:
        given |= {"uncond": model, "guidance": 3.0, "model_input": model.clone()}
    if every:
        given |= {"variance": model, "y": x.clone(), "clip": 1.0}
    if isinstance(row, list):
        given |= {"scale": torch.ones(4), "guidance": torch.ones(4), "clip": torch.ones(4)}
    index = torch.tensor(row) if isinstance(row, list) else row
    return step_op.prepare(x, model, _TABLE, index, **given)


def _vae(dtype: torch.dtype, samples: int | None = None) -> Any:
    mu = torch.empty(4, 16, 32, 32, dtype=dtype)
    return vae_op.prepare(mu, mu.clone(), 3, samples=samples)


def _vae_backward(dtype: torch.dtype, samples: int | None = None) -> Any:
    call = _vae(dtype, samples)
    mu, how = call.mu, (call.step, call.stream, call.low, call.high, call.draws)
    return vae_op.ReparameterizeBackward(
        call.z, call.kl, mu, call.logvar, call.seeds, *how, mu.clone(), mu.clone()
    )


def _modulate(dtype: torch.dtype, *, added: bool = True, channels: int = 1152) -> Any:
    x = torch.empty(4, 256, channels, dtype=dtype)
    scale, shift, gate = torch.empty(4, 3 * channels, dtype=dtype).chunk(3, dim=1)
    more = {"residual": x.clone(), "gate": gate} if added else {}
    return modulate_op.prepare(x, scale, shift, **more)


def _rescale(dtype: torch.dtype) -> Any:
    output = torch.empty(_SHAPE, dtype=dtype)
    return rescale_op.prepare(output, output.clone(), 3.0, 0.7)


# name: (op, its checked arguments)
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "noise f32": ("noise", lambda: _noise(F32)),
    "noise bf16": ("noise", lambda: _noise(BF16)),
    "noise f32 channels_last": ("noise", lambda: _noise(F32, LAST)),
    "add_noise f32": ("add_noise", lambda: _add_noise(F32, "epsilon")),
    "add_noise f32 v_prediction": ("add_noise", lambda: _add_noise(F32, "v_prediction")),
    "add_noise bf16": ("add_noise", lambda: _add_noise(BF16, "flow")),
    "add_noise f32 channels_last": ("add_noise", lambda: _add_noise(F32, "sample", LAST)),
    "brownian f32": ("brownian", lambda: _brownian(F32)),
    "brownian f32 added": ("brownian", lambda: _brownian(F32, added=True)),
    "brownian bf16": ("brownian", lambda: _brownian(BF16)),
    "brownian f32 channels_last": ("brownian", lambda: _brownian(F32, LAST, added=True)),
    "step ddim bf16": ("reverse_step", lambda: _step(0, BF16)),
    "step ddim f32": ("reverse_step", lambda: _step(0, F32)),
    "step ddim guided bf16": ("reverse_step", lambda: _step(0, BF16, guided=True)),
    "step 2m bf16": ("reverse_step", lambda: _step(2, BF16)),
    "step 2m f32": ("reverse_step", lambda: _step(2, F32)),
    "step ddpm bf16": ("reverse_step", lambda: _step(3, BF16)),
    "step ddpm f32": ("reverse_step", lambda: _step(3, F32)),
    "step ddpm bf16 channels_last": ("reverse_step", lambda: _step(3, BF16, LAST)),
    "step everything bf16": ("reverse_step", lambda: _step(4, BF16, every=True)),
    "step rows bf16": ("reverse_step", lambda: _step([0, 3, 4, 5], BF16, every=True)),
    "step rows f32": ("reverse_step", lambda: _step([0, 3, 4, 5], F32, every=True)),
    "reparameterize f32": ("reparameterize", lambda: _vae(F32)),
    "reparameterize bf16": ("reparameterize", lambda: _vae(BF16)),
    "reparameterize backward f32": ("reparameterize_backward", lambda: _vae_backward(F32)),
    "reparameterize backward bf16": ("reparameterize_backward", lambda: _vae_backward(BF16)),
    "reparameterize 5 f32": ("reparameterize", lambda: _vae(F32, 5)),
    "reparameterize 5 backward f32": ("reparameterize_backward", lambda: _vae_backward(F32, 5)),
    "modulate f32": ("modulate", lambda: _modulate(F32)),
    "modulate bf16": ("modulate", lambda: _modulate(BF16)),
    "modulate bf16 alone": ("modulate", lambda: _modulate(BF16, added=False)),
    "modulate bf16 long": ("modulate", lambda: _modulate(BF16, channels=16384)),
}
EXACT = tuple(CASES)  # what is promised as bits: no contraction, no approximation
CASES |= {
    "guidance_rescale f32": ("guidance_rescale", lambda: _rescale(F32)),
    "guidance_rescale bf16": ("guidance_rescale", lambda: _rescale(BF16)),
}
CASES |= {f"film_norm {name}": ("film_norm", make) for name, make in film_cases.COMPILED.items()}
# cases with a bfloat16 tensor among their outputs
STORES_BF16 = {
    "noise bf16",
    "add_noise bf16",
    "brownian bf16",
    "step ddim guided bf16",
    "step everything bf16",
    "step rows bf16",
    "reparameterize bf16",
    "reparameterize backward bf16",
    "modulate bf16",
    "modulate bf16 alone",
    "modulate bf16 long",
}
