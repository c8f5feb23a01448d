# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Encode a data set once, for `train_vrpo.py --latents_dir`; carry such a cache to the Hub and back.

    vrpo prepare --dataset ILSVRC/imagenet-1k --vae stabilityai/sd-vae-ft-ema \
        --resolution 256 --flip --output_dir imagenet-256
    accelerate launch -m diffusers_vrpo.commands.prepare prepare ...          (many GPUs)
    vrpo latents verify --latents_dir imagenet-256
    vrpo latents export --latents_dir imagenet-256 --output_dir to-share --push_to_hub me/imagenet-256
    vrpo latents import --dataset me/imagenet-256 --output_dir imagenet-256

A command that was stopped continues when it is given again.
"""

import argparse
import logging
import os
import sys

import torch
from tqdm.auto import tqdm

from ..alignment.encoders import load_encoder
from ..command_line import HelpFormatter, OneLineErrorParser, check_ranges, with_flags
from ..data.image_source import class_names
from ..data.latent_cache import LatentCache, num_chunks
from ..data.latent_cache_export import damage, export_cache, import_cache, push_export
from ..data.latent_cache_writer import CacheWriter
from ..data.latent_encoding import IMAGE_FORMATS, BatchEncoder, cache_config, write_chunks
from ..data.sources import load_images
from ..errors import InputError
from ..models.autoencoder import latent_shape, load_vae
from ..models.vision import layers_of_encoders
from ..training.distributed import start_processes


logger = logging.getLogger("latents")


# ----------------------------------------------------------------------------------------------------------------------
# Prepare


def prepare(args: argparse.Namespace):
    """Writes the cache that the options describe, on all processes.

    Raises:
        InputError: for options that cannot work, a folder with another cache, or damaged data.
    """
    state = start_processes()
    if args.images == "none" and not args.encoder:
        logger.info("--images none: the cache will do for --objective none only")
    with state.main_process_first():
        data = load_images(args)
    if state.is_main_process:
        data.check()
    vae = None if args.vae == "none" else load_vae(args.vae, args.cache_dir).to(state.device)
    if vae is not None and args.vae_dtype != "float32":
        vae.to(getattr(torch, args.vae_dtype))
    shape = latent_shape(vae, args.resolution, args.patch_size)
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
    if writer.complete:
        logger.info(f"{args.output_dir} is complete already: {len(data)} images")
        return
    if writer.num_done:
        logger.info(f"continuing: {writer.num_done} of {num_chunks(config)} chunks are written")
    write_chunks(writer, data, BatchEncoder(vae, encoders, config, state.device), args.dataloader_num_workers)
    writer.finish()
    logger.info(f"wrote {len(data)} images to {args.output_dir}; train with --latents_dir {args.output_dir}")


# ----------------------------------------------------------------------------------------------------------------------
# Export and import


def export(args: argparse.Namespace):
    """Writes a cache as parquet files, and uploads them with `push_to_hub`.

    Raises:
        InputError: when there is no such cache, it is damaged, or the Hub refuses.
    """
    export_cache(args.latents_dir, args.output_dir)
    if args.push_to_hub:
        push_export(args.output_dir, args.push_to_hub, args.private)


def import_(args: argparse.Namespace):
    """Makes a cache of an export.

    Raises:
        InputError: when it is not an export, or not a complete one.
    """
    state = start_processes()
    if state.num_processes > 1:
        raise InputError(None, "import runs in one process; start it without a launcher")
    import_cache(args.dataset, args.output_dir, state, args.cache_dir)


def verify(args: argparse.Namespace):
    """Compares all files of a cache with its checksums.

    Raises:
        InputError: where they differ.
    """
    cache = LatentCache(args.latents_dir)
    if damaged := cache.damaged_chunks(lambda chunks: tqdm(chunks, desc="verifying", unit="chunk")):
        raise damage(args.latents_dir, cache, damaged)
    logger.info(
        f"{args.latents_dir}: {len(cache)} images, {num_chunks(cache.config)} chunks, all as they were written"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser(prog: str) -> argparse.ArgumentParser:
    def formatter(prog):
        return HelpFormatter(prog, max_help_position=36, width=118)

    parser = OneLineErrorParser(prog=prog, allow_abbrev=False, description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prepare,verify,export,import}")

    def command(name, help, run):
        made = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            formatter_class=formatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    p = command("prepare", "encode a data set into a folder for train_vrpo.py --latents_dir", prepare)
    g = p.add_argument_group("data")
    g.add_argument(
        "--dataset_name", "--dataset", help="Hub name or folder of an image data set, or `digits` (embedded)"
    )
    g.add_argument("--dataset_config_name", help="configuration of that data set")
    g.add_argument("--dataset_split", default="train", help="split to encode")
    g.add_argument("--train_data_dir", help="folder with one folder of images per class, instead of --dataset_name")
    g.add_argument("--image_column", default="image", help="column with the images")
    g.add_argument("--label_column", default="label", help="column with the integer class labels")
    g.add_argument("--max_train_samples", type=int, help="a random subset of this size")
    g.add_argument("--cache_dir", help="where downloads go")
    g.add_argument("--resolution", type=int, default=256, help="side of ADM's centre crop in pixels")
    g = p.add_argument_group("what is kept")
    g.add_argument("--vae", required=True, help="diffusers autoencoder, Hub name or folder; `none` keeps pixels")
    g.add_argument(
        "--vae_dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of its computation; float32 gives what training from images gives",
    )
    g.add_argument(
        "--sampled", action="store_true", help="one drawn latent an image, half the size of mean and deviation"
    )
    g.add_argument("--seed", type=int, default=0, help="of --sampled")
    g.add_argument("--flip", action="store_true", help="also every image mirrored, for --random_flip")
    g.add_argument(
        "--images",
        choices=list(IMAGE_FORMATS),
        default="webp",
        help="the cropped images beside the latents, for encoders: webp is lossless, jpeg (quality 95) half as large",
    )
    g.add_argument(
        "--encoder", nargs="+", help="also features of these transformers encoders (large); then --images none will do"
    )
    g.add_argument("--encoder_layer", type=int, nargs="+", help="index in the hidden_states of each")
    g.add_argument("--patch_size", type=int, default=2, help="of the model to be trained: the token grid of features")
    g = p.add_argument_group("work")
    g.add_argument("--output_dir", required=True, help="folder of the cache")
    g.add_argument(
        "--dataloader_num_workers", type=int, default=4, help="processes that decode, for each that encodes"
    )
    g.add_argument("--chunk_rows", type=int, default=1024, help="images that a kill can cost, and of one checksum")
    g.add_argument(
        "--verify", action="store_true", help="check what is there by its checksums; do what is damaged again"
    )

    p = command("verify", "compare a cache with its checksums", verify)
    p.add_argument("--latents_dir", required=True, help="folder of the cache")

    p = command("export", "write a cache as parquet files for the Hub", export)
    p.add_argument("--latents_dir", required=True, help="folder of the cache")
    p.add_argument("--output_dir", required=True, help="folder of the export")
    p.add_argument("--push_to_hub", metavar="REPO", help="also upload it as this dataset repository")
    p.add_argument("--private", action="store_true", help="make that repository a private one")

    p = command("import", "make a cache of an export", import_)
    p.add_argument("--dataset", required=True, help="folder or Hub name of the export")
    p.add_argument("--output_dir", required=True, help="folder of the cache")
    p.add_argument("--cache_dir", help="where downloads go")
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "vrpo") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.command != "prepare":
        return args
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give either --dataset_name or --train_data_dir")
    if args.vae == "none" and not args.encoder:
        parser.error("--vae none: a cache of pixels is for encoder features; give --encoder, or train from the images")
    if args.vae == "none" and args.vae_dtype != "float32":
        parser.error(f"--vae_dtype {args.vae_dtype} is of an autoencoder; leave it out with --vae none")
    if args.encoder_layer and not args.encoder:
        parser.error("--encoder_layer goes with --encoder only; leave it out")
    if args.seed and not args.sampled:
        parser.error("--seed goes with --sampled only; leave it out")
    if args.encoder_layer and len(args.encoder_layer) not in (1, len(args.encoder)):
        parser.error(
            f"--encoder_layer has {len(args.encoder_layer)} numbers for {len(args.encoder)} encoders; give one, or "
            "one for each"
        )
    at_least_one = "resolution max_train_samples patch_size chunk_rows"
    check_ranges(parser, args, at_least_one, "dataloader_num_workers seed", "", "")
    return args


def main(argv: list[str] | None = None, prog: str = "vrpo"):
    """The command; `prog` is what its errors call it."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    args = parse_args(argv, prog)
    try:
        args.run(args)
    except InputError as error:
        sys.exit(f"{prog} {args.command}: error: {with_flags(error, vars(args))}")


if __name__ == "__main__":
    main()
