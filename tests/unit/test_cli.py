# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""`vrpo`: the scripts as one command."""

import os
import subprocess
import sys

import pytest

from diffusers_vrpo import __version__, cli
from support.paths import TRAINING_SCRIPT
from support.processes import no_network_environment


def test_help_names_every_command(capsys):
    cli.main([])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "train"])
def test_each_command_is_its_program(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: vrpo {name} ")


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit, match="no command is named 'evalute'; did you mean evaluate?"):
        cli.main(["evalute"])


def test_train_is_launched_by_accelerate(monkeypatch):
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command[1:]))
    launcher = ["-m", "accelerate.commands.launch", "-q"]
    for argv, expected in {
        ("--config", "a.yaml"): [*launcher, str(TRAINING_SCRIPT), "--config", "a.yaml"],
        ("--num_processes", "2", "--", "--seed", "1"): [
            *launcher,
            "--num_processes",
            "2",
            str(TRAINING_SCRIPT),
            "--seed",
            "1",
        ],
        ("--", "--seed", "1"): [*launcher, str(TRAINING_SCRIPT), "--seed", "1"],
        ("--help",): [str(TRAINING_SCRIPT), "--help"],
    }.items():
        started = []
        cli.main(["train", *argv])
        assert started == [expected]


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
    assert done.stderr.strip().splitlines()[-1].startswith("train_vrpo.py: error: ")


def test_options_of_training_are_read_before_torch_is_imported():
    code = (
        "import runpy, sys; from diffusers_vrpo.cli import train_script\n"
        "sys.argv = ['train_vrpo.py', '--resolution', 'a']\n"
        "try:\n    runpy.run_path(str(train_script()), run_name='__main__')\n"
        "except SystemExit:\n    print([name for name in ('torch', 'diffusers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]" and "error: argument --resolution: invalid int value: 'a'" in done.stderr
