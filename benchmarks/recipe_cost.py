#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Estimate what a training recipe will cost: FLOPs counted from the model's shapes, and hours at an assumed speed.

    python benchmarks/recipe_cost.py configs/imagenet256/*.yaml --peak_tflops 989 --mfu 0.4

FLOPs are those of transformer, projectors and DINOv2-B at 256 tokens, as in the training log (docs/speed.md), for a batch of
256 latents of 32x32; the autoencoder and the optimizer are not in them. Hours are of one device, and as good as `--mfu`,
which is assumed.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from diffusers_vrpo.alignment.attach import AlignedTransformer, alignment_layers
from diffusers_vrpo.command_line import OneLineErrorParser, number_in
from diffusers_vrpo.config import In
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel, sit_preset
from diffusers_vrpo.training.throughput import step_flops


GLOBAL_BATCH_SIZE = 256
ENCODER = "facebook/dinov2-base"


def dinov2_base_flops() -> int:
    """FLOPs of one image of 224 pixels through DINOv2-B, without its weights."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = Dinov2Model(Dinov2Config(image_size=224, attn_implementation="sdpa"))
        model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops()


def recipe_cost(path: Path, encoder_flops: int) -> dict[str, float]:
    """Parameters, those of the projectors, FLOPs of an image and of the whole training.

    Raises:
        InputError: if the file is not a recipe with a preset.
    """
    try:
        options = yaml.safe_load(path.read_text())
        config, steps = sit_preset(options["preset"]), options.get("max_train_steps", 400_000)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(None, f"{path} is not a recipe with a preset ({error})") from error
    if (
        options.get("encoder", ENCODER) != ENCODER
        or options.get("resolution", 256) != 256
        or options.get("vae") == "none"
    ):
        raise InputError(None, f"{path} is not of {ENCODER} and 32x32 latents, which the cost is counted for")
    aligned = options.get("objective", "vrpo") != "none"
    with torch.device("meta"):
        transformer = SiTTransformer2DModel(**config)
        blocks = alignment_layers(str(options.get("layer_scope", "early")), config["num_layers"])
        encoders = [SimpleNamespace(embed_dim=768)] if aligned else []
        model = AlignedTransformer(transformer, blocks, encoders, projector_dim=options.get("projector_dim", 2048))
    plain, with_projectors = step_flops(model)
    flops = with_projectors + encoder_flops if aligned else plain
    return {
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "projectors": sum(p.numel() for p in model.projectors.parameters()),
        "flops": flops,
        "total": flops * GLOBAL_BATCH_SIZE * steps,
    }


def main(argv: list[str] | None = None):
    parser = OneLineErrorParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = In(0, exclusive=True)
    parser.add_argument("recipes", nargs="+", type=Path, help="YAML files for train_vrpo.py --config")
    parser.add_argument(
        "--peak_tflops",
        type=number_in(positive, float),
        default=989.0,
        help="peak TFLOP/s of a device (default: 989, that of an H100 or H200 in bf16)",
    )
    parser.add_argument(
        "--mfu",
        type=number_in(positive, float),
        default=0.4,
        help="share of the peak that training is assumed to reach (default: 0.4)",
    )
    args = parser.parse_args(argv)
    encoder = dinov2_base_flops()
    print("| recipe | parameters, projectors (M) | GFLOPs an image | training (FLOPs) | device hours |")
    print("|---|---|---|---|---|")
    for path in args.recipes:
        cost = recipe_cost(path, encoder)
        hours = cost["total"] / (args.peak_tflops * 1e12 * args.mfu) / 3600
        sizes = f"{cost['parameters'] / 1e6:.0f}, {cost['projectors'] / 1e6:.1f}"
        print(f"| {path.stem} | {sizes} | {cost['flops'] / 1e9:.0f} | {cost['total']:.2g} | {hours:.0f} |")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"recipe_cost.py: error: {error}")
