# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The generative policy in runs of the training script: what it logs, saves, continues, adds to, and when it stops."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.commands import prepare as prepare_latents
from diffusers_vrpo.errors import InputError, TrainingStopped
from diffusers_vrpo.evaluation.feature_statistics import read_statistics
from diffusers_vrpo.experimental.generative import callback as generative_training
from diffusers_vrpo.experimental.generative import rewards as sample_rewards
from diffusers_vrpo.experimental.generative.callback import GenerativePolicy
from diffusers_vrpo.experimental.generative.rewards import REWARDS
from diffusers_vrpo.training.checkpoints import list_checkpoints, write_manifest
from diffusers_vrpo.training.metrics import read_metrics
from support.models import tiny_vae
from support.trainers import assert_same_end
from support.training import assert_same_files, options_in, run, train_vrpo


WEIGHTS = "diffusion_pytorch_model.safetensors"
STATE = "generative_policy.safetensors"
# Two classes of four samples in every step from the third on; limits that nothing reaches.
POLICY = {
    "generative_policy_start_step": 2,
    "rollout_classes": 2,
    "rollout_group_size": 4,
    "rollout_steps": 2,
    "rollout_every": 1,
    "mc_samples": 2,
    "generative_learning_rate": 1e-3,
    "reward_queue_size": 64,
    "reward_reference_images": 200,
    "guard_every": 2,
    "guard_samples": 32,
    "guard_loss_rise": 1e9,
    "guard_recall_fall": 1e9,
    "max_train_steps": 6,
}
# Without alignment, where it plays no part.
ALONE = POLICY | {"objective": "none", "encoder": None, "reward_encoder": "digits"}
# Three rollouts, at 2, 4 and 6, of which either one step or both learn; the former have the Fréchet influence.
ONE_EPOCH = POLICY | {"rollout_every": 2, "guard_every": 1, "max_train_steps": 8, "fidelity_reward": "frechet"}
TWO_EPOCHS = ONE_EPOCH | {"rollout_epochs": 2, "fidelity_reward": "mmd", "rollout_clip_range": 1e-4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with runs that nothing stopped, and `command` there: `plain`, `one` epoch and `two` epochs."""
    folder = tmp_path_factory.mktemp("finished")
    options = options_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_rewards, "REFRESH_UPDATES", 3)
        run(options(output_dir=folder / "plain", max_train_steps=4, checkpointing_steps=1))
        run(options(**ONE_EPOCH, output_dir=folder / "one", checkpointing_steps=1))
        run(options(**TWO_EPOCHS, output_dir=folder / "two", checkpointing_steps=2))
    return folder, options


def rows_of(folder) -> list[dict]:
    return read_metrics(folder / "metrics.jsonl")


def stopped_at(source, step: int, target):
    """A folder as a run has left it after this step."""
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    shutil.copy(source / "metrics.jsonl", target)
    return target


def assert_same_state(a, b):
    """The queue, what the rewards and the guards compare with; a distance that is not measured is NaN."""
    left, right = load_file(a / STATE), load_file(b / STATE)
    assert left.keys() == right.keys() and left["begun"]
    for name in left:
        assert torch.equal(left[name].nan_to_num(-1.0), right[name].nan_to_num(-1.0)), name


def drawn(pipeline, count=8) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(count, *[3, 8, 8], generator=torch.Generator().manual_seed(0))
    return pipeline(list(range(count)), latents=noise, num_inference_steps=2, output_type="pt").images


# What comes out


def test_what_is_logged_and_saved(finished):
    folder, _ = finished
    rows = rows_of(folder / "one")
    followed = [row["step"] for row in rows if "policy/ratio" in row]
    assert followed == [3, 5, 7]
    for row in rows:
        assert ("guard/loss_fm" in row) == (row["step"] in (2, 4, 6, 8))
        assert row["learning_rate"] == (0.01 if row["step"] <= 2 else 1e-3)
        if row["step"] in followed:
            assert {name for name in row if name.startswith("sample_reward/")} == {
                f"sample_reward/{n}" for n in REWARDS
            }
            assert sum(row[f"sample_share/{name}"] for name in REWARDS) == pytest.approx(1)
            # Samples of a model that has hardly learned are of no class: real images are worth more.
            assert row["sample_reward/semantic"] < row["sample_reward_real/semantic"] - 1
            assert row["policy/ratio"] == 1 and row["policy/clip_fraction"] == 0 and row["policy/gradient_ratio"] > 0
    looks = [row for row in rows if "guard/loss_fm" in row]
    assert looks[0]["guard/drift"] == 0 and looks[0]["guard/reward"] == looks[0]["guard/start_reward"]
    assert 0 < looks[1]["guard/drift"] < looks[2]["guard/drift"]
    assert "guard/held_out" not in looks[0]
    # Grids of before and after, from the same noise.
    assert (folder / "one" / "samples" / "step-0000002.png").is_file()
    assert (folder / "one" / "samples" / "step-0000008.png").is_file()
    # The optimizer had the rate of the policy before its first update.
    groups = torch.load(folder / "one" / "checkpoint-2" / "optimizer.bin", weights_only=True)["param_groups"]
    assert [group["lr"] for group in groups] == [1e-3]
    # FLOPs of an update are those of the real batch and more.
    flops = [0, *(row["train_flops"] for row in rows)]
    spent = [after - before for before, after in zip(flops, flops[1:])]
    assert len(set(spent[:2] + spent[3::2])) == 1 and spent[2] == spent[4] > 1.2 * spent[1]


def test_best_is_the_averaged_pipeline_of_the_best_look(finished):
    folder, _ = finished
    distances = {row["step"]: row["guard/distance"] for row in rows_of(folder / "one") if "guard/distance" in row}
    best = min(distances, key=distances.get)
    assert best == 8
    pipeline = VRPOPipeline.from_pretrained(folder / "one" / "best")
    assert drawn(pipeline).shape == (8, 3, 8, 8)
    left = load_file(folder / "one" / "best" / "transformer" / WEIGHTS)
    right = load_file(folder / "one" / f"checkpoint-{best}" / "transformer_ema" / WEIGHTS)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert not list((folder / "one").glob(".best*"))


def test_the_steps_before_it_are_those_without_it(finished):
    folder, _ = finished
    one, plain = folder / "one" / "checkpoint-2", folder / "plain" / "checkpoint-2"
    names = [f"transformer/{WEIGHTS}", f"transformer_ema/{WEIGHTS}", "reward_statistics.safetensors"]
    assert_same_files(one, plain, names)
    for left, right in zip(rows_of(folder / "one")[:2], rows_of(folder / "plain")[:2]):
        assert left["loss_fm"] == right["loss_fm"] and left["grad_norm"] == right["grad_norm"]
    # The next step has the same batch, and another gradient.
    left, right = rows_of(folder / "one")[2], rows_of(folder / "plain")[2]
    assert left["loss_fm"] == right["loss_fm"] and left["grad_norm"] != right["grad_norm"]
    assert (one / STATE).exists() and not list((folder / "plain").glob(f"checkpoint-*/{STATE}"))
    assert (
        not (folder / "plain" / "best").exists() and not (folder / "plain" / "reward_reference.safetensors").exists()
    )
    assert not any(
        name.split("/")[0] in ("policy", "guard", "sample_reward") for row in rows_of(folder / "plain") for name in row
    )


def test_without_a_start_step_there_is_no_policy():
    with pytest.raises(InputError, match="`generative_policy_start_step` is missing"):
        GenerativePolicy(SimpleNamespace(generative_policy_start_step=None))


def test_statistics_of_the_training_images_are_read_again(finished, tmp_path, monkeypatch):
    folder, options = finished
    features, description = read_statistics(folder / "one" / "reward_reference.safetensors")
    assert features.count == 200 and features.moments["pool"][1].shape == (64, 64) and features.pool.shape == (200, 64)
    assert description["encoder"] == "digits" and description["images"]["size"] == [8, 8]
    mean, covariance = features.moments["pool"]
    torch.testing.assert_close(mean, features.pool.double().mean(0))
    torch.testing.assert_close(covariance, features.pool.double().T.cov())

    given = tmp_path / "reference.safetensors"
    shutil.copy(folder / "one" / "reward_reference.safetensors", given)
    before = given.stat().st_mtime_ns
    short = options(**POLICY | {"max_train_steps": 3}, output_dir=tmp_path / "run", reward_reference=given)
    with monkeypatch.context() as patch:
        patch.setattr(generative_training, "reference_statistics", lambda *a: pytest.fail("computed again"))
        run(short)
    assert given.stat().st_mtime_ns == before and not (tmp_path / "run" / "reward_reference.safetensors").exists()
    # What is of other images is not overwritten.
    with pytest.raises(
        InputError, match="reference.safetensors has statistics of other images, .*; give another file"
    ):
        run(
            options(**POLICY | {"reward_reference_images": 150}, output_dir=tmp_path / "other", reward_reference=given)
        )
    assert given.stat().st_mtime_ns == before


def test_two_epochs_have_a_ratio_clipping_and_an_anchor(finished, tmp_path):
    folder, options = finished
    rows = [row for row in rows_of(folder / "two") if row["step"] > 2]
    assert [row["policy/ratio"] == 1 for row in rows] == [True, False] * 3
    assert [row["policy/clip_fraction"] > 0 for row in rows] == [False, True] * 3
    assert ["sample_reward/fidelity" in row for row in rows] == [True, False] * 3
    # Nothing but the anchor pulls: back to the averaged weights, which drew the samples. It is 0.3 with two epochs.
    drifts = {}
    for coeff in (None, 0, 100):
        changes = {"generative_coeff": 0, "max_gradient_ratio": 1e9, "anchor_coeff": coeff, "max_train_steps": 6}
        run(
            options(
                **{**TWO_EPOCHS, **changes}, output_dir=tmp_path / f"{coeff}", checkpointing_steps=6, objective="none"
            )
        )
        rows = rows_of(tmp_path / f"{coeff}")
        ratios = [row["policy/gradient_ratio"] for row in rows if "policy/gradient_ratio" in row]
        assert min(ratios) > 0 if coeff != 0 else ratios == [0] * 4
        drifts[coeff] = rows[-1]["guard/drift"]
    assert drifts[100] < 0.5 * drifts[0] and drifts[100] < drifts[None] < drifts[0]


@pytest.mark.slow
def test_a_reward_of_ones_own_rises(command, tmp_path):
    """Brighter images where brightness is wanted, darker ones where darkness is."""
    (tmp_path / "mine.py").write_text(
        "def brightness(images, features, labels):\n    return images.float().mean((1, 2, 3)) / 255\n\n\n"
        "def darkness(images, features, labels):\n    return -brightness(images, features, labels)\n"
    )
    changes = {"generative_policy_start_step": 0, "max_train_steps": 40, "rollout_group_size": 8}
    changes |= {"reward_weights": "0,0,0,1", "generative_learning_rate": 3e-3, "max_gradient_ratio": 20}
    changes |= {"guard_every": 100, "logging_steps": 4, "generative_coeff": 100}
    levels = {}
    for name in ("brightness", "darkness"):
        function = f"{tmp_path / 'mine.py'}:{name}"
        run(command(**ALONE | changes, reward_function=function, output_dir=tmp_path / name))
        rows = rows_of(tmp_path / name)[1:]
        assert rows[-1][f"sample_share/{name}"] == 1
        curve = [row[f"sample_reward/{name}"] for row in rows]
        assert curve[-1] > curve[0] + 0.05
        levels[name] = drawn(VRPOPipeline.from_pretrained(tmp_path / name)).mean().item()
    assert levels["brightness"] > levels["darkness"] + 0.1


# Continued runs


@pytest.mark.parametrize("name, step", [("one", 2), ("one", 4), ("one", 5), ("two", 4), ("two", 6)])
def test_a_run_that_was_stopped_ends_bit_equal(finished, tmp_path, monkeypatch, name, step):
    """Before the first rollout, at one, between two; and between two whose samples serve twice."""
    monkeypatch.setattr(sample_rewards, "REFRESH_UPDATES", 3)
    folder, options = finished
    target = stopped_at(folder / name, step, tmp_path / "run")
    policy = ONE_EPOCH if name == "one" else TWO_EPOCHS
    run(options(**policy, output_dir=target, checkpointing_steps=2))
    assert_same_end(folder / name, target, 8)
    assert_same_state(folder / name / "checkpoint-8", target / "checkpoint-8")
    assert_same_files(folder / name / "best", target / "best", [f"transformer/{WEIGHTS}"])
    state = load_file(target / "checkpoint-8" / STATE)
    assert ("rewards.transport.pool" in state) == (name == "one")
    assert state["rewards.counts"].tolist() == [32 + 3 * 8, 4]


def test_a_signal_waits_for_the_end_of_a_rollout(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_rewards, "REFRESH_UPDATES", 3)
    folder, options = finished
    original = GenerativePolicy.add_gradient

    def with_signal(self, step, ema):
        if step == 4:  # the first of two
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, ema)

    again = options(**TWO_EPOCHS, output_dir=tmp_path / "run", checkpointing_steps=100)
    with monkeypatch.context() as patch:
        patch.setattr(GenerativePolicy, "add_gradient", with_signal)
        with pytest.raises(SystemExit) as left:
            run(again)
    assert left.value.code == 143
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    run(again)
    assert_same_end(folder / "two", tmp_path / "run", 8)


def test_a_run_of_so_many_epochs_ends_with_a_whole_rollout(command, tmp_path):
    """1437 images are 8 steps of 200."""
    changes = {"rollout_every": 3, "rollout_epochs": 2, "generative_policy_start_step": 6, "max_train_steps": None}
    changes |= {"num_train_epochs": 1, "train_batch_size": 200, "checkpointing_steps": 3, "checkpoints_total_limit": 1}
    run(command(**ALONE | changes))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-9"]


def test_a_step_that_is_not_finite_leaves_no_samples_behind(command, tmp_path, monkeypatch):
    """Its rollout is in the queue already: what is saved is an earlier step."""
    original = GenerativePolicy.add_gradient

    def broken(self, step, ema):
        logs = original(self, step, ema)
        next(self.transformer.parameters()).grad.fill_(float("nan") if step == 4 else 1.0)
        return logs

    monkeypatch.setattr(GenerativePolicy, "add_gradient", broken)
    with pytest.raises(
        TrainingStopped, match="step 5 .*: the gradient is NaN or infinite; .*checkpoint-3 is the newest"
    ):
        run(command(**ALONE, checkpointing_steps=3))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_it_may_join_a_run_that_was_begun_without_it(finished, tmp_path):
    folder, options = finished
    joined = stopped_at(folder / "plain", 2, tmp_path / "joined")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_rewards, "REFRESH_UPDATES", 3)
        run(options(**ONE_EPOCH, output_dir=joined))
    assert_same_end(folder / "one", joined, 8)
    assert_same_state(folder / "one" / "checkpoint-8", joined / "checkpoint-8")

    late = stopped_at(folder / "plain", 4, tmp_path / "late")
    message = "`generative_policy_start_step` 2 is before step 4, from which the run continues; give 4 or more"
    with pytest.raises(InputError, match=message):
        run(options(**ONE_EPOCH, output_dir=late))
    # Other parts of a checkpoint must be there.
    (late / "checkpoint-4" / "conflict_gate.safetensors").unlink()
    write_manifest(late / "checkpoint-4")
    with pytest.raises(InputError, match="cannot be loaded .*conflict_gate"):
        run(options(**ONE_EPOCH | {"generative_policy_start_step": 4}, output_dir=late))


def test_what_it_began_with_stays(finished, tmp_path):
    folder, options = finished
    target = stopped_at(folder / "one", 5, tmp_path / "run")
    (tmp_path / "mine.py").write_text("def mine(images, features, labels):\n    return labels.float()\n")
    given = {"output_dir": target, "reward_reference": folder / "one" / "reward_reference.safetensors"}
    for name, value, message in (
        (
            "rollout_steps",
            3,
            "`rollout_steps` is 3, but the generative policy of this run began with 2; keep that value",
        ),
        ("generative_policy_start_step", 4, "`generative_policy_start_step` is 4, but .* began with 2"),
        (
            "reward_function",
            f"{tmp_path / 'mine.py'}:mine",
            r"`reward_function` is \['mine'\], but .* began with \[\]",
        ),
        ("fd_encoder", "digits", "`fd_encoder` is digits, but .* began with none"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            run(options(**{**ONE_EPOCH, name: value, **given}))
    with pytest.raises(
        InputError,
        match="checkpoint-5 was trained with the callback generative_policy and cannot be continued without it",
    ):
        run(options(output_dir=target, max_train_steps=8))
    # A run that has not begun to may leave it.
    other = stopped_at(folder / "one", 1, tmp_path / "other")
    run(options(output_dir=other, max_train_steps=2))
    names = [f"transformer/{WEIGHTS}"]
    assert_same_files(other / "checkpoint-2", folder / "plain" / "checkpoint-2", names)


# However the batch is divided


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mmd", "frechet"])
def test_divisions_give_the_same_trajectory(command, trainers, tmp_path, kind):
    """1 process of 16, 2 of 8, and (with the MMD) 8 twice."""
    options = {**ALONE, "fidelity_reward": kind, "fd_encoder": "digits", "num_fd_samples": 16, "learning_rate": 1e-3}
    options |= {"generative_learning_rate": 1e-4, "max_train_steps": 6, "max_train_samples": 300}
    if kind == "mmd":  # with alignment beside it
        options |= {"objective": "repa", "encoder": "digits"}
    run(command(**options))
    options["train_batch_size"] = 8
    trainer = trainers(command(**options, output_dir=tmp_path / "two"), processes=2)
    assert trainer.wait() == [0, 0], trainer.log.read_text()[-3000:]
    names = ["two"]
    if kind == "mmd":
        run(command(**options, output_dir=tmp_path / "twice", gradient_accumulation_steps=2))
        names.append("twice")
    reference = rows_of(tmp_path / "run")
    assert "guard/held_out" in reference[-1]
    weights = load_file(tmp_path / "run" / "transformer" / WEIGHTS)
    for name in names:
        rows = rows_of(tmp_path / name)
        assert [row["step"] for row in rows] == list(range(1, 7))
        for row, expected in zip(rows, reference):
            assert row.keys() == expected.keys()
            for key in row:
                if key.split("/")[0] in ("loss_fm", "grad_norm", "policy", "sample_reward", "sample_share", "guard"):
                    assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (name, row["step"], key)
        other = load_file(tmp_path / name / "transformer" / WEIGHTS)
        for key in weights:
            torch.testing.assert_close(other[key], weights[key], atol=1e-5, rtol=0, msg=f"{name}: {key}")


# Other models and data


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """An autoencoder of 8 x 8 to 4 x 4, and digits encoded with it: with images and without."""
    root = tmp_path_factory.mktemp("encoded")
    tiny_vae("kl").save_pretrained(root / "vae")
    for images in ("webp", "none"):
        argv = [
            "--dataset_name",
            "digits",
            "--vae",
            str(root / "vae"),
            "--resolution",
            "8",
            "--images",
            images,
        ]
        prepare_latents.main([*argv, "--output_dir", str(root / images), "--dataloader_num_workers", "0"])
    return root


def test_from_latents_as_from_images(command, encoded, tmp_path):
    changes = {**ALONE, "max_train_steps": 4}
    run(command(**changes, vae=encoded / "vae"))
    rows = rows_of(tmp_path / "run")
    cached = {"dataset_name": None, "vae": None, "latents_dir": encoded / "webp", "output_dir": tmp_path / "cached"}
    run(command(**{**changes, **cached}))
    for expected, row in zip(rows, rows_of(tmp_path / "cached"), strict=True):
        assert row["loss_fm"] == pytest.approx(expected["loss_fm"], abs=2e-3)
        for name in ("sample_reward/fidelity", "sample_reward/semantic", "guard/loss_fm", "guard/distance"):
            if name in expected:
                assert row[name] == pytest.approx(expected[name], rel=2e-2, abs=2e-3), name
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "cached" / "best")
    assert pipeline.vae is not None and pipeline.transformer.config.in_channels == 4


def test_latents_without_images_are_refused_before_any_work(command, encoded, monkeypatch):
    cached = {"dataset_name": None, "vae": None, "latents_dir": encoded / "none"}
    monkeypatch.setattr(generative_training, "load_image_encoder", lambda *a, **k: pytest.fail("work"))
    with pytest.raises(
        InputError,
        match="needs images to compare with, and `latents_dir` .*none has none; prepare it again with `images`",
    ):
        run(command(**{**ALONE, **cached}))


def test_adapters_of_a_noise_predictor(command, tmp_path):
    """DiT's objective; then adapters on what came out, of which `best` has them merged."""
    pytest.importorskip("peft")
    changes = {**ALONE, "prediction_type": "epsilon", "max_train_steps": 4, "guard_every": 1}
    run([*command(**changes), "--learn_sigma"])
    folder = tmp_path / "run"
    config = VRPOPipeline.from_pretrained(folder / "best").transformer.config
    assert config.prediction_type == "epsilon" and config.learn_sigma
    assert rows_of(folder)[-1]["policy/ratio"] == 1
    with pytest.raises(InputError, match="`rollout_steps` 3: diffusers' DDIM needs a divisor of 1000"):
        run(command(**{**changes, "rollout_steps": 3}, output_dir=tmp_path / "steps"))

    start = {"model_config": None, "pretrained_model_name_or_path": folder, "prediction_type": None, "lora_rank": 2}
    changes |= {"generative_policy_start_step": 1, **start, "output_dir": tmp_path / "lora", "checkpointing_steps": 3}
    run(command(**changes))
    best, final = (VRPOPipeline.from_pretrained(path) for path in (tmp_path / "lora" / "best", tmp_path / "lora"))
    looks = {row["step"]: row["guard/distance"] for row in rows_of(tmp_path / "lora") if "guard/distance" in row}
    state = load_file(tmp_path / "lora" / "checkpoint-4" / STATE)
    assert state["best"][1] == min(looks, key=looks.get)
    assert best.transformer.state_dict().keys() == final.transformer.state_dict().keys()
    # What `best` draws is what the look has judged, and not what the run began with.
    images, begun = drawn(best), drawn(VRPOPipeline.from_pretrained(folder))
    assert (images - begun).abs().max() > 1e-4
    # It resumes exactly, through the look that has saved a merged copy.
    resumed = stopped_at(tmp_path / "lora", 3, tmp_path / "resumed")
    run(command(**{**changes, "output_dir": resumed}))
    names = ["transformer.safetensors", "transformer_ema.safetensors"]
    assert_same_files(tmp_path / "lora" / "checkpoint-4", resumed / "checkpoint-4", names)
    assert_same_state(tmp_path / "lora" / "checkpoint-4", resumed / "checkpoint-4")


def test_with_checkpointed_gradients_and_bf16(command, tmp_path):
    """The same gradient from recomputed blocks; with bf16 the ratio is still 1."""
    changes = {**ALONE, "max_train_steps": 3}
    run(command(**changes))
    run([*command(**changes, output_dir=tmp_path / "recomputed"), "--gradient_checkpointing"])
    expected, row = (rows_of(tmp_path / name)[2] for name in ("run", "recomputed"))
    for name in ("policy/gradient_ratio", "grad_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5)
    run(command(**changes, output_dir=tmp_path / "half", mixed_precision="bf16"))
    row = rows_of(tmp_path / "half")[2]
    assert row["policy/ratio"] == 1
    assert row["policy/gradient_ratio"] == pytest.approx(expected["policy/gradient_ratio"], rel=0.2)


# Guards


GUARDS = {
    "loss": ({"guard_loss_rise": 0.02}, "the flow-matching loss on training images has risen by"),
    "recall": ({"guard_recall_fall": 0.03}, "recall has fallen from"),
    "distance": (
        {"guard_distance_rise": 0.02},
        "features that no reward sees has risen by .* while the reward has risen",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GUARDS)
def test_each_guard_stops_a_run_that_goes_wrong(command, tmp_path, name):
    limit, reason = GUARDS[name]
    (tmp_path / "mine.py").write_text(
        "def bright(images, features, labels):\n    return images.float().mean((1, 2, 3))\n"
    )
    options = {
        **ALONE,
        "guard_distance_rise": 1e9,
        **limit,
        "max_train_steps": 60,
        "generative_policy_start_step": 20,
        "guard_every": 5,
    }
    options |= {
        "generative_learning_rate": 0.1,
        "max_gradient_ratio": 20,
        "fd_encoder": "digits",
        "num_fd_samples": 16,
    }
    options |= {"reward_function": f"{tmp_path / 'mine.py'}:bright", "reward_weights": "0,0,0,1", "logging_steps": 5}
    options |= {"checkpointing_steps": 100, "max_train_samples": 300}
    with pytest.raises(TrainingStopped, match=reason) as stopped:
        run(command(**options))
    folder = tmp_path / "run"
    looks = {row["step"]: row for row in rows_of(folder) if "guard/loss_fm" in row}
    step, best = max(looks), min(looks, key=lambda step: looks[step]["guard/held_out"])
    assert step > 20 and best < step
    message = f"step {step}: .*In .*run, checkpoint-{step} has this step, and best has the averaged pipeline of step {best}; start"
    assert stopped.match(message)
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}"]
    assert load_file(folder / f"checkpoint-{step}" / STATE)["best"].tolist()[1] == best
    VRPOPipeline.from_pretrained(folder / "best")
    # The same command looks again, and does not go on; with another limit it does.
    with pytest.raises(TrainingStopped, match=f"step {step}: .*{reason}"):
        run(command(**options))
    assert max(row["step"] for row in rows_of(folder)) == step
    run(command(**options | dict.fromkeys(limit, 1e9) | {"max_train_steps": step + 1}))
    assert rows_of(folder)[-1]["step"] == step + 1


def test_a_sample_that_is_not_finite_stops_the_run(command, monkeypatch):
    original, calls = GenerativePolicy._draw, []

    def broken(self, labels, noise):
        calls.append(0)
        with monkeypatch.context() as patch:
            if len(calls) == 3:
                # The pipeline itself refuses such latents.
                patch.setattr(self.pipeline, "prepare_latents", lambda *arguments: arguments[3] * float("inf"))
            return original(self, labels, noise)

    monkeypatch.setattr(GenerativePolicy, "_draw", broken)
    with pytest.raises(
        TrainingStopped, match="step 4: a sample of the rollout is not finite; try a lower `generative_learning_rate`"
    ):
        run(command(**ALONE, checkpointing_steps=100))
    calls[:] = [0, 0]  # the next is the first look's
    with pytest.raises(
        TrainingStopped, match="step 2: a measurement of the guards is not finite; .* before its first"
    ):
        run(command(**ALONE, checkpointing_steps=100))


# What cannot work


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"generative_policy_start_step": None},
            "--rollout_classes 2 has no effect without --generative_policy_start_step",
        ),
        ({"generative_policy_start_step": 6}, "6 is never reached; it must be below --max_train_steps 6"),
        ({"guard_distance_rise": 0.1}, "--guard_distance_rise 0.1 has no effect without --fd_encoder"),
        ({"rollout_group_size": 1}, "--rollout_group_size 1 must be at least 2: advantages are relative to the group"),
        ({"rollout_epochs": 2}, "--rollout_epochs 2 must be at most --rollout_every 1"),
        ({"rollout_clip_range": 0.1}, "--rollout_clip_range 0.1 has no effect without --rollout_epochs above 1"),
        (
            {"rollout_every": 4, "rollout_epochs": 2},
            "--generative_policy_start_step 2 must be a multiple of --rollout_every 4",
        ),
        (
            {"rollout_every": 2, "rollout_epochs": 2, "checkpointing_steps": 3},
            "--checkpointing_steps 3 must be a multiple of --rollout_every 2",
        ),
        (
            {"rollout_every": 2, "rollout_epochs": 2, "max_train_steps": 7},
            "--max_train_steps 7 must be a multiple of --rollout_every 2",
        ),
        (
            {
                "rollout_every": 3,
                "rollout_epochs": 2,
                "max_train_steps": 400000,
                "generative_policy_start_step": 3,
                "checkpointing_steps": 3,
            },
            "--max_train_steps 400000 must be a multiple of --rollout_every 3",
        ),
        ({"reward_encoder": None}, "--generative_policy_start_step needs --reward_encoder"),
        ({"reward_encoder": "inception"}, "--reward_encoder inception judges results (FID) and must not give rewards"),
        ({"guard_samples": 3}, "--guard_samples 3 must be at least 4"),
        ({"reward_queue_size": 7}, "--reward_queue_size 7 must be at least 8: the queue holds a whole rollout"),
        ({"rollout_classes": 0}, "--rollout_classes 0 must be at least 1"),
        ({"generative_learning_rate": 0}, "--generative_learning_rate 0.0 must be above 0"),
    ],
)
def test_options_that_cannot_work(command, capsys, changes, message):
    with pytest.raises(SystemExit):
        train_vrpo.parse_args(command(**{**ALONE, **changes}))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "accelerator, message",
    [
        (
            {"distributed_type": DistributedType.FSDP},
            "cannot be combined with FSDP and DeepSpeed; use configs/accelerate/ddp.yaml",
        ),
        ({"distributed_type": DistributedType.DEEPSPEED}, "cannot be combined with FSDP and DeepSpeed"),
        ({"mixed_precision": "fp16"}, "cannot be combined with `mixed_precision` fp16; use bf16 or no"),
        ({"num_processes": 3}, "`rollout_classes` 2 must be a multiple of 3, the number of processes"),
        ({}, "judges images, and the latents cannot be decoded without a `vae`"),
        ({"steps": 0}, "`generative_policy_start_step` 0 is never reached, because the run has 0 steps"),
        ({"weights": "1"}, "`reward_weights` 1 must be 3 numbers >= 0"),
        ({"weights": "1,1,nan"}, "`reward_weights` 1,1,nan must be 3 numbers"),
    ],
)
def test_machines_that_cannot_work(accelerator, message):
    defaults = {"distributed_type": DistributedType.NO, "mixed_precision": "no", "num_processes": 1}
    args = SimpleNamespace(
        generative_policy_start_step=0,
        rollout_classes=2,
        use_ema=False,
        ema_warmup=True,
        reward_function=None,
        reward_weights=accelerator.pop("weights", None),
    )
    transformer = SimpleNamespace(config=SimpleNamespace(in_channels=4))
    pipeline = SimpleNamespace(transformer=transformer, vae=None)
    steps = accelerator.pop("steps", 10)
    machine = SimpleNamespace(**{**defaults, **accelerator}, device=torch.device("cpu"))
    data = SimpleNamespace(has_images=True, num_classes=2)
    trainer = SimpleNamespace(
        accelerator=machine,
        pipeline=pipeline,
        data=data,
        output_dir=None,
        validation=None,
        max_train_steps=steps,
        args=args,
    )
    with pytest.raises(InputError, match=message):
        GenerativePolicy(args).on_init_end(trainer)
