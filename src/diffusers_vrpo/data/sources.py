# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The interface of training data; opens the data that a configuration names, and checks the data of a resumed run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..config import DataConfig, options_of
from ..errors import InputError
from .image_datasets import image_and_label, load_image_dataset, refuse_paths
from .image_source import CLASS_CHECKSUMS, CLASS_NAMES, ImageDataset
from .latent_cache import LatentCache
from .parquet import stream_image_dataset
from .samples import SampleStreams


# ----------------------------------------------------------------------------------------------------------------------
# The interface


@runtime_checkable
class TrainingData(Protocol):
    """The interface of labelled training examples. Image data sets, the latent cache and parquet files implement it.

    Your own source derives from `ImageSource`, which implements the interface on top of `__len__` and `__getitem__`:

        class Pictures(ImageSource):
            def __init__(self, pictures, labels):
                self.pictures, self.labels, self.num_classes = pictures, labels, max(labels) + 1

            def __len__(self):
                return len(self.pictures)

            def __getitem__(self, rows):
                return {"image": [self.pictures[row] for row in rows], "label": [self.labels[row] for row in rows]}

    Attributes:
        num_classes (`int`): the number of classes; labels are 0 ... num_classes - 1.
        id2label (`dict[int, str]`, *optional*): the names of the classes.
        vae (`str`, *optional*): the autoencoder that the data were encoded with; None for images.
        has_images (`bool`): whether `examples` works.
        random_access (`bool`): whether rows can be read in any order at the same cost.

    Training data may also have a method `classes_with_images() -> list[int] | None`, which returns the ids of the
    classes that have images, in order, or None if that is not known. Classes without images are not sampled by
    default.
    """

    num_classes: int
    id2label: dict[int, str] | None
    vae: str | None
    has_images: bool
    random_access: bool

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def check(self) -> None:
        """Reads a few examples before any long work; called by the main process.

        Raises:
            InputError: if too many of them are damaged.
        """
        ...

    def fingerprint(self) -> dict:
        """Identifies the data, so that a run is not resumed on other data: JSON values by a name that errors show.

        It covers the class names, the labels and the images, and depends on their content, not on their folder.
        """
        ...

    def features(self, encoders: list[str], layers: list[int | None], grid_size: tuple[int, int]) -> list:
        """Returns one callable per encoder, which extracts the encoder's features `[B,N,E]` from a batch.

        Each has the attribute `embed_dim`, E. The list is empty if the features must be computed from images.

        Args:
            encoders: Hub names or folders.
            layers: the index of the hidden state of each encoder; None for the encoder's default.
            grid_size: rows and columns of tokens.

        Raises:
            InputError: if the data have neither the features nor the images.
        """
        ...

    def samples(
        self,
        *,
        seed: int,
        resolution: int,
        latent_shape: tuple[int, int, int],
        null_class_id: int | None,
        label_dropout: float,
        center_crop: bool,
        random_flip: bool,
        sample_posterior: bool,
        num_tokens: int | None,
        encoders: list,
        global_batch_size: int,
        stream_version: int,
    ) -> SampleStreams:
        """Returns the training examples of a run: a map-style dataset of batches, such as `TrainingSamples`.

        Args:
            seed: seed of the random streams.
            resolution: side of the square images in pixels.
            latent_shape: `(C, H, W)` of the noise.
            null_class_id: the label that stands for no class; None if the model has none.
            label_dropout: probability that an example is trained without its class.
            center_crop: crop in the centre; at a random place otherwise.
            random_flip: mirror half of the examples.
            sample_posterior: also draw the noise of the autoencoder's posterior.
            num_tokens: N, to draw the token subset of the structural reward; None to draw none.
            encoders: the encoders to align with; those that `features` returns do not need the images.
            global_batch_size: examples per optimizer step on all processes.
            stream_version: version of the random draws, 1 or 2; a user-defined source may ignore it.

        Raises:
            InputError: if the options contradict the data, or the processes see different data.
        """
        ...

    def loader(self, samples: SampleStreams, batch_sampler, num_workers: int, pin_memory: bool):
        """Yields the batches of a process in order.

        Args:
            samples: the examples that `samples` returns.
            batch_sampler: a `StreamBatchSampler`.
            num_workers: the number of processes or threads that prefetch batches; with 0, a batch is computed on
                demand.
            pin_memory: whether batches are in pinned memory, for copies to a GPU.
        """
        ...

    def latents(self, vae, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the clean latents of a batch, float32 `[B,C,h,w]`, on its device.

        Args:
            vae: encodes images; None if the model is trained on pixels, or the batch holds latents.
            batch: as the loader yields it, on the device, with `pixels` in [-1, 1].
        """
        ...

    def fixed_rows(self, count: int) -> np.ndarray:
        """Returns at most `count` random rows, int64, the same for every run on the data, in the order to read them."""
        ...

    def examples(self, rows: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the centre-cropped images, uint8 `[B,R,R,3]`, and labels, int64 `[B]`, of some rows."""
        ...

    def give_up_when(self, interrupted: Callable[[], bool]) -> None:
        """Makes reads stop waiting for a server that does not answer once `interrupted()` is true."""
        ...

    def release(self) -> None:
        """Frees the memory that reading has taken; the data can still be read afterwards."""
        ...


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def load_training_data(config) -> TrainingData:
    """Opens the data that a configuration names: an image data set, a latent cache, or parquet files with `streaming`.

    Args:
        config: a `DataConfig` that also has `vae`.

    Raises:
        InputError: if the data cannot be opened, or the options contradict the cache.
    """
    if config.streaming:
        data = stream_image_dataset(
            config.dataset_name,
            config.dataset_config_name,
            config.dataset_split,
            config.image_column,
            config.label_column,
            config.cache_dir,
        )
        data.jpeg_draft = config.jpeg_draft
        return data
    if config.latents_dir is None:
        return load_images(config)
    return open_cache(config)


def load_images(config) -> ImageDataset:
    """Opens the image data set that a configuration names; training and `prepare` share these options.

    Raises:
        InputError: if the data set cannot be opened.
    """
    data, id2label, num_classes = load_image_dataset(
        config.dataset_name,
        config.dataset_config_name,
        config.train_data_dir,
        config.dataset_split,
        config.image_column,
        config.label_column,
        config.max_train_samples,
        config.cache_dir,
    )
    data = ImageDataset(data, id2label, num_classes)
    data.jpeg_draft = config.jpeg_draft
    return data


def open_cache(config) -> LatentCache:
    """Opens the latent cache in `latents_dir`.

    Raises:
        InputError: if the folder does not hold a cache, or the options contradict it.
    """
    cache, name = LatentCache(config.latents_dir), f"`latents_dir` {config.latents_dir}"
    if config.resolution != cache.config["resolution"]:
        raise InputError(
            "resolution",
            f"`resolution` {config.resolution}: {name} was prepared with `resolution` {cache.config['resolution']}; "
            "give that",
        )
    if config.vae is not None and Path(config.vae).name != Path(cache.vae).name:
        raise InputError(
            "vae", f"`vae` {config.vae}: {name} was prepared with {cache.vae}; give that, or remove `vae`"
        )
    if not config.center_crop:
        raise InputError("center_crop", f"`center_crop` is off, but {name} has centre crops only; turn it on")
    if config.max_train_samples is not None:
        raise InputError(
            "max_train_samples",
            f"`max_train_samples` needs images; {name} has {len(cache)} latents, prepare a cache with fewer",
        )
    return cache


def as_training_data(dataset, image_column: str = "image", label_column: str = "label") -> TrainingData:
    """Turns a Python object, a `TrainingData` or a `Dataset` of `datasets`, into training data.

    Raises:
        InputError: if it is something else, the columns do not hold images and class ids, or rows name files instead of
            images.
    """
    if isinstance(dataset, Dataset):
        return ImageDataset(*image_and_label(dataset, "train_dataset", "(a Dataset)", image_column, label_column))
    if isinstance(dataset, ImageDataset):
        refuse_paths(dataset.data, "train_dataset", "(an ImageDataset)")
    if not isinstance(dataset, TrainingData):
        raise InputError(
            "train_dataset",
            f"`train_dataset` is a {type(dataset).__name__}; give a `datasets.Dataset` with images and labels, or an "
            "object with the methods of `TrainingData`, such as a subclass of `ImageSource`",
        )
    return dataset


# ----------------------------------------------------------------------------------------------------------------------
# Classes without images


def known_classes(data: TrainingData) -> list[int] | None:
    """The ids of the classes that have images, in order; None if that is not known."""
    find = getattr(data, "classes_with_images", None)
    return None if find is None else find()


def classes_to_sample(data: TrainingData) -> list[int]:
    """The ids of the classes that have images, in order; of all classes if that is not known."""
    known = known_classes(data)
    return list(range(data.num_classes)) if known is None else known


def classes_notice(data: TrainingData) -> tuple[int, str] | None:
    """A log level and a message about data with one class, or with classes without images; None for other data."""
    if data.num_classes == 1:
        return (
            logging.INFO,
            "one class: the model is unconditional. The null class, which `label_dropout` trains, learns the same images, so "
            "guidance has no effect, unless the run starts from weights with more classes; sample with guidance scale 1",
        )
    known = known_classes(data)
    if known is None:
        return (
            logging.INFO,
            f"which of the {data.num_classes} classes have images is not known without reading all labels; all are sampled",
        )
    empty = sorted(set(range(data.num_classes)).difference(known))
    if not empty:
        return None
    names = [f"{label} ({data.id2label[label]})" if data.id2label else str(label) for label in empty[:10]]
    return (
        logging.WARNING,
        f"{len(empty)} of {data.num_classes} classes have no images and are not sampled by default: {', '.join(names)}"
        f"{', ...' if len(empty) > 10 else ''}",
    )


# ----------------------------------------------------------------------------------------------------------------------
# What a resumed run must keep


# The names under which a checkpoint records what the data are; version 0.1 recorded only those in `SETTINGS_OF_0_1`.
COUNT, LABELS, CACHE, FILES = SETTINGS_OF_0_1 = (
    "the number of images",
    "the checksum of the labels",
    "the checksum of --latents_dir",
    "the checksum of the streamed files",
)


def data_settings(data: TrainingData) -> dict:
    """Returns what a checkpoint records about the data: JSON values by the name that an error shows.

    The main process reads the data, and all processes get the result.
    """
    found = [None]
    if PartialState().is_main_process:
        # The checksum is None without a cache, so that a run on a cache cannot continue on images.
        found = [{COUNT: len(data), CACHE: None, **data.fingerprint()}]
    return broadcast_object_list(found)[0]


def check_data_settings(saved: dict, settings: dict, checkpoint: Path, allow_changed_data: bool):
    """Checks that a run continues on the data that it was trained on.

    Args:
        saved: the settings that are in the checkpoint.
        settings: `data_settings` of the data to continue on.
        checkpoint: the checkpoint, for the error message.
        allow_changed_data: whether the data may differ.

    Raises:
        InputError: if the data differ and `allow_changed_data` is off.
    """
    difference = None if allow_changed_data else data_difference(saved, settings, checkpoint)
    if difference is not None:
        raise InputError(
            "allow_changed_data",
            f"{difference}; keep to that, start a new run in another `output_dir`, or give `allow_changed_data` to "
            "continue on other data",
        )


def data_difference(saved: dict, settings: dict, checkpoint: Path) -> str | None:
    """The first difference between the data and those of a checkpoint, in words; None if they are the same.

    Settings that the checkpoint lacks because version 0.1 wrote it are not compared.
    """
    for name, value in settings.items():
        before = saved.get(name)
        if before == value or (name not in saved and name not in SETTINGS_OF_0_1):
            continue
        if name == CLASS_NAMES:
            return differing_names(before, value, checkpoint)
        if name == CLASS_CHECKSUMS and len(before) == len(value):
            changed = [label for label in range(len(value)) if value[label] != before[label]]
            classes = ", ".join(repr((settings[CLASS_NAMES] or range(len(value)))[label]) for label in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return (
                f"the images of {'class' if len(changed) == 1 else 'the classes'} {classes}{more} are not those that "
                f"{checkpoint} was trained with, or in another order"
            )
        name = f"`{name}`" if name in options_of(DataConfig) else name.replace("--latents_dir", "`latents_dir`")
        return f"{name} is {value}, but {checkpoint} was trained with {before}"
    return None


def differing_names(before: list[str] | None, names: list[str] | None, checkpoint: Path) -> str:
    """Describes how the class names of the data differ from those of a checkpoint."""
    if before is None or names is None or len(before) != len(names):
        counts = ["none" if found is None else len(found) for found in (names, before)]
        return f"the number of class names is {counts[0]}, but {checkpoint} was trained with {counts[1]}"
    label = next(label for label in range(len(names)) if names[label] != before[label])
    if sorted(names) == sorted(before):
        return (
            f"the classes are in another order (class {label} is {names[label]!r}, but {checkpoint} was trained with "
            f"{before[label]!r}; folders called by numbers are now ordered as numbers)"
        )
    return f"the class {label} is {names[label]!r}, but {checkpoint} was trained with {before[label]!r}"
