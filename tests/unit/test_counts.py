# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What a training step launches, reads, computes and saves, counted on fake tensors, against tests/unit/counts.json.

A change that is meant is recorded again, after a look at the difference:

    python tests/unit/test_counts.py
"""

import importlib
import json
import sys
from pathlib import Path

import pytest


RECORD = Path(__file__).parent / "counts.json"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GROWTH = 1.02  # of the recorded number, at most
OBJECTIVES = ("none", "repa", "vrpo", "irepa", "rare", "repi")
# Two blocks of SiT-S/2 on 256 tokens.
SMALL = {"preset": "SiT-S/2", "batch_size": 8, "depth": 2}


def load_benchmark():
    """benchmarks/counts.py as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("counts")
    finally:
        sys.path.remove(str(BENCHMARKS))


def numbers_of(objective: str) -> dict[str, int]:
    """The numbers that must not grow, of a step and of the loss by itself."""
    found = load_benchmark().count_step(objective, **SMALL)
    numbers = dict(found["step"])
    for part in ("loss", "statistics"):
        numbers |= {f"{part} {name}": found["parts"][part][name] for name in ("launches", "read", "written")}
    return numbers


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_no_more_than_it_did(objective):
    recorded, found = json.loads(RECORD.read_text())[objective], numbers_of(objective)
    assert found.keys() == recorded.keys()
    grown = {name: (found[name], recorded[name]) for name in found if found[name] > GROWTH * recorded[name]}
    assert not grown, f"{grown} (found, recorded); this file says how to record a change that is meant"


if __name__ == "__main__":
    record = {objective: numbers_of(objective) for objective in OBJECTIVES}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
