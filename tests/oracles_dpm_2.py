"""k-diffusion's two-stage samplers and ComfyUI's ancestral steps on flows, transcribed."""

from __future__ import annotations

import math

import oracles
from oracles import STEP, Array, Case, Problem


def get_ancestral_step(level: float, level_next: float, eta: float) -> tuple[float, float]:
    """k-diffusion's, but down^2 = level_next^2 - up^2 without the difference, whose rounding the
    geometric mean with a far higher level would show."""
    if not eta:
        return level_next, 0.0
    far = (level_next / level) ** 2
    up = min(level_next, eta * level_next * (1 - far) ** 0.5)
    down2 = (1 - eta) * (1 + eta) + eta**2 * far
    return level_next * max(down2, 0.0) ** 0.5, up


def flow_step(t: float, t_next: float, eta: float) -> tuple[float, float, float]:
    """sigma_down (at least 0), alpha_ip1/alpha_down and renoise_coeff of ComfyUI's *_RF."""
    down = max(t_next * (1 + (t_next / t - 1) * eta), 0.0)
    factor = (1 - t_next) / (1 - down)
    return down, factor, math.sqrt(max(t_next**2 - down**2 * factor**2, 0.0))


def dpm_2(p: Problem, x: Array, churn: tuple) -> list:
    """sample_dpm_2; from an infinite level DDIM. On a flow ComfyUI runs it on t and x itself."""
    states: list = []
    flow = p.kind == "flow"
    for i in range(p.steps):
        t, alpha, _ = p.at(i)
        t_next, alpha_next, _ = p.at(i + 1)
        if alpha == 0 and not flow:
            x = oracles.ddim(oracles._from(p, i, i + 1), x, 0.0)[0]
            states.append(x)
            continue
        z, hat = (x / alpha, 0.0) if alpha else (x, t)
        if alpha:
            z, hat, t = oracles._churn(p, z, i, states, churn)
        if flow:
            if alpha:
                t = hat / (1 + hat)
                z = z * (1 - t)
            z, _ = _two_stages(z, t, t_next, lambda z, t: p.predict(z, t, 1 - t, t)[0], states)
            x = z
        else:
            later = p.levels[i + 1]
            known = {hat: t}

            def denoised(z, level, known=known):
                return p.denoised(z, level, known.get(level))

            z, mid = _two_stages(z, hat, later, denoised, states)
            if mid is not None:
                states[-1] = states[-1] * p.scales(mid)[0]
            x = alpha_next * z
        states.append(x)
    return states


def _two_stages(z, level, level_next, denoised, states):
    """Lines of sample_dpm_2 after the churn; the middle state is appended, its level returned."""
    d = (z - denoised(z, level)) / level
    if level_next == 0:
        return z + d * (level_next - level), None
    mid = math.exp((math.log(level) + math.log(level_next)) / 2)
    z_2 = z + d * (mid - level)
    states.append(z_2)
    d_2 = (z_2 - denoised(z_2, mid)) / mid
    return z + d_2 * (level_next - level), mid


def dpm_2_ancestral(p: Problem, x: Array, eta: float, s_noise: float) -> list:
    """sample_dpm_2_ancestral, and on flows sample_dpm_2_ancestral_RF.

    Noise is added after a capped step too. From an infinite level, with which k-diffusion can not
    begin, the step is DDIM's.
    """
    states: list = []
    for i in range(p.steps):
        t, alpha, _ = p.at(i)
        t_next, alpha_next, _ = p.at(i + 1)
        if p.kind == "flow":
            down, factor, up = flow_step(t, t_next, eta)
            end, _ = _two_stages(x, t, down, lambda z, t: p.predict(z, t, 1 - t, t)[0], states)
            x = factor * end
        elif alpha == 0:
            # the first step, so that its row and its draw are the first
            x = oracles.ddim(oracles._from(p, i, i + 1), x, min(eta, 1.0), s_noise)[0]
            states.append(x)
            continue
        else:
            level, level_next = p.levels[i], p.levels[i + 1]
            down, up = get_ancestral_step(level, level_next, eta)
            known = {level: t}

            def denoised(z, level, known=known):
                return p.denoised(z, level, known.get(level))

            z, mid = _two_stages(x / alpha, level, down, denoised, states)
            if mid is not None:
                states[-1] = states[-1] * p.scales(mid)[0]
            x, up = alpha_next * z, alpha_next * up
        if up:
            x = x + up * s_noise * p.noise(STEP, len(states))
        states.append(x)
    return states


def dpmpp_2s_ancestral(p: Problem, x: Array, eta: float, s_noise: float) -> list:
    """sample_dpmpp_2s_ancestral, and on flows sample_dpmpp_2s_ancestral_RF, whose first stage at
    t = 1 is at 0.9999: the limit is the first-order step. So is it from any infinite level."""
    states: list = []
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        t_next, alpha_next, _ = p.at(i + 1)
        x0, _ = p.predict(x, t, alpha, sigma)
        if p.kind == "flow":
            down, factor, up = flow_step(t, t_next, eta)
            if t == 1 or down == 0:
                x = factor * (down / t * x + (1 - down / t) * x0)
            else:
                lam, lam_down = math.log((1 - t) / t), math.log((1 - down) / down)
                t_s = 1 / (math.exp((lam + lam_down) / 2) + 1)
                u = t_s / t * x + (1 - t_s / t) * x0
                states.append(u)
                x0_s, _ = p.predict(u, t_s, 1 - t_s, t_s)
                x = factor * (down / t * x + (1 - down / t) * x0_s)
        elif alpha == 0:
            # the first step, so that its row and its draw are the first
            x = oracles.ddim(oracles._from(p, i, i + 1), x, min(eta, 1.0), s_noise)[0]
            states.append(x)
            continue
        else:
            level, level_next = p.levels[i], p.levels[i + 1]
            down, up = get_ancestral_step(level, level_next, eta)
            z = x / alpha
            if down == 0:
                z = z + (z - x0) / level * (down - level)
            else:
                start, end = -math.log(level), -math.log(down)
                h = end - start
                mid = math.exp(-(start + h / 2))
                z_2 = (mid / level) * z - math.expm1(-h / 2) * x0
                states.append(p.scales(mid)[0] * z_2)
                z = (down / level) * z - math.expm1(-h) * p.denoised(z_2, mid)
            x, up = alpha_next * z, alpha_next * up
        if up:
            x = x + up * s_noise * p.noise(STEP, len(states))
        states.append(x)
    return states


def euler_ancestral_rf(p: Problem, x: Array, eta: float, s_noise: float) -> list:
    """ComfyUI's sample_euler_ancestral_RF."""
    states: list = []
    for i in range(p.steps):
        t, t_next = float(p.times[i]), float(p.times[i + 1])
        x0, _ = p.predict(x, t, 1 - t, t)
        down, factor, up = flow_step(t, t_next, eta)
        x = down / t * x + (1 - down / t) * x0
        if eta > 0 and t_next > 0:
            x = factor * x + p.noise(STEP, i) * s_noise * up
        states.append(x)
    return states


CHURN = (8.0, 0.05, 50.0, 1.003)
CHURN_OPTIONS = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), CHURN, strict=True))
NO_CHURN = (0.0, 0.0, math.inf, 1.0)
OPTIONS = {"eta": 0.7, "s_noise": 1.01}


def _ancestral(solver, oracle):
    """Default, with options, without noise, and capped."""
    every = {
        "": ({}, "default"),
        "-options": (OPTIONS, "options"),
        "-ode": ({"eta": 0.0}, "without noise"),
        "-capped": ({"eta": 2.7}, "more noise than the next level has"),
    }
    for suffix, (options, reason) in every.items():
        told = {"eta": 1.0, "s_noise": 1.0} | options
        yield (
            f"{solver}{suffix}",
            Case(
                solver, options, lambda p, x, told=told: oracle(p, x, **told), reason,
                # s_noise adds other noise than the data's; a cap leaves a step of first order
                converges=suffix in ("", "-ode"),
            ),
        )  # fmt: skip


CASES = {
    "dpm_2": Case("dpm_2", {}, lambda p, x: dpm_2(p, x, NO_CHURN), "deterministic"),
    "dpm_2-churn": Case(
        "dpm_2", CHURN_OPTIONS, lambda p, x: dpm_2(p, x, CHURN), "churn", converges=False
    ),
    **dict(_ancestral("dpm_2_ancestral", dpm_2_ancestral)),
    **dict(_ancestral("dpmpp_2s_ancestral", dpmpp_2s_ancestral)),
}
for _suffix, _options in (("", {}), ("-options", OPTIONS), ("-capped", {"eta": 2.7})):
    _told = {"eta": 1.0, "s_noise": 1.0} | _options
    CASES[f"euler_ancestral-rf{_suffix}"] = Case(
        "euler_ancestral",
        {"rf": True, **_options},
        lambda p, x, told=_told: euler_ancestral_rf(p, x, **told),
        "ComfyUI's step on a flow",
        kinds=("flow",),
        converges=not _options,  # as above
    )
THIN = (5.0, 0.0, math.inf, 1.0)
ORDERS = {
    "dpm_2-thin-churn": Case(
        "dpm_2", {"s_churn": 5.0}, lambda p, x: dpm_2(p, x, THIN), "churn that thins out"
    ),
    "dpm_2_ancestral-little": Case(
        "dpm_2_ancestral", {"eta": 0.5}, lambda p, x: dpm_2_ancestral(p, x, 0.5, 1.0), "between"
    ),
    "dpmpp_2s_ancestral-little": Case(
        "dpmpp_2s_ancestral", {"eta": 0.5}, lambda p, x: dpmpp_2s_ancestral(p, x, 0.5, 1.0),
        "between",
    ),
}  # fmt: skip
