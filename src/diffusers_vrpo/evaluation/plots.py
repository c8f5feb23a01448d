# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Plots two image sets in the feature space of an encoder."""

from pathlib import Path

import numpy as np
import torch

from ..files import replacing
from .feature_statistics import FeatureSet
from .metrics import nearest_distances


def plot_features(features: dict[str, tuple[FeatureSet, FeatureSet]], file: Path, seed: int, limit: int = 5000):
    """Plots, for each encoder, both sets along the reference's two main directions, and nearest-reference distances.

    Samples whose distances are left of those between reference images lie closer to a reference image than other
    reference images do; they may be copies.

    Args:
        features: the features of samples and reference, by encoder.
        file: the image file to write.
        seed: seed of the random subset, if a set has more than `limit` images.
        limit: the largest number of images per set in the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2 * len(features)), layout="constrained")
    axes = figure.subplots(len(features), 2, squeeze=False)
    random = np.random.default_rng(seed)
    for (name, (samples, reference)), (scatter, histogram) in zip(features.items(), axes):
        x, y = (
            f.pool[torch.from_numpy(random.permutation(len(f.pool))[:limit])].double() for f in (reference, samples)
        )
        mean = x.mean(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            directions = torch.svd_lowrank(x - mean, q=min(8, *x.shape), niter=4)[2][:, :2]
        for points, label in ((x, "reference"), (y, "samples")):
            at = (points - mean) @ directions
            area = 3 if len(points) > 1000 else 14
            scatter.scatter(at[:, 0], at[:, 1], s=area, alpha=0.5, label=f"{label} ({len(points)})", linewidths=0)
        scatter.set(title=f"{Path(name).name}: main directions of the reference", xlabel="first", ylabel="second")
        scatter.legend(frameon=False)
        half = len(x) // 2
        # One half of the reference is compared with the other half, and so are the samples.
        own, generated = nearest_distances(x[:half], x[half:]), nearest_distances(y, x[half:])
        bins = np.linspace(0, torch.cat([own, generated]).max().item(), 50)
        for distances, label in ((own, "other reference images"), (generated, "samples")):
            histogram.hist(distances.numpy(), bins=bins, density=True, alpha=0.5, label=label)
        histogram.set(title="distance to the nearest reference image", xlabel="distance", ylabel="density")
        histogram.legend(frameon=False)
    with replacing(file.resolve()) as temporary:
        figure.savefig(temporary, dpi=120, format=file.suffix[1:] or "png")
