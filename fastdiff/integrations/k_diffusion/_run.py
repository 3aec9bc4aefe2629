"""The loop of k-diffusion's fixed-step functions: it walks the rows of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff._state import history_slots
from fastdiff.integrations.k_diffusion._noise import Source
from fastdiff.integrations.k_diffusion._tables import Plan
from fastdiff.ops._layout import memory_format
from fastdiff.ops._results import RESULTS
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.table import StepTable

# (step, the state that the model saw, the model's answer) -> what the callback is called with
Info = Callable[[int, Tensor, Tensor], dict[str, Any]]


class _State:
    """The state, and what the model is given of it: the same tensor, or one of the dtype of x.

    Both are new for every row, since a model or a callback may keep what it was shown; memory that
    nobody holds any more is used again (`ops._results`).
    """

    def __init__(self, x: Tensor) -> None:
        kind = state_dtype(x)
        self.given = x if memory_format(x) is not None else x.contiguous()
        self.x = self.given if x.dtype == kind else self.given.to(kind)

    def renoise(self, noise: Tensor, weight: float) -> None:
        """x + weight * noise, noise of any floating dtype."""
        before = self.x
        self.x = torch.add(before, noise, alpha=weight, out=RESULTS.empty_like(before))
        if self.given.dtype == self.x.dtype:
            self.given = self.x
        else:
            self.given = self.x.to(self.given.dtype)

    def advance(self, output: Tensor | None, table: StepTable, row: int, **slots: Any) -> None:
        """One row of the table."""
        given = None if self.given.dtype == self.x.dtype else RESULTS.empty_like(self.given)
        self.x = reverse_step(self.x, output, table, row, model_input=given, **slots)
        self.given = self.x if given is None else given


def check_model(where: str, model: Any, x: Any, callback: Any) -> None:
    if not callable(model):
        raise TypeError(f"{where}: model must be callable, got {type(model).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        got = f"{x.dim()}-D {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: x must be a floating-point tensor (N, *S), got {got}")
    if not (callback is None or callable(callback)):
        raise TypeError(f"{where}: callback must be callable, got {type(callback).__name__}")


def state_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: what the state is kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def answer_of(where: str, output: Any, x: Tensor) -> Tensor:
    """What the model returned, of the shape of x: as in k-diffusion, one image may be all."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"{where}: model must return a floating-point tensor, got {got}")
    if output.shape == x.shape:
        return output
    try:
        return output.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"{where}: model must return the shape of x {tuple(x.shape)}, got {tuple(output.shape)}"
        ) from None


def noise_of(where: str, source: Source, span: tuple[Any, Any], x: Tensor) -> Tensor:
    """One tensor of noise, of the shape and on the device of x."""
    assert source.sample is not None  # else the kernel draws
    noise = source.sample(*span)
    if not isinstance(noise, Tensor):
        raise TypeError(f"{where}: noise_sampler must return a tensor, got {type(noise).__name__}")
    if noise.shape != x.shape:
        try:
            noise = noise.expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"{where}: noise_sampler must return the shape of x {tuple(x.shape)}, "
                f"got {tuple(noise.shape)}"
            ) from None
    return noise.to(x.device)


@torch.no_grad()
def run(
    where: str,
    model: Callable[..., Tensor],
    x: Tensor,
    plan: Plan,
    source: Source,
    spans: Callable[[int], tuple[Any, Any]],
    info: Info,
    *,
    extra_args: Mapping[str, Any] | None,
    callback: Callable[[dict[str, Any]], Any] | None,
    disable: bool | None,
    churns: bool = False,
    per_call: bool = False,
) -> Tensor:
    """The last state, of the dtype of x.

    Args:
        where: the function, for errors.
        spans: from a row that asks for noise to what the sampler is called with.
        churns: noise is drawn before every step, whether the step adds any or not.
        per_call: the progress bar counts model calls, not steps.
    """
    extra = {} if extra_args is None else extra_args
    table = plan.drawn if source.sample is None else plan.given
    state = _State(x)
    slots = {
        "history": history_slots(table.depth, state.x),
        "y": torch.empty_like(state.x) if table.anchored else None,
        "seeds": source.seeds,
    }
    sigmas = torch.from_numpy(table.sigmas).to(x.dtype).to(x.device)  # some have no float64
    levels = sigmas[:, None].repeat(1, len(x)).unbind(0)
    with tqdm(total=table.nfe if per_call else len(plan.steps), disable=disable) as bar:
        for i, rows in enumerate(plan.steps):
            if churns and source.sample is not None:
                noise = noise_of(where, source, (None, None), x)
                if plan.churn[i]:
                    state.renoise(noise, plan.churn[i])
            elif plan.churn[i]:
                state.advance(None, table, rows[0] - 1, **slots)
            for row in rows:
                output = answer_of(where, model(state.given, levels[row], **extra), x)
                if callback is not None and row == rows[0]:
                    callback(info(i, state.given, output))
                uncond = None
                if plan.asks[row] and source.sample is not None:
                    noise = noise_of(where, source, spans(row), x)
                    if table.needs[row].uncond:
                        output, uncond = _alike(output, noise, state.x.dtype)
                state.advance(output, table, row, uncond=uncond, **slots)
                if per_call:
                    bar.update()
            if not per_call:
                bar.update()
    return state.given


def _alike(output: Tensor, noise: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in one dtype that loses nothing of either which the state could hold."""
    if output.dtype == noise.dtype:
        return output, noise
    if noise.dtype == torch.float64:
        noise = noise.to(kind)
    wide = torch.promote_types(output.dtype, noise.dtype)
    return output.to(wide), noise.to(wide)
