# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Reports on runs: figures worked out by hand, real runs through the command line, damaged and foreign input."""

import json
import re
import statistics
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from diffusers_vrpo.commands.report import build_parser, collect, main, number
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel
from diffusers_vrpo.reporting.figures import metric_label
from diffusers_vrpo.reporting.runs import Run, first_crossing, merge_rows
from diffusers_vrpo.schemas import START, read_rows
from diffusers_vrpo.training.metrics import MetricsFile, read_metrics
from diffusers_vrpo.training.throughput import projector_flops, step_flops
from support.models import aligned_with
from support.training import run


FD = "validation/fd_digits"


def write_run(folder, values: dict, seconds=2.0, flops=5.0, rows=(), start=None, **options):
    """A run's folder: `values` of the metric by step; seconds and FLOPs a step are numbers, or functions of the step."""
    folder.mkdir(parents=True)
    (folder / "train_config.yaml").write_text(yaml.safe_dump({"output_dir": str(folder), **options}))

    def cumulative(cost, step):
        return cost(step) if callable(cost) else cost * step

    logged = {step: {FD: value} for step, value in values.items()}
    for step in range(100, max(values) + 1, 100) if seconds else ():
        logged.setdefault(step, {})
        logged[step] |= {"train_seconds": cumulative(seconds, step), "train_flops": cumulative(flops, step)}
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step in sorted(logged):
        metrics.log(logged[step], step)
    with metrics.path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if start is not None:
        (folder / "starts.jsonl").write_text(json.dumps({"step": 0, **start}) + "\n")
    return folder


def numbers(*arguments) -> dict:
    """What would be in `report.json`, without a plot."""
    found, _ = collect(build_parser("report").parse_args([*map(str, arguments)]))
    return json.loads(json.dumps(found, allow_nan=False))


def report(tmp_path, *arguments) -> dict:
    """What `report.json` holds after the command."""
    main([*map(str, arguments), "--output_dir", str(tmp_path / "report")])
    return json.loads((tmp_path / "report" / "report.json").read_text())


def line(a, b, steps=range(100, 1001, 100)) -> dict:
    """`a - b step` at these steps."""
    return {step: a - b * step for step in steps}


# Numbers by hand


def test_a_speed_up_worked_out_by_hand(tmp_path, capsys):
    # REPA falls from 20 by 1 in 100 steps, to 10 at step 1000, for 2 s and 5 FLOPs a step: 2000 s, 5000 FLOPs.
    base = write_run(tmp_path / "repa", line(20, 1 / 100), seed=0, objective="repa")
    # These fall twice and 2.5 times as fast, evaluated every 300 steps: 10 is at step 500 and at step 400. A step takes 3 s.
    # FLOPs are 10 a step up to step 400, then 5: 4500 up to step 500 and 4000 up to step 400.
    cost = {"seconds": 3.0, "flops": lambda step: 10 * min(step, 400) + 5 * max(0, step - 400)}
    every = (300, 600, 900)
    ours = [
        write_run(tmp_path / "a", line(20, 1 / 50, every), seed=0, objective="vrpo", **cost),
        write_run(tmp_path / "b", line(20, 1 / 40, every), seed=1, objective="vrpo", **cost),
    ]
    found = report(tmp_path, base, *ours, "--baseline", "repa")
    assert found["metric"] == FD
    speed_up = found["speed_up"]
    assert speed_up["target"] == pytest.approx(10)
    assert speed_up["reference"] == {"steps": 1000, "seconds": 2000, "flops": 5000}
    (control, vrpo) = speed_up["arms"]
    assert vrpo["arm"] == "vrpo" and vrpo["reached"] == vrpo["n"] == 2
    for name, seeds, whole in (
        ("steps", (500, 400), 1000),
        ("seconds", (1500, 1200), 2000),
        ("flops", (4500, 4000), 5000),
    ):
        shares = [spent / whole for spent in seeds]
        assert vrpo[name]["seeds"] == pytest.approx(seeds)
        assert vrpo[name]["share"] == pytest.approx(statistics.mean(shares))
        assert vrpo[name]["share_std"] == pytest.approx(statistics.stdev(shares))
    # The mean of the seeds falls by 0.0225 a step: 10 is at step 444.4.
    assert vrpo["steps"]["mean_curve"] == pytest.approx(10 / 0.0225)
    assert vrpo["seconds"]["factor_first_to_first"] == pytest.approx(2000 / (3 * 10 / 0.0225))
    assert control["steps"]["share"] == pytest.approx(1) and not control["worse_again"]
    assert found["sentences"][1] == (
        f"vrpo reaches the last {FD} of repa (10) in 45 ± 7 % of repa's steps, 68 ± 11 % of its training time and "
        "85 ± 7 % of its FLOPs (all 2 seeds, ± their standard deviation)."
    )
    assert found["sentences"][1] in capsys.readouterr().out
    # Not at the same last step: both have 900, where REPA is at 11, ours at 2 and -2.5, with a deviation of 4.5/sqrt(2).
    gap = found["arms"][1]["difference"]
    assert gap["step"] == 900 and gap["value"] == pytest.approx(-11.25)
    assert gap["pooled_std"] == pytest.approx(4.5 / 2**0.5) and gap["in_std"] == pytest.approx(-11.25 / (4.5 / 2**0.5))
    assert any("end at different steps (repa 1000, vrpo 900)" in text for text in found["warnings"])


@pytest.mark.parametrize(
    "values, target, higher, expected",
    [
        ([12, 9, 8], 10, False, (100 + 100 * 2 / 3, False, False)),
        ([12, 9, 11, 8], 10, False, (100 + 100 * 2 / 3, False, True)),  # not monotone: the first crossing
        ([12, 10, 8], 10, False, (200, False, False)),
        ([9, 8], 10, False, (100, True, False)),  # there already: at most 100
        ([12, 11, 10.5], 10, False, None),
        ([0.1, 0.3, 0.7], 0.5, True, (250, False, False)),
        ([0.1], 0.5, True, None),
        ([], 1, False, None),
    ],
)
def test_first_crossing(values, target, higher, expected):
    found = first_crossing([100 * (i + 1) for i in range(len(values))], values, target, higher)
    assert found == expected if expected is None else found == pytest.approx(expected)


def test_some_seeds_reach_it_none_do_and_the_baseline_gets_worse(tmp_path, capsys):
    base = write_run(tmp_path / "base", {100: 30, 200: 10, 300: 13, 500: 12}, objective="none")  # 12 at step 190
    mixed = [
        write_run(tmp_path / "m0", {100: 13, 200: 11, 300: 9}, seed=0, objective="repa"),  # 12 at step 150
        write_run(tmp_path / "m1", {100: 19, 200: 17, 300: 13}, seed=1, objective="repa"),  # never
    ]
    never = write_run(tmp_path / "never", {100: 40, 200: 30, 300: 20}, objective="vrpo")
    # The mean of `repa` is 16, 14, 11: 12 at step 266.7.
    found = report(tmp_path, base, *mixed, never, "--baseline", "none")
    control, repa, vrpo = found["speed_up"]["arms"]
    assert control["steps"]["share"] == pytest.approx(190 / 500) and control["worse_again"]
    assert repa["reached"] == 1 and repa["steps"]["seeds"] == [150, None] and repa["steps"]["share"] is None
    assert repa["steps"]["share_of_mean_curve"] == pytest.approx((200 + 200 / 3) / 500)
    assert repa["steps"]["factor_first_to_first"] == pytest.approx(190 / (200 + 200 / 3))
    assert vrpo["reached"] == 0 and vrpo["flops"]["share"] is vrpo["flops"]["factor_first_to_first"] is None
    first, second, third = found["sentences"]
    assert (
        "38 % of none's steps" in first and "That is where it first does; a later evaluation is worse again." in first
    )
    assert (
        f"repa: 1 of 2 seeds reach the last {FD} of none (12); their mean reaches it in 53 % of none's steps" in second
    )
    assert third == f"vrpo does not reach the last {FD} of none (12)."
    assert any(
        "none itself first reaches its last value after 38 % of its steps" in text for text in found["warnings"]
    )
    assert any("fewer than three seeds (none: 1; repa: 2; vrpo: 1)" in text for text in found["warnings"])
    assert "does not reach" in (tmp_path / "report" / "report.html").read_text()


def test_a_given_target_with_and_without_a_baseline(tmp_path):
    a = write_run(tmp_path / "a", {100: 0.2, 200: 0.6}, objective="repa")
    b = write_run(tmp_path / "b", {100: 0.6, 200: 0.8}, objective="vrpo")
    found = numbers(a, b, "--target", "0.5", "--higher_is_better")
    assert found["sentences"] == [
        f"repa reaches {FD} 0.5 in 175 steps, 5.8 min and 875 FLOP (one seed).",
        f"vrpo reaches {FD} 0.5 in at most 100 steps, 3.3 min and 500 FLOP (one seed).",
    ]
    found = numbers(a, b, "--target", "0.5", "--higher_is_better", "--baseline", "repa")
    assert found["speed_up"]["arms"][1]["steps"]["share"] == pytest.approx(100 / 175)
    assert "in at most 57 % of repa's steps for it" in found["sentences"][1]


def test_a_baseline_that_was_evaluated_before_training_only(tmp_path):
    runs = [
        write_run(tmp_path / name, {0: 9, **more}, rows=[{"step": 100, "train_seconds": 60}], objective=name)
        for name, more in (("none", {}), ("repa", {50: 4}))
    ]
    found = numbers(*runs, "--baseline", "none")
    assert found["speed_up"]["reference"] is None
    assert found["sentences"][1] == f"repa reaches the last {FD} of none (9) in at most 0 steps and 0.0 s (one seed)."


def test_mean_and_deviation_over_seeds(tmp_path):
    runs = [
        write_run(tmp_path / "0", {100: 10, 200: 8, 300: 6}, seconds=1.0, seed=0, objective="repa"),
        write_run(tmp_path / "1", {100: 12, 300: 7}, seconds=2.0, seed=1, objective="repa"),
        write_run(tmp_path / "2", {100: 14, 200: 9, 300: 11, 400: 1}, seconds=3.0, seed=2, objective="repa"),
    ]
    (arm,) = numbers(*runs)["arms"]
    assert arm["n"] == 3 and arm["seeds"] == [0, 1, 2]
    assert arm["curve"]["steps"] == [100, 300] and arm["curve"]["mean"] == [12, 8]
    assert arm["curve"]["std"] == pytest.approx([2, 7**0.5])
    assert arm["curve"]["seconds"] == [200, 600] and arm["final"]["seconds"]["std"] == pytest.approx(300)
    assert arm["final"]["step"] == 300 and arm["final"]["values"] == [6, 7, 11]
    assert arm["best"] == {"value": 8, "step": 300}


def test_numbers_have_the_digits_of_their_deviation():
    assert number(12.3456, 0.2111) == "12.35 ± 0.21" and number(1234.5, 67.8) == "1234 ± 68"
    assert number(0.012345) == "0.01235" and number(1.0, 0.0) == "1 ± 0" and number(None) == "–"


# What runs wrote


def test_lines_of_resumed_and_killed_runs(tmp_path):
    folder = write_run(tmp_path / "run", {100: 9.0, 200: 8.0, 300: 7.0}, objective="repa")
    MetricsFile(folder / "metrics.jsonl", resume_step=200).log({FD: 6.5, "train_seconds": 650}, 300)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 400, "train_sec\n')  # torn by a kill
        file.write("17\n\n")
        file.write(json.dumps({"step": 400, "train_seconds": 800.0}) + "\n")
        file.write(json.dumps({"step": 400, FD: 6.0}) + "\n")  # quality in a line of its own
        file.write(json.dumps({"step": 500, FD: float("nan")}) + "\n")
        file.write(json.dumps({"step": 600, FD: 5.0}) + "\n")
    warnings = []
    found = Run(folder, warnings.append)
    found.evaluate(FD, warnings.append)
    assert found.steps.tolist() == [100, 200, 300, 400, 600] and found.values.tolist() == [9, 8, 6.5, 6, 5]
    assert [row["step"] for row in found.rows] == [100, 200, 300, 400, 500, 600]
    # Linear between logged times, and beyond the last.
    assert found.cost("seconds", [50, 250, 350, 600]).tolist() == [100, 525, 725, 1100]
    assert len(warnings) == 2 and "2 damaged line(s) skipped" in warnings[0]
    assert f"{FD} is not a finite number at step 500" in warnings[1]
    # A file that was not cut at the checkpoint: what the continued run wrote again replaces the rest.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 300, FD: 6.4, "train_seconds": 640.0}) + "\n")
    found = Run(folder, warnings.append)
    found.evaluate(FD, warnings.append)
    assert found.steps.tolist() == [100, 200, 300] and found.values.tolist() == [9, 8, 6.4]


def test_costs_of_a_log_that_has_none(tmp_path):
    """Images per second, TFLOP/s of a device and samples seen tell them: 2 processes of 8, accumulated twice."""
    rows = [
        {"step": 10, "samples_seen": 320, "images_per_second": 16.0, "tflops_per_device": 0.5, FD: 3},
        {"step": 20, "samples_seen": 640, "images_per_second": 32.0, "tflops_per_device": 1.0, FD: 2},
    ]
    options = {"train_batch_size": 8, "gradient_accumulation_steps": 2}
    folder = write_run(tmp_path / "run", {1: 5}, seconds=None, rows=rows, **options)
    warnings = []
    found = Run(folder, warnings.append)
    assert found.global_batch_size() == 32
    assert found.cost("seconds", [10, 20]) == pytest.approx([20, 30])
    assert found.cost("flops", [10, 20]) == pytest.approx([2 * 0.5e12 * 20, 2e13 + 2 * 1e12 * 10])
    assert "training time and FLOPs follow from images_per_second" in warnings[0]


def test_a_report_without_time(tmp_path, capsys):
    a = write_run(tmp_path / "a", {100: 5, 200: 4}, seconds=None, objective="repa")
    b = write_run(tmp_path / "b", {100: 4, 200: 3}, objective="vrpo")
    found = report(tmp_path, a, b, "--baseline", "repa")
    assert "in at most 50 % of repa's steps (one seed)" in found["sentences"][1]
    assert any("lack the training time" in text for text in found["warnings"])
    assert not (tmp_path / "report" / "quality_vs_time.png").exists()


# Arms


def test_runs_that_differ_in_the_seed_are_one_arm(tmp_path):
    values = {100: 2.0}
    start = {"global_batch_size": 256, "hardware": "NVIDIA H200", "num_processes": 8, "mixed_precision": "bf16"}
    start |= {"parameters": 130_000_000, "projector_parameters": 7_000_000}
    same = {"objective": "repa", "encoder": ["facebook/dinov2-base"], "validation_steps": 100, "start": start}
    runs = [
        write_run(tmp_path / "a", values, seed=0, **same),
        write_run(
            tmp_path / "b",
            values,
            seed=1,
            logging_steps=7,
            hub_private_repo=True,
            allow_tf32=False,
            **{**same, "validation_steps": 50},
        ),
        write_run(tmp_path / "c", values, seed=0, **{**same, "encoder": ["facebook/dinov3-base"]}),
        write_run(tmp_path / "d", values, seed=0, **{**same, "start": {**start, "global_batch_size": 512}}),
        write_run(tmp_path / "e", values, seed=0, objective="none", start={**start, "hardware": "NVIDIA A100"}),
    ]
    found = numbers(*runs)
    assert [(arm["name"], arm["n"]) for arm in found["arms"]] == [
        ("repa encoder=dinov2-base global batch size=256", 2),
        ("repa encoder=dinov3-base", 1),
        ("repa encoder=dinov2-base global batch size=512", 1),
        ("none", 1),
    ]
    assert found["options"]["encoder"] == [
        "facebook/dinov2-base",
        "facebook/dinov3-base",
        "facebook/dinov2-base",
        None,
    ]
    assert found["arms"][0]["hardware"] == ["8 x NVIDIA H200"] and found["arms"][0]["parameters"] == [130_000_000]
    assert any("different hardware (8 x NVIDIA A100; 8 x NVIDIA H200)" in text for text in found["warnings"])
    # By hand, and mixed.
    found = numbers(runs[4], "--arms", f"small $x={runs[0]},{runs[1]},{runs[2]}")
    assert [(arm["name"], arm["n"]) for arm in found["arms"]] == [("small $x", 3), ("none", 1)]
    assert any("small $x differ in more than the seed (encoder)" in text for text in found["warnings"])
    assert any("small $x has the same seed more than once" in text for text in found["warnings"])


def test_options_without_effect_in_any_run_are_not_said_to_differ(tmp_path):
    shared = {"objective": "none", "num_fd_samples": 64}
    runs = [
        write_run(tmp_path / "a", {100: 1.0}, learning_rate=1e-4, **shared),
        # As a version might record options that it has and the other has not.
        write_run(tmp_path / "b", {100: 1.0}, learning_rate=2e-4, estimator="expected", alignment_coeff=0.5, **shared),
    ]
    assert list(numbers(*runs)["options"]) == ["learning_rate"]
    repa = write_run(tmp_path / "c", {100: 1.0}, learning_rate=1e-4, objective="repa", alignment_coeff=4.0)
    assert list(numbers(*runs, repa)["options"]) == ["objective", "alignment_coeff", "learning_rate"]


def test_names_that_the_last_part_of_a_path_would_not_tell_apart(tmp_path):
    runs = [write_run(tmp_path / name, {100: 1.0}, latents_dir=f"/{name}/latents", objective="repa") for name in "ab"]
    found = numbers(*runs)
    assert [arm["name"] for arm in found["arms"]] == ["latents_dir=/a/latents", "latents_dir=/b/latents"]
    assert any("differ in latents_dir" in text and "may not be comparable" in text for text in found["warnings"])


# Bad input: one sentence


def test_input_that_cannot_work(tmp_path, capsys):
    run_a = write_run(tmp_path / "a", {100: 1.0}, objective="repa")
    other = write_run(tmp_path / "other", {100: 1.0}, rows=[{"step": 100, "loss_fm": 0.5}], objective="none")
    trained = write_run(tmp_path / "trained", {}, 0, rows=[{"step": 100, "loss_fm": 0.5}])
    (tmp_path / "empty").mkdir()
    new = write_run(tmp_path / "new", {100: 1.0})
    (new / "metrics.jsonl").write_text('{"step": 1')
    foreign = write_run(tmp_path / "foreign", {100: 1.0})
    (foreign / "train_config.yaml").write_text("- a list")
    (tmp_path / "file").write_text("")
    for arguments, message in [
        ([], "give the folders of one or more runs"),
        (
            [tmp_path / "nowhere"],
            "nowhere is not the output folder of a run, because it has no train_config.yaml and no metrics.jsonl",
        ),
        ([tmp_path / "empty"], "empty is not the output folder of a run"),
        ([new], "metrics.jsonl has no metrics yet; let the run reach"),
        ([foreign], "train_config.yaml is not what `vrpo train` wrote"),
        (
            [run_a, "--metric", "kid"],
            f"--metric kid is not in these runs; they have {FD}, train_seconds, train_flops",
        ),
        (
            [trained],
            "--metric fd is not in these runs, which were trained without --fd_encoder; give --metric loss_fm or another "
            "column; they have loss_fm",
        ),
        ([run_a, other, "--metric", "loss"], f"--metric loss: .*a has no loss_fm, .* give one of {FD}, train_seconds"),
        ([run_a, tmp_path / "other" / ".." / "a"], "a is given twice"),
        ([run_a, other, "--baseline", "sit"], "--baseline sit is not one of the arms; they are repa, none"),
        (["--arms", f"{run_a}"], "--arms .* must be NAME=DIR or NAME=DIR,DIR"),
        (["--arms", f"x={run_a}", f"x={other}"], "--arms names x twice"),
        ([other, "--arms", f"none={run_a}"], "--arms none is also the name of other runs"),
        ([run_a, "--target", "nan"], "--target nan must be finite"),
        ([run_a, "--output_dir", tmp_path / "file" / "x"], "--output_dir .* cannot be written"),
    ]:
        with pytest.raises(SystemExit) as exit_info:
            main(
                [*map(str, arguments), *(() if "--output_dir" in arguments else ("--output_dir", str(tmp_path / "r")))]
            )
        said = str(exit_info.value.code) + capsys.readouterr().err
        assert re.search(message, said) and "Traceback" not in said, (arguments, said)
        assert len(said.strip().splitlines()) == 1


# Real runs, and the files


class Resources(HTMLParser):
    """Everything that a page would load."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.found += [value for name, value in attributes if name in ("src", "srcset", "href", "data", "poster")]


@pytest.mark.slow
def test_real_runs_from_training_to_the_page(command, tmp_path, capsys):
    """Two arms; one is interrupted, and aligns up to step 2 only: its seconds and FLOPs go on where they were."""
    options = {"validation_steps": 2, "use_ema": None, "learning_rate": 1e-5}
    repa = {"objective": "repa", "alignment_stop_step": 2, "output_dir": tmp_path / "repa", **options}
    run(command(**repa, max_train_steps=3))
    seconds = [row["train_seconds"] for row in read_metrics(tmp_path / "repa" / "metrics.jsonl")]
    run(command(**repa, max_train_steps=4))
    for seed in (0, 1):
        run(command(objective="none", output_dir=tmp_path / f"none-{seed}", seed=seed, **options))
    rows = read_metrics(tmp_path / "repa" / "metrics.jsonl")
    assert [row["train_seconds"] for row in rows[:3]] == seconds and 0 < seconds[0] < seconds[1] < seconds[2]
    assert rows[3]["train_seconds"] > seconds[2]
    model = SiTTransformer2DModel.from_pretrained(tmp_path / "repa" / "transformer")
    trained = aligned_with(model, (1,), (64,), projector_dim=32)
    plain, aligned = step_flops(trained)
    assert aligned == plain + 3 * projector_flops(32, 16, 1, [64], projector_dim=32)
    per_step = np.diff([0, *(row["train_flops"] for row in rows)]) / 16  # the encoder is counted, too
    assert per_step[0] == per_step[1] > aligned > per_step[2] == per_step[3] == plain
    starts, _ = read_rows(tmp_path / "repa" / "starts.jsonl", START)
    assert [start["step"] for start in starts] == [0, 3] and starts[0]["hardware"]
    projectors = sum(p.numel() for p in trained.projectors.parameters())
    assert starts[1]["parameters"] == sum(p.numel() for p in model.parameters())
    assert starts[1]["projector_parameters"] == projectors > 0

    folders = [tmp_path / "none-0", tmp_path / "none-1", tmp_path / "repa"]
    found = report(tmp_path, *folders, "--metric", "loss_fm", "--baseline", "none")
    assert "wrote" in capsys.readouterr().out
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert arms["none"]["n"] == 2 and arms["repa"]["n"] == 1 and arms["none"]["final"]["std"] > 0
    assert arms["repa"]["runs"][0]["values"] == [row["loss_fm"] for row in rows]
    assert arms["repa"]["final"]["flops"]["mean"] == rows[3]["train_flops"]
    assert arms["repa"]["hardware"] == [starts[0]["hardware"]] and found["options"]["alignment_stop_step"] == [
        None,
        "2",
    ]
    assert found["grids"]["steps"] == [4, 2] and found["grids"]["same_noise"]
    # A model that has hardly learnt leaves the noise as it is, so that grids show which they started from.
    images = {}
    for name in ("none-0", "none-1", "repa"):
        with Image.open(tmp_path / name / "samples" / "step-0000002.png") as image:
            images[name] = np.asarray(image, float)
    assert (
        np.abs(images["none-0"] - images["repa"]).mean() < 2 < 20 < np.abs(images["none-0"] - images["none-1"]).mean()
    )
    assert found["grids"]["seeds"].keys() == {arm["name"] for arm in found["arms"]} and set(
        found["grids"]["seeds"].values()
    ) == {0}

    folder = tmp_path / "report"
    names = ["quality_vs_steps", "quality_vs_time", "quality_vs_flops", "final"]
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json"} | {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    for name in names:
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 700 and len(image.convert("RGB").getcolors(10**6)) > 20
    text = (folder / "report.html").read_text()
    page = Resources()
    page.feed(text)
    # Four plots on light and on dark ground, two grids of two arms; nothing comes from elsewhere.
    assert len(page.found) == 2 * 4 + 4 and all(value.startswith("data:image/") for value in page.found)
    assert (
        not page.tags & {"script", "link", "iframe", "object", "base"} and "url(" not in text and "@import" not in text
    )
    # The same runs give the same files.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report(tmp_path, *folders, "--metric", "loss_fm", "--baseline", "none")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_one_run_with_one_evaluation_and_names_that_are_markup(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {100: 3.25}, objective="repa")
    found = report(tmp_path, "--arms", f"<b>$5</b>={folder}", "--baseline", "<b>$5</b>")
    assert found["arms"][0]["final"]["mean"] == 3.25 and found["arms"][0]["final"]["std"] is None
    assert "at most 100 %" in found["sentences"][0]
    text = (tmp_path / "report" / "report.html").read_text()
    assert "&lt;b&gt;$5&lt;/b&gt;" in text and "<b>" not in text
    found = report(tmp_path, folder)
    assert found["sentences"] == [] and found["speed_up"] is None and found["options"] == {} and found["grids"] is None


def test_the_page_says_what_it_shows(tmp_path):
    runs = [
        write_run(tmp_path / f"{name}-{i}", {100: 5 + i}, objective=name, seed=i)
        for name in ("repa", "vrpo")
        for i in (0, 1)
    ]
    found = report(tmp_path, *runs, "--baseline", "repa")
    text = (tmp_path / "report" / "report.html").read_text()
    assert (
        "This page compares 4 training runs of 2 kinds by their Fréchet distance (digits), where lower is better, against training "
        "steps, training time and training compute." in text
    )
    assert (
        "An arm consists of the runs that differ only in the seed" in text
        and "last Fréchet distance (digits)</th>" in text
    )
    assert found["metric"] == FD and text.count(FD) == 1  # its name in metrics.jsonl, once
    labels = {"loss_fm": "flow-matching loss", "reward/semantic": "semantic reward", "guard/fd_x": "guard: fd x"}
    assert {name: metric_label(name) for name in labels} == labels


def test_only_options_are_shown_and_nothing_moves_the_cursor(tmp_path, capsys):
    runs = [
        write_run(tmp_path / f"run-{i}", {100: 5}, layer_scope=f"\x1b[2J{i}<b>", hub_token=f"hf_secret{i}")
        for i in range(2)
    ]
    found = report(tmp_path, *runs)
    page, printed = (tmp_path / "report" / "report.html").read_text(), capsys.readouterr().out
    assert list(found["options"]) == ["layer_scope"] and len(found["arms"]) == 2
    assert "hf_secret" not in page + json.dumps(found) + printed
    assert "\x1b" not in page + printed and "&lt;b&gt;" in page and "<b>" not in page


def test_grids_that_do_not_compare(tmp_path, capsys):
    a = write_run(tmp_path / "a", {100: 1.0}, seed=0, objective="repa")
    b = write_run(tmp_path / "b", {100: 1.0}, seed=1, objective="none")
    for folder, steps in ((a, (100, 200, 300, 400)), (b, (100, 300, 400, 500))):
        (folder / "samples").mkdir()
        for step in steps:
            Image.new("RGB", (8, 8), "red").save(folder / "samples" / f"step-{step:07d}.png")
    Image.effect_noise((2000, 1000), 90).save(a / "samples" / "step-0000400.png")
    (b / "samples" / "step-0000100.png").write_bytes(b"no picture")
    found = report(tmp_path, a, b)
    assert found["grids"]["steps"] == [400, 300, 100] and not found["grids"]["same_noise"]
    assert any("no seed that all arms have" in text for text in found["warnings"])
    assert any("step-0000100.png is damaged and is not shown" in text for text in found["warnings"])
    text = (tmp_path / "report" / "report.html").read_text()
    assert text.count("data:image/jpeg") == 1 and text.count("data:image/png") == 4
    assert "do not start from the same noise" in text


class CountedRow(dict):
    """A row of a log that counts how often it is looked at."""

    looks = 0

    def __getitem__(self, name):
        CountedRow.looks += 1
        return super().__getitem__(name)


def test_rows_are_merged_in_one_pass():
    """Each row is looked at a few times, however many there are, also if the run was continued again and again."""
    steps = [step for start in range(0, 5000, 10) for step in range(start, start + 20)]
    rows = [CountedRow(step=step, part=number) for number, step in enumerate(steps)]
    CountedRow.looks = 0
    merged = merge_rows(rows)
    assert CountedRow.looks < 8 * len(rows)
    # What the continued run wrote again replaces the rest.
    assert [row["step"] for row in merged] == list(range(5010))
    assert [merged[step]["part"] for step in (0, 9, 10, 25)] == [0, 9, 20, 45]
    both = merge_rows([{"step": 1, "a": 1}, {"step": 1, "b": 2}, {"step": 3}, {"step": 2, "a": 5}])
    assert both == [{"step": 1, "a": 1, "b": 2}, {"step": 2, "a": 5}]
