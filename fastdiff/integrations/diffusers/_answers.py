"""What a step of diffusers does to dtypes, found by asking it on a tiny sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.integrations.diffusers._mended import LinAlgError, prepared
from fastdiff.integrations.diffusers._trace import is_state


class Answer(NamedTuple):
    """What diffusers' own step does beyond the affine map, found by asking it."""

    dtypes: tuple[torch.dtype, ...]  # of what it returns
    spans: list[tuple[Tensor, Tensor]]  # what it asks of its noise sampler
    noise: list[torch.dtype]  # of each noise that it draws


class _Draws(TorchFunctionMode):
    """Notes the dtypes of the noise that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.randn:
            self.dtypes.append(result.dtype)
        return result


def ask(scheduler: Any, call: Any) -> Answer:
    """What a call of diffusers' step gives on a tiny sample of the same dtypes.

    Args:
        scheduler: a drop-in in the state before the call; it is left as it is.
        call: the `Call`.
    """
    tiny = torch.zeros(1, 1, 1, 1, dtype=call.sample.dtype)
    at = scheduler._fastdiff.number(call.timestep)
    if isinstance(call.timestep, Tensor):
        at = torch.tensor(at, dtype=call.timestep.dtype)
    (twin, step), spans = prepared(scheduler, scheduler._fd_peer.step, at), []
    for name in scheduler._fd_state:
        value = scheduler.__dict__.get(name)
        if type(value) is list:
            twin.__dict__[name] = [tiny.clone() if is_state(v) else v for v in value]
        elif is_state(value):
            twin.__dict__[name] = tiny.clone()

    def sampler(a: Tensor, b: Tensor) -> Tensor:
        spans.append((a, b))
        return tiny

    if "noise_sampler" in scheduler.__dict__:
        twin.__dict__["noise_sampler"] = sampler
    output = torch.zeros(1, 1 + bool(call.learned), 1, 1, dtype=call.model_output.dtype)
    # noise that is given excludes a generator
    generator = None if "variance_noise" in call.given else torch.Generator()
    asked = call._replace(generator=generator, given=dict.fromkeys(call.given, tiny))
    theirs = asked.theirs(scheduler._fd_names, False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _Draws() as draws:
        try:
            outputs = step(twin, output, timestep=at, sample=tiny, **theirs)
        except LinAlgError:  # a step that is mended
            outputs = (tiny,) * len(scheduler._fd_outputs)
    return Answer(tuple(t.dtype for t in outputs), spans, draws.dtypes)


def split(scheduler: Any, model_output: Tensor, sample: Tensor) -> tuple[Tensor, bool | None]:
    """The part of a model output that a step reads, and whether a variance follows it.

    None where the shapes are neither equal nor those of a learned variance.
    """
    shape, config = sample.shape, scheduler.config
    if config.get("variance_type") in ("learned", "learned_range") and (
        model_output.shape == (shape[0], 2 * shape[1], *shape[2:])
    ):
        if scheduler._fd_learned:
            return model_output, True
        if config.prediction_type == "epsilon" and shape[1] == 3:
            return model_output[:, :3], False  # the other solvers drop it
    return model_output, None
