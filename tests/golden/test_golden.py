# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The command lines, recipes, runs and folders of version 0.1, held against those of this version (README.md here)."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest


sys.path.insert(0, str(Path(__file__).parent))
import rows


RECORDS = {
    name: json.loads((rows.GOLDEN / f"{name}.json").read_text()) for name in ("help", "recipes", "runs", "folders")
}
RTOL = 1e-4  # on a machine that rounds in another way


def close(value, expected, scale: float = 0.0) -> bool:
    """Whether numbers agree up to `RTOL` of the larger of the expected one and `scale`; None and NaN are themselves."""
    if value is None or expected is None:
        return value is expected
    if math.isnan(expected):
        return math.isnan(value)
    return math.isclose(value, expected, rel_tol=RTOL, abs_tol=max(RTOL * scale, 1e-6))


def equal(value, expected) -> bool:
    return value == expected or (value != value and expected != expected)


def assert_same_run(found: dict, expected: dict, conditions: dict):
    """Metrics and weights: to the bit where both were computed under the same conditions, and else up to `RTOL`."""
    exact = rows.conditions() == conditions
    wrong = []
    for name, values in expected["metrics"].items():
        series = found["metrics"].get(name)
        if series is None or len(series) != len(values):
            wrong.append(f"{name}: {series} is not a series of {len(values)} steps")
            continue
        largest = max((abs(value) for value in values if value is not None), default=0.0)
        same = equal if exact else lambda value, recorded: close(value, recorded, largest)  # noqa: B023
        pairs = [(step, a, b) for step, (a, b) in enumerate(zip(series, values)) if not same(a, b)]
        if pairs:
            step, a, b = pairs[0]
            wrong.append(f"{name}: {a!r} instead of {b!r} in row {step}, the first of {len(pairs)} that differ")
    for part, tensors in expected["tensors"].items():
        tensors = expected["tensors"][tensors] if isinstance(tensors, str) else tensors
        if found["tensors"][part].keys() != tensors.keys():
            wrong.append(f"{part} has other tensors: {sorted(found['tensors'][part].keys() ^ tensors.keys())}")
            continue
        for name, (crc, total, norm, size) in tensors.items():
            own_crc, own_total, own_norm, own_size = found["tensors"][part][name]
            # A sum of values of both signs is as exact as their norm is.
            near = close(own_norm, norm) and close(own_total, total, norm * math.sqrt(size))
            if own_size != size or not (own_crc == crc if exact else near):
                wrong.append(f"{part}: {name} has norm {own_norm!r} and sum {own_total!r}, not {norm!r} and {total!r}")
    how = "to the bit" if exact else f"up to {RTOL}"
    assert not wrong, f"{len(wrong)} series or tensors are not the recorded ones {how}:\n" + "\n".join(wrong[:20])


# Command lines


@pytest.mark.parametrize("name", RECORDS["help"])
def test_options_of_commands(name):
    expected, found = RECORDS["help"][name], rows.describe_command(name)
    by_spelling = {text: option for option in found["options"].values() for text in option["spellings"]}
    by_spelling |= {key: option for key, option in found["options"].items() if not option["spellings"]}
    for key, option in expected["options"].items():
        for spelling in option["spellings"] or [key]:
            assert spelling in by_spelling, f"{name} has lost {spelling}"
            own = by_spelling[spelling]
            # A parser that leaves defaults to something else shows them in the parsed values below.
            if own["default"] != "SUPPRESS":
                assert own["default"] == option["default"], f"default of {spelling}"
            assert own["choices"] == option["choices"], f"choices of {spelling}"
            assert own["required"] == option["required"], spelling
            assert takes_several(own) == takes_several(option), f"number of values of {spelling}"
    for key, value in expected["parsed"].items():
        assert key in found["parsed"] and found["parsed"][key] == value, f"value of {key} after {expected['argv']}"


def takes_several(option: dict) -> bool:
    return option["nargs"] in ("+", "*") or (isinstance(option["nargs"], int) and option["nargs"] > 1)


def test_every_recipe_has_a_record():
    assert set(RECORDS["recipes"]) <= set(rows.recipe_names())


@pytest.mark.parametrize("name", RECORDS["recipes"])
def test_values_of_recipes(name):
    found = rows.parse_recipe(name)
    for key, value in RECORDS["recipes"][name].items():
        assert key in found and found[key] == value, key


# Runs


def test_every_row_has_a_record():
    assert list(RECORDS["runs"]["runs"]) == list(rows.ROWS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if row["processes"] > 1 else name for name, row in rows.ROWS.items()],
)
def test_runs(name, tmp_path, request):
    def forked(argv, folder, processes):
        request.getfixturevalue("trainers")(argv, processes=processes, folder=folder).finish()

    found = rows.run_row(name, tmp_path, launch=forked)
    assert_same_run(found, RECORDS["runs"]["runs"][name], RECORDS["runs"]["conditions"])


# Folders of version 0.1


def test_a_run_of_version_0_1_goes_on(tmp_path):
    shutil.copytree(rows.FOLDERS / "training", tmp_path, dirs_exist_ok=True)
    rows.train(rows.to_argv(rows.RESUMED), tmp_path)
    found = rows.read_run(tmp_path / "run", 20)
    assert found["metrics"]["step"] == list(range(1, 21))
    found["metrics"] = {name: values[10:] for name, values in found["metrics"].items()}
    assert_same_run(found, RECORDS["folders"], RECORDS["folders"]["conditions"])


def test_a_pipeline_of_version_0_1_opens_and_samples(tmp_path):
    from diffusers_vrpo import VRPOPipeline

    folder = rows.FOLDERS / "pipeline"
    assert any(name.startswith("projector") for name in rows.load_file(folder / "transformer" / rows.WEIGHTS))
    VRPOPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    # Whatever is saved again, the weights of the model are those that were read.
    assert rows.digests(tmp_path / "transformer" / rows.WEIGHTS) == RECORDS["folders"]["tensors"]["pipeline"]
    expected = np.array(RECORDS["folders"]["images"]).reshape(4, 8, 8, 3)
    np.testing.assert_allclose(rows.sample(folder), expected, atol=RTOL)
