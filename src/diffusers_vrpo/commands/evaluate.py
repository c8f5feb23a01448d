# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Compare generated images with a reference: FID, sFID, Inception Score, KID, precision and recall, density and coverage.

    vrpo evaluate samples/ --reference VIRTUAL_imagenet256_labeled.npz
    vrpo evaluate samples.npz --reference ILSVRC/imagenet-1k --resolution 256 --encoder facebook/dinov2-base
    vrpo evaluate --multi_gpu -- samples/ --reference path/to/images --encoder inception facebook/dinov2-large

SAMPLES is a folder with PNG or JPEG files at any depth, or an .npz as ADM writes it (arr_0, uint8 [N, H, W, 3]). The
reference may also be one of these, a data set (Hub name or folder of `datasets`, centre-cropped as for training), one of ADM's
reference batches (.npz with mu, sigma, mu_s, sigma_s and arr_0), or a statistics file that --save_reference wrote.

Compare only values for equal numbers of images, because FID and most other metrics depend on that number.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import torch

from .. import __version__
from ..command_line import OneLineErrorParser, add_options, number_in, one_line_errors
from ..config import BATCH, NUM_SAMPLES, RESOLUTION, SEED, In, RunConfig, last_part
from ..errors import InputError
from ..evaluation.compare import DATASET_OPTIONS, METRICS, MetricSettings, compare_images, open_reference
from ..evaluation.image_encoders import POOLINGS
from ..evaluation.image_sets import open_images
from ..evaluation.plots import plot_features
from ..files import write_atomically
from ..pipelines.sample_folder import unfinished_samples
from ..schemas import check
from ..training.distributed import start_processes
from ..training.output_dir import check_writable, writing_result


logger = logging.getLogger("evaluate")
# The options that the short help shows.
COMMON = ("reference", "resolution", "encoder", "metrics", "output_file", "plot_file")
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
    """Computes the requested metrics; the main process returns the content of the JSON file, the others None.

    Raises:
        InputError: if options, images or files cannot work.
    """
    state = start_processes()
    check_files(args)
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
    print(format_table(comparison.metrics))  # before writing files, in case the disk is full
    if args.output_file:
        with writing_result("output_file", args.output_file):
            write_report(Path(args.output_file), json.dumps(report, indent=2) + "\n")
    if args.plot_file and comparison.features:
        with writing_result("plot_file", args.plot_file):
            plot_features(comparison.features, Path(args.plot_file), args.seed)
    elif args.plot_file:
        logger.warning(
            f"--plot_file {args.plot_file} is not drawn, because that needs features of a reference's images"
        )
    return report


def check_files(args: argparse.Namespace):
    """Checks the files that the options name for results and statistics.

    Raises:
        InputError: if a file cannot be written, or would replace something else.
    """
    check_output_files(args, "output_file", "plot_file", "save_reference")
    if args.output_file:
        refuse_other_report(args.output_file)
    check_reference_cache(args.reference_cache)


def write_report(path: Path, text: str):
    """Writes the JSON file atomically, or writes the text to a pipe or device such as /dev/stdout."""
    if path.exists() and not path.is_file():
        path.write_text(text)
    else:
        write_atomically(path.resolve(), text.encode())


def refuse_other_report(output_file: str):
    """Checks that a file to be replaced is an earlier result of this command.

    Raises:
        InputError: if the file is something else.
    """
    path = Path(output_file)
    if not path.is_file():
        return
    try:
        check(json.loads(path.read_text()), {"samples": dict, "metrics": dict, "settings": dict})
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            "output_file",
            f"`output_file` {output_file} already exists and is not a result of `vrpo evaluate`; choose another file",
        ) from error


def warn_of_unfinished(name: str, source: str):
    """Warns if a folder of samples is not complete."""
    wanted = unfinished_samples(Path(source).expanduser())
    if wanted is not None:
        logger.warning(f"{name} {source} is an unfinished set of {wanted} samples; only those that exist are measured")


def format_table(results: dict[str, dict]) -> str:
    """Formats the results as a table with one line per encoder."""
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
        lines.append([last_part(encoder), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def check_output_files(args: argparse.Namespace, *names: str):
    """Checks that the files which these options name can be written, before any work.

    Args:
        names: names of options. `plot_file` must name an image, and only `output_file` may name a pipe or device, such as
            /dev/stdout.

    Raises:
        InputError: if a file cannot be written, matplotlib does not know its format, or two options name the same file.
    """
    seen: dict[Path, str] = {}
    for name in names:
        if (file := getattr(args, name)) is None:
            continue
        try:
            path = Path(file).resolve()
            if (other := seen.setdefault(path, name)) != name:
                raise InputError(name, f"`{name}` {file} is also the file of `{other}`; choose another file")
            if name == "plot_file":
                check_plot_format(file)
            if name == "output_file" and path.exists() and not path.is_file() and not path.is_dir():
                continue
            if not path.parent.is_dir():
                raise InputError(name, f"the folder of `{name}` {file} does not exist; create it, or choose another")
            if path.exists() and not path.is_file():
                raise InputError(name, f"`{name}` {file} is not a file; choose another")
            # `replacing` writes such a file. Permissions alone do not show a read-only disk or a name that is too long.
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"):
                pass
        except (OSError, RuntimeError) as error:  # a RuntimeError is a loop of links
            reason = getattr(error, "strerror", None) or error
            raise InputError(name, f"`{name}` {file} cannot be written ({reason}); choose another file") from error


def check_reference_cache(folder: str | None):
    """Checks the folder that keeps the statistics of references. A folder that exists may be read-only.

    Raises:
        InputError: if the path is not a folder, or the folder cannot be created.
    """
    if folder is None or Path(folder).is_dir():
        return
    if os.path.lexists(folder):
        raise InputError("reference_cache", f"`reference_cache` {folder} is not a folder; choose another place")
    check_writable("reference_cache", "`reference_cache`", folder)


def check_plot_format(file: str):
    """Checks that matplotlib can write an image with the ending of `plot_file`; a name without an ending is a PNG.

    Raises:
        InputError: if matplotlib cannot.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(set(FigureCanvasBase.get_supported_filetypes()) - {"pgf", "raw", "rgba"})  # pgf needs LaTeX
    if Path(file).suffix and Path(file).suffix[1:].lower() not in known:
        raise InputError("plot_file", f"`plot_file` {file} must end in one of .{', .'.join(known)}")


def add_reference_options(parser: argparse.ArgumentParser, **reference):
    """Adds the group of options of the reference.

    Args:
        reference: arguments of `add_argument` for --reference, such as `required`.
    """
    g = parser.add_argument_group("reference")
    g.add_argument(
        "--reference",
        help="compare with these images: a folder, an .npz, one of ADM's reference batches, a data set (Hub name or folder of "
        "`datasets`), or a file that --save_reference wrote; only the Inception Score needs no reference",
        **reference,
    )
    g.add_argument(
        "--resolution",
        type=number_in(RESOLUTION),
        help="crop the reference's images in the centre, to squares with sides of this many pixels; if not given, images of a "
        "data set are cropped to the size of the samples",
    )
    g.add_argument("--dataset_config_name", help="configuration of a data set given as --reference")
    g.add_argument("--reference_split", default="train", help="split of a data set given as --reference")
    g.add_argument("--image_column", default="image", help="column with the images of a data set given as --reference")
    g.add_argument(
        "--reference_cache",
        metavar="FOLDER",
        help="folder that keeps the statistics of references for later calls (default: ~/.cache/diffusers-vrpo/statistics)",
    )
    g.add_argument(
        "--save_reference",
        metavar="FILE.safetensors",
        help="also write the reference's statistics to this file, which --reference can read; needs a single --encoder",
    )
    add_options(g, RunConfig, ["cache_dir"])


def add_metric_options(parser: argparse.ArgumentParser):
    """Adds the group of options of the metrics, except --seed."""
    neighbour = number_in(In(1, most=10_000))
    g = parser.add_argument_group("metrics")
    g.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
        help=f"compute only these of {', '.join(METRICS)}; if not given, all that the encoder and the reference allow",
    )
    g.add_argument(
        "--encoder",
        nargs="+",
        default=["inception"],
        help="compare the images in the features of these networks: `inception` for FID, or vision models of transformers (Hub "
        "names or folders) for other Fréchet distances, such as facebook/dinov2-large for FD-DINOv2",
    )
    g.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="auto",
        help="feature vector of a transformers model: the usual one of its family (auto), or the mean of its patch tokens (mean)",
    )
    g.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="weights of the Inception network for FID; if not given, those in torch hub's cache, or downloaded into it",
    )
    g.add_argument(
        "--max_features",
        type=number_in(NUM_SAMPLES),
        default=50_000,
        help="largest number of images of each set, drawn at random, for all metrics except FID and sFID, which use all images",
    )
    g.add_argument(
        "--kid_subsets",
        type=number_in(In(1, most=10**6)),
        default=100,
        help="number of subsets over which KID is averaged",
    )
    g.add_argument(
        "--kid_subset_size",
        type=number_in(In(2, most=10**7)),
        help="images in each subset for KID (default: 1000, or half of the smaller set if that is less)",
    )
    g.add_argument(
        "--inception_score_splits",
        type=number_in(In(1, most=10**6)),
        default=10,
        help="number of parts of the samples over which the Inception Score is averaged",
    )
    g.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw these parts at random; --no-shuffle takes them in the order of the images, as ADM does, which gives wrong "
        "scores for images sorted by class",
    )
    g.add_argument(
        "--precision_recall_k",
        type=neighbour,
        default=3,
        help="rank of the nearest neighbour whose distance is the radius for precision and recall",
    )
    g.add_argument(
        "--density_coverage_k",
        type=neighbour,
        default=5,
        help="rank of the nearest neighbour whose distance is the radius for density and coverage",
    )


def add_output_options(parser: argparse.ArgumentParser):
    """Adds the group of options about the work and the files of the result, and returns it."""
    g = parser.add_argument_group("work and output")
    add_options(g, RunConfig, ["dataloader_num_workers"], help="processes that decode images, for each that encodes")
    g.add_argument("--output_file", metavar="FILE.json", help="write all numbers and settings to this file")
    g.add_argument(
        "--plot_file",
        metavar="FILE.png",
        help="draw both sets of images in two dimensions, and their distances to nearest neighbours, in this file",
    )
    return g


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__, common=(*COMMON, "batch_size"))
    parser.add_argument(
        "samples", metavar="SAMPLES", help="measure these images: a folder of them, or an .npz as ADM writes it"
    )
    add_reference_options(parser)
    add_metric_options(parser)
    g = add_output_options(parser)
    g.add_argument(
        "--batch_size",
        type=number_in(BATCH),
        help="encode this many images together on each process (default: 64 on a GPU, 4 on a CPU)",
    )
    g.add_argument(
        "--seed", type=number_in(SEED), default=0, help="seed of KID's subsets and the Inception Score's parts"
    )
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends the process with a one-line message if options of reference and metrics contradict each other."""
    if args.reference is None and args.metrics != ["is"]:
        parser.error("--reference is missing; give a folder, an .npz or a data set (only `--metrics is` needs none)")
    if args.save_reference and (len(args.encoder) > 1 or args.reference is None):
        parser.error(
            "--save_reference needs a --reference and a single --encoder, because a file has statistics of one"
        )
    if args.save_reference and not args.save_reference.endswith(".safetensors"):
        parser.error(f"--save_reference {args.save_reference} must end in .safetensors")
    if len(set(args.encoder)) < len(args.encoder):
        parser.error("--encoder names the same encoder twice; give each once")
    if args.inception_weights and "inception" not in args.encoder:
        parser.error("--inception_weights has no effect without --encoder inception; remove it")
    if args.pooling != "auto" and args.encoder == ["inception"]:
        parser.error(
            f"--pooling {args.pooling} cannot be combined with --encoder inception, which has its own pooling; remove it"
        )
    for name in ("resolution", *DATASET_OPTIONS):
        value = getattr(args, name)
        if args.reference is None and value != parser.get_default(name):
            parser.error(f"--{name} {value} has no effect without --reference; remove it")
    if (args.reference or "").endswith(".safetensors") and len(args.encoder) > 1:
        parser.error(
            f"--reference {args.reference} has the statistics of one encoder; give only that one as --encoder"
        )


def parse_args(argv: list[str] | None = None, prog: str = "vrpo evaluate") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def main(argv: list[str] | None = None, prog: str = "vrpo evaluate") -> dict | None:
    """Runs the command; `prog` is its name in errors."""
    args = parse_args(argv, prog)
    with one_line_errors(build_parser(prog)):
        return evaluate(args)


if __name__ == "__main__":
    main()
