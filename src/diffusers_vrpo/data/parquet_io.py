# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Reads byte ranges of parquet files, on a disk or on the Hub, and retries transient errors."""

import contextlib
import io
import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import first_line


logger = logging.getLogger(__name__)
# Limit in bytes for one row group of each lane together, and so for a single row group: with large row groups there
# are fewer lanes (`StreamOrder`).
MOST_BYTES = 4 << 30
READERS = 8  # threads that fetch row groups
SIGNAL_SECONDS = 10  # how long a read must have been failing before a signal ends it
FOOTER_BYTES = 1 << 16  # read first from the end of a file; more if the footer is longer
GAP_BYTES = 1 << 20  # columns with at most this many unneeded bytes between them are read in one request
# A failed read is retried after one second, two, four ... and then every half minute, in addition to huggingface_hub's
# own retries. Before training, a wrong name should be reported soon; during training, it is better to wait than to
# stop.
FIRST_DELAY, LONGEST_DELAY = 1, 30
OPENING_SECONDS, TRAINING_SECONDS = 60, 20 * 60


# ----------------------------------------------------------------------------------------------------------------------
# Files


@dataclass
class ParquetFile:
    """A parquet file whose footer has been read."""

    fs: fsspec.AbstractFileSystem
    path: str
    size: int
    metadata: pq.FileMetaData
    checksum: int  # CRC-32 of the footer, which holds the place, size and statistics of all columns


class DamagedFile(ValueError):
    """Raised when a file was read but its content is not what it should be; reading it again does not help."""


def retried(action: Callable, what: str, seconds: float | None = None, give_up: Callable[[float], bool] | None = None):
    """Calls `action` and returns its result, retrying it after 1, 2, 4, ... and at most 30 seconds while it fails.

    Args:
        action: is not retried after a `DamagedFile`.
        what: description of the action, for the log.
        seconds: how long it is retried, with a last try at the end; by default, and at most for a file that is
            missing, `OPENING_SECONDS`.
        give_up: takes the seconds since the start and returns whether to stop retrying; called twice per second.

    Raises:
        the last exception of `action`.
    """
    seconds = OPENING_SECONDS if seconds is None else seconds
    give_up = give_up or (lambda _: False)
    start, delay = time.monotonic(), FIRST_DELAY
    while True:
        try:
            return action()
        except DamagedFile:
            raise
        except Exception as error:  # every file system raises its own types
            passed = time.monotonic() - start
            # A deleted file does not come back, but a network file system may show a new one late.
            seconds = min(seconds, OPENING_SECONDS) if isinstance(error, FileNotFoundError) else seconds
            if passed >= seconds or give_up(passed):
                raise
            wait = min(delay, seconds - passed)
            logger.warning(f"{what}: {first_line(error)}; trying again in {wait:.3g} s")
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0 and not give_up(time.monotonic() - start):
            time.sleep(min(left, 0.5))
        delay = min(2 * delay, LONGEST_DELAY)


def read_range(fs: fsspec.AbstractFileSystem, path: str, start: int, end: int) -> bytes:
    """Reads the bytes `start` to `end` of a file in one request.

    Raises:
        OSError: if the file ends before `end`; and whatever the file system raises.
    """
    with fs.open(path, "rb", cache_type="none") as file:
        file.seek(start)
        data = file.read(end - start)
    if len(data) != end - start:
        raise OSError(f"got {len(data)} bytes instead of {end - start}, from byte {start} on")
    return data


def read_footer(fs: fsspec.AbstractFileSystem, path: str) -> ParquetFile:
    """Opens a parquet file by reading its footer.

    Raises:
        DamagedFile: if it is not a parquet file; and whatever the file system raises.
    """
    size = fs.size(path)
    tail = read_range(fs, path, max(0, size - FOOTER_BYTES), size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if FOOTER_BYTES < length <= size:
        tail = read_range(fs, path, size - length, size)
    try:
        metadata = pq.read_metadata(pa.BufferReader(tail))
    except (OSError, pa.ArrowException) as error:
        raise DamagedFile(first_line(error)) from error
    return ParquetFile(fs, path, size, metadata, zlib.crc32(tail[-length:]))


class Ranges(io.RawIOBase):
    """A file object for pyarrow with some byte ranges of a file; `parts` maps the start of each range to its bytes."""

    def __init__(self, size: int, parts: dict[int, bytes]):
        self.size = size
        self.parts = parts
        self.place = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.place

    def seek(self, offset, whence=io.SEEK_SET):
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def read(self, size=-1):
        for start, part in self.parts.items():
            first = self.place - start
            if first >= 0 and first + size <= len(part):
                self.place += size
                return part[first : first + size]
        raise OSError(f"{size} bytes at {self.place} are outside of the columns")


def leaves(group: pq.RowGroupMetaData, columns: list[str]) -> list[pq.ColumnChunkMetaData]:
    """The column chunks of these columns; a struct column has several."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return [
        chunk
        for chunk in chunks
        if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns)
    ]


def read_columns(file: ParquetFile, group: int, columns: list[str]) -> pa.Table:
    """Reads some columns of a row group.

    Raises:
        OSError: and whatever else the file system or pyarrow raises.
    """
    ranges: list[list[int]] = []
    for chunk in leaves(file.metadata.row_group(group), columns):
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        end = start + chunk.total_compressed_size
        if ranges and 0 <= start - ranges[-1][1] <= GAP_BYTES:
            ranges[-1][1] = end
        else:
            ranges.append([start, end])
    parts = {start: read_range(file.fs, file.path, start, end) for start, end in ranges}
    # Decode from memory in this thread only, so that pyarrow's threads do not wait for Python.
    reader = pq.ParquetFile(Ranges(file.size, parts), metadata=file.metadata, pre_buffer=False)
    return reader.read_row_group(group, columns=columns, use_threads=False)


class Threads:
    """A thread pool like `ThreadPoolExecutor`, except that the process can exit while a thread waits for a server."""

    def __init__(self, number: int):
        self.tasks = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(number)]
        for thread in self.threads:
            thread.start()

    def submit(self, function: Callable, *arguments) -> Future:
        future = Future()
        self.tasks.put((future, function, arguments))
        return future

    def _work(self):
        while (task := self.tasks.get()) is not None:
            future, function, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # raised in the thread that asks for the result
                    future.set_exception(error)
            del task, future, function, arguments  # otherwise the last result would stay in memory

    def close(self):
        """Lets the threads finish their current tasks but start no others, and waits for them for at most 2 seconds.

        A thread that is inside C++ code when the interpreter exits could abort the process.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                self.tasks.get_nowait()[0].cancel()
        for _ in self.threads:
            self.tasks.put(None)
        end = time.monotonic() + 2
        for thread in self.threads:
            thread.join(max(0, end - time.monotonic()))


def has_failed(future: Future) -> bool:
    """Whether the future has ended with an exception."""
    return future.done() and not future.cancelled() and future.exception() is not None
