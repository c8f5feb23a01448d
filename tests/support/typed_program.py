# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A program that uses every public name with its types. It is checked by mypy (tests/unit/test_style.py) and never run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_vrpo import (
    REPA,
    REPI,
    SIT_PRESETS,
    VRPO,
    AlignedTransformer,
    AlignmentStep,
    DiTAdapter,
    ImageReward,
    ImageRewards,
    ImageSource,
    InputError,
    ModelAdapter,
    NoAlignment,
    PatchEncoder,
    SiTAdapter,
    SiTSDEScheduler,
    SiTTransformer2DModel,
    TokenReward,
    TrainerCallback,
    TrainingInterrupted,
    TrainingStopped,
    VRPOConfig,
    VRPOPipeline,
    VRPOTrainer,
    cka,
    cknna,
    density_coverage,
    digits_pixels,
    fid,
    frechet_distance,
    image_semantic_reward,
    inception_score,
    kernel_distance,
    load_digits_dataset,
    load_encoder,
    load_image_encoder,
    mean_and_covariance,
    perceptual_reward,
    pooled_features,
    precision_recall,
    push_folder,
    read_metrics,
    semantic_reward,
    sit_preset,
    structural_reward,
    whiten_encoder,
)


class Pictures(ImageSource):
    num_classes = 2

    def __len__(self) -> int:
        return 2

    def __getitem__(self, rows: list[int]) -> dict[str, list[Any]]:
        return {"image": [Image.new("RGB", (8, 8)) for _ in rows], "label": rows}


class Watch(TrainerCallback):
    def on_log(self, trainer: VRPOTrainer, values: dict[str, float]) -> None:
        print(trainer.step, values)


def angle(action: torch.Tensor, mu: torch.Tensor, y: torch.Tensor, subset: torch.Tensor) -> torch.Tensor:
    return semantic_reward(action, y) + structural_reward(action, mu, y, subset)


def train(adapter: ModelAdapter | None, transformer: torch.nn.Module | None) -> int:
    args = VRPOConfig(output_dir="run", max_train_steps=2, learning_rate=1e-3)
    rewards = ["fidelity", TokenReward("angle", angle)]
    images: list[str | ImageReward] = ["perceptual", ImageReward("mine", perceptual_reward, layers=(1,))]
    try:
        with VRPOTrainer(
            "SiT-XS/2",
            ["embedded:digits"],
            "none",
            Pictures(),
            rewards,
            args,
            [Watch()],
            images,
            transformer,
            adapter,
        ) as trainer:
            trainer.train()
            trainer.save_model()
            objective: NoAlignment = trainer.objective
            return trainer.step + len(objective.summary())
    except InputError as error:
        field: str | None = error.field
        print(field)
    except TrainingInterrupted as stopped:
        print(stopped.signum)
    except TrainingStopped:
        pass
    return 0


def loop(transformer: SiTTransformer2DModel, x0: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    encoder: PatchEncoder = load_encoder("embedded:digits", grid_size=(4, 4))
    whitened: Callable = whiten_encoder(encoder, [x0], 128)
    aligned = AlignedTransformer(transformer, layers=[2], encoders=[encoder, whitened])
    objectives: list[NoAlignment] = [
        REPA(aligned, 2),
        REPI(aligned, 2),
        VRPO(aligned, max_train_steps=2),
        NoAlignment(),
    ]
    loss = torch.zeros(())
    for objective in objectives:
        step: AlignmentStep = objective.begin(t, x0)
        prediction, projections = aligned(x0, t, labels, fork=step.fork, align=step.active)
        loss = loss + objective(step, projections, x0, prediction.square().mean(1))
        objective.observe(step)
        objective.update()
    rewards = ImageRewards(["perceptual", image_semantic_reward], encoder, share=0.5)
    total: torch.Tensor = loss + rewards(x0, x0, x0, x0, t)
    rewards.update()
    return total


def sample(folder: Path) -> list[Image.Image]:
    pipeline: VRPOPipeline = VRPOPipeline.from_pretrained(folder)
    again: VRPOPipeline = VRPOPipeline.from_pipe(pipeline, scheduler=SiTSDEScheduler())
    classes: list[int] = again.trained_labels
    images: list[Image.Image] = again(classes, num_images_per_label=2, guidance_scale=1.5).images
    push_folder(folder, "me/model")
    return images


def evaluate(a: torch.Tensor, b: torch.Tensor, pixels: torch.Tensor) -> float:
    features = pooled_features(load_image_encoder("inception"), pixels)
    total: float = fid("samples", np.zeros((4, 8, 8, 3), np.uint8)) + kernel_distance(a, b)[0]
    total += frechet_distance(*mean_and_covariance(a), *mean_and_covariance(features))
    total += sum(precision_recall(a, b)) + sum(density_coverage(a, b)) + inception_score(a)[0]
    return total + cka(a, b) + cknna(a, b)


def digits(run: Path) -> int:
    images, labels = digits_pixels("train")
    rows: list[dict] = read_metrics(run / "metrics.jsonl")
    return len(load_digits_dataset()["train"]) + len(images) + len(labels) + len(rows)


def models() -> SiTTransformer2DModel:
    names: list[str] = list(SIT_PRESETS)
    adapters: list[ModelAdapter] = [DiTAdapter(), SiTAdapter()]
    print(names, adapters)
    model: SiTTransformer2DModel = SiTTransformer2DModel(**sit_preset("SiT-XS/2"))
    return model
