# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Sample grids of a run in training."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image

from .arguments import as_id
from .errors import InputError
from .pipeline_vrpo import VRPOPipeline
from .plots import image_grid


logger = get_logger(__name__)


def grid_columns(pipeline: VRPOPipeline, labels: list[str] | None) -> list[int]:
    """The classes of `--validation_labels`, names or ids; without them ten, spread over all.

    Raises:
        InputError: for a label that the model does not have.
    """
    num_classes = pipeline.transformer.config.num_classes
    columns = min(10, num_classes)
    labels = labels or [int(i * num_classes / columns) for i in range(columns)]
    try:
        return pipeline.get_label_ids([c if str(c).lower() in pipeline.labels else as_id(c) for c in labels])
    except ValueError as error:
        raise InputError(f"--validation_labels: {error}") from error


def draw_samples(
    pipeline: VRPOPipeline,
    labels: list[int],
    images_per_label: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    device: torch.device,
) -> Image.Image:
    """A grid, one column per class, always from the same noise; unguided where the model has no null class."""
    transformer = pipeline.transformer
    size = transformer.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    size = (images_per_label * len(labels), transformer.config.in_channels, height, width)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        labels * images_per_label,
        latents=latents.to(device),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale if transformer.null_class_id is not None else 1.0,
    ).images
    return image_grid(images, columns=len(labels))


def save_samples(accelerator: Accelerator, output_dir: Path, step: int, grid: Image.Image):
    """Keeps a grid of samples as a file, and shows it in the trackers that take images."""
    path = output_dir / "samples" / f"step-{step:07d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    except OSError as error:  # a full disk: a grid is not worth a run
        logger.error(f"{path} could not be written ({error.strerror or error})")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"samples": wandb.Image(grid)}, step=step)
