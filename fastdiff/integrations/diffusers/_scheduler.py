"""What the drop-in schedulers add to diffusers' own: a `step` in one pass over memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdiff.backends import forced
from fastdiff.integrations.diffusers import _compiled, _quick
from fastdiff.integrations.diffusers._answers import Answer, ask, split
from fastdiff.integrations.diffusers._draws import Call, Draws
from fastdiff.integrations.diffusers._mended import mended_trace, taken
from fastdiff.integrations.diffusers._moves import ANCHOR, FOREIGN, Move, held
from fastdiff.integrations.diffusers._outputs import Later, LaterTuple, later_output
from fastdiff.integrations.diffusers._plan import OWN, Plan, Runtime, find, signature, tensors_of
from fastdiff.integrations.diffusers._trace import Trace
from fastdiff.ops._dispatch import transformed
from fastdiff.ops._layout import memory_format
from fastdiff.ops.dynamic_threshold import dynamic_threshold
from fastdiff.ops.reverse_step import reverse_step

_HALVES = (torch.bfloat16, torch.float16)


class DropIn(Draws):
    """Mixin before a diffusers scheduler: same arguments, same results, one fused pass a step.

    The class attributes are set by `drop_in`.
    """

    _fd_peer: ClassVar[Any]  # diffusers' class
    _fd_state: ClassVar[tuple[str, ...]]  # attributes that are kept from step to step
    _fd_names: ClassVar[tuple[str, ...]]  # parameters of step behind the sample
    _fd_known: ClassVar[frozenset[str]]  # the same as a set
    _fd_return_dict: ClassVar[bool]
    _fd_output: ClassVar[type]
    _fd_outputs: ClassVar[tuple[str, ...]]  # names of what step returns
    _fd_learned: ClassVar[bool]  # the model output may carry a variance
    _fd_indexed: ClassVar[bool]  # the step goes by an index into the grid, not by the timestep
    _fd_by_value: ClassVar[bool]  # the step reads the timestep besides its index
    _fd_trims: ClassVar[tuple[tuple[str, int], ...]]  # (list, entries of it that are ever read)

    _fastdiff: Runtime
    config: Any

    # --- a step -----------------------------------------------------------------------------

    def _step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        rest: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        if rest:
            placed = dict(zip(self._fd_names, rest, strict=False))
            if len(placed) < len(rest) or placed.keys() & named.keys():  # it says what is wrong
                return self._fd_peer.step(self, model_output, timestep, sample, *rest, **named)
            named.update(placed)
        if not named.keys() <= self._fd_known:  # diffusers' own step names the one it does not know
            return self._fd_peer.step(self, model_output, timestep, sample, **named)
        if is_dynamo_compiling():
            return _compiled.step(self, model_output, timestep, sample, named)
        graded = torch.is_grad_enabled()
        if not isinstance(sample, Tensor) or transformed(
            (sample, model_output, *named.values(), *self._tensors()) if graded else ()
        ):
            if self.config.get("corrected"):
                raise ValueError(
                    f"{self._fd_peer.__name__}.step: its tensors must not record gradients with "
                    "corrected=True, got a derivative or a transform"
                )
            return self._fd_peer.step(self, model_output, timestep=timestep, sample=sample, **named)
        return_dict = named.pop("return_dict", self._fd_return_dict)
        generator = named.pop("generator", None)
        values = self.__dict__
        runtime: Runtime = values["_fastdiff"]
        plan = runtime.plan if runtime.current(self) else self._refresh()
        assert plan is not None
        for name, length in self._fd_trims:
            del values[name][:-length]
        try:
            call = self._call(model_output, timestep, sample, generator, named)
        except IndexError:  # no timestep of the grid: diffusers' own step says what is wrong
            named["return_dict"] = return_dict
            named.update({} if generator is None else {"generator": generator})
            return self._fd_peer.step(self, model_output, timestep=timestep, sample=sample, **named)
        seen = signature(values, self._fd_state, runtime)
        move = plan.moves.get((call.key, seen))
        if (
            move.__class__ is Move
            and move.quick is not None
            and model_output.dtype == torch.float32
            and forced() in ("auto", "cpu")
        ):
            new = _quick.run(self, move, call)
            if new is not None:
                later = self._later(move, call.model_output, sample) if move.lazy else ()
                if return_dict:
                    return later_output(self._fd_output, (new, *later))
                return LaterTuple((new, *later)) if later else (new,)
        if runtime.fit(sample):  # what is kept lies in none of the slots any more
            seen = signature(values, self._fd_state, runtime)
            move = plan.moves.get((call.key, seen))
        if move is None:
            move = self._find(plan, call, seen)
        if type(move) is str:
            theirs = call.theirs(self._fd_names, return_dict)
            at = runtime.number(timestep)
            return taken(self, self._fd_peer.step, at, (model_output, timestep, sample), theirs)
        assert isinstance(move, Move)
        answer = None
        if not (sample.dtype == torch.float32 == model_output.dtype) or move.spanned:
            answer = self._ask(plan, call)
        outputs = self._run(move, call, answer)
        if return_dict:
            return later_output(self._fd_output, outputs)
        return outputs if len(outputs) == 1 else LaterTuple(outputs)

    def _call(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any,
        named: dict[str, Any],
    ) -> Call:
        """The arguments sorted by kind, and the key of their numbers."""
        runtime = self._fastdiff
        place = self.__dict__.get("_step_index") if self._fd_indexed else runtime
        if place is None:
            self._init_step_index(timestep)
            place = self._step_index
        if place is runtime:  # diffusers looks the coefficients up by timestep
            place = runtime.number(timestep)
        elif self._fd_by_value:
            place = place, runtime.number(timestep)
        learned: bool | None = False
        if model_output.shape != sample.shape:
            model_output, learned = split(self, model_output, sample)
        kind = timestep.dtype if isinstance(timestep, Tensor) else type(timestep)
        if isinstance(timestep, Tensor) and timestep.dim() and timestep.numel() == 1:
            timestep = timestep.reshape(())  # kept by some, and then no tensor like the sample
        given: dict[str, Tensor] = {}
        if not named:
            key: tuple[Any, ...] = (place, kind, learned)
        else:
            for name, value in list(named.items()):
                if isinstance(value, Tensor):
                    if value.dim():
                        given[name] = named.pop(name)
                        if value.shape != sample.shape or value.dtype != sample.dtype:
                            learned = None
                    else:
                        named[name] = runtime.number(value)
            key = (place, kind, learned, *given, *named.items())
        return Call(model_output, timestep, sample, generator, named, given, learned, key)

    def _tensors(self) -> list[Any]:
        """What a step reads besides its arguments, for those who ask for derivatives."""
        values = self.__dict__
        found = [values.get("sigmas"), values.get("alphas_cumprod")]
        for name in self._fd_state:
            value = values.get(name)
            found += value if type(value) is list else (value,)
        return found

    def _find(self, plan: Plan, call: Call, seen: tuple[Any, ...]) -> Move | str:
        """The move of a call that has not been met before, or why it has none."""
        if call.learned is None:
            return "its tensors have not the shape and dtype of the sample"
        runtime = self._fastdiff
        number = runtime.number(call.timestep)

        def make() -> Trace:
            at: Any = number
            if isinstance(call.timestep, Tensor):
                at = torch.tensor(number, dtype=call.timestep.dtype)
            options = {**call.options, **call.given}
            learned = bool(call.learned)
            return mended_trace(
                self, self._fd_peer.step, self._fd_state, at, options, learned=learned
            )

        counter = None
        if self.config.get("noise") == "counter":
            listed = runtime.host.index(number) if number in runtime.host else int(number)
            counter = self._step_index if self._fd_indexed else listed
        held = tensors_of(self.__dict__, self._fd_state)
        places = {name: runtime.place(t) for name, t in (held | call.given).items()}
        return find(plan, call.key, seen, make, places, counter)

    def _run(self, move: Move, call: Call, answer: Answer | None) -> tuple[Any, ...]:
        """The outputs of a call, each a tensor or one to be computed later."""
        sample, model_output, variance = call.sample, call.model_output, None
        x = sample
        if x.dtype in _HALVES:
            x = x.float()
        if not x.is_contiguous() and memory_format(x) is None:
            x = x.contiguous()
        if call.learned:
            model_output, variance = model_output.chunk(2, dim=1)
        tensors: dict[str, Tensor] = {}
        history = anchor = seeds = None
        if not move.plain:
            runtime = self._fastdiff
            tensors = tensors_of(self.__dict__, self._fd_state)
            tensors.update(call.given)
            if move.seeded:
                seeds = self._seeds(call.generator, sample)
            self._draw(tensors, move, call, answer, variance)
            for name in move.evicted:
                tensors[name] = tensors[name].clone()
            if move.depth:
                history = runtime.history(x)
            if move.buffered:
                anchor = runtime.anchor(x)
            for name, slot in move.copies:
                to = runtime.views[slot] if slot < ANCHOR else anchor
                assert to is not None
                tensors[name] = to.copy_(tensors[name])
            if move.anchor is not None:
                anchor = tensors[move.anchor].to(x.dtype)
                anchor = anchor.contiguous(memory_format=runtime.like[3])
                if anchor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                    anchor = anchor.clone()  # a caller that hands the same sample in again
            if move.limited >= 0:
                self._limit(move, x, model_output, runtime.views[move.limited])
        raw = None if move.raw is None else tensors[move.raw]
        if raw is not None and raw.dtype != model_output.dtype:  # noise in float32 for a half model
            wide = torch.promote_types(raw.dtype, model_output.dtype)
            raw, model_output = raw.to(wide), model_output.to(wide)
        state: dict[str, Any] = {
            "uncond": raw, "variance": variance, "history": history, "seeds": seeds
        }  # fmt: skip
        later = tuple(
            self._further(k, move, call, x, model_output, anchor, state, answer)
            for k in range(1, len(move.lazy) + 1)
        )
        half = None
        if answer is not None and answer.dtypes[0] in _HALVES:
            half = torch.empty_like(x, dtype=answer.dtypes[0])
        new = reverse_step(
            x,
            model_output,
            move.rows,
            0,
            clip=move.clip,
            y=anchor,
            out=x if half is not None and x is not sample else None,
            model_input=half,
            **state,
        )
        if half is not None:
            new = half
        elif answer is not None:
            new = new.to(answer.dtypes[0])
        if move.kept:
            self._keep(move, call, new, anchor, tensors)
        return new, *later

    def _further(
        self,
        k: int,
        move: Move,
        call: Call,
        x: Tensor,
        model_output: Tensor,
        anchor: Tensor | None,
        state: dict[str, Any],
        answer: Answer | None,
    ) -> Tensor | Later:
        """The k-th output behind the next sample."""
        dtype = torch.float32 if answer is None else answer.dtypes[k]
        if not move.lazy[k - 1]:
            # of what the step is about to overwrite
            return reverse_step(
                x, model_output, move.rows, k, clip=move.clip, y=anchor, **state
            ).to(dtype)
        return self._later(move, model_output, call.sample, dtype)[k - 1]

    def _later(
        self, move: Move, model_output: Tensor, sample: Tensor, dtype: Any = torch.float32
    ) -> list[Later]:
        """The outputs behind the next sample, none of them computed yet."""

        def make(k: int) -> Tensor:
            whole = sample.float() if sample.dtype in _HALVES else sample
            return reverse_step(whole, model_output, move.rows, k, clip=move.clip).to(dtype)

        reads = (sample, model_output)
        names = self._fd_outputs
        return [Later(names[k], make, k, reads) for k in range(1, len(move.lazy) + 1)]

    def _limit(self, move: Move, x: Tensor, model_output: Tensor, out: Tensor) -> None:
        """The predicted clean data, limited by a quantile of each sample."""
        reverse_step(x, model_output, move.rows, len(move.rows) - 1, out=out)
        config = self.config
        dynamic_threshold(
            out, config.dynamic_thresholding_ratio, max_value=config.sample_max_value, out=out
        )

    def _keep(
        self, move: Move, call: Call, new: Tensor, anchor: Any, tensors: dict[str, Tensor]
    ) -> None:
        """Leave the state as diffusers would."""
        values, views = self.__dict__, self._fastdiff.views
        ends = {
            "timestep": call.timestep, "sample": call.sample, "result": new, "anchor": anchor,
        }  # fmt: skip
        for name, (kind, what) in move.kept:
            if kind == "list":
                values[name][:] = held(kind, what, tensors.__getitem__, views, ends)
            else:
                values[name] = held(kind, what, tensors.__getitem__, views, ends)

    # --- diffusers' own class -----------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """Whatever is set besides the state may change the coefficients: a plan is then looked up
        anew."""
        super().__setattr__(name, value)
        if name not in OWN and name not in self._fd_state and "_fastdiff" in self.__dict__:
            self._fastdiff.plan = None
            if name == "timesteps":  # a new run
                self._fastdiff.seeds = None

    def __copy__(self) -> Any:
        """A shallow copy with buffers of its own."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__, _fastdiff=Runtime(self._fastdiff.in_place))
        for name in self._fd_state:
            value = self.__dict__.get(name)
            if isinstance(value, list):
                twin.__dict__[name] = [self._unshared(v) for v in value]
            elif name in self.__dict__:
                twin.__dict__[name] = self._unshared(value)
        return twin

    def _unshared(self, value: Any) -> Any:
        """A part of the state in memory that the next step does not write to."""
        kept = isinstance(value, Tensor) and self._fastdiff.place(value) != FOREIGN
        return value.clone() if kept else value

    def _refresh(self) -> Plan:
        return self._fastdiff.refresh(self, self._fd_peer, self._fd_state)

    def _init_step_index(self, timestep: Any) -> None:
        """As diffusers does it, but on the host: its own asks the device."""
        if is_dynamo_compiling():
            _compiled.start(self, timestep)
            return
        if "_init_size" in self.__dict__:  # taken from the first model output of a run
            self.__dict__["_init_size"] = None
        begin = self.__dict__.get("_begin_index")
        if begin is not None:
            self._step_index = begin
            return
        runtime = self._fastdiff
        if not runtime.current(self):
            self._refresh()
        if runtime.is_first(timestep):
            # where a grid has its first timestep twice, diffusers begins at the second and runs
            # over the end
            self._step_index = 0
            return
        number = torch.tensor(runtime.number(timestep), dtype=runtime.token[1].dtype)
        self._step_index = self.index_for_timestep(  # type: ignore[attr-defined]
            number, runtime.host_timesteps
        )

    def _ask(self, plan: Plan, call: Call) -> Answer:
        """What diffusers' step gives on a tiny sample of the same dtypes."""
        key = (call.key, call.sample.dtype, call.model_output.dtype)
        found = plan.answers.get(key)
        if found is None:
            found = plan.answers[key] = ask(self, call)
        return found
