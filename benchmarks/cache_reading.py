#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure how fast the latent cache is read, compared with other stores of the same latents, and what preparing it costs.

    python benchmarks/cache_reading.py
    python benchmarks/cache_reading.py --prepare --json cache.json
    python benchmarks/cache_reading.py --draws

Reading: random latents of 4x32x32 in float16 (8 KB) with their labels, 256 random rows at a time, by one process without
workers, from files that are in the page cache, because every store is read once before:
    cache, latents      `LatentCache.read` of one latent per image
    cache, moments      the same for mean and standard deviation, 16 KB per image
    arrow               `datasets` with a `binary` column, as `export` writes it
    one file per image   `.npy` files in folders of 1,000, as in REPA's repository
    cache, all draws    `CachedSamples`: moments, noise, posterior noise, timestep and the rest of a batch
The stores take turns, and a figure is the median over rounds.

Draws (`--draws`, which measures nothing else): whole batches of 256 in the order of an epoch, with moments read and everything
drawn, for 64 to 4,096 tokens, with both versions of the random draws in turn, in samples per second of processor time of one
thread.

Preparing: `prepare` with lossless images as well as latents, compared with decoding, cropping and encoding the same images with
the same VAE without keeping the result. The VAE has Stable Diffusion's size and random weights.
"""

import argparse
import io
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_vrpo.data.image_source import ImageDataset
from diffusers_vrpo.data.latent_cache import CachedSamples, LatentCache, chunk_rows, num_chunks
from diffusers_vrpo.data.latent_cache_writer import CacheWriter
from diffusers_vrpo.data.latent_encoding import BATCH_SIZE, BatchEncoder, ImageRows, write_chunks
from diffusers_vrpo.models.autoencoder import encode_moments
from diffusers_vrpo.random_streams import STREAM_VERSIONS


FLOOR, TIMES = 300_000, 10  # samples/s of the cache, and times the store with one file per image
MOST = 1.05  # of the time of decoding and encoding


def cache_config(rows: int, kind: str, resolution: int = 256, images: str = "none") -> dict:
    side = resolution // 8
    config = {"count": rows, "resolution": resolution, "kind": kind, "latent_shape": [4, side, side], "flip": False}
    return config | {"images": images, "features": [], "chunk_rows": 1024, "seed": 0}


ABOUT = {"vae": "random", "dataset": "random", "split": "train", "num_classes": 1000, "class_names": None}


def write_cache(folder: Path, rows: int, kind: str) -> LatentCache:
    config, generator = cache_config(rows, kind), np.random.default_rng(0)
    writer = CacheWriter(folder, config, ABOUT, PartialState(cpu=True))
    channels = 8 if kind == "moments" else 4
    for chunk in writer.chunks:
        size = len(chunk_rows(config, chunk))
        latents = generator.standard_normal((1, size, channels, 32, 32), dtype=np.float32).astype(np.float16)
        labels = generator.integers(0, 1000, (1, size))
        writer.write(chunk, {"latents": latents, "labels": labels}, [], [])
    writer.finish()
    return LatentCache(folder)


def stores(folder: Path, rows: int) -> dict:
    """Functions, by store, that return the latents `[B,4,32,32]` (or `[B,8,32,32]`) and labels `[B]` of an array of rows."""
    cache, moments = (write_cache(folder / kind, rows, kind) for kind in ("sampled", "moments"))
    latents, labels = cache.arrays["latents"], cache["label"]
    paths = [folder / "files" / f"{row // 1000:05d}" / f"img-latents-{row:08d}.npy" for row in range(rows)]
    for row, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, latents[row])
    columns = {"latents": [row.tobytes() for row in latents], "label": labels}
    features = datasets.Features({"latents": datasets.Value("binary"), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "arrow")
    arrow = datasets.load_from_disk(folder / "arrow")
    samples = CachedSamples(moments, 0, 1000, num_tokens=256)

    def from_arrow(rows):
        batch = arrow[rows]
        data = np.frombuffer(b"".join(batch["latents"]), dtype=np.float16).reshape(-1, 4, 32, 32)
        return torch.from_numpy(data.copy()), np.array(batch["label"])

    return {
        "cache, latents": lambda rows: (cache.read("latents", rows), cache["label"][rows]),
        "cache, moments": lambda rows: (moments.read("latents", rows), moments["label"][rows]),
        "arrow": from_arrow,
        "one file per image": lambda rows: (
            torch.from_numpy(np.stack([np.load(paths[r]) for r in rows])),
            labels[rows],
        ),
        "cache, all draws": lambda rows: samples[rows.tolist()],
    }


def read_speed(folder: Path, rows: int, rounds: int) -> dict[str, list[float]]:
    """Measures the samples per second of every store in every round."""
    readers = stores(folder, rows)
    a, b = readers["cache, latents"](np.arange(300)), readers["one file per image"](np.arange(300))
    c = readers["arrow"](np.arange(300))
    if not (torch.equal(a[0], b[0]) and torch.equal(a[0], c[0]) and (a[1] == b[1]).all() and (a[1] == c[1]).all()):
        raise AssertionError("the stores do not hold the same")
    generator, speeds = np.random.default_rng(1), {name: [] for name in readers}
    for round_ in range(rounds + 1):
        order = generator.permutation(rows)
        batches = [order[start : start + 256] for start in range(0, rows - 255, 256)]
        for name in generator.permutation(list(readers)):
            few = batches[: len(batches) // 8 or 1] if name == "cache, all draws" and round_ else batches
            start = time.perf_counter()
            for batch in few:
                readers[name](batch)
            if round_:  # the first one warms the page cache
                speeds[name].append(256 * len(few) / (time.perf_counter() - start))
    return speeds


def draw_speed(folder: Path, rows: int, rounds: int) -> dict[tuple[int, int], list[float]]:
    """Samples per second of processor time by (number of tokens, version of the draws), in every round."""
    cache, size = write_cache(folder / "drawn", rows, "moments"), 256
    keys = [(tokens, version) for tokens in (64, 256, 1024, 4096) for version in STREAM_VERSIONS]
    readers = {(n, v): CachedSamples(cache, 0, 1000, num_tokens=n, stream_version=v) for n, v in keys}
    generator, speeds = np.random.default_rng(2), {key: [] for key in keys}
    for round_ in range(rounds + 1):
        for key in map(tuple, generator.permutation(keys).tolist()):
            first = round_ * 4 * size
            start = time.process_time()
            for batch in range(4):
                readers[key][list(range(first + batch * size, first + (batch + 1) * size))]
            if round_:  # the first one warms the page cache and shuffles the epoch of version 1
                speeds[key].append(4 * size / (time.process_time() - start))
    return speeds


def prepare_cost(folder: Path, images: int, resolution: int, rounds: int) -> tuple[list[float], list[float]]:
    """Measures the seconds of decoding and encoding alone, and of preparing, in every round."""
    generator = np.random.default_rng(0)
    rows = {"image": [], "label": []}
    for _ in range(images):
        small = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "jpeg")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["label"].append(0)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    data = ImageDataset(datasets.Dataset.from_dict(rows, features=features), None, 1)
    channels = (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, **blocks).eval().requires_grad_(False)
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    config = cache_config(images, "moments", resolution, "webp") | {"scaling_factor": 1.0, "chunk_rows": 64}

    def alone():
        batches = [list(range(start, min(start + BATCH_SIZE, images))) for start in range(0, images, BATCH_SIZE)]
        dataset = ImageRows(data, resolution, "none")
        for batch in torch.utils.data.DataLoader(dataset, batch_size=None, sampler=batches, num_workers=1):
            moments = encode_moments(vae, batch["pixels"].to(vae.device).float() / 127.5 - 1)
        return moments[0].sum().item()

    def whole(round_):
        writer = CacheWriter(folder / f"prepared-{round_}", config, ABOUT, PartialState())
        write_chunks(writer, data, BatchEncoder(vae, [], config, vae.device), num_workers=1)
        writer.finish()

    seconds = ([], [])
    for round_ in range(rounds + 1):
        for which in np.random.default_rng(round_).permutation(2):
            start = time.perf_counter()
            alone() if which == 0 else whole(round_)
            if round_:
                seconds[which].append(time.perf_counter() - start)
    if num_chunks(config) != len(LatentCache(folder / "prepared-0").checksums):
        raise AssertionError("the cache is not whole")
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="images in the stores (default: 20000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--draws", action="store_true", help="only measure both versions of the random draws")
    parser.add_argument("--prepare", action="store_true", help="also measure the cost of preparing a cache")
    parser.add_argument("--prepare_images", type=int, default=64, help="images to prepare (default: 64)")
    parser.add_argument(
        "--resolution", type=int, default=64, help="side in pixels of the prepared images (default: 64)"
    )
    parser.add_argument("--dir", help="folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    result = {"machine": f"{platform.processor() or platform.machine()}, {platform.system()}", "rows": args.rows}
    if args.draws:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            speeds = draw_speed(Path(folder), args.rows, args.rounds)
        print(f"{'tokens':>8}{'version':>9}{'samples/s':>12}{'lowest':>12}{'highest':>12}")
        for (tokens, version), values in speeds.items():
            print(f"{tokens:8,}{version:9}{np.median(values):12,.0f}{min(values):12,.0f}{max(values):12,.0f}")
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        speeds = read_speed(Path(folder), args.rows, args.rounds)
        medians = {name: float(np.median(values)) for name, values in speeds.items()}
        ratio = medians["cache, latents"] / medians["one file per image"]
        result |= {"samples_per_second": speeds, "times_one_file_an_image": ratio}
        print(f"{'store':20}{'samples/s':>12}{'lowest':>12}{'highest':>12}")
        for name, values in speeds.items():
            print(f"{name:20}{medians[name]:12,.0f}{min(values):12,.0f}{max(values):12,.0f}")
        reached = medians["cache, latents"] >= FLOOR and ratio >= TIMES
        print(f"the cache is {ratio:.0f} times one file per image (wanted {TIMES} times, and {FLOOR:,} samples/s)")
        if args.prepare:
            alone, whole = prepare_cost(Path(folder), args.prepare_images, args.resolution, args.rounds)
            ratios = np.array(whole) / np.array(alone)
            result |= {"seconds_of_decode_and_vae": alone, "seconds_of_prepare": whole}
            print(
                f"prepare: {np.median(whole):.2f} s, decode and VAE alone {np.median(alone):.2f} s; median ratio "
                f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}; wanted at most {MOST})"
            )
            reached = reached and np.median(ratios) <= MOST
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
