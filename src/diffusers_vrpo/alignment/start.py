# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The aligned transformer that a run starts with: transformer, projectors and scaffold, new or from a checkpoint."""

import logging

import torch

from ..errors import InputError
from ..models.start import Start, build_transformer, load_start
from .attach import AlignedTransformer, alignment_layers


logger = logging.getLogger(__name__)


def build_aligned_transformer(
    args, start: Start, latent_shape: tuple, num_classes: int, id2label: dict | None, encoders: list
) -> AlignedTransformer:
    """Builds the transformer to train, adapted to data and encoders, with its projectors, and adapters for `lora_rank`.

    A scaffold always starts with new maps.

    All weights that are not loaded are drawn from torch's generator.

    Args:
        latent_shape: channels, height and width.
        encoders: as for `AlignedTransformer`; an empty list trains without projectors.

    Raises:
        InputError: if weights and data do not fit, or the configuration is not valid for the model.
    """
    with torch.random.fork_rng(devices=[]):  # building the modules must not advance the generator
        transformer, difference = build_transformer(args, start, latent_shape, num_classes, id2label, draw=False)
        depth = len(transformer.transformer_blocks)
        projected = encoders and args.objective != "repi"
        layers = alignment_layers(args.layer_scope, depth) if projected else []
        aligned = AlignedTransformer(
            transformer,
            layers,
            encoders,
            args.projector,
            args.projector_dim,
            scaffold_layer=scaffold_layer(args, depth),
        )
    draw_weights(aligned)
    load_start(transformer, args, start, difference)
    if start.source is not None and encoders:
        saved = start.projectors
        if saved is None or not aligned.load_projectors(saved.description, saved.state):
            logger.info(f"{args.pretrained_model_name_or_path}: the projectors start from new random weights")
    return aligned


def scaffold_layer(args, num_layers: int) -> int | None:
    """The block with the scaffold, counted from 1: `scaffold_layer`, or the early block for `objective="repi"`.

    Raises:
        InputError: if the model does not have the block.
    """
    if args.scaffold_layer is None:
        return alignment_layers("early", num_layers)[0] if args.objective == "repi" else None
    if args.scaffold_layer > num_layers:
        raise InputError(
            "scaffold_layer",
            f"`scaffold_layer` {args.scaffold_layer} must be at most {num_layers}, the blocks of the transformer",
        )
    return args.scaffold_layer


def draw_weights(aligned: AlignedTransformer):
    """Draws the weights of a `SiTTransformer2DModel` and of its projectors from torch's generator.

    This is the one place that keeps a seed's weights what they were in version 0.1, where the projectors were part of the
    model: the defaults of every layer first, in the order of construction, the projectors' last, and then SiT's own
    initialisation of all of them. Adapters are drawn later, as they were. So is the scaffold, without which the others are
    the same.
    """
    for part in (aligned.transformer, aligned.projectors):
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    aligned.transformer.initialize_weights(aligned.projectors)
    if aligned.scaffold is not None:
        aligned.scaffold.draw_weights()
