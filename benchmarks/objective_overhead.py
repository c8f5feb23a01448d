#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure what the VRPO objective costs in time and memory, compared with REPA's and plain flow matching.

    python benchmarks/objective_overhead.py --preset SiT-B/2 --batch_size 256 --dtype bfloat16 --device cuda
    python benchmarks/objective_overhead.py --preset SiT-S/4 --batch_size 8 --threads 1 --json overhead.json
    python benchmarks/objective_overhead.py --arms repa rare repi vrpo-repi --threads 1 --clock cpu
    python benchmarks/objective_overhead.py --arms repa perceptual repa-perceptual --pixels --reward_encoder FOLDER

The arms take turns step by step in one process; each has its own model from the same seed:
    none            plain flow matching, without projectors
    repa            REPA's cosine loss
    vrpo            `--objective vrpo` with the defaults of train_vrpo.py: expected estimator, fork, statistics
    vrpo-stopped    the same, after `--alignment_stop_step`: neither encoder nor projectors run
    irepa, rare     REPA's loss with the projector, targets and token weights of iREPA and RARE
    repi            a scaffold alone, after its phase: the block's own keys and values, and their distance to the features'
    repi-scaffold   a scaffold alone, in its phase
    vrpo-repi       vrpo with a scaffold, after its phase
    perceptual, repa-perceptual
                    the perceptual reward on the image estimate of every sample with t <= 0.7, alone and together with REPA
By default the first four are measured. The perceptual arms need `--reward_encoder`, which runs in the step, with `--pixels` on
pixels, and otherwise on images that an AutoencoderTiny with random weights decodes.

A step is `VRPOTrainer.train_step`: forward, backward, clipping, AdamW, EMA, running means, the guard against NaN and the update of
the statistics. It does not include the work that all arms share (decoding, the autoencoder) or the encoder, whose features are
given as random unit vectors. The encoder costs repa and vrpo the same, so their ratio is larger, and therefore stricter, without
it. On a GPU, measure a small batch, too, because launches of small kernels are not hidden behind large kernels there.

Every round has a new batch, the same for all arms, and a new order of the arms. Ratios are medians over rounds of the ratio within
a round, which slow changes of the machine's load do not affect; intervals are 95 % bootstrap intervals over rounds. Memory is
measured first, with every arm alone for a few steps.
"""

import argparse
import contextlib
import gc
import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny
from tqdm.auto import tqdm

from diffusers_vrpo.alignment.rewards import normalize
from diffusers_vrpo.alignment.whitening import WhitenedEncoder, Whitening
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.data.image_source import ImageSource
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.start import read_start
from diffusers_vrpo.trainer import VRPOTrainer
from diffusers_vrpo.training.callbacks import TrainerCallback
from diffusers_vrpo.training.throughput import hardware_name


MAX_TRAIN_STEPS = 400_000  # the gate's window is 2 % of it
AFTER_ONE_STEP = 1 / MAX_TRAIN_STEPS  # a scaffold phase of one step, so that the timed steps come after it
ARMS = {
    "none": {"objective": "none"},
    "repa": {"objective": "repa"},
    "vrpo": {"objective": "vrpo"},
    # Step 0 aligns, as in a run, so that the optimizer has moments for the projectors.
    "vrpo-stopped": {"objective": "vrpo", "alignment_stop_step": 1},
    "irepa": {"objective": "irepa"},
    "rare": {"objective": "rare", "target_norm": "none"},  # its targets are given whitened
    "repi": {"objective": "repi", "scaffold_fraction": AFTER_ONE_STEP},
    "repi-scaffold": {"objective": "repi", "scaffold_fraction": 1.0},
    "vrpo-repi": {"objective": "vrpo", "scaffold_layer": 4, "scaffold_fraction": AFTER_ONE_STEP},
    "perceptual": {"objective": "none", "image_rewards": ["perceptual"]},
    "repa-perceptual": {"objective": "repa", "image_rewards": ["perceptual"]},
}
USUAL = ("none", "repa", "vrpo", "vrpo-stopped")
# Numerator, denominator, and the largest ratios of time and of peak memory. Arms that are not measured are omitted.
BESIDE_REPA = [(name, "repa", None) for name in ("irepa", "rare", "repi", "repi-scaffold", "vrpo-repi", "perceptual")]
TIME_RATIOS = (
    ("vrpo", "repa", 1.03),
    ("vrpo-stopped", "none", 1.01),
    ("repa", "none", None),
    ("repa-perceptual", "repa", 1.15),
    *BESIDE_REPA,
)
MEMORY_RATIOS = (
    ("vrpo", "repa", 1.05),
    ("vrpo-stopped", "none", None),
    ("repa", "none", None),
    ("repa-perceptual", "repa", None),
    *BESIDE_REPA,
)
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16"}
NUM_CLASSES = 1000


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(USUAL), help="arms to measure")
    parser.add_argument(
        "--preset", default="SiT-B/2", help="size of the model, as in train_vrpo.py (default: SiT-B/2, 256 tokens)"
    )
    parser.add_argument("--latent_size", type=int, default=32, help="side of the four-channel latents (default: 32)")
    parser.add_argument("--embed_dim", type=int, default=768, help="width of the encoder's features (default: 768)")
    parser.add_argument(
        "--projector_dim", type=int, default=2048, help="hidden width of the projectors (default: 2048)"
    )
    parser.add_argument("--batch_size", type=int, help="images in a batch (default: 256 on a GPU, 2 on the CPU)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds that count (default: 20)")
    parser.add_argument(
        "--warmup", type=int, default=3, help="rounds before those that count, at least 1 (default: 3)"
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="device to measure (default: cuda if a GPU is available, otherwise cpu)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="precision; bfloat16 means autocast (default: float32)",
    )
    parser.add_argument(
        "--threads", type=int, help="CPU threads; 1 gives steadier times on a busy machine (default: torch's)"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="measure wall time or, with cpu, processor time of the process, for a busy machine and with --threads 1",
    )
    parser.add_argument(
        "--pixels", action="store_true", help="train on images of --latent_size pixels instead of latents"
    )
    parser.add_argument(
        "--reward_encoder", metavar="FOLDER", help="vision model of transformers for the perceptual rewards"
    )
    parser.add_argument(
        "--reward_resolution", type=int, default=224, help="side in pixels of the images that it sees (default: 224)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and the order of the arms")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the numbers, with the time of each step, to this file"
    )
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# A trainer whose latents and targets are given


class GivenLatents(ImageSource):
    """Training data whose batches have latents, `x0`, instead of images."""

    num_classes = NUM_CLASSES

    def __len__(self) -> int:
        return 1_000_000

    def check(self):
        """Does nothing, because there are no images."""

    def latents(self, vae, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["x0"]


class GivenTargets:
    """An encoder whose patch embeddings are in the batch."""

    def __init__(self, embed_dim: int):
        self.embed_dim = embed_dim

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["targets"]


def random_whitening(embed_dim: int, num_dims: int = 128) -> Whitening:
    """A random whitening of the size of RARE's; its values do not change the time of a step."""
    projection = torch.linalg.qr(torch.randn(embed_dim, num_dims, generator=torch.Generator().manual_seed(0)))[0]
    return Whitening(torch.zeros(embed_dim), projection)


class BeforeOptimizer(TrainerCallback):
    """Calls `action`, if there is one, between the backward pass and the clipping of gradients."""

    action = None

    def before_optimizer_step(self, trainer):
        if self.action is not None:
            self.action()


def build_trainer(name: str, settings, encoder, compile: bool = False, callbacks=()) -> VRPOTrainer:
    """Builds the trainer of an arm, ready for `train_step`; accelerate must have been started with device and precision.

    Args:
        settings: an object with `preset`, `projector_dim`, `latent_size`, `seed` and `dtype`; for arms other than the first
            four, also with `pixels`, `reward_encoder` and `reward_resolution`.
        encoder: the encoder to align with, which the arm none does not use.
    """
    threads, pixels, arm = torch.get_num_threads(), getattr(settings, "pixels", False), dict(ARMS[name])
    # Only the shape of its latents is used: four channels, with an eighth of the image's side.
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(1, 1, 1, 1),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1,
    )
    with tempfile.TemporaryDirectory() as folder:  # nothing is written to it: neither logs nor checkpoints are due
        if "image_rewards" in arm:
            arm |= {"image_reward_encoder": settings.reward_encoder}
            arm |= {"image_reward_resolution": settings.reward_resolution}
            if not pixels:
                AutoencoderTiny().save_pretrained(f"{folder}/tiny")
                arm["reward_vae"] = f"{folder}/tiny"
        args = VRPOConfig(
            preset=settings.preset,
            projector_dim=settings.projector_dim,
            resolution=settings.latent_size * (1 if pixels else 8),
            seed=settings.seed,
            mixed_precision=MIXED_PRECISION[settings.dtype],
            max_train_steps=MAX_TRAIN_STEPS,
            compile=compile,
            report_to="none",
            output_dir=f"{folder}/run",
            **arm | ({"vae": "none"} if pixels else {}),
        )
        encoders = None if args.objective == "none" else [encoder]
        if args.objective == "rare":
            encoders = [WhitenedEncoder(encoder, random_whitening(encoder.embed_dim))]
        given = {"encoders": encoders, "vae": None if pixels else vae, "train_dataset": GivenLatents()}
        trainer = VRPOTrainer(args=args, callbacks=callbacks, **given)
        trainer.close()
    torch.set_num_threads(threads)  # on a CPU a trainer takes all cores

    # What `train` does before its first step.
    trainer.objective.resume(0)
    trainer.model.train()
    trainer.progress = tqdm(disable=True)
    return trainer


def draw_batch(settings, batch_size: int, num_tokens: int, generator: torch.Generator, device) -> dict:
    """Draws a batch of random values as loader, autoencoder and encoder would return it for a step."""
    channels = 3 if getattr(settings, "pixels", False) else 4
    shape = (batch_size, channels, settings.latent_size, settings.latent_size)
    batch = {
        "x0": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timestep": torch.rand(batch_size, generator=generator),
        "class_labels": torch.randint(NUM_CLASSES, (batch_size,), generator=generator),
        "tokens": torch.stack(
            [torch.randperm(num_tokens, generator=generator)[: min(64, num_tokens)] for _ in range(batch_size)]
        ),
        "targets": normalize(torch.randn(batch_size, num_tokens, settings.embed_dim, generator=generator)),
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return batch | {"index": torch.arange(batch_size), "corrupt_rows": torch.zeros(0, dtype=torch.long)}


def train_step(trainer: VRPOTrainer, batch: dict):
    """Takes an optimizer step on a batch, which does not change."""
    trainer.train_step(iter([dict(batch)]))


# ----------------------------------------------------------------------------------------------------------------------
# Time


def measure_seconds(arms: dict, next_batch, device: torch.device, settings) -> dict[str, list[float]]:
    """Seconds of each arm's step, a number for every round that counts."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[settings.clock]
    warmup = max(1, settings.warmup)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    order = random.Random(settings.seed)
    seconds = {name: [] for name in arms}
    for round_number in range(warmup + settings.repeats):
        batch = next_batch()
        for name in order.sample(list(arms), len(arms)):
            wait()
            start = clock()
            train_step(arms[name], batch)
            wait()
            if round_number >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median over rounds of the ratio within a round, and its 95 % interval by bootstrap over rounds."""
    ratios = np.asarray(above) / np.asarray(below)
    draws = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def measure_memory(build, next_batch, device: torch.device, warmup: int = 2) -> dict[str, int]:
    """Measures the peak bytes of tensors of an arm alone: in forward and backward pass (`gradients`), and in a whole step.

    The objective needs memory in forward and backward pass only, and this shows only if activations dominate: with a small
    batch, the gradients at the end of the backward pass or the temporary copy of the averaged weights are the peak for every
    objective. On a GPU the allocator counts the bytes. On a CPU the profiler does, because its count, unlike the peak
    resident size of a process, includes no libraries, freed pages and chance effects (and no scratch space inside MKL).

    Args:
        build: a function of callbacks that makes the trainer of the arm.
    """
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0

    def peak():
        return torch.cuda.max_memory_allocated() - before if cuda else 0

    def run():
        middle, found = BeforeOptimizer(), {}
        trainer = build([middle])
        for _ in range(warmup):
            train_step(trainer, next_batch())
        batch = next_batch()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with contextlib.ExitStack() as measured:

            def end_of_gradients():
                found["gradients"] = peak()
                measured.close()
                measured.enter_context(torch.profiler.record_function("measured_rest"))

            middle.action = end_of_gradients
            measured.enter_context(torch.profiler.record_function("measured_gradients"))
            train_step(trainer, batch)
        trainer.accelerator.free_memory()
        return found | {"peak": peak()}

    if cuda:
        result = run()
    else:
        # The arm is built and freed inside the profile, which would otherwise see memory freed that it did not see allocated.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
            gc.collect()
        gradients, rest = read_memory_trace(profile, ["measured_gradients", "measured_rest"])
        result = {"gradients": gradients, "peak": max(gradients, rest)}
    gc.collect()
    return result


def read_memory_trace(profile: torch.profiler.profile, ranges: list[str]) -> list[int]:
    """The most bytes that were in use within each named range of a finished profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    times = np.array([e["ts"] for e in changes])
    used = np.cumsum([e["args"]["Bytes"] for e in changes])
    peaks = []
    for name in ranges:
        event = next(e for e in events if e.get("name") == name and e.get("ph") == "X")
        inside = (times >= event["ts"]) & (times <= event["ts"] + event["dur"])
        peaks.append(int(used[inside].max()))
    return peaks


# ----------------------------------------------------------------------------------------------------------------------
# Report


def build_report(settings, batch_size: int, num_tokens: int, seconds: dict, memory: dict, device) -> dict:
    """All numbers, as the JSON file holds them."""

    def ratio(kind, above, below, most, value, low=None, high=None):
        return dict(what=kind, above=above, below=below, ratio=value, low=low, high=high, at_most=most)

    def measured(pairs):
        return [(a, b, most) for a, b, most in pairs if a in seconds and b in seconds]

    ratios = [ratio("time", a, b, most, *median_ratio(seconds[a], seconds[b])) for a, b, most in measured(TIME_RATIOS)]
    for kind, key in (("peak memory", "peak"), ("forward-backward peak", "gradients")):
        for a, b, most in measured(MEMORY_RATIOS):
            ratios.append(ratio(kind, a, b, most, memory[a][key] / memory[b][key]))
    return {
        "hardware": hardware_name(device),
        "torch": torch.__version__,
        "settings": {name: value for name, value in vars(settings).items() if name != "json"}
        | {"batch_size": batch_size, "num_tokens": num_tokens, "device": device.type},
        "arms": {
            name: {"median_seconds": float(np.median(times)), **memory[name], "seconds": times}
            for name, times in seconds.items()
        },
        "ratios": ratios,
    }


def print_report(report: dict):
    s = report["settings"]
    print(f"{report['hardware']}, torch {report['torch']}")
    print(
        f"{s['preset']}, {s['num_tokens']} tokens, targets of width {s['embed_dim']}, projectors of width "
        f"{s['projector_dim']}, batch {s['batch_size']}, {s['dtype']}, {s['repeats']} rounds, {s['clock']} clock\n"
    )
    print(f"{'arm':<16}{'s/step':>10}{'images/s':>10}{'peak MiB':>11}{'in forward and backward':>26}")
    for name, arm in report["arms"].items():
        seconds, speed = arm["median_seconds"], s["batch_size"] / arm["median_seconds"]
        peak, gradients = arm["peak"] / 2**20, arm["gradients"] / 2**20
        print(f"{name:<16}{seconds:>10.4f}{speed:>10.1f}{peak:>11.1f}{gradients:>26.1f}")
    print(f"\n{'ratio':<46}{'value':>9}{'95 % interval':>18}{'target':>13}")
    for r in report["ratios"]:
        label = f"{r['what']}, {r['above']} / {r['below']}"
        interval = "" if r["low"] is None else f"{r['low']:.4f} - {r['high']:.4f}"
        verdict = ""
        if r["at_most"] is not None:
            verdict = f"{'<=' if r['ratio'] <= r['at_most'] else 'NOT <='} {r['at_most']}"
        print(f"{label:<46}{r['ratio']:>9.4f}{interval:>18}{verdict:>13}")


def main(settings: argparse.Namespace):
    device_type = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = settings.batch_size or (256 if device_type == "cuda" else 2)
    if device_type == "cuda" and settings.clock == "cpu":
        raise InputError(None, "--clock cpu does not see what a GPU does; use wall")
    if not settings.reward_encoder and any("image_rewards" in ARMS[name] for name in settings.arms):
        raise InputError(None, "--arms perceptual and repa-perceptual need --reward_encoder")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = Accelerator(mixed_precision=MIXED_PRECISION[settings.dtype], cpu=device_type == "cpu").device
    patch_size = read_start(VRPOConfig(preset=settings.preset)).config["patch_size"]
    num_tokens = (settings.latent_size // patch_size) ** 2
    generator = torch.Generator().manual_seed(settings.seed)

    def build(name, callbacks=()):
        return build_trainer(name, settings, GivenTargets(settings.embed_dim), callbacks=callbacks)

    def next_batch():
        return draw_batch(settings, batch_size, num_tokens, generator, device)

    memory = {name: measure_memory(partial(build, name), next_batch, device) for name in settings.arms}
    arms = {name: build(name) for name in settings.arms}
    seconds = measure_seconds(arms, next_batch, device, settings)
    report = build_report(settings, batch_size, num_tokens, seconds, memory, device)
    print_report(report)
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except InputError as error:
        sys.exit(f"objective_overhead.py: error: {error}")
