# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The training script as a module, short runs of it on digits, and what they leave."""

import contextlib
import importlib.util
import json
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_vrpo import trainer as trainer_module
from diffusers_vrpo.training.metrics import read_metrics
from support.paths import TRAINING_SCRIPT


TINY_DIGITS = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}

spec = importlib.util.spec_from_file_location("train_vrpo", TRAINING_SCRIPT)
train_vrpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_vrpo)


def options_in(folder: Path):
    """Gives the options of a short run on digits in a folder; keyword arguments change them, None removes."""
    model_config = folder / "model.json"
    model_config.write_text(json.dumps(TINY_DIGITS))
    defaults = {
        "output_dir": folder / "run",
        "dataset_name": "digits",
        "resolution": 8,
        "vae": "none",
        "model_config": model_config,
        "objective": "vrpo",
        "encoder": "digits",
        "projector_dim": 32,
        "train_batch_size": 16,
        "max_train_steps": 4,
        "learning_rate": 0.01,
        "ema_decay": 0.5,
        "logging_steps": 1,
        "checkpointing_steps": 10000,
        "checkpoints_total_limit": 0,
        "validation_steps": 10000,
        "num_inference_steps": 2,
        "num_validation_images": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }

    def options(**changes) -> list[str]:
        merged = {**defaults, **changes}
        return [part for name, value in merged.items() if value is not None for part in (f"--{name}", str(value))]

    return options


def no_curves(metrics_file, output_file, title: str = ""):
    """Takes the place of `plot_metrics`, which takes most of a short run's time: writes one pixel."""
    Image.new("L", (1, 1)).save(output_file)


def run(options: list[str], curves: bool = False):
    """Trains in this process; the curves are one pixel unless asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.nullcontext() if curves else patch.object(trainer_module, "plot_metrics", no_curves):
        train_vrpo.main(train_vrpo.parse_args(options))


def losses(folder) -> list[float]:
    """The logged flow-matching losses of a run."""
    return [row["loss_fm"] for row in read_metrics(Path(folder) / "metrics.jsonl")]


def assert_same_files(a: Path, b: Path, names: list[str]):
    """The files of both folders have the same tensors, bit by bit."""
    for name in names:
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key}"


def projectors_of(checkpoint: Path, suffix: str = "") -> tuple[dict, dict]:
    """What describes the projectors of a checkpoint, and their weights."""
    file = Path(checkpoint) / f"projectors{suffix}.safetensors"
    with safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["description"])
    return description, load_file(file)


def aligned_weights(checkpoint: Path) -> dict:
    """The weights of a checkpoint, by the names of `AlignedTransformer`."""
    weights = load_file(Path(checkpoint) / "transformer" / "diffusion_pytorch_model.safetensors")
    projectors = projectors_of(checkpoint)[1]
    return {
        **{f"transformer.{name}": tensor for name, tensor in weights.items()},
        **{f"projectors.{name}": tensor for name, tensor in projectors.items()},
    }
