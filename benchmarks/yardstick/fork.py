# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Lets arms continue from one base: from its weights, averaged weights, optimizer moments and position in the data."""

import json
from pathlib import Path

import torch

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel
from diffusers_vrpo.training.callbacks import TrainerCallback


class Fork(TrainerCallback):
    """Lets a new run continue from a checkpoint of another run, although the objectives differ.

    `resume_from_checkpoint` would refuse another objective, and starting from weights alone would lose the moments of AdamW
    and the averaged weights. The run of the checkpoint has no alignment, so each arm starts with new projectors. The new run
    counts its steps from 0, but its examples follow those of the base.

    Args:
        checkpoint: a checkpoint of a run in one process with the same transformer and batch size.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = Path(checkpoint)
        self.state = json.loads((self.checkpoint / "training_state.json").read_text())

    @torch.no_grad()
    def on_init_end(self, trainer):
        parameters = list(trainer.transformer.parameters())
        saved = torch.load(self.checkpoint / "optimizer.bin", weights_only=True)["state"]
        if len(saved) != len(parameters):
            raise InputError(
                None,
                f"{self.checkpoint} has moments of {len(saved)} tensors and the transformer {len(parameters)}; fork from a "
                "run without alignment and of the same model",
            )
        for folder, targets in (
            ("transformer", parameters),
            ("transformer_ema", trainer.ema.shadow_params[: len(parameters)]),
        ):
            source = SiTTransformer2DModel.from_pretrained(self.checkpoint / folder)
            for target, tensor in zip(targets, source.parameters(), strict=True):
                target.copy_(tensor)
        # The state is keyed by the position of a parameter; the parameters of the transformer come first.
        optimizer = trainer.optimizer.optimizer
        for place, parameter in enumerate(parameters):
            optimizer.state[parameter] = {name: tensor.clone() for name, tensor in saved[place].items()}
        trainer.samples_seen = self.state["samples_seen"]

    def on_train_begin(self, trainer):
        trainer.ema.optimization_step = (
            self.state["step"] + trainer.step
        )  # otherwise the first step would reset the average
