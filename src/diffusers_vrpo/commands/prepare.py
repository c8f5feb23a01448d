# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Encode a data set once, for `vrpo train --latents_dir`.

    vrpo prepare --dataset ILSVRC/imagenet-1k --vae stabilityai/sd-vae-ft-ema \
        --resolution 256 --flip --output_dir imagenet-256
    vrpo prepare --multi_gpu -- --dataset ILSVRC/imagenet-1k ...          (several GPUs)

A stopped command continues when it is run again.
"""

import argparse
import logging
import os
from collections.abc import Callable

import torch

from ..alignment.encoders import load_encoder
from ..command_line import OneLineErrorParser, add_options, number_in, one_line_errors
from ..config import LAYER, SEED, DataConfig, In, RunConfig
from ..data.image_source import class_names
from ..data.latent_cache import num_chunks
from ..data.latent_cache_writer import CacheWriter
from ..data.latent_encoding import IMAGE_FORMATS, BatchEncoder, cache_config, write_chunks
from ..data.latents_of_others import FORMATS, scale_problem, write_latents
from ..data.sources import classes_notice, load_images
from ..errors import InputError
from ..models.autoencoder import latent_layout, load_vae, reconstruction_problem
from ..models.start import cast_weights
from ..models.vision import layers_of_encoders
from ..training.distributed import start_processes


logger = logging.getLogger("latents")
# The options that the short help shows in addition to the required ones.
COMMON = ("dataset_name", "train_data_dir", "resolution", "flip", "images", "encoder")


def prepare(args: argparse.Namespace):
    """Writes the cache that the options describe, on all processes.

    Raises:
        InputError: if options cannot work, the folder holds another cache, or the data are damaged.
    """
    state = start_processes()
    if args.images == "none" and not args.encoder:
        logger.info("with --images none and no --encoder, the cache can only be used with --objective none")
    with state.main_process_first():
        data = load_images(args)
    if state.is_main_process:
        data.check()
        if notice := classes_notice(data):
            logger.log(*notice)
    vae = None if args.vae == "none" else load_vae(args.vae, args.cache_dir).to(state.device)
    if vae is not None:
        cast_weights(vae, args.vae_dtype)
    shape, has_posterior = latent_layout(vae, args.resolution, args.patch_size)
    if vae is not None and state.is_main_process:
        image = data.examples(data.fixed_rows(1), args.resolution)[0][0]
        problem = reconstruction_problem(vae, image)
        if problem is not None:
            logger.warning(f"--vae: {problem}")
    grid_size = (shape[1] // args.patch_size, shape[2] // args.patch_size)
    layers = layers_of_encoders(args.encoder, args.encoder_layer)
    encoders = [
        load_encoder(name, grid_size, layer, torch.float32, state.device, args.cache_dir)
        for name, layer in zip(args.encoder or [], layers)
    ]
    config = cache_config(
        data,
        vae,
        shape,
        has_posterior,
        args.resolution,
        encoders,
        args.encoder or [],
        layers,
        vae_dtype=args.vae_dtype,
        sampled=args.sampled,
        seed=args.seed,
        flip=args.flip,
        images=args.images,
        chunk_rows=args.chunk_rows,
    )
    about = {
        "vae": os.path.abspath(args.vae) if os.path.isdir(args.vae) else args.vae,
        "dataset": args.dataset_name or args.train_data_dir,
        "split": args.dataset_split,
        "num_classes": data.num_classes,
        "class_names": class_names(data),
    }
    writer = CacheWriter(args.output_dir, config, about, state, args.verify)

    def write():
        encoder = BatchEncoder(vae, encoders, config, state.device)
        write_chunks(writer, data, encoder, args.dataloader_num_workers)

    fill(writer, len(data), write)


def prepare_from_latents(args: argparse.Namespace):
    """Writes the cache from latents that another repository has encoded, on all processes.

    Raises:
        InputError: if files, labels or shapes are wrong, or the folder holds another cache.
    """
    state = start_processes()
    kind, path = args.from_latents
    source = FORMATS[kind](path)
    images = args.images if source.has_images else "none"
    if images == "none" and state.is_main_process:
        logger.info(f"the cache of {path} has no images, so it can only be used with --objective none")
    vae = load_vae(args.vae, args.cache_dir)
    shape, has_posterior = latent_layout(vae, args.resolution, args.patch_size)
    if shape != source.shape:
        raise InputError(
            "from_latents",
            f"`from_latents` {path} has latents of {list(source.shape)}, but `vae` {args.vae} with `resolution` "
            f"{args.resolution} makes {list(shape)}; give the autoencoder and the resolution that made the latents",
        )
    if state.is_main_process and (problem := scale_problem(source, vae)):
        logger.warning(f"--from {kind} {path}: {problem}")
    config = cache_config(
        source,
        vae,
        shape,
        has_posterior,
        args.resolution,
        sampled=source.kind == "sampled",
        seed=None,
        flip=source.flip,
        images=images,
        chunk_rows=args.chunk_rows,
        checksum=source.checksum(),
    )
    about = {
        "vae": os.path.abspath(args.vae) if os.path.isdir(args.vae) else args.vae,
        "dataset": os.path.abspath(path),
        "split": "train",
        "num_classes": int(source.labels.max()) + 1,
        "class_names": None,
    }
    writer = CacheWriter(args.output_dir, config, about, state, args.verify)
    fill(writer, len(source), lambda: write_latents(writer, source, vae))


def fill(writer: CacheWriter, num_images: int, write: Callable[[], None]):
    """Writes what a cache lacks, unless it is already complete."""
    if writer.complete:
        logger.info(f"{writer.folder} is already complete with {num_images} images")
        return
    if writer.num_done:
        logger.info(
            f"continuing in {writer.folder}: {writer.num_done} of {num_chunks(writer.config)} chunks are written"
        )
    write()
    writer.finish()
    logger.info(f"wrote {num_images} images to {writer.folder}; train with --latents_dir {writer.folder}")


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__, common=COMMON)
    g = parser.add_argument_group("data")
    g.add_argument(
        "--from",
        dest="from_latents",
        nargs=2,
        metavar=("FORMAT", "PATH"),
        help="read latents that another repository has encoded, instead of images: repa-zip and the folder that contains REPA's "
        "vae-sd and images, or lightningdit and the folder with LightningDiT's safetensors files",
    )
    add_options(g, DataConfig, ["dataset_name"], spellings=["--dataset"])
    add_options(
        g, DataConfig, ["dataset_config_name", "dataset_split", "train_data_dir", "image_column", "label_column"]
    )
    add_options(g, DataConfig, ["max_train_samples", "resolution", "jpeg_draft"])
    add_options(g, RunConfig, ["cache_dir"])
    g = parser.add_argument_group("what is kept")
    g.add_argument(
        "--vae",
        required=True,
        help="encode the images with this autoencoder of diffusers (Hub name or folder), usually stabilityai/sd-vae-ft-ema; "
        "`none` keeps pixels instead of latents",
    )
    g.add_argument(
        "--vae_dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="precision of the autoencoder; float32 gives the same latents as training from images",
    )
    g.add_argument(
        "--sampled",
        action="store_true",
        help="keep one sampled latent for each image, which takes half the space of its mean and standard deviation",
    )
    g.add_argument("--seed", type=number_in(SEED), default=0, help="seed of --sampled")
    g.add_argument(
        "--flip",
        action="store_true",
        help="also keep every image mirrored, for training with --random_flip; this doubles the size of the folder",
    )
    g.add_argument(
        "--images",
        choices=list(IMAGE_FORMATS),
        default="webp",
        help="how to keep the cropped images, which the encoder of alignment needs: without loss (webp), at half the size "
        "(jpeg, quality 95), or not at all (none), which suits --objective none",
    )
    g.add_argument(
        "--encoder",
        nargs="+",
        help="also keep the features of these vision encoders of transformers (Hub names or folders), which saves their time "
        "in training but takes much space; --images none then suffices",
    )
    g.add_argument(
        "--encoder_layer",
        type=number_in(LAYER),
        nargs="+",
        help="index of the hidden state to keep, one for all encoders or one for each; if not given, their output",
    )
    g.add_argument(
        "--patch_size",
        type=number_in(In(1, most=1024)),
        default=2,
        help="patch size of the model to be trained, which determines the token grid of the features",
    )
    g = parser.add_argument_group("work")
    g.add_argument(
        "--output_dir",
        required=True,
        metavar="DIR",
        help="write the cache to this folder; an interrupted command continues there",
    )
    add_options(g, RunConfig, ["dataloader_num_workers"], help="processes that decode images, for each that encodes")
    g.add_argument(
        "--chunk_rows",
        type=number_in(In(1, most=10**6)),
        default=1024,
        help="images per chunk; each chunk has its own checksum, and an interruption costs at most one chunk",
    )
    g.add_argument(
        "--verify", action="store_true", help="compare existing chunks with their checksums and replace damaged ones"
    )
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "vrpo prepare") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.from_latents is not None:
        check_from(parser, args)
        return args
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give either --dataset_name, --train_data_dir or --from")
    if args.vae == "none" and not args.encoder:
        parser.error(
            "--vae none makes a cache of pixels, which only saves time with --encoder; give it, or train on the images"
        )
    if args.vae == "none" and args.vae_dtype != "float32":
        parser.error(f"--vae_dtype {args.vae_dtype} has no effect with --vae none; remove it")
    if args.encoder_layer and not args.encoder:
        parser.error("--encoder_layer has no effect without --encoder; remove it")
    if args.seed and not args.sampled:
        parser.error("--seed has no effect without --sampled; remove it")
    if args.encoder_layer and len(args.encoder_layer) not in (1, len(args.encoder)):
        parser.error(
            f"--encoder_layer has {len(args.encoder_layer)} numbers for {len(args.encoder)} encoders; give one, or "
            "one for each"
        )
    return args


def check_from(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends the process with a message if `--from` has an unknown format, or comes with options about images to encode."""
    kind = args.from_latents[0]
    if kind not in FORMATS:
        parser.error(f"--from {kind} is not a known format; give {' or '.join(FORMATS)}")
    if args.vae == "none":
        parser.error("--vae none cannot be combined with --from; give the autoencoder that made the latents")
    concerned = ["dataset_name", "train_data_dir", "dataset_config_name", "dataset_split", "image_column"]
    concerned += [
        "label_column",
        "max_train_samples",
        "vae_dtype",
        "jpeg_draft",
        "sampled",
        "seed",
        "flip",
        "encoder",
        "encoder_layer",
    ]
    for name in concerned:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"`{name}` cannot be combined with --from; remove it")


def main(argv: list[str] | None = None, prog: str = "vrpo prepare"):
    """Runs the command; `prog` is its name in errors."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    args = parse_args(argv, prog)
    with one_line_errors(build_parser(prog)):
        (prepare_from_latents if args.from_latents else prepare)(args)


if __name__ == "__main__":
    main()
