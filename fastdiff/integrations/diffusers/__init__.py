"""diffusers' schedulers, each step one fused pass over memory."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
from diffusers.configuration_utils import FrozenDict

# the folder of a saved pipeline names this module, and diffusers then looks here for the base class
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch.compiler import is_dynamo_compiling

from fastdiff.integrations.diffusers import _compiled, _program
from fastdiff.integrations.diffusers._exchange import to_diffusers as to_diffusers
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
    "CogVideoXDPMScheduler": (),
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
    ("LCMScheduler", "TCDScheduler", "SCMScheduler", "FlowMapEulerDiscreteScheduler",
     "MiniMaxH3Scheduler", "SASolverScheduler")
)  # fmt: skip
# lists that grow without end, and the entries that a step reads
_TRIMS = {"IPNDMScheduler": (("ets", 3),)}
# whose model output may carry a variance
_LEARNED = frozenset(("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler"))

_TOKENS = "its state is made of tokens, not of numbers"
LEFT_OUT = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "ConsistencyDecoderScheduler": "part of ConsistencyDecoderVAE, which makes it itself",
    "DDPMWuerstchenScheduler": "each sample has a timestep of its own",
    "HeliosScheduler": "its grid changes from stage to stage of a run",
    "HeliosDMDScheduler": "its tables are arguments of step",
    "KarrasVeScheduler": "deprecated; step takes a sample that another method has made",
    "PiflowScheduler": "a step integrates a policy, which is not affine in the model output",
    "RePaintScheduler": "a step is weighted by a mask, element by element",
    "RFD4ProteinaScheduler": "a step is weighted by a mask, and centres coordinates",
    "ScoreSdeVeScheduler": "it has no step; the corrector hangs on norms of the model output",
    "ScoreSdeVpScheduler": "deprecated; it has no step",
}
"""diffusers' schedulers that have no drop-in, and why."""
_FIRST = ("model_output", "timestep", "sample")
# methods of diffusers' after which the programs for `torch.compile` are others
_FOLLOWED = {
    "set_timesteps": _program.reset,
    "set_begin_index": _program.changed,
    "register_to_config": _program.changed,
}


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
        # what is saved at the defaults is the file that diffusers saves
        loud = {name: value for name, value in chosen.items() if value != _OPTIONS[name]}
        self._internal_dict = FrozenDict(
            {k: v for k, v in self.config.items() if k not in chosen or k in loud}
        )
        if loud:
            self.register_to_config(**loud)

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

    @functools.wraps(peer.step)
    def step_in_their_order(self: Any, *args: Any, **named: Any) -> Any:
        named.update(zip(order, args, strict=False))
        if named.get("return_dict"):  # the first and the last step give a tuple all the same
            stride = self.config.num_train_timesteps // self.num_inference_steps
            inside = int(named["timestep"]) >= stride
            named["return_dict"] = inside and named["old_pred_original_sample"] is not None
        output, timestep, sample = (named.pop(name) for name in _FIRST)
        return run(self, output, timestep, sample, (), named)

    order = tuple(parameters)[1:]
    more: dict[str, Any] = grid_methods(peer)
    for method, then in _FOLLOWED.items():
        if hasattr(peer, method):
            more[method] = _followed(more.get(method, getattr(peer, method)), then)
    lookup = getattr(peer, "index_for_timestep", None)
    if lookup is None or "schedule_timesteps" not in inspect.signature(lookup).parameters:
        if hasattr(peer, "_init_step_index"):
            more["_init_step_index"] = _begins(peer._init_step_index)
        elif lookup is not None:
            more["_init_step_index"] = _begins(_init_step_index)
    base = _output_class(peer)
    names = tuple(name for name in order if name not in _FIRST)
    name = peer.__name__
    return type(
        name,
        (DropIn, peer),
        {
            "__init__": __init__,
            "__module__": __name__,
            "__doc__": peer.__doc__,
            "step": step if order[: len(_FIRST)] == _FIRST else step_in_their_order,
            "_fd_peer": peer,
            "_fd_state": state,
            "_fd_names": names,
            "_fd_known": frozenset(names),
            "_fd_return_dict": parameters["return_dict"].default,
            "_fd_output": base,
            "_fd_outputs": tuple(field.name for field in dataclasses.fields(base)),
            "_fd_learned": name in _LEARNED,
            "_fd_indexed": "_step_index" in state,
            "_fd_by_value": name in _BY_VALUE,
            "_fd_trims": _TRIMS.get(name, ()),
            **more,
        },
    )


def _followed(method: Any, then: Any) -> Any:
    """diffusers' method, and what the drop-in does behind it."""

    @functools.wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        then(self)

    return both


def _begins(otherwise: Callable[..., None]) -> Callable[..., None]:
    """The first step of a run: in a graph, at the first element of `timesteps`, or as diffusers."""

    def _init_step_index(self: Any, timestep: Any) -> None:
        if is_dynamo_compiling():
            _compiled.start(self, timestep)
            return
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


def __getattr__(name: str) -> Any:
    """A drop-in at its first use: some of diffusers' classes need packages that may be missing."""
    if name not in _STATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # the class that another thread may just have made is the one that pickles
    return globals().setdefault(name, drop_in(getattr(diffusers, name), _STATE[name]))


def __dir__() -> list[str]:
    return sorted({*globals(), *_STATE})
