# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Measure a transformer's blocks: linear probes and alignment with vision encoders, by block and noise level.

    vrpo probe PIPELINE --dataset_name ILSVRC/imagenet-1k --test_split validation \
      --encoder facebook/dinov2-large --output_file probe.json --plot_file probe.png

These measurements motivate REPA (arXiv 2410.06940). Images are encoded and noised to each of --timesteps (t = 1 is noise),
and the transformer sees them without a class. The hidden states of every block, averaged over the tokens, are measured by
    a linear probe: the accuracy on the test images of a logistic regression that is fitted to the training images;
    CKNNA (arXiv 2405.07987): whether the test images have the same neighbours as in an encoder's features.
"""

import argparse
import contextlib
import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ..command_line import OneLineErrorParser, add_options, number_in, one_line_errors
from ..config import BATCH, NUM_SAMPLES, SEED, DataConfig, In, RunConfig, last_part
from ..data.image_datasets import column_values, load_image_dataset
from ..data.image_decoding import find_pixel_range, sample_rows
from ..errors import InputError
from ..evaluation.feature_statistics import Batches, gather_rows
from ..evaluation.image_encoders import POOLINGS, load_image_encoder
from ..evaluation.image_sets import DatasetReader, ImageSet
from ..evaluation.metrics import cka, cknna, linear_probe
from ..files import replacing
from ..models.autoencoder import decoded_side, encode_images
from ..models.flow import forward_process
from ..pipelines.pipeline_vrpo import VRPOPipeline
from ..random_streams import NOISE, ORDER, random_stream
from ..training.distributed import start_processes
from ..training.output_dir import writing_result
from .evaluate import check_output_files, write_report
from .sample import load_pipeline


logger = logging.getLogger("probe")
# The options that the short help shows in addition to the required ones.
COMMON = ("test_split", "num_train", "num_test", "timesteps", "encoder", "batch_size", "output_file", "plot_file")


def pooled_blocks(transformer: nn.Module):
    """`recorded_blocks` for the hidden states averaged over tokens, float32 `[B, D]`."""
    return recorded_blocks(transformer, lambda tokens: tokens.float().mean(1))


@contextmanager
def recorded_blocks(transformer: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]):
    """Yields a list that each forward pass fills again with `function` of every block's hidden states `[B, N, D]`."""
    states: list[torch.Tensor] = []
    blocks = list(transformer.transformer_blocks)

    def keep(block, arguments, output):
        if block is blocks[0]:
            states.clear()
        states.append(function(output))

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def block_features(
    transformer: nn.Module, latents: torch.Tensor, noise: torch.Tensor, t: float, batch_size: int = 64
) -> torch.Tensor:
    """Computes the features of all blocks for latents noised to t, float32 `[N, blocks, D]` on the CPU.

    The class is the null class, or class 0 for a model without one, because the true label would give the probe its answer.

    Args:
        latents, noise: `[N, C, H, W]`.
        t: noise level in [0, 1), 1 being noise; for a model that predicts noise, the share of its 1000 timesteps.
    """
    device = next(transformer.parameters()).device
    label = transformer.null_class_id if transformer.null_class_id is not None else 0
    features = []
    with pooled_blocks(transformer) as states:
        for x0, epsilon in zip(latents.split(batch_size), noise.split(batch_size)):
            u = torch.full((len(x0),), t, device=device)
            x_t, timestep, _, _ = forward_process(x0.to(device), epsilon.to(device), u, transformer.config)
            labels = torch.full((len(x0),), label, device=device)
            transformer(x_t.to(transformer.dtype), timestep, labels, return_dict=False)
            features.append(torch.stack(states, dim=1).cpu())
    return torch.cat(features)


class LabelledImages:
    """A subset of a labelled data set, cropped for a transformer, and the part of it that this process encodes.

    Attributes:
        images (`ImageSet`), labels (int64 `[N]`): the subset.
        rows: the rows of the subset that this process encodes.
        latents, noise: float32 latents and noise of these rows, on the CPU.
        vectors: the feature vectors `[N, D]` of the whole subset by encoder, on the main process.
    """

    def __init__(self, data, rows: np.ndarray, resolution: int, name: str, first_index: int):
        # The sample is drawn from all rows, so that training and test images of one split have the same pixel range.
        sample = (data[row]["image"] for row in sample_rows(len(data)))
        pixel_range = find_pixel_range(sample, name)
        data = data.select(rows)
        reader = DatasetReader(data, "image", resolution, pixel_range)
        self.images = ImageSet(name, "data set", len(rows), (resolution, resolution), reader, None)
        self.labels = torch.tensor(data["label"][:])
        self.first_index = first_index  # offset of the noise indices, so that no two images share noise

    @torch.no_grad()
    def encode(self, vae, encoders: dict, state: PartialState, batch_size: int, num_workers: int, seed: int):
        rows = range(len(self.images))
        batches = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        batches = batches[state.process_index :: state.num_processes]
        self.rows = torch.tensor([row for batch in batches for row in batch], dtype=torch.long)
        loader = torch.utils.data.DataLoader(
            Batches(self.images), batch_size=None, sampler=batches, num_workers=num_workers
        )
        latents, vectors = [], {name: [] for name in encoders}
        for pixels in tqdm(loader, desc=self.images.name, unit="batch", disable=not state.is_main_process):
            if isinstance(pixels, str):
                raise InputError(None, pixels)
            pixels = pixels.to(state.device)
            latents.append(encode_images(vae, pixels.float() / 127.5 - 1).cpu())
            for name, encoder in encoders.items():
                vectors[name].append(encoder(pixels)["pool"].cpu())
        self.latents = torch.cat(latents)
        streams = (random_stream(seed, self.first_index + row, NOISE) for row in self.rows.tolist())
        shape = self.latents.shape[1:]
        self.noise = torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams]))
        self.vectors = {
            name: gather_rows(torch.cat(parts), self.rows, len(self.images), state) for name, parts in vectors.items()
        }

    def block_features(self, transformer, t: float, state: PartialState, batch_size: int) -> torch.Tensor | None:
        """Computes the features of all blocks; returns `[N, blocks, D]` on the main process, and None on the others."""
        features = block_features(transformer, self.latents, self.noise, t, batch_size)
        gathered = gather_rows(features.flatten(1), self.rows, len(self.images), state)
        return None if gathered is None else gathered.unflatten(1, features.shape[1:])


def open_pipeline(name: str, cache_dir: str | None) -> VRPOPipeline:
    """Opens the pipeline to probe.

    Raises:
        InputError: if the pipeline cannot be opened.
    """
    pipeline = load_pipeline(name, revision=None, variant=None, cache_dir=cache_dir)
    pipeline.transformer.eval().requires_grad_(False)
    return pipeline


def image_side(transformer, vae) -> int:
    """The side in pixels of the images on which a transformer was trained.

    Raises:
        InputError: if the images were not square.
    """
    size = transformer.config.sample_size
    if not isinstance(size, int):
        raise InputError(
            None,
            f"PIPELINE makes images that are not square ({size[0]}x{size[1]} latents), and only squares are supported",
        )
    if vae is None:
        return size
    return decoded_side(vae, transformer.config.in_channels, size)


@contextlib.contextmanager
def naming(option: str, of: str):
    """Inside the `with` block, makes errors about the option `of` name `option` instead."""
    try:
        yield
    except InputError as error:
        if error.field != of:
            raise
        raise InputError(option, str(error).replace(f"`{of}`", f"`{option}`")) from error


def split_rows(args, data, test_data) -> tuple[np.ndarray, np.ndarray]:
    """Draws the rows of the training and test images.

    Args:
        test_data: the data set of `--test_split`; if it is None, both are disjoint parts of `data`.

    Raises:
        InputError: if there are not enough images.
    """
    rows = random_stream(args.seed, 0, ORDER).permutation(len(data))
    if test_data is None:
        needed = args.num_train + args.num_test
        if len(rows) < needed:
            raise InputError(
                "num_train",
                f"`num_train` {args.num_train} and `num_test` {args.num_test} need {needed} images, but the split has "
                f"{len(rows)}; give lower numbers",
            )
        return rows[: args.num_train], rows[args.num_train : needed]
    test_rows = random_stream(args.seed, 1, ORDER).permutation(len(test_data))
    for option, wanted, found in (
        ("num_train", args.num_train, len(rows)),
        ("num_test", args.num_test, len(test_rows)),
    ):
        if found < wanted:
            raise InputError(option, f"`{option}` {wanted} is too high, because the split has {found} images")
    return rows[: args.num_train], test_rows[: args.num_test]


def probe(args: argparse.Namespace) -> dict | None:
    """Runs the requested measurements; the main process returns the content of the JSON file, the others None.

    Raises:
        InputError: if options, pipeline or data cannot work.
    """
    state = start_processes()
    check_output_files(args, "output_file", "plot_file")
    where = {"image_column": args.image_column, "label_column": args.label_column, "cache_dir": args.cache_dir}
    with state.main_process_first():
        pipeline = open_pipeline(args.pipeline, args.cache_dir)
        data, _, num_classes = load_image_dataset(
            args.dataset_name, args.dataset_config_name, split=args.dataset_split, **where
        )
        if num_classes < 2:
            raise InputError(
                "label_column",
                f"`dataset_name` {args.dataset_name} has one class, and probing needs several; give another `label_column`",
            )
        test_data = None
        if args.test_split:
            with naming("test_split", of="dataset_split"):
                test_data = load_image_dataset(
                    args.dataset_name, args.dataset_config_name, split=args.test_split, **where
                )[0]
        rows, test_rows = split_rows(args, data, test_data)
        if len(np.unique(column_values(data, "label").to_numpy()[rows])) < 2:
            raise InputError(
                "num_train",
                f"`num_train` {args.num_train} draws images of one class only, and a probe needs at least two; give more",
            )
        encoders = {
            name: load_image_encoder(
                name, args.pooling, args.inception_weights, device=state.device, cache_dir=args.cache_dir
            )
            for name in args.encoder or []
        }
    transformer = pipeline.transformer.to(state.device)
    vae = None if pipeline.vae is None else pipeline.vae.to(state.device).eval()
    if vae is None and transformer.config.in_channels != 3:
        raise InputError(
            None,
            f"PIPELINE {args.pipeline} has no autoencoder for its latents of {transformer.config.in_channels} channels; save it "
            "with one",
        )
    if transformer.null_class_id is None:
        logger.warning("the transformer has no null class, so its hidden states are those for class 0")
    side = image_side(transformer, vae)
    train = LabelledImages(data, rows, side, "training images", 0)
    test = LabelledImages(data if test_data is None else test_data, test_rows, side, "test images", len(rows))
    smallest = min(len(train.images), len(test.images))
    if smallest < args.batch_size * state.num_processes and state.num_processes > 1:
        args.batch_size = max(1, smallest // state.num_processes)  # every process needs images to gather
    for part in (train, test):
        part.encode(vae, encoders, state, args.batch_size, args.dataloader_num_workers, args.seed)

    report = {
        "pipeline": args.pipeline,
        "num_train": len(rows),
        "num_test": len(test_rows),
        "num_classes": num_classes,
        "timesteps": args.timesteps,
        "accuracy": [],
        "train_accuracy": [],
        "cknna": {name: [] for name in encoders},
        "cka": {name: [] for name in encoders},
        "encoder_accuracy": {},
        "settings": {key: getattr(args, key) for key in ("l2", "cknna_k", "pooling", "seed", "test_split")},
    }
    num_blocks = len(transformer.transformer_blocks)
    progress = tqdm(
        total=num_blocks * len(args.timesteps), desc="probing", unit="block", disable=not state.is_main_process
    )
    with progress:
        for t in args.timesteps:
            x = train.block_features(transformer, t, state, args.batch_size)
            z = test.block_features(transformer, t, state, args.batch_size)
            if not state.is_main_process:
                continue
            accuracies = []
            for block in range(num_blocks):
                accuracies.append(
                    probe_accuracy(x[:, block], train.labels, z[:, block], test.labels, args.l2, state.device)
                )
                progress.update()
            report["accuracy"].append([held_out for held_out, _ in accuracies])
            report["train_accuracy"].append([training for _, training in accuracies])
            for name, vectors in test.vectors.items():
                of_blocks = [z[:, block].to(vectors.device) for block in range(num_blocks)]
                report["cknna"][name].append([cknna(f, vectors, args.cknna_k) for f in of_blocks])
                report["cka"][name].append([cka(f, vectors) for f in of_blocks])
    if not state.is_main_process:
        return None
    for name in encoders:
        held_out, _ = probe_accuracy(
            train.vectors[name], train.labels, test.vectors[name], test.labels, args.l2, state.device
        )
        report["encoder_accuracy"][name] = held_out
    print(format_probe(report))  # before writing files, in case the disk is full
    if args.output_file:
        with writing_result("output_file", args.output_file):
            write_report(Path(args.output_file), json.dumps(report, indent=2) + "\n")
    if args.plot_file:
        with writing_result("plot_file", args.plot_file):
            plot_probe(report, Path(args.plot_file))
    return report


def probe_accuracy(x, labels, z, test_labels, l2, device) -> tuple[float, float]:
    """The accuracies of `linear_probe` on test and training images, computed on `device`."""
    return linear_probe(x.to(device), labels.to(device), z.to(device), test_labels.to(device), l2)


def format_probe(report: dict) -> str:
    """Formats as text the best block at each noise level, and the encoders' own accuracies."""
    lines = [f"chance {1 / report['num_classes']:.3f}"]
    for i, t in enumerate(report["timesteps"]):
        accuracy = report["accuracy"][i]
        best = int(np.argmax(accuracy))
        line = f"t = {t:g}: probe accuracy {accuracy[best]:.3f} after block {best + 1} of {len(accuracy)}"
        for name, values in report["cknna"].items():
            best = int(np.argmax(values[i]))
            line += f"; CKNNA with {name} {values[i][best]:.3f} after block {best + 1}"
        lines.append(line)
    for name, accuracy in report["encoder_accuracy"].items():
        lines.append(f"{name}: probe accuracy {accuracy:.3f}")
    return "\n".join(lines)


def plot_probe(report: dict, file: Path):
    """Plots accuracy and alignment over the blocks, with one line for each noise level."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = [("linear probe", "accuracy on test images", report["accuracy"])]
    panels += [(f"alignment with {last_part(name)}", "CKNNA", values) for name, values in report["cknna"].items()]
    figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(report["timesteps"])))
    for axis, (title, label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for t, line, colour in zip(report["timesteps"], values, colours):
            axis.plot(range(1, len(line) + 1), line, marker="o", markersize=3, color=colour, label=f"t = {t:g}")
        axis.set(title=title, xlabel="block", ylabel=label)
        axis.grid(alpha=0.3)
    axis.legend(frameon=False, title="noise level (1 is noise)")
    with replacing(file.resolve()) as temporary:
        figure.savefig(temporary, dpi=120, format=file.suffix[1:] or "png")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__, common=COMMON)
    parser.add_argument(
        "pipeline",
        metavar="PIPELINE",
        help="measure the transformer of this pipeline: the output folder of a run or of `vrpo convert`, or a name on the Hub",
    )
    g = parser.add_argument_group("data")
    add_options(g, DataConfig, ["dataset_name"], required=True)
    add_options(g, DataConfig, ["dataset_config_name", "dataset_split"])
    g.add_argument(
        "--test_split", help="split with the test images; if not given, they are other images of --dataset_split"
    )
    add_options(g, DataConfig, ["image_column", "label_column"])
    g.add_argument(
        "--num_train",
        type=number_in(NUM_SAMPLES),
        default=10_000,
        help="fit the probes to this many images, drawn at random; more images take longer and raise the accuracies",
    )
    g.add_argument(
        "--num_test",
        type=number_in(NUM_SAMPLES),
        default=2000,
        help="test on this many images, drawn at random; compare values of CKNNA only for equal numbers",
    )
    add_options(g, RunConfig, ["cache_dir"])
    g = parser.add_argument_group("what is measured")
    g.add_argument(
        "--timesteps",
        type=number_in(In(0, 1), float),
        nargs="+",
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        help="measure at these noise levels t, from 0 (the image) up to but not including 1 (noise)",
    )
    g.add_argument(
        "--encoder",
        nargs="+",
        help="compare the blocks with these encoders: `inception`, or vision models of transformers (Hub names or folders)",
    )
    g.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="feature vector of the encoders: the mean of the patch tokens (mean), as for the blocks, or the usual one of their "
        "family (auto)",
    )
    g.add_argument("--inception_weights", metavar="FILE", help="weights of the Inception network for FID")
    g.add_argument("--cknna_k", type=number_in(In(2, most=10_000)), default=10, help="number of neighbours for CKNNA")
    g.add_argument(
        "--l2",
        type=number_in(In(0, most=10**9), float),
        default=1e-3,
        help="penalty on the squared weights of the probes, which see standardised features",
    )
    g.add_argument("--seed", type=number_in(SEED), default=0, help="seed of the drawn images and the noise")
    g = parser.add_argument_group("work and output")
    g.add_argument(
        "--batch_size", type=number_in(BATCH), default=32, help="compute this many images together on each process"
    )
    add_options(g, RunConfig, ["dataloader_num_workers"], help="processes that decode images, for each that encodes")
    g.add_argument("--output_file", metavar="FILE.json", help="write all numbers to this file")
    g.add_argument("--plot_file", metavar="FILE.png", help="draw accuracies and alignment by block in this file")
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "vrpo probe") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    least = max(4, args.cknna_k + 1)
    if args.encoder and args.num_test < least:
        parser.error(f"--num_test {args.num_test} must be at least {least} for CKNNA with --cknna_k {args.cknna_k}")
    for name in ("pooling", "cknna_k"):
        value = getattr(args, name)
        if not args.encoder and value != parser.get_default(name):
            parser.error(f"--{name} {value} has no effect without --encoder; remove it")
    if args.pooling != parser.get_default("pooling") and args.encoder == ["inception"]:
        parser.error(
            f"--pooling {args.pooling} cannot be combined with --encoder inception, which has its own pooling; remove it"
        )
    if args.inception_weights and "inception" not in (args.encoder or []):
        parser.error("--inception_weights has no effect without --encoder inception; remove it")
    return args


def main(argv: list[str] | None = None, prog: str = "vrpo probe") -> dict | None:
    """Runs the command; `prog` is its name in errors."""
    args = parse_args(argv, prog)
    with one_line_errors(build_parser(prog)):
        return probe(args)


if __name__ == "__main__":
    main()
