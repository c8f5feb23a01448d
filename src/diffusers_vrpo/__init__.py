# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Representation-aligned training of diffusion transformers, native to diffusers.

Names are loaded when they are first used, so that `import diffusers_vrpo` and `vrpo --help` import neither torch nor
diffusers.
"""

from importlib import import_module


__version__ = "0.1.0"

# Public name: the module that defines it.
_MODULES = {
    "AlignedTransformer": "diffusers_vrpo.alignment.attach",
    "DiTAdapter": "diffusers_vrpo.pipelines.adapters",
    "ImageReward": "diffusers_vrpo.alignment.image_rewards",
    "ImageRewards": "diffusers_vrpo.alignment.image_rewards",
    "InputError": "diffusers_vrpo.errors",
    "ModelAdapter": "diffusers_vrpo.pipelines.adapters",
    "NoAlignment": "diffusers_vrpo.alignment.objective",
    "REPA": "diffusers_vrpo.alignment.objective",
    "REPI": "diffusers_vrpo.alignment.objective",
    "SIT_PRESETS": "diffusers_vrpo.models.transformer_sit",
    "SiTSDEScheduler": "diffusers_vrpo.pipelines",
    "SiTTransformer2DModel": "diffusers_vrpo.models.transformer_sit",
    "TokenReward": "diffusers_vrpo.alignment.rewards",
    "TrainerCallback": "diffusers_vrpo.training.callbacks",
    "VRPO": "diffusers_vrpo.alignment.objective",
    "VRPOConfig": "diffusers_vrpo.config",
    "VRPOPipeline": "diffusers_vrpo.pipelines",
    "VRPOTrainer": "diffusers_vrpo.trainer",
    "load_encoder": "diffusers_vrpo.alignment.encoders",
    "sit_preset": "diffusers_vrpo.models.transformer_sit",
}
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
