# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Training data whose images are read by row: image data sets and subclasses of `ImageSource`."""

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from PIL import Image as PILImage

from ..models.autoencoder import encode_images
from ..random_streams import NEWEST_STREAMS, ORDER, random_stream
from .image_datasets import check_images, column_values, first_readable
from .image_decoding import PixelRange, find_pixel_range, resize_and_crop, sample_rows
from .samples import SampleStreams, TrainingSamples, ignore_signals


CHECKED_IMAGES = 256  # images that are decoded before training
# A fingerprint covers the content of about `FINGERPRINT_IMAGES` images, but of at least one for each of at most
# `MOST_CLASSES` classes, and the sizes of about `MOST_FILE_SIZES` image files.
FINGERPRINT_IMAGES = 64
MOST_CLASSES = 1024
MOST_FILE_SIZES = 100_000
# The names of a fingerprint's entries, as errors show them.
CLASS_NAMES = "the class names"
CLASS_CHECKSUMS = "the checksums of the images of each class"


# ----------------------------------------------------------------------------------------------------------------------
# Any source of images


class ImageSource:
    """Training data that returns images and labels by row; `TrainingData` documents the methods.

    To train on your own data, derive a class from this one. Set `num_classes` (and `id2label`, if the classes have
    names) and define two methods: `__len__`, and `__getitem__`, which takes a list of rows and returns
    `{"image": [...], "label": [...]}`, as a `datasets.Dataset` does. An image is a PIL image, or a dictionary
    `{"bytes": ..., "path": ...}` with the content or the path of an image file.

    Example:

    ```python
    from PIL import Image

    from diffusers_vrpo import ImageSource


    class Squares(ImageSource):
        num_classes, id2label = 2, {0: "black", 1: "white"}

        def __len__(self):
            return 100

        def __getitem__(self, rows):
            labels = [row % 2 for row in rows]
            return {"image": [Image.new("RGB", (8, 8), (255 * label,) * 3) for label in labels], "label": labels}


    source = Squares()  # for VRPOTrainer(train_dataset=source, ...)
    ```

    Attributes:
        num_classes (`int`): the number of classes.
        id2label (`dict[int, str]`, *optional*): the names of the classes.
        jpeg_draft (`bool`): decode JPEG files at a half, a quarter or an eighth of their size where that is enough for
            the resolution; False by default.
    """

    num_classes: int
    id2label: dict[int, str] | None = None
    jpeg_draft: bool = False
    vae: str | None = None
    has_images = True
    random_access = True

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, rows: list[int]) -> dict[str, list]:
        raise NotImplementedError

    @cached_property
    def pixel_range(self) -> PixelRange:
        """Which values are black and white in images that are not 8-bit, decided from a fixed sample of the rows.

        Raises:
            InputError: if their values have no known range.
        """
        return find_pixel_range((self[[row]]["image"][0] for row in self.sampled_rows()), "the training data")

    def sampled_rows(self) -> Iterable[int]:
        """The rows that decide `pixel_range`, evenly spaced."""
        return sample_rows(len(self))

    def check(self) -> None:
        """Decodes a fixed random sample of the images.

        Raises:
            InputError: if too many of them are damaged, or the values of their pixels have no known range.
        """
        rows = random_stream(0, 0, ORDER).permutation(len(self))[:CHECKED_IMAGES]
        check_images(self, rows, self.pixel_range)

    def fingerprint(self) -> dict:
        """Returns the class names, and CRC-32 of the labels and images of a fixed random subset of the rows."""
        checksum = 0
        for row in self.fixed_rows(FINGERPRINT_IMAGES).tolist():
            record = self[[row]]
            checksum = zlib.crc32(str(int(record["label"][0])).encode(), checksum)
            checksum = zlib.crc32(image_content(record["image"][0]), checksum)
        return {CLASS_NAMES: class_names(self), "the checksum of a sample of the images": checksum}

    def classes_with_images(self) -> list[int] | None:
        """Returns the ids of the classes that have images, in order; None, as here, if that is not known."""
        return None

    def features(self, encoders: list[str], layers: list[int | None], grid_size: tuple[int, int]) -> list:
        """Returns an empty list: the encoders compute their features from the images."""
        return []

    def samples(
        self,
        *,
        seed: int,
        resolution: int,
        latent_shape: tuple[int, int, int],
        null_class_id: int | None,
        label_dropout: float = 0.1,
        center_crop: bool = True,
        random_flip: bool = False,
        sample_posterior: bool = False,
        num_tokens: int | None = None,
        encoders: Sequence = (),
        global_batch_size: int | None = None,
        stream_version: int = NEWEST_STREAMS,
    ) -> SampleStreams:
        """`TrainingSamples` of the images."""
        return TrainingSamples(
            self,
            seed,
            resolution,
            latent_shape,
            null_class_id,
            label_dropout,
            center_crop,
            random_flip,
            sample_posterior,
            num_tokens,
            self.pixel_range,
            stream_version,
            self.draft_side(resolution),
        )

    def loader(
        self, samples: SampleStreams, batch_sampler: Iterable[list[int]], num_workers: int, pin_memory: bool
    ) -> torch.utils.data.DataLoader:
        """A `DataLoader` with worker processes."""
        return worker_loader(samples, batch_sampler, num_workers, pin_memory)

    def latents(self, vae: torch.nn.Module | None, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Encodes the `pixels` of a batch, with its `posterior_noise` if it has any; without `vae`, returns them."""
        return encode_images(vae, batch["pixels"], batch.get("posterior_noise"))

    def draft_side(self, resolution: int) -> int | None:
        """The argument `draft_side` of `decode_image` for squares of this size."""
        return resolution if self.jpeg_draft else None

    def fixed_rows(self, count: int) -> np.ndarray:
        """Returns at most `count` random rows in ascending order, the same for every run."""
        return np.sort(random_stream(0, 0, ORDER).permutation(len(self))[:count])

    def examples(self, rows: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """Centre-cropped images and their labels; a row that cannot be decoded is replaced by the next one that can."""
        records = self[rows.tolist()]
        images, labels = [], []
        for row, image, label in zip(rows.tolist(), records["image"], records["label"]):
            record = {"image": image, "label": label}
            image, label, _ = first_readable(self, row, record, self.pixel_range, self.draft_side(resolution))
            images.append(resize_and_crop(image, resolution))
            labels.append(label)
        return np.stack(images), np.array(labels, dtype=np.int64)

    def give_up_when(self, interrupted: Callable[[], bool]) -> None:
        """Has no effect: nothing here waits for a server."""

    def release(self) -> None:
        """Has no effect: no images are kept in memory."""


def worker_loader(samples: SampleStreams, batch_sampler: Iterable[list[int]], num_workers: int, pin_memory: bool):
    """Yields the batches of a process in order, computed ahead by worker processes, or on demand with 0 workers.

    Args:
        samples: returns a batch for a list of indices.
        batch_sampler: a `StreamBatchSampler`.
        num_workers: the number of worker processes.
        pin_memory: whether batches are in pinned memory, for copies to a GPU.
    """
    return torch.utils.data.DataLoader(
        samples,
        batch_size=None,  # `samples` returns whole batches
        sampler=batch_sampler,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
    )


def class_names(data) -> list[str] | None:
    """The names of the classes in order, or None if the classes have no names."""
    return [data.id2label[label] for label in range(data.num_classes)] if data.id2label else None


def image_content(image) -> bytes:
    """The bytes of an image file, or of the pixels of a PIL image; empty if the file cannot be read."""
    if isinstance(image, PILImage.Image):
        return f"{image.mode} {image.size}".encode() + image.tobytes()
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        with open(image["path"], "rb") as file:
            return file.read()
    except OSError:
        return b""


# ----------------------------------------------------------------------------------------------------------------------
# Data sets of `datasets`


class ImageDataset(ImageSource):
    """A data set of `datasets` with the columns `image` and `label`.

    Args:
        data: as `load_image_dataset` returns it, with images that are not decoded.
        id2label: the names of the classes.
        num_classes: the number of classes.
    """

    def __init__(self, data: Dataset, id2label: dict[int, str] | None, num_classes: int):
        self.data = data
        self.id2label = id2label
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: list[int]) -> dict[str, list]:
        return self.data[rows]

    def labels(self) -> np.ndarray:
        """The labels of all rows, int64 `[n]`."""
        return column_values(self.data, "label").to_numpy().astype(np.int64)

    def classes_with_images(self) -> list[int]:
        """The ids of the classes that have images, in order."""
        return np.unique(self.labels()).tolist()

    def fingerprint(self) -> dict:
        """Returns the class names, the CRC-32 of the labels, and for each class the CRC-32 of its images.

        The latter covers the size in bytes of every image and the names of image files, in the order of the rows, and the
        content of at least one image of each class. It does not depend on the folder of the files. With more than 100,000
        image files, it covers the sizes of an evenly spaced subset; with more than 1,024 classes, it covers the
        content of images of an evenly spaced subset of the classes.
        """
        labels = self.labels()
        names, sizes = image_files(self.data)
        rows_of_class = np.split(
            np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=self.num_classes))[:-1]
        )
        files_of_class = max(1, MOST_FILE_SIZES // self.num_classes)
        sampled_of_class = -(-FINGERPRINT_IMAGES // self.num_classes)
        sampled_classes = range(0, self.num_classes, -(-self.num_classes // MOST_CLASSES))
        checksums = []
        for label, rows in enumerate(rows_of_class):
            if sizes is None:
                paths = names.take(pa.array(spread(rows, files_of_class))).to_pylist()
                own_sizes = np.array([file_size(path) for path in paths], dtype=np.int64)
                basenames = [os.path.basename(path) for path in names.take(pa.array(rows)).to_pylist()]
                checksum = zlib.crc32("\n".join(basenames).encode())
            else:
                own_sizes, checksum = sizes[rows], 0
            checksum = zlib.crc32(own_sizes.tobytes(), checksum)
            if label in sampled_classes and len(rows):
                for image in self[spread(rows, sampled_of_class).tolist()]["image"]:
                    checksum = zlib.crc32(image_content(image), checksum)
            checksums.append(checksum)
        return {
            CLASS_NAMES: class_names(self),
            "the checksum of the labels": zlib.crc32(labels.tobytes()),
            CLASS_CHECKSUMS: checksums,
        }


def image_files(data: Dataset) -> tuple[pa.Array, np.ndarray | None]:
    """The paths of all images, and their sizes in bytes; the sizes are None if some images are separate files.

    Images that are embedded in the table are not read, only their lengths.
    """
    column = data.data.column("image")
    paths = pa.chunked_array([pc.struct_field(chunk, "path") for chunk in column.chunks], pa.string())
    paths = paths.cast(pa.large_string()).combine_chunks()
    lengths = [pc.binary_length(pc.struct_field(chunk, "bytes")) for chunk in column.chunks]
    lengths = pa.chunked_array(lengths, lengths[0].type)
    # A selection of rows is kept by `datasets` as indices into the table.
    if data._indices is not None:
        indices = data._indices.column(0).combine_chunks()
        paths, lengths = paths.take(indices), lengths.take(indices)
    return paths, None if lengths.null_count else lengths.to_numpy().astype(np.int64)


def file_size(path: str | None) -> int:
    """The size of a file in bytes, or -1 if the file cannot be found."""
    try:
        return os.stat(path).st_size
    except (OSError, TypeError):
        return -1


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spread over them."""
    return rows[:: -(-len(rows) // count)] if len(rows) > count else rows
