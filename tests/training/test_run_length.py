# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""How long a run is, and when it saves and samples, where no option says it."""

import dataclasses
import json
import logging
import signal
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState

from diffusers_vrpo.config import VRPOConfig, allowed_changes, changeable_options
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.schemas import TRAINING_STATE, check
from diffusers_vrpo.training.checkpoints import check_settings, list_checkpoints
from diffusers_vrpo.training.length import (
    BEFORE_IT_WAS_RECORDED,
    RunLength,
    SpeedNotice,
    duration,
    length_of_run,
    passes_notice,
    recorded_length,
    resolve_length,
)
from diffusers_vrpo.training.metrics import read_metrics
from support.trainers import assert_same_end
from support.training import run


SAMPLED = {"estimator": "sampled", "policy_epochs": 3}


@pytest.mark.parametrize(
    "images, batch, options, steps",
    [
        (1_281_167, 256, {}, 400_000),  # ImageNet: 102.4 million images, 80 epochs
        (1_281_167, 2048, {}, 50_000),
        (500, 32, {}, 3125),  # 200 epochs
        (2 * 10**9, 256, {}, 7_812_500),  # one epoch
        (3, 256, {}, 2),
        (1, 256, {}, 1),
        (500, 32, SAMPLED, 9375),  # a draw for three steps
        (None, 256, {}, 400_000),
        (500, 32, {"max_train_steps": 7}, 7),
        (500, 32, {"num_train_epochs": 3}, 47),
        (500, 32, {"num_train_epochs": 3} | SAMPLED, 141),
    ],
)
def test_length(images, batch, options, steps):
    args = VRPOConfig(**options)
    assert length_of_run(args, images, batch) == steps
    if images is not None and not options.get("num_train_epochs"):
        seen = steps * batch / args.policy_epochs
        assert options.get("max_train_steps") or seen <= max(200 * images, batch)


def test_intervals():
    assert resolve_length(VRPOConfig(max_train_steps=4000), 500, 32) == RunLength(4000, 200, 200, True, 3)
    # Short runs do not save all the time.
    assert resolve_length(VRPOConfig(max_train_steps=40), 500, 32) == RunLength(40, 100, 100, True, 3)
    # Steps that share actions are saved together.
    length = resolve_length(VRPOConfig(max_train_steps=4200, **SAMPLED), 500, 32)
    assert (length.checkpointing_steps, length.validation_steps) == (210, 210)
    assert resolve_length(VRPOConfig(max_train_steps=42, **SAMPLED), 500, 32).checkpointing_steps == 102
    given = VRPOConfig(max_train_steps=4000, checkpointing_steps=7, validation_steps=9)
    assert resolve_length(given, 500, 32) == RunLength(4000, 7, 9, False, 3)


def test_a_continued_run_keeps_what_it_is_not_given():
    recorded = RunLength(3000, 150, 150, True, 3)
    # The data or the batch may have changed: the length has not.
    assert resolve_length(VRPOConfig(), 77, 8, recorded) == recorded
    longer = resolve_length(VRPOConfig(max_train_steps=9000, validation_steps=10), 77, 8, recorded)
    assert longer == RunLength(9000, 150, 10, False, 3)
    assert resolve_length(VRPOConfig(num_train_epochs=2), 400, 8, recorded).max_train_steps == 100
    # Checkpoints of version 0.1 do not say it, and keep all others.
    assert recorded_length({}) == BEFORE_IT_WAS_RECORDED
    old = resolve_length(VRPOConfig(), 500, 32, recorded_length({}))
    assert dataclasses.astuple(old) == (400_000, 10_000, 10_000, False, 0)
    assert not any(map(old.draws_early, range(1000))) and old.validates(10_000)


def test_when_grids_are_drawn():
    length = RunLength(4000, 200, 200, True, 3)
    assert [step for step in range(1001) if length.validates(step)] == [200, 400, 600, 800, 1000]
    assert [step for step in range(1001) if length.draws_early(step)] == [1, 100, 500]
    often = dataclasses.replace(length, validation_steps=100)
    assert [step for step in range(1001) if often.draws_early(step)] == [1]


def test_the_warning_of_many_epochs():
    assert passes_notice(200, 500) is None
    assert "the run passes over its 500 images 1000 times; beyond 200" in passes_notice(1000, 500)


def test_the_notice_of_the_speed(caplog):
    PartialState()  # which accelerate's loggers need
    caplog.set_level(logging.INFO)
    seconds = SimpleNamespace(value=100.0)
    trainer = SimpleNamespace(
        step=50,
        max_train_steps=7200,
        global_batch_size=10,
        data=[0] * 720,
        args=SimpleNamespace(policy_epochs=1),
        stopwatch=SimpleNamespace(seconds=lambda: seconds.value),
    )
    notice = SpeedNotice()
    notice.on_train_begin(trainer)
    for step in range(51, 90):
        # The first step compiles.
        seconds.value += 60 if step == 51 else 2
        trainer.step = step
        notice.on_step_end(trainer)
    (text,) = [record.getMessage() for record in caplog.records]
    assert "7200 steps = 100 epochs of 720 images, about 4.0 hours at the measured speed of 2 s per step" in text
    assert "from step 50 on" in text
    assert (duration(20), duration(600), duration(5400)) == ("1 minute(s)", "10 minute(s)", "1.5 hours")


def state_of(folder) -> tuple[dict, dict]:
    """The settings in a run's newest checkpoint, and its last start."""
    checkpoint = list_checkpoints(folder)[-1]
    state = json.loads((checkpoint / "training_state.json").read_text())
    return state, json.loads((folder / "starts.jsonl").read_text().splitlines()[-1])


def test_a_changed_option_acts_from_there_on(command, tmp_path):
    options = {"objective": "none", "encoder": None, "projector_dim": None, "max_train_steps": 2}
    run(command(**options))
    options |= {"max_train_steps": 4, "learning_rate": 0.004, "lr_scheduler": "linear", "adam_beta2": 0.9}
    with pytest.raises(InputError, match="`lr_scheduler` is linear, but .* give `allow_changed` lr_scheduler to"):
        run(command(**options, allow_changed="learning_rate"))
    run(command(**options, allow_changed="learning_rate,lr_scheduler,adam_beta2"))
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.0])  # a row has the rate of the next step
    state, start = state_of(tmp_path / "run")
    assert start["changed"] == {
        "learning_rate": [0.01, 0.004],
        "lr_scheduler": ["constant_with_warmup", "linear"],
        "adam_beta2": [0.999, 0.9],
    }
    assert (state["settings"]["learning_rate"], state["settings"]["lr_scheduler"]) == (0.004, "linear")
    optimizer = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.bin", weights_only=True)
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.9)
    # The same command again has nothing to change.
    run(command(**options, allow_changed="learning_rate,lr_scheduler,adam_beta2"))
    assert "changed" not in state_of(tmp_path / "run")[1]


def test_which_options_may_change(capsys):
    names = changeable_options()
    assert {"learning_rate", "lr_scheduler", "lr_warmup_steps", "train_batch_size", "max_grad_norm"} <= set(names)
    for name in ("seed", "resolution", "objective", "lerning_rate"):
        with pytest.raises(
            InputError,
            match=f"`allow_changed` {name} names an option that cannot change within a run; those that can are .*learning_rate",
        ):
            VRPOConfig(allow_changed=[f"learning_rate,{name}"])
    assert allowed_changes(VRPOConfig(allow_changed=["learning_rate, max_grad_norm", "adam_beta1"])) == {
        "learning_rate",
        "max_grad_norm",
        "adam_beta1",
    }


@pytest.mark.parametrize("option", ["train_batch_size", "gradient_accumulation_steps"])
def test_the_batch_of_a_stream_may_change(option, tmp_path):
    state = {"settings": {"the number of samples a step": 16}}
    expected = {"the number of samples a step": 32}
    with pytest.raises(
        InputError, match="is 32, but .* with 16; keep that value, give `allow_changed` train_batch_size to"
    ):
        check_settings(state, expected, tmp_path)
    assert check_settings(state, expected, tmp_path, {option}) == {"the number of samples a step": [16, 32]}


def test_another_batch_is_recorded(command, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options = {"objective": "none", "encoder": None, "projector_dim": None}
    run(command(**options, max_train_steps=2))
    run(command(**options, max_train_steps=3, train_batch_size=8, gradient_accumulation_steps=2))
    assert "changed" not in state_of(tmp_path / "run")[1]  # as many samples in another division
    run(command(**options, max_train_steps=4, train_batch_size=8))
    assert "options changed from step 3 on: the number of samples a step 16 -> 8" in caplog.text
    assert state_of(tmp_path / "run")[1]["changed"] == {"the number of samples a step": [16, 8]}


@pytest.mark.slow
def test_a_stopped_run_without_a_length_ends_bit_equal(command, trainers, tmp_path):
    options = {
        "max_train_steps": None,
        "validation_steps": None,
        "checkpointing_steps": None,
        "lr_scheduler": "cosine",
    }
    options |= {"train_batch_size": 64, "max_train_samples": 8, "learning_rate": 1e-3}
    trainers(command(**options)).finish()
    again = command(**options, output_dir=tmp_path / "left")
    trainer = trainers(again)
    trainer.wait_for_step(tmp_path / "left", 3)
    trainer.kill(signal.SIGTERM)
    assert trainer.wait() == [128 + signal.SIGTERM]
    trainers(again).finish()
    assert_same_end(tmp_path / "run", tmp_path / "left", 25)


@pytest.mark.slow
def test_a_run_without_a_length(command, tmp_path, caplog):
    """Eight images in steps of 64: 25 steps in 200 epochs."""
    caplog.set_level(logging.INFO)
    options = {"max_train_steps": None, "validation_steps": None, "checkpointing_steps": None, "objective": "none"}
    options |= {"encoder": None, "projector_dim": None, "train_batch_size": 64, "max_train_samples": 8}
    options |= {"lr_scheduler": "cosine", "learning_rate": 1e-3}
    run(command(**options))
    folder = tmp_path / "run"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-25"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000001.png", "step-0000025.png"]
    assert "25 steps = 200 epochs of 8 images, about 1 minute(s) at the measured speed" in caplog.text
    assert "a step has 64 samples: `train_batch_size` 64 x 1 process x `gradient_accumulation_steps` 1" in caplog.text
    assert "passes over its" not in caplog.text
    state = check(json.loads((folder / "checkpoint-25" / "training_state.json").read_text()), TRAINING_STATE)
    assert state["length"] == dataclasses.asdict(RunLength(25, 100, 100, True, 3))
    used = yaml.safe_load((folder / "train_config.yaml").read_text())
    assert (used["max_train_steps"], used["checkpointing_steps"], used["validation_steps"]) == (25, 100, 100)

    # With half the batch, the run that continues has the same length, which is reached already.
    caplog.clear()
    run(command(**options | {"train_batch_size": 32}))
    assert "steps 25 to 25" in caplog.text


def test_a_profile_that_never_comes_is_announced(command, caplog):
    run(command(profile=3))
    assert "`profile` 3: there will be no table, which comes after 8 steps" in caplog.text and "4 left" in caplog.text
