# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A run does not continue on other images or class names without being told to."""

import shutil

import numpy as np
import pytest
from PIL import Image

from diffusers_vrpo.errors import InputError
from support.training import losses, run


def write_folder(folder):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
    return folder


def test_changed_data_do_not_continue_a_run(command, tmp_path):
    folder = write_folder(tmp_path / "data")

    def options(steps, data=folder, *flags):
        data = {"dataset_name": None, "train_data_dir": data, "cache_dir": tmp_path / "hf", "objective": "none"}
        return [*command(**data, encoder=None, max_train_steps=steps, train_batch_size=8), *flags]

    run(options(2))
    moved = shutil.copytree(folder, tmp_path / "moved")
    run(options(3, moved))
    assert len(losses(tmp_path / "run")) == 3
    # Both folders have as many files, of the same names.
    (moved / "cat").rename(moved / "aside")
    (moved / "dog").rename(moved / "cat")
    (moved / "aside").rename(moved / "dog")
    with pytest.raises(InputError, match="the images of the classes 'cat', 'dog' are not those that .*checkpoint-3"):
        run(options(4, moved))
    run(options(4, moved, "--allow_changed_data"))
    assert len(losses(tmp_path / "run")) == 4
    # From then on these are the data of the run.
    run(options(5, moved))
    assert len(losses(tmp_path / "run")) == 5
