# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What is looked at while training: the Fréchet distance beside the grid, and looks that a killed run missed."""

import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_source import ImageDataset
from diffusers_vrpo.data.parquet import stream_image_dataset
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.feature_statistics import read_statistics
from diffusers_vrpo.evaluation.image_encoders import load_image_encoder, pooled_features
from diffusers_vrpo.evaluation.metrics import frechet_distance, mean_and_covariance
from diffusers_vrpo.pipelines.sampling import sample_batch
from diffusers_vrpo.training import validation
from diffusers_vrpo.training.metrics import read_metrics
from diffusers_vrpo.training.trackers import log_values
from support.data import write_files
from support.training import run


FD = {"fd_encoder": "digits", "num_fd_samples": 40, "max_train_samples": 200}


def to_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_the_distance_is_that_of_the_saved_pipeline(command, tmp_path):
    run(command(max_train_steps=3, validation_steps=2, **FD))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert ["validation/fd_digits" in row for row in rows] == [False, True, True]
    assert all("loss_fm" in row for row in rows)

    pipeline = VRPOPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    labels = [i // 4 for i in range(40)]
    samples = sample_batch(pipeline, range(40), labels, 0, {"num_inference_steps": 2, "guidance_scale": 1.0})
    data = ImageDataset(*load_image_dataset("digits", max_train_samples=200))
    encoder = load_image_encoder("digits")
    real = pooled_features(encoder, to_tensor(data.examples(data.fixed_rows(10_000), 8)[0]))
    assert len(real) == len(data)
    expected = frechet_distance(
        *mean_and_covariance(real), *mean_and_covariance(pooled_features(encoder, to_tensor(samples)))
    )
    assert rows[-1]["validation/fd_digits"] == pytest.approx(expected, rel=1e-5)
    assert rows[-1]["validation/fd_digits"] != rows[1]["validation/fd_digits"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the grid", "the distance"])
def test_a_look_that_a_kill_prevented_is_made_good(command, tmp_path, what):
    options = {"max_train_steps": 4, "validation_steps": 2, "checkpointing_steps": 2, **FD}
    run(command(**options))
    expected = read_metrics(tmp_path / "run" / "metrics.jsonl")
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "run", killed)
    shutil.rmtree(killed / "checkpoint-4")
    grid = killed / "samples" / "step-0000002.png"
    before = grid.read_bytes()
    if what == "the grid":
        grid.unlink()
    (killed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in expected[:1]))
    with (killed / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({name: value for name, value in expected[1].items() if name != "validation/fd_digits"}) + "\n"
        )
    run(command(**options, output_dir=killed))
    assert grid.read_bytes() == before
    rows = read_metrics(killed / "metrics.jsonl")
    assert [row.get("validation/fd_digits") for row in rows] == [row.get("validation/fd_digits") for row in expected]
    assert rows[1]["validation/fd_digits"] is not None


@pytest.mark.parametrize("drawn", [True, False])
def test_a_run_without_a_distance_continues_from_a_validated_step(command, tmp_path, drawn):
    run(command(max_train_steps=2, validation_steps=2))
    grid = tmp_path / "run" / "samples" / "step-0000002.png"
    if not drawn:
        grid.unlink()
    before = grid.stat().st_mtime_ns if drawn else None
    run(command(max_train_steps=3, validation_steps=2))
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert grid.is_file() and (not drawn or grid.stat().st_mtime_ns == before)


def test_a_look_at_the_end_that_a_kill_prevented_is_made_once(command, tmp_path, monkeypatch):
    run(command(max_train_steps=2, validation_steps=2))
    (tmp_path / "run" / "samples" / "step-0000002.png").unlink()
    drawn = []
    monkeypatch.setattr(validation.Validation, "draw", lambda self, step, averaged: drawn.append(step))
    run(command(max_train_steps=2, validation_steps=2))
    assert drawn == [2]


def test_what_cannot_be_compared(command, capsys):
    with pytest.raises(InputError, match="`num_fd_samples` 1 is too few for a covariance; use 2048 or more"):
        run(command(fd_encoder="digits", num_fd_samples=1))
    with pytest.raises(SystemExit):
        run(command(num_fd_samples=9))
    assert "--num_fd_samples 9 has no effect without --fd_encoder; remove it" in capsys.readouterr().err
    with pytest.raises(InputError, match="`fd_encoder` ./nowhere: the folder does not exist"):
        run(command(fd_encoder="./nowhere"))


def test_streamed_references_are_whole_row_groups(tmp_path):
    folder = write_files(tmp_path / "numbered", rows=103, files=2, group_rows=10)
    data = stream_image_dataset(folder)
    rows = data.fixed_rows(25)
    assert len(rows) == 25 and len({np.searchsorted(data.first_rows, row, side="right") for row in rows}) == 3
    images = data.examples(rows, 8)[0]
    assert images.shape == (25, 8, 8, 3) and images[:, 0, 0, 0].tolist() == rows.tolist()
    assert np.array_equal(np.sort(data.fixed_rows(10_000)), np.arange(103))


def test_a_signal_ends_the_work(command, tmp_path, monkeypatch):
    """No number is logged, and the run leaves with a checkpoint after its next step."""

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return sample_batch(*arguments)

    monkeypatch.setattr(validation, "sample_batch", interrupted)
    with pytest.raises(SystemExit) as end:
        run(command(max_train_steps=9, validation_steps=2, **{**FD, "train_batch_size": 8}))
    assert end.value.code == 143
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3 and not any("validation/fd_digits" in row for row in rows)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


@pytest.mark.slow
def test_the_reference_is_that_of_the_data(command, tmp_path):
    options = {"max_train_steps": 1, "resume_from_checkpoint": "none", **FD}
    run(command(**options))
    file, again = tmp_path / "run" / "fd_reference.safetensors", tmp_path / "again"
    again.mkdir()
    for content in (file.read_bytes(), b"damaged"):
        (again / file.name).write_bytes(content)
        run(command(**options, output_dir=again))
        # The order of the file's metadata may differ.
        statistics, description = read_statistics(again / file.name)
        expected, expected_description = read_statistics(file)
        assert description == expected_description and statistics.count == expected.count
        for moments, expected_moments in zip(statistics.moments["pool"], expected.moments["pool"]):
            assert torch.equal(moments, expected_moments)
        shutil.rmtree(again)
        again.mkdir()


def test_a_tracker_that_cannot_write_is_left_out():
    class Full:
        name = "full"

        def log(self, values, step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Kept:
        name = "kept"

        def log(self, values, step):
            got.append((values, step))

    got = []
    accelerator = SimpleNamespace(trackers=[Full(), Kept()])
    PartialState()  # accelerate's loggers ask it
    for step in (1, 2):
        log_values(accelerator, {"a": 1.0}, step)
    assert got == [({"a": 1.0}, 1), ({"a": 1.0}, 2)] and [t.name for t in accelerator.trackers] == ["kept"]
