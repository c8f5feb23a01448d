# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Encodes images for a latent cache: decodes them in worker processes, encodes batches and writes chunk by chunk."""

import io
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image as PILImage
from tqdm.auto import tqdm

from ..config import last_part
from ..errors import InputError
from ..models.autoencoder import encode_moments, latent_statistics, scale_and_shift
from ..models.start import weights_checksum
from ..random_streams import ORDER, POSTERIOR, random_stream
from .image_datasets import first_readable, too_many_corrupt
from .image_decoding import resize_and_crop
from .image_source import image_content
from .latent_cache import chunk_rows
from .latent_cache_writer import CacheWriter


# Images per batch of the autoencoder and the encoders. It is fixed, since some kernels round differently at other
# sizes.
BATCH_SIZE = 32
# Lossless WebP at its lowest effort is smaller than PNG and faster to write and to read (docs/data.md).
IMAGE_FORMATS = {
    "webp": {"format": "webp", "lossless": True, "method": 0, "quality": 0},
    "jpeg": {"format": "jpeg", "quality": 95, "subsampling": 0},
    "none": None,
}


def cache_config(
    data,
    vae,
    latent_shape: tuple[int, int, int],
    has_posterior: bool,
    resolution: int,
    encoders: list = (),
    encoder_names: list[str] = (),
    layers: list[int | None] = (),
    vae_dtype: str = "float32",
    sampled: bool = False,
    seed: int | None = 0,
    flip: bool = False,
    images: str = "webp",
    chunk_rows: int = 1024,
    checksum: int | None = None,
) -> dict:
    """Everything that the content of a cache depends on, as JSON values.

    Args:
        data: an `ImageDataset`, or, with `checksum`, anything that has a length.
        vae: the autoencoder; None keeps the pixels.
        latent_shape, has_posterior: as `latent_layout` returns them.
        resolution: side of the centre crop in pixels.
        encoders, encoder_names, layers: the encoders of the features; a layer of None is the encoder's default.
        vae_dtype: the dtype of the autoencoder's computation.
        sampled: keep one latent, drawn with `seed`, in place of mean and standard deviation. `seed` is None if another
            program has drawn it.
        flip: also encode every image mirrored.
        images: how the images are kept, one of `IMAGE_FORMATS`.
        chunk_rows: the number of images in a chunk.
        checksum: the checksum of the labels and a sample of the content; by default, it is computed from the images.

    Raises:
        InputError: if `sampled` is set and the autoencoder has no posterior.
    """
    if sampled and not has_posterior:
        what = "`vae` none keeps pixels" if vae is None else f"`vae` is a {type(vae).__name__}, which has no posterior"
        raise InputError("sampled", f"`sampled`: {what}; remove it")
    vae_config = None if vae is None else vae.config
    # Channel statistics of the autoencoder and JPEG drafts add keys only if they are used, so that the settings of
    # caches without them stay as they were.
    statistics = {} if vae is None else latent_statistics(vae)
    drafts = {"jpeg_draft": True} if getattr(data, "jpeg_draft", False) else {}
    return {
        "count": len(data),
        "dataset_checksum": dataset_checksum(data) if checksum is None else checksum,
        "resolution": resolution,
        "crop": "center",
        "vae_checksum": None if vae is None else weights_checksum(vae.parameters()),
        "vae_dtype": vae_dtype,
        "scaling_factor": getattr(vae_config, "scaling_factor", None) or 1.0,
        "shift_factor": getattr(vae_config, "shift_factor", None) or 0.0,
        **statistics,
        **drafts,
        "kind": "sampled" if sampled else "moments" if has_posterior else "latents",
        "seed": seed if sampled else None,
        "latent_shape": list(latent_shape),
        "flip": flip,
        "images": images,
        "features": [
            {
                "encoder": last_part(name),
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


def dataset_checksum(data, sample: int = 256) -> int:
    """CRC-32 of all labels and of a fixed random subset of the encoded images, independent of the folder of the files."""
    checksum = zlib.crc32(data.labels().tobytes())
    for row in random_stream(0, 0, ORDER).permutation(len(data))[:sample].tolist():
        checksum = zlib.crc32(image_content(data[[row]]["image"][0]), checksum)
    return checksum


class ImageRows(torch.utils.data.Dataset):
    """The images of a data set by row: cropped to squares, uint8 `[B,3,R,R]`, and these squares compressed again.

    Args:
        data: an `ImageDataset`.
        resolution: side of the squares in pixels, R.
        images: how the images are kept, one of `IMAGE_FORMATS`.
    """

    def __init__(self, data, resolution: int, images: str):
        self.data = data
        self.resolution = resolution
        self.images = images
        self.pixel_range = data.pixel_range
        self.draft_side = data.draft_side(resolution)

    def __getitem__(self, rows: list[int]) -> dict:
        records = self.data[rows]
        batch = {"pixels": [], "labels": [], "images": [], "corrupt_rows": []}
        for row, image, label in zip(rows, records["image"], records["label"]):
            record = {"image": image, "label": label}
            image, label, tried = first_readable(self.data, row, record, self.pixel_range, self.draft_side)
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
    """Encodes batches of images into rows of the arrays of a cache.

    Args:
        vae: the autoencoder, on the device; None keeps the pixels, in [-1, 1].
        encoders: the frozen encoders that compute `features-0` and so on.
        config: the config of the cache.
        device: the device of the autoencoder and the encoders.
    """

    def __init__(self, vae, encoders: list, config: dict, device: torch.device):
        self.vae = vae
        self.encoders = encoders
        self.config = config
        self.device = device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, rows: list[int]) -> dict[str, torch.Tensor]:
        """Returns float16 tensors `[copies, B, ...]` on the device, for uint8 `pixels [B,3,R,R]` of the rows."""
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
    """Decodes, encodes and writes the chunks of this process.

    Worker processes decode, this thread encodes, and another one writes.

    Raises:
        InputError: if latents or features are not finite in float16, too many images are damaged, or the disk is full.
    """
    config = writer.config
    batches = []  # never across chunks, so that the content does not depend on which process encodes it
    for chunk in writer.chunks:
        rows = list(chunk_rows(config, chunk))
        batches += [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    dataloader = torch.utils.data.DataLoader(
        ImageRows(data, config["resolution"], config["images"]),
        batch_size=None,  # `ImageRows` returns whole batches
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
    loaded, all_corrupt = iter(dataloader), []
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
            all_corrupt += corrupt
            if len(all_corrupt) > 0.01 * config["count"]:
                raise too_many_corrupt(all_corrupt, config["count"])
            arrays["labels"] = np.array(labels, dtype=np.int64)[None]
            pending.append(thread.submit(writer.write, chunk, arrays, images, corrupt))
            # At most three chunks are in memory: one being encoded and two being written.
            while len(pending) > 2 or (pending and pending[0].done()):
                pending.popleft().result()
        for write in pending:
            write.result()
