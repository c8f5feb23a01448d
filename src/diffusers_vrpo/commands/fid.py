# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Sample from a pipeline and compare the images with a reference: `vrpo sample` and `vrpo evaluate` in one.

    vrpo fid outputs/digits --reference path/to/images --num_images 1000
    vrpo fid --multi_gpu -- sit-xl --reference VIRTUAL_imagenet256_labeled.npz --sampler sde --num_inference_steps 250 \
        --batch_size 128 --dtype bfloat16

A stopped command that is run again continues with the images that already exist. The images are removed once they are
measured, unless --keep_images is given or --output_dir already had a complete set before.

Compare only values for equal numbers of images and equal sampling options.
"""

import argparse
import contextlib
import logging
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState

from ..command_line import OneLineErrorParser, one_line_errors
from ..evaluation.compare import MetricSettings, allowed_metrics, open_reference
from ..evaluation.image_encoders import load_image_encoder
from ..evaluation.image_sets import ImageSet
from ..models.autoencoder import decoded_side
from ..pipelines.pipeline_vrpo import VRPOPipeline
from ..pipelines.sample_folder import remove_samples, unfinished_samples
from ..training.distributed import start_processes
from . import evaluate, sample, sample_options


logger = logging.getLogger("fid")
# The options that the short help shows in addition to the required ones.
COMMON = (*sample_options.COMMON, *evaluate.COMMON, "num_images", "output_dir", "keep_images")


def fid(args: argparse.Namespace) -> dict | None:
    """Samples and measures; the main process returns the content of the JSON file of `vrpo evaluate`, the others None.

    Raises:
        InputError: if options cannot work, if possible before anything is sampled.
    """
    state = start_processes()
    folder = Path(args.output_dir or f"{Path(args.pipeline).resolve().name}-fid")
    # A complete set in a folder that --output_dir names may come from `vrpo sample`, and is kept.
    were_there = (folder / "manifest.json").is_file() and unfinished_samples(folder) is None
    keep = args.keep_images or (args.output_dir is not None and were_there)
    evaluate.check_files(args)
    pipeline = sample.open_pipeline(args, state)
    check_measurable(args, pipeline, state)
    given = vars(args) | {"output_dir": str(folder), "samples": str(folder), "output_format": "png"}
    sample.sample(argparse.Namespace(**given), pipeline)
    # The batch size is that of sampling, which is not meant for encoders.
    report = evaluate.evaluate(argparse.Namespace(**given | {"batch_size": None}))
    if state.is_main_process and not keep:
        remove_samples(folder)
        with contextlib.suppress(OSError):  # the folder stays if it has other files
            folder.rmdir()
        logger.info(f"removed the {args.num_images} images in {folder}; --keep_images keeps them")
    state.wait_for_everyone()
    return report


def check_measurable(args: argparse.Namespace, pipeline: VRPOPipeline, state: PartialState):
    """Checks the encoders and the reference before sampling, which can take hours.

    Raises:
        InputError: if an encoder or the reference cannot be opened, does not fit images of the pipeline's size or does not
            allow a metric, or there are too few images.
    """
    config = pipeline.transformer.config
    size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    if pipeline.vae is not None:
        size = [decoded_side(pipeline.vae, config.in_channels, side) for side in size]
    with state.main_process_first():
        samples = ImageSet("SAMPLES", "folder", args.num_images, tuple(size), read=None, origin=None)
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
        settings = MetricSettings(**{field.name: getattr(args, field.name) for field in fields(MetricSettings)})
        for name in args.encoder:
            load_image_encoder(name, args.pooling, args.inception_weights, cache_dir=args.cache_dir)
            allowed_metrics(args.metrics, name, samples, reference, settings)


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__, common=COMMON)
    sample_options.add_sampling_options(
        parser, default=50_000, help="sample this many images; published values use 50000, and fewer images raise FID"
    )
    evaluate.add_reference_options(parser, required=True)
    evaluate.add_metric_options(parser)
    g = evaluate.add_output_options(parser)
    g.add_argument(
        "--output_dir",
        metavar="DIR",
        help="write the images to this folder, which must be new, empty, or that of an earlier call; if not given, to a folder "
        "in the current one that is called like PIPELINE, with -fid at the end",
    )
    g.add_argument("--keep_images", action="store_true", help="keep the images instead of removing them at the end")
    g.add_argument("--overwrite", action="store_true", help="remove the samples in --output_dir first")
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "vrpo fid") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    sample_options.check_args(parser, args)
    evaluate.check_args(parser, args)
    return args


def main(argv: list[str] | None = None, prog: str = "vrpo fid") -> dict | None:
    """Runs the command; `prog` is its name in errors."""
    args = parse_args(argv, prog)
    with one_line_errors(build_parser(prog)):
        return fid(args)


if __name__ == "__main__":
    main()
