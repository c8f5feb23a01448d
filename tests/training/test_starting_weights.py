# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Training that starts from weights: pipelines, official files, other classes, adapters; and DiT's objective."""

import json
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.alignment.projectors import make_projector
from diffusers_vrpo.alignment.start import build_aligned_transformer
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.samples import TrainingSamples
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models import ddpm
from diffusers_vrpo.models.flow import forward_process
from diffusers_vrpo.models.official_checkpoints import convert_checkpoint, default_scheduler
from diffusers_vrpo.models.start import Start
from diffusers_vrpo.training.checkpoints import write_manifest
from diffusers_vrpo.training.metrics import read_metrics
from support.models import digits_model, tiny_vae
from support.official import official_state, saved, tiny_dit
from support.training import assert_same_files, losses, projectors_of, run


WEIGHTS = "diffusion_pytorch_model.safetensors"


def official_digits(**changes) -> dict:
    return official_state(**{"channels": 3, "rows": 11, "depth": 2, **changes})


def batch_of_digits(step=0):
    data, _, _ = load_image_dataset("digits")
    batch = TrainingSamples(data, 0, 8, (3, 8, 8), 10).__getitem__(list(range(16 * step, 16 * step + 16)))
    return batch["pixels"].float() / 127.5 - 1, batch


CONVENTIONS = {
    "velocity": {},
    "noise_to_data": {"time_direction": "noise_to_data", "learn_sigma": True},
    "epsilon": {"prediction_type": "epsilon"},
    "learned variance": {"prediction_type": "epsilon", "learn_sigma": True},
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_training_goes_on_in_the_checkpoints_convention(command, tmp_path, convention):
    """One step against the loss and its gradient step written out."""
    model = digits_model(**CONVENTIONS[convention])
    model.save_pretrained(tmp_path / "start")
    options = {"objective": "none", "encoder": None, "model_config": None, "max_train_steps": 1, "max_grad_norm": 1e9}
    run(command(**options, pretrained_model_name_or_path=tmp_path / "start"))

    x0, batch = batch_of_digits()
    x_t, timestep, target, _ = forward_process(x0, batch["noise"], batch["timestep"], model.config)
    prediction = model(x_t, timestep, batch["class_labels"], return_variance=True).sample
    loss_fm = (prediction[:, :3] - target).square().mean()
    loss, row = loss_fm, read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["loss_fm"] == pytest.approx(loss_fm.item(), rel=1e-5)
    if convention == "learned variance":
        bound = ddpm.variational_bound(prediction[:, :3], prediction[:, 3:], x0, x_t, timestep).mean()
        assert row["loss_vb"] == pytest.approx(bound.item(), rel=1e-5)
        loss = loss + bound
    else:
        assert "loss_vb" not in row
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    loss.backward()
    optimizer.step()
    trained = load_file(tmp_path / "run" / "checkpoint-1" / "transformer" / WEIGHTS)
    for name, parameter in model.named_parameters():
        real = parameter.grad.abs() > 1e-5
        torch.testing.assert_close(trained[name][real], parameter.detach()[real], atol=1e-4, rtol=1e-3)
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "run")
    for key, value in CONVENTIONS[convention].items():
        assert pipeline.transformer.config[key] == value


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["none", "repa", "vrpo"])
@pytest.mark.parametrize("source", ["pipeline", "sit.pt", "repa.pt", "dit folder"])
def test_every_source_and_objective(command, tmp_path, source, objective):
    path = tmp_path / source
    if source == "pipeline":
        model = digits_model()
        VRPOPipeline(model, default_scheduler("velocity"), None, {i: str(i) for i in range(10)}).save_pretrained(path)
    elif source == "dit folder":
        tiny_dit(num_embeds_ada_norm=10, in_channels=3, out_channels=6).save_pretrained(path)
    else:
        # With qk-norm the number of heads shows in the file.
        saved(tmp_path, official_digits(qk_norm=8, sigma=source == "sit.pt", z=(5,) * ("repa" in source)), source)
    run(
        command(
            objective=objective,
            model_config=None,
            max_train_steps=12,
            learning_rate=3e-3,
            pretrained_model_name_or_path=path,
        )
    )
    curve = losses(tmp_path / "run")
    assert sum(curve[-3:]) < sum(curve[:3])
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("seven", num_inference_steps=2).images[0].size == (8, 8)
    config = pipeline.transformer.config
    assert config.prediction_type == ("epsilon" if "dit" in source else "velocity")
    projectors = tmp_path / "run" / "checkpoint-12" / "projectors.safetensors"
    assert projectors.exists() == (objective != "none")
    if objective != "none":
        assert projectors_of(projectors.parent)[0]["alignment_layers"] == [1]
    if source == "dit folder":
        assert config.downscale_freq_shift == 1 and type(pipeline.scheduler).__name__ == "DDIMScheduler"


def test_dit_from_scratch(command, tmp_path):
    run(command(model_config=None, preset="DiT-XS/4", max_train_steps=30, learning_rate=2e-3, train_batch_size=16))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(r["loss_fm"] for r in rows[-5:]) < 0.8 * sum(r["loss_fm"] for r in rows[:5])
    assert rows[-1]["reward/semantic"] > rows[0]["reward/semantic"]
    transformer = VRPOPipeline.from_pretrained(tmp_path / "run").transformer
    # The last layer starts at zero: the rows of the variance have moved too.
    rows = transformer.proj_out.weight.unflatten(0, (-1, 6))[:, 3:]
    assert transformer.config.learn_sigma and (rows.abs().amax(-1) > 1e-4).all()


def test_other_classes_start_the_label_table_anew(command, tmp_path, caplog):
    caplog.set_level("INFO")
    model = digits_model(num_classes=4)
    model.save_pretrained(tmp_path / "start")
    options = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "start", "max_train_steps": 1}
    run(command(**options, learning_rate=1e-12))
    assert "the classes differ (10 here, 4 there): their embeddings start from new random weights" in caplog.text
    assert "the projectors start from new random weights" in caplog.text
    trained = SiTTransformer2DModel.from_pretrained(tmp_path / "run", subfolder="transformer").state_dict()
    table, old = trained.pop("label_embedding.weight"), model.state_dict()["label_embedding.weight"]
    assert table.shape[0] == 11
    torch.testing.assert_close(table[10], old[4])
    assert (table[:4] - old[:4]).abs().mean() > 0.05
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_same_number_of_other_classes_is_noticed(command, tmp_path, caplog):
    caplog.set_level("INFO")
    model = digits_model()
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    other = {i: f"something else {i}" for i in range(10)}
    options = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "start", "learning_rate": 1e-12}
    options |= {"max_train_steps": 1}
    for names, more, same in (
        (other, [], False),
        (other, ["--keep_labels"], True),
        ({i: name.upper() for i, name in enumerate(digits)}, [], True),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        caplog.clear()
        VRPOPipeline(model, default_scheduler("velocity"), None, names).save_pretrained(tmp_path / "start")
        run(command(**options) + more)
        assert ("0 is 'zero' here, 'something else 0' there" in caplog.text) != same
        table = load_file(tmp_path / "run" / "transformer" / WEIGHTS)["label_embedding.weight"]
        assert torch.allclose(table, model.label_embedding.weight, atol=1e-6) == same
    with pytest.raises(InputError, match="`keep_labels`: a fresh model does not have the 10 classes"):
        run(command(output_dir=tmp_path / "fresh") + ["--keep_labels"])


def merge_projectors(checkpoint, suffix, file):
    """Moves the projectors of a checkpoint to the transformer's weights, where version 0.1 had them."""
    state = projectors_of(checkpoint, suffix)[1]
    weights = {**load_file(file), **{f"projectors.{name}": tensor for name, tensor in state.items()}}
    save_file(weights, file, {"format": "pt"})
    (checkpoint / f"projectors{suffix}.safetensors").unlink()


def as_version_0_1(checkpoint, folder):
    """A transformer folder as version 0.1 wrote it: projectors among the weights and described in the config."""
    shutil.copytree(checkpoint, folder.with_suffix(".whole"))
    description = projectors_of(checkpoint, "_ema")[0]
    merge_projectors(folder.with_suffix(".whole"), "_ema", folder.with_suffix(".whole") / "transformer_ema" / WEIGHTS)
    shutil.copytree(folder.with_suffix(".whole") / "transformer_ema", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | description))


@pytest.mark.parametrize("source", ["checkpoint", "version 0.1", "pipeline"])
def test_a_run_continues_another_with_its_projectors(command, tmp_path, caplog, source):
    """From a training checkpoint, or from what version 0.1 wrote; a pipeline has no projectors."""
    caplog.set_level("INFO")
    run(command(max_train_steps=3))
    start = {"checkpoint": tmp_path / "run" / "checkpoint-3", "pipeline": tmp_path / "run"}.get(
        source, tmp_path / "old"
    )
    if source == "version 0.1":
        as_version_0_1(tmp_path / "run" / "checkpoint-3", start)
    options = {"model_config": None, "pretrained_model_name_or_path": start, "learning_rate": 1e-12}
    run(command(**options, max_train_steps=1, output_dir=tmp_path / "second"))
    assert "prediction_type velocity, time_direction data_to_noise" in caplog.text
    assert ("the projectors start from new random weights" in caplog.text) == (source == "pipeline")
    first, second = (load_file(tmp_path / folder / "transformer" / WEIGHTS) for folder in ("run", "second"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0)
    first = projectors_of(tmp_path / "run" / "checkpoint-3", "_ema")[1]
    second = projectors_of(tmp_path / "second" / "checkpoint-1", "_ema")[1]
    same = [torch.allclose(second[name], tensor, atol=1e-6, rtol=0) for name, tensor in first.items()]
    assert any(same) == all(same) == (source != "pipeline")


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_a_seed_draws_the_weights_of_version_0_1(projector):
    """Defaults of all layers in the order of construction, projectors last, then SiT's initialisation of all of them."""

    class Model(SiTTransformer2DModel):
        """The model of version 0.1: projectors are made before the weights are initialised."""

        def initialize_weights(self):
            widths = (64, 12) * 2
            self.projectors = torch.nn.ModuleList(make_projector(projector, 32, out, 24) for out in widths)
            super().initialize_weights()

    config = {"sample_size": 8, "in_channels": 3, "num_classes": 10, "num_layers": 3}
    config |= {"num_attention_heads": 2, "attention_head_dim": 16}
    torch.manual_seed(3)
    expected = dict(Model(**config).named_parameters())
    after = torch.rand(1)
    args = Namespace(
        pretrained_model_name_or_path=None, vae=None, keep_labels=False, label_dropout=None, layer_scope="1,2",
        projector=projector, projector_dim=24, model_config=None, preset=None, lora_rank=None, objective="repa",
        scaffold_layer=None,
    )  # fmt: skip
    torch.manual_seed(3)
    encoders = [SimpleNamespace(embed_dim=dim) for dim in (64, 12)]
    aligned = build_aligned_transformer(args, Start(config), (3, 8, 8), 10, None, encoders)
    assert torch.equal(torch.rand(1), after)
    names = [name.removeprefix("transformer.") for name, _ in aligned.named_parameters()]
    assert names == list(expected)
    for name, parameter in zip(names, aligned.parameters()):
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(aligned.transformer.pos_embed, Model(**config).pos_embed)


@pytest.mark.slow
def test_lora_trains_adapters_and_projectors_alone(command, tmp_path):
    pytest.importorskip("peft")
    model = digits_model()
    model.save_pretrained(tmp_path / "start")
    options = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "start", "lora_rank": 2}
    options |= {"max_train_steps": 6, "checkpointing_steps": 3}
    run(command(**options))
    folder = tmp_path / "run"
    saved_names = set(load_file(folder / "checkpoint-3" / "transformer.safetensors"))
    assert {name.split(".")[0] for name in saved_names} == {"transformer_blocks"}
    assert all("lora_" in name for name in saved_names)
    first, second = (projectors_of(folder / f"checkpoint-{step}")[1] for step in (3, 6))
    assert len(first) == 6 and not any(torch.equal(tensor, second[name]) for name, tensor in first.items())

    # The pipeline has the adapters merged: it equals the starting weights with the adapters loaded.
    merged = VRPOPipeline.from_pretrained(folder).transformer.eval()
    adapted = SiTTransformer2DModel.from_pretrained(tmp_path / "start").eval()
    adapted.load_lora_adapter(str(folder / "lora"), use_safetensors=True)
    x0, batch = batch_of_digits()
    inputs = (batch["noise"], batch["timestep"], batch["class_labels"])
    with torch.no_grad():
        plain, with_adapter, from_pipeline = model(*inputs)[0], adapted(*inputs)[0], merged(*inputs)[0]
    torch.testing.assert_close(from_pipeline, with_adapter, atol=1e-5, rtol=1e-5)
    assert (with_adapter - plain).abs().max() > 1e-3
    untouched = ("label_embedding.weight", "proj_out.weight", "transformer_blocks.0.modulation.weight")
    for name in untouched:
        assert torch.equal(merged.state_dict()[name], model.state_dict()[name])

    # It resumes exactly, and only on the same weights.
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(folder / "checkpoint-3", resumed / "checkpoint-3")
    run(command(**options, output_dir=resumed))
    names = ["transformer.safetensors", "transformer_ema.safetensors", "reward_statistics.safetensors"]
    names += ["projectors.safetensors", "projectors_ema.safetensors"]
    assert_same_files(folder / "checkpoint-6", resumed / "checkpoint-6", names)

    # A checkpoint of version 0.1, which had the projectors among the adapters, resumes the same.
    old = tmp_path / "old"
    old.mkdir()
    shutil.copytree(folder / "checkpoint-3", old / "checkpoint-3")
    for suffix in ("", "_ema"):
        merge_projectors(old / "checkpoint-3", suffix, old / "checkpoint-3" / f"transformer{suffix}.safetensors")
    write_manifest(old / "checkpoint-3")
    run(command(**options, output_dir=old))
    assert_same_files(folder / "checkpoint-6", old / "checkpoint-6", names)
    model.proj_out.bias.data += 1
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(InputError, match="checkpoint-3 holds adapters only"):
        convert_checkpoint(str(folder / "checkpoint-3"))
    with pytest.raises(InputError, match="the checksum of the frozen weights is"):
        run(command(**{**options, "max_train_steps": 9}, output_dir=resumed))


def test_lora_on_other_classes_trains_their_table_too(command, tmp_path):
    pytest.importorskip("peft")
    digits_model(num_classes=4).save_pretrained(tmp_path / "start")
    options = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "start", "lora_rank": 2}
    run(command(**options))
    assert "label_embedding.weight" in load_file(tmp_path / "run" / "checkpoint-4" / "transformer.safetensors")


@pytest.mark.slow
def test_no_label_dropout_means_no_null_class(command, tmp_path):
    run(command(label_dropout=0, max_train_steps=2))
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.transformer.label_embedding.num_embeddings == 10 and pipeline.transformer.null_class_id is None
    # Weights that have a null class keep it, so that guidance still works.
    digits_model().save_pretrained(tmp_path / "start")
    options = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "start", "max_train_steps": 1}
    run(command(**options, label_dropout=0, output_dir=tmp_path / "kept"))
    transformer = convert_checkpoint(str(tmp_path / "kept"))
    assert transformer.null_class_id == 10 and transformer.config.class_dropout_prob == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_rank": 2, "pretrained_model_name_or_path": None}, "`lora_rank` adapts trained weights; it needs"),
        (
            {"prediction_type": "epsilon"},
            "`prediction_type` epsilon: .*start was trained with prediction_type velocity",
        ),
        ({"preset": "SiT-XS/2"}, "`preset` SiT-XS/2: .* has a complete config.json"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "./nowhere is neither a folder nor a file"),
        ({"vae": "VAE"}, "gives 4 channels, but .*start takes 3"),
    ],
)
def test_what_cannot_work(command, tmp_path, changes, message):

    digits_model().save_pretrained(tmp_path / "start")
    tiny_vae("kl").save_pretrained(tmp_path / "vae")
    if changes.get("vae") == "VAE":
        changes = {"vae": tmp_path / "vae", "resolution": 16}
    options = {"model_config": None, "pretrained_model_name_or_path": tmp_path / "start", **changes}
    with pytest.raises(InputError, match=message):
        run(command(**options))


def test_learned_variance_needs_a_diffusion(command, capsys):
    with pytest.raises(InputError, match="`learn_sigma` trains a diffusion's variance"):
        run(command() + ["--learn_sigma"])
    with pytest.raises(SystemExit):
        run(command(pretrained_model_name_or_path="x"))
    assert (
        "--model_config cannot be combined with --preset or --pretrained_model_name_or_path" in capsys.readouterr().err
    )
