# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Training data: what a resumed run must keep of them, and a source that a user adds in one class."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_decoding import decode_image
from diffusers_vrpo.data.image_source import ImageDataset, ImageSource
from diffusers_vrpo.data.samples import StreamBatchSampler
from diffusers_vrpo.data.sources import (
    TrainingData,
    as_training_data,
    check_data_settings,
    data_difference,
    data_settings,
)
from diffusers_vrpo.errors import InputError


CHECKPOINT = Path("run/checkpoint-5")


def pictures(count: int, seed: int = 0) -> list[PILImage.Image]:
    generator = np.random.default_rng(seed)
    return [PILImage.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count)]


def write_folder(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """One folder of images per class; the files of all classes have the same names and, as bitmaps, the same size."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(pictures(count, seed + number)):
            picture.save(folder / name / f"{i:03d}.bmp")
    return folder


def settings_of(folder: Path, tmp_path: Path, **options) -> dict:
    data = load_image_dataset(train_data_dir=str(folder), cache_dir=str(tmp_path / "hf"), **options)
    return data_settings(ImageDataset(*data))


@pytest.fixture
def started(tmp_path):
    """A folder of three classes, and what a checkpoint keeps of it."""
    folder = write_folder(tmp_path / "data", {"cat": 30, "dog": 30, "owl": 20})
    return folder, settings_of(folder, tmp_path)


def difference(started, tmp_path, folder=None, **options) -> str | None:
    return data_difference(started[1], settings_of(folder or started[0], tmp_path, **options), CHECKPOINT)


# What a resumed run must keep


def test_an_unchanged_folder_continues_elsewhere(started, tmp_path):
    assert difference(started, tmp_path) is None
    moved = shutil.move(started[0], tmp_path / "elsewhere" / "renamed")
    assert difference(started, tmp_path, Path(moved)) is None


def test_a_renamed_class_is_refused(started, tmp_path):
    (started[0] / "dog").rename(started[0] / "dogs")
    text = "the class 1 is 'dogs', but run/checkpoint-5 was trained with 'dog'"
    assert difference(started, tmp_path) == text
    now = settings_of(started[0], tmp_path)
    with pytest.raises(InputError, match=f"{text}; keep to that, .* or give `allow_changed_data` to continue"):
        check_data_settings(started[1], now, CHECKPOINT, allow_changed_data=False)
    check_data_settings(started[1], now, CHECKPOINT, allow_changed_data=True)


def test_swapped_class_folders_are_refused(started, tmp_path):
    folder = started[0]
    (folder / "cat").rename(folder / "aside")
    (folder / "dog").rename(folder / "cat")
    (folder / "aside").rename(folder / "dog")
    assert difference(started, tmp_path) == (
        "the images of the classes 'cat', 'dog' are not those that run/checkpoint-5 was trained with, or in another order"
    )


def test_replaced_images_of_the_same_size_are_refused(started, tmp_path):
    for path, picture in zip(sorted((started[0] / "owl").iterdir()), pictures(20, seed=99)):
        size = path.stat().st_size
        picture.save(path)
        assert path.stat().st_size == size
    assert difference(started, tmp_path).startswith("the images of class 'owl' are not those that")


def test_a_few_replaced_or_renamed_files_are_seen(started, tmp_path):
    """Of a few, those of another size or name; their content is sampled."""
    path = started[0] / "cat" / "017.bmp"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert difference(started, tmp_path).startswith("the images of class 'cat' are not those that")
    path.write_bytes(content)
    assert difference(started, tmp_path) is None
    path.rename(path.with_name("017a.bmp"))
    assert difference(started, tmp_path).startswith("the images of class 'cat' are not those that")


def test_more_and_fewer_images_are_refused(started, tmp_path):
    assert difference(started, tmp_path, max_train_samples=50) == (
        "the number of images is 50, but run/checkpoint-5 was trained with 80"
    )
    # As many images, of other classes.
    (started[0] / "owl" / "000.bmp").rename(started[0] / "cat" / "100.bmp")
    assert difference(started, tmp_path).startswith("the checksum of the labels is ")


def test_checkpoints_of_version_0_1_continue(started, tmp_path):
    """They know the number of images and the labels only."""
    saved = {name: started[1][name] for name in ("the number of images", "the checksum of the labels")}
    saved["the checksum of --latents_dir"] = None
    (started[0] / "dog").rename(started[0] / "dogs")
    assert data_difference(saved, settings_of(started[0], tmp_path), CHECKPOINT) is None
    saved["the checksum of --latents_dir"] = 5
    assert data_difference(saved, started[1], CHECKPOINT) == (
        "the checksum of `latents_dir` is None, but run/checkpoint-5 was trained with 5"
    )


def table(images: list[PILImage.Image], labels: list[int], names=("a", "b")) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=names) if names else Value("int64")})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_tables_are_told_apart_by_their_content(tmp_path):
    labels = [0, 1] * 20
    before = data_settings(as_training_data(table(pictures(40), labels)))
    # The same rows, written and read again, or as a selection of more.
    table(pictures(40), labels).to_parquet(tmp_path / "data.parquet")
    again = load_dataset("parquet", data_files=str(tmp_path / "data.parquet"), split="train", cache_dir=str(tmp_path))
    assert data_settings(as_training_data(again)) == before
    longer = table(pictures(50), [0, 1] * 25).select(range(40))
    assert data_settings(as_training_data(longer)) == before

    def now(images=None, labels=labels, **options):
        settings = data_settings(as_training_data(table(images or pictures(40), labels, **options)))
        return data_difference(before, settings, CHECKPOINT)

    assert now() is None
    assert now(names=("a", "c")).startswith("the class 1 is 'c'")
    assert now(names=None) == "the number of class names is none, but run/checkpoint-5 was trained with 2"
    assert now(pictures(40, seed=3)).startswith("the images of the classes 'a', 'b' are not")
    assert now(pictures(40)[::-1]).startswith("the images of the classes 'a', 'b' are not")
    assert now(labels=labels[::-1]).startswith("the checksum of the labels is ")


def test_wrong_training_data():
    with pytest.raises(InputError, match="`train_dataset` is a list; give a `datasets.Dataset`"):
        as_training_data([1, 2])
    with pytest.raises(InputError, match="`image_column` 'picture' is not in"):
        as_training_data(table(pictures(2), [0, 1]), image_column="picture")


# A source of your own


class Pictures(ImageSource):
    def __init__(self, pictures, labels):
        self.pictures, self.labels, self.num_classes = pictures, labels, max(labels) + 1

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, rows):
        return {"image": [self.pictures[row] for row in rows], "label": [self.labels[row] for row in rows]}


OPTIONS = {"seed": 3, "resolution": 8, "latent_shape": (3, 8, 8), "null_class_id": 2, "random_flip": True}
OPTIONS |= {"global_batch_size": 4}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_class_is_a_source(num_workers):
    """It gives the batches of a data set with the same images and labels."""
    images, labels = pictures(20), [0, 1] * 10
    source, dataset = Pictures(images, labels), as_training_data(table(images, labels, names=None))
    assert as_training_data(source) is source and isinstance(source, TrainingData)
    source.check()
    batches = []
    for data in (source, dataset):
        samples = data.samples(**OPTIONS)
        loader = data.loader(samples, StreamBatchSampler(0, 8, 4, 0, 1, 1), num_workers, pin_memory=False)
        batches.append(list(loader))
    assert len(batches[0]) == 8
    for own, expected in zip(*batches):
        assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    batch = {**batches[0][0], "pixels": batches[0][0]["pixels"].float() / 127.5 - 1}
    assert torch.equal(source.latents(None, batch), batch["pixels"])

    rows = source.fixed_rows(5)
    images_and_labels = source.examples(rows, 6)
    assert np.array_equal(images_and_labels[0], np.stack([np.asarray(images[row]) for row in rows]))
    assert images_and_labels[1].tolist() == [labels[row] for row in rows]
    assert source.features(["digits"], [None], (4, 4)) == [] and source.has_images and source.random_access


def test_a_source_of_your_own_has_a_fingerprint():
    before = data_settings(Pictures(pictures(20), [0, 1] * 10))
    assert data_settings(Pictures(pictures(20), [0, 1] * 10)) == before
    for changed in (Pictures(pictures(20, seed=1), [0, 1] * 10), Pictures(pictures(20), [1, 0] * 10)):
        assert "a sample of the images is" in data_difference(before, data_settings(changed), CHECKPOINT)


def test_pictures_are_rgb_and_upright():
    grey = PILImage.fromarray(np.full((4, 6), 40000, dtype=np.uint16))
    assert np.asarray(decode_image(grey)).tolist() == np.full((4, 6, 3), 40000 >> 8).tolist()
    with pytest.raises(ValueError, match="mode F hold floating-point numbers from -7 to -7"):
        decode_image(PILImage.fromarray(np.full((2, 2), -7, dtype=np.float32)))
