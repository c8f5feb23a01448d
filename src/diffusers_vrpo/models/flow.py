# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Linear interpolants between data, t = 0, and noise, t = 1 (SiT, arXiv 2401.08740; docs/method.md).

The whole package uses this t; `forward_process` converts it for checkpoints with other conventions.
"""

import torch

from . import ddpm


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Returns `x_t = (1 - t) x0 + t noise`; `x0`, `noise` `[B, ...]`, `t [B]` in [0, 1]."""
    t = t.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The target `v = dx_t/dt = noise - x0`, `[B, ...]`."""
    return noise - x0


def forward_process(
    x0: torch.Tensor, noise: torch.Tensor, u: torch.Tensor, config
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes noisy latents, and the timestep and target of a transformer with this `config`.

    Args:
        x0, noise: `[B, ...]`.
        u: as `sample_time` returns it, in [0, 1), `[B]`.
        config: the transformer's config, of which `prediction_type` and `time_direction` are used.

    Returns:
        x_t `[B, ...]`; the timestep `[B]` in the transformer's convention; the target of its prediction `[B, ...]`;
        and the flow time t `[B]`, where 1 is noise. For an epsilon model, t is the flow time with the same noise level
        (`ddpm.flow_time`).
    """
    if config.prediction_type == "epsilon":
        timestep = ddpm.discrete_timestep(u)
        return ddpm.add_noise(x0, noise, timestep), timestep, noise, ddpm.flow_time(timestep)
    x_t, v = interpolate(x0, noise, u), velocity(x0, noise)
    if config.time_direction == "noise_to_data":
        return x_t, 1 - u, -v, u
    return x_t, u, v, u


def sample_time(
    u: torch.Tensor, timestep_sampling: str = "uniform", logit_mean: float = 0.0, logit_std: float = 1.0
) -> torch.Tensor:
    """Maps uniform numbers to the times that a run trains on, by the inverse of their distribution function.

    Args:
        u: uniform in [0, 1), `[B]`.
        timestep_sampling: `"uniform"`, which returns `u`, or `"logit_normal"` (Stable Diffusion 3, arXiv 2403.03206),
            where the logit `log(t / (1 - t))` is normally distributed.
        logit_mean, logit_std: mean and standard deviation of the logit. A mean above 0 prefers noise.

    Returns:
        float32 `[B]` in [0, 1), for `forward_process`: t of a flow, or the place n / 1000 in the schedule of a
        diffusion.
    """
    if timestep_sampling == "uniform":
        return u
    t = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u.double()))
    return t.float().clamp(max=1 - 2**-24)  # the largest float32 below 1


def typical_flow_times(
    prediction_type: str, timestep_sampling: str = "uniform", logit_mean: float = 0.0, logit_std: float = 1.0
) -> torch.Tensor:
    """Returns 100,000 evenly spaced quantiles of a run's flow times, to compute means over them; float32."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = sample_time(u, timestep_sampling, logit_mean, logit_std).float()
    return ddpm.flow_time(ddpm.discrete_timestep(t)) if prediction_type == "epsilon" else t


def x0_estimate(
    prediction: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor, t: torch.Tensor, config
) -> torch.Tensor:
    """Computes the clean latents that a prediction implies, `x0_hat = x_t - t v`, float32 `[B, ...]`.

    Args:
        prediction: output of a transformer with this `config`, `[B, ...]`.
        x_t, timestep, t: as `forward_process` returns them.
        config: the transformer's config.
    """
    prediction, x_t = prediction.float(), x_t.float()
    if config.prediction_type == "epsilon":
        return ddpm.predicted_x0(prediction, x_t, timestep)
    v = -prediction if config.time_direction == "noise_to_data" else prediction
    return x_t - t.reshape(-1, *[1] * (x_t.ndim - 1)) * v


def flow_time(u: torch.Tensor, config) -> torch.Tensor:
    """The flow time t `[B]` that `forward_process` returns for `u [B]`."""
    return ddpm.flow_time(ddpm.discrete_timestep(u)) if config.prediction_type == "epsilon" else u


def flow_matching_gradient(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The gradient of each example's `L_FM,i` at its prediction, `2 (v_theta - v) / D`, float32 `[B, ...]`."""
    return (prediction.float() - target.float()) * (2 / prediction[0].numel())


def flow_matching_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Computes each example's `L_FM,i = mean_d (v_theta - v)^2` (for epsilon models, of the noise), float32 `[B]`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
