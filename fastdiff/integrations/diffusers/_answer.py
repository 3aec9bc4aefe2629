"""What diffusers' own step does with dtypes and noise samplers, found by asking it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.integrations.diffusers._mended import LinAlgError, prepared
from fastdiff.integrations.diffusers._plan import Plan
from fastdiff.integrations.diffusers._trace import is_state


class Answer(NamedTuple):
    """What diffusers' own step does beyond the affine map, found by asking it."""

    dtypes: tuple[torch.dtype, ...]  # of what it returns
    spans: list[tuple[Tensor, Tensor]]  # what it asks of its noise sampler


def answer_of(scheduler: Any, plan: Plan, call: Any) -> Answer:
    """What diffusers' step gives on a tiny sample of the same dtypes.

    Args:
        scheduler: a drop-in; it is left as it is.
        plan: keeps the answer.
        call: the `Call`.
    """
    key = (call.key, call.sample.dtype, call.model_output.dtype)
    found = plan.answers.get(key)
    if found is None:
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
        output = torch.zeros(1, 1 + call.learned, 1, 1, dtype=call.model_output.dtype)
        asked = call._replace(generator=torch.Generator(), given=dict.fromkeys(call.given, tiny))
        theirs = asked.theirs(scheduler._fd_names, False)
        try:
            outputs = step(twin, output, at, tiny, **theirs)
        except LinAlgError:  # a step that is mended
            outputs = (tiny,) * len(scheduler._fd_outputs)
        found = plan.answers[key] = Answer(tuple(t.dtype for t in outputs), spans)
    return found
