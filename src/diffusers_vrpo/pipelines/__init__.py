# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The pipeline, its SDE scheduler, samplers, and folders of samples."""

from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .pipeline_vrpo import VRPOPipeline
from .scheduling_sit_sde import SiTSDEScheduler


__all__ = ["SiTSDEScheduler", "VRPOPipeline"]

# diffusers loads components only from the libraries listed here, by their name in `model_index.json`.
LOADABLE_CLASSES.setdefault("diffusers_vrpo", {})
