# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Experiment trackers: what they are started with and get, that a run of wandb goes on, and outages."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_vrpo import VRPOConfig
from diffusers_vrpo.training.metrics import MetricsFile, read_metrics
from diffusers_vrpo.training.trackers import end_trackers, log_image, log_values, start_trackers, tracked_options


class Wandb(SimpleNamespace):
    """Stands for the module `wandb`: remembers calls, and fails in those that `broken` names."""

    def __init__(self):
        super().__init__(
            inits=[], logged=[], configs=[], finished=0, broken=set(), Image=lambda image: ("image", image.size)
        )
        self.config = SimpleNamespace(update=lambda values, **kwargs: self.configs.append(values))

    def call(self, name):
        if name in self.broken:
            raise ConnectionError(f"{name}: the server is out of reach")

    def init(self, **arguments):
        self.call("init")
        self.inits.append(arguments)
        return self

    def log(self, values, step=None):
        self.call("log")
        self.logged.append((step, values))

    def finish(self):
        self.call("finish")
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return module


@pytest.fixture
def start(tmp_path):
    """`start(names, step=0, **options)`: an accelerator with started trackers, whose output folder is `tmp_path / "run"`."""

    def start(names, step=0, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(folder, logging_dir=folder / "logs"))
        accelerator.log_with = list(names)
        args = VRPOConfig(output_dir=folder, **options)
        start_trackers(accelerator, MetricsFile(folder / "metrics.jsonl", step), args, folder, step)
        return accelerator

    return start


def test_a_run_of_wandb_gets_typed_options_and_images_and_goes_on(start, wandb, tmp_path):
    options = {"encoder": ["digits", "b"], "learning_rate": 0.01, "random_flip": True, "max_train_steps": 7}
    accelerator = start(["wandb"], **options)
    log_values(accelerator, {"loss_fm": 1.5}, 1)
    log_image(accelerator, "samples", Image.new("RGB", (8, 16)), 1)
    end_trackers(accelerator)
    assert wandb.finished == 1
    assert wandb.logged == [(1, {"loss_fm": 1.5}), (1, {"samples": [("image", (8, 16))]})]
    (config,) = wandb.configs
    assert config["learning_rate"] == 0.01 and config["random_flip"] is True and config["max_train_steps"] == 7
    assert config["encoder"] == "digits,b" and config["objective"] == "vrpo" and "preset" not in config
    assert {type(value) for value in config.values()} <= {int, float, str, bool}

    # The continued run is the same one; a run that begins again is another.
    start(["wandb"], step=1, tracker_project_name="flowers", tracker_run_name="sit-b")
    start(["wandb"])
    first, continued, again = wandb.inits
    assert first == {"project": "vrpo", "name": "run", "id": first["id"], "resume": "allow"}
    assert continued == {"project": "flowers", "name": "sit-b", "id": first["id"], "resume": "allow"}
    assert again["id"] != first["id"]
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"wandb": again["id"]}


def test_the_environment_names_a_run_of_wandb(start, wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    start(["wandb"])
    assert wandb.inits[0]["id"] == "mine" and not (tmp_path / "run" / "trackers.json").exists()


@pytest.mark.parametrize("broken, logged", [("init", 0), ("log", 0), ("finish", 2)])
def test_an_outage_is_one_warning(start, wandb, broken, logged, tmp_path, caplog):
    wandb.broken = {broken}
    accelerator = start(["wandb", "tensorboard"])
    for step in (1, 2):
        log_values(accelerator, {"loss_fm": float(step)}, step)
    end_trackers(accelerator)
    assert len(wandb.logged) == logged
    (warning,) = [record for record in caplog.records if "wandb" in record.getMessage()]
    assert warning.levelname == "WARNING"
    assert (
        f"the tracker wandb has failed ({broken}: the server is out of reach) and is not used again"
        in warning.getMessage()
    )
    # The others have everything.
    assert [row["loss_fm"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1.0, 2.0]
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "vrpo")).Reload()
    assert [event.value for event in events.Scalars("loss_fm")] == [1.0, 2.0]


def test_tensorboard_gets_typed_options_and_images(start, tmp_path):
    accelerator = start(["tensorboard"], tracker_project_name="flowers", learning_rate=0.01)
    grid = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    log_image(accelerator, "samples", Image.fromarray(grid), 3)
    end_trackers(accelerator)
    folder = tmp_path / "run" / "logs" / "flowers"
    (event,) = EventAccumulator(str(folder)).Reload().Images("samples")
    assert (event.step, event.width, event.height) == (3, 16, 8)
    (file,) = folder.rglob("hparams.yml")
    assert yaml.safe_load(file.read_text()) == tracked_options(
        VRPOConfig(output_dir=tmp_path / "run", tracker_project_name="flowers", learning_rate=0.01)
    )
