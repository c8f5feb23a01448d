# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""`benchmarks/nearest_images.py` finds copies, also mirrored ones, and nothing else."""

import importlib.util

import pytest
import torch
from PIL import Image

from support.paths import ROOT


spec = importlib.util.spec_from_file_location("nearest_images", ROOT / "benchmarks" / "nearest_images.py")
nearest_images = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nearest_images)


def test_copies_are_found_and_fresh_images_are_not():
    training, held_out, fresh = torch.rand(3, 200, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    name = "samples below the 5th percentile of held-out images"
    copies = nearest_images.compare(training[:50].flip(2), training, held_out)
    assert copies["median distance of samples"] < 1e-2 and copies[name] == 1
    others = nearest_images.compare(fresh, training, held_out)
    assert others[name] == pytest.approx(0.05, abs=0.05)
    assert others["median distance of samples"] == pytest.approx(
        others["median distance of held-out images"], rel=0.05
    )


def test_folders_of_images(tmp_path, capsys):
    for number, name in enumerate(("samples", "train/a", "held_out")):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 6), (0, 100 * number, 0)).save(tmp_path / name / "0.png")
    arguments = [str(tmp_path / "samples"), "--train_data_dir", str(tmp_path / "train"), "--resolution", "4"]
    nearest_images.main([*arguments, "--held_out", str(tmp_path / "held_out")])
    # 16 pixels, one channel of which differs by 100 of 255.
    assert "median distance of samples: 1.57" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="none has no images"):
        nearest_images.main([*arguments, "--held_out", str(tmp_path / "none")])
