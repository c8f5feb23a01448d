# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The order in which the rows of streamed parquet files are trained on, and their batches.

The row of example i is a function of (seed, i, examples per step), like everything else that is drawn for it: a resumed
run opens only the row groups that its next batches need.

An epoch goes through the row groups in random order, and through the rows of each in random order. This sequence is cut
into S lanes of equal length; every batch takes the same number of rows from each lane, always at the same positions. The
share of a process in a batch is also at fixed positions, so that it reads only the row groups of its own lanes. The
last N mod S rows of the sequence, which differ in every epoch, are not used.
"""

import bisect
import math
import weakref
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from accelerate.utils import gather_object

from ..errors import InputError
from ..random_streams import ROW_GROUPS, ROWS_OF_GROUP, random_stream
from .parquet_io import MOST_BYTES, READERS, TRAINING_SECONDS, Threads, has_failed
from .samples import TrainingSamples


MOST_LANES = 64


# ----------------------------------------------------------------------------------------------------------------------
# Order


class StreamOrder:
    """Maps example i to a row, as a function of the seed, the row groups and the examples per step.

    Example i is at position p = i mod B of step i // B. Its lane is s = floor(p S / B). In this lane it is example
    number k = (i // B) (B / S) + p mod (B / S), that is example k mod L of epoch k // L, where L = floor(N / S) and N
    is the number of rows.

    Args:
        seed: seed of the run.
        group_rows, group_bytes: rows and bytes of each row group, `[G]`.
        batch_size: B, examples per optimizer step on all processes.

    Attributes:
        num_lanes (`int`): S, the largest divisor of B up to 64 (and N) for which S row groups stay below 4 GiB.
        length (`int`): L, the rows of a lane in an epoch.
    """

    def __init__(self, seed: int, group_rows: np.ndarray, group_bytes: np.ndarray, batch_size: int):
        self.seed = seed
        self.group_rows = group_rows
        self.batch_size = batch_size
        self.first_rows = np.concatenate([[0], np.cumsum(group_rows)])
        num_rows = int(self.first_rows[-1])
        most = min(MOST_LANES, num_rows, MOST_BYTES // max(1, int(group_bytes.max())))
        self.num_lanes = max(s for s in range(1, max(1, most) + 1) if batch_size % s == 0)
        self.length = num_rows // self.num_lanes
        self._groups_of_epoch = lru_cache(maxsize=2)(self._groups_of_epoch)
        self._rows_of_group = lru_cache(maxsize=2 * self.num_lanes)(self._rows_of_group)

    def _groups_of_epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The row groups in the order of an epoch, and the end of each in the sequence of rows."""
        order = random_stream(self.seed, epoch, ROW_GROUPS).permutation(len(self.group_rows))
        return order.tolist(), np.cumsum(self.group_rows[order]).tolist()

    def _rows_of_group(self, epoch: int, group: int) -> np.ndarray:
        index = epoch * len(self.group_rows) + group
        return random_stream(self.seed, index, ROWS_OF_GROUP).permutation(self.group_rows[group])

    def locate(self, index: int) -> tuple[int, int, int]:
        """The epoch, the row group, and the position of the example within the row group in that epoch."""
        step, place = divmod(index, self.batch_size)
        share = self.batch_size // self.num_lanes
        lane, place = divmod(place, share)
        epoch, place = divmod(step * share + place, self.length)
        order, ends = self._groups_of_epoch(epoch)
        place += lane * self.length
        number = bisect.bisect_right(ends, place)
        group = order[number]
        return epoch, group, place - ends[number] + int(self.group_rows[group])

    def row_of(self, index: int) -> int:
        epoch, group, place = self.locate(index)
        return int(self.first_rows[group] + self._rows_of_group(epoch, group)[place])

    @property
    def steps_ahead(self) -> int:
        """How many steps ahead row groups are fetched: as many as use up a quarter of a row group, but 8 to 64."""
        rows_of_lane = self.batch_size / self.num_lanes
        return min(64, max(8, math.ceil(self.group_rows.mean() / 4 / rows_of_lane)))


class StreamedSamples(TrainingSamples):
    """`TrainingSamples` that are read from `ParquetRows`; only the order of the rows differs.

    Args:
        data: `ParquetRows`.
        global_batch_size: examples per optimizer step on all processes.
        Others: see `TrainingSamples`.

    Raises:
        InputError: if the processes do not see the same files.
    """

    def __init__(self, data, global_batch_size: int, seed: int, *arguments, **keywords):
        super().__init__(data, seed, *arguments, **keywords)
        self.order = StreamOrder(seed, data.group_rows, data.group_bytes, global_batch_size)
        if len(set(gather_object([data.checksum]))) > 1:
            raise InputError(
                "dataset_name",
                "`dataset_name`: the processes see different files of the data set, which has changed just now or differs "
                "between machines; run the command again",
            )

    def rows_of(self, indices: list[int]) -> np.ndarray:
        return np.array([self.order.row_of(index) for index in indices])

    def groups_of(self, indices: list[int]) -> list[int]:
        """The row groups of some examples."""
        return list(dict.fromkeys(self.order.locate(index)[1] for index in indices))


# ----------------------------------------------------------------------------------------------------------------------
# Batches


class StreamedBatches:
    """The batches of `StreamedSamples` in order, computed ahead by threads of this process.

    The threads replace worker processes, each of which would read every row group. Up to two batches per thread are in
    progress or ready. Row groups are fetched `StreamOrder.steps_ahead` steps ahead, and no others are in memory.

    Args:
        samples: the samples to batch.
        batch_sampler: the `StreamBatchSampler` of this process.
        num_threads: threads that decode; with 0, the iterating thread decodes, and row groups are still fetched ahead.
        pin_memory: whether batches are in pinned memory, for copies to a GPU.

    Raises:
        TrainingStopped: if a row group can no longer be read. Other exceptions of a thread are raised unchanged.
    """

    def __init__(self, samples: StreamedSamples, batch_sampler, num_threads: int, pin_memory: bool = False):
        self.samples, self.batch_sampler = samples, batch_sampler
        self.num_threads, self.pin_memory = num_threads, pin_memory

    def __len__(self):
        return len(self.batch_sampler)

    def _compute(self, indices: list[int]) -> dict[str, torch.Tensor]:
        batch = self.samples[indices]
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        data = self.samples.data
        data.closed.clear()
        data.retry_seconds = TRAINING_SECONDS
        readers, decoders = Threads(READERS), Threads(self.num_threads)
        upcoming = ((indices, self.samples.groups_of(indices)) for indices in self.batch_sampler)
        length = self.samples.order.steps_ahead * self.batch_sampler.accumulation
        window, batches = deque(islice(upcoming, length)), deque()

        def work_ahead():
            data.hold((group for _, groups in window for group in groups), readers.submit)
            for indices, _ in islice(window, len(batches), max(1, 2 * self.num_threads)):
                batches.append(decoders.submit(self._compute, indices) if self.num_threads else None)

        # The finalizer also runs if the process exits without closing the generator.
        end = weakref.finalize(self, end_threads, data, decoders, readers)
        try:
            work_ahead()
            while batches:
                ahead, (indices, _) = batches.popleft(), window.popleft()
                # Compute the batch now if there are no threads, or if a thread failed to compute it, maybe long ago.
                batch = self._compute(indices) if ahead is None or has_failed(ahead) else ahead.result()
                window.extend(islice(upcoming, 1))
                work_ahead()
                yield batch
        finally:
            end()


def end_threads(data, *threads: Threads):
    """Stops reading `ParquetRows` and ends the threads."""
    data.closed.set()
    data.release()
    for group in threads:
        group.close()
