# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Small transformers and autoencoders with random weights, and what they are called with."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file

from diffusers_vrpo import SiTTransformer2DModel
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.models.official_checkpoints import convert_with_projectors


TINY = {
    "sample_size": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 5,
}


# There diffusers' attention dispatch asks for versions in a way that torch cannot trace.
needs_compiler = pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 cannot compile the blocks whole")


def tiny_model(**changes) -> SiTTransformer2DModel:
    """A small model with random weights everywhere: fresh adaLN-zero models output 0 and show nothing."""
    torch.manual_seed(0)
    model = SiTTransformer2DModel(**{**TINY, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def aligned_with(model, layers=(2,), dims=(12,), projector="mlp", projector_dim=24, **options) -> AlignedTransformer:
    """Projectors with random weights on a model, for encoders of which only the width is known."""
    encoders = [SimpleNamespace(embed_dim=dim) for dim in dims]
    aligned = AlignedTransformer(model, list(layers), encoders, projector, projector_dim, **options)
    torch.manual_seed(1)
    for parameter in aligned.projectors.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return aligned.eval()


def inputs(batch=2, channels=4, height=8, width=8):
    """Noisy images, their timesteps and their class labels, always the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 5


def load_golden(shared, name: str):
    """A model of the official code, converted and with its projectors, and what the official code computed with it."""
    folder = shared / "golden" / name
    heads = json.loads((folder / "config.json").read_text())["num_heads"]
    aligned = aligned_as_saved(*convert_with_projectors(str(folder / "checkpoint.pt"), num_attention_heads=heads))
    return aligned, load_file(folder / "tensors.safetensors")


def aligned_as_saved(model, projectors) -> AlignedTransformer:
    """A model with the projectors that were saved with it, if any."""
    if projectors is None:
        return AlignedTransformer(model)
    saved = projectors.description
    kind = (saved["projector_type"], saved["projector_dim"])
    aligned = aligned_with(model, saved["alignment_layers"], saved["alignment_dims"], *kind)
    assert aligned.load_projectors(saved, projectors.state)
    return aligned


def digits_model(**changes) -> SiTTransformer2DModel:
    """A small model for the digits: 8x8 pixels of 3 channels, 10 classes."""
    arguments = {"in_channels": 3, "num_classes": 10, "num_layers": 2, **changes}
    return tiny_model(**arguments)


def tiny_vae(kind):
    """A small autoencoder with random weights: `kl`, `tiny` or `dc`."""
    torch.manual_seed(0)
    if kind == "kl":
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.3,
            shift_factor=0.1,
        )
    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.5,
    )
