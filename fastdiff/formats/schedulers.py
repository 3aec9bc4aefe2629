"""The noise schedule of a `scheduler_config.json` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastdiff import schedules
from fastdiff.schedules import Schedule

__all__ = ["MOST_TIMES", "Scheduler", "read_scheduler"]

MOST_TIMES = 1_000_000  # of a schedule in a file: memory is taken for each

# schedulers of one table of betas that the model sees by its index
DISCRETE = (
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler",
    "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler",
    "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
FLOW = (
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
)  # fmt: skip
EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")

PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "sample",
    "original_sample": "sample",
    "v_prediction": "v_prediction",
}

# options under which the network sees other noise, or its output means something else
_MUST: dict[str, tuple[Any, ...]] = {
    "timestep_type": ("discrete",),
    "snr_shift_scale": (1.0,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
}


class Scheduler(NamedTuple):
    """What a scheduler's config says of the model.

    Attributes:
        schedule: the noise.
        prediction: what the model predicts, as in `solvers.build`.
        time_scale: the model's own time over that of the schedule.
        clip: bound of the predicted data, or None.
    """

    schedule: Schedule
    prediction: str
    time_scale: float
    clip: float | None


def read_scheduler(config: Mapping[str, Any]) -> Scheduler:
    """The schedule of a scheduler's config as diffusers writes it.

    Raises:
        ValueError: the class or an option has no counterpart, or what says the noise is not there.
    """
    kind = config.get("_class_name")
    if kind not in (*DISCRETE, *FLOW, *EDM):
        known = sorted((*DISCRETE, *FLOW, *EDM))
        raise ValueError(f"load: scheduler must be one of {known}, got {kind!r}")
    for name, allowed in _MUST.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"load: {name} must be {allowed[0]!r}, got {config[name]!r}")
    clip = _number(config, "clip_sample_range", 1.0) if config.get("clip_sample") else None
    if kind in EDM:
        _require(config, "prediction_type", ("epsilon",))  # c_out has the other sign for v
        names = ("sigma_min", "sigma_max", "sigma_data")
        made = schedules.edm(**{n: _number(config, n) for n in names if n in config})
        return Scheduler(made, "edm", 1.0, clip)
    if kind in FLOW or config.get("use_flow_sigmas"):
        return Scheduler(_flow(config, kind), "flow", _count(config), clip)
    _require(config, "prediction_type", tuple(PREDICTIONS))
    prediction = PREDICTIONS[config.get("prediction_type", "epsilon")]
    made = _betas(config)
    if config.get("rescale_betas_zero_snr"):
        made = schedules.rescale_zero_terminal_snr(made)
    return Scheduler(made, prediction, 1.0, clip)


def _require(config: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> None:
    got = config.get(name, allowed[0])
    if got not in allowed:
        raise ValueError(
            f"load: {name} of {config['_class_name']} must be one of {allowed}, got {got!r}"
        )


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"load: {name} must be a number, got {value!r}")
    return float(value)


def _count(config: Mapping[str, Any]) -> int:
    count = config.get("num_train_timesteps", 1000)
    if type(count) is not int or not 1 <= count <= MOST_TIMES:
        raise ValueError(
            f"load: num_train_timesteps must be an int in [1, {MOST_TIMES}], got {count!r}"
        )
    return count


def _flow(config: Mapping[str, Any], kind: str) -> Schedule:
    if kind not in FLOW:
        _require(config, "prediction_type", ("flow_prediction",))
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            "load: use_dynamic_shifting must be False, got True: the shift depends on the size of "
            "the image; load the folder of the model alone, and take "
            "schedules.flow(schedules.dynamic_shift(tokens))"
        )
    return schedules.flow(_number(config, "shift" if kind in FLOW else "flow_shift", 1.0))


def _betas(config: Mapping[str, Any]) -> Schedule:
    count, trained = _count(config), config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or not all(type(b) in (int, float) for b in trained):
            raise ValueError(
                f"load: trained_betas must be a list of numbers, got {type(trained).__name__}"
            )
        if len(trained) != count:
            raise ValueError(
                f"load: trained_betas must be num_train_timesteps={count}, got {len(trained)}"
            )
        return schedules.from_betas(trained)
    # the defaults of the classes differ, and diffusers writes every option
    needed = ("beta_start", "beta_end", "beta_schedule")
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"load: scheduler's config must hold {list(needed)}, got no {missing}")
    _require(config, "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"))
    name = config["beta_schedule"]
    if name == "squaredcos_cap_v2":
        return schedules.cosine(count)
    make = {f.__name__: f for f in (schedules.linear, schedules.scaled_linear, schedules.sigmoid)}
    return make[name](count, _number(config, "beta_start"), _number(config, "beta_end"))
