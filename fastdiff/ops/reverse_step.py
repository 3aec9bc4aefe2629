"""One row of a `StepTable` over a batch: the reverse-step update of every fixed-step solver."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.autograd import forward_ad

from fastdiff._packing import Packing
from fastdiff.backends import Implementation, Op, choose
from fastdiff.ops import _native, _step_cpu
from fastdiff.ops._checks import check_dense, check_memory
from fastdiff.ops._layout import memory_format
from fastdiff.ops._results import RESULTS
from fastdiff.ops._step_checks import (
    Cursor,
    Like,
    Step,
    check_apart,
    check_history,
    check_row,
    check_rows,
    check_seeds,
    check_unread,
    factors,
    in_place,
    joined,
    kind,
    ordered,
    require,
    weight,
)
from fastdiff.reference.reverse_step import reference_row
from fastdiff.table import C_IN, PUSH

# --- reference ------------------------------------------------------------------------------


def _reference(step: Step) -> None:
    x = step.x
    floats, ints = step.packed.floats.cpu().numpy(), step.packed.ints.cpu().numpy()
    rows = np.full(len(x), step.row) if step.rows is None else step.rows.cpu().numpy()
    seeds = np.zeros(0, np.uint64)
    if step.seeds is not None:
        seeds = step.seeds.cpu().numpy().view(np.uint64)

    def one(t: torch.Tensor | float | None, i: int) -> torch.Tensor | float | None:
        return float(t[i]) if isinstance(t, torch.Tensor) else t

    uniform = step.rows is None
    per_sample = any(isinstance(t, torch.Tensor) for t in (step.guidance, step.scale, step.clip))
    groups = (
        [slice(0, len(x))]
        if uniform and not per_sample
        else [slice(i, i + 1) for i in range(len(x))]
    )
    for g in groups if len(x) else []:

        def part(t: torch.Tensor | None, g: slice = g) -> torch.Tensor | None:
            return None if t is None else t[g]

        row, info = floats[rows[g.start]], ints[rows[g.start]]
        guidance = one(step.guidance, g.start)
        assert guidance is not None
        clip = one(step.clip, g.start)
        new_x, new_y, pushed = reference_row(
            row,
            info,
            x[g],
            output=part(step.output),
            uncond=part(step.uncond),
            variance=part(step.variance),
            y=part(step.y),
            history=[] if step.history is None else [h[g] for h in step.history],
            seeds=seeds[g],
            guidance=guidance,
            scale=None if step.scale is None else step.scale[g.start],
            clip=None if clip is None or float(clip) < 0 else clip,
        )
        step.out[g] = new_x
        if new_y is not None and step.y is not None:
            step.y[g] = new_y
        if pushed is not None and step.history is not None:
            step.history[int(info[PUSH]), g] = pushed
        if step.model_input is not None:
            step.model_input[g] = (float(row[C_IN]) * new_x).to(step.model_input.dtype)


# --- backends -------------------------------------------------------------------------------

_STATES = (torch.float32, torch.float64)


def _wants_gradient(t: torch.Tensor | None) -> bool:
    return isinstance(t, torch.Tensor) and t.requires_grad


def _tracked(
    x: torch.Tensor,
    output: torch.Tensor | None,
    uncond: torch.Tensor | None,
    variance: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> bool:
    """Whether autograd would want a backward pass, or any tensor may have a tangent."""
    # written out: a loop over the tensors would cost a tenth of a small step
    return forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and (
            _wants_gradient(x)
            or _wants_gradient(output)
            or _wants_gradient(uncond)
            or _wants_gradient(variance)
            or _wants_gradient(scale)
        )
    )


def _refuse_dtype(step: Step) -> str | None:
    x, output, model_input = step.x, step.output, step.model_input
    if _tracked(x, output, step.uncond, step.variance, step.scale):
        return "the kernel has no backward pass or tangents (torch.no_grad(), or the reference)"
    if x.dtype != torch.float32:
        return f"the state must be float32, got {x.dtype}"
    if output is not None and output.dtype not in _native.DTYPES:
        return f"model tensors must be float32, bfloat16 or float16, got {output.dtype}"
    if model_input is not None and model_input.dtype not in _native.DTYPES:
        return f"model tensors must be float32, bfloat16 or float16, got {model_input.dtype}"
    return None


def _refuse_cpu(step: Step) -> str | None:
    if not step.x.is_cpu:
        return f"the state must be on the CPU, got {step.x.device}"
    return _refuse_dtype(step)


def _refuse_triton(step: Step) -> str | None:
    return _native.refuse_triton(step.x) or _refuse_dtype(step)


def _refuse_cuda(step: Step) -> str | None:
    return _native.refuse_cuda(step.x) or _refuse_dtype(step)


def _load_triton() -> Callable[[Step], None]:
    from fastdiff.kernels.reverse_step import reverse_step

    return reverse_step  # type: ignore[no-any-return]


def _load_cuda() -> Callable[[Step], None]:
    from fastdiff.ops._cuda import reverse_step

    return reverse_step


OP = Op(
    "reverse_step",
    {
        "cpu": Implementation(lambda: _step_cpu.run, _refuse_cpu),
        "triton": Implementation(_load_triton, _refuse_triton),
        "cuda": Implementation(_load_cuda, _refuse_cuda),
        "reference": Implementation(lambda: _reference, lambda step: None),
    },
)


# --- the op ---------------------------------------------------------------------------------


def prepare(
    x: torch.Tensor,
    output: torch.Tensor | None,
    table: Packing,
    row: int | torch.Tensor | Cursor,
    *,
    uncond: torch.Tensor | None = None,
    guidance: float | torch.Tensor = 1.0,
    scale: torch.Tensor | None = None,
    clip: float | torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    model_input: torch.Tensor | None = None,
) -> Step:
    """The arguments of `reverse_step`, checked; nothing is written."""
    if not isinstance(x, torch.Tensor) or x.dtype not in _STATES:
        raise TypeError(f"reverse_step: x must be a float32 or float64 tensor, got {kind(x)}")
    check_dense("reverse_step", "x", x)
    check_memory("reverse_step", "x", x)
    if not isinstance(table, Packing):
        raise TypeError(f"reverse_step: table must be a StepTable, got {type(table).__name__}")
    shape = x.shape
    if not shape:
        raise ValueError("reverse_step: x must have shape (N, *S), got ()")
    fmt = memory_format(x)
    if fmt is None:
        fmt = torch.contiguous_format
        x = x.contiguous()
    dtype, device = x.dtype, x.device
    like = Like(shape, device, dtype, fmt)
    rows: torch.Tensor | None = None
    if isinstance(row, torch.Tensor):
        rows = check_rows(row, table, like)
        needs, row = joined(table, rows.tolist()), 0
    elif isinstance(row, Cursor):
        rows, needs, row = row.rows, row.needs, 0
    else:
        needs = table.needs[check_row(row, table)]
    if needs.output:
        output = ordered(require("output", output, like, "the row evaluates the model"), fmt)
        if uncond is not None or needs.uncond:
            uncond = require("uncond", uncond, like, "the row reads it", output.dtype)
            uncond = ordered(uncond, fmt)
    else:
        output = uncond = None
    if needs.variance:
        variance = require("variance", variance, like, "its variance is learned", output.dtype)  # type: ignore[union-attr]
        variance = ordered(variance, fmt)
    else:
        variance = None
    if needs.anchor or needs.writes_anchor:
        y = require("y", y, like, "the row uses the anchor state", dtype)
        in_place("y", y, fmt)
    else:
        y = None
    history = check_history(history, needs.history, x, like) if needs.history else None
    if needs.seeds:
        seeds = check_seeds(seeds, like)
    if uncond is not None or isinstance(guidance, torch.Tensor):
        guidance = weight("guidance", guidance, like)
    if scale is not None:
        scale = factors(scale, like) if needs.output else None
    if clip is not None:
        clip = weight("clip", clip, like)
        if not isinstance(clip, torch.Tensor) and clip < 0:
            raise ValueError(f"reverse_step: clip must not be negative, got {clip}")
    if out is None:
        out = RESULTS.empty_like(x)
        check_memory("reverse_step", "out", out)  # a tracer may have made it
    else:
        require("out", out, like, "", dtype)
        in_place("out", out, fmt)
    if model_input is not None:
        require("model_input", model_input, like, "")
        in_place("model_input", model_input, fmt)
    check_apart(x, out, y, history, model_input)
    for name, t in (("output", output), ("uncond", uncond), ("variance", variance)):
        if t is not None:
            check_unread(name, t, out, y, history, model_input)
    if isinstance(clip, torch.Tensor):
        packed = table.packed_each(device, dtype=dtype)
        rows = torch.full_like(clip, row, dtype=torch.int64) if rows is None else rows
        rows = rows + len(table) * (clip >= 0)
    else:
        packed = table.packed(device, clip=clip is not None, dtype=dtype)
    return Step(
        x,
        output,
        uncond,
        variance,
        y,
        history,
        packed,
        row,
        rows,
        seeds,
        guidance,
        scale,
        clip,
        out,
        model_input,
        fmt,
    )


def reverse_step(
    x: torch.Tensor,
    output: torch.Tensor | None,
    table: Packing,
    row: int | torch.Tensor | Cursor,
    *,
    uncond: torch.Tensor | None = None,
    guidance: float | torch.Tensor = 1.0,
    scale: torch.Tensor | None = None,
    clip: float | torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    model_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """The state after one row of the table, in one pass over memory.

    Args:
        x: (N, *S) state, float32 (float64 on the reference backend only); contiguous and
            channels_last are read as they are, any other order is copied first.
        output: (N, *S) model output, float32, bfloat16 or float16; None for a row without one.
        table: the solver's rows.
        row: index of the row, or (N,) int64 tensor with one a sample (or such a tensor in a
            `Cursor`, whose values are not looked at).
        uncond: (N, *S) unconditional model output, dtype of ``output``.
        guidance: weight w of ``uncond + w*(output - uncond)``, a number or (N,) float32.
        scale: (N,) factors of the guided output, dtype of x, from `guidance_rescale`; None: none.
        clip: bound of the converted prediction, a number or (N,) float32; None or a negative
            bound of a sample: no clipping.
        variance: (N, *S) the model's variance output, for rows with a learned variance.
        y: (N, *S) anchor state, float32, updated in place; for rows that keep one.
        history: (depth, N, *S) float32 ring of what rows push, updated in place.
        seeds: (N,) int64 seeds on the CPU or the device of x, for rows that draw noise.
        out: written and returned if given; may be ``x``.
        model_input: (N, *S) float32, bfloat16 or float16, receives ``c_in * x'``.

        What is written shares no memory with what is read or with each other, but that ``out`` may
        be ``x``, and ``out`` or ``model_input`` the very memory of a model tensor of its dtype.

    Returns:
        (N, *S) the new state.

    Raises:
        TypeError, ValueError: an argument breaks its rule; nothing has been written.
        BackendError: the forced backend cannot do it.
    """
    if not _tracked(x, output, uncond, variance, scale):
        done = _step_cpu.quick(
            x,
            output,
            table,
            row,
            uncond,
            guidance,
            scale,
            clip,
            variance,
            y,
            history,
            seeds,
            out,
            model_input,
        )
        if done is not None:
            return done
    step = prepare(
        x,
        output,
        table,
        row,
        uncond=uncond,
        guidance=guidance,
        scale=scale,
        clip=clip,
        variance=variance,
        y=y,
        history=history,
        seeds=seeds,
        out=out,
        model_input=model_input,
    )
    choose(OP, step)[1](step)
    return step.out
