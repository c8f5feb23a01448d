# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The command line of one training run, the cache that all runs of a size share, and options of all commands here."""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import time
from functools import cache
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from recipe import HERE, Recipe, in_full
from subset import packed

from diffusers_vrpo.commands import prepare as prepare_latents
from diffusers_vrpo.files import write_atomically
from diffusers_vrpo.models.start import read_start


ROOT = HERE.parents[1]
TRAIN_SCRIPT = ROOT / "train_vrpo.py"
ARM_SCRIPT = HERE / "train_arm.py"
LOG = "train.log"  # of a run; a training accepts a folder that holds files of that kind
ONE_STEP = {"steps": 1, "alignment_stop_step": None}


@cache
def train_script():
    """train_vrpo.py as a module."""
    spec = importlib.util.spec_from_file_location("train_vrpo", TRAIN_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_argv(options: dict) -> list[str]:
    """`{name: value}` as a command line: lists as many words, true as a flag, false as `--no-flag`, None not at all."""
    argv = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={value}")
    return argv


def train_argv(
    recipe: Recipe, arm: dict, plan: dict, seed: int, work: Path, output_dir: Path, more: dict | None = None
) -> list[str]:
    """Options of train_arm.py, which are those of train_vrpo.py and a few more, for a run.

    Args:
        arm: its options, without `stop`.
        plan: `steps` and `alignment_stop_step`.
        more: options that replace others.
    """
    every = math.ceil(plan["steps"] / recipe.evaluations)
    options = {
        "latents_dir": str(work / "cache"),
        "encoder": packed(work / "packed", recipe.encoder),
        "fd_encoder": packed(work / "packed", recipe.judge),
        "num_fd_samples": recipe.curve_samples,
        "max_train_steps": plan["steps"],
        "alignment_stop_step": plan["alignment_stop_step"],
        "validation_steps": every,
        "checkpointing_steps": every,
        "checkpoints_total_limit": 1,
        "report_to": "none",
        "seed": seed,
        "output_dir": str(output_dir),
    }
    if arm.get("scaffold_fraction") == 1:
        options["oracle"] = json.dumps({"recipe": dataclasses.asdict(recipe), "work": str(work)})
    options |= recipe.train | in_full(arm) | (more or {})
    options.pop("from_base", None)
    if isinstance(options.get("gradient_scale"), dict):
        options["gradient_scale"] = json.dumps(options["gradient_scale"])
    if "image_reward_encoder" in options:
        options["image_reward_encoder"] = packed(work / "packed", options["image_reward_encoder"])
    if options["objective"] in ("none", "repi"):  # the script refuses what it would not use
        options.pop("layer_scope", None)
    return to_argv(options)


def seconds_now() -> float:
    """A clock whose differences are costs: the processor's time of this process without a GPU, else the wall's.

    Processes that share the cores stretch the wall's time, and hardly the processor's.
    """
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def make_cache(recipe: Recipe, work: Path) -> float:
    """Pixels and encoder features of the training images, in `work/cache`; once for all runs.

    Returns:
        the seconds that it took when it was made: decoding, the encoder, writing.

    Raises:
        InputError: where the recipe's options cannot work.
    """
    done, start = work / "cache_seconds.json", seconds_now()
    if done.exists():
        return json.loads(done.read_text())
    args = train_script().parse_args(train_argv(recipe, {"objective": "none"}, ONE_STEP, 0, work, work))
    options = {
        "dataset_name": str(work / "packed" / "data"),
        "vae": "none",
        "resolution": args.resolution,
        "patch_size": read_start(args).config["patch_size"],
        "encoder": packed(work / "packed", recipe.encoder),
        "encoder_layer": args.encoder_layer,
        "flip": args.random_flip or None,
        "output_dir": str(work / "cache"),
        "dataloader_num_workers": args.dataloader_num_workers,
    }
    prepare_latents.prepare(prepare_latents.parse_args(to_argv(options)))
    seconds = seconds_now() - start
    write_atomically(done, json.dumps(seconds).encode())
    return seconds


def make_moments(recipe: Recipe, work: Path) -> Path:
    """The moments of the training images behind the curve's Fréchet distance, as a run leaves them; once for all runs."""
    file, folder = work / "fd_reference.safetensors", work / "first_step"
    if not file.exists():
        few = {"num_fd_samples": 2, "num_inference_steps": 1, "num_validation_images": 1}
        argv = train_argv(recipe, {"objective": "none"}, ONE_STEP, 0, work, folder, few)
        AcceleratorState._reset_state(reset_partial_state=True)
        train_script().main(train_script().parse_args(argv))
        (folder / file.name).replace(file)
        shutil.rmtree(folder)
    return file


def add_common_options(parser: argparse.ArgumentParser):
    parser.add_argument("size", help="cpu, gpu, or a YAML file such as cpu.yaml")
    parser.add_argument("--arms", nargs="+", help="of arms.yaml (default: all)")
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path(os.environ.get("VRPO_SHARED", ROOT.parent / "shared")),
        help="folder with the data and encoders that a recipe names (default: VRPO_SHARED, or ../shared)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "outputs" / "yardstick",
        help="caches and runs (default: outputs/yardstick)",
    )
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results and timing (default: this one)")


def resolve_folders(args: argparse.Namespace):
    """Makes the folders of the options of `add_common_options` absolute."""
    args.work, args.results = args.work.resolve(), args.results.resolve()
    args.shared = args.shared.resolve()
