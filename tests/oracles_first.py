"""The cases of the solvers transcribed in `oracles.py`."""

from __future__ import annotations

import math

import oracles
from oracles import Case, variance_output

CHURN = (8.0, 0.05, 50.0, 1.003)
CHURN_OPTIONS = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), CHURN, strict=True))
NO_CHURN = (0.0, 0.0, math.inf, 1.0)


def heun_oracle(p, x, churn):
    return (oracles.flow_heun if p.kind == "flow" else oracles.heun)(p, x, churn)


def level_oracle(of_levels, fallback):
    """Sources that count in sigma/alpha say nothing where it is infinite: there DDIM's equation."""
    return lambda p, x: (of_levels if p.alphas[0] else fallback)(p, x)


def euler_oracle(churn):
    def run_oracle(p, x):
        if p.alphas[0]:
            return oracles.euler(p, x, churn)
        first = oracles.ddim(oracles._from(p, 0, 1), x, 0.0)
        if p.steps == 1:
            return first
        rest = oracles._from(p, 1, p.steps)
        rest.noise = lambda kind, row: p.noise(kind, row + 1)
        rest_churn = (churn[0] * rest.steps / p.steps, *churn[1:])  # s_churn is of all the steps
        return first + oracles.euler(rest, first[0], rest_churn)

    return run_oracle


CASES = {
    "ddpm": Case("ddpm", {}, lambda p, x: oracles.ddpm(p, x, "fixed_small", None), "default"),
    "ddpm-large": Case(
        "ddpm",
        {"variance": "fixed_large"},
        lambda p, x: oracles.ddpm(p, x, "fixed_large", None),
        "the other fixed variance",
    ),
    "ddpm-learned": Case(
        "ddpm",
        {"variance": "learned_range"},
        lambda p, x: oracles.ddpm(p, x, "learned_range", variance_output),
        "variance by the network",
        converges=False,
    ),
    "ddim": Case("ddim", {}, lambda p, x: oracles.ddim(p, x, 0.0), "deterministic"),
    "ddim-eta": Case("ddim", {"eta": 0.3}, lambda p, x: oracles.ddim(p, x, 0.3), "between"),
    "ddim-eta1": Case("ddim", {"eta": 1.0}, lambda p, x: oracles.ddim(p, x, 1.0), "equals DDPM"),
    "euler": Case("euler", {}, euler_oracle(NO_CHURN), "deterministic"),
    "euler-churn": Case(
        "euler", CHURN_OPTIONS, euler_oracle(CHURN), "noise rows on its stream", converges=False
    ),
    "euler_ancestral": Case(
        "euler_ancestral",
        {},
        level_oracle(
            lambda p, x: oracles.euler_ancestral(p, x, 1.0, 1.0),
            lambda p, x: oracles.ddim(p, x, 1.0),
        ),
        "default",
    ),
    "euler_ancestral-options": Case(
        "euler_ancestral",
        {"eta": 0.7, "s_noise": 1.01},
        level_oracle(
            lambda p, x: oracles.euler_ancestral(p, x, 0.7, 1.01),
            lambda p, x: oracles.ddim(p, x, 0.7, 1.01),
        ),
        "options",
        converges=False,
    ),
    "heun": Case("heun", {}, lambda p, x: heun_oracle(p, x, NO_CHURN), "deterministic"),
    "heun-churn": Case(
        "heun", CHURN_OPTIONS, lambda p, x: heun_oracle(p, x, CHURN), "algorithm 2", converges=False
    ),
    "dpmpp_2m": Case("dpmpp_2m", {}, lambda p, x: oracles.dpmpp_2m(p, x, "midpoint"), "default"),
    "dpmpp_2m-heun": Case(
        "dpmpp_2m",
        {"solver_type": "heun"},
        lambda p, x: oracles.dpmpp_2m(p, x, "heun"),
        "the other solver type",
    ),
    "dpmpp_2m_sde": Case(
        "dpmpp_2m_sde",
        {},
        lambda p, x: oracles.dpmpp_2m_sde(p, x, 1.0, 1.0, "midpoint"),
        "default",
    ),
    "dpmpp_2m_sde-heun": Case(
        "dpmpp_2m_sde",
        {"eta": 0.4, "s_noise": 1.01, "solver_type": "heun"},
        lambda p, x: oracles.dpmpp_2m_sde(p, x, 0.4, 1.01, "heun"),
        "every option",
        converges=False,
    ),
    "dpmpp_2m_sde-ode": Case(
        "dpmpp_2m_sde",
        {"eta": 0.0},
        lambda p, x: oracles.dpmpp_2m(p, x, "midpoint"),
        "without noise it is dpmpp_2m",
    ),
}

# Measured for their order alone: churn below sqrt(2) - 1 a step, so that it thins out as steps are
# added, and an eta where the error does not cross zero on a flow, as it does at 0.5.
THIN = (5.0, 0.0, math.inf, 1.0)
ORDERS = {
    "euler-thin-churn": Case("euler", {"s_churn": 5.0}, euler_oracle(THIN), "churn"),
    "heun-thin-churn": Case(
        "heun", {"s_churn": 5.0}, lambda p, x: heun_oracle(p, x, THIN), "churn"
    ),
    "dpmpp_2m_sde-little": Case(
        "dpmpp_2m_sde",
        {"eta": 0.25, "solver_type": "heun"},
        lambda p, x: oracles.dpmpp_2m_sde(p, x, 0.25, 1.0, "heun"),
        "between",
    ),
}
