# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Compares generated images with a reference: FID and other metrics from folders, arrays, data sets or statistics.

    from diffusers_vrpo.evaluation.compare import fid
    fid("samples", "imagenet/val", encoder="facebook/dinov2-large")

`compare_images` computes several metrics with several encoders; `fid` computes one number.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..config import last_part
from ..errors import InputError
from .feature_statistics import FeatureSet, batch_moments, measure, reference_features
from .image_encoders import encoder_checksum, load_image_encoder
from .image_sets import ImageSet, as_image_set, npz_keys, open_images
from .metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
)


logger = logging.getLogger("evaluate")
METRICS = ("fid", "sfid", "is", "kid", "precision_recall", "density_coverage")
INCEPTION_METRICS = ("sfid", "is")
KID_SUBSET = 1000  # images in a subset of large sets
# Options that apply only if the reference is a data set, with their defaults.
DATASET_OPTIONS = {"dataset_config_name": None, "reference_split": "train", "image_column": "image"}


# ----------------------------------------------------------------------------------------------------------------------
# Settings and results


@dataclass
class MetricSettings:
    """The settings of the metrics.

    Attributes:
        kid_subsets: the number of subsets that KID is averaged over.
        kid_subset_size: images per subset; by default 1000, but at most half of a set.
        inception_score_splits: the number of splits of the Inception Score.
        shuffle: draw these splits at random; ADM splits the images in order.
        precision_recall_k: in precision and recall, a radius is the distance to the k-th nearest neighbour.
        density_coverage_k: the same for density and coverage.
        seed: seed of KID's subsets and the Inception Score's splits.
    """

    kid_subsets: int = 100
    kid_subset_size: int | None = None
    inception_score_splits: int = 10
    shuffle: bool = True
    precision_recall_k: int = 3
    density_coverage_k: int = 5
    seed: int = 0


@dataclass
class Reference:
    """The reference that samples are compared with.

    Attributes:
        source: the reference as the user named it, for messages.
        images: the images; None if the reference holds statistics only.
        moments: the means and covariances of Inception's `pool` and `spatial` features that an `.npz` contains.
    """

    source: str
    images: ImageSet | None
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def has_features(self) -> bool:
        """Whether features of images are available, not only moments."""
        return self.images is not None or self.source.endswith(".safetensors")


@dataclass
class Comparison:
    """The result of `compare_images`.

    Attributes:
        metrics: the values by encoder and name.
        encoders: by encoder, the kind of its vector, the checksum of its weights, the number of images in the
            reference, and which moments come from the reference's file.
        features: by encoder, the features of samples and reference, if the reference has features.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    encoders: dict[str, dict] = field(default_factory=dict)
    features: dict[str, tuple[FeatureSet, FeatureSet]] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------------------
# The reference


def open_reference(
    source: str,
    samples: ImageSet,
    resolution: int | None = None,
    dataset_config_name: str | None = None,
    reference_split: str = "train",
    image_column: str = "image",
    cache_dir: str | None = None,
    save_reference: str | None = None,
) -> Reference:
    """Opens the reference that samples are compared with.

    Args:
        source: a folder, an `.npz`, a statistics file, or the Hub name or folder of a data set.
        samples: the samples; the images of the reference must have the same size.
        resolution: side to crop the reference's images to; by default a data set is cropped to the side of the samples.
        dataset_config_name, reference_split, image_column: options of a data set.
        cache_dir: folder for downloads.
        save_reference: file to write the statistics to, which requires a reference with images.

    Raises:
        InputError: if the reference cannot be used for these samples.
    """
    options = {
        "dataset_config_name": dataset_config_name,
        "reference_split": reference_split,
        "image_column": image_column,
    }
    path, name = Path(source), f"`reference` {source}"
    if path.suffix in (".npz", ".safetensors"):
        if not path.is_file():
            raise InputError(None, f"{name}: the file does not exist")
        if resolution is not None:
            raise InputError(
                "resolution", f"`resolution` {resolution}: {source} is used as it is; remove `resolution`"
            )
        refuse_dataset_options(source, options)
        moments = batch_moments(source) if path.suffix == ".npz" else {}
        if path.suffix == ".safetensors":
            return Reference(source, None)
        if "arr_0" not in npz_keys(name, path):
            if not moments:
                raise InputError(None, f"{name} has neither arr_0 (images) nor mu and sigma (statistics)")
            if save_reference:
                raise InputError(
                    "save_reference", f"`save_reference` {save_reference}: {source} has no images; remove it"
                )
            return Reference(source, None, moments)
    side = samples.size[0] if samples.size[0] == samples.size[1] else None
    images = open_images(
        "`reference`",
        source,
        resolution,
        dataset_config_name,
        reference_split,
        image_column,
        cache_dir,
        dataset_resolution=side,
    )
    if images.kind != "data set":
        refuse_dataset_options(source, options)
    check_sizes(name, images, samples, can_crop=path.suffix != ".npz")
    return Reference(source, images, moments if path.suffix == ".npz" else {})


def refuse_dataset_options(source: str, options: dict):
    """Checks that no option of a data set is given for a reference that is not a data set.

    Raises:
        InputError: if an option of `DATASET_OPTIONS` is given.
    """
    for option, default in DATASET_OPTIONS.items():
        if options[option] != default:
            raise InputError(
                option, f"`{option}` {options[option]} needs a data set, which {source} is not; remove it"
            )


def check_sizes(name: str, images: ImageSet, samples: ImageSet, can_crop: bool):
    """Checks that the reference's images have the size of the samples.

    Raises:
        InputError: if the sizes differ.
    """
    if images.size == samples.size:
        return
    (h, w), (height, width) = images.size, samples.size
    remedy = f"; `resolution` {height} crops the reference to it" if height == width and can_crop else ""
    raise InputError(None, f"{name}: its images are {w}x{h}, those of SAMPLES {width}x{height}{remedy}")


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def choose_metrics(asked: list[str] | None, encoder_name: str, has_images: bool, has_spatial: bool) -> list[str]:
    """Returns the metrics to compute for an encoder: the requested ones, or all that can be computed.

    Args:
        asked: the requested metrics; None for all.
        encoder_name: the name of the encoder.
        has_images: whether the reference has features of images, not only moments.
        has_spatial: whether the reference has moments of Inception's spatial features.

    Raises:
        InputError: if a requested metric cannot be computed.
    """
    chosen = []
    for metric in asked or METRICS:
        problem = None
        if metric in INCEPTION_METRICS and encoder_name != "inception":
            problem = f"it is defined by the Inception network, not by `encoder` {encoder_name}"
        elif metric == "sfid" and not has_spatial:
            problem = "the reference has no mu_s and sigma_s, nor images"
        elif metric in ("kid", "precision_recall", "density_coverage") and not has_images:
            problem = "the reference has statistics only; it needs images"
        if problem is None:
            chosen.append(metric)
        elif asked:
            raise InputError("metrics", f"`metrics` {metric}: {problem}; remove it")
    return chosen


def check_counts(metrics: list[str], settings: MetricSettings, num_samples: int, num_reference: int | None):
    """Checks that there are enough images, before anything is computed.

    Args:
        num_reference: the number of images in the reference; None if unknown.

    Raises:
        InputError: if there are too few; the message names the metric and how many images it needs.
    """
    needs = {
        "fid": (2, 2),
        "sfid": (2, 2),
        "is": (settings.inception_score_splits, 0),
        "kid": (settings.kid_subset_size or 2,) * 2,
        "precision_recall": (settings.precision_recall_k + 1,) * 2,
        "density_coverage": (1, settings.density_coverage_k + 1),
    }
    # The settings that determine these numbers.
    causes = {
        "is": "inception_score_splits",
        "kid": "kid_subset_size",
        "precision_recall": "precision_recall_k",
        "density_coverage": "density_coverage_k",
    }
    for metric in metrics:
        for name, count, least in zip(("SAMPLES", "`reference`"), (num_samples, num_reference), needs[metric]):
            if count is not None and count < least:
                images = "image" if count == 1 else "images"
                option = causes.get(metric)
                value = getattr(settings, option) if option else None
                remedy = f"; give more, or a smaller `{option}` than {value}" if value else ""
                raise InputError(
                    "metrics", f"`metrics` {metric} needs at least {least} images; {name} has {count} {images}{remedy}"
                )


def few_images(
    metrics: list[str], settings: MetricSettings, num_samples: int, num_reference: int | None, widths: dict[str, int]
) -> list[str]:
    """Returns warnings about metrics whose values mean little because there are too few images.

    The covariance of fewer images than dimensions is singular, so that the Fréchet distance depends mostly on the
    number of images. In sets of fewer than two subsets (of 1000 images by default), KID's subsets are small or
    overlap, so it varies.

    Args:
        num_reference: the number of images in the reference; None if unknown.
        widths: the number of feature dimensions by metric, for `fid` and `sfid`.
    """
    sentences = []
    counts = [("SAMPLES", num_samples), ("the reference", num_reference)]
    needs = [
        (metric, width + 1, f"{width} feature dimensions") for metric, width in widths.items() if metric in metrics
    ]
    if "kid" in metrics:
        size = settings.kid_subset_size or KID_SUBSET
        needs.append(("kid", 2 * size, f"subsets of {size} images"))
    for metric, least, why in needs:
        few = [f"{name} has {count}" for name, count in counts if count is not None and count < least]
        if few:
            sentences.append(
                f"{metric} needs at least {least} images in each set ({why}), but {' and '.join(few)}: its value says little"
            )
    return sentences


def compute_metrics(
    metrics: list[str],
    samples: FeatureSet,
    reference: FeatureSet | None,
    settings: MetricSettings,
    device: torch.device,
    key: str = "fid",
) -> dict[str, float]:
    """Computes metrics in the features of one encoder; returns the values by name.

    Args:
        metrics: names of `METRICS`.
        samples, reference: the features; the Inception Score does not need a reference.
        device: the device that computes distances.
        key: the name of the Fréchet distance in the result.
    """
    device = torch.device("cpu") if device.type == "mps" else device
    results = {}
    for metric, name, vector in (("fid", key, "pool"), ("sfid", "sfid", "spatial")):
        if metric in metrics:
            moments = [m.to(device) for m in (*samples.moments[vector], *reference.moments[vector])]
            results[name] = frechet_distance(*moments)
    if "is" in metrics:
        seed = settings.seed if settings.shuffle else None
        mean, std = inception_score(samples.logits, settings.inception_score_splits, seed)
        results |= {"inception_score": mean, "inception_score_std": std}
    x, y = (None if f is None or f.pool is None else f.pool.to(device) for f in (reference, samples))
    if "kid" in metrics:
        size = settings.kid_subset_size or max(2, min(KID_SUBSET, len(x) // 2, len(y) // 2))
        mean, std = kernel_distance(x, y, settings.kid_subsets, size, settings.seed)
        results |= {"kid": mean, "kid_std": std, "kid_subset_size": size}
    if "precision_recall" in metrics:
        results["precision"], results["recall"] = precision_recall(x, y, settings.precision_recall_k)
    if "density_coverage" in metrics:
        results["density"], results["coverage"] = density_coverage(x, y, settings.density_coverage_k)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Comparisons


def compare_images(
    samples: ImageSet,
    reference: Reference | None = None,
    encoders: Sequence[str] = ("inception",),
    metrics: list[str] | None = None,
    settings: MetricSettings | None = None,
    pooling: str = "auto",
    inception_weights: str | None = None,
    max_features: int = 50_000,
    batch_size: int | None = None,
    num_workers: int = 0,
    cache_dir: str | None = None,
    reference_cache: str | None = None,
    save_reference: str | None = None,
    state: PartialState | None = None,
) -> Comparison | None:
    """Computes metrics of samples against a reference, for each encoder; returns them on the main process, else None.

    Args:
        samples: as `open_images` or `as_image_set` returns them.
        reference: as `open_reference` returns it; only the Inception Score can be computed without one.
        encoders: `inception`, or Hub names or folders of transformers vision models.
        metrics: names of `METRICS`; by default all that the encoder and the reference allow.
        settings: the settings of the metrics.
        pooling: the vector of a transformers model, as for `load_image_encoder`.
        inception_weights: file of the Inception network; by default torch hub's cache, or a download.
        max_features: the other metrics use at most this many images per set, drawn at random; FID and sFID use all
            images.
        batch_size: images per batch of an encoder; `default_batch_size` by default.
        num_workers: the number of processes that decode images.
        cache_dir: folder for downloads.
        reference_cache: folder where statistics of references are kept.
        save_reference: another file to write the reference's statistics to.
        state: the processes that share the work.

    Raises:
        InputError: if the encoder or the reference does not allow a metric, or images are too few or damaged.
    """
    state, settings = state or PartialState(), settings or MetricSettings()
    # TensorFloat-32, the default of cudnn and of training, changes features by a thousandth.
    kinds = torch.backends.cudnn, torch.backends.cuda.matmul
    tf32 = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        # Check all encoders before any of them computes.
        metrics_of, loaded = {}, {}
        for name in encoders:
            metrics_of[name] = allowed_metrics(metrics, name, samples, reference, settings)
            with state.main_process_first():
                loaded[name] = load_image_encoder(
                    name, pooling, inception_weights, device=state.device, cache_dir=cache_dir
                )

        comparison = Comparison()
        for name, chosen in metrics_of.items():
            encoder = loaded.pop(name)
            compared, known = [metric for metric in chosen if metric != "is"], None
            if compared:
                known = reference_features(
                    reference.source,
                    reference.images,
                    samples.size,
                    reference.moments,
                    compared,
                    name,
                    encoder,
                    state,
                    max_features,
                    batch_size,
                    num_workers,
                    reference_cache,
                    save_reference,
                )
            if known is not None and "sfid" in chosen and "spatial" not in known.moments:
                raise InputError(
                    "metrics",
                    f"`metrics` sfid: {reference.source} has no statistics of spatial features; remove it",
                )
            if known is not None and known.pool is not None:
                of_pool = [metric for metric in compared if metric not in ("fid", "sfid")]  # these use all images
                check_counts(of_pool, settings, len(samples), len(known.pool))
            own = measure(samples, encoder, state, batch_size, num_workers, max_features, "is" in chosen)
            if not state.is_main_process:
                continue
            widths = {
                metric: len(own.moments[vector][0])
                for metric, vector in (("fid", "pool"), ("sfid", "spatial"))
                if vector in own.moments
            }
            for sentence in few_images(chosen, settings, len(samples), known.count if known else None, widths):
                logger.warning(f"{last_part(name)}: {sentence}")
            key = "fid" if name == "inception" else "fd"
            comparison.metrics[name] = compute_metrics(chosen, own, known, settings, state.device, key)
            comparison.encoders[name] = {
                "vector": getattr(encoder, "kind", "pool_3"),
                "weights_checksum": encoder_checksum(encoder),
                "reference_count": known.count if known else None,
                # These moments are those of the reference's file, which come from an unknown number of images.
                "moments_from_the_reference_file": list(reference.moments)
                if reference is not None and name == "inception"
                else [],
            }
            if known is not None and known.pool is not None:
                comparison.features[name] = (own, known)
            del encoder
    finally:
        for kind, allowed in zip(kinds, tf32):
            kind.allow_tf32 = allowed
    return comparison if state.is_main_process else None


def allowed_metrics(
    asked: list[str] | None,
    encoder_name: str,
    samples: ImageSet,
    reference: Reference | None,
    settings: MetricSettings,
) -> list[str]:
    """Calls `choose_metrics` for a reference, and checks that there are enough images.

    Raises:
        InputError: if a metric cannot be computed.
    """
    has_features = reference is not None and reference.has_features
    has_spatial = has_features or (reference is not None and "spatial" in reference.moments)
    chosen = choose_metrics(asked, encoder_name, has_features, has_spatial)
    if "fid" in chosen and not has_features and encoder_name != "inception":
        source = "no reference" if reference is None else reference.source
        raise InputError(
            "encoder",
            f"`encoder` {encoder_name}: {source} has no images, only statistics of Inception features; give images",
        )
    images = None if reference is None else reference.images
    check_counts(chosen, settings, len(samples), None if images is None else len(images))
    return chosen


def fid(
    samples: str | Path | np.ndarray | torch.Tensor,
    reference: str | Path | np.ndarray | torch.Tensor,
    encoder: str = "inception",
    **options,
) -> float:
    """Computes the Fréchet distance of samples to a reference: FID with `inception`, FD-DINOv2 with dinov2-large.

    Example:

    ```python
    import torch

    from diffusers_vrpo import fid

    features = torch.randn(2, 100, 8)  # features from an encoder; folders of images work, too
    print(fid(features[0], features[1]))
    ```

    Args:
        samples: a folder of images, an `.npz` as ADM writes it, an array or tensor uint8 `[N,H,W,3]`, or features: a
            floating-point tensor `[N,D]`.
        reference: the same, or the name or folder of a data set, or a file of statistics; features if `samples` are.
        encoder: `"inception"`, or the Hub name or folder of a vision model; not used if both arguments are features.
        options: further arguments of `compare_images`.

    Raises:
        InputError: if the two cannot be compared.
    """
    if all(isinstance(given, torch.Tensor) and given.is_floating_point() for given in (samples, reference)):
        return frechet_distance(*mean_and_covariance(samples), *mean_and_covariance(reference))
    samples = as_image_set("samples", samples)
    if isinstance(reference, (str, Path)):
        reference = open_reference(str(reference), samples, cache_dir=options.get("cache_dir"))
    else:
        images = as_image_set("reference", reference)
        check_sizes("`reference`", images, samples, can_crop=False)
        reference = Reference("", images)
    comparison = compare_images(samples, reference, [encoder], ["fid"], **options)
    # Of several processes, only the main one has the result.
    values = [None if comparison is None else next(iter(comparison.metrics[encoder].values()))]
    return broadcast_object_list(values)[0]
