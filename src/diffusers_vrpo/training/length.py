# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""How long a run is, and when it saves and validates: as the options say, or as follows from the data."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from accelerate.logging import get_logger

from ..config import (
    CHECKPOINTS_TO_KEEP,
    DEFAULT_IMAGES_SEEN,
    DEFAULT_INTERVALS,
    EARLY_GRIDS,
    MOST_EPOCHS,
    SHORTEST_INTERVAL,
    VRPOConfig,
)
from ..errors import InputError
from .callbacks import TrainerCallback


logger = get_logger(__name__)
MEASURED_STEPS = 20


@dataclass
class RunLength:
    """Length and intervals of a run. Every checkpoint has them, and a resumed run keeps those that are not given again.

    Attributes:
        max_train_steps (`int`): optimizer steps of the whole run.
        checkpointing_steps (`int`): optimizer steps between two checkpoints.
        validation_steps (`int`): optimizer steps between two validations.
        early_grids (`bool`): whether sample grids are also drawn after the steps of `EARLY_GRIDS`.
        checkpoints_to_keep (`int`): number of checkpoints to keep if `checkpoints_total_limit` is not given; 0 keeps all.
    """

    max_train_steps: int
    checkpointing_steps: int
    validation_steps: int
    early_grids: bool
    checkpoints_to_keep: int

    def validates(self, step: int) -> bool:
        """Whether there is a validation after this step because of `validation_steps`."""
        return step > 0 and step % self.validation_steps == 0

    def draws_early(self, step: int) -> bool:
        """Whether only a sample grid is drawn after this step, without the rest of a validation."""
        return self.early_grids and step in EARLY_GRIDS and not self.validates(step)


# What version 0.1 did by default; its checkpoints do not record it.
BEFORE_IT_WAS_RECORDED = RunLength(400_000, 10_000, 10_000, early_grids=False, checkpoints_to_keep=0)


def shared_steps(args: VRPOConfig) -> int:
    """The number of steps that share sampled actions or a rollout; lengths and intervals are multiples of it."""
    return math.lcm(args.policy_epochs, args.rollout_every if args.rollout_epochs > 1 else 1)


def length_of_run(args: VRPOConfig, num_images: int | None, global_batch_size: int) -> int:
    """The number of optimizer steps of a new run.

    The steps for `num_train_epochs` are rounded up so that the last epoch and the last draw of actions or rollout are
    complete. If no length is given, a run sees `DEFAULT_IMAGES_SEEN` images, but makes at most `MOST_EPOCHS` passes over
    the data and at least about one.

    Args:
        num_images: number of training images; None if it is not known, as for a plan without data.
        global_batch_size: examples per optimizer step on all processes.
    """
    if args.max_train_steps:
        return args.max_train_steps
    shared = shared_steps(args)
    if args.num_train_epochs:
        draws = math.ceil(args.num_train_epochs * num_images / global_batch_size)
        return math.ceil(draws * args.policy_epochs / shared) * shared
    images = DEFAULT_IMAGES_SEEN
    if num_images is not None:
        images = max(num_images, min(images, MOST_EPOCHS * num_images))
    return max(1, images // global_batch_size * args.policy_epochs // shared) * shared


def resolve_length(
    args: VRPOConfig, num_images: int, global_batch_size: int, recorded: RunLength | None = None
) -> RunLength:
    """Length and intervals of a run: as given, or else as recorded, or else as they follow from the data.

    Args:
        num_images: number of training images.
        global_batch_size: examples per optimizer step on all processes.
        recorded: length and intervals in the checkpoint from which the run resumes; None for a new run.
    """
    given = {
        "max_train_steps": args.max_train_steps,
        "checkpointing_steps": args.checkpointing_steps,
        "validation_steps": args.validation_steps,
        "early_grids": None if args.validation_steps is None else False,
    }
    if recorded is None or args.num_train_epochs:
        given["max_train_steps"] = length_of_run(args, num_images, global_batch_size)
    if recorded is None:
        shared, steps = shared_steps(args), given["max_train_steps"]
        interval = max(SHORTEST_INTERVAL, math.ceil(steps / DEFAULT_INTERVALS))
        interval = math.ceil(interval / shared) * shared
        recorded = RunLength(steps, interval, interval, early_grids=True, checkpoints_to_keep=CHECKPOINTS_TO_KEEP)
    return dataclasses.replace(recorded, **{name: value for name, value in given.items() if value is not None})


def recorded_length(state: dict) -> RunLength:
    """Length and intervals in the state of a checkpoint."""
    return RunLength(**state["length"]) if "length" in state else BEFORE_IT_WAS_RECORDED


def check_length(checkpoint: Path, step: int, max_train_steps: int):
    """Checks that a checkpoint of step `step` is not beyond the end of the run that continues from it.

    Raises:
        InputError: if `step` is above `max_train_steps`.
    """
    if step > max_train_steps:
        raise InputError(
            "max_train_steps",
            f"`max_train_steps` {max_train_steps} is below step {step} of {checkpoint}; give at least {step}, or start a "
            "new run in another `output_dir`",
        )


def num_epochs(trainer) -> float:
    """How many times a whole run passes over its data."""
    return trainer.max_train_steps * trainer.global_batch_size / trainer.args.policy_epochs / len(trainer.data)


def passes_notice(epochs: float, num_images: int) -> str | None:
    """A sentence for the log if a run passes over its data more than `MOST_EPOCHS` times; None otherwise."""
    if epochs <= MOST_EPOCHS:
        return None
    return (
        f"the run passes over its {num_images} images {epochs:.0f} times; beyond {MOST_EPOCHS} times a model mostly memorises "
        "them: watch the sample grids, and give fewer `max_train_steps`, more images or starting weights"
    )


class SpeedNotice(TrainerCallback):
    """Logs once the length of a run and the time it will take, measured over `MEASURED_STEPS` steps after a warm-up step."""

    def on_train_begin(self, trainer):
        self.first, self.seconds = trainer.step, 0.0

    def on_step_end(self, trainer):
        steps = trainer.step - self.first
        if steps == 1:
            self.seconds = trainer.stopwatch.seconds()
        elif steps == 1 + MEASURED_STEPS:
            speed = (trainer.stopwatch.seconds() - self.seconds) / MEASURED_STEPS
            logger.info(
                f"{trainer.max_train_steps} steps = {num_epochs(trainer):.3g} epochs of {len(trainer.data)} images, about "
                f"{duration(speed * (trainer.max_train_steps - self.first))} at the measured speed of {speed:.3g} s per step"
                f"{f' from step {self.first} on' if self.first else ''}, without checkpoints and validation"
            )


def duration(seconds: float) -> str:
    """A duration in words: in hours, or in minutes if it is below one hour."""
    if seconds < 3600:
        return f"{max(1, round(seconds / 60))} minute(s)"
    return f"{seconds / 3600:.1f} hours"
