# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Residual token weights and how the losses use them."""

import pytest
import torch

from diffusers_vrpo.alignment.policy import expected_policy_loss, repa_loss, sampled_policy_loss
from diffusers_vrpo.alignment.rewards import normalize
from diffusers_vrpo.alignment.token_weights import residual_weights, target_distance


def tokens(batch=3, count=6, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mu, y = (normalize(torch.randn(batch, count, dim, generator=generator)).double() for _ in range(2))
    return mu, y, torch.arange(4).expand(batch, -1)


def test_weights_by_hand():
    y = torch.tensor([1.0, 0.0]).expand(1, 4, 2)
    # Cosines 1, 0.5, 0.5, -1: distances 0, 0.25, 0.25, 1 of mean 0.375.
    mu = torch.tensor([[[1.0, 0.0], [0.5, 0.75**0.5], [0.5, -(0.75**0.5)], [-1.0, 0.0]]])
    torch.testing.assert_close(target_distance(mu, y), torch.tensor([[0.0, 0.25, 0.25, 1.0]]))
    clipped = torch.tensor([[0.25, 2 / 3, 2 / 3, 8 / 3]])  # 0 is clipped to 1/4
    torch.testing.assert_close(residual_weights(mu, y), clipped / clipped.mean())
    # One of twenty tokens is far: 20 times the mean is clipped to 4.
    many = y[:, :1].repeat(1, 20, 1)
    far = many.clone()
    far[0, 7] = -far[0, 7]
    weights = residual_weights(far, many)
    assert weights.argmax() == 7 and weights[0, 7] / weights[0, 0] == pytest.approx(16)


def test_weights_have_mean_one_for_each_image_and_no_gradient():
    mu, y, _ = tokens()
    weights = residual_weights(mu.requires_grad_(), y)
    assert not weights.requires_grad
    torch.testing.assert_close(weights.mean(1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(weights[1], residual_weights(mu[1:2], y[1:2])[0])
    order = target_distance(mu, y).argsort(dim=1)
    assert (weights.gather(1, order).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("case", ["agree", "opposite", "one token", "no target"])
def test_weights_without_a_difference_are_one(case):
    mu, y, _ = tokens(count=1 if case == "one token" else 6)
    mu = {"agree": y, "opposite": -y}.get(case, mu)
    y = y * 0 if case == "no target" else y
    torch.testing.assert_close(residual_weights(mu.float(), y.float()), torch.ones(mu.shape[:2]))


def test_the_gradient_of_the_weighted_loss_matches_finite_differences():
    mu, y, _ = tokens()
    weights = residual_weights(mu, y)
    point = mu.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(repa_loss(point, y, weights).sum(), point)
    direction = torch.randn(mu.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ahead, behind = (repa_loss(mu + h * direction, y, weights) for h in (1e-5, -1e-5))
    torch.testing.assert_close((ahead - behind) / 2e-5, (gradient * direction).sum((1, 2)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(repa_loss(mu, y, weights), -(weights * (1 - 2 * target_distance(mu, y))).mean(1))


@pytest.mark.parametrize("estimator", ["repa", "expected", "sampled"])
def test_each_tokens_gradient_is_multiplied_by_its_weight(estimator):
    mu, y, subset = tokens()
    mu, y = mu.float(), y.float()
    weights, shares = residual_weights(mu, y), torch.tensor([[0.7, 0.3]]).expand(3, -1)
    xi = torch.randn(8, *mu.shape, generator=torch.Generator().manual_seed(2))

    def gradient(weights):
        point = mu.clone().requires_grad_()
        if estimator == "repa":
            loss = repa_loss(point, y, weights)
        elif estimator == "expected":
            loss = expected_policy_loss(point, y, subset, shares, shares * 0.1, token_weights=weights)[0]
        else:
            loss = sampled_policy_loss(point, y, subset, xi, shares, token_weights=weights)[0]
        return torch.autograd.grad(loss.sum(), point)[0]

    torch.testing.assert_close(gradient(weights), weights.unsqueeze(-1) * gradient(None))
    torch.testing.assert_close(gradient(torch.ones_like(weights)), gradient(None))
