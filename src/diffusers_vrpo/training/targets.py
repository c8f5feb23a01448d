# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Whitens the features of the encoders for `target_norm`, with statistics of a fixed sample of the run's data."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from ..alignment.whitening import (
    TARGET_WHITENING,
    WhitenedEncoder,
    Whitening,
    Whitenings,
    check_width,
    fit_whitening,
    whitenings_from_state,
)
from ..config import VRPOConfig, whitened_dims
from ..data.latent_cache import CachedEncoder
from ..data.sources import TrainingData
from ..errors import InputError
from .distributed import run_and_share_errors


logger = logging.getLogger(__name__)
SAMPLE_IMAGES = 1024  # or all images if there are fewer
BATCH = 32


def target_encoders(
    config: VRPOConfig, accelerator: Accelerator, data: TrainingData, encoders: list, checkpoint: Path | None
) -> list:
    """Returns the encoders to align with: the given ones, or with `target_norm` each of them whitened.

    A resumed run reads the statistics from its checkpoint. A new run computes them on its main process from images that
    depend on the data alone (`TrainingData.fixed_rows`), cropped in the centre, or from their cached features.

    Raises:
        InputError: if `target_norm` asks for more dimensions than an encoder has, the checkpoint was trained without it, or
            the data have neither images nor features.
    """
    num_dims = whitened_dims(config.target_norm)
    if num_dims is None or not encoders:
        return encoders
    for encoder, name in zip(encoders, config.encoder):
        check_width(num_dims, encoder.embed_dim, name)

    state: list[dict[str, torch.Tensor] | None] = [None]
    if checkpoint is not None:
        file = checkpoint / f"{TARGET_WHITENING}.safetensors"
        if not file.is_file():
            raise InputError(
                "target_norm",
                f"`target_norm` is {config.target_norm}, but {checkpoint} was trained with none; give none, or start a new run "
                "in another `output_dir`",
            )
        state[0] = load_file(file)
    else:

        def fit():
            state[0] = Whitenings(_fit(config, data, encoders, num_dims, accelerator.device)).state_dict()

        run_and_share_errors(accelerator, fit, where=accelerator.is_main_process)
        broadcast_object_list(state)
    whitenings = [whitening.to(accelerator.device) for whitening in whitenings_from_state(state[0])]
    return [WhitenedEncoder(encoder, whitening) for encoder, whitening in zip(encoders, whitenings, strict=True)]


def _fit(config: VRPOConfig, data: TrainingData, encoders: list, num_dims: int, device) -> list[Whitening]:
    """Computes the whitening of each encoder from features on the CPU; the encoders run on `device`."""
    rows = data.fixed_rows(SAMPLE_IMAGES)
    logger.info(f"target_norm {config.target_norm}: computing its statistics from {len(rows)} images")

    def embeddings(encoder) -> Iterator[torch.Tensor]:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            if isinstance(encoder, CachedEncoder):
                batch = {f"features_{encoder.number}": data.read(f"features-{encoder.array}", part)}
                yield encoder(batch)
            else:
                images = torch.from_numpy(data.examples(part, config.resolution)[0]).to(device)
                yield encoder(images.permute(0, 3, 1, 2).float() / 127.5 - 1).cpu()

    if not data.has_images and not all(isinstance(encoder, CachedEncoder) for encoder in encoders):
        raise InputError(
            "target_norm",
            f"`target_norm` {config.target_norm} needs images or cached features, and the data have neither; give none",
        )
    named = zip(encoders, config.encoder, strict=True)
    whitenings = [fit_whitening(embeddings(encoder), num_dims, name) for encoder, name in named]
    data.release()
    return whitenings
