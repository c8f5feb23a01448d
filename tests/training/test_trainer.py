# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The trainer from Python: what the command line does, with objects in the place of names."""

import json
import os
import shutil
import signal
import warnings
import weakref

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusers_vrpo import TrainerCallback, VRPOConfig, VRPOPipeline, VRPOTrainer
from diffusers_vrpo import trainer as trainer_module
from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.assets.digits import load_digits_dataset
from diffusers_vrpo.data.image_source import ImageSource
from diffusers_vrpo.errors import InputError, TrainingInterrupted
from diffusers_vrpo.experimental.generative.callback import GenerativePolicy
from diffusers_vrpo.training.checkpoints import write_manifest
from diffusers_vrpo.training.metrics import read_metrics
from diffusers_vrpo.training.throughput import ForeachEMA
from support.training import TINY_DIGITS, assert_same_files, losses, no_curves, run


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Every trainer of this module has an accelerator of its own, and draws no curves, which would take most of its time."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(trainer_module, "plot_metrics", no_curves)


@pytest.fixture
def config(tmp_path):
    """`config(**changes)`: the options of a run of four steps on digits."""
    model_config = tmp_path / "model.json"
    model_config.write_text(json.dumps(TINY_DIGITS))

    def make(**changes) -> VRPOConfig:
        options = {
            "output_dir": str(tmp_path / "python"),
            "model_config": str(model_config),
            "resolution": 8,
            "projector_dim": 32,
            "train_batch_size": 16,
            "max_train_steps": 4,
            "learning_rate": 0.01,
            "ema_decay": 0.5,
            "logging_steps": 1,
            "validation_steps": 10000,
            "num_inference_steps": 2,
            "num_validation_images": 1,
            "dataloader_num_workers": 0,
            "report_to": "none",
        }
        return VRPOConfig(**{**options, **changes})

    return make


def test_a_few_lines_train_save_and_open(config, command, tmp_path):
    with VRPOTrainer(
        encoders="digits", vae="none", train_dataset=load_digits_dataset()["train"], args=config()
    ) as trainer:
        trainer.train()
        trainer.save_model()
    # Others may read the files as the umask says, weights included.
    umask = os.umask(0o022)
    os.umask(umask)
    for file in (path for path in (tmp_path / "python").rglob("*") if path.is_file()):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "python")
    assert pipeline(["three"], num_inference_steps=2).images[0].size == (8, 8)

    # The same run by the command line is equal, bit by bit.
    run(command())
    assert_same_files(tmp_path / "python", tmp_path / "run", ["transformer/diffusion_pytorch_model.safetensors"])
    assert losses(tmp_path / "python") == losses(tmp_path / "run")


def test_a_python_run_continues_bit_equal(config, tmp_path):
    def train(**changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        with VRPOTrainer(
            encoders="digits", vae="none", args=config(dataset_name="digits", checkpointing_steps=2, **changes)
        ) as trainer:
            trainer.train()
            trainer.save_model()

    train()
    train(output_dir=str(tmp_path / "parts"), max_train_steps=2)
    train(output_dir=str(tmp_path / "parts"))
    assert losses(tmp_path / "python") == losses(tmp_path / "parts")


class CtrlC(TrainerCallback):
    """Sends Ctrl-C once, at the end of the first step."""

    calls = 0

    def on_step_end(self, trainer):
        self.calls += 1
        if self.calls == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_trainer_that_is_used_again_goes_on(config, tmp_path):
    common = {"encoders": "digits", "vae": "none"}
    with VRPOTrainer(args=config(dataset_name="digits", max_train_steps=2), **common) as trainer:
        trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    steps = []
    with VRPOTrainer(args=config(dataset_name="digits", max_train_steps=6), callbacks=[CtrlC()], **common) as trainer:
        with pytest.raises(TrainingInterrupted):
            trainer.train()
        steps.append(trainer.step)
        trainer.train()
        steps.append(trainer.step)
        trainer.train()
        steps.append(trainer.step)
    assert steps == [4, 6, 6]
    rows = read_metrics(tmp_path / "python" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    AcceleratorState._reset_state(reset_partial_state=True)
    one = config(dataset_name="digits", max_train_steps=6, output_dir=str(tmp_path / "one"))
    with VRPOTrainer(args=one, **common) as trainer:
        trainer.train()
    assert losses(tmp_path / "python") == losses(tmp_path / "one")


def test_adapters_stay_with_the_trainer_that_saves_the_result(config, tmp_path):
    with VRPOTrainer(encoders="digits", vae="none", args=config(dataset_name="digits", max_train_steps=1)) as trainer:
        trainer.train()
        trainer.save_model()
    AcceleratorState._reset_state(reset_partial_state=True)
    start = {"model_config": None, "pretrained_model_name_or_path": str(tmp_path / "python"), "lora_rank": 2}
    args = config(dataset_name="digits", output_dir=str(tmp_path / "adapters"), **start)
    weights = tmp_path / "adapters" / "transformer" / "diffusion_pytorch_model.safetensors"
    with VRPOTrainer(encoders="digits", vae="none", args=args) as trainer:
        trainer.train()
        trainer.save_model()
        first = weights.read_bytes()
        trainer.save_model()
        assert weights.read_bytes() == first
        assert [name for name in trainer.transformer.state_dict() if ".lora_" in name]
    assert not [name for name in load_file(weights) if "lora" in name]


def test_untrained_weights_do_not_replace_a_result(config, tmp_path):
    trainer = VRPOTrainer(encoders="digits", vae="none", args=config(dataset_name="digits"))
    with trainer, pytest.raises(InputError, match=r"nothing to save in .*python yet: call `train\(\)` first"):
        trainer.save_model()


def test_the_default_workers_are_not_warned_of_on_two_cores(config, monkeypatch):
    arguments = {"train_dataset": load_digits_dataset()["train"], "args": config(dataloader_num_workers=1)}
    with VRPOTrainer(encoders="digits", vae="none", **arguments) as trainer:
        trainer._resume()
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            next(trainer._batches())


class Steps(TrainerCallback):
    """Writes down which hook was called at which step, and keeps a count with the checkpoints."""

    state_name = "steps"

    def __init__(self):
        self.calls, self.count = [], 0

    def on_init_end(self, trainer):
        self.calls.append(("init", trainer.step))

    def on_train_begin(self, trainer):
        self.calls.append(("begin", trainer.step))

    def before_optimizer_step(self, trainer):
        gradients = [p.grad for p in trainer.transformer.parameters() if p.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
        self.count += 1

    def on_step_end(self, trainer):
        self.calls.append(("step", trainer.step))

    def on_save(self, trainer, checkpoint):
        assert (checkpoint / "steps.safetensors").is_file()
        self.calls.append(("save", trainer.step))

    def on_log(self, trainer, values):
        assert values["loss_fm"] > 0
        self.calls.append(("log", trainer.step))

    def on_evaluate(self, trainer):
        self.calls.append(("evaluate", trainer.step))

    def on_train_end(self, trainer):
        self.calls.append(("end", trainer.step))

    def state_dict(self):
        return {"count": torch.tensor(self.count)}

    def load_state_dict(self, state):
        self.count = int(state["count"])


class Colours:
    """An encoder of which the trainer has the only reference."""

    embed_dim = 6

    def __call__(self, images):
        colours = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).mT
        return torch.cat([colours, colours.square()], dim=-1) + 0.1


def test_encoders_are_freed_when_alignment_ends(config):
    """Here one in a wrapper that whitens it."""
    there = []

    class Watch(TrainerCallback):
        def on_init_end(self, trainer):
            self.encoder = weakref.ref(trainer.encoders[0])

        def on_step_end(self, trainer):
            there.append(self.encoder() is not None)

    options = {"objective": "rare", "target_norm": "whiten:2", "release": "stop", "alignment_stop_step": 2}
    args = config(dataset_name="digits", train_batch_size=2, **options)
    with VRPOTrainer(encoders=[Colours()], vae="none", args=args, callbacks=[Watch()]) as trainer:
        trainer.train()
    assert there == [True, True, False, False]


def test_callbacks_are_called_in_order_and_saved(config):
    arguments = {"encoders": "digits", "vae": "none"}
    first = Steps()
    with VRPOTrainer(**arguments, args=config(dataset_name="digits", max_train_steps=2), callbacks=[first]) as trainer:
        trainer.train()
    assert first.calls == [
        ("init", 0),
        ("begin", 0),
        *[("log", 1), ("step", 1), ("evaluate", 1)],
        *[("log", 2), ("step", 2), ("save", 2), ("evaluate", 2)],
        ("end", 2),
    ]

    AcceleratorState._reset_state(reset_partial_state=True)
    second = Steps()
    with VRPOTrainer(**arguments, args=config(dataset_name="digits"), callbacks=[second]) as trainer:
        trainer.train()
    assert second.count == 4
    assert second.calls[:2] == [("init", 0), ("begin", 2)]

    # Without the callback, what it has kept would be lost.
    AcceleratorState._reset_state(reset_partial_state=True)
    with (
        VRPOTrainer(**arguments, args=config(dataset_name="digits", max_train_steps=6)) as trainer,
        pytest.raises(InputError, match="was trained with the callback steps and cannot be continued without it"),
    ):
        trainer.train()


# One test for each row of the table "who adds what": none of them touches the package.


def nearest_angle(action, mu, y, subset):
    """A token reward: minus the squared angle to the target."""
    return -torch.acos((action * y).sum(-1).clamp(-0.999, 0.999)).square()


def test_a_token_reward_is_a_function(config, tmp_path):
    rewards = ["fidelity", "semantic", nearest_angle]
    with VRPOTrainer(encoders="digits", vae="none", rewards=rewards, args=config(dataset_name="digits")) as trainer:
        trainer.train()
    rows = read_metrics(tmp_path / "python" / "metrics.jsonl")
    assert all(-(3.2**2) < row["reward/nearest_angle"] < 0 for row in rows)
    assert all(row["share/nearest_angle"] > 0.05 for row in rows)
    assert "reward/structural" not in rows[0]


def test_a_token_reward_by_its_name(config, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def first_axis(action, mu, y, subset):\n    return action[..., 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = ["semantic", "my_rewards:first_axis"]
    with VRPOTrainer(
        encoders="digits", vae="none", rewards=rewards, args=config(dataset_name="digits", max_train_steps=2)
    ) as trainer:
        trainer.train()
    assert "reward/first_axis" in read_metrics(tmp_path / "python" / "metrics.jsonl")[0]


def test_other_rewards_do_not_continue_a_run(config):
    arguments = {"encoders": "digits", "vae": "none"}
    with VRPOTrainer(**arguments, args=config(dataset_name="digits", max_train_steps=2)) as trainer:
        trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    with (
        VRPOTrainer(**arguments, rewards=["semantic"], args=config(dataset_name="digits")) as trainer,
        pytest.raises(InputError, match="rewards"),
    ):
        trainer.train()


def test_rewards_are_vrpos(config):
    with pytest.raises(InputError, match="`rewards`.*objective"):
        VRPOTrainer(
            encoders="digits", vae="none", rewards=["semantic"], args=config(dataset_name="digits", objective="repa")
        )


def darkness(images, features, labels):
    """An image reward: dark images are good."""
    return -images.float().mean((1, 2, 3))


def test_an_image_reward_is_a_function(config, tmp_path):
    args = config(
        dataset_name="digits",
        generative_policy_start_step=2,
        rollout_classes=2,
        rollout_group_size=2,
        rollout_steps=2,
        rollout_every=1,
        mc_samples=2,
        guard_samples=16,
        reward_reference_images=64,
        reward_queue_size=16,
        guard_loss_rise=10.0,
        guard_recall_fall=1.0,
    )
    with VRPOTrainer(
        encoders="digits", vae="none", args=args, callbacks=[GenerativePolicy(args, rewards=[darkness])]
    ) as trainer:
        trainer.train()
    rows = read_metrics(tmp_path / "python" / "metrics.jsonl")
    assert all(-255 <= row["sample_reward/darkness"] <= 0 for row in rows if row["step"] > 2)


class PooledPatches:
    """An encoder that is not in transformers: the mean colours of 4 x 4 parts of an image, and their squares."""

    embed_dim = 6

    def __call__(self, images):
        colours = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).mT
        return torch.cat([colours, colours.square()], dim=-1) + 0.1


def test_an_encoder_is_a_callable(config, tmp_path):
    with VRPOTrainer(encoders=PooledPatches(), vae="none", args=config(dataset_name="digits")) as trainer:
        trainer.train()
    rewards = [row["reward/semantic"] for row in read_metrics(tmp_path / "python" / "metrics.jsonl")]
    assert rewards[-1] > rewards[0]


def test_two_encoders_one_of_each_kind(config, tmp_path):
    encoders = [PooledPatches(), load_encoder("digits", (4, 4))]
    with VRPOTrainer(
        encoders=encoders, vae="none", args=config(dataset_name="digits", objective="repa", max_train_steps=2)
    ) as trainer:
        trainer.train()
        assert [projector[-1].out_features for projector in trainer.aligned.projectors] == [6, encoders[1].embed_dim]


class Squares(ImageSource):
    """A source of training data: one grey square per class."""

    num_classes, id2label = 3, {0: "black", 1: "grey", 2: "white"}

    def __len__(self):
        return 30

    def __getitem__(self, rows):
        from PIL import Image

        labels = [row % 3 for row in rows]
        return {"image": [Image.new("RGB", (8, 8), (127 * label,) * 3) for label in labels], "label": labels}


def test_a_data_source_is_one_class(config, tmp_path):
    with VRPOTrainer(encoders="digits", vae="none", train_dataset=Squares(), args=config()) as trainer:
        trainer.train()
        trainer.save_model()
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "python")
    assert pipeline.get_label_ids("white") == [2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"encoders": "/no/such/encoder"}, "^`encoder` /no/such/encoder: the folder does not exist"),
        ({"model": "SiT-B/3"}, "^`pretrained_model_name_or_path` SiT-B/3"),
        ({"vae": "/no/such/vae"}, "^`vae` /no/such/vae is not a folder"),
        ({"train_dataset": [1, 2], "args": {"dataset_name": None}}, "^`train_dataset` is a list"),
        ({"train_dataset": [1, 2]}, "^`train_dataset` is given, but `args` also names the data digits"),
        ({"args": {"dataset_name": None}}, "`train_dataset`"),
        ({"encoders": None}, "`encoders`"),
        ({"args": {"generative_policy_start_step": 1}}, "`generative_policy_start_step`.*GenerativePolicy"),
        ({"encoders": [3]}, "^`encoders` has 3; each must be a folder or a Hub name"),
        ({"encoders": 3}, "^`encoders` has 3; each must be"),
        ({"encoders": ["digits", print]}, "^`encoders` has <built-in function print>; .* width as `embed_dim`"),
        ({"vae": 3}, "^`vae` is a int; give"),
        ({"rewards": "semantic"}, "^`rewards` must be a list of names and functions, not 'semantic'"),
        ({"rewards": 3}, "^`rewards` must be a list"),
        ({"callbacks": [3]}, "^`callbacks` has 3; each must be a TrainerCallback"),
        ({"callbacks": 3}, "^`callbacks` has 3"),
        ({"train_dataset": 3, "args": {"dataset_name": None}}, "^`train_dataset` is a int"),
    ],
)
def test_what_cannot_work_names_the_argument(config, arguments, message):
    defaults = {"encoders": "digits", "vae": "none"}
    args = config(**{"dataset_name": "digits", **arguments.pop("args", {})})
    if "model" in arguments:
        args.model_config = None
    with pytest.raises(InputError, match=message):
        VRPOTrainer(**{**defaults, **arguments}, args=args)


def test_the_options_are_a_configuration():
    with pytest.raises(InputError, match="^`args` must be a VRPOConfig, not a dict"):
        VRPOTrainer(args={"output_dir": "out"})


# The average of the weights


def output_layer(folder, part="transformer"):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")["proj_out.weight"]


def test_the_share_of_the_start_is_what_the_average_holds():
    """The weights are 1 after the first step and 0 from then on: the average is that share."""
    for decay, min_decay in ((0.9999, 0.0), (0.9, 0.0), (0.5, 0.5)):
        parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        ema = ForeachEMA([parameter], decay=decay, min_decay=min_decay)
        for step in range(1, 120):
            ema.step([parameter])
            torch.nn.init.zeros_(parameter)
            assert ema.shadow_params[0].item() == pytest.approx(ema.share_of_start(step), rel=1e-9)
    assert ForeachEMA([parameter], decay=0.9999, min_decay=0.9999).share_of_start(5001) == pytest.approx(
        0.6065, abs=1e-3
    )
    assert ForeachEMA([parameter], decay=0.9999).share_of_start(300) < 1e-10


@pytest.mark.parametrize("warmup", [True, False])
def test_a_short_run_publishes_what_it_has_learned(config, tmp_path, caplog, warmup):
    """The output layer starts at zero; at the default decay, the average without warm-up stays there."""
    options = {"objective": "none", "dataset_name": "digits", "vae": "none", "encoder": None, "projector_dim": 2048}
    args = config(ema_warmup=warmup, ema_decay=0.9999, max_train_steps=30, **options)
    with caplog.at_level("INFO"), VRPOTrainer(args=args) as trainer:
        trainer.train()
        trainer.save_model()
    folder = tmp_path / "python"
    kept = output_layer(folder).norm() / output_layer(folder / "checkpoint-30").norm()
    assert kept > 0.7 if warmup else kept < 0.2
    assert ("of the weights that the run started with" in caplog.text) != warmup
    assert ("of the starting weights" in caplog.text) != warmup
    settings = json.loads((folder / "checkpoint-30" / "training_state.json").read_text())["settings"]
    assert settings["ema_warmup"] is warmup


def test_a_run_goes_on_with_the_average_that_it_began_with(config, tmp_path, caplog):
    def train(name, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {"objective": "none", "dataset_name": "digits", "vae": "none", "projector_dim": 2048}
        args = config(output_dir=str(tmp_path / name), checkpointing_steps=2, ema_decay=0.9, **options, **changes)
        with VRPOTrainer(args=args) as trainer:
            trainer.train()
        return output_layer(tmp_path / name / "checkpoint-4", "transformer_ema")

    def setting(name, step):
        return tmp_path / name / f"checkpoint-{step}" / "training_state.json"

    whole = train("whole", ema_warmup=False)
    # A checkpoint without the setting was made before there was a warm-up, which is the default now.
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "old" / "checkpoint-2")
    state = json.loads(setting("old", 2).read_text())
    del state["settings"]["ema_warmup"]
    setting("old", 2).write_text(json.dumps(state))
    write_manifest(tmp_path / "old" / "checkpoint-2")
    with caplog.at_level("INFO"):
        assert torch.equal(train("old"), whole)
    assert "the averaged weights continue without warm-up, as the run began" in caplog.text
    assert json.loads(setting("old", 4).read_text())["settings"]["ema_warmup"] is False
    assert not torch.equal(train("with warm-up"), whole)
