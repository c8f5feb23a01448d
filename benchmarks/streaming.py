#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure how fast `--streaming` reads, compared with the same images from the disk.

    python benchmarks/streaming.py path/to/parquet-folder --resolution 256
    python benchmarks/streaming.py --imagenet

Both make whole training batches: images are read, decoded and cropped, and noise and all other random numbers are drawn. The
data set is a folder with parquet files, which is in the page cache after the first round.
    streamed, 2     `StreamedBatches` with two threads; with 0 the calling thread decodes
    on disk, 2      `DataLoader` with two worker processes over `load_dataset`'s memory-mapped copy
They take turns, and a figure is the median over rounds. The first batch, which reads row groups and starts processes, is
reported separately.

`--imagenet` reads nothing. It counts the row groups that a process would hold and read in an epoch of 1,281,167 images in row
groups of 100, with 256 samples per step.
"""

import argparse
import json
import tempfile
import time
from collections import deque
from pathlib import Path

import datasets
import numpy as np
import torch

from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_source import ImageDataset
from diffusers_vrpo.data.parquet import stream_image_dataset
from diffusers_vrpo.data.samples import StreamBatchSampler, TrainingSamples
from diffusers_vrpo.data.streamed_samples import StreamedSamples, StreamOrder


def count_row_groups(processes: int) -> tuple[int, int, int]:
    """Counts row groups: the most that the first of `processes` processes holds, those that it reads in an epoch, and all."""
    rows = np.full(12_812, 100)
    rows[-1] = 67
    order = StreamOrder(0, rows, rows * 110_000, 256)
    share = 256 // processes
    held, read, window = 0, 0, deque(maxlen=order.steps_ahead)
    for step in range(order.length * order.num_lanes // 256):
        before = set().union(*window)
        window.append({order.locate(256 * step + place)[1] for place in range(share)})
        held = max(held, len(set().union(*window)))
        read += len(window[-1] - before)
    return held, read, len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="folder with parquet files of images")
    parser.add_argument("--imagenet", action="store_true", help="only count row groups of ImageNet")
    parser.add_argument("--resolution", type=int, default=256, help="side in pixels of the images (default: 256)")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch (default: 64)")
    parser.add_argument("--batches", type=int, default=12, help="batches in a round, after the first (default: 12)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of workers to measure (default: 0 1 2)"
    )
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if args.imagenet == bool(args.folder):
        parser.error("give either a folder or --imagenet")
    if args.imagenet:
        for processes in (1, 8):
            held, read, groups = count_row_groups(processes)
            print(
                f"{processes} process(es): each holds at most {held} row groups and reads {read} of {groups} an epoch"
            )
        return
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    side = args.resolution // 8
    options = {"seed": 0, "resolution": args.resolution, "latent_shape": (4, side, side), "null_class_id": 1000}
    options |= {"sample_posterior": True, "num_tokens": side * side // 4}
    with tempfile.TemporaryDirectory() as folder:
        on_disk = ImageDataset(*load_image_dataset(args.folder, cache_dir=folder))
        streamed = stream_image_dataset(args.folder)
        print(f"{len(streamed)} images in {len(streamed.group_rows)} row groups of up to {streamed.group_rows.max()}")
        kinds = {
            "streamed": StreamedSamples(streamed, args.batch_size, **options),
            "on disk": TrainingSamples(on_disk, **options),
        }
        speeds = {(kind, workers): [] for workers in args.workers for kind in kinds}
        waits = {key: [] for key in speeds}
        for round_ in range(args.rounds):
            for key in np.random.default_rng(round_).permutation(len(speeds)):
                kind, workers = key = list(speeds)[key]
                sampler = StreamBatchSampler(
                    round_ * 10_000 * args.batch_size, args.batches + 1, args.batch_size, 0, 1, 1
                )
                start, first = time.perf_counter(), None
                for _ in kinds[kind].data.loader(kinds[kind], sampler, workers, pin_memory=False):
                    first = first or time.perf_counter()
                waits[key].append(first - start)
                speeds[key].append(args.batches * args.batch_size / (time.perf_counter() - first))
    print(f"{'':14}{'images/s':>10}{'lowest':>10}{'highest':>10}{'first batch, s':>16}")
    for key, values in speeds.items():
        figures = (np.median(values), min(values), max(values))
        print(f"{key[0]}, {key[1]:<4}" + "".join(f"{f:10,.0f}" for f in figures) + f"{np.median(waits[key]):16.2f}")
    if args.json:
        named = {f"{kind}, {workers}": values for (kind, workers), values in speeds.items()}
        Path(args.json).write_text(json.dumps({"images_per_second": named}, indent=1) + "\n")


if __name__ == "__main__":
    main()
