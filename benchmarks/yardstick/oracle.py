# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The positive control of a yardstick: samples of a model that sees an encoder's features of real images while it draws."""

from pathlib import Path

import torch
from judge import ORACLE_SAMPLES, draw, make_references
from recipe import Recipe
from safetensors.torch import save_file
from subset import packed

from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.training.callbacks import TrainerCallback
from diffusers_vrpo.training.distributed import ema_weights, full_pipeline


class OracleSamples(TrainerCallback):
    """Draws the samples for the last judgement at the end of a run whose scaffold phase never ends.

    Each sample sees the features of a validation image of its class, in the order of these images. The judge reads the
    samples from `oracle_samples.safetensors` in the output folder, because the pipeline alone cannot draw them.
    """

    def __init__(self, recipe: Recipe, work: Path):
        self.recipe = recipe
        self.work = work

    def on_train_end(self, trainer):
        references, recipe = make_references(self.recipe, self.work), self.recipe
        encoder = load_encoder(
            packed(self.work / "packed", recipe.encoder), trainer.grid_size, trainer.args.encoder_layer
        )
        images, labels = references["validation_images"], references["validation_labels"]
        of_class = {label: torch.nonzero(labels == label)[:, 0].tolist() for label in labels.unique().tolist()}

        def told(indices: range, classes: list[int]):
            """A context in which the samples `indices` of these classes see the features of validation images."""
            rows = [of_class[label][i % len(of_class[label])] for i, label in zip(indices, classes)]
            features = encoder(images[rows].float() / 127.5 - 1)
            return trainer.aligned.oracle({"features_0": features})

        with (
            ema_weights(trainer.ema, trainer.aligned),
            full_pipeline(trainer.accelerator, trainer.pipeline, None) as averaged,
        ):
            samples = draw(recipe, averaged, trainer.args.seed, around=told)
        save_file({"samples": samples}, trainer.output_dir / ORACLE_SAMPLES)
