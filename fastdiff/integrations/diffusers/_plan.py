"""The moves of a scheduler's run, and where its tensors are kept between steps."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations.diffusers._moves import ANCHOR, FOREIGN, Move, bind
from fastdiff.integrations.diffusers._outputs import version
from fastdiff.integrations.diffusers._quick import Quick, fits
from fastdiff.integrations.diffusers._trace import NotAffine, Trace, is_state
from fastdiff.ops._layout import memory_format
from fastdiff.table import HISTORY_SLOTS

_PLANS_KEPT = 64


@dataclass
class Plan:
    """What is known of the steps of one configuration on one grid.

    Filled as steps are taken, and shared by all schedulers with the same configuration and grid.

    Attributes:
        traces: (place, options, which state is there) -> the call's map, or why it has none.
        moves: that and the slots of the state -> the rows, or why there are none.
        answers: (call, dtypes of sample and output) -> what diffusers does on these.
        numbers: id of a number in a tensor that a step leaves -> the tensor, the number.
        programs: spans and tables of whole runs, see `_program`.
    """

    traces: dict[Any, Trace | str] = field(default_factory=dict)
    moves: dict[Any, Move | str] = field(default_factory=dict)
    answers: dict[Any, Any] = field(default_factory=dict)
    numbers: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)
    programs: dict[Any, Any] = field(default_factory=dict)


_plans: OrderedDict[Any, Plan] = OrderedDict()
_lock = threading.Lock()


def _content(value: Any) -> Any:
    """A value as part of a key: what it holds, in full; a repr rounds and leaves out."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().reshape(-1)
        return value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return tuple(map(_content, value))
    if inspect.isfunction(value) and not value.__closure__:
        if value.__module__.startswith("diffusers."):  # a default, made anew in each constructor
            return value.__module__, value.__qualname__, value.__code__
        return value
    if callable(value):
        return value  # kept alive, so that no other takes its id
    return repr(value)


def plan_of(scheduler: Any, peer: type, state: Sequence[str]) -> Plan:
    """The plan for all that a scheduler's steps depend on besides their state."""
    config = scheduler.config
    parts: list[Any] = [peer]
    parts.extend((name, _content(value)) for name, value in sorted(config.items()))
    parts.extend(
        (name, _content(value))
        for name, value in sorted(vars(scheduler).items())
        if name not in state and name not in OWN
    )
    key = tuple(parts)
    with _lock:
        plan = _plans.setdefault(key, Plan())
        _plans.move_to_end(key)
        while len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    return plan


# attributes that change from step to step without being the state of the map
OWN = frozenset(
    ("_fastdiff", "_internal_dict", "_begin_index", "is_scale_input_called", "timestep_list",
     "noise_sampler", "_init_size")
)  # fmt: skip


class Runtime:
    """What a drop-in scheduler keeps of a run: buffers, and the tensors that its plan is good for.

    A copy of the scheduler starts with a new one: its tensors are then foreign, and copied once.

    Args:
        in_place: the scheduler was made as diffusers' class, and `restore` is to give it back.
    """

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place
        self.plan: Plan | None = None
        self.token: tuple[Any, ...] = ()
        self.host: list[Any] = []
        self.host_timesteps: Tensor | None = None
        self.start = self.bytes = self.step = 0
        self.ring: Tensor | None = None
        self.views: list[Tensor] = []
        self.slots: dict[int, int] = {}
        self.buffer: Tensor | None = None
        self.like: Any = None
        self.seeds: tuple[Any, Tensor] | None = None
        self.fresh: dict[str, Any] = {}  # the state before the first step of a run

    def __deepcopy__(self, memo: Any) -> Runtime:
        return Runtime(self.in_place)

    def __reduce__(self) -> Any:
        return Runtime, (self.in_place,)

    # --- the plan ---------------------------------------------------------------------------

    def current(self, scheduler: Any) -> bool:
        """Whether the plan still holds: pipelines replace the config and write to sigmas."""
        token = self.token
        if self.plan is None:
            return False
        values = scheduler.__dict__
        sigmas = values.get("sigmas")
        return (
            values["_internal_dict"] is token[0]
            and values.get("timesteps") is token[1]
            and sigmas is token[2]
            and values.get("num_inference_steps") == token[3]
            and all(t._version == v for t, v in token[4])
        )

    def refresh(self, scheduler: Any, peer: type, state: Sequence[str]) -> Plan:
        """The plan of what the scheduler is set to now, and a copy of its timesteps on the host."""
        values = scheduler.__dict__
        if values.get("timestep_list") and values.get("_step_index") is None:
            # diffusers leaves the last run's, which nobody reads, and which may be on a device
            values["timestep_list"] = [None] * len(values["timestep_list"])
        sigmas, timesteps = values.get("sigmas"), values.get("timesteps")
        self.token = (
            values["_internal_dict"],
            timesteps,
            sigmas,
            values.get("num_inference_steps"),
            tuple(
                (t, version(t))
                for t in (timesteps, sigmas, values.get("alphas_cumprod"))
                if isinstance(t, Tensor) and not t.is_inference()
            ),
        )
        if isinstance(timesteps, Tensor):
            self.host_timesteps = timesteps.detach().cpu()
            self.host = self.host_timesteps.tolist()
            self.start, self.step = timesteps.data_ptr(), timesteps.element_size()
            self.bytes = timesteps.numel() * self.step if timesteps.is_contiguous() else 0
        else:
            self.host, self.bytes = [], 0
        self.plan = plan_of(scheduler, peer, state)
        return self.plan

    def number(self, timestep: Any) -> Any:
        """The timestep as a number; one out of `timesteps` is known by its place in memory.

        So that no device is waited for: pipelines iterate over `timesteps`, whose elements are
        views.
        """
        if not isinstance(timestep, Tensor):
            return timestep.item() if isinstance(timestep, np.generic) else timestep
        at = timestep.data_ptr() - self.start
        if 0 <= at < self.bytes and timestep.dim() == 0 and timestep.dtype == self.token[1].dtype:
            return self.host[at // self.step]
        return timestep.item() if timestep.numel() == 1 else tuple(timestep.flatten().tolist())

    def is_first(self, timestep: Any) -> bool:
        """Whether this is the first element of `timesteps` itself."""
        return (
            isinstance(timestep, Tensor)
            and self.bytes > 0
            and timestep.dim() == 0
            and timestep.data_ptr() == self.start
        )

    # --- the tensors ------------------------------------------------------------------------

    def fit(self, sample: Tensor) -> bool:
        """Make room for tensors like the sample; whether there was room for others, now gone."""
        dtype = torch.float32 if sample.dtype.itemsize < 4 else sample.dtype
        order = memory_format(sample) or torch.contiguous_format
        like = (sample.shape, dtype, sample.device, order)
        before = self.like
        if before == like:
            return False
        self.like, self.ring, self.buffer = like, None, None
        self.views, self.slots = [], {}
        return before is not None

    def history(self, x: Tensor) -> Tensor:
        """The slots of the history, all of them views of one tensor."""
        if self.ring is None:
            with torch.inference_mode(False):  # its tensors could not be written to outside of it
                if self.like[3] == torch.contiguous_format:
                    shape = HISTORY_SLOTS, *x.shape
                    self.ring = torch.empty(shape, dtype=x.dtype, device=x.device)
                else:
                    self.ring = torch.stack([torch.empty_like(x)] * HISTORY_SLOTS)
                self.views = list(self.ring.unbind(0))
            self.slots = {id(view): i for i, view in enumerate(self.views)}
        return self.ring

    def anchor(self, x: Tensor) -> Tensor:
        """The buffer of the anchor."""
        if self.buffer is None:
            with torch.inference_mode(False):
                self.buffer = torch.empty_like(x)
        return self.buffer

    def place(self, t: Tensor) -> int:
        """Where a tensor of the state lies."""
        if t is self.buffer:
            return ANCHOR
        return self.slots.get(id(t), FOREIGN)


# --- what is kept from before -----------------------------------------------------------------

# of a tensor in the signature of a state, by its place
_PLACES = ("h0", "h1", "h2", "h3", "anchor", "foreign")
assert (_PLACES[ANCHOR], _PLACES[FOREIGN]) == ("anchor", "foreign")


def signature(values: dict[str, Any], state: Sequence[str], runtime: Runtime) -> tuple[Any, ...]:
    """The state of a scheduler as a key: numbers as they are, tensors by where they lie."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim():
                return _PLACES[runtime.place(value)]
            # a number of diffusers' own that an earlier step left is known by its identity
            known = runtime.plan.numbers.get(id(value)) if runtime.plan else None
            return runtime.number(value) if known is None else known[1]
        return value

    return tuple(
        tuple(part(v) for v in value) if type(value) is list else part(value)
        for value in map(values.get, state)
    )


def tensors_of(values: dict[str, Any], state: Sequence[str]) -> dict[str, Tensor]:
    """The tensors that are kept from before, by the name that a trace gives them."""
    found: dict[str, Tensor] = {}
    for name in state:
        value = values.get(name)
        if type(value) is list:
            found.update({f"{name}.{i}": v for i, v in enumerate(value) if is_state(v)})
        elif isinstance(value, Tensor) and is_state(value):
            found[name] = value
    return found


def _pattern(part: Any) -> Any:
    """The signature without the places."""
    if isinstance(part, tuple):
        return tuple(map(_pattern, part))
    return "tensor" if part in _PLACES else part


def _parts(kind: str, what: Any) -> list[Any]:
    """The plain values that an attribute holds after a move."""
    if kind == "list":
        return [value for part in what for value in _parts(*part)]
    return [what] if kind == "value" else []


def traced(
    plan: Plan, call: tuple[Any, ...], seen: tuple[Any, ...], make: Callable[[], Trace]
) -> Trace | str:
    """The map of a call, or the reason why it has none; arguments as for `find`."""
    key = (call, _pattern(seen))
    found = plan.traces.get(key)
    if found is None:
        try:
            found = make()
        except NotAffine as error:
            found = str(error)
        plan.traces[key] = found
    return found


def find(
    plan: Plan,
    call: tuple[Any, ...],
    seen: tuple[Any, ...],
    make: Callable[[], Trace],
    places: dict[str, int],
    counter: int | None,
) -> Move | str:
    """The move of a call, or the reason why diffusers' own code has to make it.

    Args:
        plan: takes what is found.
        call: key of the call without the state; ``seen`` is the signature of the state.
        make: traces the call.
        places: of the tensors of the state.
        counter: of the noise that the kernel draws, None where it comes as tensors.
    """
    found = traced(plan, call, seen, make)
    move: Move | str
    if isinstance(found, str):
        move = found
    else:
        try:
            move = bind(found, places, counter)
        except NotAffine as error:
            move = str(error)
    if isinstance(move, Move):
        held = [part for _, (kind, what) in move.kept for part in _parts(kind, what)]
        plan.numbers.update((id(t), (t, t.item())) for t in held if isinstance(t, Tensor))
        if fits(move):
            move.quick = Quick(move)
    plan.moves[call, seen] = move
    return move
