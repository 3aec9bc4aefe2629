"""Normalizing flows and flow matching in plain PyTorch, as a text to read and to test against.

A flow is an invertible map f from data x to latents z of a simple density. Probability is conserved
in every small volume, p(x) |dx| = p_z(z) |dz|, and f stretches volumes by |det df/dx|:

    log p(x) = log p_z(f(x)) + log |det df/dx|                         (change of variables)

`change_of_variables` takes the determinant of a Jacobian, D^3 operations; the two flows below are
built so that it is cheap. `RealNVP` has triangular Jacobians. `ContinuousFlow` follows an ODE
dx/dt = v(x, t) from data at t = 0 to noise at t = 1. A short step is x + h v, whose Jacobian
I + h dv/dx has log det = h tr(dv/dx) + O(h^2), so the logarithms add up to the integral of a trace,

    log p_0(x_0) = log p_1(x_1) + int_0^1 div v(x_t, t) dt,

the instantaneous change of variables (Chen et al. 2018, arXiv:1806.07366, theorem 1). There v is
any network: what makes it invertible is that an ODE can be followed backwards.

Times are those of the project's flow schedule: t = 0 is data and t = 1 noise, as in rectified flow
reversed; papers on flow matching count the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdiff.ops import randn
from fastdiff.reference.diffusion import to_prediction
from fastdiff.reference.distributions import normal_log_pdf

__all__ = [
    "AffineCoupling", "ContinuousFlow", "RealNVP", "RealNVPConfig", "change_of_variables",
    "divergence", "flow_matching_loss", "gaussian_velocity", "hutchinson", "standard_normal",
]  # fmt: skip

# (x, t) -> dx/dt, for x (N, *S) and t (N,)
Velocity = Callable[[Tensor, Tensor], Tensor]


def standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) of each sample, `(N,)`."""
    return normal_log_pdf(z).flatten(1).sum(1)


def change_of_variables(
    f: Callable[[Tensor], Tensor], x: Tensor, log_prob: Callable[[Tensor], Tensor] = standard_normal
) -> Tensor:
    """log p(x) = log p_z(f(x)) + log |det df/dx|, the determinant taken as one.

    Args:
        f: invertible, `(N, D)` to `(N, D)`, each sample by itself.
        x: `(N, D)`. log_prob: of the latents, `(N, D)` to `(N,)`.

    Returns:
        `(N,)`, in nats.
    """
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: f(one[None])[0]))(x)
    stretch: Tensor = torch.linalg.slogdet(jacobian).logabsdet
    return log_prob(f(x)) + stretch


# --- affine couplings ------------------------------------------------------------------------


class AffineCoupling(nn.Module):
    """One half of the coordinates scales and shifts the other: Dinh et al. 2017, arXiv:1605.08803.

    With x_a kept and x_b to be changed, z_a = x_a and z_b = x_b exp(s(x_a)) + t(x_a) (equations 4
    and 5). The Jacobian is block triangular, as z_a does not depend on x_b, with the diagonal 1 and
    exp(s): log det = sum s, whatever the networks s and t are. They are never inverted either:
    x_b = (z_b - t(z_a)) exp(-s(z_a)).

    Args:
        keep: `(D,)` booleans, the coordinates of x_a; not all and not none.
        hidden: width of the network that gives s and t.
    """

    keep: Tensor

    def __init__(self, keep: Tensor, hidden: int = 64) -> None:
        super().__init__()
        # a tensor of the device "meta" has no values to look at
        one = not keep.is_meta and bool(keep.all() == keep.any())
        if keep.dim() != 1 or keep.dtype != torch.bool or one:
            raise ValueError(
                f"AffineCoupling: keep must be (D,) booleans of both values, got {keep}"
            )
        self.register_buffer("keep", keep)
        self.net = nn.Sequential(
            nn.Linear(len(keep), hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * len(keep)),
        )
        # the authors' form of s: tanh, times a learned scale, cannot run away in a step of training
        self.bound = nn.Parameter(torch.ones(len(keep)))

    def _scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.net(torch.where(self.keep, x, 0.0)).chunk(2, dim=1)
        free = (~self.keep).to(x.dtype)
        return free * self.bound * torch.tanh(s), free * t

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z `(N, D)` and log |det dz/dx| `(N,)`."""
        s, t = self._scale_and_shift(x)
        return x * torch.exp(s) + t, s.sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """x `(N, D)`."""
        s, t = self._scale_and_shift(z)
        return (z - t) * torch.exp(-s)


@dataclass(frozen=True)
class RealNVPConfig:
    """The arguments of a `RealNVP`, for a checkpoint."""

    dim: int
    layers: int = 6
    hidden: int = 64

    def to_config(self) -> dict[str, Any]:
        """The fields as a JSON-able dict; `from_config` inverts it."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RealNVPConfig:
        """Build from a dict as `to_config` gives; TypeError names an unknown key."""
        return cls(**config)


class RealNVP(nn.Module):
    """Couplings in a row that keep each half of the coordinates in turn.

    log p(x) is log N(z; 0, I) and the sum of the layers' log determinants, since the Jacobian of a
    composition is a product. It is exact: training maximises it, and no bound.

    Args:
        dim: D, at least 2. layers: number of couplings, at least 2, so that all coordinates move.
        hidden: width of the networks.
    """

    def __init__(self, dim: int, layers: int = 6, hidden: int = 64) -> None:
        super().__init__()
        if dim < 2 or layers < 2:
            raise ValueError(f"RealNVP: dim and layers must be at least 2, got {dim} and {layers}")
        even = torch.arange(dim) % 2 == 0
        self.dim, self.config = dim, RealNVPConfig(dim, layers, hidden)
        self.layers = nn.ModuleList(
            AffineCoupling(even if i % 2 == 0 else ~even, hidden) for i in range(layers)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z `(N, D)` and log |det dz/dx| `(N,)`."""
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        """x `(N, D)`."""
        for layer in reversed(self.layers):
            z = cast(AffineCoupling, layer).inverse(z)
        return z

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `(N,)`, in nats."""
        z, log_det = self.forward(x)
        return standard_normal(z) + log_det

    def sample(self, seeds: Any) -> Tensor:
        """`(len(seeds), D)`, of noise drawn as in `fastdiff.randn`."""
        like = next(self.parameters())
        return self.inverse(randn(seeds, (self.dim,), dtype=like.dtype, device=like.device))


# --- continuous flows ------------------------------------------------------------------------


def divergence(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """v and its divergence tr(dv/dx), one derivative for each of the D elements of a sample.

    Returns:
        v of the shape of x, and `(N,)`. Differentiable, except under `torch.no_grad`.
    """
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        v = velocity(x, t)
        flat, trace = v.flatten(1), x.new_zeros(len(x))
        if not v.requires_grad:  # it depends on the time alone
            return v, trace
        # samples do not mix, so the gradient of a sum over them is that of each
        for i in range(flat.shape[1]):
            (row,) = torch.autograd.grad(
                flat[:, i].sum(), x, retain_graph=True, create_graph=keep, allow_unused=True
            )
            if row is not None:
                trace = trace + row.flatten(1)[:, i]
    return v, trace


def hutchinson(velocity: Velocity, x: Tensor, t: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """v and an unbiased estimate of its divergence, by one derivative: e^T (dv/dx) e.

    E[e^T A e] = sum_ij A_ij E[e_i e_j] = tr A for any probe e of mean 0 and covariance I
    (Hutchinson 1990; FFJORD, Grathwohl et al. 2019, arXiv:1810.01367). Signs have the least
    variance, twice the squares off the diagonal of the symmetric part of A, and none for D = 1;
    normal probes add twice those on it.

    Args:
        probe: the shape of x.

    Returns:
        As `divergence`.
    """
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        v = velocity(x, t)
        if not v.requires_grad:  # it depends on the time alone
            return v, x.new_zeros(len(x))
        (row,) = torch.autograd.grad((v * probe).sum(), x, create_graph=keep, allow_unused=True)
    return v, x.new_zeros(len(x)) if row is None else (row * probe).flatten(1).sum(1)


class ContinuousFlow:
    """The flow of dx/dt = v(x, t) between data at t = 0 and N(0, I) at t = 1.

    Steps are those of the classical Runge-Kutta method of order 4, all alike, so that gradients
    flow through them and the error can be read from half as many. Under `torch.no_grad` nothing is
    kept for a backward pass. (`fastdiff.AdaptiveSampler` draws samples with error control.)

    Args:
        velocity: ``v(x, t)`` for x `(N, *S)` and t `(N,)`.
        steps: of the method, four evaluations each; at least 1.
    """

    def __init__(self, velocity: Velocity, steps: int = 32) -> None:
        if steps < 1:
            raise ValueError(f"ContinuousFlow: steps must be positive, got {steps}")
        self.velocity, self.steps = velocity, steps

    def encode(self, x: Tensor) -> Tensor:
        """Latents of data, the shape of x."""
        return self._integrate(lambda y, t: (self.velocity(y, t), y.new_zeros(())), x, 0.0, 1.0)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Data of latents: the same curve, followed backwards."""
        return self._integrate(lambda y, t: (self.velocity(y, t), y.new_zeros(())), z, 1.0, 0.0)[0]

    def log_prob(self, x: Tensor, probe: Tensor | None = None) -> Tensor:
        """log p_0(x) = log N(x_1; 0, I) + int_0^1 div v dt, `(N,)`, in nats.

        Args:
            x: `(N, *S)`, data.
            probe: None for the exact divergence, D derivatives an evaluation; or the shape of x,
                signs or normals, for Hutchinson's estimate. It is the same at all times, which
                keeps the ODE smooth; the curve of x does not depend on it, so the result is as
                unbiased as the divergence is.
        """
        if probe is None:
            end, integral = self._integrate(
                lambda y, t: divergence(self.velocity, y, t), x, 0.0, 1.0
            )
        else:
            fixed = probe
            end, integral = self._integrate(
                lambda y, t: hutchinson(self.velocity, y, t, fixed), x, 0.0, 1.0
            )
        return standard_normal(end) + integral

    def _integrate(
        self,
        slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        x: Tensor,
        start: float,
        end: float,
    ) -> tuple[Tensor, Tensor]:
        """Solve for x and for the integral of the second slope, from `start` to `end`."""
        h = (end - start) / self.steps
        total = x.new_zeros(len(x))
        for i in range(self.steps):
            t = x.new_full((len(x),), start + i * h)
            k1, d1 = slope(x, t)
            k2, d2 = slope(x + h / 2 * k1, t + h / 2)
            k3, d3 = slope(x + h / 2 * k2, t + h / 2)
            k4, d4 = slope(x + h * k3, t + h)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        return x, total


# --- flow matching ---------------------------------------------------------------------------


def flow_matching_loss(velocity: Velocity, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """|v(x_t, t) - (noise - x0)|^2 of each sample, the mean over its elements.

    Lipman et al. 2023 (arXiv:2210.02747), equation 23 with sigma_min = 0, for the path of
    conditional optimal transport: x_t = (1 - t) x0 + t noise, a straight line whose velocity is
    noise - x0. A regression finds the conditional mean, u(x, t) = E[noise - x0 | x_t = x], and that
    is the velocity which carries the marginal density p_t along: for any test function g,
    d/dt E[g(x_t)] = E[grad g(x_t) . (noise - x0)] = E[grad g(x_t) . u(x_t, t)], the continuity
    equation in weak form (their theorems 1 and 2). So the flow of u takes the data to the noise,
    although its curves are not the lines.

    Args:
        x0: data, `(N, *S)`. noise: unit normal, the same shape. t: `(N,)` in [0, 1].

    Returns:
        `(N,)`.
    """
    time = t.view(-1, *[1] * (x0.dim() - 1))
    x = (1 - time) * x0 + time * noise
    target = to_prediction("flow", x0, noise, 1 - time, time)
    return (velocity(x, t) - target).square().flatten(1).mean(1)


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """u(x, t) = E[noise - x0 | x_t = x] for data N(mean, scale^2), coordinate by coordinate.

    x_t has mean (1 - t) mean and variance s_t^2 = (1 - t)^2 scale^2 + t^2, and its covariance with
    noise - x0 is t - (1 - t) scale^2, which is half the slope of s_t^2. Regression of one Gaussian
    on another is linear:

        u = -mean + (t - (1 - t) scale^2) / s_t^2 (x - (1 - t) mean).

    Its flow scales the distance from the mean by s_t: (x_t - (1 - t) mean) / s_t is constant. The
    velocity of a mixture is `GaussianMixture.network(schedules.flow(), "flow")`.

    Args:
        x: `(N, *S)`. t: `(N,)`. mean, scale: broadcast against x; scale positive.
    """
    time = t.view(-1, *[1] * (x.dim() - 1))
    variance = ((1 - time) * scale).square() + time.square()
    gain = (time - (1 - time) * scale.square()) / variance
    return gain * (x - (1 - time) * mean) - mean
