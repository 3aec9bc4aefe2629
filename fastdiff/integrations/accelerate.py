"""`accelerate` and `restore`: the chains of a model between its convolutions, as fused ops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastdiff.integrations import _attention, _chains, _convolution, _resnet, _transformer
from fastdiff.integrations._swap import Swapped, covered, keeps_forward, loaded, swap, unswap

__all__ = ["Report", "accelerate", "restore"]


@dataclass
class Report:
    """What `accelerate` did.

    Attributes:
        fused: name of each accelerated module or scheduler -> what runs as one pass.
        left: name of each one of a known kind that was left alone -> the reason.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = []
        for title, entries in (("fused", self.fused), ("left", self.left)):
            lines.append(f"{title}: {len(entries)} modules")
            grouped: dict[str, list[str]] = {}
            for name, text in entries.items():
                grouped.setdefault(text, []).append(name or "(the module itself)")
            for text, names in grouped.items():
                more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
                lines.append(f"  {text}: {', '.join(names[:3])}{more}")
        return "\n".join(lines)


# --- which module is whose ------------------------------------------------------------------

# Module, class of it -> what an instance becomes; the first row that fits. An exact fusion for one
# more class is one more row and a `Swapped` in a file beside this one.
_BLOCKS: tuple[tuple[str, str, type[Swapped]], ...] = (
    ("diffusers.models.resnet", "ResnetBlock2D", _resnet.ResnetBlock2D),
    ("diffusers.models.attention_processor", "Attention", _attention.Attention),
    (_transformer.BLOCKS, "BasicTransformerBlock", _transformer.BasicTransformerBlock),
    (_transformer.BLOCKS, "JointTransformerBlock", _transformer.JointTransformerBlock),
    (_transformer.MODEL, "DiTTransformer2DModel", _transformer.DiTTransformer2DModel),
    (_transformer.NORMS, "AdaLayerNormZero", _transformer.AdaLayerNormZero),
    (_transformer.NORMS, "AdaLayerNormZeroSingle", _transformer.AdaLayerNormZeroSingle),
    (_transformer.NORMS, "AdaLayerNormContinuous", _transformer.AdaLayerNormContinuous),
    ("torch.nn", "Sequential", _chains.Sequential),
    ("torch.nn", "GroupNorm", _chains.GroupNorm),
)

# Models whose forward calls conv_act(conv_norm_out(x)), and neither of the two on anything else.
_HEADS = (
    ("diffusers.models.unets.unet_2d", "UNet2DModel"),
    ("diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel"),
    ("diffusers.models.autoencoders.vae", "Encoder"),
    ("diffusers.models.autoencoders.vae", "Decoder"),
)

# Blocks with slow chains that stay as they are, and what there is to say of them.
_FLUX = "diffusers.models.transformers.transformer_flux"
_GATES = "its gated residuals are not fused, its norms are"
_UNFUSED = (
    (_transformer.NORMS, "AdaLayerNorm", "no fused op covers it yet"),
    (_transformer.NORMS, "AdaGroupNorm", "no fused op covers it yet"),
    (_transformer.NORMS, "SD35AdaLayerNormZeroX", "no fused op covers it yet"),
    ("diffusers.models.resnet", "ResnetBlockCondNorm2D", "no fused op covers it yet"),
    (_FLUX, "FluxTransformerBlock", _GATES),
    (_FLUX, "FluxSingleTransformerBlock", _GATES),
)


def _head(module: nn.Module) -> tuple[nn.GroupNorm, nn.SiLU] | None:
    """The normalisation and the activation before a model's last convolution."""
    for home, name in _HEADS:
        for base in loaded(home, name):
            if isinstance(module, base) and keeps_forward(module, base):
                norm, act = (getattr(module, n, None) for n in ("conv_norm_out", "conv_act"))
                if type(norm) is nn.GroupNorm and type(act) is nn.SiLU:
                    return norm, act
    return None


def _plan(
    roots: Mapping[str, nn.Module], freeze: bool, report: Report
) -> Iterator[tuple[nn.Module, type[Swapped], dict[str, Any]]]:
    """What to swap; parents come before the submodules that they take in."""
    taken: set[int] = set()
    heads: dict[int, nn.Module] = {}
    for prefix, root in roots.items():
        for name, module in root.named_modules(prefix=prefix):
            head = _head(module)
            if head is not None:
                heads[id(head[0])] = head[1]
            if id(module) in taken:
                continue
            taken.add(id(module))
            if isinstance(module, Swapped):
                if not isinstance(module, _chains.ActAfterNorm):
                    report.fused[name] = module.fused
                taken.update(map(id, module.inside()))
                continue
            if "parametrizations" in module._modules:
                report.left[name] = "is parametrized, which is a class of its own"
                continue
            mixin: type[Swapped] | None
            if id(module) in heads:
                act = heads[id(module)]
                taken.add(id(act))
                reason = _chains.hooked(module, act)
                if reason is None:
                    report.fused[name] = _chains.NormBeforeAct.fused
                    yield module, _chains.NormBeforeAct, {"_fastdiff_act": (act,)}
                    yield act, _chains.ActAfterNorm, {}
                else:
                    report.left[name] = reason
                continue
            if freeze and isinstance(module, nn.Conv2d):
                mixin = _convolution.Conv2d
                reason = _convolution.unavailable() or mixin.refuse(module)
                if reason is None:
                    report.fused[name] = mixin.fused
                    yield module, mixin, {"_fastdiff_packed": _convolution.Packed()}
                else:
                    report.left[name] = reason
                continue
            mixin = next((m for home, c, m in _BLOCKS if isinstance(module, loaded(home, c))), None)
            if mixin is None:
                for home, c, why in _UNFUSED:
                    if isinstance(module, loaded(home, c)):
                        report.left[name] = f"{type(module).__name__}: {why}"
                continue
            # a block that is left alone is left whole
            taken.update(map(id, mixin.inside(module)))
            reason = mixin.refuse(module)
            if reason is None:
                report.fused[name] = mixin.fused
                yield module, mixin, {}
            elif mixin is not _chains.Sequential:  # most have no such pair, and that is no news
                report.left[name] = reason


def _roots(op: str, module: Any) -> dict[str, nn.Module]:
    """The module itself, or the modules among the components of a pipeline."""
    if isinstance(module, nn.Module):
        return {"": module}
    components = getattr(module, "components", None)
    if isinstance(components, Mapping):
        found = {str(k): m for k, m in components.items() if isinstance(m, nn.Module)}
        if found:
            return found
    raise TypeError(
        f"{op}: module must be a torch.nn.Module or a pipeline with components that are, "
        f"got {type(module).__name__}"
    )


# --- which scheduler is whose ---------------------------------------------------------------

_SCHEDULERS = ("diffusers.schedulers.scheduling_utils", "SchedulerMixin")


def _schedulers(module: Any) -> dict[str, Any]:
    """diffusers' schedulers among the components of a pipeline."""
    if isinstance(module, nn.Module):
        return {}
    components: Mapping[Any, Any] = module.components
    return {str(k): c for k, c in components.items() if isinstance(c, loaded(*_SCHEDULERS))}


# --- the two functions ----------------------------------------------------------------------


def accelerate(module: Any, *, freeze: bool = False) -> Report:
    """Let the chains of a model that have a fused op run as that op, in place.

    Of a pipeline also the schedulers: each step is one fused pass (fastdiff.integrations.diffusers
    says what stays equal). The scheduler is the same object with its config, timesteps and state,
    and saves as diffusers' own.

    Weights stay where they are: `state_dict`, hooks, `isinstance`, `deepcopy`, pickling (by which
    the copy is accelerated too), `.to()`, `load_state_dict` and later changes of weights work as
    before. Results differ in roundings only. Swapped are residual blocks, attention blocks with a
    group norm and the last normalisation of diffusers' U-Nets and autoencoders; the blocks and
    the last normalisation of its DiT, the blocks of PixArt and Stable Diffusion 3, and the adaptive
    layer norms of other transformers; `nn.Sequential` with a SiLU behind a GroupNorm, and any other
    plain GroupNorm.

    The fused chains run where no gradient is wanted (under `torch.no_grad`, as every pipeline
    does), in float32, bfloat16 or float16 and without autocast; otherwise, and for arguments or
    hooks that the fused chain would not honour, the module's own forward runs.

    Args:
        module: a `torch.nn.Module`, or a pipeline: any object whose `components` is a mapping with
            modules in it.
        freeze: also keep the weights of convolutions in the order that oneDNN computes in, which
            `F.conv2d` makes anew at every call: for one image or small grids on the CPU, in
            channels_last. Costs the memory of those weights a second time. Weights that are
            assigned, moved, loaded by `load_state_dict` or updated in place are packed anew; but
            a write through ``.data`` (some EMA code swaps weights so) cannot be noticed, hence the
            name and the default.

    Returns:
        Which modules and schedulers are accelerated now and which were left alone for what reason.
        A second call changes nothing and gives the same report.

    Raises:
        TypeError: module is neither, or freeze is no bool.
    """
    if not isinstance(freeze, bool):
        raise TypeError(f"accelerate: freeze must be a bool, got {type(freeze).__name__}")
    report = Report()
    # all of it is planned before the first swap: a failure leaves the module as it was
    swaps = list(_plan(_roots("accelerate", module), freeze, report))
    steps = []
    for name, scheduler in _schedulers(module).items():
        # only here, so that a model alone does not import diffusers
        from fastdiff.integrations.diffusers import _exchange

        reason = _exchange.refuse(scheduler)
        if reason is None:
            report.fused[name] = "step of the scheduler"
            steps.append((_exchange.put_in, scheduler))
        else:
            report.left[name] = reason
    for target, mixin, kept in swaps:
        swap(target, mixin, **kept)
    for put_in, scheduler in steps:
        put_in(scheduler)
    return report


def restore(module: Any) -> None:
    """Undo `accelerate`: every module gets its own class back and with it the bits that it gave.

    So does the scheduler of a pipeline, unless it was made as a drop-in.

    Args:
        module: as for `accelerate`, or a part of what was accelerated; others pass unchanged.

    Raises:
        TypeError: module is neither a module nor a pipeline.
        ValueError: a module got yet another class since, by a parametrisation for instance.
    """
    targets = [m for root in _roots("restore", module).values() for m in root.modules()]
    for target in targets:
        if covered(target):
            raise ValueError(
                "restore: module must have the classes that accelerate gave it, got "
                f"{type(target).__name__} on top of one: undo that first"
            )
    for target in targets:
        unswap(target)
    for scheduler in _schedulers(module).values():
        from fastdiff.integrations.diffusers import _exchange

        _exchange.take_out(scheduler)
