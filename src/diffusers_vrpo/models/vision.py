# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Helpers for frozen vision encoders, shared by alignment, data and evaluation."""


def layers_of_encoders(encoders: list[str] | None, layers: list[int] | None) -> list[int | None]:
    """Expands `encoder_layer` to one entry per encoder: a single number is for all; None is an encoder's default."""
    layers = layers or [None]
    return layers * (len(encoders or []) // len(layers))
