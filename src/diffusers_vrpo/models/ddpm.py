# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The diffusion that DiT trains on: 1000 steps of a linear schedule, noise prediction, learned variance.

The formulas are those of DDPM (arXiv 2006.11239) and Improved DDPM (arXiv 2102.09672), the betas those of diffusers'
`DDPMScheduler`.
"""

import functools
import math

import torch
from diffusers import DDPMScheduler


NUM_TIMESTEPS = 1000
# Arguments of diffusers' DDPM, DDIM and DPM++ schedulers for models trained on this diffusion; latents are not
# clipped.
SCHEDULER_CONFIG = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
}


@functools.cache
def _tables(device: torch.device) -> dict[str, torch.Tensor]:
    """The tables of the formulas by timestep, computed in float64 and kept on the device in float32 `[1000]`."""
    beta = DDPMScheduler(**SCHEDULER_CONFIG).betas.double()
    alpha_bar = (1 - beta).cumprod(0)
    previous = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    tables = {
        "signal": alpha_bar.sqrt(),
        "noise": (1 - alpha_bar).sqrt(),
        "flow_time": (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt()),
        "log_beta": beta.log(),
        # At n = 0, the posterior variance is 0, and Improved DDPM uses that of n = 1 instead.
        "log_posterior_variance": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
        "mean_from_x0": beta * previous.sqrt() / (1 - alpha_bar),
        "mean_from_xn": (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
    }
    return {name: table.float().to(device) for name, table in tables.items()}


def _at(name: str, timestep: torch.Tensor, ndim: int) -> torch.Tensor:
    """Looks up a table at timesteps `[B]`, in a shape that broadcasts over a tensor of `ndim` dimensions."""
    return _tables(timestep.device)[name][timestep].reshape(-1, *[1] * (ndim - 1))


def discrete_timestep(u: torch.Tensor) -> torch.Tensor:
    """Maps `u`, uniform in [0, 1), to equally likely integer timesteps 0 ... 999."""
    return (u * NUM_TIMESTEPS).long().clamp(0, NUM_TIMESTEPS - 1)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Returns `x_n = sqrt(abar_n) x0 + sqrt(1 - abar_n) noise`, `[B, ...]`, for the timesteps n, int64 `[B]`."""
    return _at("signal", timestep, x0.ndim) * x0 + _at("noise", timestep, x0.ndim) * noise


def predicted_x0(epsilon: torch.Tensor, x_n: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Returns `x0 = (x_n - sqrt(1 - abar_n) epsilon) / sqrt(abar_n)`, `[B, ...]`, for the timesteps n, int64 `[B]`."""
    return (x_n - _at("noise", timestep, x_n.ndim) * epsilon) / _at("signal", timestep, x_n.ndim)


def flow_time(timestep: torch.Tensor) -> torch.Tensor:
    """The flow time with the same noise level as a timestep, float32 `[B]`.

    It is `t = sqrt(1 - abar) / (sqrt(abar) + sqrt(1 - abar))`, for which `x_n / (sqrt(abar) + sqrt(1 - abar))` equals
    `(1 - t) x0 + t noise`. The timestep bins and weights of the alignment loss use this t.
    """
    return _at("flow_time", timestep, 1)


def variational_bound(
    epsilon: torch.Tensor, variance: torch.Tensor, x0: torch.Tensor, x_n: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Computes each example's term of the variational bound, in bits per dimension, which trains the learned variance.

    The term is `KL(q(x_{n-1} | x_n, x0) || p(x_{n-1} | x_n))` or, at n = 0, the negative log-likelihood of x0 in bins
    of width 2/255 (arXiv 2006.11239, eq. 13). The model's log-variance interpolates between `log beta` and the
    posterior's `log beta_tilde`: `(v+1)/2 log beta + (1-v)/2 log beta_tilde` (arXiv 2102.09672, eq. 15).

    Args:
        epsilon: predicted noise `[B, ...]`; no gradient flows into it.
        variance: v, the model's variance channels, `[B, ...]`, about [-1, 1].
        x0, x_n: clean and noisy latents `[B, ...]`.
        timestep: int64 `[B]`.

    Returns:
        float32 `[B]`.
    """
    epsilon, variance, x0, x_n = epsilon.detach().float(), variance.float(), x0.float(), x_n.float()

    def at(name):
        return _at(name, timestep, x0.ndim)

    x0_prediction = predicted_x0(epsilon, x_n, timestep)
    true_mean = at("mean_from_x0") * x0 + at("mean_from_xn") * x_n
    mean = at("mean_from_x0") * x0_prediction + at("mean_from_xn") * x_n
    log_min = at("log_posterior_variance")
    log_variance = (variance + 1) / 2 * at("log_beta") + (1 - variance) / 2 * log_min

    kl = 0.5 * (
        log_variance
        - log_min
        - 1
        + (log_min - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    # The likelihood of x0 is the Gaussian's mass in the bin of x0; the first and last bins are open.
    std = (0.5 * log_variance).exp()
    upper = torch.special.ndtr((x0 - mean + 1 / 255) / std)
    lower = torch.special.ndtr((x0 - mean - 1 / 255) / std)
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    nll = -mass.clamp_min(1e-12).log()
    bound = torch.where(timestep.reshape(-1, *[1] * (x0.ndim - 1)) == 0, nll, kl)
    return bound.flatten(1).mean(1) / math.log(2)
