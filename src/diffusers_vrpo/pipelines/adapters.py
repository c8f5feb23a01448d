# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Adapters: how the trainer calls, samples and saves a transformer, one class per kind of model."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from ..errors import InputError
from ..models import ddpm
from ..models.official_checkpoints import default_scheduler
from ..models.transformer_sit import SiTTransformer2DModel
from .pipeline_vrpo import VRPOPipeline


logger = logging.getLogger(__name__)


class ModelAdapter:
    """Tells [`VRPOTrainer`] how to call, sample and save a diffusers transformer. Derive a class per kind of model.

        class PixArtAdapter(ModelAdapter):
            prediction_type = "epsilon"

            def call(self, model, x_t, timestep, batch):
                return model(x_t, timestep=timestep, encoder_hidden_states=self.captions[batch["class_labels"]])

    The trainer computes `x_t`, the timestep and the target according to `prediction_type` and `time_direction`. With
    `"velocity"`, `x_t = (1 - t) x_0 + t noise`, the timestep t is in [0, 1), where 1 is noise, and the target is
    `noise - x_0`; with `"noise_to_data"`, the timestep is `1 - t` and the target is `x_0 - noise`. With `"epsilon"`,
    the diffusion is DiT's with a linear schedule, the timestep is int64 in 0 ... 999, and the target is the noise. If
    a model counts time in another unit, such as `1000 t`, its `call` converts it.

    Attributes:
        prediction_type (`str`): `"velocity"` or `"epsilon"`.
        time_direction (`str`): `"data_to_noise"`, or `"noise_to_data"` for velocities in the opposite direction.
        learns_variance (`bool`): the prediction has a second set of channels for the variance of the diffusion, which
            is trained by the variational bound.
        null_class_id (`int`, *optional*): the label that stands for no class; without it, every sample keeps its
            class.
        num_classes (`int`, *optional*): the number of classes that the model has; None if it accepts any number.
        label_dropout (`float`): the share of samples that get the null class, unless `VRPOConfig(label_dropout=...)`
            sets it.
    """

    prediction_type: str = "velocity"
    time_direction: str = "data_to_noise"
    learns_variance: bool = False
    null_class_id: int | None = None
    num_classes: int | None = None
    label_dropout: float = 0.1

    def prepare(self, transformer: torch.nn.Module) -> None:
        """Sets the attributes that depend on the transformer; called once, before anything else."""

    def call(
        self, model: Any, x_t: torch.Tensor, timestep: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Computes the prediction of the model. Every subclass must have this method.

        Args:
            model: must be called once, with the arguments of the transformer's `forward`; returns its prediction.
            x_t (`torch.Tensor`): noisy latents, or pixels, `[B,C,H,W]`.
            timestep (`torch.Tensor`): `[B]`, in the convention of `prediction_type` and `time_direction`.
            batch (`dict[str, torch.Tensor]`): `class_labels [B]`, where dropped ones are replaced by `null_class_id`;
                `noise`; and the images, `pixels [B,3,R,R]` in [-1, 1], unless the latents come from a latent cache.

        Returns:
            `[B,C,H,W]`, or `[B,2C,H,W]` with `learns_variance`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `call(model, x_t, timestep, batch)`")

    def patch_size(self, transformer: torch.nn.Module) -> int:
        """Returns the side of a token's patch in latents; by default, the config's `patch_size`, or 1 without it."""
        return getattr(transformer.config, "patch_size", None) or 1

    def pipeline(
        self,
        transformer: torch.nn.Module,
        vae: torch.nn.Module | None,
        id2label: dict[int, str] | None,
        trained_labels: list[int] | None = None,
    ) -> DiffusionPipeline | None:
        """Builds the pipeline that validation samples from and `save_model` saves.

        Args:
            transformer: the model in training.
            vae: the autoencoder of the run; None for pixels.
            id2label: the names of the classes, if the data have any.
            trained_labels: the ids of the classes that have images.

        Returns:
            the pipeline, or None, the default, if there is none. Without a pipeline, no samples are drawn,
            `save_model` saves only the transformer, and the run cannot be published.

        Raises:
            InputError: if the pipeline cannot be used with this run.
        """
        return None

    def sample(
        self,
        pipeline: DiffusionPipeline,
        class_labels: list[int],
        generators: list[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> list[Image.Image]:
        """Draws one image per class label; by default, it calls the pipeline with arguments of these names.

        Args:
            pipeline: the pipeline that the method `pipeline` returned.
            class_labels: ids of classes.
            generators: one per image, on the CPU; the noise of an image must come from its generator.
            num_inference_steps: the number of solver steps.
            guidance_scale: the scale of classifier-free guidance; 1 for none.

        Returns:
            the images, in the order of the labels.
        """
        return pipeline(
            class_labels=class_labels,
            generator=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pil",
        ).images


class SiTAdapter(ModelAdapter):
    """The adapter of [`SiTTransformer2DModel`], which the trainer uses for presets and checkpoints."""

    def prepare(self, transformer: SiTTransformer2DModel) -> None:
        """Sets the attributes from the transformer's config."""
        config = transformer.config
        self.prediction_type, self.time_direction = config.prediction_type, config.time_direction
        self.learns_variance = config.learn_sigma and config.prediction_type == "epsilon"
        self.null_class_id, self.num_classes = transformer.null_class_id, config.num_classes
        self.label_dropout = config.class_dropout_prob

    def call(
        self, model: Any, x_t: torch.Tensor, timestep: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Computes the prediction, with the variance if it is trained."""
        return model(x_t, timestep, batch["class_labels"], return_variance=self.learns_variance)

    def pipeline(
        self,
        transformer: SiTTransformer2DModel,
        vae: torch.nn.Module | None,
        id2label: dict[int, str] | None,
        trained_labels: list[int] | None = None,
    ) -> VRPOPipeline:
        """Builds a [`VRPOPipeline`] with an Euler scheduler, or DDIM for a model that predicts noise."""
        scheduler = default_scheduler(self.prediction_type)
        return VRPOPipeline(transformer, scheduler, vae, id2label, trained_labels)


class DiTAdapter(ModelAdapter):
    """The adapter of diffusers' class-conditional `DiTTransformer2DModel`: integer timesteps, noise, `DiTPipeline`.

    A model with `out_channels = 2 * in_channels` also learns the variance. `prepare` turns off the model's own label
    dropout, which would drop different labels in every block; the trainer drops a share `label_dropout` of them
    instead.

    `DiTPipeline` always uses 1000 as the null class, so models with another number of classes are sampled without
    guidance.
    """

    prediction_type = "epsilon"

    def prepare(self, transformer: DiTTransformer2DModel) -> None:
        """Sets the attributes from the transformer's config, and turns off the label dropout inside the blocks."""
        config = transformer.config
        self.num_classes = config.num_embeds_ada_norm
        self.null_class_id = config.num_embeds_ada_norm
        self.learns_variance = transformer.out_channels == 2 * config.in_channels
        # DiTPipeline cannot handle None, the default of `out_channels`.
        transformer.register_to_config(out_channels=transformer.out_channels)
        for block in transformer.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def call(
        self, model: Any, x_t: torch.Tensor, timestep: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Computes the predicted noise, with the variance if it is trained."""
        return model(x_t, timestep=timestep, class_labels=batch["class_labels"])

    def pipeline(
        self,
        transformer: DiTTransformer2DModel,
        vae: torch.nn.Module | None,
        id2label: dict[int, str] | None,
        trained_labels: list[int] | None = None,
    ) -> DiTPipeline:
        """Builds a `DiTPipeline` with a DDIM scheduler on DiT's noise schedule.

        Raises:
            InputError: if there is no autoencoder, or `DiTPipeline` would not undo its shift.
        """
        if vae is None:
            raise InputError("vae", "`vae` none: diffusers' DiTPipeline decodes latents; give an autoencoder")
        shifted = [name for name in ("shift_factor", "latents_mean") if vae.config.get(name)]
        if shifted:
            raise InputError(
                "vae",
                f"`vae`: diffusers' DiTPipeline decodes without the {shifted[0]} of a {type(vae).__name__}; give an "
                "autoencoder without one, such as stabilityai/sd-vae-ft-ema",
            )
        if self.num_classes != 1000:
            logger.info(
                f"samples are not guided: the null class of DiTPipeline is 1000, and there are {self.num_classes} classes"
            )
        pipeline = DiTPipeline(transformer, vae, DDIMScheduler(**ddpm.SCHEDULER_CONFIG), id2label)
        # DiTPipeline reads the names from `model_index.json`, but does not write them.
        pipeline.register_to_config(id2label={str(label): name for label, name in (id2label or {}).items()} or None)
        return pipeline

    def sample(
        self,
        pipeline: DiTPipeline,
        class_labels: list[int],
        generators: list[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> list[Image.Image]:
        """Draws one image per class label, with guidance only if the model has 1000 classes."""
        scale = guidance_scale if self.num_classes == 1000 else 1.0
        return super().sample(pipeline, class_labels, generators, num_inference_steps, scale)


ADAPTERS = {DiTTransformer2DModel: DiTAdapter, SiTTransformer2DModel: SiTAdapter}


def adapter_for(transformer: torch.nn.Module) -> ModelAdapter:
    """Returns the package's adapter for a transformer.

    Raises:
        InputError: if the package has none for its class.
    """
    for kind, adapter in ADAPTERS.items():
        if isinstance(transformer, kind):
            return adapter()
    known = " and ".join(kind.__name__ for kind in ADAPTERS)
    raise InputError(
        "adapter",
        f"`adapter` is missing: {known} have one already, but for a {type(transformer).__name__} you must write a subclass of "
        "ModelAdapter",
    )


class TransformerAlone:
    """Stands in for the pipeline of an adapter that has none: it saves the transformer and cannot sample."""

    def __init__(self, transformer: torch.nn.Module):
        self.transformer = transformer

    def save_pretrained(self, folder: str | Path):
        """Saves the transformer in `folder/transformer`, which `from_pretrained` of its class opens."""
        self.transformer.save_pretrained(Path(folder) / "transformer")


class ModelCall:
    """The model that an adapter calls: it adds the arguments of alignment, and keeps what comes with the prediction.

    Attributes:
        projections: the projected tokens of the last call.
    """

    def __init__(self, model: torch.nn.Module, transformer: torch.nn.Module, **alignment):
        self.model, self.transformer, self.alignment = model, transformer, alignment
        self.projections: tuple[torch.Tensor, ...] = ()

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        self.given = args, kwargs
        prediction, self.projections = self.model(*args, **kwargs, **self.alignment)
        return prediction

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the last call by the names that the transformer's `forward` gives them."""
        args, kwargs = self.given
        return dict(inspect.signature(self.transformer.forward).bind(*args, **kwargs).arguments)
