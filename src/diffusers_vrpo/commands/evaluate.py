# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Compare generated images with a reference: FID, sFID, Inception Score, KID, precision and recall, density and coverage.

    vrpo evaluate samples/ --reference VIRTUAL_imagenet256_labeled.npz
    vrpo evaluate samples.npz --reference ILSVRC/imagenet-1k --resolution 256 --encoder facebook/dinov2-base
    accelerate launch -m diffusers_vrpo.commands.evaluate samples/ --reference path/to/images --encoder inception facebook/dinov2-large

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
from dataclasses import fields
from pathlib import Path

import torch

from .. import __version__
from ..command_line import HelpFormatter, OneLineErrorParser, check_ranges, with_flags
from ..errors import InputError
from ..evaluation.compare import DATASET_OPTIONS, METRICS, MetricSettings, compare_images, open_reference
from ..evaluation.image_encoders import POOLINGS
from ..evaluation.image_sets import open_images
from ..evaluation.plots import plot_features
from ..pipelines.sample_folder import unfinished_samples
from ..training.distributed import start_processes


logger = logging.getLogger("evaluate")
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


def evaluate(args: argparse.Namespace) -> dict | None:
    """Computes what the options ask for; the main process returns the content of the JSON file, the others None.

    Raises:
        InputError: for input that cannot work.
    """
    state = start_processes()
    check_output_files(args, "output_file", "plot_file", "save_reference")
    started = time.perf_counter()
    with state.main_process_first():
        samples, reference = open_images("SAMPLES", args.samples), None
        if args.reference is not None:
            reference = open_reference(
                args.reference,
                samples,
                args.resolution,
                args.dataset_config_name,
                args.reference_split,
                args.image_column,
                args.cache_dir,
                args.save_reference,
            )
    if state.is_main_process:
        warn_of_unfinished("SAMPLES", args.samples)
        warn_of_unfinished("--reference", args.reference or "")
    comparison = compare_images(
        samples,
        reference,
        args.encoder,
        args.metrics,
        MetricSettings(**{field.name: getattr(args, field.name) for field in fields(MetricSettings)}),
        pooling=args.pooling,
        inception_weights=args.inception_weights,
        max_features=args.max_features,
        batch_size=args.batch_size,
        num_workers=args.dataloader_num_workers,
        cache_dir=args.cache_dir,
        reference_cache=args.reference_cache,
        save_reference=args.save_reference,
        state=state,
    )
    if comparison is None:
        return None
    images = None if reference is None else reference.images
    report = {
        "samples": {"source": args.samples, "count": len(samples), "size": list(samples.size)},
        "reference": {"source": args.reference, "count": None if images is None else len(images)},
        "metrics": comparison.metrics,
        "encoders": comparison.encoders,
        "settings": {key: getattr(args, key) for key in SETTINGS},
        "versions": {"diffusers_vrpo": __version__, "torch": torch.__version__},
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(format_table(comparison.metrics))  # first: a disk may be full
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(report, indent=2) + "\n")
    if args.plot_file and comparison.features:
        plot_features(comparison.features, Path(args.plot_file), args.seed)
    elif args.plot_file:
        logger.warning("--plot_file needs features of a reference; nothing is drawn")
    return report


def warn_of_unfinished(name: str, source: str):
    """Warns of a folder whose samples are not complete."""
    wanted = unfinished_samples(Path(source).expanduser())
    if wanted is not None:
        logger.warning(f"{name} {source} is an unfinished set of {wanted} samples; only those that exist count")


def format_table(results: dict[str, dict]) -> str:
    """The results as a table: one line per encoder."""
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


def check_output_files(args: argparse.Namespace, *names: str):
    """Checks that the files which these options name can be written, before any work.

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
