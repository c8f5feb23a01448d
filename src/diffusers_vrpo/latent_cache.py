# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A data set encoded once: autoencoder latents, labels, images and encoder features in memory-mapped files.

A cache is a folder (n images, f = 2 with flipped copies and 1 without, docs/data.md):

    latents.npy        float16 `[f n, 2C, h, w]`: mean, then standard deviation, both as the transformer sees them (shifted
                       and scaled); `[f n, C, h, w]` where there is no posterior or one latent was drawn of it
    labels.npy         int64 `[n]`
    images/00000.bin   compressed images, one file a chunk; image_offsets.npy, int64 `[n]`, has where each ends in it
    features-0.npy     float16 `[f n, N, E]` of the first encoder
    meta.json          what made it, a checksum for each chunk, `complete`

Row n + i is the mirrored row i. Rows are written in chunks. A chunk counts once its data are on the disk and its checksum
is in a journal, of which every process has its own; `meta.json` says `complete` when all are.
"""

import io
import json
import os
import shutil
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage

from .encoders import layers_of_encoders
from .errors import InputError, first_line
from .files import write_atomically
from .interruption import ignore_signals
from .latents import SampleStreams, TrainingSamples, as_is, encode_images, load_image_dataset
from .streaming import ParquetRows, StreamedBatches, StreamedSamples, stream_image_dataset


FORMAT = 1
REMEDY = "`python -m diffusers_vrpo.latents prepare` makes one"
# What a difference in a setting is called in an error.
SETTING_NAMES = {
    "kind": "the kind of latents (--sampled)",
    "dataset_checksum": "the checksum of the data set",
    "vae_checksum": "the checksum of the weights of --vae",
    "count": "the number of images",
    "latent_shape": "the shape of the latents",
    "features": "--encoder, its layer, weights or token grid",
}


def read_meta(folder: Path, option: str) -> dict:
    """`meta.json` of a cache, complete or not.

    Raises:
        InputError: when there is none that this version reads.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] == FORMAT:
            return meta
    except FileNotFoundError as error:
        raise InputError(f"{option} {folder} has no meta.json, so it is no latent cache; {REMEDY}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{option} {folder}: meta.json is damaged ({first_line(error)}); prepare it anew") from error
    raise InputError(f"{option} {folder} has format {meta['format']}, this version reads {FORMAT}; prepare it anew")


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
    """The start of a `.npy` file of version 1.0; the data follow."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


def create_arrays(folder: Path, config: dict) -> bool:
    """Makes the arrays at full size (sparse, where the file system can), and gives whether any was not whole.

    What a file of a wrong size holds stays, for the checksums to judge.
    """
    changed = False
    for name, (dtype, row, copies) in array_layout(config).items():
        shape = (copies * config["count"], *row)
        header, path = npy_header(dtype, shape), folder / f"{name}.npy"
        size = len(header) + int(np.prod(shape)) * int(dtype[-1])
        if path.exists():
            with path.open("rb") as file:
                if path.stat().st_size == size and file.read(len(header)) == header:
                    continue
        changed = True
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(header)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    return changed


def image_file(folder: Path, chunk: int) -> Path:
    return folder / "images" / f"{chunk:05d}.bin"


def chunk_rows(config: dict, chunk: int) -> range:
    return range(chunk * config["chunk_rows"], min((chunk + 1) * config["chunk_rows"], config["count"]))


def num_chunks(config: dict) -> int:
    return -(-config["count"] // config["chunk_rows"])


def checksum_on_disk(folder: Path, config: dict, chunk: int) -> int | None:
    """CRC-32 of what the files of a cache hold for a chunk; None where they hold less."""
    rows, checksum = chunk_rows(config, chunk), 0
    try:
        for name, (_, _, copies) in array_layout(config).items():
            array = np.load(folder / f"{name}.npy", mmap_mode="r")
            for copy in range(copies):
                first = copy * config["count"] + rows.start
                checksum = zlib.crc32(np.ascontiguousarray(array[first : first + len(rows)]), checksum)
        if config["images"] != "none":
            checksum = zlib.crc32(image_file(folder, chunk).read_bytes(), checksum)
    except (OSError, ValueError):
        return None
    return checksum


# ----------------------------------------------------------------------------------------------------------------------
# Writing


class CacheWriter:
    """Writes a cache chunk by chunk, with any number of processes; a run that was killed goes on where it was.

    Args:
        folder: new, empty, or with a cache of the same `config`, complete or not.
        config: all that the content depends on; JSON types.
        about: more to know of it; JSON types.
        state: `accelerate.PartialState`.
        verify: also check what is there already by its checksums, and do again what is damaged.

    Attributes:
        complete (`bool`): whether there is nothing to do.
        chunks (`list[int]`): what this process is to write.

    Raises:
        InputError: for a folder with something else in it, or too little space.
    """

    def __init__(self, folder: Path, config: dict, about: dict, state, verify: bool = False):
        self.folder, self.config, self.about, self.state = Path(folder), config, about, state
        if state.is_main_process:
            try:
                self._prepare_folder(verify)
            except OSError as error:
                raise cannot_write(self.folder, error) from error
        state.wait_for_everyone()
        self.complete = read_meta(self.folder, "--output_dir")["complete"]
        done = self._read_journals()
        self.num_done = len(done)
        missing = [chunk for chunk in range(num_chunks(config)) if chunk not in done]
        self.chunks = [] if self.complete else missing[state.process_index :: state.num_processes]
        # Nobody writes into a journal before all have read them.
        state.wait_for_everyone()

    def _prepare_folder(self, verify: bool):
        self.folder.mkdir(parents=True, exist_ok=True)
        done = {}
        if (self.folder / "meta.json").exists():
            meta = read_meta(self.folder, "--output_dir")
            self._refuse_another(meta["config"])
            self.about = meta["about"]
            done = self._read_journals()
            if meta["complete"]:
                corrupt = {chunk: [] for chunk in range(num_chunks(self.config))}
                for row in meta["corrupt_rows"]:
                    corrupt[row // self.config["chunk_rows"]].append(row)
                done = {c: {"chunk": c, "crc": meta["checksums"][c], "corrupt": corrupt[c]} for c in corrupt}
        elif found := [path.name for path in self.folder.iterdir() if not path.match(".*.tmp")]:
            raise InputError(
                f"--output_dir {self.folder} holds other files ({', '.join(sorted(found)[:3])}) and no latent cache; "
                "choose a new or empty folder"
            )
        else:
            meta = {"complete": False}
            needed = sum(
                copies * self.config["count"] * int(np.prod(row)) * int(dtype[-1])
                for dtype, row, copies in array_layout(self.config).values()
            )
            if needed > (free := shutil.disk_usage(self.folder).free):
                raise InputError(
                    f"--output_dir {self.folder} has {free / 1e9:.1f} GB of free space, but the arrays of the cache take "
                    f"{needed / 1e9:.1f} GB (and its images more); choose another disk"
                )
            self._write_meta(complete=False)
        if self.config["images"] != "none":
            (self.folder / "images").mkdir(exist_ok=True)
        for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob("images/.*.tmp")]:
            leftover.unlink()
        if (create_arrays(self.folder, self.config) or verify) and done:
            whole = {c: entry for c, entry in done.items() if self._on_disk(c) == entry["crc"]}
            if len(whole) < len(done):
                # A complete cache becomes an unfinished one, in an order that a kill cannot turn into a wrong one.
                self._write_journal(whole.values())
                self._write_meta(complete=False)
                return
        if meta["complete"]:
            self._remove_journals()

    def _refuse_another(self, existing: dict):
        """Ends where the cache in the folder was made otherwise than this one is to be."""
        for name in [*self.config, *existing]:
            there, now = existing.get(name), self.config.get(name)
            if there != now:
                name = SETTING_NAMES.get(name, f"--{name}")
                what = f"{name} differs" if isinstance(there or now, list) else f"{name} was {there} and is {now}"
                raise InputError(
                    f"--output_dir {self.folder} was prepared otherwise: {what}; keep to that, or choose another folder"
                )

    def _write_meta(self, **state):
        meta = {"format": FORMAT, **state, "about": self.about, "config": self.config}
        write_atomically(self.folder / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("journal-*.jsonl"))

    def _read_journals(self) -> dict[int, dict]:
        """The entries of all journals by chunk, without a last line that a kill cut short."""
        done = {}
        for path in self._journals():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    done[entry["chunk"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue
        return done

    def _write_journal(self, entries):
        """One journal with these entries in the place of all there are."""
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_atomically(self.folder / "journal-0.jsonl", lines.encode())
        for path in self._journals():
            if path.name != "journal-0.jsonl":
                path.unlink()

    def _remove_journals(self):
        for path in self._journals():
            path.unlink()

    def _on_disk(self, chunk: int) -> int | None:
        return checksum_on_disk(self.folder, self.config, chunk)

    def write(
        self,
        chunk: int,
        arrays: dict[str, np.ndarray],
        images: list[bytes],
        corrupt_rows: list[int],
        expected: int | None = None,
    ) -> bool:
        """Writes a chunk, reads it back, and enters it into the journal.

        Args:
            arrays: `[copies, rows, ...]` by name, all but `image_offsets`.
            images: compressed, one a row; empty without images.
            corrupt_rows: those of its rows that could not be decoded.
            expected: the checksum that it must have.

        Returns:
            whether it has; if not, it is not entered.

        Raises:
            InputError: when it cannot be written, or reads back otherwise.
        """
        rows, checksum = chunk_rows(self.config, chunk), 0
        if self.config["images"] != "none":
            ends = np.cumsum([len(image) for image in images], dtype=np.int64)
            arrays = {**arrays, "image_offsets": ends[None]}
        try:
            for name, (dtype, row, copies) in array_layout(self.config).items():
                data = np.ascontiguousarray(arrays[name], dtype=dtype)
                if data.shape != (copies, len(rows), *row):
                    raise ValueError(f"{name} {data.shape} is not of the shape {(copies, len(rows), *row)}")
                start = len(npy_header(dtype, (copies * self.config["count"], *row)))
                stride = int(np.prod(row)) * data.itemsize
                with (self.folder / f"{name}.npy").open("r+b") as file:
                    for copy in range(copies):
                        file.seek(start + (copy * self.config["count"] + rows.start) * stride)
                        file.write(data[copy])
                        checksum = zlib.crc32(data[copy], checksum)
                    file.flush()
                    os.fsync(file.fileno())
            if self.config["images"] != "none":
                joined = b"".join(images)
                write_atomically(image_file(self.folder, chunk), joined)
                checksum = zlib.crc32(joined, checksum)
            if self._on_disk(chunk) != checksum:
                raise OSError("what was written reads back otherwise")
            if expected is not None and checksum != expected:
                return False
            entry = json.dumps({"chunk": chunk, "crc": checksum, "corrupt": corrupt_rows})
            journal = self.folder / f"journal-{self.state.process_index}.jsonl"
            with journal.open("ab") as file:
                # A line of its own, even after one that a kill cut short.
                file.write(f"\n{entry}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            return True
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def finish(self):
        """Once every chunk is there: the final `meta.json`, and no journals.

        Raises:
            InputError: when some are missing.
        """
        self.state.wait_for_everyone()
        if self.state.is_main_process and not self.complete:
            done, wanted = self._read_journals(), num_chunks(self.config)
            if sorted(done) != list(range(wanted)):
                raise InputError(
                    f"--output_dir {self.folder} has {len(done)} of {wanted} chunks; run the same command again"
                )
            corrupt = sorted(row for entry in done.values() for row in entry["corrupt"])
            checksums = [done[chunk]["crc"] for chunk in range(wanted)]
            self._write_meta(complete=True, corrupt_rows=corrupt, checksums=checksums)
            self._remove_journals()
        self.complete = True
        self.state.wait_for_everyone()


def cannot_write(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"--output_dir {folder} cannot be written ({error.strerror or error}); mend that and run the same command again, "
        "it goes on from there"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class LatentCache:
    """A complete cache, opened for reading. Copies of it in other processes map the files for themselves.

    Like a `Dataset` of images it has a length and a column `["label"]`.

    Args:
        folder: of the cache.
        option: by which the user named it.

    Attributes:
        config, about (`dict`): of `meta.json`.
        corrupt_rows (`set[int]`): of the images that could not be decoded; in each one's place is the next one.
        id2label (`dict[int, str]`, *optional*): class names.

    Raises:
        InputError: when it is none, not complete, or files are missing or cut short.
    """

    def __init__(self, folder: str | Path, option: str = "--latents_dir"):
        self.folder, self.option = Path(folder), option
        meta = read_meta(self.folder, option)
        if not meta["complete"]:
            raise InputError(f"{option} {folder} is not finished; run the same `prepare` or `import` command again")
        self.config, self.about, self.checksums = meta["config"], meta["about"], meta["checksums"]
        self.corrupt_rows = set(meta["corrupt_rows"])
        self.num_classes, names = self.about["num_classes"], self.about["class_names"]
        self.id2label = dict(enumerate(names)) if names else None
        # Of the whole content.
        self.checksum = zlib.crc32(json.dumps([self.config, self.checksums]).encode())
        for name, (dtype, row, copies) in array_layout(self.config).items():
            try:
                array = self._open(name)
            except (OSError, ValueError) as error:
                raise self._damaged(f"{name}.npy: {first_line(error)}") from error
            if array.shape != (copies * len(self), *row) or array.dtype != dtype:
                raise self._damaged(f"{name}.npy holds {array.dtype} {array.shape}")
        if self.config["images"] != "none":
            missing = [c for c in range(num_chunks(self.config)) if not image_file(self.folder, c).exists()]
            if missing:
                raise self._damaged(f"{image_file(self.folder, missing[0])} is missing")

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.option} {self.folder} is damaged ({what}); `prepare --verify` mends it")

    def _open(self, name: str) -> np.ndarray:
        # asarray: every index into a np.memmap would make another one.
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The mapped arrays by name, opened by the process that reads them."""
        return {name: self._open(name) for name in array_layout(self.config)}

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}

    def __len__(self) -> int:
        return self.config["count"]

    def __getitem__(self, column: str) -> np.ndarray:
        """The labels, int64 `[n]`, as the column `label`."""
        return {"label": self.arrays["labels"]}[column]

    def stored_rows(self, rows: np.ndarray, flips: np.ndarray | None = None) -> np.ndarray:
        """Where the rows, some of them mirrored, stand in the arrays with copies."""
        return rows if flips is None else rows + len(self) * flips

    def read(self, name: str, rows: np.ndarray, flips: np.ndarray | None = None) -> torch.Tensor:
        """Rows of an array, as a tensor of its own memory: `latents` float16 `[B,2C,h,w]`, `features-0` `[B,N,E]`."""
        return torch.from_numpy(self.arrays[name].take(self.stored_rows(rows, flips), axis=0))

    def image_bytes(self, row: int) -> bytes:
        """The compressed image of a row."""
        chunk, place = divmod(row, self.config["chunk_rows"])
        ends = self.arrays["image_offsets"]
        start = int(ends[row - 1]) if place else 0
        # Not mapped: ImageNet's 1,251 files are more than a process may usually hold open.
        with image_file(self.folder, chunk).open("rb") as file:
            file.seek(start)
            return file.read(int(ends[row]) - start)

    def pixels(self, row: int) -> np.ndarray:
        """The image of a row, uint8 `[R,R,3]`.

        Raises:
            InputError: when it cannot be decoded.
        """
        try:
            with PILImage.open(io.BytesIO(self.image_bytes(row))) as image:
                return np.asarray(image.convert("RGB"))
        except OSError as error:
            raise self._damaged(f"the image of row {row}: {first_line(error)}") from error

    def damaged_chunks(self, progress=lambda chunks: chunks) -> list[int]:
        """The chunks that differ from their checksums."""
        chunks = progress(range(num_chunks(self.config)))
        return [c for c in chunks if checksum_on_disk(self.folder, self.config, c) != self.checksums[c]]

    def find_features(self, encoders: list[str], layers: list[int | None], grid_size: tuple[int, int]) -> list[int]:
        """The numbers of the feature arrays that these encoders give; empty where not all of them are here.

        Args:
            encoders: Hub names or folders; the last part of the name counts.
            layers: one of each, as `load_encoder` takes them.
            grid_size: of the tokens.

        Raises:
            InputError: where they are here for another token grid, and the images are not.
        """
        found = []
        for encoder, layer in zip(encoders, layers):
            same = [
                i
                for i, features in enumerate(self.config["features"])
                if features["encoder"] == Path(encoder).name and layer in (features["layer"], features["layer_used"])
            ]
            found += [i for i in same if self.config["features"][i]["grid"] == list(grid_size)][:1]
        if len(found) == len(encoders):
            return found
        if self.config["images"] == "none":
            have = [f"{f['encoder']} (layer {f['layer_used']}, grid {f['grid']})" for f in self.config["features"]]
            raise InputError(
                f"{self.option} {self.folder} has neither images nor all features of --encoder {' '.join(encoders)} for a "
                f"{grid_size[0]}x{grid_size[1]} grid of tokens (it has {', '.join(have) or 'none'}); prepare one with "
                "--images webp, or with that --encoder and --patch_size"
            )
        return []


class CachedSamples(SampleStreams):
    """The samples of a run, from a cache. The draws for sample i are those of `TrainingSamples` (with a centre crop).

    A batch has what theirs has, except:

        latents     float16 `[B,2C,h,w]` or `[B,C,h,w]`, as the cache has them; `batch_latents` makes the clean latents
        pixels      only with `images`
        features_0  float16 `[B,N,E]`, and so on, for each number in `features`

    `posterior_noise` is there where the cache holds moments.

    Args:
        cache: what to read.
        images: also give the images.
        features: numbers of the feature arrays to give, as `find_features` has them.
        Others: those of `SampleStreams`.

    Raises:
        InputError: for `random_flip` where the cache has no flipped copies.
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
    ):
        if random_flip and not cache.config["flip"]:
            raise InputError(f"--random_flip: {cache.folder} has no flipped copies; prepare one with --flip")
        moments, shape = cache.config["kind"] == "moments", tuple(cache.config["latent_shape"])
        super().__init__(len(cache), seed, shape, null_class_id, label_dropout, random_flip, moments, num_tokens)
        self.cache = cache
        self.images = images
        self.features = list(features)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        cache = self.cache
        rows = np.array([self.row_of(index) for index in indices])
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


def batch_latents(vae, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The clean latents `[B,C,h,w]` float32 of a batch of `CachedSamples` or `TrainingSamples`, on its device.

    From a cache they do not need the autoencoder; else it encodes the pixels, which are float32 in [-1, 1] here.
    """
    if "latents" not in batch:
        return encode_images(vae, batch["pixels"], batch.get("posterior_noise"))
    latents = batch["latents"].float()
    if "posterior_noise" not in batch:
        return latents
    mean, std = latents.chunk(2, dim=1)
    return mean + std * batch["posterior_noise"]


# ----------------------------------------------------------------------------------------------------------------------
# For the trainer


class CachedEncoder:
    """Stands for a frozen encoder whose features are in the cache: called with a batch, it reads them out of it.

    Attributes:
        embed_dim (`int`): E.
        array (`int`): number of the feature array in the cache.
    """

    def __init__(self, number: int, array: int, embed_dim: int):
        self.number, self.array, self.embed_dim = number, array, embed_dim

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Patch embeddings `[B,N,E]`, float32."""
        return batch[f"features_{self.number}"].float()


def load_images(args):
    """`load_image_dataset` of the data options that `train_vrpo.py` and `prepare` share."""
    return load_image_dataset(
        args.dataset_name,
        args.dataset_config_name,
        args.train_data_dir,
        args.dataset_split,
        args.image_column,
        args.label_column,
        args.max_train_samples,
        args.cache_dir,
    )


def load_training_data(args):
    """What the data options of `train_vrpo.py` name, class names, number of classes.

    It is a `Dataset`, a `LatentCache` or, with `--streaming`, `ParquetRows`.

    With a cache, `args.vae` becomes the one that it was made with.

    Raises:
        InputError: when it cannot be had, or the options contradict the cache.
    """
    if args.streaming:
        columns = (args.image_column, args.label_column)
        return stream_image_dataset(
            args.dataset_name, args.dataset_config_name, args.dataset_split, *columns, args.cache_dir
        )
    if args.latents_dir is None:
        return load_images(args)
    cache, there = LatentCache(args.latents_dir), f"--latents_dir {args.latents_dir}"
    made_with, resolution = cache.about["vae"], cache.config["resolution"]
    if args.resolution != resolution:
        raise InputError(
            f"--resolution {args.resolution}: {there} was prepared with --resolution {resolution}; give that"
        )
    if args.vae is not None and Path(args.vae).name != Path(made_with).name:
        raise InputError(f"--vae {args.vae}: {there} was prepared with {made_with}; give that, or leave --vae out")
    if not args.center_crop:
        raise InputError(f"--no-center_crop: {there} has centre crops only; leave it out")
    if args.max_train_samples is not None:
        raise InputError(f"--max_train_samples goes with images; {there} has {len(cache)}, prepare one with fewer")
    args.vae = args.vae or made_with
    return cache, cache.id2label, cache.num_classes


def cached_encoders(data, args, grid_size: tuple[int, int]) -> list[CachedEncoder]:
    """The encoders of `args` whose features the cache has; empty where they are to be computed from the images.

    Raises:
        InputError: when the cache has neither the features nor the images.
    """
    if not isinstance(data, LatentCache) or args.objective == "none":
        return []
    found = data.find_features(args.encoder, layers_of_encoders(args.encoder, args.encoder_layer), grid_size)
    return [CachedEncoder(number, i, data.config["features"][i]["dim"]) for number, i in enumerate(found)]


def training_samples(
    data,
    args,
    transformer,
    latent_shape: tuple[int, int, int],
    num_tokens: int,
    encoders: list,
    global_batch_size: int,
):
    """The samples of a run for what `load_training_data` gave: `TrainingSamples`, `CachedSamples` or `StreamedSamples`.

    Args:
        transformer: it knows the null class and the share of dropped labels.
        num_tokens: N of the transformer.
        encoders: with `CachedEncoder`s their features take the place of the images.
        global_batch_size: samples of an optimizer step on all processes.

    Raises:
        InputError: when the options contradict the cache, or the processes stream different files.
    """
    null_class_id, dropout = transformer.null_class_id, transformer.config.class_dropout_prob
    num_tokens = num_tokens if args.objective == "vrpo" else None
    if not isinstance(data, LatentCache):
        options = (args.seed, args.resolution, latent_shape, null_class_id, dropout)
        options += (args.center_crop, args.random_flip, args.vae != "none", num_tokens)
        if isinstance(data, ParquetRows):
            return StreamedSamples(data, global_batch_size, *options)
        return TrainingSamples(data, *options)
    if list(latent_shape) != data.config["latent_shape"]:
        raise InputError(
            f"--vae {args.vae} makes latents of {list(latent_shape)}, but --latents_dir {args.latents_dir} holds "
            f"{data.config['latent_shape']}; give the autoencoder that made them"
        )
    features = [encoder.array for encoder in encoders if isinstance(encoder, CachedEncoder)]
    images = bool(encoders) and not features
    return CachedSamples(data, args.seed, null_class_id, dropout, args.random_flip, num_tokens, images, features)


def training_batches(samples: SampleStreams, batch_sampler, num_workers: int, pin_memory: bool):
    """The batches of a process in order: by worker processes, or by threads for what is streamed.

    Args:
        batch_sampler: a `StreamBatchSampler`.
        num_workers: processes or threads; with 0 everything happens when a batch is asked for.
        pin_memory: for copies to a GPU.
    """
    if isinstance(samples, StreamedSamples):
        return StreamedBatches(samples, batch_sampler, num_workers, pin_memory)
    return torch.utils.data.DataLoader(
        samples,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=as_is,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
    )
