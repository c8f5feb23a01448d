# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Imports latents that other repositories have computed into a latent cache.

`RepaLatents` reads the output of REPA's preprocessing, and `LightningLatents` reads the shards of LightningDiT. Both
have

    len(source), labels          the number of images; their classes, int64 `[n]`
    kind, flip                   the `kind` in a cache's config; whether there are mirrored copies
    shape                        the shape of a latent, `(C, h, w)`
    read(rows)                   float32 `[copies, B, C, h, w]`, or `[copies, B, 2C, h, w]` for moments, not scaled
    has_images                   whether there are images
    pixels(row)                  an image, uint8 `[R, R, 3]`; only `RepaLatents`
    checksum()                   the checksum of the labels and a sample of the latents
"""

import io
import json
import re
import zipfile
import zlib
from bisect import bisect_right
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..arrays import num_bytes, read_header
from ..errors import InputError, first_line
from ..files import open_image
from ..models.autoencoder import scale_and_shift
from ..random_streams import ORDER, random_stream
from .latent_cache import chunk_rows
from .latent_cache_writer import CacheWriter
from .latent_encoding import IMAGE_FORMATS


FIELD = "from_latents"
MOST_CLASSES = 100_000
LARGEST_LATENT = 2**28  # bytes of one latent; a file that claims to hold a larger one is refused before it is read


def problem(path: Path, what: str) -> InputError:
    """The error for latents that cannot be used."""
    return InputError(FIELD, f"`{FIELD}` {path}: {what}")


def check_labels(path: Path, labels: np.ndarray):
    """Checks that labels are class ids.

    Raises:
        InputError: if one is negative, or so large that it cannot be the number of a class.
    """
    if not len(labels):
        raise problem(path, "there are no latents in it")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= MOST_CLASSES:
        wrong = low if low < 0 else high
        raise problem(path, f"a label is {wrong}; labels must be class ids from 0 to {MOST_CLASSES - 1}")


# ----------------------------------------------------------------------------------------------------------------------
# REPA


class FolderOrZip:
    """The files of a folder or a zip archive by their names, which are relative to it.

    Raises:
        InputError: if it is neither or cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            if zipfile.is_zipfile(path):
                self.names = [info.filename for info in self._archive.infolist() if not info.is_dir()]
            elif path.is_dir():
                self.names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
            else:
                raise problem(path, "it is neither a folder nor a zip archive")
        except (OSError, zipfile.BadZipFile) as error:
            raise problem(path, f"it cannot be read ({first_line(error)})") from error

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_archive"}

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            InputError: if it cannot be read.
        """
        try:
            return (self.path / name).read_bytes() if self.path.is_dir() else self._archive.read(name)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise problem(self.path, f"{name} cannot be read ({first_line(error)})") from error


def find_part(path: Path, name: str) -> Path | None:
    """The folder `name` or the archive `name.zip` in a folder; None if there is neither."""
    return next((part for part in (path / name, path / f"{name}.zip") if part.exists()), None)


def number_of(name: str) -> str | None:
    """The digits at the end of a file's name, before the ending; None if there are none."""
    found = re.search(r"(\d+)\.\w+$", name)
    return found and found[1]


class RepaLatents:
    """REPA's preprocessed data set: one `.npy` file per image with mean and standard deviation, `[2C, h, w]`.

    Args:
        path: the folder that holds `vae-sd` and, optionally, `images` (each a folder or a zip archive); or `vae-sd`
            itself.

    Raises:
        InputError: if files or labels are missing, or do not match each other.
    """

    kind = "moments"
    flip = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise problem(self.path, "it does not exist")
        self.files = FolderOrZip(find_part(self.path, "vae-sd") or self.path)
        self.names = sorted(name for name in self.files.names if name.endswith(".npy"))
        if not self.names:
            raise problem(
                self.path, "it has no .npy files; give the folder that holds `vae-sd`, or that folder or zip"
            )
        self.labels = self._read_labels()
        check_labels(self.path, self.labels)
        first = self._array(self.names[0])
        if first.ndim != 3 or first.shape[0] % 2:
            raise problem(
                self.path,
                f"{self.names[0]} has the shape {list(first.shape)}; mean and standard deviation are [2C, h, w]",
            )
        self.stored = first.shape
        self.shape = (first.shape[0] // 2, *first.shape[1:])
        self.images, self.image_names = None, []
        if part := find_part(self.path, "images"):
            self._find_images(FolderOrZip(part))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_images(self) -> bool:
        return self.images is not None

    def _read_labels(self) -> np.ndarray:
        try:
            table = json.loads(self.files.read("dataset.json"))["labels"]
            if table is None:  # a data set without classes: all images get class 0
                return np.zeros(len(self.names), dtype=np.int64)
            labels = dict(table)
            values = [labels[name] for name in self.names]
        except KeyError as error:
            raise problem(self.path, f"dataset.json has no entry {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise problem(self.path, f"dataset.json is damaged ({first_line(error)})") from error
        for name, value in zip(self.names, values):
            if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
                raise problem(
                    self.path, f"the label of {name} in dataset.json is {json.dumps(value)[:40]}, not a class id"
                )
        return np.array(values, dtype=np.int64)

    def _find_images(self, images: FolderOrZip):
        endings = PILImage.registered_extensions()
        names = sorted(name for name in images.names if Path(name).suffix.lower() in endings)
        if len(names) != len(self):
            raise problem(
                self.path,
                f"it has {len(self)} latents and {len(names)} images; give `images` none, or the complete set of both",
            )
        for name, image in zip(self.names, names):
            if number_of(name) != number_of(image):
                raise problem(self.path, f"the latent {name} and the image {image} have different numbers")
        self.images, self.image_names = images, names

    def _array(self, name: str) -> np.ndarray:
        content = io.BytesIO(self.files.read(name))
        try:
            shape, _, dtype = read_header(content)
            if num_bytes(shape, dtype) > LARGEST_LATENT:
                raise ValueError(f"its header has the shape {list(shape)}")
            content.seek(0)
            array = np.load(content, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise problem(self.path, f"{name} is damaged ({first_line(error)})") from error
        if array.dtype.kind != "f":
            raise problem(self.path, f"{name} holds {array.dtype}, not floating-point numbers")
        return array[0] if array.ndim == 4 and array.shape[0] == 1 else array

    def read(self, rows: list[int]) -> torch.Tensor:
        """Mean and standard deviation of some images, float32 `[1, B, 2C, h, w]`.

        Raises:
            InputError: if a file is damaged, of another shape, or holds negative standard deviations.
        """
        arrays = []
        for row in rows:
            array = self._array(self.names[row])
            if array.shape != self.stored:
                raise problem(
                    self.path, f"{self.names[row]} has the shape {list(array.shape)}, others have {list(self.stored)}"
                )
            if (array[self.shape[0] :] < 0).any():
                raise problem(
                    self.path,
                    f"the second half of {self.names[row]} has negative numbers, so it is not a standard deviation "
                    "(a log variance?)",
                )
            arrays.append(array.astype(np.float32))
        return torch.from_numpy(np.stack(arrays))[None]

    def pixels(self, row: int) -> np.ndarray:
        """The image of a row, uint8 `[R, R, 3]`.

        Raises:
            InputError: if it cannot be decoded.
        """
        name = self.image_names[row]
        try:
            with open_image(io.BytesIO(self.images.read(name))) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise problem(self.path, f"{name} cannot be decoded ({first_line(error)})") from error

    def checksum(self, sample: int = 256) -> int:
        """CRC-32 of the labels and of a fixed random sample of the files."""
        checksum = zlib.crc32(self.labels.tobytes())
        for row in random_stream(0, 0, ORDER).permutation(len(self))[:sample].tolist():
            checksum = zlib.crc32(self.files.read(self.names[row]), checksum)
        return checksum


# ----------------------------------------------------------------------------------------------------------------------
# LightningDiT


class LightningLatents:
    """LightningDiT's shards: one drawn latent for each image and its mirrored copy, in safetensors files.

    The shards are in the order of their names. They have no images.

    Args:
        path: the folder with the shards: tensors `latents [n, C, h, w]`, `labels [n]` and, in all shards or in none,
            `latents_flip`.

    Raises:
        InputError: if tensors are missing, or do not match each other.
    """

    kind = "sampled"
    has_images = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise problem(self.path, "it is not a folder of safetensors files")
        self.shards = sorted(file for file in self.path.glob("*.safetensors") if file.is_file())
        if not self.shards:
            raise problem(self.path, "it has no .safetensors files")
        self.ends, labels, shapes, flips = [], [], {}, {}
        for shard in self.shards:
            found = self._open_shard(shard)
            labels.append(found["labels"])
            self.ends.append(len(found["labels"]) + (self.ends[-1] if self.ends else 0))
            shapes.setdefault(found["shape"], shard.name)
            flips.setdefault(found["flip"], shard.name)
        if len(shapes) > 1:
            listed = " and ".join(f"{list(shape)} in {name}" for shape, name in [*shapes.items()][:2])
            raise problem(self.path, f"its latents have different shapes: {listed}")
        if len(flips) > 1:
            raise problem(self.path, f"{flips[True]} has mirrored latents (latents_flip), {flips[False]} does not")
        self.shape, self.flip = next(iter(shapes)), next(iter(flips))
        self.labels = np.concatenate(labels)
        check_labels(self.path, self.labels)

    def __len__(self) -> int:
        return self.ends[-1]

    def _open_shard(self, shard: Path) -> dict:
        """Reads the labels, the shape of a latent, and whether there are mirrored copies."""
        try:
            with safe_open(shard, framework="pt") as file:
                names = set(file.keys())
                if missing := {"latents", "labels"} - names:
                    raise problem(self.path, f"{shard.name} has no tensor {sorted(missing)[0]}")
                sizes = {name: file.get_slice(name).get_shape() for name in names & {"latents", "latents_flip"}}
                kinds = {name: file.get_slice(name).get_dtype() for name in sizes}
                labels = file.get_tensor("labels")
        except (OSError, SafetensorError) as error:
            raise problem(self.path, f"{shard.name} is damaged ({first_line(error)})") from error
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise problem(
                self.path, f"the labels in {shard.name} are {labels.dtype} {list(labels.shape)}, not class ids [n]"
            )
        for name, size in sizes.items():
            if len(size) != 4 or size[0] != len(labels) or size != sizes["latents"]:
                raise problem(self.path, f"{name} in {shard.name} has the shape {size} for {len(labels)} labels")
            if kinds[name] not in ("F64", "F32", "F16", "BF16"):
                raise problem(self.path, f"{name} in {shard.name} holds {kinds[name]}, not floating-point numbers")
        return {"labels": labels.long().numpy(), "shape": tuple(sizes["latents"][1:]), "flip": "latents_flip" in sizes}

    def read(self, rows: list[int]) -> torch.Tensor:
        """The latents of consecutive rows, float32 `[copies, B, C, h, w]`.

        Raises:
            InputError: if a shard is damaged.
        """
        names, copies, row = ["latents", "latents_flip"][: 1 + self.flip], [], rows[0]
        while row <= rows[-1]:
            number = bisect_right(self.ends, row)
            first = self.ends[number - 1] if number else 0
            end = min(self.ends[number], rows[-1] + 1)
            try:
                with safe_open(self.shards[number], framework="pt") as file:
                    parts = [file.get_slice(name)[row - first : end - first].float() for name in names]
            except (OSError, SafetensorError) as error:
                raise problem(self.path, f"{self.shards[number].name} is damaged ({first_line(error)})") from error
            copies.append(torch.stack(parts))
            row = end
        return torch.cat(copies, dim=1)

    def checksum(self, sample: int = 256) -> int:
        """CRC-32 of the labels and of a fixed random sample of the latents."""
        checksum = zlib.crc32(self.labels.tobytes())
        for row in random_stream(0, 0, ORDER).permutation(len(self))[:sample].tolist():
            checksum = zlib.crc32(self.read([row]).numpy().tobytes(), checksum)
        return checksum


FORMATS = {"repa-zip": RepaLatents, "lightningdit": LightningLatents}


# ----------------------------------------------------------------------------------------------------------------------
# Into a cache


def scaled(latents: torch.Tensor, kind: str, vae) -> torch.Tensor:
    """Shifts and scales latents, or means and standard deviations, as the autoencoder's config says.

    Args:
        latents: `[..., C, h, w]`, or `[..., 2C, h, w]` for moments.
        kind: the `kind` in a cache's config.
        vae: the autoencoder.
    """
    scale, shift = (value.cpu() if isinstance(value, torch.Tensor) else value for value in scale_and_shift(vae))
    if kind != "moments":
        return (latents - shift) * scale
    mean, std = latents.chunk(2, dim=-3)
    return torch.cat([(mean - shift) * scale, std * scale], dim=-3)


def scale_problem(source, vae, rows: int = 64) -> str | None:
    """Describes the problem if the standard deviation of scaled latents is outside [0.4, 2.5]; else returns None.

    Args:
        source: `RepaLatents` or `LightningLatents`.
        vae: the autoencoder whose scale the latents get.
        rows: how many latents are read, the first ones.
    """
    latents = scaled(source.read(list(range(min(rows, len(source))))), source.kind, vae)
    if source.kind == "moments":
        mean, std = latents.chunk(2, dim=-3)
        spread = float((mean.var() + std.square().mean()).sqrt())
    else:
        spread = float(latents.std())
    if 0.4 <= spread <= 2.5:
        return None
    return (
        f"latents have a standard deviation of {spread:.2g} after the scale of the autoencoder, where about 1 is usual; "
        "were they made by another autoencoder, or scaled already?"
    )


def write_latents(writer: CacheWriter, source, vae):
    """Writes the chunks of this process: scaled latents, labels and, unless the config has `images` none, the images.

    Raises:
        InputError: if latents are not finite in float16, an image is missing or of another size, or the disk is full.
    """
    config = writer.config
    progress = tqdm(
        total=sum(len(chunk_rows(config, chunk)) for chunk in writer.chunks),
        desc="reading",
        unit="image",
        disable=not writer.state.is_main_process,
    )
    with progress:
        for chunk in writer.chunks:
            rows = list(chunk_rows(config, chunk))
            latents = scaled(source.read(rows), source.kind, vae).half()
            if not latents.isfinite().all():
                raise problem(source.path, f"latents of rows {rows[0]} to {rows[-1]} are not finite in float16")
            images = [compressed(source, row, config) for row in rows] if config["images"] != "none" else []
            arrays = {"latents": latents.numpy(), "labels": source.labels[rows][None]}
            writer.write(chunk, arrays, images, [])
            progress.update(len(rows))


def compressed(source, row: int, config: dict) -> bytes:
    """The image of a row in the format of the cache."""
    pixels, side = source.pixels(row), config["resolution"]
    if pixels.shape[:2] != (side, side):
        raise problem(
            source.path,
            f"the image of row {row} has {pixels.shape[1]}x{pixels.shape[0]} pixels, and `resolution` is {side}",
        )
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, **IMAGE_FORMATS[config["images"]])
    return buffer.getvalue()
