# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What training on digit grids needs in addition to the package: the encoder on each cell, and images of one channel."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.assets.digit_grids import SPLIT_SIZES, cells_to_images, digit_images, images_to_cells
from diffusers_vrpo.config import EMBEDDED_DIGITS


class GridEncoder(torch.nn.Module):
    """The embedded digits encoder on each cell of a digit grid, for `VRPOTrainer(encoders=[GridEncoder()])`.

    `load_encoder("embedded:digits")` would see a whole grid at half its size. Here each cell is encoded by itself, and its
    4x4 patch tokens are averaged to 2x2, so that a grid has 4x4 tokens of 4x4 pixels. The training and held-out digits are
    encoded in advance; cells with other pixels are encoded when needed.

    Attributes:
        embed_dim (`int`): 64.
    """

    def __init__(self):
        super().__init__()
        self.encoder = load_encoder(EMBEDDED_DIGITS, grid_size=(4, 4))
        self.embed_dim = self.encoder.embed_dim
        digits = np.concatenate([digit_images(split)[0] for split in SPLIT_SIZES])
        pixels = torch.from_numpy(digits)[:, None].expand(-1, 3, -1, -1).float() / 127.5 - 1
        self.register_buffer("features", self._encode(pixels), persistent=False)
        self.rows = {digit.tobytes(): row for row, digit in enumerate(digits)}

    def _encode(self, cells: torch.Tensor) -> torch.Tensor:
        """Encodes cells `[B, 3, 8, 8]` in [-1, 1] to maps `[B, 64, 2, 2]`."""
        return F.avg_pool2d(self.encoder(cells).mT.unflatten(2, (4, 4)), kernel_size=2)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Computes patch embeddings `[B, 16, 64]` of grids `[B, 3, 16, 16]` in [-1, 1], row by row."""
        cells = images_to_cells(images.float()).flatten(0, 1)
        keys = ((cells[:, 0] + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        rows = [self.rows.get(key.tobytes()) for key in keys]
        maps = self._encode(cells) if None in rows else self.features[rows]
        return cells_to_images(maps.unflatten(0, (-1, 4))).flatten(2).mT.contiguous()


class GreyImages(torch.nn.Module):
    """Stands for an autoencoder. The latents of a grey image are its one channel, so that the noise also has one channel."""

    dtype, config = torch.float32, SimpleNamespace()

    def __init__(self):
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.place.device

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=pixels[:, :1])

    def decode(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (latents.expand(-1, 3, -1, -1),)
