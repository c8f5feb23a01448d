# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Projectors: from the tokens of a block to the width of an encoder's patch embeddings."""

import math

import torch
from torch import nn


KINDS = ("mlp", "conv")


def mlp_projector(dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """REPA's projector g: three linear layers with SiLU between them, applied to each token."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim),
        nn.SiLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.SiLU(),
        nn.Linear(hidden_dim, out_dim),
    )


class ConvProjector(nn.Module):
    """iREPA's projector (arXiv 2512.10794): one 3x3 convolution over the grid of tokens."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.projection_layer = nn.Conv2d(dim, out_dim, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        return self.projection_layer(hidden_states.mT.unflatten(2, grid_size)).flatten(2).mT


def make_projector(kind: str, dim: int, out_dim: int, hidden_dim: int) -> nn.Module:
    """A projector of one of `KINDS`; `hidden_dim` is for the `"mlp"` only."""
    if kind not in KINDS:
        raise ValueError(f"projector {kind!r} must be one of {', '.join(KINDS)}")
    return mlp_projector(dim, hidden_dim, out_dim) if kind == "mlp" else ConvProjector(dim, out_dim)


def token_grid(num_tokens: int, grid_size: tuple[int, int] | None, latents: torch.Tensor | None) -> tuple[int, int]:
    """Rows and columns of `num_tokens` image tokens.

    Args:
        grid_size: rows and columns where they are known; used if they fit the number of tokens.
        latents: the transformer's first input. Where it is a map `[B,C,H,W]`, its height and width tell the grid of
            another resolution.

    Raises:
        ValueError: if the grid cannot be derived from either.
    """
    if grid_size is not None and grid_size[0] * grid_size[1] == num_tokens:
        return grid_size
    if latents is not None and latents.ndim == 4:
        height, width = latents.shape[-2:]
        rows, columns = round(math.sqrt(num_tokens * height / width)), round(math.sqrt(num_tokens * width / height))
        if rows * columns == num_tokens:
            return rows, columns
    raise ValueError(f"the grid of {num_tokens} tokens is not known; give `grid_size`, their rows and columns")
