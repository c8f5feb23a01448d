# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The embedded default to its last step: what README's first command trains must look like digits and not like copies."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.assets.digits import DIGIT_NAMES, load_digits_dataset
from diffusers_vrpo.training.metrics import read_metrics
from support.paths import ROOT
from support.training import run


CONFIG = ROOT / "configs" / "digits.yaml"


@pytest.mark.slow
def test_the_embedded_default_makes_digits(tmp_path):
    # Half the batch takes half the time and still makes digits.
    run(["--config", str(CONFIG), "--output_dir", str(tmp_path), "--train_batch_size", "32"], curves=True)

    def flat_images(split):
        rows = load_digits_dataset()[split]
        return np.stack([np.asarray(image) for image in rows["image"]]).reshape(len(rows), -1) / 255, rows["label"]

    (train, train_labels), (held_out, held_out_labels) = flat_images("train"), flat_images("validation")
    judge = LogisticRegression(max_iter=5000).fit(train, train_labels)
    held_out_accuracy = judge.score(held_out, held_out_labels)

    pipeline = VRPOPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(
        DIGIT_NAMES, num_images_per_label=30, output_type="np", generator=torch.Generator().manual_seed(1)
    ).images
    samples = samples.mean(-1).reshape(300, 64)
    accuracy = (judge.predict(samples) == np.repeat(np.arange(10), 30)).mean()

    def nearest(images):
        return torch.cdist(torch.from_numpy(images).double(), torch.from_numpy(train)).amin(1).numpy()

    # Of the real held-out images 5 % lie below their own 5th percentile; of copies all would.
    threshold = np.percentile(nearest(held_out), 5)
    too_near, median = (nearest(samples) < threshold).mean(), np.median(nearest(samples))
    print(f"recognised: samples {accuracy:.1%}, held-out images {held_out_accuracy:.1%}")
    print(f"nearer than the 5th percentile of held-out images: {too_near:.1%}")
    print(f"median distance: samples {median:.2f}, held-out images {np.median(nearest(held_out)):.2f}")
    assert held_out_accuracy > 0.95 and accuracy >= 0.9
    assert too_near <= 0.05 and median > threshold
    # Nor are they one image per class.
    assert samples.reshape(10, 30, 64).std(1).mean() > 0.5 * train.std(0).mean()

    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["loss_fm"] < 0.25 * rows[0]["loss_fm"]
    for reward in ("semantic", "structural"):
        assert rows[-1][f"reward/{reward}"] > rows[0][f"reward/{reward}"]
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (10 * 66 - 2, 17 + 4 * 66 - 2)
