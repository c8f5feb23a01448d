#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure what a training step of each arm costs, in steps of the reference arm, and write it to `timing-SIZE.json`.

    python benchmarks/yardstick/timing.py cpu --arms none repa vrpo

Each round trains every arm for a few steps with train_vrpo.py itself, in random order in one process. The ratio in a round is the
arm's seconds per step divided by the reference's in the same round, and the result is the median over rounds. Whatever slows the
machine for minutes therefore slows both. The first steps of each burst do not count. Arms that are already timed with the same
options are skipped. Without a GPU, seconds are the processor time of the process on one core, which other processes hardly change.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import train_arm
from accelerate.state import AcceleratorState
from recipe import HERE, Recipe, aligned_flags, choose_arms, cost_flags, load_recipe, recorded_options, step_ratio
from subset import pack
from training_run import add_common_options, make_cache, resolve_folders, seconds_now, train_argv

from diffusers_vrpo.command_line import OneLineErrorParser, number_in
from diffusers_vrpo.config import In
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.files import write_atomically
from diffusers_vrpo.training.callbacks import TrainerCallback
from diffusers_vrpo.training.metrics import read_metrics
from diffusers_vrpo.training.throughput import hardware_name


def timing_file(recipe: Recipe, folder: Path = HERE) -> Path:
    return folder / f"timing-{recipe.name}.json"


def timed_options(recipe: Recipe) -> dict:
    """The options of a recipe on which the times depend."""
    options = {"classes": recipe.classes, "encoder": recipe.encoder, "reference": recipe.reference}
    return options | {"train": recorded_options(recipe)}


def read_timing(recipe: Recipe, folder: Path = HERE) -> dict:
    """Reads the timing file of a size; there are no times if it does not exist yet.

    Raises:
        InputError: if its times are of other options.
    """
    path = timing_file(recipe, folder)
    found = {"file": path.name, "arms": []}
    if path.exists():
        found |= json.loads(path.read_text())
        if found["options"] != timed_options(recipe):
            raise InputError(
                None, f"{path.name} is of other options than {recipe.name}; run `timing.py {recipe.name} --again`"
            )
    return found


@contextlib.contextmanager
def one_core():
    """Without a GPU, limits the process to one core, as run.py does by default; train_vrpo.py would use all cores."""
    if torch.cuda.is_available() or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


class Clock(TrainerCallback):
    """Records the time after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, trainer):
        self.after[trainer.step] = seconds_now()


def burst(recipe: Recipe, arm: dict, work: Path, steps: int, skipped: int) -> float:
    """Trains for a few steps; returns the seconds per step, without the first `skipped` steps."""
    folder = work / "timing"
    shutil.rmtree(folder, ignore_errors=True)
    plan = {"steps": skipped + steps, "alignment_stop_step": None}
    few = {
        "logging_steps": skipped,
        "validation_steps": 10**6,
        "checkpointing_steps": 10**6,
        "num_validation_images": 1,
        "validation_labels": ["0"],
        "num_inference_steps": 1,
        "fd_encoder": None,
        "num_fd_samples": None,
        "oracle": None,
    }
    if arm["objective"] == "rare" or arm.get("release") == "plateau":
        few["release"] = "none"  # otherwise so short a run could end alignment, whose cost is measured
    AcceleratorState._reset_state(reset_partial_state=True)
    clock = Clock()
    train_arm.main(train_argv(recipe, arm, plan, 0, work, folder, few), [clock])
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train_seconds" in row]
    shutil.rmtree(folder)
    if rows[-1].get("alignment_coeff") == 0:
        raise InputError(
            None, f"--steps {steps}: the gate closed within so few, and steps became cheaper; take another number"
        )
    return (clock.after[skipped + steps] - clock.after[skipped]) / steps


def measure(recipe: Recipe, arms: dict[str, dict], work: Path, rounds: int, steps: int, skipped: int) -> dict:
    """Measures the seconds per step of each arm, one number for every round.

    Raises:
        InputError: if a run cannot work.
    """
    order, seconds = random.Random(0), {name: [] for name in arms}
    for round_ in range(rounds):
        for name in order.sample(list(arms), len(arms)):
            seconds[name].append(burst(recipe, aligned_flags(arms[name]), work, steps, skipped))
            print(f"round {round_ + 1} of {rounds}: {name} {seconds[name][-1]:.4f} s a step", flush=True)
    return seconds


def summarize(recipe: Recipe, arms: dict[str, dict], seconds: dict[str, list[float]], old: dict) -> dict:
    """The content of the timing file: the old times, and the new medians over rounds of the ratio within a round."""
    reference = np.array(seconds[recipe.reference])
    first = {
        "options": timed_options(recipe),
        "reference_seconds": float(np.median(reference)),
        "hardware": hardware_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "torch": torch.__version__,
    }
    known = list(old["arms"])
    for name, values in seconds.items():
        if step_ratio(arms[name], {"arms": known}) is None:
            ratio = float(np.median(np.array(values) / reference))
            known.append({"name": name, "flags": cost_flags(arms[name]), "ratio": ratio, "seconds": values})
    # Old times are kept, so that later runs have the same number of steps.
    return first | old | {"arms": known}


def time_arms(args: argparse.Namespace, recipe: Recipe, names: list[str] | None):
    """Times the arms `names` (None means all) that are not timed yet, and writes the file.

    Args:
        args: the options, from `build_parser`.
    """
    work, old = args.work / recipe.name, {"arms": []} if args.again else read_timing(recipe, args.results)
    arms = {}
    for name, arm in choose_arms(names, recipe).items():
        if step_ratio(arm, {"arms": old["arms"]}) is None and cost_flags(arm) not in map(cost_flags, arms.values()):
            arms[name] = arm
    if not arms:
        print(f"{timing_file(recipe, args.results)} has all of them")
        return
    # The reference always takes part, under its own name.
    reference = choose_arms([recipe.reference], recipe)
    arms = reference | {n: a for n, a in arms.items() if cost_flags(a) != cost_flags(reference[recipe.reference])}
    pack(recipe, args.shared, work / "packed")
    gpu = torch.cuda.is_available()
    steps, skipped = args.steps or (30 if gpu else 8), args.skipped or (20 if gpu else 3)
    with one_core():
        old.setdefault("features_seconds", make_cache(recipe, work))
        seconds = measure(recipe, arms, work, args.rounds, steps, skipped)
        found = summarize(recipe, arms, seconds, old)
    found.pop("file", None)
    write_atomically(timing_file(recipe, args.results), (json.dumps(found, indent=1) + "\n").encode())
    for timed in found["arms"]:
        print(f"{timed['name']}: {timed['ratio']:.3f} of a step of {recipe.reference}")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineErrorParser(
        prog="timing.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument(
        "--rounds", type=number_in(In(1)), default=5, help="number of bursts of every arm (default: 5)"
    )
    parser.add_argument(
        "--steps", type=number_in(In(1)), help="steps of a burst that count (default: 8, or 30 on a GPU)"
    )
    parser.add_argument(
        "--skipped",
        type=number_in(In(1)),
        help="steps of a burst before those that count (default: 3, or 20 on a GPU)",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="also time arms that are already timed, which changes their number of steps",
    )
    return parser


def main(argv: list[str] | None = None):
    parser = build_parser()
    args = parser.parse_args(argv)
    resolve_folders(args)
    time_arms(args, load_recipe(args.size), args.arms)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"timing.py: error: {error}")
