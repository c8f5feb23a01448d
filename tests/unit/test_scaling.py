# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""benchmarks/scaling.py at the smallest sizes, and the memory of the metrics that compare all pairs."""

import importlib.util
import json

import pytest
import torch

from diffusers_vrpo.evaluation import metrics
from support.paths import ROOT


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_cost_is_measured(scaling, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        results = scaling.main(["--quick", "--json", str(tmp_path / "scaling.json")])
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "scaling.json").read_text()) == results
    units = {result["unit"] for result in results}
    assert units == {"tokens", "rows", "classes", "aligned blocks", "encoders", "log rows", "features"}
    for result in results:
        assert len(result["seconds"]) == len(result["sizes"]) and min(result["seconds"]) >= 0
    assert capsys.readouterr().out.count("exponent") == len(results)


def test_exponents_are_slopes_of_the_larger_sizes(scaling):
    sizes = [1, 10, 100, 1000]
    assert scaling.fitted_exponent(sizes, [7, 7, 3 * 100**1.5, 3 * 1000**1.5]) == pytest.approx(1.5)
    assert scaling.fitted_exponent(sizes, [5.0] * 4) == pytest.approx(0)


def test_distances_are_computed_in_blocks(monkeypatch):
    """No block has more elements than asked for, and the first set is not converted as a whole."""
    converted, blocks = [], []
    original = metrics.as_float64
    monkeypatch.setattr(metrics, "as_float64", lambda x: converted.append(len(x)) or original(x))
    x, y = torch.randn(300, 4), torch.randn(50, 4)
    for rows, distances in metrics.distance_blocks(x, y, block_elements=1000):
        blocks.append(distances.numel())
        torch.testing.assert_close(distances, torch.cdist(x[rows].double(), y.double()).square())
    assert blocks == [1000] * 15 and converted == [50] + [20] * 15
    assert metrics.BLOCK_ELEMENTS * 8 <= 2**27
