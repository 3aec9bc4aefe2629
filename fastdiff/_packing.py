"""Packed rows: what a kernel reads of a table, in the precision of the state and on its device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastdiff._rows import C_IN, HISTORY_SLOTS, PUSH, TERMS, A, B, Needs, P, Q


class Packed(NamedTuple):
    """Rows in the precision of the state, on one device: the kernel's view of a table."""

    floats: torch.Tensor  # (rows, ROW_FLOATS)
    ints: torch.Tensor  # (rows, ROW_INTS) int32


def folded(floats: np.ndarray, ints: np.ndarray) -> np.ndarray:
    """A copy of the rows as they run where nothing is clipped.

    There the converted prediction is affine in x and m, so where no row pushes it it is folded into
    their coefficients, in float64: fewer roundings and no second pass.
    """
    floats = floats.copy()
    fold = ints[:, PUSH] < 0
    for start in (A, B):
        d = floats[:, start + TERMS.index("d")]
        floats[fold, start + TERMS.index("x")] += (d * floats[:, P])[fold]
        floats[fold, start + TERMS.index("m")] += (d * floats[:, Q])[fold]
        d[fold] = 0.0
    return floats


def fits(floats: np.ndarray, ints: np.ndarray) -> np.ndarray:
    """(rows,) whether float32 holds every coefficient of a row, folded or not; NaN it does not."""
    most = np.finfo(np.float32).max
    with np.errstate(invalid="ignore", over="ignore"):  # which is what is asked
        inside = [(np.abs(f) <= most).all(axis=1) for f in (floats, folded(floats, ints))]
    both: np.ndarray = inside[0] & inside[1]
    return both


class Packing:
    """Rows that `ops.reverse_step` runs.

    Attributes:
        floats: (rows, ROW_FLOATS) float64, history by memory slot.
        ints: (rows, ROW_INTS) int32.
        needs: of each row.
    """

    floats: np.ndarray
    ints: np.ndarray
    needs: tuple[Needs, ...]
    _packed: dict[tuple[bool | None, torch.device, torch.dtype], Packed]

    def __len__(self) -> int:
        return len(self.needs)

    def packed(
        self,
        device: torch.device | str = "cpu",
        *,
        clip: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Packed:
        """The rows rounded once to ``dtype`` on ``device``; made on first use, then kept."""
        key = (clip, device if isinstance(device, torch.device) else torch.device(device), dtype)
        found = self._packed.get(key)
        if found is None:
            floats = self.floats.copy() if clip else folded(self.floats, self.ints)
            with _disable_current_modes():  # what a tracer makes of them must not be kept
                found = self._packed[key] = Packed(
                    torch.from_numpy(floats).to(key[1], dtype),
                    torch.from_numpy(self.ints.copy()).to(key[1]),
                )
        return found

    def packed_each(
        self, device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32
    ) -> Packed:
        """The rows twice, ``packed(clip=False)`` and then ``packed(clip=True)``.

        For a batch in which some samples are clipped and some are not: sample i of row r runs row
        r or len(self) + r, and so has the bits that it has alone.
        """
        key = (None, torch.device(device), dtype)
        found = self._packed.get(key)
        if found is None:
            plain = self.packed(device, dtype=dtype)
            clipped = self.packed(device, clip=True, dtype=dtype)
            with _disable_current_modes():
                found = self._packed[key] = Packed(
                    *(torch.cat(both) for both in zip(plain, clipped, strict=True))
                )
        return found


class SlotRows(Packing):
    """Rows that name the memory slots of their history, for a caller who keeps the state himself.

    Unlike a `StepTable` they stand alone: which slot holds what, and whether it was written, is
    what the caller has to know.

    Args:
        floats: (rows, ROW_FLOATS) float64; c_in is set to 1.
        ints: (rows, ROW_INTS) int32.
        variance: the rows read the model's variance output.

    Raises:
        ValueError: a coefficient is not finite in float32.
    """

    def __init__(self, floats: np.ndarray, ints: np.ndarray, *, variance: bool = False) -> None:
        floats[:, C_IN] = 1.0
        if not fits(floats, ints).all():
            raise ValueError(f"SlotRows: floats must be finite in float32, got {floats}")
        self.floats, self.ints, self._packed = floats, ints, {}
        reads = (floats[:, A : A + len(TERMS)] != 0.0) | (floats[:, B : B + len(TERMS)] != 0.0)
        at = {term: reads[:, i] for i, term in enumerate(TERMS)}
        first = TERMS.index("h0")
        slots = reads[:, first : first + HISTORY_SLOTS]
        self.needs = tuple(
            Needs(
                output=True,
                uncond=bool(at["u"][i]),
                variance=variance and bool(at["n1"][i]),
                anchor=bool(at["y"][i]),
                writes_anchor=bool((floats[i, B : B + len(TERMS)] != 0.0).any()),
                history=1 + max(int(ints[i, PUSH]), -1, *np.flatnonzero(slots[i]).tolist()),
                seeds=bool(at["n1"][i] or at["n2"][i]),
            )
            for i in range(len(floats))
        )
