# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from diffusers_vrpo.alignment.attach import alignment_layers
from diffusers_vrpo.alignment.policy import (
    clipped_objective,
    expected_policy_loss,
    group_relative_advantages,
    kl_penalty,
    log_probability,
    repa_loss,
    sample_actions,
    sampled_policy_loss,
    timestep_weight,
    token_shares,
)
from diffusers_vrpo.alignment.rewards import (
    BUILT_IN,
    TokenReward,
    normalize,
    semantic_reward,
    structural_reward,
    tangent,
)
from diffusers_vrpo.alignment.rewards import reward_gradients as gradients_of_rewards
from diffusers_vrpo.errors import InputError


TOKEN_REWARDS = ("semantic", "structural")


def reward_gradients(mu, y, subset):
    """Of the two built-in rewards."""
    return gradients_of_rewards([BUILT_IN[name] for name in TOKEN_REWARDS], mu, y, subset)


def random_tokens(batch=2, tokens=6, dim=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.nn.functional.normalize(torch.randn(batch, tokens, dim, generator=generator, dtype=dtype), dim=-1)
    y = torch.nn.functional.normalize(torch.randn(batch, tokens, dim, generator=generator, dtype=dtype), dim=-1)
    subset = torch.stack([torch.randperm(tokens, generator=generator)[:4] for _ in range(batch)])
    return mu, y, subset


def test_rewards_by_hand():
    mu = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    y = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    tokens = torch.tensor([[0, 1]])
    torch.testing.assert_close(semantic_reward(mu, y), torch.tensor([[1.0, 0.8]]))
    # Relations of mu: identity. Of y: off the diagonal 0.6.
    torch.testing.assert_close(structural_reward(mu, mu, y, tokens), torch.tensor([[-0.18, -0.18]]))
    torch.testing.assert_close(repa_loss(mu, y), torch.tensor([-0.9]))
    rewards, _ = reward_gradients(mu, y, tokens)
    torch.testing.assert_close(rewards, torch.tensor([[[1.0, -0.18], [0.8, -0.18]]]))


@pytest.mark.parametrize("reward", TOKEN_REWARDS)
def test_gradients_match_finite_differences_on_the_sphere(reward):
    mu, y, tokens = random_tokens()
    _, gradients = reward_gradients(mu, y, tokens)
    gradient = gradients[TOKEN_REWARDS.index(reward)]

    def value(action):
        action = torch.nn.functional.normalize(action, dim=-1)
        return semantic_reward(action, y) if reward == "semantic" else structural_reward(action, mu, y, tokens)

    numeric, step = torch.zeros_like(mu), 1e-5
    for d in range(mu.shape[-1]):
        shift = torch.zeros_like(mu)
        shift[..., d] = step
        numeric[..., d] = (value(mu + shift) - value(mu - shift)) / (2 * step)
    torch.testing.assert_close(gradient, numeric, atol=1e-8, rtol=1e-6)
    assert (gradient * mu).sum(-1).abs().max() < 1e-12


def test_the_surrogate_is_zero_and_its_gradient_is_the_weighted_unit_gradient():
    mu, y, tokens = random_tokens(dtype=torch.float32)
    mu.requires_grad_()
    shares, tau = torch.tensor([[0.7, 0.3], [0.4, 0.6]]), torch.tensor([[0.1, 0.01], [0.0, 0.2]])
    loss, rewards, squares = expected_policy_loss(mu, y, tokens, shares, tau)
    assert loss.abs().max() < 1e-6
    loss.sum().backward()
    _, gradients = reward_gradients(mu.detach(), y, tokens)
    expected = torch.zeros_like(mu)
    for k, g in enumerate(gradients):
        unit = g / (g.norm(dim=-1, keepdim=True) + tau[:, k, None, None])
        expected = expected - shares[:, k, None, None] * unit / mu.shape[1]
    torch.testing.assert_close(mu.grad, expected)
    torch.testing.assert_close(rewards[:, 0], semantic_reward(mu.detach(), y).mean(1))
    torch.testing.assert_close(squares[:, 1], gradients[1].square().sum(-1).mean(1))


def test_with_the_semantic_reward_alone_it_is_repa_over_sin_theta():
    mu, y, tokens = random_tokens(dtype=torch.float32)
    tau = 0.05
    a, b = mu.clone().requires_grad_(), mu.clone().requires_grad_()
    shares = torch.tensor([[1.0, 0.0]]).expand(2, 2)
    expected_policy_loss(a, y, tokens, shares, torch.full((2, 2), tau))[0].sum().backward()
    repa_loss(b, y).sum().backward()
    sin_theta = (1 - (mu * y).sum(-1, keepdim=True).square()).sqrt()
    torch.testing.assert_close(a.grad, tangent(mu, b.grad) / (sin_theta + tau))


def test_following_the_loss_raises_both_rewards():
    mu, y, tokens = random_tokens(dtype=torch.float32, tokens=8, dim=16)
    before, _ = reward_gradients(mu, y, torch.arange(8).expand(2, 8))
    raw = mu.clone().requires_grad_()
    optimizer = torch.optim.SGD([raw], lr=0.2)
    for _ in range(100):
        loss, _, _ = expected_policy_loss(
            normalize(raw), y, torch.arange(8).expand(2, 8), torch.full((2, 2), 0.5), torch.full((2, 2), 0.01)
        )
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    after, _ = reward_gradients(normalize(raw.detach()), y, torch.arange(8).expand(2, 8))
    assert (after.mean((0, 1)) > before.mean((0, 1))).all()


@pytest.mark.parametrize("case", ["zeros", "constant", "one token", "aligned", "bfloat16", "autocast"])
def test_no_nan(case):
    tokens = 1 if case == "one token" else 4
    raw, features = torch.randn(2, tokens, 8), torch.randn(2, tokens, 8)
    if case == "zeros":
        raw, features = raw * 0, features * 0
    elif case == "constant":
        features = torch.ones_like(features)
    elif case == "aligned":
        features = raw.clone()
    elif case == "bfloat16":
        raw, features = raw.bfloat16(), features.bfloat16()
    raw.requires_grad_()
    subset = torch.arange(tokens).expand(2, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        loss, rewards, squares = expected_policy_loss(
            normalize(raw), normalize(features), subset, torch.full((2, 2), 0.5), torch.zeros(2, 2)
        )
    loss.sum().backward()
    assert rewards.dtype == torch.float32
    for tensor in (loss, rewards, squares, raw.grad):
        assert torch.isfinite(tensor).all()


def test_layer_scopes():
    assert [alignment_layers("early", depth) for depth in (28, 12, 24)] == [[8], [4], [7]]
    assert alignment_layers("mid", 28) == [14]
    assert alignment_layers("all", 3) == [1, 2, 3]
    assert alignment_layers("8,4", 12) == [4, 8]
    for wrong in ("late", "0", "13", "4,x"):
        with pytest.raises(InputError, match="`layer_scope`"):
            alignment_layers(wrong, 12)


def test_actions_and_their_log_probability_by_hand():
    mu = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    xi = torch.tensor([5.0, 2.0, 0.0, -1.0]).expand(1, 1, 1, 4)
    actions = sample_actions(mu, xi, noise_scale=0.2)
    # The part along mu is taken off, the rest is scaled by 0.2 / sqrt(4).
    torch.testing.assert_close(actions, torch.tensor([[[[1.0, 0.2, 0.0, -0.1]]]]))
    # -4 * (0.04 + 0.01) / (2 * 0.04), which is -(4 + 1) / 2.
    torch.testing.assert_close(log_probability(actions, mu, 0.2), torch.tensor([[[-2.5]]]))


def test_log_probability_is_the_gaussians():
    generator = torch.Generator().manual_seed(0)
    mu = normalize(torch.randn(1, 1, 12, generator=generator))
    actions = sample_actions(mu, torch.randn(50, 1, 1, 12, generator=generator), 0.3)
    gaussian = torch.distributions.Normal(mu, 0.3 / math.sqrt(12)).log_prob(actions).sum(-1)
    ours = log_probability(actions, mu, 0.3)
    torch.testing.assert_close(ours - ours[0], gaussian - gaussian[0], atol=1e-4, rtol=1e-4)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    advantages = group_relative_advantages(rewards, noise_scale=0.1, embed_dim=100)
    one = 1 / (math.sqrt(2 / 3) + 1e-3 * 0.1 / 10)
    torch.testing.assert_close(advantages, torch.tensor([[-one, 0.0], [0.0, 0.0], [one, 0.0]]))
    assert group_relative_advantages(torch.randn(1, 3), 0.1, 100).abs().max() == 0
    # Where the spread is delta itself, advantages are half of what they would be.
    delta = 1e-3 * 0.1 / 10
    torch.testing.assert_close(
        group_relative_advantages(torch.tensor([-delta, delta], dtype=torch.float64), 0.1, 100),
        torch.tensor([-0.5, 0.5], dtype=torch.float64),
    )


def test_clipping_acts_only_outside_of_the_range_and_on_the_side_of_the_advantage():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5] * 2)
    log_ratio = ratio.log().requires_grad_()
    advantages = torch.tensor([2.0] * 5 + [-2.0] * 5)
    objective, clipped = clipped_objective(log_ratio, advantages, clip_range=0.2)
    torch.testing.assert_close(
        objective, torch.tensor([1.0, 1.8, 2.0, 2.2, 2.4, -1.6, -1.8, -2.0, -2.2, -3.0]), rtol=1e-5, atol=0
    )
    assert clipped.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    objective.sum().backward()
    torch.testing.assert_close(log_ratio.grad, ratio * advantages * (1 - clipped))


def sampled_inputs(dim=8, tokens=3, group=8, batch=1, seed=0):
    mu, y, _ = random_tokens(1, tokens, dim, torch.float32, seed)
    subset = torch.arange(tokens)[None]
    xi = torch.randn(group, batch, tokens, dim, generator=torch.Generator().manual_seed(seed))
    return mu.expand(batch, -1, -1), y.expand(batch, -1, -1), subset.expand(batch, -1), xi


@pytest.mark.parametrize("shares", [[1.0, 0.0], [0.0, 1.0], [0.6, 0.4]])
def test_the_mean_of_sampled_gradients_is_the_expected_gradient(shares):
    mu, y, tokens, xi = sampled_inputs(batch=20000)
    shares = torch.tensor([shares])
    sampled = mu.clone().requires_grad_()
    sampled_policy_loss(sampled, y, tokens, xi, shares.expand(len(mu), -1), noise_scale=0.1)[0].mean().backward()
    sampled = sampled.grad.sum(0)
    expected = mu[:1].clone().requires_grad_()
    expected_policy_loss(expected, y[:1], tokens[:1], shares, torch.full((1, 2), 1e-3))[0].backward()
    expected = expected.grad[0]
    assert torch.cosine_similarity(sampled.flatten(), expected.flatten(), dim=0) > 0.99
    # E[std_G] of 8 standard normal numbers.
    factor = math.sqrt(2 / 8) * math.exp(math.lgamma(8 / 2) - math.lgamma(7 / 2))
    assert factor == pytest.approx(0.9027, abs=1e-4)
    assert (sampled.norm() / expected.norm()).item() == pytest.approx(factor, rel=0.02)


def test_one_sampled_gradient_is_the_plain_policy_gradient_at_ratio_one():
    mu, y, tokens, xi = sampled_inputs(batch=2)
    shares, scale = torch.tensor([[0.7, 0.3], [0.2, 0.8]]), 0.1 / math.sqrt(8)
    leaf = mu.clone().requires_grad_()
    loss, rewards, squares, spread, clip_fraction = sampled_policy_loss(leaf, y, tokens, xi, shares)
    loss.sum().backward()
    actions = sample_actions(mu, xi)
    raw = [semantic_reward(normalize(actions), y), structural_reward(normalize(actions), mu, y, tokens)]
    advantages = sum(shares[:, k, None] * group_relative_advantages(reward, 0.1, 8) for k, reward in enumerate(raw))
    # grad log pi = (a - mu) / scale^2; averaged over G and N.
    gradient = -(advantages[..., None] * (actions - mu) / scale**2).mean(0) / 3
    torch.testing.assert_close(leaf.grad, scale * gradient)
    _, expected_rewards, expected_squares = expected_policy_loss(mu, y, tokens, shares, shares)
    torch.testing.assert_close(rewards, expected_rewards)
    torch.testing.assert_close(squares, expected_squares)
    torch.testing.assert_close(spread[:, 1], raw[1].std(0, correction=0).mean(1))
    assert loss.abs().max() < 1e-6 and not clip_fraction.any()
    assert loss.shape == clip_fraction.shape == (2,) and spread.shape == (2, 2)


def test_more_updates_per_draw_use_the_ratio_and_clip_it():
    mu_old, y, tokens, xi = sampled_inputs(batch=2, group=64)
    shares = torch.full((2, 2), 0.5)

    def at(mu, **options):
        leaf = mu.clone().requires_grad_()
        loss, *_, clip_fraction = sampled_policy_loss(leaf, y, tokens, xi, shares, mu_old=mu_old, **options)
        loss.sum().backward()
        return loss.detach(), leaf.grad, clip_fraction

    leaf = mu_old.clone().requires_grad_()
    sampled_policy_loss(leaf, y, tokens, xi, shares)[0].sum().backward()
    same, gradient, clip_fraction = at(mu_old)
    torch.testing.assert_close(gradient, leaf.grad)
    assert not clip_fraction.any()
    # A step along the gradient gains; far enough, ratios leave the range and clipping takes the gradient away.
    near, _, few = at(normalize(mu_old - 0.002 * gradient))
    far, _, many = at(normalize(mu_old - 0.2 * gradient))
    assert (near < same - 1e-5).all() and (few == 0).all() and (many > 0.2).all()
    unclipped, _, none = at(normalize(mu_old - 0.2 * gradient), clip_range=1e9)
    assert (unclipped <= far).all() and not none.any()
    # By hand. Actions keep the rewards that they had when they were drawn.
    mu, actions = normalize(mu_old - 0.2 * gradient), sample_actions(mu_old, xi)
    units = normalize(actions)
    raw = [semantic_reward(units, y), structural_reward(units, mu_old, y, tokens)]
    advantages = sum(0.5 * group_relative_advantages(reward, 0.1, 8) for reward in raw)
    objective, _ = clipped_objective(log_probability(actions, mu) - log_probability(actions, mu_old), advantages)
    torch.testing.assert_close(far, -0.1 / math.sqrt(8) * objective.mean((0, 2)))
    torch.testing.assert_close(at(mu, actions=actions)[0], far)


def test_kl_by_hand():
    mu = sampled_inputs(tokens=1, dim=4)[0].clone().requires_grad_()
    reference = normalize(mu.detach() + torch.tensor([0.0, 0.3, 0.0, 0.0]))
    kl = kl_penalty(mu, reference)
    # (sigma / sqrt(E)) * E ||mu - mu_ref||^2 / (2 sigma^2) with sigma = 0.1, E = 4.
    torch.testing.assert_close(kl, (0.05 * 4 / (2 * 0.01) * (mu - reference).square().sum()).reshape(1))
    (gradient,) = torch.autograd.grad(kl.sum(), mu)
    torch.testing.assert_close(gradient, 0.05 * 4 / 0.01 * (mu - reference).detach(), rtol=1e-4, atol=1e-4)
    assert kl_penalty(mu, mu).item() == 0


def test_token_shares_divide_what_fidelity_leaves():
    shares = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(token_shares(shares), torch.tensor([[0.6, 0.4], [0.5, 0.5]]))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_unit_vectors_is_that_of_a_division_by_the_norm(transposed):
    """To the bit, for maps of conv projectors, too, whose channels come first."""
    torch.manual_seed(0)
    x, weights = torch.randn(2, 7, 48), torch.randn(2, 7, 48)
    x[0, 0], x[1, 2] = 0, 1e-8
    x = x.mT.contiguous().mT if transposed else x
    gradients = []
    for function in (
        normalize,
        lambda x: x / torch.nn.functional.threshold(x.norm(dim=-1, keepdim=True), 1e-6, math.inf),
    ):
        raw = x.clone().requires_grad_()
        gradients += torch.autograd.grad((function(raw) * weights).sum(), raw)
    assert torch.equal(*gradients) and not gradients[0][0, 0].any()


def test_short_vectors_have_no_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-9, 0.0]], requires_grad=True)
    unit = normalize(x)
    assert unit.tolist()[0] == unit.tolist()[2] == [0, 0]
    torch.testing.assert_close(unit[1], torch.tensor([0.6, 0.8]))
    (unit @ torch.tensor([1.0, 1.0])).sum().backward()
    assert x.grad[[0, 2]].abs().max() == 0 and x.grad[1].abs().max() > 0.01
    half = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    expected_policy_loss(
        normalize(half)[None],
        normalize(torch.ones(1, 2, 3)),
        torch.tensor([[0, 1]]),
        torch.ones(1, 2) / 2,
        torch.zeros(1, 2),
    )[0].sum().backward()
    assert half.grad.abs().max() == 0


def test_the_rewards_variance_falls_as_one_over_the_dimension():
    theta, sigma = 1.1, 0.01
    constants = []
    for dim in (16, 64, 256, 1024):
        generator = torch.Generator().manual_seed(0)
        mu, other = torch.zeros(1, 1, dim), torch.zeros(1, 1, dim)
        mu[..., 0] = other[..., 1] = 1.0
        xi = torch.randn(15000, 1, 1, dim, generator=generator)
        y = math.cos(theta) * mu + math.sin(theta) * other
        rewards = semantic_reward(normalize(sample_actions(mu, xi, sigma)), y)
        constants.append(dim * rewards.double().var().item() / math.sin(theta) ** 2)
    assert constants == pytest.approx([sigma**2] * 4, rel=0.05)


@pytest.mark.parametrize("case", ["zeros", "constant", "one token", "aligned", "one action", "autocast"])
def test_no_nan_in_sampled(case):
    tokens, group = 1 if case == "one token" else 4, 1 if case == "one action" else 8
    raw, features = torch.randn(2, tokens, 8), torch.randn(2, tokens, 8)
    if case == "zeros":
        raw, features = raw * 0, features * 0
    elif case == "constant":
        features = torch.ones_like(features)
    elif case == "aligned":
        features = raw.clone()
    raw.requires_grad_()
    mu, y, xi = normalize(raw), normalize(features), torch.randn(group, 2, tokens, 8)

    def run(autocast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            subset, shares = torch.arange(tokens).expand(2, -1), torch.full((2, 2), 0.5)
            old = mu.detach()
            return sampled_policy_loss(mu, y, subset, xi, shares, mu_old=old)

    outputs = run(case == "autocast")
    outputs[0].sum().backward()
    torch.testing.assert_close(outputs, run(False), rtol=0, atol=0)
    for tensor in (*outputs, raw.grad):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()


def test_timestep_weights_have_mean_one():
    t = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    for kind in ("uniform", "low_noise"):
        weight = timestep_weight(t, kind)
        assert weight.dtype == torch.float32 and weight.shape == t.shape
        assert weight.double().mean().item() == pytest.approx(1, abs=1e-6)
    weight = timestep_weight(torch.tensor([0.0, 0.7, 1.0]), "low_noise")
    assert weight.tolist() == pytest.approx([1.42882, 0.71441, 0.00353], abs=1e-5)
    assert timestep_weight(torch.tensor([0.0, 1.0]), "uniform").tolist() == [1, 1]


def test_a_reward_without_a_closed_form_has_the_gradient_of_autograd():
    """The built-in rewards, given as plain functions, have the values and gradients of their closed forms."""
    mu, y, subset = random_tokens()
    shares, tau = torch.tensor([[0.3, 0.7]]).double().expand(2, -1), torch.zeros(2, 2).double()
    plain = [TokenReward(name, BUILT_IN[name].function) for name in TOKEN_REWARDS]
    values, gradients = gradients_of_rewards(plain, mu, y, subset)
    expected, closed_forms = reward_gradients(mu, y, subset)
    torch.testing.assert_close(values, expected)
    for gradient, closed_form in zip(gradients, closed_forms, strict=True):
        torch.testing.assert_close(gradient, closed_form)
    leaves = [mu.clone().requires_grad_() for _ in range(2)]
    expected_policy_loss(leaves[0], y, subset, shares, tau)[0].sum().backward()
    expected_policy_loss(leaves[1], y, subset, shares, tau, plain)[0].sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    # One of K rewards with a share of zero changes nothing.
    third = TokenReward("third", lambda action, mu, y, subset: action.sum(-1))
    leaf = mu.clone().requires_grad_()
    wider, zeros = torch.cat([shares, torch.zeros(2, 1)], dim=1), torch.zeros(2, 3).double()
    expected_policy_loss(leaf, y, subset, wider, zeros, [*plain, third])[0].sum().backward()
    torch.testing.assert_close(leaf.grad, leaves[0].grad)
