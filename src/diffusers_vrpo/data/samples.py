# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Training examples and the random numbers drawn for them.

Everything random about training example i (image, crop, flip, timestep, noise, label dropout) is a function of (seed, i),
where i counts the examples of the run. It does not depend on the process or the time of the draw: a resumed run, a run
on two processes and a run with gradient accumulation all see the same stream.
"""

import signal
from functools import lru_cache

import numpy as np
import torch
from PIL import Image as PILImage

from ..random_streams import (
    NEWEST_STREAMS,
    NOISE,
    NOISE_2,
    ORDER,
    ORDER_KEYS_2,
    POSTERIOR,
    POSTERIOR_2,
    SAMPLE,
    SAMPLE_2,
    TOKENS,
    TOKENS_2,
    permutation_keys,
    permuted,
    random_normals,
    random_stream,
    random_subsets,
    random_uniforms,
)
from .image_datasets import first_readable
from .image_decoding import PixelRange, resize_and_crop


def ignore_signals(worker_id: int):
    """Makes a data-loader process ignore SIGINT and SIGTERM, which would end it before the last step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------------------
# Samples of a run


class SampleStreams(torch.utils.data.Dataset):
    """The random draws for the examples of a run: a function of the seed and the global index i = 0, 1, 2, ...

    All data sources share these draws. Each epoch visits the rows in a different random order.

    Args:
        num_rows: the number of rows of the data set.
        seed: the seed of the run.
        latent_shape: `(C, H, W)` of the noise.
        null_class_id: the label that stands for no class; None if the model has none and label_dropout is 0.
        label_dropout: probability that an example is trained without its class.
        random_flip: mirror half of the examples.
        sample_posterior: also draw the noise of the autoencoder's posterior.
        num_tokens: N, the number of tokens of the transformer, to draw a subset of M = min(64, N) of them; None to
            draw none.
        stream_version: 2, or 1 for the draws of runs that began before there was a version 2.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        latent_shape: tuple[int, int, int],
        null_class_id: int | None,
        label_dropout: float = 0.1,
        random_flip: bool = False,
        sample_posterior: bool = False,
        num_tokens: int | None = None,
        stream_version: int = NEWEST_STREAMS,
    ):
        self.num_rows = num_rows
        self.seed = seed
        self.latent_shape = latent_shape
        self.null_class_id = null_class_id
        self.label_dropout = label_dropout
        self.random_flip = random_flip
        self.sample_posterior = sample_posterior
        self.num_tokens = num_tokens
        self.stream_version = stream_version

    def rows_of(self, indices: list[int]) -> np.ndarray:
        """The rows of some examples, int64 `[B]`."""
        epochs, positions = np.divmod(np.array(indices, dtype=np.int64), self.num_rows)
        rows = np.empty(len(indices), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            if self.stream_version == 1:
                rows[inside] = epoch_order(self.seed, epoch, self.num_rows)[positions[inside]]
            else:
                keys = permutation_keys(self.seed, epoch, ORDER_KEYS_2)
                rows[inside] = permuted(positions[inside], self.num_rows, keys)
        return rows

    def uniforms(self, indices: list[int]) -> np.ndarray:
        """Draws five uniform numbers per example, float64 `[B,5]`: timestep, label dropout, flip, and the crop's x and y."""
        if self.stream_version == 1:
            return np.stack([random_stream(self.seed, index, SAMPLE).random(5) for index in indices])
        return random_uniforms(self.seed, indices, SAMPLE_2, 5)

    def flips(self, uniforms: np.ndarray) -> np.ndarray:
        """Which examples are mirrored, bool `[B]`."""
        return np.logical_and(self.random_flip, uniforms[:, 2] < 0.5)

    def noise(self, indices: list[int], posterior: bool = False) -> np.ndarray:
        """Draws the noise of some examples, or that of the autoencoder's posterior; float32 `[B, *latent_shape]`."""
        if self.stream_version == 1:
            streams = (random_stream(self.seed, index, POSTERIOR if posterior else NOISE) for index in indices)
            return np.stack([stream.standard_normal(self.latent_shape, dtype=np.float32) for stream in streams])
        return random_normals(self.seed, indices, POSTERIOR_2 if posterior else NOISE_2, self.latent_shape)

    def tokens(self, indices: list[int]) -> np.ndarray:
        """Draws a subset of the tokens for each example, int64 `[B,M]`."""
        size = min(64, self.num_tokens)
        if self.stream_version == 1:
            orders = [random_stream(self.seed, index, TOKENS).permutation(self.num_tokens) for index in indices]
            return np.stack(orders)[:, :size]
        return random_subsets(self.seed, indices, TOKENS_2, size, self.num_tokens)

    def drawn(self, indices: list[int], uniforms: np.ndarray, labels) -> dict[str, torch.Tensor]:
        """The part of a batch that does not depend on the images; `labels [B]` are the labels of the rows."""
        timestep, drop = uniforms[:, 0], uniforms[:, 1]
        labels = [self.null_class_id if u < self.label_dropout else int(label) for u, label in zip(drop, labels)]
        batch = {"class_labels": np.array(labels), "timestep": timestep.astype(np.float32)}
        batch["noise"] = self.noise(indices)
        if self.sample_posterior:
            batch["posterior_noise"] = self.noise(indices, posterior=True)
        if self.num_tokens is not None:
            batch["tokens"] = self.tokens(indices)
        return {**{name: torch.from_numpy(values) for name, values in batch.items()}, "index": torch.tensor(indices)}


class TrainingSamples(SampleStreams):
    """The training examples of a run, read from images. Indices are global example indices, which never end, not rows.

    `samples[indices]` is a batch, a dict of

        pixels          uint8 `[B,3,R,R]`
        class_labels    int64 `[B]`, dropped ones already replaced by `null_class_id`
        timestep        float32 `[B]`, uniform in [0, 1)
        noise           float32 `[B, *latent_shape]`
        posterior_noise float32 `[B, *latent_shape]`, only with `sample_posterior`
        tokens          int64 `[B,M]`: the token subset of the structural reward, only with `num_tokens`
        index           int64 `[B]`, the global example indices
        corrupt_rows    int64, the rows that could not be decoded; each is replaced by the next row that can

    Args:
        data: returns `{"image": [...], "label": [...]}` for a list of rows, as `ImageSource` and a `Dataset` do.
        resolution: side of the square images, in pixels.
        center_crop: crop in the centre; at a random place otherwise.
        pixel_range: black and white of images that are not 8-bit; by default, it is found for each image.
        draft_side: see `decode_image`.
        Others: see `SampleStreams`.
    """

    def __init__(
        self,
        data,
        seed: int,
        resolution: int,
        latent_shape: tuple[int, int, int],
        null_class_id: int | None,
        label_dropout: float = 0.1,
        center_crop: bool = True,
        random_flip: bool = False,
        sample_posterior: bool = False,
        num_tokens: int | None = None,
        pixel_range: PixelRange | None = None,
        stream_version: int = NEWEST_STREAMS,
        draft_side: int | None = None,
    ):
        streams = (
            latent_shape,
            null_class_id,
            label_dropout,
            random_flip,
            sample_posterior,
            num_tokens,
            stream_version,
        )
        super().__init__(len(data), seed, *streams)
        self.data = data
        self.resolution = resolution
        self.center_crop = center_crop
        self.pixel_range = pixel_range
        self.draft_side = draft_side

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = self.rows_of(indices).tolist()
        records = self.data[rows]
        uniforms = self.uniforms(indices)
        pixels, labels, corrupt = [], [], []
        for i, flip in enumerate(self.flips(uniforms)):
            record = {"image": records["image"][i], "label": records["label"][i]}
            image, label, tried = first_readable(self.data, rows[i], record, self.pixel_range, self.draft_side)
            # If no image can be decoded, the trainer counts these rows and stops before it takes a step.
            image = image or PILImage.new("RGB", (self.resolution, self.resolution))
            square = resize_and_crop(image, self.resolution, None if self.center_crop else tuple(uniforms[i, 3:]))
            pixels.append(square[:, ::-1] if flip else square)
            labels.append(label)
            corrupt += tried
        return {
            "pixels": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
            **self.drawn(indices, uniforms, labels),
            "corrupt_rows": torch.tensor(corrupt, dtype=torch.long),
        }


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in an epoch, int64 `[num_rows]`, in version 1 of the draws."""
    return random_stream(seed, epoch, ORDER).permutation(num_rows)


class StreamBatchSampler(torch.utils.data.Sampler):
    """Yields the global example indices of one process, batch by batch, from `start` on.

    Optimizer step k of the sampler uses the indices `start + k * B ... start + (k + 1) * B - 1`, where
    B = batch_size * processes * accumulation, so that the same B gives the same examples however it is divided. With
    `repeats` r, the r steps `k r ... k r + r - 1` share these indices.

    Args:
        start: the first index.
        num_steps: the number of optimizer steps.
        batch_size: examples per batch of one process.
        rank: the number of this process, from 0.
        processes: the number of processes.
        accumulation: batches of a process per optimizer step.
        repeats: optimizer steps that use the same examples.
    """

    def __init__(
        self,
        start: int,
        num_steps: int,
        batch_size: int,
        rank: int,
        processes: int,
        accumulation: int,
        repeats: int = 1,
    ):
        self.start = start
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes
        self.accumulation = accumulation
        self.repeats = repeats

    def __len__(self):
        return self.num_steps * self.accumulation

    def __iter__(self):
        for step_of_micro in range(len(self)):
            step, part = divmod(step_of_micro, self.accumulation)
            micro_step = step // self.repeats * self.accumulation + part
            first = self.start + (micro_step * self.processes + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
