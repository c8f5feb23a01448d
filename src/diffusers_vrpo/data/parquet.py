# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Streams training data from parquet files on the Hub or on a disk, one row group at a time.

Nothing is downloaded or converted first. `streamed_samples.py` defines the order of the rows and the batches.
"""

import json
import logging
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features, load_dataset_builder
from datasets.packaged_modules.parquet.parquet import Parquet
from fsspec.implementations.local import LocalFileSystem

from ..errors import InputError, TrainingStopped, first_line
from ..random_streams import NEWEST_STREAMS, ORDER, random_stream
from .image_datasets import check_columns, check_images, check_labels, is_classless, open_named, text_classes
from .image_decoding import SAMPLED_IMAGES
from .image_source import CHECKED_IMAGES, CLASS_NAMES, ImageSource, class_names
from .parquet_io import (
    MOST_BYTES,
    OPENING_SECONDS,
    READERS,
    SIGNAL_SECONDS,
    ParquetFile,
    Threads,
    has_failed,
    leaves,
    read_columns,
    read_footer,
    retried,
)
from .streamed_samples import StreamedBatches, StreamedSamples


logger = logging.getLogger(__name__)
CHECKED_GROUPS = 4  # row groups in which images are decoded before training
GROUPS_AT_ONCE = 64  # row groups whose labels are read between two checks whether all classes are found


# ----------------------------------------------------------------------------------------------------------------------
# Rows


class ParquetRows(ImageSource):
    """Training data in parquet files that are read during training; `stream_image_dataset` opens them.

    `rows[5]` is `{"image": {"bytes": ..., "path": None}, "label": ...}`, and `rows[[5, 7]]` is a dictionary of lists,
    as in the `Dataset` of `load_image_dataset`. A row group is read completely and kept until `hold` is called without
    it.

    Args:
        files: the files, in the order of the rows.
        image_column, label_column: the columns to read; without `label_column`, all images have the class 0.
        id2label: the names of the classes.
        num_classes: the number of classes.

    Attributes:
        classes: the ids of the classes that have images, in order; None if that is not known.
        label_of: the class ids of text labels; None where the labels are class ids themselves.
        group_rows: int64 `[G]`, the number of rows of each row group; empty groups are skipped.
        group_bytes: int64 `[G]`, the size of each group's images and labels in memory.
        checksum (`int`): CRC-32 of the files' names, sizes and footers, and of the columns.
        closed (`threading.Event`): once it is set, failing reads are not retried.
        interrupted: returns whether a signal has arrived; from then on, a read that has failed for 10 seconds is given up.
        retry_seconds: how long a failing read is retried; `StreamedBatches` sets it to `TRAINING_SECONDS`.
    """

    random_access = False

    def __init__(
        self,
        files: list[ParquetFile],
        image_column: str,
        label_column: str | None,
        id2label: dict[int, str] | None = None,
        num_classes: int = 0,
    ):
        self.files, self.columns = files, [name for name in (image_column, label_column) if name is not None]
        self.id2label, self.num_classes = id2label, num_classes
        self.classes: list[int] | None = None
        self.label_of: dict[str, int] | None = None
        self.groups = [
            (file, number)
            for file in files
            for number in range(file.metadata.num_row_groups)
            if file.metadata.row_group(number).num_rows
        ]
        groups = [file.metadata.row_group(number) for file, number in self.groups]
        self.group_rows = np.array([group.num_rows for group in groups], dtype=np.int64)
        sizes = [sum(leaf.total_uncompressed_size for leaf in leaves(group, self.columns)) for group in groups]
        self.group_bytes = np.array(sizes, dtype=np.int64)
        self.first_rows = np.concatenate([[0], np.cumsum(self.group_rows)])
        content = [[Path(file.path).name, file.size, file.checksum] for file in files]
        self.checksum = zlib.crc32(json.dumps([content, self.columns]).encode())
        self.closed = threading.Event()
        self.interrupted: Callable[[], bool] = lambda: False
        self.retry_seconds = OPENING_SECONDS
        self._held: dict[int, Future] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, rows: int | list[int]) -> dict:
        if isinstance(rows, (int, np.integer)):
            return self._record(int(rows))
        records = [self._record(row) for row in rows]
        return {name: [record[name] for record in records] for name in ("image", "label")}

    def _record(self, row: int) -> dict:
        group = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        table, place = self._table(group), row - int(self.first_rows[group])
        values = [table.column(name)[place].as_py() for name in self.columns]
        image, label = values if len(values) == 2 else (values[0], 0)
        if self.label_of is not None:
            label = self.label_of[text_of(label)]
        if not isinstance(image, dict):
            image = {"path": image} if isinstance(image, str) else {"bytes": image}
        # A path in a table could name any file of this machine, and is not opened.
        return {"image": {"bytes": image.get("bytes"), "path": None}, "label": label}

    def _table(self, group: int) -> pa.Table:
        with self._lock:
            future = self._held.get(group)
            # A prefetch that failed is retried: the failure may have been long ago.
            mine = future is None or has_failed(future)
            if mine:
                future = self._held[group] = Future()
        if mine:
            self._read_into(group, future)
        return future.result()

    def _read_into(self, group: int, future: Future):
        try:
            future.set_result(self.read_group(group))
        except BaseException as error:
            future.set_exception(error)

    def read_group(self, group: int) -> pa.Table:
        """Reads the columns of a row group.

        Raises:
            TrainingStopped: if it cannot be read.
        """
        file, number = self.groups[group]
        try:
            action = partial(read_columns, file, number, self.columns)
            return retried(action, file.path, self.retry_seconds, self._give_up)
        except Exception as error:  # from the file system, or from pyarrow if the file has changed
            raise TrainingStopped(
                f"{file.path} can no longer be read (row group {number}: {first_line(error)}); fix that and run the same "
                "command again: it continues from the newest checkpoint"
            ) from error

    def _give_up(self, seconds: float) -> bool:
        return self.closed.is_set() or (seconds >= SIGNAL_SECONDS and self.interrupted())

    def hold(self, groups: Iterable[int], submit: Callable):
        """Keeps only some row groups in memory, and fetches those that are missing, in order.

        Args:
            groups: the row groups to keep.
            submit: called as `submit(function, *arguments)`; runs the function, here or in a thread.
        """
        with self._lock:
            wanted = dict.fromkeys(groups)
            self._held = {group: future for group, future in self._held.items() if group in wanted}
            for group in wanted:
                if group not in self._held:
                    future = self._held[group] = Future()
                    submit(self._read_into, group, future)

    def release(self):
        """Drops all row groups; a thread that waits for one gets a `CancelledError`."""
        with self._lock:
            for future in self._held.values():
                future.cancel()
            self._held = {}

    # ------------------------------------------------------------------------------------------------------------------
    # As training data

    def sampled_rows(self) -> list[int]:
        """The first rows of the row groups that `check` reads."""
        groups = random_stream(0, 0, ORDER).permutation(len(self.group_rows))[:CHECKED_GROUPS]
        rows = [self.first_rows[group] + np.arange(self.group_rows[group]) for group in groups]
        return np.concatenate(rows)[:SAMPLED_IMAGES].tolist()

    def check(self):
        """Decodes random rows of at most four row groups, the same for every run.

        Raises:
            InputError: if too many of them are damaged, or the values of their pixels have no known range.
        """
        generator = random_stream(0, 0, ORDER)
        rows = []
        for group in generator.permutation(len(self.group_rows))[:CHECKED_GROUPS].tolist():
            places = generator.permutation(self.group_rows[group])[: -(-CHECKED_IMAGES // CHECKED_GROUPS)]
            rows.append(self.first_rows[group] + places)
        check_images(self, np.concatenate(rows), self.pixel_range)

    def classes_with_images(self) -> list[int] | None:
        """The ids of the classes that have images, in order; None if that is not known without reading all labels."""
        return self.classes

    def fingerprint(self) -> dict:
        """Returns the class names, and CRC-32 of the columns and of the files' names, sizes and footers."""
        return {CLASS_NAMES: class_names(self), "the checksum of the streamed files": self.checksum}

    def samples(
        self,
        *,
        seed: int,
        resolution: int,
        latent_shape: tuple[int, int, int],
        null_class_id: int | None,
        label_dropout: float = 0.1,
        center_crop: bool = True,
        random_flip: bool = False,
        sample_posterior: bool = False,
        num_tokens: int | None = None,
        encoders: list = (),
        global_batch_size: int,
        stream_version: int = NEWEST_STREAMS,
    ) -> StreamedSamples:
        """`StreamedSamples` of the images; the order of the rows depends on `global_batch_size`.

        Raises:
            InputError: if the processes do not see the same files.
        """
        return StreamedSamples(
            self,
            global_batch_size,
            seed,
            resolution,
            latent_shape,
            null_class_id,
            label_dropout,
            center_crop,
            random_flip,
            sample_posterior,
            num_tokens,
            self.pixel_range,
            stream_version,
            self.draft_side(resolution),
        )

    def loader(self, samples: StreamedSamples, batch_sampler, num_workers: int, pin_memory: bool):
        """`StreamedBatches`, which uses threads: worker processes would each read every row group."""
        return StreamedBatches(samples, batch_sampler, num_workers, pin_memory)

    def fixed_rows(self, count: int) -> np.ndarray:
        """Returns at most `count` rows of random row groups, one group after another, the same for every run."""
        groups = random_stream(0, 0, ORDER).permutation(len(self.group_rows))
        groups = groups[: np.searchsorted(np.cumsum(self.group_rows[groups]), count) + 1]
        return np.concatenate([self.first_rows[g] + np.arange(self.group_rows[g]) for g in groups])[:count]

    def examples(self, rows: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """As `ImageSource.examples`; the last row group stays in memory, as the next rows may begin in it."""
        images_and_labels = super().examples(rows, resolution)
        last = int(np.searchsorted(self.first_rows, rows[-1], side="right")) - 1
        self.hold([last], lambda read, *arguments: read(*arguments))
        return images_and_labels

    def give_up_when(self, interrupted: Callable[[], bool]):
        """Once `interrupted()` is true, a read that has failed for 10 seconds is given up."""
        self.interrupted = interrupted


def stream_image_dataset(
    dataset_name: str,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    cache_dir: str | None = None,
) -> ParquetRows:
    """Opens the parquet files of a Hub name or a folder. Unlike `load_image_dataset`, it does not download them.

    It reads only the files' footers. It also reads the column of the labels if it holds text or the footers have no
    statistics of it and, on a local disk, until all classes are found. On the Hub, all files are read from one commit
    for the whole run.

    Raises:
        InputError: if the data set, split or column does not exist, the files are not parquet, or the labels are not
            class ids.
    """
    source = f"`dataset_name` {dataset_name}"
    builder = open_named("dataset_name", dataset_name, dataset_config_name, cache_dir, load_dataset_builder)
    splits = builder.config.data_files
    if not (isinstance(builder, Parquet) and splits):
        kind = type(builder).__mro__[1].__name__
        raise InputError(
            None,
            f"{source}: `streaming` reads parquet files, and this data set is read by the {kind} reader of datasets; "
            f"{dataset_name.partition('@')[0]}@refs/convert/parquet is the Hub's parquet copy, if it has one, "
            "Dataset.to_parquet writes one, and `vrpo prepare` reads any format",
        )
    if split not in splits:
        raise InputError(
            "dataset_split", f"`dataset_split` {split!r} is not in {source}; it has {', '.join(map(repr, splits))}"
        )
    files = open_files(splits[split], source)
    schema = files[0].metadata.schema.to_arrow_schema()
    features = builder.info.features or Features.from_arrow_schema(schema)
    classless = is_classless(features, "dataset_name", dataset_name, label_column)
    if classless:
        label_column = None
    check_columns(features, "dataset_name", dataset_name, image_column, label_column, text=True)
    columns = [image_column] if classless else [image_column, label_column]
    types = {name: schema.field(name).type for name in columns if name in schema.names}
    for file in files:
        found = file.metadata.schema.to_arrow_schema()
        if len(types) < len(columns) or any(
            name not in found.names or found.field(name).type != types[name] for name in types
        ):
            raise InputError(
                None,
                f"{source}: {file.path} has the columns {', '.join(map(repr, found.names))}, but `streaming` needs "
                f"{' and '.join(map(repr, columns))} of one type in all files; train without `streaming`",
            )
    column = f"`label_column` {label_column!r} of {source}"
    of_text = not classless and holds_text(types[label_column])
    if not (classless or of_text or pa.types.is_integer(types[label_column])):
        raise InputError(
            "label_column",
            f"{column} is stored as {types[label_column]}, and `streaming` reads integers and text; train without "
            "`streaming`",
        )
    rows = ParquetRows(files, image_column, label_column)
    if len(rows) == 0:
        raise InputError("dataset_split", f"`dataset_split` {split!r} of {source} has no images")
    if (largest := int(rows.group_bytes.max())) > MOST_BYTES:
        raise InputError(
            None,
            f"{source}: a row group has {largest / 1e9:.1f} GB, and `streaming` holds at most {MOST_BYTES / 1e9:.1f} GB; "
            "write the files with smaller ones, as Dataset.to_parquet does",
        )
    if classless:
        rows.num_classes, rows.classes = 1, [0]
    elif of_text:
        read_text_classes(rows, features[label_column], source, column)
    else:
        nulls, labels, unread = labels_in_footers(rows, source)
        least, most = min(labels, default=0), max(labels, default=0)
        names, rows.num_classes = check_labels(features[label_column], nulls, least, most, len(rows), column)
        rows.id2label = dict(enumerate(names)) if names else None
        rows.classes = classes_in(rows, source, labels, unread)
    return rows


def open_files(urls: list[str], source: str) -> list[ParquetFile]:
    """Reads the footers of files, several at a time.

    Raises:
        InputError: if a file cannot be read.
    """

    def footer(place):
        fs, path = place
        try:
            return retried(partial(read_footer, fs, path), path)
        except Exception as error:  # from the file system, or from pyarrow if it is not parquet
            raise InputError(
                None, f"{source}: {path} cannot be read ({first_line(error)}); copy or download it again"
            ) from error

    # The file systems are made in this thread: in others, fsspec would create new ones, without the known folder
    # listings.
    return in_threads(footer, [fsspec.core.url_to_fs(str(url)) for url in urls])


def labels_in_footers(rows: ParquetRows, source: str) -> tuple[int, set[int], list[tuple[ParquetFile, int]]]:
    """Collects labels from the statistics in the footers; the labels of row groups without statistics are read.

    Returns:
        the number of rows without a label; the labels that are known to occur, among them the smallest and the
        largest; the row groups that may have further labels.
    """
    nulls, labels, without, unread = 0, set(), [], []
    for file, number in rows.groups:
        (leaf,) = leaves(file.metadata.row_group(number), rows.columns[1:])
        known = leaf.statistics
        if known is None or not known.has_null_count:
            without.append((file, number))
        elif known.null_count == leaf.num_values:
            nulls += known.null_count
        elif not known.has_min_max:
            without.append((file, number))
        else:
            nulls += known.null_count
            labels |= {known.min, known.max}
            if known.min != known.max:
                unread.append((file, number))
    for count, values in distinct_labels(rows, without, source):
        nulls += count
        labels.update(values)
    return nulls, labels, unread


def classes_in(
    rows: ParquetRows, source: str, labels: set[int], unread: list[tuple[ParquetFile, int]]
) -> list[int] | None:
    """Returns the classes that have images, in order; None if that is not known.

    On a local disk, labels are read until all classes are found; on the Hub, they are not read.

    Args:
        labels: the labels that are known to occur.
        unread: the row groups that may have further labels.
    """
    labels = set(labels)
    is_local = all(isinstance(file.fs, LocalFileSystem) for file in rows.files)
    for first in range(0, len(unread) if is_local else 0, GROUPS_AT_ONCE):
        if len(labels) == rows.num_classes:
            break
        for _, values in distinct_labels(rows, unread[first : first + GROUPS_AT_ONCE], source):
            labels.update(values)
    return sorted(labels) if is_local or not unread or len(labels) == rows.num_classes else None


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text or truth values, which can become classes."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)


def text_of(label: str | bool) -> str:
    """A label as text; truth values are spelled as arrow spells them, and so as in a data set that is not streamed."""
    return str(label).lower() if isinstance(label, bool) else label


def read_text_classes(rows: ParquetRows, feature, source: str, column: str):
    """Sets the classes of rows with text labels, after reading the column of the labels from all files.

    Args:
        rows: the rows whose classes are set.
        feature: the feature of the column; if it is a `ClassLabel`, its names are the classes.
        source, column: descriptions of the data set and of the column, for the log and errors.

    Raises:
        InputError: if the column cannot be read, a label is missing, or the texts are not classes.
    """
    logger.info(f"{column} holds text: reading that column of {len(rows.groups)} row groups")
    nulls, texts = 0, set()
    for count, values in distinct_labels(rows, rows.groups, source):
        nulls += count
        texts.update(text_of(value) for value in values)
    if not isinstance(feature, ClassLabel):
        names = text_classes(texts, nulls, len(rows), column)
    elif nulls:
        raise InputError(None, f"{column} is empty in {nulls} rows")
    elif unknown := texts.difference(feature.names):
        raise InputError(None, f"{column} has the label {min(unknown)!r}, which is not among the names of its classes")
    else:
        names = feature.names
    rows.id2label, rows.num_classes = dict(enumerate(names)), len(names)
    rows.label_of = {name: label for label, name in enumerate(names)}
    rows.classes = sorted(rows.label_of[text] for text in texts)


def distinct_labels(
    rows: ParquetRows, groups: list[tuple[ParquetFile, int]], source: str
) -> list[tuple[int, list[int | str | bool]]]:
    """Reads the column of the labels; returns for each row group the number of missing labels and the distinct labels.

    Raises:
        InputError: if it cannot be read.
    """

    def of_group(group):
        file, number = group
        try:
            labels = retried(partial(read_columns, file, number, rows.columns[1:]), file.path).column(0)
        except Exception as error:  # from the file system, or from pyarrow if the file is damaged
            raise InputError(
                None, f"{source}: {file.path} cannot be read ({first_line(error)}); copy or download it again"
            ) from error
        return labels.null_count, pc.unique(labels.drop_null()).to_pylist()

    return in_threads(of_group, groups)


def in_threads(function: Callable, items: Iterable) -> list:
    """Calls the function on all items in threads, and returns the results in order."""
    threads = Threads(2 * READERS)
    try:
        return [future.result() for future in [threads.submit(function, item) for item in items]]
    finally:
        threads.close()
