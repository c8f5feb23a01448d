# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""`vrpo`: the scripts as one command."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from diffusers_vrpo import __version__, cli
from diffusers_vrpo.command_line import OneLineErrorParser, as_id, one_line_errors, recipes, sentence
from diffusers_vrpo.commands import train
from support.paths import ROOT, TRAINING_SCRIPT
from support.processes import no_network_environment


def test_help_names_every_command(capsys):
    cli.main([])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    (pages,) = re.findall(r'^Documentation = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert text.endswith(f"They are at\n{pages}\n")
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_is_its_program(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: vrpo {name} ")


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit, match="no command is named 'evalute'; did you mean evaluate?"):
        cli.main(["evalute"])


def started_by(monkeypatch, argv: list[str]) -> list[str] | None:
    """The launcher's command line for that of `vrpo`, or None where the command runs in this process."""
    found = []

    def execv(program, command):
        found.append(command[1:])
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(train, "train", lambda args: None)
    with contextlib.suppress(SystemExit):
        cli.main(argv)
    return found[0] if found else None


def test_what_stands_before_two_dashes_is_the_launchers(monkeypatch, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "-q"]
    module = ["-m", "diffusers_vrpo.commands.{}"]
    defaults = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    monkeypatch.setattr("diffusers_vrpo.command_line.HF_HOME", str(tmp_path))
    fsdp = str(ROOT / "configs" / "accelerate" / "fsdp2.yaml")
    for argv, expected in {
        ("train", "--num_processes", "2", "--", "--seed", "1"): [
            "--num_processes",
            "2",
            *defaults,
            *module,
            "--seed",
            "1",
        ],
        ("train", "--", "--seed", "1"): [*defaults, *module, "--seed", "1"],
        ("train", "--mixed-precision=bf16", "--"): ["--mixed-precision=bf16", *defaults[:2], *defaults[4:], *module],
        ("train", "--config_file", "fsdp2", "--"): ["--config_file", fsdp, *module],
        ("train", "--config_file", "mine.yaml", "--"): ["--config_file", "mine.yaml", *module],
        ("sample", "--multi_gpu", "--", "run"): ["--multi_gpu", *defaults, *module, "run"],
    }.items():
        expected = [word.format(argv[0]) for word in expected]
        assert started_by(monkeypatch, list(argv)) == [*launcher, *expected]
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("")  # as `accelerate config` writes it
    assert started_by(monkeypatch, ["evaluate", "--", "x"]) == [
        *launcher,
        "-m",
        "diffusers_vrpo.commands.evaluate",
        "x",
    ]


def test_training_starts_a_launcher_where_several_devices_are(monkeypatch, tmp_path):
    options = ["--dataset_name", "digits", "--vae", "none", "--objective", "none"]
    monkeypatch.setattr("diffusers_vrpo.command_line.HF_HOME", str(tmp_path))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert started_by(monkeypatch, ["train", *options]) is None
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    command = started_by(monkeypatch, ["train", *options])
    assert command[3:6] == ["--multi_gpu", "--num_processes", "4"] and command[-len(options) :] == options
    monkeypatch.setenv("WORLD_SIZE", "4")  # in one of the started processes
    assert started_by(monkeypatch, ["train", *options]) is None


def test_harmless_warnings_of_other_libraries_are_not_shown():
    parser = OneLineErrorParser(prog="vrpo")
    with pytest.warns(UserWarning) as shown, one_line_errors(parser):
        warnings.warn("The `local_dir_use_symlinks` argument is deprecated and ignored", stacklevel=1)
        warnings.warn("This DataLoader will create 4 worker processes in total. Our suggested max", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]


@pytest.mark.slow
def test_an_error_of_the_trainer_is_one_sentence():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "diffusers_vrpo.cli",
            "train",
            "--cpu",
            "--",
            "--dataset_name",
            "digits",
            "--seed",
            "-1",
        ],
        capture_output=True,
        text=True,
        env=no_network_environment(),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("vrpo train: error: ")


@pytest.mark.parametrize(
    "program",
    ["from diffusers_vrpo.cli import main; main(['train', *options])", "runpy.run_path({!r}, run_name='__main__')"],
)
@pytest.mark.parametrize(
    ("options", "shown"), [(["--resolution", "a"], "invalid int value: 'a'"), (["--help"], "--resolution")]
)
def test_options_of_training_are_read_before_torch_is_imported(program, options, shown):
    code = (
        f"import runpy, sys; options = {options}; sys.argv = ['train_vrpo.py', *options]\n"
        f"try:\n    {program.format(str(TRAINING_SCRIPT))}\n"
        "except SystemExit:\n    print([name for name in ('torch', 'diffusers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and shown in done.stdout + done.stderr


def test_recipes_are_found_by_name(tmp_path, monkeypatch, capsys):
    assert {"digits", "sit-b-2-repa", "dit-xl-2-vrpo"} <= set(recipes()) and "ddp" not in recipes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # such as the folder of a run
    args = train.parse_args(["--config", "digits", "--seed", "5"])
    assert (args.preset, args.train_batch_size, args.seed) == ("SiT-XS/2", 64, 5)
    assert train.parse_args(["--config", "sit-b-2-repa"]).objective == "repa"
    with pytest.raises(SystemExit):
        train.parse_args(["--config", "digit"])
    assert "vrpo train: error: --config digit cannot be read: there is no such file, and the recipes are digits, " in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["train", "plan", "prepare", "sample", "evaluate", "fid", "probe", "layers"])
def test_the_short_help_and_the_whole_one(name, capsys):
    command = importlib.import_module(f"diffusers_vrpo.commands.{name}")
    parser = command.build_parser(f"vrpo {name}")
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([flag])
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    short, whole = texts
    options = {action.option_strings[0]: action for action in parser._actions if action.option_strings}
    shown = [flag for flag in options if f"\n  {flag}" in short]
    assert {action.dest for action in options.values()} >= set(parser.common)
    assert len(parser.common) + 2 <= len(shown) <= 23 and all(f"\n  {flag}" in whole for flag in options)
    assert f"`vrpo {name} --help-all` shows all {len(options) - 2}." in " ".join(short.split())
    for flag in shown:
        help = sentence(options[flag].help).partition(" (default: ")[0]
        assert help[0].isupper() and help.endswith("."), help


def test_the_page_gets_the_pipeline_in_each_way(monkeypatch, capsys):
    served = []
    page = SimpleNamespace(serve=lambda args, parser: served.append((args.pipeline, args.dtype, parser.prog)))
    monkeypatch.setitem(sys.modules, "app", page)  # the real one needs gradio
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("VRPO_PIPELINE", raising=False)
    cli.main(["app", "run"])
    cli.main(["app", "--pipeline", "me/run", "--dtype", "bfloat16"])
    assert (ROOT / "space" / "app.py").parent.samefile(sys.path[0])
    with pytest.raises(SystemExit):
        cli.main(["app"])
    assert "vrpo app: error: PIPELINE is missing" in capsys.readouterr().err
    monkeypatch.setenv("VRPO_PIPELINE", "of/a-space")
    cli.main(["app"])
    assert served == [
        ("run", None, "vrpo app"),
        ("me/run", "bfloat16", "vrpo app"),
        ("of/a-space", None, "vrpo app"),
    ]


def test_only_decimal_digits_are_class_ids():
    assert [as_id(label) for label in (3, "12", "-1")] == [3, 12, -1]
    assert [as_id(label) for label in ("²", "--1", "1.5", "three", "")] == ["²", "--1", "1.5", "three", ""]
