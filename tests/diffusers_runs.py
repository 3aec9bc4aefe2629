"""Trajectories of diffusers' schedulers and of the drop-ins on the same outputs and noise."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers_cases import made, split
from scopes import default_dtype
from torch import Tensor
from torch.overrides import TorchFunctionMode

SHAPE = (2, 3, 4, 4)
LEARNED = ("learned", "learned_range")


class Doubled(TorchFunctionMode):
    """Computes in float64 where diffusers would go back to float32, on the noise of another run."""

    def __init__(self, noise: list[Tensor]) -> None:
        super().__init__()
        self.noise = iter(noise)
        self.reach = [0.0]  # largest size of what has been clipped

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn:
            return next(self.noise).double()
        doubled = args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if doubled and func in (Tensor.to, Tensor.float, Tensor.type):
            asked = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
            if all(dtype.is_floating_point for dtype in asked):
                return args[0]
        if doubled and func in (Tensor.clamp, torch.clamp):
            self.reach.append(float(args[0].abs().max()) if args[0].numel() else 0.0)
        return func(*args, **kwargs)


class Recorded(TorchFunctionMode):
    """Notes the noise that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.randn:
            self.noise.append(result)
        return result


class Sampler:
    """A noise sampler whose noise is noted."""

    def __init__(self, of: Any, noise: list[Tensor]) -> None:
        self.of, self.noise = of, noise

    def __call__(self, *span: Any) -> Tensor:
        before = len(self.noise)
        value: Tensor = self.of(*span)
        self.noise[before:] = [value]  # in place of what the tree itself drew
        return value


def doubled(scheduler: Any) -> Any:
    """A copy whose tables are in float64."""
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            twin.__dict__[name] = value.double()
        elif type(value) is list:
            twin.__dict__[name] = list(value)
    inner = getattr(twin, "solver_p", None)
    if inner is not None:
        twin.solver_p = doubled(inner)
    return twin


@dataclass
class Path:
    """A run: what every step returned, and how it ended."""

    outputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    error: Exception | None = None
    noise: list[Tensor] = field(default_factory=list)
    state: Any = None  # of the generator afterwards
    reach: float = 0.0  # largest size of what has been clipped


def model_outputs(row: dict[str, Any], n: int, dtype: torch.dtype, shape=SHAPE) -> list[Tensor]:
    """Random outputs of a model, the same for every class; twice the channels with a variance."""
    generator = torch.Generator().manual_seed(5)
    config, _, _ = split(row)
    # DPMSolver* take a learned variance and drop it
    learned = config.get("variance_type") in LEARNED
    channels = shape[1] * (1 + learned)
    made = [
        torch.randn(shape[0], channels, *shape[2:], generator=generator).to(dtype) for _ in range(n)
    ]
    if config.get("variance_type") == "learned":  # the variance itself, not its logarithm
        for output in made:
            output[:, shape[1] :].abs_()
    return made


def arguments(scheduler: Any, i: int, t: Any, before: tuple[Tensor, ...] | None) -> dict[str, Any]:
    """What a step is given by place or by name besides the model output and the sample."""
    if "timestep_back" in inspect.signature(scheduler.step).parameters:
        back = scheduler.timesteps[i - 1] if i else None
        return {
            "old_pred_original_sample": None if before is None else before[1],
            "timestep": t,
            "timestep_back": back,
        }
    return {"timestep": t}


def walk(scheduler: Any, row: dict[str, Any], sample: Tensor, outputs: list[Tensor]) -> Path:
    """Every step of a grid, up to the first that fails; the generator's seed is 1."""
    path = Path()
    _, _, options = split(row)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)  # some take a seed from the global generator
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    before = None
    try:
        for i, t in enumerate(scheduler.timesteps):
            if i == len(outputs):
                break
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, t)
            more = arguments(scheduler, i, t, before)
            before = scheduler.step(outputs[i], sample=sample, **more, **options, return_dict=False)
            before = tuple(before)
            path.outputs.append(before)
            sample = before[0]
    except Exception as error:  # what is raised is compared
        path.error = error
    path.state = generator.get_state()
    return path


def compared(
    peer: Any, ours: Any, row: dict[str, Any], dtype: torch.dtype = torch.float32, shape=SHAPE
) -> tuple[Path, Path, Path]:
    """The paths of diffusers' class, of the drop-in, and of diffusers' class in float64.

    The last one has the float32 tables, outputs and noise of the others.
    """
    theirs, mine = made(peer, row), made(ours, row)
    exact = doubled(theirs)
    outputs = model_outputs(row, len(theirs.timesteps), dtype, shape)
    scale = float(getattr(theirs, "init_noise_sigma", 1.0))
    start = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * scale
    start = start.to(dtype)
    with Recorded() as recorded:
        if "noise_sampler" in vars(theirs):
            _watch(theirs, recorded.noise)
        one = walk(theirs, row, start, outputs)
    one.noise = recorded.noise
    two = walk(mine, row, start, outputs)
    if "noise_sampler" in vars(exact):
        feed = iter(one.noise)
        exact.__dict__["noise_sampler"] = lambda *span: next(feed).double()
    with default_dtype(torch.float64), Doubled(one.noise) as mode:
        three = walk(exact, row, start.double(), [m.double() for m in outputs])
    three.reach = max(mode.reach)
    return one, two, three


def _watch(scheduler: Any, noise: list[Tensor]) -> None:
    """Notes the noise of the sampler that the scheduler is going to make."""
    cls = type(scheduler)

    def get(self: Any) -> Any:
        return self.__dict__["noise_sampler"]

    def put(self: Any, value: Any) -> None:
        noise.clear()  # of the draws that seed the sampler
        self.__dict__["noise_sampler"] = None if value is None else Sampler(value, noise)

    scheduler.__class__ = type(cls.__name__, (cls,), {"noise_sampler": property(get, put)})
    scheduler.__dict__["noise_sampler"] = None
