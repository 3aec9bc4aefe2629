"""`film_norm` and `film`: the reference against torch's norm, the CPU kernel against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import assert_same_bits
from budget import assert_within_budget
from tables import Guard, needs_extension

from fastdiff import use_backend
from fastdiff.ops import _native, film, film_norm
from fastdiff.reference import film_norm as reference

CONTIGUOUS, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# In the dtype of the result: its own rounding, and in float32 the few roundings of slope, offset
# and SiLU, which the reference has one by one too; the largest of a group weighs in all of them.
ULPS = 4.0


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Case:
    """Every argument of one call; `without` leaves some out."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        dtype: torch.dtype = torch.float32,
        fmt: torch.memory_format = CONTIGUOUS,
        act: str | None = "silu",
        mean: float = 0.5,
        without: tuple[str, ...] = (),
    ) -> None:
        n, c = shape[:2]
        guard = Guard(shape, fmt, dtype)  # starts off any vector's alignment
        self.x = guard.tensor.copy_((_normal(*shape) * 2 + mean).to(dtype))
        self.guard = guard
        # two halves of one row, as an embedding's projection gives them
        wide = _normal(n, 2 * c, seed=3).to(dtype)
        tensors = {
            "weight": _normal(c, seed=1).to(dtype), "bias": _normal(c, seed=2).to(dtype),
            "scale": wide[:, :c], "shift": wide[:, c:],
            "residual": _normal(*shape, seed=4).to(dtype).contiguous(memory_format=fmt),
        }  # fmt: skip
        self.tensors = {k: None if k in without else v for k, v in tensors.items()}
        self.groups, self.act, self.dtype = groups, act, dtype

    def __call__(self, **other: Any) -> torch.Tensor:
        kwargs = {**self.tensors, "act": self.act, **other}
        if self.groups:
            return film_norm(self.x, self.groups, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}
        return film(self.x, kwargs.pop("scale"), kwargs.pop("shift"), plus_one=True, **kwargs)

    def reference(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        x, t = self.x, self.tensors
        if dtype is not None:
            x = x.to(dtype)
            t = {k: None if v is None else v.to(dtype) for k, v in t.items()}
        return reference.film_norm(
            x, self.groups, t["weight"], t["bias"], t["scale"], t["shift"], self.act, t["residual"]
        )

    def check(self, got: torch.Tensor) -> None:
        assert got.dtype == self.dtype
        assert_within_budget(got, self.reference(), self.reference(torch.float64), ULPS)


# --- the reference --------------------------------------------------------------------------


def _chain(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The definition by torch's own group norm."""
    t = {k: v.to(dtype) for k, v in case.tensors.items() if v is not None}
    wide = (..., *(None,) * (case.x.dim() - 2))
    h = F.group_norm(case.x.to(dtype), case.groups, t["weight"], t["bias"], 1e-5)
    return F.silu(h * (1 + t["scale"][wide]) + t["shift"][wide]) + t["residual"]


@pytest.mark.parametrize("groups", (1, 3, 6))
@pytest.mark.parametrize("shape", ((2, 12), (2, 6, 5), (2, 6, 4, 3), (2, 6, 2, 3, 2)), ids=str)
def test_reference_is_torchs_group_norm_modulated(shape: tuple[int, ...], groups: int) -> None:
    case = Case(shape, groups)
    chain, exact = _chain(case, torch.float32), _chain(case, torch.float64)
    assert_within_budget(case.reference(), chain, exact, ulps=1)  # the last rounding, both times
    # in float64 what is left must not show in float32
    assert_within_budget(case.reference(torch.float64).float(), exact.float(), exact, ulps=0.5)


def test_film_multiplies_by_the_scale_itself_or_by_one_more() -> None:
    x, scale, shift = _normal(2, 3, 4), _normal(2, 3), _normal(2, 3, seed=1)
    for backend in ("reference", "auto"):
        with use_backend(backend):
            plain, more = film(x, scale, shift), film(x, scale, shift, plus_one=True)
        exact = x.double() * scale.double()[..., None] + shift.double()[..., None]
        assert_within_budget(plain, exact.float(), exact, 2)
        assert_within_budget(more, (exact + x.double()).float(), exact + x.double(), 2)


# --- the kernel -----------------------------------------------------------------------------

# channels and groups around the widths of vectors, pairs and runs; the memory order of each
SHAPES = {
    "one": ((1, 1, 1, 1), 1, CONTIGUOUS),
    "vector": ((3, 32), 4, CONTIGUOUS),
    "one-pixel": ((2, 66, 1, 1), 3, LAST),
    "odd-groups": ((2, 33, 5, 7), 11, LAST),
    "odd-groups-contiguous": ((2, 33, 5, 7), 11, CONTIGUOUS),
    "pairs": ((2, 64, 8, 8), 32, LAST),
    "pairs-contiguous": ((2, 64, 8, 8), 32, CONTIGUOUS),
    "one-channel-a-group": ((2, 96, 9, 9), 96, LAST),
    "one-group": ((2, 96, 9, 9), 1, LAST),
    "ten-a-group": ((1, 320, 13, 5), 32, LAST),
    "wider-than-a-block": ((3, 160, 16, 12), 8, LAST),
    "many-runs": ((1, 36, 37, 31), 6, LAST),
    "long-runs": ((2, 6, 71, 67), 3, CONTIGUOUS),
    "sequence": ((2, 12, 129), 4, CONTIGUOUS),
    "video": ((2, 34, 3, 5, 7), 17, LAST_3D),
    "five-samples": ((5, 40, 8, 9), 8, LAST),
}


@needs_extension
@pytest.mark.parametrize("act", (None, "silu"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "groups", "fmt"), SHAPES.values(), ids=SHAPES)
def test_kernel_within_budget(
    isa: str,
    shape: tuple[int, ...],
    groups: int,
    fmt: torch.memory_format,
    dtype: torch.dtype,
    act: str | None,
) -> None:
    case = Case(shape, groups, dtype, fmt, act)
    with use_backend("cpu"):
        got = case()
        assert got.is_contiguous(memory_format=fmt)
        case.check(got)
        modulation = Case(shape, 0, dtype, fmt, act)
        modulation.check(modulation())
    # nothing beyond the result is written, and all of it is
    result = Guard(shape, fmt, dtype)
    arguments = (case.x, groups, *(case.tensors[k] for k in ("weight", "bias", "scale", "shift")))
    _native.extension.film_norm(
        *arguments, act, case.tensors["residual"], 1e-5, True, result.tensor
    )
    assert_same_bits(result.tensor, got)
    result.check("result")
    case.guard.check("x")


PARTS = ("weight", "bias", "scale", "shift", "residual")


@needs_extension
@pytest.mark.parametrize("fmt", (CONTIGUOUS, LAST), ids=str)
@pytest.mark.parametrize(
    "without", [(p,) for p in PARTS] + [tuple(q for q in PARTS if q != p) for p in PARTS] + [PARTS],
    ids=lambda parts: "no-" + "-".join(parts),
)  # fmt: skip
def test_any_part_may_be_absent(without: tuple[str, ...], fmt: torch.memory_format) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for groups in (4, 0):
            case = Case((3, 64, 5, 6), groups, dtype, fmt, without=without)
            with use_backend("cpu"):
                case.check(case())


@needs_extension
@pytest.mark.parametrize("fmt", (CONTIGUOUS, LAST), ids=str)
@pytest.mark.parametrize(
    ("mean", "dtype"), ((1000.0, torch.float32), (30.0, torch.bfloat16), (100.0, torch.float16))
)
def test_a_mean_far_above_the_spread_does_not_cancel(
    isa: str, mean: float, dtype: torch.dtype, fmt: torch.memory_format
) -> None:
    case = Case((2, 32, 24, 24), 8, dtype, fmt, act=None, mean=mean)
    with use_backend("cpu"):
        case.check(case())


@needs_extension
def test_error_against_float64_is_at_most_that_of_eager_bf16() -> None:
    case = Case((4, 128, 16, 16), 32, torch.bfloat16, LAST, without=("scale", "shift", "residual"))
    exact = case.reference(torch.float64)
    eager = F.silu(F.group_norm(case.x, 32, case.tensors["weight"], case.tensors["bias"]))
    with use_backend("cpu"):
        got = case()
    for norm in (torch.linalg.vector_norm, lambda t: t.abs().max()):
        assert norm(got.double() - exact) <= norm(eager.double() - exact)


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_silu_from_end_to_end_of_the_type(isa: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-90.0, -200.0, 90.0, 3e4, -3e4])])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-30, float("inf"), float("nan")])]).to(dtype)
    exact, plain = F.silu(x.double()), F.silu(x.float()).to(dtype)
    eps = torch.finfo(dtype).eps
    # relative to each element, since it spans all magnitudes. float32: the few operations, and the
    # rounding of the scaled argument, |y| / 2 ulp; below -75 the result is 0 beside a float32 sum
    rate = 0.75 * eps if dtype != torch.float32 else eps * (3 + x.double().abs() / 2)
    bound = rate * exact.abs() + max(1e-30, torch.finfo(dtype).smallest_normal)
    for shape in ((1, 1, len(x)), (1, len(x), 1)):
        with use_backend("cpu"):
            got = film(x.view(shape), None, None, act="silu").view(-1)
        finite = plain.isfinite()
        assert bool(((got.double() - exact).abs() <= bound)[finite].all())
        assert bool((got.isfinite() == finite).all())


@needs_extension
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("fmt", (CONTIGUOUS, LAST), ids=str)
def test_a_sample_has_the_bits_that_it_has_alone(
    isa: str, dtype: torch.dtype, fmt: torch.memory_format
) -> None:
    case = Case((5, 64, 17, 16), 16, dtype, fmt)
    results = []
    with use_backend("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case())
        alone = []
        for i in range(5):
            part = {k: v if v is None or v.dim() == 1 else v[i : i + 1]
                    for k, v in case.tensors.items()}  # fmt: skip
            alone.append(film_norm(case.x[i : i + 1], case.groups, act=case.act, **part))
    for other in (*results[1:], torch.cat(alone)):
        assert_same_bits(other, results[0])


@needs_extension
@pytest.mark.parametrize("fmt", (CONTIGUOUS, LAST), ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_results_that_bypass_the_caches_are_the_same(
    isa: str, dtype: torch.dtype, fmt: torch.memory_format
) -> None:
    """16 MB of x and result are written past the caches; a sample of them alone is not."""
    for groups in (8, 0):
        case = Case((2, 64, 256, 128), groups, dtype, fmt)
        x = case.x.clone()  # aligned, unlike that of a guard
        assert 2 * x.nbytes >= 16 << 20
        case.x = x
        with use_backend("cpu"):
            together = case()
            # off the alignment, so that it is not written past them whatever its size
            case.x = Guard((1, 64, 256, 128), fmt, dtype).tensor.copy_(x[1:])
            case.tensors = {k: v if v is None or v.dim() == 1 else v[1:]
                            for k, v in case.tensors.items()}  # fmt: skip
            alone = Guard((1, 64, 256, 128), fmt, dtype)
            t = case.tensors
            _native.extension.film_norm(
                case.x, groups, *((t["weight"], t["bias"]) if groups else (None, None)),
                t["scale"], t["shift"], "silu", t["residual"], 1e-5, True, alone.tensor,
            )  # fmt: skip
            assert_same_bits(alone.tensor, together[1:])


@needs_extension
@pytest.mark.parametrize("fmt", (CONTIGUOUS, LAST), ids=str)
def test_nan_and_infinity_stay_in_their_group(isa: str, fmt: torch.memory_format) -> None:
    for bad in (float("nan"), float("inf")):
        for dtype in FLOATS:
            x = _normal(2, 64, 6, 6).to(dtype).contiguous(memory_format=fmt)
            x[1, 17, 3, 2] = bad
            with use_backend("cpu"):
                got = film_norm(x, 16, act="silu")
            inside = torch.zeros(2, 64, 6, 6, dtype=torch.bool)
            inside[1, 16:20] = True
            assert bool(got[inside].isnan().all()) and bool(got[~inside].isfinite().all())


# --- what the op takes ------------------------------------------------------------------------


@needs_extension
def test_other_strides_dtypes_and_classes_are_arranged_first() -> None:
    x = _normal(2, 8, 6, 10)
    expected = film_norm(x[..., ::2].contiguous(), 4)
    assert_same_bits(film_norm(x[..., ::2], 4), expected)
    weight = torch.nn.Parameter(_normal(8))
    bias = _normal(8, seed=1).to(torch.bfloat16)
    scale, shift = _normal(8, 2).T, _normal(2, 8, seed=2).half()
    with torch.no_grad():
        got = film_norm(x, 4, weight, bias, scale, shift, residual=x.transpose(2, 3).mT)
        wide = film_norm(x, 4, weight.detach(), bias.float(), scale.contiguous(), shift.float(),
                         residual=x)  # fmt: skip
    assert_same_bits(got, wide)


def test_float64_runs_on_the_reference() -> None:
    x = _normal(2, 8, 6).double()
    assert film_norm(x, 4).dtype == torch.float64


@pytest.mark.parametrize("shape", ((0, 8, 4, 4), (2, 8, 0, 4)), ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    assert film_norm(torch.zeros(shape), 4, act="silu").shape == shape
