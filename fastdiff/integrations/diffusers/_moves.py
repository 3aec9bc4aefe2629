"""A traced call of `step` as rows of the kernel: which tensor stands in which slot.

A row reads the sample, the model output, one anchor tensor and up to four slots of history, and it
writes the next sample, the anchor and one slot. What diffusers keeps between two steps is put
there: what a step newly computes is pushed into a free slot, or written to the anchor; a tensor of
the caller's own (the sample of an earlier step, noise from a generator) is read in place as the
anchor where that is free, and else copied to a free slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff._packing import SlotRows
from fastdiff.integrations.diffusers._trace import (
    LIMITED,
    NOISE,
    OUTPUT,
    SAMPLE,
    TIMESTEP,
    Form,
    Made,
    NotAffine,
    Trace,
)
from fastdiff.ops.noise import Stream
from fastdiff.table import (
    COUNTER1,
    EVALUATES,
    FLAGS,
    HISTORY_SLOTS,
    LEARNED_VARIANCE,
    LV_SCALE,
    LV_SHIFT,
    PUSH,
    PUSH_D,
    PUSH_X,
    ROW_FLOATS,
    ROW_INTS,
    STREAM1,
    TERMS,
    A,
    B,
    P,
    Q,
)

ANCHOR = HISTORY_SLOTS  # in a signature: the tensor is the anchor buffer; below: its history slot
FOREIGN = HISTORY_SLOTS + 1  # a tensor of the caller's


@dataclass
class Move:
    """What one call does, slot by slot.

    Attributes:
        rows: row 0 gives the next sample, row i the i-th further output; where the prediction is
            limited by a quantile, the last row is that prediction.
        evicted: names of tensors that are kept but not read, whose slots are needed: they are
            cloned before the rows run.
        copies: (name, slot) of tensors to copy before the rows run, into history slots or ANCHOR.
        anchor: name of the tensor that is read as the anchor in place; None: the buffer, if any.
        raw: name of the noise that is read as the raw second output of the model, or None.
        buffered: the rows use the anchor buffer.
        push: slot that row 0 writes, or -1.
        depth: slots that the history must have.
        draws: how many noise tensors are to be drawn.
        clip: bound of the prediction, or None.
        limited: slot of the prediction that is limited by a quantile, or -1.
        lazy: of each further output: whether it may be computed after the step.
        kept: (attribute, what it holds afterwards), see `Trace.kept`; for tensors a (kind, value).
        scaled: the noise that is drawn is to be scaled by a learned variance, (scale, shift).
        seeded: the rows draw noise themselves.
        counter: of noise that is drawn by seed as a tensor, or None.
        spanned: the noise comes from a noise sampler, by spans of sigma.
        quick: the same laid out for the quick road (`_quick.Quick`), or None.
        plain: the rows read the sample and the model output alone, and write the sample alone.
    """

    rows: SlotRows
    evicted: tuple[str, ...]
    copies: tuple[tuple[str, int], ...]
    anchor: str | None
    raw: str | None
    buffered: bool
    push: int
    depth: int
    draws: int
    clip: float | None
    limited: int
    lazy: tuple[bool, ...]
    kept: tuple[tuple[str, Any], ...]
    scaled: tuple[float, float] | None
    seeded: bool
    counter: int | None
    spanned: bool
    plain: bool
    quick: Any = None


def _single(form: Form) -> str | None:
    """The tensor that a form is, if it is one unchanged."""
    if len(form) == 1 and not isinstance(form, Made):
        ((name, weight),) = form.items()
        return name if weight == 1.0 else None
    return None


def _forms(kept: dict[str, Any]) -> list[Form]:
    parts = [p for v in kept.values() for p in (v if isinstance(v, list) else [v])]
    return [p for p in parts if isinstance(p, dict)]


class _Binding:
    """The choice of slots for one trace."""

    def __init__(self, trace: Trace, places: dict[str, int], counter: int | None) -> None:
        self.trace = trace
        self.spanned = any(trace.spans)
        kept = _forms(trace.kept)
        self.retained = {name for f in kept if (name := _single(f)) is not None}
        # the spans of a noise sampler overlap, and so their noise is not drawn anew; noise that is
        # kept has to be a tensor
        seen = self.spanned or not self.retained.isdisjoint(NOISE)
        self.counter = None if seen else counter
        self.places = {n: p for n, p in places.items() if p != FOREIGN}  # of tensors, as they are
        self.copies: list[tuple[str, int]] = []
        self.evicted: list[str] = []
        self.anchor: str | None = None
        self.clip = trace.limit.bound if trace.limit else None
        self.quantile = trace.limit is not None and trace.limit.bound is None
        if trace.limit and set(trace.limit.form) - {SAMPLE, OUTPUT}:
            raise NotAffine("it limits a prediction that more than this step's tensors make up")
        self.new: list[Form] = []
        for f in kept:
            name = _single(f)
            if (name is None or name == OUTPUT) and f not in self.new and f != trace.outputs[0]:
                self.new.append(f)
        read = [n for f in (*trace.outputs, *self.new) for n in f]
        self.read = list(dict.fromkeys(read))
        self.pushed, self.written = self._destinations()
        self._place(places)

    def _destinations(self) -> tuple[Form | None, Form | None]:
        """Which new tensor is pushed, and which is written to the anchor."""
        if len(self.new) > 2:
            raise NotAffine(f"it keeps {len(self.new)} new tensors, and a row can write 2")
        usable = {SAMPLE, LIMITED} if self.clip is not None else {SAMPLE, OUTPUT}
        pushable = [f for f in self.new if not set(f) - usable]
        pushed = pushable[0] if pushable else None
        rest = [f for f in self.new if f is not pushed]
        if len(rest) > 1:
            raise NotAffine("it keeps two new tensors that are made of what it kept before")
        return pushed, rest[0] if rest else None

    def _free(self) -> int:
        """A slot that nothing of this step and the next needs."""
        for slot in range(HISTORY_SLOTS):
            if slot not in self.places.values():
                return slot
        for name, place in self.places.items():
            if name not in self.read and place != ANCHOR:
                self.evicted.append(name)
                del self.places[name]
                return place
        raise NotAffine(f"it needs more than {HISTORY_SLOTS} tensors besides the sample's")

    def _place(self, places: dict[str, int]) -> None:
        # what is neither read nor kept makes room
        needed = {*self.read, *self.retained}
        self.places = {n: p for n, p in self.places.items() if n in needed}
        if self.written is not None and ANCHOR in self.places.values():
            (name,) = (n for n, p in self.places.items() if p == ANCHOR)
            if name in self.retained:  # the row writes another one there: it moves to a slot
                self.places[name] = self._free()
                self.copies.append((name, self.places[name]))
        self.limited = -1
        if self.quantile:
            self.limited = self.places[LIMITED] = self._free()
        drawn = NOISE[: self.trace.draws] if self.counter is None else ()
        # the first noise stands where the unconditional output would: nothing is guided
        self.raw = drawn[0] if drawn and self.trace.log_variance is None else None
        foreign = [n for n in self.read if places.get(n) == FOREIGN] + [
            n for n in drawn if n in self.read and n != self.raw
        ]
        for name in foreign:
            if self.written is not None and ANCHOR not in self.places.values():
                # the tensor that the row replaces; the caller's own is not written to
                to = ANCHOR if name not in drawn and name not in self.retained else self._free()
                self.copies.append((name, to))
            elif (
                self.anchor is None and self.written is None and ANCHOR not in self.places.values()
            ):
                self.anchor, to = name, ANCHOR
            else:
                to = self._free()
                self.copies.append((name, to))
            self.places[name] = to
        self.push = -1
        if self.pushed is not None:
            held = {p for n, p in self.places.items() if n in self.retained or n == LIMITED}
            busy = set(self.places.values())
            slots = range(HISTORY_SLOTS)
            # one that is read now and not kept may be written in the same pass
            free = [s for s in slots if s not in busy] or [s for s in slots if s not in held]
            self.push = free[0] if free else self._free()

    def term(self, name: str) -> int:
        """Position of a tensor among the terms of a row."""
        if name in (SAMPLE, OUTPUT):
            return TERMS.index(name)
        if name in self.places:
            place = self.places[name]
            return TERMS.index("y" if place == ANCHOR else f"h{place}")
        if name == LIMITED:
            return TERMS.index("d")
        if name == self.raw:
            return TERMS.index("u")
        return TERMS.index(("n1", "n2")[NOISE.index(name)])


def _kept(value: Any, b: _Binding) -> Any:
    """What an attribute holds afterwards, as (kind, value)."""
    if isinstance(value, list):
        return "list", tuple(_kept(v, b) for v in value)
    if value is TIMESTEP:
        return "timestep", None
    if not isinstance(value, dict):
        return "value", value
    name = _single(value)
    if name == SAMPLE:
        return "sample", None
    if value == b.trace.outputs[0]:
        return "result", None
    if value == b.pushed:
        return "slot", b.push
    if value == b.written:
        return "anchor", None
    if name == LIMITED and b.quantile:
        return "slot", b.limited
    return "entry", name


def held(
    kind: str, what: Any, entry: Callable[[Any], Any], views: list[Any], ends: dict[str, Any]
) -> Any:
    """What an attribute holds after a step; arguments as in `Move.kept`.

    Args:
        kind, what: of the attribute.
        entry: finds a tensor of the state before the step.
        views: the slots of the history.
        ends: by kind, what the call was given and what it made.
    """
    # no closure that calls itself: such a cycle keeps the tensors until a garbage collection
    if kind == "value":
        return what
    if kind == "slot":
        return views[what]
    if kind == "entry":
        return entry(what)
    if kind == "list":
        return [held(k, w, entry, views, ends) for k, w in what]
    return ends[kind]


def bind(trace: Trace, places: dict[str, int], counter: int | None) -> Move:
    """The rows of a traced call for tensors that lie where ``places`` says.

    Args:
        trace: of the call.
        places: of every tensor that is kept from before: its history slot, ANCHOR or FOREIGN.
        counter: of the noise, drawn in the kernel; None: it comes as tensors.

    Raises:
        NotAffine: it takes more tensors than a row reads or writes.
    """
    b = _Binding(trace, places, counter)
    limit = trace.limit
    forms = [*trace.outputs, *([limit.form] if limit and b.quantile else [])]
    floats = np.zeros((len(forms), ROW_FLOATS))
    ints = np.zeros((len(forms), ROW_INTS), np.int32)
    ints[:, FLAGS], ints[:, PUSH] = EVALUATES, -1
    for row, form in enumerate(forms):
        for name, weight in form.items():
            floats[row, A + b.term(name)] += weight
    convert = limit.form if limit and not b.quantile else None
    if convert is None and b.pushed is not None:
        convert = b.pushed
    floats[:, P], floats[:, Q] = (
        (convert.get(SAMPLE, 0.0), convert.get(OUTPUT, 0.0)) if convert is not None else (0.0, 1.0)
    )
    if b.pushed is not None:
        ints[0, PUSH] = b.push
        floats[0, PUSH_X : PUSH_D + 1] = (
            (0.0, 1.0)
            if convert is b.pushed
            else (b.pushed.get(SAMPLE, 0.0), b.pushed.get(LIMITED, 0.0))
        )
    if b.written is not None:
        for name, weight in b.written.items():
            floats[0, B + b.term(name)] += weight
    if b.counter is not None:
        for k in range(trace.draws):
            # draws of one step: neighbouring counters
            ints[:, STREAM1 + 2 * k] = Stream.STEP
            ints[:, COUNTER1 + 2 * k] = len(NOISE) * b.counter + k
        if trace.log_variance is not None:
            floats[:, LV_SCALE], floats[:, LV_SHIFT] = trace.log_variance
            ints[:, FLAGS] |= LEARNED_VARIANCE
    try:
        rows = SlotRows(floats, ints, variance=trace.log_variance is not None)
    except ValueError as error:
        raise NotAffine("a coefficient is not finite") from error
    plain = {SAMPLE, OUTPUT} if b.quantile else {SAMPLE, OUTPUT, LIMITED}
    used = [b.push, b.limited, *(p for p in b.places.values() if p < HISTORY_SLOTS)]
    buffered = b.anchor is None and (b.written is not None or ANCHOR in b.places.values())
    drawn = trace.draws if b.counter is None else 0
    return Move(
        rows=rows,
        evicted=tuple(b.evicted),
        copies=tuple(b.copies),
        anchor=b.anchor,
        raw=b.raw,
        buffered=buffered,
        push=b.push,
        depth=HISTORY_SLOTS if max(used) >= 0 else 0,
        draws=drawn,
        clip=b.clip,
        limited=b.limited,
        lazy=tuple(not set(f) - plain for f in trace.outputs[1:]),
        kept=tuple((name, _kept(value, b)) for name, value in trace.kept.items()),
        scaled=trace.log_variance if b.counter is None else None,
        seeded=b.counter is not None and trace.draws > 0,
        counter=counter if b.counter is None and not b.spanned else None,
        spanned=b.spanned,
        plain=not (buffered or b.evicted or b.anchor or b.copies or max(used) >= 0 or trace.draws)
        and not any(f and _single(f) not in (None, SAMPLE, OUTPUT) for f in _forms(trace.kept)),
    )
