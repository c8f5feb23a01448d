# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import torch

from diffusers_vrpo.models.flow import flow_matching_loss, interpolate, velocity


def test_interpolant_and_its_velocity():
    torch.manual_seed(0)
    x0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 0.3, 1.0])
    x_t = interpolate(x0, noise, t)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.7 * x0[1] + 0.3 * noise[1])
    step = 1e-3
    slope = (interpolate(x0, noise, t + step) - interpolate(x0, noise, t - step)) / (2 * step)
    torch.testing.assert_close(slope, velocity(x0, noise), atol=1e-3, rtol=1e-3)


def test_flow_matching_loss_is_per_sample_and_float32():
    prediction = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16)
    loss = flow_matching_loss(prediction, torch.zeros(2, 2, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [5.0, 0.0]
