"""One call of a diffusers scheduler's own `step`, read as an affine map.

Every scheduler with a fixed grid moves the state by an affine combination of a few tensors. The
coefficients are here read off diffusers' own code rather than written a second time: `step` runs
once on a copy of the scheduler, in float64, on a batch whose samples are the unit vectors, one for
each tensor that it may read (the sample, the model output, what it kept from earlier steps, the
noise that it draws). Entry i of what it returns is then the coefficient of tensor i. One more
sample is zero, and shows a constant; one is random, and shows whether the map is affine at all.

What `step` does to the state between two calls (a list that moves up by one, a counter) is read off
the same call, so that whatever a new version of diffusers changes is followed without being told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Form = dict[str, float]
"""An affine combination: coefficient by name of a tensor, zeros left out."""


class Made(dict[str, float]):
    """A `Form` that is one tensor, computed anew: the caller may write over that tensor later."""


SAMPLE, OUTPUT, VARIANCE, LIMITED = "x", "m", "v", "d"
NOISE = ("n0", "n1")
TIMESTEP = object()  # stands for the timestep that the caller handed in

_AFFINE = 1e-9  # of the terms, by which the random sample may miss its form


class NotAffine(Exception):
    """This call can not be a row of a table; the text says why."""


class NotFinite(NotAffine):
    """diffusers' own coefficients are infinite or NaN."""


@dataclass
class Limit:
    """What limits the predicted clean data in the middle of a step.

    Attributes:
        form: of what is limited.
        bound: of the clamp to [-bound, bound]; None for dynamic thresholding.
    """

    form: Form
    bound: float | None


@dataclass
class Trace:
    """One call of `step`.

    Attributes:
        outputs: what it returned, in order, the next sample first.
        kept: attribute -> what it holds afterwards: a `Form`, `TIMESTEP`, a number, or a list of
            these.
        limit: of the predicted clean data, if there is one.
        draws: how often it drew noise.
        spans: (sigma, sigma_next) of each noise that came from a noise sampler, else None.
        log_variance: (scale, shift) of the log of the first noise's learned variance, or None.
    """

    outputs: list[Form]
    kept: dict[str, Any]
    limit: Limit | None = None
    draws: int = 0
    spans: list[tuple[float, float] | None] = field(default_factory=list)
    log_variance: tuple[float, float] | None = None


_POWERS = (Tensor.pow, torch.pow, Tensor.__pow__, Tensor.sqrt, torch.sqrt)


def _rounded_below_0(value: Any) -> bool:
    """Whether a number is a variance of 0, found as a difference of others of order 1."""
    return isinstance(value, Tensor) and value.dim() == 0 and -1e-12 < float(value) < 0


def is_state(value: Any) -> bool:
    """Whether a part of the state is a tensor like the sample, not a number held in a tensor."""
    return isinstance(value, Tensor) and value.dim() > 0


class _Vectors:
    """The unit vectors of the tensors that a step may read, as samples of one batch."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.rows = len(self.names) + 2
        generator = torch.Generator().manual_seed(0)
        self.random = torch.randn(len(self.names), dtype=torch.float64, generator=generator)

    def of(self, name: str) -> Tensor:
        i = self.names.index(name)
        unit = torch.zeros(self.rows, 1, 1, 1, dtype=torch.float64)
        unit[i] = 1.0
        unit[-1] = self.random[i]
        return unit

    def carries(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 4 and value.shape[0] == self.rows

    def form(self, value: Tensor, what: str, constant: bool = False) -> Form:
        """The combination that a traced value is.

        Raises:
            NotAffine: it is none.
        """
        if not self.carries(value) or value.shape[1:] != (1, 1, 1):
            raise NotAffine(f"{what} has shape {tuple(value.shape)}")
        column = value.detach().double().reshape(-1)
        if not bool(torch.isfinite(column).all()):
            raise NotFinite(f"{what} is not finite")
        shift = column[-2]
        if not constant and float(shift) != 0.0:
            raise NotAffine(f"{what} has a constant term, {float(shift):g}")
        weights = column[:-2] - shift
        terms = weights * self.random
        miss = float((column[-1] - shift - terms.sum()).abs())
        if miss > _AFFINE * max(float(terms.abs().max()), 1e-300):
            raise NotAffine(f"{what} is not an affine function of the tensors of a step")
        found = {n: float(w) for n, w in zip(self.names, weights, strict=True) if float(w) != 0.0}
        if constant:
            found[""] = float(shift)
        return found


class _Recorder(TorchFunctionMode):
    """Answers the calls in which a step is not affine in what it is given, and notes them."""

    def __init__(self, vectors: _Vectors) -> None:
        super().__init__()
        self.vectors = vectors
        self.limit: Limit | None = None
        self.draws = 0
        self.spans: list[tuple[float, float] | None] = []
        self.log_variance: tuple[float, float] | None = None

    def draw(self, span: tuple[float, float] | None = None) -> Tensor:
        if self.draws == len(NOISE):
            raise NotAffine(f"it draws noise more than {len(NOISE)} times")
        self.draws += 1
        self.spans.append(span)
        return self.vectors.of(NOISE[self.draws - 1])

    def limited(self, value: Tensor, bound: float | None) -> Tensor:
        if self.limit is not None:
            raise NotAffine("it limits two predictions")
        self.limit = Limit(self.vectors.form(value, "what is clipped"), bound)
        return self.vectors.of(LIMITED)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.nn.functional.interpolate:
            raise NotAffine("it changes the size of the sample")
        if func is torch.randn:
            return self.draw()
        if func in _POWERS and _rounded_below_0(args[0]):
            return torch.zeros_like(args[0])
        if args and self.vectors.carries(args[0]):
            if func in (Tensor.to, Tensor.float, Tensor.type):
                return args[0]  # casts are the kernel's business: all of it is float64 here
            if func in (Tensor.clamp, torch.clamp, Tensor.clip, torch.clip):
                low, high = (*args[1:], named.get("min"), named.get("max"))[:2]
                if low is None or high is None or float(low) != -float(high):
                    raise NotAffine(f"it clips to [{low}, {high}]")
                return self.limited(args[0], float(high))
            if func in (Tensor.exp, torch.exp):
                # exp(half the log of a learned variance), a factor of the noise
                form = self.vectors.form(args[0], "the log of the variance", constant=True)
                if self.log_variance is not None or set(form) - {VARIANCE, ""}:
                    raise NotAffine("it takes an exponential of more than a learned variance")
                self.log_variance = (form.get(VARIANCE, 0.0), form.get("", 0.0))
                return torch.ones_like(args[0])
        return func(*args, **named)


def _on_the_host(scheduler: Any, state: Sequence[str], wide: bool) -> Any:
    """A copy of a scheduler on the CPU, its tables in float64 if wide; its lists are its own.

    The tensors of its state are left where they are, as unit vectors will stand for them.
    """
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if name in state and is_state(value):
            continue
        if isinstance(value, Tensor):
            moved = value.detach().cpu()
            twin.__dict__[name] = moved.double() if wide and value.is_floating_point() else moved
        elif type(value) is list:
            twin.__dict__[name] = list(value)
    twin.__dict__["is_scale_input_called"] = True
    return twin


def trace(
    scheduler: Any,
    step: Callable[..., Any],
    state: Sequence[str],
    timestep: Any,
    options: Mapping[str, Any],
    *,
    learned: bool = False,
    wide: bool = True,
) -> Trace:
    """The map of one call, ``step(scheduler, model_output, timestep, sample, ...)``.

    Args:
        scheduler: in the state before the call; it is left as it is.
        step: the unbound function of diffusers' class.
        state: names of the attributes that hold what is kept between steps.
        timestep: as the caller would hand it in, on the CPU.
        options: further arguments of `step`; tensors like the sample are named by their argument.
        learned: the model output has a second half of channels, its variance.
        wide: coefficients are computed in float64; False: in the dtype of the scheduler's tables,
            as diffusers does.

    Returns:
        The trace; tensors of the state are named ``name`` or ``name.i`` for member i of a list.

    Raises:
        NotAffine: it can not be a row of a table.
        Exception: whatever `step` itself raises on such arguments.
    """
    if getattr(scheduler, "solver_p", None) is not None:
        raise NotAffine("it steps another scheduler, which keeps a state of its own")
    twin = _on_the_host(scheduler, state, wide)
    held: dict[str, tuple[str, int | None]] = {}
    for name in state:
        value = vars(scheduler).get(name)
        if type(value) is list:
            held.update({f"{name}.{i}": (name, i) for i, v in enumerate(value) if is_state(v)})
        elif is_state(value):
            held[name] = (name, None)
    given = [name for name, value in options.items() if is_state(value)]
    vectors = _Vectors([SAMPLE, OUTPUT, VARIANCE, LIMITED, *NOISE, *held, *given])
    options = {**options, **{name: vectors.of(name) for name in given}}
    for symbol, (name, i) in held.items():
        if i is None:
            twin.__dict__[name] = vectors.of(symbol)
        else:
            twin.__dict__[name][i] = vectors.of(symbol)
    recorder = _Recorder(vectors)
    if hasattr(twin, "_threshold_sample"):
        largest = twin.config.sample_max_value if twin.config.thresholding else 1.0

        def threshold(value: Tensor) -> Tensor:
            # below 1 every quantile is clamped to the bound, and it is a clip with a scale
            return (
                recorder.limited(value, largest) / largest
                if largest < 1
                else recorder.limited(value, None)
            )

        twin.__dict__["_threshold_sample"] = threshold
    if "noise_sampler" in vars(twin):
        twin.__dict__["noise_sampler"] = lambda a, b: recorder.draw((float(a), float(b)))
    output = vectors.of(OUTPUT)
    if learned:
        output = torch.cat([output, vectors.of(VARIANCE)], dim=1)
    sample = vectors.of(SAMPLE)
    with torch.no_grad(), recorder:
        result = step(
            twin,
            output,
            timestep=timestep,
            sample=sample,
            return_dict=False,
            **options,
        )

    def kept(value: Any, what: str) -> Any:
        if value is timestep:
            return TIMESTEP
        if vectors.carries(value):
            form = vectors.form(value, what)
            return Made(form) if form == {SAMPLE: 1.0} and value is not sample else form
        if isinstance(value, Tensor) and value.dim() > 0:
            raise NotAffine(f"it keeps a tensor of shape {tuple(value.shape)} in {what}")
        return value

    after: dict[str, Any] = {}
    for name in state:
        if name not in vars(twin):
            continue
        value = vars(twin)[name]
        if type(value) is list:
            after[name] = [kept(v, f"{name}[{i}]") for i, v in enumerate(value)]
        else:
            after[name] = kept(value, name)
    forms = [vectors.form(value, f"output {i}") for i, value in enumerate(result)]
    return Trace(
        forms, after, recorder.limit, recorder.draws, recorder.spans, recorder.log_variance
    )
