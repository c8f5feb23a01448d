# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Experiment trackers of accelerate: started, written to and ended so that an outage of one does not end a run."""

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image

from ..config import VRPOConfig
from ..errors import TrainingStopped, first_line
from ..files import read_regular, write_atomically
from ..schemas import TRACKERS, check
from .metrics import MetricsFile


logger = get_logger(__name__)
TRACKERS_FILE = "trackers.json"  # in the output folder: the ids of runs that a resumed run continues
# The argument of each tracker's start that names a run.
RUN_NAME_ARGUMENTS = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}


def use_trackers(accelerator: Accelerator, action: Callable):
    """Calls `action` with each tracker; one that fails (a full disk, a server out of reach) is logged and not used again.

    Raises:
        TrainingStopped: if `metrics.jsonl` cannot be written.
    """
    for tracker in list(accelerator.trackers):
        try:
            action(tracker)
        except TrainingStopped:
            raise
        except Exception as error:  # each tracker has errors of its own
            accelerator.trackers.remove(tracker)
            give_up(tracker.name, error)


def give_up(name: str, error: Exception):
    """Warns that a tracker is not used in this run."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    logger.warning(
        f"{name} cannot be written ({reason}); it is not used again in this run, and metrics.jsonl has everything"
    )


def log_values(accelerator: Accelerator, values: dict[str, float], step: int):
    """Logs numbers to the trackers."""
    use_trackers(accelerator, lambda tracker: tracker.log(values, step=step))


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int):
    """Logs an image to the trackers that take images."""

    def show(tracker):
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif tracker.name in ("wandb", "swanlab"):
            tracker.log_images({name: [image]}, step=step)
        elif tracker.name in ("aim", "clearml"):
            tracker.log_images({name: image}, step=step)

    use_trackers(accelerator, show)


def tracked_options(args: VRPOConfig) -> dict[str, int | float | str | bool]:
    """The options that are set, as trackers take them: flat, numbers and truth values as such, lists joined with commas."""
    return {
        name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in args.to_dict().items()
    }


def start_trackers(accelerator: Accelerator, metrics_file: MetricsFile, args: VRPOConfig, output_dir: Path, step: int):
    """Starts the trackers of `report_to`, and adds `metrics.jsonl` to them; on the main process.

    A tracker that cannot start is logged and not used.

    Args:
        step: the step of the checkpoint that is continued, or 0. Later values in TensorBoard are replaced by the continued run,
            and a run of wandb continues under its id, which the output folder keeps.
    """
    run_name = args.tracker_run_name or output_dir.resolve().name
    started = []
    wanted, accelerator.trackers = accelerator.log_with, []
    try:
        for tracker in wanted:
            name = str(tracker)
            arguments = {RUN_NAME_ARGUMENTS[name]: run_name} if name in RUN_NAME_ARGUMENTS else {}
            if name == "tensorboard" and step:
                arguments["purge_step"] = step + 1
            if name == "wandb":
                arguments |= {"id": wandb_run_id(output_dir, step), "resume": "allow"}
            # One by one, so that the failure of one does not keep the others from starting.
            accelerator.log_with, accelerator.trackers = [tracker], []
            try:
                accelerator.init_trackers(args.tracker_project_name, tracked_options(args), {name: arguments})
            except Exception as error:  # each tracker has errors of its own
                give_up(name, error)
            else:
                started += accelerator.trackers
    finally:
        accelerator.log_with, accelerator.trackers = wanted, [*started, metrics_file]


def wandb_run_id(output_dir: Path, step: int) -> str:
    """The id of the run in wandb: that of the run which is continued, or a new one, which the output folder keeps.

    Args:
        step: the step of the checkpoint that is continued, or 0.
    """
    if given := os.environ.get("WANDB_RUN_ID"):
        return given
    file = output_dir / TRACKERS_FILE
    if step:
        with contextlib.suppress(OSError, ValueError):  # another folder's checkpoint, or a damaged file
            return check(json.loads(read_regular(file)), TRACKERS)["wandb"]
    new = uuid.uuid4().hex
    with contextlib.suppress(OSError):
        write_atomically(file, json.dumps({"wandb": new}).encode())
    return new


def end_trackers(accelerator: Accelerator):
    """Ends the trackers, so that only `metrics.jsonl` is left; one that fails is logged."""
    use_trackers(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = [tracker for tracker in accelerator.trackers if isinstance(tracker, MetricsFile)]
