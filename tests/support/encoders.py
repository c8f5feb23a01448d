# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Tiny encoders of every family, with random weights."""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModel


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**VIT, "image_size": 64, "patch_size": 16}
TEXT = {**VIT, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FLEXIBLE = {**VIT, "num_patches": 16, "patch_size": 16}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
EFFICIENT = {"hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 64}
# Name, its class of config and arguments, prefix tokens. The native grid of each ViT is 4x4.
VITS = {
    "dinov2": ("Dinov2Config", {**VISION, "patch_size": 14, "image_size": 56}, 1),
    "dinov2-registers": ("Dinov2WithRegistersConfig", {**VISION, "num_register_tokens": 3}, 4),
    "dinov3": ("DINOv3ViTConfig", {**VISION, "num_register_tokens": 4}, 5),
    "vit": ("ViTConfig", VISION, 1),
    "deit": ("DeiTConfig", VISION, 2),
    "beit": ("BeitConfig", {**VISION, "use_relative_position_bias": True}, 1),
    "data2vec": ("Data2VecVisionConfig", VISION, 1),
    "vit-mae": ("ViTMAEConfig", VISION, 1),
    "ijepa": ("IJepaConfig", VISION, 0),
    "clip-vision": ("CLIPVisionConfig", VISION, 1),
    "siglip-vision": ("SiglipVisionConfig", VISION, 0),
    "siglip2-vision": ("Siglip2VisionConfig", FLEXIBLE, 0),
}
DUALS = {
    "clip": ("CLIPConfig", {"text_config": TEXT, "vision_config": VISION}, 1),
    "siglip": ("SiglipConfig", {"text_config": TEXT, "vision_config": VISION}, 0),
    "siglip2": ("Siglip2Config", {"text_config": TEXT, "vision_config": FLEXIBLE}, 0),
}
# Name, config, the default layer.
CONVS = {
    "resnet": ("ResNetConfig", {"embedding_size": 8, **STAGES}, 3),
    "convnext": ("ConvNextConfig", STAGES, 3),
    "regnet": ("RegNetConfig", {"embedding_size": 8, "groups_width": 8, **STAGES}, 3),
    "efficientnet": ("EfficientNetConfig", EFFICIENT, 5),
    "swin": ("SwinConfig", {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}, 2),
    "dinov3-convnext": ("DINOv3ConvNextConfig", STAGES, 3),
}
OTHERS = {
    "bert": ("BertConfig", {**VIT, "vocab_size": 50}),
    "yolos": ("YolosConfig", {**VISION, "image_size": [64, 64]}),
    "deep-resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8] * 8, "depths": [1] * 8}),
}
ALL = {**VITS, **DUALS, **CONVS, **OTHERS}


def transformers_output(folder, name, pixels, **arguments):
    """transformers' own output for pixels of the native size."""
    model = AutoModel.from_pretrained(folder).eval()
    model = model.vision_model if name in DUALS else model
    with torch.no_grad():
        if name.startswith("siglip2"):
            patches = [
                image[:, y : y + 16, x : x + 16].permute(1, 2, 0).flatten()
                for image in pixels
                for y in range(0, 64, 16)
                for x in range(0, 64, 16)
            ]
            patches = torch.stack(patches).unflatten(0, (len(pixels), -1))
            return model(patches, torch.ones(patches.shape[:2]), torch.tensor([[4, 4]] * len(pixels)), **arguments)
        if name == "vit-mae":
            model.config.mask_ratio = 0.0
            arguments["noise"] = torch.linspace(0, 1, 16).expand(len(pixels), -1)
        return model(pixels, **arguments)


def save_encoder(folder: Path, name: str):
    """Saves a tiny model of that name, one of `ALL`, with random weights and a processor's file."""
    config_class, arguments = ALL[name][:2]
    torch.manual_seed(0)
    model = AutoModel.from_config(getattr(transformers, config_class)(**arguments))
    model.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
