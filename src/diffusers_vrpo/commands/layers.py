# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Suggest which block of a transformer to align with which layer of an encoder, by ridge regressions for every pair.

    vrpo layers MODEL --dataset_name ILSVRC/imagenet-1k --encoder facebook/dinov2-base --output_file layers.json

MODEL is a short run without alignment or an early checkpoint, given as the folder of the run, of a checkpoint-N or of a
pipeline. Images are encoded and noised to each of --timesteps (t = 1 is noise), and the transformer sees them without a
class. From the tokens of each block, a ridge regression predicts the encoder's features of the clean image, scaled to
length 1, for each layer of the encoder.

The recoverability is R² on held-out images: the share of the differences between images that the regression predicts.
The gap is how far the recoverability of a block is below that of the best block. In the suggested pair the block reaches
about half of the best block's recoverability: the model builds these features only later, and alignment could make it
build them here. This is a heuristic, not a measurement of what alignment gains.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm

from ..alignment.encoders import features_of_layers, load_encoder
from ..alignment.rewards import normalize
from ..command_line import OneLineErrorParser, add_options, number_in, one_line_errors
from ..config import BATCH, LAYER, SEED, DataConfig, In, RunConfig
from ..data.image_datasets import load_image_dataset
from ..errors import InputError
from ..evaluation.feature_statistics import Batches
from ..evaluation.readouts import BlockReadouts, gaps, recommend
from ..models.autoencoder import encode_images, load_vae
from ..models.flow import forward_process
from ..models.official_checkpoints import convert_with_projectors
from ..random_streams import NOISE, random_stream
from ..training.checkpoints import list_checkpoints
from ..training.distributed import start_processes
from ..training.output_dir import writing_result
from .evaluate import check_output_files, write_report
from .probe import LabelledImages, image_side, open_pipeline, recorded_blocks, split_rows


logger = logging.getLogger("layers")
# The options that the short help shows in addition to the required ones.
COMMON = ("num_train", "num_test", "encoder_layer", "timesteps", "output_file")
SEVERAL = In(2, most=10**7)  # R² needs at least two images


def open_model(args: argparse.Namespace):
    """Opens the transformer and its autoencoder from a pipeline, the folder of a run or a checkpoint.

    Returns:
        the transformer, and its autoencoder or, for a model of pixels, None.

    Raises:
        InputError: if none of these is found, or the autoencoder of a checkpoint is not known.
    """
    folder = Path(args.model).expanduser()
    is_pipeline = (folder / "model_index.json").is_file() or not folder.is_dir()
    if is_pipeline and args.vae is None:
        pipeline = open_pipeline(args.model, args.cache_dir)
        return pipeline.transformer, pipeline.vae
    if not is_pipeline and (checkpoints := list_checkpoints(folder)):
        folder = checkpoints[-1]
        logger.info(f"the newest checkpoint is {folder}")
    try:
        transformer, _ = convert_with_projectors(str(folder), cache_dir=args.cache_dir)
    except InputError as error:
        raise InputError(None, f"MODEL {args.model}: {error}") from error
    vae = args.vae or vae_of_run(folder.parent)
    if vae is None:
        raise InputError(
            "vae", f"MODEL {args.model} does not name an autoencoder; give `vae`, or `vae` none for a model of pixels"
        )
    return transformer.eval().requires_grad_(False), None if vae == "none" else load_vae(vae, args.cache_dir).eval()


def vae_of_run(folder: Path) -> str | None:
    """The autoencoder in the record of a run's options; None if there is no record."""
    try:
        recorded = yaml.safe_load((folder / "train_config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    vae = recorded.get("vae") if isinstance(recorded, dict) else None
    return vae if isinstance(vae, str) else None


def batches(part: LabelledImages, batch_size: int, num_workers: int):
    """Yields rows and their pixels, `[B,3,R,R]` in [-1, 1], of a part of a data set, with a progress bar."""
    rows = range(len(part.images))
    drawn = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    loader = torch.utils.data.DataLoader(Batches(part.images), batch_size=None, sampler=drawn, num_workers=num_workers)
    # zip asks the progress bar first, which therefore reaches its end.
    for pixels, numbers in zip(tqdm(loader, desc=part.images.name, unit="batch"), drawn):
        if isinstance(pixels, str):
            raise InputError(None, pixels)
        yield numbers, pixels.float() / 127.5 - 1


@torch.no_grad()
def tokens_at(transformer, x0: torch.Tensor, noise: torch.Tensor, t: float) -> list[torch.Tensor]:
    """The tokens `[B,N,D]` of every block for latents noised to t, without a class.

    A model without a null class sees class 0.
    """
    label = transformer.null_class_id if transformer.null_class_id is not None else 0
    u = torch.full((len(x0),), t, device=x0.device)
    x_t, timestep, _, _ = forward_process(x0, noise, u, transformer.config)
    labels = torch.full((len(x0),), label, device=x0.device)
    with recorded_blocks(transformer, lambda tokens: tokens.float()) as states:
        transformer(x_t.to(transformer.dtype), timestep, labels, return_dict=False)
        return list(states)


def layers(args: argparse.Namespace) -> dict:
    """Fits and scores the regressions, and returns the content of the JSON file.

    Raises:
        InputError: if options, model or data cannot work.
    """
    state = start_processes()
    if state.num_processes > 1:
        raise InputError(None, f"{state.num_processes} processes were started, but vrpo layers runs in one; start one")
    check_output_files(args, "output_file")
    transformer, vae = open_model(args)
    if vae is None and transformer.config.in_channels != 3:
        raise InputError(
            "vae", f"MODEL {args.model} takes latents of {transformer.config.in_channels} channels; give its `vae`"
        )
    data, _, _ = load_image_dataset(
        args.dataset_name,
        args.dataset_config_name,
        split=args.dataset_split,
        image_column=args.image_column,
        label_column=args.label_column,
        cache_dir=args.cache_dir,
    )
    train_rows, test_rows = split_rows(args, data, None)
    transformer = transformer.to(state.device)
    vae = None if vae is None else vae.to(state.device)
    side = image_side(transformer, vae)
    encoder = load_encoder(args.encoder, transformer.grid_size, device=state.device, cache_dir=args.cache_dir)
    train = LabelledImages(data, train_rows, side, "training images", 0)
    test = LabelledImages(data, test_rows, side, "held-out images", len(train_rows))

    names, readouts = None, None
    for part in (train, test):
        for rows, pixels in batches(part, args.batch_size, args.dataloader_num_workers):
            pixels = pixels.to(state.device)
            found = chosen_layers(features_of_layers(encoder, pixels), args.encoder_layer)
            features = torch.cat([normalize(values) for values in found.values()], dim=-1)
            if readouts is None:
                names = list(found)
                widths = [values.shape[-1] for values in found.values()]
                readouts = BlockReadouts(len(transformer.transformer_blocks), len(args.timesteps), widths)
            x0 = encode_images(vae, pixels)
            draws = [random_stream(args.seed, part.first_index + row, NOISE) for row in rows]
            noise = np.stack([draw.standard_normal(x0.shape[1:], dtype=np.float32) for draw in draws])
            noise = torch.from_numpy(noise).to(state.device)
            for level, t in enumerate(args.timesteps):
                use = readouts.add if part is train else readouts.score
                use(level, tokens_at(transformer, x0, noise, t), features)
        if part is train:
            readouts.fit(args.l2)

    recoverability = readouts.recoverability()
    found, gap = gaps(recoverability)
    pair = recommend(found, gap)
    report = {
        "model": args.model,
        "encoder": args.encoder,
        "encoder_layers": ["output" if name is None else name for name in names],
        "timesteps": args.timesteps,
        "num_train": len(train_rows),
        "num_test": len(test_rows),
        "recoverability": found.tolist(),
        "gap": gap.tolist(),
        "recoverability_by_timestep": recoverability.transpose(0, 1).tolist(),
        "recommendation": None if pair is None else {"block": pair[0] + 1, "encoder_layer": names[pair[1]]},
        "settings": {key: getattr(args, key) for key in ("l2", "seed")},
    }
    print(format_layers(report))
    if args.output_file:
        with writing_result("output_file", args.output_file):
            write_report(Path(args.output_file), json.dumps(report, indent=2) + "\n")
    return report


def chosen_layers(features: dict, layers: list[int] | None) -> dict:
    """The features of the layers that `--encoder_layer` names; by default of all but 0, the embedding of the pixels.

    Args:
        features: features by index of the layer; the index of the output is None.
        layers: indices of layers; negative ones count from the last layer.

    Raises:
        InputError: if the encoder does not have such a layer.
    """
    if layers is None:
        return {index: values for index, values in features.items() if index != 0}
    last = max(index for index in features if index is not None)
    chosen = {}
    for layer in layers:
        index = layer + last + 1 if layer < 0 else layer
        if index not in features:
            known = ", ".join(str(index) for index in features if index is not None)
            raise InputError(
                "encoder_layer", f"`encoder_layer` {layer} is not a layer with tokens; give one of {known}"
            )
        chosen[index] = features[index]
    return chosen


def format_layers(report: dict) -> str:
    """Formats both tables of blocks by layers, and the recommendation."""
    layers = report["encoder_layers"]
    lines = []
    for name, of in (("recoverability", "R² on held-out images"), ("gap", "to the best block")):
        lines += [f"{name} ({of}), mean over t; rows: blocks, columns: layers of {report['encoder']}"]
        lines += ["      " + "".join(f"{layer!s:>8}" for layer in layers)]
        for block, values in enumerate(report[name]):
            lines += [f"{block + 1:>6}" + "".join(f"{value:8.3f}" for value in values)]
    pair = report["recommendation"]
    if pair is None:
        return "\n".join([*lines, "no pair is suggested, because no block is clearly behind a later one in any layer"])
    block, layer = pair["block"], pair["encoder_layer"]
    index = layers.index("output" if layer is None else layer)
    found, gap = (report[name][block - 1][index] for name in ("recoverability", "gap"))
    what = "the output" if layer is None else f"layer {layer}"
    flags = f"--layer_scope {block}" + ("" if layer is None else f" --encoder_layer {layer}")
    text = f"align block {block} with {what}: recoverability {found:.3f}, {gap:.3f} below the best block ({flags})"
    return "\n".join([*lines, text, "this is a heuristic; compare it with --layer_scope early by a short run of each"])


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__, common=COMMON)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="measure the transformer of this run, checkpoint-N or pipeline (folder, or Hub name of a pipeline)",
    )
    parser.add_argument(
        "--vae",
        help="autoencoder of the model (Hub name or folder), or `none` for pixels; if not given, that of the run",
    )
    g = parser.add_argument_group("data")
    add_options(g, DataConfig, ["dataset_name"], required=True)
    add_options(g, DataConfig, ["dataset_config_name", "dataset_split", "image_column", "label_column"])
    g.add_argument(
        "--num_train",
        type=number_in(SEVERAL),
        default=1024,
        help="fit the regressions on this many images, drawn at random",
    )
    g.add_argument(
        "--num_test", type=number_in(SEVERAL), default=256, help="score the regressions on this many other images"
    )
    add_options(g, RunConfig, ["cache_dir"])
    g = parser.add_argument_group("what is measured")
    g.add_argument(
        "--encoder",
        required=True,
        help="compare with the layers of this vision encoder of transformers (Hub name or folder, usually "
        "facebook/dinov2-base), or of `digits`, which is part of the package",
    )
    g.add_argument(
        "--encoder_layer",
        type=number_in(LAYER),
        nargs="+",
        help="compare only with these hidden states of the encoder, by index; if not given, with all except 0 and with its output",
    )
    g.add_argument(
        "--timesteps",
        type=number_in(In(0, 1), float),
        nargs="+",
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        help="measure at these noise levels t, from 0 (the image) up to but not including 1 (noise); for a model that predicts "
        "noise, they are shares of its 1000 timesteps",
    )
    g.add_argument(
        "--l2",
        type=number_in(In(0, most=10**9), float),
        default=1e-3,
        help="penalty on the squared weights of the regressions, which see standardised tokens",
    )
    g.add_argument("--seed", type=number_in(SEED), default=0, help="seed of the drawn images and the noise")
    g = parser.add_argument_group("work and output")
    g.add_argument("--batch_size", type=number_in(BATCH), default=32, help="compute this many images together")
    add_options(g, RunConfig, ["dataloader_num_workers"], help="processes that decode images")
    g.add_argument("--output_file", metavar="FILE.json", help="write all numbers to this file")
    return parser


def main(argv: list[str] | None = None, prog: str = "vrpo layers") -> dict:
    """Runs the command; `prog` is its name in errors."""
    args = build_parser(prog).parse_args(argv)
    with one_line_errors(build_parser(prog)):
        return layers(args)


if __name__ == "__main__":
    main()
