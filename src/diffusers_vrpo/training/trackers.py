# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Starts, writes to and ends accelerate's experiment trackers, so that the failure of one does not end a run."""

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
TRACKERS_FILE = "trackers.json"  # in the output folder: the ids by which a resumed run continues its tracker runs
# The argument with which each tracker is told the name of the run.
RUN_NAME_ARGUMENTS = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}


def use_trackers(accelerator: Accelerator, action: Callable):
    """Calls `action` with each tracker. A tracker that fails (full disk, unreachable server) is logged and not used again.

    Raises:
        TrainingStopped: if `metrics.jsonl` cannot be written.
    """
    for tracker in list(accelerator.trackers):
        try:
            action(tracker)
        except TrainingStopped:
            raise
        except Exception as error:  # each tracker raises errors of its own
            accelerator.trackers.remove(tracker)
            give_up(tracker.name, error)


def give_up(name: str, error: Exception):
    """Warns that a tracker has failed and is not used again in this run."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    logger.warning(
        f"the tracker {name} has failed ({reason}) and is not used again in this run; metrics.jsonl has all values"
    )


def log_values(accelerator: Accelerator, values: dict[str, float], step: int):
    """Logs numbers to the trackers."""
    use_trackers(accelerator, lambda tracker: tracker.log(values, step=step))


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int):
    """Logs an image to the trackers that can show images."""

    def show(tracker):
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif tracker.name in ("wandb", "swanlab"):
            tracker.log_images({name: [image]}, step=step)
        elif tracker.name in ("aim", "clearml"):
            tracker.log_images({name: image}, step=step)

    use_trackers(accelerator, show)


def tracked_options(args: VRPOConfig) -> dict[str, int | float | str | bool]:
    """The options that are set, in the flat form that trackers accept: numbers, truth values, and lists joined by commas."""
    return {
        name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in args.to_dict().items()
    }


def start_trackers(accelerator: Accelerator, metrics_file: MetricsFile, args: VRPOConfig, output_dir: Path, step: int):
    """Starts the trackers of `report_to` and adds `metrics.jsonl` to them; called on the main process.

    A tracker that cannot start is logged and not used.

    Args:
        step: the step of the checkpoint from which the run resumes, or 0. The resumed run replaces later values in
            TensorBoard, and continues its wandb run under the id that the output folder keeps.
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
            # Each is started by itself, so that the failure of one does not keep the others from starting.
            accelerator.log_with, accelerator.trackers = [tracker], []
            try:
                accelerator.init_trackers(args.tracker_project_name, tracked_options(args), {name: arguments})
            except Exception as error:  # each tracker raises errors of its own
                give_up(name, error)
            else:
                started += accelerator.trackers
    finally:
        accelerator.log_with, accelerator.trackers = wanted, [*started, metrics_file]


def wandb_run_id(output_dir: Path, step: int) -> str:
    """The id of the run in wandb: `WANDB_RUN_ID` if set, the kept one of a resumed run, or a new one, which is then kept.

    Args:
        step: the step of the checkpoint from which the run resumes, or 0.
    """
    if given := os.environ.get("WANDB_RUN_ID"):
        return given
    file = output_dir / TRACKERS_FILE
    if step:
        with contextlib.suppress(
            OSError, ValueError
        ):  # no file (the checkpoint is in another folder), or a damaged one
            return check(json.loads(read_regular(file)), TRACKERS)["wandb"]
    new = uuid.uuid4().hex
    with contextlib.suppress(OSError):
        write_atomically(file, json.dumps({"wandb": new}).encode())
    return new


def end_trackers(accelerator: Accelerator):
    """Ends all trackers except `metrics.jsonl`; failures are logged."""
    use_trackers(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = [tracker for tracker in accelerator.trackers if isinstance(tracker, MetricsFile)]
