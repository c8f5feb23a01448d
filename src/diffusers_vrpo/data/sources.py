# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What training needs of data, the data that a configuration names, and what a resumed run must keep of them."""

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
from .image_datasets import image_and_label, load_image_dataset
from .image_source import CLASS_CHECKSUMS, CLASS_NAMES, ImageDataset
from .latent_cache import LatentCache
from .parquet import stream_image_dataset
from .samples import SampleStreams


# ----------------------------------------------------------------------------------------------------------------------
# The interface


@runtime_checkable
class TrainingData(Protocol):
    """Labelled examples to train on. Image data sets, the latent cache and streamed parquet files implement it.

    A source of your own derives from `ImageSource`, which implements all of it on top of `__len__` and `__getitem__`:

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
        vae (`str`, *optional*): the autoencoder that the data were encoded with; None where they are images.
        has_images (`bool`): whether `examples` works.
        random_access (`bool`): whether rows can be read in any order at the same cost.
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
            InputError: when too many of them are damaged.
        """
        ...

    def fingerprint(self) -> dict:
        """What a resumed run must keep beside the number of examples: JSON values by a name that errors show.

        It covers the class names, the labels and the images, and depends on their content, not on where they lie.
        """
        ...

    def features(self, encoders: list[str], layers: list[int | None], grid_size: tuple[int, int]) -> list:
        """Callables that take an encoder's features `[B,N,E]` from a batch, if the data have those of all encoders.

        Each has the attribute `embed_dim`, E. The list is empty where features are to be computed from images.

        Args:
            encoders: Hub names or folders.
            layers: the index in the hidden states of each; None for its default.
            grid_size: rows and columns of tokens.

        Raises:
            InputError: when the data have neither the features nor the images.
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
    ) -> SampleStreams:
        """The samples of a run: a map-style dataset of batches over global sample indices, as `TrainingSamples` has it.

        Args:
            seed: of everything that is drawn.
            resolution: side of the square images in pixels.
            latent_shape: `(C, H, W)` of the noise.
            null_class_id: the label that stands for no class; None where the model has none.
            label_dropout: probability that a sample is trained without its class.
            center_crop: crop in the centre; at a random place otherwise.
            random_flip: mirror half of the samples.
            sample_posterior: also draw the noise of the autoencoder's posterior.
            num_tokens: N, for the token subset of the structural reward; None where none is drawn.
            encoders: of the alignment; those that `features` gave take the place of the images.
            global_batch_size: samples of an optimizer step on all processes.

        Raises:
            InputError: when the options contradict the data, or the processes see different data.
        """
        ...

    def loader(self, samples: SampleStreams, batch_sampler, num_workers: int, pin_memory: bool):
        """The batches of a process in order.

        Args:
            samples: as `samples` returns them.
            batch_sampler: a `StreamBatchSampler`.
            num_workers: processes or threads that work ahead; with 0 a batch is made when it is asked for.
            pin_memory: whether batches are in pinned memory, for copies to a GPU.
        """
        ...

    def latents(self, vae, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The clean latents `[B,C,h,w]`, float32, of a batch on its device.

        Args:
            vae: encodes images; None where these are trained on, or latents are in the batch.
            batch: as the loader gives it, with `pixels` in [-1, 1].
        """
        ...

    def fixed_rows(self, count: int) -> np.ndarray:
        """At most `count` random rows, int64, the same for every run on the data, in the order to read them."""
        ...

    def examples(self, rows: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 `[B,R,R,3]`, cropped in the centre, and labels int64 `[B]` of some rows."""
        ...

    def give_up_when(self, interrupted: Callable[[], bool]) -> None:
        """From when `interrupted()` is true, the data no longer wait for a server that does not answer."""
        ...

    def release(self) -> None:
        """Frees what reading has left in memory; the data can be read again."""
        ...


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def load_training_data(config) -> TrainingData:
    """The data that a configuration names: an image data set, a latent cache, or with `streaming` parquet files.

    Args:
        config: a `DataConfig`, with `vae`.

    Raises:
        InputError: when they cannot be had, or the options contradict the cache.
    """
    if config.streaming:
        return stream_image_dataset(
            config.dataset_name,
            config.dataset_config_name,
            config.dataset_split,
            config.image_column,
            config.label_column,
            config.cache_dir,
        )
    if config.latents_dir is None:
        return load_images(config)
    return open_cache(config)


def load_images(config) -> ImageDataset:
    """The image data set of the options that training and `prepare` share.

    Raises:
        InputError: when it cannot be had.
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
    return ImageDataset(data, id2label, num_classes)


def open_cache(config) -> LatentCache:
    """The latent cache in `latents_dir`.

    Raises:
        InputError: when there is none, or the options contradict it.
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
            "vae", f"`vae` {config.vae}: {name} was prepared with {cache.vae}; give that, or leave `vae` out"
        )
    if not config.center_crop:
        raise InputError("center_crop", f"`center_crop` is off, but {name} has centre crops only; turn it on")
    if config.max_train_samples is not None:
        raise InputError(
            "max_train_samples",
            f"`max_train_samples` goes with images; {name} has {len(cache)}, prepare one with fewer",
        )
    return cache


def as_training_data(dataset, image_column: str = "image", label_column: str = "label") -> TrainingData:
    """Training data of an object that was made in Python: `TrainingData` itself, or a `Dataset` of `datasets`.

    Raises:
        InputError: when it is something else, or the columns do not hold images and class ids.
    """
    if isinstance(dataset, Dataset):
        return ImageDataset(*image_and_label(dataset, "train_dataset", "(a Dataset)", image_column, label_column))
    if not isinstance(dataset, TrainingData):
        raise InputError(
            "train_dataset",
            f"`train_dataset` is a {type(dataset).__name__}; give a `datasets.Dataset` with images and labels, or an "
            "object with the methods of `TrainingData`, such as one of a class that derives from `ImageSource`",
        )
    return dataset


# ----------------------------------------------------------------------------------------------------------------------
# What a resumed run must keep


# The names under which a checkpoint keeps these settings; version 0.1 kept none but those of `SETTINGS_OF_0_1`.
COUNT, LABELS, CACHE, FILES = SETTINGS_OF_0_1 = (
    "the number of images",
    "the checksum of the labels",
    "the checksum of --latents_dir",
    "the checksum of the streamed files",
)


def data_settings(data: TrainingData) -> dict:
    """What a checkpoint keeps of the data, by the name that an error shows: JSON values.

    The main process reads the data, and all processes get its answer.
    """
    found = [None]
    if PartialState().is_main_process:
        # Without a cache its checksum is None, so that a run on a cache cannot continue on the images.
        found = [{COUNT: len(data), CACHE: None, **data.fingerprint()}]
    return broadcast_object_list(found)[0]


def check_data_settings(saved: dict, settings: dict, checkpoint: Path, allow_changed_data: bool):
    """Refuses to continue a run on other data.

    Args:
        saved: the settings that are in the checkpoint.
        settings: `data_settings` of the data to continue on.
        checkpoint: for the error.
        allow_changed_data: whether the data may differ.

    Raises:
        InputError: when they differ and may not.
    """
    difference = None if allow_changed_data else data_difference(saved, settings, checkpoint)
    if difference is not None:
        raise InputError(
            "allow_changed_data",
            f"{difference}; keep to that, start a new run in another `output_dir`, or give `allow_changed_data` to "
            "continue on other data",
        )


def data_difference(saved: dict, settings: dict, checkpoint: Path) -> str | None:
    """The first difference of the data from those of a checkpoint, in words; None where there is none.

    Settings that the checkpoint lacks because version 0.1 made it are not compared.
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
    """What differs between the class names of a checkpoint and those of the data."""
    if before is None or names is None or len(before) != len(names):
        counts = ["none" if found is None else len(found) for found in (names, before)]
        return f"the number of class names is {counts[0]}, but {checkpoint} was trained with {counts[1]}"
    label = next(label for label in range(len(names)) if names[label] != before[label])
    return f"the class {label} is {names[label]!r}, but {checkpoint} was trained with {before[label]!r}"
