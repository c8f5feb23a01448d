# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Rewards against numeric derivatives of the distances that they follow, advantages, and the loss of a tiny model."""

import math
from types import SimpleNamespace

import pytest
import torch
from sklearn.covariance import OAS

from diffusers_vrpo import SiTTransformer2DModel
from diffusers_vrpo.evaluation.metrics import frechet_distance, mean_and_covariance
from diffusers_vrpo.experimental.generative.objective import (
    add_balanced,
    class_log_probability,
    denoising_loss,
    frechet_influence,
    gaussian_kernel,
    mmd_witness,
    oas_shrinkage,
    sample_advantages,
    sample_policy_loss,
    shrink,
    stratified_times,
    transport_map,
    update_cost,
)
from diffusers_vrpo.models.flow import forward_process, x0_estimate


def gaussian(count, dim, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + shift


def moments(features, weights=None):
    """Weighted mean and biased covariance."""
    weights = torch.ones(len(features)).double() if weights is None else weights
    weights = weights / weights.sum()
    mean = weights @ features
    centred = features - mean
    return mean, (weights[:, None] * centred).T @ centred


def slope_and_correlation(x, y):
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / x.square().sum()).item(), ((x * y).sum() / (x.norm() * y.norm())).item()


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_influence_is_the_derivative_of_the_frechet_distance(shift):
    generated, real = gaussian(300, 8), moments(gaussian(400, 8, seed=1, shift=shift))
    mu, sigma = moments(generated)
    # Generated samples and points that are far from all.
    points = torch.cat([generated[:60], 3 * gaussian(20, 8, seed=2)])
    influence = frechet_influence(points, mu, real[0], transport_map(sigma, real[1]))
    eps, numeric = 1e-6, []
    for point in points:
        everything = torch.cat([generated, point[None]])
        distances = []
        for sign in (1, -1):
            weights = torch.full((301,), (1 - sign * eps) / 300, dtype=torch.float64)
            weights[-1] = sign * eps
            distances.append(frechet_distance(*real, *moments(everything, weights)))
        numeric.append((distances[0] - distances[1]) / (2 * eps))
    slope, correlation = slope_and_correlation(influence, -torch.tensor(numeric, dtype=torch.float64))
    assert correlation > 0.999999 and slope == pytest.approx(1, abs=1e-4)


def test_influence_tells_what_leaving_a_sample_out_does():
    generated, real = gaussian(200, 6), moments(gaussian(500, 6, seed=1, shift=0.2))
    mu, sigma = moments(generated)
    influence = frechet_influence(generated, mu, real[0], transport_map(sigma, real[1]))
    whole, without = frechet_distance(*real, mu, sigma), []
    for i in range(200):
        without.append(frechet_distance(*real, *moments(torch.cat([generated[:i], generated[i + 1 :]]))) - whole)
    slope, correlation = slope_and_correlation(influence, torch.tensor(without, dtype=torch.float64))
    assert correlation > 0.999 and slope == pytest.approx(1 / 200, rel=0.05)


def test_transport_map():
    sigma_g, sigma_r = moments(gaussian(300, 8))[1], moments(gaussian(300, 8, seed=1))[1]
    transport = transport_map(sigma_g, sigma_r)
    torch.testing.assert_close(transport @ sigma_g @ transport, sigma_r)
    torch.testing.assert_close(transport, transport.T)
    assert torch.linalg.eigvalsh(transport).min() > 0
    torch.testing.assert_close(transport_map(sigma_g, sigma_g), torch.eye(8).double())
    diagonal = transport_map(
        torch.diag(torch.tensor([4.0, 9.0]).double()), torch.diag(torch.tensor([1.0, 81.0]).double())
    )
    torch.testing.assert_close(diagonal, torch.diag(torch.tensor([0.5, 3.0]).double()))


def test_singular_covariances():
    """Fewer features than channels: finite, and with shrinkage the derivative along all of them."""
    generated, real = gaussian(10, 32), gaussian(12, 32, seed=1)
    (mu, sigma), (mu_r, sigma_r) = moments(generated), moments(real)
    for pair in ((sigma, sigma_r), (sigma, torch.eye(32).double()), (sigma, sigma)):
        transport = transport_map(*pair)
        influence = frechet_influence(gaussian(20, 32, seed=2), mu, mu_r, transport)
        assert influence.isfinite().all() and transport.abs().max() < 1e6
    # On the span of what there is it is the identity.
    torch.testing.assert_close(transport_map(sigma, sigma) @ sigma, sigma)
    amount = oas_shrinkage(sigma, 10)
    assert 0 < amount < 1
    torch.testing.assert_close(transport_map(*[shrink(sigma, amount)] * 2), torch.eye(32).double())


def test_influence_takes_float32_features_and_is_float64():
    generated, (mu_r, sigma_r) = gaussian(50, 4), moments(gaussian(60, 4, seed=1))
    mu, sigma = moments(generated)
    transport = transport_map(sigma, sigma_r)
    influence = frechet_influence(generated.float(), mu, mu_r, transport)
    assert influence.dtype == torch.float64 and influence.shape == (50,)
    torch.testing.assert_close(influence, frechet_influence(generated, mu, mu_r, transport), atol=1e-5, rtol=1e-5)


def test_witness_is_the_derivative_of_the_squared_mmd():
    generated, real, points = gaussian(40, 5), gaussian(30, 5, seed=1, shift=0.5), gaussian(25, 5, seed=2)
    everything = torch.cat([generated, points])

    def kernel(a, b):
        return torch.tensor([[math.exp(-((p - q) ** 2).sum() / (2 * 0.9**2)) for q in b] for p in a]).double()

    torch.testing.assert_close(gaussian_kernel(generated, real, 0.9), kernel(generated, real))
    k_gg, k_gr, k_rr = kernel(everything, everything), kernel(everything, real), kernel(real, real)

    def squared_mmd(weights):
        return weights @ k_gg @ weights - 2 * (weights @ k_gr).mean() + k_rr.mean()

    eps, start = 1e-4, torch.cat([torch.full((40,), 1 / 40), torch.zeros(25)]).double()
    numeric = []
    for i in range(25):
        moved = [(1 - sign * eps) * start + sign * eps * torch.eye(65).double()[40 + i] for sign in (1, -1)]
        numeric.append((squared_mmd(moved[0]) - squared_mmd(moved[1])) / (2 * eps))
    witness = mmd_witness(points, generated, real, 0.9)
    slope, correlation = slope_and_correlation(witness, -torch.stack(numeric))
    assert correlation > 0.999999 and slope == pytest.approx(1, abs=1e-6)


def test_shrinkage_is_that_of_the_paper():
    for count, dim in ((20, 200), (300, 200), (50, 10)):
        features = gaussian(count, dim)
        covariance = mean_and_covariance(features)[1]
        amount = oas_shrinkage(covariance, count)
        # It does not depend on the covariance's scale, biased or not; scikit-learn leaves 2/D out of eq. 23.
        assert amount == pytest.approx(oas_shrinkage(covariance * (count - 1) / count, count), rel=1e-9)
        assert amount == pytest.approx(OAS().fit(features.numpy()).shrinkage_, rel=3 / dim)
        square, trace = (covariance @ covariance).trace().item(), covariance.trace().item()
        numerator, denominator = (1 - 2 / dim) * square + trace**2, (count + 1 - 2 / dim) * (square - trace**2 / dim)
        assert amount == pytest.approx(min(1.0, numerator / denominator), rel=1e-9)


def test_shrinkage_at_the_ends():
    covariance = moments(gaussian(500, 6))[1]
    assert oas_shrinkage(covariance, 0) == 1 and oas_shrinkage(torch.eye(6).double(), 100) == 1
    assert oas_shrinkage(covariance, 10**9) < 1e-7
    assert oas_shrinkage(covariance, 100) > oas_shrinkage(covariance, 1000)
    assert oas_shrinkage(torch.zeros(6, 6).double(), 5) in (0, 1)
    torch.testing.assert_close(shrink(covariance, 0.0), covariance)
    sphere = shrink(covariance, 1.0)
    torch.testing.assert_close(sphere, covariance.trace() / 6 * torch.eye(6).double())
    assert shrink(covariance, 0.3).trace().item() == pytest.approx(covariance.trace().item())


def test_class_probability_by_hand():
    prototypes, centre = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 1.0])
    log_p = class_log_probability(torch.tensor([[6.0, 1.0], [4.0, 5.0]]), centre, prototypes, 0.5)
    expected = torch.tensor([[2.0, 0.0], [1.2, 1.6]]).log_softmax(1)
    torch.testing.assert_close(log_p, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


def some_rewards(groups=5, size=8, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(groups, size, count, generator=generator, dtype=torch.float64)
    return (
        rewards * torch.tensor([1.0, 3.0, 0.2]),
        torch.tensor([2.0, 1.0, 0.5]).double(),
        torch.tensor([0.5, 0.3, 0.2]),
    )


def test_advantages_by_hand():
    rewards = torch.tensor([[[1.0], [3.0]], [[10.0], [10.0]]])
    advantages, shares, zero_spread = sample_advantages(rewards, torch.tensor([5.0]), torch.ones(1))
    # Relative to the group -1, 1, 0, 0, over one number; over their std, the root of a half.
    expected = 3 * torch.tensor([[-(2**0.5) / 3, 2**0.5 / 3], [0, 0]]).tanh()
    torch.testing.assert_close(advantages, expected)
    assert shares.tolist() == [1] and zero_spread == 0.5

    # Two rewards: what the spread over the batch and over real images make of each.
    rewards = torch.stack([rewards[..., 0], torch.tensor([[2.0, 0.0], [4.0, 0.0]])], 2)
    std = [torch.tensor(column).double().std(correction=0).item() for column in ([1, 3, 10, 10], [2, 0, 4, 0])]
    first, second = std[0] + 0.5, std[1] + 0.2
    total = torch.tensor([-0.75 / first + 0.25 / second, 0.75 / first - 0.25 / second, 0.5 / second, -0.5 / second])
    advantages, shares, zero_spread = sample_advantages(rewards, torch.tensor([5.0, 2.0]), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(advantages.flatten(), 3 * (total / total.std(correction=0) / 3).tanh())
    parts = [0.75 / first * 0.5**0.5, 0.25 / second * 2.5**0.5]
    torch.testing.assert_close(shares, torch.tensor(parts) / sum(parts))
    assert zero_spread == 0


def test_neither_scale_nor_offset_of_a_reward_matters():
    rewards, real_std, weights = some_rewards()
    advantages, shares, _ = sample_advantages(rewards, real_std, weights)
    scale, offset = torch.tensor([1e-6, 40.0, 1e5]).double(), torch.tensor([1.0, -3e4, 7.0]).double()
    again, again_shares, _ = sample_advantages(rewards * scale + offset * scale, real_std * scale, weights)
    torch.testing.assert_close(again, advantages, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again_shares, shares)
    assert not torch.allclose(sample_advantages(-rewards, real_std, weights)[0], advantages)


def test_advantages_are_bounded_centred_and_shared_out():
    rewards, real_std, weights = some_rewards(groups=16, size=16)
    advantages, shares, zero_spread = sample_advantages(rewards, real_std, weights)
    assert advantages.dtype == torch.float32 and advantages.shape == (16, 16)
    assert advantages.mean().abs() < 0.02 and 0.8 < advantages.std() < 1
    assert shares.sum() == pytest.approx(1) and (shares > 0).all() and zero_spread == 0
    rewards[3, 4, 1] = 1e6
    advantages, shares, _ = sample_advantages(rewards, real_std, weights)
    assert 2.9 < advantages[3, 4] < 3 and advantages.abs().max() == advantages[3, 4]
    assert advantages.isfinite().all()


def test_a_better_class_has_no_advantage():
    rewards, real_std, weights = some_rewards()
    rewards[2] += 100
    advantages, _, _ = sample_advantages(rewards, real_std, weights)
    assert advantages.mean(1).abs().max() < 0.15
    advantages = sample_advantages(rewards[..., :1], real_std[:1], torch.ones(1))[0]
    assert (advantages.argsort(1) == rewards[..., 0].argsort(1)).all()


@pytest.mark.parametrize("real_std", [0.0, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4, 1e8, 1e12])
def test_equal_rewards_give_none(offset, real_std):
    rounding = torch.randn(4, 8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2e-16
    for rewards in (torch.full((4, 8, 1), offset).double(), offset * (1 + rounding)):
        advantages, shares, zero_spread = sample_advantages(rewards, torch.tensor([real_std]), torch.ones(1))
        assert (advantages == 0).all() and shares.isfinite().all() and zero_spread == 1
    # A reward that says nothing leaves the other's advantages as they are.
    other = some_rewards()[0][:4, :, :1]
    both = sample_advantages(torch.cat([other, rewards], 2), torch.tensor([1.0, real_std]), torch.tensor([0.5, 0.5]))
    alone = sample_advantages(other, torch.tensor([1.0]), torch.ones(1))
    torch.testing.assert_close(both[0], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1], torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Likelihood and loss


def test_denoising_loss_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    estimates = torch.tensor([[[2.0, 2.0], [1.0, 5.0]], [[0.5, -0.5], [0.0, 0.0]]], requires_grad=True)
    loss, scale = denoising_loss(estimates, x)
    torch.testing.assert_close(scale, torch.tensor([[0.5, 1.5], [0.5, 1e-6]]))
    torch.testing.assert_close(loss, torch.tensor([(0.5 / 0.5 + 4.5 / 1.5) / 2, 0.5 / 2]))
    assert not scale.requires_grad
    loss.sum().backward()
    # 2 (x0_hat - x) / (D scale) / M: no gradient through the denominators.
    expected = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, -0.5], [0.0, 0.0]]])
    torch.testing.assert_close(estimates.grad, expected)
    again = denoising_loss(estimates, x, torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
    torch.testing.assert_close(again[0], torch.tensor([(0.5 + 1.5) / 2, 0.125]))
    assert denoising_loss(estimates.bfloat16(), x.bfloat16())[0].dtype == torch.float32


def test_clipping_acts_on_the_side_that_the_advantage_pushes_to():
    # The ratio is over, within and under 1 +- 0.1.
    old, loss = torch.ones(6), torch.tensor([0.8, 1.0, 1.2, 0.8, 1.0, 1.2], requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    values, ratio, clipped = sample_policy_loss(loss, old, advantages, 0.1)
    rho = [math.exp(0.2), 1, math.exp(-0.2)]
    torch.testing.assert_close(ratio, torch.tensor(rho * 2))
    torch.testing.assert_close(values, torch.tensor([-2.2, -2, -2 * rho[2], 2 * rho[0], 2, 1.8]))
    assert clipped.tolist() == [1, 0, 0, 0, 0, 1]
    values.sum().backward()
    torch.testing.assert_close(loss.grad, torch.tensor([0, 2, 2 * rho[2], -2 * rho[0], -2, 0]))


VELOCITY = {"prediction_type": "velocity", "time_direction": "data_to_noise"}
CONVENTIONS = {
    "data_to_noise": VELOCITY,
    "noise_to_data": {"prediction_type": "velocity", "time_direction": "noise_to_data"},
    "epsilon": {"prediction_type": "epsilon", "time_direction": "data_to_noise"},
}


def tiny_model(**changes) -> SiTTransformer2DModel:
    """Random weights everywhere, in float64."""
    torch.manual_seed(0)
    model = SiTTransformer2DModel(
        sample_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3, **changes
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.double().eval()


class Draw:
    """Samples of two groups, with noise and timesteps shared inside each."""

    def __init__(self, model, size=3, many=4, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(2 * size, 4, 4, 4, generator=generator, dtype=torch.float64)
        self.labels = torch.tensor([0, 2]).repeat_interleave(size)
        times = stratified_times(torch.rand(2, many, generator=generator, dtype=torch.float64))
        self.times = times.clamp(0.05, 0.9).repeat_interleave(size, 0)
        noise = torch.randn(2, many, 4, 4, 4, generator=generator, dtype=torch.float64)
        self.noise = noise.repeat_interleave(size, 0)
        self.advantages = torch.tensor([1.5, -0.5, -1.0, 0.3, 0.9, -1.2])
        self.model, self.many = model, many

    def x0_hat(self):
        """As the training does it."""
        x, config = self.x.repeat_interleave(self.many, 0), self.model.config
        x_t, timestep, _, t = forward_process(x, self.noise.flatten(0, 1), self.times.flatten(), config)
        labels = self.labels.repeat_interleave(self.many)
        prediction = self.model(x_t, timestep, labels, return_dict=False)[0]
        return x0_estimate(prediction, x_t, timestep, t, config).unflatten(0, (len(self.x), self.many))

    @torch.no_grad()
    def errors(self):
        """`x0_hat - x` in float64, by the formulas: `[B,M,D]`."""
        config, errors = self.model.config, []
        for j in range(self.many):
            t, noise = self.times[:, j], self.noise[:, j]
            at = t.view(-1, 1, 1, 1)
            if config.prediction_type == "epsilon":
                n = (1000 * t).long()
                alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[n].view(-1, 1, 1, 1)
                x_t = alpha_bar.sqrt() * self.x + (1 - alpha_bar).sqrt() * noise
                epsilon = self.model(x_t, n, self.labels, return_dict=False)[0]
                estimate = (x_t - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
            else:
                x_t = (1 - at) * self.x + at * noise
                flip = config.time_direction == "noise_to_data"
                v = self.model(x_t, 1 - t if flip else t, self.labels, return_dict=False)[0]
                estimate = x_t - at * (-v if flip else v)
            errors.append((estimate - self.x).flatten(1))
        return torch.stack(errors, 1)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradient_is_that_of_the_formula(convention):
    """Against finite differences of `mean_i[-rho_i A_i]`, at the old parameters and some way off."""
    model = tiny_model(**CONVENTIONS[convention])
    draw, clip_range = Draw(model), 0.02
    errors = draw.errors()
    fixed = errors.abs().mean(2)
    old = (errors.square().mean(2) / fixed).mean(1)

    def objective():
        loss = (draw.errors().square().mean(2) / fixed).mean(1)
        rho = (old - loss).exp()
        objective = torch.minimum(rho * draw.advantages, rho.clamp(1 - clip_range, 1 + clip_range) * draw.advantages)
        return -objective.mean().item()

    parameters = list(model.parameters())
    denoising, scale = denoising_loss(draw.x0_hat(), draw.x)
    torch.testing.assert_close(scale, fixed.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoising, old.float(), rtol=1e-4, atol=1e-5)
    old_loss = denoising.detach()
    loss, ratio, _ = sample_policy_loss(denoising, old_loss, draw.advantages, clip_range)
    assert (ratio == 1).all() and loss.mean().item() == pytest.approx(objective(), abs=1e-5)
    gradients = [torch.autograd.grad(loss.mean(), parameters, allow_unused=True)]

    # Away from the old parameters, with the old denominators: some are clipped.
    generator = torch.Generator().manual_seed(3)
    steps = [0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    places = [[p.detach().clone() for p in parameters], [(p + s).detach() for p, s in zip(parameters, steps)]]
    with torch.no_grad():
        for p, place in zip(parameters, places[1]):
            p.copy_(place)
    loss, ratio, clipped = sample_policy_loss(
        denoising_loss(draw.x0_hat(), draw.x, scale)[0], old_loss, draw.advantages, clip_range
    )
    assert loss.mean().item() == pytest.approx(objective(), abs=1e-4)
    assert 0 < clipped.mean() < 1
    gradients.append(torch.autograd.grad(loss.mean(), parameters, allow_unused=True))

    for gradient, place in zip(gradients, places):
        flat = torch.cat([g.flatten() for g in gradient if g is not None])
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
            if seed == 3:  # the gradient itself
                along = [torch.zeros_like(p) if g is None else g / flat.norm() for p, g in zip(parameters, gradient)]
            values, h = [], 1e-5
            for sign in (1, -1):
                with torch.no_grad():
                    for p, start, direction in zip(parameters, place, along):
                        p.copy_(start + sign * h * direction)
                values.append(objective())
            expected = sum((g * d).sum().item() for g, d in zip(gradient, along) if g is not None)
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(
                expected, rel=1e-3, abs=1e-3 * flat.norm().item()
            )


def test_a_step_makes_good_samples_likelier_and_bad_ones_less_so():
    model = tiny_model(**VELOCITY)
    draw = Draw(model, size=2)
    draw.advantages = torch.tensor([1.0, -1.0, -0.8, 0.8])
    before, scale = denoising_loss(draw.x0_hat(), draw.x)
    before = before.detach()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        denoising = denoising_loss(draw.x0_hat(), draw.x, scale)[0]
        sample_policy_loss(denoising, before, draw.advantages, 10.0)[0].mean().backward()
        optimizer.step()
    change = denoising_loss(draw.x0_hat(), draw.x, scale)[0].detach() - before
    assert (change * draw.advantages).max() < 0, change


def test_nothing_changed_means_a_ratio_of_exactly_one():
    draw = Draw(tiny_model(**VELOCITY).float())
    draw.x, draw.times, draw.noise = draw.x.float(), draw.times.float(), draw.noise.float()
    first, scale = denoising_loss(draw.x0_hat(), draw.x)
    again = denoising_loss(draw.x0_hat(), draw.x, scale)[0]
    loss, ratio, clipped = sample_policy_loss(again, first, draw.advantages, 8e-3)
    assert (ratio == 1).all() and not clipped.any()
    torch.testing.assert_close(loss, -draw.advantages)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_true_target_gives_back_the_clean_latents(convention):
    config, generator = SimpleNamespace(**CONVENTIONS[convention]), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(64, 3, 4, 4, generator=generator), torch.randn(64, 3, 4, 4, generator=generator)
    u = torch.linspace(0, 0.999, 64)
    x_t, timestep, target, t = forward_process(x0, noise, u, config)
    estimate = x0_estimate(target, x_t, timestep, t, config)
    # Pure noise, at the end of the diffusion, is divided by 0.006.
    torch.testing.assert_close(estimate, x0, atol=2e-4 if convention == "epsilon" else 2e-6, rtol=0)
    assert x0_estimate(target.bfloat16(), x_t, timestep, t, config).dtype == torch.float32
    worse = x0_estimate(target + 0.1, x_t, timestep, t, config)
    assert ((worse - x0).abs().mean() > 0.02).all()


def test_stratified_times():
    offsets = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
    times = stratified_times(offsets)
    assert ((times * 4).floor() == torch.arange(4)).all()
    torch.testing.assert_close(stratified_times(torch.tensor([0.0, 0.5])), torch.tensor([0.0, 0.75]))
    # Each alone is uniform in its part.
    torch.testing.assert_close(times.mean(0), torch.tensor([0.125, 0.375, 0.625, 0.875]), atol=0.03, rtol=0)
    assert stratified_times(offsets.double()).dtype == torch.float64


def test_balanced_gradients():
    def parameters(*gradients):
        made = [torch.nn.Parameter(torch.zeros(2)) for _ in gradients]
        for parameter, gradient in zip(made, gradients):
            parameter.grad = None if gradient is None else torch.tensor(gradient)
        return made

    # Norms 5 and 10: shortened to 2.5.
    made = parameters([3.0, 0.0], [0.0, 4.0])
    ratio = add_balanced(made, [torch.tensor([0.0, 6.0]), torch.tensor([8.0, 0.0])], 0.5)
    assert ratio == pytest.approx(2)
    torch.testing.assert_close(made[0].grad, torch.tensor([3.0, 1.5]))
    torch.testing.assert_close(made[1].grad, torch.tensor([2.0, 4.0]))
    # Short enough: as it is; iterators do.
    made = parameters([3.0, 0.0], [0.0, 4.0])
    ratio = add_balanced(iter(made), iter([torch.tensor([0.0, 1.0]), None]), 0.5)
    assert ratio == pytest.approx(1 / 3)
    torch.testing.assert_close(made[0].grad, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(made[1].grad, torch.tensor([0.0, 4.0]))
    # One that has no gradient gets one, shortened as the others.
    made = parameters([3.0, 4.0], None)
    add_balanced(made, [None, torch.tensor([0.0, 2.0])], 0.5)
    add_balanced(made, [torch.tensor([0.0, 0.0]), None], 0.5)
    torch.testing.assert_close(made[0].grad, torch.tensor([3.0, 4.0]))
    made = parameters([3.0, 4.0], None)
    add_balanced(made, [torch.tensor([6.0, 0.0]), torch.tensor([0.0, 8.0])], 0.5)
    torch.testing.assert_close(made[0].grad, torch.tensor([4.5, 4.0]))
    torch.testing.assert_close(made[1].grad, torch.tensor([0.0, 2.0]))
    # No rewards' gradient at all.
    made = parameters([3.0, 4.0])
    assert add_balanced(made, [torch.zeros(2)], 0.5) == 0
    torch.testing.assert_close(made[0].grad, torch.tensor([3.0, 4.0]))


def test_cost_of_an_update():
    assert update_cost(25, 2.5, 4, 3.0, False) == 25 + 2.5 + 3 * 4 + 3 * 3
    assert update_cost(25, 2.5, 4, 3.0, True) == 48.5 + 4
    assert update_cost(25, 2.5, 4, 3.0, True, epochs=2) == 52.5 + 12
