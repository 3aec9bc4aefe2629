"""Runge-Kutta methods on rectified flow, dx/dt = noise - x0, as torchdiffeq's fixed grid has them.

torchdiffeq (rk_common.py, fixed_grid.py): midpoint, heun3 and rk4 (the 3/8 rule); and Kutta's
classic method. At t = 0 rectified flow has no slope that an x0 prediction could give, so the step
to clean data of the two methods of fourth order is heun3's.
"""

from __future__ import annotations

from oracles import Case


def _slope(p):
    def k(x, t):
        x0, eps = p.predict(x, t, 1 - t, t)
        return eps - x0

    return k


def midpoint(p, x):
    states = []
    for i in range(p.steps):
        t, t1 = float(p.times[i]), float(p.times[i + 1])
        h, f = t1 - t, _slope(p)
        x_half = x + f(x, t) * h / 2
        x = x + h * f(x_half, t + h / 2)
        states += [x_half, x]
    return states


def _heun3_step(f, t, h, x):
    k1 = f(x, t)
    x2 = x + h * k1 / 3
    k2 = f(x2, t + h / 3)
    x3 = x + h * 2 * k2 / 3
    k3 = f(x3, t + 2 * h / 3)
    return [x2, x3, x + h * (k1 + 3 * k3) / 4]


def heun3(p, x):
    states = []
    for i in range(p.steps):
        t, t1 = float(p.times[i]), float(p.times[i + 1])
        states += _heun3_step(_slope(p), t, t1 - t, x)
        x = states[-1]
    return states


def rk4(p, x, variant):
    states = []
    for i in range(p.steps):
        t, t1 = float(p.times[i]), float(p.times[i + 1])
        h, f = t1 - t, _slope(p)
        if t1 == 0:
            states += _heun3_step(f, t, h, x)
        elif variant == "3/8":
            k1 = f(x, t)
            x2 = x + h * k1 / 3
            k2 = f(x2, t + h / 3)
            x3 = x + h * (k2 - k1 / 3)
            k3 = f(x3, t + h * 2 / 3)
            x4 = x + h * (k1 - k2 + k3)
            k4 = f(x4, t1)
            states += [x2, x3, x4, x + h * (k1 + 3 * (k2 + k3) + k4) / 8]
        else:
            k1 = f(x, t)
            x2 = x + h / 2 * k1
            k2 = f(x2, t + h / 2)
            x3 = x + h / 2 * k2
            k3 = f(x3, t + h / 2)
            x4 = x + h * k3
            k4 = f(x4, t1)
            states += [x2, x3, x4, x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)]
        x = states[-1]
    return states


FLOW = {"kinds": ("flow",), "ends_in_x0": "line"}
CASES = {
    # On a Gaussian x^2 is a quadratic in t, so that x x''' + 3 x' x'' = 0; over 24 x that is the
    # error term of third order, x'''/24 + (x'/x) x''/8.
    "flow_midpoint": Case("flow_midpoint", {}, midpoint, "second order", gaussian_order=3, **FLOW),
    "flow_heun3": Case("flow_heun3", {}, heun3, "third order", **FLOW),
    "flow_rk4": Case("flow_rk4", {}, lambda p, x: rk4(p, x, "3/8"), "fourth order", **FLOW),
    "flow_rk4-classic": Case(
        "flow_rk4",
        {"variant": "classic"},
        lambda p, x: rk4(p, x, "classic"),
        "the other tableau",
        **FLOW,
    ),
}
