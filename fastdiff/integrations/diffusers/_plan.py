"""The moves of a scheduler's run, and where its tensors are kept between steps."""

from __future__ import annotations

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
    """

    traces: dict[Any, Trace | str] = field(default_factory=dict)
    moves: dict[Any, Move | str] = field(default_factory=dict)
    answers: dict[Any, Any] = field(default_factory=dict)


_plans: OrderedDict[Any, Plan] = OrderedDict()
_lock = threading.Lock()


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().cpu().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if callable(value):
        return id(value)
    return repr(value)


def plan_of(scheduler: Any, peer: type, state: Sequence[str]) -> Plan:
    """The plan for all that a scheduler's steps depend on besides their state."""
    config = scheduler.config
    parts: list[Any] = [peer, repr(sorted(config.items(), key=lambda item: item[0]))]
    for name, value in sorted(vars(scheduler).items()):
        # an object made in the constructor because the config gave none is the config's
        made = callable(value) and config.get(name, value) is None
        if name in state or name in _OWN or made:
            continue
        parts.append((name, _content(value)))
    key = tuple(parts)
    with _lock:
        plan = _plans.setdefault(key, Plan())
        _plans.move_to_end(key)
        while len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    return plan


# attributes that change from step to step without being the state of the map
_OWN = frozenset(
    ("_fastdiff", "_internal_dict", "_begin_index", "is_scale_input_called", "timestep_list",
     "noise_sampler")
)  # fmt: skip


class Runtime:
    """What a drop-in scheduler keeps of a run: buffers, and the tensors that its plan is good for.

    A copy of the scheduler starts with a new one: its tensors are then foreign, and copied once.
    """

    def __init__(self) -> None:
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

    def __deepcopy__(self, memo: Any) -> Runtime:
        return Runtime()

    def __reduce__(self) -> Any:
        return Runtime, ()

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
            and (token[3] < 0 or sigmas._version == token[3])
            and values.get("num_inference_steps") == token[4]
        )

    def refresh(self, scheduler: Any, peer: type, state: Sequence[str]) -> Plan:
        """The plan of what the scheduler is set to now, and a copy of its timesteps on the host."""
        values = scheduler.__dict__
        sigmas, timesteps = values.get("sigmas"), values.get("timesteps")
        self.token = (
            values["_internal_dict"],
            timesteps,
            sigmas,
            version(sigmas) if isinstance(sigmas, Tensor) else -1,
            values.get("num_inference_steps"),
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
            return timestep
        at = timestep.data_ptr() - self.start
        if 0 <= at < self.bytes and timestep.dim() == 0 and timestep.dtype == self.token[1].dtype:
            return self.host[at // self.step]
        return timestep.item()

    def is_first(self, timestep: Any) -> bool:
        """Whether this is the first element of `timesteps` itself."""
        return (
            isinstance(timestep, Tensor)
            and self.bytes > 0
            and timestep.dim() == 0
            and timestep.data_ptr() == self.start
        )

    # --- the tensors ------------------------------------------------------------------------

    def fit(self, x: Tensor) -> None:
        """Make room for tensors like x, if there is none yet."""
        like = (x.shape, x.dtype, x.device, memory_format(x))
        if self.like != like:
            self.like, self.ring, self.buffer = like, None, None
            self.views, self.slots = [], {}

    def history(self, x: Tensor) -> Tensor:
        """The slots of the history, all of them views of one tensor."""
        if self.ring is None:
            if self.like[3] == torch.contiguous_format:
                self.ring = torch.empty((HISTORY_SLOTS, *x.shape), dtype=x.dtype, device=x.device)
            else:
                self.ring = torch.stack([torch.empty_like(x)] * HISTORY_SLOTS)
            self.views = list(self.ring.unbind(0))
            self.slots = {id(view): i for i, view in enumerate(self.views)}
        return self.ring

    def anchor(self, x: Tensor) -> Tensor:
        """The buffer of the anchor."""
        if self.buffer is None:
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
            return _PLACES[runtime.place(value)] if value.dim() else "number"
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
    key = (call, _pattern(seen))
    found = plan.traces.get(key)
    if found is None:
        try:
            found = make()
        except NotAffine as error:
            found = str(error)
        plan.traces[key] = found
    move: Move | str
    if isinstance(found, str):
        move = found
    else:
        try:
            move = bind(found, places, counter)
        except NotAffine as error:
            move = str(error)
    if isinstance(move, Move) and fits(move):
        move.quick = Quick(move)
    plan.moves[call, seen] = move
    return move
