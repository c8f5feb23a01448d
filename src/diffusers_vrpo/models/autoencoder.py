# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Autoencoders: images to scaled latents, and the shape of what the transformer is trained on."""

import os

import torch
from diffusers import AutoModel

from ..errors import InputError, first_line, hub_problem


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoders


def load_vae(name_or_path: str, cache_dir: str | None = None) -> torch.nn.Module:
    """A frozen diffusers autoencoder in float32, from a folder or a Hub name, or from the `vae` folder of a pipeline.

    Raises:
        InputError: when there is none, or it is not an image autoencoder.
    """
    if not os.path.isdir(name_or_path) and name_or_path.startswith((".", "/", "~")):
        raise InputError("vae", f"`vae` {name_or_path} is not a folder")
    problem = None
    for subfolder in (None, "vae"):
        try:
            vae = AutoModel.from_pretrained(name_or_path, subfolder=subfolder, cache_dir=cache_dir)
            break
        except Exception as error:  # diffusers raises many types; all mean that this is none
            problem = problem or hub_problem(error, name_or_path) or f"diffusers cannot load it ({first_line(error)})"
    else:
        raise InputError(
            "vae",
            f"`vae` {name_or_path}: {problem}; a folder or Hub name such as stabilityai/sd-vae-ft-ema would do, or `none` "
            "to train on pixels",
        )
    if not (hasattr(vae, "encode") and hasattr(vae, "decode")):
        raise InputError(
            "vae",
            f"`vae` {name_or_path} is a {type(vae).__name__}, not an autoencoder; AutoencoderKL, AutoencoderTiny or "
            "AutoencoderDC would do",
        )
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_moments(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the latents of `pixels [B,3,H,W]` in [-1, 1], as the autoencoder gives them.

    Both are `[B,C,h,w]` float32 and not scaled yet; where an autoencoder has no posterior, the second is None.
    """
    means, stds = [], []
    # 32 at a time: a batch of 256 images of 256 pixels would take tens of gigabytes of activations.
    for part in pixels.split(32):
        with torch.autocast(pixels.device.type, enabled=False):
            encoded = vae.encode(part.to(vae.dtype))
        if hasattr(encoded, "latent_dist"):
            means.append(encoded.latent_dist.mean.float())
            stds.append(encoded.latent_dist.std.float())
        else:
            means.append((encoded.latents if hasattr(encoded, "latents") else encoded.latent).float())
    return torch.cat(means), torch.cat(stds) if stds else None


def scale_and_shift(vae) -> tuple[float, float]:
    """`(scale, shift)` of an autoencoder: the transformer sees `(latents - shift) * scale`."""
    return getattr(vae.config, "scaling_factor", None) or 1.0, getattr(vae.config, "shift_factor", None) or 0.0


def encode_images(vae, pixels: torch.Tensor, posterior_noise: torch.Tensor | None = None) -> torch.Tensor:
    """Scaled latents `[B,C,h,w]` float32 of `pixels [B,3,H,W]` in [-1, 1]; the posterior's mean without noise.

    With `vae=None` these are the pixels themselves.
    """
    if vae is None:
        return pixels
    latents, std = encode_moments(vae, pixels)
    if std is not None and posterior_noise is not None:
        latents = latents + std * posterior_noise
    scale, shift = scale_and_shift(vae)
    return (latents - shift) * scale


def latent_shape(vae, resolution: int, patch_size: int) -> tuple[int, int, int]:
    """`(C, h, w)` of what the transformer is trained on.

    Raises:
        InputError: when the resolution is not a multiple of the autoencoder's factor times the patch size.
    """
    channels, factor = 3, 1
    if vae is not None:
        try:
            probe = encode_images(vae, torch.zeros(1, 3, 128, 128, device=vae.device))
        except Exception as error:  # whatever it raises on one blank image, it would raise in training
            raise InputError(
                "vae",
                f"`vae`: a {type(vae).__name__} does not encode RGB images ({first_line(error)}); AutoencoderKL, "
                "AutoencoderTiny or AutoencoderDC would do",
            ) from error
        channels, factor = probe.shape[1], 128 // probe.shape[-1]
    unit = factor * patch_size
    if resolution <= 0 or resolution % unit:
        below = resolution // unit * unit
        near = " or ".join(str(r) for r in (below, below + unit) if r > 0)
        raise InputError(
            "resolution",
            f"`resolution` {resolution} is not divisible by {unit} (autoencoder factor {factor} x patch size "
            f"{patch_size}); {near} would do",
        )
    return channels, resolution // factor, resolution // factor
