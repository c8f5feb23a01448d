# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import json
import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from PIL import Image

from diffusers_vrpo.config import AlignmentConfig, PolicyConfig, VRPOConfig, settings_to_keep
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.pipelines.sampling import image_grid
from diffusers_vrpo.reporting.curves import chosen_panels, plot_metrics, smoothed
from diffusers_vrpo.training.checkpoints import (
    check_settings,
    find_checkpoint,
    list_checkpoints,
    read_training_state,
    save_checkpoint,
    write_manifest,
)
from diffusers_vrpo.training.distributed import ema_weights
from diffusers_vrpo.training.metrics import MetricsFile, RunningMeans, read_metrics
from diffusers_vrpo.training.output_dir import prepare_output_dir
from diffusers_vrpo.training.validation import captions_of


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


# What every training state has.
STATE = {"samples_seen": 0, "settings": {}, "lr_scheduler": {}, "alignment": None, "skipped": 0}
STATE |= {"train_seconds": 1.0, "train_flops": 1.0}


def fake_checkpoint(folder, step, settings=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "training_state.json").write_text(json.dumps(STATE | {"step": step, "settings": settings or {}}))
    write_manifest(path)
    return path


def test_output_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="`output_dir` .*file/run cannot be written .*another folder"):
        prepare_output_dir(str(tmp_path / "file" / "run"))
    assert list(prepare_output_dir(str(tmp_path / "a" / "b")).iterdir()) == []


def test_checkpoints_are_ordered_by_step_and_half_made_ones_do_not_count(tmp_path):
    for step in (900, 1000, 20):
        fake_checkpoint(tmp_path, step)
    (tmp_path / ".checkpoint-2000.tmp").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-900", "checkpoint-1000"]
    assert find_checkpoint("latest", tmp_path).name == "checkpoint-1000"
    assert find_checkpoint("checkpoint-1000", tmp_path).name == "checkpoint-1000"
    assert find_checkpoint(str(tmp_path / "checkpoint-20"), tmp_path / "branch").name == "checkpoint-20"
    with pytest.raises(InputError, match="checkpoint-20 is older than .*checkpoint-1000; to branch off"):
        find_checkpoint("checkpoint-20", tmp_path)
    assert find_checkpoint(str(tmp_path / "checkpoint-900"), tmp_path / "other").name == "checkpoint-900"


def test_the_same_command_goes_on_from_where_a_run_that_began_with_the_checkpoint_of_another_was_stopped(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    begun_with, folder = str(fake_checkpoint(tmp_path / "first", 6)), tmp_path / "second"
    assert find_checkpoint(begun_with, folder) == tmp_path / "first" / "checkpoint-6"
    fake_checkpoint(folder, 5)  # of a run that has not begun there
    assert find_checkpoint(begun_with, folder) == tmp_path / "first" / "checkpoint-6"
    fake_checkpoint(folder, 16)
    assert find_checkpoint(begun_with, folder) == folder / "checkpoint-16"
    assert find_checkpoint(begun_with, folder, overwrite=True) == tmp_path / "first" / "checkpoint-6"


def test_the_only_checkpoint_of_a_folder_may_have_another_name(tmp_path):
    fake_checkpoint(tmp_path, 5).rename(tmp_path / "kept")
    assert find_checkpoint("kept", tmp_path).name == "kept"


def checked_state(checkpoint, expected):
    state = read_training_state(checkpoint)
    check_settings(state, expected, checkpoint)
    return state


def test_what_resume_refuses(tmp_path):
    assert find_checkpoint("latest", tmp_path) is None and find_checkpoint("none", tmp_path) is None
    fake_checkpoint(tmp_path, 5)
    with pytest.raises(InputError, match="`resume_from_checkpoint` none would mix.*`output_dir`"):
        find_checkpoint("none", tmp_path)
    with pytest.raises(InputError, match="`resume_from_checkpoint` nowhere is not a checkpoint.*has checkpoint-5"):
        find_checkpoint("nowhere", tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = fake_checkpoint(tmp_path, 5, {"seed": 1})
    assert checked_state(path, {"seed": 1})["step"] == 5
    with pytest.raises(InputError, match="`seed` is 2, but .*checkpoint-5 was trained with 1"):
        checked_state(path, {"seed": 2})
    (path / "training_state.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        checked_state(path, {"seed": 1})


def test_an_option_without_effect_may_have_another_default_than_before(tmp_path):
    """Version 0.1 wrote `reward_weighting inverse_variance` for runs without rewards too; its default is `auto` now."""
    old = fake_checkpoint(tmp_path, 5, {"--objective": "repa", "--reward_weighting": "inverse_variance"})
    kept = {
        objective: settings_to_keep(VRPOConfig(objective=objective), AlignmentConfig)
        | settings_to_keep(VRPOConfig(objective=objective), PolicyConfig)
        for objective in ("repa", "vrpo")
    }
    assert checked_state(old, kept["repa"])["step"] == 5
    with pytest.raises(InputError, match="`objective` is vrpo, but"):
        checked_state(old, kept["vrpo"])
    old = fake_checkpoint(tmp_path, 6, {"--objective": "vrpo", "--reward_weighting": "inverse_variance"})
    with pytest.raises(InputError, match="`reward_weighting` is auto, but .* was trained with inverse_variance"):
        checked_state(old, kept["vrpo"])


def test_what_earlier_versions_did_before_there_was_an_option(tmp_path):
    old = fake_checkpoint(tmp_path, 5, {"--seed": 1})
    assert checked_state(old, {"token_weighting": "uniform"})["step"] == 5
    with pytest.raises(
        InputError, match="`token_weighting` is residual, but .* was trained with uniform; keep that value"
    ):
        checked_state(old, {"token_weighting": "residual"})
    ends = (("gate", 5, "gate"), ("project", 5, "stop"), ("none", None, "none"))
    for step, (conflict, stop_step, release) in enumerate(ends):
        old = fake_checkpoint(tmp_path, step, {"--conflict": conflict, "--alignment_stop_step": stop_step})
        assert checked_state(old, {"release": release})["step"] == step
        with pytest.raises(InputError, match=f"`release` is plateau, but .* was trained with {release}"):
            checked_state(old, {"release": "plateau"})


def test_what_equal_meant_in_earlier_versions(tmp_path):
    old = fake_checkpoint(tmp_path, 5, {"--reward_weighting": "equal"})
    assert checked_state(old, {"reward_weighting": "raw"})["step"] == 5
    with pytest.raises(InputError, match="is now called raw: give `reward_weighting` raw to continue"):
        checked_state(old, {"reward_weighting": "equal"})
    with pytest.raises(InputError, match="`reward_weighting` is inverse_std, but .* was trained with raw"):
        checked_state(old, {"reward_weighting": "inverse_std"})
    new = json.loads((old / "training_state.json").read_text()) | {"reward_weightings": ["equal", "raw"]}
    (old / "training_state.json").write_text(json.dumps(new))
    assert checked_state(old, {"reward_weighting": "equal"})["step"] == 5
    with pytest.raises(InputError, match="`reward_weighting` is raw, but .* was trained with equal"):
        checked_state(old, {"reward_weighting": "raw"})


def test_save_keeps_the_newest_and_leaves_nothing_half_made(tmp_path, accelerator):
    for step in (1, 2, 3):
        save_checkpoint(accelerator, tmp_path, step, STATE | {"step": step}, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    # Saving a step again replaces it.
    save_checkpoint(accelerator, tmp_path, 3, STATE | {"step": 3, "settings": {"again": True}}, limit=2)
    assert read_training_state(tmp_path / "checkpoint-3")["settings"] == {"again": True}


def test_running_means(accelerator):
    means = RunningMeans()
    for value in (1.0, 3.0):
        means.add(a=torch.tensor(value))
    means.add(b=torch.tensor(5.0))
    assert means.read(accelerator) == {"a": 2.0, "b": 5.0}
    assert means.read(accelerator) == {}


def test_ema_weights_come_and_go():
    model = torch.nn.Linear(2, 2)
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    original = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(RuntimeError), ema_weights(ema, model):
        torch.testing.assert_close(model.weight, original)
        raise RuntimeError
    torch.testing.assert_close(model.weight, original + 1)
    with ema_weights(None, model):
        torch.testing.assert_close(model.weight, original + 1)


def test_metrics_file_drops_what_a_resumed_run_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in (10, 20, 30):
        metrics.log({"loss_fm": 1.0 / step}, step)
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]
    MetricsFile(path, resume_step=20).log({"loss_fm": 0.5}, 30)
    assert [(row["step"], row["loss_fm"]) for row in read_metrics(path)] == [(10, 0.1), (20, 0.05), (30, 0.5)]


def test_plot_and_grid(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(3):
        metrics.log({"loss_fm": 1.0, "reward/semantic": step, "share/semantic": 0.5, "share/structural": 0.5}, step)
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "plot.png", title="run")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 500 and len(image.convert("L").getcolors(256)) > 10
    MetricsFile(tmp_path / "empty.jsonl")
    plot_metrics(tmp_path / "empty.jsonl", tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
    for number, name in enumerate(
        ("scaffold_distance", "image_share/perceptual", "alignment_distance", "gate/0.0-0.1")
    ):
        MetricsFile(tmp_path / f"{number}.jsonl").log({name: 1.0}, 1)
        plot_metrics(tmp_path / f"{number}.jsonl", tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").exists(), name

    colours = ["red", "lime", "blue"]
    grid = image_grid([Image.new("RGB", (8, 8), colour) for colour in colours], columns=2)
    assert grid.size == (2 * 64 + 2, 2 * 64 + 2)
    assert grid.getpixel((0, 0)) == (255, 0, 0) and grid.getpixel((66, 0)) == (0, 255, 0)
    assert grid.getpixel((0, 66)) == (0, 0, 255) and grid.getpixel((100, 100)) == (255, 255, 255)


def test_captions_of_a_grid():
    images = [Image.new("RGB", (8, 8), "blue")] * 4
    for names, lines in ((["zero", "class 207"], 1), (["zero", "golden retriever"], 2), (["x" * 99, "a b " * 99], 2)):
        grid = image_grid(images, columns=2, captions=names)
        top = 3 + 14 * lines
        assert grid.size == (2 * 64 + 2, top + 2 * 64 + 2)
        # Dark letters on white, whole within their column, and below them the images.
        head = np.asarray(grid.convert("L"))[:top]
        assert (head[:, :64] < 90).any() and (head[:, 66:] < 90).any() and (head[:, 64:66] == 255).all()
        assert grid.getpixel((0, top)) == grid.getpixel((129, grid.height - 1)) == (0, 0, 255)
    assert captions_of([3, 1], {"1": "shark, great white shark", 3: "tench"}) == ["tench", "shark"]
    assert captions_of([3, 1], {"1": "shark"}) == ["class 3", "shark"] and captions_of([0, 1], None)[0] == "class 0"
    assert captions_of([0], None) is None


def test_curves_have_five_panels_that_are_neither_flat_nor_empty():
    generator = random.Random(0)
    rows = [
        {
            "step": step,
            "loss_fm": 2 / step + 0.01 * generator.random(),
            "reward/fidelity": -2 / step,
            "reward/semantic": 1 - 1 / step,
            "reward/colour": math.nan,
            "share/semantic": 0.5,
            "cosine/0.0-0.1": 0.1 / step,
            "cosine/0.1-0.2": math.nan,
            "alignment_coeff": 0.5,
            "grad_norm": 1 + generator.random(),
            "gradient_ratio/0.0-0.1": generator.random(),
            "images_per_second": 100 + generator.random(),
        }
        for step in range(1, 101)
    ]
    panels = chosen_panels(rows)
    assert len(panels) == 5 and panels[0][0].logarithmic
    assert [list(panel.lines.values())[0] for panel, _ in panels] == [
        *("loss_fm", "reward/colour", "mean:cosine/", "grad_norm", "mean:gradient_ratio/")
    ]
    assert panels[0][1][""] == ([*range(1, 101)], [row["loss_fm"] for row in rows])
    assert list(panels[1][1]) == ["semantic"]  # without the reward that has no value, and without the loss again
    loss = [row["loss_fm"] for row in rows]
    for logarithmic, mean in ((False, np.mean), (True, lambda part: math.exp(np.mean(np.log(part))))):
        smooth = smoothed(loss, logarithmic)
        assert smooth[0] == pytest.approx(loss[0]) and smooth[50] == pytest.approx(mean(loss[47:54]))
    assert smoothed([1.0, 5.0]) == [1.0, 5.0] and smoothed([]) == []
