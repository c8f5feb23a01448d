# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Image data sets: opening them, checking their columns, and finding the images that can be decoded."""

import logging
import os
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.features import Value
from PIL import Image as PILImage

from ..config import DIGITS, EMBEDDED_DIGITS, EMBEDDED_GRIDS, expanded, is_embedded_dataset
from ..errors import UNKNOWN_TO_THE_HUB, InputError, first_line, gated, hub_problem
from ..random_streams import ORDER, random_stream
from ..reach import offline_if_out_of_reach
from .image_decoding import PixelRange, decode_image
from .image_files import IMAGE_SUFFIXES
from .image_folders import (
    IMAGE_FOLDER,
    LABEL_COLUMN,
    METADATA_FILES,
    NO_CLASSES,
    check_text_labels,
    load_image_folder,
    sorted_classes,
)


logger = get_logger(__name__)  # needs accelerate's state, and logs on the main process only
opening_logger = logging.getLogger(__name__)  # for messages before that state exists
TABLE_SUFFIXES = (".parquet", ".arrow", ".zip", ".tar")  # files with images inside, which `datasets` reads


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    max_train_samples: int | None = None,
    cache_dir: str | None = None,
) -> tuple[Dataset, dict[int, str] | None, int]:
    """Opens an image data set from the Hub, from a folder of parquet files or images, or from the package itself.

    Without labels, or with `label_column="none"`, all images get class 0.

    Returns:
        the split with the columns `image` (encoded bytes or paths) and `label`; the class names, or None if the labels
        are plain integers; the number of classes.

    Raises:
        InputError: if the data set, split or column does not exist, or the labels are not class ids.
    """
    option, name = ("train_data_dir", train_data_dir) if dataset_name is None else ("dataset_name", dataset_name)
    name = expanded(name)
    say_which_digits(option, name)
    if dataset_name is not None and is_embedded_dataset(dataset_name):
        refuse_config_name(dataset_config_name, option, name)
        data = load_embedded_dataset(dataset_name)
    elif os.path.isdir(name) and (option == "train_data_dir" or is_image_folder(name)):
        refuse_config_name(dataset_config_name, option, name)
        data = {split: load_image_folder(option, name, split, image_column, label_column)}
    else:
        data = open_named(option, name, dataset_config_name, cache_dir)
    if split not in data:
        raise InputError(
            "dataset_split",
            f"`dataset_split` {split!r} is not in `{option}` {name}; it has {', '.join(map(repr, data))}",
        )
    data = data[split]

    if len(data) == 0:
        raise InputError("dataset_split", f"`dataset_split` {split!r} of `{option}` {name} has no images")
    data, id2label, num_classes = image_and_label(data, option, name, image_column, label_column)
    if max_train_samples is not None:
        # A random subset, since many data sets are sorted by class; the same for every seed.
        rows = random_stream(0, 0, ORDER).permutation(len(data))[:max_train_samples]
        data = data.select(np.sort(rows))
    return data, id2label, num_classes


def refuse_config_name(config_name: str | None, option: str, name: str):
    """Checks that no configuration is given for a data set that has none.

    Raises:
        InputError: if one is given.
    """
    if config_name is not None:
        raise InputError(
            "dataset_config_name",
            f"`dataset_config_name` {config_name} has no effect, since `{option}` {name} has no configurations; remove it",
        )


def load_embedded_dataset(name: str) -> DatasetDict:
    """Both splits of the digits that the package contains, or of the digit grids that it makes from them."""
    if name == EMBEDDED_GRIDS:
        from ..assets.digit_grids import load_digit_grids

        return load_digit_grids()
    from ..assets.digits import load_digits_dataset

    return load_digits_dataset()


def say_which_digits(option: str, name: str):
    """Logs what `digits` means, which depends on whether there is a folder of that name."""
    if name == DIGITS and option != "train_data_dir":
        what = "the folder of that name" if os.path.isdir(DIGITS) else "the package's own digits"
        opening_logger.info(f"`{option}` {DIGITS} is {what}; {EMBEDDED_DIGITS} always names those of the package")


def is_image_folder(folder: str) -> bool:
    """Whether a folder given as `dataset_name` holds image files, rather than tables or archives of images."""
    has_images = False
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        endings = {os.path.splitext(name)[1].lower() for name in files if name not in METADATA_FILES}
        if not endings.isdisjoint(TABLE_SUFFIXES):
            return False
        has_images = has_images or not endings.isdisjoint(IMAGE_SUFFIXES)
        # Two levels are enough to tell; a class folder may have a million files.
        if os.path.relpath(place, folder).count(os.sep) >= 1 or (has_images and place != folder):
            break
    return has_images


def image_and_label(
    data: Dataset, option: str, name: str, image_column: str, label_column: str
) -> tuple[Dataset, dict[int, str] | None, int]:
    """Reduces a data set to the columns `image`, not decoded, and `label`.

    Args:
        data: has images in one column and class ids in another; `is_classless` says which may have no class ids.
        option, name: the option that gives the data set, and its value, for errors.
        image_column, label_column: the names of the columns in `data`.

    Returns:
        the data set; the class names, or None if the labels are plain integers; the number of classes.

    Raises:
        InputError: if the columns do not hold images and class ids, or name files instead of images.
    """
    classless = is_classless(data.features, option, name, label_column)
    check_columns(data.features, option, name, image_column, None if classless else label_column, text=True)
    refuse_paths(data.select_columns([image_column]), option, name)
    if classless:
        data, label_column = data.select_columns([image_column]), LABEL_COLUMN
        data = data.add_column(label_column, np.zeros(len(data), np.int64), feature=Value("int64"))
    data = with_text_classes(data, label_column, f"`label_column` {label_column!r} of `{option}` {name}")
    labels, label = column_values(data, label_column), data.features[label_column]
    smallest, largest = pc.min_max(labels).as_py().values()
    column = f"`label_column` {label_column!r} of `{option}` {name}"
    names, num_classes = check_labels(label, labels.null_count, smallest, largest, len(data), column)
    data = data.select_columns([image_column, label_column])
    renamed = {image_column: "image", label_column: "label"}
    data = data.rename_columns({old: new for old, new in renamed.items() if old != new})
    return data.cast_column("image", Image(decode=False)), dict(enumerate(names)) if names else None, num_classes


def is_classless(features: Features, option: str, name: str, label_column: str) -> bool:
    """Whether all images of a table get one class, because there are no labels or `label_column` is `"none"`.

    It is False if an option names a column that does not exist, or if the default column does not exist and another
    one looks like classes; `check_columns` then raises an error.
    """
    if label_column in features or label_column not in (LABEL_COLUMN, NO_CLASSES):
        return False
    if label_column == LABEL_COLUMN and any(looks_like_classes(*column) for column in features.items()):
        return False
    opening_logger.warning(
        f"`{option}` {name} is trained without labels (its columns are {', '.join(map(repr, features))}); all images get "
        "class 0, so the model is unconditional"
    )
    return True


def looks_like_classes(column: str, feature) -> bool:
    """Whether a column that is not named in the options probably holds the classes."""
    words = ("label", "class", "categor", "target", "species")
    is_value = isinstance(feature, Value) and (feature.dtype.startswith(("int", "uint")) or is_text(feature))
    return isinstance(feature, ClassLabel) or (is_value and any(word in column.lower() for word in words))


def is_text(feature) -> bool:
    """Whether a column holds text or truth values, which can become classes."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "bool")


def with_text_classes(data: Dataset, label_column: str, column: str) -> Dataset:
    """Replaces text labels by class ids, in the order of the class names; other data sets are returned unchanged.

    Args:
        column: a description of the column and the data set, for the log and errors.

    Raises:
        InputError: if a label is missing, or the texts are not classes.
    """
    if not is_text(data.features[label_column]):
        return data
    values = column_values(data, label_column).cast(pa.string())
    names = text_classes(pc.unique(values.drop_null()).to_pylist(), values.null_count, len(values), column)
    labels = pc.index_in(values, value_set=pa.array(names, pa.string())).cast(pa.int64())
    columns = [name for name in data.column_names if name != label_column]
    return data.select_columns(columns).add_column(label_column, labels.to_numpy(), feature=ClassLabel(names=names))


def text_classes(texts: Iterable[str], nulls: int, count: int, column: str) -> list[str]:
    """The names of the classes of text labels, in order.

    Args:
        texts: the distinct labels.
        nulls: the number of rows without a label.
        count: the number of rows.
        column: a description of the column and the data set, for the log and errors.

    Raises:
        InputError: if a label is missing, or the texts are not classes.
    """
    if nulls:
        raise InputError(None, f"{column} is empty in {nulls} rows")
    names = sorted_classes(texts)
    check_text_labels(names, count, column)
    opening_logger.info(
        f"{column} holds text; its {len(names)} values in order are the classes: {', '.join(names[:10])}"
    )
    return names


def column_values(data: Dataset, column: str) -> pa.ChunkedArray:
    """The values of a column for all rows of a data set, as arrow stores them."""
    return selected(data, data.data.column(column))


def selected(data: Dataset, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Picks the values that belong to the rows of a data set from a column of its arrow table.

    `datasets` keeps a selection of rows as indices into the table.
    """
    return values if data._indices is None else values.take(data._indices.column(0))


def check_columns(
    features: Features, option: str, name: str, image_column: str, label_column: str | None, text: bool = False
):
    """Checks that a data set has a column of images and one of integer labels or, with `text`, of text labels.

    Without `label_column`, only the column of the images is checked.

    Raises:
        InputError: if a column is missing or holds something else.
    """
    for column_option, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            without = f", or give `label_column` {NO_CLASSES} to train without classes"
            raise InputError(
                None,
                f"`{column_option}` {column!r} is not in `{option}` {name}; its columns are "
                f"{', '.join(map(repr, features))}; name the right one with `{column_option}`"
                f"{without if column_option == 'label_column' else ''}",
            )
    if not isinstance(features[image_column], Image):
        raise InputError(
            "image_column",
            f"`image_column` {image_column!r} of `{option}` {name} holds {features[image_column]}, not images; name "
            "the column of the images with `image_column` (or cast it with dataset.cast_column(column, datasets.Image()))",
        )
    if label_column is None:
        return
    label = features[label_column]
    is_integer = isinstance(label, Value) and label.dtype.startswith(("int", "uint"))
    if not (isinstance(label, ClassLabel) or is_integer or (text and is_text(label))):
        raise InputError(
            "label_column",
            f"`label_column` {label_column!r} of `{option}` {name} holds {label}, not integer class labels; name "
            f"another column with `label_column`, or make them with dataset.class_encode_column({label_column!r})",
        )


def check_labels(
    label: ClassLabel | Value, nulls: int, smallest: int, largest: int, count: int, column: str
) -> tuple[list[str] | None, int]:
    """Returns the class names, or None if the labels are plain integers, and the number of classes.

    Args:
        label: the feature of the column.
        nulls: the number of rows without a label.
        smallest, largest: the range of the labels.
        count: the number of rows.
        column: a description of the column and the data set, for the error.

    Raises:
        InputError: if the labels are not class ids.
    """
    if nulls:
        raise InputError(None, f"{column} is empty in {nulls} rows")
    names = label.names if isinstance(label, ClassLabel) else None
    num_classes = len(names) if names else largest + 1
    if not names and num_classes > max(1000, count):
        raise InputError(
            None,
            f"{column} goes up to {largest} with {count} images: these are not class labels; "
            "dataset.class_encode_column(column) makes them",
        )
    if smallest < 0 or largest >= num_classes:
        raise InputError(
            None,
            f"{column} has labels from {smallest} to {largest}, but they must lie in 0 ... classes - 1; choose a "
            "`dataset_split` that is labelled",
        )
    return names, num_classes


def open_named(option: str, name: str, config_name: str | None, cache_dir: str | None, opener=load_dataset):
    """Opens a folder or a Hub name, also as `name@revision`.

    Args:
        option, name: the option that gives the data set, and its value.
        config_name: the configuration of the data set, if it has several.
        cache_dir: where downloads are kept.
        opener: `load_dataset` or `load_dataset_builder`.

    Raises:
        InputError: if the data set cannot be opened.
    """
    is_local = os.path.isdir(name)
    if not is_local and (option == "train_data_dir" or name.startswith((".", "/", "~"))):
        raise InputError(option, f"`{option}` {name} is not a folder")
    repository, _, revision = (name, "", "") if is_local else name.partition("@")
    if is_local and any(letter in name for letter in "*?["):
        raise InputError(
            option,
            f"`{option}` {name}: `datasets` would read *, ? and [ in the name of a folder of tables as a pattern; rename the "
            "folder, or make a link to it with another name",
        )
    try:
        with offline_if_out_of_reach(name):
            opened = opener(repository, config_name, cache_dir=cache_dir, revision=revision or None)
    except Exception as error:  # every reader raises its own types; all mean that the data set cannot be opened
        problem = hub_problem(error, f"datasets/{repository}")
        problem = problem or f"it cannot be opened as a data set ({first_line(cause_of(error))})"
        if isinstance(error, DatasetNotFoundError):  # which hides the Hub's own error
            problem = gated(f"datasets/{repository}") if "gated" in str(error) else UNKNOWN_TO_THE_HUB
        raise InputError(option, f"`{option}` {name}: {problem}") from error
    for data in opened.values() if isinstance(opened, dict) else ():
        refuse_paths(data, option, name)
    return opened


def refuse_paths(data: Dataset, option: str, name: str):
    """Refuses a table that holds paths instead of images, since a path could name any file on this machine.

    Paths are accepted if `datasets` or `load_image_folder` has listed the image files itself. This reads only which
    values are missing, not the images.

    Raises:
        InputError: if a row has a path and no bytes.
    """
    if lists_its_own_files(data):
        return
    for column, feature in data.features.items():
        if not isinstance(feature, Image):
            continue
        named = []
        for chunk in data.data.column(column).chunks:
            has_path = pc.is_valid(pc.struct_field(chunk, "path"))
            named.append(pc.and_(pc.is_null(pc.struct_field(chunk, "bytes")), has_path))
        named = selected(data, pa.chunked_array(named, pa.bool_()))
        if pc.any(named).as_py():
            embedding = (
                'dataset.with_format("arrow").map(datasets.table.embed_table_storage, batched=True).with_format(None)'
            )
            then = "" if option == "train_dataset" else ", and to_parquet writes the result"
            raise InputError(
                option,
                f"`{option}` {name}: row {pc.index(named, True).as_py()} of column {column!r} names a file instead of holding "
                "an image, and files that a table names are not opened; store the images themselves in the table "
                f"(if you trust the paths, {embedding} in Python reads the files into it{then}), or give the folder of the "
                "image files",
            )


def lists_its_own_files(data: Dataset) -> bool:
    """Whether the paths of a data set were listed from a folder or repository of image files, rather than read from a table.

    A folder that `save_to_disk` writes holds the images themselves. If a folder of that kind holds paths, another
    program made it, so its `builder_name` is not trusted.
    """
    folders = {os.path.dirname(file["filename"]) for file in data.cache_files}
    is_saved = any(os.path.exists(os.path.join(folder, "state.json")) for folder in folders)
    return data.info.builder_name == IMAGE_FOLDER and not is_saved


def cause_of(error: BaseException) -> BaseException:
    """The cause behind errors of `datasets` that only say that an error has occurred; else the error itself."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error


# ----------------------------------------------------------------------------------------------------------------------
# Images


def check_images(data, rows: np.ndarray, values: PixelRange | None = None):
    """Decodes the images of some rows, before any training.

    Args:
        data: returns `{"image": [...], "label": [...]}` for a list of rows.
        rows: the rows to decode.
        values: the pixel range of the data set.

    Raises:
        InputError: if over 1 % of these images cannot be decoded, or over 3 % if `rows` are only a part of the data
            set.
    """
    corrupt = []
    for row in rows.tolist():
        record = data[[row]]
        try:
            decode_image(record["image"][0], values)
        except Exception:  # PIL's readers raise many types; all mean the same here
            corrupt.append(row)
    if len(corrupt) > (0.01 if len(rows) == len(data) else 0.03) * len(rows):
        raise too_many_corrupt(corrupt, len(rows))


def too_many_corrupt(rows, out_of: int) -> InputError:
    """The error for a data set with too many damaged images: `rows` failed out of `out_of` decoded ones."""
    return InputError(
        "dataset_name",
        f"the data set given by `dataset_name` or `train_data_dir` is damaged: {len(rows)} of {out_of} images tried cannot "
        f"be decoded, which is over 1 % (rows {sorted(rows)[:5]} ...); mend or remove them",
    )


def check_corrupt_rows(rows: set[int], num_rows: int, known: int) -> int:
    """Counts the images that the processes could not decode, and warns if there are more than before.

    Args:
        rows: the rows that this process could not decode.
        num_rows: the number of rows of the data set.
        known: the number of damaged images that the log already mentions.

    Raises:
        InputError: if over 1 % of all images cannot be decoded.
    """
    found = set(gather_object(sorted(rows)))
    if len(found) > 0.01 * num_rows:
        raise too_many_corrupt(found, num_rows)
    if len(found) > known:
        logger.warning(
            f"{len(found)} of {num_rows} images cannot be decoded and are skipped (rows {sorted(found)[:5]})"
        )
    return len(found)


def first_readable(
    data, row: int, record: dict, values: PixelRange | None = None, draft_side: int | None = None
) -> tuple[PILImage.Image | None, int, list[int]]:
    """Returns the image and label of a row, or of the next row that can be decoded, and the rows that were skipped.

    If no row can be decoded, the image is None.

    Args:
        data: returns `{"image": [...], "label": [...]}` for a list of rows.
        row: the row.
        record: its `image` and `label`, already read.
        values: the pixel range of the data set.
        draft_side: see `decode_image`.
    """
    corrupt = []
    for tries in range(len(data)):
        try:
            return decode_image(record["image"], values, draft_side), record["label"], corrupt
        except Exception:  # PIL's readers raise many types; all mean the same here
            corrupt.append((row + tries) % len(data))
            following = data[[(row + tries + 1) % len(data)]]
            record = {name: values[0] for name, values in following.items()}
    return None, 0, corrupt
