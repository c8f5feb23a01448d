#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure what a guidance interval saves, and how many images per second a sampler draws.

    python benchmarks/sampling_cost.py --preset SiT-XS/2 --batch_size 2 --threads 1 --clock cpu
    python benchmarks/sampling_cost.py --preset SiT-XL/2 --device cuda --dtype bfloat16 --batch_size 64
    python benchmarks/sampling_cost.py --preset SiT-XL/2 --device cuda --batch_size 64 --rounds 3 --throughput \
        --sampler sde --num_inference_steps 250
    python benchmarks/sampling_cost.py --pipeline outputs/digits --first_block_cache 0.05 0.1 0.2 --threads 1 --clock cpu

Without `--throughput` and `--first_block_cache`, three arms sample the same batch with the same model:
    always      guided at every step
    interval    guided only within `--guidance_interval`, without the unconditional half of the batch elsewhere
    never       not guided
The time of `interval` divided by that of `always` must be at most its share of the rows that the model evaluates, which are
counted, plus 3 %, so that other costs of a step do not cancel what the interval saves.

With `--throughput`, two arms sample with always guided steps: float32 eager, and bfloat16 with compiled blocks.

With `--first_block_cache`, an arm `whole` computes all blocks in always guided steps, and one for each threshold has diffusers'
first-block cache. Rows are the blocks that ran over the number of blocks, and samples are compared with those of `whole`: mean
absolute difference over their standard deviation. That needs the trained weights of `--pipeline`, because blocks with fresh
weights change nothing.

A call is `VRPOPipeline.__call__` up to the latents, with a generator for each image, as in `vrpo sample`. Weights are fresh
unless `--pipeline` is given. Arms take turns within a round, in a new order in each round. Ratios are medians over rounds of
the ratio within a round; intervals are 95 % bootstrap intervals over rounds. `--clock cpu` measures processor time of the
process, for a machine that also does other work.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig
from objective_overhead import NUM_CLASSES, hardware_name, median_ratio

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline, sit_preset
from diffusers_vrpo.config import DTYPES
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.official_checkpoints import default_scheduler
from diffusers_vrpo.pipelines.sampling import SAMPLERS, set_sampler, start_noise, step_generator


MARGIN = 0.03
THROUGHPUT_ARMS = {"float32, eager": ("float32", False), "bfloat16, compiled": ("bfloat16", True)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="SiT-S/2", help="size of the model, as in train_vrpo.py (default: SiT-S/2)"
    )
    parser.add_argument("--pipeline", metavar="FOLDER", help="sample from this pipeline instead of a preset")
    parser.add_argument("--latent_size", type=int, default=32, help="side of the four-channel latents (default: 32)")
    parser.add_argument("--batch_size", type=int, help="images in a batch (default: 64 on a GPU, 2 on the CPU)")
    parser.add_argument(
        "--sampler", default="default", help="sampler, as in `vrpo sample` (default: the pipeline's, Euler)"
    )
    parser.add_argument("--num_inference_steps", type=int, default=50, help="solver steps (default: 50)")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="guidance scale (default: 1.5)")
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        default=[0.0, 0.7],
        help="noise levels with guidance (default: 0 0.7)",
    )
    parser.add_argument("--throughput", action="store_true", help="compare precisions instead of guidance intervals")
    parser.add_argument(
        "--first_block_cache",
        type=float,
        nargs="+",
        metavar="THRESHOLD",
        help="compare these thresholds of the first-block cache instead",
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default: 9)")
    parser.add_argument(
        "--warmup", type=int, default=1, help="rounds before those that count, at least 1 (default: 1)"
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="device to measure (default: cuda if a GPU is available, otherwise cpu)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="precision of the transformer (default: float32)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument(
        "--threads", type=int, help="CPU threads; 1 gives steadier times on a busy machine (default: torch's)"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="measure wall time or, with cpu, processor time of the process (default: wall)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the order of the arms")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the numbers, with the time of each call, to this file"
    )
    return parser


def build_pipeline(settings, dtype: str, compiled: bool) -> VRPOPipeline:
    """Builds a pipeline with the sampler: that of `--pipeline`, or the preset with fresh weights and no autoencoder."""
    if settings.pipeline:
        pipeline = VRPOPipeline.from_pretrained(settings.pipeline)
        model = pipeline.transformer
    else:
        config = {**sit_preset(settings.preset), "sample_size": settings.latent_size, "num_classes": NUM_CLASSES}
        torch.manual_seed(0)
        model = SiTTransformer2DModel(**config).eval()
        pipeline = VRPOPipeline(model, default_scheduler(model.config.prediction_type))
    samplers = ("default", *SAMPLERS[model.config.prediction_type])
    if settings.sampler not in samplers:
        raise InputError(None, f"--sampler {settings.sampler}: {settings.preset} takes {', '.join(samplers)}")
    set_sampler(pipeline, settings.sampler, settings.preset)
    model.to(settings.device)
    if dtype != "float32":
        model.to(getattr(torch, dtype))
    if compiled:
        model.compile_repeated_blocks(dynamic=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_arms(settings) -> dict:
    """Builds the arms as `{name: function}`; each function samples a batch from given latents."""

    def arm(pipeline, **guidance):
        def call(latents, generators):
            return pipeline(
                [i % pipeline.transformer.config.num_classes for i in range(len(latents))],
                num_inference_steps=settings.num_inference_steps,
                latents=latents,
                generator=generators,
                output_type="latent",
                **guidance,
            ).images

        call.pipeline = pipeline
        return call

    scale = settings.guidance_scale
    if settings.throughput:
        return {
            name: arm(build_pipeline(settings, *precision), guidance_scale=scale)
            for name, precision in THROUGHPUT_ARMS.items()
        }
    pipeline = build_pipeline(settings, settings.dtype, settings.compile)
    if settings.first_block_cache:
        arms = {"whole": arm(pipeline, guidance_scale=scale)}
        for threshold in settings.first_block_cache:
            cached = build_pipeline(settings, settings.dtype, settings.compile)
            cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            arms[f"cache {threshold:g}"] = arm(cached, guidance_scale=scale)
        return arms
    return {
        "always": arm(pipeline, guidance_scale=scale),
        "interval": arm(pipeline, guidance_scale=scale, guidance_interval=tuple(settings.guidance_interval)),
        "never": arm(pipeline, guidance_scale=1.0),
    }


def count_rows(call, latents, generators, of_blocks: bool) -> tuple[float, torch.Tensor]:
    """Rows that the model evaluates in a call, and its samples.

    Args:
        of_blocks: count rows of the blocks, over their number: a block that a cache skips does not count.
    """
    transformer, rows = call.pipeline.transformer, []
    counted = [block.attn for block in transformer.transformer_blocks] if of_blocks else [transformer]
    hooks = [
        module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]) / len(counted)))
        for module in counted
    ]
    samples = call(latents, generators)
    for hook in hooks:
        hook.remove()
    return round(sum(rows), 2), samples


def measure(settings) -> dict:
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[settings.clock]
    wait = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    arms = build_arms(settings)
    config = next(iter(arms.values())).pipeline.transformer.config
    size = config.sample_size
    shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    order = random.Random(settings.seed)
    rows, samples, seconds = {}, {}, {name: [] for name in arms}
    for round_number in range(max(1, settings.warmup) + settings.rounds):
        first = round_number * settings.batch_size
        indices = range(first, first + settings.batch_size)
        latents = torch.stack([start_noise(settings.seed, i, shape) for i in indices])
        for name in order.sample(list(arms), len(arms)):
            generators = [step_generator(settings.seed, i) for i in indices]
            if round_number == 0:
                rows[name], samples[name] = count_rows(
                    arms[name], latents, generators, settings.first_block_cache is not None
                )
                continue
            wait()
            start = clock()
            arms[name](latents, generators)
            wait()
            if round_number >= max(1, settings.warmup):
                seconds[name].append(clock() - start)
    first = next(iter(arms))
    differences = {
        name: ((images - samples[first]).abs().mean() / samples[first].std()).item()
        for name, images in samples.items()
        if name != first
    }
    return {"rows": rows, "seconds": seconds, "differences": differences}


def build_report(settings, measured: dict) -> dict:
    rows, seconds = measured["rows"], measured["seconds"]
    if settings.throughput:
        slow, fast = THROUGHPUT_ARMS
        pairs = [(slow, fast, None)]
    elif settings.first_block_cache:
        pairs = [(name, "whole", rows[name] / rows["whole"]) for name in rows if name != "whole"]
    else:
        pairs = [(name, "always", rows[name] / rows["always"]) for name in ("interval", "never")]

    def ratio(above, below, share):
        value, low, high = median_ratio(seconds[above], seconds[below])
        at_most = share + MARGIN if above == "interval" else None
        return dict(above=above, below=below, ratio=value, low=low, high=high, share=share, at_most=at_most)

    return {
        "hardware": hardware_name(torch.device(settings.device)),
        "torch": torch.__version__,
        "settings": {name: value for name, value in vars(settings).items() if name != "json"},
        "arms": {
            name: {
                "rows": rows[name],
                "median_seconds": float(np.median(times)),
                "images_per_second": settings.batch_size / float(np.median(times)),
                "seconds": times,
            }
            for name, times in seconds.items()
        },
        "ratios": [ratio(*pair) for pair in pairs],
        "differences": measured["differences"] if settings.first_block_cache else {},
    }


def print_report(report: dict):
    s = report["settings"]
    how = "" if s["throughput"] else f", {s['dtype']}, {'compiled' if s['compile'] else 'eager'}"
    interval = (
        ""
        if s["throughput"] or s["first_block_cache"]
        else f", interval {s['guidance_interval'][0]} to {s['guidance_interval'][1]}"
    )
    print(f"{report['hardware']}, torch {report['torch']}")
    print(
        f"{s['pipeline'] or s['preset']}, {s['num_inference_steps']} steps of {s['sampler']}, batch {s['batch_size']}, guidance "
        f"{s['guidance_scale']}{interval}{how}, {s['rounds']} rounds, {s['clock']} clock\n"
    )
    print(f"{'arm':<22}{'rows':>8}{'s/batch':>10}{'images/s':>10}")
    for name, arm in report["arms"].items():
        print(f"{name:<22}{arm['rows']:>8g}{arm['median_seconds']:>10.3f}{arm['images_per_second']:>10.3f}")
    print(f"\n{'ratio of times':<40}{'value':>9}{'95 % interval':>18}{'of rows':>10}{'target':>14}")
    for r in report["ratios"]:
        share = "" if r["share"] is None else f"{r['share']:.4f}"
        verdict = ""
        if r["at_most"] is not None:
            verdict = f"{'<=' if r['ratio'] <= r['at_most'] else 'NOT <='} {r['at_most']:.4f}"
        bounds = f"{r['low']:.4f} - {r['high']:.4f}"
        print(f"{r['above'] + ' / ' + r['below']:<40}{r['ratio']:>9.4f}{bounds:>18}{share:>10}{verdict:>14}")
    for name, difference in report["differences"].items():
        print(f"difference of samples, {name}: {difference:.4f} of their standard deviation")


def main(settings: argparse.Namespace) -> dict:
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and settings.clock == "cpu":
        raise InputError(None, "--clock cpu does not see what a GPU does; use wall")
    if settings.throughput and (settings.dtype != "float32" or settings.compile):
        raise InputError(
            None, "--throughput compares float32 eager with bfloat16 compiled; leave out --dtype and --compile"
        )
    if settings.first_block_cache and (settings.throughput or settings.compile):
        raise InputError(None, "--first_block_cache cannot be combined with --throughput or --compile")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings.batch_size = settings.batch_size or (64 if settings.device == "cuda" else 2)
    report = build_report(settings, measure(settings))
    print_report(report)
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except InputError as error:
        sys.exit(f"sampling_cost.py: error: {error}")
