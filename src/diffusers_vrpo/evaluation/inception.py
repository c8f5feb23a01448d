# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The Inception network that defines FID: TensorFlow's graph of December 2015, in plain torch.

It differs from torchvision's Inception v3: average pooling excludes the padding, the last block uses max pooling,
there are 1008 classes, and images are resized to 299 pixels by the bilinear resize of TensorFlow 1. The names of the
weights are those of torch-fidelity's and pytorch-fid's ports, which are the same file.
"""

import hashlib
import logging
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import InputError, first_line


logger = logging.getLogger(__name__)
WEIGHTS_NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAMES[0]}"
WEIGHTS_SHA256 = "6726825d"  # the first digits, which are part of the file names
SIDE = 299
SPATIAL_CHANNELS = 7  # for sFID: 7 * 17 * 17 = 2023 numbers, about as many as the 2048 of FID


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average_pool(x):
    """3x3 average at every position, at the borders over the existing pixels only, as in TensorFlow."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Block35(nn.Module):
    """A block on the 35 x 35 grid: `mixed` to `mixed_2` of the TensorFlow graph."""

    def __init__(self, in_channels, pool_channels):
        super().__init__()
        self.branch1x1 = ConvBlock(in_channels, 64, 1)
        self.branch5x5_1 = ConvBlock(in_channels, 48, 1)
        self.branch5x5_2 = ConvBlock(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBlock(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, padding=1)
        self.branch_pool = ConvBlock(in_channels, pool_channels, 1)

    def forward(self, x):
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3, self.branch_pool(average_pool(x))], dim=1)


class Reduction17(nn.Module):
    """Reduces the 35 x 35 grid to 17 x 17: `mixed_3`."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3 = ConvBlock(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBlock(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, stride=2)

    def forward(self, x):
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, F.max_pool2d(x, 3, stride=2)], dim=1)


class Block17(nn.Module):
    """A block on the 17 x 17 grid, with 7x7 convolutions as pairs of 1x7 and 7x1: `mixed_4` to `mixed_7`."""

    def __init__(self, in_channels, width):
        super().__init__()
        row, column = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = ConvBlock(in_channels, 192, 1)
        self.branch7x7_1 = ConvBlock(in_channels, width, 1)
        self.branch7x7_2 = ConvBlock(width, width, **row)
        self.branch7x7_3 = ConvBlock(width, 192, **column)
        self.branch7x7dbl_1 = ConvBlock(in_channels, width, 1)
        self.branch7x7dbl_2 = ConvBlock(width, width, **column)
        self.branch7x7dbl_3 = ConvBlock(width, width, **row)
        self.branch7x7dbl_4 = ConvBlock(width, width, **column)
        self.branch7x7dbl_5 = ConvBlock(width, 192, **row)
        self.branch_pool = ConvBlock(in_channels, 192, 1)

    def forward(self, x):
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), branch7x7, twice, self.branch_pool(average_pool(x))], dim=1)


class Reduction8(nn.Module):
    """Reduces the 17 x 17 grid to 8 x 8: `mixed_8`."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3_1 = ConvBlock(in_channels, 192, 1)
        self.branch3x3_2 = ConvBlock(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBlock(in_channels, 192, 1)
        self.branch7x7x3_2 = ConvBlock(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvBlock(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvBlock(192, 192, 3, stride=2)

    def forward(self, x):
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([branch3x3, branch7x7, F.max_pool2d(x, 3, stride=2)], dim=1)


class Block8(nn.Module):
    """A block on the 8 x 8 grid: `mixed_9`, or with max pooling `mixed_10`."""

    def __init__(self, in_channels, max_pool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvBlock(in_channels, 320, 1)
        self.branch3x3_1 = ConvBlock(in_channels, 384, 1)
        self.branch3x3_2a = ConvBlock(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvBlock(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvBlock(in_channels, 448, 1)
        self.branch3x3dbl_2 = ConvBlock(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvBlock(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvBlock(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvBlock(in_channels, 192, 1)

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, dim=1)


def resize_bilinear(images: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """TensorFlow 1's `resize_bilinear`: pixel i of the output lies at `i * height / side`, not at pixel centres.

    There is no antialiasing, and the last row and column are repeated beyond the end.

    Args:
        images: float32 `[B, C, H, W]`.

    Returns:
        float32 `[B, C, side, side]`.
    """

    def positions(extent):
        # Positions are float32, as in TensorFlow, so that rounding them down gives the same pixels.
        scale = torch.tensor(extent / side, dtype=torch.float32, device=images.device)
        at = torch.arange(side, dtype=torch.float32, device=images.device) * scale
        low = at.long().clamp(max=extent - 1)
        return low, (low + 1).clamp(max=extent - 1), at - low

    top, bottom, dy = positions(images.shape[2])
    left, right, dx = positions(images.shape[3])
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * dx
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * dx
    return upper + (lower - upper) * dy[:, None]


class FIDInception(nn.Module):
    """The features of the FID protocol (ADM's evaluator, arXiv 2105.05233): pool, spatial features, logits.

    The network is frozen and always in evaluation mode. `load_inception` loads its weights.

    Attributes:
        dim (`int`): 2048.
    """

    dim = 2048

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3)
        self.Mixed_5b = Block35(192, pool_channels=32)
        self.Mixed_5c = Block35(256, pool_channels=64)
        self.Mixed_5d = Block35(288, pool_channels=64)
        self.Mixed_6a = Reduction17(288)
        self.Mixed_6b = Block17(768, width=128)
        self.Mixed_6c = Block17(768, width=160)
        self.Mixed_6d = Block17(768, width=160)
        self.Mixed_6e = Block17(768, width=192)
        self.Mixed_7a = Reduction8(768)
        self.Mixed_7b = Block8(1280, max_pool=False)
        self.Mixed_7c = Block8(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Keeps evaluation mode: the batch norms' statistics belong to the metric."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Computes the features of images.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8, RGB, any size.

        Returns:
            float32 features: `pool [B, 2048]` for FID and all other metrics but the following two; `spatial [B, 2023]`
            for sFID, the first 7 channels of `mixed_6/conv`, row by row, channels last; `logits [B, 1008]` for the
            Inception Score, without the bias, as in OpenAI's and ADM's code.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"`images` must be uint8, not {images.dtype}")
        with torch.autocast(images.device.type, enabled=False):
            # Images of any size are stretched to a square, as in the TensorFlow graph.
            x = (resize_bilinear(images.float()) - 128) / 128
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
            # `mixed_6` is the graph's name for Mixed_6d; its first channels are those of its first branch.
            spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
            pool = x.mean((2, 3))
            return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}


def find_inception_weights() -> Path | None:
    """Finds the weights of torch-fidelity or pytorch-fid in torch hub's cache; returns None if they are not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)


def load_inception(
    weights: str | Path | None = None, device: torch.device | str | None = None, option: str = "encoder"
) -> FIDInception:
    """Loads the network with the weights of 2015 from a file or torch hub's cache, or downloads them into that cache.

    Args:
        weights: a `.pth` of torch-fidelity or pytorch-fid, whose SHA-256 must start with 6726825d, or the same weights
            as safetensors (without that check, since a conversion has another checksum).
        device: the device of the network; the CPU by default.
        option: the option that named this encoder, for messages when `weights` is not given.

    Raises:
        InputError: if the file is not one of these, or no file exists and it cannot be downloaded.
    """
    path = Path(weights).expanduser() if weights is not None else find_inception_weights() or _download(option)
    source = f"`inception_weights` {path}" if weights is not None else f"`{option}` inception: {path}"
    if not path.is_file():
        raise InputError("inception_weights", f"{source}: the file does not exist; download it from {WEIGHTS_URL}")
    is_safetensors = path.suffix == ".safetensors"
    try:
        if not is_safetensors and not _sha256(path).startswith(WEIGHTS_SHA256):
            raise InputError(
                "inception_weights",
                f"{source} is not the network that defines FID (its SHA-256 does not start with {WEIGHTS_SHA256}); "
                f"use {WEIGHTS_URL}",
            )
        state = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            "inception_weights", f"{source} cannot be read ({first_line(error)}); use {WEIGHTS_URL}"
        ) from error
    return inception_from_state(state, source).to(device)


def inception_from_state(state: dict[str, torch.Tensor], name: str = "the weights") -> FIDInception:
    """Builds a network with these weights; torchvision's auxiliary head is ignored.

    Raises:
        InputError: if tensors are missing, left over, of another shape, or not finite.
    """
    model = FIDInception()
    wanted = model.state_dict()
    # Newer files also have the batch counters of batch norm, which are not used.
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    state = {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}
    wrong = [key for key in wanted if key not in counters and key not in state]
    wrong += [key for key in state if key not in wanted or state[key].shape != wanted[key].shape]
    if wrong:
        raise InputError(None, f"{name}: {len(wrong)} tensors are not those of the FID network, such as {wrong[0]}")
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError(None, f"{name}: the weights are not finite")
    model.load_state_dict(state, strict=False)
    return model


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(option: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAMES[0]
    logger.info(f"downloading the Inception network of FID (91 MB) from {WEIGHTS_URL} to {path}")
    try:
        os.makedirs(path.parent, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256, progress=False)
    except Exception as error:  # from the network or the disk, or a wrong checksum
        raise InputError(
            option,
            f"`{option}` inception: the Inception network of FID cannot be downloaded ({first_line(error)}); fetch {WEIGHTS_URL} "
            f"elsewhere and put it into {path.parent} (or give it to `vrpo evaluate` or `vrpo probe` as `inception_weights`), or measure with "
            "another encoder",
        ) from error
    return path
