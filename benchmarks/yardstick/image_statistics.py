# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A judge without any network: distances of images by their gradients, colours and frequencies.

It shares neither weights, data nor labels with the encoders of rewards and targets, or with any network that was trained on
the same images. Images are uint8 `[N, 3, H, W]` with sides that are multiples of 8. Pixels p are in [0, 1]; grey is
`0.299 R + 0.587 G + 0.114 B`. There are three groups of statistics:

hog     histograms of oriented gradients (Dalal and Triggs 2005). Central differences gx, gy of grey with edges repeated;
        each pixel votes its magnitude `|g| = sqrt(gx^2 + gy^2)` for its orientation `atan2(gy, gx) mod pi`, divided
        linearly between the two nearest of 8 bins; averaged over each of 4x4 regions, 128 numbers h. A region's numbers are
        divided by `sqrt(e + 0.01^2)`, where e is the mean of `sum of h^2` over the 3x3 regions around it, so that the shape
        of edges counts instead of their contrast, and flat regions stay near 0.
colour  mean and standard deviation of Y, Cb and Cr (of JPEG) in 2x2 regions, 24 numbers.
dct     for each of the 14 diagonals u + v = 1 ... 14 of 8x8 cosine transforms (orthonormal, of grey), and each of 2x2
        regions: the root of the mean of the squared coefficients, 56 numbers. Blur and noise show here.

Each statistic is divided by its standard deviation over the training images, and by the root of the number of statistics in
its group. All groups then have the same unit: the variances of a group over the training images sum to 1. The distance of two
sets is the sum, over the groups, of the Fréchet distance of Gaussians with the means and covariances of the sets.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from diffusers_vrpo.evaluation.metrics import frechet_distance, mean_and_covariance


ORIENTATIONS = 8
EDGE_REGIONS, REGIONS, BLOCK = 4, 2, 8
GREY = (0.299, 0.587, 0.114)


def grey_images(pixels: torch.Tensor) -> torch.Tensor:
    """Converts images `[N, 3, H, W]` to grey ones, `[N, 1, H, W]`."""
    return (pixels * torch.tensor(GREY, dtype=pixels.dtype).view(1, 3, 1, 1)).sum(1, keepdim=True)


def oriented_gradients(pixels: torch.Tensor) -> torch.Tensor:
    """The group `hog` of pixels `[N, 3, H, W]` in [0, 1]: `[N, 128]`."""
    grey = F.pad(grey_images(pixels), (1, 1, 1, 1), mode="replicate")
    gx = (grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]) / 2
    gy = (grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]) / 2
    magnitude = (gx.square() + gy.square()).sqrt()

    # A vote is divided between two neighbouring bins; the last and the first are neighbours.
    place = torch.atan2(gy, gx).remainder(math.pi) * (ORIENTATIONS / math.pi)
    low = place.floor()
    votes = torch.zeros(len(grey), ORIENTATIONS, *gx.shape[2:], dtype=pixels.dtype)
    votes.scatter_add_(1, low.long() % ORIENTATIONS, magnitude * (1 - (place - low)))
    votes.scatter_add_(1, (low.long() + 1) % ORIENTATIONS, magnitude * (place - low))
    histograms = F.adaptive_avg_pool2d(votes, EDGE_REGIONS)

    # Regions are normalised by the energy around them. It is a mean, so that regions at the border have the same scale.
    energy = F.avg_pool2d(histograms.square().sum(1, keepdim=True), 3, 1, padding=1, count_include_pad=False)
    return (histograms / (energy + 0.01**2).sqrt()).flatten(1)


def colours(pixels: torch.Tensor) -> torch.Tensor:
    """The group `colour` of pixels `[N, 3, H, W]` in [0, 1]: `[N, 24]`."""
    grey = grey_images(pixels)
    opponents = torch.cat([grey, (pixels[:, 2:] - grey) / 1.772, (pixels[:, :1] - grey) / 1.402], 1)
    mean = F.adaptive_avg_pool2d(opponents, REGIONS)
    variance = F.adaptive_avg_pool2d(opponents.square(), REGIONS) - mean.square()
    return torch.cat([mean, variance.clamp(min=0).sqrt()], 1).flatten(1)


def frequencies(pixels: torch.Tensor) -> torch.Tensor:
    """The group `dct` of pixels `[N, 3, H, W]` in [0, 1]: `[N, 56]`."""
    places = torch.arange(BLOCK, dtype=pixels.dtype)
    basis = torch.cos(math.pi / BLOCK * (places + 0.5) * places[:, None]) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    blocks = grey_images(pixels)[:, 0].unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK)  # [N, rows, columns, 8, 8]
    energy = (basis @ blocks @ basis.T).square()
    diagonals = (places[:, None] + places).long().flatten()
    counts = torch.bincount(diagonals).to(pixels)
    of_diagonals = torch.zeros(*energy.shape[:3], len(counts), dtype=pixels.dtype)
    of_diagonals.index_add_(3, diagonals, energy.flatten(3))
    means = F.adaptive_avg_pool2d((of_diagonals / counts).permute(0, 3, 1, 2)[:, 1:], REGIONS)
    return means.sqrt().flatten(1)


GROUPS = {"hog": oriented_gradients, "colour": colours, "dct": frequencies}


def image_statistics(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics of images, uint8 `[N, 3, H, W]`, by group: float64 `[N, D]`."""
    parts = [part.cpu().double() / 255 for part in images.split(1000)]
    return {name: torch.cat([group(part) for part in parts]) for name, group in GROUPS.items()}


def statistics_distances(
    images: torch.Tensor, reference: dict[str, torch.Tensor], training: dict[str, torch.Tensor]
) -> dict[str, float]:
    """The distance of images to a reference set, in each group and in all (`plain`, their sum).

    Args:
        images: uint8 `[N, 3, H, W]`.
        reference: `image_statistics` of the images to compare with.
        training: `image_statistics` of the training images, which determine the unit of a group.
    """
    own, distances = image_statistics(images), {}
    for name in GROUPS:
        unit = training[name].std(0).clamp(min=1e-6) * training[name].shape[1] ** 0.5
        moments = (mean_and_covariance(statistics[name] / unit) for statistics in (reference, own))
        distances[name] = frechet_distance(*itertools.chain(*moments))
    return {"plain": sum(distances.values())} | distances
