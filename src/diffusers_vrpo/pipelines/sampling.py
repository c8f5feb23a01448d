# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Draws images from a pipeline: the random streams of each image, the samplers, and grids of images."""

import argparse
import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError, first_line
from ..models import ddpm
from ..random_streams import LABEL, START, STEPS, random_stream
from .pipeline_vrpo import VRPOPipeline
from .scheduling_sit_sde import SiTSDEScheduler


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers of image i


def start_noise(seed: int, index: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """The noise from which image `index` starts, float32 `[C,H,W]` on the CPU."""
    return torch.from_numpy(random_stream(seed, index, START).standard_normal(shape, dtype=np.float32))


def step_generator(seed: int, index: int) -> torch.Generator:
    """The generator, on the CPU, of the noise that the steps add to image `index`.

    torch's generator uses 32 bits of a seed. Its seeds are the indices plus an offset that depends on `seed`, so that
    no two images of a run share a generator.
    """
    first = int(random_stream(seed, 0, STEPS).integers(2**32))
    return torch.Generator().manual_seed((first + index) % 2**32)


def image_label(seed: int, index: int, labels: list[int], class_balance: str) -> int:
    """The class of image `index`, out of `labels`: each in turn (`"balanced"`), or a random one (`"random"`)."""
    if class_balance == "balanced":
        return labels[index % len(labels)]
    return labels[random_stream(seed, index, LABEL).integers(len(labels))]


# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def flow_shift(own: dict) -> float:
    """The shift of a pipeline's own flow scheduler, given its options; 1 by default. All samplers but SDE keep it."""
    return own.get("shift", own.get("flow_shift", 1.0))


def flow_options(own: dict) -> dict:
    """The options with which a multistep solver of diffusers integrates a flow.

    Args:
        own: the options of the pipeline's own scheduler.
    """
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": flow_shift(own)}


def noise_schedule(own: dict) -> dict:
    """The betas of a pipeline's own diffusion scheduler, given its options; DiT's by default. Samplers keep them."""
    names = ("num_train_timesteps", "beta_start", "beta_end")
    betas = {name: own.get(name, ddpm.SCHEDULER_CONFIG[name]) for name in names}
    return betas | {
        "beta_schedule": own.get("beta_schedule", "linear"),
        "trained_betas": own.get("trained_betas"),
    }


# The samplers for each kind of prediction. Each is a function that returns a scheduler, given the transformer's config
# and the options of the pipeline's own scheduler.
SAMPLERS: dict[str, dict[str, Callable]] = {
    "velocity": {
        "ode": lambda config, own: FlowMatchEulerDiscreteScheduler(shift=flow_shift(own)),
        "heun": lambda config, own: FlowMatchHeunDiscreteScheduler(shift=flow_shift(own)),
        "dpmsolver++": lambda config, own: DPMSolverMultistepScheduler(**flow_options(own)),
        "unipc": lambda config, own: UniPCMultistepScheduler(**flow_options(own)),
        "sde": lambda config, own: SiTSDEScheduler(),
    },
    "epsilon": {
        "ddim": lambda config, own: DDIMScheduler(
            **noise_schedule(own), clip_sample=False, timestep_spacing="trailing"
        ),
        # DiT's spacing, from 999 to 0.
        "ddpm": lambda config, own: DDPMScheduler(
            **noise_schedule(own),
            clip_sample=False,
            timestep_spacing="linspace",
            variance_type="learned_range" if config.learn_sigma else "fixed_small",
        ),
        "dpmsolver++": lambda config, own: DPMSolverMultistepScheduler(**noise_schedule(own)),
        "unipc": lambda config, own: UniPCMultistepScheduler(**noise_schedule(own)),
    },
}


def set_sampler(pipeline: VRPOPipeline, sampler: str, name: str):
    """Sets the pipeline's scheduler to that of `sampler`; `"default"` keeps the pipeline's own.

    Args:
        pipeline: the pipeline.
        sampler: `"default"`, or a name of `SAMPLERS` for the kind of prediction.
        name: the name of the pipeline, for the error.

    Raises:
        InputError: if the sampler cannot be combined with what the model predicts.
    """
    config = pipeline.transformer.config
    if sampler == "default":
        return
    if sampler not in SAMPLERS[config.prediction_type]:
        what = {"velocity": "velocities", "epsilon": "noise"}[config.prediction_type]
        raise InputError(
            "sampler",
            f"`sampler` {sampler} cannot be combined with PIPELINE {name}, which predicts {what}; use "
            f"{', '.join(SAMPLERS[config.prediction_type])} or default",
        )
    pipeline.scheduler = SAMPLERS[config.prediction_type][sampler](config, pipeline.scheduler_options)


def check_steps(pipeline: VRPOPipeline, num_inference_steps: int, option: str = "num_inference_steps"):
    """Checks the number of steps and, by a step on zeros, that the scheduler draws noise only from a given generator.

    Raises:
        InputError: if the scheduler does not accept the number of steps, or draws noise without the generator.
    """
    name = type(pipeline.scheduler).__name__
    try:
        pipeline.prepare_times(num_inference_steps, "cpu")
    except ValueError as error:
        raise InputError(option, f"`{option}` {num_inference_steps}: {first_line(error)}") from error
    scheduler = pipeline.scheduler
    if isinstance(scheduler, DDIMScheduler):
        # DDIM always steps down by this stride (diffusers issue 12633), even if its next timestep is at another
        # distance.
        stride = scheduler.config.num_train_timesteps // num_inference_steps
        if (scheduler.timesteps[:-1] - scheduler.timesteps[1:] != stride).any():
            raise InputError(
                option,
                f"`{option}` {num_inference_steps}: diffusers' DDIM needs a divisor of "
                f"{scheduler.config.num_train_timesteps} (and timestep_spacing 'trailing' or 'leading'), else its steps miss "
                "its timesteps; `sampler` dpmsolver++ takes any number",
            )
    channels = pipeline.transformer.config.in_channels
    x, prediction = torch.zeros(1, channels, 2, 2), torch.zeros(1, channels * (1 + pipeline.learned_variance), 2, 2)
    state = torch.get_rng_state()
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    generator = {"generator": [torch.Generator().manual_seed(0)]} if takes_generator else {}
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(prediction, scheduler.timesteps[0], x, **generator)
    if not torch.equal(torch.get_rng_state(), state):
        raise InputError(None, f"the pipeline's {name} draws noise that no seed fixes; choose another scheduler")


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def sampling_arguments(pipeline: VRPOPipeline, args: argparse.Namespace) -> dict:
    """Returns the arguments of the pipeline's call that are the same for every batch.

    Raises:
        InputError: if an option does not apply to this pipeline.
    """
    config = pipeline.transformer.config
    channels = config.in_channels if args.guidance_channels == "all" else args.guidance_channels
    channels = channels or config.guidance_channels or config.in_channels
    scale = args.guidance_scale
    if scale is None:
        scale = 1.5 if pipeline.transformer.null_class_id is not None and config.num_classes > 1 else 1.0
    ignored = {
        "guidance_interval": args.guidance_interval != [0.0, 1.0],
        "guidance_channels": args.guidance_channels is not None,
    }
    if scale == 1 and any(ignored.values()):
        name = next(name for name, given in ignored.items() if given)
        value = getattr(args, name)
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        raise InputError(
            name, f"`{name}` {value} has no effect with guidance scale 1, which turns guidance off; remove it"
        )
    arguments = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": scale,
        "guidance_interval": tuple(args.guidance_interval),
        "guidance_channels": channels,
    }
    if pipeline.vae is None and config.in_channels not in (1, 3):
        raise InputError(
            "vae",
            f"PIPELINE {args.pipeline} has no autoencoder for its {config.in_channels}-channel latents; `vrpo convert` "
            "adds one with `vae`",
        )
    if pipeline.vae is None and args.vae_dtype != "float32":
        raise InputError(
            "vae_dtype", f"`vae_dtype` {args.vae_dtype}: PIPELINE {args.pipeline} has no autoencoder; remove it"
        )
    try:
        pipeline.check_inputs(num_images_per_label=1, **arguments, output_type="pt", tensor_inputs=())
    except ValueError as error:
        raise InputError(None, f"PIPELINE {args.pipeline}: {error}") from error
    return arguments


@torch.no_grad()
def sample_batch(pipeline: VRPOPipeline, indices: range, labels: list[int], seed: int, arguments: dict) -> np.ndarray:
    """Draws some images of a run, uint8 `[B,H,W,3]`; grey images have three equal channels.

    Args:
        pipeline: the pipeline.
        indices: the numbers of the images in the run.
        labels: their classes.
        seed: the seed of the run.
        arguments: steps and guidance, as `sampling_arguments` returns them.

    Raises:
        InputError: if an image is not finite.
    """
    config = pipeline.transformer.config
    size = config.sample_size
    shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    latents = pipeline(
        labels,
        latents=torch.stack([start_noise(seed, i, shape) for i in indices]),
        generator=[step_generator(seed, i) for i in indices],
        output_type="latent",
        **arguments,
    ).images
    images, finite = decoded_images(pipeline, latents)
    if not finite.all():
        raise InputError(
            "dtype",
            f"image {indices[finite.tolist().index(False)]} is not finite; are the weights sound, and would `dtype` bfloat16 or "
            "float32 do?",
        )
    return images.permute(0, 2, 3, 1).cpu().contiguous().numpy()


@torch.no_grad()
def decoded_images(pipeline: VRPOPipeline, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes latents to images, uint8 `[B,3,H,W]`; grey images get three equal channels.

    Returns:
        the images, and whether each is finite, bool `[B]`.
    """
    # The autoencoder computes in its own dtype, even under the autocast of training.
    with torch.autocast(latents.device.type, enabled=False):
        pixels = pipeline.decode_latents(latents)
    finite = latents.isfinite().flatten(1).all(1) & pixels.isfinite().flatten(1).all(1)
    images = pipeline.image_processor.postprocess(pixels.nan_to_num(), output_type="pt")
    return (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1), finite


def image_grid(
    images: list[Image.Image],
    columns: int,
    min_size: int = 64,
    gap: int = 2,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Arranges images of one size in rows of `columns`; small ones are enlarged smoothly to at least `min_size`.

    Args:
        columns: the number of images in a row.
        min_size: the smallest side of an image in the grid, in pixels.
        gap: the distance between images in pixels.
        captions: the names of the columns, which are written above them in up to two lines.
    """
    width, height = images[0].size
    factor = max(1, -(-min_size // min(width, height)))
    width, height = width * factor, height * factor
    rows = -(-len(images) // columns)
    head = [] if captions is None else column_heads(captions, width + gap)
    top = max((part.height for part in head), default=0)
    grid = Image.new("RGB", (columns * (width + gap) - gap, top + rows * (height + gap) - gap), "white")
    for i, part in enumerate(head):
        grid.paste(part, (i * (width + gap), top - part.height))
    for i, image in enumerate(images):
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        grid.paste(image, (i % columns * (width + gap), top + i // columns * (height + gap)))
    return grid


def column_heads(captions: Sequence[str], width: int) -> list[Image.Image]:
    """Draws each caption on an image of this width, in one or two lines, which are shortened if they do not fit."""
    size = min(16, max(11, width // 8))
    font = ImageFont.load_default(size)

    def shortened(text: str) -> str:
        while font.getlength(text) > width - 4 and len(text) > 1:
            text = text.rstrip("…")[:-1].rstrip() + "…"
        return text

    heads = []
    for caption in captions:
        lines = [""]
        for word in caption.split():
            longer = f"{lines[-1]} {word}".strip()
            if len(lines) == 2 or not lines[-1] or font.getlength(longer) <= width - 4:
                lines[-1] = longer
            else:
                lines.append(word)
        head = Image.new("RGB", (width, (size + 3) * len(lines) + 3), "white")
        draw = ImageDraw.Draw(head)
        for number, line in enumerate(lines):
            draw.text((width / 2, 1 + number * (size + 3)), shortened(line), fill="#1b1b1b", font=font, anchor="ma")
        heads.append(head)
    return heads
