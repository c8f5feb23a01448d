# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The yardstick's driver on digits: equal compute by hand, finished runs, continued runs, the table's numbers."""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import yaml

from diffusers_vrpo import SiTTransformer2DModel
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.output_dir import claim_output_dir
from support.paths import ROOT
from support.yardstick import MODEL, TIMING, YARDSTICK


def results(tiny_yardstick) -> list[dict]:
    return [json.loads(line) for line in (tiny_yardstick.folder / "results-tiny.jsonl").read_text().splitlines()]


def test_equal_compute_by_hand(yardstick, tiny_yardstick):
    recipe = yardstick.recipe.load_recipe(tiny_yardstick.places[0])
    recipe = yardstick.recipe.dataclasses.replace(recipe, reference_steps=100, charge_features=True)
    arms = yardstick.recipe.load_arms()
    arms["conv+stop"] = {"objective": "repa", "projector": "conv", "alignment_coeff": 2.0, "stop": 0.5}
    timed = [
        ("repa", {"objective": "repa"}, 1.0),
        ("none", {"objective": "none"}, 0.8),
        ("conv", {"objective": "repa", "projector": "conv"}, 1.25),
    ]
    timing = TIMING | {"arms": [dict(zip(("name", "flags", "ratio"), each)) for each in timed]}

    def plan(name):
        return yardstick.recipe.equal_compute(recipe, arms[name], name, timing)

    # Features cost 0.4 s, two steps of the reference: the budget is 102 steps, of which aligned arms have 100.
    assert plan("repa")["steps"] == 100
    assert plan("none")["steps"] == round(102 / 0.8)
    assert plan("none")["nominal_seconds"][0] == (0, 0.0)
    # Half of the 100 at 1.25 each, the other half at 0.8.
    stopped = plan("conv+stop")
    assert (stopped["alignment_stop_step"], stopped["steps"]) == (40, 40 + round(50 / 0.8))
    # Coefficient, shares and timestep weight cost nothing.
    assert plan("repa-1.5")["steps"] == plan("repa")["steps"]
    assert plan("repa+w+stop") == plan("repa+stop")
    for name in ("repa", "none", "repa+stop", "conv+stop"):
        assert plan(name)["nominal_seconds"][-1][1] == pytest.approx(102 * 0.2, rel=0.01)
    with pytest.raises(InputError, match="arm vrpo has no time in timing-tiny.json; run `timing.py tiny --arms vrpo`"):
        plan("vrpo")


def test_recipe_hash_names_what_results_depend_on(yardstick, tiny_yardstick):
    recipe, module = yardstick.recipe.load_recipe(tiny_yardstick.places[0]), yardstick.recipe
    plan = {"steps": 2, "alignment_stop_step": None}
    key = module.recipe_hash(recipe, {"objective": "repa"}, plan)
    assert key == module.recipe_hash(recipe, {"objective": "repa"}, plan)
    changed = module.dataclasses.replace(recipe, train=recipe.train | {"learning_rate": 2e-3})
    others = [(changed, {"objective": "repa"}, plan), (recipe, {"objective": "none"}, plan)]
    others += [(recipe, {"objective": "repa"}, plan | {"steps": 3})]
    assert key not in [module.recipe_hash(*each) for each in others]
    (tiny_yardstick.folder / "wrong.yaml").write_text(yaml.safe_dump(tiny_yardstick.values | {"clases": 3}))
    with pytest.raises(InputError, match="wrong.yaml: clases is unknown"):
        module.load_recipe(str(tiny_yardstick.folder / "wrong.yaml"))
    with pytest.raises(InputError, match="--arms nothing is not one of none, repa"):
        module.choose_arms(["nothing"], recipe)


def test_recorded_results_are_of_the_recipe_as_it_is(yardstick):
    """The table of the recorded results has lines: neither a new option of the recipe nor of the code has renamed them."""
    recipe = yardstick.recipe.load_recipe("cpu")
    timing, arms = yardstick.timing.read_timing(recipe), yardstick.recipe.load_arms()
    lines = yardstick.run.read_results(YARDSTICK / "results-cpu.jsonl")
    for name in ("none", "repa", "vrpo"):
        plan = yardstick.recipe.equal_compute(recipe, arms[name], name, timing)
        key = yardstick.recipe.recipe_hash(recipe, arms[name], plan)
        assert {line["seed"] for line in lines if (line["arm"], line["recipe"]) == (name, key)} == {1, 2, 3}


@pytest.mark.slow
def test_two_arms_and_seeds_once(tiny_yardstick, yardstick, capsys):
    wanted = ["--arms", "none", "repa", "--seeds", "0", "1"]
    assert tiny_yardstick(*wanted, "--dry_run") == 4
    assert "none, seed 0: 4 steps, 0 s" in capsys.readouterr().out
    assert tiny_yardstick(*wanted) == 0
    lines = results(tiny_yardstick)
    assert [(line["arm"], line["seed"], line["steps"]) for line in lines] == [
        ("none", 0, 4),
        ("repa", 0, 2),
        ("none", 1, 4),
        ("repa", 1, 2),
    ]
    for line in lines:
        assert [step for step, _ in line["curve"]] == ([2, 4] if line["arm"] == "none" else [1, 2])
        assert line["fd_train"] > 0 and line["fd_validation"] > 0 and line["sliced_wasserstein_train"] > 0
        assert line["loss_train"] > 0 and line["loss_validation"] > 0
        assert 0 <= line["recall"] <= 1 and 0 <= line["coverage"] <= 1 and 0 <= line["probe_accuracy"] <= 1
        assert line["train_seconds"] > 0 and line["train_flops"] > 0 and line["hardware"] and line["commit"]
    # The moments of the training images are made by the first run, and used by the others.
    assert (tiny_yardstick.folder / "work" / "tiny" / "fd_reference.safetensors").exists()

    # Again: nothing to do; with a line cut short that one only, and from where it was: judged, not trained.
    assert tiny_yardstick(*wanted) == 0 and len(results(tiny_yardstick)) == 4
    file = tiny_yardstick.folder / "results-tiny.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]) + json.dumps(lines[3])[:50])
    capsys.readouterr()
    assert tiny_yardstick(*wanted) == 0
    assert "1 of 4 runs to do" in capsys.readouterr().out
    again = yardstick.run.read_results(file)
    assert again[3]["fd_train"] == lines[3]["fd_train"] and again[3]["train_seconds"] == lines[3]["train_seconds"]

    # The table of these results.
    yardstick.table.main(tiny_yardstick.places)
    text = capsys.readouterr().out
    mean = np.mean([line["fd_train"] for line in lines if line["arm"] == "none"])
    gap = mean - np.mean([line["fd_train"] for line in lines if line["arm"] == "repa"])
    row = next(line for line in text.splitlines() if line.startswith("| none |"))
    assert f"| {gap:+.1f} |" in row and "| 2 | 4 |" in row
    written = tiny_yardstick.folder / "work" / "tiny" / "report"
    assert (written / "table.md").read_text().startswith("| arm | seeds |")
    assert (written / "quality_vs_time.png").exists() and (written / "quality_vs_steps.svg").exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on(tiny_yardstick, yardstick):
    recipe = tiny_yardstick.folder / "longer.yaml"
    recipe.write_text(yaml.safe_dump(tiny_yardstick.values | {"reference_steps": 400, "evaluations": 1}))
    options = [str(recipe), *tiny_yardstick.places[1:], "--workers", "0", "--arms", "repa", "--seeds", "3"]
    runs, sent = tiny_yardstick.folder / "work" / "longer" / "runs", []

    def interrupt():
        while not (found := list(runs.glob("*/metrics.jsonl"))) or not found[0].stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        sent.append(True)

    threading.Thread(target=interrupt, daemon=True).start()
    assert yardstick.run.main(options) == 1 and sent
    assert not (tiny_yardstick.folder / "results-longer.jsonl").exists()
    assert yardstick.run.main(options) == 0
    (line,) = yardstick.run.read_results(tiny_yardstick.folder / "results-longer.jsonl")
    assert line["steps"] == 400 and [step for step, _ in line["curve"]] == [400]
    (folder,) = runs.iterdir()
    starts = [json.loads(each)["step"] for each in (folder / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2 and 0 < starts[1] < 400
    assert not list(folder.glob("checkpoint-*"))


def test_timing_by_real_steps(tiny_yardstick, yardstick):
    results = tiny_yardstick.folder / "timed"
    results.mkdir()
    places = [*tiny_yardstick.places[:3], "--results", str(results)]
    yardstick.timing.main([*places, "--arms", "none", "--rounds", "1", "--steps", "2", "--skipped", "1"])
    found = json.loads((results / "timing-tiny.json").read_text())
    assert [(timed["name"], timed["ratio"] == 1.0) for timed in found["arms"]] == [("repa", True), ("none", False)]
    assert found["reference_seconds"] > 0 and found["features_seconds"] > 0
    kept = (results / "timing-tiny.json").read_text()
    yardstick.timing.main([*places, "--arms", "none"])
    assert (results / "timing-tiny.json").read_text() == kept
    recipe = yardstick.recipe.load_recipe(tiny_yardstick.places[0])
    other = yardstick.recipe.dataclasses.replace(recipe, train=recipe.train | {"train_batch_size": 4})
    with pytest.raises(
        InputError, match="timing-tiny.json is of other options than tiny; run `timing.py tiny --again`"
    ):
        yardstick.timing.read_timing(other, results)


def test_arms_without_a_time_are_timed_first(tiny_yardstick, yardstick, monkeypatch):
    asked = []
    monkeypatch.setattr(yardstick.run, "time_arms", lambda args, recipe, names: asked.append((args, names)))
    recipe, arms = yardstick.recipe.load_recipe(tiny_yardstick.places[0]), yardstick.recipe.load_arms()
    args = yardstick.run.build_parser().parse_args(tiny_yardstick.places)
    known = ("none", "repa", "repa-1.5", "repa+stop", "repa+w+stop")
    yardstick.run.measure_missing(args, recipe, {name: arms[name] for name in known})
    assert asked == []
    yardstick.run.measure_missing(args, recipe, {name: arms[name] for name in ("none", "irepa", "vrpo")})
    ((used, names),) = asked
    assert names == ["irepa", "vrpo"] and (used.rounds, used.again) == (5, False)
    assert (str(used.work), str(used.results)) == (tiny_yardstick.places[2], tiny_yardstick.places[4])


def test_difference_in_pooled_std_by_hand(yardstick):
    # Variances 1 and 4 of three each: the pooled one is 2.5.
    assert yardstick.table.in_std([9.0, 10.0, 11.0], [18.0, 20.0, 22.0]) == pytest.approx(-10 / 2.5**0.5)
    assert yardstick.table.in_std([9.0], [10.0]) is None

    def runs(values):
        return [{"seed": seed, "fd_train": value} for seed, value in enumerate(values)]

    assert yardstick.table.paired(runs([9.0, 12.0, 13.0]), runs([10.0, 11.0, 15.0, 99.0])) == "-0.7 ± 1.5"
    assert yardstick.table.paired(runs([9.0]), runs([10.0])) == "-1.0"
    line = {"seed": 1, "steps": 10, "nominal_seconds": [[0, 0], [10, 5.0]], "train_flops": 2e12} | dict.fromkeys(
        yardstick.table.COLUMNS, 0.5
    )
    arms = {"repa": [line | {"fd_train": 20.0}], "vrpo": [line | {"fd_train": 15.0}]}
    head, rows = yardstick.table.table_rows(arms, "repa")
    assert rows[1][:5] == ["vrpo", "1", "10", "5", "2 TFLOP"] and rows[1][-3:] == ["-5.0", "–", "-5.0"]
    assert rows[0][-3:] == ["–", "–", "–"] and len(head) == len(rows[0])


def test_sliced_wasserstein_of_a_shift(yardstick):
    generator = torch.Generator().manual_seed(0)
    x, shift = torch.randn(400, 3, generator=generator), torch.tensor([3.0, 0.0, 0.0])
    distance = yardstick.judge.sliced_wasserstein
    assert distance(x, x) == 0
    # Projected on a random direction u the shift is 3 u_1, whose mean square is 9 / 3.
    assert distance(x, x + shift, projections=20_000) == pytest.approx(3**0.5, rel=0.02)
    # A set and the same one twice have the same quantiles.
    assert distance(x, torch.cat([x, x])) < 0.02


def test_loss_on_real_images(yardstick):
    """A network that has learned nothing predicts 0, so that the loss is what noise and image differ by."""
    torch.manual_seed(0)
    transformer = SiTTransformer2DModel(sample_size=8, in_channels=3, num_classes=3, **MODEL)
    images, labels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 3
    loss = yardstick.judge.real_loss(transformer, images, labels)
    # Noise of variance 1 against pixels that are evenly spread over [-1, 1]: 1 + 1/3.
    assert loss == pytest.approx(4 / 3, rel=0.05) and loss == yardstick.judge.real_loss(transformer, images, labels)
    assert loss != yardstick.judge.real_loss(transformer, images.flip(0), labels)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are given to processes on Linux only")
def test_runs_side_by_side_have_cores_of_their_own(yardstick, tmp_path, monkeypatch):
    monkeypatch.setattr(yardstick.run.os, "sched_getaffinity", lambda _: {3, 5, 8})
    assert yardstick.run.share_cores(2, 1) == [[3], [5]]
    assert yardstick.run.share_cores(2, 2) == [[3, 5], [8, 3]]
    assert yardstick.run.share_cores(2, None) == [[], []]
    monkeypatch.undo()
    args = argparse.Namespace(workers=1, threads=1, work=tmp_path)
    workers = yardstick.run.Workers(args, argparse.Namespace(name="tiny"))
    command = [
        sys.executable,
        "-c",
        "import os; print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])",
    ]
    assert workers.call(command, tmp_path / "log.txt") and workers.cores.qsize() == 1
    assert (tmp_path / "log.txt").read_text() == f"[{min(os.sched_getaffinity(0))}] 1\n"


def test_training_accepts_a_folder_with_the_log_of_the_yardstick(yardstick, tmp_path):
    """The log of a run begins before the run does."""
    (tmp_path / yardstick.run.LOG).write_text("")
    (tmp_path / "fd_reference.safetensors").write_bytes(b"")
    claim_output_dir(VRPOConfig(output_dir=str(tmp_path)), tmp_path, None)


def test_none_trains_without_the_block_of_the_others(yardstick, tiny_yardstick, tmp_path):
    recipe = yardstick.recipe.load_recipe(tiny_yardstick.places[0])
    recipe = yardstick.recipe.dataclasses.replace(recipe, train=recipe.train | {"layer_scope": "1"})
    plan = {"steps": 4, "alignment_stop_step": None}
    argv = [
        yardstick.training_run.train_argv(recipe, {"objective": name}, plan, 0, tmp_path, tmp_path)
        for name in ("none", "repa")
    ]
    assert ["--layer_scope=1" in each for each in argv] == [False, True]


def test_judge_sees_images_of_the_side_that_is_asked_for(yardstick, tmp_path):
    file = tmp_path / "preprocessor_config.json"
    values = {"do_center_crop": True, "crop_size": {"height": 289, "width": 289}, "image_mean": [0.5, 0.5, 0.5]}
    file.write_text(json.dumps(values))
    yardstick.subset.show_smaller(file, 128)
    changed = {"do_center_crop": False, "size": {"height": 128, "width": 128}}
    assert json.loads(file.read_text()) == values | changed


def test_cost_of_a_recipe_by_hand(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("recipe_cost", ROOT / "benchmarks" / "recipe_cost.py")
    recipe_cost = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe_cost)
    recipe = ROOT / "configs" / "imagenet256" / "sit-b-2-repa.yaml"
    recipe_cost.main([str(recipe), "--peak_tflops", "1000", "--mfu", "0.5"])
    # Forward: blocks 12 x 256 x (4 x 768^2 + 2 x 256 x 768 + 8 x 768^2) multiply-adds, and the small parts; DINOv2-B as much.
    blocks = 2 * 12 * 256 * (12 * 768**2 + 2 * 256 * 768)
    projector = 2 * 256 * (768 * 2048 + 2048**2 + 2048 * 768)
    flops = 3 * (blocks + projector) + blocks
    cost = recipe_cost.recipe_cost(recipe, recipe_cost.dinov2_base_flops())
    assert cost["flops"] == pytest.approx(flops, rel=0.02) and cost["parameters"] == pytest.approx(130e6, rel=0.01)
    hours = cost["flops"] * 256 * 400_000 / 5e14 / 3600
    assert f"| {hours:.0f} |" in capsys.readouterr().out
    other = tmp_path / "run.yaml"
    other.write_text(yaml.safe_dump({"preset": "SiT-B/2", "encoder": "digits"}))
    with pytest.raises(InputError, match="is not of facebook/dinov2-base and 32x32 latents"):
        recipe_cost.recipe_cost(other, 0)
    other.write_text("objective: repa")
    with pytest.raises(InputError, match="is not a recipe with a preset"):
        recipe_cost.recipe_cost(other, 0)
