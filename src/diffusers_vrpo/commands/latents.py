# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Verify a latent cache of `vrpo prepare`, export it to the Hub, and import it.

vrpo latents verify --latents_dir imagenet-256
vrpo latents export --latents_dir imagenet-256 --output_dir to-share --push_to_hub me/imagenet-256
vrpo latents import --dataset me/imagenet-256 --output_dir imagenet-256
"""

import argparse
import logging

from tqdm.auto import tqdm

from ..command_line import OneLineErrorParser, add_options, one_line_errors
from ..config import RunConfig
from ..data.latent_cache import LatentCache, num_chunks
from ..data.latent_cache_export import damage, export_cache, import_cache, push_export
from ..errors import InputError
from ..training.distributed import start_processes


logger = logging.getLogger("latents")


def export(args: argparse.Namespace):
    """Writes a cache as parquet files, and uploads them if `push_to_hub` is set.

    Raises:
        InputError: if the cache is missing or damaged, the Hub refuses, or `private` is given without `push_to_hub`.
    """
    if args.private and not args.push_to_hub:
        raise InputError("private", "`private` has no effect without `push_to_hub`; remove it")
    export_cache(args.latents_dir, args.output_dir)
    if args.push_to_hub:
        push_export(args.output_dir, args.push_to_hub, args.private)


def import_(args: argparse.Namespace):
    """Rebuilds a cache from an export.

    Raises:
        InputError: if the source is not a complete export, or several processes were started.
    """
    state = start_processes()
    if state.num_processes > 1:
        raise InputError(None, f"{state.num_processes} processes were started, but import runs in one; start one")
    import_cache(args.dataset, args.output_dir, state, args.cache_dir)


def verify(args: argparse.Namespace):
    """Compares all files of a cache with its checksums.

    Raises:
        InputError: if a file differs from its checksum.
    """
    cache = LatentCache(args.latents_dir)
    if damaged := cache.damaged_chunks(lambda chunks: tqdm(chunks, desc="verifying", unit="chunk")):
        raise damage(args.latents_dir, cache, damaged)
    logger.info(
        f"{args.latents_dir} is intact: {len(cache)} images in {num_chunks(cache.config)} chunks are as they were written"
    )


def build_parser(prog: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command, and the parsers of its subcommands by name."""
    parser = OneLineErrorParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{verify,export,import}")

    def command(name, help, run):
        made = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        made.set_defaults(run=run)
        return made

    p = command("verify", "compare a cache with its checksums", verify)
    p.add_argument("--latents_dir", required=True, help="folder of the cache")

    p = command("export", "write a cache as parquet files for the Hub", export)
    p.add_argument("--latents_dir", required=True, help="folder of the cache")
    p.add_argument("--output_dir", required=True, help="folder of the export")
    p.add_argument(
        "--push_to_hub", metavar="REPO", help="also upload the export to this data set repository, OWNER/NAME"
    )
    p.add_argument("--private", action="store_true", help="make the repository private if it does not exist yet")

    p = command("import", "rebuild a cache from an export", import_)
    p.add_argument("--dataset", required=True, help="folder or Hub name of the export")
    p.add_argument("--output_dir", required=True, help="folder of the cache")
    add_options(p, RunConfig, ["cache_dir"])
    return parser, dict(commands.choices)


def main(argv: list[str] | None = None, prog: str = "vrpo latents"):
    """Runs the command; `prog` is its name in errors."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    parser, commands = build_parser(prog)
    args = parser.parse_args(argv)
    with one_line_errors(commands[args.command]):
        args.run(args)


if __name__ == "__main__":
    main()
