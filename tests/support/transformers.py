# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Small transformers of diffusers with random weights, and what each is called with."""

from torch import nn

from diffusers_vrpo.alignment.tiny_transformers import build as build_tiny


TRANSFORMERS = ["SiT", "DiT", "PixArt", "SD3", "Flux", "Sana"]


def build(name: str) -> tuple[nn.Module, dict]:
    """A small transformer of diffusers with random weights, and what it is called with; 16 tokens of width 32."""
    model, arguments, _ = build_tiny(f"{name}Transformer2DModel")
    return model, arguments
