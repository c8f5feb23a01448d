# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The representation policy: the losses whose gradients follow rewards on projected tokens (rewards.py).

Pure functions on tensors; notation of docs/method.md. `mu [B,N,E]` are the projected tokens of the
transformer and `y [B,N,E]` the patch embeddings of a frozen encoder, both unit vectors in float32. The paper (arXiv
2606.00583) fixes that group-relative rewards replace REPA's cosine loss; the formulas of the objective are ours.
"""

import math
from collections.abc import Sequence

import torch

from ..random_streams import ACTIONS, random_stream
from .rewards import BUILT_IN, TokenReward, normalize, reward_gradients, tangent, values_and_gradients
from .token_weights import token_mean


DEFAULT_TOKEN_REWARDS = (BUILT_IN["semantic"], BUILT_IN["structural"])


def repa_loss(mu: torch.Tensor, y: torch.Tensor, token_weights: torch.Tensor | None = None) -> torch.Tensor:
    """REPA's alignment loss (arXiv 2410.06940) of each sample: `-(1/N) sum_n <mu_n, y_n>`, `[B]`.

    With `token_weights` `w [B,N]` of mean 1 it is `-(1/N) sum_n w_n <mu_n, y_n>`.
    """
    return -token_mean((mu * y).sum(-1), token_weights)


def expected_policy_loss(
    mu: torch.Tensor,
    y: torch.Tensor,
    subset: torch.Tensor,
    shares: torch.Tensor,
    tau: torch.Tensor,
    rewards: Sequence[TokenReward] = DEFAULT_TOKEN_REWARDS,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `expected` estimator: the limit of the group-relative objective for small policy noise (docs/method.md).

    Each reward pulls along its unit tangent gradient `u_k = P_mu grad R_k / (||P_mu grad R_k|| + tau_k)`, and the loss
    is `-(1/N) sum_n <sg(sum_k s_k u_k,n), mu_n>`. Since u_k is orthogonal to mu, the value of the loss is always 0. Only its
    gradient counts, and the rewards show the progress.

    Args:
        mu, y: unit tokens `[B,N,E]`, float32.
        subset: the tokens S of the structural reward, `[B,M]`.
        shares: `s_k` of each sample, `[B,K]`, summing to 1.
        tau: `tau_k` of each sample, `[B,K]`, at least 0.
        rewards: K of them; by default the semantic and the structural one.
        token_weights: `w [B,N]` of mean 1, by which the terms of the loss are multiplied; 1 when not given.

    Returns:
        the loss `[B]`; the token mean of the rewards `[B,K]`; the token mean of `||P_mu grad R_k||^2` `[B,K]`.
    """
    with torch.no_grad():
        values, gradients = values_and_gradients(rewards, mu, y, subset)
        norms = [torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients]
        values, norms = torch.stack([*values, *norms], dim=-1).tensor_split(2, dim=-1)
        scale = shares.unsqueeze(1) / (norms + tau.unsqueeze(1)).clamp_min(1e-12)
        direction = scale[..., :1] * gradients[0]
        for k in range(1, len(gradients)):
            direction = torch.addcmul(direction, scale[..., k : k + 1], gradients[k])
        mean_values, mean_squares = values.mean(1), norms.square().mean(1)
    return _Pull.apply(mu, direction, token_weights), mean_values, mean_squares


class _Pull(torch.autograd.Function):
    """`-(1/N) sum_n w_n <sg(u_n), mu_n>` with its gradient, for directions u that are orthogonal to mu: 0 for every sample."""

    @staticmethod
    def forward(mu, direction, token_weights):
        return mu.new_zeros(len(mu))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, direction, token_weights = inputs
        ctx.save_for_backward(direction, token_weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        direction, token_weights = ctx.saved_tensors
        scale = (gradient / -direction.shape[1]).unsqueeze(-1)
        if token_weights is not None:
            scale = scale * token_weights
        return scale.unsqueeze(-1) * direction, None, None


def sample_actions(mu: torch.Tensor, xi: torch.Tensor, noise_scale: float = 0.1) -> torch.Tensor:
    """Actions of the policy, `a = mu + (sigma / sqrt(E)) P_mu xi`: Gaussian in the tangent plane, `[G,B,N,E]`.

    Args:
        mu: unit tokens `[B,N,E]`, float32.
        xi: standard normal `[G,B,N,E]`, which the caller draws.
        noise_scale: sigma, which is about `||a - mu||` in every dimension.
    """
    return mu + (noise_scale / math.sqrt(mu.shape[-1])) * tangent(mu, xi)


def log_probability(actions: torch.Tensor, mu: torch.Tensor, noise_scale: float = 0.1) -> torch.Tensor:
    """`log pi(a) = -E ||a - mu||^2 / (2 sigma^2)`, without its constant, of `actions [G,B,N,E]` under `mu [B,N,E]`.

    Float32 `[G,B,N]`, at most 0, about -E/2 for the policy's own actions.
    """
    return (-0.5 * mu.shape[-1] / noise_scale**2) * (actions - mu).square().sum(-1)


def group_relative_advantages(rewards: torch.Tensor, noise_scale: float, embed_dim: int) -> torch.Tensor:
    """`A = (R - mean_G R) / (std_G R + delta)`, `delta = 1e-3 sigma / sqrt(E)`: the group, dimension 0, is the baseline.

    `std_G` divides by G, as `mean_G` does: the mean square of a group's advantages is then 1 for every G, and a group of
    one has advantage 0. delta scales with the rewards' std, which is `sigma ||P_mu grad R|| / sqrt(E)`.

    Args:
        rewards: `[G, ...]`, float32: their differences are smaller than half precision resolves.

    Returns:
        `[G, ...]`, within `+- sqrt(G - 1)`; 0 where all rewards of a group are the same.
    """
    delta = 1e-3 * noise_scale / math.sqrt(embed_dim)
    centred = rewards - rewards.mean(0)
    return centred / (centred.square().mean(0).sqrt() + delta)


def clipped_objective(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's `min(rho A, clip(rho, 1 - c, 1 + c) A)`, `rho = exp(log_ratio)`, of each element; all tensors have the same shape.

    Returns:
        the objective, to be maximised; and, float32, 1 where clipping acts and 0 elsewhere. Clipping acts where rho has left
        the range on the side to which the advantage pushes it. The mean is the clip fraction.
    """
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return torch.minimum(plain, clipped), (clipped < plain).float()


def sampled_policy_loss(
    mu: torch.Tensor,
    y: torch.Tensor,
    subset: torch.Tensor,
    xi: torch.Tensor | None,
    shares: torch.Tensor,
    *,
    rewards: Sequence[TokenReward] = DEFAULT_TOKEN_REWARDS,
    noise_scale: float = 0.1,
    mu_old: torch.Tensor | None = None,
    clip_range: float = 0.2,
    actions: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `sampled` estimator: G actions per token, group-relative advantages, clipped ratios (docs/method.md).

    The loss is `-(sigma / sqrt(E)) (1/N) sum_n mean_G min(rho A, clip(rho) A)` with `A = sum_k s_k A_k`. For small sigma the
    expectation of its gradient is the gradient of `expected_policy_loss` with `tau = 1e-3`, times `E[std_G z]` of G standard
    normal z (0.90 for G = 8, 0.99 for G = 64), which is not divided out. At rho = 1 the value of this loss is 0, too, since
    advantages have mean 0.

    Args:
        mu, y: unit tokens `[B,N,E]`, float32. The gradient goes to `mu` through `log pi` only.
        subset: the tokens S of the structural reward, `[B,M]`.
        xi: standard normal `[G,B,N,E]`, G at least 2; not used with `actions`.
        shares: `s_k` of each sample, `[B,K]`, summing to 1.
        rewards: K of them; by default the semantic and the structural one.
        mu_old: the tokens that the actions are, or were, drawn around, `[B,N,E]`; without it `mu`, and then rho = 1.
        clip_range: c of the clipping.
        actions: `[G,B,N,E]` drawn before, around `mu_old`, which must then be given.
        token_weights: `w [B,N]` of mean 1, by which the terms of the loss are multiplied; 1 when not given.

    Returns:
        the loss `[B]`; at the mean action, the token mean of the rewards and that of `||P_mu grad R_k||^2`, both `[B,K]`;
        the token mean of `std_G R_k` `[B,K]`; the clip fraction `[B]`.
    """
    embed_dim = mu.shape[-1]
    # Under autocast the rewards' products would run in half precision.
    with torch.autocast(mu.device.type, enabled=False):
        with torch.no_grad():
            old = mu if mu_old is None else mu_old
            actions = sample_actions(old, xi, noise_scale) if actions is None else actions
            # The other tokens are also those at the time of the draw, so that an action keeps its reward.
            units = normalize(actions)
            values = torch.stack([reward.function(units, old, y, subset) for reward in rewards], dim=-1)
            spread = values.std(0, correction=0)
            advantages = group_relative_advantages(values, noise_scale, embed_dim)
            advantages = (shares.unsqueeze(1) * advantages).sum(-1)
            mean_rewards, gradients = reward_gradients(rewards, mu, y, subset)
            squares = torch.stack([g.square().sum(-1) for g in gradients], dim=-1)
        log_pi = log_probability(actions, mu, noise_scale)
        log_pi_old = log_pi.detach() if mu_old is None else log_probability(actions, mu_old.detach(), noise_scale)
        objective, clipped = clipped_objective(log_pi - log_pi_old, advantages, clip_range)
        loss = -(objective if token_weights is None else token_weights * objective).mean((0, 2))
        loss = (noise_scale / math.sqrt(embed_dim)) * loss
    return loss, mean_rewards.mean(1), squares.mean(1), spread.mean(1), clipped.mean((0, 2))


def kl_penalty(mu: torch.Tensor, mu_ref: torch.Tensor, noise_scale: float = 0.1) -> torch.Tensor:
    """The divergence from a reference policy, `E ||mu - mu_ref||^2 / (2 sigma^2)`, which either estimator may add.

    It is the mean over tokens, multiplied by `sigma / sqrt(E)` as the objective is; `[B]`, float32. `mu_ref [B,N,E]` gets no
    gradient.
    """
    scale = noise_scale / math.sqrt(mu.shape[-1])
    return -scale * log_probability(mu, mu_ref.detach(), noise_scale).mean(-1)


def token_shares(shares: torch.Tensor, fidelity: bool = True) -> torch.Tensor:
    """Shares of the token rewards among themselves, `[B,K-1]`, from those of all rewards `[B,K]`, fidelity first.

    Fidelity takes its share in the fork, where the gradients meet. If it takes everything, the shares of the token rewards are
    equal, since the length of fidelity's part is that of the gradient it replaces. Without `fidelity` among the rewards, the
    shares `[B,K]` are returned as they are.
    """
    if not fidelity:
        return shares
    rest = shares[:, 1:].sum(-1, keepdim=True)
    return torch.where(rest > 0, shares[:, 1:] / rest.clamp_min(1e-12), 1 / (shares.shape[1] - 1))


TIMESTEP_WEIGHTS = ("uniform", "low_noise")


def timestep_weight(t: torch.Tensor, kind: str) -> torch.Tensor:
    """`w(t) / E[w]` of timesteps `t [B]`, float32, with mean 1 over t uniform in [0, 1].

    `uniform` is 1; `low_noise` is `w(t) = sigmoid(20 (0.7 - t))`, which almost removes the noisiest timesteps, where the noisy
    image says little about the features (Stable Velocity).
    """
    if kind == "uniform":
        return torch.ones_like(t, dtype=torch.float32)
    # The integral of a sigmoid is a softplus: E[w] = (softplus(14) - softplus(-6)) / 20 = 0.69988.
    mean = (math.log1p(math.exp(20 * 0.7)) - math.log1p(math.exp(-20 * 0.3))) / 20
    return torch.sigmoid(20 * (0.7 - t.float())) / mean


def action_noise(seed: int, indices: torch.Tensor, number: int, shape: tuple, device: torch.device) -> torch.Tensor:
    """Standard normal noise of the policy's actions, `[G,B,N,E]`, a function of seed, sample index and projector.

    It is drawn on the device, since G * N * E numbers per sample are too many for the data loader. Devices of different kinds
    draw different noise.

    Args:
        indices: global sample indices, `[B]`, on the CPU.
        number: of the projector.
        shape: `(G, N, E)`.
    """
    noise = []
    for index in indices.tolist():
        start = random_stream(seed, index, ACTIONS).integers(2**62, size=number + 1)[number]
        noise.append(torch.randn(shape, generator=torch.Generator(device).manual_seed(int(start)), device=device))
    return torch.stack(noise, dim=1)
