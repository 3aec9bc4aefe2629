"""diffusers' schedulers, each step one fused pass over memory."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
from diffusers.configuration_utils import FrozenDict

from fastdiff.integrations.diffusers._grids import grid_methods
from fastdiff.integrations.diffusers._noise import SOURCES
from fastdiff.integrations.diffusers._plan import Runtime
from fastdiff.integrations.diffusers._scheduler import DropIn

# options of the drop-ins beside diffusers' own, with their defaults
_OPTIONS = {"noise": "generator", "corrected": False}

_LISTED = ("_step_index", "lower_order_nums", "model_outputs")
# what a scheduler keeps between two calls of step
_STATE: dict[str, tuple[str, ...]] = {
    "DDPMScheduler": (),
    "DDPMParallelScheduler": (),
    "DDIMScheduler": (),
    "DDIMParallelScheduler": (),
    "DDIMInverseScheduler": (),
    "CogVideoXDDIMScheduler": (),
    "PNDMScheduler": ("counter", "ets", "cur_sample", "cur_model_output"),
    "LMSDiscreteScheduler": ("_step_index", "derivatives"),
    "IPNDMScheduler": ("_step_index", "ets"),
    "EulerDiscreteScheduler": ("_step_index",),
    "EulerAncestralDiscreteScheduler": ("_step_index",),
    "EDMEulerScheduler": ("_step_index",),
    "HeunDiscreteScheduler": ("_step_index", "prev_derivative", "dt", "sample"),
    "KDPM2DiscreteScheduler": ("_step_index", "sample"),
    "KDPM2AncestralDiscreteScheduler": ("_step_index", "sample", "dt"),
    "DPMSolverMultistepScheduler": _LISTED,
    "DPMSolverMultistepInverseScheduler": _LISTED,
    "DPMSolverSinglestepScheduler": ("_step_index", "model_outputs", "sample"),
    "DPMSolverSDEScheduler": ("_step_index", "sample", "mid_point_sigma"),
    "DEISMultistepScheduler": _LISTED,
    "EDMDPMSolverMultistepScheduler": _LISTED,
    "CosineDPMSolverMultistepScheduler": _LISTED,
    "UniPCMultistepScheduler": (*_LISTED, "last_sample", "this_order", "timestep_list"),
    "SASolverScheduler": (
        *_LISTED, "last_sample", "last_noise", "this_predictor_order", "this_corrector_order",
        "timestep_list",
    ),
    "LCMScheduler": ("_step_index",),
    "TCDScheduler": ("_step_index",),
    "CMStochasticIterativeScheduler": ("_step_index",),
    "UnCLIPScheduler": (),
    "SCMScheduler": ("_step_index",),
    "FlowMatchEulerDiscreteScheduler": ("_step_index",),
    "FlowMatchHeunDiscreteScheduler": ("_step_index", "prev_derivative", "dt", "sample"),
    "FlowMatchLCMScheduler": ("_step_index",),
    "FlowMapEulerDiscreteScheduler": ("_step_index",),
    "LTXEulerAncestralRFScheduler": ("_step_index",),
    "MiniMaxH3Scheduler": ("_step_index",),
}  # fmt: skip
# whose step reads the timestep besides its index
_BY_VALUE = frozenset(
    ("LCMScheduler", "TCDScheduler", "SCMScheduler", "FlowMapEulerDiscreteScheduler")
)
# lists that grow without end, and the entries that a step reads
_TRIMS = {"IPNDMScheduler": (("ets", 3),)}
# whose model output may carry a variance
_LEARNED = frozenset(("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler"))


def _output_class(peer: Any) -> type:
    """The class of what `step` returns."""
    said = str(inspect.signature(peer.step).return_annotation)
    classes = [c for c in vars(inspect.getmodule(peer)).values() if dataclasses.is_dataclass(c)]
    return next(c for c in classes if isinstance(c, type) and c.__name__ in said)


def drop_in(peer: Any, state: tuple[str, ...]) -> type:
    """The drop-in for one of diffusers' scheduler classes.

    Args:
        peer: the class.
        state: names of the attributes that its `step` keeps for the next call.

    Its constructor takes two keywords more: ``noise`` ("generator" or "counter") and ``corrected``,
    True to mend what diffusers does to the picture against the method (docs/diffusers_defects.md).
    """
    parameters = inspect.signature(peer.step).parameters
    run = DropIn._step

    def __init__(
        self: Any, *args: Any, noise: str = "generator", corrected: bool = False, **kwargs: Any
    ) -> None:
        if noise not in SOURCES:
            raise ValueError(f"{peer.__name__}: noise must be one of {SOURCES}, got {noise!r}")
        if not isinstance(corrected, bool):
            raise TypeError(f"{peer.__name__}: corrected must be a bool, got {corrected!r}")
        self._fastdiff = Runtime()
        chosen = {"noise": noise, "corrected": corrected}
        # the constructor may read the grid's options before the configuration has them
        self.register_to_config(**chosen)
        peer.__init__(self, *args, **kwargs)
        self.register_to_config(**chosen)
        silent = [name for name, value in chosen.items() if value == _OPTIONS[name]]
        if silent:  # a default is not handed on to other classes
            left = [*self.config.get("_use_default_values", ()), *silent]
            self._internal_dict = FrozenDict({**self.config, "_use_default_values": left})

    signature = inspect.signature(peer.__init__)
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in _OPTIONS.items()
    ]
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=sorted((*signature.parameters.values(), *own), key=lambda p: p.kind)
    )

    @functools.wraps(peer.step)
    def step(
        self: Any, model_output: Any, timestep: Any, sample: Any, *rest: Any, **named: Any
    ) -> Any:
        return run(self, model_output, timestep, sample, rest, named)

    more: dict[str, Any] = {}
    lookup = getattr(peer, "index_for_timestep", None)
    if lookup is None or "schedule_timesteps" not in inspect.signature(lookup).parameters:
        if hasattr(peer, "_init_step_index"):
            more["_init_step_index"] = _begins(peer._init_step_index)
        elif lookup is not None:
            more["_init_step_index"] = _begins(_init_step_index)
    base = _output_class(peer)
    name = peer.__name__
    return type(
        name,
        (DropIn, peer),
        {
            "__init__": __init__,
            "__module__": __name__,
            "__doc__": peer.__doc__,
            "step": step,
            "_fd_peer": peer,
            "_fd_state": state,
            "_fd_names": tuple(parameters)[4:],
            "_fd_return_dict": parameters["return_dict"].default,
            "_fd_output": base,
            "_fd_outputs": tuple(field.name for field in dataclasses.fields(base)),
            "_fd_learned": name in _LEARNED,
            "_fd_by_value": name in _BY_VALUE,
            "_fd_trims": _TRIMS.get(name, ()),
            **grid_methods(peer),
            **more,
        },
    )


def _begins(otherwise: Callable[..., None]) -> Callable[..., None]:
    """A run that is handed the first element of `timesteps` begins there, see `DropIn`."""

    def _init_step_index(self: Any, timestep: Any) -> None:
        runtime = self._fastdiff
        if not runtime.current(self):
            self._refresh()
        if self.__dict__.get("_begin_index") is None and runtime.is_first(timestep):
            self._step_index = 0
        else:
            otherwise(self, timestep)

    return _init_step_index


def _init_step_index(self: Any, timestep: Any) -> None:
    """For classes that look the index up in `step` itself."""
    begin = self._begin_index
    self._step_index = self.index_for_timestep(timestep) if begin is None else begin


for _name, _state in _STATE.items():
    globals()[_name] = drop_in(getattr(diffusers, _name), _state)
