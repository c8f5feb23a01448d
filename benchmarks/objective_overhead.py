#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure what the VRPO objective costs in time and memory, beside REPA's and plain flow matching.

    python benchmarks/objective_overhead.py --preset SiT-B/2 --batch_size 256 --dtype bfloat16 --device cuda
    python benchmarks/objective_overhead.py --preset SiT-S/4 --batch_size 8 --threads 1 --json overhead.json

Four arms, each with its own model of the same seed, take turns step by step in one process:
    none            plain flow matching, without projectors
    repa            REPA's cosine loss
    vrpo            `--objective vrpo` with the defaults of train_vrpo.py: expected estimator, fork, gate, statistics
    vrpo-stopped    the same, after `--alignment_stop_step`: neither encoder nor projectors run
A step is forward, backward, clipping, AdamW, EMA, running means and the update of the statistics, by the package's own
code. Left out is what all arms share (decoding, the autoencoder) and the encoder: its features are given, random unit
vectors. It costs repa and vrpo the same, so their ratio without it is the larger, stricter one; so is the ratio at a
small batch on a GPU, where the launches of small kernels are not hidden.

Every round has a new batch, the same for all arms, and an order of the arms of its own. Ratios are medians over rounds
of the ratio within a round, which slow changes of the machine's load leave alone; intervals are a 95 % bootstrap over
rounds. For memory every arm runs alone for a few steps, before the clock is used.
"""

import argparse
import gc
import importlib.util
import json
import platform
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_vrpo.alignment import Alignment
from diffusers_vrpo.flow import flow_matching_loss, forward_process
from diffusers_vrpo.initialization import build_transformer, read_start
from diffusers_vrpo.representation_policy import normalize
from diffusers_vrpo.training import RunningMeans, release_projectors, trainable_parameters


ARMS = {
    "none": ["--objective", "none"],
    "repa": ["--objective", "repa"],
    "vrpo": ["--objective", "vrpo"],
    # Step 0 aligns, as in a run: what the optimizer keeps of the projectors stays.
    "vrpo-stopped": ["--objective", "vrpo", "--alignment_stop_step", "1"],
}
# numerator, denominator, at most: of time, and of peak memory.
TIME_RATIOS = (("vrpo", "repa", 1.03), ("vrpo-stopped", "none", 1.01), ("repa", "none", None))
MEMORY_RATIOS = (("vrpo", "repa", 1.05), ("vrpo-stopped", "none", None), ("repa", "none", None))
NUM_CLASSES = 1000
MAX_TRAIN_STEPS = 400_000  # the gate's window is 2 % of it


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="SiT-B/2", help="as of train_vrpo.py (default: SiT-B/2, 256 tokens)")
    parser.add_argument("--latent_size", type=int, default=32, help="side of the four-channel latents (default: 32)")
    parser.add_argument("--embed_dim", type=int, default=768, help="width of the encoder's features (default: 768)")
    parser.add_argument("--projector_dim", type=int, default=2048, help="hidden width (default: 2048)")
    parser.add_argument("--batch_size", type=int, help="default: 256 on a GPU, 2 on the CPU")
    parser.add_argument("--repeats", type=int, default=20, help="rounds that count (default: 20)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them, at least 1 (default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    parser.add_argument("--threads", type=int, help="of the CPU; 1 is steadier where other work runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, with the time of each step")
    return parser


def load_train_script():
    """train_vrpo.py of this checkout as a module: its parser has the defaults that are measured."""
    path = Path(__file__).resolve().parents[1] / "train_vrpo.py"
    spec = importlib.util.spec_from_file_location("train_vrpo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------------------
# A step, as in train_vrpo.py


def build_arm(name: str, train_parser: argparse.ArgumentParser, settings, accelerator: Accelerator) -> SimpleNamespace:
    """Model, average, optimizer and alignment of one arm, as `main` of train_vrpo.py makes them."""
    options = ["--preset", settings.preset, "--projector_dim", str(settings.projector_dim)]
    args = train_parser.parse_args(ARMS[name] + options)
    aligned = args.objective != "none"
    torch.manual_seed(settings.seed)
    size = settings.latent_size
    embed_dims = [settings.embed_dim] if aligned else []
    model = build_transformer(args, read_start(args), (4, size, size), NUM_CLASSES, None, embed_dims)
    model.to(accelerator.device).train()
    ema = EMAModel(trainable_parameters(model), decay=args.ema_decay, min_decay=args.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(
        trainable_parameters(model),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )
    # Targets are given: of the encoders only their number is asked for.
    alignment = Alignment(args, model, [lambda images: None] if aligned else [], MAX_TRAIN_STEPS, accelerator.device)
    alignment.look_ahead(0)
    transformer = model
    model, optimizer = accelerator.prepare(model, optimizer)
    return SimpleNamespace(
        args=args,
        aligned=aligned,
        transformer=transformer,
        model=model,
        ema=ema,
        optimizer=optimizer,
        alignment=alignment,
        means=RunningMeans(),
        step=0,
    )


def draw_batch(settings, batch_size: int, num_tokens: int, generator: torch.Generator, device) -> dict:
    """What the loader, the autoencoder and the encoder would give for one step."""
    shape = (batch_size, 4, settings.latent_size, settings.latent_size)
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
    return {name: tensor.to(device) for name, tensor in batch.items()}


def train_step(arm: SimpleNamespace, batch: dict, accelerator: Accelerator):
    """One optimizer step, line by line the loop of train_vrpo.py for a model that predicts no variance."""
    args, alignment, transformer = arm.args, arm.alignment, arm.transformer
    aligning = alignment.active(arm.step)
    with accelerator.accumulate(arm.model):
        x_t, timestep, target, t = forward_process(batch["x0"], batch["noise"], batch["timestep"], transformer.config)
        inputs = (x_t, timestep, batch["class_labels"])
        prediction, projections = arm.model(
            *inputs,
            return_projections=aligning,
            alignment_fork=alignment.fork(t) if aligning else None,
            return_dict=False,
        )
        loss_fm = flow_matching_loss(prediction, target)
        loss = loss_fm.mean()
        arm.means.add(loss_fm=loss)
        if aligning:
            loss_rep, logs = alignment.loss(projections, [batch["targets"]], t, loss_fm, batch, arm.step, 0, inputs)
            loss = loss + args.alignment_coeff * loss_rep
            arm.means.add(**logs)
        accelerator.backward(loss)
        if aligning:
            alignment.observe()
        elif arm.aligned:
            release_projectors(transformer)
        arm.means.add(grad_norm=accelerator.clip_grad_norm_(arm.model.parameters(), args.max_grad_norm))
        arm.optimizer.step()
        arm.optimizer.zero_grad()
    arm.step += 1
    arm.ema.step(trainable_parameters(transformer))
    if aligning:
        alignment.update(arm.step)


# ----------------------------------------------------------------------------------------------------------------------
# Time


def measure_seconds(arms: dict, next_batch, accelerator: Accelerator, warmup: int, repeats: int, seed: int) -> dict:
    """Seconds of each arm's step, a number for every round that counts."""
    wait = torch.cuda.synchronize if accelerator.device.type == "cuda" else lambda: None
    order = random.Random(seed)
    seconds = {name: [] for name in arms}
    for round_number in range(warmup + repeats):
        batch = next_batch()
        for name in order.sample(list(arms), len(arms)):
            wait()
            start = time.perf_counter()
            train_step(arms[name], batch, accelerator)
            wait()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median over rounds of the ratio within a round, and its 95 % interval by bootstrap over rounds."""
    ratios = np.asarray(above) / np.asarray(below)
    draws = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def measure_memory(build, next_batch, accelerator: Accelerator, steps: int = 3) -> dict[str, int]:
    """Bytes of tensors that one arm, alone, has at rest between steps, and at most within its last step.

    On a GPU the allocator counts them. On the CPU the profiler does: unlike the peak resident size of a process it holds
    no libraries, no freed pages and no chance, so that small differences are seen; scratch space inside MKL is not in it.
    """

    def run_steps(arm, count):
        for _ in range(count):
            train_step(arm, next_batch(), accelerator)

    if accelerator.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        arm = build()
        run_steps(arm, steps - 1)
        torch.cuda.synchronize()
        rest = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        run_steps(arm, 1)
        torch.cuda.synchronize()
        result = {"rest": rest, "peak": torch.cuda.max_memory_allocated() - before}
    else:
        # The arm lives and dies inside the profile, or the profiler would see memory freed that it never saw taken.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            arm = build()
            run_steps(arm, steps - 1)
            with torch.profiler.record_function("measured_step"):
                run_steps(arm, 1)
            del arm
            accelerator.free_memory()
            gc.collect()
        result = read_memory_trace(profile)
    accelerator.free_memory()
    return result


def read_memory_trace(profile: torch.profiler.profile) -> dict[str, int]:
    """Bytes in use before and at most within the range `measured_step` of a finished profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    measured = next(e for e in events if e.get("name") == "measured_step" and e.get("ph") == "X")
    used, rest, peak = 0, 0, 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        used += event["args"]["Bytes"]
        if event["ts"] < measured["ts"]:
            rest = used
        elif event["ts"] <= measured["ts"] + measured["dur"]:
            peak = max(peak, used)
    return {"rest": rest, "peak": peak}


# ----------------------------------------------------------------------------------------------------------------------
# Report


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


def build_report(settings, batch_size: int, num_tokens: int, seconds: dict, memory: dict, device) -> dict:
    """All numbers, as the JSON file holds them."""

    def ratio(kind, above, below, most, value, low=None, high=None):
        return dict(what=kind, above=above, below=below, ratio=value, low=low, high=high, at_most=most)

    ratios = [ratio("time", a, b, most, *median_ratio(seconds[a], seconds[b])) for a, b, most in TIME_RATIOS]
    for a, b, most in MEMORY_RATIOS:
        ratios.append(ratio("peak memory", a, b, most, memory[a]["peak"] / memory[b]["peak"]))
    for a, b, _ in MEMORY_RATIOS:
        above_rest = {name: memory[name]["peak"] - memory[name]["rest"] for name in (a, b)}
        ratios.append(ratio("peak - rest", a, b, None, above_rest[a] / above_rest[b]))
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
        f"{s['projector_dim']}, batch {s['batch_size']}, {s['dtype']}, {s['repeats']} rounds\n"
    )
    print(f"{'arm':<14}{'s/step':>10}{'images/s':>10}{'rest MiB':>11}{'peak MiB':>11}{'peak - rest':>13}")
    for name, arm in report["arms"].items():
        rest, peak = arm["rest"] / 2**20, arm["peak"] / 2**20
        speed = s["batch_size"] / arm["median_seconds"]
        print(f"{name:<14}{arm['median_seconds']:>10.4f}{speed:>10.1f}{rest:>11.1f}{peak:>11.1f}{peak - rest:>13.1f}")
    print(f"\n{'ratio':<36}{'value':>9}{'95 % interval':>18}{'target':>9}")
    for r in report["ratios"]:
        label = f"{r['what']}, {r['above']} / {r['below']}"
        interval = "" if r["low"] is None else f"{r['low']:.4f} - {r['high']:.4f}"
        verdict = ""
        if r["at_most"] is not None:
            verdict = f"{'<=' if r['ratio'] <= r['at_most'] else 'NOT <='} {r['at_most']}"
        print(f"{label:<36}{r['ratio']:>9.4f}{interval:>18}{verdict:>13}")


def main(settings: argparse.Namespace):
    device_type = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = settings.batch_size or (256 if device_type == "cuda" else 2)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    mixed_precision = {"float32": "no", "bfloat16": "bf16"}[settings.dtype]
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device_type == "cpu")
    device = accelerator.device
    train_parser = load_train_script().build_parser()
    patch_size = read_start(train_parser.parse_args(["--preset", settings.preset])).config["patch_size"]
    num_tokens = (settings.latent_size // patch_size) ** 2
    generator = torch.Generator().manual_seed(settings.seed)

    def build(name):
        return build_arm(name, train_parser, settings, accelerator)

    def next_batch():
        return draw_batch(settings, batch_size, num_tokens, generator, device)

    memory = {name: measure_memory(lambda name=name: build(name), next_batch, accelerator) for name in ARMS}
    arms = {name: build(name) for name in ARMS}
    seconds = measure_seconds(arms, next_batch, accelerator, max(1, settings.warmup), settings.repeats, settings.seed)
    report = build_report(settings, batch_size, num_tokens, seconds, memory, device)
    print_report(report)
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(build_parser().parse_args())
