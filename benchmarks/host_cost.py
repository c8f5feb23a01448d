#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure what images and weights cost the host: encoding on a CPU, JPEG draft mode, and loading saved weights.

    python benchmarks/host_cost.py encoding
    python benchmarks/host_cost.py jpeg --parquet FILE.parquet --scale 4 --resolution 256
    python benchmarks/host_cost.py weights --preset SiT-XL/2

`encoding` encodes 96 images of 128 pixels with a small autoencoder, in turn 32 at a time and as many at a time as `encode_moments`
does. It prints processor time, the system's part of it, and the number of pages that the system cleared. `jpeg` enlarges the
images of a parquet file, compresses them again, and decodes and crops them, in turn with and without `jpeg_draft`. It prints images
per second of processor time, and how much the cropped squares differ. `weights` saves a transformer with random weights in a
temporary folder, loads it in new processes, and prints the peaks of their private memory and of the pages of the file.
"""

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_vrpo import SiTTransformer2DModel, sit_preset
from diffusers_vrpo.data.image_decoding import decode_image, resize_and_crop
from diffusers_vrpo.models.autoencoder import encode_moments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encoding", "jpeg", "weights", "open"])
    parser.add_argument("--parquet", type=Path, help="parquet file with a column `image` of encoded images")
    parser.add_argument("--images", type=int, default=96, help="number of images (default: 96)")
    parser.add_argument("--scale", type=float, default=4, help="enlarge the images by this factor (default: 4)")
    parser.add_argument("--quality", type=int, default=90, help="quality of the JPEG files (default: 90)")
    parser.add_argument("--resolution", type=int, default=128, help="side in pixels of the images (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--preset", default="SiT-XL/2", help="size of the model (default: SiT-XL/2)")
    parser.add_argument("--folder", help="folder of the weights that `open` loads")
    parser.add_argument("--dtype", default="bfloat16", help="precision in which `open` loads them")
    return parser


def spent(work: Callable[[], object]) -> tuple[float, float, int]:
    """Measures the processor seconds of a call, the system's part of them, and the pages that the system handed out."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    return after.ru_utime - before.ru_utime + system, system, after.ru_minflt - before.ru_minflt


def measure_encoding(args: argparse.Namespace):
    torch.manual_seed(0)
    widths = [32, 64, 64]
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        norm_num_groups=4,
    ).eval()
    pixels = torch.rand(32, 3, args.resolution, args.resolution) * 2 - 1
    batches = [pixels] * (args.images // 32)

    @torch.no_grad()
    def whole():
        for batch in batches:
            vae.encode(batch)

    def parts():
        for batch in batches:
            encode_moments(vae, batch)

    arms = {"32 at a time": whole, "as encode_moments": parts}
    for number in range(args.rounds + 1):
        for name, work in arms.items():
            total, system, pages = spent(work)
            if number:  # the first round warms up
                print(f"{name}: {total:.2f} s of processor time, {system:.2f} s of the system, {pages:,} pages")


def measure_jpeg(args: argparse.Namespace):
    files, column = [], pq.read_table(args.parquet, columns=["image"])["image"]
    for encoded in column[: args.images].to_pylist():
        image = decode_image(encoded)
        image = image.resize([round(side * args.scale) for side in image.size], Image.Resampling.BICUBIC)
        image.save(buffer := io.BytesIO(), "jpeg", quality=args.quality)
        files.append({"bytes": buffer.getvalue(), "path": None})
    sides = [min(decode_image(file).size) for file in files]
    print(f"{len(files)} files, shorter side {min(sides)} to {max(sides)} pixels, median {int(np.median(sides))}")

    def squares(draft_side: int | None) -> np.ndarray:
        images = (decode_image(file, draft_side=draft_side) for file in files)
        return np.stack([resize_and_crop(image, args.resolution) for image in images])

    for _ in range(args.rounds):
        whole = len(files) / spent(lambda: squares(None))[0]
        draft = len(files) / spent(lambda: squares(args.resolution))[0]
        print(f"whole: {whole:.1f} images/s, draft: {draft:.1f} images/s, {draft / whole:.2f} times as fast")
    difference = np.abs(squares(None).astype(np.int16) - squares(args.resolution))
    per_image = difference.reshape(len(files), -1).mean(1)
    print(
        f"of 255 levels the pixels differ by {difference.mean():.2f} in the mean ({per_image.max():.2f} in the worst image), "
        f"99 % of them by at most {np.quantile(difference, 0.99):.0f}"
    )


def resident() -> tuple[float, float]:
    """The memory of this process in MiB: its private memory, and pages of files, which the system can reclaim."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0]: int(words[1]) / 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}
    return found["RssAnon:"], found["RssFile:"]


def measure_open(args: argparse.Namespace):
    before, peak, done = resident(), [0.0, 0.0], threading.Event()

    def watch():
        while not done.is_set():
            peak[:] = map(max, peak, resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    model = SiTTransformer2DModel.from_pretrained(args.folder, torch_dtype=getattr(torch, args.dtype))
    done.set()
    thread.join()
    size = sum(tensor.nbytes for tensor in model.parameters()) / 2**20
    own, pages = (highest - at_first for highest, at_first in zip(peak, before))
    print(f"{size:.0f} MiB of weights; peak: {own:.0f} MiB of its own, {pages:.0f} MiB of the file")


def measure_weights(args: argparse.Namespace):
    with tempfile.TemporaryDirectory() as folder:
        for saved in (torch.bfloat16, torch.float32):
            torch.set_default_dtype(saved)
            model = SiTTransformer2DModel(**sit_preset(args.preset))
            model.save_pretrained(folder)
            del model
            for dtype in ("bfloat16", "float32"):
                print(f"{str(saved).removeprefix('torch.')} files opened in {dtype}: ", end="", flush=True)
                options = ["--folder", folder, "--dtype", dtype]
                subprocess.run([sys.executable, __file__, "open", *options], check=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    args = build_parser().parse_args()
    {"encoding": measure_encoding, "jpeg": measure_jpeg, "weights": measure_weights, "open": measure_open}[args.what](
        args
    )
