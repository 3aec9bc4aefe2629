"""CFG++ (Chung et al. 2024) in the solvers of ComfyUI's k_diffusion/sampling.py.

States z = x/alpha, levels sigma/alpha. A level that is infinite has only the step of the paper,
which is written with alpha and sigma.
"""

from __future__ import annotations

import dataclasses
import math

from oracles import STEP, Case


def both(p, x, t, alpha, sigma):
    """The guided x0 and the unconditional one, which no one clips."""
    alone = dataclasses.replace(p, network=p.uncond, clip=None)
    return p.predict(x, t, alpha, sigma)[0], alone.predict(x, t, alpha, sigma)[0]


def at_level(p, z, level):
    alpha, sigma = p.scales(level)
    return both(p, alpha * z, p.time_of(level), alpha, sigma)


def ancestral_step(level, level_next, eta):
    """get_ancestral_step; its sqrt(level_next^2 - up^2) is put so that no digits cancel."""
    ratio = level_next / level  # 0 from an infinite level
    up = min(level_next, eta * level_next * ((1 - ratio) * (1 + ratio)) ** 0.5)
    share = (1 - eta) * (1 + eta) + (eta * ratio) ** 2
    return level_next * math.sqrt(max(share, 0.0)), up


def euler_ancestral(p, x, eta, s_noise):
    """sample_euler_ancestral_cfg_pp, and euler_cfg_pp with eta = 0, algorithm 2 of the paper."""
    states = []
    for i in range(p.steps):
        x = _first_order(p, x, i, eta, s_noise)
        states.append(x)
    return states


def _first_order(p, x, i, eta, s_noise):
    t, alpha, sigma = p.at(i)
    _, alpha_next, sigma_next = p.at(i + 1)
    denoised, uncond = both(p, x, t, alpha, sigma)
    if sigma_next == 0:
        return denoised
    down, up = ancestral_step(p.levels[i], p.levels[i + 1], eta)
    eps = (x - alpha * uncond) / sigma
    x = alpha_next * denoised + alpha_next * down * eps
    if up:
        x = x + alpha_next * up * s_noise * p.noise(STEP, i)
    return x


def dpmpp_2s_ancestral(p, x, eta, s_noise):
    """sample_dpmpp_2s_ancestral_cfg_pp, r = 1/2."""
    states = []
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        alpha_next = float(p.alphas[i + 1])
        level, level_next = p.levels[i], p.levels[i + 1]
        down, up = ancestral_step(level, level_next, eta)
        denoised, uncond = both(p, x, t, alpha, sigma)
        row = len(states)
        if math.isinf(level):  # the first step, and the first row
            x = _first_order(p, x, i, eta, s_noise)
            states.append(x)
            continue
        if down == 0:
            z = denoised
        else:
            z = x / alpha
            t_now, t_next = -math.log(level), -math.log(down)
            h = t_next - t_now
            s = t_now + h / 2
            z_2 = math.exp(-s) / level * (z + (denoised - uncond))
            z_2 = z_2 - math.expm1(-h / 2) * denoised
            states.append(p.scales(math.exp(-s))[0] * z_2)
            row += 1
            denoised_2, _ = at_level(p, z_2, math.exp(-s))
            z = down / level * (z + (denoised - uncond)) - math.expm1(-h) * denoised_2
        if level_next > 0 and up:
            z = z + p.noise(STEP, row) * s_noise * up
        x = alpha_next * z
        states.append(x)
    return states


def dpmpp_2m(p, x):
    """sample_dpmpp_2m_cfg_pp."""
    states, old = [], None
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        denoised, uncond = both(p, x, t, alpha, sigma)
        level, level_next = p.levels[i], p.levels[i + 1]
        if math.isinf(level):
            x = _first_order(p, x, i, 0.0, 0.0)
        else:
            decay = level_next / level  # exp(-h)
            mix = -decay * uncond
            if old is not None and level_next != 0:
                h, h_last = -math.log(decay), math.log(p.levels[i - 1]) - math.log(level)
                r = h_last / h
                mix = mix - math.expm1(-h) * (1 / (2 * r)) * (denoised - old)
            x = float(p.alphas[i + 1]) * (denoised + mix + decay * x / alpha)
        old = uncond
        states.append(x)
    return states


def res_multistep(p, x, eta, s_noise):
    """res_multistep with cfg_pp."""
    states, old, old_down = [], None, None
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        denoised, uncond = both(p, x, t, alpha, sigma)
        level, level_next = p.levels[i], p.levels[i + 1]
        down, up = ancestral_step(level, level_next, eta)
        if down == 0 or old is None or math.isinf(level):
            x = _first_order(p, x, i, eta, s_noise)
        else:
            t_now, t_next = -math.log(level), -math.log(down)
            h = t_next - t_now
            c2 = -math.inf  # the limit of the lines below
            if old_down and math.isfinite(p.levels[i - 1]):
                t_prev, t_old = -math.log(p.levels[i - 1]), -math.log(old_down)
                c2 = (t_prev - t_old) / h
            phi1 = math.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            b1, b2 = phi1 - phi2 / c2, phi2 / c2
            z = x / alpha + (denoised - uncond)
            z = math.exp(-h) * z + h * (b1 * uncond + b2 * old)
            if level_next > 0 and up:
                z = z + p.noise(STEP, i) * s_noise * up
            x = float(p.alphas[i + 1]) * z
        old, old_down = uncond, down
        states.append(x)
    return states


def gradient_estimation(p, x, gamma):
    """sample_gradient_estimation with cfg_pp; a flow's sigma is t, as ComfyUI has it."""
    states, old_d = [], None
    flow = p.kind == "flow"
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        alpha_next = float(p.alphas[i + 1])
        denoised, uncond = both(p, x, t, alpha, sigma)
        if flow:
            alpha, alpha_next, level, level_next = 1.0, 1.0, t, float(p.times[i + 1])
        else:
            level, level_next = p.levels[i], p.levels[i + 1]
        if math.isinf(level):
            d = x / sigma
            x = _first_order(p, x, i, 0.0, 0.0)
        else:
            d = (x / alpha - uncond) / level
            if level_next == 0:
                z = denoised
            else:
                z = denoised + d * level_next
                if i >= 1:
                    z = z + (gamma - 1) * (d - old_d) * (level_next - level)
            x = alpha_next * z
        old_d = d
        states.append(x)
    return states


def of_eta(name, oracle, eta):
    """The three ways in which a solver with fresh noise is used."""
    alone = {} if eta == 1.0 else {"eta": 1.0}
    return {
        f"{name}-ancestral": Case(
            name, alone, lambda p, x: oracle(p, x, 1.0, 1.0), "as much noise as ddpm's"
        ),
        f"{name}-ode": Case(name, {"eta": 0.0}, lambda p, x: oracle(p, x, 0.0, 1.0), "no noise"),
        f"{name}-options": Case(
            name,
            {"eta": 0.7, "s_noise": 1.01},
            lambda p, x: oracle(p, x, 0.7, 1.01),
            "options",
            converges=False,  # s_noise is not 1
        ),
    }


CASES = {
    "euler_cfg_pp": Case(
        "euler_cfg_pp", {}, lambda p, x: euler_ancestral(p, x, 0.0, 0.0), "the paper's"
    ),
    "dpmpp_2m_cfg_pp": Case("dpmpp_2m_cfg_pp", {}, dpmpp_2m, "one U kept"),
    "gradient_estimation_cfg_pp": Case(
        "gradient_estimation_cfg_pp", {}, lambda p, x: gradient_estimation(p, x, 2.0), "default"
    ),
    "gradient_estimation_cfg_pp-gamma": Case(
        "gradient_estimation_cfg_pp",
        {"ge_gamma": 3.0},
        lambda p, x: gradient_estimation(p, x, 3.0),
        "option",
    ),
    **of_eta("euler_ancestral_cfg_pp", euler_ancestral, 1.0),
    **of_eta("dpmpp_2s_ancestral_cfg_pp", dpmpp_2s_ancestral, 1.0),
    **of_eta("res_multistep_cfg_pp", res_multistep, 0.0),
}
