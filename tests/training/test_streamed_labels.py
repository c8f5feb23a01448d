# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Text labels of streamed parquet files, and which failures of reading are final."""

import fsspec
import pytest
from datasets import Dataset, Features, Image, Value

from diffusers_vrpo.data import parquet
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.parquet import stream_image_dataset
from diffusers_vrpo.errors import InputError
from support.data import png


def write_labels(folder, labels, feature="string", file=None) -> str:
    """A parquet file with an image per label, in row groups of two."""
    folder.mkdir(exist_ok=True)
    features = Features({"image": Image(), "label": Value(feature)})
    rows = {"image": [{"bytes": png(row), "path": None} for row in range(len(labels))], "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(file or folder / "train.parquet", batch_size=2)
    return str(folder)


@pytest.mark.parametrize(
    "labels, feature",
    [
        (["dog", "cat", "dog", "ant"], "string"),
        (["10", "9", "9", "1"], "large_string"),
        ([True, False, True, True], "bool"),
        ([True, True], "bool"),
    ],
)
def test_text_becomes_classes_as_without_streaming(tmp_path, caplog, labels, feature):
    folder = write_labels(tmp_path / "data", labels, feature)
    expected, names, num_classes = load_image_dataset(folder, cache_dir=str(tmp_path / "cache"))
    rows = stream_image_dataset(folder)
    assert (rows.id2label, rows.num_classes) == (names, num_classes)
    assert [rows[row]["label"] for row in range(len(labels))] == list(expected["label"])
    assert rows.classes_with_images() == list(range(num_classes))
    assert rows[0]["image"]["bytes"] == png(0)


def test_only_the_labels_are_read_of_files_on_a_server(tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    with fs.open("/remote/train.parquet", "wb") as file:
        write_labels(tmp_path / "data", ["dog", "cat", "dog", "cat"], file=file)
    files = parquet.open_files(["memory://remote/train.parquet"], "")
    rows = parquet.ParquetRows(files, "image", "label")
    asked, original = [], parquet.read_columns
    monkeypatch.setattr(parquet, "read_columns", lambda *a: asked.append(a[2]) or original(*a))
    parquet.read_text_classes(rows, Value("string"), "data", "label")
    assert asked == [["label"], ["label"]]
    assert rows.id2label == {0: "cat", 1: "dog"} and rows[[0, 3]]["label"] == [1, 0]


@pytest.mark.parametrize("names, message", [(["cat", "dog", "owl"], None), (["cat"], "has the label 'dog', which")])
def test_names_that_the_data_set_gives_are_kept(tmp_path, names, message):
    """The README of a data set can name the classes of a column of text."""
    folder = write_labels(tmp_path / "data", ["dog", "cat"])
    listed = "".join(f"          '{number}': {name}\n" for number, name in enumerate(names))
    (tmp_path / "data" / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:\n"
        f"        names:\n{listed}---\n"
    )
    if message:
        with pytest.raises(InputError, match=message):
            stream_image_dataset(folder)
        return
    rows = stream_image_dataset(folder)
    assert (rows.num_classes, rows.classes_with_images(), rows[0]["label"]) == (3, [0, 1], 1)


@pytest.mark.parametrize(
    "labels, message",
    [(["a", None, "b"], "is empty in 1 rows"), ([f"a photo of {i}" for i in range(30)], "30 different texts")],
)
def test_texts_that_are_no_classes(tmp_path, labels, message):
    with pytest.raises(InputError, match=message):
        stream_image_dataset(write_labels(tmp_path / "data", labels))
