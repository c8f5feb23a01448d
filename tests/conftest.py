# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Fixtures of more than one test module; functions that several of them call are in `support`.

Fixtures import what they need when they are used: a worker's threads and cores must be set before torch is loaded.
"""

import functools
import os
from pathlib import Path

import pytest


if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Two tests at once, each on a core of its own: threads that wait for one another's cores make both many times slower.
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items):
    """Modules with slow tests come last; where several workers share the modules, first. A module's tests stay together."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: (item.path in slow) != bool(worker))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, encoders and official tensors; tests that need it are skipped where it is absent."""
    from support.paths import ROOT

    folder = Path(os.environ.get("VRPO_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir() or not (folder / "encoders").is_dir():
        pytest.skip(f"no shared data at {folder} (set VRPO_SHARED)")
    return folder.resolve()


# Training runs


@pytest.fixture
def command(tmp_path):
    """`command(**changes)`: the options of a short run on digits whose output is `tmp_path / "run"`."""
    from support.training import options_in

    return options_in(tmp_path)


@pytest.fixture(scope="session")
def trainers(tmp_path_factory):
    """`trainers(options, hook=None, processes=1, program=None)` starts training, or the program, in the background."""
    from support.trainers import fork_server

    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork processes")
    with fork_server(tmp_path_factory.mktemp("fork_server")) as start:
        yield start


@pytest.fixture
def one_core(trainers):
    """Each process has a core: threads that wait for one another are slow where cores are shared."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


# Models


@pytest.fixture(scope="session")
def encoder_checkpoint(tmp_path_factory):
    """`encoder_checkpoint(name)`: the folder of a tiny encoder of that name with random weights."""
    import torch

    from support.encoders import save_encoder

    torch.set_num_threads(1)

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        save_encoder(folder, name)
        return folder

    return make


@pytest.fixture(scope="module")
def inception_weights():
    """A state dict of the FID network with random weights."""
    import torch

    from support.inception import random_inception_state

    torch.set_num_threads(1)
    return random_inception_state()


@pytest.fixture(scope="module")
def digits_pipeline(tmp_path_factory):
    """The folder of a pipeline of pixels for the digits, with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from support.models import tiny_model
    from support.pipelines import quiet_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    model = tiny_model(in_channels=3, num_classes=10, sample_size=8, class_dropout_prob=0.1)
    quiet_pipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


# The yardstick


@pytest.fixture(scope="module")
def yardstick():
    """The modules of the yardstick by name."""
    from support.yardstick import yardstick_modules

    with yardstick_modules() as modules:
        yield modules


@pytest.fixture(scope="module")
def tiny_yardstick(tmp_path_factory, yardstick):
    """A function that runs the yardstick's driver on a recipe of two steps on three classes of digits."""
    from support.yardstick import tiny_driver

    return tiny_driver(tmp_path_factory.mktemp("yardstick"), yardstick)
