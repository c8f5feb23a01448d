# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Convert checkpoints of SiT, REPA, iREPA and DiT into pipelines, and transformers back into official state dicts.

    vrpo convert SiT-XL-2-256x256.pt sit-xl --vae stabilityai/sd-vae-ft-ema
    vrpo convert last.pt repa-xl --vae stabilityai/sd-vae-ft-ema
    vrpo convert facebook/DiT-XL-2-256 dit-xl
    vrpo convert sit-xl-vrpo sit-xl-vrpo.pt --to sit

`VRPOPipeline.from_pretrained` loads the result, and `vrpo train --pretrained_model_name_or_path` starts from it.
"""

import argparse
import json
import logging
import os
import re
import tempfile
from pathlib import Path

import diffusers
from safetensors import SafetensorError

from ..command_line import OneLineErrorParser, number_in, one_line_errors
from ..config import In
from ..errors import InputError, first_line
from ..files import default_permissions
from ..models.autoencoder import latent_shape, load_vae, side_factor
from ..models.official_checkpoints import (
    FORMATS,
    LAYOUTS,
    convert_with_projectors,
    default_scheduler,
    export_checkpoint,
    find_transformer,
    pipeline_index,
    save_official,
)
from ..pipelines.pipeline_vrpo import VRPOPipeline
from ..pipelines.scheduling_sit_sde import SiTSDEScheduler
from ..reach import offline_if_out_of_reach
from ..schemas import id2label_problem
from ..training.output_dir import check_writable


logger = logging.getLogger("convert")

# The files and folders that a folder may have for --overwrite to replace it.
PIPELINE_FILES = {
    "model_index.json",
    "pipeline_vrpo.py",
    "transformer",
    "scheduler",
    "vae",
    "README.md",
    ".gitattributes",
}


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="file of official weights, or folder or Hub name of a model"
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT_DIR",
        help="folder for the pipeline; with --to, a .pt or .safetensors file, or a folder",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="format of CHECKPOINT; auto recognises it by the names of the weights",
    )
    parser.add_argument(
        "--preset",
        help="size that the model in a file must have, such as SiT-XL/2 or DiT-XL/2; other sizes are refused",
    )
    parser.add_argument(
        "--num_attention_heads",
        type=number_in(In(1, most=1024)),
        help="number of attention heads, for a model whose depth and width are not those of a published size",
    )
    parser.add_argument(
        "--num_classes",
        type=number_in(In(1, most=10**7)),
        help="number of classes, for a file of a model that was trained without label dropout",
    )
    parser.add_argument(
        "--alignment_layer",
        type=number_in(In(1, most=1000)),
        help="block after which REPA's projectors are attached, counted from 1, if the file does not say so",
    )
    parser.add_argument(
        "--vae", help="autoencoder for the pipeline (Hub name or folder), or `none` for a model of pixels"
    )
    parser.add_argument(
        "--id2label", metavar="FILE.json", help="file with class names, as a JSON object from id to name"
    )
    parser.add_argument("--to", choices=LAYOUTS, help="write an official state dict instead of a pipeline")
    parser.add_argument(
        "--ema_key",
        action="store_true",
        help="put the state dict of --to under the key 'ema', as in the official training checkpoints; needs a .pt file",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a pipeline in OUTPUT_DIR, or the file of --to; a folder with other files is never replaced",
    )
    parser.add_argument("--cache_dir", help="folder for downloads")
    return parser


def source_parts(name_or_path: str, cache_dir: str | None) -> tuple[object, dict | None, list[int] | None, bool]:
    """Reads the parts of a pipeline besides its transformer.

    Returns:
        the scheduler, the class names, the ids of the trained classes, and whether there is an autoencoder; None, None, None
        and False if this is not a pipeline.
    """
    index = pipeline_index(name_or_path, cache_dir)
    if index is None:
        return None, None, None, False
    library, class_name = index["scheduler"]
    scheduler = None
    scheduler_class = {"SiTSDEScheduler": SiTSDEScheduler}.get(class_name) or getattr(diffusers, class_name, None)
    if scheduler_class is not None:
        scheduler = scheduler_class.from_pretrained(name_or_path, subfolder="scheduler", cache_dir=cache_dir)
    else:
        logger.warning(
            f"the scheduler {library}.{class_name} of {name_or_path} is unknown here, so the default is used instead"
        )
    return scheduler, index.get("id2label"), index.get("trained_labels"), index.get("vae", [None])[0] is not None


def check_pipeline_folder(output: Path, overwrite: bool):
    """Checks that a pipeline can be written to a folder without losing other files, and creates the folder.

    Raises:
        InputError: if the folder cannot be created, has a pipeline and `overwrite` is false, or has files that are not part
            of a pipeline, such as those of a training run.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in output.iterdir())
    except OSError as error:
        raise InputError(
            None, f"OUTPUT_DIR {output} cannot be created as a folder ({error.strerror}); choose another place"
        ) from error
    others = [name for name in names if name not in PIPELINE_FILES]
    if others:
        raise InputError(
            None,
            f"OUTPUT_DIR {output} holds {', '.join(others[:3])}, not only a pipeline; choose another folder",
        )
    if names and not overwrite:
        raise InputError(
            None, f"OUTPUT_DIR {output} holds a pipeline; choose another folder, or give --overwrite to replace it"
        )


def write_pipeline(pipeline: VRPOPipeline, output: Path):
    """Writes a pipeline to a temporary folder next to `output` and then renames it, so that a failure leaves `output` intact.

    Raises:
        InputError: if the pipeline cannot be written, for example on a full disk.
    """
    output = output.resolve()
    # The temporary folder is on the same disk, and its name is unique.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        written, before = Path(scratch) / "pipeline", Path(scratch) / "before"
        try:
            pipeline.save_pretrained(written)
            default_permissions(written)
            output.rename(before)
            written.rename(output)
        except (OSError, RuntimeError, SafetensorError) as error:
            if before.exists() and not output.exists():
                before.rename(output)
            raise InputError(
                None, f"OUTPUT_DIR {output} cannot be written ({first_line(error)}); make room or choose another place"
            ) from error


def read_id2label(file: str) -> dict[int, str]:
    """Reads class names by id from a JSON file.

    Raises:
        InputError: if the file is something else.
    """
    path = Path(file)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise OSError("it is not a file")
        names = json.loads(path.read_text())
        if problem := id2label_problem(names):
            raise ValueError(f"it {problem}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            "id2label", f"`id2label` {file} is not a JSON map from ids to names: {first_line(error)}"
        ) from error
    return {int(key): name for key, name in names.items()}


def is_ours(name_or_path: str, cache_dir: str | None) -> bool:
    """Whether a folder or Hub name has a transformer of this package, as opposed to diffusers' DiT."""
    return find_transformer(name_or_path, cache_dir)[0]["_class_name"] == "SiTTransformer2DModel"


def check_latents(vae, name: str, config):
    """Checks that a transformer of this config can work on the latents of an autoencoder.

    Raises:
        InputError: if their number of channels or their size does not fit.
    """
    sides = [config.sample_size] if isinstance(config.sample_size, int) else config.sample_size
    shape = latent_shape(vae, (side_factor(vae) or 1) * max(sides), config.patch_size)
    if shape[0] != config.in_channels:
        raise InputError(
            "vae",
            f"`vae` {name} makes latents of {shape[0]} channels, but the transformer takes {config.in_channels}; give another",
        )


def convert(args: argparse.Namespace):
    """Converts a checkpoint and writes the result.

    Raises:
        InputError: if options, checkpoint or output folder cannot work.
    """
    output = Path(args.output)
    is_file = output.suffix in (".pt", ".pth", ".safetensors") and not output.is_dir()
    file = output if is_file else output / f"{args.to}.pt"
    if args.to is None:
        check_pipeline_folder(output, args.overwrite)
    else:
        if not is_file and not output.is_dir() and re.fullmatch(r"\.[a-z]{1,6}", output.suffix.lower()):
            raise InputError(
                None, f"OUTPUT_DIR {output} must end in .pt, .pth or .safetensors, or be a folder, with `to` {args.to}"
            )
        check_writable(None, "OUTPUT_DIR", output)
        if os.path.lexists(file) and not args.overwrite:
            raise InputError(None, f"OUTPUT_DIR {file} exists; choose another file, or give --overwrite to replace it")
    if args.ema_key and args.to is None:
        raise InputError("ema_key", "`ema_key` has no effect without `to`; remove it")
    id2label = read_id2label(args.id2label) if args.id2label else None
    transformer, projectors = convert_with_projectors(
        args.checkpoint,
        preset=args.preset,
        num_attention_heads=args.num_attention_heads,
        format=args.format,
        num_classes=args.num_classes,
        alignment_layer=args.alignment_layer,
        cache_dir=args.cache_dir,
    )
    config = transformer.config
    logger.info(
        f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.1f} M parameters, depth {config.num_layers}, "
        f"{config.num_attention_heads} heads of {config.attention_head_dim}, patch {config.patch_size}, "
        f"{config.num_classes} classes; predicts {config.prediction_type}, {config.time_direction}"
    )

    if args.to is not None:
        state = export_checkpoint(transformer, args.to, projectors)
        if args.ema_key and file.suffix == ".safetensors":
            raise InputError("ema_key", f"`ema_key` needs a .pt file, because {file.suffix} files have no nested keys")
        save_official({"ema": state} if args.ema_key else state, file)
        logger.info(f"wrote {file}: {len(state)} tensors, learn_sigma={config.learn_sigma and args.to != 'repa'}")
        return

    if projectors is not None:
        logger.info(
            f"{args.checkpoint} also has alignment projectors, which only training needs; they are not part of the pipeline"
        )
    scheduler, names, trained_labels, has_vae = source_parts(args.checkpoint, args.cache_dir)
    vae = None
    if args.vae not in (None, "none"):
        vae = load_vae(args.vae, args.cache_dir)
    elif args.vae is None and has_vae:
        vae = load_vae(args.checkpoint, args.cache_dir)
    elif args.vae is None and config.in_channels not in (1, 3):
        logger.warning(
            "without --vae the pipeline returns latents instead of images; SiT and DiT use stabilityai/sd-vae-ft-ema"
        )
    if vae is not None:
        name = args.vae or args.checkpoint
        check_latents(vae, name, config)
        other = [key for key in ("shift_factor", "latents_mean", "latents_std") if getattr(vae.config, key, None)]
        is_file = Path(args.checkpoint).is_file()
        if other and (is_file or not is_ours(args.checkpoint, args.cache_dir)):
            logger.warning(
                f"the autoencoder {name} has {' and '.join(other)}, which the pipeline applies; the official code of SiT, REPA "
                "and DiT only divides latents by scaling_factor, so make sure that these weights were trained with them"
            )
    scheduler = scheduler or default_scheduler(config.prediction_type)
    try:
        pipeline = VRPOPipeline(transformer, scheduler, vae, id2label or names, trained_labels)
    except ValueError as error:
        raise InputError("id2label", f"`id2label` {args.id2label}: {error}") from error
    write_pipeline(pipeline, output)
    logger.info(f"wrote {output}; open it with VRPOPipeline.from_pretrained({str(output)!r})")


def main(argv: list[str] | None = None, prog: str = "vrpo convert"):
    """Runs the command; `prog` is its name in errors."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    for name, value in (("CHECKPOINT", args.checkpoint), ("OUTPUT_DIR", args.output)):
        if not value.strip():
            parser.error(f"{name} is empty; give a path")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Whether the Hub is in reach is asked once for weights, scheduler and autoencoder.
    with one_line_errors(parser), offline_if_out_of_reach(args.checkpoint):
        convert(args)


if __name__ == "__main__":
    main()
