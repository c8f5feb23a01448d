#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure what a training step of each arm costs, in steps of the reference arm, and write it to `timing-SIZE.json`.

    python benchmarks/yardstick/timing.py cpu --arms none repa vrpo

Each round trains every arm for a few steps by train_vrpo.py itself, in random order in one process; a round's ratio is that
arm's seconds a step over the reference's in the same round, and the median over rounds is kept. So what slows the machine
for minutes slows both. The first steps of a burst are left out. Arms that have a time, and the same options, are kept.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from recipe import HERE, Recipe, aligned_flags, choose_arms, load_recipe
from subset import pack
from training_run import add_common_options, check_common, make_cache, train_argv, train_script

from diffusers_vrpo.arguments import OneLineErrorParser
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.files import write_atomically
from diffusers_vrpo.throughput import hardware_name
from diffusers_vrpo.training import read_metrics


def timing_file(recipe: Recipe, folder: Path = HERE) -> Path:
    return folder / f"timing-{recipe.name}.json"


def read_timing(recipe: Recipe, folder: Path = HERE) -> dict:
    """The file of a size; one without any time where there is none yet."""
    path = timing_file(recipe, folder)
    found = json.loads(path.read_text()) if path.exists() else {"ratios": {}, "arms": {}}
    return found | {"file": path.name}


def burst(recipe: Recipe, arm: dict, work: Path, steps: int, skipped: int) -> float:
    """Seconds a step, without the first `skipped` steps."""
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
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    script = train_script()
    script.main(script.parse_args(train_argv(recipe, arm, plan, 0, work, folder, few)))
    seconds = {
        row["step"]: row["train_seconds"] for row in read_metrics(folder / "metrics.jsonl") if "train_seconds" in row
    }
    shutil.rmtree(folder)
    return (seconds[skipped + steps] - seconds[skipped]) / steps


def measure(recipe: Recipe, arms: dict[str, dict], work: Path, rounds: int, steps: int, skipped: int) -> dict:
    """Seconds a step of each arm, a number for every round.

    Raises:
        InputError: where a run cannot work.
    """
    order, seconds = random.Random(0), {name: [] for name in arms}
    for round_ in range(rounds):
        for name in order.sample(list(arms), len(arms)):
            seconds[name].append(burst(recipe, aligned_flags(arms[name]), work, steps, skipped))
            print(f"round {round_ + 1} of {rounds}: {name} {seconds[name][-1]:.4f} s a step", flush=True)
    return seconds


def summarize(recipe: Recipe, arms: dict[str, dict], seconds: dict[str, list[float]], old: dict) -> dict:
    """The content of the file: medians over rounds of the ratio within a round, and what was there before."""
    reference = np.array(seconds[recipe.reference])
    ratios = {name: float(np.median(np.array(values) / reference)) for name, values in seconds.items()}
    spans = {name: [min(values), max(values)] for name, values in seconds.items()}
    first = "reference_seconds" not in old
    return {
        "reference": recipe.reference,
        # Nominal: of the first measurement, so that results of later ones go on with the same steps.
        "reference_seconds": float(np.median(reference)) if first else old["reference_seconds"],
        "features_seconds": old["features_seconds"],
        "hardware": hardware_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if first
        else old["hardware"],
        "torch": torch.__version__ if first else old["torch"],
        "ratios": ratios | old["ratios"],
        "arms": {name: aligned_flags(arms[name]) for name in ratios} | old["arms"],
        "seconds": spans | old.get("seconds", {}),
    }


def main(argv: list[str] | None = None):
    parser = OneLineErrorParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="bursts of every arm (default: 5)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a burst that count (default: 8)")
    parser.add_argument("--skipped", type=int, default=3, help="steps of a burst before these (default: 3)")
    parser.add_argument("--again", action="store_true", help="also the arms that have a time: their steps will change")
    args = parser.parse_args(argv)
    check_common(parser, args, "rounds steps skipped")
    recipe = load_recipe(args.size)
    work, old = args.work / recipe.name, read_timing(recipe, args.results)
    arms = choose_arms(args.arms, recipe)
    known = {} if args.again else old["arms"]
    arms = {name: arm for name, arm in arms.items() if known.get(name) != aligned_flags(arm)}
    if not arms:
        print(f"{timing_file(recipe, args.results)} has all of them")
        return
    arms = choose_arms([recipe.reference], recipe) | arms
    pack(recipe, args.shared, work / "packed")
    if args.again:
        old = {"ratios": {}, "arms": {}}
    features_seconds = make_cache(recipe, work)
    old.setdefault("features_seconds", features_seconds)
    seconds = measure(recipe, arms, work, args.rounds, args.steps, args.skipped)
    changed = {name for name in seconds if name not in known}
    old["ratios"] = {name: ratio for name, ratio in old["ratios"].items() if name not in changed}
    old["arms"] = {name: arm for name, arm in old["arms"].items() if name not in changed}
    found = summarize(recipe, arms, seconds, old)
    write_atomically(timing_file(recipe, args.results), (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found["ratios"], indent=1))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"timing.py: error: {error}")
