# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The representation policy: rewards on projected tokens, and the loss whose gradient follows them.

Pure functions on tensors; notation of docs/method.md. `mu [B,N,E]` are the projected tokens of the
transformer and `y [B,N,E]` the patch embeddings of a frozen encoder, both unit vectors in float32. The objective is ours
in the terms that the paper (arXiv 2606.00583) fixes: group-relative rewards in place of REPA's cosine loss.
"""

import math

import torch

from ..random_streams import ACTIONS, random_stream


# The composite reward is alpha R_f + beta R_se + gamma R_st. Fidelity, R_f = -L_FM of the sample, is no function of the
# tokens here: its gradient meets the others' in gradient_fork.py.
REWARDS = ("fidelity", "semantic", "structural")


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Unit vectors in float32; half precision here is REPA's known source of NaN.

    Vectors shorter than 1e-6 become zero and get no gradient: it would be as large as they are short.
    """
    x = x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 1e-6, x / norm.clamp_min(1e-6), 0.0)


def tangent(mu: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`P_mu g = g - <g, mu> mu`: what of a gradient moves a unit vector along the sphere."""
    return torch.addcmul(gradient, (gradient * mu).sum(-1, keepdim=True), mu, value=-1)


def repa_loss(mu: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """REPA's alignment loss (arXiv 2410.06940) of each sample: `-(1/N) sum_n <mu_n, y_n>`, `[B]`."""
    return -(mu * y).sum(-1).mean(-1)


def semantic_reward(action: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`R_se(a_n) = <a_n, y_n>` of unit actions `[B,N,E]`, in [-1, 1], `[B,N]`."""
    return (action * y).sum(-1)


def take_tokens(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows `tokens [B,M]` of `x [B,N,E]`, `[B,M,E]`."""
    return x.gather(1, tokens.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def structural_reward(action: torch.Tensor, mu: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`R_st(a_n) = -(1/M) sum_{m in S} (<a_n, sg mu_m> - <y_n, y_m>)^2`, at most 0, `[B,N]`.

    The relations of a token to the tokens S (`tokens [B,M]`, row indices) must match the encoder's.
    """
    relations = action @ take_tokens(mu.detach(), tokens).mT
    return -(relations - y @ take_tokens(y, tokens).mT).square().mean(-1)


@torch.no_grad()
def reward_gradients(
    mu: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rewards at the mean action and their tangent gradients `P_mu grad R_k`, in closed form.

    Returns:
        rewards `[B,N,2]`, semantic and structural, and their gradients, each `[B,N,E]`.
    """
    # Autocast would run the products in half precision: the rewards' differences are smaller than its rounding.
    with torch.autocast(mu.device.type, enabled=False):
        mu_s = take_tokens(mu, tokens)
        difference = torch.baddbmm(mu @ mu_s.mT, y, take_tokens(y, tokens).mT, alpha=-1)
        semantic = semantic_reward(mu, y)
        rewards = torch.stack([semantic, -difference.square().mean(-1)], dim=-1)
        gradient_st = (difference * (-2 / tokens.shape[1])) @ mu_s
        # The first is `tangent(mu, y)`, whose product is the reward.
        return rewards, [torch.addcmul(y, semantic.unsqueeze(-1), mu, value=-1), tangent(mu, gradient_st)]


def expected_policy_loss(
    mu: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor, shares: torch.Tensor, tau: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `expected` estimator: the limit of the group-relative objective for small policy noise (docs/method.md).

    Each reward pulls along its unit tangent gradient `u_k = P_mu grad R_k / (||P_mu grad R_k|| + tau_k)`, and the loss
    is `-(1/N) sum_n <sg(sum_k s_k u_k,n), mu_n>`. Since u_k is orthogonal to mu its value is always 0; its gradient is
    what counts, and the rewards are what to watch.

    Args:
        mu, y: unit tokens `[B,N,E]`, float32.
        tokens: the tokens S of the structural reward, `[B,M]`.
        shares: `s_k` of each sample, `[B,K]`, summing to 1.
        tau: `tau_k` of each sample, `[B,K]`, at least 0.

    Returns:
        the loss `[B]`; the token mean of the rewards `[B,K]`; the token mean of `||P_mu grad R_k||^2` `[B,K]`.
    """
    rewards, gradients = reward_gradients(mu, y, tokens)
    norms = torch.stack([torch.linalg.vector_norm(g, dim=-1) for g in gradients], dim=-1)
    scale = shares.unsqueeze(1) / (norms + tau.unsqueeze(1)).clamp_min(1e-12)
    direction = torch.addcmul(scale[..., :1] * gradients[0], scale[..., 1:], gradients[1])
    loss = -(direction * mu).sum(-1).mean(-1)
    return loss, rewards.mean(1), norms.square().mean(1)


def sample_actions(mu: torch.Tensor, xi: torch.Tensor, noise_scale: float = 0.1) -> torch.Tensor:
    """Actions of the policy, `a = mu + (sigma / sqrt(E)) P_mu xi`: Gaussian in the tangent plane, `[G,B,N,E]`.

    Args:
        mu: unit tokens `[B,N,E]`, float32.
        xi: standard normal `[G,B,N,E]`, from a random stream of the caller's.
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
    """PPO's `min(rho A, clip(rho, 1 - c, 1 + c) A)`, `rho = exp(log_ratio)`, of each element; all shapes alike.

    Returns:
        the objective, to be maximised; float32 1 where clipping acts, that is where rho has left the range on the side
        to which the advantage pushes it, and 0 elsewhere. Its mean is the clip fraction.
    """
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return torch.minimum(plain, clipped), (clipped < plain).float()


def sampled_policy_loss(
    mu: torch.Tensor,
    y: torch.Tensor,
    tokens: torch.Tensor,
    xi: torch.Tensor | None,
    shares: torch.Tensor,
    *,
    noise_scale: float = 0.1,
    mu_old: torch.Tensor | None = None,
    clip_range: float = 0.2,
    actions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `sampled` estimator: G actions per token, group-relative advantages, clipped ratios (docs/method.md).

    The loss is `-(sigma / sqrt(E)) (1/N) sum_n mean_G min(rho A, clip(rho) A)` with `A = sum_k s_k A_k`. For small sigma the expectation of its gradient is that of
    `expected_policy_loss` with `tau = 1e-3`, times `E[std_G z]` of G standard normal z (0.90 for G = 8, 0.99 for G = 64),
    which is not divided out. Its value at rho = 1 is 0, as that of the other: advantages have mean 0.

    Args:
        mu, y: unit tokens `[B,N,E]`, float32. The gradient goes to `mu` through `log pi` only.
        tokens: the tokens S of the structural reward, `[B,M]`.
        xi: standard normal `[G,B,N,E]`, G at least 2; not used with `actions`.
        shares: `s_k` of each sample, `[B,K]`, summing to 1.
        mu_old: the tokens that the actions are, or were, drawn around, `[B,N,E]`; without it `mu`, and then rho = 1.
        clip_range: c of the clipping.
        actions: `[G,B,N,E]` drawn before, around `mu_old`, which must then be given.

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
            # The other tokens are those of the draw too, so that an action's reward stays what it was.
            units = normalize(actions)
            rewards = torch.stack([semantic_reward(units, y), structural_reward(units, old, y, tokens)], dim=-1)
            spread = rewards.std(0, correction=0)
            advantages = group_relative_advantages(rewards, noise_scale, embed_dim)
            advantages = (shares.unsqueeze(1) * advantages).sum(-1)
            mean_rewards, gradients = reward_gradients(mu, y, tokens)
            squares = torch.stack([g.square().sum(-1) for g in gradients], dim=-1)
        log_pi = log_probability(actions, mu, noise_scale)
        log_pi_old = log_pi.detach() if mu_old is None else log_probability(actions, mu_old.detach(), noise_scale)
        objective, clipped = clipped_objective(log_pi - log_pi_old, advantages, clip_range)
        loss = -objective.mean((0, 2))
        loss = (noise_scale / math.sqrt(embed_dim)) * loss
    return loss, mean_rewards.mean(1), squares.mean(1), spread.mean(1), clipped.mean((0, 2))


def kl_penalty(mu: torch.Tensor, mu_ref: torch.Tensor, noise_scale: float = 0.1) -> torch.Tensor:
    """The divergence from a reference policy, `E ||mu - mu_ref||^2 / (2 sigma^2)`, as it stands beside either estimator.

    That is the token mean times `sigma / sqrt(E)`, by which the objective is multiplied; `[B]`, float32. `mu_ref [B,N,E]`
    gets no gradient.
    """
    scale = noise_scale / math.sqrt(mu.shape[-1])
    return -scale * log_probability(mu, mu_ref.detach(), noise_scale).mean(-1)


def token_shares(shares: torch.Tensor) -> torch.Tensor:
    """Shares of the semantic and the structural reward among themselves, `[B,2]`, from all three `[B,3]`.

    What fidelity takes is taken where the gradients meet. Where it takes all, they are equal: fidelity's part is as large
    as the gradient that it replaces.
    """
    rest = shares[:, 1:].sum(-1, keepdim=True)
    return torch.where(rest > 0, shares[:, 1:] / rest.clamp_min(1e-12), 0.5)


TIMESTEP_WEIGHTS = ("uniform", "low_noise")


def timestep_weight(t: torch.Tensor, kind: str) -> torch.Tensor:
    """`w(t) / E[w]` of timesteps `t [B]`, float32, with mean 1 over t uniform in [0, 1].

    `uniform` is 1; `low_noise` is `w(t) = sigmoid(20 (0.7 - t))`, which leaves out the noisiest timesteps, where the image
    says little about its features (Stable Velocity).
    """
    if kind == "uniform":
        return torch.ones_like(t, dtype=torch.float32)
    # The integral of a sigmoid is a softplus: E[w] = (softplus(14) - softplus(-6)) / 20 = 0.69988.
    mean = (math.log1p(math.exp(20 * 0.7)) - math.log1p(math.exp(-20 * 0.3))) / 20
    return torch.sigmoid(20 * (0.7 - t.float())) / mean


def action_noise(seed: int, indices: torch.Tensor, number: int, shape: tuple, device: torch.device) -> torch.Tensor:
    """Standard normal noise of the policy's actions, `[G,B,N,E]`, a function of seed, sample index and projector.

    It is drawn on the device (G * N * E numbers a sample are too many for the data loader), so that only devices of one
    kind draw the same.

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
