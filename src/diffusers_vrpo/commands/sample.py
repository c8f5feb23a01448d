# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Sample many images from a pipeline into a folder, as PNG files or an .npz file for ADM's evaluator.

    vrpo sample outputs/digits --num_images 100 --output_dir samples
    vrpo sample --multi_gpu -- sit-xl --num_images 50000 --output_dir samples --sampler sde --num_inference_steps 250 \
        --guidance_scale 1.8 --guidance_interval 0 0.7 --batch_size 128 --dtype bfloat16 --compile --output_format npz

Image i is a function of (seed, i) and the options: one process, several, or a stopped command that is run again write the
same files. Existing files are kept.
"""

import argparse
import json
import logging
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import PIL
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..command_line import OneLineErrorParser, as_id, number_in, one_line_errors
from ..config import BATCH, DTYPES, GUIDANCE, NUM_SAMPLES, SEED, SOLVER_STEPS
from ..errors import InputError, first_line, hub_problem
from ..models.official_checkpoints import pipeline_index
from ..models.start import public_config, weights_checksum
from ..pipelines.pipeline_vrpo import VRPOPipeline
from ..pipelines.sample_folder import SampleFolder, cannot_write
from ..pipelines.sampling import (
    SAMPLERS,
    check_steps,
    image_label,
    sample_batch,
    sampling_arguments,
    set_sampler,
)
from ..reach import offline_if_out_of_reach
from ..training.distributed import start_processes, use_tf32


logger = logging.getLogger("sample")
# The options that the short help shows beside the required ones.
COMMON = ("labels", "seed", "sampler", "num_inference_steps", "guidance_scale", "batch_size", "dtype")


# ----------------------------------------------------------------------------------------------------------------------
# Pipeline and sampler


def load_pipeline(name_or_path: str, revision: str | None, variant: str | None, cache_dir: str | None) -> VRPOPipeline:
    """Loads a saved `VRPOPipeline`.

    Raises:
        InputError: if the pipeline does not exist or its files cannot be loaded.
    """
    is_path = name_or_path.startswith((".", "/", "~"))
    if not Path(name_or_path).is_dir() and (is_path or Path(name_or_path).exists()):
        raise InputError(None, f"PIPELINE {name_or_path} is not a folder; `vrpo convert` makes one from a checkpoint")
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise InputError(
                "revision", f"`revision` {revision} needs a Hub name; PIPELINE {name_or_path} is a folder"
            )
        index = pipeline_index(name_or_path)
        if index is None:
            raise InputError(
                None,
                f"PIPELINE {name_or_path} has no model_index.json, so it is not a pipeline; give a run's output folder, or "
                "the result of `vrpo convert`",
            )
        found = index.get("transformer", [None, "no transformer"])[1]
        if found != "SiTTransformer2DModel":
            raise InputError(
                None,
                f"PIPELINE {name_or_path} holds {found}, not a SiTTransformer2DModel; `vrpo convert` converts DiT",
            )
    try:
        with offline_if_out_of_reach(name_or_path):
            return VRPOPipeline.from_pretrained(name_or_path, revision=revision, variant=variant, cache_dir=cache_dir)
    except Exception as error:  # diffusers raises many types; all mean that it cannot be opened
        problem = hub_problem(error, name_or_path) or first_line(error)
        if isinstance(error, RecursionError):
            problem = (
                "the config.json of its transformer or autoencoder, or scheduler_config.json, is nested too deeply"
            )
        raise InputError(None, f"PIPELINE {name_or_path} cannot be opened: {problem}") from error


def checksum(pipeline: VRPOPipeline) -> int:
    """CRC-32 of the weights and configs of transformer and autoencoder."""
    value = 0
    for model in filter(None, (pipeline.transformer, pipeline.vae)):
        config = json.dumps(public_config(model.config), sort_keys=True, default=str)
        value = zlib.crc32(f"{weights_checksum(model.state_dict().values())} {config}".encode(), value)
    return value


def open_pipeline(args: argparse.Namespace, state: PartialState) -> VRPOPipeline:
    """`load_pipeline` of the options, on all processes; one of them downloads."""
    with state.main_process_first():
        return load_pipeline(args.pipeline, args.revision, args.variant, args.cache_dir)


def sample(args: argparse.Namespace, pipeline: VRPOPipeline | None = None):
    """Writes the samples that the options describe, on all processes.

    Args:
        pipeline: that of the options, if it is open.

    Raises:
        InputError: if options cannot work, or the folder holds something else.
    """
    state = start_processes()
    use_tf32(state.device, args.allow_tf32)
    pipeline = pipeline or open_pipeline(args, state)
    set_sampler(pipeline, args.sampler, args.pipeline)
    arguments = sampling_arguments(pipeline, args)
    check_steps(pipeline, args.num_inference_steps)
    given = args.labels or pipeline.trained_labels
    try:
        classes = pipeline.get_label_ids([c if str(c).lower() in pipeline.labels else as_id(c) for c in given])
    except ValueError as error:
        raise InputError("labels", f"`labels`: {error}") from error

    if (
        not args.labels
        and (untrained := pipeline.transformer.config.num_classes - len(classes))
        and state.is_main_process
    ):
        logger.info(f"{untrained} classes had no images in training and are not sampled; --labels samples them too")

    # 1. The folder: one process checks it, and all learn what is missing or wrong.
    manifest = build_manifest(pipeline, args, arguments, classes, state)
    folder = SampleFolder(args.output_dir, manifest)
    outcome = [None, None, None]
    if state.is_main_process:
        try:
            outcome = [None, *folder.prepare(args.overwrite)]
        except InputError as error:
            outcome = [str(error), None, None]
    problem, missing, differences = broadcast_object_list(outcome)
    if problem:
        raise InputError(None, problem)
    if state.is_main_process:
        if differences:
            logger.warning(f"continuing with other versions, so bytes may differ: {'; '.join(differences)}")
        if 0 < len(missing) < folder.num_batches:
            logger.info(f"continuing: {len(missing)} of {folder.num_batches} batches are missing")

    # 2. The missing batches. Each has the full size, even the last one, since images depend on the batch size.
    pipeline.to(state.device)
    for model, dtype in ((pipeline.transformer, args.dtype), (pipeline.vae, args.vae_dtype)):
        if model is not None and model.dtype != getattr(torch, dtype):
            model.to(getattr(torch, dtype))
    if args.compile:
        pipeline.transformer.compile_repeated_blocks(dynamic=False)
    pipeline.set_progress_bar_config(disable=True)
    own = missing[state.process_index :: state.num_processes]
    progress = tqdm(
        total=sum(len(folder.indices(batch)) for batch in own), unit="image", disable=not state.is_main_process
    )
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress:
            pending = []
            for batch in own:
                indices = range(batch * args.batch_size, (batch + 1) * args.batch_size)
                labels = [image_label(args.seed, i, classes, args.class_balance) for i in indices]
                images = sample_batch(pipeline, indices, labels, args.seed, arguments)
                # Files are written while the next batch is computed.
                for file in pending:
                    file.result()
                pending = folder.write(batch, images, pool)
                progress.update(len(folder.indices(batch)))
            for file in pending:
                file.result()
    except OSError as error:
        raise cannot_write(folder.folder, error) from error

    # 3. The files that need all batches.
    state.wait_for_everyone()
    if state.is_main_process:
        folder.finish()
        logger.info(f"{args.num_images} images are in {args.output_dir}")
    state.wait_for_everyone()


def build_manifest(pipeline, args, arguments: dict, classes: list[int], state: PartialState) -> dict:
    """Describes everything that the images depend on, and the label of each, as JSON."""
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type
    # Some kernels split sums by threads, which changes their rounding.
    threads = f", {torch.get_num_threads()} thread(s)" if state.device.type == "cpu" else ", TF32" * args.allow_tf32
    manifest = {
        "pipeline": args.pipeline,
        "pipeline_checksum": checksum(pipeline),
        "options": {
            "num_images": args.num_images,
            "label_ids": "all"
            if classes == list(range(pipeline.transformer.config.num_classes)) and not args.labels
            else classes,
            "class_balance": args.class_balance,
            "seed": args.seed,
            "sampler": args.sampler,
            "scheduler": {"class": type(pipeline.scheduler).__name__, **pipeline.scheduler_options},
            **arguments,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "vae_dtype": args.vae_dtype if pipeline.vae is not None else None,
            "compile": args.compile,
            "output_format": args.output_format,
        },
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "accelerate": accelerate.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "device": device + threads,
        },
        "labels": [image_label(args.seed, i, classes, args.class_balance) for i in range(args.num_images)],
    }
    return json.loads(json.dumps(manifest, default=str))  # as it is read back: lists, not tuples


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def channels(text: str) -> int | str:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of channels nor `all`")
    if text == "0":
        raise argparse.ArgumentTypeError(f"{text} must be at least 1, or `all`")
    return text if text == "all" else int(text)


def add_sampling_options(parser: argparse.ArgumentParser, **num_images):
    """Adds PIPELINE and the options of what is sampled and how, but those of the files.

    Args:
        num_images: arguments of `add_argument` for --num_images, such as `default`.
    """
    parser.add_argument(
        "pipeline",
        metavar="PIPELINE",
        help="sample from this pipeline: the output folder of a run, what `vrpo convert` wrote, or a name on the Hub",
    )
    g = parser.add_argument_group("what is sampled")
    g.add_argument("--num_images", type=number_in(NUM_SAMPLES), metavar="N", **num_images)
    g.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="sample these classes, by name or id, in turn; all classes that had images in training if not given",
    )
    g.add_argument(
        "--class_balance",
        choices=["balanced", "random"],
        default="balanced",
        help="labels in turn, image by image, or drawn at random",
    )
    g.add_argument(
        "--seed",
        type=number_in(SEED),
        default=0,
        help="draw noise and random labels from this seed; the same seed and options give the same images",
    )
    g = parser.add_argument_group("how")
    names = list(dict.fromkeys(("default", *SAMPLERS["velocity"], *SAMPLERS["epsilon"])))
    g.add_argument(
        "--sampler",
        choices=names,
        default="default",
        help="sample with this scheduler: the pipeline's own (`default`); ode (Euler), heun or sde for SiT, which predicts "
        "velocity; ddim or ddpm for DiT, which predicts noise; dpmsolver++ or unipc, which need fewer steps, for both",
    )
    g.add_argument(
        "--num_inference_steps",
        type=number_in(SOLVER_STEPS),
        default=50,
        help="solve in this many steps, each a pass of the transformer (two for heun); published FIDs use 250",
    )
    g.add_argument(
        "--guidance_scale",
        type=number_in(GUIDANCE, float),
        help="push images towards their class by this much (classifier-free guidance): 1 turns it off and takes half the "
        "time, 4 gives typical images of little variety (default: 1.5; 1 for a model with one class or without a null class)",
    )
    g.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.0, 1.0],
        help="noise levels t at which guidance acts; t = 1 is noise",
    )
    g.add_argument(
        "--guidance_channels",
        type=channels,
        metavar="N",
        help="latent channels that guidance changes: the first N (SiT, DiT: 3) or `all` (REPA); as the model has it if not "
        "given",
    )
    g = parser.add_argument_group("computation")
    g.add_argument(
        "--batch_size",
        type=number_in(BATCH),
        default=32,
        help="compute this many images together on each process; raise it on a GPU until its memory is used",
    )
    g.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="compute the transformer in this precision; bfloat16 is several times as fast on a GPU",
    )
    g.add_argument("--vae_dtype", choices=DTYPES, default="float32", help="precision of the autoencoder")
    g.add_argument(
        "--allow_tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute float32 matrix products in TF32 on Ampere and later GPUs, as the official samplers of SiT and REPA do",
    )
    g.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    g.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub repository")
    g.add_argument("--variant", metavar="NAME", help="variant of the weights' files, such as fp16")


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__, common=(*COMMON, "output_format"))
    add_sampling_options(parser, required=True, help="sample this many images")
    g = parser.add_argument_group("files")
    g.add_argument(
        "--output_dir",
        required=True,
        metavar="DIR",
        help="write the images to this folder, a new or empty one; an interrupted command continues in its own",
    )
    g.add_argument(
        "--output_format",
        choices=["png", "npz", "both"],
        default="png",
        help="write 000000.png and so on (png), samples.npz as ADM's evaluator reads it (npz), or both",
    )
    g.add_argument("--overwrite", action="store_true", help="remove the samples in DIR first")
    g.add_argument("--cache_dir", metavar="DIR", help="folder for downloads")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends the process with a one-line message if options of `add_sampling_options` contradict each other."""
    low, high = args.guidance_interval
    if not 0 <= low <= high <= 1:
        parser.error(f"--guidance_interval {low} {high} must be LOW HIGH with 0 <= LOW <= HIGH <= 1 (t = 1 is noise)")


def parse_args(argv: list[str] | None = None, prog: str = "vrpo sample") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def main(argv: list[str] | None = None, prog: str = "vrpo sample"):
    """Runs the command; `prog` is its name in errors."""
    args = parse_args(argv, prog)
    with one_line_errors(build_parser(prog)):
        sample(args)


if __name__ == "__main__":
    main()
