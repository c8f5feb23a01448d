# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Autoencoders: encode images to scaled latents, and determine the shape of the transformer's input."""

import math
import os

import numpy as np
import torch
from diffusers import AutoModel
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..errors import HUB_OUT_OF_REACH, InputError, first_line, hub_problem


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoders

# The classes of diffusers whose latents one scale and one shift normalise, and that take images in [-1, 1]. Others have
# statistics of their own (Flux.2), another range of pixels (RAE) or a time axis, and would train on wrong latents.
SUPPORTED_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL", "VQModel")


def load_vae(name_or_path: str, cache_dir: str | None = None) -> torch.nn.Module:
    """Loads a frozen diffusers autoencoder in float32, from a folder, a Hub name, or the `vae` folder of a pipeline.

    Raises:
        InputError: if it does not exist, is not an image autoencoder of a supported class, or its configuration has a
            scale that cannot be used.
    """
    if not os.path.isdir(name_or_path) and name_or_path.startswith((".", "/", "~")):
        raise InputError("vae", f"`vae` {name_or_path} is not a folder")
    # A Hub out of reach is asked once: each of the files would be tried five times, in both places.
    local_only = os.path.isdir(name_or_path) or not hub_answers(name_or_path)
    problem = None
    for subfolder in (None, "vae"):
        try:
            vae = AutoModel.from_pretrained(
                name_or_path, subfolder=subfolder, cache_dir=cache_dir, local_files_only=local_only
            )
            break
        except Exception as error:  # diffusers raises many types; all mean that it cannot be loaded
            problem = problem or hub_problem(error, name_or_path) or f"diffusers cannot load it ({first_line(error)})"
    else:
        if problem == HUB_OUT_OF_REACH:
            raise InputError("vae", f"`vae` {name_or_path}: {problem}, or `none` to train on pixels")
        raise InputError(
            "vae",
            f"`vae` {name_or_path}: {problem}; give a folder or Hub name such as stabilityai/sd-vae-ft-ema, or `none` "
            "to train on pixels",
        )
    if not (hasattr(vae, "encode") and hasattr(vae, "decode")):
        raise InputError(
            "vae",
            f"`vae` {name_or_path} is a {type(vae).__name__}, not an image autoencoder; give an AutoencoderKL, "
            "AutoencoderTiny or AutoencoderDC",
        )
    check_vae(vae, name_or_path)
    return vae.eval().requires_grad_(False)


def hub_answers(name: str) -> bool:
    """Whether the Hub can be reached, also if it answers that it does not have the model or does not give it."""
    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError as error:
        return error.response is not None
    except Exception:  # offline mode and the many types of a failed connection
        return False
    return True


def check_vae(vae, name: str):
    """Checks that the latents of an autoencoder can be scaled rightly.

    Classes from outside diffusers are taken as they are; only their configuration is checked.

    Args:
        vae: the autoencoder.
        name: how messages name it.

    Raises:
        InputError: if it is a class of diffusers that is not in `SUPPORTED_CLASSES`, or `scaling_factor`,
            `shift_factor`, `latents_mean` or `latents_std` of its configuration cannot be used.
    """
    kind = type(vae).__name__
    if type(vae).__module__.startswith("diffusers.") and kind not in SUPPORTED_CLASSES:
        raise InputError(
            "vae",
            f"`vae` {name} is a {kind}, whose latents or pixels need a treatment of their own; give an "
            f"{', '.join(SUPPORTED_CLASSES[:-1])} or {SUPPORTED_CLASSES[-1]}",
        )
    config = getattr(vae, "config", None)
    scale = getattr(config, "scaling_factor", None)
    if scale is not None and not (is_finite_number(scale) and scale > 0):
        raise InputError(
            "vae",
            f"`vae` {name}: `scaling_factor` in its config.json is {scale!r}; it must be a positive number, such as "
            "0.18215",
        )
    shift = getattr(config, "shift_factor", None)
    if shift is not None and not is_finite_number(shift):
        raise InputError(
            "vae", f"`vae` {name}: `shift_factor` in its config.json is {shift!r}; it must be a finite number or null"
        )
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None and std is None:
        return
    channels = getattr(config, "latent_channels", None)
    for values in (mean, std):
        if not isinstance(values, (list, tuple)) or len(values) != channels or not all(map(is_finite_number, values)):
            raise InputError(
                "vae",
                f"`vae` {name}: `latents_mean` and `latents_std` in its config.json must both be lists of {channels} "
                "finite numbers, or both null",
            )
    if min(std) <= 0:
        raise InputError("vae", f"`vae` {name}: `latents_std` in its config.json has {min(std)}; it must be positive")
    if shift:
        raise InputError(
            "vae",
            f"`vae` {name}: its config.json has both `shift_factor` {shift} and `latents_mean`, and only one can be "
            "subtracted; set the one that is not meant to null",
        )


def is_finite_number(value) -> bool:
    """Whether a value of a JSON file is a finite number; truth values are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@torch.no_grad()
def encode_moments(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes `pixels [B,3,H,W]` in [-1, 1] to the mean and standard deviation of their latents.

    Both are `[B,C,h,w]` float32 and not scaled yet; the second is None if the autoencoder has no posterior.
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


def latent_statistics(vae) -> dict[str, list[float]]:
    """`latents_mean` and `latents_std` of an autoencoder's configuration, one number per channel; empty without them."""
    names = ("latents_mean", "latents_std")
    statistics = {name: getattr(vae.config, name, None) for name in names}
    return {} if None in statistics.values() else {name: list(values) for name, values in statistics.items()}


def scale_and_shift(vae) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """`(scale, shift)` of an autoencoder: the transformer sees `(latents - shift) * scale`.

    Both are numbers, or float32 tensors `[C,1,1]` if the configuration has statistics of every channel: then, as in
    diffusers, the shift is the mean and the scale is `scaling_factor` divided by the standard deviation.
    """
    scale, shift = getattr(vae.config, "scaling_factor", None) or 1.0, getattr(vae.config, "shift_factor", None) or 0.0
    if not (statistics := latent_statistics(vae)):
        return scale, shift
    mean, std = (torch.tensor(values, device=vae.device).view(-1, 1, 1) for values in statistics.values())
    return scale / std, mean


def encode_images(vae, pixels: torch.Tensor, posterior_noise: torch.Tensor | None = None) -> torch.Tensor:
    """Encodes `pixels [B,3,H,W]` in [-1, 1] to scaled latents `[B,C,h,w]` float32: the posterior's mean without noise.

    With `vae=None` it returns the pixels.
    """
    if vae is None:
        return pixels
    latents, std = encode_moments(vae, pixels)
    if std is not None and posterior_noise is not None:
        latents = latents + std * posterior_noise
    scale, shift = scale_and_shift(vae)
    return (latents - shift) * scale


def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Decodes scaled latents `[B,C,h,w]` to images `[B,3,H,W]`, about [-1, 1], float32, with gradients to the latents.

    The autoencoder computes in its own dtype, or in that of the autocast around the call. With `vae=None` it returns the
    latents, which are pixels then.
    """
    if vae is None:
        return latents
    scale, shift = scale_and_shift(vae)
    return vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0].float()


@torch.no_grad()
def reconstruction_problem(vae, image: np.ndarray) -> str | None:
    """Describes an absurd error of `decode(encode(image))`, else returns None.

    Absurd is a mean squared error above the image's own variance: its mean colour would be a better reconstruction.

    Args:
        vae: the autoencoder; None reconstructs exactly.
        image: uint8 `[R,R,3]`.
    """
    if vae is None:
        return None
    pixels = torch.from_numpy(image).to(vae.device).permute(2, 0, 1)[None].float() / 127.5 - 1
    try:
        with torch.autocast(pixels.device.type, enabled=False):
            decoded = vae.decode(encode_moments(vae, pixels)[0].to(vae.dtype), return_dict=False)[0].float()
    except Exception as error:  # training needs no decoder; the sample grids would fail in the same way
        return f"it cannot decode what it has encoded ({first_line(error)})"
    if decoded.shape != pixels.shape:
        return f"an image of {list(pixels.shape[1:])} comes back as {list(decoded.shape[1:])}"
    error = (decoded - pixels).square().mean().item()
    # Nearly flat images have next to no variance, and sound autoencoders still err a little.
    limit = max((pixels - pixels.mean((2, 3), keepdim=True)).square().mean().item(), 0.02)
    if error <= limit:  # false for NaN
        return None
    return (
        f"decode(encode(image)) of one image has a mean squared error of {error:.3g}, and the image's mean colour has "
        f"{limit:.3g}; is it trained, and for this `resolution` and these images?"
    )


def latent_shape(vae, resolution: int, patch_size: int) -> tuple[int, int, int]:
    """The shape `(C, h, w)` of the transformer's training input.

    Raises:
        InputError: if the resolution is not a multiple of the autoencoder's factor times the patch size.
    """
    channels, factor = 3, 1
    if vae is not None:
        try:
            probe = encode_images(vae, torch.zeros(1, 3, 128, 128, device=vae.device))
        except Exception as error:  # an error on one blank image would also occur in training
            raise InputError(
                "vae",
                f"`vae`: a {type(vae).__name__} does not encode RGB images ({first_line(error)}); give an "
                "AutoencoderKL, AutoencoderTiny or AutoencoderDC",
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
