#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure what an update of the generative policy costs, in forward passes of the transformer per generated image.

    python benchmarks/generative_cost.py --preset SiT-S/4 --threads 1 --clock cpu
    python benchmarks/generative_cost.py --preset SiT-B/2 --device cuda --mixed_precision bf16 --batch_size 256 --rollout_classes 32

An update is a rollout with its encoding, rewards and gradient, and the forward and backward passes of the real images that belong
to it, as the callback `GenerativePolicy` and `VRPOTrainer.compute_loss` compute them. It is compared with
    rollout_steps + encoder + 3 N_MC + 3 (real images per generated image)   (+ N_MC with the anchor)
by counted FLOPs (matrix products, convolutions, attention), which shows whether anything is computed twice, and by time: the time
of an update divided by that of a forward pass of the same batch without gradients, in turn within a round, as medians over rounds.
Weights of the transformer and of the DINOv2-sized encoder are random, and images are noise. Autoencoder and optimizer are not
included.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from objective_overhead import hardware_name
from PIL import Image as PILImage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from diffusers_vrpo.command_line import add_options
from diffusers_vrpo.config import GenerativeConfig, VRPOConfig, options_of
from diffusers_vrpo.experimental.generative.callback import GenerativePolicy
from diffusers_vrpo.experimental.generative.objective import update_cost
from diffusers_vrpo.trainer import VRPOTrainer
from diffusers_vrpo.training.throughput import forward_flops


NUM_CLASSES = 10


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="SiT-S/4", help="size of the model, as in train_vrpo.py (default: SiT-S/4)"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        default=64,
        help="side in pixels of the images, on which the model works (default: 64)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, dest="train_batch_size", help="real images in a batch (default: 8)"
    )
    parser.add_argument(
        "--encoder_width", type=int, default=384, help="width of the DINOv2; 384 is S, 768 is B (default: 384)"
    )
    parser.add_argument(
        "--encoder_pixels",
        type=int,
        default=112,
        help="side in pixels of the images that the encoder sees (default: 112)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="device to measure (default: cuda if a GPU is available, otherwise cpu)",
    )
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument(
        "--threads", type=int, help="CPU threads; 1 gives steadier times on a busy machine (default: torch's)"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="measure wall time or, with cpu, processor time of the process (default: wall)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    add_options(parser, GenerativeConfig, options_of(GenerativeConfig))
    # The defaults are small, so that a CPU is fast enough.
    parser.set_defaults(rollout_classes=2, rollout_group_size=4, rollout_steps=10, rollout_every=1)
    return parser


def build_trainer(args, folder: Path) -> tuple[VRPOTrainer, GenerativePolicy]:
    """The trainer of a run on noise, and its callback."""
    options = dict(image_size=args.encoder_pixels, patch_size=14, hidden_size=args.encoder_width)
    options |= dict(num_hidden_layers=12, num_attention_heads=args.encoder_width // 64)
    Dinov2Model(Dinov2Config(**options)).save_pretrained(folder / "encoder")
    size = {"height": args.encoder_pixels, "width": args.encoder_pixels}
    processor = {
        "do_resize": True,
        "size": size,
        "do_center_crop": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(processor))
    random_pixels = np.random.default_rng(0)
    images = [
        PILImage.fromarray(random_pixels.integers(0, 256, (args.resolution,) * 2 + (3,), np.uint8)) for _ in range(64)
    ]
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=NUM_CLASSES)})
    columns = {"image": images, "label": [i % NUM_CLASSES for i in range(64)]}
    data = Dataset.from_dict(columns, features=features)

    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    generative = {name: getattr(args, name) for name in options_of(GenerativeConfig)}
    generative |= {"generative_policy_start_step": 0, "reward_encoder": str(folder / "encoder")}
    # Checkpoints and the end, which are never reached, must be at whole rollouts.
    steps = args.rollout_every * 10**6
    config = VRPOConfig(
        objective="none",
        preset=args.preset,
        vae="none",
        resolution=args.resolution,
        train_batch_size=args.train_batch_size,
        mixed_precision=args.mixed_precision,
        use_ema=False,
        max_train_steps=steps,
        checkpointing_steps=steps,
        report_to="none",
        output_dir=str(folder / "run"),
        **generative,
    )
    policy = GenerativePolicy(config)
    threads = torch.get_num_threads()
    trainer = VRPOTrainer(args=config, train_dataset=data, callbacks=[policy])
    torch.set_num_threads(threads)  # on a CPU a trainer takes all cores
    torch.nn.init.normal_(trainer.transformer.proj_out.weight, std=0.02)  # else every sample would be its noise
    trainer.objective.resume(0)
    return trainer, policy


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as temporary:
        trainer, policy = build_trainer(args, Path(temporary))
        accelerator, model = trainer.accelerator, trainer.transformer
        forward = forward_flops(model.config)
        device, count = accelerator.device, args.train_batch_size
        x0, noise = torch.randn(2, count, *policy.shape, device=device)
        labels, u = torch.zeros(count, dtype=torch.long, device=device), torch.rand(count, device=device)
        batch = {"pixels": x0, "noise": noise, "timestep": u, "class_labels": labels, "index": torch.arange(count)}
        trainer.model.train()

        def look():
            with torch.no_grad(), accelerator.autocast():
                model(x0, u, labels, return_dict=False)

        def real_step():
            trainer.model.zero_grad()
            accelerator.backward(trainer.compute_loss(batch))

        def update(number: int):
            for _ in range(args.rollout_every):
                real_step()
            for epoch in range(args.rollout_epochs):
                policy.add_gradient(number * args.rollout_every + epoch, None)

        def seconds(action, *arguments) -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            action(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return clock() - start

        encoder = torch.zeros(1, 3, *policy.encoder.input_size, dtype=torch.uint8, device=device)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            policy.encoder(encoder)
        encoder_cost = counter.get_total_flops() / forward
        real = args.rollout_every * count / policy.num_samples
        formula = update_cost(
            args.rollout_steps, encoder_cost, args.mc_samples, real, policy.anchor_coeff > 0, args.rollout_epochs
        )
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            update(0)
        counted = counter.get_total_flops() / forward / policy.num_samples

        looks, updates, order = [], [], random.Random(0)
        seconds(look)
        for number in range(1, args.rounds + 1):
            kinds = order.sample(["look", "update"], 2)
            timed = {kind: seconds(look) if kind == "look" else seconds(update, number) for kind in kinds}
            looks.append(timed["look"] / count)
            updates.append(timed["update"] / policy.num_samples)
        timed = statistics.median(update / look for update, look in zip(updates, looks))
        result = {
            "hardware": hardware_name(device),
            "preset": args.preset,
            "samples": policy.num_samples,
            "encoder": encoder_cost,
            "formula": formula,
            "flops": counted,
            "time": timed,
            "times": [update / look for update, look in zip(updates, looks)],
            "forward_seconds": statistics.median(looks),
        }
        trainer.close()
    print(
        f"{result['hardware']}, {args.preset}, {policy.num_samples} samples, {args.mixed_precision}: formula {formula:.1f} forward "
        f"passes a sample (encoder {encoder_cost:.2f}, real images {3 * real:.1f}); FLOPs {counted:.1f}, that is {counted / formula:.3f} of "
        f"it; time {timed:.1f}, {timed / formula:.3f} of it (rounds {min(result['times']) / formula:.3f} to "
        f"{max(result['times']) / formula:.3f})"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
