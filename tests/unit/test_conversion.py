# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Conversion from and to the official layouts, against a plain rendering of the official forward pass."""

import argparse
import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from diffusers_vrpo import SiTSDEScheduler, SiTTransformer2DModel, VRPOPipeline
from diffusers_vrpo.commands import convert
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.official_checkpoints import (
    SavedProjectors,
    convert_checkpoint,
    convert_with_projectors,
    export_checkpoint,
    read_checkpoint,
)
from support.models import TINY, aligned_as_saved, aligned_with, inputs, tiny_model, tiny_vae
from support.official import official_forward, official_state, saved, tiny_dit
from support.pipelines import quiet_pipeline


def convert_script(*argv):
    convert.convert(convert.build_parser("convert.py").parse_args([str(a) for a in argv]))


CASES = {
    "sit": ({}, {"time_direction": "noise_to_data", "prediction_type": "velocity", "guidance_channels": 3}),
    "sit patch 4, pixels": ({"patch": 4, "channels": 3, "rows": 3}, {"patch_size": 4, "num_classes": 2}),
    "sit patch 1, no sigma": ({"patch": 1, "sigma": False, "dim": 48}, {"learn_sigma": False}),
    "repa": ({"sigma": False, "z": (10, 6), "rows": 1001}, {"num_classes": 1000}),
    "dit patch 8": ({"patch": 8, "side": 2}, {"prediction_type": "epsilon", "sample_size": 16}),
    "repa qk-norm": ({"sigma": False, "z": (5,), "qk_norm": 8}, {"qk_norm": True, "attention_head_dim": 8}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_converted_models_compute_what_the_official_code_computes(tmp_path, case):
    arguments, expected = CASES[case]
    state = official_state(**arguments)
    heads = 3
    path = saved(tmp_path, state)
    # With qk-norm the width of a head shows, otherwise it must be given.
    kwargs = {} if "qk_norm" in arguments else {"num_attention_heads": heads}
    format = case.split()[0] if "dit" in case else "auto"
    model, projectors = convert_with_projectors(path, format=format, **kwargs)
    aligned = aligned_as_saved(model, projectors)
    for name, value in expected.items():
        assert model.config[name] == value, name
    x = torch.randn(
        3, model.config.in_channels, *[model.config.sample_size] * 2, generator=torch.Generator().manual_seed(1)
    )
    t = torch.tensor([0, 480, 999]) if "dit" in case else torch.tensor([0.0, 0.3, 1.0])
    labels = torch.tensor([0, 1, model.null_class_id])
    sample, projections = official_forward(state, x, t, labels, heads, aligned=1)
    ours, our_projections = aligned(x, t, labels, return_variance=True)
    torch.testing.assert_close(ours, sample, atol=1e-5, rtol=0)
    assert ours.shape[1] == model.config.in_channels * (2 if model.config.learn_sigma else 1)
    assert aligned.embed_dims == list(arguments.get("z", ()))
    assert len(our_projections) == len(projections) == len(arguments.get("z", ()))
    for ours, theirs in zip(our_projections, projections):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_every_layout_of_a_file(tmp_path):
    state = official_state(z=(6,), sigma=False)
    path = saved(tmp_path, state)
    reference, reference_projectors = convert_with_projectors(path, num_attention_heads=3)
    reference = reference.state_dict()

    def same(content, name="other.pt", **kwargs):
        path = saved(tmp_path, content, name)
        converted, projectors = convert_with_projectors(path, **{"num_attention_heads": 3, **kwargs})
        assert all(torch.equal(x, reference[name]) for name, x in converted.state_dict().items())
        assert projectors.state.keys() == reference_projectors.state.keys() and len(projectors.state) == 6
        assert all(torch.equal(x, reference_projectors.state[name]) for name, x in projectors.state.items())
        return projectors.description

    # Averaged weights come first; a training file's arguments are plain values and may be read.
    other = {name: torch.zeros_like(x) if name != "pos_embed" else x for name, x in state.items()}
    args = argparse.Namespace(model="SiT-XL/2", encoder_depth=2, enc_type="dinov2-vit-b", path_type="linear")
    description = same({"model": other, "ema": state, "opt": {"state": {}}, "args": args, "steps": 7})
    assert description["alignment_layers"] == [2]
    same({"model": {f"module.{name}": x for name, x in state.items()}})
    same({f"_orig_mod.{name}": x for name, x in state.items()})
    # Early REPA files split the blocks where the encoder ends, which is the aligned one.
    early = {}
    for name, x in state.items():
        number = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        early[name.replace(f"blocks.{number}.", f"decoder_blocks.{number - 2}.") if number >= 2 else name] = x
    assert same(early)["alignment_layers"] == [2]
    # iREPA's name for the same projector, and its convolution.
    renamed = {name.replace("projectors.0.", "projectors.0.projection_layer."): x for name, x in state.items()}
    assert same(renamed)["projector_type"] == "mlp"
    assert same(state, alignment_layer=3)["alignment_layers"] == [3]


def test_irepa_convolution(tmp_path):
    state = official_state(sigma=False)
    weight, bias = torch.randn(7, 24, 3, 3), torch.randn(7)
    state |= {"projectors.0.projection_layer.weight": weight, "projectors.0.projection_layer.bias": bias}
    model, projectors = convert_with_projectors(saved(tmp_path, state), num_attention_heads=3)
    assert projectors.description["projector_type"] == "conv" and projectors.description["alignment_dims"] == [7]
    seen = []
    model.transformer_blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    x, t, labels = inputs()
    projection = aligned_as_saved(model, projectors)(x, t, labels)[1][0]
    expected = F.conv2d(seen[0].mT.reshape(2, 24, 4, 4), weight, bias, padding=1)
    torch.testing.assert_close(projection, expected.flatten(2).mT)
    exported = export_checkpoint(model, "repa", projectors)
    assert exported.keys() == state.keys() and torch.equal(exported["projectors.0.projection_layer.weight"], weight)


def test_format_is_told_from_what_there_is(tmp_path, caplog):
    caplog.set_level("INFO")
    state = official_state()

    def direction(content, name="weights.pt", **kwargs):
        caplog.clear()
        config = convert_checkpoint(saved(tmp_path, content, name), num_attention_heads=3, **kwargs).config
        return config.prediction_type, config.time_direction

    dit, sit, repa = ("epsilon", "data_to_noise"), ("velocity", "noise_to_data"), ("velocity", "data_to_noise")
    assert direction(state) == sit and "nothing else tells" in caplog.text
    assert direction(state, "DiT-XL-2-256x256.pt") == dit and "taken as dit by its name" in caplog.text
    assert direction(state, "my_repa.pt") == repa
    # Whole words only.
    for name in ("SiT-conditional.pt", "edited.pt", "prepared-SiT.pt"):
        assert direction(state, name) == sit
    assert direction(state, "DiT-XL-2-256x256.pt", format="sit") == sit
    assert direction({"ema": state, "args": argparse.Namespace(model="DiT-B/4", num_classes=7)}) == dit
    assert direction({"ema": state, "args": argparse.Namespace(enc_type="dinov2-vit-b")}) == repa
    assert direction(state, format="repa") == repa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_open(tmp_path, dtype):
    state = {name: x.to(dtype) for name, x in official_state().items()}
    model = convert_checkpoint(saved(tmp_path, state), num_attention_heads=3)
    assert model.dtype == torch.float32
    assert torch.equal(model.proj_out.weight.to(dtype), state["final_layer.linear.weight"])


@pytest.mark.parametrize("name, to", [("repa_c10", "repa"), ("repa_c1000", "repa"), ("sit_learn_sigma", "sit")])
def test_official_files_come_back_bit_equal(shared, name, to):
    path = shared / "golden" / name / "checkpoint.pt"
    state = read_checkpoint(str(path))[0]
    model, projectors = convert_with_projectors(str(path), num_attention_heads=4)
    back = export_checkpoint(model, to, projectors)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_no_null_class(tmp_path):
    path = saved(tmp_path, official_state(rows=8))
    model = convert_checkpoint(path, num_attention_heads=3, num_classes=8)
    assert model.null_class_id is None and model.config.num_classes == 8 and model.config.class_dropout_prob == 0
    assert convert_checkpoint(path, num_attention_heads=3).null_class_id == 7
    args = argparse.Namespace(cfg_prob=0.0)
    path = saved(tmp_path, {"ema": official_state(rows=8), "args": args})
    assert convert_checkpoint(path, num_attention_heads=3).config.num_classes == 8


@pytest.mark.parametrize("layout, qk_norm", [("sit", False), ("repa", False), ("repa", True), ("dit", False)])
def test_round_trips_are_bit_equal(tmp_path, layout, qk_norm):
    conventions = {
        "sit": {
            "time_direction": "noise_to_data",
            "learn_sigma": True,
            "guidance_channels": 3,
        },
        "repa": {},
        "dit": {
            "prediction_type": "epsilon",
            "learn_sigma": True,
            "guidance_channels": 3,
        },
    }[layout]
    model = tiny_model(qk_norm=qk_norm, **conventions)
    aligned, projectors = aligned_with(model), None
    if layout == "repa":
        state = {f"projectors.{name}": tensor for name, tensor in aligned.projectors.state_dict().items()}
        projectors = SavedProjectors(aligned.description(), state)
    path = saved(tmp_path, export_checkpoint(model, layout, projectors))
    options = {"alignment_layer": 2} if layout == "repa" else {}
    heads = None if qk_norm else 2
    back, projectors_back = convert_with_projectors(path, num_attention_heads=heads, format=layout, **options)
    ours = model.state_dict()
    assert back.state_dict().keys() == ours.keys()
    assert all(torch.equal(x, ours[name]) for name, x in back.state_dict().items())
    for name, value in model.config.items():
        if not name.startswith("_"):
            assert back.config[name] == value, name
    assert (projectors_back is None) == (projectors is None)
    if projectors is not None:
        assert projectors_back.description == projectors.description
        assert projectors_back.state.keys() == projectors.state.keys()
        assert all(torch.equal(x, projectors.state[name]) for name, x in projectors_back.state.items())
    # And the official code computes the same with it.
    x, t, labels = inputs()
    t = torch.tensor([3, 700]) if layout == "dit" else t
    sample, _ = official_forward(export_checkpoint(model, layout), x, t, labels, heads=2)
    torch.testing.assert_close(sample[:, :4], model(x, t, labels).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_export_turns_time_around(tmp_path):
    # What a user compares: our model in the SiT repository, whose time runs the other way.
    model, (x, t, labels) = tiny_model(learn_sigma=True), inputs()
    sample, _ = official_forward(export_checkpoint(model, "sit"), x, 1 - t, labels, heads=2)
    torch.testing.assert_close(-sample[:, :4], model(x, t, labels).sample, atol=1e-5, rtol=0)
    # A SiT model in the REPA repository, which has no variance channels.
    sit = convert_checkpoint(saved(tmp_path, official_state()), num_attention_heads=3)
    exported = export_checkpoint(sit, "repa")
    assert exported["final_layer.linear.weight"].shape[0] == 16
    sample, _ = official_forward(exported, x, t, labels, heads=3)
    torch.testing.assert_close(-sample, sit(x, 1 - t, labels).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"out_channels": 4, "num_embeds_ada_norm": 5, "patch_size": 4}])
@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
@torch.no_grad()
def test_diffusers_dit_gives_the_same_output(tmp_path, changes, class_name):
    dit = tiny_dit(**changes)
    dit.save_pretrained(tmp_path)
    # The published weights were saved when diffusers' DiT had the second name.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": class_name}))
    model = convert_checkpoint(str(tmp_path))
    assert model.config.downscale_freq_shift == 1 and model.config.norm2_eps == 1e-5
    x = inputs(batch=3)[0]
    t = torch.tensor([0, 417, 999])
    labels = torch.tensor([0, 3, model.null_class_id])
    expected = dit(x, t, labels).sample
    torch.testing.assert_close(model(x, t, labels, return_variance=True).sample, expected, atol=1e-5, rtol=0)
    # The frequencies and the eps matter at this precision: the test can tell.
    model.register_to_config(downscale_freq_shift=0.0)
    other = SiTTransformer2DModel.from_config(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert (other(x, t, labels, return_variance=True).sample - expected).abs().max() > 1e-4


def test_diffusers_dit_with_separate_embedders_is_refused(tmp_path):
    dit = tiny_dit()
    dit.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight.data[5] += 1e-3
    dit.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"transformer_blocks.2.*training has separated"):
        convert_checkpoint(str(tmp_path))


def test_other_transformers_of_diffusers_are_refused(tmp_path):
    tiny_dit(activation_fn="gelu").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="activation_fn is 'gelu'; only DiT's own 'gelu-approximate'"):
        convert_checkpoint(str(tmp_path))
    tiny_vae("kl").save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="it holds a AutoencoderKL"):
        convert_checkpoint(str(tmp_path / "vae"))


STATISTICS = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4, "shift_factor": None}


def test_an_autoencoder_that_official_code_would_scale_otherwise_is_mentioned(tmp_path, caplog):
    vae = tiny_vae("kl")
    vae.register_to_config(**STATISTICS)
    vae.save_pretrained(tmp_path / "vae")
    tiny_dit().save_pretrained(tmp_path / "dit")
    warning = "has latents_mean and latents_std, which the pipeline applies"
    convert_script(tmp_path / "dit", tmp_path / "ours", "--vae", tmp_path / "vae")
    assert caplog.text.count(warning) == 1
    ours = VRPOPipeline.from_pretrained(tmp_path / "ours")
    assert ours.vae.config.latents_mean == STATISTICS["latents_mean"]
    convert_script(tmp_path / "ours", tmp_path / "again")
    assert caplog.text.count(warning) == 1
    file = saved(tmp_path, official_state())
    convert_script(file, tmp_path / "sit", "--vae", tmp_path / "vae", "--num_attention_heads", 3)
    assert caplog.text.count(warning) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents_std": [0.0] * 4}, "`latents_std` in its config.json has 0.0"),
        ({"scaling_factor": 0}, "`scaling_factor` in its config.json is 0"),
        ({"_class_name": "AutoencoderKLFlux2"}, "is a AutoencoderKLFlux2"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_convert_checks_the_autoencoder_as_training_does(tmp_path, changes, message, given):
    vae = tiny_vae("kl")
    vae.register_to_config(shift_factor=None)
    DiTPipeline(tiny_dit(), vae, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "dit")
    path = tmp_path / "dit" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | STATISTICS | changes))
    with pytest.raises(InputError, match=f"`vae` .*{message}"):
        convert_script(tmp_path / "dit", tmp_path / "ours", *(["--vae", tmp_path / "dit"] if given else []))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_dit_pipeline_and_ours_give_the_same_images(tmp_path, scheduler):
    schedule = scheduler(beta_schedule="linear", **({"clip_sample": False} if scheduler is DDIMScheduler else {}))
    vae = tiny_vae("kl")
    vae.register_to_config(shift_factor=None)  # DiTPipeline knows none
    theirs = DiTPipeline(tiny_dit(), vae, schedule)
    theirs.save_pretrained(tmp_path / "dit")
    # The published pipelines have the class names here, though diffusers does not write them.
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    index["id2label"] = {str(i): f"class {i}" for i in range(1000)}
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps(index))
    convert_script(tmp_path / "dit", tmp_path / "ours")
    ours = VRPOPipeline.from_pretrained(tmp_path / "ours")
    assert type(ours.scheduler) is scheduler and ours.labels["class 3"] == [3]
    for pipeline in (theirs, ours):
        pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "np"}
    expected = theirs([3, 7], generator=torch.Generator().manual_seed(0), **arguments).images
    images = ours(["class 3", 7], generator=torch.Generator().manual_seed(0), **arguments).images
    assert expected.std() > 0.05
    torch.testing.assert_close(torch.from_numpy(images), torch.from_numpy(expected), atol=1e-4, rtol=0)


class Malicious:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_files_that_are_refused(tmp_path, capsys):
    state = official_state()

    def refused(content, message, name="bad.pt", **kwargs):
        path = content if isinstance(content, str) else saved(tmp_path, content, name)
        with pytest.raises(InputError, match=message):
            convert_checkpoint(path, **{"num_attention_heads": 3, **kwargs})

    refused({"ema": state, "extra": Malicious()}, "objects other than tensors")
    assert "never be printed" not in capsys.readouterr().out
    without = {name: x for name, x in state.items() if "blocks.1.mlp.fc2" not in name}
    refused(without, r"2 missing: blocks.1.mlp.fc2.bias, blocks.1.mlp.fc2.weight")
    refused(state | {"blocks.0.lora": torch.zeros(1)}, "1 unknown: blocks.0.lora")
    refused(state | {"blocks.0.mlp.fc2.bias": torch.zeros(3)}, r"of another shape: blocks.0.mlp.fc2.bias \(3,\)")
    refused(state | {"pos_embed": torch.zeros(1, 16, 24)}, "sine-cosine table")
    refused({"a": torch.zeros(1)}, "not a SiT, REPA or DiT checkpoint: x_embedder.proj.weight")
    refused({"ema": [1]}, "no state dict")
    refused(state, "give `num_attention_heads`", num_attention_heads=None)
    refused(state, "does not divide the width 24", num_attention_heads=5)
    refused(state, r"`preset` SiT-S/2 has depth, width and patch size \(12, 384, 2\)", preset="SiT-S/2")
    refused(state, "do not fit `num_classes` 3", num_classes=3)
    refused({"ema": state, "args": argparse.Namespace(path_type="GVP")}, "path_type 'GVP'")
    refused(state, "`format` 'sitt' must be one of", format="sitt")
    refused(state, "`preset` DiT-S/2 contradicts `format` sit", preset="DiT-S/2", format="sit")
    refused(state, "`alignment_layer` 2: .* has no projectors", alignment_layer=2)
    for name in ("num_attention_heads", "num_classes", "alignment_layer"):
        refused(state, f"`{name}` 0 must be at least 1", **{name: 0})
    refused(official_state(rows=1), "do not fit `num_classes` 0")
    refused(official_state(qk_norm=8), "`num_attention_heads` 2: .* has 3 heads; remove it", num_attention_heads=2)
    refused(state | {"blocks.x.foo": torch.zeros(1), "projectors.foo": torch.zeros(1)}, "projectors", format="sit")
    refused(state | {"blocks.x.foo": torch.zeros(1)}, "1 unknown: blocks.x.foo")
    refused(state | {"pos_embed": torch.zeros(1, 15, 24)}, "sine-cosine table")
    refused(state | {"pos_embed": torch.zeros(15)}, "another shape")
    refused(state | {"x_embedder.proj.weight": torch.zeros(24)}, "another shape")
    refused({3: torch.zeros(1)}, "no state dict")
    (tmp_path / "text.pt").write_text("no checkpoint")
    refused(str(tmp_path / "text.pt"), "text.pt")
    whole = Path(saved(tmp_path, state)).read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    refused(str(tmp_path / "short.pt"), "it may be truncated; download it again")
    refused(str(tmp_path / "absent.pt"), "absent.pt is not a file")
    for name in ("./absent", "runs/absent/checkpoint-3"):
        refused(name, f"{name} is neither a folder nor a file", num_attention_heads=None)
    found = "the folder has no config.json of a transformer; .* SiTTransformer2DModel or DiTTransformer2DModel"
    refused(str(tmp_path), found, num_attention_heads=None)
    tiny_model().save_pretrained(tmp_path / "ours")
    refused(str(tmp_path / "ours"), "`num_attention_heads` 3: .* has a complete config.json")
    with pytest.raises(InputError, match="use `to` sit or repa"):
        export_checkpoint(tiny_model(), "dit")
    with pytest.raises(InputError, match="frequencies or the norm of diffusers' DiT"):
        export_checkpoint(tiny_model(prediction_type="epsilon", downscale_freq_shift=1.0), "dit")
    for changes, layout, message in (
        ({"qk_norm": True}, "sit", "which only REPA's code has"),
        (
            {"qk_norm": "rms_norm"},
            "repa",
            "has an RMSNorm on queries and keys, which the official code cannot compute",
        ),
        ({"null_class_id": 9}, "repa", "the null class is 9, the official code has it at 5"),
        ({"sample_size": (8, 4)}, "repa", "the official models are square"),
    ):
        with pytest.raises(InputError, match=message):
            export_checkpoint(tiny_model(**changes), layout)


def test_sizes_of_the_papers_need_no_heads(tmp_path):
    # SiT-S by its depth and width.
    state = official_state(dim=384, depth=12, side=2)
    assert convert_checkpoint(saved(tmp_path, state)).config.num_attention_heads == 6
    assert convert_checkpoint(saved(tmp_path, state), preset="DiT-S/2").config.prediction_type == "epsilon"


def test_the_script_converts_and_exports(tmp_path, caplog):
    state = official_state()
    convert_script(saved(tmp_path, {"ema": state}), tmp_path / "pipeline", "--num_attention_heads", 3)
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.transformer.config.time_direction == "noise_to_data" and pipeline.vae is None
    assert {p.suffix for p in (tmp_path / "pipeline").rglob("*.*")} == {".json", ".safetensors", ".py"}
    for to, file in (("sit", "back.pt"), ("sit", "back.safetensors")):
        convert_script(tmp_path / "pipeline", tmp_path / file, "--to", to)
        back = read_checkpoint(str(tmp_path / file))[0]
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], x) for name, x in state.items() if name != "pos_embed")
    convert_script(tmp_path / "pipeline", tmp_path / "folder", "--to", "repa", "--ema_key")
    assert torch.load(tmp_path / "folder" / "repa.pt", weights_only=True)["ema"].keys() == state.keys()
    vae = tiny_vae("kl")
    vae.save_pretrained(tmp_path / "vae")
    convert_script(
        tmp_path / "checkpoint.pt",
        tmp_path / "with-vae",
        "--num_attention_heads",
        3,
        "--vae",
        tmp_path / "vae",
        "--format",
        "dit",
    )
    pipeline = VRPOPipeline.from_pretrained(tmp_path / "with-vae")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline([1], num_inference_steps=2).images[0].size[0] > 8


def test_the_script_leaves_projectors_to_training(tmp_path, caplog):
    """A pipeline has none, and the log says so; the other official layout keeps them."""
    caplog.set_level("INFO")
    state = official_state(sigma=False, z=(6,))
    path = saved(tmp_path, state)
    convert_script(path, tmp_path / "pipeline", "--num_attention_heads", 3)
    assert "alignment projectors, which only training needs" in caplog.text
    weights = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("projector" in name for name in weights)
    convert_script(path, tmp_path / "back.pt", "--num_attention_heads", 3, "--to", "repa")
    back = read_checkpoint(str(tmp_path / "back.pt"))[0]
    assert back.keys() == state.keys() and all(torch.equal(back[name], x) for name, x in state.items())


def test_the_script_refuses_what_would_not_sample(tmp_path):
    state = saved(tmp_path, official_state())
    tiny_vae("kl").save_pretrained(tmp_path / "vae")
    (tmp_path / "names.json").write_text('{"99": "zebra"}')
    (tmp_path / "file").write_text("")
    pixels = saved(tmp_path, official_state(channels=3), "pixels.pt")
    for arguments, message in (
        (
            (pixels, tmp_path / "out", "--vae", tmp_path / "vae"),
            "`vae` .* makes latents of 4 channels, but the transformer takes 3",
        ),
        ((state, tmp_path / "out", "--id2label", tmp_path / "names.json"), "names class 99, but .* ids 0 ... 6"),
        ((state, tmp_path / "file" / "out"), "OUTPUT_DIR .* cannot be created as a folder"),
        ((state, tmp_path / "file" / "out.pt", "--to", "sit"), "out.pt cannot be written"),
        (
            (state, tmp_path / "out.bin", "--to", "sit"),
            r"out.bin must end in .pt, .pth or .safetensors, or be a folder",
        ),
        ((state, tmp_path / "out", "--ema_key"), "`ema_key` has no effect without `to`"),
    ):
        with pytest.raises(InputError, match=message):
            convert_script(*arguments, "--num_attention_heads", 3)


@pytest.mark.parametrize("places, name", [(["", "out"], "CHECKPOINT"), (["x.pt", " "], "OUTPUT_DIR")])
def test_empty_names(capsys, places, name):
    with pytest.raises(SystemExit):
        convert.main(places)
    assert f"error: {name} is empty; give a path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"0": 5}', "0 must be text, not 5"),
        ('{"zero": "a"}', 'has the key "zero", which is not a class id'),
        ('{"-1": "a"}', 'has the key "-1"'),
        ("[1, 2]", "must map class ids to names"),
        ("3", "must map class ids to names"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("a pipe", "it is not a file"),
        (None, "No such file"),
    ],
    ids=["number", "name", "negative", "list", "3", "empty", "deep", "pipe", "missing"],
)
def test_class_names_of_another_form(tmp_path, text, message):
    file = tmp_path / "names.json"
    if text == "a pipe":
        os.mkfifo(file)
    elif text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=f"`id2label` .*names.json is not a JSON map from ids to names.*{message}"):
        convert.read_id2label(str(file))


def test_the_script_keeps_the_pipelines_parts(tmp_path):
    pipeline = VRPOPipeline(tiny_model(), SiTSDEScheduler(last_step_size=0.1), tiny_vae("kl"), {0: "zebra"})
    pipeline.save_pretrained(tmp_path / "a")
    convert_script(tmp_path / "a", tmp_path / "b")
    again = VRPOPipeline.from_pretrained(tmp_path / "b")
    assert again.scheduler.config.last_step_size == 0.1 and again.labels["zebra"] == [0] and again.vae is not None


@pytest.mark.slow
def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "diffusers_vrpo.commands.convert", str(tmp_path / "no.pt"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("vrpo convert: error:") and "Traceback" not in done.stderr
    assert "no.pt is not a file" in done.stderr


def test_our_own_folders_open_too(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "alone")
    model.save_pretrained(tmp_path / "checkpoint-3" / "transformer")
    averaged = SiTTransformer2DModel(**TINY)
    averaged.save_pretrained(tmp_path / "checkpoint-3" / "transformer_ema")
    for folder, expected in (("alone", model), ("checkpoint-3", averaged)):
        loaded = convert_checkpoint(str(tmp_path / folder)).state_dict()
        assert all(torch.equal(x, loaded[name]) for name, x in expected.state_dict().items())


# What is there already


def test_nothing_is_written_over(tmp_path):
    source, output = tmp_path / "source", tmp_path / "pipeline"
    quiet_pipeline(tiny_model(), FlowMatchEulerDiscreteScheduler()).save_pretrained(source)
    convert_script(source, output, "--vae", "none")
    written = output / "transformer" / "diffusion_pytorch_model.safetensors"
    first = written.stat()
    umask = os.umask(0o022)
    os.umask(umask)
    assert first.st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(InputError, match="holds a pipeline; choose another folder, or give --overwrite"):
        convert_script(source, output, "--vae", "none")
    assert written.stat().st_ino == first.st_ino
    convert_script(source, output, "--vae", "none", "--overwrite")
    assert written.stat().st_ino != first.st_ino and sorted(p.name for p in tmp_path.iterdir()) == [
        "pipeline",
        "source",
    ]

    # A run's folder has a pipeline too, and more.
    (output / "metrics.jsonl").write_text("{}")
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="holds metrics.jsonl, not only a pipeline; choose another folder"):
            convert_script(source, output, "--vae", "none", *overwrite)
    assert (output / "metrics.jsonl").read_text() == "{}" and written.exists()

    file = tmp_path / "sit.pt"
    file.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists; choose another file, or give --overwrite"):
        convert_script(source, file, "--to", "sit")
    assert file.read_bytes() == b"mine"
    convert_script(source, file, "--to", "sit", "--overwrite")
    assert torch.load(file, weights_only=True)


def test_a_full_disk_leaves_the_pipeline_that_was_there(tmp_path, monkeypatch):
    source, output = tmp_path / "source", tmp_path / "pipeline"
    quiet_pipeline(tiny_model(), FlowMatchEulerDiscreteScheduler()).save_pretrained(source)
    convert_script(source, output, "--vae", "none")
    before = sorted(path.stat().st_ino for path in output.rglob("*"))

    def full(self, folder, **kwargs):
        Path(folder, "transformer").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(VRPOPipeline, "save_pretrained", full)
    with pytest.raises(InputError, match="cannot be written .*No space left on device.*; make room"):
        convert_script(source, output, "--vae", "none", "--overwrite")
    assert sorted(path.stat().st_ino for path in output.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline", "source"]
