#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Compare the distance of samples to the training images with that of held-out images, to find copies.

    python benchmarks/nearest_images.py SAMPLES --train_data_dir TRAIN --held_out HELD_OUT --resolution 24

The three are folders of images, which may have subfolders. Distances are Euclidean, over all pixels scaled to [0, 1], to the
nearest training image or mirrored training image. Held-out images are of the same kind as the training images, but were not
used for training: a model that copies is nearer to the training images than they are.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_vrpo.data.image_decoding import resize_and_crop


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="folder with samples of the model")
    parser.add_argument("--train_data_dir", type=Path, required=True, help="folder with the training images")
    parser.add_argument("--held_out", type=Path, required=True, help="folder with held-out images")
    parser.add_argument("--resolution", type=int, required=True, help="side in pixels to which all images are cropped")
    return parser


def read_images(folder: Path, resolution: int) -> torch.Tensor:
    """The images of a folder as float32 `[N,R,R,3]` in [0, 1]."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise SystemExit(f"{folder} has no images")
    images = [resize_and_crop(Image.open(file).convert("RGB"), resolution) for file in files]
    return torch.from_numpy(np.stack(images)).float() / 255


def nearest_distances(images: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """The distance of each of `images [N,R,R,3]` to the nearest of `training [M,R,R,3]` or its mirror image, `[N]`."""
    both = torch.cat([training, training.flip(2)]).flatten(1)
    return torch.cdist(images.flatten(1), both).amin(1)


def compare(samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Median distances of samples and held-out images, and the share of samples below the 5th percentile of the latter."""
    ours, theirs = nearest_distances(samples, training), nearest_distances(held_out, training)
    return {
        "median distance of samples": ours.median().item(),
        "median distance of held-out images": theirs.median().item(),
        "samples below the 5th percentile of held-out images": (ours < theirs.quantile(0.05)).float().mean().item(),
    }


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    folders = (args.samples, args.train_data_dir, args.held_out)
    for name, value in compare(*(read_images(folder, args.resolution) for folder in folders)).items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
