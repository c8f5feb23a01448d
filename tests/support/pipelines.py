# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Pipelines without a progress bar, and one whose velocity is known exactly."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.models import ddpm
from support.models import TINY, tiny_model


FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NAMES = {0: "goldfish, Carassius auratus", 1: "crane", 2: "crane", 3: "tench", 4: "great white shark"}


def quiet_pipeline(model, scheduler) -> VRPOPipeline:
    """A pipeline without an autoencoder and without a progress bar."""
    pipeline = VRPOPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, labels=(0, 3), **arguments):
    """Images of a pipeline from noise of seed 0, as latents unless told otherwise."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 3, "output_type": "latent", "generator": generator, **arguments}
    return pipeline(list(labels) if isinstance(labels, tuple) else labels, **arguments).images


MEAN, STD = 0.7, 0.5
ALPHA_BAR = DDPMScheduler(**ddpm.SCHEDULER_CONFIG).alphas_cumprod


class ExactGaussian(SiTTransformer2DModel):
    """The exact velocity or noise of data from N(MEAN, STD²), without a network."""

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        x, t = hidden_states, timestep
        if self.config.prediction_type == "epsilon":
            signal, noise = ALPHA_BAR[t.long()].sqrt(), (1 - ALPHA_BAR[t.long()]).sqrt()
            return (noise * (x - signal * MEAN) / ((signal * STD) ** 2 + noise**2),)
        variance = ((1 - t) * STD) ** 2 + t**2
        return ((t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN,)


def exact_gaussian(**config) -> ExactGaussian:
    """A model of the given config that predicts exactly."""
    return ExactGaussian(**{**TINY, "class_dropout_prob": 0.0, **config})


def moment_errors(pipeline, steps) -> tuple[float, float]:
    """Relative errors of mean and standard deviation, from 2**18 numbers of a start with exact moments."""
    # Another seed than that of the steps: their noise must not be the start's.
    noise = torch.randn(4, 4, 128, 128, generator=torch.Generator().manual_seed(1))
    noise = (noise - noise.mean()) / noise.std()
    images = sample(pipeline, (0,) * 4, guidance_scale=1, latents=noise, num_inference_steps=steps)
    return abs(images.mean().item() / MEAN - 1), abs(images.std().item() / STD - 1)


def save_pipeline(folder: Path, scheduler=None, **options) -> VRPOPipeline:
    """Saves a small pipeline of pixels with names of classes, and returns it."""
    names = {0: "goldfish, Carassius auratus", 1: "crane"}
    pipeline = VRPOPipeline(tiny_model(in_channels=3), scheduler or FlowMatchEulerDiscreteScheduler(), id2label=names)
    pipeline.save_pretrained(folder, **options)
    return pipeline
