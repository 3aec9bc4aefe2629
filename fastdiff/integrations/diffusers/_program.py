"""A run as `torch.compile` is told of it: the steps that differ in numbers alone, and the numbers.

A graph can not stop to trace diffusers' step. So a run is walked before, with the default state and
the options of the call: what the graph is made of, a `Kind`, is the same for most steps of it, and
the coefficients lie in a table that the graph indexes by the step, so that a new step, a new grid
or a new scheduler of the same class finds the graph made.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastdiff.integrations.diffusers._draws import Call
from fastdiff.integrations.diffusers._mended import mended_trace
from fastdiff.integrations.diffusers._plan import OWN, Plan, signature, traced
from fastdiff.integrations.diffusers._trace import TIMESTEP, Form, Trace

F = TypeVar("F", bound=Callable[..., Any])
POSITIONS = ("_step_index", "counter")  # attributes that say where in its run a scheduler stands


def _constant(function: F) -> F:
    """Called when a graph is traced, and its result is part of the graph."""
    marked: F = torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return marked


class Key(NamedTuple):
    """What the graph of a step depends on besides the state.

    Attributes:
        timestep: "tensor", or the type of the number.
        sample, output: dtypes of sample and model output.
        learned: whether the model output carries a variance.
        given: names of the options that are tensors like the sample.
        options: (name, value) of the others.
    """

    timestep: str
    sample: torch.dtype
    output: torch.dtype
    learned: bool
    given: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


class Kind(NamedTuple):
    """Steps of a run that differ in numbers alone.

    Attributes:
        before: pattern of the state that they start from, by `pattern`.
        forms: of each tensor that is computed: its terms, (name, column of the table).
        dtypes: of the outputs, which are the first forms.
        limit: (form, bound) of the predicted clean data; bound None: a quantile; or None.
        draws: dtype of each noise.
        log_variance: columns of scale and shift of the log of the learned variance, or None.
        kept: (attribute, kind, value) of what it holds afterwards.
        affine: False: diffusers' own code has to make these steps.
    """

    before: tuple[Any, ...]
    forms: tuple[tuple[tuple[str, int], ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    limit: tuple[int, float | None] | None = None
    draws: tuple[torch.dtype, ...] = ()
    log_variance: tuple[int, int] | None = None
    kept: tuple[tuple[str, str, Any], ...] = ()
    affine: bool = True


class Program:
    """A run of one scheduler.

    Attributes:
        config, timesteps, sigmas: of the scheduler, for which it is good.
        start: index of the first step.
        spans: (first step, step behind the last, number of the kind) of the steps whose state is as
            the kind says.
        table: (steps, columns); of a scheduler that goes by the timestep's value, row t + 1 is of
            timestep t, and the first and the last row are of none. NaN where there is no step.
    """

    def __init__(self, scheduler: Any, start: int, spans: Any, table: Tensor) -> None:
        self.config, self.timesteps = scheduler._internal_dict, scheduler.timesteps
        self.sigmas = getattr(scheduler, "sigmas", None)
        self.start, self.spans, self.table = start, spans, table

    def follows(self, scheduler: Any) -> bool:
        """Whether it is good for the grid of the scheduler; asked in graphs."""
        return (
            self.timesteps is scheduler.timesteps
            and self.sigmas is getattr(scheduler, "sigmas", None)
            and self.start == first(scheduler)
        )


def first(scheduler: Any) -> int:
    """Index of the first step of a run; a graph can not look it up by the timestep."""
    return getattr(scheduler, "_begin_index", None) or 0


def pattern(value: Any) -> Any:
    """A part of the state as what a graph depends on in it."""
    if isinstance(value, list):
        return tuple([pattern(v) for v in value])
    if isinstance(value, Tensor):
        return "tensor" if value.dim() > 0 else "number"
    return "number" if isinstance(value, float) else value


def patterned(state: tuple[str, ...]) -> tuple[str, ...]:
    """The attributes whose pattern tells kinds apart."""
    return tuple([name for name in state if name not in POSITIONS and name not in OWN])


# --- the walk ---------------------------------------------------------------------------------


class _Step(NamedTuple):
    """One step of a walk."""

    at: int  # row of the table
    before: tuple[Any, ...]
    trace: Trace
    dtypes: tuple[torch.dtype, ...]
    noise: tuple[torch.dtype, ...]  # of each draw
    order: int  # place of the timestep in the run


def _walk(scheduler: Any, plan: Plan, key: Key, position: str | None) -> list[_Step]:
    """The steps of a run from its start, up to the first that is not affine."""
    peer, state, runtime = scheduler._fd_peer, scheduler._fd_state, scheduler._fastdiff
    twin = copy.copy(scheduler)
    twin._fastdiff.refresh(twin, peer, state)  # the mended forms look at the grid
    for name in state:
        twin.__dict__.pop(name, None)
    for name, value in runtime.fresh.items():
        twin.__dict__[name] = list(value) if type(value) is list else value
    start = 0 if position is None else first(scheduler)
    if position is not None:
        twin.__dict__[position] = start
    tiny = torch.zeros(1, 1, 1, 1)
    given = dict.fromkeys(key.given, tiny)
    options, steps = dict(key.options), []
    for i in range(start, len(runtime.host)):
        for name, length in scheduler._fd_trims:
            del twin.__dict__[name][:-length]
        number = runtime.host[i]
        at: Any = number
        if key.timestep == "tensor":
            at = torch.tensor(number, dtype=scheduler.timesteps.dtype)
        place: Any = number
        if position == "_step_index":
            place = (i, number) if scheduler._fd_by_value else i
        kind = at.dtype if key.timestep == "tensor" else type(at)
        call = Call(
            tiny.to(key.output), at, tiny.to(key.sample), None, options, given, key.learned,
            (place, kind, key.learned, *key.given, *key.options),
        )  # fmt: skip

        def make(at: Any = at) -> Trace:
            return mended_trace(
                twin, peer.step, state, at, {**options, **given}, learned=key.learned
            )

        found = traced(plan, call.key, signature(twin.__dict__, state, runtime), make)
        if isinstance(found, str):
            break
        dtypes: tuple[torch.dtype, ...] = (torch.float32,) * len(found.outputs)
        noise: tuple[torch.dtype, ...] = (torch.float32,) * found.draws
        if not key.sample == torch.float32 == key.output:
            answer = twin._ask(plan, call)
            dtypes, noise = answer.dtypes, tuple(answer.noise)
        before = tuple([pattern(twin.__dict__.get(name)) for name in patterned(state)])
        row = i if position is not None else int(number) + 1
        steps.append(_Step(row, before, found, dtypes, noise, i))
        for name, value in found.kept.items():
            twin.__dict__[name] = _after(value, at, tiny)
    return steps


def _after(value: Any, timestep: Any, tiny: Tensor) -> Any:
    if isinstance(value, list):
        return [_after(v, timestep, tiny) for v in value]
    if value is TIMESTEP:
        return timestep
    return tiny if isinstance(value, dict) else value


# --- kinds and the table ----------------------------------------------------------------------


class _Laid:
    """One step with its numbers taken out: steps with the same ``skeleton`` are of one kind."""

    def __init__(self, step: _Step) -> None:
        found = step.trace
        self.step, self.forms, self.numbers = step, list(found.outputs), list[float]()
        self.outputs = found.outputs
        kept = tuple([(n, *self._kept(n, v)) for n, v in found.kept.items()])
        self.limit = None
        if found.limit is not None:
            self.limit = self._form(found.limit.form), found.limit.bound
        if found.log_variance is not None:
            self.numbers += found.log_variance
        self.skeleton = (
            step.before, step.dtypes, kept, self.limit, step.noise, len(self.forms),
            len(self.numbers), found.log_variance is not None, any(found.spans),
        )  # fmt: skip
        self.kept = kept

    def _form(self, form: Form) -> int:
        self.forms.append(form)
        return len(self.forms) - 1

    def _kept(self, name: str, value: Any) -> tuple[str, Any]:
        if isinstance(value, list):
            return "list", tuple([self._kept(name, v) for v in value])
        if value is TIMESTEP:
            return "timestep", None
        if isinstance(value, dict):
            for single, weight in value.items():
                if len(value) == 1 and weight == 1.0:
                    return "tensor", single
            if value in self.outputs:
                return "output", self.outputs.index(value)
            return "form", self._form(value)
        if name in POSITIONS:
            return "position", int(value) - self.step.order
        if isinstance(value, (Tensor, float)):
            self.numbers.append(float(value))
            return "number", len(self.numbers) - 1
        return "value", value


def _kind(group: list[_Laid]) -> tuple[Kind, int]:
    """The kind of steps with one skeleton, and how many columns it has."""
    head = group[0]
    before, dtypes, _, limit, draws, count, numbers, learned, spanned = head.skeleton
    if spanned:
        return Kind(before, affine=False), 0
    column = itertools.count(numbers + 1)  # column 0 is the place in the run
    forms = []
    for k in range(count):
        names = dict.fromkeys(name for one in group for name in one.forms[k])
        forms.append(tuple([(name, next(column)) for name in names]))
    variance = (numbers - 1, numbers) if learned else None
    return Kind(before, tuple(forms), dtypes, limit, draws, variance, head.kept), next(column)


_numbered: dict[Kind, int] = {}
_kinds: list[Kind] = []


@_constant
def kind(number: int) -> Kind:
    """The kind by the number that stands for it in `Program.spans`."""
    return _kinds[number]


def _number(kind: Kind) -> int:
    number = _numbered.setdefault(kind, len(_kinds))
    if number == len(_kinds):
        _kinds.append(kind)
    return number


def position_of(state: tuple[str, ...]) -> str | None:
    """The attribute that says where in its run a scheduler stands; None: it goes by timestep."""
    for name in POSITIONS:
        if name in state:
            return name
    return None


def _alike(steps: list[_Step]) -> list[_Step]:
    """Steps that all draw the noise which some of them draw: a graph does not know which it is."""
    noise = max((step.noise for step in steps), key=len, default=())
    learned = any(step.trace.log_variance is not None for step in steps)
    return [
        step._replace(
            noise=noise,
            trace=dataclasses.replace(
                step.trace,
                draws=len(noise),
                log_variance=(step.trace.log_variance or (0.0, 0.0)) if learned else None,
            ),
        )
        for step in steps
    ]


def _build(scheduler: Any, plan: Plan, key: Key) -> tuple[Any, Tensor]:
    """Spans and table of a run."""
    position = position_of(scheduler._fd_state)
    host = scheduler._fastdiff.host
    steps = _walk(scheduler, plan, key, position)
    if position is None:
        steps = _alike(steps)
    laid = [_Laid(step) for step in steps]
    groups: dict[Any, list[_Laid]] = {}
    for one in laid:
        groups.setdefault(one.skeleton, []).append(one)
    made = {skeleton: _kind(group) for skeleton, group in groups.items()}
    rows = len(host) if position is not None else int(max(host)) + 3
    wide = max([1, *(columns for _, columns in made.values())])
    table = torch.full((rows, wide), torch.nan, dtype=torch.float64)
    spans: list[tuple[int, int, int]] = []
    last: dict[Any, int] = {}  # by pattern of the state, the place of its last span
    for one in laid:
        kind, at = made[one.skeleton][0], one.step.at
        row = table[at]
        row[0] = one.step.order
        if kind.affine:
            row[1:] = 0.0
            row[1 : 1 + len(one.numbers)] = torch.tensor(one.numbers)
            for form, terms in zip(one.forms, kind.forms, strict=True):
                for name, column in terms:
                    row[column] = form.get(name, 0.0)
        number, end, before = _number(kind), one.step.order + 1, one.step.before
        if before in last and spans[last[before]][2] == number:
            spans[last[before]] = (spans[last[before]][0], end, number)
        else:
            last[before] = len(spans)
            spans.append((one.step.order, end, number))
    if position is None and (len(spans) != 1 or spans[0][1] != len(host) or min(host) < 0):
        spans = []  # the graph would have to know the timestep
    dtype = torch.float64 if key.sample == torch.float64 else torch.float32
    return tuple(spans), table.to(scheduler.timesteps.device, dtype)


# --- when -------------------------------------------------------------------------------------

_live: weakref.WeakSet[Any] = weakref.WeakSet()
_wanted: dict[str, set[Key]] = {}
_slots: dict[Key, int] = {}


@_constant
def prepare(name: str, parts: tuple[Any, ...]) -> str:
    """Called while a step is traced: programs for all schedulers of the class of that name.

    The result is the attribute of `Runtime` that they are in.

    For all that were given a grid, since a graph must not depend on one; ``parts`` are those of the
    `Key`.
    """
    key = Key(*parts)
    for scheduler in list(_live):
        if type(scheduler).__name__ == name:
            _program(scheduler, key)
    _wanted.setdefault(name, set()).add(key)
    return _slot(key)


def _slot(key: Key) -> str:
    return f"program_{_slots.setdefault(key, len(_slots))}"


def _program(scheduler: Any, key: Key) -> None:
    runtime, slot = scheduler._fastdiff, _slot(key)
    found = getattr(runtime, slot, None)
    if found is not None and found.follows(scheduler) and found.config is scheduler._internal_dict:
        return
    plan = runtime.plan if runtime.current(scheduler) else scheduler._refresh()
    start = first(scheduler)
    device = scheduler.timesteps.device
    parts = plan.programs.get((key, start, device))
    if parts is None:
        try:
            parts = plan.programs[key, start, device] = _build(scheduler, plan, key)
        except Exception:  # of diffusers' step: it is raised again by whoever calls it
            setattr(runtime, slot, None)
            return
    setattr(runtime, slot, Program(scheduler, start, *parts))


def changed(scheduler: Any) -> None:
    """Called when the config or the first step of the run is another."""
    if scheduler not in _live:
        return
    for key in _wanted.get(type(scheduler).__name__, ()):
        _program(scheduler, key)


def reset(scheduler: Any) -> None:
    """Called when a grid was set: the state is fresh."""
    values = scheduler.__dict__
    held = {name: values[name] for name in scheduler._fd_state if name in values}
    scheduler._fastdiff.fresh = {n: list(v) if type(v) is list else v for n, v in held.items()}
    _live.add(scheduler)
    changed(scheduler)
