#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Check that distances rank real, held-out and damaged images correctly.

    python benchmarks/metric_sanity.py --dataset_name path/to/tiny-imagenet-100 --encoder path/to/efficientnet-lite2

The reference is a random part A of the training images. It is compared with sets of the same size: another part B of the training
images, images of the validation split, B blurred and B with noise (two strengths each), and training images outside A of some
classes only. B and the validation images must be nearest, followed by the damaged images in the order of their strength.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from diffusers_vrpo.command_line import OneLineErrorParser, number_in
from diffusers_vrpo.config import In
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_decoding import decode_image
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_encoders import ImageEncoder, load_image_encoder, pooled_features
from diffusers_vrpo.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
)


def read_images(data, rows) -> torch.Tensor:
    """uint8 `[N, 3, H, W]` of the rows of a data set."""
    images = [np.asarray(decode_image(record["image"])) for record in (data[int(row)] for row in rows)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def blur(images: torch.Tensor, radius: float) -> torch.Tensor:
    """Gaussian blur; the radius is its standard deviation in pixels."""
    blurred = [
        np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
        for image in images.permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2).contiguous()


def add_noise(images: torch.Tensor, std: float, random: np.random.Generator) -> torch.Tensor:
    """Adds Gaussian noise; its standard deviation is in steps of 255."""
    noise = torch.from_numpy(random.normal(0, std, images.shape))
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def build_sets(train, validation, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The sets by name, uint8 `[count, 3, H, W]`; the first is the reference.

    Args:
        train, validation: splits as `load_image_dataset` gives them.

    Raises:
        InputError: if there are not enough images.
    """
    random = np.random.default_rng(seed)
    rows, labels = random.permutation(len(train)), np.asarray(train["label"][:])
    if len(rows) < 3 * count or len(validation) < count:
        raise InputError(None, f"--count {count} needs {3 * count} training and {count} validation images")
    part_a, part_b, others = rows[:count], rows[count : 2 * count], rows[count:]
    b = read_images(train, part_b)
    sets = {
        "train A (reference)": read_images(train, part_a),
        "train B": b,
        "validation": read_images(validation, random.permutation(len(validation))[:count]),
        "blur 0.5": blur(b, 0.5),
        "blur 1.0": blur(b, 1.0),
        "noise 10": add_noise(b, 10, random),
        "noise 25": add_noise(b, 25, random),
    }
    classes = random.permutation(np.unique(labels))
    for share in (2, 10):
        kept = others[np.isin(labels[others], classes[: len(classes) // share])][:count]
        if len(kept) == count:
            sets[f"1/{share} of the classes"] = read_images(train, kept)
    return sets


def compare(encoder, sets: dict[str, torch.Tensor], seed: int = 0) -> dict[str, dict[str, float]]:
    """All metrics of every set against the first, by name."""
    vectors = {}
    for name, images in sets.items():
        vectors[name] = pooled_features(encoder, images)
        print(f"encoded {name}", file=sys.stderr)
    reference, *others = vectors
    mu, sigma = mean_and_covariance(vectors[reference])
    rows = {}
    for name in others:
        x, y = vectors[reference], vectors[name]
        kid, kid_std = kernel_distance(x, y, subsets=20, subset_size=min(500, len(x) // 2), seed=seed)
        precision, recall = precision_recall(x, y)
        density, coverage = density_coverage(x, y)
        rows[name] = {
            "fd": frechet_distance(mu, sigma, *mean_and_covariance(y)),
            "kid": kid,
            "kid_std": kid_std,
            "precision": precision,
            "recall": recall,
            "density": density,
            "coverage": coverage,
        }
    return rows


def print_table(rows: dict[str, dict[str, float]]):
    print("| against train A | FD | KID x 1000 | precision | recall | density | coverage |")
    print("|---|---|---|---|---|---|---|")
    for name, values in rows.items():
        numbers = [
            f"{values['fd']:.1f}",
            f"{1000 * values['kid']:.2f} ± {1000 * values['kid_std']:.2f}",
            *(f"{values[key]:.3f}" for key in ("precision", "recall", "density", "coverage")),
        ]
        print(f"| {name} | {' | '.join(numbers)} |")


def main(input_args: list[str] | None = None):
    parser = OneLineErrorParser(prog="metric_sanity.py", description=__doc__)
    parser.add_argument("--dataset_name", required=True, help="Hub name or folder of a labelled image data set")
    parser.add_argument("--validation_split", default="validation", help="split of held-out images")
    parser.add_argument("--encoder", required=True, help="`inception`, or a vision model (Hub name or folder)")
    parser.add_argument("--count", type=number_in(In(6)), default=1000, help="images in each set")
    parser.add_argument(
        "--input_size", type=number_in(In(1)), help="side in pixels to which images are resized, for a conv net"
    )
    parser.add_argument("--seed", type=number_in(In(0)), default=0, help="seed of the parts and the noise")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args(input_args)
    try:
        train, _, _ = load_image_dataset(args.dataset_name)
        validation, _, _ = load_image_dataset(args.dataset_name, split=args.validation_split)
        encoder = load_image_encoder(args.encoder, device="cuda" if torch.cuda.is_available() else "cpu")
        sets = build_sets(train, validation, args.count, args.seed)
    except InputError as error:
        sys.exit(f"metric_sanity.py: error: {error}")
    if args.input_size is not None:
        if not isinstance(encoder, ImageEncoder):
            parser.error("--input_size cannot be combined with --encoder inception, which always sees 299 pixels")
        encoder.input_size = (args.input_size, args.input_size)
    rows = compare(encoder, sets, args.seed)
    print_table(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
