# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Folders of image files: names are paths, the first level is the class, and what is left out is counted."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from diffusers_vrpo.command_line import OneLineErrorParser, parse_config, training_parser
from diffusers_vrpo.config import VRPOConfig, kept_value, options_of
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_files import IMAGE_SUFFIXES, list_images
from diffusers_vrpo.data.sources import differing_names
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_sets import open_images
from diffusers_vrpo.models.start import check_class_order
from support.data import write_parquet


def images(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return str(folder)


def classes(folder, **options) -> tuple[list[str], list[str]]:
    """The names of the classes, and the class of each image by its path."""
    data, id2label, count = load_image_dataset(**({"train_data_dir": str(folder)} | options))
    assert count == len(id2label)
    return list(id2label.values()), [id2label[label] for label in data["label"]]


@pytest.mark.parametrize(
    "names",
    [
        ["bullet_train", "cat", "train_station"],
        ["bus", "car", "train"],
        ["dev", "test", "train", "val"],
        ["evaluation set", "test-tube", "val.x"],
    ],
)
def test_split_words_in_class_names(tmp_path, names):
    folder = images(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(3)))
    assert classes(folder) == (names, [name for name in names for _ in range(3)])
    assert classes(None, train_data_dir=None, dataset_name=folder)[0] == names


@pytest.mark.parametrize("file", ["train_0", "ILSVRC2012_val_1", "test", "x-eval-y"])
def test_split_words_in_file_names(tmp_path, file):
    folder = images(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in (0, 1, file)))
    assert len(classes(folder)[1]) == 6


def test_classes_are_the_first_level(tmp_path):
    folder = images(tmp_path, *(f"{name}/batch{i}/0.png" for name in ("cat", "dog") for i in (1, 2)))
    assert classes(folder) == (["cat", "dog"], ["cat", "cat", "dog", "dog"])


@pytest.mark.parametrize("other, split", [("validation", "validation"), ("val", "validation"), ("test", "test")])
def test_folders_of_splits(tmp_path, caplog, other, split):
    folder = images(tmp_path, "train/cat/0.png", "train/dog/0.png", "train/dog/1.png", f"{other}/dog/2.png")
    with caplog.at_level(logging.INFO):
        assert classes(folder) == (["cat", "dog"], ["cat", "dog", "dog"])
    assert "are splits" in caplog.text
    assert classes(folder, split=split) == (["cat", "dog"], ["dog"])  # ids are those of training
    with pytest.raises(InputError, match="'nosuch' is not in .* it has 'train'"):
        classes(folder, split="nosuch")


def test_what_is_left_out_is_counted_in_one_line(tmp_path, caplog):
    folder = images(tmp_path, "cat/0.png", "dog/0.png", "outside.png", "dog/.hidden.png")
    (tmp_path / "dog" / "x.heic").touch()
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.INFO):
        assert len(classes(folder)[1]) == 2
    line = next(line for line in caplog.messages if "not used" in line)
    for part in ("1 image outside the class folders", "1 .heic", "1 hidden", "1 link to no file"):
        assert part in line
    assert "1 folder without images (empty)" in caplog.text


def test_names_are_not_patterns_and_links_are_followed(tmp_path):
    images(tmp_path / "data1", "wolf/0.png")
    names = ["[y]", "a b", "über", "*"]
    folder = Path(images(tmp_path / "data[12]", *(f"{name}/0.png" for name in names)))
    assert classes(folder)[0] == sorted(names)
    links = tmp_path / "links"
    links.mkdir()
    (links / "a").symlink_to(folder / "a b")
    (links / "loop").symlink_to(links)
    (links / "b").mkdir()
    (links / "b" / "0.png").symlink_to(folder / "über" / "0.png")
    assert classes(links) == (["a", "b"], ["a", "b"])
    tables = write_parquet(tmp_path / "tables[1]", [0, 1])
    with pytest.raises(InputError, match="as a pattern"):
        load_image_dataset(tables)


def test_numbers_are_ordered_as_numbers(tmp_path, caplog):
    folder = images(tmp_path, *(f"{name}/0.png" for name in range(12)))
    with caplog.at_level(logging.INFO):
        assert classes(folder)[0] == [str(name) for name in range(12)]
    assert "in the order of the numbers" in caplog.text
    assert "now ordered as numbers" in differing_names(["0", "1", "10", "2"], ["0", "1", "2", "10"], Path("x"))


def test_label_rows_of_a_permuted_order_are_refused():
    as_text = dict(enumerate(sorted(map(str, range(12)))))
    with pytest.raises(InputError, match="class 2 is '10' here, '2' there"):
        check_class_order(None, as_text, False, "weights")
    with pytest.raises(InputError, match="another order"):
        check_class_order({"0": "dog", "1": "cat"}, {0: "cat", 1: "dog"}, True, "weights")
    check_class_order({"0": "dog", "1": "cat"}, {0: "cat", 1: "dog"}, False, "weights")  # the rows start again
    check_class_order(None, {label: str(label) for label in range(12)}, True, "weights")
    check_class_order(None, {0: "cat", 1: "dog"}, True, "weights")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_metadata_gives_the_labels(tmp_path, ending):
    folder = images(tmp_path, "0.png", "1.png", "sub/2.png")
    rows = [("0.png", "dog"), ("1.png", "cat"), ("sub/2.png", "dog")]
    text = {
        "csv": "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows),
        "jsonl": "".join(f'{{"file_name": "{name}", "label": "{label}"}}\n' for name, label in rows),
    }
    (tmp_path / f"metadata.{ending}").write_text(text[ending])
    assert classes(folder) == (["cat", "dog"], ["dog", "cat", "dog"])
    (tmp_path / f"metadata.{ending}").write_text(text[ending].replace("0.png", "../0.png"))
    with pytest.raises(InputError, match="outside the folder"):
        classes(folder)


def test_a_line_of_metadata_that_is_not_an_object(tmp_path):
    folder = images(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "dog"}\n["1.png", "cat"]\n')
    with pytest.raises(InputError, match=r"metadata.jsonl cannot be read \(a line is not a JSON object\)"):
        classes(folder)


def test_reasons_and_remedies(tmp_path):
    def reason(name: str, *files: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        for file in files:
            (tmp_path / name / file).touch()
        with pytest.raises(InputError) as error:
            classes(tmp_path / name)
        return str(error.value)

    assert "the folder is empty" in reason("empty")
    assert "unzip -q train.zip -d train" in reason("zipped", "train.zip")
    assert "tar -xf n01.tar -C n01" in reason("tar", "n01.tar")
    assert "give the folder as `dataset_name`" in reason("tables", "0.parquet")
    assert "`latents_dir`" in reason("cache", "latents.npy")
    assert "1 .heic" in reason("heic", "x.heic")
    for name in ("model_index.json", "train_config.yaml"):
        images(tmp_path / name, "validation/0.png")
        assert f"holds a model or a training run ({name})" in reason(name, name)
    images(tmp_path / "flat", "0.png")
    with pytest.raises(InputError, match="one folder for each class, .* or remove `label_column`"):
        classes(tmp_path / "flat", label_column="kind")
    (tmp_path / "flat" / "metadata.csv").write_text("file_name,kind\n0.png,cat\n")
    assert "has the columns 'file_name', 'kind'" in reason("flat")
    assert "`label_column` none to train without classes" in reason("flat")


def test_text_labels_become_classes(tmp_path):
    from datasets import Dataset

    data, names, count = load_image_dataset(write_parquet(tmp_path / "ids", [0, 1, 1]))
    folder = tmp_path / "text"
    folder.mkdir()
    table = Dataset.from_dict({"image": data["image"], "label": ["dog", "cat", "dog"]}, None)
    table.cast_column("image", data.features["image"]).to_parquet(folder / "train.parquet")
    data, names, count = load_image_dataset(str(folder))
    assert (names, count, list(data["label"])) == ({0: "cat", 1: "dog"}, 2, [1, 0, 1])


def test_evaluation_lists_the_same_files(tmp_path, caplog):
    folder = images(tmp_path, "0.png", "a/1.tif", "2.gif", "3.avif")
    (tmp_path / "4.heic").touch()
    with caplog.at_level(logging.INFO):
        assert len(open_images("SAMPLES", folder)) == 4
    assert "1 .heic" in caplog.text
    assert len(list_images(folder).images) == 4
    assert {".tif", ".gif", ".avif", ".jpeg"} < IMAGE_SUFFIXES


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = VRPOConfig(output_dir="~/x", encoder=["~/e", "b"], train_data_dir=Path("~/d"))
    assert (config.output_dir, config.encoder) == (f"{tmp_path}/x", [f"{tmp_path}/e", "b"])
    assert config.train_data_dir == f"{tmp_path}/d"
    (tmp_path / "c.yaml").write_text("output_dir: ~/y\nobjective: none\nvae: none\n")
    config = parse_config(training_parser(), ["--config=~/c.yaml", "--train_data_dir=~/d"])
    assert (config.output_dir, config.train_data_dir) == (f"{tmp_path}/y", f"{tmp_path}/d")
    parser = OneLineErrorParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", nargs="*")
    args = parser.parse_args(["~/z", "--names", "~/a", "~unknown-user"])
    assert (args.folder, args.names) == (tmp_path / "z", [f"{tmp_path}/a", "~unknown-user"])


def test_embedded_digits_have_a_name_of_their_own(tmp_path, monkeypatch, caplog):
    from diffusers_vrpo.alignment.encoders import _locate

    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert len(load_image_dataset("digits")[0]) == 1437
    assert "embedded:digits always names" in caplog.text
    packaged = _locate("digits")
    images(tmp_path / "digits", "cat/0.png", "dog/0.png")
    assert len(load_image_dataset("digits")[0]) == 2
    assert len(load_image_dataset("embedded:digits")[0]) == 1437
    assert _locate("embedded:digits") == packaged
    with pytest.raises(InputError):
        _locate("digits")
    name = options_of(VRPOConfig)["dataset_name"]
    assert kept_value(name, "embedded:digits") == kept_value(name, "digits") == "digits"  # a run may use either


def test_evaluation_follows_links(tmp_path):
    folder = Path(images(tmp_path / "y", "0.png"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(folder)
    assert len(open_images("SAMPLES", str(tmp_path / "links"))) == 1
