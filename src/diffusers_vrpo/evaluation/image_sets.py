# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Sets of images to measure, from folders, ADM's `.npz` batches, arrays and data sets, as uint8 RGB `[3, H, W]`."""

import logging
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..arrays import map_array, num_bytes, read_header
from ..config import is_embedded_dataset
from ..data.image_decoding import PixelRange, decode_image, find_pixel_range, resize_and_crop, sample_rows
from ..data.image_files import list_images, reason_without_images
from ..errors import InputError, first_line
from ..files import open_image
from ..pipelines.sample_folder import unfinished_samples
from ..random_streams import ORDER, random_stream


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
# A compressed array is unpacked into memory. It may have as many bytes as 50,000 images of 256 x 256 pixels and, above
# 256 MB, at most 100 times the bytes that it takes in the file, a ratio that only almost blank images exceed.
MAX_UNPACKED = 50_000 * 256 * 256 * 3
MAX_UNPACKED_RATIO = 100
SMALL_UNPACKED = 1 << 28


class ImageSet(torch.utils.data.Dataset):
    """Images of one size.

    Attributes:
        name (`str`): the option and its value, for messages.
        size (`tuple[int, int]`): height and width.
        kind (`str`): "folder", ".npz", "array" or "data set".
        read: returns the pixels of an image, uint8 `[H, W, 3]`; it can be pickled, for worker processes.
        origin: distinguishes this set from others, such as the names and dates of files, or a data set's fingerprint.
    """

    def __init__(
        self, name: str, kind: str, count: int, size: tuple[int, int], read: Callable[[int], np.ndarray], origin
    ):
        self.name = name
        self.kind = kind
        self.count = count
        self.size = size
        self.read = read
        self.origin = origin

    def __len__(self):
        return self.count

    def __getitem__(self, row: int) -> torch.Tensor:
        """Returns an image, uint8 `[3, H, W]`.

        Raises:
            InputError: if the image cannot be decoded; skipping it would change the metric.
        """
        try:
            pixels = self.read(row)
        except Exception as error:  # PIL's readers raise many types; all mean the same here
            raise InputError(
                None, f"{self.name}: image {row} cannot be decoded ({first_line(error)}); mend or remove it"
            ) from (error)
        if tuple(pixels.shape) != (*self.size, 3):
            raise InputError(
                None,
                f"{self.name}: image {row} is {pixels.shape[1]}x{pixels.shape[0]}, the others are "
                f"{self.size[1]}x{self.size[0]}; a metric needs one size",
            )
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))

    def fingerprint(self, sample: int = 256) -> dict:
        """Returns the count, the size, and CRC-32 of the origin and the pixels of a fixed random subset, as JSON."""
        checksum = zlib.crc32(repr(self.origin).encode())
        for row in random_stream(0, 0, ORDER).permutation(len(self))[:sample].tolist():
            checksum = zlib.crc32(self[row].numpy(), checksum)
        return {"count": len(self), "size": list(self.size), "checksum": checksum}


@dataclass
class FileReader:
    """Reads image files as they are, or cropped to `resolution` as for training."""

    paths: list[Path]
    resolution: int | None
    pixel_range: PixelRange

    def __call__(self, row: int) -> np.ndarray:
        image = decode_image({"bytes": None, "path": self.paths[row]}, self.pixel_range)
        return np.asarray(image) if self.resolution is None else resize_and_crop(image, self.resolution)


class ArrayReader:
    """Reads the `arr_0` of an `.npz`; pickles the name of the file, not its content."""

    def __init__(self, name: str, file: str | Path):
        self.name = name
        self.file = file
        self.array = read_npz(name, file, "arr_0", partial(check_pixels, f"{name}: arr_0"))

    def __reduce__(self):
        return ArrayReader, (self.name, self.file)

    def __call__(self, row: int) -> np.ndarray:
        return self.array[row]


@dataclass
class DatasetReader:
    """Reads images of a data set of `datasets`, cropped to `resolution` as for training."""

    data: "Dataset"
    image_column: str
    resolution: int
    pixel_range: PixelRange

    def __call__(self, row: int) -> np.ndarray:
        return resize_and_crop(decode_image(self.data[row][self.image_column], self.pixel_range), self.resolution)


def folder_images(name: str, folder: str | Path, resolution: int | None = None) -> ImageSet:
    """The images below a folder as they are, or cropped to `resolution` as for training.

    Raises:
        InputError: if the folder has no images, an image cannot be read, the sizes differ, or the pixel values have no
            known range.
    """
    listing = list_images(folder)
    if not listing.images:
        raise InputError(None, f"{name}: {reason_without_images(os.fspath(folder), listing)}")
    if (Path(folder) / "manifest.json").is_file():  # what `vrpo sample` writes next to its images
        listing.others -= Counter({".json": 1})
        listing.others -= Counter({".npz": (Path(folder) / "samples.npz").is_file()})
    if left_out := listing.left_out():
        logger.warning(f"{name}: not used: {'; '.join(left_out)}")
    paths = sorted(Path(folder, image) for image in listing.images)
    first = None
    for path in paths if resolution is None else paths[:1]:
        try:
            with open_image(path) as image:  # the header only
                size = image.size
        except Exception as error:  # PIL's readers raise many types; all mean the same here
            raise InputError(None, f"{name}: {path} is not an image that can be read; mend or remove it") from error
        first = first or (path, size)
        if size != first[1]:
            raise InputError(
                None,
                f"{name}: the images are of several sizes ({first[0].name} is {first[1][0]}x{first[1][1]}, {path.name} "
                f"{size[0]}x{size[1]}); a metric needs one size",
            )

    height, width = (first[1][1], first[1][0]) if resolution is None else (resolution, resolution)
    origin = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    sample = ({"bytes": None, "path": paths[row]} for row in sample_rows(len(paths)))
    reader = FileReader(paths, resolution, find_pixel_range(sample, name))
    return ImageSet(name, "folder", len(paths), (height, width), reader, origin)


def array_images(name: str, file: str | Path) -> ImageSet:
    """Opens the `arr_0` (uint8 `[N, H, W, 3]`) of an `.npz`; it is memory-mapped if it is not compressed.

    Raises:
        InputError: if `arr_0` is missing, something else, or too large to unpack.
    """
    reader = ArrayReader(name, file)
    origin = (os.path.getsize(file), os.stat(file).st_mtime_ns)
    return ImageSet(name, ".npz", len(reader.array), reader.array.shape[1:3], reader, origin)


def as_image_set(name: str, images) -> ImageSet:
    """Turns an array uint8 `[N, H, W, 3]` (numpy or torch), a folder or an `.npz` into an `ImageSet`.

    Raises:
        InputError: if there are no images, or they cannot be measured.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, (str, Path)):
        return open_images(f"`{name}`", str(images))
    array = np.asarray(images)
    check_pixels(f"`{name}`", array.dtype, array.shape)
    origin = zlib.crc32(np.ascontiguousarray(array))
    return ImageSet(f"`{name}`", "array", len(array), array.shape[1:3], array.__getitem__, origin)


def check_pixels(name: str, dtype: np.dtype, shape: tuple[int, ...]):
    """Checks that an array holds images.

    Raises:
        InputError: if it is not uint8 `[N, H, W, 3]`, or empty.
    """
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise InputError(
            None, f"{name} must be uint8 of the shape [images, height, width, 3], not {dtype} {list(shape)}"
        )


def read_npz(
    name: str, file: str | Path, key: str, check: Callable[[np.dtype, tuple[int, ...]], None] | None = None
) -> np.ndarray:
    """Opens one array of an `.npz`: memory-mapped if it is not compressed (as `np.savez` writes it), else read.

    A compressed array is read only if the headers of the zip and of the array agree on its size, and if it is not
    larger than `MAX_UNPACKED` nor, unless it is small, than `MAX_UNPACKED_RATIO` times its size in the file.

    Args:
        name: what errors call the file.
        key: the name of the array in the file.
        check: called with the dtype and the shape in the header, before the content is read; raises InputError.

    Raises:
        InputError: if the file or the array cannot be read, and whatever `check` raises.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            member = archive.getinfo(f"{key}.npy")
            with archive.open(member) as stream:
                shape, _, dtype = read_header(stream)
                size, declared = num_bytes(shape, dtype), member.file_size - stream.tell()
        if check is not None:
            check(dtype, shape)
        if size != declared:
            raise ValueError(f"its header promises {size} bytes, and {declared} follow")
        if member.compress_type == zipfile.ZIP_STORED:
            return map_array(Path(file), member_offset(file, member))
        limit = min(MAX_UNPACKED, max(SMALL_UNPACKED, MAX_UNPACKED_RATIO * member.compress_size))
        if size > limit:
            raise InputError(
                None,
                f"{name}: {key} takes {size / 1e9:.1f} GB unpacked and {member.compress_size / 1e6:.1f} MB in the file, and at "
                f"most {limit / 1e9:.1f} GB of it are unpacked; write it with np.savez, which does not compress",
            )
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[key]
    except InputError:
        raise
    except Exception as error:  # zipfile and its decompressors raise many types; all mean the same here
        raise InputError(
            None, f"{name}: {key} cannot be read ({first_line(error)}); is it an .npz as ADM writes it?"
        ) from error


def member_offset(file: str | Path, member: zipfile.ZipInfo) -> int:
    """The offset at which the content of an uncompressed member of a zip begins."""
    with open(file, "rb") as stream:
        # The local header has 30 bytes; the last four are the lengths of the name and of the extra field.
        stream.seek(member.header_offset + 26)
        lengths = struct.unpack("<HH", stream.read(4))
        return stream.tell() + sum(lengths)


def npz_keys(name: str, file: str | Path) -> set[str]:
    """The names of the arrays in an `.npz`.

    Raises:
        InputError: if the file is not an `.npz`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return {member.removesuffix(".npy") for member in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(None, f"{name} cannot be read ({first_line(error)}); is it an .npz?") from error


def dataset_images(
    option: str,
    name: str,
    source: str,
    config_name: str | None,
    split: str,
    image_column: str,
    resolution: int,
    cache_dir: str | None,
) -> ImageSet:
    """Opens a split of a data set (Hub name or folder, or an embedded one), cropped to `resolution` as for training.

    Raises:
        InputError: if the data set, split or column of images does not exist, or the values of the pixels have no known
            range.
    """
    # Imported here, so that folders and files of images can be measured without `datasets`.
    from datasets import Image

    from ..data.image_datasets import load_embedded_dataset, open_named, refuse_config_name

    if is_embedded_dataset(source):
        refuse_config_name(config_name, option, source)
        data = load_embedded_dataset(source)
    else:
        data = open_named(option, source, config_name, cache_dir)
    if split not in data:
        raise InputError(
            "reference_split", f"`reference_split` {split!r} is not in {source}; it has {', '.join(map(repr, data))}"
        )
    data = data[split]
    if image_column not in data.column_names or not isinstance(data.features[image_column], Image):
        columns = [key for key, feature in data.features.items() if isinstance(feature, Image)]
        raise InputError(
            "image_column",
            f"`image_column` {image_column!r} is not a column of images in {source}; these are: "
            f"{', '.join(map(repr, columns)) or 'none'}",
        )
    if len(data) == 0:
        raise InputError("reference_split", f"`reference_split` {split!r} of {source} has no images")
    data = data.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    sample = (data[row][image_column] for row in sample_rows(len(data)))
    reader = DatasetReader(data, image_column, resolution, find_pixel_range(sample, name))
    return ImageSet(name, "data set", len(data), (resolution, resolution), reader, data._fingerprint)


def open_images(
    name: str,
    source: str,
    resolution: int | None = None,
    config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    cache_dir: str | None = None,
    dataset_resolution: int | None = None,
) -> ImageSet:
    """Opens the images that a command line names: an `.npz`, a folder with image files, or a data set.

    Args:
        name: name of the images in errors, such as SAMPLES, or an option in backticks.
        source: a path, or the Hub name of a data set.
        resolution: side to crop images of folders and data sets to. By default a folder is used as it is, and a data set
            is cropped to `dataset_resolution`.
        config_name, split, image_column, cache_dir: as for `dataset_images`, for a data set.
        dataset_resolution: side to crop the images of a data set to, without `resolution`.

    Raises:
        InputError: if there are no images, or they cannot be measured.
    """
    option, name, path = name.strip("`"), f"{name} {source}", Path(source).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise InputError(None, f"{name}: the file does not exist")
        return array_images(name, path)
    has_images = path.is_dir() and bool(list_images(path).images)
    wanted = unfinished_samples(path)
    if wanted is not None and not has_images:
        raise InputError(None, f"{name} is an unfinished set of {wanted} samples; run the same command to finish it")
    if not has_images and (path / "samples.npz").is_file():
        raise InputError(None, f"{name} has no image files; give {path / 'samples.npz'}, which is in it")
    if has_images:
        return folder_images(name, path, resolution)
    if path.is_file() or (not path.exists() and (path.is_absolute() or source.startswith((".", "~")))):
        what = "is neither a folder nor an .npz" if path.exists() else "does not exist"
        raise InputError(None, f"{name} {what}; give a folder of images, an .npz, or a data set")
    if resolution is None and dataset_resolution is None:
        raise InputError(None, f"{name}: the folder has no images, or does not exist")
    return dataset_images(
        option, name, source, config_name, split, image_column, resolution or dataset_resolution, cache_dir
    )
