#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Judge one finished run of a yardstick; `run.py` calls this.

    python benchmarks/yardstick/judge.py cpu --run outputs/yardstick/cpu/runs/repa-1a2b3c4d-0 --output judged.json

Unguided samples of the averaged weights, with equally many of each class, are compared with training and validation images by
    Fréchet distance, KID, recall and coverage in the features of an encoder that no reward or target uses;
    sliced Wasserstein distance of the pixels, and Fréchet distance of gradients, colours and frequencies
    (image_statistics.py), which use no learned features at all.
The flow-matching loss is measured on these images, and a linear probe predicts the class from the block that the recipe aligns.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from image_statistics import image_statistics, statistics_distances
from recipe import Recipe, load_recipe
from safetensors.torch import load_file, save_file
from subset import SPLITS, packed
from training_run import add_common_options, resolve_folders

from diffusers_vrpo.alignment.attach import alignment_layers
from diffusers_vrpo.command_line import OneLineErrorParser, number_in
from diffusers_vrpo.commands.probe import block_features
from diffusers_vrpo.config import In
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_decoding import decode_image, resize_and_crop
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_encoders import load_image_encoder, pooled_features
from diffusers_vrpo.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    linear_probe,
    mean_and_covariance,
    polynomial_mmd,
    precision_recall,
)
from diffusers_vrpo.models.flow import flow_matching_loss, forward_process
from diffusers_vrpo.pipelines.pipeline_vrpo import VRPOPipeline
from diffusers_vrpo.pipelines.sampling import sample_batch
from diffusers_vrpo.random_streams import NOISE, random_stream


ORACLE_SAMPLES = "oracle_samples.safetensors"  # samples of a run with an oracle (oracle.py)


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, projections: int = 512, seed: int = 0) -> float:
    """The root of the mean over random directions of the squared 2-Wasserstein distance of the projected sets.

    In one dimension this is the distance between quantiles, of which as many are compared as the smaller set has points.

    Args:
        x, y: `[M, D]` and `[N, D]`, float32 on one device.
    """
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(seed)).to(x)
    directions = directions / directions.norm(dim=0)
    count = min(len(x), len(y))
    levels = (torch.arange(count, device=x.device) + 0.5) / count
    quantiles = []
    for values in (x, y):
        ordered = (values @ directions).sort(dim=0).values
        place = (levels * len(values) - 0.5).clamp(0, len(values) - 1)
        low, share = place.floor().long(), (place - place.floor())[:, None]
        high = (low + 1).clamp(max=len(values) - 1)
        quantiles.append((1 - share) * ordered[low] + share * ordered[high])
    return (quantiles[0] - quantiles[1]).square().mean().sqrt().item()


def flat_pixels(images: torch.Tensor) -> torch.Tensor:
    """Converts images, uint8 `[N,3,H,W]`, to vectors, float32 `[N, 3 H W]` in [0, 1]."""
    return images.flatten(1).float() / 255


def spread_rows(total: int, count: int) -> np.ndarray:
    """The numbers of `count` of `total` rows, evenly spread, or of all rows if there are fewer."""
    count = min(count, total)
    return np.arange(count) * total // count


def make_references(recipe: Recipe, work: Path) -> dict[str, torch.Tensor]:
    """Reads images, uint8 `[N,3,R,R]`, and labels of both splits, and computes the judge's features; keeps them in a file.

    Of the training images it uses `reference_images`, evenly spread, for the features and for mean and covariance.
    """
    file = work / "references.safetensors"
    if file.exists():
        return load_file(file)
    encoder = load_image_encoder(packed(work / "packed", recipe.judge), device=default_device(), option="judge")
    tensors = {}
    for split in SPLITS:
        data, _, _ = load_image_dataset(str(work / "packed" / "data"), split=split)
        rows = spread_rows(len(data), recipe.reference_images if split == "train" else len(data))
        records = data[rows.tolist()]
        images = [resize_and_crop(decode_image(image), recipe.train["resolution"]) for image in records["image"]]
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        tensors[f"{split}_images"], tensors[f"{split}_labels"] = images, torch.tensor(records["label"][:])
        tensors[f"{split}_features"] = pooled_features(encoder, images).cpu()
    partial = file.with_suffix(".tmp")
    save_file(tensors, partial)
    partial.replace(file)
    return tensors


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(
    recipe: Recipe,
    pipeline: VRPOPipeline,
    seed: int,
    guidance_scale: float = 1.0,
    count: int | None = None,
    around: Callable = lambda indices, labels: contextlib.nullcontext(),
) -> torch.Tensor:
    """Draws samples, uint8 `[N,3,R,R]` on the CPU, from other noise than those of the curve.

    Args:
        around: a function of indices and classes, which returns the context in which these samples are drawn.
    """
    pipeline.set_progress_bar_config(disable=True)
    count, classes = count or recipe.final_samples, pipeline.trained_labels
    options = {"num_inference_steps": recipe.train["num_inference_steps"], "guidance_scale": guidance_scale}
    size, parts = (256 if default_device().type == "cuda" else 32), []
    for start in range(0, count, size):
        indices = range(start, min(start + size, count))
        labels = [classes[i * len(classes) // count] for i in indices]
        with around(indices, labels):
            parts.append(torch.from_numpy(sample_batch(pipeline, indices, labels, 10**6 + seed, options)))
    return torch.cat(parts).permute(0, 3, 1, 2).contiguous()


def probe(recipe: Recipe, pipeline: VRPOPipeline, references: dict) -> float:
    """The accuracy on validation images of a linear probe after the first block that the recipe aligns, the same in all arms."""
    scope = str(recipe.train.get("layer_scope", "early"))
    block = alignment_layers(scope, len(pipeline.transformer.transformer_blocks))[0] - 1
    features, first = [], 0
    for split in SPLITS:
        images = references[f"{split}_images"].float() / 127.5 - 1
        streams = (random_stream(0, first + i, NOISE) for i in range(len(images)))
        noise = np.stack([stream.standard_normal(images.shape[1:], dtype=np.float32) for stream in streams])
        first += len(images)
        of_blocks = block_features(pipeline.transformer, images, torch.from_numpy(noise), recipe.probe_timestep)
        features += [of_blocks[:, block], references[f"{split}_labels"]]
    return linear_probe(*features)[0]


@torch.no_grad()
def real_loss(transformer, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Flow-matching loss on real images uint8 `[N,3,R,R]`, with the same noise and evenly spread timesteps for every run."""
    device, losses = default_device(), []
    times = (torch.arange(len(images)) * 0.618034 + 0.5) % 1  # the times of each class are evenly spread, too
    for rows in torch.arange(len(images)).split(256 if device.type == "cuda" else 32):
        streams = (random_stream(1, i, NOISE) for i in rows.tolist())
        noise = np.stack([stream.standard_normal(images.shape[1:], dtype=np.float32) for stream in streams])
        x0 = images[rows].to(device).float() / 127.5 - 1
        x_t, timestep, target, _ = forward_process(
            x0, torch.from_numpy(noise).to(device), times[rows].to(device), transformer.config
        )
        prediction = transformer(x_t, timestep, labels[rows].to(device), return_dict=False)[0]
        losses.append(flow_matching_loss(prediction, target))
    return torch.cat(losses).mean().item()


def reward_distance(work: Path, encoder_folder: str, references: dict, images: torch.Tensor) -> float:
    """The Fréchet distance of samples to the training images in the features of a reward's encoder."""
    encoder = load_image_encoder(encoder_folder, device=default_device(), option="--reward_encoder")
    file = work / f"reference_moments_{Path(encoder_folder).name}.safetensors"
    if not file.exists():
        mean, covariance = mean_and_covariance(pooled_features(encoder, references["train_images"]).cpu())
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({"mean": mean, "covariance": covariance}, partial)
        partial.replace(file)
    moments = load_file(file)
    features = pooled_features(encoder, images).cpu()
    return frechet_distance(moments["mean"], moments["covariance"], *mean_and_covariance(features))


def judge(
    recipe: Recipe,
    work: Path,
    run: Path,
    seed: int,
    reward_encoder: str | None = None,
    guidance_scales: list[float] = (),
    guided_samples: int | None = None,
) -> dict:
    """Measures a finished run.

    Args:
        reward_encoder: folder of an encoder in whose features a distance is measured, too, as `fd_reward`.
        guidance_scales: scales for each of which the distance of `guided_samples` guided samples to the training images is
            measured.

    Raises:
        InputError: if samples are not finite.
    """
    references, device = make_references(recipe, work), default_device()
    pipeline = VRPOPipeline.from_pretrained(run)
    pipeline.transformer.eval().requires_grad_(False).to(device)
    kept = run / ORACLE_SAMPLES
    images = load_file(kept)["samples"] if kept.exists() else draw(recipe, pipeline, seed)
    encoder = load_image_encoder(packed(work / "packed", recipe.judge), device=device, option="judge")
    features = pooled_features(encoder, images).cpu()
    moments = mean_and_covariance(features)
    result = {"final_samples": len(images)}
    statistics = {split: image_statistics(references[f"{split}_images"]) for split in SPLITS}
    for split in SPLITS:
        reference = references[f"{split}_features"]
        result[f"fd_{split}"] = frechet_distance(*mean_and_covariance(reference), *moments)
        distances = statistics_distances(images, statistics[split], statistics["train"])
        result |= {f"{name}_{split}": value for name, value in distances.items()}
        pixels = flat_pixels(references[f"{split}_images"])
        result[f"sliced_wasserstein_{split}"] = sliced_wasserstein(pixels, flat_pixels(images))
        real = references[f"{split}_images"], references[f"{split}_labels"]
        result[f"loss_{split}"] = real_loss(pipeline.transformer, *real)
    result["kid_train"] = polynomial_mmd(references["train_features"], features)
    result["precision"], result["recall"] = precision_recall(references["train_features"], features)
    result["density"], result["coverage"] = density_coverage(references["train_features"], features)
    if reward_encoder:
        result["fd_reward"] = reward_distance(work, reward_encoder, references, images)
    if guidance_scales:
        train, guided = mean_and_covariance(references["train_features"]), {}
        # There are as many unguided samples, because the distance depends on their number.
        guided[1.0] = frechet_distance(
            *train, *mean_and_covariance(features[:: max(1, len(features) // guided_samples)])
        )
        for scale in guidance_scales:
            samples = pooled_features(encoder, draw(recipe, pipeline, seed, scale, guided_samples)).cpu()
            guided[scale] = frechet_distance(*train, *mean_and_covariance(samples))
        result["fd_guided"] = guided
    return result | {"probe_accuracy": probe(recipe, pipeline, references)}


def main(argv: list[str] | None = None):
    parser = OneLineErrorParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument(
        "--run", type=Path, help="output folder of the run; if not given, only the references are made"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--reward_encoder", help="folder of an encoder in whose features a distance is measured, too")
    parser.add_argument("--guidance_scales", nargs="+", type=float, default=[], help="also judge guided samples")
    parser.add_argument(
        "--guided_samples",
        type=number_in(In(1)),
        default=500,
        help="number of guided samples for each scale (default: 500)",
    )
    parser.add_argument("--output", type=Path, help="JSON file to which the numbers are written")
    args = parser.parse_args(argv)
    resolve_folders(args)
    recipe = load_recipe(args.size)
    work = args.work / recipe.name
    if args.run is None:
        make_references(recipe, work)
        return
    more = (args.reward_encoder, args.guidance_scales, args.guided_samples)
    text = json.dumps(judge(recipe, work, args.run, args.seed, *more), allow_nan=False)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"judge.py: error: {error}")
