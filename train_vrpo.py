#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Train a class-conditional diffusion transformer: `vrpo train`, as a script for `accelerate launch` and torchrun.

    accelerate launch train_vrpo.py --config configs/digits.yaml

The program is `src/diffusers_vrpo/commands/train.py`.
"""

import argparse

from diffusers_vrpo.commands import train
from diffusers_vrpo.config import VRPOConfig


main = train.train


def build_parser() -> argparse.ArgumentParser:
    return train.build_parser("train_vrpo.py")


def parse_args(input_args: list[str] | None = None) -> VRPOConfig:
    return train.parse_args(input_args, "train_vrpo.py")


if __name__ == "__main__":
    train.main(prog="train_vrpo.py")
