# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""One feature vector per image, for metrics: the FID Inception network or any vision encoder of transformers.

The vector of an encoder is the one that the literature uses for its family: the class token after the last norm for
DINOv2, DINOv3 and MAE (as in FD-DINOv2, arXiv 2306.04675), the projected image embedding for CLIP, the
attention-pooled embedding for SigLIP, the globally pooled map for a conv net, and the mean of the tokens for models
without a class token.
"""

from collections.abc import Iterable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn

from ..alignment.encoders import (
    REMEDY,
    _apply,
    _explain,
    _first_sentence,
    _load_model,
    _locate,
    _native_size,
    _pixel_format,
    _quiet_transformers,
    _states,
    _token_map,
)
from ..errors import InputError
from ..reach import offline_if_out_of_reach
from .inception import FIDInception, load_inception


POOLINGS = ("auto", "mean")


class ImageEncoder(nn.Module):
    """A frozen transformers model that returns one vector per image; `load_image_encoder` loads it.

    Attributes:
        dim (`int`): D, the length of a vector.
        input_size (`tuple[int, int]`): height and width in pixels to which images are resized.
        kind (`str`): description of the vector.
        shallow_layer (`int`, *optional*): index of a hidden state whose mean over the image is also returned, as `shallow`.
    """

    def __init__(self, model, input_size, pixel_format, pooling):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.input_size = input_size
        self.pooling = pooling
        self.shallow_layer = None
        mean, std, self.flip_channels = pixel_format
        self.register_buffer("mean", torch.tensor(mean, device=model.device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device=model.device).view(1, 3, 1, 1), persistent=False)
        blank = torch.zeros(1, 3, *input_size, dtype=torch.uint8, device=model.device)
        vector, self.kind = self._encode(blank)[:2]
        self.dim = vector.shape[1]

    def train(self, mode=True):
        """Keeps evaluation mode."""
        return super().train(False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Converts uint8 images `[B, 3, H, W]` to the model's normalised pixels `[B, 3, *input_size]`, float32."""
        pixels = images.float() / 255
        if tuple(pixels.shape[2:]) != self.input_size:
            pixels = F.interpolate(pixels, self.input_size, mode="bicubic", antialias=True).clamp(0, 1)
        if self.flip_channels:
            pixels = pixels.flip(1)
        return (pixels - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns `{"pool": [B, D]}`, float32, for uint8 RGB images `[B, 3, H, W]`; also `shallow` if enabled."""
        if images.dtype != torch.uint8:
            raise ValueError(f"`images` must be uint8, not {images.dtype}")
        vector, _, shallow = self._encode(images)
        return {"pool": vector} if shallow is None else {"pool": vector, "shallow": shallow}

    @torch.no_grad()
    def _encode(self, images):
        shallow = None
        with torch.autocast(images.device.type, enabled=False):
            output = _apply(self.model, self.preprocess(images), hidden_states=self.shallow_layer is not None)
            vector, kind = image_vector(output, self.model.config, self.input_size, self.pooling)
            if self.shallow_layer is not None:
                state = _states(output)[self.shallow_layer]
                maps = _token_map(state, self.model.config, self.input_size) if state.ndim == 3 else state
                shallow = maps.mean((2, 3)).float()
        return vector.float(), kind, shallow

    def take_shallow(self, layer: int | None = None, option: str = "reward_shallow_layer"):
        """Enables the output `shallow`: the mean over the image of a hidden state, without class and register tokens.

        Args:
            layer: index of the hidden state; by default at a quarter of the depth.
            option: the option that messages name.

        Raises:
            InputError: if the model does not have the layer, or the layer has no rows and columns.
        """
        blank = torch.zeros(1, 3, *self.input_size, device=self.mean.device)
        with torch.no_grad():
            states = _states(_apply(self.model, self.preprocess(blank.to(torch.uint8)), hidden_states=True))
        layer = min(max(1, len(states) // 4), len(states) - 1) if layer is None else layer
        if not 0 <= layer < len(states):
            raise InputError(
                option, f"`{option}` {layer}: the reward encoder has hidden states 0 to {len(states) - 1}"
            )
        before, self.shallow_layer = self.shallow_layer, layer
        try:
            self._encode(blank.to(torch.uint8))
        except (ValueError, RuntimeError, IndexError, AttributeError) as error:
            self.shallow_layer = before
            raise InputError(
                option, f"`{option}` {layer} has no rows and columns ({_first_sentence(error)}); take another"
            ) from error


def image_vector(output, config, size: tuple[int, int], pooling: str) -> tuple[torch.Tensor, str]:
    """Returns the vector `[B, D]` of a transformers vision model's output, and a description of it.

    Args:
        size: height and width of the model's input pixels.
        pooling: `"auto"` for the usual vector of the family, or `"mean"` over the patch tokens or positions.
    """
    features = getattr(output, "last_hidden_state", None)
    pooled = getattr(output, "pooler_output", None)
    pooled = None if pooled is None else pooled.flatten(1)
    if pooling == "auto" and getattr(output, "image_embeds", None) is not None:
        return output.image_embeds, "the projected image embedding"
    if features is None:
        return pooled, "the pooled output"
    if features.ndim == 4:
        # Some conv nets have a norm after pooling, which belongs to their vector.
        if pooling == "auto" and pooled is not None and pooled.shape[1] == features.shape[1]:
            return pooled, "the globally pooled map"
        return features.mean((2, 3)), "the mean of the map"
    patch = getattr(config, "patch_size", None)
    # Some families do not use the class token: they pool by attention (SigLIP), normalise only the pooled vector (CLIP),
    # or use the normalised mean (BEiT). Models without a patch size (DINOv3's conv nets) have no token grid.
    own = config.model_type.startswith(("clip", "siglip")) or getattr(config, "use_mean_pooling", False)
    if pooled is not None and (patch is None or (pooling == "auto" and own)):
        return pooled, "the pooled output"
    prefix = 0
    if patch is not None:
        patch = (patch, patch) if isinstance(patch, int) else patch
        prefix = features.shape[1] - (size[0] // patch[0]) * (size[1] // patch[1])
    if not 0 < prefix <= 16:  # none (I-JEPA), or a pyramid, whose tokens are fewer than its patches
        return features.mean(1), "the mean of all tokens"
    if pooling == "mean":
        return features[:, prefix:].mean(1), "the mean of the patch tokens"
    return features[:, 0], "the class token"


def load_image_encoder(
    name_or_path: str,
    pooling: str = "auto",
    inception_weights: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    cache_dir: str | None = None,
    option: str = "encoder",
) -> "ImageEncoder | FIDInception":
    """Loads the encoder of a metric: `"inception"`, or a Hub name or folder of a transformers vision model.

    On the device, images are resized, not cropped, to the size of the images that the model's processor returns
    (DINOv2: 224 pixels), bicubically with antialiasing.

    Example:

    ```python
    # not run: needs a published encoder
    from diffusers_vrpo import load_image_encoder, pooled_features

    encoder = load_image_encoder("facebook/dinov2-base", device="cuda")  # or "inception"
    features = pooled_features(encoder, images)  # uint8 [N, 3, H, W] -> [N, D]
    ```

    Args:
        name_or_path: `"inception"`, `"embedded:digits"`, or the Hub name or folder of a transformers vision model.
        pooling: `"auto"` for the usual vector of the family, or `"mean"` for the mean of the patch tokens or
            positions; without effect for Inception.
        inception_weights: file of the Inception network; by default torch hub's cache, or a download.
        dtype: dtype of the weights and the computation; float32, the default, keeps metrics comparable. Inception is
            always float32.
        device: the device of the encoder; the CPU by default.
        cache_dir: folder for downloads; the Hub's cache by default.
        option: the option that messages name.

    Raises:
        InputError: if the name is not an encoder, or the checkpoint lacks weights that the vector depends on.
        ValueError: if `pooling` has another value.
    """
    if name_or_path == "inception":
        return load_inception(inception_weights, device, option)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
    prefix = f"`{option}` {name_or_path}: "
    source, local = _locate(name_or_path, option)
    import_module("transformers")  # outside of the `try`, which blames every error on the checkpoint
    try:
        with offline_if_out_of_reach(source):
            model, _ = _load_model(source, dtype, cache_dir, local)
            if model.config.model_type == "clip_vision_model" and pooling == "auto":
                model = _with_projection(source, dtype, cache_dir, local) or model
            pixel_format = _pixel_format(source, cache_dir, local)
            input_size = _input_size(source, model.config, cache_dir, local)
    except InputError:
        raise
    except Exception as error:  # transformers raises many types; all mean that this checkpoint cannot be loaded
        raise InputError(option, prefix + _explain(error, source)) from error
    model = model.to(device)
    try:
        encoder = ImageEncoder(model, input_size, pixel_format, pooling)
        vector = encoder(torch.zeros(1, 3, *input_size, dtype=torch.uint8, device=model.device))["pool"]
    except Exception as error:  # whatever a model raises for a blank image, it would raise later, too
        reason = f"{type(model).__name__} does not return a vector for an image ({_first_sentence(error)})"
        raise InputError(option, f"{prefix}{reason}; {REMEDY}") from error
    if not vector.isfinite().all():
        raise InputError(
            None,
            f"{prefix}its vector ({encoder.kind}) is not finite: the checkpoint lacks weights that it depends on, or "
            f"overflows in {dtype}; {REMEDY}",
        )
    return encoder


def _with_projection(source, dtype, cache_dir, local):
    """Loads CLIP's image tower with its projection; returns None if the checkpoint has none."""
    from transformers import CLIPVisionModelWithProjection

    with _quiet_transformers(local):
        model, info = CLIPVisionModelWithProjection.from_pretrained(
            source, dtype=dtype, output_loading_info=True, cache_dir=cache_dir, local_files_only=local
        )
    return None if any("visual_projection" in key for key in info["missing_keys"]) else model


def _input_size(source, config, cache_dir, local):
    """Height and width of the processor's output (its crop, or else its resize), or else of the model's input."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(
            source, cache_dir=cache_dir, local_files_only=local
        )
    except OSError as error:
        if error.__cause__ is not None:  # the file is not just missing
            raise
        processor = {}
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    elif isinstance(size, int):
        size = (size, size)
    return size if size and all(isinstance(side, int) for side in size) else _native_size(config)


def default_batch_size(device: torch.device) -> int:
    """64 on an accelerator; 4 on a CPU, where larger batches take up to three times as long to allocate and free."""
    return 4 if device.type == "cpu" else 64


@torch.no_grad()
def image_features(
    encoder: "ImageEncoder | FIDInception", images: torch.Tensor, batch_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Computes the vectors `[B, D]` of an encoder by name, float32, on its device.

    Args:
        images: uint8 RGB `[B, 3, H, W]` on any device.
        batch_size: images at a time; `default_batch_size` by default.
    """
    device = next(encoder.parameters()).device
    parts = [encoder(part.to(device)) for part in images.split(batch_size or default_batch_size(device))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def pooled_features(
    encoder: "ImageEncoder | FIDInception",
    images: torch.Tensor | Iterable[torch.Tensor],
    batch_size: int | None = None,
) -> torch.Tensor:
    """Computes features `[N, D]`, float32, on the encoder's device, for `frechet_distance` and other metrics.

    Example:

    ```python
    import torch

    from diffusers_vrpo import load_image_encoder, pooled_features

    encoder = load_image_encoder("embedded:digits")
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    features = pooled_features(encoder, images)  # [4, D]
    ```

    Args:
        encoder: as `load_image_encoder` returns it.
        images: uint8 RGB `[N, 3, H, W]` on any device, or an iterable of such batches, which are used as they are.
        batch_size: images at a time; by default 64, or 4 on a CPU.
    """
    device = next(encoder.parameters()).device
    batch_size = batch_size or default_batch_size(device)
    batches = images.split(batch_size) if isinstance(images, torch.Tensor) else images
    return torch.cat([encoder(batch.to(device))["pool"] for batch in batches])


def encoder_checksum(encoder: nn.Module) -> int:
    """CRC-32 of all weights and statistics of an encoder."""
    from ..models.start import weights_checksum

    return weights_checksum(value for value in encoder.state_dict().values() if value.is_floating_point())


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Converts images in [-1, 1] (a decoder's output) to uint8, rounded as when they are saved: `round(127.5 (x + 1))`.

    Raises:
        InputError: if some are not finite.
    """
    if not images.isfinite().all():
        bad = (~images.isfinite().flatten(1).all(1)).sum().item()
        raise InputError(None, f"{bad} of {len(images)} images are not finite")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
