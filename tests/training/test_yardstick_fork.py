# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Arms of the yardstick that go on from one base."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusers_vrpo.errors import InputError
from support.yardstick import TIMING


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def forked(tiny_yardstick, yardstick, tmp_path):
    """The tiny recipe with a base of two steps, and a function that runs the driver on it."""
    recipe = tiny_yardstick.values | {"base": {"steps": 2, "seed": 0}}
    (tmp_path / "forked.yaml").write_text(yaml.safe_dump(recipe))
    options = {"classes": 3, "encoder": "digits", "reference": "repa", "train": recipe["train"]}
    (tmp_path / "timing-forked.json").write_text(json.dumps(TIMING | {"options": options}))
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--workers", "0"]

    def run(*options):
        return yardstick.run.main([str(tmp_path / "forked.yaml"), *places, *options])

    run.folder, run.work = tmp_path, tmp_path / "work" / "forked"
    run.lines = lambda: [json.loads(line) for line in (tmp_path / "results-forked.jsonl").read_text().splitlines()]
    return run


@pytest.mark.slow
def test_arms_go_on_from_the_base(forked, yardstick, tiny_yardstick):
    assert forked("--arms", "none", "repa", "--seeds", "0") == 0
    none, repa = forked.lines()
    # The base of two steps costs half as much a step as the reference of 0.2 s.
    assert none["nominal_seconds"][0] == [0, pytest.approx(0.2)] and repa["nominal_seconds"][0] == [
        0,
        pytest.approx(0.2),
    ]
    assert none["steps"] == 4 and none["nominal_seconds"][-1] == [4, pytest.approx(0.2 + 4 * 0.1)]
    assert none["plain_train"] > 0 and none["hog_validation"] > 0 and none["kid_train"] > 0
    assert [path.name for path in forked.work.glob("base/checkpoint-*")] == ["checkpoint-2"]
    # Lines of recipes without a base keep their names.
    recipe = yardstick.recipe.load_recipe(tiny_yardstick.places[0])
    assert "base" not in tiny_yardstick.values and recipe.base is None


def test_a_fork_without_alignment_is_the_same_run(yardstick, command, tmp_path):
    """Two steps and two forked ones are the four of one run: weights, average, moments and examples."""
    import train_arm

    def train(name, *more, **changes):
        options = {
            "objective": "none",
            "encoder": None,
            "checkpointing_steps": 2,
            "ema_decay": 0.5,
            "lr_warmup_steps": 0,
        }
        argv = command(**options | {"output_dir": tmp_path / name} | changes)
        yardstick.run.AcceleratorState._reset_state(reset_partial_state=True)
        train_arm.main([*map(str, argv), *more])
        return tmp_path / name

    whole = train("whole", max_train_steps=4)
    part = train("part", "--fork_from", str(whole / "checkpoint-2"), max_train_steps=2)
    names = [f"transformer/{WEIGHTS}", f"transformer_ema/{WEIGHTS}"]
    for name in names:
        wanted, found = load_file(whole / "checkpoint-4" / name), load_file(part / "checkpoint-2" / name)
        assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items())
    wanted, found = (
        torch.load(folder / "optimizer.bin", weights_only=True)["state"]
        for folder in (whole / "checkpoint-4", part / "checkpoint-2")
    )
    assert all(torch.equal(tensor, found[i][key]) for i, state in wanted.items() for key, tensor in state.items())

    # An aligned base has moments that are not the transformer's alone.
    aligned = train("aligned", objective="repa", encoder="digits", max_train_steps=2)
    with pytest.raises(InputError, match="fork from a run without alignment"):
        train("wrong", "--fork_from", str(aligned / "checkpoint-2"), max_train_steps=2)


def test_an_arm_from_scratch_gets_the_time_of_the_base(forked, yardstick):
    recipe = yardstick.recipe.load_recipe(str(forked.folder / "forked.yaml"))
    timing = yardstick.timing.read_timing(recipe, forked.folder)
    arm = {"objective": "none"}
    forking, scratch = (
        yardstick.recipe.equal_compute(recipe, arm | more, "none", timing) for more in ({}, {"from_base": False})
    )
    assert scratch["steps"] == forking["steps"] + recipe.base["steps"]
    assert scratch["nominal_seconds"][0] == (0, 0) and scratch["nominal_seconds"][-1][1] == pytest.approx(
        forking["nominal_seconds"][-1][1]
    )
    assert not yardstick.recipe.starts_from_base(recipe, arm | {"from_base": False})
    argv = yardstick.run.train_argv(recipe, arm | {"from_base": False}, scratch, 0, forked.work, forked.folder)
    assert not any("from_base" in word for word in argv)
