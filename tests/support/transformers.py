# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Small transformers of diffusers with random weights, and what each is called with."""

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from support.models import tiny_model
from support.official import tiny_dit


TRANSFORMERS = ["SiT", "DiT", "PixArt", "SD3", "Flux", "Sana"]
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16}


def build(name: str) -> tuple[nn.Module, dict]:
    """A small transformer of diffusers with random weights, and what it is called with; 16 tokens of width 32."""
    torch.manual_seed(0)
    x, t, text, pooled = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 12), torch.randn(2, 6)
    labels = torch.tensor([1, 2])
    if name == "SiT":
        return tiny_model(num_layers=4), {"hidden_states": x, "timestep": t, "class_labels": labels}
    if name == "DiT":
        model = tiny_dit(**SIZES, num_layers=4)
        return model, {"hidden_states": x, "timestep": torch.tensor([3, 4]), "class_labels": labels}
    if name == "PixArt":
        model = PixArtTransformer2DModel(
            **SIZES,
            sample_size=8,
            num_layers=4,
            cross_attention_dim=32,
            caption_channels=12,
            use_additional_conditions=False,
        )
        arguments = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        arguments |= {"hidden_states": x, "encoder_hidden_states": text, "timestep": torch.tensor([3, 4])}
    elif name == "SD3":
        model = SD3Transformer2DModel(
            **SIZES,
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            joint_attention_dim=12,
            caption_projection_dim=32,
            pooled_projection_dim=6,
            pos_embed_max_size=8,
        )
        arguments = {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": 1000 * t,
        }
    elif name == "Flux":
        model = FluxTransformer2DModel(
            **SIZES,
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=12,
            pooled_projection_dim=6,
            axes_dims_rope=(4, 4, 8),
        )
        arguments = {"hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": text, "timestep": t}
        arguments |= {"pooled_projections": pooled, "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    else:
        model = SanaTransformer2DModel(
            **SIZES,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=12,
            sample_size=4,
            patch_size=1,
        )
        arguments = {"hidden_states": x[:, :, :4, :4], "encoder_hidden_states": text, "timestep": t}
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval(), arguments
