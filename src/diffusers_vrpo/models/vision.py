# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What alignment, data and evaluation share of frozen vision encoders."""


def layers_of_encoders(encoders: list[str] | None, layers: list[int] | None) -> list[int | None]:
    """`encoder_layer` for each of `encoder`: one number holds for all, none is the default of each."""
    layers = layers or [None]
    return layers * (len(encoders or []) // len(layers))
