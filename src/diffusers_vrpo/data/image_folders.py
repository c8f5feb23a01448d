# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Opens folders of image files as data sets: the class of each image, and which files are not used.

`datasets` reads folders by patterns: a folder or file with the word train or test in its name becomes a split, the last
folder level becomes the class, and brackets in a name match other folders. Here a name is a path and never a pattern.
"""

import csv
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, Value
from datasets.table import InMemoryTable

from ..errors import InputError, first_line
from .image_files import Listing, counted, list_images, reason_without_images


logger = logging.getLogger(__name__)

SPLIT_OF_FOLDER = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLIT_OF_FOLDER |= {"validation": "validation", "val": "validation", "valid": "validation", "dev": "validation"}
IMAGE_FOLDER = "imagefolder"  # the name of the reader of such folders in `datasets`, used here, too
LABEL_COLUMN, NO_CLASSES = "label", "none"  # the default of `label_column`, and its value to train without classes
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def visible_folders(folder: str) -> list[str]:
    """The names of the folders directly in a folder, without hidden ones."""
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
    return sorted(name for name in found if name != "__MACOSX")


def metadata_file(folder: str) -> str | None:
    """The table of `METADATA_FILES` that lies in a folder, if there is one."""
    return next((name for name in METADATA_FILES if os.path.isfile(os.path.join(folder, name))), None)


def sorted_classes(names) -> list[str]:
    """Class names in order: as numbers if all of them are whole numbers, else as text."""
    names = sorted(set(names))
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Splits


def split_folders(folder: str) -> dict[str, str]:
    """The top-level folders that are splits, by the name of the split; empty if those folders are classes.

    They are splits if there is `train` together with `validation` or `test`, or one of the three as the only folder,
    and if each of them has folders of its own or a table of labels. So a class may be called train. Other spellings of
    the three names are in `SPLIT_OF_FOLDER`.
    """
    names = visible_folders(folder)

    def is_split(name: str) -> bool:
        inside = os.path.join(folder, name)
        return name.lower() in SPLIT_OF_FOLDER and bool(metadata_file(inside) or visible_folders(inside))

    found = {SPLIT_OF_FOLDER[name.lower()]: name for name in names if is_split(name)}
    found = {split: found[split] for split in ("train", "validation", "test") if split in found}
    words = [name for name in names if name.lower() in SPLIT_OF_FOLDER]
    complete = len(found) == len(words) and ("train" in found and len(found) > 1 or len(names) == 1)
    return found if complete else {}


# ----------------------------------------------------------------------------------------------------------------------
# As a data set


def load_image_folder(option: str, folder: str, split: str, image_column: str, label_column: str) -> Dataset:
    """Opens a folder with one folder of images per class, or with a table of labels, as a data set.

    The class of an image is the name of its folder at the first level. If no image lies in a folder, all get one class
    without a name. The log says what the classes are, and how many files are not used.

    Args:
        option: the option that gives the folder, for errors.
        folder: the folder.
        split: `"train"`, or another split if the folder has a folder for it.
        image_column: must be `"image"`.
        label_column: the name of the column of labels in the table and in the result; `"none"` gives all images one
            class.

    Raises:
        InputError: if the folder cannot be read or has no images, or the split or a column does not exist.
    """
    source = f"`{option}` {folder}"
    try:
        splits = split_folders(folder)
        if split not in (splits or ["train"]):
            raise InputError(
                "dataset_split",
                f"`dataset_split` {split!r} is not in {source}; it has {', '.join(map(repr, splits or ['train']))}",
            )
        top = os.path.join(folder, splits[split]) if splits else folder
        if splits:
            names = ", ".join(f"{name}/ ({key})" for key, name in splits.items())
            logger.info(f"{source}: the folders {names} are splits; the images of {splits[split]}/ are used")
            if others := [name for name in visible_folders(folder) if name not in splits.values()]:
                logger.warning(f"{source}: not used: the other folders ({', '.join(others[:5])})")
        listing, table = list_images(top), metadata_file(top)
    except OSError as error:
        raise InputError(option, f"{source} cannot be read ({first_line(error)})") from error

    if not listing.images:
        raise InputError(option, f"{source}: {reason_without_images(top, listing)}")
    for name in ("model_index.json", "train_config.yaml"):
        if os.path.isfile(os.path.join(top, name)):  # its images are grids of samples and plots
            raise InputError(
                option, f"{source}: it holds a model or a training run ({name}); give the folder of the images"
            )
    if image_column != "image":
        raise InputError(
            "image_column", f"`image_column` {image_column!r}: a folder of images has `image` only; remove it"
        )
    in_folders = any("/" in name for name in listing.images)
    labels = table_labels(option, top, table, label_column) if table and label_column != NO_CLASSES else None
    if labels is None and (label_column == NO_CLASSES or (not in_folders and label_column == LABEL_COLUMN)):
        rows, values, names = listing.images, [0] * len(listing.images), None
        logger.warning(
            f"{source}: {counted(len(rows), 'image')} {'' if in_folders else 'and no class folders; '}all get class 0, "
            "so the model is unconditional"
        )
    elif labels is None:
        known = (
            list_images(os.path.join(folder, splits["train"])).images if "train" in splits and split != "train" else []
        )
        rows, values, names = folder_classes(option, source, listing, known)
        if empty := [name for name in visible_folders(top) if name not in names]:
            logger.warning(f"{source}: {counted(len(empty), 'folder')} without images ({', '.join(empty[:5])})")
    else:
        listed = set(listing.images)
        rows = [name for name in labels if name in listed]
        values, names = label_values(source, [labels[name] for name in rows], label_column)
        listing.others.pop(os.path.splitext(table)[1], None)
        if not rows:
            raise InputError(
                option, f"{source}: {table} does not name any of the {len(listing.images)} images in the folder"
            )
        if missing := len(labels) - len(rows):
            logger.warning(f"{source}: {table} names {missing} files that are not images in the folder")
    report(source, listing, len(listing.images) - len(rows), table if labels is not None else None)

    feature = ClassLabel(names=names) if names else Value("int64")
    paths = pa.array([os.path.join(os.path.abspath(top), name) for name in rows], pa.string())
    images = pa.StructArray.from_arrays([pa.nulls(len(rows), pa.binary()), paths], ["bytes", "path"])
    table = pa.table({"image": images, label_column: pa.array(values, pa.int64())})
    features = Features({"image": Image(), label_column: feature})
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features, builder_name=IMAGE_FOLDER))


def folder_classes(
    option: str, source: str, listing: Listing, known: list[str]
) -> tuple[list[str], list[int], list[str]]:
    """The images in class folders, their labels, and the names of the classes.

    Args:
        option: the option that gives the folder.
        source: the option and the folder, for the log and errors.
        listing: the files of the split.
        known: the images of the training split; its classes are used for another split that has no further ones.

    Raises:
        InputError: if no image lies in a folder.
    """
    rows = [name for name in listing.images if "/" in name]
    if not rows:
        raise InputError(
            "label_column",
            f"{source} has neither a table with the `label_column` that is given nor class folders "
            f"({counted(len(listing.images), 'image')} in all); move the images into one folder for each class, such as cat/ "
            "and dog/, add a metadata.csv with the columns file_name and label, or remove `label_column` to train without "
            "classes",
        )
    classes = [name.partition("/")[0] for name in rows]
    names, trained = sorted_classes(classes), {name.partition("/")[0] for name in known if "/" in name}
    names = sorted_classes(trained) if trained.issuperset(names) else names
    label_of = {name: label for label, name in enumerate(names)}
    order = "in the order of the numbers" if names[-1].isdigit() and names != sorted(names) else "in this order"
    shown = ", ".join(map(repr, names[:10])) + (f", ... {names[-1]!r}" if len(names) > 10 else "")
    logger.info(
        f"{source}: {counted(len(rows), 'image')} of {len(names)} class{'es' * (len(names) > 1)}, {order}: {shown}"
    )
    inner = {name.split("/")[1] for name in rows if name.count("/") > 1}
    if len(names) == 1 and len(inner) > 1:
        logger.warning(
            f"{source}: all images lie in the one folder {names[0]}, which is the only class; if the folders in it are the "
            f"classes, give {names[0]} inside that folder as `{option}`"
        )
    elif inner:
        logger.info(f"{source}: images in deeper folders belong to the class of the first level")
    return rows, [label_of[name] for name in classes], names


def table_labels(option: str, folder: str, table: str, label_column: str) -> dict[str, str | int] | None:
    """Reads the labels in a table by file name; None if it has no such column and there are class folders.

    Raises:
        InputError: if the table cannot be read, lacks a column, or names a file outside the folder.
    """
    path = os.path.join(folder, table)
    name = f"`{option}` {folder}: {table}"
    try:
        if table.endswith(".csv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                records = list(csv.DictReader(file))
        elif table.endswith(".jsonl"):
            with open(path, encoding="utf-8") as file:
                records = [json.loads(line) for line in file if line.strip()]
                if not all(isinstance(record, dict) for record in records):
                    raise ValueError("a line is not a JSON object")
        else:
            records = pyarrow.parquet.read_table(path).to_pylist()
        columns = list(records[0]) if records else []
    except (OSError, ValueError, TypeError, csv.Error, pa.ArrowException) as error:
        raise InputError(option, f"{name} cannot be read ({first_line(error)})") from error
    if label_column not in columns and visible_folders(folder):
        logger.info(f"{name} has no column {label_column!r}; the classes are the folders")
        return None
    for column_option, column in ((option, "file_name"), ("label_column", label_column)):
        if column not in columns:
            raise InputError(
                column_option,
                f"{name} has the columns {', '.join(map(repr, columns)) or 'none'}, but it needs file_name and "
                f"`label_column` {label_column!r}; name the column of the classes with `label_column`, or give "
                f"`label_column` {NO_CLASSES} to train without classes",
            )
    labels = {}
    for record in records:
        file = os.path.normpath(str(record.get("file_name"))).replace(os.sep, "/")
        if file.startswith(("../", "/")) or file == "..":
            raise InputError(option, f"{name} names {file}, which is outside the folder; move the images into it")
        labels[file] = record.get(label_column)
    return labels


def label_values(source: str, values: list, label_column: str) -> tuple[list[int], list[str] | None]:
    """Turns the labels of a table into class ids; returns these, and the class names, or None if labels are numbers.

    Raises:
        InputError: if a label is missing.
    """
    if missing := sum(value in (None, "") for value in values):
        raise InputError("label_column", f"{source}: `label_column` {label_column!r} is empty for {missing} images")
    texts = [str(value) for value in values]
    if all(text.isascii() and text.isdigit() for text in texts):
        return [int(text) for text in texts], None
    names = sorted_classes(texts)
    check_text_labels(names, len(texts), f"`label_column` {label_column!r} of {source}")
    logger.info(f"{source}: {label_column!r} holds text; its {len(names)} values in order are the classes")
    label_of = {name: label for label, name in enumerate(names)}
    return [label_of[text] for text in texts], names


def check_text_labels(names: list[str], count: int, column: str):
    """Checks that the distinct texts of a column are classes rather than captions.

    Raises:
        InputError: if there are over 20 of them and more than half as many as images.
    """
    if len(names) > max(20, count // 2):
        raise InputError(
            "label_column",
            f"{column} has {len(names)} different texts for {count} images, such as {names[0][:40]!r}: these are not "
            "classes; name another column with `label_column`",
        )


def report(source: str, listing: Listing, outside: int, table: str | None):
    """Logs in one line how many files are not used, and why."""
    where = f"named in no row of {table}" if table else "outside the class folders"
    parts = [f"{counted(outside, 'image')} {where}"] if outside else []
    if parts := parts + listing.left_out():
        logger.warning(f"{source}: not used: {'; '.join(parts)}")
