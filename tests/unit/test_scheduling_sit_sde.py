# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from diffusers_vrpo.pipelines.scheduling_sit_sde import SiTSDEScheduler
from support.pipelines import MEAN, STD, exact_gaussian, moment_errors, quiet_pipeline


def test_the_grid():
    scheduler = SiTSDEScheduler()
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.76, 0.52, 0.28, 0.04, 0.0]))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 760.0, 520.0, 280.0, 40.0]))
    assert len(scheduler) == 1000 and scheduler.order == 1 and scheduler.init_noise_sigma == 1
    scheduler = SiTSDEScheduler(num_train_timesteps=10, last_step_size=0.2)
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([10.0, 2.0]))


def test_a_step_is_the_sde_written_with_its_score():
    scheduler = SiTSDEScheduler()
    scheduler.set_timesteps(4)
    x, v, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    for i, timestep in enumerate(scheduler.timesteps):
        t, t_next = scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item()
        score, w = -(x + (1 - t) * v) / t, 2 * t
        expected = x + (t_next - t) * (v - w * score / 2)
        if i < 3:
            expected = expected + (w * (t - t_next)) ** 0.5 * noise
        assert scheduler.scale_model_input(x, timestep) is x
        stepped = scheduler.step(v, timestep, x, noise=noise).prev_sample
        torch.testing.assert_close(stepped, expected)
        assert scheduler.step_index == i + 1
        x = stepped


def test_generators_draw_the_noise_and_the_state_keeps_float32():
    scheduler = SiTSDEScheduler()
    scheduler.set_timesteps(3)
    x, v = torch.randn(2, 2, 3, 4, 4)

    def step(sample, model_output, generator):
        scheduler.set_timesteps(3)
        return scheduler.step(model_output, scheduler.timesteps[0], sample, generator, return_dict=False)[0]

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = step(x, v, generators(3, 4))
    assert torch.equal(both[1:], step(x[1:], v[1:], generators(4)[0]))
    noise = torch.randn(1, 3, 4, 4, generator=generators(4)[0])
    scheduler.set_timesteps(3)
    given = scheduler.step(v[1:], scheduler.timesteps[0], x[1:], noise=noise).prev_sample
    assert torch.equal(both[1:], given)
    assert step(x.bfloat16(), v.bfloat16(), None).dtype == torch.float32
    assert step(x.double(), v.bfloat16(), None).dtype == torch.float64


def test_starting_later():
    scheduler = SiTSDEScheduler()
    scheduler.set_timesteps(4)
    x, v, noise = torch.randn(3, 1, 3, 4, 4)
    by_timestep = scheduler.step(v, scheduler.timesteps[2], x, noise=noise).prev_sample
    assert scheduler.step_index == 3
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.set_begin_index(2)
    assert torch.equal(scheduler.step(v, scheduler.timesteps[2], x, noise=noise).prev_sample, by_timestep)
    x0 = torch.randn(2, 3, 4, 4)
    noisy = scheduler.add_noise(x0, torch.ones_like(x0), torch.tensor([250.0, 1000.0]))
    torch.testing.assert_close(noisy, torch.stack([0.75 * x0[0] + 0.25, torch.ones(3, 4, 4)]))
    assert torch.equal(scheduler.scale_noise(x0, torch.tensor([250.0, 1000.0]), torch.ones_like(x0)), noisy)


def test_errors():
    scheduler = SiTSDEScheduler()
    for num_inference_steps in (1, 2.5, "4", None):
        with pytest.raises(ValueError, match="`num_inference_steps` must be an integer and at least 2"):
            scheduler.set_timesteps(num_inference_steps)
    for num_train_timesteps in (1, 10.5, "1000"):
        with pytest.raises(ValueError, match="`num_train_timesteps` must be an integer and at least 2"):
            SiTSDEScheduler(num_train_timesteps)
    for last_step_size in (0, 1, -0.1, float("nan"), "0.04"):
        with pytest.raises(ValueError, match="`last_step_size` must lie between 0 and 1"):
            SiTSDEScheduler(last_step_size=last_step_size)
    scheduler.set_timesteps(4)
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="timestep 3 is not one of `scheduler.timesteps`"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match=r"`noise` has shape \(3, 4, 4\)"):
        scheduler.step(x, scheduler.timesteps[0], x, noise=x[0])


def test_save_load_and_conversion(tmp_path):
    SiTSDEScheduler(last_step_size=0.1).save_pretrained(tmp_path)
    loaded = SiTSDEScheduler.from_pretrained(tmp_path)
    assert loaded.config.last_step_size == 0.1 and loaded.config.num_train_timesteps == 1000
    converted = SiTSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler(num_train_timesteps=500).config)
    assert converted.config.num_train_timesteps == 500 and converted.config.last_step_size == 0.04
    assert FlowMatchEulerDiscreteScheduler in converted.compatibles


@pytest.mark.parametrize(
    "scheduler, steps, tolerance",
    [
        (SiTSDEScheduler(), (10, 50, 250), 0.02),
        (FlowMatchEulerDiscreteScheduler(), (10, 50, 250), 0.01),
        (FlowMatchHeunDiscreteScheduler(), (10, 25, 50), 0.01),
    ],
)
def test_the_exact_velocity_of_a_gaussian_gives_its_moments(scheduler, steps, tolerance):
    pipeline = quiet_pipeline(exact_gaussian(), scheduler)
    errors = [moment_errors(pipeline, n) for n in steps]
    assert max(errors[-1]) < tolerance
    # The mean is exact up to chance at any number of steps.
    assert all(mean_error < 0.01 for mean_error, _ in errors)
    assert errors[0][1] > errors[1][1] > errors[2][1]


def test_it_is_not_stochastic_sampling():
    # diffusers' option of that name draws all of x_t's noise anew at every step: the deviation comes out too small.
    pipeline = quiet_pipeline(exact_gaussian(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    mean_error, std_error = moment_errors(pipeline, 50)
    assert mean_error * MEAN < 0.02 and std_error * STD > 0.1
