# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Weights of the tokens of an image in the alignment loss: equal, or by their distance to the targets (docs/method.md).

Residual weights are those of RARE (arXiv 2609.34732): the tokens of an image form a group, in which tokens that are farther
from their targets than the others count more.
"""

import torch


TOKEN_WEIGHTINGS = ("uniform", "residual")
LARGEST_WEIGHT = 4.0  # and the smallest is its inverse, before the weights are made to have mean 1


def target_distance(mu: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`eta_n = (1 - <mu_n, y_n>) / 2` of unit tokens `[B,N,E]`: 0 where they agree, 1 where they are opposite, `[B,N]`."""
    return (1 - (mu * y).sum(-1)) / 2


@torch.no_grad()
def residual_weights(mu: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`w_n = clip(eta_n / mean_N eta, 1/4, 4)`, divided by its mean over the tokens of each image.

    Args:
        mu, y: unit tokens `[B,N,E]`, float32.

    Returns:
        `[B,N]`, mean 1 over N, without a gradient; 1 where all tokens of an image agree with their targets.
    """
    distance = target_distance(mu, y).clamp_min(0)
    mean = distance.mean(-1, keepdim=True)
    relative = torch.where(mean > 1e-7, distance / mean.clamp_min(1e-7), 1.0)
    weights = relative.clamp(1 / LARGEST_WEIGHT, LARGEST_WEIGHT)
    return weights / weights.mean(-1, keepdim=True)


def token_mean(values: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
    """The mean over the last dimension of `values [..., B,N]`, weighted by `token_weights [B,N]` unless they are None."""
    return values.mean(-1) if token_weights is None else (token_weights * values).mean(-1)
