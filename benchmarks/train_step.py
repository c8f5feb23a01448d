#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Compare this package's training step with a plain REPA step, and list the effect of each improvement.

    python benchmarks/train_step.py --device cuda --dtype bfloat16 --batch_size 256
    python benchmarks/train_step.py --batch_size 4 --threads 1 --clock cpu --json train_step.json
    python benchmarks/train_step.py --device cuda --dtype bfloat16 --sweep

The plain step is REPA's method, written in this file in the most direct way: eager, with a loop over samples in the loss, the
average updated tensor by tensor, torch's default AdamW, the encoder in float32, and losses that are read at every step. Model and
projectors are the same code as ours, and batches and starting weights are the same numbers. The arms, each with its own model,
take turns in one process:
    plain           the above
    + ...           plain with one improvement, for its share; improvements need not add up
    plain, all      plain with all of them
    repa, vrpo      `VRPOTrainer.train_step` with `--objective repa` and with its default
A step starts with a batch on the CPU (uint8 images, latents, noise, labels) and runs the encoder, forward and backward pass,
clipping, AdamW and the average. It does not include decoding and the autoencoder. The encoder is a DINOv2 with random weights
unless one is given. With bfloat16 the plain encoder in float32 is the slow part, so the strict comparison is the ratio to
`+ encoder in half precision`, which has the same encoder in the same precision.

Every round has a new batch, the same for all arms, and a new order of the arms. Ratios are medians over rounds of the ratio within
a round; intervals are 95 % bootstrap intervals over rounds.

`--sweep` measures the vrpo step alone for several model sizes: images/s, TFLOP/s, MFU, peak memory. Latents are given, but the
encoder runs in the step; its work counts, while recomputation would not. A batch that does not fit is halved.
"""

import argparse
import copy
import gc
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from objective_overhead import (
    MIXED_PRECISION,
    NUM_CLASSES,
    build_trainer,
    draw_batch,
    hardware_name,
    median_ratio,
    train_step,
)
from transformers import Dinov2Config, Dinov2Model
from transformers.utils.logging import disable_progress_bar

from diffusers_vrpo.alignment.encoders import IMAGENET_MEAN, IMAGENET_STD, PatchEncoder, load_encoder
from diffusers_vrpo.alignment.start import build_aligned_transformer
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.start import read_start
from diffusers_vrpo.training.throughput import peak_flops, throughput_metrics


ENCODER_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
SWEEP = ("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2")
# What each improvement changes in the plain step.
IMPROVEMENTS = {
    "fused AdamW": "adamw",
    "average in one pass": "ema",
    "loss without a loop": "loss",
    "no losses read": "sync",
    "encoder in half precision": "half",
    "encoder compiled": "compiled encoder",
    "blocks compiled": "compiled blocks",
}
# Images/s of these over the plain step, at least, on the CPU and on a GPU.
TARGETS = {"cpu": 1.0, "cuda": 1.3}


def build_parser() -> argparse.ArgumentParser:
    flag = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="SiT-S/2", help="size of the model, as in train_vrpo.py (default: SiT-S/2)"
    )
    parser.add_argument("--latent_size", type=int, default=32, help="side of the four-channel latents (default: 32)")
    parser.add_argument(
        "--projector_dim", type=int, default=2048, help="hidden width of the projectors (default: 2048)"
    )
    parser.add_argument("--encoder", help="encoder, as in train_vrpo.py; a DINOv2 with random weights if not given")
    parser.add_argument("--encoder_size", choices=ENCODER_SIZES, default="base", help="size of that DINOv2")
    parser.add_argument("--batch_size", type=int, help="images in a batch (default: 256 on a GPU, 4 on the CPU)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count (default: 15)")
    parser.add_argument(
        "--warmup", type=int, default=2, help="rounds before those that count, at least 1 (default: 2)"
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
        "--compile", action=flag, help="compile the blocks and the encoder of our step (default: on a GPU only)"
    )
    parser.add_argument(
        "--ablations", action=flag, default=True, help="also measure an arm for each improvement alone"
    )
    parser.add_argument("--sweep", nargs="*", metavar="PRESET", help=f"by default {' '.join(SWEEP)}")
    parser.add_argument(
        "--peak_tflops", type=float, help="peak TFLOP/s of the device, for MFU; looked up for known GPUs"
    )
    parser.add_argument(
        "--threads", type=int, help="CPU threads; 1 gives steadier times on a busy machine (default: torch's)"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="measure wall time or, with cpu, processor time of the process (default: wall)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and the order of the arms")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the numbers, with the time of each step, to this file"
    )
    return parser


class Setup:
    """What all arms share: device, precision, batches, encoders."""

    def __init__(self, settings: argparse.Namespace, preset: str):
        self.settings, self.preset = settings, preset
        mixed_precision = MIXED_PRECISION[settings.dtype]
        self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=settings.device == "cpu")
        self.device = self.accelerator.device
        self.dtype = getattr(torch, settings.dtype)
        patch_size = read_start(VRPOConfig(preset=preset)).config["patch_size"]
        self.grid_size = (settings.latent_size // patch_size,) * 2
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.encoders: dict[tuple, PatchEncoder] = {}

    def encoder(self, dtype: torch.dtype = torch.float32, compiled: bool = False) -> PatchEncoder:
        if (dtype, compiled) not in self.encoders:
            if self.settings.encoder:
                encoder = load_encoder(self.settings.encoder, self.grid_size, dtype=dtype, device=self.device)
            else:
                encoder = random_encoder(
                    self.settings.encoder_size, self.grid_size, dtype, self.device, self.settings.seed
                )
            if compiled:
                encoder.model.compile()
            self.encoders[dtype, compiled] = encoder
        return self.encoders[dtype, compiled]

    def next_batch(self, batch_size: int) -> dict[str, torch.Tensor]:
        """On the CPU, pinned for a GPU, as the loader gives it."""
        shapes = SimpleNamespace(latent_size=self.settings.latent_size, embed_dim=1)
        batch = draw_batch(shapes, batch_size, self.grid_size[0] * self.grid_size[1], self.generator, "cpu")
        del batch["targets"]
        side = 8 * self.settings.latent_size
        batch["pixels"] = torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8, generator=self.generator)
        return {name: tensor.pin_memory() if self.device.type == "cuda" else tensor for name, tensor in batch.items()}


def random_encoder(size: str, grid_size: tuple[int, int], dtype: torch.dtype, device, seed: int) -> PatchEncoder:
    """A DINOv2/14 of twelve layers with random weights."""
    dim, heads = ENCODER_SIZES[size]
    torch.manual_seed(seed)
    disable_progress_bar()
    config = Dinov2Config(hidden_size=dim, num_attention_heads=heads, image_size=14 * grid_size[0])
    with tempfile.TemporaryDirectory() as folder:
        Dinov2Model(config).save_pretrained(folder)
        processor = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
        return load_encoder(folder, grid_size, dtype=dtype, device=device)


# ----------------------------------------------------------------------------------------------------------------------
# The two steps


def build_ours(setup: Setup, objective: str) -> SimpleNamespace:
    """The trainer, with the encoder online; a step of it is `VRPOTrainer.train_step`."""
    settings, compiled = setup.settings, setup.settings.compile
    encoder = setup.encoder(setup.dtype if setup.device.type == "cuda" else torch.float32, compiled)
    shapes = SimpleNamespace(
        preset=setup.preset,
        projector_dim=settings.projector_dim,
        latent_size=settings.latent_size,
        seed=settings.seed,
        dtype=settings.dtype,
    )
    trainer = build_trainer(objective, shapes, encoder, compiled)
    return SimpleNamespace(
        trainer=trainer,
        aligned=trainer.aligned,
        optimizer=trainer.optimizer,
        ema=trainer.ema,
        guard=trainer.guard,
        run=lambda batch: train_step(trainer, batch),
    )


def build_plain(setup: Setup, improvements: tuple[str, ...] = ()) -> SimpleNamespace:
    """The same model with what a plain step needs."""
    encoder = setup.encoder(
        setup.dtype if "half" in improvements else torch.float32, "compiled encoder" in improvements
    )
    settings = setup.settings
    args = VRPOConfig(objective="repa", preset=setup.preset, projector_dim=settings.projector_dim)
    torch.manual_seed(settings.seed)
    latent_shape = (4, settings.latent_size, settings.latent_size)
    aligned = build_aligned_transformer(args, read_start(args), latent_shape, NUM_CLASSES, None, [encoder])
    aligned.to(setup.device).train()
    if "compiled blocks" in improvements:
        aligned.transformer.compile_repeated_blocks()
    optimizer = torch.optim.AdamW(
        aligned.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True if "adamw" in improvements else None,
    )
    arm = SimpleNamespace(
        aligned=aligned,
        transformer=aligned.transformer,
        average=[p.detach().clone() for p in aligned.parameters()],
        optimizer=optimizer,
        encoder=encoder,
        args=args,
        step=0,
        log={},
    )
    arm.run = lambda batch: plain_step(arm, batch, setup.device, setup.dtype, improvements)
    return arm


def plain_step(arm: SimpleNamespace, batch: dict, device, dtype: torch.dtype, improvements: tuple[str, ...]):
    """One step of REPA from its formulas; each of `improvements` replaces one part."""
    x0, noise, t = (batch[name].to(device) for name in ("x0", "noise", "timestep"))
    labels, images = batch["class_labels"].to(device), batch["pixels"].to(device).float() / 127.5 - 1
    with torch.no_grad():
        features = arm.encoder(images)

    # x_t = (1 - t) x0 + t noise, whose velocity is noise - x0
    s = t.reshape(-1, 1, 1, 1)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        prediction, projections = arm.aligned((1 - s) * x0 + s * noise, t, labels)
    loss_fm = (prediction.float() - (noise - x0)).square().mean()

    # -(1/N) sum_n <mu_n, y_n>, mean over samples
    projections = projections[0].float()
    if "loss" in improvements:
        loss_rep = -(F.normalize(projections, dim=-1) * F.normalize(features, dim=-1)).sum(-1).mean()
    else:
        loss_rep = 0.0
        for projection, feature in zip(projections, features):
            mu, y = F.normalize(projection, dim=-1), F.normalize(feature, dim=-1)
            loss_rep = loss_rep - (mu * y).sum(-1).mean()
        loss_rep = loss_rep / len(features)

    loss = loss_fm + arm.args.alignment_coeff * loss_rep
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(arm.aligned.parameters(), arm.args.max_grad_norm)
    arm.optimizer.step()
    arm.optimizer.zero_grad(set_to_none=True)

    arm.step += 1
    # The first step copies, and the decay then rises to its value, as that of diffusers' average does.
    decay = min(arm.args.ema_decay, arm.step / (9 + arm.step)) if arm.step > 1 else 0.0
    with torch.no_grad():
        if "ema" in improvements:
            torch._foreach_lerp_(arm.average, list(arm.aligned.parameters()), 1 - decay)
        else:
            for average, parameter in zip(arm.average, arm.aligned.parameters()):
                average.mul_(decay).add_(parameter, alpha=1 - decay)
    losses = {"loss": loss_fm.detach(), "alignment": loss_rep.detach(), "grad_norm": norm}
    arm.log = losses if "sync" in improvements else {name: value.item() for name, value in losses.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def arm_builders(setup: Setup) -> dict:
    """What builds each arm, by its name."""
    builders = {"plain": lambda: build_plain(setup)}
    if setup.settings.ablations:
        applicable = {"adamw", "ema", "loss", "sync"}
        if setup.device.type == "cuda" and setup.dtype != torch.float32:
            applicable.add("half")
        if setup.settings.compile:
            applicable |= {"compiled encoder", "compiled blocks"}
        for name, key in IMPROVEMENTS.items():
            if key in applicable:
                builders[f"+ {name}"] = lambda key=key: build_plain(setup, (key,))
        builders["plain, all"] = lambda: build_plain(setup, tuple(applicable))
    return builders | {name: lambda name=name: build_ours(setup, name) for name in ("repa", "vrpo")}


def measure_seconds(arms: dict, setup: Setup, batch_size: int) -> dict[str, list[float]]:
    """Seconds of each arm's step, a number for every round that counts."""
    settings = setup.settings
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[settings.clock]
    wait = torch.cuda.synchronize if setup.device.type == "cuda" else lambda: None
    order, warmup = random.Random(settings.seed), max(1, settings.warmup)
    seconds = {name: [] for name in arms}
    for round_number in range(warmup + settings.repeats):
        batch = setup.next_batch(batch_size)
        for name in order.sample(list(arms), len(arms)):
            wait()
            start = clock()
            arms[name].run(batch)
            wait()
            if round_number >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def compare(setup: Setup, batch_size: int) -> dict:
    """Times all arms; the report as the JSON file holds it."""
    arms = {name: build() for name, build in arm_builders(setup).items()}
    seconds = measure_seconds(arms, setup, batch_size)
    plain, aligned = arms["vrpo"].trainer.flops_per_image
    half, target = "+ encoder in half precision", TARGETS[setup.device.type]
    pairs = [(name, "plain", target if name in ("repa", "vrpo") else None) for name in arms if name != "plain"]
    if half in arms:
        pairs += [("repa", half, target), ("vrpo", half, target)]

    def ratio(above, below, at_least):
        # Of images/s, so the seconds stand the other way round.
        value, low, high = median_ratio(seconds[below], seconds[above])
        return {"above": above, "below": below, "ratio": value, "low": low, "high": high, "at_least": at_least}

    return {
        "flops_per_image": aligned,
        "flops_per_image_without_alignment": plain,
        "arms": {name: {"median_seconds": float(np.median(s)), "seconds": s} for name, s in seconds.items()},
        "ratios": [ratio(*pair) for pair in pairs],
    }


def print_comparison(report: dict):
    s = report["settings"]
    print(
        f"{s['preset']}, {s['num_tokens']} tokens, encoder {s['encoder'] or 'random DINOv2 ' + s['encoder_size']}, batch "
        f"{s['batch_size']}, {s['dtype']}, {'compiled' if s['compile'] else 'eager'}, {s['repeats']} rounds, {s['clock']} "
        "clock\n"
    )
    print(f"{'arm':<32}{'s/step':>10}{'images/s':>10}{'TFLOP/s':>10}")
    for name, arm in report["arms"].items():
        speed = s["batch_size"] / arm["median_seconds"]
        print(
            f"{name:<32}{arm['median_seconds']:>10.4f}{speed:>10.2f}{speed * report['flops_per_image'] / 1e12:>10.3f}"
        )
    print(f"\n{'ratio of images/s':<52}{'value':>9}{'95 % interval':>18}{'time saved':>13}{'target':>14}")
    for r in report["ratios"]:
        label, interval = f"{r['above']} / {r['below']}", f"{r['low']:.4f} - {r['high']:.4f}"
        verdict = ""
        if r["at_least"] is not None:
            verdict = f"{'>=' if r['ratio'] >= r['at_least'] else 'NOT >='} {r['at_least']}"
        print(f"{label:<52}{r['ratio']:>9.4f}{interval:>18}{100 * (1 - 1 / r['ratio']):>11.1f} %{verdict:>14}")


# ----------------------------------------------------------------------------------------------------------------------
# Model sizes


def measure_alone(setup: Setup, batch_size: int) -> dict:
    """Speed and memory of the vrpo step of one model. The steps queue up, as in training."""
    settings, cuda = setup.settings, setup.device.type == "cuda"
    arm = build_ours(setup, "vrpo")
    wait = torch.cuda.synchronize if cuda else lambda: None
    batches = [setup.next_batch(batch_size) for _ in range(2)]
    for i in range(max(1, settings.warmup)):
        arm.run(batches[i % 2])
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for i in range(settings.repeats):
        arm.run(batches[i % 2])
    wait()
    images_per_second = settings.repeats * batch_size / (time.perf_counter() - start)
    flops = arm.trainer.flops_per_image[True]
    arm.trainer.accelerator.free_memory()
    peak = 1e12 * settings.peak_tflops if settings.peak_tflops else peak_flops(setup.device, setup.dtype)
    return {
        "preset": setup.preset,
        "batch_size": batch_size,
        "images_per_second": images_per_second,
        **throughput_metrics(images_per_second, flops, peak),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def sweep(settings: argparse.Namespace, batch_size: int) -> dict:
    rows = []
    for preset in settings.sweep or SWEEP:
        setup, size = Setup(settings, preset), batch_size
        while True:
            try:
                rows.append(measure_alone(setup, size))
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            size //= 2  # here, where the exception no longer holds the tensors
            setup.accelerator.free_memory()
            gc.collect()
            torch.cuda.empty_cache()
        del setup
        gc.collect()
        torch.compiler.reset()
    return {"rows": rows}


def print_sweep(report: dict):
    s = report["settings"]
    print(f"encoder online, {s['dtype']}, {'compiled' if s['compile'] else 'eager'}, {s['repeats']} steps each\n")
    print(f"{'model':<12}{'batch':>7}{'images/s':>11}{'TFLOP/s':>10}{'MFU':>8}{'peak GiB':>10}")
    for row in report["rows"]:
        mfu = f"{100 * row['mfu']:.1f} %" if "mfu" in row else "-"
        memory = f"{row['peak_memory_bytes'] / 2**30:.1f}" if row["peak_memory_bytes"] else "-"
        print(
            f"{row['preset']:<12}{row['batch_size']:>7}{row['images_per_second']:>11.1f}"
            f"{row['tflops_per_device']:>10.2f}{mfu:>8}{memory:>10}"
        )


def main(settings: argparse.Namespace) -> dict:
    settings = copy.copy(settings)
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.compile is None:
        settings.compile = settings.device == "cuda"
    if settings.device == "cuda" and settings.clock == "cpu":
        raise InputError(None, "--clock cpu does not see what a GPU does; use wall")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings.batch_size = settings.batch_size or (256 if settings.device == "cuda" else 4)
    if settings.sweep is not None:
        report, show = sweep(settings, settings.batch_size), print_sweep
    else:
        setup = Setup(settings, settings.preset)
        report, show = compare(setup, settings.batch_size), print_comparison
        settings.num_tokens = setup.grid_size[0] * setup.grid_size[1]
    report = {
        "hardware": hardware_name(torch.device(settings.device)),
        "torch": torch.__version__,
        "settings": {name: value for name, value in vars(settings).items() if name != "json"},
        **report,
    }
    print(f"{report['hardware']}, torch {report['torch']}")
    show(report)
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except InputError as error:
        sys.exit(f"train_step.py: error: {error}")
