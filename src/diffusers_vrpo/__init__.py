# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Representation-aligned training of diffusion transformers, native to diffusers.

The names here are the public API (docs/api.md); everything else is private. They are loaded when they are first used, so
that `import diffusers_vrpo` and `vrpo --help` import neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # type checkers and editors read the names here
    from .alignment.attach import AlignedTransformer as AlignedTransformer
    from .alignment.encoders import PatchEncoder as PatchEncoder
    from .alignment.encoders import load_encoder as load_encoder
    from .alignment.image_rewards import ImageReward as ImageReward
    from .alignment.image_rewards import ImageRewards as ImageRewards
    from .alignment.image_rewards import image_semantic_reward as image_semantic_reward
    from .alignment.image_rewards import perceptual_reward as perceptual_reward
    from .alignment.objective import REPA as REPA
    from .alignment.objective import REPI as REPI
    from .alignment.objective import VRPO as VRPO
    from .alignment.objective import AlignmentStep as AlignmentStep
    from .alignment.objective import NoAlignment as NoAlignment
    from .alignment.rewards import TokenReward as TokenReward
    from .alignment.rewards import semantic_reward as semantic_reward
    from .alignment.rewards import structural_reward as structural_reward
    from .alignment.whitening import whiten_encoder as whiten_encoder
    from .assets.digits import digits_pixels as digits_pixels
    from .assets.digits import load_digits_dataset as load_digits_dataset
    from .config import VRPOConfig as VRPOConfig
    from .data.image_source import ImageSource as ImageSource
    from .errors import InputError as InputError
    from .errors import TrainingInterrupted as TrainingInterrupted
    from .errors import TrainingStopped as TrainingStopped
    from .evaluation.compare import fid as fid
    from .evaluation.image_encoders import load_image_encoder as load_image_encoder
    from .evaluation.image_encoders import pooled_features as pooled_features
    from .evaluation.metrics import cka as cka
    from .evaluation.metrics import cknna as cknna
    from .evaluation.metrics import density_coverage as density_coverage
    from .evaluation.metrics import frechet_distance as frechet_distance
    from .evaluation.metrics import inception_score as inception_score
    from .evaluation.metrics import kernel_distance as kernel_distance
    from .evaluation.metrics import mean_and_covariance as mean_and_covariance
    from .evaluation.metrics import precision_recall as precision_recall
    from .hub.publish import push_folder as push_folder
    from .models.transformer_sit import SIT_PRESETS as SIT_PRESETS
    from .models.transformer_sit import SiTTransformer2DModel as SiTTransformer2DModel
    from .models.transformer_sit import sit_preset as sit_preset
    from .pipelines.adapters import DiTAdapter as DiTAdapter
    from .pipelines.adapters import ModelAdapter as ModelAdapter
    from .pipelines.adapters import SiTAdapter as SiTAdapter
    from .pipelines.pipeline_vrpo import VRPOPipeline as VRPOPipeline
    from .pipelines.scheduling_sit_sde import SiTSDEScheduler as SiTSDEScheduler
    from .trainer import VRPOTrainer as VRPOTrainer
    from .training.callbacks import TrainerCallback as TrainerCallback
    from .training.metrics import read_metrics as read_metrics


__version__ = "0.2.0"

# The public names and the modules that define them, in the order of docs/api.md, which docs/make_api.py writes.
_PUBLIC = {
    "Training": {
        "VRPOTrainer": "trainer",
        "VRPOConfig": "config",
        "ModelAdapter": "pipelines.adapters",
        "DiTAdapter": "pipelines.adapters",
        "SiTAdapter": "pipelines.adapters",
        "ImageSource": "data.image_source",
        "TrainerCallback": "training.callbacks",
        "read_metrics": "training.metrics",
        "load_digits_dataset": "assets.digits",
        "digits_pixels": "assets.digits",
        "InputError": "errors",
        "TrainingStopped": "errors",
        "TrainingInterrupted": "errors",
    },
    "Alignment in a loop of your own": {
        "AlignedTransformer": "alignment.attach",
        "NoAlignment": "alignment.objective",
        "REPA": "alignment.objective",
        "REPI": "alignment.objective",
        "VRPO": "alignment.objective",
        "AlignmentStep": "alignment.objective",
        "load_encoder": "alignment.encoders",
        "PatchEncoder": "alignment.encoders",
        "whiten_encoder": "alignment.whitening",
    },
    "Rewards": {
        "TokenReward": "alignment.rewards",
        "semantic_reward": "alignment.rewards",
        "structural_reward": "alignment.rewards",
        "ImageReward": "alignment.image_rewards",
        "ImageRewards": "alignment.image_rewards",
        "perceptual_reward": "alignment.image_rewards",
        "image_semantic_reward": "alignment.image_rewards",
    },
    "Models and pipelines": {
        "SiTTransformer2DModel": "models.transformer_sit",
        "SIT_PRESETS": "models.transformer_sit",
        "sit_preset": "models.transformer_sit",
        "VRPOPipeline": "pipelines.pipeline_vrpo",
        "SiTSDEScheduler": "pipelines.scheduling_sit_sde",
        "push_folder": "hub.publish",
    },
    "Evaluation": {
        "fid": "evaluation.compare",
        "load_image_encoder": "evaluation.image_encoders",
        "pooled_features": "evaluation.image_encoders",
        "mean_and_covariance": "evaluation.metrics",
        "frechet_distance": "evaluation.metrics",
        "kernel_distance": "evaluation.metrics",
        "inception_score": "evaluation.metrics",
        "precision_recall": "evaluation.metrics",
        "density_coverage": "evaluation.metrics",
        "cka": "evaluation.metrics",
        "cknna": "evaluation.metrics",
    },
}
_MODULES = {name: f"{__name__}.{module}" for names in _PUBLIC.values() for name, module in names.items()}
# diffusers looks for the base classes of a component in the package that defines the component.
_BASE_CLASSES = {"ModelMixin": "diffusers", "SchedulerMixin": "diffusers"}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    module = {**_MODULES, **_BASE_CLASSES}.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
