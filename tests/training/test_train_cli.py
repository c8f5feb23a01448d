# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The training script from its command line to the saved pipeline, on real images (handwritten digits)."""

import io
import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.alignment.rewards import DEFAULT_REWARDS
from diffusers_vrpo.alignment.start import draw_weights
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.samples import TrainingSamples
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.flow import interpolate
from diffusers_vrpo.training.metrics import read_metrics
from support.data import png, write_parquet
from support.models import tiny_vae
from support.paths import ROOT, TRAINING_SCRIPT
from support.processes import no_network_environment
from support.training import TINY_DIGITS, aligned_weights, assert_same_files, losses, projectors_of, run, train_vrpo


# What comes out


@pytest.mark.parametrize("objective", ["none", "repa", "vrpo"])
def test_each_objective_trains_saves_and_samples_by_name(command, tmp_path, objective):
    run(command(objective=objective, max_train_steps=30, validation_steps=15, report_to="tensorboard"), curves=True)
    folder = tmp_path / "run"
    curve = losses(folder)
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    rows = read_metrics(folder / "metrics.jsonl")
    rewards = {name for name in rows[-1] if name.startswith("reward/")}
    assert (
        rewards
        == {
            "none": set(),
            "repa": {"reward/semantic"},
            "vrpo": {"reward/fidelity", "reward/semantic", "reward/structural"},
        }[objective]
    )
    for name in rewards:
        assert rows[-1][name] > rows[0][name]
    if objective == "vrpo":
        assert sum(rows[-1][f"share/{name}"] for name in DEFAULT_REWARDS) == pytest.approx(1)

    pipeline = VRPOPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("seven", num_inference_steps=2).images[0]
    assert image.size == (8, 8)
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["step-0000015.png", "step-0000030.png"]
    with Image.open(folder / "samples.png") as grid:
        assert grid.size == (10 * 66 - 2, 17 + 64)  # a line of captions above one row
    with Image.open(folder / "training.png") as curves:
        assert curves.width >= 1000
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    # The pipeline has the averaged weights, and the run's options open as a configuration.
    assert_same_files(
        folder / "transformer", folder / "checkpoint-30" / "transformer_ema", ["diffusion_pytorch_model.safetensors"]
    )
    again = train_vrpo.parse_args(["--config", str(folder / "train_config.yaml")])
    assert again.objective == objective and again.max_train_steps == 30 and again.center_crop is True


def test_repa_is_repas_loss(command, tmp_path):
    """One step of the script against the formula written out: L_FM - 0.5 mean <mu, y>, AdamW, clipped gradient."""
    run(command(objective="repa", max_train_steps=1, use_ema=None, max_grad_norm=1.0))
    data, _, _ = load_image_dataset("digits")
    batch = TrainingSamples(data, 0, 8, (3, 8, 8), 10).__getitem__(list(range(16)))
    transformer = SiTTransformer2DModel(**TINY_DIGITS, sample_size=8, in_channels=3, num_classes=10)
    model = AlignedTransformer(transformer, [1], [load_encoder("digits", (4, 4))], projector_dim=32)
    torch.manual_seed(0)
    draw_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    images = batch["pixels"].float() / 127.5 - 1
    x_t = interpolate(images, batch["noise"], batch["timestep"])
    prediction, projections = model(x_t, batch["timestep"], batch["class_labels"])
    loss_fm = (prediction - (batch["noise"] - images)).square().mean()
    features = model.encoders[0](images)
    cosine = torch.nn.functional.cosine_similarity(projections[0], features, dim=-1).mean()
    (loss_fm - 0.5 * cosine).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["loss_fm"] == pytest.approx(loss_fm.item(), abs=1e-6)
    assert row["reward/semantic"] == pytest.approx(cosine.item(), abs=1e-6)
    trained = aligned_weights(tmp_path / "run" / "checkpoint-1")
    for name, parameter in model.named_parameters():
        # Adam turns a gradient of rounding errors (the keys' bias has no true one) into a full step: leave it out.
        real = parameter.grad.abs() > 1e-6
        torch.testing.assert_close(trained[name][real], parameter.detach()[real], atol=2e-5, rtol=1e-4)


def test_latents_conv_encoder_and_images_of_a_folder(command, tmp_path):
    from transformers import ResNetConfig, ResNetModel

    tiny_vae("kl").save_pretrained(tmp_path / "vae")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "encoder")
    for i, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for j in range(4):
            (tmp_path / "images" / name / f"{j}.png").write_bytes(png(60 * i + j, size=(40, 36)))
    options = command(
        dataset_name=None,
        train_data_dir=tmp_path / "images",
        vae=tmp_path / "vae",
        encoder=tmp_path / "encoder",
        encoder_layer=1,
        resolution=32,
        layer_scope="all",
        spatial_norm=0.6,
        cache_dir=tmp_path / "cache",
        train_batch_size=4,
        max_train_steps=2,
    )
    run(options + ["--random_flip", "--no-center_crop", "--validation_labels", "bee", "2", "--gradient_checkpointing"])
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "run")
    assert projectors_of(tmp_path / "run" / "checkpoint-2")[0]["alignment_layers"] == [1, 2]
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("cat", num_inference_steps=1).images[0].size == (32, 32)
    with Image.open(tmp_path / "run" / "samples.png") as grid:
        assert grid.size == (2 * 66 - 2, 17 + 64)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["none", "repa", "vrpo"])
def test_imagenet_images_with_a_real_encoder(command, shared, tmp_path, objective):
    options = command(
        dataset_name=shared / "data" / "tiny-imagenet-100",
        encoder=shared / "encoders" / "efficientnet-lite0",
        resolution=64,
        model_config=None,
        preset="SiT-XS/8",
        objective=objective,
        max_train_samples=200,
        cache_dir=tmp_path / "cache",
        validation_labels="goldfish",
    )
    run(options)
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("goldfish", num_inference_steps=1).images[0].size == (64, 64)
    if objective != "none":
        assert projectors_of(tmp_path / "run" / "checkpoint-4")[0]["alignment_dims"] == [112]


# The same run, however it is divided or interrupted


@pytest.mark.slow
@pytest.mark.parametrize("objective, precision", [("vrpo", "no"), ("repa", "no"), ("vrpo", "bf16")])
def test_resume_is_bit_equal(command, tmp_path, objective, precision):
    # 640 samples: enough for the running statistics to act.
    options = {"objective": objective, "mixed_precision": precision, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    options |= {"max_train_steps": 10, "checkpointing_steps": 5, "train_batch_size": 64, "dataloader_num_workers": 1}
    run(command(**options))
    straight, resumed = tmp_path / "run", tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(straight / "checkpoint-5", resumed / "checkpoint-5")
    shutil.copy(straight / "metrics.jsonl", resumed)
    run(command(**options, output_dir=resumed))
    weights = "diffusion_pytorch_model.safetensors"
    names = [f"transformer/{weights}", f"transformer_ema/{weights}", "projectors.safetensors"]
    names += ["conflict_gate.safetensors", *(["reward_statistics.safetensors"] if objective == "vrpo" else [])]
    assert_same_files(straight / "checkpoint-10", resumed / "checkpoint-10", names)
    a, b = (torch.load(f / "checkpoint-10" / "optimizer.bin", weights_only=True) for f in (straight, resumed))
    for key, state in a["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, b["state"][key][name])
    assert losses(straight) == losses(resumed) and len(losses(resumed)) == 10
    if objective == "vrpo":
        assert read_metrics(resumed / "metrics.jsonl")[-1]["share/semantic"] != pytest.approx(1 / 3)


@pytest.mark.slow
def test_resume_with_another_division_of_the_batch(command, tmp_path):
    """From an odd step on, 8 samples twice give the losses that 16 at once give."""
    run(command(max_train_steps=7, checkpointing_steps=3))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-3", resumed / "checkpoint-3")
    run(command(max_train_steps=7, train_batch_size=8, gradient_accumulation_steps=2, output_dir=resumed))
    a, b = torch.tensor(losses(tmp_path / "run"))[3:], torch.tensor(losses(resumed))
    assert len(b) == 4 and (a - b).abs().max() <= 1e-5


def test_a_damaged_checkpoint_and_an_older_one(command, tmp_path):
    run(command(checkpointing_steps=2))
    with pytest.raises(InputError, match="checkpoint-2 is older than .*checkpoint-4; .*another `output_dir`"):
        run(command(resume_from_checkpoint="checkpoint-2", max_train_steps=8))
    weights = tmp_path / "run" / "checkpoint-4" / "reward_statistics.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(InputError, match="checkpoint-4 is damaged .reward_statistics.* has 20 bytes, not .*; give"):
        run(command(resume_from_checkpoint="checkpoint-4", max_train_steps=8))
    run(command(max_train_steps=3))
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_the_same_command_again_ends_at_once(command, tmp_path):
    run(command())
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    run(command())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_accumulation_gives_the_same_losses(command, tmp_path):
    run(command(max_train_steps=10, train_batch_size=64))
    run(
        command(
            max_train_steps=10, train_batch_size=32, gradient_accumulation_steps=2, output_dir=tmp_path / "accumulated"
        )
    )
    a, b = torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(tmp_path / "accumulated"))
    assert (a - b).abs().max() <= 1e-5 and (a - b).mean().abs() <= 1e-6


# Bad input: one sentence, before any training


@pytest.mark.parametrize(
    "options, message",
    [
        (["--objective", "grpo"], "--objective: invalid choice: 'grpo'"),
        (["--train_batch_size", "0"], "--train_batch_size 0 must be at least 1"),
        (["--label_dropout", "1.5"], "--label_dropout 1.5 must lie in"),
        (["--learning_rate", "-1"], "--learning_rate -1.0 must be above 0"),
        (["--train_data_dir", "x"], "either --dataset_name or --train_data_dir"),
        (["--num_train_epochs", "3"], "either --max_train_steps or --num_train_epochs"),
        (["--lr_scheduler", "constant", "--lr_warmup_steps", "5"], "--lr_scheduler constant has no warm-up"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers -1 must be at least 0"),
        (["--alignment_coeff", "nan"], "--alignment_coeff nan must be at least 0"),
        (["--seed", str(2**64)], "--seed 18446744073709551616 must lie in"),
        (["--preset", "SiT-B/2"], "--model_config cannot be combined with --preset or"),
        (["--conf", "x.yaml"], "unrecognized arguments: --conf"),
        (["--config"], "--config: expected one argument"),
        (["--lerning_rate", "1"], "unrecognized arguments: --lerning_rate"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read"),
    ],
)
def test_wrong_options(command, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        train_vrpo.parse_args(command() + options)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in error and error.count("\n") == 1


def test_command_line_replaces_the_alternative_in_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"dataset_name": "digits", "vae": "none", "objective": "none", "num_train_epochs": 3})
    )
    args = train_vrpo.parse_args(["--config", str(file), "--latents_dir", "cache", "--max_train_steps=7"])
    assert (args.dataset_name, args.latents_dir) == (None, "cache")
    assert (args.num_train_epochs, args.max_train_steps, args.objective) == (None, 7, "none")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "imagenet256").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_of_imagenet(file):
    args = train_vrpo.parse_args(["--config", str(file)])
    model, objective = file.stem.rsplit("-", 1)
    assert args.preset.lower().replace("/", "-") == model and args.objective == objective
    assert args.train_batch_size * 8 == 256 and args.max_train_steps == 400_000
    other = train_vrpo.parse_args(["--config", str(file.with_name(f"{model}-vrpo.yaml"))])
    differ = {name for name, value in vars(args).items() if value != getattr(other, name)}
    assert differ <= {"config", "objective", "output_dir", "reward_weighting"}
    assert args.alignment_coeff == 0.5  # REPA's and VRPO's papers


def test_missing_options(command, capsys):
    for changes, message in [
        ({"vae": None}, "--vae"),
        ({"dataset_name": None}, "--dataset_name"),
        ({"encoder": None}, "--objective vrpo needs --encoder"),
    ]:
        with pytest.raises(SystemExit):
            train_vrpo.parse_args(command(**changes))
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "SiT-B/3", "model_config": None}, "`preset`: unknown preset 'SiT-B/3'; choose one of SiT-B/"),
        ({"resolution": 9}, "`resolution` 9 is not divisible by 2"),
        ({"label_column": "digit"}, "`label_column` 'digit' is not in `dataset_name` digits"),
        ({"dataset_split": "test"}, "`dataset_split` 'test'"),
        ({"layer_scope": "3"}, "`layer_scope` '3'.*between 1 and 2"),
        ({"reward_weighting": "best"}, "`reward_weighting` 'best'"),
        ({"validation_labels": "sevn"}, "`validation_labels`: .*'sevn'; did you mean 'seven'"),
        ({"validation_labels": "10"}, "`validation_labels`: .*10 is not a class"),
        ({"encoder": "./nowhere"}, "`encoder` ./nowhere"),
        ({"vae": "./nowhere"}, "`vae` ./nowhere"),
        ({"report_to": "paper"}, "`report_to` paper: "),
        ({"report_to": "tensorboard,wandb"}, "`report_to` tensorboard,wandb needs wandb, which is not installed"),
        ({"model_config": "./nowhere.json"}, "`model_config` ./nowhere.json cannot be read"),
        ({"resume_from_checkpoint": "./nowhere"}, "`resume_from_checkpoint` ./nowhere is not a checkpoint"),
    ],
)
def test_input_that_cannot_work(command, changes, message):
    with pytest.raises(InputError, match=message):
        run(command(**changes))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"depth": 3}, "'depth', which is not one of sample_size, "),
        ([1], "must map argument names"),
        ({"num_attention_heads": 3, "attention_head_dim": 5}, "must be divisible by 4"),
        ({"patch_size": 0}, "patch_size 0 must be a whole number from 1 to 256"),
        ({"null_class_id": 3}, "null_class_id 3 is one of the 10 classes"),
    ],
)
def test_wrong_model_configs(command, tmp_path, config, message):
    (tmp_path / "bad.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"`model_config` .*{message}"):
        run(command(model_config=tmp_path / "bad.json"))


def test_the_config_of_a_trained_model_opens_for_another_objective(command, tmp_path):
    run(command(max_train_steps=1))
    config = tmp_path / "run" / "transformer" / "config.json"
    # Version 0.1 wrote what described its projectors there.
    old = {"alignment_layers": [1], "alignment_dims": [64], "projector_type": "mlp", "projector_dim": 32}
    config.write_text(json.dumps(json.loads(config.read_text()) | old))
    run(command(max_train_steps=1, objective="none", model_config=config, output_dir=tmp_path / "plain"))
    assert not (tmp_path / "plain" / "checkpoint-1" / "projectors.safetensors").exists()
    assert not set(old) & set(VRPOPipeline.from_pretrained(tmp_path / "plain").transformer.config)


@pytest.mark.slow
def test_a_wrong_output_dir_is_one_line_on_the_terminal(command, tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, str(TRAINING_SCRIPT), *command(output_dir=tmp_path / "file" / "run")],
        capture_output=True,
        text=True,
        env=no_network_environment(),
    )
    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("train_vrpo.py: error: --output_dir") and "Traceback" not in done.stderr


def test_another_seed_or_model_does_not_continue_the_run(command):
    run(command())
    with pytest.raises(InputError, match="`seed` is 1, but .*checkpoint-4 was trained with 0"):
        run(command(seed=1, max_train_steps=8))
    with pytest.raises(
        InputError, match="trained with 0.01; keep that value, give `allow_changed` learning_rate to change"
    ):
        run(command(max_train_steps=8, learning_rate=0.1))
    for option, value in (("learning_rate", 0.1), ("label_dropout", 0.5), ("reward_weighting", "equal")):
        with pytest.raises(InputError, match=f"`{option}` is {value}, but .*checkpoint-4 was trained with"):
            run(command(max_train_steps=8, **{option: value}))
    with pytest.raises(InputError, match="the model's num_layers is 6, but .*checkpoint-4 was trained with 2"):
        run(command(model_config=None, preset="SiT-XS/2", max_train_steps=8))


def test_few_corrupt_images_are_skipped_and_many_are_an_error(command, tmp_path, caplog):
    images = [png(i % 200) for i in range(200)]
    images[7] = b"broken"
    options = {"max_train_steps": 14, "objective": "none"}
    folder = write_parquet(tmp_path / "one", [i % 2 for i in range(200)], images=images)
    run(command(dataset_name=folder, **options))
    assert "1 of 200 images cannot be decoded and are skipped (rows [7])" in caplog.text
    for row in (20, 30, 40):
        images[row] = b"broken"
    folder = write_parquet(tmp_path / "many", [i % 2 for i in range(200)], images=images)
    with pytest.raises(InputError, match="4 of 200 images tried cannot be decoded, which is over 1 %"):
        run(command(dataset_name=folder, output_dir=tmp_path / "run2", **options))


def test_what_the_log_says(command, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    logging.root.addHandler(handler)
    of_the_hub = logging.StreamHandler(output)
    logging.getLogger("huggingface_hub").addHandler(of_the_hub)
    try:
        run(command(max_train_steps=2))
        logging.getLogger("huggingface_hub").warning("a line of the Hub")
    finally:
        logging.root.removeHandler(handler)
        logging.getLogger("huggingface_hub").removeHandler(of_the_hub)
    text = output.getvalue()
    assert "RANK" not in text and "Saving current state" not in text and text.count("a line of the Hub") == 1
    end = text[text.index("all 2 steps are done") :]
    assert f"a checkpoint, samples and the pipeline follow, in {tmp_path / 'run'}\n" in end
    assert f"vrpo sample {tmp_path / 'run'} --num_images 100" in end


# Configuration files and help


def test_config_files(command, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"dataset_name": "digits", "vae": "none", "objective": "none", "seed": 5}))
    args = train_vrpo.parse_args(["--config", str(config), "--seed", "6"])
    assert args.objective == "none" and args.seed == 6
    config.write_text(yaml.safe_dump({"random_flip": True, "center_crop": False, "validation_labels": ["a", 3]}))
    args = train_vrpo.parse_args(command() + ["--config", str(config)])
    assert args.random_flip and not args.center_crop and args.validation_labels == ["a", "3"]
    config.write_text("mixed_precision: no\nguidance_scale: 1.0e-3\n")
    args = train_vrpo.parse_args(command() + ["--config", str(config)])
    assert args.mixed_precision == "no" and args.guidance_scale == 1e-3
    for text, message in [
        ("sed: 1", "unknown option 'sed'; did you mean seed?"),
        ("- 1", "must map option names"),
        ("objective: best", "--objective: invalid choice: 'best'"),
        ("config: other.yaml", "unknown option 'config'"),
        ("seed: true", "seed takes a value, not true"),
    ]:
        config.write_text(text)
        with pytest.raises(SystemExit):
            train_vrpo.parse_args(command(objective=None) + ["--config", str(config)])
        assert message in capsys.readouterr().err


def test_the_embedded_configuration_opens():
    args = train_vrpo.parse_args(["--config", str(ROOT / "configs" / "digits.yaml")])
    assert args.dataset_name == "embedded:digits" and args.encoder == ["embedded:digits"] and args.objective == "vrpo"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train_vrpo.parse_args(["--help-all"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    for action in train_vrpo.build_parser()._actions:
        assert action.option_strings[-1] in text and action.help
    assert "(default: 0.9999)" in text and "(default: None)" not in text


@pytest.mark.slow
def test_no_network_and_no_torchvision(command, tmp_path):
    """The digits run in a process whose sockets and torchvision are forbidden."""
    guard = tmp_path / "guard.py"
    guard.write_text(
        "import socket, sys, runpy\n"
        "def refuse(*args, **kwargs): raise AssertionError('network access')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "sys.modules['torchvision'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    options = command(max_train_steps=2)
    done = subprocess.run(
        [sys.executable, str(guard), str(TRAINING_SCRIPT), *options],
        capture_output=True,
        text=True,
        env=no_network_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model_index.json").is_file()
