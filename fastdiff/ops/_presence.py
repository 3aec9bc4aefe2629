"""What a reverse step reads and writes, as the compile-time flags of the GPU kernels.

A step whose samples share one row compiles its terms in or out. Where each sample has its own row,
everything that some row may use is compiled in, and the kernel decides by the row's coefficients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff.table import (
    EVALUATES,
    FLAGS,
    LEARNED_VARIANCE,
    PUSH,
    PUSH_D,
    PUSH_X,
    TERMS,
    A,
    B,
    P,
    Packed,
    Q,
)

if TYPE_CHECKING:
    from fastdiff.ops._step_checks import Step

BIT = {term: 1 << k for k, term in enumerate(TERMS)}
PUSHES_D, PUSHES_SUM = 1, 2
_NOISE = BIT["n1"] | BIT["n2"]


class Presence(NamedTuple):
    """Compile-time flags; bit k of ``a`` and ``b`` is term k of `TERMS`."""

    a: int  # terms of x'
    b: int  # terms of y'
    p: bool  # the converted prediction reads x
    q: bool  # the converted prediction reads m
    push: int  # 0 nothing, PUSHES_D the converted prediction itself, PUSHES_SUM a sum, or both
    push_x: bool  # the sum that is pushed reads x
    push_d: bool  # and the converted prediction
    evaluates: bool
    guided: bool  # a weight of guidance may differ from 1
    scaled: bool  # the model output has a factor
    learned: bool  # the first draw has a learned variance
    clip: bool

    @property
    def draws(self) -> bool:
        """Whether any noise is drawn, so that the kernel needs logical indices."""
        return bool((self.a | self.b) & _NOISE)


def _bits(coefficients: np.ndarray) -> int:
    return sum(1 << k for k, c in enumerate(coefficients.tolist()) if c != 0.0)


def _of_rows(packed: Packed) -> list[Presence]:
    # the only copy to the host, once a packed table: no step waits for the device
    floats, ints = packed.floats.cpu().numpy(), packed.ints.cpu().numpy()
    rows = []
    for f, i in zip(floats, ints, strict=True):
        a, b = _bits(f[A : A + len(TERMS)]), _bits(f[B : B + len(TERMS)])
        push = push_x = push_d = 0
        if i[PUSH] >= 0:
            push_x, push_d = f[PUSH_X] != 0.0, f[PUSH_D] != 0.0
            push = PUSHES_SUM if push_x or f[PUSH_D] != 1.0 else PUSHES_D
        converts = bool(push_d or (a | b) & BIT["d"])
        rows.append(
            Presence(
                a=a,
                b=b,
                p=converts and bool(f[P] != 0.0),
                q=converts and bool(f[Q] != 0.0),
                push=push,
                push_x=bool(push_x),
                push_d=bool(push_d),
                evaluates=bool(i[FLAGS] & EVALUATES),
                guided=False,
                scaled=False,
                learned=bool(i[FLAGS] & LEARNED_VARIANCE) and bool((a | b) & BIT["n1"]),
                clip=converts,
            )
        )
    return rows


_rows: Any = WeakTensorKeyDictionary()  # packed floats -> list[Presence]


def presence(step: Step) -> Presence:
    """The flags of this step. The first call for a packed table copies it to the host."""
    guided = step.uncond is not None and (
        isinstance(step.guidance, torch.Tensor) or bool(np.float32(step.guidance) != 1.0)
    )
    clip = step.clip is not None
    if step.rows is not None:
        terms = BIT["x"]
        if step.y is not None:
            terms |= BIT["y"]
        if step.output is not None:
            terms |= BIT["m"] | BIT["d"]
        if step.uncond is not None:
            terms |= BIT["u"]
        for k in range(0 if step.history is None else min(4, step.history.shape[0])):
            terms |= BIT[f"h{k}"]
        if step.seeds is not None:
            terms |= _NOISE
        evaluates = step.output is not None
        pushes = evaluates and step.history is not None
        return Presence(
            a=terms,
            b=terms if step.y is not None else 0,
            p=evaluates,
            q=evaluates,
            push=PUSHES_D | PUSHES_SUM if pushes else 0,
            push_x=pushes,
            push_d=pushes,
            evaluates=evaluates,
            guided=guided,
            scaled=step.scale is not None and evaluates,
            learned=step.variance is not None,
            clip=clip and evaluates,
        )
    rows = _rows.get(step.packed.floats)
    if rows is None:
        rows = _rows[step.packed.floats] = _of_rows(step.packed)
    row: Presence = rows[step.row]
    reads_m = row.q or bool((row.a | row.b) & BIT["m"])
    return row._replace(
        guided=guided and reads_m,
        scaled=step.scale is not None and reads_m,
        clip=clip and row.clip,
    )
