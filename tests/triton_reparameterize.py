"""What `reparameterize` is held to in Triton's interpreter: triton_cases.py runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bits import assert_same_bits
from budget import assert_within_budget

from fastdiff import use_backend
from fastdiff.ops import reparameterize
from fastdiff.reference.reparameterize import UNBOUNDED
from fastdiff.reference.reparameterize import reparameterize as exact_reparameterize

SEEDS = [1, 2**63 + 5, 2**64 - 1]


def same(size: tuple[int, ...], dtype: torch.dtype, **how: Any) -> None:
    several = (how["samples"],) if "samples" in how else ()
    rng = np.random.default_rng(0)
    shape = (len(SEEDS), *size)
    mu, logvar = (torch.from_numpy(rng.standard_normal(shape)).to(dtype) for _ in range(2))
    grad_z = torch.from_numpy(rng.standard_normal((len(SEEDS), *several, *size))).to(dtype)
    grad_kl = torch.from_numpy(rng.standard_normal(len(SEEDS))).float()
    results: dict[str, list[torch.Tensor]] = {}
    kls: dict[str, torch.Tensor] = {}
    for backend in ("triton", "cpu", "reference"):
        found = results[backend] = []
        for through in ("zk", "z", "k"):
            m, lv = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
            with use_backend(backend):
                z, kl = reparameterize(m, lv, SEEDS, step=7, **how)
                outputs = [z] * ("z" in through) + [kl] * ("k" in through)
                given = [grad_z] * ("z" in through) + [grad_kl] * ("k" in through)
                found += [z.detach(), *torch.autograd.grad(outputs, (m, lv), given)]
        kls[backend] = kl.detach()
    for got, expected in zip(results["triton"], results["cpu"], strict=True):
        assert_same_bits(got, expected, f"{size} {dtype} {how}")
    bounds = how.get("clamp", UNBOUNDED)
    wide = (mu.double(), logvar.double(), torch.zeros(shape).double())
    _, exact = exact_reparameterize(*wide, bounds)
    # the terms, each rounded a few times, are positive: half a ulp for each level of a sum of n
    levels = max(1, int(np.ceil(np.log2(max(2, mu[0].numel())))))
    assert_within_budget(kls["triton"], kls["reference"], exact, ulps=levels)
    with use_backend("triton"):
        again = reparameterize(mu, logvar, SEEDS, step=7, **how)[1]
    assert_same_bits(kls["triton"], again, "a second run")
