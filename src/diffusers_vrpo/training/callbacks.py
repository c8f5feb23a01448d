# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Callbacks: the hooks that `VRPOTrainer` calls around its steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from ..errors import InputError


if TYPE_CHECKING:
    from ..trainer import VRPOTrainer


class TrainerCallback:
    """Hooks around the steps of a [`VRPOTrainer`]. Each does nothing unless a subclass overrides it.

    All processes call the hooks at the same points, so that hooks may communicate between processes. `trainer.step` is the
    number of completed optimizer steps.

    A callback with a `state_name` is saved with every checkpoint: its `state_dict()` returns tensors by name, and
    `load_state_dict(state)` restores them. If a checkpoint lacks that file, the callback keeps its initial state.

    Example:

    ```python
    from diffusers_vrpo import TrainerCallback


    class PrintStep(TrainerCallback):
        def on_step_end(self, trainer):
            print(trainer.step)


    callbacks = [PrintStep()]  # for VRPOTrainer(callbacks=callbacks, ...)
    ```

    Attributes:
        state_name (`str`): name of the callback's file in a checkpoint, without `.safetensors`; empty (the default) if the
            callback has no state.
    """

    state_name = ""

    def on_init_end(self, trainer: VRPOTrainer) -> None:
        """Called after model and data are loaded and before a checkpoint is; may raise InputError."""

    def on_train_begin(self, trainer: VRPOTrainer) -> None:
        """Called after a checkpoint was loaded, before the first step."""

    def before_optimizer_step(self, trainer: VRPOTrainer) -> None:
        """Called once all micro-batches have added their gradients, before these are clipped and `trainer.step` rises."""

    def on_step_end(self, trainer: VRPOTrainer) -> None:
        """Called after a step and before its checkpoint. State that the checkpoint must hold is updated here."""

    def on_save(self, trainer: VRPOTrainer, checkpoint: Path) -> None:
        """Called after a checkpoint has been written to the folder `checkpoint`."""

    def on_evaluate(self, trainer: VRPOTrainer) -> None:
        """Called at the end of a step, after its checkpoint if one was due, for long work such as validation.

        Its time does not count as training time.
        """

    def on_log(self, trainer: VRPOTrainer, values: dict[str, float]) -> None:
        """Called after the metrics of a step, `values` by name, have been written."""

    def on_train_end(self, trainer: VRPOTrainer) -> None:
        """Called after the last step and its checkpoint."""

    def can_save(self, step: int, begun: bool = False) -> bool:
        """Whether a checkpoint after `step` steps would hold all that the callback needs to continue.

        Args:
            begun: whether the next step has begun and failed. What the callback has changed for that step is then in the
                checkpoint, too.
        """
        return True

    def flops(self, step: int) -> float:
        """The FLOPs that the callback adds to the step with index `step`, on all processes together."""
        return 0.0


def stateful(callbacks: list[TrainerCallback]) -> dict[str, TrainerCallback]:
    """The callbacks that are saved with a checkpoint, by the names of their files."""
    return {callback.state_name: callback for callback in callbacks if callback.state_name}


def check_states(checkpoint: Path, names: list[str] | None, callbacks: list[TrainerCallback]):
    """Checks that a run resumes with all callbacks whose state is in its checkpoint.

    Args:
        checkpoint: the checkpoint to continue from.
        names: the `state_name` of each callback whose state it holds; None for version 0.1, which does not list them.
        callbacks: the callbacks of the run.

    Raises:
        InputError: if one of these callbacks is missing.
    """
    if names is None:
        file = checkpoint / "generative_policy.safetensors"
        names = ["generative_policy"] if file.exists() and bool(load_file(file)["begun"]) else []
    if missing := [name for name in names if name not in stateful(callbacks)]:
        raise InputError(
            "callbacks",
            f"{checkpoint} was trained with the callback {missing[0]} and cannot be continued without it; give the options "
            "that the run began with, or start a new run from these weights with `pretrained_model_name_or_path`",
        )
