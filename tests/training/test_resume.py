# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Runs that are killed, interrupted, or meet NaN and full disks."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusers_vrpo import trainer as trainer_module
from diffusers_vrpo.data.samples import TrainingSamples
from diffusers_vrpo.errors import InputError, TrainingStopped
from diffusers_vrpo.training import checkpoints as training
from diffusers_vrpo.training.checkpoints import find_checkpoint, find_damage, list_checkpoints
from diffusers_vrpo.training.interruption import OVERFLOWS_IN_A_ROW, SKIPPED_IN_A_ROW, Interruption, StepGuard
from diffusers_vrpo.training.metrics import RunningMeans, read_metrics
from support.processes import no_network_environment
from support.trainers import assert_same_end
from support.training import assert_same_files, losses, run


pytestmark = pytest.mark.usefixtures("one_core")


# Killed and interrupted


@pytest.mark.slow
def test_killed_at_any_moment_the_end_is_bit_equal(command, trainers, tmp_path):
    # Logged every third step, saved every second: sums of half a log interval are part of a checkpoint.
    options = {"max_train_steps": 44, "checkpointing_steps": 2, "checkpoints_total_limit": 2, "logging_steps": 3}
    options |= {"lr_scheduler": "cosine", "lr_warmup_steps": 5, "train_batch_size": 32, "learning_rate": 1e-3}
    straight, killed = tmp_path / "run", tmp_path / "killed"
    assert trainers(command(**options)).wait() == [0]
    dice = random.Random(os.environ.get("KILL_SEED", "0"))
    again = command(**options, output_dir=killed)
    saved, folders = 0, []
    in_checkpoints = ["half a file", "no manifest", "no name", "half deleted"]
    plan = [*in_checkpoints, *[None] * 7]
    dice.shuffle(plan)
    for number, hook in enumerate(plan):
        trainer = trainers(again, hook=hook)
        if hook is None:
            # Now and then on the way to the first step, otherwise after some.
            if number % 4:
                trainer.wait_for_step(killed, min(saved + 3, 42))
            time.sleep(dice.uniform(0, 0.3))
            trainer.kill()
        codes = trainer.wait()
        assert codes == [-signal.SIGKILL], (hook, trainer.log.read_text()[-2000:])
        # Whatever happened, the newest checkpoint with a name is whole, and they only get newer.
        existing = list_checkpoints(killed)
        folders.append(sorted(path.name for path in killed.glob(".checkpoint-*")))
        if existing:
            assert find_damage(existing[-1]) is None
            assert int(existing[-1].name.split("-")[1]) >= saved
            saved = int(existing[-1].name.split("-")[1])
    assert 0 < saved < 44 and any(folders)
    assert trainers(again).wait() == [0]
    assert_same_end(straight, killed, 44)
    assert [path.name for path in list_checkpoints(killed)] == ["checkpoint-42", "checkpoint-44"]
    assert [path.name for path in killed.glob(".*")] == [".lock"]
    share = read_metrics(killed / "metrics.jsonl")[-1]["share/semantic"]
    assert share != pytest.approx(1 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("signum, policy_epochs", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_the_end_is_bit_equal(command, trainers, tmp_path, signum, policy_epochs):
    options = {"max_train_steps": 14, "dataloader_num_workers": 1, "logging_steps": 2, "learning_rate": 1e-3}
    if policy_epochs > 1:
        options |= {"estimator": "sampled", "policy_epochs": policy_epochs, "logging_steps": 1}
    assert trainers(command(**options)).wait() == [0]
    again = command(**options, output_dir=tmp_path / "left")
    trainer = trainers(again)
    trainer.wait_for_step(tmp_path / "left", 4)
    trainer.kill(signum)
    assert trainer.wait() == [128 + signum]
    (checkpoint,) = list_checkpoints(tmp_path / "left")
    step = json.loads((checkpoint / "training_state.json").read_text())["step"]
    assert 4 <= step < 14 and step % policy_epochs == 0
    assert trainers(again).wait() == [0]
    assert_same_end(tmp_path / "run", tmp_path / "left", 14)


def test_signals_before_and_after_the_loop_act_as_always():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    interruption = Interruption()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by the launcher
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert interruption.signum == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once():
    code = (
        "import os, signal, time\nfrom diffusers_vrpo.training.interruption import Interruption\n"
        "with Interruption():\n    os.kill(os.getpid(), 2)\n    time.sleep(1.1)\n"
        "    os.kill(os.getpid(), 2)\n    time.sleep(5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=no_network_environment(), capture_output=True, text=True)
    assert done.returncode == 130 and "SIGINT: saving a checkpoint" in done.stderr


# Damaged checkpoints


@pytest.fixture
def two_checkpoints(command, tmp_path):
    run(command(checkpointing_steps=2))
    return tmp_path / "run"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(command, two_checkpoints, caplog):
    folder, last = two_checkpoints, two_checkpoints / "checkpoint-4"
    before = losses(folder)
    optimizer = last / "optimizer.bin"
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 1
    optimizer.write_bytes(data)
    with pytest.raises(InputError, match="checkpoint-4 is damaged .optimizer.bin is not what was saved.; give"):
        run(command(resume_from_checkpoint="checkpoint-4"))
    # One checkpoint is kept, and it is the whole one until the next is complete.
    run(command(max_train_steps=3, checkpoints_total_limit=1))
    assert (
        "checkpoint-4 is damaged (optimizer.bin is not what was saved) and was renamed to checkpoint-4.damaged"
        in caplog.text
    )
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4.damaged"]
    run(command())
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert losses(folder) == before


def test_every_kind_of_damage_has_a_name(two_checkpoints):
    path = two_checkpoints / "checkpoint-4"
    assert find_damage(path) is None
    shutil.copytree(path, two_checkpoints / "copy")
    (two_checkpoints / "copy" / "transformer" / "config.json").unlink()
    assert find_damage(two_checkpoints / "copy") == "transformer/config.json is missing"
    (path / "manifest.json").write_text("{}")
    assert find_damage(path) == "manifest.json is not what was saved"
    (path / "manifest.json").unlink()
    assert find_damage(path) == "manifest.json is missing"
    os.truncate(two_checkpoints / "checkpoint-2" / "training_state.json", 7)
    with pytest.raises(
        InputError, match="all checkpoints in .* are damaged .checkpoint-4: .*; checkpoint-2: .* 7 bytes"
    ):
        find_checkpoint("latest", two_checkpoints)
    assert len(list_checkpoints(two_checkpoints)) == 2


def test_what_a_kill_left_is_tidied(two_checkpoints):
    last = two_checkpoints / "checkpoint-4"
    os.replace(last, two_checkpoints / ".checkpoint-4.tmp")  # complete, but for its name
    shutil.copytree(two_checkpoints / "checkpoint-2", two_checkpoints / ".checkpoint-6.tmp")
    (two_checkpoints / ".checkpoint-6.tmp" / "optimizer.bin").unlink()
    shutil.copytree(two_checkpoints / "checkpoint-2", two_checkpoints / ".checkpoint-1.old")
    assert find_checkpoint("latest", two_checkpoints) == last
    assert not list(two_checkpoints.glob(".checkpoint-*"))


# NaN and infinity


@pytest.fixture
def nan_sample(monkeypatch):
    """Sample 60 of the stream, in step 4 of 16 samples each, has NaN as noise."""
    original = TrainingSamples.__getitem__

    def patched(self, indices):
        batch = original(self, indices)
        batch["noise"][batch["index"] == 60] = math.nan
        return batch

    monkeypatch.setattr(TrainingSamples, "__getitem__", patched)


@pytest.mark.slow
def test_a_loss_that_is_nan_stops_with_the_state_before_it(command, tmp_path, nan_sample, caplog):
    message = r"step 4 \(samples 48 to 63\): the loss is NaN or infinite; .*checkpoint-3 is .*`skip_nonfinite` skips"
    options = {"max_train_steps": 6, "gradient_accumulation_steps": 2, "train_batch_size": 8}
    for _ in range(2):  # the same command tries the step again
        with pytest.raises(TrainingStopped, match=message):
            run(command(**options))
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    run(command(**options | {"output_dir": tmp_path / "clean", "max_train_steps": 3}))
    assert_same_files(
        *(tmp_path / folder / "checkpoint-3" for folder in ("run", "clean")),
        ["transformer/diffusion_pytorch_model.safetensors", "transformer_ema/diffusion_pytorch_model.safetensors"],
    )
    # With the option it goes on, and to the same end as if it had been there from the start.
    for folder in ("run", "skipped"):
        run([*command(**options, output_dir=tmp_path / folder), "--skip_nonfinite"])
    assert (
        "step 4 (samples 48 to 63): the loss is NaN or infinite; the step is skipped (1 skipped so far)" in caplog.text
    )
    assert_same_end(tmp_path / "run", tmp_path / "skipped", 6)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows[3:]] == [1, 1, 1]
    # The half of the batch without NaN has a loss; where none has, it is NaN.
    assert all(math.isfinite(row["loss_fm"]) for row in rows) and math.isnan(rows[3]["grad_norm"])
    weights = load_file(tmp_path / "run" / "checkpoint-6" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


class Guarded:
    """A guard over one parameter, whose gradient and loss are given."""

    def __init__(self, skip_nonfinite: bool, scaler=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler
        self.parameter = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.AdamW([self.parameter], lr=0.1, fused=True)
        self.guard = StepGuard(accelerator, self.optimizer, Interruption(), skip_nonfinite)

    def step(self, loss: float, gradient: float) -> str | None:
        self.parameter.grad = torch.full((3,), gradient)
        self.guard.watch(torch.tensor(loss))
        self.guard.ask(self.parameter.grad.norm())
        self.optimizer.step()
        return self.guard.answer()


def test_a_step_that_is_not_finite_leaves_the_optimizer_as_it_was():
    guarded = Guarded(skip_nonfinite=True)
    assert guarded.step(1.0, 1.0) is None
    state = [tensor.clone() for tensor in (guarded.parameter, *guarded.optimizer.state[guarded.parameter].values())]
    assert guarded.step(1.0, math.inf) == "the gradient"
    assert guarded.step(math.inf, 1.0) == "the loss"
    after = (guarded.parameter, *guarded.optimizer.state[guarded.parameter].values())
    assert all(torch.equal(a, b) for a, b in zip(state, after))
    assert guarded.guard.skipped == 2 and not guarded.guard.must_stop()
    assert guarded.step(1.0, 1.0) is None and guarded.guard.skipped_in_a_row == 0
    assert not torch.equal(state[0], guarded.parameter)
    for _ in range(SKIPPED_IN_A_ROW):
        assert not guarded.guard.must_stop()
        guarded.step(math.nan, 1.0)
    assert guarded.guard.must_stop()
    assert "100 steps in a row were skipped" in str(guarded.guard.stop("step 9: the loss", Path("run"), 8))


def test_overflow_of_fp16_is_normal_until_it_is_not():
    guarded = Guarded(skip_nonfinite=False, scaler=object())
    for _ in range(OVERFLOWS_IN_A_ROW):
        assert guarded.step(1.0, math.inf) is None
    assert guarded.step(1.0, math.inf) == "the gradient"
    assert guarded.step(1.0, 1.0) is None and guarded.step(1.0, math.inf) is None
    assert guarded.step(math.nan, 1.0) == "the loss"


def test_means_leave_out_what_is_not_finite(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    means, accelerator = RunningMeans(), Accelerator(cpu=True)
    for a, b in ((1.0, math.nan), (math.inf, math.nan), (3.0, math.nan)):
        means.add(a=torch.tensor(a), b=torch.tensor(b))
    means.commit()
    means.add(a=torch.tensor(100.0), b=torch.tensor(1.0))  # of a step that does not end
    # Of two processes: each its own; with one process the sums of both.
    again = RunningMeans()
    again.load_state_dicts([means.state_dict(), means.state_dict(), {}], accelerator)
    again.add(a=torch.tensor(5.0))
    values = again.read(accelerator)
    assert values["a"] == (1 + 3 + 1 + 3 + 5) / 5 and math.isnan(values["b"])


# A full disk


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(command, trainers, tmp_path):
    options = {"max_train_steps": 6, "checkpointing_steps": 2, "logging_steps": 6, "checkpoints_total_limit": 1}
    assert trainers(command(**options)).wait() == [0]
    full = command(**options, output_dir=tmp_path / "full")
    trainer = trainers(full, hook="disk full")
    assert trainer.wait() == [1]
    log = trainer.log.read_text()
    for step in (4, 6):
        assert f"full/checkpoint-{step} could not be saved (" in log
    assert "GB were free); " in log and "the run can be continued from " in log
    assert (
        "ended by TrainingStopped: the checkpoint of step 6 could not be saved; make room and repeat the command"
        in log
    )
    assert [path.name for path in (tmp_path / "full").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert trainers(full).wait() == [0]
    assert_same_end(tmp_path / "run", tmp_path / "full", 6)


@pytest.mark.slow
def test_a_full_disk_at_the_start_and_at_the_end(command, trainers, tmp_path, monkeypatch):
    options = command(max_train_steps=2)
    again = "cannot be written .*; make room and repeat the command"

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "write_atomically", full)
        with pytest.raises(TrainingStopped, match="train_config.yaml or metrics.jsonl in .*/run " + again):
            run(options)
    trainer = trainers(options, hook="no room for the result")
    assert trainer.wait() == [1]
    assert re.search("ended by TrainingStopped: the pipeline in .*/run " + again, trainer.log.read_text())
    assert trainers(options).wait() == [0]
    assert len(losses(tmp_path / "run")) == 2 and (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(command, trainers, tmp_path):
    options = command(max_train_steps=10000, dataloader_num_workers=1)
    first = trainers(options)
    first.wait_for_step(tmp_path / "run", 1)
    second = trainers(options)
    assert second.wait() == [1]
    in_use = (
        f"run is in use by another run \\(process {first.pids[0]} on .*; wait for its end or choose another folder"
    )
    assert re.search(in_use, second.log.read_text())
    first.kill()
    assert first.wait() == [-signal.SIGKILL]
    # Its data loader's process may still be alive.
    (tmp_path / "run" / "metrics.jsonl").unlink()
    third = trainers(options)
    third.wait_for_step(tmp_path / "run", 1)
    third.kill(signal.SIGTERM)
    assert third.wait() == [143]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["save_file", "write_manifest", "sync_to_disk"])
def test_no_space_at_any_stage_of_saving(command, tmp_path, monkeypatch, caplog, where):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(command(max_train_steps=2))
    with monkeypatch.context() as patch:
        original = getattr(training, where)
        # metrics.jsonl is written.
        patch.setattr(training, where, lambda *a: original(*a) if "metrics" in str(a[0]) else full())
        with pytest.raises(TrainingStopped, match="step 4 could not be saved"):
            run(command())
    assert "checkpoint-4 could not be saved (No space left on device; " in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    run(command())
    assert len(losses(tmp_path / "run")) == 4


def test_other_failures_while_saving_are_not_hidden(command, monkeypatch):
    def broken(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(training, "write_manifest", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(command(max_train_steps=1))
