"""UniPC (Zhao et al. 2023, arXiv:2302.04867), transcribed in float64 NumPy. No fastdiff here."""

from __future__ import annotations

import functools

from log_snr import NO_SIGNAL, log_snr
from mpmath import expm1, factorial, lu_solve, matrix, mpf
from oracles import Array, Case, Problem


@functools.cache
def _rhos(rks, hh, big_b, count):
    """R rho = b of theorem 3.1: rho R_k = k! h phi_{k+1}(h)/B(h), phi as in appendix."""
    h_phi_k, rows, b = expm1(hh) / hh - 1, [], []
    for i in range(1, count + 1):
        rows.append([rk ** (i - 1) for rk in rks[:count]])
        b.append(h_phi_k * factorial(i) / big_b)
        h_phi_k = h_phi_k / hh - 1 / factorial(i + 1)
    return list(lu_solve(matrix(rows), matrix(b)))


def unipc(
    p: Problem,
    x: Array,
    order: int,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    corrected=lambda step: True,
    lower_order_final: bool = True,
) -> list:
    """Algorithms 1 (UniC) and 2 (UniP) in turn, as the authors' code and diffusers have them: the
    buffer holds the predictions at the predicted states, and the last step is not corrected.

    UniP-2 and UniC-1 take 1/2 for their one coefficient. A step to clean data returns x0; there is
    no correction where B(h) is infinite (bh1 from alpha = 0).
    """
    lam, states, buffer = log_snr(p), [], []
    last = last_order = None

    def solve(state, s, t, model_t, order_):
        """From point s to t with the buffer, by UniP or (with model_t) by UniC."""
        h = lam[t] - lam[s]
        hh = -h if predict_x0 else h
        big_b = hh if solver_type == "bh1" else expm1(hh)
        m0 = buffer[s]
        rks = [(lam[s - k] - lam[s]) / h for k in range(1, order_)]
        d1s = [(buffer[s - k] - m0) * float(1 / rks[k - 1]) for k in range(1, order_)]
        if model_t is None:
            rhos = [mpf("0.5")] if order_ == 2 else []
            if order_ > 2:
                rhos = _rhos(tuple(rks), hh, big_b, order_ - 1)
        else:
            rks, d1s = [*rks, mpf(1)], [*d1s, model_t - m0]
            rhos = [mpf("0.5")] if order_ == 1 else _rhos(tuple(rks), hh, big_b, order_)
        if predict_x0:
            scale, ratio = p.alphas[t], p.sigmas[t] / p.sigmas[s]
        else:
            scale, ratio = p.sigmas[t], p.alphas[t] / p.alphas[s]
        out = ratio * state - scale * float(expm1(hh)) * m0
        for rho, d1 in zip(rhos, d1s, strict=True):
            out = out - scale * float(big_b * rho) * d1
        return out

    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        x0, eps = p.predict(x, t, alpha, sigma)
        model = x0 if predict_x0 else eps
        finite = i > 0 and (solver_type == "bh2" or lam[i - 1] != NO_SIGNAL)
        if finite and corrected(i - 1):
            x = solve(last, i - 1, i, model, last_order)
        buffer.append(model)
        if p.sigmas[i + 1] == 0:
            x = p.alphas[i + 1] * x0
        else:
            last_order = min(order, p.steps - i) if lower_order_final else order
            last_order = min(last_order, i + 1)
            last = x
            x = solve(x, i, i + 1, None, last_order)
        states.append(x)
    return states


def case(reason, *, skip=(), corrector=True, order=2, kinds=None, converges=False, **options):
    """The default order is not spelled out among the options."""
    more = {"disable_corrector": skip} if skip else {}
    more |= {} if corrector else {"corrector": False}
    data = options.get("predict_x0", True)
    return Case(
        "unipc",
        {**({"order": order} if order != 2 else {}), **options, **more},
        lambda p, x: unipc(p, x, order, corrected=lambda i: corrector and i not in skip, **options),
        reason,
        kinds=kinds or (("discrete", "edm", "flow") if data else ("discrete", "edm")),
        signal=not data,
        converges=converges,
    )


FULL = {"lower_order_final": False}
NOISE = {"predict_x0": False}
# Most are measured in ORDERS or in test_peers_unipc.py: the order falls to 2 with the steps, later
# on one grid than on another, where the last step is of order 1 or the first from alpha = 0.
CASES = {
    "unipc": case("default"),
    "unipc-1": case("lowest order", order=1, converges=True),
    "unipc-3": case("highest order", order=3),
    "unipc-3-full": case("the order to the end", order=3, **FULL),
    "unipc-2-full": case("the order to the end", **FULL),
    "unipc-bh1": case("the other B(h)", solver_type="bh1"),
    "unipc-3-bh1": case("the other B(h)", order=3, solver_type="bh1", **FULL),
    # from 999 to 499 the noise form multiplies a rounding by 8e3 if it corrects that step
    "unipc-noise": case("the noise form", skip=(0,), **NOISE),
    "unipc-3-noise-bh1": case("the noise form", order=3, solver_type="bh1", **NOISE, **FULL),
    "unip-1": case("the predictor alone: DDIM", order=1, corrector=False, converges=True),
    "unip-2": case("the predictor alone", corrector=False, converges=True, **FULL),
    "unip-3": case("the predictor alone", order=3, corrector=False, **FULL),
    "unip-3-noise": case("the predictor alone", order=3, corrector=False, **NOISE, **FULL),
    "unipc-skip": case("the first two steps uncorrected", skip=(0, 1)),
}
WITH_SIGNAL = {"kinds": ("discrete", "edm"), "converges": True, **FULL}
ORDERS = {
    "unipc-2-order": case("order 3", **WITH_SIGNAL),
    "unipc-3-order": case("order 4", order=3, **WITH_SIGNAL),
    "unipc-bh1-order": case("order 3", solver_type="bh1", **WITH_SIGNAL),
    "unipc-3-bh1-order": case("order 4", order=3, solver_type="bh1", **WITH_SIGNAL),
    "unipc-noise-order": case("order 3", **NOISE, **WITH_SIGNAL),
}
