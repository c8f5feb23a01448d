# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The yardstick of digit grids: its exact judge, what its encoder sees, controls, the driver and the table."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image as PILImage

from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.assets import digit_grids
from diffusers_vrpo.assets.digit_grids import cells_to_images, grid_images, images_to_cells
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.callbacks import TrainerCallback
from support.yardstick import YARDSTICK


@pytest.fixture(scope="module")
def grids(yardstick):
    """The module grids.py."""
    import grids

    return grids


def pixels(split: str, count: int) -> torch.Tensor:
    return torch.from_numpy(grid_images(split)[:count])[:, None].float() / 127.5 - 1


def test_the_judge_knows_real_grids_from_others(grids):
    judge, real = grids.grid_judge(), pixels("validation", 1000)
    assert judge.accuracy > 0.98
    found = judge(real)
    assert found["rule"] == pytest.approx(0.93, abs=0.01) and found["pairs"] == pytest.approx(0.964, abs=0.01)
    assert found["entropy"] > 0.99 and found["fd_cell"] < 0.1 and found["fd_joint"] < 1

    # The same cells in other company: as good one by one, at chance together.
    generator, cells = torch.Generator().manual_seed(0), images_to_cells(real)
    orders = [torch.randperm(len(real), generator=generator) for _ in range(4)]
    mixed = judge(cells_to_images(torch.stack([cells[order, i] for i, order in enumerate(orders)], 1)))
    assert mixed["rule"] < 0.01 and mixed["pairs"] == pytest.approx(0.1, abs=0.02)
    assert mixed["fd_cell"] == pytest.approx(found["fd_cell"], abs=0.01) and mixed["nn"] == pytest.approx(found["nn"])
    assert mixed["fd_joint"] > 10

    noisy = judge(real + 0.5 * torch.randn(real.shape, generator=generator))
    assert noisy["nn"] > found["nn"] and noisy["fd_cell"] > 10 * found["fd_cell"]


def test_the_encoder_sees_each_cell_alone(grids):
    encoder, images = grids.GridEncoder(), pixels("train", 3)
    tokens = encoder(images.expand(-1, 3, -1, -1))
    assert tokens.shape == (3, 16, encoder.embed_dim)
    alone = load_encoder("embedded:digits", grid_size=(4, 4))
    for place in range(4):
        cell = images_to_cells(images)[:, place].expand(-1, 3, -1, -1)
        wanted = alone(cell).unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
        row, column = divmod(place, 2)
        own = tokens.unflatten(1, (4, 4))[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1, 2)
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)
    # Digits that are not in the data set are encoded when they come.
    other = encoder((images + 0.02).expand(-1, 3, -1, -1))
    assert not torch.equal(other, tokens) and (other - tokens).abs().max() < 0.5


@pytest.mark.parametrize("block", [None, 1])
def test_a_gradient_is_scaled_where_it_arrives(yardstick, block):
    from gradient_scale import GradientScale

    first, last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    transformer = torch.nn.Sequential(first, last)
    transformer.transformer_blocks = [first]
    t, x = torch.tensor([0.1, 0.59, 0.6, 0.99]), torch.randn(4, 2)
    trainer = SimpleNamespace(transformer=transformer, alignment=SimpleNamespace(t=t))

    def weight_gradients(rows):
        return torch.autograd.grad(transformer(x[rows]).square().sum(), [first.weight, last.weight])

    low, high = weight_gradients(slice(0, 2)), weight_gradients(slice(2, 4))
    GradientScale(2.0, t_below=0.6, block=block).on_train_begin(trainer)
    of_first, of_last = torch.autograd.grad(transformer(x).square().sum(), [first.weight, last.weight])
    torch.testing.assert_close(of_first, 2 * low[0] + high[0])
    torch.testing.assert_close(of_last, (2 if block is None else 1) * low[1] + high[1])
    factors = GradientScale([1.0, 3.0]).factor(t)
    assert factors.tolist() == [1.0, 3.0, 3.0, 3.0]


@pytest.fixture
def study(grids, tmp_path, monkeypatch):
    """The study of grids.yaml with four steps, and a function that runs the driver's actions on it."""
    monkeypatch.setattr(digit_grids, "SPLIT_SIZES", {"train": 200, "validation": 100})
    digit_grids._grid_splits.cache_clear()
    values = yaml.safe_load((YARDSTICK / "grids.yaml").read_text())
    values |= {"steps": 4, "evaluate_every": 2, "curve_samples": 20, "final_samples": 30, "solver_steps": 2}
    values["model"] |= {"num_layers": 3, "attention_head_dim": 8}
    values["train"] |= {"train_batch_size": 4, "projector_dim": 8, "lr_warmup_steps": 1, "ema_decay": 0.5}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))

    def run(action, *options):
        places = ["--study", str(file), "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
        return grids.main([action, *options, *places])

    run.folder, run.study, run.work = tmp_path, grids.load_study(file), tmp_path / "work"
    run.lines = lambda: [json.loads(line) for line in (tmp_path / "results-tiny.jsonl").read_text().splitlines()]
    yield run
    digit_grids._grid_splits.cache_clear()


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def before_optimizer_step(self, trainer):
        if trainer.step == self.step:
            raise Killed


@pytest.mark.slow
def test_runs_go_on_where_they_were_killed(grids, study, monkeypatch):
    name = "vrpo-4-b3-equal"
    whole = grids.train_and_judge(study.study, name, 1, study.work / "whole")
    folder = grids.run_folder(study.study, name, 1, study.work / "killed") / "run"
    grids.AcceleratorState._reset_state(reset_partial_state=True)
    trainer = grids.make_trainer(study.study, study.study.arms[name], 4, 1, study.work / "killed", folder, [KillAt(3)])
    with pytest.raises(Killed), trainer:
        trainer.train()  # killed after the checkpoint of step 2, before its point of the curve
    grids.AcceleratorState._reset_state(reset_partial_state=True)
    continued = grids.train_and_judge(study.study, name, 1, study.work / "killed")
    for line in (whole, continued):
        assert line.pop("train_seconds") > 0
    assert continued == whole
    assert [point["step"] for point in whole["curve"]] == [2, 4]


def test_arms_of_a_seed_start_from_the_same_weights(grids, study, capsys):
    assert study("one", "--arms", "none", "repa-4-b3", "--seeds", "1") == 0
    none, repa = study.lines()
    assert none["seed"] == repa["seed"] == 1 and none["parameters"] == repa["parameters"]
    assert none["recipe"] != repa["recipe"] and none["flags"] == {"objective": "none"}
    assert len(list(study.work.glob("starts/*/*.safetensors"))) == 1
    assert study("run", "--arms", "none", "repa-4-b3", "--seeds", "1") == 0  # nothing is left to do
    assert "0 of 2 runs to do" in capsys.readouterr().out and len(study.lines()) == 2
    assert study("table", "--arms", "none", "repa-4-b3", "--reference", "none") == 0
    out = capsys.readouterr().out
    assert "| repa-4-b3 | 1 |" in out and "pairs against none" in out
    with pytest.raises(InputError, match="has no run of this study"):
        study("table", "--seeds", "2")
    assert study("picture", "--arms", "none", "repa-4-b3", "--seeds", "1", "2") == 0
    with PILImage.open(study.work / "samples.png") as picture:
        assert picture.size == (12 * 72, 2 * 88)  # two runs of twelve samples
    with pytest.raises(InputError, match="has samples of none of these arms"):
        study("picture", "--arms", "none", "--seeds", "7")
    with pytest.raises(InputError, match="--arms nine is not one of .*none, none-doubled"):
        study("table", "--arms", "nine")


def test_the_table_by_hand(grids):
    pytest.importorskip("scipy")
    found = grids.paired([0.05, 0.03, 0.07, 0.01])
    assert found["mean"] == pytest.approx(0.04) and found["error"] == pytest.approx(0.02581989 / 2)
    assert found["p"] == pytest.approx(0.0533, abs=1e-3)  # t = 3.098 with 3 degrees of freedom
    line = {"curve": [{"step": 100, "pairs": 0.2}, {"step": 200, "pairs": 0.4}]}
    assert grids.steps_to(line, 0.3) == pytest.approx(150) and grids.steps_to(line, 0.5) is None
    study = grids.load_study(YARDSTICK / "grids.yaml")
    arms = {name: study.arms[name] for name in ("none", "repa-4-b3")}
    lines = []
    for name, level in (("none", 0.2), ("repa-4-b3", 0.5)):
        for seed in (1, 2):
            values = dict.fromkeys(grids.COLUMNS, level + 0.1 * seed) | {"arm": name, "seed": seed}
            curve = [{"step": 450, "pairs": level}, {"step": 900, "pairs": level + 0.1 * seed}]
            lines.append(values | {"recipe": grids.run_hash(study, arms[name]), "curve": curve})
    # In the seconds of 900 steps of the reference, an arm whose steps take 1.2 times as long has taken 750.
    assert grids.pairs_at(lines[0], 675) == pytest.approx(0.25) and grids.pairs_at(lines[0], 1000) == pytest.approx(
        0.3
    )
    runs = {name: {line["seed"]: line for line in lines if line["arm"] == name} for name in arms}
    assert grids.equal_compute(runs["none"], runs["repa-4-b3"], 4 / 3, 900).startswith("-0.375 ± 0.025")
    timing = {"none": {"ratio": 0.8}, "repa-4-b3": {"ratio": 1.0}}
    text = grids.table(study, lines, timing, "repa-4-b3", arms)
    head, _, none, repa = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert none[:4] == ["none", "2", "0.80", "0.350 ± 0.050"] and none[-1] == "–"
    assert none[head.index("pairs against repa-4-b3")].startswith("-0.300 ± 0.000")
    assert repa[-4:-1] == ["–", "–", "–"]
    assert none[-2].startswith("-0.300 ± 0.000")  # its curve ends
