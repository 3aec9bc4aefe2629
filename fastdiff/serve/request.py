"""What a client asks for, and the plan that is made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff._guidance import Guidance, check_number
from fastdiff.ops.noise import as_seeds
from fastdiff.schedules import Schedule
from fastdiff.table import StepTable

Weights = float | Sequence[float] | Callable[[int, float], float] | None


@dataclass(frozen=True)
class Request:
    """Images to make: one for each seed.

    Attributes:
        seeds: an int, a sequence of ints, or an (N,) int64 tensor; image i depends on seed i alone.
        solver: a name in `solvers.SOLVERS`, or a table.
        steps: of the solver; None for a table.
        spacing: of the steps in time, as in `solvers.build`.
        options: further options of the solver and the spacing, by name.
        guidance: as in `Sampler`, but one weight for all images: a number, a sequence of one a row,
            or a function of (index of the row, its sigma / alpha).
        guidance_interval: as in `Sampler`.
        guidance_rescale: as in `Sampler`, a number.
        clip: bound of the converted prediction; None: no clipping.
        cond: arguments of the model by name: what one image has, for all of them, or (N, ...).
        uncond: the same for the unconditional output; what is not named is the engine's null.
    """

    seeds: int | Sequence[int] | Tensor = 0
    solver: str | StepTable = "dpmpp_2m"
    steps: int | None = 20
    spacing: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    guidance: Weights = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    clip: float | None = None
    cond: Mapping[str, Any] = field(default_factory=dict)
    uncond: Mapping[str, Any] = field(default_factory=dict)


NAMES = tuple(f.name for f in fields(Request))


@dataclass(frozen=True, eq=False)
class Plan:
    """A request that was checked, as a batch runs it.

    Attributes:
        request: as it was asked.
        table: of its solver.
        seeds: (N,) int64.
        weights: guidance of each row.
        calls: whether each row wants the unconditional output.
        phis: share of rescaled guidance of each row, 0 for none.
        clip: bound, or -1 for none.
        cond, uncond: (N, ...) arguments of the model.
        cost: model evaluations of one image.
    """

    request: Request
    table: StepTable
    seeds: Tensor
    weights: tuple[float, ...]
    calls: tuple[bool, ...]
    phis: tuple[float, ...]
    clip: float
    cond: Mapping[str, Tensor]
    uncond: Mapping[str, Tensor]
    cost: int


class Planner:
    """Makes plans for one model.

    Args:
        schedule: of the model.
        prediction: what the model predicts.
        null: arguments of the model that stand for "no condition", without a sample axis.
        defaults: fields of a request where it names no others.
        max_steps: that a request may ask for.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str,
        null: Mapping[str, Tensor],
        defaults: Mapping[str, Any],
        max_steps: int,
    ) -> None:
        _check_names("defaults", defaults)
        # copies: the caller may use the tensors again
        self.null = {key: value.detach().clone() for key, value in null.items()}
        self.defaults, self.max_steps = dict(defaults), max_steps
        self._prediction = prediction

        # typed, which looks at arguments and not into them: eta=1 is a number and eta=True is none
        @functools.lru_cache(maxsize=64, typed=True)
        def build(solver: str, steps: int, spacing: str | None, /, **options: Any) -> StepTable:
            return solvers.build(
                solver, schedule, steps, prediction=prediction, spacing=spacing, **options
            )

        self._build = build

    def __call__(self, **given: Any) -> Plan:
        """The plan of a request.

        Raises:
            TypeError, ValueError: a field breaks its rule.
        """
        _check_names("fields", given)
        request = Request(**{**self.defaults, **given})
        table = self._table(request)
        seeds = as_seeds(request.seeds, where="submit")
        if len(seeds) == 0:
            raise ValueError("submit: seeds must not be empty, got none")
        for name in ("guidance_rescale", "clip"):
            value = getattr(request, name)
            if isinstance(value, Tensor):
                raise TypeError(f"submit: {name} must be a number, got a tensor")
        check_number("clip", request.clip, optional=True)
        if request.clip is not None and request.clip < 0:
            raise ValueError(f"submit: clip must not be negative, got {request.clip}")
        rows = Guidance(
            table, request.guidance, request.guidance_interval, request.guidance_rescale
        ).rows(torch.device("cpu"))
        if any(isinstance(row.weight, Tensor) for row in rows):
            raise TypeError("submit: guidance must be one number for all images, got a tensor")
        calls = tuple(row.calls for row in rows)
        if any(calls) and not self.null:
            raise ValueError(
                f"submit: guidance must be left out for a model without conditions, "
                f"got {request.guidance}"
            )
        evaluations = (
            row.evaluates * (1 + call) for row, call in zip(table.rows, calls, strict=True)
        )
        return Plan(
            request=request,
            table=table,
            seeds=seeds.clone(),  # the caller may use the tensor again while the request waits
            weights=tuple(float(row.weight) for row in rows),
            calls=calls,
            phis=tuple(float(row.phi or 0) for row in rows),
            clip=-1.0 if request.clip is None else float(request.clip),
            cond=self._entries("cond", request.cond, len(seeds)),
            uncond=self._entries("uncond", request.uncond, len(seeds)),
            cost=max(1, sum(evaluations)),
        )

    def _table(self, request: Request) -> StepTable:
        solver, steps = request.solver, request.steps
        if isinstance(solver, StepTable):
            if steps is not None or request.spacing is not None or request.options:
                raise ValueError(
                    f"submit: steps, spacing and options must be left out with a table, "
                    f"got {steps}, {request.spacing}, {dict(request.options)}"
                )
            if solver.prediction != self._prediction or len(solver.starts) > 1:
                raise ValueError(
                    f"submit: solver must be one table for {self._prediction}, got "
                    f"{len(solver.starts)} for {solver.prediction}"
                )
            return solver
        if not isinstance(solver, str):
            raise TypeError(f"submit: solver must be a name or a StepTable, got {solver!r}")
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"submit: steps must be an integer, got {steps!r}")
        if not 1 <= steps <= self.max_steps:
            raise ValueError(f"submit: steps must lie in [1, {self.max_steps}], got {steps}")
        if not (request.spacing is None or isinstance(request.spacing, str)):
            raise TypeError(f"submit: spacing must be a name or None, got {request.spacing!r}")
        options = request.options
        if not (isinstance(options, Mapping) and all(isinstance(name, str) for name in options)):
            raise TypeError(f"submit: options must be a mapping of names, got {options!r}")
        solvers.check_names("submit", options)
        try:
            return self._build(solver, steps, request.spacing, **dict(sorted(options.items())))
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
            raise TypeError(
                f"submit: options must be numbers, words or tuples, got {dict(options)}"
            ) from None

    def _entries(self, name: str, given: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        """Conditions of each image, and the null where none is given."""
        if not isinstance(given, Mapping):
            raise TypeError(f"submit: {name} must be a mapping, got {given!r}")
        unknown = sorted(set(given) - set(self.null), key=str)
        if unknown:
            known = ", ".join(self.null) or "none"
            raise ValueError(f"submit: {name} must be among {known}, got {unknown[0]!r}")
        found = {}
        for key, null in self.null.items():
            value = _tensor(f"{name} {key}", given[key], null) if key in given else null
            if value.shape == null.shape:
                value = value.expand(count, *null.shape)
            elif value.shape != (count, *null.shape):
                raise ValueError(
                    f"submit: {name} {key} must have shape {tuple(null.shape)} or "
                    f"{(count, *null.shape)}, got {tuple(value.shape)}"
                )
            found[key] = value
        return found


def _tensor(name: str, value: Any, like: Tensor) -> Tensor:
    """The value in the dtype of ``like``, of which it must be a value."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"submit: {name} must be numbers or a tensor, got {value!r}") from None
    if not torch.can_cast(tensor.dtype, like.dtype):
        raise TypeError(f"submit: {name} must be {like.dtype}, got {tensor.dtype}")
    # a copy: what a batch reads must not change under it
    return tensor.detach().to("cpu", like.dtype, copy=True)


def _check_names(what: str, given: Mapping[str, Any]) -> None:
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise TypeError(f"submit: {what} must be among {', '.join(NAMES)}, got {unknown[0]!r}")
