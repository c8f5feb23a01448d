# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The diffusion of DiT against diffusers' scheduler and against distributions written out."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from diffusers_vrpo.models import ddpm
from diffusers_vrpo.models.flow import forward_process, interpolate
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel


SCHEDULER = DDPMScheduler(**ddpm.SCHEDULER_CONFIG)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_added_as_diffusers_adds_it():
    x0, noise, timestep = draw(4, 3, 2, 2), draw(4, 3, 2, 2, seed=1), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(ddpm.add_noise(x0, noise, timestep), SCHEDULER.add_noise(x0, noise, timestep))


def test_flow_time_is_the_same_noise_level():
    timestep = torch.arange(0, 1000, 37)
    x0, noise = draw(len(timestep), 5), draw(len(timestep), 5, seed=1)
    t = ddpm.flow_time(timestep)
    assert ((t[1:] - t[:-1]) > 0).all() and t[0] > 0 and t[-1] < 1
    alpha_bar = SCHEDULER.alphas_cumprod[timestep][:, None]
    scaled = ddpm.add_noise(x0, noise, timestep) / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())
    torch.testing.assert_close(interpolate(x0, noise, t), scaled, atol=1e-5, rtol=1e-5)


def test_discrete_timesteps_are_equally_likely():
    timestep = ddpm.discrete_timestep((torch.arange(10_000) + 0.5) / 10_000)
    assert torch.equal(timestep.bincount(), torch.full((1000,), 10))
    assert ddpm.discrete_timestep(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_variational_bound_is_the_kl_of_the_posteriors():
    x0, noise, epsilon = draw(3, 6), draw(3, 6, seed=1), draw(3, 6, seed=2)
    variance, timestep = 0.7 * draw(3, 6, seed=3), torch.tensor([1, 77, 999])
    x_n = ddpm.add_noise(x0, noise, timestep)
    bound = ddpm.variational_bound(epsilon, variance, x0, x_n, timestep)
    for i, n in enumerate(timestep.tolist()):
        abar, beta = SCHEDULER.alphas_cumprod.double()[n], SCHEDULER.betas.double()[n]
        before = SCHEDULER.alphas_cumprod.double()[n - 1]

        def posterior_mean(x):
            return (
                before.sqrt() * beta * x + (1 - beta).sqrt() * (1 - before) * x_n[i].double()  # noqa: B023
            ) / (1 - abar)  # noqa: B023

        beta_tilde = beta * (1 - before) / (1 - abar)
        predicted_x0 = (x_n[i].double() - (1 - abar).sqrt() * epsilon[i].double()) / abar.sqrt()
        share = (variance[i].double() + 1) / 2
        log_variance = share * beta.log() + (1 - share) * beta_tilde.log()
        kl = kl_divergence(
            Normal(posterior_mean(x0[i].double()), beta_tilde.sqrt()),
            Normal(posterior_mean(predicted_x0), (log_variance / 2).exp()),
        )
        assert bound[i].item() == pytest.approx(kl.mean().item() / math.log(2), rel=2e-3)


def test_variational_bound_of_the_last_step_is_a_likelihood_of_bins():
    # Over all values of a pixel the probabilities sum to 1.
    values = torch.linspace(-1, 1, 256)
    x_n = torch.full((256, 1), 0.3)
    zeros, timestep = torch.zeros(256, 1), torch.zeros(256, dtype=torch.long)
    bits = ddpm.variational_bound(zeros + 0.4, zeros, values[:, None], x_n, timestep)
    assert (2.0**-bits).sum().item() == pytest.approx(1, abs=1e-3)
    assert bits.argmin().item() == pytest.approx(127.5 * 1.3, abs=2)


def test_only_the_variance_is_trained_by_it():
    epsilon, variance = draw(2, 4, seed=2).requires_grad_(), torch.zeros(2, 4, requires_grad=True)
    x0, timestep = draw(2, 4), torch.tensor([0, 3])
    x_n = ddpm.add_noise(x0, draw(2, 4, seed=1), timestep)
    ddpm.variational_bound(epsilon, variance, x0, x_n, timestep).sum().backward()
    assert epsilon.grad is None and (variance.grad != 0).all()
    # The exact noise leaves only the variances' difference, which is least for the posterior's (v = -1).
    noise = draw(1, 4, seed=1)
    bound = [
        ddpm.variational_bound(
            noise, torch.full((1, 4), v), x0[:1], ddpm.add_noise(x0[:1], noise, timestep[1:]), timestep[1:]
        )
        for v in (-1.0, 0.0, 1.0)
    ]
    assert bound[0] < bound[1] < bound[2] and bound[0].item() == pytest.approx(0, abs=1e-5)


def test_bound_is_finite_in_half_precision_and_far_away():
    far = torch.full((3, 4), 30.0)
    bound = ddpm.variational_bound(far.bfloat16(), far.bfloat16() / 30, far, -far, torch.tensor([0, 1, 999]))
    assert bound.isfinite().all() and bound.dtype == torch.float32


def test_forward_process_of_every_convention():
    x0, noise, u = draw(3, 4), draw(3, 4, seed=1), torch.tensor([0.0, 0.25, 0.999])

    def config(**changes):
        return SiTTransformer2DModel(sample_size=2, num_layers=1, num_attention_heads=1, **changes).config

    x_t, timestep, target, t = forward_process(x0, noise, u, config())
    torch.testing.assert_close((x_t, timestep, target, t), (interpolate(x0, noise, u), u, noise - x0, u))
    flipped = forward_process(x0, noise, u, config(time_direction="noise_to_data"))
    torch.testing.assert_close(flipped, (x_t, 1 - u, x0 - noise, u))
    x_n, timestep, target, t = forward_process(x0, noise, u, config(prediction_type="epsilon"))
    assert timestep.tolist() == [0, 250, 999] and torch.equal(target, noise)
    torch.testing.assert_close(x_n, ddpm.add_noise(x0, noise, timestep))
    torch.testing.assert_close(t, ddpm.flow_time(timestep))
