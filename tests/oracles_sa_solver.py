"""SA-Solver (Xue et al. 2023, arXiv:2309.05019), transcribed in NumPy. No fastdiff here."""

from __future__ import annotations

import functools
import math

from log_snr import log_snr
from mpmath import exp, expm1, mpf, sqrt
from oracles import STEP, Array, Case, Problem


@functools.cache
def _integrals(nodes: tuple, s, t, a) -> list:
    """Of a e^{a (u - t)} l_i(u) from s to t, l_i the Lagrange polynomials on the nodes."""
    found = []
    for i, at in enumerate(nodes):
        poly = [mpf(1)]  # rising powers of u
        for j, other in enumerate(nodes):
            if j != i:
                up, same = [mpf(0), *poly], [*(c * -other for c in poly), mpf(0)]
                poly = [(u + v) / (at - other) for u, v in zip(up, same, strict=True)]
        ends, sign = [mpf(0), mpf(0)], 1  # by parts: e^{au} (P/a - P'/a^2 + P''/a^3 ...)
        for k in range(len(nodes)):
            for end, u in enumerate((s, t)):
                ends[end] += sign * sum(c * u**n for n, c in enumerate(poly)) / a**k
            poly, sign = [n * c for n, c in enumerate(poly)][1:], -sign
        found.append(ends[1] - exp(a * (s - t)) * ends[0])
    return found


def sa_solver(
    p: Problem, x: Array, predictor=3, corrector=4, tau=1.0, interval=None, s_noise=1.0,
    simple=False, pece=False, falls=True, data=True,
) -> list:  # fmt: skip
    """Algorithm 1 with equations 14 and 17, tau constant over a step: that of the time it begins.

    Without `data` in its noise form: x' = alpha'/alpha x - (1 + tau^2) alpha' int e^{-u} eps(u) du
    + tau sigma' sqrt(e^{2h} - 1) noise, u the log-SNR.

    The authors' interval, lowered orders (for the steps before a step to clean data) and, for
    `simple`, the order-2 coefficients of appendix D.
    """
    lam, states, buffer = log_snr(p), [], []
    dirty = p.steps - (p.sigmas[-1] == 0)
    if interval is None:
        interval = {"discrete": (0.2, 0.8), "flow": (0.2, 0.8), "edm": (0.05, 1.0)}[p.kind]
        if p.kind == "discrete":
            total = p.time_of(math.inf) + 1  # the noisiest time is the last of T
            interval = (interval[0] * total, interval[1] * total)

    def update(state, i, models, points, noise, corrects):
        """From point i to i + 1 on the predictions `models` at `points`, newest first."""
        strength = tau if interval[0] <= p.times[i] <= interval[1] else 0.0
        s, t, mul = lam[i], lam[i + 1], 1 + mpf(strength) ** 2
        h, alpha = t - s, p.alphas[i + 1]
        nodes = tuple(lam[k] for k in points)
        if not data:
            out = alpha / p.alphas[i] * state
            for w, model in zip(_integrals(nodes, s, t, -1), models, strict=True):
                # e^{-u} = e^{-t} e^{-(u - t)}, and the integrals have a factor -1
                out = out + float(mul * exp(-t) * w) * alpha * model
            return out + s_noise * p.sigmas[i + 1] * strength * float(sqrt(expm1(2 * h))) * noise
        weights = _integrals(nodes, s, t, mul)
        if simple and len(models) == 2 and h < 1e9:
            late = mul * h / 2 if corrects else mul * h**2 / 2 / (lam[points[1]] - s)
            total = -expm1(-mul * h)
            weights = [late, total - late] if corrects else [total - late, late]
        out = p.sigmas[i + 1] / p.sigmas[i] * float(exp(-(mpf(strength) ** 2) * h)) * state
        for w, model in zip(weights, models, strict=True):
            out = out + alpha * float(w) * model
        if strength:
            up = float(sqrt(-expm1(-2 * mpf(strength) ** 2 * h)))
            out = out + s_noise * p.sigmas[i + 1] * up * noise
        return out

    last = noise = None
    for i in range(p.steps):
        x0, eps = p.predict(x, *p.at(i))
        model = x0 if data else eps
        if i and corrector:
            order = min(corrector, i + 1, dirty - (i - 1) + 1 if falls else corrector)
            models = [model, *buffer[::-1]][:order]
            x = update(last, i - 1, models, range(i, i - order, -1), noise, True)
            if pece:
                states.append(x)
                x0, eps = p.predict(x, *p.at(i))
                model = x0 if data else eps
        buffer.append(model)
        if i == dirty:
            x = p.alphas[i + 1] * x0
        else:
            order = min(predictor, i + 1, dirty - i if falls else predictor)
            noise, last = p.noise(STEP, len(states)), x
            x = update(x, i, buffer[::-1][:order], range(i, i - order, -1), noise, False)
        states.append(x)
    return states


NAMES = {
    "predictor": "predictor_order", "corrector": "corrector_order", "simple": "simple_order_2",
    "falls": "lower_order_final", "data": "predict_x0",
}  # fmt: skip


def case(reason, *, kinds=("discrete", "edm", "flow"), converges=False, **options):
    ours = {NAMES.get(k, k): v for k, v in options.items() if k != "interval"}
    if "interval" in options:
        ours |= dict(zip(("tau_end", "tau_start"), options["interval"], strict=True))
    return Case(
        "sa_solver", ours, lambda p, x: sa_solver(p, x, **options), reason, kinds,
        "data" in options, converges,
    )  # fmt: skip


ALL = (0.0, 1e9)  # every time
NOISE = {"data": False, "kinds": ("discrete", "edm")}
# Some are measured in ORDERS: from alpha = 0 their error crosses 0 near 150 steps, or falls from a
# higher order to 2 there.
CASES = {
    "sa_solver": case("default"),
    "sa_solver-ode": case("without noise", tau=0.0),
    "sa_solver-22": case(
        "the defaults of diffusers", predictor=2, corrector=2, simple=True, converges=True
    ),
    "sa_solver-always": case("noise from first to last", tau=0.6, interval=ALL, s_noise=1.01),
    "sa_solver-full": case("orders to the end", falls=False, interval=ALL, converges=True),
    "sa_solver-simple": case(
        "appendix D", predictor=2, corrector=2, simple=True, falls=False, interval=ALL
    ),
    "sa_predictor": case("no corrector", corrector=0, interval=ALL),
    "sa_predictor-1": case("lowest order", predictor=1, corrector=0, converges=True),
    "sa_solver-13": case("more predictions to correct", predictor=1, corrector=3, converges=True),
    "sa_solver_pece": case("two evaluations", pece=True),
    "sa_solver_pece-always": case(
        "two evaluations with noise", pece=True, predictor=2, corrector=3, interval=ALL, tau=0.5
    ),
    "sa_solver-noise": case("the noise form", **NOISE),
    "sa_solver-noise-22": case(
        "its orders in diffusers' default", predictor=2, corrector=2, converges=True, **NOISE
    ),
    "sa_solver-noise-always": case(
        "noise from first to last", tau=0.6, interval=ALL, s_noise=1.01, falls=False, **NOISE
    ),
    "sa_predictor-noise": case("no corrector", corrector=0, interval=ALL, **NOISE),
    "sa_predictor-noise-1": case("lowest order", predictor=1, corrector=0, **NOISE),
    "sa_solver_pece-noise": case("two evaluations", pece=True, interval=ALL, tau=0.5, **NOISE),
}
MEASURED = {"kinds": ("discrete", "edm"), "converges": True}
ORDERS = {
    "sa_solver-order": case("weak order 2", **MEASURED),
    "sa_solver_pece-order": case("weak order 2", pece=True, **MEASURED),
    "sa_solver-ode-order": case("order 4", tau=0.0, falls=False, **MEASURED),
    "sa_solver_pece-ode-order": case("order 4", tau=0.0, falls=False, pece=True, **MEASURED),
    "sa_solver-noise-order": case("weak order 2", data=False, **MEASURED),
    # at order 4 its error on Gaussian data crosses 0 near 150 steps
    "sa_solver-noise-ode-order": case(
        "order 3", predictor=2, corrector=3, tau=0.0, falls=False, data=False, **MEASURED
    ),
}
