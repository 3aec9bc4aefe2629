"""The steps of guided-diffusion in float64, from the papers' equations; knows nothing of fastdiff.

Times 0 ... T-1 index the kept timesteps. DDPM: Ho et al. 2020 (arXiv:2006.11239), eqs. 6, 7, 15;
learned range: Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 15; DDIM: Song et al. 2021
(arXiv:2010.02502), eqs. 12 and 16; guidance by a classifier: Dhariwal and Nichol 2021
(arXiv:2105.05233), algorithms 1 and 2.
"""

from __future__ import annotations

import math

import torch


def betas_of(name, steps):
    if name == "linear":
        return [1000 / steps * (1e-4 + (0.02 - 1e-4) * i / (steps - 1)) for i in range(steps)]

    def bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)]


class Oracle:
    """One sample after another, each at its own t, coefficient by coefficient."""

    def __init__(self, name, steps, kept, predict_xstart, variance, rescale):
        bars, bar = [], 1.0
        for beta in betas_of(name, steps):
            bar *= 1 - beta
            bars.append(bar)
        self.kept, self.steps, self.rescale = sorted(kept), steps, rescale
        self.bar = [bars[i] for i in self.kept]
        self.predict_xstart, self.variance = predict_xstart, variance

    def before(self, t):
        return self.bar[t - 1] if t else 1.0

    def after(self, t):
        return self.bar[t + 1] if t + 1 < len(self.bar) else 0.0

    def beta(self, t):
        return 1 - self.bar[t] / self.before(t)

    def beta_tilde(self, t):
        return (1 - self.before(t)) / (1 - self.bar[t]) * self.beta(t)

    def time(self, t):
        original = torch.tensor([self.kept[t]])
        return original.float() * (1000.0 / self.steps) if self.rescale else original

    def evaluate(self, model, x, t, clip, denoised_fn, kwargs):
        """x0, and the variance and log variance of the ancestral step."""
        output = model(x, self.time(t), **kwargs)
        if self.variance == "learned_range":
            output, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
            low, high = math.log(self.beta_tilde(max(t, 1))), math.log(self.beta(t))
            log = low + (v + 1) / 2 * (high - low)
            variance = torch.exp(log)
        elif self.variance == "fixed_small":
            log = torch.full_like(x, math.log(self.beta_tilde(max(t, 1))))
            variance = torch.full_like(x, self.beta_tilde(t))
        else:
            variance = torch.full_like(x, self.beta(t) if t else self.beta_tilde(1))
            log = torch.log(variance)
        bar = self.bar[t]
        x0 = output if self.predict_xstart else (x - math.sqrt(1 - bar) * output) / math.sqrt(bar)
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        return (x0.clamp(-1, 1) if clip else x0), variance, log

    def mean(self, x0, x, t):
        bar, before = self.bar[t], self.before(t)
        c0 = math.sqrt(before) * self.beta(t) / (1 - bar)
        c1 = math.sqrt(1 - self.beta(t)) * (1 - before) / (1 - bar)
        return c0 * x0 + c1 * x

    def p_sample(self, model, x, t, draw, clip=True, denoised_fn=None, cond_fn=None, kwargs=None):
        kwargs = kwargs or {}
        x0, variance, log = self.evaluate(model, x, t, clip, denoised_fn, kwargs)
        noise = draw()  # at every t, before the gradient
        mean = self.mean(x0, x, t)
        if cond_fn is not None:
            mean = mean + variance * cond_fn(x, self.time(t), **kwargs)
        return mean + (torch.exp(log / 2) * noise if t else 0.0), x0

    def ddim_sample(
        self, model, x, t, draw, clip=True, denoised_fn=None, cond_fn=None, kwargs=None, eta=0.0
    ):
        kwargs, bar, before = kwargs or {}, self.bar[t], self.before(t)
        x0 = self.evaluate(model, x, t, clip, denoised_fn, kwargs)[0]
        epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        if cond_fn is not None:
            epsilon = epsilon - math.sqrt(1 - bar) * cond_fn(x, self.time(t), **kwargs)
            x0 = (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
        noise = draw()  # at every t and eta, after the gradient
        sigma = eta * math.sqrt((1 - before) / (1 - bar)) * math.sqrt(1 - bar / before)
        left = math.sqrt(1 - before - sigma**2) if t else 0.0
        return math.sqrt(before) * x0 + left * epsilon + (sigma * noise if t else 0.0), x0

    def reverse(self, model, x, t, clip=True, denoised_fn=None, kwargs=None):
        bar, after = self.bar[t], self.after(t)
        x0 = self.evaluate(model, x, t, clip, denoised_fn, kwargs or {})[0]
        epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        return math.sqrt(after) * x0 + math.sqrt(1 - after) * epsilon, x0
