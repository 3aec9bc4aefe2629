"""`step` as `torch.compile` traces it: the affine map in plain torch, for the compiler to fuse.

The state is kept in tensors of its own, as diffusers does, and what a graph is made of comes from
`_program`. What has no program (a noise sampler, numbers in tensors among the options) goes through
diffusers' own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.diffusers import _program
from fastdiff.integrations.diffusers._noise import drawn
from fastdiff.integrations.diffusers._program import Kind
from fastdiff.integrations.diffusers._trace import LIMITED, NOISE, OUTPUT, SAMPLE, VARIANCE
from fastdiff.ops.noise import Stream
from fastdiff.reference.dynamic_threshold import dynamic_threshold

_HALVES = (torch.bfloat16, torch.float16)
_FIRST = (
    "step: the first timestep of a compiled run must be timesteps[0], got another; "
    "set_begin_index says where a run starts"
)


def start(self: Any, timestep: Any) -> None:
    """Choose the first step: a graph can not look it up, so without a begin index it is step 0."""
    if getattr(self, "_begin_index", None) is None:
        torch._assert_async(self.timesteps[0] == timestep, _FIRST)
    self._step_index = _program.first(self)


def step(
    self: Any, model_output: Tensor, timestep: Any, sample: Tensor, named: dict[str, Any]
) -> Any:
    """The step of a drop-in scheduler inside a graph; arguments as for diffusers' step.

    A timestep that is not the one of this step, where the coefficients depend on it, gives NaN.
    """
    return_dict = named.pop("return_dict", self._fd_return_dict)
    generator = named.pop("generator", None)
    position = _program.position_of(self._fd_state)
    if position == "_step_index" and self._step_index is None:
        start(self, timestep)
    for name, length in self._fd_trims:
        del getattr(self, name)[:-length]
    numbers, given, plain = [], {}, True
    for name, value in named.items():
        if not isinstance(value, Tensor):
            numbers.append((name, value))
        elif value.dim() > 0:
            given[name] = value
        else:
            plain = False
    learned = self._fd_learned and model_output.shape != sample.shape
    kind = row = None
    if plain:
        key = (  # a `Key`, which the compiler can not hand on as one
            "tensor" if isinstance(timestep, Tensor) else type(timestep).__name__,
            sample.dtype, model_output.dtype, learned, tuple(given), tuple(numbers),
        )  # fmt: skip
        program = getattr(self._fastdiff, _program.prepare(type(self).__name__, key), None)
        if program is not None and program.follows(self):
            kind, row = _lookup(self, program, position, timestep, sample)
    if kind is None or not kind.affine:
        if "generator" in self._fd_names:
            named["generator"] = generator
        return self._fd_peer.step(
            self, model_output, timestep, sample, return_dict=return_dict, **named
        )
    outputs = _run(self, kind, row, position, model_output, timestep, sample, generator, given)
    if return_dict:
        return self._fd_output(**dict(zip(self._fd_outputs, outputs, strict=True)))
    return outputs


def _lookup(
    self: Any, program: Any, position: str | None, timestep: Any, sample: Tensor
) -> tuple[Kind | None, Any]:
    """The kind of this step and its row of the table."""
    table = program.table
    if table.device != sample.device:
        table = table.to(sample.device)
    if position is None:
        for _, _, number in program.spans:
            at = torch.as_tensor(timestep, device=sample.device).long() + 1
            rows = table.index_select(0, at.clamp(0, len(table) - 1).reshape(1))
            return _program.kind(number), rows[0]
        return None, None
    at = getattr(self, position)
    seen = tuple(
        [_program.pattern(getattr(self, n, None)) for n in _program.patterned(self._fd_state)]
    )
    for begin, end, number in program.spans:
        # the pattern first: comparisons of the step go into the guards
        if _alike(_program.kind(number).before, seen) and begin <= at < end:
            row = table[at]
            if self._fd_by_value or position == "counter":
                right = (self.timesteps[at] == timestep).to(sample.device)
                row = torch.where(right, row, torch.nan)
            return _program.kind(number), row
    return None, None


def _alike(a: Any, b: Any) -> bool:
    """Whether two patterns are equal; torch 2.11 cannot trace `==` of what differs in type."""
    if a is None or b is None:
        return a is b
    for kind in (tuple, str):
        if isinstance(a, kind) != isinstance(b, kind):
            return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _run(
    self: Any,
    kind: Kind,
    row: Any,
    position: str | None,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    generator: Any,
    given: dict[str, Tensor],
) -> tuple[Tensor, ...]:
    """The outputs of a step, and the state left as diffusers would."""
    x = sample.float() if sample.dtype in _HALVES else sample
    wide = x.dtype
    variance = None
    if model_output.shape != sample.shape and self._fd_learned:
        model_output, variance = model_output.chunk(2, dim=1)
    tensors = {SAMPLE: sample, OUTPUT: model_output, **_held(self), **given}
    if variance is not None:
        tensors[VARIANCE] = variance

    def combined(form: int) -> Tensor:
        total = None
        for name, column in kind.forms[form]:
            term = row[column] * tensors[name].to(wide)
            total = term if total is None else total + term
        return torch.zeros_like(x) if total is None else total

    if kind.limit is not None:
        form, bound = kind.limit
        limited = combined(form)
        if bound is None:
            config = self.config
            ratio, top = config.dynamic_thresholding_ratio, config.sample_max_value
            tensors[LIMITED] = dynamic_threshold(limited, ratio, top)[0]
        else:
            tensors[LIMITED] = limited.clamp(-bound, bound)
    for k, dtype in enumerate(kind.draws):
        like = model_output if variance is None else variance
        if self.config.noise == "counter":
            at = row[0].long() if position is None else getattr(self, position)
            noise = _counter_noise(self, generator, like, at, k)
        else:
            noise = drawn(like, generator, dtype)
        if kind.log_variance is not None and variance is not None and k == 0:
            scale, shift = kind.log_variance
            noise = noise * torch.exp(row[scale] * variance.to(wide) + row[shift])
        tensors[NOISE[k]] = noise
    made = [combined(form) for form in range(len(kind.forms))]
    outputs = tuple([made[k].to(dtype) for k, dtype in enumerate(kind.dtypes)])
    place = None if position is None else getattr(self, position)

    def value(what: str, of: Any) -> Any:
        if what == "tensor":
            return tensors[of]
        if what == "form":
            return made[of]
        if what == "output":
            return outputs[of]
        if what == "position":
            return place + of
        if what == "number":
            return row[1 + of]
        if what == "list":
            return [value(*part) for part in of]
        return timestep if what == "timestep" else of

    now = [(name, what, value(what, of)) for name, what, of in kind.kept]
    for name, what, held in now:
        if what == "list":
            getattr(self, name)[:] = held
        else:
            setattr(self, name, held)
    return outputs


def _held(self: Any) -> dict[str, Tensor]:
    """The tensors of the state by the names that a trace gives them."""
    found: dict[str, Tensor] = {}
    for name in self._fd_state:
        value = getattr(self, name, None)
        if isinstance(value, list):
            for i, v in enumerate(value):
                if isinstance(v, Tensor) and v.dim() > 0:
                    found[f"{name}.{i}"] = v
        elif isinstance(value, Tensor) and value.dim() > 0:
            found[name] = value
    return found


def _counter_noise(self: Any, generator: Any, like: Tensor, at: Any, k: int) -> Tensor:
    """Noise k of the step at a place in the run: the bits that the kernel draws."""
    runtime = self._fastdiff
    of = (generator, like.shape[0], like.device)
    if runtime.seeds is None or runtime.seeds[0] != of:
        if generator is not None:
            self._seeds(generator, like)  # the compiler refuses it, and says why
        seeds = torch.randint(2**62, ()) + torch.arange(like.shape[0])
        runtime.seeds = of, seeds.to(like.device)
    step = len(NOISE) * at + k
    draw = torch.ops.fastdiff.randn_at if isinstance(at, Tensor) else torch.ops.fastdiff.randn
    noise: Tensor = draw(runtime.seeds[1], like.shape[1:], step, int(Stream.STEP))
    return noise
