# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The command line of a training run, the cache that all runs of a size share, and the options that all commands share."""

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
LOG = "train.log"  # the log of a run; training accepts an output folder that has such a file
ONE_STEP = {"steps": 1, "alignment_stop_step": None}


@cache
def train_script():
    """Imports train_vrpo.py as a module."""
    spec = importlib.util.spec_from_file_location("train_vrpo", TRAIN_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_argv(options: dict) -> list[str]:
    """Converts `{name: value}` to a command line: a list to several words, True to `--flag`, False to `--no-flag`.

    Options with the value None are omitted.
    """
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
    """The command line of train_arm.py, which has the options of train_vrpo.py and a few more, for a run.

    Args:
        arm: the options of the arm, without `stop`.
        plan: `steps` and `alignment_stop_step` of the arm.
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
    """A clock whose differences are costs: without a GPU the processor time of this process, with a GPU the wall time.

    Other processes on the same cores stretch the wall time, but hardly the processor time.
    """
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def make_cache(recipe: Recipe, work: Path) -> float:
    """Writes pixels and encoder features of the training images to `work/cache`, once for all runs.

    Returns:
        the seconds that decoding, encoding and writing took when the cache was made.

    Raises:
        InputError: if the recipe's options cannot work.
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
    """Computes the moments of the training images for the curve's Fréchet distance, in the file of a run, once for all runs."""
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
    parser.add_argument("--arms", nargs="+", help="arms of arms.yaml to use (default: all)")
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path(os.environ.get("VRPO_SHARED", ROOT.parent / "shared")),
        help="folder with the data and encoders that the recipe names (default: the environment variable VRPO_SHARED, or ../shared)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "outputs" / "yardstick",
        help="folder of caches and runs (default: outputs/yardstick)",
    )
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results and timing (default: this one)")


def resolve_folders(args: argparse.Namespace):
    """Makes the folders of the options of `add_common_options` absolute."""
    args.work, args.results = args.work.resolve(), args.results.resolve()
    args.shared = args.shared.resolve()
