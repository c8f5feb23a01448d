# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Encoders from code: `package.module:name` and `FILE.py:name`, among them models of torch.hub and timm.

The code of such a name runs when it is loaded. `load_encoder` and the commands that read names from files of other people
therefore refuse it; the trainer loads it only if the command line or Python names it.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError, first_line
from .encoders import IMAGENET_MEAN, IMAGENET_STD


STRIDE = 16  # pixels per token side, for a model whose patch size is not known


class CustomEncoder(nn.Module):
    """A module used instead of a `PatchEncoder`: frozen, in evaluation mode, without gradients and outside of autocast.

    A module with `forward_features`, as timm and DINOv2 of torch.hub have it, gets images of the size of its patches times
    the grid (or of its own size, if it takes no other) with its own normalisation; its class and register tokens are removed.
    Every other module gets images `[B,3,H,W]` in [-1, 1] as they are and must return patch embeddings `[B,M,E]`, row by row
    of a square grid, or of its attribute `grid_size`.

    Args:
        module: the module, or another callable.
        grid_size: rows and columns of the transformer's tokens.

    Attributes:
        embed_dim (`int`): E.
        grid_size (`tuple[int, int]`, *optional*): rows and columns of the embeddings, where they are known.

    Raises:
        ValueError: if the output for a blank image is not of that form.
    """

    def __init__(self, module, grid_size: tuple[int, int], resolution: int, device: torch.device):
        super().__init__()
        if isinstance(module, nn.Module):
            module = module.to(device).requires_grad_(False).eval()
        self.module = module
        self.has_features = hasattr(module, "forward_features")
        self.grid_size = getattr(module, "grid_size", None)
        self.input_size: tuple[int, int] | None = None
        blank = torch.zeros(2, 3, resolution, resolution, device=device)
        if self.has_features:
            given = getattr(module, "pretrained_cfg", None) or {}
            statistics = [given.get(*pair) for pair in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))]
            mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in statistics)
            self.register_buffer("mean", mean, persistent=False)
            self.register_buffer("std", std, persistent=False)
            self._choose_input_size(grid_size, blank)
        features = self(blank)
        if not features.isfinite().all():
            raise ValueError("its embeddings of a blank image are not finite")
        self.embed_dim = features.shape[2]

    def _choose_input_size(self, grid_size: tuple[int, int], blank: torch.Tensor):
        """Sets `input_size` to that of the grid, or to the module's own if it does not take that."""
        embedding = getattr(self.module, "patch_embed", None)
        patch = pair(getattr(embedding, "patch_size", STRIDE))
        self.input_size = (grid_size[0] * patch[0], grid_size[1] * patch[1])
        own = getattr(embedding, "img_size", None)
        try:
            self(blank)
        except Exception:  # a table of positions or an assertion for another size
            if own is None:
                raise
            self.input_size = pair(own)
        if embedding is not None:
            self.grid_size = (self.input_size[0] // patch[0], self.input_size[1] // patch[1])

    def train(self, mode: bool = True):
        """Keeps evaluation mode: a teacher's dropout and batch statistics must not follow the student's `train()`."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Patch embeddings `[B,M,E]` of images `[B,3,H,W]` in [-1, 1], float32, not normalised.

        Raises:
            ValueError: if the module returns something else.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            features = self._features(images) if self.has_features else self.module(images)
        if not isinstance(features, torch.Tensor) or features.ndim != 3 or len(features) != len(images):
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"it returns {found} for {len(images)} images; it must return patch embeddings [images, patches, width]"
            )
        return features.float()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.float() + 1) / 2
        if tuple(pixels.shape[2:]) != self.input_size:
            pixels = F.interpolate(pixels, self.input_size, mode="bicubic", antialias=True).clamp(0, 1)
        parameter = next(self.module.parameters(), pixels)
        features = self.module.forward_features(((pixels - self.mean) / self.std).to(parameter.dtype))
        if isinstance(features, dict):
            return features.get("x_norm_patchtokens")
        if features.ndim == 4:
            # A map of a conv net, `[B,E,rows,columns]`, or of a pyramid with the channels last.
            if features.shape[1] != getattr(self.module, "num_features", features.shape[1]):
                features = features.permute(0, 3, 1, 2)
            self.grid_size = tuple(features.shape[2:])
            return features.flatten(2).mT
        return features[:, getattr(self.module, "num_prefix_tokens", 0) :]


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def load_custom_encoder(
    name: str,
    grid_size: tuple[int, int],
    layer: int | None,
    resolution: int,
    device: torch.device,
) -> CustomEncoder:
    """Imports an encoder by name, which runs its code, and tests it on a blank image.

    Args:
        name: `package.module:name` or `FILE.py:name` of a module, or of a class or function that returns one without
            arguments.
        grid_size: rows and columns of the transformer's tokens.
        layer: must be None: the module decides what it returns.
        resolution: side of the training images in pixels.

    Raises:
        InputError: if the object does not exist, or does not give patch embeddings.
    """
    if layer is not None:
        raise InputError(
            "encoder_layer",
            f"`encoder_layer` {layer} has no effect with `encoder` {name}, which itself determines what it returns; remove it",
        )
    found = import_object(name)
    try:
        # A class also has the attributes of its objects; a module is used as it is.
        finished = isinstance(found, nn.Module) or (hasattr(found, "embed_dim") and not isinstance(found, type))
        return CustomEncoder(found if finished else found(), grid_size, resolution, device)
    except Exception as error:  # whatever that code raises
        raise InputError(
            "encoder", f"`encoder` {name} does not give patch embeddings of an image: {first_line(error)}"
        ) from error


def import_object(name: str):
    """Imports the object of `package.module:name` or `FILE.py:name`.

    Raises:
        InputError: if it does not exist or cannot be imported.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute.isidentifier():
        raise InputError(
            "encoder", f"`encoder` {name}: give package.module:name or FILE.py:name of a module, a class or a function"
        )
    file = Path(source).expanduser()
    if source.endswith(".py") and not file.is_file():
        raise InputError("encoder", f"`encoder` {name}: the file {source} does not exist")
    try:
        module = import_file(file) if source.endswith(".py") else importlib.import_module(source)
        return getattr(module, attribute)
    except Exception as error:  # whatever that code raises when it is imported
        raise InputError("encoder", f"`encoder` {name} cannot be imported: {first_line(error)}") from error


def import_file(file: Path):
    """Imports a Python file that is not part of a package."""
    spec = importlib.util.spec_from_file_location(f"imported_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module
