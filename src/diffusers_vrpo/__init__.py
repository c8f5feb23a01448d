# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Representation-aligned training of class-conditional diffusion transformers, native to diffusers."""

from diffusers import ModelMixin, SchedulerMixin  # noqa: F401  (where diffusers looks for the base classes)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .pipeline_vrpo import VRPOPipeline
from .scheduling_sit_sde import SiTSDEScheduler
from .transformer_sit import SIT_PRESETS, SiTTransformer2DModel, sit_preset


__version__ = "0.1.0"
__all__ = ["SIT_PRESETS", "SiTSDEScheduler", "SiTTransformer2DModel", "VRPOPipeline", "sit_preset"]

# diffusers loads components of these libraries only (so named in `model_index.json`); their base classes are its own.
LOADABLE_CLASSES.setdefault("diffusers_vrpo", {})
