# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Activation checkpointing: which parts of a transformer are recomputed in the backward pass."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from ..alignment.image_tokens import transformer_blocks
from ..config import recomputed_part
from ..errors import InputError
from ..models.transformer_sit import SiTTransformer2DModel


def recompute(transformer: torch.nn.Module, gradient_checkpointing: bool | str):
    """Sets which parts of a transformer are recomputed in the backward pass; weights and results stay the same.

    Args:
        transformer: a transformer of diffusers. Only those of this package can recompute `attention` or `mlp` alone.
        gradient_checkpointing: the value of the option; with False the transformer stays as it is.

    Raises:
        InputError: if the transformer has no such part.
    """
    if not gradient_checkpointing:
        return
    name = type(transformer).__name__
    part, every = recomputed_part(gradient_checkpointing)
    if part != "block":
        if not isinstance(transformer, SiTTransformer2DModel):
            raise InputError(
                "gradient_checkpointing",
                f"`gradient_checkpointing` {gradient_checkpointing} works with the SiT and DiT of this package only; the blocks "
                f"of {name} can only be recomputed as a whole; give full or every:K",
            )
        for block in transformer.transformer_blocks:
            block.recomputed = part
        return
    if not transformer._supports_gradient_checkpointing:
        raise InputError("gradient_checkpointing", f"`gradient_checkpointing` is not supported by {name}; remove it")
    if every == 1:
        transformer.enable_gradient_checkpointing()
        return
    try:
        blocks = transformer_blocks(transformer)
    except ValueError as error:
        raise InputError(
            "gradient_checkpointing", f"`gradient_checkpointing` {gradient_checkpointing}: {error}"
        ) from error
    if every > len(blocks):
        raise InputError(
            "gradient_checkpointing",
            f"`gradient_checkpointing` {gradient_checkpointing} would recompute nothing, because {name} has {len(blocks)} "
            "blocks; give a lower number",
        )
    transformer.enable_gradient_checkpointing(_only(blocks[every - 1 :: every]))


def _only(blocks: list[torch.nn.Module]) -> Callable:
    """Returns the function with which a diffusers transformer calls its blocks; it checkpoints only the given ones."""
    chosen = {id(block) for block in blocks}

    def call(block: torch.nn.Module, *arguments):
        if id(block) in chosen:
            return checkpoint(block.__call__, *arguments, use_reentrant=False)
        return block(*arguments)

    return call
