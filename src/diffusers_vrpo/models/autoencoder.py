# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Loads autoencoders, encodes images to scaled latents, and determines the shape of the transformer's input."""

import contextlib
import math
import os
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from huggingface_hub import HfApi, constants, try_to_load_from_cache

from ..errors import HUB_OUT_OF_REACH, InputError, first_line, hub_problem
from ..reach import offline_if_out_of_reach
from .transformer_sit import WEIGHTS, choose_variant, not_finite, refuse_weights, saved_variants


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoders

# A GPU encodes at most this many images at a time.
ON_A_GPU = 32
# The classes of diffusers that encode images in [-1, 1] and whose latents are normalised by the scale and shift in
# their configuration. Others keep statistics elsewhere (Flux.2), use another range of pixels (RAE) or have a time
# axis, so that their latents would be wrong.
SUPPORTED_CLASSES = (
    "AutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "AutoencoderKLHunyuanImage",
    "AsymmetricAutoencoderKL",
    "VQModel",
)


def load_vae(name_or_path: str, cache_dir: str | None = None) -> torch.nn.Module:
    """Loads a frozen diffusers autoencoder in float32, from a folder, a Hub name, or the `vae` folder of a pipeline.

    The class and the configuration are checked before weights are downloaded. If there are no plain weights but a
    single variant, such as `fp16`, the variant is loaded.

    Raises:
        InputError: if it does not exist, is not an image autoencoder of a supported class, its configuration has a scale
            that cannot be used, or weights are missing, NaN or infinite.
    """
    if not os.path.isdir(name_or_path) and name_or_path.startswith((".", "/", "~")):
        raise InputError("vae", f"`vae` {name_or_path} is not a folder")
    with offline_if_out_of_reach(name_or_path):
        config, subfolder = _find_config(name_or_path, cache_dir)
        check_class(config["_class_name"], name_or_path)
        kind = getattr(diffusers, config["_class_name"])
        try:
            with init_empty_weights():
                check_vae(kind.from_config(config), name_or_path)
            vae, info = kind.from_pretrained(
                name_or_path,
                subfolder=subfolder,
                cache_dir=cache_dir,
                variant=_variant(name_or_path, subfolder, cache_dir),
                output_loading_info=True,
            )
            absent = {name for name, tensor in vae.named_parameters() if tensor.is_meta}
            refuse_weights({"missing": absent | set(info["missing_keys"]), "NaN or infinite": not_finite(vae)})
        except InputError:
            raise
        except Exception as error:  # diffusers raises many types; all mean that it cannot be loaded
            raise _cannot_load(name_or_path, _problem(error, name_or_path)) from error
    return vae.float().eval().requires_grad_(False)


def _find_config(name_or_path: str, cache_dir: str | None) -> tuple[dict, str | None]:
    """Reads the config.json of an autoencoder, which names its class; returns it with the subfolder that it is in."""
    problem = None
    for subfolder in (None, "vae"):
        try:
            config = AutoencoderKL.load_config(name_or_path, subfolder=subfolder, cache_dir=cache_dir)
        except Exception as error:  # diffusers raises many types; all mean that no autoencoder can be read
            problem = problem or _problem(error, name_or_path)
            continue
        if isinstance(config, dict) and isinstance(config.get("_class_name"), str):
            return config, subfolder
        problem = problem or "its config.json does not name a class of diffusers (`_class_name`)"
    raise _cannot_load(name_or_path, problem)


def _problem(error: Exception, name: str) -> str:
    return hub_problem(error, name) or f"diffusers cannot load it ({first_line(error)})"


def _cannot_load(name: str, problem: str) -> InputError:
    if problem == HUB_OUT_OF_REACH:
        return InputError("vae", f"`vae` {name}: {problem}, or `none` to train on pixels")
    return InputError(
        "vae",
        f"`vae` {name}: {problem}; give a folder or Hub name such as stabilityai/sd-vae-ft-ema, or `none` to train on "
        "pixels",
    )


def _variant(name_or_path: str, subfolder: str | None, cache_dir: str | None) -> str | None:
    """The variant of the weights to load; None if there are plain ones.

    Raises:
        ValueError: if there are several variants, or a folder has no weights.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    # diffusers finds an autoencoder's own folder under any subfolder.
    folder = Path(name_or_path, subfolder or "")
    folder = folder if folder.is_dir() else Path(name_or_path)
    if folder.is_dir():
        if not (variants := saved_variants(os.listdir(folder))):
            raise ValueError(f"{folder} has no weights: {WEIGHTS}.safetensors is not there")
        return choose_variant(variants, folder)
    names = []
    if not constants.HF_HUB_OFFLINE:
        with contextlib.suppress(Exception):  # loading the weights will have the same problem and report it
            names = HfApi().list_repo_files(name_or_path)
    names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not names:
        config = try_to_load_from_cache(name_or_path, f"{prefix}config.json", cache_dir=cache_dir)
        names = os.listdir(Path(config).parent) if isinstance(config, str) else []
    return choose_variant(saved_variants(names), name_or_path)


def check_class(kind: str, name: str):
    """Raises InputError if a class, given by its name, is not in `SUPPORTED_CLASSES`; `name` is the autoencoder's."""
    if kind in SUPPORTED_CLASSES:
        return
    found = getattr(diffusers, kind, None)
    why = "not a class of diffusers"
    if found is not None:
        is_autoencoder = "Autoencoder" in kind or "VAE" in kind
        why = "whose latents or pixels need special treatment" if is_autoencoder else "not an image autoencoder"
    raise InputError(
        "vae",
        f"`vae` {name} is a {kind}, {why}; give an {', '.join(SUPPORTED_CLASSES[:-1])} or {SUPPORTED_CLASSES[-1]}",
    )


def check_vae(vae, name: str):
    """Checks that the latents of an autoencoder can be scaled correctly.

    Of classes from outside diffusers, only the configuration is checked.

    Args:
        vae: the autoencoder.
        name: how messages name it.

    Raises:
        InputError: if it is a class of diffusers that is not in `SUPPORTED_CLASSES`, or `scaling_factor`,
            `shift_factor`, `latents_mean` or `latents_std` of its configuration cannot be used.
    """
    if type(vae).__module__.startswith("diffusers."):
        check_class(type(vae).__name__, name)
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
    """Whether a value from a JSON file is a finite number; a truth value is not a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class InPrecision:
    """An autoencoder that encodes under autocast. Its weights stay float32; everything else is as in `vae`.

    Args:
        vae: the autoencoder, in float32.
        dtype (`torch.dtype`): bfloat16 or float16.
    """

    def __init__(self, vae: torch.nn.Module, dtype: torch.dtype):
        self.vae, self.autocast_dtype = vae, dtype

    def __getattr__(self, name: str):
        return getattr(self.vae, name)

    def encode(self, pixels: torch.Tensor):
        with torch.autocast(pixels.device.type, self.autocast_dtype):
            return self.vae.encode(pixels)


def encoding_in(vae: torch.nn.Module | None, dtype: str):
    """The autoencoder, wrapped so that it encodes in `vae_dtype`, given by its name; None stays None."""
    return vae if vae is None or dtype == "float32" else InPrecision(vae, getattr(torch, dtype))


@torch.no_grad()
def check_precision(vae, dtype: str, image: np.ndarray):
    """Checks that an autoencoder encodes an image in another precision to about the same latents as in float32.

    Args:
        vae: the autoencoder, in float32.
        dtype: the name of the precision.
        image: uint8 `[R,R,3]`.

    Raises:
        InputError: if the latents are not finite, or differ from those in float32 by more than a tenth of their
            deviation.
    """
    pixels = torch.from_numpy(image).to(vae.device).permute(2, 0, 1)[None].float() / 127.5 - 1
    exact, found = (encode_moments(each, pixels)[0] for each in (vae, encoding_in(vae, dtype)))
    error = ((found - exact).square().mean().sqrt() / exact.std().clamp_min(1e-6)).item()
    if not error <= 0.1:  # also for NaN
        raise InputError(
            "vae_dtype",
            f"`vae_dtype` {dtype}: the latents of an image differ from those of float32 by {error:.2g} of their standard "
            "deviation (nan: they overflow); give another precision",
        )


@torch.no_grad()
def encode_moments(
    vae, pixels: torch.Tensor, at_a_time: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes `pixels [B,3,H,W]` in [-1, 1] to the mean and standard deviation of their latents.

    Both are float32 `[B,C,h,w]` and not scaled yet; the second is None if the autoencoder has no posterior.
    `at_a_time` images are encoded together; by default, `images_at_a_time` decides.
    """
    if pixels.is_cuda:  # convolutions on a GPU would transpose inputs of another layout; the weights keep their layout
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.autocast(pixels.device.type, enabled=False):
        parts = [_moments(vae, part) for part in pixels.split(at_a_time or images_at_a_time(pixels))]
    means, stds = zip(*parts)
    return torch.cat(means), None if stds[0] is None else torch.cat(stds)


def images_at_a_time(pixels: torch.Tensor) -> int:
    """How many of `pixels [B,3,H,W]` are encoded together.

    On a GPU, it is `ON_A_GPU`: the activations of a batch of 256 images of 256 x 256 pixels would take tens of
    gigabytes. On a CPU, it is as many images as have 32,768 pixels together, but at least one and at most `ON_A_GPU`:
    with more, each layer's memory is above the 32 MB from which glibc returns it to the system, which clears it again
    for the next layer.
    """
    if pixels.device.type != "cpu":
        return ON_A_GPU
    height, width = pixels.shape[-2:]
    return max(1, min(ON_A_GPU, 2**15 // (height * width)))


def _moments(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    encoded = vae.encode(pixels.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    return (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float(), None


def latent_statistics(vae) -> dict[str, list[float]]:
    """`latents_mean` and `latents_std` of an autoencoder's configuration, one number per channel; empty without them."""
    names = ("latents_mean", "latents_std")
    statistics = {name: getattr(vae.config, name, None) for name in names}
    return {} if None in statistics.values() else {name: list(values) for name, values in statistics.items()}


def scale_and_shift(vae) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """Returns `(scale, shift)` of an autoencoder: the transformer sees `(latents - shift) * scale`.

    Both are numbers, or float32 tensors `[C,1,1]` if the configuration has statistics of every channel. In that case,
    as in diffusers, the shift is the mean, and the scale is `scaling_factor` divided by the standard deviation.
    """
    scale, shift = getattr(vae.config, "scaling_factor", None) or 1.0, getattr(vae.config, "shift_factor", None) or 0.0
    if not (statistics := latent_statistics(vae)):
        return scale, shift
    mean, std = (torch.tensor(values, device=vae.device).view(-1, 1, 1) for values in statistics.values())
    return scale / std, mean


def encode_images(
    vae, pixels: torch.Tensor, posterior_noise: torch.Tensor | None = None, at_a_time: int | None = None
) -> torch.Tensor:
    """Encodes `pixels [B,3,H,W]` in [-1, 1] to scaled latents, float32 `[B,C,h,w]`.

    Args:
        vae: the autoencoder; with None, the pixels are returned.
        posterior_noise: normal noise `[B,C,h,w]` that draws from the posterior; without it, the latents are its mean.
        at_a_time: see `encode_moments`.
    """
    if vae is None:
        return pixels
    latents, std = encode_moments(vae, pixels, at_a_time)
    if std is not None and posterior_noise is not None:
        latents = latents + std * posterior_noise
    scale, shift = scale_and_shift(vae)
    return (latents - shift) * scale


def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Decodes scaled latents `[B,C,h,w]` to images, float32 `[B,3,H,W]`, about [-1, 1], with gradients to the latents.

    The autoencoder computes in its own dtype, or in that of an autocast around the call. With `vae=None`, the latents,
    which are pixels then, are returned.
    """
    if vae is None:
        return latents
    scale, shift = scale_and_shift(vae)
    return vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0].float()


@torch.no_grad()
def reconstruction_problem(vae, image: np.ndarray) -> str | None:
    """Describes what is wrong if `decode(encode(image))` is far from the image; None if it is not.

    It is far if the mean squared error is above the image's own variance: the mean colour would be a better
    reconstruction.

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
    # Images of nearly one colour have almost no variance, and good autoencoders still have a small error.
    limit = max((pixels - pixels.mean((2, 3), keepdim=True)).square().mean().item(), 0.02)
    if error <= limit:  # false for NaN
        return None
    return (
        f"decode(encode(image)) of one image has a mean squared error of {error:.3g}, and the image's mean colour has "
        f"{limit:.3g}; is the autoencoder trained, and for this `resolution` and these images?"
    )


class _Applied(torch.nn.Module):
    """An autoencoder whose `forward` is `function(vae, values)`, as `functional_call` needs it."""

    def __init__(self, vae, function):
        super().__init__()
        self.vae = vae
        self.function = function

    def forward(self, values: torch.Tensor):
        return self.function(self.vae, values)


@torch.no_grad()
def on_meta(function, vae, *shape: int):
    """Calls `function(vae, values)` on the meta device, which finds shapes in milliseconds at any size.

    Raises:
        Exception: of any type, if the function does not take that shape, or does not compute on that device.
    """
    applied = _Applied(vae, function)
    state = {**dict(applied.named_parameters()), **dict(applied.named_buffers())}
    state = {name: tensor.to("meta") for name, tensor in state.items()}
    return torch.func.functional_call(applied, state, (torch.zeros(shape, device="meta"),))


def side_factor(vae) -> int | None:
    """The factor by which an autoencoder shrinks sides; None if images of 512 pixels do not tell it."""
    try:
        return 512 // on_meta(_moments, vae, 1, 3, 512, 512)[0].shape[-1]
    except Exception:  # a class from anywhere, which may need another resolution or not compute on that device
        return None


def measure_latents(vae, resolution: int) -> tuple[tuple[int, int, int], bool]:
    """The shape `(C, h, w)` of the latents of an image of `resolution` pixels, and whether they have a posterior.

    They are not extrapolated from another resolution. An autoencoder that does not compute on the meta device encodes
    one blank image on its own.

    Raises:
        Exception: of any type, if the autoencoder cannot encode such an image.
    """
    try:
        mean, std = on_meta(_moments, vae, 1, 3, resolution, resolution)
    except Exception:  # if the real device fails, too, its error is the one to report
        mean, std = encode_moments(vae, torch.zeros(1, 3, resolution, resolution, device=vae.device))
    return tuple(mean.shape[1:]), std is not None


@torch.no_grad()
def decoded_side(vae, channels: int, size: int) -> int:
    """The side in pixels of the images that latents `[channels, size, size]` are decoded to.

    Raises:
        InputError: if the autoencoder does not decode such latents.
    """
    try:
        return on_meta(_decoded, vae, 1, channels, size, size).shape[-1]
    except Exception:  # whatever fails on the meta device may work on the real one
        pass
    try:
        return _decoded(vae, torch.zeros(1, channels, size, size, device=vae.device)).shape[-1]
    except Exception as error:  # every autoencoder fails in its own way
        raise InputError(
            "vae",
            f"`vae` cannot decode the latents of the transformer, {channels} channels of {size}x{size} ({first_line(error)})",
        ) from error


def _decoded(vae, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def latent_layout(vae, resolution: int, patch_size: int) -> tuple[tuple[int, int, int], bool]:
    """The shape `(C, h, w)` of the transformer's training input, and whether the latents have a posterior.

    Raises:
        InputError: if the autoencoder cannot encode RGB images of that size, or the resolution is not a multiple of its
            factor times the patch size.
    """
    if vae is None:
        check_resolution(resolution, 1, patch_size)
        return (3, resolution, resolution), False
    if (factor := side_factor(vae)) is not None:
        check_resolution(resolution, factor, patch_size)
    try:
        shape, has_posterior = measure_latents(vae, resolution)
    except Exception as error:  # an error on one blank image would also occur in training
        raise InputError(
            "vae",
            f"`vae`: a {type(vae).__name__} does not encode RGB images of {resolution} pixels ({first_line(error)}); give "
            "an AutoencoderKL, AutoencoderTiny or AutoencoderDC",
        ) from error
    if len(shape) != 3 or shape[1] % patch_size or shape[2] % patch_size:
        raise InputError(
            "vae",
            f"`vae`: a {type(vae).__name__} encodes images of `resolution` {resolution} to {list(shape)}, not to rows and "
            f"columns in patches of {patch_size}; give another `resolution` or autoencoder",
        )
    return shape, has_posterior


def latent_shape(vae, resolution: int, patch_size: int) -> tuple[int, int, int]:
    """The shape `(C, h, w)` of the transformer's training input; raises InputError as `latent_layout` does."""
    return latent_layout(vae, resolution, patch_size)[0]


def check_resolution(resolution: int, factor: int, patch_size: int):
    """Raises InputError if a resolution is not a multiple of the autoencoder's factor times the patch size."""
    unit = factor * patch_size
    if resolution <= 0 or resolution % unit:
        below = resolution // unit * unit
        near = " or ".join(str(r) for r in (below, below + unit) if r > 0)
        raise InputError(
            "resolution",
            f"`resolution` {resolution} is not divisible by {unit} (autoencoder factor {factor} x patch size "
            f"{patch_size}); {near} would do",
        )
