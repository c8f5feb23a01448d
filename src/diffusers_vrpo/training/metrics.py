# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Metrics of a run: running means, the file `metrics.jsonl`, and the record of the run's starts."""

import contextlib
import json
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker

from ..alignment.attach import AlignedTransformer
from ..files import open_regular, sync_to_disk, write_atomically
from ..schemas import METRICS_ROW, merge_steps, read_rows
from .output_dir import writing
from .throughput import hardware_name


logger = get_logger(__name__)


def shown_values(values: dict[str, float]) -> dict[str, str]:
    """Formats loss, rewards and speed for the progress bar."""
    shown = {"loss": f"{values['loss_fm']:.4f}"}
    rewards = {name.removeprefix("reward/"): values[name] for name in values if name.startswith("reward/")}
    shown |= {name: f"{value:.4f}" for name, value in rewards.items() if name != "fidelity"}  # it is minus the loss
    speed = values["images_per_second"]
    shown["images/s"] = f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"
    if "mfu" in values:
        shown |= {"TFLOP/s": f"{values['tflops_per_device']:.3g}", "MFU": f"{100 * values['mfu']:.1f}%"}
    return shown


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


class Stopwatch:
    """Adds up the seconds between each `start` and the next `stop`.

    Args:
        seconds (`float`): the initial value.
    """

    def __init__(self, seconds: float = 0.0):
        self.counted = seconds
        self.started: float | None = None

    def start(self):
        self.started = time.perf_counter()

    def stop(self):
        self.counted, self.started = self.seconds(), None

    def seconds(self) -> float:
        """The seconds so far."""
        running = 0.0 if self.started is None else time.perf_counter() - self.started
        return self.counted + running


class RunningMeans:
    """Means of device scalars between two reads. Adding never waits for the device; reading waits once.

    Values that are not finite are skipped. `commit` ends a step, and a checkpoint saves only what was added before the last
    `commit`.
    """

    def __init__(self):
        # For each tuple of names that were added together: their sums and counts, `[2, names]`.
        self.groups: dict[tuple[str, ...], torch.Tensor] = {}
        self.committed: dict[tuple[str, ...], torch.Tensor] = {}

    def add(self, **values: torch.Tensor):
        new = torch.stack([value.detach().float() for value in values.values()])
        finite = new.isfinite()
        new = torch.stack([torch.where(finite, new, 0.0), finite.float()])
        # The sums are not changed in place, because `commit` keeps these tensors.
        self.groups[tuple(values)] = self.groups.get(tuple(values), 0.0) + new

    def commit(self):
        self.committed = dict(self.groups)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the means over all processes since the last read, and resets them; NaN if no value was finite."""
        keys = sorted(self.groups)
        if not keys:
            return {}
        sums, counts = accelerator.reduce(torch.cat([self.groups[key] for key in keys], 1), reduction="sum").tolist()
        totals: dict[str, tuple[float, float]] = {}
        for name, value, count in zip((name for key in keys for name in key), sums, counts):
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + value, before[1] + count
        self.groups, self.committed = {}, {}
        return {name: value / count if count else float("nan") for name, (value, count) in sorted(totals.items())}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"|".join(key): tensor.contiguous() for key, tensor in self.committed.items()}

    def load_state_dicts(self, saved: list[dict[str, torch.Tensor]], accelerator: Accelerator):
        """Restores the sums of every process; if the number of processes has changed, the first one gets the sum of all."""
        for state in saved:
            state.update({name: tensor.to(accelerator.device) for name, tensor in state.items()})
        if len(saved) == accelerator.num_processes:
            own = saved[accelerator.process_index]
        else:
            names = {name for state in saved for name in state}
            own = {name: sum(state[name] for state in saved if name in state) for name in names}
            if not accelerator.is_main_process:
                own = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
        self.groups = {tuple(name.split("|")): tensor for name, tensor in own.items()}
        self.commit()


class MetricsFile(GeneralTracker):
    """`metrics.jsonl`, a tracker of accelerate: one line per logged step.

    Args:
        path: path of the file.
        resume_step: step of the checkpoint from which the run resumes; lines of later steps are removed.
    """

    name = "metrics.jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, path: Path, resume_step: int = 0):
        super().__init__()
        self.path = path
        rows, damaged = read_rows(path, METRICS_ROW) if path.exists() else ([], 0)
        if damaged:
            logger.warning(f"{path}: removed {damaged} damaged line(s), such as a crash leaves behind")
        kept = [row for row in merge_steps(rows) if row["step"] <= resume_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    @property
    def tracker(self) -> Path:
        return self.path

    def store_init_configuration(self, values: dict):
        """Does nothing, because `train_config.yaml` has the options."""

    def log(self, values: dict[str, float], step: int | None = None, **kwargs):
        """Appends a line with the step and the values.

        Raises:
            TrainingStopped: if the file cannot be written.
        """
        flags = os.O_WRONLY | os.O_APPEND  # without O_CREAT, so that a folder that was moved away is an error
        with writing(f"step {step} of {self.path}"), os.fdopen(open_regular(self.path, flags), "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def sync(self):
        """Waits until all lines are on the disk, so that they are there if the checkpoint is."""
        with contextlib.suppress(OSError):
            sync_to_disk(self.path)


def write_start(
    output_dir: Path,
    step: int,
    accelerator: Accelerator,
    aligned: AlignedTransformer,
    global_batch_size: int,
    max_train_steps: int,
    options: dict,
    prediction_type: str,
    changes: dict[str, list] | None = None,
):
    """Appends a line to `starts.jsonl` with the first step, the hardware and the size of the model.

    Args:
        step: completed steps when the run starts or resumes.
        options: the given options; the line lists those of their values that are local files or folders.
        prediction_type: what the transformer predicts.
        changes: options that have changed since the checkpoint, `{name: [before, now]}`.
    """
    names = [name for value in options.values() for name in (value if isinstance(value, list) else [value])]
    start = {
        "step": step,
        "hardware": hardware_name(accelerator.device),
        "num_processes": accelerator.num_processes,
        "global_batch_size": global_batch_size,
        "mixed_precision": accelerator.mixed_precision,
        "parameters": sum(parameter.numel() for parameter in aligned.transformer.parameters()),
        "projector_parameters": sum(parameter.numel() for parameter in aligned.projectors.parameters()),
        "max_train_steps": max_train_steps,
        "prediction_type": prediction_type,
        "adapters_suffice": getattr(aligned.transformer, "adapters_suffice", False),
        "local": sorted({name for name in names if isinstance(name, str) and os.path.exists(name)}),
        "torch": torch.__version__,
    } | ({"changed": changes} if changes else {})
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with contextlib.suppress(OSError), os.fdopen(open_regular(output_dir / "starts.jsonl", flags), "a") as file:
        file.write(json.dumps(start) + "\n")


def read_metrics(path: str | Path) -> list[dict]:
    """Reads what a run has logged, as one row per step, and skips damaged lines, such as a crash leaves behind.

    Example:

    ```python
    from diffusers_vrpo import read_metrics

    rows = read_metrics("outputs/digits/metrics.jsonl")
    print([(row["step"], row["loss_fm"]) for row in rows])
    ```

    Args:
        path: the `metrics.jsonl` of an output folder.

    Returns:
        the rows in the order of their steps; each maps names, among them `step`, to numbers.

    Raises:
        OSError: if the file cannot be read.
    """
    return merge_steps(read_rows(Path(path), METRICS_ROW)[0])
