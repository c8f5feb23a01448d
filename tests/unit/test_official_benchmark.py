# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""benchmarks/official.py with small repositories of the test's own; the official ones are not part of this one."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from diffusers_vrpo.errors import InputError
from support.paths import ROOT


TRAIN = """
import a_tracker_that_is_not_installed
from helpers import twice


@torch.no_grad()
def scaled(value):
    return 3 * twice(value)


def main(args):
    for epoch in range(9):
        for image, label in train_dataloader:
            found.append(scaled(image) + label + args.offset)
            step_number += 1
            if step_number > 1:
                break
"""


@pytest.fixture(scope="module")
def official():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("official")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "train.py").write_text("import torch\n" + TRAIN)
    (tmp_path / "helpers.py").write_text("def twice(value):\n    return 2 * value\n")
    return tmp_path


def test_the_body_of_the_loop_is_the_step(official, repository):
    found = []
    step = official.training_step(repository, {"found": found, "args": SimpleNamespace(offset=100), "step_number": 0})
    for image in (1, 2, 3):
        step((image, 10))
    assert found == [116, 122, 128] and step.namespace["step_number"] == 3
    assert "helpers" not in sys.modules


def test_a_file_without_the_loop_is_refused(official, repository):
    (repository / "train.py").write_text("def main(args):\n    pass\n")
    with pytest.raises(InputError, match="no single loop over its data loader"):
        official.training_step(repository, {})


def test_what_is_missing_is_named(official, repository):
    with pytest.raises(InputError, match="No module named 'absent'.*must be a clone"):
        official.load_official(repository, "repa", ["absent"])
    (helpers,) = official.load_official(repository, "repa", ["helpers"])
    assert helpers.twice(4) == 8 and "helpers" not in sys.modules
    for options, message in (([], "give --repa or --sit"), (["--sit", "x", "--what", "training"], "needs --repa")):
        with pytest.raises(InputError, match=message):
            official.main(official.build_parser().parse_args(options))


def test_two_repositories_may_have_modules_of_one_name(official, tmp_path):
    for file in ("one/models/sit.py", "two/models.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(f"NAME = {file!r}\n")
    (first,) = official.load_official(tmp_path / "one", "repa", ["models.sit"])
    (second,) = official.load_official(tmp_path / "two", "sit", ["models"])
    assert (first.NAME, second.NAME) == ("one/models/sit.py", "two/models.py")
    assert not {"models", "models.sit"} & set(sys.modules)


def test_a_package_that_is_missing_becomes_placeholders(official):
    official.replace_if_missing("a_package_of_nobody")
    try:
        from a_package_of_nobody.transforms import Normalize

        assert Normalize((0.5,), (0.5,)) is not None
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, official.Placeholders)]
        for name in [name for name in sys.modules if name.startswith("a_package_of_nobody")]:
            del sys.modules[name]


def test_rows_of_the_network_are_counted(official):
    counted = official.CountedRows(torch.nn.Identity())
    for rows in (2, 3):
        counted(torch.zeros(rows, 1))
    assert counted.rows == 5


def test_the_time_of_operators_is_printed(official, capsys):
    layer, settings = torch.nn.Linear(256, 256), SimpleNamespace(repeats=2, operators=True)
    calls = {"twice": lambda x: layer(x).sum().backward(), "once": layer}
    found = official.time_operators(settings, calls, iter([torch.ones(64, 256)] * 2))
    assert {"addmm", "mm", "sum"} <= found["twice"].keys() and "mm" not in found["once"]
    assert all(seconds > 0 for seconds in (found["twice"]["mm"], found["once"]["addmm"]))
    official.print_operators(found)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("addmm", "others", "matrix products", "their share"))
    assert official.time_operators(SimpleNamespace(repeats=2, operators=False), calls, iter([])) == {}
