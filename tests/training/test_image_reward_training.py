# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Image rewards in training: with every objective, in pixels and latents, resumed and divided, and from Python."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

from diffusers_vrpo import VRPOConfig, VRPOTrainer
from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.alignment.image_rewards import ImageReward, ImageRewards
from diffusers_vrpo.assets.digits import digits_pixels
from diffusers_vrpo.commands import prepare as prepare_latents
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.flow import forward_process
from diffusers_vrpo.training.checkpoints import write_manifest
from diffusers_vrpo.training.metrics import read_metrics
from support.models import digits_model, tiny_vae
from support.training import TINY_DIGITS, assert_same_files, losses, run


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def darkness(x0_hat, x0):
    return -x0_hat.mean((1, 2, 3))


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(tmp_path):
    """`config(**changes)`: the options of a short run on digits without an objective."""
    model_config = tmp_path / "model.json"
    model_config.write_text(json.dumps(TINY_DIGITS))

    def make(**changes) -> VRPOConfig:
        options = {
            "output_dir": str(tmp_path / "run"),
            "model_config": str(model_config),
            "dataset_name": "digits",
            "objective": "none",
            "resolution": 8,
            "projector_dim": 32,
            "train_batch_size": 64,
            "max_train_steps": 3,
            "learning_rate": 0.001,
            "logging_steps": 1,
            "validation_steps": 10000,
            "num_inference_steps": 2,
            "num_validation_images": 1,
            "dataloader_num_workers": 0,
            "report_to": "none",
        }
        return VRPOConfig(**{**options, **changes})

    return make


def train(args, encoders="digits", vae="none", **objects) -> list[dict]:
    """Trains in this process; returns the logged rows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with VRPOTrainer(encoders=encoders, vae=vae, args=args, **objects) as trainer:
        trainer.train()
    return read_metrics(f"{args.output_dir}/metrics.jsonl")


@pytest.mark.slow
def test_a_reward_rises():
    """In a loop of one's own, trained by the reward alone, and more than by flow matching alone if it is added."""
    pixels, labels = digits_pixels("train")
    encoder, ends = load_encoder("embedded:digits", (4, 4)), {}
    for flow, share in ((0, 1.0), (1, 1e-9), (1, 2.0)):
        torch.manual_seed(0)
        transformer = digits_model().train()
        image_rewards = ImageRewards(["perceptual"], encoder, share=share)
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=5e-3)
        rewards = []
        for _ in range(40):
            rows = torch.randint(len(pixels), (32,))
            noise, u = torch.randn(32, 3, 8, 8), torch.rand(32)
            x_t, timestep, target, t = forward_process(pixels[rows], noise, u, transformer.config)
            prediction = transformer(x_t, timestep, labels[rows], return_dict=False)[0]
            loss = flow * (prediction - target).square().mean()
            loss = loss + image_rewards(prediction, target, pixels[rows], x_t, t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            image_rewards.update()
            rewards.append(image_rewards.logs["reward/perceptual"].item())
        start, ends[flow, share] = sum(rewards[:10]) / 10, sum(rewards[-15:]) / 15
        assert ends[flow, share] > start + 0.05
    assert ends[1, 2.0] > ends[1, 1e-9] + 0.005


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["none", "repa", "vrpo"])
def test_every_objective_has_them_in_addition(config, objective):
    plain = train(config(objective=objective, output_dir=config().output_dir + "-plain"))
    rows = train(config(objective=objective, image_rewards=["perceptual", "image_semantic"]))
    new = {f"{kind}/{name}" for kind in ("reward", "image_share") for name in ("perceptual", "image_semantic")}
    assert set(rows[0]) - set(plain[0]) == new
    # The first step has no statistics yet: the loss after it is the same, and then the rewards act.
    assert [row["loss_fm"] for row in rows[:2]] == [row["loss_fm"] for row in plain[:2]]
    assert rows[2]["loss_fm"] != plain[2]["loss_fm"] and rows[2]["train_flops"] > plain[2]["train_flops"]
    assert rows[0]["image_share/perceptual"] == 0 < rows[2]["image_share/perceptual"]


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal(config, tmp_path):
    options = {"objective": "repa", "image_rewards": ["perceptual"], "image_reward_every": 2}
    options |= {"image_reward_start_step": 1, "checkpointing_steps": 3, "max_train_steps": 6}
    rows = train(config(**options))
    assert [("reward/perceptual" in row) for row in rows] == [False, True] * 3
    train(config(**{**options, "max_train_steps": 3}, output_dir=str(tmp_path / "parts")))
    assert train(config(**options, output_dir=str(tmp_path / "parts")))[-1]["step"] == 6
    names = [WEIGHTS, "image_rewards.safetensors", "projectors.safetensors"]
    assert_same_files(tmp_path / "run" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6", names)
    assert losses(tmp_path / "run") == losses(tmp_path / "parts")
    with pytest.raises(InputError, match=r"`image_reward_every` is 1, but .* was trained with 2"):
        train(config(**{**options, "image_reward_every": 1, "max_train_steps": 9}))


@pytest.mark.slow
def test_a_run_from_before_there_were_image_rewards_goes_on_with_them(config, tmp_path):
    train(config(max_train_steps=1))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    state = json.loads((checkpoint / "training_state.json").read_text())
    state["settings"] = {name: value for name, value in state["settings"].items() if "reward" not in name}
    (checkpoint / "training_state.json").write_text(json.dumps(state))
    write_manifest(checkpoint)
    rows = train(config(image_rewards=["perceptual"]))
    assert [("reward/perceptual" in row) for row in rows] == [False, True, True]


@pytest.mark.slow
def test_divisions_of_the_batch_give_the_same_run(command, trainers, one_core, tmp_path):
    """One process, two, and two micro-batches."""
    options = {"max_train_steps": 4, "learning_rate": 1e-3, "objective": "repa", "image_rewards": "perceptual"}
    options |= {"image_reward_fraction": 0.75}
    assert trainers(command(**options, train_batch_size=128)).wait() == [0]
    halves = {**options, "train_batch_size": 64}
    assert trainers(command(**halves, output_dir=tmp_path / "two"), processes=2).wait() == [0, 0]
    run(command(**halves, gradient_accumulation_steps=2, output_dir=tmp_path / "twice"))
    one = load_file(tmp_path / "run" / "checkpoint-4" / "image_rewards.safetensors")
    assert (one["count"] >= 8).sum() == 7
    for name in ("two", "twice"):
        drift = torch.tensor(losses(tmp_path / name)) - torch.tensor(losses(tmp_path / "run"))
        assert drift.abs().max() <= 1e-5
        other = load_file(tmp_path / name / "checkpoint-4" / "image_rewards.safetensors")
        torch.testing.assert_close(other, one, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "reward_vae", "cache"])
def test_latents_are_decoded(config, tmp_path, kind):
    """By the run's autoencoder, by a smaller one for the same latents, and where the data are prepared latents."""
    vae = tiny_vae("kl")
    vae.save_pretrained(tmp_path / "vae")
    changes = {"image_rewards": ["perceptual"], "image_reward_batch_size": 16}
    if kind == "reward_vae":
        blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
            tmp_path / "small"
        )
        changes["reward_vae"] = str(tmp_path / "small")
    if kind == "cache":
        argv = ["--dataset_name", "digits", "--vae", str(tmp_path / "vae"), "--resolution", "8"]
        argv += ["--encoder", "digits", "--patch_size", "2", "--dataloader_num_workers", "0"]
        argv += ["--max_train_samples", "128"]
        prepare_latents.main([*argv, "--output_dir", str(tmp_path / "cache")])
        changes |= {"dataset_name": None, "latents_dir": str(tmp_path / "cache"), "objective": "repa"}
    rows = train(config(**changes), vae=None if kind == "cache" else str(tmp_path / "vae"))
    assert all(-4 < row["reward/perceptual"] < 0 for row in rows) and rows[2]["image_share/perceptual"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "epsilon", "learn_sigma": True},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "image_reward_resolution": 12},
    ],
)
def test_other_models_and_precisions(config, tmp_path, changes):
    description = {**TINY_DIGITS, **{k: changes.pop(k) for k in ("prediction_type", "learn_sigma") if k in changes}}
    (tmp_path / "other.json").write_text(json.dumps(description))
    rows = train(config(model_config=str(tmp_path / "other.json"), image_rewards=["perceptual"], **changes))
    assert all(-4 < row["reward/perceptual"] < 0 for row in rows) and rows[2]["image_share/perceptual"] > 0


@pytest.mark.slow
def test_rewards_that_are_functions(config, tmp_path, monkeypatch):
    args = config(image_reward_share=[0.5, 0.1, 0.1], image_reward_max_t=1.0)
    gram = ImageReward("gram", lambda hat, clean: -(hat[0] - clean[0]).square().mean((1, 2, 3)), layers=(1,))
    rows = train(args, image_rewards=["perceptual", darkness, gram])
    assert rows[2]["reward/darkness"] != rows[1]["reward/darkness"] and rows[2]["reward/gram"] < 0
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "training_state.json").read_text())
    assert state["settings"]["image_rewards"] == ["perceptual", "darkness", "gram"]
    # The command line names a function of a module; no encoder is needed then.
    (tmp_path / "own_rewards.py").write_text("def darkness(x0_hat, x0):\n    return -x0_hat.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = config(image_rewards=["own_rewards:darkness"], output_dir=str(tmp_path / "named"), max_train_steps=1)
    assert train(args, encoders=None)[0]["reward/darkness"] == pytest.approx(rows[0]["reward/darkness"], abs=0.2)


def semantic(x0_hat, x0):
    """A name that the log of REPA's cosine has."""
    return -(x0_hat - x0).square().mean((1, 2, 3))


class Colours:
    """An encoder without hidden states."""

    embed_dim = 3

    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).mT


@pytest.mark.parametrize(
    "changes, objects, message",
    [
        ({"image_reward_share": [1.0]}, {}, "`image_reward_share` .* has no effect without `image_rewards`"),
        ({"image_rewards": ["perceptual"], "reward_vae": "x"}, {}, "`reward_vae` x has no effect with `vae` none"),
        (
            {"image_rewards": ["perceptual"], "image_reward_start_step": 23, "max_train_steps": None}
            | {"num_train_epochs": 1},
            {},
            "`image_reward_start_step` 23 is never reached, because the run has 23 steps",
        ),
        ({"image_reward_resolution": 8}, {"image_rewards": [darkness]}, "`image_reward_resolution` 8 has no effect"),
        ({"image_reward_encoder": "x"}, {"image_rewards": [darkness]}, "`image_reward_encoder` x has no effect"),
        (
            {"image_rewards": ["perceptual"], "image_reward_encoder": "./x"},
            {},
            "`image_reward_encoder` ./x: the folder",
        ),
        ({"image_rewards": ["perceptual"], "perceptual_layer": [9]}, {}, "`perceptual_layer` 9 is not a hidden state"),
        ({}, {"image_rewards": "percptual"}, "'percptual' is neither perceptual, image_semantic nor"),
        ({"image_rewards": ["perceptual"]}, {"encoders": Colours()}, "which the encoder Colours does not give"),
        (
            {"objective": "vrpo"},
            {"rewards": ["semantic", darkness], "image_rewards": [darkness]},
            "`image_rewards` darkness has the same name as a token reward",
        ),
        (
            {"objective": "irepa", "image_rewards": [f"{__name__}:semantic"]},
            {},
            "`image_rewards` semantic has the same name as a token reward",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(config, changes, objects, message):
    with pytest.raises(InputError, match=message):
        train(config(**changes), **objects)


def test_an_autoencoder_for_other_latents_is_refused(config, tmp_path):
    tiny_vae("kl").save_pretrained(tmp_path / "vae")
    tiny_vae("tiny").save_pretrained(tmp_path / "small")  # of a quarter of the side, not half
    args = config(image_rewards=["perceptual"], reward_vae=str(tmp_path / "small"))
    with pytest.raises(InputError, match=r"does not decode latents of \[4, 4, 4\] to images of \[3, 8, 8\]"):
        train(args, vae=str(tmp_path / "vae"))
    with pytest.raises(InputError, match="`reward_vae` .*nowhere is not a folder"):
        train(config(image_rewards=["perceptual"], reward_vae="./nowhere"), vae=str(tmp_path / "vae"))
