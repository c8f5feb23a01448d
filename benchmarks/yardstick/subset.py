# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Packs what a yardstick needs into one small folder: some classes of a data set, and the two encoders."""

import json
import shutil
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Image

from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.errors import InputError


SPLITS = ("train", "validation")


def write_subset(dataset_name: str, num_classes: int, folder: Path) -> dict[str, int]:
    """Writes `num_classes` classes, spread evenly over all, as parquet files of both splits.

    Classes have new ids; the image files do not change.

    Returns:
        the number of images of each split.

    Raises:
        InputError: if the data set has fewer classes, or lacks a split.
    """
    counts = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        data, names, total = load_image_dataset(dataset_name, split=split)
        if total < num_classes:
            raise InputError(None, f"classes: {num_classes} of {dataset_name}, which has {total}; take fewer")
        kept = np.arange(num_classes) * total // num_classes
        labels = np.asarray(data["label"][:])
        rows = np.flatnonzero(np.isin(labels, kept))
        part = data.select(rows).remove_columns("label")
        new_ids = ClassLabel(names=[names[old] if names else str(old) for old in kept.tolist()])
        part = part.add_column("label", np.searchsorted(kept, labels[rows])).cast_column("label", new_ids)
        part = part.cast_column("image", Image())
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        counts[split] = len(part)
    return counts


def show_smaller(processor: Path, side: int):
    """Makes a packed encoder see images of `side` pixels, because upsampling to its usual size adds no information."""
    values = json.loads(processor.read_text())
    processor.write_text(json.dumps(values | {"do_center_crop": False, "size": {"height": side, "width": side}}))


def pack(recipe, shared: Path, folder: Path):
    """Writes data and encoders of a recipe to `data/` and `encoders/` in `folder`; parts that are already there stay.

    Raises:
        InputError: if `shared` lacks the data or an encoder that the recipe names.
    """
    if (folder / "data" / "validation-00000-of-00001.parquet").exists():
        return
    for name in (recipe.encoder, recipe.judge):
        if name == "digits":
            continue
        source = shared / name
        if not source.is_dir():
            raise InputError(
                None, f"--shared {shared} has no {name}; name the folder that holds it (or set VRPO_SHARED)"
            )
        shutil.copytree(source, folder / name, dirs_exist_ok=True, copy_function=shutil.copyfile)
    if recipe.judge_pixels and recipe.judge != "digits":
        show_smaller(folder / recipe.judge / "preprocessor_config.json", recipe.judge_pixels)
    dataset = "digits" if recipe.dataset == "digits" else str(shared / recipe.dataset)
    write_subset(dataset, recipe.classes, folder / "data")


def packed(folder: Path, name: str) -> str:
    """The name by which a packed encoder is loaded."""
    return name if name == "digits" else str(folder / name)
