#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Write the cards of the ImageNet recipes beside this file, from the template and the recipes' own command lines.

python model_cards/render.py
"""

import importlib.util
import json
import shlex
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from diffusers_vrpo import SiTTransformer2DModel, sit_preset
from diffusers_vrpo.alignment.attach import alignment_layers
from diffusers_vrpo.hub.card import render_card
from diffusers_vrpo.training.throughput import forward_flops, num_tokens, projector_flops, training_flops


FOLDER = Path(__file__).parent
LAUNCH = "accelerate launch --multi_gpu --num_processes 8 train_vrpo.py"
COMMON = (
    "--dataset_name ILSVRC/imagenet-1k --resolution 256 --random_flip --vae stabilityai/sd-vae-ft-ema "
    "--encoder facebook/dinov2-base --objective vrpo --alignment_coeff 0.5 --reward_weighting inverse_variance "
    "--mixed_precision bf16 --train_batch_size 32"
)
# Name, preset and steps.
RECIPES = [
    ("sit-b-2-imagenet-256", "SiT-B/2", 400_000),
    ("sit-xl-2-imagenet-256", "SiT-XL/2", 4_000_000),
    ("dit-xl-2-imagenet-256", "DiT-XL/2", 4_000_000),
]
TESTED = {
    "SiT": "velocities and projections of this architecture agree with tensors of the official SiT and REPA code within "
    "1e-5 (`tests/unit/test_transformer.py`, if those tensors are available)",
    "DiT": "the predictions of this architecture agree with those of diffusers' `DiTTransformer2DModel` within 1e-5 at "
    "whole timesteps (`tests/unit/test_conversion.py`)",
}


def card(name: str, preset: str, steps: int) -> str:
    """The model card of a recipe that has not been run."""
    spec = importlib.util.spec_from_file_location("train_vrpo", FOLDER.parent / "train_vrpo.py")
    train_vrpo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_vrpo)
    options = f"{COMMON} --preset {preset} --max_train_steps {steps} --output_dir {name}"
    args = train_vrpo.parse_args(shlex.split(options))
    config = {**sit_preset(preset), "num_classes": 1000}
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in SiTTransformer2DModel(**config).parameters())
    words = f"{LAUNCH} {options}".split(" --")
    recipe = words[0] + "".join((" \\\n  --" if i % 4 == 3 else " --") + word for i, word in enumerate(words[1:]))
    layers = alignment_layers(args.layer_scope, config["num_layers"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    projectors = projector_flops(width, num_tokens(config), len(layers), [768], projector_dim=args.projector_dim)
    flops = training_flops(forward_flops(config) + projectors)
    measured = (
        f"Counted: {parameters / 1e6:.1f} M parameters, and {flops / 2e9:.0f} GMAC per training step and image, without encoder "
        "and autoencoder, which is three times the forward pass of transformer and projector (`training_flops` in "
        f"`training/throughput.py`). Tested: {TESTED[preset[:3]]}. "
        "Speed, loss curve and image quality of this recipe have not been measured."
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        given = {key: value for key, value in vars(args).items() if value is not None and key != "config"}
        (folder / "train_config.yaml").write_text(yaml.safe_dump(given))
        start = {"parameters": parameters, "global_batch_size": 256, "mixed_precision": "bf16", "num_processes": 8}
        start |= {"local": [], "max_train_steps": steps}
        (folder / "starts.jsonl").write_text(json.dumps(start | {"hardware": "GPU"}) + "\n")
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
        extra = {"recipe": recipe, "measured": measured, "example_label": "207", "hardware": []}
        return render_card(folder, f"diffusers-vrpo/{name}", license="other", **extra)


if __name__ == "__main__":
    for recipe in RECIPES:
        (FOLDER / f"{recipe[0]}.md").write_text(card(*recipe), encoding="utf-8")
        print(FOLDER / f"{recipe[0]}.md", file=sys.stderr)
