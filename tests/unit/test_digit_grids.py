# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The embedded digit grids: what an image shows, and opening them by name."""

import numpy as np
import pytest
import torch

from diffusers_vrpo.assets import digit_grids
from diffusers_vrpo.assets.digit_grids import PARTNERS, cells_to_images, digit_images, grid_images, images_to_cells
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_sets import open_images


@pytest.fixture
def few(monkeypatch):
    """Composes few grids only."""
    monkeypatch.setattr(digit_grids, "SPLIT_SIZES", {"train": 60, "validation": 40})
    digit_grids._grid_splits.cache_clear()
    yield
    digit_grids._grid_splits.cache_clear()


def cell_classes(split: str) -> np.ndarray:
    """The class of each cell of each grid, `[N, 4]`; a digit that another class shows, too, is not among them."""
    digits, labels = digit_images(split)
    classes = {digit.tobytes(): label for digit, label in zip(digits, labels.tolist())}
    cells = images_to_cells(torch.from_numpy(grid_images(split))[:, None]).flatten(0, 1)[:, 0].numpy()
    return np.array([classes[cell.tobytes()] for cell in cells]).reshape(-1, 4)


def test_every_grid_obeys_the_rule_with_digits_of_its_own_split(few):
    assert PARTNERS.tolist() == [8, 5, 0, 2, 1, 9, 7, 3, 6, 4]
    for split in ("train", "validation"):  # a digit of the other split would be a KeyError
        classes = cell_classes(split)
        assert (classes[:, 0] == classes[:, 3]).all() and (classes[:, 1] == classes[:, 2]).all()
        assert (classes[:, 1] == PARTNERS[classes[:, 0]]).all()
        assert len(set(classes[:, 0].tolist())) == 10
    held_out, _ = digit_images("validation")
    assert not {digit.tobytes() for digit in held_out} & {digit.tobytes() for digit in digit_images("train")[0]}


def test_grids_repeat(few):
    assert np.array_equal(grid_images("train"), grid_images("train"))
    assert not np.array_equal(grid_images("train")[:40], grid_images("validation"))


def test_cells_and_images_are_inverse():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    cells = images_to_cells(images)
    assert torch.equal(cells[:, 0], images[:, :, :2, :3]) and torch.equal(cells[:, 1], images[:, :, :2, 3:])
    assert torch.equal(cells[:, 2], images[:, :, 2:, :3]) and torch.equal(cells_to_images(cells), images)


def test_grids_have_a_name(few):
    data, id2label, num_classes = load_image_dataset("embedded:digit-grids")
    assert (len(data), id2label, num_classes) == (60, {0: "grid"}, 1)
    assert len(load_image_dataset("embedded:digit-grids", split="validation")[0]) == 40
    images = open_images("SAMPLES", "embedded:digit-grids", dataset_resolution=16)
    assert np.array_equal(images[3][0].numpy(), grid_images("train")[3])  # the first of three equal channels
    with pytest.raises(InputError, match="in the package"):
        VRPOConfig(dataset_name="embedded:digit-grids", streaming=True)
