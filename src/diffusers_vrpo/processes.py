# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The processes of a command that is not a training."""

import logging
import os
from datetime import timedelta

from accelerate import PartialState

from .errors import InputError


def start_processes() -> PartialState:
    """The processes that were launched, connected; only the first one logs.

    Raises:
        InputError: when they are not connected.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    # The wait for the slowest process can be long.
    several = {"timeout": timedelta(hours=12)} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    state = PartialState(cpu=on_cpu, **several)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise InputError(
            f"{os.environ['WORLD_SIZE']} processes were started, but accelerate does not connect them; for several CPU "
            "processes set ACCELERATE_USE_CPU=true"
        )
    level = logging.INFO if state.is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=level)
    for noisy in ("httpx", "datasets", "PIL", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return state
