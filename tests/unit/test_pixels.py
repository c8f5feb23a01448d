# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What is not decoded: files that a table names, and images of absurd sizes."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets, load_dataset, load_from_disk
from PIL import Image as PILImage

from diffusers_vrpo import files
from diffusers_vrpo.commands.report import small_image
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_decoding import decode_image
from diffusers_vrpo.data.image_source import ImageDataset
from diffusers_vrpo.data.sources import as_training_data
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_sets import open_images
from support.data import png


def write_table(folder, images):
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    folder.mkdir()
    columns = {"image": images, "label": [0, 1] * (len(images) // 2)}
    # Not `to_parquet`, which would put the files' content into the table.
    pq.write_table(Dataset.from_dict(columns, features=features).data.table, folder / "train.parquet")


@pytest.mark.parametrize("path", ["secret.png", "/dev/zero", "file:///etc/hostname", "http://127.0.0.1:9/x.png"])
def test_files_that_a_table_names_are_not_opened(tmp_path, path):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    path = str(tmp_path / path) if path == "secret.png" else path
    images = [{"bytes": png(row), "path": "0.png"} for row in range(3)] + [{"bytes": None, "path": path}]
    write_table(tmp_path / "table", images)
    with pytest.raises(InputError, match="row 3 of column 'image' names a file instead of holding an image"):
        load_image_dataset(str(tmp_path / "table"), cache_dir=str(tmp_path / "cache"))


def handed_in(folder, way):
    """A data set whose last row names a file, as a script can get it from a table of somebody else."""
    images = [{"bytes": png(row), "path": "0.png"} for row in range(3)]
    images.append({"bytes": None, "path": str(folder / "secret.png")})
    write_table(folder / "table", images)
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    if way == "from_dict":
        return Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=features)
    data = load_dataset(str(folder / "table"), split="train", cache_dir=str(folder / "cache"))
    if way == "joined":  # which forgets the reader
        return concatenate_datasets([data, data.rename_column("label", "kind").rename_column("kind", "label")])
    if way == "saved":  # with a description that claims to be a folder of images
        (folder / "saved").mkdir()
        data.select(range(3)).save_to_disk(folder / "saved")
        info = json.loads((folder / "saved" / "dataset_info.json").read_text()) | {"builder_name": "imagefolder"}
        (folder / "saved" / "dataset_info.json").write_text(json.dumps(info))
        arrow = next((folder / "saved").glob("*.arrow"))
        with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, data.data.table.schema) as stream:
            stream.write_table(data.data.table)
        return load_from_disk(str(folder / "saved"))
    return data.select([3, 0, 1]) if way == "selected" else data


@pytest.mark.parametrize("way", ["loaded", "selected", "from_dict", "joined", "saved"])
def test_files_that_a_data_set_from_python_names_are_not_opened(tmp_path, way):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    data = handed_in(tmp_path, way)
    row = 0 if way == "selected" else 3
    with pytest.raises(InputError, match=f"row {row} of column 'image' names a file .*embed_table_storage"):
        as_training_data(data)
    with pytest.raises(InputError, match=f"row {row} of column 'image' names a file"):
        as_training_data(ImageDataset(data, None, 2))
    # Rows without paths are taken.
    assert len(as_training_data(data.select([1, 2]))) == 2
    # What the error advises puts in what the file holds.
    data = data.with_format("arrow").map(datasets.table.embed_table_storage, batched=True).with_format(None)
    record = as_training_data(data)[[row]]["image"][0]
    assert record["bytes"] == (tmp_path / "secret.png").read_bytes()


def test_data_sets_of_image_files_can_be_handed_in(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(png(1))
    ours = load_image_dataset(train_data_dir=str(tmp_path / "images"))[0]
    theirs = load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train", cache_dir=str(tmp_path))
    assert len(as_training_data(as_training_data(ours))) == 2
    for data in (ours, theirs, theirs.train_test_split(0.5)["train"], concatenate_datasets([theirs, theirs])):
        assert as_training_data(data).examples(np.array([0]), 8)[1].tolist() in ([0], [1])


def test_tables_that_hold_their_images_open(tmp_path):
    write_table(tmp_path / "table", [{"bytes": png(row), "path": f"{row}.png"} for row in range(4)])
    data, _, _ = load_image_dataset(str(tmp_path / "table"), cache_dir=str(tmp_path / "cache"))
    assert len(data) == 4 and decode_image(data[0]["image"]).mode == "RGB"


def test_image_files_of_a_folder_are_still_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(png(1))
    data, names, _ = load_image_dataset(train_data_dir=str(tmp_path / "images"))
    assert names == {0: "cat", 1: "dog"} and decode_image(data[1]["image"]).mode == "RGB"


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_small_file_of_a_huge_image_is_not_decoded(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    PILImage.new("1", (13000, 13000)).save(buffer, "png")
    assert len(buffer.getvalue()) < 1e5
    with pytest.raises(ValueError, match="13000x13000 are more than"):
        decode_image({"bytes": buffer.getvalue(), "path": None})
    monkeypatch.setattr(files, "LARGEST_IMAGE", 63)
    with pytest.raises(ValueError, match="12x10 are more than 63 pixels"):
        decode_image({"bytes": png(1), "path": None})


def test_pictures_of_others_have_the_same_limit(tmp_path, monkeypatch):
    """Samples to measure and the grids of a run; the images of a cache are in test_latent_cache.py."""
    (tmp_path / "0.png").write_bytes(png(1))
    assert (
        small_image(tmp_path / "0.png").startswith("data:image/png")
        and len(open_images("SAMPLES", str(tmp_path))) == 1
    )
    monkeypatch.setattr(files, "LARGEST_IMAGE", 63)
    assert small_image(tmp_path / "0.png") is None
    with pytest.raises(InputError, match="0.png is not an image that can be read"):
        open_images("SAMPLES", str(tmp_path))


def test_an_image_that_pillow_calls_a_bomb_has_one_kind_of_error(monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match="decompression bomb"):
        files.open_image(io.BytesIO(png(1)))


def test_one_function_opens_images():
    package = Path(files.__file__).parent
    opening = re.compile(r"Image\.open\(")
    found = [file.name for file in package.rglob("*.py") if opening.search(file.read_text(encoding="utf-8"))]
    assert found == ["files.py"]
