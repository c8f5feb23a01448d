# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The generative policy: group-relative rewards for generated images, and the loss whose gradient follows them.

These are pure functions on tensors, in the notation of docs/method.md. A rollout draws G samples of each of P classes from
the current model, rewards say how good the samples are, and the likelihood of the good ones is raised. The likelihood of a
sample is that of the forward process, given by its denoising error, so that any sampler may draw it. The objective is ours;
it is related to V-GRPO, DiffusionNFT and AWM.
"""

from collections.abc import Iterable

import torch

from ...alignment.policy import clipped_objective


# ----------------------------------------------------------------------------------------------------------------------
# Rewards: closed forms of the features of samples, with statistics of training images


def oas_shrinkage(covariance: torch.Tensor, count: int) -> float:
    """How far the covariance `[D,D]` of `count` features is shrunk towards a multiple of the identity, in [0, 1].

    The formula is oracle approximating shrinkage (Chen et al. 2010, arXiv 0907.4698, eq. 23).
    """
    dim = len(covariance)
    square, trace = covariance.square().sum(), covariance.trace()
    numerator = (1 - 2 / dim) * square + trace.square()
    denominator = (count + 1 - 2 / dim) * (square - trace.square() / dim)
    return (numerator / denominator.clamp_min(1e-300)).clamp(max=1.0).item() if count else 1.0


def shrink(covariance: torch.Tensor, amount: float) -> torch.Tensor:
    """Shrinks a covariance S by s: `(1 - s) S + s (tr S / D) I`, `[D,D]`."""
    mean_variance = covariance.trace() / len(covariance)
    return (1 - amount) * covariance + amount * mean_variance * torch.eye(len(covariance)).to(covariance)


def symmetric_power(matrix: torch.Tensor, power: float) -> torch.Tensor:
    """`M^power` of a positive semidefinite matrix; eigenvalues that are only rounding errors are dropped."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > values.amax() * len(values) * torch.finfo(values.dtype).eps
    return (vectors[:, kept] * values[kept].pow(power)) @ vectors[:, kept].T


def transport_map(sigma_g: torch.Tensor, sigma_r: torch.Tensor) -> torch.Tensor:
    """`T = S_r^1/2 (S_r^1/2 S_g S_r^1/2)^-1/2 S_r^1/2`, the linear map that transports N(0, S_g) to N(0, S_r); `[D,D]`.

    Args:
        sigma_g, sigma_r: covariances of generated and of training images, float64.
    """
    root = symmetric_power(sigma_r, 0.5)
    return root @ symmetric_power(root @ sigma_g @ root, -0.5) @ root


def frechet_influence(
    features: torch.Tensor, mu_g: torch.Tensor, mu_r: torch.Tensor, transport: torch.Tensor
) -> torch.Tensor:
    """`r_i = -[2 (mu_g - mu_r)^T d_i + d_i^T (I - T) d_i]`, `d_i = f_i - mu_g`: a sample's influence on the Fréchet distance.

    The squared distance changes by `-r_i eps + const` if a mass eps of the generated distribution moves to `f_i`.

    Args:
        features: features of samples, `[B,D]`.
        mu_g, mu_r: means of generated and of training images, `[D]`, float64.
        transport: the `transport_map` of their covariances.

    Returns:
        float64 `[B]`.
    """
    delta = features.to(mu_g) - mu_g
    quadratic = (delta.square() - (delta @ transport) * delta).sum(1)
    return -(2 * delta @ (mu_g - mu_r) + quadratic)


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor, bandwidth: torch.Tensor | float) -> torch.Tensor:
    """`exp(-|x - y|^2 / (2 h^2))` of all pairs, `[M,N]`, with the bandwidth h."""
    # A matrix product would lose precision if features have a large common part, above all with TF32.
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-distances.square() / (2 * bandwidth**2))


def mmd_witness(
    features: torch.Tensor, generated: torch.Tensor, real: torch.Tensor, bandwidth: torch.Tensor | float
) -> torch.Tensor:
    """`r_i = 2 (mean_real k(f_i, x) - mean_generated k(f_i, y))`: a sample's influence on the squared MMD; `[B]`.

    It needs no covariance, so a few hundred features are enough.

    Args:
        features, generated, real: `[B,D]`, `[M,D]`, `[N,D]`, float32 or float64.
        bandwidth: h of the Gaussian kernel.
    """
    to_real, to_generated = (gaussian_kernel(features, others, bandwidth).mean(1) for others in (real, generated))
    return 2 * (to_real - to_generated)


def class_directions(features: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Unit vectors from the centre of all training images `[D]` to features `[B,D]`; `[B,D]`."""
    return torch.nn.functional.normalize(features - centre, dim=1)


def class_log_probability(
    features: torch.Tensor, centre: torch.Tensor, prototypes: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`log p(c | f) = log softmax_c(<direction of f, prototype of c> / temperature)`, `[B,C]` for prototypes `[C,D]`."""
    return (class_directions(features, centre) @ prototypes.T / temperature).log_softmax(1)


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


def sample_advantages(
    rewards: torch.Tensor, real_std: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`A_k = (r_k - mean over the class) / (std over the batch + 0.1 real std)`, `A = 3 tanh(batchnorm(sum_k s_k A_k) / 3)`.

    Each reward is normalised within its group before the rewards are combined, so that its scale and offset have no effect.
    The spread over real images reduces the weight of a reward in which the samples hardly differ.

    Args:
        rewards: K rewards of P groups of G samples, `[P,G,K]`.
        real_std: standard deviation of each reward over training images, `[K]`, at least 0.
        weights: `s_k`, `[K]`, with the sum 1.

    Returns:
        float32: the advantages `[P,G]` in (-3, 3); the share of each reward in them, proportional to `s_k std A_k`, with the
        sum 1, `[K]`; and the share of the groups whose samples all have the same advantage, `[]`.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(1, keepdim=True)
    scale = rewards.flatten(0, 1).std(0, correction=0) + 0.1 * real_std.double()
    # Rewards that are equal up to rounding errors must not become advantages.
    negligible = 1e-9 * rewards.abs().flatten(0, 1).amax(0)
    relative = torch.where(scale > negligible, centred / scale.clamp_min(1e-300), 0.0)
    total = relative @ weights.double()
    std = (total - total.mean()).square().mean().sqrt()
    normalised = torch.where(std > 1e-6, (total - total.mean()) / std.clamp_min(1e-300), 0.0)
    parts = weights.double() * relative.flatten(0, 1).std(0, correction=0)
    zero_spread = (total.std(1, correction=0) < 1e-6).float().mean()
    return (3 * torch.tanh(normalised / 3)).float(), (parts / parts.sum().clamp_min(1e-300)).float(), zero_spread


# ----------------------------------------------------------------------------------------------------------------------
# Likelihood and loss


def denoising_loss(
    x0_prediction: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`l = mean_j [ mean_d (x0_hat - x)^2 / sg mean_d |x0_hat - x| ]`; a lower loss means a higher likelihood of x.

    Args:
        x0_prediction: estimates of x from M noisy versions of it, `[B,M,...]`.
        x: samples `[B,...]`.
        scale: the denominators of another call, `[B,M]`; None computes those of these estimates.

    Returns:
        float32: l `[B]`, and the denominators `[B,M]`, which have no gradient.
    """
    error = (x0_prediction.float() - x.float().unsqueeze(1)).flatten(2)
    if scale is None:
        scale = error.detach().abs().mean(2).clamp_min(1e-6)
    return (error.square().mean(2) / scale).mean(1), scale


def sample_policy_loss(
    loss: torch.Tensor, old_loss: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`-min(rho A, clip(rho, 1 - c, 1 + c) A)` of each sample, with the ratio `rho = exp(l_old - l)`.

    l is a loss, so the ratio rises if it falls.

    Args:
        loss, old_loss: `denoising_loss` of the current model and of the model at the first step on this rollout, with the same
            noise, timesteps and denominators; `[B]`.
        advantages: `[B]`.
        clip_range: c.

    Returns:
        the loss `[B]`, rho `[B]`, and 1 for samples on which clipping acts and 0 for others, `[B]`.
    """
    log_ratio = old_loss.detach() - loss
    objective, clipped = clipped_objective(log_ratio, advantages, clip_range)
    return -objective, log_ratio.detach().exp(), clipped


def stratified_times(offsets: torch.Tensor) -> torch.Tensor:
    """`t_j = (j + u_j) / M`, one time in each of M equal parts of [0, 1); `offsets`, u, are uniform in [0, 1), `[...,M]`."""
    count = offsets.shape[-1]
    return (torch.arange(count, dtype=offsets.dtype, device=offsets.device) + offsets) / count


@torch.no_grad()
def add_balanced(
    parameters: Iterable[torch.nn.Parameter], gradients: Iterable[torch.Tensor | None], max_ratio: float
) -> torch.Tensor:
    """Adds gradients to those that parameters have, after clipping their norm to `max_ratio` times that of the latter.

    Returns:
        the ratio of the two norms before clipping, `[]`.
    """
    pairs = [(p, g) for p, g in zip(parameters, gradients) if g is not None]
    own = torch.nn.utils.get_total_norm([p.grad for p, _ in pairs if p.grad is not None])
    new = torch.nn.utils.get_total_norm([g for _, g in pairs])
    ratio = new / own.clamp_min(1e-30)
    factor = (max_ratio / ratio.clamp_min(1e-30)).clamp(max=1.0)
    for parameter, gradient in pairs:
        if parameter.grad is None:
            parameter.grad = gradient * factor
        else:
            parameter.grad.add_(gradient * factor)
    return ratio


def update_cost(
    rollout_steps: int, encoder: float, mc_samples: int, real_per_sample: float, anchored: bool, epochs: int = 1
) -> float:
    """The cost of an update for each generated image, in forward passes of the transformer; a backward pass counts as two.

    It is `rollout_steps + encoder + 3 N_MC epochs + 3 (real images per generated image)`, plus N_MC with the anchor.

    Args:
        rollout_steps: evaluations of the transformer for a sample.
        encoder: FLOPs of encoding one image, divided by those of a forward pass.
        mc_samples: N_MC.
        real_per_sample: real images that training sees for each generated one.
        anchored: whether the anchor is used.
        epochs: optimizer steps on the same samples.
    """
    return rollout_steps + encoder + 3 * mc_samples * epochs + 3 * real_per_sample + mc_samples * anchored
