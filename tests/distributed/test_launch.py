# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The training script under the launchers of accelerate and torch."""

import subprocess
import sys

import pytest
import torch

from diffusers_vrpo.training.metrics import read_metrics
from support.paths import TRAINING_SCRIPT
from support.processes import no_network_environment
from support.training import losses, run


def launch(launcher: list[str], options: list[str], **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(TRAINING_SCRIPT), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**no_network_environment(), "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
def test_accelerate_launch(command, tmp_path):
    done = launch(["accelerate.commands.launch", "--cpu"], command(max_train_steps=2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model_index.json").is_file() and len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_two_processes_give_the_same_losses(command, trainers, tmp_path):
    fd = {"fd_encoder": "digits", "num_fd_samples": 100}
    run(command(max_train_steps=10, train_batch_size=64, **fd))
    options = command(max_train_steps=10, train_batch_size=32, output_dir=tmp_path / "two", **fd)
    trainers(options, processes=2).finish()
    a, b = torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(tmp_path / "two"))
    assert (a - b).abs().max() <= 1e-5 and (a - b).mean().abs() <= 1e-6
    one, two = (read_metrics(tmp_path / folder / "metrics.jsonl")[-1] for folder in ("run", "two"))
    cosines = [name for name in one if name.startswith("cosine/")]
    assert len(cosines) == 10
    for name in ("reward/structural", "std/fidelity", "std/semantic", "share/semantic", "samples_seen", *cosines):
        assert two[name] == pytest.approx(one[name], abs=1e-5)
        if name in cosines:
            ratio = name.replace("cosine", "gradient_ratio")
            assert two[ratio] == pytest.approx(one[ratio], rel=1e-3)
    assert one["share/semantic"] != pytest.approx(1 / 3)
    assert two["validation/fd_digits"] == pytest.approx(one["validation/fd_digits"], rel=1e-3)
    # Every process has its own random state in the checkpoint.
    assert len(list((tmp_path / "two" / "checkpoint-10").glob("random_states_*.pkl"))) == 2


@pytest.mark.slow
def test_two_processes_whiten_weigh_and_release_as_one(command, trainers, tmp_path):
    options = {"objective": "rare", "target_norm": "whiten:6", "max_train_steps": 16, "learning_rate": 1e-3}
    run(command(**options, train_batch_size=64))
    trainers(command(**options, train_batch_size=32, output_dir=tmp_path / "two"), processes=2).finish()
    one, two = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("run", "two"))
    assert any("alignment_distance" in row for row in one) and "alignment_distance" not in one[-1]
    for a, b in zip(one, two, strict=True):
        assert ("alignment_distance" in a) == ("alignment_distance" in b)
        for name in ("loss_fm", "reward/semantic", "alignment_coeff", "alignment_distance", "alignment_weight"):
            assert b.get(name) == (pytest.approx(a[name], abs=1e-4) if name in a else None)


@pytest.mark.slow
def test_torchrun_without_the_switch_to_the_cpu(command, trainers, tmp_path):
    """Some versions of accelerate then leave the processes unconnected: they must not train side by side."""
    options = command(max_train_steps=2, train_batch_size=32)
    done = launch(["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], options)
    if done.returncode:
        assert "2 processes were started, but accelerate does not connect them" in done.stderr
    else:
        trainers(command(max_train_steps=2, train_batch_size=32, output_dir=tmp_path / "forked"), processes=2).finish()
        assert losses(tmp_path / "run") == losses(tmp_path / "forked")
