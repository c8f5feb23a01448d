# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The benchmark of bad inputs: its cases, and a small sample of them."""

import subprocess
import sys

import pytest

from diffusers_vrpo import AlignedTransformer, TokenReward, load_encoder, sit_preset
from support.models import tiny_model
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


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load_encoder(3, (4, 4)), "`encoder` 3 is not a name"),
        (lambda: load_encoder("digits", 4), "grid_size must be two whole numbers"),
        (lambda: load_encoder("digits", (0, 4)), "grid_size must be two whole numbers"),
        (
            lambda: AlignedTransformer(tiny_model(), [1], [3]),
            "`encoders` has 3, which has no whole number `embed_dim`",
        ),
        (lambda: sit_preset(3), "a preset is a name such as"),
        (lambda: TokenReward("a", 3), "the reward 'a' must have functions"),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_a_sample_of_bad_inputs_ends_in_sentences():
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "bad_inputs.py", "--only=report --"], capture_output=True, text=True
    )
    assert run.returncode == 0 and "100.0 % end in one sentence" in run.stdout, run.stdout + run.stderr
