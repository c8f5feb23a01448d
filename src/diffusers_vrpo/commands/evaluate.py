# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Compare generated images with a reference: FID, sFID, Inception Score, KID, precision and recall, density and coverage.

    python pipelines/evaluate.py samples/ --reference VIRTUAL_imagenet256_labeled.npz
    python pipelines/evaluate.py samples.npz --reference ILSVRC/imagenet-1k --resolution 256 --encoder facebook/dinov2-base
    accelerate launch pipelines/evaluate.py samples/ --reference path/to/images --encoder inception facebook/dinov2-large

SAMPLES is a folder with PNG or JPEG files at any depth, or an .npz as ADM writes it (arr_0, uint8 [N, H, W, 3]). The
reference is the same, a data set (Hub name or folder of `datasets`, centre-cropped as for training), one of ADM's reference
batches (.npz with mu, sigma, mu_s, sigma_s and arr_0), or a statistics file that --save_reference wrote.

Numbers are compared at equal numbers of images only: those of FID and KID's relatives fall, or rise, with it.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..command_line import HelpFormatter, OneLineErrorParser, check_ranges, with_flags
from ..errors import InputError
from ..evaluation.feature_statistics import FeatureSet, batch_moments, measure, reference_features
from ..evaluation.image_encoders import POOLINGS, encoder_checksum, load_image_encoder
from ..evaluation.image_sets import ImageSet, npz_keys, open_images
from ..evaluation.metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    precision_recall,
)
from ..pipelines.sample_folder import unfinished_samples
from ..training.distributed import start_processes


logger = logging.getLogger("evaluate")
METRICS = ("fid", "sfid", "is", "kid", "precision_recall", "density_coverage")
INCEPTION_METRICS = ("sfid", "is")
SETTINGS = (
    "pooling",
    "resolution",
    "reference_split",
    "max_features",
    "kid_subsets",
    "inception_score_splits",
    "shuffle",
    "precision_recall_k",
    "density_coverage_k",
    "seed",
)
DATASET_OPTIONS = {"dataset_config_name": None, "reference_split": "train", "image_column": "image"}


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def choose_metrics(asked: list[str] | None, encoder_name: str, has_images: bool, has_spatial: bool) -> list[str]:
    """The metrics to compute for an encoder: those asked for, or all that can be.

    Raises:
        InputError: for one that was asked for and cannot be.
    """
    chosen = []
    for metric in asked or METRICS:
        problem = None
        if metric in INCEPTION_METRICS and encoder_name != "inception":
            problem = f"it is defined by the Inception network, not by --encoder {encoder_name}"
        elif metric == "sfid" and not has_spatial:
            problem = "the reference has no mu_s and sigma_s, nor images"
        elif metric in ("kid", "precision_recall", "density_coverage") and not has_images:
            problem = "the reference has statistics only; it needs images"
        if problem is None:
            chosen.append(metric)
        elif asked:
            raise InputError("metrics", f"`metrics` {metric}: {problem}; leave it out")
    return chosen


def check_counts(metrics: list[str], args, num_samples: int, num_reference: int | None):
    """Whether there are enough images, before any work.

    Raises:
        InputError: names the metric and how many it needs.
    """
    needs = {
        "fid": (2, 2),
        "sfid": (2, 2),
        "is": (args.inception_score_splits, 0),
        "kid": (args.kid_subset_size or 2,) * 2,
        "precision_recall": (args.precision_recall_k + 1,) * 2,
        "density_coverage": (1, args.density_coverage_k + 1),
    }
    for metric in metrics:
        for name, count, least in zip(("SAMPLES", "--reference"), (num_samples, num_reference), needs[metric]):
            if count is not None and count < least:
                images = "image" if count == 1 else "images"
                raise InputError(
                    "metrics", f"`metrics` {metric} needs at least {least} images; {name} has {count} {images}"
                )


def compute_metrics(
    metrics: list[str], samples: FeatureSet, reference: FeatureSet | None, args, device: torch.device, key: str = "fid"
) -> dict:
    """Numbers by name, as they go into the JSON file; `key` is the name of the Fréchet distance.

    Distances are computed on `device`.
    """
    device = torch.device("cpu") if device.type == "mps" else device
    results = {}
    for metric, name, vector in (("fid", key, "pool"), ("sfid", "sfid", "spatial")):
        if metric in metrics:
            moments = [m.to(device) for m in (*samples.moments[vector], *reference.moments[vector])]
            results[name] = frechet_distance(*moments)
    if "is" in metrics:
        seed = args.seed if args.shuffle else None
        mean, std = inception_score(samples.logits, args.inception_score_splits, seed)
        results |= {"inception_score": mean, "inception_score_std": std}
    x, y = (None if f is None or f.pool is None else f.pool.to(device) for f in (reference, samples))
    if "kid" in metrics:
        size = args.kid_subset_size or max(2, min(1000, len(x) // 2, len(y) // 2))
        mean, std = kernel_distance(x, y, args.kid_subsets, size, args.seed)
        results |= {"kid": mean, "kid_std": std, "kid_subset_size": size}
    if "precision_recall" in metrics:
        results["precision"], results["recall"] = precision_recall(x, y, args.precision_recall_k)
    if "density_coverage" in metrics:
        results["density"], results["coverage"] = density_coverage(x, y, args.density_coverage_k)
    return results


def format_table(results: dict[str, dict]) -> str:
    """The results for people: a line for each encoder."""
    columns = [
        ("fid", "FID", 1, "{:.4g}"),
        ("fd", "FD", 1, "{:.4g}"),
        ("sfid", "sFID", 1, "{:.4g}"),
        ("inception_score", "IS", 1, "{:.4g}"),
        ("kid", "KID x 1000", 1000, "{:.4g}"),
        ("precision", "precision", 1, "{:.4f}"),
        ("recall", "recall", 1, "{:.4f}"),
        ("density", "density", 1, "{:.4f}"),
        ("coverage", "coverage", 1, "{:.4f}"),
    ]
    columns = [column for column in columns if any(column[0] in values for values in results.values())]
    lines = [["encoder", *(title for _, title, _, _ in columns)]]
    for encoder, values in results.items():
        cells = []
        for key, _, factor, pattern in columns:
            text = pattern.format(factor * values[key]) if key in values else "-"
            spread = values.get(f"{key}_std")
            cells.append(text if spread is None else f"{text} ± {factor * spread:.2g}")
        lines.append([Path(encoder).name, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def plot_features(features: dict[str, tuple[FeatureSet, FeatureSet]], file: Path, seed: int, limit: int = 5000):
    """For each encoder: both sets along the reference's two main directions, and distances to the nearest reference image.

    Samples left of the reference's own distances lie closer to a reference image than another reference image does: they
    may be copies.

    Args:
        features: samples and reference by encoder; at most `limit` images of each are drawn.
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
        # The reference against itself, with as many to choose from.
        own, generated = nearest_distances(x[:half], x[half:]), nearest_distances(y, x[half:])
        bins = np.linspace(0, torch.cat([own, generated]).max().item(), 50)
        for distances, label in ((own, "other reference images"), (generated, "samples")):
            histogram.hist(distances.numpy(), bins=bins, density=True, alpha=0.5, label=label)
        histogram.set(title="distance to the nearest reference image", xlabel="distance", ylabel="density")
        histogram.legend(frameon=False)
    figure.savefig(file, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def check_output_files(args: argparse.Namespace, *names: str):
    """Whether the files that these options name can be written, before any work.

    Raises:
        InputError: when one cannot.
    """
    for name in names:
        if (file := getattr(args, name)) is None:
            continue
        folder = Path(file).absolute().parent
        if not folder.is_dir():
            raise InputError(name, f"`{name}` {file}: its folder does not exist")
        if not os.access(folder, os.W_OK) or Path(file).is_dir():
            raise InputError(name, f"`{name}` {file} cannot be written; choose another file")


def evaluate(args: argparse.Namespace) -> dict | None:
    """Computes what the options ask for; the main process returns the content of the JSON file, the others None.

    Raises:
        InputError: for input that cannot work.
    """
    state = start_processes()
    # TensorFloat-32, cudnn's default, moves features by a thousandth.
    torch.backends.cudnn.allow_tf32 = False
    check_output_files(args, "output_file", "plot_file", "save_reference")
    started = time.perf_counter()
    with state.main_process_first():
        samples = open_images("SAMPLES", args.samples)
        reference = open_reference(args, samples)
    given = batch_moments(args.reference) if (args.reference or "").endswith(".npz") else {}
    results, features, details = {}, {}, {}
    if state.is_main_process:
        for name, source in (("SAMPLES", args.samples), ("--reference", args.reference)):
            wanted = unfinished_samples(Path(source or "").expanduser())
            if wanted is not None:
                logger.warning(f"{name} {source} is an unfinished set of {wanted} samples; those that are there count")

    # 1. Whatever cannot work with one of the encoders, before the work with another.
    metrics_of, encoders = {}, {}
    for name in args.encoder:
        has_images = reference is not None or (args.reference or "").endswith(".safetensors")
        metrics = choose_metrics(args.metrics, name, has_images, has_images or "spatial" in given)
        if "fid" in metrics and not has_images and name != "inception":
            raise InputError(
                "encoder",
                f"`encoder` {name}: {args.reference} has no images, only statistics of Inception features; give images",
            )
        check_counts(metrics, args, len(samples), None if reference is None else len(reference))
        metrics_of[name] = metrics
        with state.main_process_first():
            encoders[name] = load_image_encoder(
                name, args.pooling, args.inception_weights, device=state.device, cache_dir=args.cache_dir
            )

    # 2. Features and metrics.
    for name, metrics in metrics_of.items():
        encoder = encoders.pop(name)
        compared = [metric for metric in metrics if metric != "is"]
        known = None
        if compared:
            known = reference_features(args, reference, samples.size, given, compared, name, encoder, state)
        if known is not None and "sfid" in metrics and "spatial" not in known.moments:
            raise InputError(
                "metrics", f"`metrics` sfid: {args.reference} has no statistics of spatial features; leave it out"
            )
        if known is not None and known.pool is not None:
            check_counts(compared, args, len(samples), len(known.pool))
        measured = measure(
            samples, encoder, state, args.batch_size, args.dataloader_num_workers, args.max_features, "is" in metrics
        )
        if state.is_main_process:
            key = "fid" if name == "inception" else "fd"
            results[name] = compute_metrics(metrics, measured, known, args, state.device, key)
            details[name] = {
                "vector": getattr(encoder, "kind", "pool_3"),
                "weights_checksum": encoder_checksum(encoder),
                "reference_count": known.count if known else None,
                # Of these, means and covariances are the file's own, of however many images.
                "moments_from_the_reference_file": list(given) if name == "inception" else [],
            }
            if known is not None and known.pool is not None:
                features[name] = (measured, known)
        del encoder
    if not state.is_main_process:
        return None
    report = {
        "samples": {"source": args.samples, "count": len(samples), "size": list(samples.size)},
        "reference": {"source": args.reference, "count": None if reference is None else len(reference)},
        "metrics": results,
        "encoders": details,
        "settings": {key: getattr(args, key) for key in SETTINGS},
        "versions": {"diffusers_vrpo": __version__, "torch": torch.__version__},
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(format_table(results))  # first: a disk may be full
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(report, indent=2) + "\n")
    if args.plot_file:
        if features:
            plot_features(features, Path(args.plot_file), args.seed)
        else:
            logger.warning("--plot_file needs features of a reference; nothing is drawn")
    return report


def open_reference(args, samples: ImageSet) -> ImageSet | None:
    """The images of the reference; None where it is statistics only, or there is none.

    Raises:
        InputError: when it cannot be used for these samples.
    """
    if args.reference is None:
        return None
    path = Path(args.reference)
    name = f"--reference {args.reference}"
    if path.suffix in (".npz", ".safetensors"):
        if not path.is_file():
            raise InputError(None, f"{name}: there is no such file")
        if args.resolution is not None:
            raise InputError(
                "resolution", f"`resolution` {args.resolution}: {args.reference} is taken as it is; leave it out"
            )
        refuse_dataset_options(args)
        if path.suffix == ".safetensors" or "arr_0" not in npz_keys(name, path):
            if path.suffix == ".npz" and not batch_moments(args.reference):
                raise InputError(None, f"{name} has neither arr_0 (images) nor mu and sigma (statistics)")
            if path.suffix == ".npz" and args.save_reference:
                raise InputError(
                    "save_reference",
                    f"`save_reference` {args.save_reference}: {args.reference} has no images; leave it out",
                )
            return None
    side = samples.size[0] if samples.size[0] == samples.size[1] else None
    reference = open_images(
        "--reference",
        args.reference,
        args.resolution,
        args.dataset_config_name,
        args.reference_split,
        args.image_column,
        args.cache_dir,
        dataset_resolution=side,
    )
    if reference.kind != "data set":
        refuse_dataset_options(args)
    if reference.size != samples.size:
        (h, w), (height, width) = reference.size, samples.size
        remedy = f"; --resolution {side} crops the reference to it" if side and path.suffix != ".npz" else ""
        raise InputError(None, f"{name}: its images are {w}x{h}, those of SAMPLES {width}x{height}{remedy}")
    return reference


def refuse_dataset_options(args):
    """For a reference that is no data set.

    Raises:
        InputError: when an option is given that goes with one.
    """
    for option, default in DATASET_OPTIONS.items():
        if (value := getattr(args, option)) != default:
            raise InputError(
                option, f"`{option}` {value} goes with a data set, which {args.reference} is not; leave it out"
            )


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(
        prog=prog,
        allow_abbrev=False,
        description=__doc__,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36, width=118),
    )
    parser.add_argument("samples", metavar="SAMPLES", help="folder of images, or .npz of ADM")
    g = parser.add_argument_group("reference")
    g.add_argument("--reference", help="folder, .npz, data set or statistics file; not needed for the Inception Score")
    g.add_argument(
        "--resolution",
        type=int,
        help="centre-crop the reference's images (ADM's crop) to this side; those of a data set are cropped to the samples' side without it",
    )
    g.add_argument("--dataset_config_name", help="configuration, where the reference is a data set")
    g.add_argument("--reference_split", default="train", help="split, where the reference is a data set")
    g.add_argument("--image_column", default="image", help="column of images, where the reference is a data set")
    g.add_argument(
        "--reference_cache",
        metavar="FOLDER",
        help="where statistics of references are kept, each under a name made of its images, encoder and options (default: ~/.cache/diffusers-vrpo/statistics)",
    )
    g.add_argument(
        "--save_reference",
        metavar="FILE.safetensors",
        help="also write the reference's statistics to a file that --reference takes; with one --encoder",
    )
    g.add_argument("--cache_dir", help="where downloads go")
    g = parser.add_argument_group("metrics")
    g.add_argument(
        "--metrics", nargs="+", choices=METRICS, help="by default all that the encoder and the reference allow"
    )
    g.add_argument(
        "--encoder",
        nargs="+",
        default=["inception"],
        help="`inception`, or Hub names or folders of transformers vision models; facebook/dinov2-large gives FD-DINOv2",
    )
    g.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="auto",
        help="the vector of a transformers model: by its family, or the mean of its patch tokens",
    )
    g.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="weights of the Inception network of FID; by default torch hub's cache, or a download into it",
    )
    g.add_argument(
        "--max_features",
        type=int,
        default=50_000,
        help="images of each set, drawn at random, for all but FID and sFID, which take all",
    )
    g.add_argument("--kid_subsets", type=int, default=100, help="subsets that KID is averaged over")
    g.add_argument("--kid_subset_size", type=int, help="images of each (default: 1000, but not over half of a set)")
    g.add_argument("--inception_score_splits", type=int, default=10, help="parts of the Inception Score")
    g.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw these parts at random; ADM takes the images in their order, which is wrong for samples sorted by class",
    )
    g.add_argument("--precision_recall_k", type=int, default=3, help="neighbours that set the radii")
    g.add_argument("--density_coverage_k", type=int, default=5, help="neighbours that set the radii")
    g.add_argument("--seed", type=int, default=0, help="of KID's subsets and the Inception Score's parts")
    g = parser.add_argument_group("work and output")
    g.add_argument(
        "--batch_size", type=int, help="images an encoder sees at a time, on each process (default: 64, on a CPU 4)"
    )
    g.add_argument(
        "--dataloader_num_workers", type=int, default=4, help="processes that decode, for each that encodes"
    )
    g.add_argument("--output_file", metavar="FILE.json", help="all numbers and settings")
    g.add_argument(
        "--plot_file", metavar="FILE.png", help="both sets in two dimensions, and nearest-neighbour distances"
    )
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "vrpo evaluate") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    at_least_one = (
        "resolution max_features kid_subsets inception_score_splits precision_recall_k density_coverage_k batch_size"
    )
    check_ranges(parser, args, at_least_one, "dataloader_num_workers seed", "", "")
    if args.kid_subset_size is not None and args.kid_subset_size < 2:
        parser.error(f"--kid_subset_size {args.kid_subset_size} must be at least 2")
    if args.reference is None and args.metrics != ["is"]:
        parser.error("--reference is missing: a folder, an .npz or a data set (only `--metrics is` needs none)")
    if args.save_reference and (len(args.encoder) > 1 or args.reference is None):
        parser.error("--save_reference needs a --reference and one --encoder: a file holds the statistics of one")
    if args.save_reference and not args.save_reference.endswith(".safetensors"):
        parser.error(f"--save_reference {args.save_reference} must end in .safetensors")
    if len(set(args.encoder)) < len(args.encoder):
        parser.error("--encoder names one twice")
    if args.inception_weights and "inception" not in args.encoder:
        parser.error("--inception_weights goes with --encoder inception only; leave it out")
    if args.pooling != "auto" and args.encoder == ["inception"]:
        parser.error(f"--pooling {args.pooling} does not go with --encoder inception, which has its own; leave it out")
    for name in ("resolution", *DATASET_OPTIONS):
        value = getattr(args, name)
        if args.reference is None and value != parser.get_default(name):
            parser.error(f"--{name} {value} goes with a --reference only; leave it out")
    if (args.reference or "").endswith(".safetensors") and len(args.encoder) > 1:
        parser.error(f"--reference {args.reference} holds the statistics of one encoder; name that --encoder alone")
    if (args.reference or "").startswith("~"):
        args.reference = os.path.expanduser(args.reference)  # as after `--reference=`, where no shell does
    return args


def main(argv: list[str] | None = None, prog: str = "vrpo evaluate") -> dict | None:
    """The command; `prog` is what its errors call it."""
    args = parse_args(argv, prog)
    try:
        return evaluate(args)
    except InputError as error:
        sys.exit(f"{prog}: error: {with_flags(error, vars(args))}")


if __name__ == "__main__":
    main()
