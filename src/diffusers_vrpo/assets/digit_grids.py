# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The embedded digit grids: images of four handwritten digits whose classes obey a rule that no label reveals.

An image has 16x16 pixels and consists of 2x2 cells with one digit each. Both cells on the diagonal show some class c,
and the two other cells show pi(c), where pi is a fixed permutation of the ten classes. A generator must coordinate
distant cells to obey the rule, and a classifier of digits tells whether it does. `--dataset_name embedded:digit-grids`
selects this data set.
"""

import copy
import io
from functools import cache

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from .digits import digits_splits


PARTNERS = np.random.RandomState(7).permutation(10)  # pi: the class to the right of and below a digit of class c
SPLIT_SIZES = {"train": 50_000, "validation": 2_000}
SPLIT_SEEDS = {"train": 0, "validation": 1}


def load_digit_grids() -> DatasetDict:
    """50,000 training and 2,000 validation grids, grey, 16x16 pixels, all of class 0, "grid".

    The validation grids show the held-out digits, which do not occur in the training grids. Composing the grids takes
    about three seconds, once per process.

    Raises:
        ImportError: if scikit-learn, which contains the digits, is not installed.
    """
    return DatasetDict({name: copy.copy(split) for name, split in _grid_splits().items()})


@cache
def _grid_splits() -> dict[str, Dataset]:
    features = Features({"image": Image(), "label": ClassLabel(names=["grid"])})
    splits = {}
    for split in SPLIT_SIZES:
        grids = grid_images(split)
        columns = {"image": [{"bytes": _png(grid), "path": None} for grid in grids], "label": [0] * len(grids)}
        splits[split] = Dataset.from_dict(columns, features=features)
    return splits


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(image).save(file, "PNG")
    return file.getvalue()


@cache
def digit_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split, `"train"` or `"validation"`: uint8 `[N, 8, 8]`, and their classes `[N]`."""
    rows = digits_splits()[split]
    return np.stack([np.asarray(image) for image in rows["image"]]), np.array(rows["label"])


def grid_images(split: str) -> np.ndarray:
    """The grids of a split, uint8 `[N, 16, 16]`, the same in every process."""
    digits, labels = digit_images(split)
    rows_of_class = [np.flatnonzero(labels == label) for label in range(10)]

    # Draw the class of each cell, then one of the digits of that class.
    draws, count = np.random.RandomState(SPLIT_SEEDS[split]), SPLIT_SIZES[split]
    latent = draws.randint(10, size=count)
    classes = np.stack([latent, PARTNERS[latent], PARTNERS[latent], latent], axis=1)
    uniform, rows = draws.random_sample(classes.shape), np.empty(classes.shape, dtype=np.int64)
    for label, candidates in enumerate(rows_of_class):
        chosen = classes == label
        rows[chosen] = candidates[(uniform[chosen] * len(candidates)).astype(np.int64)]

    cells = torch.from_numpy(digits[rows])
    return cells_to_images(cells.unsqueeze(2))[:, 0].numpy()


def cells_to_images(cells: torch.Tensor) -> torch.Tensor:
    """Assembles four cells into an image, row by row: `[B, 4, C, h, w]` to `[B, C, 2h, 2w]`."""
    return cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).contiguous()


def images_to_cells(images: torch.Tensor) -> torch.Tensor:
    """Cuts images into their four cells, row by row: `[B, C, 2h, 2w]` to `[B, 4, C, h, w]`."""
    height, width = (side // 2 for side in images.shape[2:])
    return images.unflatten(3, (2, width)).unflatten(2, (2, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
