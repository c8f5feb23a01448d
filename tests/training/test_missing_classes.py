# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Classes without images: named at the start, not sampled unless asked for, and known to the saved pipeline."""

import contextlib
import json
import logging
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.commands import sample
from diffusers_vrpo.data import parquet
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_source import ImageDataset, ImageSource
from diffusers_vrpo.data.latent_cache import LatentCache
from diffusers_vrpo.data.parquet import stream_image_dataset
from diffusers_vrpo.data.sources import classes_notice, classes_to_sample, known_classes
from diffusers_vrpo.hub.card import render_card
from diffusers_vrpo.models.start import Start, load_start
from diffusers_vrpo.schemas import check_model_index
from diffusers_vrpo.training import validation
from support.data import write_files, write_parquet
from support.models import tiny_model
from support.training import run


NAMES = ["zero", "one", "two", "three", "four"]


def make_pipeline(trained_labels=None, names=NAMES) -> VRPOPipeline:
    model = tiny_model(in_channels=3, num_classes=5)
    pipeline = VRPOPipeline(model, FlowMatchEulerDiscreteScheduler(), None, dict(enumerate(names)), trained_labels)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Which classes have images


@pytest.mark.parametrize("labels", [[1, 2, 3, 1], [0, 4, 4, 0]])
def test_the_classes_that_have_images(tmp_path, labels):
    folder = write_parquet(tmp_path / "data", labels, NAMES)
    data = ImageDataset(*load_image_dataset(folder, cache_dir=str(tmp_path / "cache")))
    present = sorted(set(labels))
    assert known_classes(data) == known_classes(stream_image_dataset(folder)) == present
    assert known_classes(ImageDataset(data.data.select([0]), data.id2label, 5)) == labels[:1]
    assert LatentCache.classes_with_images({"label": np.array(labels)}) == present
    level, text = classes_notice(data)
    empty = [f"{label} ({NAMES[label]})" for label in range(5) if label not in labels]
    assert level == logging.WARNING
    assert text == f"{len(empty)} of 5 classes have no images and are not sampled by default: {', '.join(empty)}"


def test_many_empty_classes_are_counted():
    data = SimpleNamespace(num_classes=1000, id2label=None, classes_with_images=lambda: list(range(20, 1000)))
    listed = ", ".join(map(str, range(10)))
    assert classes_notice(data)[1] == (
        f"20 of 1000 classes have no images and are not sampled by default: {listed}, ..."
    )
    data.classes_with_images = lambda: list(range(1000))
    assert classes_notice(data) is None


def test_labels_that_only_reading_would_tell(tmp_path):
    """The labels of a stream are read on a disk; of a server, the statistics must do."""
    source = ImageSource()
    source.num_classes = 3
    assert known_classes(source) is None and classes_to_sample(source) == [0, 1, 2]
    assert "is not known" in classes_notice(source)[1] and classes_notice(source)[0] == logging.INFO

    fs = fsspec.filesystem("memory")

    def remote(labels, group_rows):
        with fs.open("/remote/train.parquet", "wb") as file:
            Dataset.from_dict({"image": labels, "label": labels}).to_parquet(file, batch_size=group_rows)
        rows = parquet.ParquetRows(parquet.open_files(["memory://remote/train.parquet"], ""), "image", "label")
        _, found, unread = parquet.labels_in_footers(rows, "")
        rows.num_classes = max(labels) + 1
        return parquet.classes_in(rows, "", found, unread)

    assert remote([0, 0, 3, 3], 2) == [0, 3]  # sorted by class
    assert remote([0, 1, 0, 1], 4) == [0, 1]  # both ends of the range
    assert remote([0, 2, 4, 1], 4) is None
    local = stream_image_dataset(write_files(tmp_path / "data", rows=30, files=1))
    assert local.classes_with_images() == list(range(10))


# What is sampled


def test_a_pipeline_knows_its_classes(tmp_path, caplog):
    pipeline = make_pipeline([3, 1])
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["trained_labels"] == [1, 3]
    opened = VRPOPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert opened.trained_labels == VRPOPipeline.from_pipe(opened).trained_labels == [1, 3]
    # An explicit request works, with a warning, once of each class.
    arguments = {"num_inference_steps": 1, "output_type": "latent"}
    with caplog.at_level(logging.WARNING):
        opened(["one", 3], **arguments)
        assert "had no images" not in caplog.text
        for _ in range(2):
            assert len(opened(["one", "zero", 4], **arguments).images) == 3
    assert caplog.text.count("2 of these classes had no images in training") == 1
    assert "0 ('zero'), 4 ('four')" in caplog.text
    card = render_card(tmp_path, "me/x")
    assert 'pipeline("one", ' in card and "5 classes (2 of which had training images)" in card


@pytest.mark.parametrize("trained_labels", [None, [4, 3, 2, 1, 0]])
def test_a_pipeline_with_all_classes_says_nothing(tmp_path, trained_labels):
    pipeline = make_pipeline(trained_labels)
    pipeline.save_pretrained(tmp_path)
    assert "trained_labels" not in json.loads((tmp_path / "model_index.json").read_text())
    assert pipeline.trained_labels == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [[], [5], [-1, 2], ["1"], "1", {"1": 2}, [True], 3])
def test_wrong_trained_labels(value):
    with pytest.raises(ValueError, match="`trained_labels` "):
        make_pipeline(value)


@pytest.mark.parametrize("value", ["1", {"1": 2}, ["1"], [1.5], 3])
def test_wrong_trained_labels_in_a_file(value):
    with pytest.raises(ValueError, match="trained_labels"):
        check_model_index({"trained_labels": value}, ValueError)


def test_the_grid_and_the_distance_take_classes_with_images(monkeypatch):
    assert validation.grid_columns(make_pipeline(), None, [1, 3]) == [1, 3]
    assert validation.grid_columns(make_pipeline(), ["zero", "4"], [1, 3]) == [0, 4]
    drawn = []

    def moments(batches):
        list(batches)
        return torch.zeros(1), torch.zeros(1)

    look = SimpleNamespace(
        args=SimpleNamespace(num_inference_steps=1, seed=0),
        num_samples=4,
        classes=[1, 3],
        interruption=SimpleNamespace(signum=0),
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        own_batches=lambda count: [range(count)],
        moments=moments,
        reference=(),
    )
    look.draw_batch = validation.Validation.draw_batch.__get__(look)
    monkeypatch.setattr(validation, "sample_batch", lambda pipeline, indices, labels, *_: drawn.append(labels))
    monkeypatch.setattr(validation, "frechet_distance", lambda *moments: 0.0)
    validation.Validation.distance(look, make_pipeline())
    assert drawn == [[1, 1, 3, 3]]


@pytest.mark.parametrize("trained, expected", [(None, [0, 1, 2, 3, 4]), ([1, 2, 9], [1, 2])])
def test_rows_of_the_starting_weights_count_as_trained(trained, expected):
    args = SimpleNamespace(pretrained_model_name_or_path="base", lora_rank=None)
    source, model = tiny_model(num_classes=5), tiny_model(num_classes=5)
    start = Start({}, source, trained_labels=trained)
    load_start(model, args, start, None)
    assert model.learned_labels == expected
    load_start(model, args, start, "other names")
    assert model.learned_labels == []


def test_a_run_and_its_samples(command, tmp_path, caplog):
    folder = write_parquet(tmp_path / "data", [1, 2, 3] * 6, NAMES)
    with caplog.at_level(logging.INFO):
        run(command(dataset_name=folder, objective="none", encoder=None, max_train_steps=1))
    assert "2 of 5 classes have no images and are not sampled by default: 0 (zero), 4 (four)" in caplog.text
    pipeline = tmp_path / "run"
    assert json.loads((pipeline / "model_index.json").read_text())["trained_labels"] == [1, 2, 3]
    options = [str(pipeline), "--num_images=4", "--num_inference_steps=1"]

    def labels(*more):
        sample.main([*options, "--output_dir", str(tmp_path / f"samples{len(more)}"), *more])
        return json.loads((tmp_path / f"samples{len(more)}" / "manifest.json").read_text())["labels"]

    assert labels() == [1, 2, 3, 1]
    assert set(labels("--class_balance", "random")) <= {1, 2, 3}
    caplog.clear()
    assert labels("--labels", "0", "one") == [0, 1, 0, 1]
    assert "1 of these classes had no images in training" in caplog.text
