#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Train a class-conditional diffusion transformer (SiT, DiT) with representation alignment.

    accelerate launch train_vrpo.py --config configs/digits.yaml
    accelerate launch train_vrpo.py --preset SiT-B/2 --dataset_name ILSVRC/imagenet-1k --resolution 256 \
        --vae stabilityai/sd-vae-ft-ema --encoder facebook/dinov2-base --objective vrpo --output_dir sit-b-vrpo

`--objective none` is plain flow matching, `repa` adds REPA's cosine loss, `vrpo` replaces that loss by group-relative
rewards on the projected tokens. Running the same command again continues the run.
"""

import sys
from collections.abc import Iterable

from diffusers_vrpo.command_line import one_line_errors, parse_config, training_parser
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.errors import TrainingInterrupted


def build_parser():
    usage = "accelerate launch train_vrpo.py [--config FILE.yaml] [options]"
    return training_parser(prog="train_vrpo.py", usage=usage, description=__doc__)


def parse_args(input_args: list[str] | None = None) -> VRPOConfig:
    return parse_config(build_parser(), input_args)


def main(args: VRPOConfig, callbacks: Iterable = ()):
    """Trains, or continues where the newest checkpoint of `output_dir` ends.

    Args:
        callbacks: `TrainerCallback`s of a caller, besides those that the options ask for.

    Raises:
        InputError: for options, data or checkpoints that cannot work.
        TrainingStopped: when the run cannot go on.
        SystemExit: 128 + the number of a signal (143, 130), after a checkpoint was saved.
    """
    # Not before the options are read: torch and diffusers take several seconds to import.
    from diffusers_vrpo.trainer import VRPOTrainer

    callbacks = list(callbacks)
    if args.generative_policy_start_step is not None:
        from diffusers_vrpo.experimental.generative.callback import GenerativePolicy

        callbacks.append(GenerativePolicy(args))

    with VRPOTrainer(args=args, callbacks=callbacks) as trainer:
        try:
            trainer.train()
        except TrainingInterrupted as interrupted:
            sys.exit(128 + interrupted.signum)
        trainer.save_model()
        if args.push_to_hub:
            trainer.push_to_hub()


if __name__ == "__main__":
    with one_line_errors(build_parser()):
        main(parse_args())
