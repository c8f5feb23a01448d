# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The columns of the table of docs/models.md that need two processes."""

import pytest
import torch


PROGRAM = """
import os, sys
from diffusers_vrpo.alignment.support import run_process

run_process(int(os.environ["RANK"]), sys.argv[1].split(","), ["ddp", "fsdp2"], sys.argv[2])
"""
# One with layers that are called again behind the blocks, one whose image comes before the text, and one with both in a sequence.
MODELS = ["DiTTransformer2DModel", "CogView4Transformer2DModel", "AuraFlowTransformer2DModel"]


@pytest.mark.slow
def test_two_processes(tmp_path, trainers):
    (tmp_path / "program.py").write_text(PROGRAM)
    trainers([",".join(MODELS), tmp_path], program=str(tmp_path / "program.py"), processes=2).finish()
    answers = torch.load(tmp_path / "answers.pt")
    assert {model for model, _ in answers} == set(MODELS) and len(answers) == 6
    for (_, column), answer in answers.items():
        assert answer.startswith("yes") or (column == "fsdp2" and "this version of torch" in answer)
