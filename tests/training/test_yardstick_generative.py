# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The comparison of the generative policy with flow matching, on digits: one base, equal wall time, lines once."""

import json
import shutil

import pytest
import yaml
from PIL import Image

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.metrics import read_metrics


POLICY = {"generative_policy_start_step": 0, "rollout_classes": 2, "rollout_group_size": 2, "rollout_steps": 2}
POLICY |= {"rollout_every": 1, "mc_samples": 2, "reward_reference_images": 60, "guard_samples": 16, "guard_every": 100}


@pytest.fixture
def comparison(tiny_yardstick, yardstick, tmp_path):
    """A comparison on the tiny recipe, and a function that runs the driver on it."""
    import generative

    values = {
        "size": tiny_yardstick.places[0],
        "base": {"objective": "repa"},
        "base_seed": 1,
        "base_steps": 3,
        "budget_steps": 20,
    }
    values |= {"reward_pixels": 8, "guidance_scales": [2.0], "guided_samples": 12, "policy": POLICY}
    values |= {"train": {"learning_rate": 1e-3}, "arms": {"fm": {}, "fm-annealed": {"lr_scheduler": "linear"}}}
    values["arms"]["policy"] = {"policy": True}
    file = tmp_path / "generative-tiny.yaml"
    file.write_text(yaml.safe_dump(values))

    def run_file(name, *options):
        work = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
        return generative.main([str(tmp_path / name), *work, "--workers", "0", "--rounds", "1", *options])

    def run(*options):
        return run_file(file.name, *options)

    run.module, run.folder, run.file, run.run = generative, tmp_path, file, run_file
    return run


@pytest.mark.slow
def test_arms_from_one_base_for_the_same_time(comparison, capsys, monkeypatch):
    times = {comparison.module.cost_key({}): {"step": 0.1, "setup": 0.0}}
    times[comparison.module.cost_key({"policy": True})] = {"step": 0.5, "setup": 1.0}
    (comparison.folder / "timing-generative-tiny.json").write_text(json.dumps(times))
    comparison("--seeds", "1")
    lines = [
        json.loads(line) for line in (comparison.folder / "results-generative-tiny.jsonl").read_text().splitlines()
    ]
    # 20 steps are 2 s: 1 s of statistics and 2 updates.
    steps = {line["arm"]: line["steps"] for line in lines}
    assert steps == {"base": 0, "fm": 20, "fm-annealed": 20, "policy": 2}
    assert {line["nominal_seconds"] for line in lines} == {0.0, 2.0}
    for line in lines:
        assert set(line["fd_guided"]) == {"1.0", "2.0"} and line["guided"] == min(line["fd_guided"].values())
        assert line["fd_train"] > 0 and line["fd_reward"] > 0
    runs = comparison.folder / "work" / "tiny" / "generative-tiny"
    rates = [row["learning_rate"] for row in read_metrics(runs / "fm-annealed-20-1" / "metrics.jsonl")]
    assert rates[-1] < 0.2 * max(rates)
    assert "policy/ratio" in read_metrics(runs / "policy-2-1" / "metrics.jsonl")[-1]
    table = capsys.readouterr().out
    assert "| policy | 1 | 2 | 2 |" in table
    comparison("--seeds", "1")
    assert "0 runs to do" in capsys.readouterr().out
    comparison("--table")
    assert "| fm-annealed | 1 | 20 | 2 |" in capsys.readouterr().out
    with Image.open(comparison.folder / "work" / "tiny" / "report" / "generative-tiny-samples.png") as image:
        assert image.size == (2 * 3 * 8, 2 * 4 * 2 * 8)  # three classes; base and three arms, two rows each

    # Another comparison goes on from an arm of this one, which is trained where it is not there yet.
    shutil.rmtree(runs / "fm-annealed-20-1")
    monkeypatch.setattr(
        comparison.module.judge, "main", lambda argv: shutil.copy(runs / "fm-20-1/judged.json", argv[-1])
    )
    values = yaml.safe_load(comparison.file.read_text())
    del values["base_steps"]
    base = {"comparison": str(comparison.file), "arm": "fm-annealed"}
    values |= {"base": base, "arms": {"fm": {}}, "budget_steps": 2}
    comparison.file.with_name("generative-later.yaml").write_text(yaml.safe_dump(values))
    comparison.run("generative-later.yaml", "--seeds", "1")
    lines = (comparison.folder / "results-generative-later.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["base", "fm"]
    config = yaml.safe_load((runs.with_name("generative-later") / "fm-2-1" / "train_config.yaml").read_text())
    assert config["pretrained_model_name_or_path"] == str(runs / "fm-annealed-20-1")


def test_arms_that_cost_the_same_share_a_time_and_a_budget_without_a_step_is_refused(comparison):
    module, cpu = comparison.module, comparison.module.load_comparison("cpu")
    assert set(cpu.arms) >= {"fm", "fm-annealed", "policy"}
    times = {module.cost_key({}): {"step": 0.1, "setup": 0.0}}
    times[module.cost_key(cpu.arms["policy"])] = {"step": 0.5, "setup": 100.0}
    # What an update only computes with costs nothing.
    assert module.cost_key(cpu.arms["policy"]) == module.cost_key(cpu.arms["policy-fidelity"])
    assert module.cost_key(cpu.arms["policy"]) != module.cost_key(cpu.arms["policy-every-1"])
    with pytest.raises(InputError, match="budget_steps 600 does not pay for one step of policy; take more"):
        module.plan_steps(cpu, "policy", cpu.arms["policy"], times)
    with pytest.raises(InputError, match="is not one of fm, fm-annealed"):
        comparison("--arms", "other")
    with pytest.raises(InputError, match="has no run"):
        comparison("--table")
