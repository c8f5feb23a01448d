# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Encodes a data set and writes it as a latent cache, chunk by chunk; a run that was killed continues where it stopped."""

import io
import json
import os
import shutil
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import write_atomically
from ..models.autoencoder import encode_moments, scale_and_shift
from ..models.start import weights_checksum
from ..random_streams import ORDER, POSTERIOR, random_stream
from .image_datasets import first_readable, resize_and_crop, too_many_corrupt
from .image_source import image_content
from .latent_cache import (
    FORMAT,
    array_layout,
    checksum_on_disk,
    chunk_rows,
    image_file,
    npy_header,
    num_chunks,
    read_meta,
)


# Images a step of the autoencoder and of the encoders. A fixed number: some kernels round differently in other batches.
BATCH_SIZE = 32
# Lossless WebP at its least effort is smaller than PNG and faster to write and to read (docs/data.md).
IMAGE_FORMATS = {
    "webp": {"format": "webp", "lossless": True, "method": 0, "quality": 0},
    "jpeg": {"format": "jpeg", "quality": 95, "subsampling": 0},
    "none": None,
}
# How errors name a setting that differs.
SETTING_NAMES = {
    "kind": "the kind of latents (`sampled`)",
    "dataset_checksum": "the checksum of the data set",
    "vae_checksum": "the checksum of the weights of `vae`",
    "count": "the number of images",
    "latent_shape": "the shape of the latents",
    "features": "`encoder`, its layer, weights or token grid",
}


def create_arrays(folder: Path, config: dict) -> bool:
    """Makes the arrays at full size, sparse where the file system can; whether any of them was missing or incomplete.

    What a file of a wrong size holds stays: the checksums tell which chunks are valid.
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


# ----------------------------------------------------------------------------------------------------------------------
# Writing


class CacheWriter:
    """Writes a cache chunk by chunk, with any number of processes; a run that was killed continues where it stopped.

    Args:
        folder: new, empty, or with a cache of the same `config`, complete or not.
        config: all that the content depends on, as JSON values; `cache_config` returns it.
        about: more to know of the cache, as JSON values.
        state: `accelerate.PartialState`.
        verify: also compare existing chunks with their checksums, and write the damaged ones again.

    Attributes:
        complete (`bool`): whether the cache is complete.
        num_done (`int`): how many chunks were written before.
        chunks (`list[int]`): the chunks that this process is to write.

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
        self.complete = read_meta(self.folder, "output_dir")["complete"]
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
            meta = read_meta(self.folder, "output_dir")
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
                "output_dir",
                f"`output_dir` {self.folder} holds other files ({', '.join(sorted(found)[:3])}) and no latent cache; "
                "choose a new or empty folder",
            )
        else:
            meta = {"complete": False}
            needed = sum(
                copies * self.config["count"] * int(np.prod(row)) * int(dtype[-1])
                for dtype, row, copies in array_layout(self.config).values()
            )
            if needed > (free := shutil.disk_usage(self.folder).free):
                raise InputError(
                    "output_dir",
                    f"`output_dir` {self.folder} has {free / 1e9:.1f} GB of free space, but the arrays of the cache take "
                    f"{needed / 1e9:.1f} GB (and its images more); choose another disk",
                )
            self._write_meta(complete=False)
        if self.config["images"] != "none":
            (self.folder / "images").mkdir(exist_ok=True)
        for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob("images/.*.tmp")]:
            leftover.unlink()
        if (create_arrays(self.folder, self.config) or verify) and done:
            valid = {c: entry for c, entry in done.items() if self._on_disk(c) == entry["crc"]}
            if len(valid) < len(done):
                # A complete cache becomes an unfinished one, in an order that a kill cannot turn into a wrong one.
                self._write_journal(valid.values())
                self._write_meta(complete=False)
                return
        if meta["complete"]:
            self._remove_journals()

    def _refuse_another(self, existing: dict):
        """Raises an `InputError` if the cache in the folder was made with another `config`."""
        for name in [*self.config, *existing]:
            before, now = existing.get(name), self.config.get(name)
            if before != now:
                name = SETTING_NAMES.get(name, f"`{name}`")
                what = f"{name} differs" if isinstance(before or now, list) else f"{name} was {before} and is {now}"
                raise InputError(
                    "output_dir",
                    f"`output_dir` {self.folder} was prepared otherwise: {what}; keep to that, or choose another folder",
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
        """Replaces all journals by one with these entries."""
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
            images: compressed, one per row; empty without images.
            corrupt_rows: those of its rows that could not be decoded.
            expected: the checksum that the chunk must have.

        Returns:
            whether it has that checksum; if not, it is not entered.

        Raises:
            InputError: when the chunk cannot be written, or reads back otherwise.
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
        """Writes the final `meta.json` and removes the journals.

        Raises:
            InputError: when chunks are missing.
        """
        self.state.wait_for_everyone()
        if self.state.is_main_process and not self.complete:
            done, wanted = self._read_journals(), num_chunks(self.config)
            if sorted(done) != list(range(wanted)):
                raise InputError(
                    "output_dir",
                    f"`output_dir` {self.folder} has {len(done)} of {wanted} chunks; run the same command again",
                )
            corrupt = sorted(row for entry in done.values() for row in entry["corrupt"])
            checksums = [done[chunk]["crc"] for chunk in range(wanted)]
            self._write_meta(complete=True, corrupt_rows=corrupt, checksums=checksums)
            self._remove_journals()
        self.complete = True
        self.state.wait_for_everyone()


def cannot_write(folder: Path, error: OSError) -> InputError:
    """The error for a folder on which writing fails."""
    return InputError(
        "output_dir",
        f"`output_dir` {folder} cannot be written ({error.strerror or error}); mend that and run the same command again, "
        "it goes on from there",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


def cache_config(
    data,
    vae,
    latent_shape: tuple[int, int, int],
    resolution: int,
    encoders: list = (),
    encoder_names: list[str] = (),
    layers: list[int | None] = (),
    vae_dtype: str = "float32",
    sampled: bool = False,
    seed: int = 0,
    flip: bool = False,
    images: str = "webp",
    chunk_rows: int = 1024,
) -> dict:
    """All that the content of a cache depends on, as JSON values.

    Args:
        data: an `ImageDataset`.
        vae: the autoencoder; None keeps the pixels.
        latent_shape: `(C, h, w)`.
        resolution: side of the centre crop in pixels.
        encoders, encoder_names, layers: of the features; a layer of None is the encoder's default.
        vae_dtype: of the autoencoder's computation.
        sampled: keep one latent, drawn with `seed`, in place of mean and standard deviation.
        flip: also encode every image mirrored.
        images: how the images are kept, one of `IMAGE_FORMATS`.
        chunk_rows: images of a chunk.

    Raises:
        InputError: for `sampled` with an autoencoder that has no posterior.
    """
    has_posterior = vae is not None and has_moments(vae)
    if sampled and not has_posterior:
        what = "`vae` none keeps pixels" if vae is None else f"`vae` is a {type(vae).__name__}, which has no posterior"
        raise InputError("sampled", f"`sampled`: {what}; leave it out")
    scale, shift = (1.0, 0.0) if vae is None else scale_and_shift(vae)
    return {
        "count": len(data),
        "dataset_checksum": dataset_checksum(data),
        "resolution": resolution,
        "crop": "center",
        "vae_checksum": None if vae is None else weights_checksum(vae.parameters()),
        "vae_dtype": vae_dtype,
        "scaling_factor": scale,
        "shift_factor": shift,
        "kind": "sampled" if sampled else "moments" if has_posterior else "latents",
        "seed": seed if sampled else None,
        "latent_shape": list(latent_shape),
        "flip": flip,
        "images": images,
        "features": [
            {
                "encoder": Path(name).name,
                "layer": layer,
                "layer_used": encoder.layer,
                "grid": list(encoder.grid_size),
                "dim": encoder.embed_dim,
                "checksum": weights_checksum(encoder.parameters()),
            }
            for name, layer, encoder in zip(encoder_names, layers, encoders)
        ],
        "chunk_rows": chunk_rows,
    }


def has_moments(vae) -> bool:
    """Whether an autoencoder gives a posterior."""
    return encode_moments(vae, torch.zeros(1, 3, 128, 128, device=vae.device))[1] is not None


def dataset_checksum(data, sample: int = 256) -> int:
    """CRC-32 of all labels and of a fixed random sample of the encoded images, wherever the files lie."""
    checksum = zlib.crc32(data.labels().tobytes())
    for row in random_stream(0, 0, ORDER).permutation(len(data))[:sample].tolist():
        checksum = zlib.crc32(image_content(data[[row]]["image"][0]), checksum)
    return checksum


class ImageRows(torch.utils.data.Dataset):
    """The images of a data set by row, cropped to squares, `[B,3,R,R]` uint8, and compressed again."""

    def __init__(self, data, resolution: int, images: str):
        self.data, self.resolution, self.images = data, resolution, images

    def __getitem__(self, rows: list[int]) -> dict:
        records = self.data[rows]
        batch = {"pixels": [], "labels": [], "images": [], "corrupt_rows": []}
        for row, image, label in zip(rows, records["image"], records["label"]):
            image, label, tried = first_readable(self.data, row, {"image": image, "label": label})
            if image is None:
                raise too_many_corrupt(tried, len(self.data))
            pixels = resize_and_crop(image, self.resolution)
            if self.images != "none":
                buffer = io.BytesIO()
                PILImage.fromarray(pixels).save(buffer, **IMAGE_FORMATS[self.images])
                batch["images"].append(buffer.getvalue())
            batch["pixels"].append(pixels)
            batch["labels"].append(label)
            if tried:
                batch["corrupt_rows"].append(row)
        batch["pixels"] = torch.from_numpy(np.stack(batch["pixels"])).permute(0, 3, 1, 2).contiguous()
        return batch


class BatchEncoder:
    """Encodes batches of images as the arrays of a cache have them.

    Args:
        vae: on the device; None keeps the pixels, in [-1, 1].
        encoders: frozen, for `features-0` and so on.
        config: of the cache.
        device: the device of the autoencoder and the encoders.
    """

    def __init__(self, vae, encoders: list, config: dict, device: torch.device):
        self.vae, self.encoders, self.config, self.device = vae, encoders, config, device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, rows: list[int]) -> dict[str, torch.Tensor]:
        """Float16 tensors `[copies, B, ...]` on the device, for uint8 `pixels [B,3,R,R]` of the rows."""
        images = pixels.to(self.device, non_blocking=True).float() / 127.5 - 1
        copies = [images, images.flip(-1)] if self.config["flip"] else [images]
        arrays = {"latents": [self._latents(images, rows, copy) for copy, images in enumerate(copies)]}
        for i, encoder in enumerate(self.encoders):
            arrays[f"features-{i}"] = [encoder(images) for images in copies]
        return {name: torch.stack(parts).half() for name, parts in arrays.items()}

    def _latents(self, images: torch.Tensor, rows: list[int], copy: int) -> torch.Tensor:
        if self.vae is None:
            return images
        mean, std = encode_moments(self.vae, images)
        scale, shift = scale_and_shift(self.vae)
        if self.config["kind"] == "sampled":
            keys = [copy * self.config["count"] + row for row in rows]
            streams = (random_stream(self.config["seed"], key, POSTERIOR) for key in keys)
            noise = np.stack([stream.standard_normal(mean.shape[1:], dtype=np.float32) for stream in streams])
            mean = mean + std * torch.from_numpy(noise).to(mean)
        mean = (mean - shift) * scale
        return torch.cat([mean, std * scale], dim=1) if self.config["kind"] == "moments" else mean


def write_chunks(writer: CacheWriter, data, encode: BatchEncoder, num_workers: int):
    """Decodes (in worker processes), encodes (here) and writes (in a thread) the chunks of this process.

    Raises:
        InputError: for latents or features that are not finite in float16, too many damaged images, or a full disk.
    """
    config = writer.config
    batches = []  # never across chunks, so that the content does not depend on who encodes what
    for chunk in writer.chunks:
        rows = list(chunk_rows(config, chunk))
        batches += [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    dataloader = torch.utils.data.DataLoader(
        ImageRows(data, config["resolution"], config["images"]),
        batch_size=None,  # the rows give batches themselves
        sampler=batches,
        num_workers=num_workers,
        pin_memory=encode.device.type == "cuda",
    )
    many, rank = writer.state.num_processes > 1, writer.state.process_index
    progress = tqdm(
        total=sum(map(len, batches)),
        desc=f"process {rank} of {writer.state.num_processes}" if many else "encoding",
        unit="image",
        disable=not writer.state.is_main_process,
    )
    loaded, num_corrupt = iter(dataloader), 0
    with ThreadPoolExecutor(1) as thread, progress:
        pending = deque()
        for chunk in writer.chunks:
            rows, parts, labels, images, corrupt = list(chunk_rows(config, chunk)), [], [], [], []
            for start in range(0, len(rows), BATCH_SIZE):
                batch = next(loaded)
                parts.append(encode(batch["pixels"], rows[start : start + BATCH_SIZE]))
                labels += batch["labels"]
                images += batch["images"]
                corrupt += batch["corrupt_rows"]
                progress.update(len(batch["labels"]))
            arrays = {name: torch.cat([part[name] for part in parts], dim=1).cpu().numpy() for name in parts[0]}
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise InputError(
                        None,
                        f"{name} of rows {rows[0]} to {rows[-1]} are not finite in float16; is the model sound, and does it "
                        "need `vae_dtype` float32?",
                    )
            num_corrupt += len(corrupt)
            if num_corrupt > 0.01 * config["count"]:
                raise too_many_corrupt(corrupt, config["count"])
            arrays["labels"] = np.array(labels, dtype=np.int64)[None]
            pending.append(thread.submit(writer.write, chunk, arrays, images, corrupt))
            # Not more in memory than one chunk in the making and two on their way to the disk.
            while len(pending) > 2 or (pending and pending[0].done()):
                pending.popleft().result()
        for write in pending:
            write.result()
