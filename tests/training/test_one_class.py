# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Images without classes: they train as one class, and guidance of such a model is warned of."""

import logging
from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.commands import probe, sample
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.parquet import stream_image_dataset
from diffusers_vrpo.data.sources import as_training_data, classes_notice
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.experimental.generative.callback import GenerativePolicy
from diffusers_vrpo.hub.card import render_card
from diffusers_vrpo.pipelines.sampling import sampling_arguments
from support.data import png
from support.models import tiny_model
from support.training import run


def write_images(folder, *names) -> str:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return str(folder)


def write_table(folder, **columns) -> str:
    """A parquet file of four images with further columns, `name=(feature, values)`."""
    folder.mkdir()
    features = Features({"image": Image()} | {name: feature for name, (feature, _) in columns.items()})
    rows = {"image": [{"bytes": png(row), "path": None} for row in range(4)]}
    rows |= {name: values for name, (_, values) in columns.items()}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


# Data


@pytest.mark.parametrize("option", ["train_data_dir", "dataset_name"])
def test_a_folder_without_class_folders_has_one_class(tmp_path, caplog, option):
    folder = write_images(tmp_path / "faces", "0.png", "1.png", "2.png")
    (tmp_path / "faces" / "thumbnails").mkdir()
    with caplog.at_level(logging.INFO):
        data, names, num_classes = load_image_dataset(**{option: folder})
    assert (list(data["label"]), names, num_classes) == ([0, 0, 0], None, 1)
    assert "3 images and no class folders; all get class 0" in caplog.text


def test_class_folders_and_tables_can_be_ignored(tmp_path, caplog):
    folder = write_images(tmp_path / "faces", "0.png", "cat/1.png", "dog/2.png")
    assert load_image_dataset(train_data_dir=folder)[2] == 2
    data, names, num_classes = load_image_dataset(train_data_dir=folder, label_column="none")
    assert (list(data["label"]), names, num_classes) == ([0, 0, 0], None, 1)
    (tmp_path / "faces" / "metadata.csv").write_text("file_name,text\n0.png,a face\n")
    assert len(load_image_dataset(train_data_dir=folder, label_column="none")[0]) == 3
    assert "3 images all get class 0" in caplog.text


def opened(folder, tmp_path, way, **options):
    if way == "stream":
        return stream_image_dataset(folder, **options)
    data = Dataset.from_parquet(f"{folder}/train.parquet", cache_dir=str(tmp_path / "cache"))
    if way == "script":
        return as_training_data(data, **options)
    return as_training_data(load_image_dataset(folder, cache_dir=str(tmp_path / "cache"), **options)[0])


WAYS = ["name", "script", "stream"]
CAPTIONS = {"text": (Value("string"), ["a", "b", "c", "d"]), "id": (Value("int64"), [5, 6, 7, 8])}
FINE = {"fine_label": (ClassLabel(names=["a", "b"]), [0, 1, 0, 1])}
KIND = {"animal_class": (Value("string"), ["cat", "dog", "cat", "dog"])}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("columns", [{}, CAPTIONS], ids=["images", "captions"])
def test_a_table_without_labels_has_one_class(tmp_path, caplog, way, columns):
    data = opened(write_table(tmp_path / "table", **columns), tmp_path, way)
    assert (data.num_classes, data.id2label, data.classes_with_images()) == (1, None, [0])
    record = data[[2]]
    assert record["label"] == [0] and record["image"][0]["bytes"] == png(2)
    assert "is trained without labels" in caplog.text and "all images get class 0" in caplog.text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("columns", [FINE, KIND], ids=["classes", "named so"])
def test_a_column_that_looks_like_classes_is_asked_about(tmp_path, way, columns):
    folder = write_table(tmp_path / "table", **columns)
    with pytest.raises(
        InputError, match="`label_column` 'label' is not in .*; name the right one .*`label_column` none"
    ):
        opened(folder, tmp_path, way)
    assert opened(folder, tmp_path, way, label_column="none").num_classes == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_column_that_was_named_must_exist(tmp_path, way):
    with pytest.raises(InputError, match="`label_column` 'kind' is not in .*'image'"):
        opened(write_table(tmp_path / "table"), tmp_path, way, label_column="kind")
    with pytest.raises(InputError, match="`image_column` 'picture' is not in"):
        opened(str(tmp_path / "table"), tmp_path, way, image_column="picture")


# Training and sampling


def test_the_log_says_what_guidance_does():
    level, text = classes_notice(SimpleNamespace(num_classes=1))
    assert level == logging.INFO and "guidance has no effect" in text


@pytest.mark.parametrize("num_classes, dropout, scale", [(1, 0.1, 1.0), (1, 0.0, 1.0), (2, 0.1, 1.5), (2, 0.0, 1.0)])
def test_guidance_of_samples_is_off_for_one_class(num_classes, dropout, scale):
    model = tiny_model(in_channels=3, num_classes=num_classes, class_dropout_prob=dropout)
    pipeline = VRPOPipeline(model, FlowMatchEulerDiscreteScheduler())
    args = sample.parse_args(["x", "--num_images=1", "--output_dir=x"])
    assert sampling_arguments(pipeline, args)["guidance_scale"] == scale


@pytest.mark.parametrize("num_classes, scale, warned", [(1, 1.5, True), (1, 1.0, False), (2, 1.5, False)])
def test_guidance_of_one_class_is_warned_of_once(caplog, num_classes, scale, warned):
    model = tiny_model(in_channels=3, num_classes=num_classes)
    pipeline = VRPOPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    for _ in range(2):
        pipeline(0, num_inference_steps=1, guidance_scale=scale, output_type="latent")
    assert caplog.text.count("this model has one class") == warned


def test_a_run_on_a_folder_of_faces(command, tmp_path, caplog):
    folder = write_images(tmp_path / "faces", *(f"{number}.png" for number in range(16)))
    with caplog.at_level(logging.INFO):
        options = {"objective": "none", "encoder": None, "max_train_steps": 1, "dataset_name": None}
        run(command(train_data_dir=folder, **options))
    assert "one class: the model is unconditional" in caplog.text
    card = render_card(tmp_path / "run", "me/faces")
    assert "Unconditional SiT diffusion transformer" in card and "There is one class, 0." in card
    assert "pipeline(0, guidance_scale=1.0, " in card


def test_what_needs_several_classes_says_so(tmp_path, monkeypatch):
    accelerator = SimpleNamespace(distributed_type="NO", mixed_precision="no", num_processes=1)
    args = SimpleNamespace(use_ema=False, ema_warmup=False, rollout_classes=4)
    policy = SimpleNamespace(args=args, accelerator=accelerator, start=1)
    with pytest.raises(InputError, match="the data have one class; give data of several classes"):
        GenerativePolicy._check(policy, SimpleNamespace(num_classes=1), 10)
    monkeypatch.setattr(probe, "open_pipeline", lambda *arguments: None)
    folder = write_table(tmp_path / "table")
    with pytest.raises(InputError, match="has one class, and probing needs several"):
        probe.probe(
            probe.parse_args(["x", "--dataset_name", folder, "--cache_dir", str(tmp_path), "--output_file", "x.json"])
        )
