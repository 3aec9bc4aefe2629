"""The error budget: the one tolerance of the test-suite.

A kernel may be as far from the float64 answer as the readable reference in the same dtype is,
twice over, and ``ulps`` units in the last place more; no literal rtol anywhere.

Test modules import it as ``from budget import assert_within_budget`` (pyproject.toml puts the
tests folder on the path).
"""

from __future__ import annotations

import torch


def ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbouring numbers of ``dtype`` at the magnitude of ``exact``, float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().double().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(exact, info.eps, dtype=torch.float64), exponent - 1)


def assert_within_budget(
    got: torch.Tensor,
    reference_same_dtype: torch.Tensor,
    exact_float64: torch.Tensor,
    ulps: float,
    at: torch.Tensor | None = None,
) -> None:
    """``|got - exact| <= 2 max |reference - exact| + ulps * ulp(exact)`` in every element.

    Args:
        got: what the kernel gave, any floating dtype.
        reference_same_dtype: what the plain reference gave in that dtype.
        exact_float64: the same computation in float64 on the same (rounded) inputs.
        ulps: allowance in units in the last place of the dtype of ``got``, elementwise. Say next
            to the call where it comes from.
        at: the units are those of this magnitude, where terms larger than the result were added or
            clipped; default ``exact_float64``.

    Where the reference is not finite (an overflow of a 16-bit type, a NaN put in) the kernel must
    give the same non-finite value.
    """
    if not got.shape == reference_same_dtype.shape == exact_float64.shape:
        raise AssertionError(
            f"shapes differ: got {tuple(got.shape)}, reference "
            f"{tuple(reference_same_dtype.shape)}, exact {tuple(exact_float64.shape)}"
        )
    if got.dtype != reference_same_dtype.dtype:
        raise AssertionError(f"dtypes differ: {got.dtype} and {reference_same_dtype.dtype}")
    if exact_float64.dtype != torch.float64:
        raise AssertionError(f"the exact answer must be float64, got {exact_float64.dtype}")
    g, r, e = (t.detach().cpu().double() for t in (got, reference_same_dtype, exact_float64))
    if g.numel() == 0:
        return
    finite = r.isfinite() & e.isfinite()
    same = (g == r) | (g.isnan() & r.isnan())
    if not bool((same | finite).all()):
        i = int((~(same | finite)).flatten().nonzero()[0])
        raise AssertionError(
            f"element {i}: got {g.flatten()[i]}, but the reference is {r.flatten()[i]}"
        )
    zero = torch.zeros(())
    reference_error = torch.where(finite, (r - e).abs(), zero).max()
    # a NaN in `got` must not compare as within the budget, hence "not <="
    scale = e if at is None else at.detach().cpu().double()
    budget = 2 * reference_error + ulps * ulp(torch.where(finite, scale, zero), got.dtype)
    over = finite & ~((g - e).abs() <= budget)
    if bool(over.any()):
        error = torch.where(finite, (g - e).abs(), zero)
        i = int(over.flatten().nonzero()[0])
        raise AssertionError(
            f"{int(over.sum())} of {g.numel()} elements over budget; first: element {i}, got "
            f"{g.flatten()[i]:.9g}, exact {e.flatten()[i]:.9g}, error {error.flatten()[i]:.3g} > "
            f"2 * {float(reference_error):.3g} + {ulps} ulp = {budget.flatten()[i]:.3g}; "
            f"largest error {float(error.max()):.3g}"
        )
