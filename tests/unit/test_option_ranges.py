# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The values that numeric options take: every option has a finite range, and what lies outside is refused by name."""

import argparse
import math
import os

import pytest

from diffusers_vrpo.command_line import parse_config, training_parser
from diffusers_vrpo.commands import convert, evaluate, layers, prepare, probe, report, sample
from diffusers_vrpo.config import In, VRPOConfig, checked_value, options_of
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.compare import MetricSettings, few_images
from diffusers_vrpo.models.start import check_lora_rank
from support.paths import ROOT


NUMBERS = {
    name: option
    for name, option in options_of(VRPOConfig).items()
    if option.kind in (int, float) and option.choices is None  # these have a list instead
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_training_have_a_finite_range(name):
    option = NUMBERS[name]
    (limits,) = option.marked(In)
    assert math.isfinite(limits.low) and math.isfinite(min(limits.high, limits.most))
    wrong = [-(10**30), 10**30] if option.kind is int else [math.nan, math.inf, -math.inf, -1e30, 1e30]
    for value in wrong:
        with pytest.raises(InputError) as refused:
            checked_value(option, [value] if option.many else value)
        assert f"`{name}` {value} must " in str(refused.value) and refused.value.field == name


@pytest.mark.parametrize(
    "name, largest",
    [
        ("train_batch_size", 65536),
        ("dataloader_num_workers", 256),
        ("rollout_classes", 65536),
        ("resolution", 8192),
        ("num_inference_steps", 10000),
        ("lora_rank", 10000),
        ("guidance_scale", 1000.0),
        ("learning_rate", 10.0),
    ],
)
def test_largest_values(name, largest):
    option = NUMBERS[name]
    assert checked_value(option, largest) == largest
    with pytest.raises(InputError, match=f"`{name}` {largest + 1} must .* at most {largest:.0f}$"):
        checked_value(option, largest + 1)


def test_a_flag_out_of_range_is_one_sentence(capsys):
    for argv in (["--guidance_scale", "nan"], ["--guidance_scale", "-1"], ["--train_batch_size", "1000000000"]):
        with pytest.raises(SystemExit):
            training_parser().parse_args(argv)
        error = capsys.readouterr().err
        assert f"{argv[0]} " in error and " must be at least " in error and error.count("\n") == 1


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_lie_in_the_ranges(file):
    parse_config(training_parser(), ["--config", str(file), "--output_dir", "run"])


# The other commands


PARSERS = {
    module.__name__.rsplit(".", 1)[1]: module.build_parser("vrpo")
    for module in (convert, evaluate, layers, prepare, probe, report, sample)
}
# A value of a metric may be any number; the interval is checked as a whole.
UNBOUNDED = {"target", "guidance_interval"}
NUMBERS_OF_COMMANDS = [
    (name, action)
    for name, parser in PARSERS.items()
    for action in parser._actions
    if getattr(action.type, "__name__", None) in ("int", "float") and action.dest not in UNBOUNDED
]


@pytest.mark.parametrize(
    "action", [action for _, action in NUMBERS_OF_COMMANDS], ids=[f"{n}-{a.dest}" for n, a in NUMBERS_OF_COMMANDS]
)
def test_numbers_of_commands_have_a_finite_range(action):
    for value in ("-1e30", "1e30", "nan", "inf") if action.type.__name__ == "float" else (-(10**30), 10**30):
        with pytest.raises(argparse.ArgumentTypeError, match="must "):
            action.type(str(value))
    for value in action.default if isinstance(action.default, list) else [action.default]:
        assert value is None or action.type(str(value)) == value


@pytest.mark.parametrize(
    "module, argv, message",
    [
        (sample, ["p", "--output_dir", "o", "--num_images", str(10**13)], "--num_images 10000000000000 must"),
        (
            sample,
            ["p", "--output_dir", "o", "--num_images", "1", "--guidance_scale", "inf"],
            "--guidance_scale inf must",
        ),
        (sample, ["p", "--output_dir", "o", "--num_images", "1", "--guidance_scale=-2"], "--guidance_scale -2.0 must"),
        (
            sample,
            ["p", "--output_dir", "o", "--num_images", "1", "--guidance_interval", "nan", "1"],
            "--guidance_interval nan 1.0 must be LOW HIGH",
        ),
        (evaluate, ["s", "--reference", "r", "--dataloader_num_workers", "100000"], "--dataloader_num_workers 100000"),
        (evaluate, ["s", "--reference", "r", "--kid_subsets", str(10**9)], "--kid_subsets 1000000000 must"),
        (probe, ["p", "--dataset_name", "d", "--l2", "nan"], "--l2 nan must"),
        (
            prepare,
            ["--dataset", "d", "--vae", "v", "--output_dir", "o", "--resolution", "9000"],
            "--resolution 9000 must",
        ),
    ],
)
def test_refused_values_of_commands(module, argv, message, capsys):
    with pytest.raises(SystemExit):
        module.parse_args(argv)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_target_that_is_not_finite(capsys):
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(SystemExit):
            PARSERS["report"].parse_args(["run", f"--target={value}"])
        assert f"--target {value} must be finite" in capsys.readouterr().err


def test_a_rank_above_the_width():
    for rank in (None, 1, 384):
        check_lora_rank(rank, "sit-s", 384)
    with pytest.raises(
        InputError, match="^`lora_rank` 385 must be at most 384, the width of the layers of sit-s"
    ) as error:
        check_lora_rank(385, "sit-s", 384)
    assert error.value.field == "lora_rank"


# Files that are written at the end


def outputs(**files) -> argparse.Namespace:
    return argparse.Namespace(**{"output_file": None, "plot_file": None, "save_reference": None} | files)


@pytest.mark.parametrize("command", ["evaluate", "probe"])
@pytest.mark.parametrize(
    "option, file, message",
    [
        ("plot_file", "x.exe", r"must end in one of .*\.eps, .*\.png"),
        ("plot_file", "x.json", "must end in one of"),
        ("plot_file", "x.pgf", "must end in one of"),
        ("plot_file", "no/x.png", "does not exist; create it, or choose another"),
        ("plot_file", "folder.png", "is not a file"),
        ("plot_file", "/dev/null", "is not a file"),
        ("plot_file", "file/x.png", "does not exist; create it, or choose another"),
        ("plot_file", "/proc/x.png", "cannot be written"),
        ("plot_file", "x" * 250 + ".png", "File name too long"),
        ("output_file", "loop", "cannot be written"),
        ("output_file", "/proc/x.json", "cannot be written"),
        ("output_file", "folder.png", "is not a file"),
        ("save_reference", "no/x.safetensors", "does not exist; create it, or choose another"),
    ],
)
def test_output_files_are_checked_before_the_work(tmp_path, monkeypatch, command, option, file, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    module = {"evaluate": evaluate, "probe": probe}[command]
    with pytest.raises(InputError, match=message) as error:
        module.check_output_files(outputs(**{option: file}), "output_file", "plot_file", "save_reference")
    assert error.value.field == option and f"`{option}` {file}" in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_output_files_that_can_be_written(tmp_path):
    names = ("output_file", "plot_file", "save_reference")
    for plot in ("x.png", "x.PDF", "x.svg", "x.webp", "x"):
        evaluate.check_output_files(outputs(output_file="/dev/stdout", plot_file=str(tmp_path / plot)), *names)
    same = str(tmp_path / "x.png")
    with pytest.raises(InputError, match="is also the file of `output_file`"):
        evaluate.check_output_files(outputs(output_file=same, plot_file=same), *names)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("target", ["/proc/report", "{tmp}/file/report", "{tmp}/loop"])
def test_reports_and_conversions_are_refused_before_the_work(tmp_path, monkeypatch, target):
    def work(*args, **kwargs):
        raise AssertionError("the work has begun")

    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    target = target.format(tmp=tmp_path)
    monkeypatch.setattr(report, "collect", work)
    monkeypatch.setattr(convert, "convert_with_projectors", work)
    with pytest.raises(SystemExit, match=f"--output_dir {target} cannot be written"):
        report.main(["run", "--output_dir", target])
    with pytest.raises(SystemExit, match=f"OUTPUT_DIR {target}/x.pt cannot be written"):
        convert.main(["weights.pt", f"{target}/x.pt", "--to", "sit"])
    with pytest.raises(AssertionError, match="the work has begun"):
        report.main(["run", "--output_dir", str(tmp_path / "a" / "b")])
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


# Metrics of few images


@pytest.mark.parametrize(
    "metrics, settings, samples, reference, said",
    [
        (["fid"], {}, 2049, 2049, None),
        (
            ["fid"],
            {},
            2048,
            50_000,
            "fid needs at least 2049 images in each set (2048 feature dimensions), but SAMPLES has",
        ),
        (["fid"], {}, 2049, 10, "but the reference has 10: its value"),
        (["fid"], {}, 3, 10, "but SAMPLES has 3 and the reference has 10: its value"),
        (["fid"], {}, 50_000, None, None),
        (["sfid"], {}, 1000, 1000, "sfid needs at least 2024 images"),
        (["kid"], {}, 2000, 2000, None),
        (
            ["kid"],
            {},
            1999,
            2000,
            "kid needs at least 2000 images in each set (subsets of 1000 images), but SAMPLES has",
        ),
        (["kid"], {"kid_subset_size": 10}, 20, 20, None),
        (["kid"], {"kid_subset_size": 10}, 20, 19, "kid needs at least 20 images in each set (subsets of 10 images)"),
        (["is", "precision_recall", "density_coverage"], {}, 10, 10, None),
    ],
)
def test_metrics_of_few_images(metrics, settings, samples, reference, said):
    widths = {"fid": 2048, "sfid": 2023}
    sentences = few_images(metrics, MetricSettings(**settings), samples, reference, widths)
    assert (said is None and not sentences) or (len(sentences) == 1 and said in sentences[0])
