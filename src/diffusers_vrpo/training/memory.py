# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Counts the GPU memory that a training step needs, without a GPU and without data.

A micro-step of the real model and the real objective runs on fake tensors, which have shapes and types but no content, and
every storage that is made or freed is tracked. Two runs, with two and with three images, give the bytes at each moment of
the step as `constant + images * slope`, so that the peak is known for any batch size. A formula for a block would have to
be changed with the block; this count is exact and takes seconds for SiT-XL/2. The tests compare it with such a formula and
with what autograd saves.

The count includes neither the CUDA context, workspaces of kernels and memory lost to fragmentation, nor compiled blocks,
image rewards and the generative policy.
"""

import contextlib
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..alignment.attach import AlignedTransformer
from ..alignment.objective import SUBSET_SIZE, AlignmentStep, NoAlignment, objective_from_config
from ..config import VRPOConfig
from ..models.autoencoder import ON_A_GPU, encode_images
from ..models.flow import flow_matching_loss


HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class LiveBytes(TorchDispatchMode):
    """Tracks how many bytes are held by the tensors that operations inside the `with` block make.

    Attributes:
        bytes (`int`): bytes that are held now.
        timeline (`list[int]`): bytes that were held after each new storage.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.timeline: list[int] = []
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._watch(value.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_):
            del self._storages[key]
            self.bytes -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.timeline.append(self.bytes)


@dataclass
class Timeline:
    """The bytes that some work holds at every moment, each as `constant + images * slope`.

    Attributes:
        moments (`list[tuple[int, int]]`): constant and slope after each new storage.
        saved (`tuple[int, int]`): constant and slope between forward and backward pass, when autograd holds what it has
            saved.
    """

    moments: list[tuple[int, int]]
    saved: tuple[int, int]

    def peak(self, images: int) -> int:
        """The largest number of bytes held at any moment with `images` images."""
        return max(constant + images * slope for constant, slope in self.moments)

    def most_images(self, memory: float) -> int:
        """The largest number of images whose peak is at most `memory` bytes; 0 if even one image needs more."""
        if self.peak(1) > memory:
            return 0
        return int(min((memory - constant) // slope for constant, slope in self.moments if slope > 0))


def timeline_of(work: Callable[[int, LiveBytes], int]) -> Timeline:
    """Measures the timeline of work on fake tensors.

    Args:
        work: a function `work(images, live)` that is called inside `live`, makes the same tensors for any number of images,
            and returns the bytes held between its forward and its backward pass.
    """
    lines, saved = [], []
    for images in (2, 3):
        with LiveBytes() as live:
            saved.append(work(images, live))
        lines.append(live.timeline)

    def line_through(two: int, three: int) -> tuple[int, int]:
        return 3 * two - 2 * three, three - two

    moments = {line_through(two, three) for two, three in zip(*lines, strict=True)}
    return Timeline(sorted(moments), line_through(*saved))


def training_timeline(
    args: VRPOConfig, aligned: AlignedTransformer, latent_shape: tuple[int, int, int], with_pixels: bool
) -> Timeline:
    """Measures the timeline of a micro-step: the batch, forward pass, encoders, losses, backward pass and gradients.

    It does not include weights, averaged weights and the optimizer's moments. With gradient accumulation it is the timeline
    of two micro-steps, of which the second starts with gradients in memory.

    Args:
        args: the options; read are `objective` and its options, `mixed_precision` and `gradient_accumulation_steps`.
        aligned: the model on fake tensors, with encoders that accept batches as `with_pixels` describes them.
        latent_shape: channels, height and width.
        with_pixels: whether a batch holds images, for encoders or an autoencoder; a latent cache with features has none.
    """

    def work(images: int, live: LiveBytes) -> int:
        for parameter in aligned.parameters():
            parameter.grad = None
        # With epsilon, the mean weight over timesteps would be read from a tensor, and fake tensors have no values.
        objective = objective_from_config(args, aligned, 10**9, prediction_type="velocity")
        for _ in range(min(2, args.gradient_accumulation_steps)):
            batch = blank_batch(args, aligned, latent_shape, with_pixels, images)
            loss, _ = micro_step(args, aligned, objective, batch)
            saved = live.bytes
            loss.backward()
        return saved

    return timeline_of(work)


def blank_batch(
    args: VRPOConfig, aligned: AlignedTransformer, latent_shape: tuple[int, int, int], with_pixels: bool, images: int
) -> dict[str, torch.Tensor]:
    """A blank batch of a micro-step, as loader and autoencoder would return it; arguments as for `training_timeline`."""
    side = args.resolution if with_pixels else 1
    pixels = torch.zeros(images, 3, side, side)
    x0 = pixels if latent_shape == tuple(pixels.shape[1:]) else torch.zeros(images, *latent_shape)
    batch = {"pixels": pixels, "x0": x0, "noise": torch.randn_like(x0), "timestep": torch.rand(images)}
    batch["class_labels"] = torch.zeros(images, dtype=torch.long)
    if args.objective == "vrpo":
        num_tokens = math.prod(side // aligned.transformer.config.patch_size for side in latent_shape[1:])
        batch["tokens"] = torch.zeros(images, min(SUBSET_SIZE, num_tokens), dtype=torch.long)
    return batch


def micro_step(
    args: VRPOConfig,
    aligned: AlignedTransformer,
    objective: NoAlignment,
    batch: dict[str, torch.Tensor],
    part: Callable = contextlib.nullcontext,
) -> tuple[torch.Tensor, AlignmentStep]:
    """Computes the loss of a micro-step as `VRPOTrainer.compute_loss` does.

    Args:
        batch: as `blank_batch` returns it.
        part: called with the name of a part of the step, `objective` or `forward`; returns a context in which it runs.

    Returns:
        the loss, and the objective's step.
    """
    dtype, t, x0, noise = HALF.get(args.mixed_precision), batch["timestep"], batch["x0"], batch["noise"]
    channels = x0.shape[1]
    epsilon = aligned.transformer.config.prediction_type == "epsilon"
    learns_variance = aligned.transformer.config.learn_sigma and epsilon
    inputs = {
        "hidden_states": x0 + noise,
        "timestep": torch.zeros(len(x0), dtype=torch.long) if epsilon else t,
        "class_labels": batch["class_labels"],
    }
    target = noise if epsilon else noise - x0
    if learns_variance:
        inputs["return_variance"] = True

    with part("objective"):
        step = objective.begin(t, batch["pixels"])
    with part("forward"):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            prediction, projections = aligned(**inputs, fork=step.fork, align=step.active, scaffold=step.scaffold)
        prediction = prediction.float()  # as accelerate does
        projections = [projection.float() for projection in projections]

    with part("objective"):
        loss_fm = flow_matching_loss(prediction[:, :channels], target)
        loss = loss_fm.mean()
        if learns_variance:
            # A stand-in for the variational bound, which makes a few tensors of this size.
            loss = loss + (prediction[:, channels:].sigmoid() * target).square().mean()
        if aligned.layers:
            step.targets = objective.targets(batch["pixels"], features=step.features)
            draws = {"subset": batch.get("tokens"), "inputs": inputs}
            loss = loss + args.alignment_coeff * objective(step, projections, batch["pixels"], loss_fm, **draws)
        if step.scaffold is not None:
            loss = loss + args.scaffold_coeff * step.scaffold_distance()
    return loss, step


def encoding_timeline(vae: torch.nn.Module, resolution: int) -> Timeline:
    """Measures the timeline of encoding images with an autoencoder, at most `ON_A_GPU` of them at a time, as on a GPU."""

    def work(images: int, live: LiveBytes) -> int:
        latents = encode_images(vae, torch.zeros(images, 3, resolution, resolution), at_a_time=ON_A_GPU)
        return latents.untyped_storage().nbytes()

    return timeline_of(work)
