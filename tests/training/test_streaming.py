# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Training straight from parquet files: the order, who reads what, resuming, servers and files that fail."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo import trainer as trainer_module
from diffusers_vrpo.data import parquet, parquet_io, streamed_samples
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.parquet import stream_image_dataset
from diffusers_vrpo.data.samples import StreamBatchSampler
from diffusers_vrpo.data.streamed_samples import StreamedBatches, StreamedSamples, StreamOrder
from diffusers_vrpo.errors import InputError, TrainingStopped
from support.data import numbered, png, write_files
from support.paths import TRAINING_SCRIPT
from support.processes import no_network_environment
from support.training import assert_same_files, losses, run, train_vrpo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("streaming") / "numbered")


def stream(folder, global_batch_size=16, seed=3, **options) -> StreamedSamples:
    data = stream_image_dataset(folder)
    arguments = {"resolution": 8, "latent_shape": (3, 8, 8), "null_class_id": 10, "num_tokens": 16, **options}
    return StreamedSamples(data, global_batch_size, seed, **arguments)


def rows_in(batch) -> list[int]:
    return [int(red) + 256 * int(green) for red, green, _ in batch["pixels"][:, :, 0, 0].tolist()]


def counted(samples: StreamedSamples) -> list[int]:
    """The row groups that are read from now on."""
    reads, original = [], samples.data.read_group
    samples.data.read_group = lambda group: reads.append(group) or original(group)
    return reads


# Rows


def test_rows_and_classes_are_those_of_load_dataset(folder, tmp_path):
    expected, names, num_classes = load_image_dataset(folder, cache_dir=str(tmp_path))
    rows = stream_image_dataset(folder)
    assert (rows.id2label, rows.num_classes, len(rows)) == (names, num_classes, len(expected))
    assert names[3] == "class 3"
    assert len(rows.files) == 2 and set(rows.group_rows) == {10, 2, 1}
    for row in range(len(rows)):
        assert rows[row]["label"] == expected[row]["label"]
        assert rows[row]["image"]["bytes"] == expected[row]["image"]["bytes"]
    few = rows[[5, 402, 7]]
    assert few["label"] == [5, 2, 7] and few["image"][1]["bytes"] == numbered(402)


def test_plain_integers_and_labels_without_statistics(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "data", rows=35, files=1, names=None, write_statistics=False)
    columns, original = [], parquet.read_columns
    monkeypatch.setattr(parquet, "read_columns", lambda *a: columns.append(a[2]) or original(*a))
    rows = stream_image_dataset(folder)
    assert rows.id2label is None and rows.num_classes == 10 and columns == [["label"]] * 4


def test_only_the_two_columns_are_fetched_in_one_request(tmp_path, monkeypatch):
    rows = stream_image_dataset(write_files(tmp_path / "data", rows=30, files=1))
    asked, original = [], parquet_io.read_range
    monkeypatch.setattr(parquet_io, "read_range", lambda fs, path, *r: asked.append(r) or original(fs, path, *r))
    rows.read_group(1)
    ((start, end),) = asked
    group = rows.files[0].metadata.row_group(1)
    ends = [column.total_compressed_size for column in (group.column(i) for i in range(group.num_columns))]
    image = group.column(0)
    assert start == (image.dictionary_page_offset if image.has_dictionary_page else image.data_page_offset)
    assert end - start <= sum(ends)
    monkeypatch.setattr(parquet_io, "GAP_BYTES", 0)  # the column in between is left out
    del asked[:]
    table = rows.read_group(1)
    assert len(asked) == 2 and table.column("label").to_pylist() == list(range(10))


def test_damaged_images_and_the_sample_that_is_tried(tmp_path):
    images = [png(row % 256) for row in range(200)]
    images[4] = b"not an image"
    folder = write_files(tmp_path / "one", rows=200, files=1, images=images)
    samples = stream(folder, 8)
    reads = counted(samples)
    samples.data.check()
    assert len(reads) == 4
    found = [batch["corrupt_rows"].tolist() for batch in StreamedBatches(samples, sampler(0, 25, 8), 1)]
    assert sum(found, []) == [4]
    folder = write_files(tmp_path / "all", rows=200, files=1, images=[b"not an image"] * 200)
    with pytest.raises(InputError, match="40 of 40 images tried cannot be decoded"):
        stream(folder, 8).data.check()


def test_a_path_in_a_remote_file_is_not_opened(tmp_path):
    import fsspec

    (tmp_path / "secret.png").write_bytes(png(1))
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "label": [0]}
    table = Dataset.from_dict(rows, features=features).data.table
    fs = fsspec.filesystem("memory")
    with fs.open("/remote/train.parquet", "wb") as file:
        pq.write_table(table, file)
    (opened,) = parquet.open_files(["memory://remote/train.parquet"], "")
    data = parquet.ParquetRows([opened], "image", "label")
    assert data[0] == {"image": {"bytes": None, "path": None}, "label": 0}


# Order


def sampler(start=0, steps=3, batch_size=16, rank=0, processes=1, accumulation=1, repeats=1) -> StreamBatchSampler:
    return StreamBatchSampler(start, steps, batch_size, rank, processes, accumulation, repeats)


@pytest.mark.parametrize("batch_size, num_lanes", [(16, 16), (24, 24), (1, 1), (7, 7), (256, 64), (100, 50)])
def test_an_epoch_takes_every_row_once(batch_size, num_lanes):
    group_rows = np.array([10] * 30 + [1, 90, 7, 5])
    order = StreamOrder(1, group_rows, group_rows * 1000, batch_size)
    assert order.num_lanes == num_lanes
    epochs = {0: [], 1: [], 2: []}
    for index in range(5 * 403):
        epoch, _, _ = order.locate(index)
        if epoch in epochs:
            epochs[epoch].append(order.row_of(index))
    for rows in epochs.values():
        # At most S - 1 rows are left out.
        assert len(rows) == len(set(rows)) == 403 // num_lanes * num_lanes and set(rows) <= set(range(403))
    assert epochs[0] != epochs[1] != epochs[2]
    left_out = [set(range(403)) - set(rows) for rows in epochs.values()]
    assert 403 % num_lanes == 0 or left_out[0] != left_out[1]
    other = StreamOrder(2, group_rows, group_rows * 1000, batch_size)
    assert [other.row_of(i) for i in range(100)] != epochs[0][:100]


def test_rows_are_mixed():
    """Batches of a data set that is sorted by class have nearly as many classes as of a shuffled one."""
    order = StreamOrder(0, np.full(100, 100), np.full(100, 10_000), 64)
    labels = np.array([[order.row_of(64 * step + i) // 100 for i in range(64)] for step in range(150)])
    classes = np.mean([len(set(batch)) for batch in labels])
    shuffled = 100 * (1 - (1 - 1 / 100) ** 64)
    assert classes > 0.95 * shuffled
    # Neighbours in a stream are not neighbours in the files.
    rows = np.array([order.row_of(64 * step) for step in range(150)])
    assert abs(np.corrcoef(rows[1:100] % 100, rows[:99] % 100)[0, 1]) < 0.4


def test_large_row_groups_make_fewer_streams():
    rows = np.full(10, 1000)
    assert StreamOrder(0, rows, np.full(10, 1 << 30), 64).num_lanes == 4
    assert StreamOrder(0, rows, np.full(10, 4 << 30), 64).num_lanes == 1
    assert StreamOrder(0, np.array([5]), np.array([100]), 16).num_lanes == 4


@pytest.mark.parametrize("threads", [0, 2])
def test_every_division_gives_the_same_steps(folder, threads):
    def steps(batch_size, processes, accumulation):
        result = [[] for _ in range(40)]
        for rank in range(processes):
            batches = sampler(32, 40, batch_size, rank, processes, accumulation)
            for number, batch in enumerate(StreamedBatches(stream(folder), batches, threads)):
                result[number // accumulation] += zip(
                    batch["index"].tolist(), rows_in(batch), batch["noise"].sum((1, 2, 3)).tolist()
                )
        return [sorted(step) for step in result]

    expected = steps(16, 1, 1)
    assert [[i for i, _, _ in step] for step in expected] == [list(range(32 + 16 * k, 48 + 16 * k)) for k in range(40)]
    assert steps(8, 2, 1) == steps(8, 1, 2) == steps(4, 2, 2) == expected


def test_policy_epochs_repeat_the_batch(folder):
    batches = list(StreamedBatches(stream(folder), sampler(0, 4, 8, accumulation=2, repeats=2), 1))
    rows = [rows_in(batch) for batch in batches]
    assert rows[0:2] == rows[2:4] and rows[4:6] == rows[6:8] and rows[0:2] != rows[4:6]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_process_reads_its_share_of_the_row_groups_once(tmp_path, accumulation):
    folder = write_files(tmp_path / "data", rows=1600, files=2, group_rows=10)
    every, held = [], 0
    for rank in range(4):
        samples = stream(folder)
        reads = counted(samples)
        epoch = samples.order.length  # steps of 16 samples in 16 streams
        assert epoch == 100 and samples.order.steps_ahead == 8
        batches = sampler(0, epoch, 4 // accumulation, rank, 4, accumulation)
        for _ in StreamedBatches(samples, batches, 1):
            held = max(held, len(samples.data._held))
        # Four of 16 streams, each of 10 row groups; where streams meet within one, both read it.
        assert len(reads) == len(set(reads)) <= 40 + 4
        every += reads
    assert set(every) == set(range(160)) and len(every) <= 160 + 16
    # In memory: one row group of each of the four streams, and the next one of those that need it within 8 steps.
    assert held <= 8


def test_resuming_reads_nothing_but_the_next_batches(folder):
    straight = list(StreamedBatches(stream(folder), sampler(0, 60), 2))
    samples = stream(folder)
    reads = counted(samples)
    resumed = StreamedBatches(samples, sampler(45 * 16, 15), 2)
    for number, (batch, expected) in enumerate(zip(resumed, straight[45:])):
        for name in expected:
            assert torch.equal(batch[name], expected[name]), name
        if number == 0:
            assert len(reads) <= 2 * 16
    assert number == 14


# What fails


@pytest.fixture
def no_delay(monkeypatch):
    """A hundredth of a second in place of minutes."""
    monkeypatch.setattr(parquet_io, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(parquet, "OPENING_SECONDS", 0.01)
    monkeypatch.setattr(parquet_io, "OPENING_SECONDS", 0.01)
    monkeypatch.setattr(streamed_samples, "TRAINING_SECONDS", 0.01)


def test_a_dropped_connection_is_tried_again(folder, monkeypatch, no_delay, caplog):
    expected = [rows_in(batch) for batch in StreamedBatches(stream(folder), sampler(steps=30), 2)]
    original, calls = parquet_io.read_range, []

    def flaky(fs, path, start, end):
        calls.append(0)
        if len(calls) % 3:
            return original(fs, path, start, end)[: 20 if len(calls) % 2 else None]
        raise ConnectionError("connection reset")

    samples = stream(folder)
    monkeypatch.setattr(streamed_samples, "TRAINING_SECONDS", 60)
    monkeypatch.setattr(parquet_io, "read_range", flaky)
    assert [rows_in(batch) for batch in StreamedBatches(samples, sampler(steps=30), 2)] == expected
    assert "connection reset; trying again in 0.001 s" in caplog.text


class Clock:
    """Stands in for `time`: sleeping takes no time but counts."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize("training, seconds", [(False, 60), (True, 20 * 60)])
def test_how_long_an_outage_may_last(folder, monkeypatch, training, seconds):
    samples, clock, tried = stream(folder), Clock(), []

    def down(*arguments):
        tried.append(clock.now)
        raise ConnectionError("no route to host")

    if training:
        next(iter(StreamedBatches(samples, sampler(), 1)))  # which ends at once
        samples.data.closed.clear()
    samples.data.release()
    monkeypatch.setattr(parquet_io, "time", clock)
    monkeypatch.setattr(parquet_io, "read_range", down)
    with pytest.raises(TrainingStopped, match="no route to host"):
        samples.data.read_group(0)
    assert tried[:6] == [0, 1, 3, 7, 15, 31] and tried[-1] == seconds
    assert np.diff(tried).max() == (30 if training else 29)
    # A signal need not wait for that, but a read that has just failed may yet succeed.
    del tried[:]
    clock.now, samples.data.interrupted = 0.0, lambda: True
    with pytest.raises(TrainingStopped):
        samples.data.read_group(0)
    assert tried == [0, 1, 3, 7, 10]


def test_what_could_not_be_fetched_ahead_is_read_when_it_is_due(folder, monkeypatch, no_delay):
    data, original = stream(folder).data, parquet_io.read_range

    def down(*arguments):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(parquet_io, "read_range", down)
    data.hold([0, 1], lambda read, *arguments: read(*arguments))
    with pytest.raises(TrainingStopped, match="no route to host"):
        data[0]
    monkeypatch.setattr(parquet_io, "read_range", original)
    data.hold([0, 1], lambda *arguments: pytest.fail("it is not fetched ahead again"))
    assert data[0]["image"]["bytes"] == numbered(0) and data[15]["image"]["bytes"] == numbered(15)
    data.read_group = lambda group: pytest.fail("it is in memory")
    assert data[1]["label"] == 1


@pytest.mark.parametrize("damage", ["vanish", "shrink", "overwrite"])
def test_a_file_that_is_damaged_on_the_way(tmp_path, no_delay, damage):
    folder = write_files(tmp_path / "data")
    path = tmp_path / "data" / "data" / "train-00001-of-00002.parquet"
    batches = iter(StreamedBatches(stream(folder), sampler(steps=100), 2))
    next(batches)
    if damage == "vanish":
        path.unlink()
    elif damage == "shrink":
        os.truncate(path, 500)
    else:
        path.write_bytes(bytes(path.stat().st_size))
    before = threading.active_count()
    with pytest.raises(
        TrainingStopped, match=r"train-00001-of-00002.parquet can no longer be read \(row group .*\); fix that"
    ):
        for _ in batches:
            pass
    assert threading.active_count() < before


def test_an_error_of_a_thread_is_raised_in_order(folder):
    samples = stream(folder)
    original = samples.__getitem__

    def failing(indices):
        if indices[0] == 48:
            raise ZeroDivisionError("in a thread")
        return original(indices)

    samples.__class__ = type("Failing", (StreamedSamples,), {"__getitem__": lambda self, indices: failing(indices)})
    seen = []
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        for batch in StreamedBatches(samples, sampler(steps=9), 2):
            seen.append(int(batch["index"][0]))
    assert seen == [0, 16, 32]


def test_a_batch_that_failed_ahead_is_computed_when_it_is_due(folder):
    expected = [rows_in(batch) for batch in StreamedBatches(stream(folder), sampler(steps=9), 2)]
    samples, later = stream(folder), threading.Event()
    original = samples.__getitem__

    def failing(indices):
        if indices[0] == 64:
            later.set()  # by the one thread, which is done with 48
        if indices[0] == 48 and not later.is_set():
            raise TrainingStopped("the network was down")
        return original(indices)

    samples.__class__ = type("Failing", (StreamedSamples,), {"__getitem__": lambda self, indices: failing(indices)})
    found = []
    for batch in StreamedBatches(samples, sampler(steps=9), 1):
        found.append(rows_in(batch))
        assert batch["index"][0] != 32 or later.wait(20)
    assert found == expected


def test_leaving_a_run_ends_its_threads(folder):
    before = threading.active_count()
    batches = iter(StreamedBatches(stream(folder), sampler(steps=1000), 2))
    next(batches)
    assert threading.active_count() > before
    del batches
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.02)
    raise AssertionError(threading.enumerate())


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_column": "img"}, "`image_column` 'img' is not in `dataset_name` .*'image', 'note', 'label'"),
        (
            {"label_column": "note"},
            "`label_column` 'note'.*403 different texts for 403 images.*these are not classes",
        ),
        ({"image_column": "label"}, "`image_column` 'label'.*not images"),
        ({"split": "test"}, "`dataset_split` 'test' is not in .*; it has 'train'"),
        ({"dataset_name": "./nowhere"}, "`dataset_name` ./nowhere is not a folder"),
    ],
)
def test_wrong_columns_and_splits(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        stream_image_dataset(**{"dataset_name": folder, **arguments})


def test_other_formats_and_broken_files(tmp_path, monkeypatch, no_delay):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(png(5))
    with pytest.raises(
        InputError, match="reads parquet files, .* the ImageFolder reader .* prepare` reads any format"
    ):
        stream_image_dataset(str(tmp_path / "images"))
    folder = write_files(tmp_path / "data", rows=20)
    files = sorted((tmp_path / "data" / "data").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "MOST_BYTES", 100)
        with pytest.raises(InputError, match="a row group has .* GB, and `streaming` holds at most"):
            stream_image_dataset(folder)
    pq.write_table(pq.read_table(files[1]).drop_columns(["label"]), files[1])
    with pytest.raises(InputError, match="00001.* has the columns 'image', 'note', but `streaming` needs 'image' and"):
        stream_image_dataset(folder)


@pytest.mark.parametrize(
    "content", [b"no parquet at all", b"PAR1" + bytes(64) + b"PAR1", b""], ids=["text", "cut", "empty"]
)
def test_damaged_files_are_not_read_again(tmp_path, caplog, content):
    folder = write_files(tmp_path, rows=20)
    sorted((tmp_path / "data").iterdir())[1].write_bytes(content)
    with pytest.raises(InputError, match=r"`dataset_name` .*00001-of-00002.parquet cannot be read \(.*\)"):
        stream_image_dataset(folder)
    assert "trying again" not in caplog.text


@pytest.mark.parametrize("labels, message", [([0, None], "is empty in 1 rows"), ([-1, -1], "labels from -1 to -1")])
def test_labels_that_are_no_classes(tmp_path, labels, message):
    features = Features({"image": Image(), "label": Value("int64")})
    rows = {"image": [{"bytes": png(1), "path": None}] * 2, "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=message):
        stream_image_dataset(str(tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset_name": None, "latents_dir": "somewhere"}, "cannot be combined with --latents_dir somewhere"),
        ({"dataset_name": None, "train_data_dir": "somewhere"}, "cannot be combined with --train_data_dir somewhere"),
        ({"dataset_name": "some/data", "max_train_samples": 5}, "cannot be combined with --max_train_samples 5"),
        ({}, "cannot be combined with --dataset_name digits, which is in the package"),
    ],
)
def test_options_that_do_not_go_together(command, capsys, changes, message):
    with pytest.raises(SystemExit):
        train_vrpo.parse_args(command(**changes) + ["--streaming"])
    assert f"error: --streaming {message}" in capsys.readouterr().err


# The whole script


@pytest.mark.slow
def test_a_signal_and_the_same_command_again_are_bit_equal(command, folder, tmp_path, monkeypatch):
    options = {"dataset_name": folder, "train_batch_size": 8, "gradient_accumulation_steps": 2, "max_train_steps": 5}
    options |= {"dataloader_num_workers": 2, "learning_rate": 1e-3}
    run(command(**options) + ["--streaming", "--random_flip"])
    again = command(**options, output_dir=tmp_path / "left") + ["--streaming", "--random_flip"]
    original, calls = trainer_module.forward_process, []

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(trainer_module, "forward_process", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(again)
    assert ended.value.code == 143 and (tmp_path / "left" / "checkpoint-3").is_dir()

    # What the order depends on must stay; how the batch is divided may change.
    options |= {"output_dir": tmp_path / "left"}
    with pytest.raises(InputError, match="the number of samples a step is 8, but .*checkpoint-3 was trained with 16"):
        run(command(**options | {"train_batch_size": 4}) + ["--streaming", "--random_flip"])
    with pytest.raises(InputError, match="`streaming` is None, but .*checkpoint-3 was trained with True"):
        run(command(**options) + ["--random_flip", "--cache_dir", str(tmp_path / "cache")])
    changed = write_files(tmp_path / "numbered", images=[numbered(row + (row == 400)) for row in range(403)])
    with pytest.raises(InputError, match="the checksum of the streamed files is"):
        run(command(**options | {"dataset_name": changed}) + ["--streaming", "--random_flip"])

    run(again)
    weights = "diffusion_pytorch_model.safetensors"
    names = [f"transformer/{weights}", f"transformer_ema/{weights}", "reward_statistics.safetensors"]
    assert_same_files(tmp_path / "run" / "checkpoint-5", tmp_path / "left" / "checkpoint-5", names)
    assert losses(tmp_path / "run") == losses(tmp_path / "left") and len(losses(tmp_path / "left")) == 5


@pytest.mark.slow
def test_imagenet_images_with_a_real_encoder(command, shared, tmp_path):
    """Two optimizer steps a draw; no copy of the data set is made."""
    options = {"dataset_name": shared / "data" / "tiny-imagenet-100", "resolution": 64, "preset": "SiT-XS/8"}
    options |= {"encoder": shared / "encoders" / "efficientnet-lite0", "estimator": "sampled", "policy_epochs": 2}
    options |= {"model_config": None, "dataloader_num_workers": 1, "cache_dir": tmp_path / "cache"}
    run(command(**options, validation_labels="goldfish", max_train_steps=2) + ["--streaming"])
    assert len(losses(tmp_path / "run")) == 2
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("goldfish", num_inference_steps=1).images[0].size == (64, 64)


def test_epochs(command, folder, tmp_path):
    options = {"max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 128, "objective": "none"}
    run(command(**options, dataset_name=folder, encoder=None) + ["--streaming"])
    assert len(losses(tmp_path / "run")) == 7  # 806 images


# The Hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The data set `me/numbered` at one commit. The third request for images is cut off; after one for `?silence` none is."""

    protocol_version = "HTTP/1.1"
    folder: Path
    requests: list[tuple[str, str | None]]

    def answer(self, code: int, body=b"", whole=True, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if whole else body[: len(body) // 2])
            self.close_connection = not whole

    def do_GET(self):
        span = self.headers["Range"]
        self.requests.append((self.path, span))
        files = {path.name: path for path in self.folder.iterdir()}
        at_commit = f"/datasets/me/numbered/resolve/{COMMIT}/data/"
        if any("silence" in path for path, _ in self.requests) and span:
            time.sleep(60)
        elif self.path.startswith(at_commit) and span:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            body = files[self.path.removeprefix(at_commit)].read_bytes()[first : last + 1]
            self.answer(206, body, whole=sum(asked is not None for _, asked in self.requests) != 5)
        elif "/resolve/" in self.path:
            self.answer(404, X_Error_Code="EntryNotFound")
        elif self.path.startswith(f"/api/datasets/me/numbered/tree/{COMMIT}"):
            tree = [{"type": "directory", "path": "data", "oid": "0", "size": 0}]
            if self.path.partition("?")[0].endswith("/data"):
                sizes = {f"data/{name}": path.stat().st_size for name, path in files.items()}
                tree = [{"type": "file", "path": path, "oid": "0", "size": size} for path, size in sizes.items()]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif self.path.startswith("/api/datasets/me/numbered"):
            info = {"id": "me/numbered", "sha": COMMIT, "siblings": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            self.answer(404)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


ON_THE_HUB = """
import importlib.util, os, sys, threading, time, urllib.request
spec = importlib.util.spec_from_file_location("train_vrpo", sys.argv[1])
train_vrpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_vrpo)
train_vrpo.main(train_vrpo.parse_args(sys.argv[2:]))

# Another revision; and a process ends although every thread that reads waits for a server that is silent.
from diffusers_vrpo.data.samples import StreamBatchSampler
from diffusers_vrpo.data.parquet import stream_image_dataset
from diffusers_vrpo.data.streamed_samples import StreamedBatches, StreamedSamples
data = stream_image_dataset("me/numbered@refs/convert/parquet")
samples = StreamedSamples(data, 16, 0, 8, (3, 8, 8), 10)
batches = iter(StreamedBatches(samples, StreamBatchSampler(0, 1000, 16, 0, 1, 1), 1))
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/api/datasets/me/numbered?silence").close()
threading.Thread(target=lambda: next(batches), daemon=True).start()
time.sleep(1)
print("ending at", time.time(), flush=True)
sys.exit("as usual")
"""


@pytest.mark.slow
def test_from_the_hub_by_http(command, tmp_path):
    """The same losses as from the folder, one request for each row group, nothing on the disk, and an end in any case."""
    FakeHub.folder, FakeHub.requests = Path(write_files(tmp_path / "numbered")) / "data", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = no_network_environment() | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    options = {"max_train_steps": 3, "objective": "none", "encoder": None, "dataloader_num_workers": 1}
    on_hub = command(**options, dataset_name="me/numbered") + ["--streaming"]
    script = [sys.executable, "-c", ON_THE_HUB, str(TRAINING_SCRIPT), *on_hub]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    took = time.time() - float(done.stdout.split()[-1])
    server.shutdown()
    assert done.returncode == 1 and "as usual" in done.stderr, done.stderr[-3000:]
    run(command(**options, dataset_name=tmp_path / "numbered", output_dir=tmp_path / "here") + ["--streaming"])
    assert losses(tmp_path / "run") == losses(tmp_path / "here") and len(losses(tmp_path / "run")) == 3
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in (".parquet", ".arrow")]
    assert any("refs%2Fconvert%2Fparquet" in path for path, _ in FakeHub.requests)
    assert sum(asked is not None for _, asked in FakeHub.requests) <= 2 * 2 + 42 + 1 + 8 and took < 10
