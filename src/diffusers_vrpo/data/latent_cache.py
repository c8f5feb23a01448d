# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The latent cache: autoencoder latents, labels, images and encoder features of a data set in memory-mapped files.

A cache is a folder with the following files, where n is the number of images, and f is 2 with mirrored copies and 1
without (docs/data.md):

    latents.npy        float16 `[f n, 2C, h, w]`: mean, then standard deviation, both as the transformer sees them (shifted
                       and scaled); `[f n, C, h, w]` without a posterior, or for one latent drawn from it
    labels.npy         int64 `[n]`
    images/00000.bin   compressed images, one file per chunk; image_offsets.npy, int64 `[n]`, holds the end of each image
    features-0.npy     float16 `[f n, N, E]` of the first encoder
    meta.json          the settings, a checksum for each chunk, `complete`

Row n + i is the mirrored copy of row i. Rows are written in chunks. A chunk counts as written once its data are on the
disk and its checksum is in a journal; every process has a journal of its own. `meta.json` says `complete` once all
chunks are written.
"""

import io
import json
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..arrays import map_array
from ..config import last_part
from ..errors import InputError, first_line
from ..files import open_image
from ..models.autoencoder import latent_statistics
from ..random_streams import NEWEST_STREAMS, ORDER, random_stream
from ..schemas import CACHE, COMPLETE_CACHE, check
from .image_source import CLASS_NAMES, class_names, worker_loader
from .samples import SampleStreams


FORMAT = 1
REMEDY = "`vrpo prepare` makes one"


def read_meta(folder: Path, option: str) -> dict:
    """Reads `meta.json` of a cache, complete or not.

    Raises:
        InputError: if the folder does not hold a cache that this version can read.
    """
    try:
        # The Hub's download folder consists of links, which are followed here; reading a pipe would block.
        file = folder / "meta.json"
        if file.exists() and not file.is_file():
            raise ValueError("it is not a regular file")
        meta = check(json.loads(file.read_text()), {"format": int})
        if meta["format"] == FORMAT:
            meta = check(meta, CACHE)
            return check(meta, COMPLETE_CACHE) if meta["complete"] else meta
    except FileNotFoundError as error:
        raise InputError(
            option, f"`{option}` {folder} has no meta.json, so it is not a latent cache; {REMEDY}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            option, f"`{option}` {folder}: meta.json is damaged ({first_line(error)}); prepare it again"
        ) from error
    raise InputError(
        option, f"`{option}` {folder} has format {meta['format']}, this version reads {FORMAT}; prepare it again"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Files


def array_layout(config: dict) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """`{name: (dtype, shape of a row, copies of every row)}` of the arrays of a cache; each is the file `name.npy`."""
    copies = 2 if config["flip"] else 1
    channels, height, width = config["latent_shape"]
    channels *= 2 if config["kind"] == "moments" else 1
    layout = {"latents": ("<f2", (channels, height, width), copies), "labels": ("<i8", (), 1)}
    if config["images"] != "none":
        layout["image_offsets"] = ("<i8", (), 1)
    for i, features in enumerate(config["features"]):
        layout[f"features-{i}"] = ("<f2", (features["grid"][0] * features["grid"][1], features["dim"]), copies)
    return layout


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The bytes of a `.npy` file of version 1.0 that precede the data."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


def image_file(folder: Path, chunk: int) -> Path:
    """The file with the compressed images of a chunk."""
    return folder / "images" / f"{chunk:05d}.bin"


def chunk_rows(config: dict, chunk: int) -> range:
    """The rows of a chunk; the last chunk may have fewer than the others."""
    return range(chunk * config["chunk_rows"], min((chunk + 1) * config["chunk_rows"], config["count"]))


def num_chunks(config: dict) -> int:
    return -(-config["count"] // config["chunk_rows"])


def checksum_on_disk(folder: Path, config: dict, chunk: int) -> int | None:
    """CRC-32 of a chunk in the files of a cache; None if they are missing, too short or of another kind."""
    rows, checksum = chunk_rows(config, chunk), 0
    try:
        for name, (_, _, copies) in array_layout(config).items():
            array = map_array(folder / f"{name}.npy")
            for copy in range(copies):
                first = copy * config["count"] + rows.start
                checksum = zlib.crc32(np.ascontiguousarray(array[first : first + len(rows)]), checksum)
        if config["images"] != "none":
            checksum = zlib.crc32(image_file(folder, chunk).read_bytes(), checksum)
    except (OSError, ValueError, IndexError):  # IndexError: an array without rows
        return None
    return checksum


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class LatentCache:
    """A complete latent cache as training data, without decoding or encoding; `TrainingData` documents the methods.

    Like a `Dataset` of images, it has a length and a column `["label"]`. The arrays are mapped into memory; a copy of
    the object in another process maps them again.

    Args:
        folder: the folder of the cache.
        option: the option that names the folder, for errors.

    Attributes:
        config, about (`dict`): these entries of `meta.json`.
        checksum (`int`): CRC-32 of `config` and of the checksums of all chunks.
        corrupt_rows (`set[int]`): the rows whose image could not be decoded; each holds the next image instead.
        num_classes (`int`): the number of classes.
        id2label (`dict[int, str]`, *optional*): the names of the classes.
        vae (`str`): the autoencoder that the cache was made with.
        has_images (`bool`): whether the cache also holds the images.

    Raises:
        InputError: if the folder does not hold a cache, or the cache is unfinished, or files are missing or truncated.
    """

    random_access = True

    def __init__(self, folder: str | Path, option: str = "latents_dir"):
        self.folder, self.option = Path(folder), option
        meta = read_meta(self.folder, option)
        if not meta["complete"]:
            raise InputError(
                option, f"`{option}` {folder} is not finished; run the same `prepare` or `import` command again"
            )
        self.config = meta["config"]
        self.about = meta["about"]
        self.checksums = meta["checksums"]
        self.corrupt_rows = set(meta["corrupt_rows"])
        self.num_classes, names = self.about["num_classes"], self.about["class_names"]
        self.id2label = dict(enumerate(names)) if names else None
        self.vae, self.has_images = self.about["vae"], self.config["images"] != "none"
        self.checksum = zlib.crc32(json.dumps([self.config, self.checksums]).encode())
        for name, (dtype, row, copies) in array_layout(self.config).items():
            try:
                array = self._open(name)
            except (OSError, ValueError) as error:
                raise self._damaged(f"{name}.npy: {first_line(error)}") from error
            if array.shape != (copies * len(self), *row) or array.dtype != dtype:
                raise self._damaged(f"{name}.npy holds {array.dtype} {array.shape}")
        if self.has_images:
            missing = [c for c in range(num_chunks(self.config)) if not image_file(self.folder, c).exists()]
            if missing:
                raise self._damaged(f"{image_file(self.folder, missing[0])} is missing")

    def _damaged(self, what: str) -> InputError:
        return InputError(
            self.option, f"`{self.option}` {self.folder} is damaged ({what}); `vrpo prepare` with `verify` mends it"
        )

    def _open(self, name: str) -> np.ndarray:
        # As a plain array, since every index into a np.memmap would create another np.memmap.
        return np.asarray(map_array(self.folder / f"{name}.npy"))

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The mapped arrays by name; every process that reads them opens its own."""
        return {name: self._open(name) for name in array_layout(self.config)}

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}

    def __len__(self) -> int:
        return self.config["count"]

    def __getitem__(self, column: str) -> np.ndarray:
        """The labels, int64 `[n]`, as the column `label`."""
        return {"label": self.arrays["labels"]}[column]

    def stored_rows(self, rows: np.ndarray, flips: np.ndarray | None = None) -> np.ndarray:
        """The indices of some rows in the arrays with mirrored copies; `flips` bool `[B]` says which are mirrored."""
        return rows if flips is None else rows + len(self) * flips

    def read(self, name: str, rows: np.ndarray, flips: np.ndarray | None = None) -> torch.Tensor:
        """Copies rows of an array: `latents` float16 `[B,2C,h,w]` or `[B,C,h,w]`, `features-0` float16 `[B,N,E]`."""
        return torch.from_numpy(self.arrays[name].take(self.stored_rows(rows, flips), axis=0))

    def image_bytes(self, row: int) -> bytes:
        """The compressed image of a row."""
        chunk, place = divmod(row, self.config["chunk_rows"])
        ends = self.arrays["image_offsets"]
        start = int(ends[row - 1]) if place else 0
        # The files are not mapped: a process may usually not keep as many open as ImageNet's 1,251.
        with image_file(self.folder, chunk).open("rb") as file:
            file.seek(start)
            return file.read(int(ends[row]) - start)

    def pixels(self, row: int) -> np.ndarray:
        """The image of a row, uint8 `[R,R,3]`.

        Raises:
            InputError: if it cannot be decoded.
        """
        try:
            with open_image(io.BytesIO(self.image_bytes(row))) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise self._damaged(f"the image of row {row}: {first_line(error)}") from error

    # ------------------------------------------------------------------------------------------------------------------
    # As training data

    def check(self):
        """Has no effect: the images were decoded when the cache was made."""

    def fingerprint(self) -> dict:
        """Returns the class names, and CRC-32 of the labels and of the cache."""
        return {
            CLASS_NAMES: class_names(self),
            "the checksum of the labels": zlib.crc32(np.asarray(self["label"], dtype=np.int64).tobytes()),
            "the checksum of --latents_dir": self.checksum,
        }

    def classes_with_images(self) -> list[int]:
        """The ids of the classes that have images, in order."""
        return np.unique(self["label"]).tolist()

    def features(self, encoders: list[str], layers: list[int | None], grid_size: tuple[int, int]) -> list:
        """Returns a `CachedEncoder` per encoder, or an empty list if the cache has the images but not all features.

        Raises:
            InputError: if the cache has neither.
        """
        numbers = self.find_features(encoders, layers, grid_size)
        return [CachedEncoder(i, array, self.config["features"][array]["dim"]) for i, array in enumerate(numbers)]

    def check_vae(self, vae):
        """Checks that the latents were normalised with the channel statistics of `vae`; None is not checked.

        Raises:
            InputError: if `latents_mean` or `latents_std` in its configuration differ from those of the cache.
        """
        if vae is None:
            return
        recorded = {name: self.config[name] for name in ("latents_mean", "latents_std") if name in self.config}
        if recorded != latent_statistics(vae):
            made = (
                "with other `latents_mean` and `latents_std`"
                if recorded
                else "without `latents_mean` and `latents_std`"
            )
            raise InputError(
                self.option,
                f"`{self.option}` {self.folder} was made {made}, which does not match the config.json of `vae`; prepare the "
                "latents again, or give the autoencoder that made them",
            )

    def samples(
        self,
        *,
        seed: int,
        latent_shape: tuple[int, int, int],
        null_class_id: int | None,
        label_dropout: float = 0.1,
        random_flip: bool = False,
        num_tokens: int | None = None,
        encoders: list = (),
        stream_version: int = NEWEST_STREAMS,
        **only_for_images,
    ) -> "CachedSamples":
        """`CachedSamples`, with the images if some of the encoders need them. Resolution and crop are those of the cache.

        Raises:
            InputError: if the latents have another shape, or `random_flip` is set and they have no flipped copies.
        """
        if list(latent_shape) != self.config["latent_shape"]:
            raise InputError(
                "vae",
                f"`vae` makes latents of {list(latent_shape)}, but `{self.option}` {self.folder} holds "
                f"{self.config['latent_shape']}; give the autoencoder that made them",
            )
        features = [encoder.array for encoder in encoders if isinstance(encoder, CachedEncoder)]
        images = bool(encoders) and not features
        streams = (seed, null_class_id, label_dropout, random_flip, num_tokens)
        return CachedSamples(self, *streams, images, features, stream_version)

    def loader(self, samples: SampleStreams, batch_sampler, num_workers: int, pin_memory: bool):
        """A `DataLoader` with worker processes."""
        return worker_loader(samples, batch_sampler, num_workers, pin_memory)

    def latents(self, vae, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The latents of the batch in float32, drawn from the posterior if the cache holds its mean and deviation."""
        latents = batch["latents"].float()
        if "posterior_noise" not in batch:
            return latents
        mean, std = latents.chunk(2, dim=1)
        return mean + std * batch["posterior_noise"]

    def fixed_rows(self, count: int) -> np.ndarray:
        """Returns at most `count` random rows in ascending order, the same for every run."""
        return np.sort(random_stream(0, 0, ORDER).permutation(len(self))[:count])

    def examples(self, rows: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of the cache, which have its resolution, and their labels."""
        return np.stack([self.pixels(row) for row in rows.tolist()]), self["label"][rows].astype(np.int64)

    def give_up_when(self, interrupted: Callable[[], bool]):
        """Has no effect: nothing here waits for a server."""

    def release(self):
        """Has no effect: no images are kept in memory."""

    # ------------------------------------------------------------------------------------------------------------------
    # Chunks and features

    def damaged_chunks(self, progress=lambda chunks: chunks) -> list[int]:
        """Returns the chunks that differ from their checksums; `progress` wraps the chunks, for a progress bar."""
        chunks = progress(range(num_chunks(self.config)))
        return [c for c in chunks if checksum_on_disk(self.folder, self.config, c) != self.checksums[c]]

    def find_features(self, encoders: list[str], layers: list[int | None], grid_size: tuple[int, int]) -> list[int]:
        """Returns the numbers of the feature arrays of these encoders; empty if the cache does not have all of them.

        Args:
            encoders: Hub names or folders, of which only the last part of the name is compared.
            layers: one per encoder, as for `load_encoder`.
            grid_size: rows and columns of the tokens.

        Raises:
            InputError: if the cache does not have the images either.
        """
        found = []
        for encoder, layer in zip(encoders, layers):
            same = [
                i
                for i, features in enumerate(self.config["features"])
                if features["encoder"] == last_part(encoder) and layer in (features["layer"], features["layer_used"])
            ]
            found += [i for i in same if self.config["features"][i]["grid"] == list(grid_size)][:1]
        if len(found) == len(encoders):
            return found
        if self.config["images"] == "none":
            have = [f"{f['encoder']} (layer {f['layer_used']}, grid {f['grid']})" for f in self.config["features"]]
            raise InputError(
                self.option,
                f"`{self.option}` {self.folder} has neither images nor all features of `encoder` {' '.join(encoders)} for a "
                f"{grid_size[0]}x{grid_size[1]} grid of tokens (it has {', '.join(have) or 'none'}); prepare one with "
                "`images` webp, or with that `encoder` and `patch_size`",
            )
        return []


class CachedEncoder:
    """Stands in for a frozen encoder whose features are cached: it returns the features that a batch contains.

    Args:
        number: index of the encoder, from 0.
        array: number of the feature array in the cache.
        embed_dim: E, the length of a feature.
    """

    def __init__(self, number: int, array: int, embed_dim: int):
        self.number = number
        self.array = array
        self.embed_dim = embed_dim

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Patch embeddings `[B,N,E]`, float32."""
        return batch[f"features_{self.number}"].float()


class CachedSamples(SampleStreams):
    """The training examples of a run, read from a cache. The draws for example i are those of `TrainingSamples`.

    A batch has the entries of a `TrainingSamples` batch (with a centre crop), except:

        latents     float16 `[B,2C,h,w]` or `[B,C,h,w]`, as stored; `LatentCache.latents` computes the clean latents
        pixels      only with `images`
        features_0  float16 `[B,N,E]`, and so on, for each number in `features`

    `posterior_noise` is included if the cache holds moments.

    Args:
        cache: the cache to read.
        images: whether to return the images, too.
        features: numbers of the feature arrays to return, from `find_features`.
        Others: see `SampleStreams`.

    Raises:
        InputError: if `random_flip` is set and the cache has no flipped copies.
    """

    def __init__(
        self,
        cache: LatentCache,
        seed: int,
        null_class_id: int | None,
        label_dropout: float = 0.1,
        random_flip: bool = False,
        num_tokens: int | None = None,
        images: bool = False,
        features: list[int] = (),
        stream_version: int = NEWEST_STREAMS,
    ):
        if random_flip and not cache.config["flip"]:
            raise InputError(
                "random_flip", f"`random_flip`: {cache.folder} has no flipped copies; prepare one with `flip`"
            )
        moments, shape = cache.config["kind"] == "moments", tuple(cache.config["latent_shape"])
        streams = (shape, null_class_id, label_dropout, random_flip, moments, num_tokens, stream_version)
        super().__init__(len(cache), seed, *streams)
        self.cache = cache
        self.images = images
        self.features = list(features)

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        cache = self.cache
        rows = self.rows_of(indices)
        uniforms = self.uniforms(indices)
        flips = self.flips(uniforms)
        batch = {"latents": cache.read("latents", rows, flips)}
        if self.images:
            pixels = [cache.pixels(row)[:, ::-1] if flip else cache.pixels(row) for row, flip in zip(rows, flips)]
            batch["pixels"] = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        for number, i in enumerate(self.features):
            batch[f"features_{number}"] = cache.read(f"features-{i}", rows, flips)
        corrupt = []
        for row in rows.tolist():
            while row in cache.corrupt_rows:
                corrupt.append(row)
                row = (row + 1) % len(cache)
        drawn = self.drawn(indices, uniforms, cache["label"][rows])
        return {**batch, **drawn, "corrupt_rows": torch.tensor(corrupt, dtype=torch.long)}
