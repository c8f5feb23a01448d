# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The benchmark of bad inputs: its cases, and a small sample of them."""

import subprocess
import sys

import pytest

from support.paths import ROOT


BENCHMARKS = ROOT / "benchmarks"


def test_there_are_enough_different_cases_of_every_command(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bad_inputs_cases import BASES, all_cases

    from diffusers_vrpo.cli import COMMANDS

    cases = all_cases()
    refused = [case for case in cases if case.expected == "sentence"]
    assert len(refused) >= 300 and len({(str(case), case.names) for case in cases}) == len(cases)
    commands = {case.command for case in cases}
    assert commands == {*BASES, "python"} and {name.split()[0] for name in commands - {"python"}} == set(COMMANDS)


@pytest.mark.slow
def test_a_sample_of_bad_inputs_ends_in_sentences():
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "bad_inputs.py", "--only=report --"], capture_output=True, text=True
    )
    assert run.returncode == 0 and "100.0 % end in one sentence" in run.stdout, run.stdout + run.stderr
