# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The work of `vrpo sample`, which writes many images of a pipeline to a folder. Its options are in `sample_options.py`."""

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
from diffusers import FirstBlockCacheConfig
from tqdm.auto import tqdm

from ..command_line import as_id, one_line_errors
from ..errors import InputError, first_line, hub_problem
from ..models.official_checkpoints import pipeline_index
from ..models.start import cast_weights, public_config, weights_checksum
from ..pipelines.pipeline_vrpo import VRPOPipeline
from ..pipelines.sample_folder import SampleFolder, cannot_write
from ..pipelines.sampling import check_steps, image_label, sample_batch, sampling_arguments, set_sampler
from ..reach import offline_if_out_of_reach
from ..training.checkpoints import list_checkpoints
from ..training.distributed import start_processes, use_tf32
from .sample_options import build_parser, parse_args


logger = logging.getLogger("sample")


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
            folder, remedy = Path(name_or_path), "give a run's output folder, or the result of `vrpo convert`"
            checkpoints = list_checkpoints(folder) or [p for p in list_checkpoints(folder.parent) if p == folder]
            if checkpoints:
                remedy = (
                    f"the run is not finished; `vrpo convert {checkpoints[-1]} NEW_FOLDER` makes one of a checkpoint"
                )
            raise InputError(
                None, f"PIPELINE {name_or_path} has no model_index.json, so it is not a pipeline; {remedy}"
            )
        found = index.get("transformer", [None, "no transformer"])[1]
        if found != "SiTTransformer2DModel":
            raise InputError(
                None,
                f"PIPELINE {name_or_path} has {found} instead of a SiTTransformer2DModel; `vrpo convert` converts DiT",
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
    """Loads the pipeline that the options name, on all processes; only one of them downloads it."""
    with state.main_process_first():
        return load_pipeline(args.pipeline, args.revision, args.variant, args.cache_dir)


def sample(args: argparse.Namespace, pipeline: VRPOPipeline | None = None):
    """Writes the samples that the options describe, on all processes.

    Args:
        pipeline: the pipeline that the options name; None loads it.

    Raises:
        InputError: if options cannot work, or the output folder has files other than these samples.
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
        logger.info(f"{untrained} classes had no images in training and are not sampled; --labels can name them")

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
            logger.warning(
                f"continuing with other versions, so new images may differ in their bytes: {'; '.join(differences)}"
            )
        if 0 < len(missing) < folder.num_batches:
            logger.info(f"continuing in {args.output_dir}: {len(missing)} of {folder.num_batches} batches are missing")

    # 2. The missing batches. Each has the full size, even the last one, because images depend on the batch size.
    pipeline.to(state.device)
    for model, dtype in ((pipeline.transformer, args.dtype), (pipeline.vae, args.vae_dtype)):
        if model is not None:
            cast_weights(model, dtype)
    if args.first_block_cache is not None:
        pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=args.first_block_cache))
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
    """Describes everything that the images depend on, and the label of each image, as JSON.

    Only the main process, which compares and writes the checksum, computes it; on the others it is None. It reads all
    weights, which are 2.7 GB for SiT-XL/2.
    """
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type
    # An option that version 0.1 did not have is in the manifest only if it is given.
    cache = {} if args.first_block_cache is None else {"first_block_cache": args.first_block_cache}
    # Some kernels split sums among threads, so the rounding depends on their number.
    threads = f", {torch.get_num_threads()} thread(s)" if state.device.type == "cpu" else ", TF32" * args.allow_tf32
    manifest = {
        "pipeline": args.pipeline,
        "pipeline_checksum": checksum(pipeline) if state.is_main_process else None,
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
            **cache,
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
    # Equal to what is read back from the file, with lists in place of tuples.
    return json.loads(json.dumps(manifest, default=str))


def main(argv: list[str] | None = None, prog: str = "vrpo sample"):
    """Runs the command; `prog` is its name in errors."""
    args = parse_args(argv, prog)
    with one_line_errors(build_parser(prog)):
        sample(args)


if __name__ == "__main__":
    main()
