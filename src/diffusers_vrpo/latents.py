# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Images and what is drawn for them: data sets, random streams, autoencoders.

Everything random about training sample i (which image, crop, flip, timestep, noise, label drop) is a function of
(seed, i), where i counts the samples of the whole run. Neither the process that draws it nor the moment matters: a
resumed run, two processes or gradient accumulation see the same stream.
"""

import io
import os
from functools import lru_cache

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from datasets.exceptions import DatasetNotFoundError
from datasets.features import Value
from diffusers import AutoModel
from PIL import Image as PILImage
from PIL import ImageOps

from .errors import UNKNOWN_TO_THE_HUB, InputError, first_line, gated, hub_problem
from .random_streams import random_stream


logger = get_logger(__name__)

# Independent streams of one sample; a new purpose gets a new number, old runs stay reproducible.
ORDER, SAMPLE, NOISE, POSTERIOR, TOKENS, ACTIONS, ROW_GROUPS, ROWS_OF_GROUP = range(8)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    max_train_samples: int | None = None,
    cache_dir: str | None = None,
) -> tuple[Dataset, dict[int, str] | None, int]:
    """Opens a labelled image data set: a Hub name, a folder of parquet files, an imagefolder, or `"digits"`.

    Returns:
        the split with the columns `image` (encoded bytes or paths) and `label`; the class names, or None where the
        labels are plain integers; the number of classes.

    Raises:
        InputError: when there is no such data set, split or column, or the labels are not class ids.
    """
    option, name = ("--train_data_dir", train_data_dir) if dataset_name is None else ("--dataset_name", dataset_name)
    if dataset_name == "digits" and not os.path.isdir("digits"):
        from .digits import load_digits_dataset

        data = load_digits_dataset()
    else:
        data = open_named(option, name, dataset_config_name, cache_dir)
    if split not in data:
        raise InputError(f"--dataset_split {split!r} is not in {option} {name}; it has {', '.join(map(repr, data))}")
    data = data[split]

    check_columns(data.features, option, name, image_column, label_column)
    if len(data) == 0:
        raise InputError(f"--dataset_split {split!r} of {option} {name} has no images")
    labels, label = data.data.column(label_column), data.features[label_column]
    smallest, largest = pc.min_max(labels).as_py().values()
    there = f"--label_column {label_column!r} of {option} {name}"
    names, num_classes = check_labels(label, labels.null_count, smallest, largest, len(data), there)
    if max_train_samples is not None:
        # A random subset, since many data sets are sorted by class; the same for every seed.
        rows = random_stream(0, 0, ORDER).permutation(len(data))[:max_train_samples]
        data = data.select(np.sort(rows))
    data = data.select_columns([image_column, label_column])
    renamed = {image_column: "image", label_column: "label"}
    data = data.rename_columns({old: new for old, new in renamed.items() if old != new})
    data = data.cast_column("image", Image(decode=False))
    return data, dict(enumerate(names)) if names else None, num_classes


def check_columns(features: Features, option: str, name: str, image_column: str, label_column: str):
    """Ends with a sentence where a data set has no such columns, or not with images and integers in them."""
    for column_option, column in (("--image_column", image_column), ("--label_column", label_column)):
        if column not in features:
            raise InputError(
                f"{column_option} {column!r} is not in {option} {name}; its columns are "
                f"{', '.join(map(repr, features))}"
            )
    if not isinstance(features[image_column], Image):
        raise InputError(
            f"--image_column {image_column!r} of {option} {name} holds {features[image_column]}, not images; cast "
            "it with dataset.cast_column(column, datasets.Image())"
        )
    label = features[label_column]
    is_integer = isinstance(label, Value) and label.dtype.startswith(("int", "uint"))
    if not (isinstance(label, ClassLabel) or is_integer):
        raise InputError(
            f"--label_column {label_column!r} of {option} {name} holds {label}, not integer class labels; "
            f"dataset.class_encode_column({label_column!r}) makes them"
        )


def check_labels(
    label: ClassLabel | Value, nulls: int, smallest: int, largest: int, count: int, there: str
) -> tuple[list[str] | None, int]:
    """Class names, or None where there are none, and the number of classes, of `count` labels.

    Args:
        label: their feature.
        nulls: rows without one.
        there: the column and the data set, for the error.

    Raises:
        InputError: when they are not class ids.
    """
    if nulls:
        raise InputError(f"{there} is empty in {nulls} rows")
    names = label.names if isinstance(label, ClassLabel) else None
    num_classes = len(names) if names else largest + 1
    if not names and num_classes > max(1000, count):
        raise InputError(
            f"{there} goes up to {largest} with {count} images: these are no class labels; "
            "dataset.class_encode_column(column) makes them"
        )
    if smallest < 0 or largest >= num_classes:
        raise InputError(
            f"{there} has labels from {smallest} to {largest}, but they must lie in 0 ... classes - 1; choose a "
            "--dataset_split that is labelled"
        )
    return names, num_classes


def open_named(option: str, name: str, config_name: str | None, cache_dir: str | None, opener=load_dataset):
    """What `load_dataset` or `load_dataset_builder` gives for a folder, or for a Hub name (`name@revision` too).

    Raises:
        InputError: when there is no such data set.
    """
    is_local = os.path.isdir(name)
    if not is_local and (option == "--train_data_dir" or name.startswith((".", "/", "~"))):
        raise InputError(f"{option} {name} is not a folder")
    repository, _, revision = (name, "", "") if is_local else name.partition("@")
    try:
        if option == "--train_data_dir":
            return opener("imagefolder", data_dir=name, cache_dir=cache_dir)
        return opener(repository, config_name, cache_dir=cache_dir, revision=revision or None)
    except Exception as error:  # each reader of datasets has its own; all mean that this data set cannot be had
        problem = hub_problem(error, f"datasets/{repository}")
        problem = problem or f"it cannot be opened as a data set ({first_line(error)})"
        if isinstance(error, DatasetNotFoundError):  # which hides the Hub's own error
            problem = gated(f"datasets/{repository}") if "gated" in str(error) else UNKNOWN_TO_THE_HUB
        raise InputError(f"{option} {name}: {problem}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Images


def resize_and_crop(image: PILImage.Image, resolution: int, position: tuple[float, float] | None = None) -> np.ndarray:
    """ADM's crop, used by DiT, SiT and REPA: halve while twice too large, bicubic to the short side, cut a square.

    `position` (x, y in [0, 1)) places the square; the centre without it. Returns uint8 `[resolution, resolution, 3]`.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), PILImage.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
    image = image.resize(size, PILImage.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    if position is not None:
        left = int(position[0] * (image.width - resolution + 1))
        top = int(position[1] * (image.height - resolution + 1))
    return np.asarray(image)[top : top + resolution, left : left + resolution]


def decode_image(encoded: dict) -> PILImage.Image:
    """The RGB image of `{"bytes": ..., "path": ...}` as `datasets` stores it."""
    source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    with PILImage.open(source) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
            image = PILImage.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point images have no known range")
        return image.convert("RGB")


def check_images(data: Dataset, sample: int = 256) -> None:
    """Tries a fixed random sample of the images, before any training.

    Raises:
        InputError: when over 1 % of them cannot be decoded (3 % where the sample is not the whole data set).
    """
    if hasattr(data, "rows_to_try"):  # a streamed one, which is fetched a row group at a time
        rows = data.rows_to_try(sample)
    else:
        rows = random_stream(0, 0, ORDER).permutation(len(data))[:sample]
    corrupt = []
    for row in rows.tolist():
        record = data[row]
        try:
            decode_image(record["image"])
        except Exception:  # PIL's readers raise many types; all mean the same here
            corrupt.append(row)
    if len(corrupt) > (0.01 if len(rows) == len(data) else 0.03) * len(rows):
        raise too_many_corrupt(corrupt, len(rows))


def too_many_corrupt(rows, out_of: int) -> InputError:
    return InputError(
        f"the data set given by --dataset_name or --train_data_dir is damaged: {len(rows)} of {out_of} images tried cannot "
        f"be decoded, which is over 1 % (rows {sorted(rows)[:5]} ...); mend or remove them"
    )


def check_corrupt_rows(rows: set[int], num_rows: int, known: int) -> int:
    """Counts the images that some process could not decode and warns of new ones; over 1 % is an error."""
    found = set(gather_object(sorted(rows)))
    if len(found) > 0.01 * num_rows:
        raise too_many_corrupt(found, num_rows)
    if len(found) > known:
        logger.warning(
            f"{len(found)} of {num_rows} images cannot be decoded and are skipped (rows {sorted(found)[:5]})"
        )
    return len(found)


def first_readable(data: Dataset, row: int, record: dict) -> tuple[PILImage.Image | None, int, list[int]]:
    """Image and label of a row, or of the next one that can be read; the rows tried before it, which cannot.

    Where not one can be read, the image is None. `record` is the row of `data`, already fetched.
    """
    corrupt = []
    for tries in range(len(data)):
        try:
            return decode_image(record["image"]), record["label"], corrupt
        except Exception:  # PIL's readers raise many types; all mean the same here
            corrupt.append((row + tries) % len(data))
            record = data[(row + tries + 1) % len(data)]
    return None, 0, corrupt


# ----------------------------------------------------------------------------------------------------------------------
# Samples of a run


class SampleStreams(torch.utils.data.Dataset):
    """What is drawn for the samples of a run: a function of the seed and the global sample index i = 0, 1, 2, ...

    Wherever the images come from, the draws are these. Each epoch goes through the rows in an order of its own.

    Args:
        num_rows: of the data set.
        latent_shape: `(C, H, W)` of the noise.
        null_class_id: the label that stands for no class; None where there is none, with label_dropout 0.
        label_dropout: probability that a sample is trained without its class.
        random_flip: mirror half of the samples.
        sample_posterior: also draw the noise of the autoencoder's posterior.
        num_tokens: N of the transformer; M = min(64, N).
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
    ):
        self.num_rows = num_rows
        self.seed = seed
        self.latent_shape = latent_shape
        self.null_class_id = null_class_id
        self.label_dropout = label_dropout
        self.random_flip = random_flip
        self.sample_posterior = sample_posterior
        self.num_tokens = num_tokens

    def row_of(self, index: int) -> int:
        epoch, position = divmod(index, self.num_rows)
        return int(epoch_order(self.seed, epoch, self.num_rows)[position])

    def uniforms(self, indices: list[int]) -> np.ndarray:
        """Five uniform numbers of each sample, float64 `[B,5]`: timestep, label drop, flip, and the crop's x and y."""
        return np.stack([random_stream(self.seed, index, SAMPLE).random(5) for index in indices])

    def flips(self, uniforms: np.ndarray) -> np.ndarray:
        """Which samples are mirrored, bool `[B]`."""
        return np.logical_and(self.random_flip, uniforms[:, 2] < 0.5)

    def drawn(self, indices: list[int], uniforms: np.ndarray, labels) -> dict[str, torch.Tensor]:
        """The part of a batch that does not depend on the images; `labels [B]` are those of the rows."""

        def noise(purpose):
            streams = (random_stream(self.seed, index, purpose) for index in indices)
            return np.stack([stream.standard_normal(self.latent_shape, dtype=np.float32) for stream in streams])

        timestep, drop = uniforms[:, 0], uniforms[:, 1]
        labels = [self.null_class_id if u < self.label_dropout else int(label) for u, label in zip(drop, labels)]
        batch = {"class_labels": np.array(labels), "timestep": timestep.astype(np.float32), "noise": noise(NOISE)}
        if self.sample_posterior:
            batch["posterior_noise"] = noise(POSTERIOR)
        if self.num_tokens is not None:
            orders = [random_stream(self.seed, index, TOKENS).permutation(self.num_tokens) for index in indices]
            batch["tokens"] = np.stack(orders)[:, : min(64, self.num_tokens)]
        return {**{name: torch.from_numpy(values) for name, values in batch.items()}, "index": torch.tensor(indices)}


class TrainingSamples(SampleStreams):
    """The samples of a run, from images. Its indices are not rows but global sample indices without end.

    A batch is a dict:

        pixels          uint8 `[B,3,R,R]`
        class_labels    int64 `[B]`, dropped ones already replaced by `null_class_id`
        timestep        float32 `[B]`, uniform in [0, 1)
        noise           float32 `[B, *latent_shape]`
        posterior_noise float32 `[B, *latent_shape]`, only with `sample_posterior`
        tokens          int64 `[B,M]`: the token subset of the structural reward, only with `num_tokens`
        index           int64 `[B]`, the global sample indices
        corrupt_rows    rows that could not be decoded; the next row that can be stands in for each

    Args:
        data: as `load_image_dataset` returns it.
        resolution: side of the square images, in pixels.
        center_crop: a random square otherwise.
        Others: those of `SampleStreams`.
    """

    def __init__(
        self,
        data: Dataset,
        seed: int,
        resolution: int,
        latent_shape: tuple[int, int, int],
        null_class_id: int | None,
        label_dropout: float = 0.1,
        center_crop: bool = True,
        random_flip: bool = False,
        sample_posterior: bool = False,
        num_tokens: int | None = None,
    ):
        streams = (latent_shape, null_class_id, label_dropout, random_flip, sample_posterior, num_tokens)
        super().__init__(len(data), seed, *streams)
        self.data = data
        self.resolution = resolution
        self.center_crop = center_crop

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = [self.row_of(index) for index in indices]
        records = self.data[rows]
        uniforms = self.uniforms(indices)
        pixels, labels, corrupt = [], [], []
        for i, flip in enumerate(self.flips(uniforms)):
            record = {"image": records["image"][i], "label": records["label"][i]}
            image, label, tried = first_readable(self.data, rows[i], record)
            # Where not one can be read: the trainer, which counts these rows, stops before it takes a step.
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


def action_noise(seed: int, indices: torch.Tensor, number: int, shape: tuple, device: torch.device) -> torch.Tensor:
    """Standard normal noise of the policy's actions, `[G,B,N,E]`, a function of seed, sample index and projector.

    It is drawn on the device (G * N * E numbers a sample are too many for the data loader), so that only devices of one
    kind draw the same.

    Args:
        indices: global sample indices, `[B]`, on the CPU.
        number: of the projector.
        shape: `(G, N, E)`.
    """
    noise = []
    for index in indices.tolist():
        start = random_stream(seed, index, ACTIONS).integers(2**62, size=number + 1)[number]
        noise.append(torch.randn(shape, generator=torch.Generator(device).manual_seed(int(start)), device=device))
    return torch.stack(noise, dim=1)


def as_is(batch):
    """The collate function for `TrainingSamples`, which gives whole batches."""
    return batch


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in an epoch."""
    return random_stream(seed, epoch, ORDER).permutation(num_rows)


class StreamBatchSampler(torch.utils.data.Sampler):
    """Global sample indices of one process, batch by batch, from `start` on.

    Optimizer step k takes the indices `k * B ... (k + 1) * B - 1` with B = batch_size * processes * accumulation, so
    that the same B gives the same samples however it is divided. With `repeats` r, so do steps `k r ... k r + r - 1`.
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


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoders


def load_vae(name_or_path: str, cache_dir: str | None = None) -> torch.nn.Module:
    """A frozen diffusers autoencoder in float32, from a folder or a Hub name, or from the `vae` folder of a pipeline.

    Raises:
        InputError: when there is none, or it is not an image autoencoder.
    """
    if not os.path.isdir(name_or_path) and name_or_path.startswith((".", "/", "~")):
        raise InputError(f"--vae {name_or_path} is not a folder")
    problem = None
    for subfolder in (None, "vae"):
        try:
            vae = AutoModel.from_pretrained(name_or_path, subfolder=subfolder, cache_dir=cache_dir)
            break
        except Exception as error:  # diffusers raises many types; all mean that this is none
            problem = problem or hub_problem(error, name_or_path) or f"diffusers cannot load it ({first_line(error)})"
    else:
        raise InputError(
            f"--vae {name_or_path}: {problem}; a folder or Hub name such as stabilityai/sd-vae-ft-ema would do, or `none` "
            "to train on pixels"
        )
    if not (hasattr(vae, "encode") and hasattr(vae, "decode")):
        raise InputError(
            f"--vae {name_or_path} is a {type(vae).__name__}, not an autoencoder; AutoencoderKL, AutoencoderTiny or "
            "AutoencoderDC would do"
        )
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_moments(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the latents of `pixels [B,3,H,W]` in [-1, 1], as the autoencoder gives them.

    Both are `[B,C,h,w]` float32 and not scaled yet; where an autoencoder has no posterior, the second is None.
    """
    means, stds = [], []
    # 32 at a time: a batch of 256 images of 256 pixels would take tens of gigabytes of activations.
    for part in pixels.split(32):
        with torch.autocast(pixels.device.type, enabled=False):
            encoded = vae.encode(part.to(vae.dtype))
        if hasattr(encoded, "latent_dist"):
            means.append(encoded.latent_dist.mean.float())
            stds.append(encoded.latent_dist.std.float())
        else:
            means.append((encoded.latents if hasattr(encoded, "latents") else encoded.latent).float())
    return torch.cat(means), torch.cat(stds) if stds else None


def scale_and_shift(vae) -> tuple[float, float]:
    """`(scale, shift)` of an autoencoder: the transformer sees `(latents - shift) * scale`."""
    return getattr(vae.config, "scaling_factor", None) or 1.0, getattr(vae.config, "shift_factor", None) or 0.0


def encode_images(vae, pixels: torch.Tensor, posterior_noise: torch.Tensor | None = None) -> torch.Tensor:
    """Scaled latents `[B,C,h,w]` float32 of `pixels [B,3,H,W]` in [-1, 1]; the posterior's mean without noise.

    With `vae=None` these are the pixels themselves.
    """
    if vae is None:
        return pixels
    latents, std = encode_moments(vae, pixels)
    if std is not None and posterior_noise is not None:
        latents = latents + std * posterior_noise
    scale, shift = scale_and_shift(vae)
    return (latents - shift) * scale


def latent_shape(vae, resolution: int, patch_size: int) -> tuple[int, int, int]:
    """`(C, h, w)` of what the transformer is trained on.

    Raises:
        InputError: when the resolution is not a multiple of the autoencoder's factor times the patch size.
    """
    channels, factor = 3, 1
    if vae is not None:
        try:
            probe = encode_images(vae, torch.zeros(1, 3, 128, 128, device=vae.device))
        except Exception as error:  # whatever it raises on one blank image, it would raise in training
            raise InputError(
                f"--vae: a {type(vae).__name__} does not encode RGB images ({first_line(error)}); AutoencoderKL, "
                "AutoencoderTiny or AutoencoderDC would do"
            ) from error
        channels, factor = probe.shape[1], 128 // probe.shape[-1]
    unit = factor * patch_size
    if resolution <= 0 or resolution % unit:
        below = resolution // unit * unit
        near = " or ".join(str(r) for r in (below, below + unit) if r > 0)
        raise InputError(
            f"--resolution {resolution} is not divisible by {unit} (autoencoder factor {factor} x patch size "
            f"{patch_size}); {near} would do"
        )
    return channels, resolution // factor, resolution // factor


if __name__ == "__main__":
    from .prepare_latents import main

    main()
