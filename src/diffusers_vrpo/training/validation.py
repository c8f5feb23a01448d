# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Validation of a run: sample grids, and the Fréchet distance of samples to training images."""

import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..command_line import as_id
from ..config import last_part
from ..data.sources import TrainingData, classes_to_sample
from ..errors import InputError, first_line
from ..evaluation.feature_statistics import FeatureSet, collect_features, describe, shared_statistics
from ..evaluation.image_encoders import load_image_encoder
from ..evaluation.metrics import frechet_distance
from ..pipelines.adapters import ModelAdapter
from ..pipelines.pipeline_vrpo import VRPOPipeline
from ..pipelines.sampling import check_steps, image_grid, sample_batch, step_generator
from .callbacks import TrainerCallback
from .distributed import full_pipeline
from .interruption import Interruption
from .metrics import read_metrics
from .trackers import log_image


logger = get_logger(__name__)
SAMPLES = 2048
REFERENCE_IMAGES = 10_000  # training images behind the Fréchet distance; all of them if there are fewer


class Validation(TrainerCallback):
    """Draws samples of the averaged model every `validation_steps` and at the end, and early grids in the first steps.

    The grid has one column per class, always from the same noise. With `fd_encoder`, `num_fd_samples` unguided samples, always
    of the same classes from the same noise, are compared with training images by the Fréchet distance of their features;
    `metrics.jsonl` records it as `validation/fd_{encoder}`. All processes share that work.

    Raises:
        InputError: if the model does not have a label, an encoder cannot be loaded, or the data have no images.
    """

    def __init__(
        self,
        args,
        accelerator: Accelerator,
        pipeline: VRPOPipeline,
        data: TrainingData,
        output_dir: Path,
        interruption: Interruption,
    ):
        self.args = args
        self.accelerator = accelerator
        self.pipeline = pipeline
        self.output_dir = output_dir
        self.interruption = interruption
        self.classes = classes_to_sample(data)
        self.check_pipeline(data)
        self.fd_encoder = None
        self.grid: Image.Image | None = None  # the newest grid, on the main process only
        if args.fd_encoder:
            self.num_samples = args.num_fd_samples or SAMPLES
            if self.num_samples < 2:
                raise InputError(
                    "num_fd_samples",
                    f"`num_fd_samples` {args.num_fd_samples} is too few for a covariance; use {SAMPLES} or more",
                )
            if not data.has_images:
                raise InputError(
                    "fd_encoder",
                    f"`fd_encoder` {args.fd_encoder} needs images to compare with, and `latents_dir` {args.latents_dir} has none; "
                    "prepare it again with `images` webp",
                )
            self.name = f"validation/fd_{last_part(args.fd_encoder)}"
            with accelerator.main_process_first():
                self.fd_encoder = load_image_encoder(
                    args.fd_encoder, device=accelerator.device, cache_dir=args.cache_dir, option="fd_encoder"
                )
            self.reference = self.reference_moments(data)

    def check_pipeline(self, data: TrainingData):
        """Chooses the classes of the grid, and checks that the pipeline can sample them with these options.

        Raises:
            InputError: if the pipeline cannot.
        """
        self.columns = grid_columns(self.pipeline, self.args.validation_labels, self.classes)
        check_steps(self.pipeline, self.args.num_inference_steps)

    def on_train_begin(self, trainer):
        """Validates the step of the checkpoint if the run was interrupted between that checkpoint and its validation.

        The last step is left to `on_train_end`.
        """
        step, length, missing = trainer.step, trainer.length, False
        due = (length.validates(step) or length.draws_early(step)) and step < trainer.max_train_steps
        if self.accelerator.is_main_process and due:
            rows = read_metrics(trainer.metrics_file.path)
            needs_distance = self.fd_encoder is not None and not length.draws_early(step)
            measured = not needs_distance or any(row["step"] == step and self.name in row for row in rows)
            missing = not (measured and grid_file(self.output_dir, step).exists())
        if broadcast_object_list([missing])[0]:
            self.validate(trainer)

    def on_evaluate(self, trainer):
        due = trainer.length.validates(trainer.step) or trainer.length.draws_early(trainer.step)
        if due and trainer.step < trainer.max_train_steps:
            self.validate(trainer)

    def on_train_end(self, trainer):
        self.validate(trainer)

    def validate(self, trainer):
        """Draws the grid of the trainer's step and, unless it is an early one, measures the distance.

        All processes must call it.
        """
        accelerator, step = self.accelerator, trainer.step
        early = trainer.length.draws_early(step) and step < trainer.max_train_steps
        measures = self.fd_encoder is not None and not early
        with full_pipeline(accelerator, self.pipeline, trainer.ema, everywhere=measures) as averaged:
            if accelerator.is_main_process:
                self.grid = self.draw(step, averaged)
            if measures:
                values = {self.name: self.distance(averaged)}
                # An interrupted validation has no result; the resumed run repeats it.
                if accelerator.is_main_process and not self.interruption.signum:
                    logger.info(f"step {step}: {self.name} {values[self.name]:.2f}")
                    trainer.log(values)

    def draw(self, step: int, averaged: VRPOPipeline) -> Image.Image:
        """Draws and saves the grid of a step, on the main process."""
        grid = self.draw_grid(averaged)
        save_samples(self.accelerator, self.output_dir, step, grid)
        return grid

    def draw_grid(self, averaged: VRPOPipeline) -> Image.Image:
        """Draws the grid of a pipeline, always from the same noise."""
        args, device = self.args, self.accelerator.device
        drawing = (args.num_validation_images, args.num_inference_steps, args.guidance_scale, args.seed)
        return draw_samples(averaged, self.columns, *drawing, device)

    def draw_batch(self, pipeline: VRPOPipeline, indices: range, labels: list[int]) -> np.ndarray:
        """Draws unguided images of the classes `labels`, image i from the noise of index i: uint8 `[B,H,W,3]`.

        Raises:
            InputError: if an image is not finite.
        """
        options = {"num_inference_steps": self.args.num_inference_steps, "guidance_scale": 1.0}
        return sample_batch(pipeline, indices, labels, self.args.seed, options)

    def distance(self, pipeline: VRPOPipeline) -> float:
        """Computes the Fréchet distance of samples of `pipeline` to the reference; NaN if an image is not finite."""
        count, classes = self.num_samples, self.classes
        pipeline.set_progress_bar_config(disable=True)

        def batches():
            for indices in self.own_batches(count):
                if self.interruption.signum:
                    yield None
                    return
                # Every class with images appears equally often, up to a difference of one.
                labels = [classes[i * len(classes) // count] for i in indices]
                try:
                    with self.accelerator.autocast():
                        images = self.draw_batch(pipeline, indices, labels)
                except InputError as error:
                    # An image is not finite. Training continues, and no process waits for another.
                    logger.warning(f"{self.name}: {error}", main_process_only=False)
                    images = None
                yield images

        mean, covariance = self.moments(batches())
        return frechet_distance(*self.reference, mean, covariance) if mean.isfinite().all() else math.nan

    def reference_moments(self, data) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `[D]` and covariance `[D,D]` of the features of training images, the same for every run on these data.

        They are cached in the output folder for a resumed run.
        """
        resolution, file = self.args.resolution, self.output_dir / "fd_reference.safetensors"
        rows = data.fixed_rows(REFERENCE_IMAGES)
        first = data.examples(rows[:16], resolution)[0]
        images = {"count": len(rows), "of": len(data), "size": [resolution, resolution]}
        images["checksum"] = zlib.crc32(first.tobytes(), zlib.crc32(rows.tobytes()))

        def compute() -> FeatureSet:
            logger.info(f"{self.name}: features of {len(rows)} training images")
            batches = (rows[own.start : own.stop] for own in self.own_batches(len(rows)))
            mean, covariance = self.moments(data.examples(batch, resolution)[0] for batch in batches)
            return FeatureSet(len(rows), {"pool": (mean.cpu(), covariance.cpu())})

        description = describe(images, self.args.fd_encoder, self.fd_encoder, max_features=0)
        known = shared_statistics(file, description, compute, self.accelerator)
        data.release()
        return tuple(tensor.to(self.device) for tensor in known.moments["pool"])

    @property
    def device(self) -> torch.device:
        """The device of the moments: the CPU on Apple's GPUs, which do not support float64."""
        return torch.device("cpu") if self.accelerator.device.type == "mps" else self.accelerator.device

    def own_batches(self, count: int) -> list[range]:
        """The batches of `range(count)` that this process computes, in ascending order."""
        size, rank, processes = (
            self.args.train_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        return batches[rank * len(batches) // processes : (rank + 1) * len(batches) // processes]

    def moments(self, batches: Iterable[np.ndarray | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes mean `[D]` and covariance `[D,D]` of the features of all processes' images.

        Args:
            batches: this process's images, uint8 `[B,H,W,3]`; a None makes the result NaN.
        """
        tensors = (None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2) for images in batches)
        moments, _ = collect_features(self.fd_encoder, ((None, images) for images in tensors), self.accelerator)
        return moments["pool"].mean, moments["pool"].covariance


class AdapterValidation(Validation):
    """The validation for a pipeline that an adapter has made: `ModelAdapter.sample` draws all images.

    Args:
        adapter: the adapter of the transformer in training. The other arguments are those of `Validation`.
    """

    def __init__(self, args, accelerator, pipeline, data, output_dir, interruption, adapter: ModelAdapter):
        self.adapter = adapter
        super().__init__(args, accelerator, pipeline, data, output_dir, interruption)

    def check_pipeline(self, data: TrainingData):
        """Chooses the classes of the grid, and checks the number of steps with the pipeline's scheduler.

        Raises:
            InputError: if the data do not have one of the classes, or the scheduler does not accept the number of steps.
        """
        args, self.id2label = self.args, data.id2label
        ids = {name.strip().lower(): label for label, name in (data.id2label or {}).items()}
        labels = args.validation_labels or spread_classes(self.classes)
        self.columns = [ids.get(str(label).strip().lower(), as_id(label)) for label in labels]
        for label in self.columns:
            if label not in range(data.num_classes):
                raise InputError(
                    "validation_labels",
                    f"`validation_labels` {label!r} is neither a class id below {data.num_classes} nor the name of a class",
                )
        try:
            self.pipeline.scheduler.set_timesteps(args.num_inference_steps)
        except (ValueError, AttributeError) as error:
            raise InputError(
                "num_inference_steps", f"`num_inference_steps` {args.num_inference_steps}: {first_line(error)}"
            ) from error

    def draw_images(self, pipeline, indices: range, labels: list[int], guidance_scale: float) -> list[Image.Image]:
        """Draws images of the classes `labels`, image i with the generator of (seed, i)."""
        args = self.args
        pipeline.set_progress_bar_config(disable=True)
        generators = [step_generator(args.seed, i) for i in indices]
        return self.adapter.sample(pipeline, labels, generators, args.num_inference_steps, guidance_scale)

    def draw_grid(self, averaged) -> Image.Image:
        """Draws the grid of a pipeline, always from the same noise."""
        labels = self.columns * self.args.num_validation_images
        images = self.draw_images(averaged, range(len(labels)), labels, self.args.guidance_scale)
        return image_grid(images, len(self.columns), captions=captions_of(self.columns, self.id2label))

    def draw_batch(self, pipeline, indices: range, labels: list[int]) -> np.ndarray:
        """Draws unguided images of the classes `labels`: uint8 `[B,H,W,3]`."""
        images = self.draw_images(pipeline, indices, labels, guidance_scale=1.0)
        return np.stack([np.asarray(image.convert("RGB")) for image in images])


def spread_classes(classes: list[int]) -> list[int]:
    """Ten of the classes, evenly spread, or all of them if there are fewer."""
    columns = min(10, len(classes))
    return [classes[int(i * len(classes) / columns)] for i in range(columns)]


def grid_columns(pipeline: VRPOPipeline, labels: list[str] | None, classes: list[int]) -> list[int]:
    """The ids of the classes in `validation_labels`, which are names or ids; by default those of `spread_classes`.

    Raises:
        InputError: if the model does not have one of the classes.
    """
    labels = labels or spread_classes(classes)
    try:
        return pipeline.get_label_ids([c if str(c).lower() in pipeline.labels else as_id(c) for c in labels])
    except ValueError as error:
        raise InputError("validation_labels", f"`validation_labels`: {error}") from error


def draw_samples(
    pipeline: VRPOPipeline,
    labels: list[int],
    images_per_label: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    device: torch.device,
) -> Image.Image:
    """Draws a grid with one column per class, from the noise of the seed; without guidance if there is no null class."""
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
    return image_grid(images, len(labels), captions=captions_of(labels, pipeline.config.get("id2label")))


def captions_of(labels: list[int], id2label: dict | None) -> list[str] | None:
    """The captions above the columns of a grid: the first name of each class, or its id.

    A single class without a name has no caption (None).
    """
    names = {int(label): str(name).split(",")[0].strip() for label, name in (id2label or {}).items()}
    if not names and len(labels) == 1:
        return None
    return [names.get(label) or f"class {label}" for label in labels]


def grid_file(output_dir: Path, step: int) -> Path:
    return output_dir / "samples" / f"step-{step:07d}.png"


def save_samples(accelerator: Accelerator, output_dir: Path, step: int, grid: Image.Image):
    """Saves a grid of samples as a file, and logs it to the trackers that accept images."""
    path = grid_file(output_dir, step)
    try:
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    except OSError as error:  # a grid that cannot be saved, for example on a full disk, must not end a run
        logger.error(f"the sample grid {path} could not be written ({error.strerror or error}); training continues")

    log_image(accelerator, "samples", grid, step)
