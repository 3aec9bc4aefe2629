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
_NOISE = BIT["n1"] | BIT["n2"]


class Presence(NamedTuple):
    """Compile-time flags; bit k of ``a`` and ``b`` is term k of `TERMS`."""

    a: int  # terms of x'
    b: int  # terms of y'
    p: bool  # the converted prediction reads x
    q: bool  # the converted prediction reads m
    push: bool  # the converted prediction may be pushed
    evaluates: bool
    guided: bool  # a weight of guidance may differ from 1
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
        push = bool(i[PUSH] >= 0)
        converts = push or bool((a | b) & BIT["d"])
        rows.append(
            Presence(
                a=a,
                b=b,
                p=converts and bool(f[P] != 0.0),
                q=converts and bool(f[Q] != 0.0),
                push=push,
                evaluates=bool(i[FLAGS] & EVALUATES),
                guided=False,
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
        return Presence(
            a=terms,
            b=terms if step.y is not None else 0,
            p=evaluates,
            q=evaluates,
            push=evaluates and step.history is not None,
            evaluates=evaluates,
            guided=guided,
            learned=step.variance is not None,
            clip=clip and evaluates,
        )
    rows = _rows.get(step.packed.floats)
    if rows is None:
        rows = _rows[step.packed.floats] = _of_rows(step.packed)
    row: Presence = rows[step.row]
    reads_m = row.q or bool((row.a | row.b) & BIT["m"])
    return row._replace(guided=guided and reads_m, clip=clip and row.clip)
