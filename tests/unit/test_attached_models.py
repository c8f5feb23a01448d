# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""benchmarks/attached_models.py at the smallest size."""

import importlib.util
import json

import pytest
import torch

from diffusers_vrpo.alignment.tiny_transformers import TRANSFORMERS
from support.paths import ROOT


FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("attached_models", FOLDER / "attached_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_model_is_trained_once(benchmark, tmp_path, capsys, monkeypatch):
    argv = ["--models", "FluxTransformer2DModel", "--seeds", "3", "--steps", "2", "--results", str(tmp_path / "lines")]
    args = benchmark.build_parser().parse_args(argv)
    monkeypatch.setattr(benchmark, "reward_without_image", lambda: (0.2, 0.5))  # of all digits
    benchmark.main(args)
    (line,) = benchmark.read_lines(tmp_path / "lines")
    assert line["seed"] == 3 and line["steps"] == line["aligned_steps"] == 2 and line["loss_aligned"] > 0
    first = capsys.readouterr().out
    assert "| `FluxTransformer2DModel` |" in first and "the reward rises by" in first

    monkeypatch.setattr(benchmark, "compare", None)
    benchmark.main(args)
    assert capsys.readouterr().out == first.partition("\n")[2]
    assert len(benchmark.read_lines(tmp_path / "lines")) == 1


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_each_model_is_called_with_digits_and_classes(benchmark, name):
    tiny, pixels = benchmark.build(name, seed=0), torch.zeros(3, 3, 8, 8)
    conditions = benchmark.Conditions(tiny.arguments, torch.Generator().manual_seed(0))
    x_t = benchmark.latents_of(pixels, conditions.shape)
    assert x_t.shape[1:] == conditions.shape[1:]
    with torch.no_grad():
        arguments = conditions(x_t, torch.rand(3), torch.tensor([0, 4, 9]))
        prediction = tiny.model.eval()(**arguments, return_dict=False)[0]
    assert prediction[:, : x_t.shape[1]].shape == x_t.shape
    assert ("class_labels" in arguments) != bool(conditions.texts)


def test_the_wrapper_adds_no_operations(benchmark, tmp_path, capsys, monkeypatch):
    sizes = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 2}
    monkeypatch.setattr(benchmark, "WIDER", sizes)
    monkeypatch.setattr(benchmark, "OVERHEAD_BATCH_SIZE", 2)
    argv = ["overhead", "--models", "SiTTransformer2DModel", "--rounds", "1", "--results", str(tmp_path / "lines")]
    benchmark.main(benchmark.build_parser().parse_args(argv))
    counts = json.loads((tmp_path / "lines").read_text())["operations"]
    assert counts["align=False"] == counts["alone"] == counts["alone again"] > 100
    # A zero as alignment's loss, times its coefficient, is added to the loss.
    assert counts["ended"] - counts["alone"] <= 4
    assert "| `SiTTransformer2DModel` |" in capsys.readouterr().out


def test_the_page_has_the_tables_of_the_results(benchmark):
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    training, overhead = (benchmark.read_lines(FOLDER / name) for name in benchmark.RESULTS.values())
    # The file has runs with other rewards, widths and seeds as well, from which the text quotes.
    shown = {"rewards": benchmark.REWARDS, "steps": 200, "heads": None}
    training = [line for line in training if shown.items() <= line.items() and line["seed"] in (0, 1)]
    for table in (benchmark.training_table(training), benchmark.overhead_table(overhead)):
        rows = [row for row in table.splitlines() if row.startswith("|")]
        assert "\n".join(rows) in page
    assert {line["model"] for line in training} == set(TRANSFORMERS)
