# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Arms that go on from one base: its weights, their average, the optimizer's moments and its place in the data."""

import json
from pathlib import Path

import torch

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel
from diffusers_vrpo.training.callbacks import TrainerCallback


class Fork(TrainerCallback):
    """Lets a new run begin where a checkpoint of another one ended, although the objectives differ.

    `resume_from_checkpoint` would refuse another objective, and starting from weights alone would lose the moments of AdamW
    and the average. The checkpoint's run trains without alignment, so that projectors, which it does not have, begin
    again in every arm. The run counts its steps from 0, but takes the examples that follow those of the base.

    Args:
        checkpoint: of a run of one process with the same transformer and batch size.
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
        # Keyed by the place of a parameter; the transformer's are the first.
        optimizer = trainer.optimizer.optimizer
        for place, parameter in enumerate(parameters):
            optimizer.state[parameter] = {name: tensor.clone() for name, tensor in saved[place].items()}
        trainer.samples_seen = self.state["samples_seen"]

    def on_train_begin(self, trainer):
        trainer.ema.optimization_step = (
            self.state["step"] + trainer.step
        )  # the first step of a new average would reset it
