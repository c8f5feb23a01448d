#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure how cost grows with size: rows, tokens, classes, aligned blocks, encoders, log rows, features for metrics.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --full --json scaling.json
    python benchmarks/scaling.py --full --only draws
    python benchmarks/scaling.py --full --only metrics

A cost is processor time of one thread (the least of some repeats) and, if memory matters, the peak of resident memory above its
value before (Linux only). The exponent is the slope of a line through the logarithms of cost and size over the larger half of
the sizes, where fixed costs matter least: 1 means that the cost is proportional to the size, 0 that it does not grow. Work that
compares all pairs is quadratic by definition and is marked so; the exponent of everything else must be at most 1.05.

Rows of data are faked: a latent cache is a sparse file, and an image of a table is one byte, which nothing decodes. `--full` goes
to 10^7 rows of a table and 50,000 features for metrics. The metrics then take six minutes, and the other parts less than one
each; `--quick` is for tests.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from diffusers_vrpo import SiTTransformer2DModel
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.alignment.objective import VRPO
from diffusers_vrpo.data.image_datasets import image_and_label
from diffusers_vrpo.data.image_source import ImageDataset
from diffusers_vrpo.data.latent_cache import FORMAT, LatentCache, num_chunks
from diffusers_vrpo.data.latent_cache_writer import create_arrays
from diffusers_vrpo.data.samples import SampleStreams
from diffusers_vrpo.data.streamed_samples import StreamOrder
from diffusers_vrpo.evaluation.metrics import density_coverage, kernel_distance, precision_recall
from diffusers_vrpo.reporting.runs import merge_rows


MOST = 1.05  # largest exponent of work that is not quadratic by definition
BATCH = 256


@dataclass
class Scale:
    """A cost that is measured at several sizes.

    Attributes:
        name: name of the work, for the table.
        unit: unit of the size.
        sizes: in ascending order.
        prepare: makes the function to measure, given the size and an empty folder.
        shared_by: samples that share the cost, by which it is divided.
        quadratic: whether the work is quadratic by definition.
        repeats: number of measurements, of which the least counts.
        memory: whether memory is measured, too.
    """

    name: str
    unit: str
    sizes: list[int]
    prepare: Callable[[int, Path], Callable[[], object]]
    shared_by: int = 1
    quadratic: bool = False
    repeats: int = 3
    memory: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def draws(num_rows: int, num_tokens: int, version: int = 2) -> Callable[[], object]:
    """Everything that is drawn for a batch of 256 latents of 4x32x32; every call is in another epoch."""
    samples = SampleStreams(
        num_rows, 0, (4, 32, 32), 1000, sample_posterior=True, num_tokens=num_tokens, stream_version=version
    )
    epoch = iter(range(1, 10**9))

    def draw():
        first = next(epoch) * num_rows
        indices = list(range(first, first + BATCH))
        samples.drawn(indices, samples.uniforms(indices), samples.rows_of(indices) % 1000)

    return draw


def order(num_rows: int) -> Callable[[], object]:
    """The rows of a batch in a new epoch."""
    samples, epoch = SampleStreams(num_rows, 0, (4, 32, 32), 1000), iter(range(1, 10**9))

    def look_up():
        first = next(epoch) * num_rows
        samples.rows_of(list(range(first, first + BATCH)))

    return look_up


def streamed_order(num_rows: int) -> Callable[[], object]:
    """The rows of one batch of streamed files with 100 rows in a row group, in a new epoch."""
    groups = np.full(num_rows // 100, 100)
    stream, epoch = StreamOrder(0, groups, groups * 100_000, 64), iter(range(1, 10**9))

    def look_up():
        first = next(epoch) * num_rows
        [stream.row_of(first + i) for i in range(64)]

    return look_up


def open_cache(num_rows: int, folder: Path) -> Callable[[], object]:
    """Opens a latent cache of moments of 4x32x32, and computes the fingerprint by which a resumed run is checked."""
    config = {"count": num_rows, "resolution": 256, "kind": "moments", "latent_shape": [4, 32, 32], "flip": False}
    config |= {"images": "none", "features": [], "chunk_rows": 1024, "seed": 0}
    about = {"vae": "random", "num_classes": 1000, "class_names": None}
    create_arrays(folder, config)
    meta = {"format": FORMAT, "complete": True, "about": about, "config": config, "corrupt_rows": []}
    (folder / "meta.json").write_text(json.dumps(meta | {"checksums": [0] * num_chunks(config)}))
    return lambda: LatentCache(folder).fingerprint()


def image_table(num_rows: int, num_classes: int) -> datasets.Dataset:
    """A table whose images are one byte each."""
    ends = pa.array(np.arange(num_rows + 1, dtype=np.int32)).buffers()[1]
    content = pa.Array.from_buffers(pa.binary(), num_rows, [None, ends, pa.py_buffer(bytes(num_rows))])
    image = pa.StructArray.from_arrays([content, pa.nulls(num_rows, pa.string())], ["bytes", "path"])
    labels = np.random.default_rng(0).integers(0, num_classes, num_rows)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {i}" for i in range(num_classes)])}
    )
    table = pa.table({"image": image, "label": labels}).cast(features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def open_table(num_rows: int, num_classes: int) -> Callable[[], object]:
    """Checks the columns and labels of an image data set, and computes its fingerprint."""
    table = image_table(num_rows, num_classes)
    return lambda: ImageDataset(*image_and_label(table, "train_dataset", "(a table)", "image", "label")).fingerprint()


def aligned_step(num_tokens: int = 64, blocks: int = 1, encoders: int = 1, num_classes: int = 10, depth: int = 2):
    """Forward pass, backward pass and statistics of VRPO on a narrow model, in whose cost projectors and rewards are large."""
    torch.manual_seed(0)
    side = math.isqrt(num_tokens)
    model = SiTTransformer2DModel(
        sample_size=side,
        patch_size=1,
        num_layers=depth,
        num_attention_heads=1,
        attention_head_dim=32,
        num_classes=num_classes,
    )
    targets = torch.randn(4, num_tokens, 64)

    class Encoder:
        embed_dim = 64

        def __call__(self, images):
            return targets

    aligned = AlignedTransformer(model, list(range(1, blocks + 1)), [Encoder()] * encoders, "mlp", 128)
    objective = VRPO(aligned, max_train_steps=1000)
    latents, times, labels = torch.randn(4, 4, side, side), torch.rand(4), torch.zeros(4, dtype=torch.long)
    tokens = torch.stack([torch.randperm(num_tokens)[:64] for _ in range(4)])

    def step():
        state = objective.begin(times)
        output, projections = aligned(latents, times, labels, fork=state.fork, align=state.active)
        loss_fm = output.square().flatten(1).mean(1)
        loss = loss_fm.mean() + 0.5 * objective(state, projections, latents, loss_fm, subset=tokens)
        loss.backward()
        objective.observe(state)
        objective.update()
        aligned.zero_grad()

    return step


def merge(rows: list[dict]) -> Callable[[], object]:
    return lambda: merge_rows(rows)


def log_rows(number: int) -> list[dict]:
    """The log rows of a run that was resumed ten times, each time from a slightly earlier checkpoint."""
    steps = [
        step for part in range(10) for step in range(part * number // 10 - min(part, 1) * 5, (part + 1) * number // 10)
    ]
    return [{"step": step, "loss_fm": 1.0, "validation/fd": 2.0} for step in steps]


def features(number: int, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, dim, generator=generator), torch.randn(number, dim, generator=generator)


def scales(quick: bool, full: bool) -> dict[str, list[Scale]]:
    """All measurements, by the names for `--only`."""
    powers = [10**k for k in range(3, 5 if quick else 8)]
    tables = powers if full or quick else powers[:-1]
    tokens = [64, 144] if quick else [64, 256, 1024, 4096]
    classes = [10, 100] if quick else [10, 100, 1000, 5000, 22_000]
    blocks = [1, 2] if quick else [1, 2, 4, 8, 16, 28]
    logged = [1000, 2000] if quick else [1000, 10_000, 30_000, 100_000]
    sets = [200, 400] if quick else [1000, 2000, 4000, 8000] + ([16_000, 50_000] if full else [])
    # The products of the subsets do not depend on these; with small subsets and many features the rest is seen.
    of_kid = [200, 400] if quick else [1000, 10_000, 100_000, 1_000_000]

    def metric(function, **options):
        def prepare(size, folder):
            pair = features(size)
            return lambda: function(*pair, **options)

        return prepare

    kid = {"subsets": 10, "subset_size": 100}
    return {
        "draws": [
            Scale("draws of a sample", "tokens", tokens, lambda n, _: draws(1_281_167, n), shared_by=BATCH),
            Scale("draws of a sample", "rows", powers, lambda n, _: draws(n, 256), shared_by=BATCH),
            Scale("rows of a batch, new epoch", "rows", powers, lambda n, _: order(n), memory=True),
            Scale("the same, streaming", "rows", powers, lambda n, _: streamed_order(n), memory=True),
        ],
        "start": [
            Scale("open and check a cache", "rows", powers, open_cache, memory=True),
            Scale("open and check a table", "rows", tables, lambda n, _: open_table(n, 100), memory=True),
            Scale("the same, 100,000 rows", "classes", classes, lambda n, _: open_table(max(tables[0], 10**5), n)),
        ],
        "step": [
            Scale("VRPO step, 28 blocks", "aligned blocks", blocks, lambda n, _: aligned_step(blocks=n, depth=28)),
            Scale("VRPO step", "encoders", [1, 2, 3], lambda n, _: aligned_step(encoders=n)),
            Scale("VRPO step", "classes", classes, lambda n, _: aligned_step(num_classes=n)),
            Scale("VRPO step, with attention", "tokens", tokens, lambda n, _: aligned_step(n), quadratic=True),
        ],
        "report": [Scale("merge the rows of a log", "log rows", logged, lambda n, _: merge(log_rows(n)))],
        "kid": [Scale("KID, subsets of 100", "features", of_kid, metric(kernel_distance, **kid), memory=True)],
        "metrics": [
            Scale(
                "precision, recall", "features", sets, metric(precision_recall), quadratic=True, repeats=1, memory=True
            ),
            Scale(
                "density, coverage", "features", sets, metric(density_coverage), quadratic=True, repeats=1, memory=True
            ),
        ],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def peak_memory(function: Callable[[], object]) -> float | None:
    """The peak of resident memory in a call above the memory before it, in MiB; None without Linux's files about processes."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name: str) -> float:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1]) / 1024

    try:
        before = read("VmRSS")
        reset.write_text("5")  # sets the peak to the present memory
        function()
        return max(0.0, read("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def measure(scale: Scale) -> dict:
    """Seconds and MiB at each size, and the exponent of the seconds."""
    seconds, memory = [], []
    for size in scale.sizes:
        with tempfile.TemporaryDirectory() as folder:
            function, taken = scale.prepare(size, Path(folder)), []

            def call():
                start = time.process_time()
                function()  # noqa: B023
                taken.append(time.process_time() - start)  # noqa: B023

            memory.append(peak_memory(call) if scale.memory else None)
            while len(taken) < scale.repeats:
                call()
            seconds.append(min(taken) / scale.shared_by)
    return {
        "name": scale.name,
        "unit": scale.unit,
        "sizes": scale.sizes,
        "seconds": seconds,
        "memory_mib": memory,
        "exponent": fitted_exponent(scale.sizes, seconds),
        "quadratic": scale.quadratic,
    }


def fitted_exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of the logarithm of the cost over that of the size, over the larger half of the sizes."""
    first = len(sizes) // 2 if len(sizes) > 3 else 0
    return float(np.polyfit(np.log(sizes[first:]), np.log(np.maximum(costs[first:], 1e-9)), 1)[0])


def print_result(result: dict):
    print(f"\n{result['name']}: seconds by {result['unit']}")
    for size, seconds, memory in zip(result["sizes"], result["seconds"], result["memory_mib"]):
        print(f"{size:>14,}{seconds:>14.6f} s" + ("" if memory is None else f"{memory:>10.1f} MiB"))
    if result["quadratic"]:
        bound = "(compares all pairs, so 2 by definition)"
    else:
        bound = "" if result["exponent"] <= MOST else f"(above {MOST})"
    print(f"{'exponent':>14}{result['exponent']:>14.2f} {bound}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="measure only two or three small sizes of each, as the tests do"
    )
    parser.add_argument("--full", action="store_true", help="also measure sizes that take minutes each")
    parser.add_argument(
        "--only", nargs="+", choices=list(scales(True, False)), help="measure only these (default: all)"
    )
    parser.add_argument("--json", help="write the figures to this file")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    groups = scales(args.quick, args.full)
    results = []
    for scale in (scale for name in args.only or groups for scale in groups[name]):
        results.append(measure(scale))
        print_result(results[-1])
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    too_steep = [each for each in main() if not each["quadratic"] and each["exponent"] > MOST]
    sys.exit(1 if too_steep else 0)
