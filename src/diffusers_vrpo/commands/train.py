# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Train a class-conditional diffusion transformer (SiT, DiT) with representation alignment.

    vrpo train --config digits
    vrpo train --preset SiT-B/2 --dataset_name ILSVRC/imagenet-1k --resolution 256 --vae stabilityai/sd-vae-ft-ema \
        --encoder facebook/dinov2-base --objective vrpo --output_dir sit-b-vrpo
    vrpo train --num_processes 8 -- --config sit-b-2-repa           (options of `accelerate launch` before the --)

`--objective none` is plain flow matching, `repa` adds REPA's cosine loss, and `vrpo` replaces that loss by group-relative
rewards for the projected tokens. Running the same command again continues the run.
"""

import argparse
import os
import sys
from collections.abc import Iterable

from ..command_line import is_configured, one_line_errors, parse_config, training_parser
from ..config import VRPOConfig
from ..errors import TrainingInterrupted


def build_parser(prog: str = "vrpo train") -> argparse.ArgumentParser:
    return training_parser(prog=prog, description=__doc__)


def parse_args(argv: list[str] | None = None, prog: str = "vrpo train") -> VRPOConfig:
    return parse_config(build_parser(prog), argv)


def train(args: VRPOConfig, callbacks: Iterable = ()):
    """Trains, or continues from the newest checkpoint in `output_dir`, and writes the result.

    Args:
        callbacks: `TrainerCallback`s of the caller, in addition to those that the options require.

    Raises:
        InputError: if options, data or checkpoints cannot work.
        TrainingStopped: if the run cannot continue.
        SystemExit: after a signal, once a checkpoint has been saved; the code is 128 + its number (143 or 130).
    """
    # Imported after the options are read, because torch and diffusers take several seconds to import.
    from ..trainer import VRPOTrainer

    callbacks = list(callbacks)
    if args.generative_policy_start_step is not None:
        from ..experimental.generative.callback import GenerativePolicy

        callbacks.append(GenerativePolicy(args))

    with VRPOTrainer(args=args, callbacks=callbacks) as trainer:
        try:
            trainer.train()
        except TrainingInterrupted as interrupted:
            sys.exit(128 + interrupted.signum)
        trainer.save_model()
        if args.push_to_hub:
            trainer.push_to_hub()


def launcher_options() -> list[str] | None:
    """The options for `accelerate launch` to train on all devices of this machine; None if this process suffices.

    If `accelerate config` was run on this machine, there are no options, and its configuration applies.
    """
    if "WORLD_SIZE" in os.environ:  # a launcher has started this process
        return None

    if is_configured():
        return []

    import torch

    devices = torch.accelerator.device_count()
    return ["--multi_gpu", "--num_processes", str(devices)] if devices > 1 else None


def main(argv: list[str] | None = None, prog: str = "vrpo train"):
    """Runs the command; `prog` is its name in errors."""
    args = parse_args(argv, prog)
    with one_line_errors(build_parser(prog)):
        train(args)


if __name__ == "__main__":
    main()
