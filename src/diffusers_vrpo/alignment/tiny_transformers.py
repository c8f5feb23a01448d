# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Transformers of diffusers with tiny configurations and random weights, and what each is called with.

All have four blocks of width 32 and get two samples with 16 image tokens; texts have 5 tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch
from torch import nn

from ..models.transformer_sit import SiTTransformer2DModel


class TinyTransformer(NamedTuple):
    """A model, its arguments by name, and further arguments of `AlignedTransformer`."""

    model: nn.Module
    arguments: dict
    options: dict


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
MAP = {"in_channels": 4, "out_channels": 4}


def _latents(**others) -> dict:
    """Maps of 8x8, flow times and text embeddings, with further arguments."""
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([0.3, 0.6]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    } | others


def _packed(id_width: int, **others) -> dict:
    """Packed latents with the positions of image and text tokens."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    image_ids = torch.zeros(16, id_width)
    image_ids[:, 1], image_ids[:, 2] = rows.flatten(), columns.flatten()
    packed = {"hidden_states": torch.randn(2, 16, 16), "img_ids": image_ids, "txt_ids": torch.zeros(5, id_width)}
    return _latents(**packed) | others


def _sit():
    model = SiTTransformer2DModel(sample_size=8, num_layers=4, num_classes=10, **HEADS)
    arguments = _latents(class_labels=torch.tensor([1, 2]))
    del arguments["encoder_hidden_states"]
    return model, arguments


def _dit():
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=4, num_embeds_ada_norm=10, in_channels=4, out_channels=8, **HEADS
    )
    arguments = _latents(class_labels=torch.tensor([1, 2]), timestep=torch.tensor([300, 600]))
    del arguments["encoder_hidden_states"]
    return model, arguments


def _pixart():
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=4,
        cross_attention_dim=32,
        caption_channels=12,
        use_additional_conditions=False,
        **HEADS,
    )
    resolution = {"resolution": None, "aspect_ratio": None}
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    timestep = torch.tensor([300, 600])
    return model, _latents(timestep=timestep, added_cond_kwargs=resolution, encoder_attention_mask=mask)


def _sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=4,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
        **MAP,
        **HEADS,
    )
    return model, _latents(timestep=torch.tensor([300.0, 600.0]), pooled_projections=torch.randn(2, 6))


def _flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )
    return model, _packed(3, pooled_projections=torch.randn(2, 6))


def _flux2():
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **HEADS,
    )
    return model, _packed(4)


def _chroma():
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **HEADS,
    )
    return model, _packed(3)


def _bria():
    model = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=12, axes_dims_rope=[4, 6, 6], **HEADS
    )
    return model, _packed(3)


def _qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=4, joint_attention_dim=12, axes_dims_rope=(4, 6, 6), **HEADS
    )
    arguments = _latents(hidden_states=torch.randn(2, 16, 16), img_shapes=[[(1, 4, 4)]] * 2)
    arguments["encoder_hidden_states_mask"] = torch.ones(2, 5, dtype=torch.long)
    return model, arguments


def _sana():
    model = diffusers.SanaTransformer2DModel(
        sample_size=4,
        patch_size=1,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=12,
        **MAP,
        **HEADS,
    )
    return model, _latents(hidden_states=torch.randn(2, 4, 4, 4))


def _lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(16, 16, 16),
        cap_feat_dim=12,
    )
    # The captions have 5 and 3 tokens, and the image's follow each.
    return model, _latents(encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))


def _lumina_next():
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=12,
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    rotary = get_2d_rotary_pos_embed_lumina(16, 8, 8)
    return model, _latents(encoder_mask=mask, image_rotary_emb=rotary, cross_attention_kwargs={})


def _hunyuan_dit():
    model = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=4,
        use_style_cond_and_image_meta_size=False,
        **HEADS,
    )
    arguments = _latents(timestep=torch.tensor([300.0, 600.0]), encoder_hidden_states_t5=torch.randn(2, 4, 16))
    arguments["text_embedding_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    arguments["text_embedding_mask_t5"] = torch.ones(2, 4, dtype=torch.long)
    return model, arguments


def _cogview_sizes() -> dict:
    size = torch.tensor([[64.0, 64.0]] * 2)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(2, 2)}


def _cogview3():
    model = diffusers.CogView3PlusTransformer2DModel(
        sample_size=8,
        num_layers=4,
        text_embed_dim=12,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        **MAP,
        **HEADS,
    )
    return model, _latents(timestep=torch.tensor([300, 600]), **_cogview_sizes())


def _cogview4():
    model = diffusers.CogView4Transformer2DModel(
        sample_size=8, num_layers=4, text_embed_dim=12, time_embed_dim=16, condition_dim=8, **MAP, **HEADS
    )
    return model, _latents(timestep=torch.tensor([300.0, 600.0]), **_cogview_sizes())


def _aura_flow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pos_embed_max_size=16,
        **MAP,
        **HEADS,
    )
    return model, _latents()


def _prx():
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=12, hidden_size=32, num_heads=2, depth=4, axes_dim=[8, 8]
    )
    return model, _latents(attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool())


def _unet():
    """A UNet whose four transformer blocks, all at half resolution, are named by hand."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=16,
    )
    parts = [model.down_blocks[1], model.mid_block, model.up_blocks[0]]
    blocks = [block for part in parts for attention in part.attentions for block in attention.transformer_blocks]
    arguments = _latents(timestep=torch.tensor([300, 600]))
    arguments = {"sample": arguments.pop("hidden_states"), **arguments}
    return model, arguments, {"blocks": blocks, "hidden_dim": 32, "grid_size": (4, 4)}


TRANSFORMERS: dict[str, Callable] = {
    "SiTTransformer2DModel": _sit,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "ChromaTransformer2DModel": _chroma,
    "BriaTransformer2DModel": _bria,
    "QwenImageTransformer2DModel": _qwen_image,
    "SanaTransformer2DModel": _sana,
    "Lumina2Transformer2DModel": _lumina2,
    "LuminaNextDiT2DModel": _lumina_next,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "CogView3PlusTransformer2DModel": _cogview3,
    "CogView4Transformer2DModel": _cogview4,
    "AuraFlowTransformer2DModel": _aura_flow,
    "PRXTransformer2DModel": _prx,
    "UNet2DConditionModel": _unet,
}


def build(name: str) -> TinyTransformer:
    """Builds a tiny transformer of a class named in `TRANSFORMERS`, in evaluation mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, arguments, *options = TRANSFORMERS[name]()
        # Fresh models have gates of zero, which hide most gradients.
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return TinyTransformer(model.eval(), arguments, options[0] if options else {})
