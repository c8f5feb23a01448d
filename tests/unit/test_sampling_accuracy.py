# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Samplers against distributions whose velocity is known exactly: what they give, and how fast their error falls."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_vrpo import SiTTransformer2DModel
from diffusers_vrpo.models import ddpm
from diffusers_vrpo.pipelines.scheduling_sit_sde import SiTSDEScheduler
from support.models import TINY
from support.pipelines import ALPHA_BAR, FLOW_SIGMAS, quiet_pipeline


# Weights, means and standard deviations of the data, by class; class 2 is "no class".
MIXTURE = ([0.3, 0.7], [-1.0, 0.8], [0.3, 0.4])
CONDITIONAL, UNCONDITIONAL = ([1.0], [0.7], [0.5]), ([1.0], [-0.2], [0.9])
CLASSES = (MIXTURE, CONDITIONAL, UNCONDITIONAL)


class ExactMixture(SiTTransformer2DModel):
    """The exact velocity or noise of independent numbers from a mixture of Gaussians, without a network."""

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        if self.config.prediction_type == "epsilon":
            signal, noise = ALPHA_BAR[timestep.long()].sqrt(), (1 - ALPHA_BAR[timestep.long()]).sqrt()
        else:
            signal, noise = 1 - timestep, timestep
        x0 = [
            self.posterior_mean(x, signal, noise, *CLASSES[label])
            for x, label in zip(hidden_states, class_labels.tolist())
        ]
        epsilon = (hidden_states - signal * torch.stack(x0)) / noise
        return (epsilon if self.config.prediction_type == "epsilon" else epsilon - torch.stack(x0),)

    @staticmethod
    def posterior_mean(x, signal, noise, weights, means, stds):
        """E[x0 | x], where x = signal x0 + noise n."""
        weights, means, stds = (torch.tensor(values).reshape(-1, 1, 1, 1) for values in (weights, means, stds))
        variance = (signal * stds) ** 2 + noise**2
        of_component = means + signal * stds**2 / variance * (x - signal * means)
        logits = weights.log() - (x - signal * means) ** 2 / (2 * variance) - variance.log() / 2
        return (logits.softmax(0) * of_component).sum(0)


def exact_pipeline(scheduler, **config):
    config = {**TINY, "in_channels": 1, "num_classes": 2, "null_class_id": 2, **config}
    return quiet_pipeline(ExactMixture(**config), scheduler)


def normal_quantiles(n: int) -> torch.Tensor:
    """n numbers that stand for N(0, 1), with its mean and standard deviation, float32 `[1,1,32,n/32]`."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = math.sqrt(2) * torch.erfinv(2 * p - 1)
    return (z / z.std(correction=0)).float().reshape(1, 1, 32, -1)


def mixture_cdf(x: torch.Tensor) -> torch.Tensor:
    parts = (w * torch.special.ndtr((x - m) / s) for w, m, s in zip(*MIXTURE))
    return sum(parts)


def to_data(z: torch.Tensor) -> torch.Tensor:
    """Where the exact flow takes noise: in one dimension it keeps the order, so F(x0) = Phi(z). By bisection."""
    p, low, high = torch.special.ndtr(z.double()), torch.full_like(z, -9.0).double(), torch.full_like(z, 9.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        below = mixture_cdf(middle) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


def flow_error(pipeline, steps) -> tuple[float, float]:
    """Root mean square of where the sampler goes from where the exact flow does, and the relative error of std."""
    z = normal_quantiles(4096)
    x0 = to_data(z)
    images = pipeline(0, latents=z, num_inference_steps=steps, guidance_scale=1, output_type="latent").images
    return (images - x0).square().mean().sqrt().item(), (images.std() / x0.std() - 1).item()


# Without guidance


@pytest.mark.parametrize(
    "scheduler, steps, at_least, at_most",
    [
        (FlowMatchEulerDiscreteScheduler(), (32, 64, 128), 1.9, 2.1),
        (FlowMatchHeunDiscreteScheduler(), (32, 64, 128), 3.8, 4.4),
        # These start at t = 0.999 (UniPC in old versions), which leaves an error of a thousandth at any number of steps.
        (UniPCMultistepScheduler(**FLOW_SIGMAS), (8, 16, 32), 3.0, 7.0),
        (DPMSolverMultistepScheduler(**FLOW_SIGMAS), (8, 16, 32), 3.0, 5.0),
    ],
    ids=["euler", "heun", "unipc", "dpmsolver++"],
)
def test_each_number_goes_where_the_exact_flow_takes_it(scheduler, steps, at_least, at_most):
    pipeline = exact_pipeline(scheduler)
    errors = [flow_error(pipeline, n)[0] for n in steps]
    for error, of_twice_the_steps in zip(errors, errors[1:]):
        assert at_least < error / of_twice_the_steps < at_most
    error, std_error = flow_error(pipeline, 250)
    assert error < 0.005 and abs(std_error) < 0.01


@pytest.mark.parametrize(
    "scheduler, steps, at_least",
    [
        (DDIMScheduler(**ddpm.SCHEDULER_CONFIG, timestep_spacing="trailing"), (25, 50, 100, 200), 1.9),
        (DPMSolverMultistepScheduler(), (16, 32, 64), 2.2),
        (UniPCMultistepScheduler(), (16, 32, 64), 2.2),
    ],
    ids=["ddim", "dpmsolver++", "unipc"],
)
def test_the_same_of_models_that_predict_noise(scheduler, steps, at_least):
    pipeline = exact_pipeline(scheduler, prediction_type="epsilon")
    errors = [flow_error(pipeline, n)[0] for n in steps]
    assert all(error / of_twice_the_steps > at_least for error, of_twice_the_steps in zip(errors, errors[1:]))
    error, std_error = flow_error(pipeline, 250)
    assert error < 0.006 and abs(std_error) < 0.01


@pytest.mark.parametrize(
    "scheduler, config",
    [(SiTSDEScheduler(), {}), (DDPMScheduler(**ddpm.SCHEDULER_CONFIG), {"prediction_type": "epsilon"})],
    ids=["sde", "ddpm"],
)
def test_stochastic_samplers_give_the_mixture(scheduler, config):
    x0 = to_data(normal_quantiles(4096))
    assert x0.mean().item() == pytest.approx(0.26, abs=1e-4)
    z = torch.randn(4, 1, 256, 256, generator=torch.Generator().manual_seed(1))
    pipeline, std_errors = exact_pipeline(scheduler, **config), []
    for steps in (10, 50, 250):
        images = pipeline(
            [0] * 4,
            latents=z,
            num_inference_steps=steps,
            guidance_scale=1,
            output_type="latent",
            generator=torch.Generator().manual_seed(2),
        ).images
        std_errors.append(abs(images.std() / x0.std() - 1).item())
    assert std_errors[0] > std_errors[1] > std_errors[2] and std_errors[2] < 0.02
    assert images.mean().item() == pytest.approx(0.26, abs=0.005)
    for border in (-1.5, -1.0, -0.25, 0.5, 0.8, 1.5):
        share = mixture_cdf(torch.tensor(border, dtype=torch.float64)).item()
        assert (images < border).double().mean().item() == pytest.approx(share, abs=0.006)


def test_the_sde_without_chance():
    mean, std = CONDITIONAL[1][0], CONDITIONAL[2][0]
    moments = {n: sde_moments(n) for n in (25, 50, 100, 200, 400, 250)}
    assert all(m == pytest.approx(mean, abs=1e-9) for m, _ in moments.values())
    assert moments[250][1] == pytest.approx(std, rel=0.02)
    # With more and more steps it goes to the exact process up to t = 0.04, and the step without noise from there.
    t = SiTSDEScheduler().config.last_step_size
    slope, _ = velocity_coefficients(t, *CONDITIONAL)
    limit = (1 - t * (1 + (2 - t) * slope)) * math.sqrt(((1 - t) * std) ** 2 + t**2)
    for n in (50, 100, 200):
        assert 1.8 < (moments[n][1] - limit) / (moments[2 * n][1] - limit) < 2.1
    assert limit == pytest.approx(0.99 * std, rel=2e-3)


# With guidance


def velocity_coefficients(t: float, weights, means, stds) -> tuple[float, float]:
    """a, b of the velocity `a x + b` of a single Gaussian."""
    (mean,), (std,) = means, stds
    slope = (t - (1 - t) * std**2) / (((1 - t) * std) ** 2 + t**2)
    return slope, -slope * (1 - t) * mean - mean


def guided_moments(scale: float, interval: tuple[float, float], sde: bool) -> tuple[float, float]:
    """Mean and standard deviation at t = 0 of the guided process from N(0, 1) at t = 1, by Runge-Kutta in fine steps.

    The guided velocity is `a x + b`. ODE: m' = a m + b, V' = 2 a V. SDE with w = 2 t, backward in time:
    m' = m + (2 - t) (a m + b), V' = 2 (1 + (2 - t) a) V - 2 t.
    """
    edges = sorted({0.0, *interval, 1.0}, reverse=True)
    moments = np.array([0.0, 1.0])
    for high, low in zip(edges, edges[1:]):
        # Constant in between, and so smooth.
        w = scale if interval[0] <= (low + high) / 2 <= interval[1] else 1.0

        def rate(t, moments, w=w):
            of_class, of_null = (np.array(velocity_coefficients(t, *c)) for c in (CONDITIONAL, UNCONDITIONAL))
            a, b = of_null + w * (of_class - of_null)
            m, v = moments
            if sde:
                return np.array([m + (2 - t) * (a * m + b), 2 * (1 + (2 - t) * a) * v - 2 * t])
            return np.array([a * m + b, 2 * a * v])

        h = (low - high) / 1000
        for t in high + h * np.arange(1000):
            k1 = rate(t, moments)
            k2 = rate(t + h / 2, moments + h / 2 * k1)
            k3 = rate(t + h / 2, moments + h / 2 * k2)
            k4 = rate(t + h, moments + h * k3)
            moments = moments + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return moments[0], math.sqrt(moments[1])


def sde_moments(steps: int) -> tuple[float, float]:
    """Mean and standard deviation that the scheduler gives for CONDITIONAL, without chance.

    With a velocity that is linear in x so is a step: `x -> A x + B + C noise`, read off from three calls.
    """
    scheduler = SiTSDEScheduler()
    scheduler.set_timesteps(steps)
    mean, variance = 0.0, 1.0
    for i in range(steps):
        a, b = velocity_coefficients(scheduler.sigmas[i].item(), *CONDITIONAL)
        x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).reshape(3, 1)
        noise = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1)
        scheduler.set_begin_index(i)
        scheduler._step_index = None
        at_0, at_1, noisy = (
            scheduler.step(a * x + b, scheduler.timesteps[i], x, noise=noise).prev_sample.flatten().tolist()
        )
        mean = (at_1 - at_0) * mean + at_0
        variance = (at_1 - at_0) ** 2 * variance + (noisy - at_0) ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.7), (0.2, 0.7)])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(**FLOW_SIGMAS),
        UniPCMultistepScheduler(**FLOW_SIGMAS),
        SiTSDEScheduler(),
    ],
    ids=["euler", "heun", "dpmsolver++", "unipc", "sde"],
)
def test_guided_moments(scheduler, interval):
    sde = isinstance(scheduler, SiTSDEScheduler)
    # A step goes by the t that it starts from: the last guided one ends below the interval.
    mean, std = guided_moments(2.0, (max(0.0, interval[0] - 1 / 250), interval[1]), sde)
    # Guidance moved them: the test is not of the class alone.
    assert mean > 0.9 and std < 0.4
    z = normal_quantiles(4096)
    if sde:
        z = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(1))
        z = (z - z.mean()) / z.std()
    images = exact_pipeline(scheduler)(
        1,
        latents=z,
        num_inference_steps=250,
        guidance_scale=2.0,
        guidance_interval=interval,
        output_type="latent",
        generator=torch.Generator().manual_seed(2),
    ).images
    assert images.mean().item() == pytest.approx(mean, abs=0.004)
    assert images.std().item() == pytest.approx(std, rel=0.02 if sde else 0.01)


def test_the_error_of_guided_moments_falls_with_the_steps():
    pipeline, z = exact_pipeline(FlowMatchEulerDiscreteScheduler()), normal_quantiles(4096)
    mean, std = guided_moments(2.0, (0.0, 1.0), sde=False)
    errors = []
    for steps in (50, 100, 200):
        images = pipeline(1, latents=z, num_inference_steps=steps, guidance_scale=2.0, output_type="latent").images
        errors.append(std - images.std().item())
    assert 1.9 < errors[0] / errors[1] < 2.1 and 1.9 < errors[1] / errors[2] < 2.1
