#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""train_vrpo.py with the callbacks of the yardsticks: `--fork_from CHECKPOINT`, `--gradient_scale JSON`, `--oracle JSON`."""

import argparse
import json
import sys
from pathlib import Path

from fork import Fork
from gradient_scale import GradientScale
from oracle import OracleSamples
from recipe import Recipe
from training_run import train_script

from diffusers_vrpo.command_line import one_line_errors
from diffusers_vrpo.training.callbacks import TrainerCallback


def split_argv(argv: list[str]) -> tuple[list[str], list]:
    """Splits a command line into the options of train_vrpo.py and the callbacks for the other options."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--fork_from", type=Path)
    own.add_argument("--gradient_scale", type=json.loads)
    own.add_argument("--oracle", type=json.loads)
    found, rest = own.parse_known_args(argv)
    callbacks = [Fork(found.fork_from)] if found.fork_from else []
    callbacks += [GradientScale(**found.gradient_scale)] if found.gradient_scale else []
    if found.oracle:
        callbacks.append(OracleSamples(Recipe(**found.oracle["recipe"]), Path(found.oracle["work"])))
    return rest, callbacks


def main(argv: list[str], more_callbacks: list[TrainerCallback] = ()):
    rest, callbacks = split_argv(argv)
    script = train_script()
    script.main(script.parse_args(rest), [*callbacks, *more_callbacks])


if __name__ == "__main__":
    with one_line_errors(train_script().build_parser()):
        main(sys.argv[1:])
