# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What programs are started with."""

import os

from support.paths import SRC


def no_network_environment() -> dict:
    """The environment of a program that finds this package's sources, and no settings of the Hub or of accelerate."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ACCELERATE"))}
    return {**environment, "PYTHONPATH": str(SRC)}
