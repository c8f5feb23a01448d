# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Weights for the FID network."""

import torch

from diffusers_vrpo.evaluation.inception import FIDInception


def random_inception_state() -> dict[str, torch.Tensor]:
    """Random weights that keep activations of order one, statistics of the batch norms included."""
    generator = torch.Generator().manual_seed(0)
    state = FIDInception().state_dict()
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("conv.weight"):
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            value.copy_(noise.sigmoid() + 0.5)
        elif name.endswith(("bn.bias", "running_mean")):
            value.copy_(0.3 * noise)
        elif name.startswith("fc."):
            value.copy_(0.03 * noise)
    return state
