# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The files of autoencoders: variants, missing and damaged weights, in a folder and in a pipeline."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.commands.sample import load_pipeline
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models import autoencoder
from diffusers_vrpo.models.autoencoder import load_vae
from support.models import tiny_model, tiny_vae


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(tmp_path):
    """A saved pipeline with an autoencoder."""
    VRPOPipeline(tiny_model(in_channels=4), FlowMatchEulerDiscreteScheduler(), tiny_vae("kl")).save_pretrained(
        tmp_path
    )
    return tmp_path


def keep_variant(folder, *variants, **options):
    (folder / WEIGHTS).unlink()
    for variant in variants:
        tiny_vae("kl").half().save_pretrained(folder, variant=variant, **options)


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
def test_a_single_variant_opens_by_itself(run, options):
    keep_variant(run / "vae", "fp16", **options)
    assert not (run / "vae" / WEIGHTS).exists()
    expected = tiny_vae("kl").half().state_dict()
    for vae in (
        load_vae(str(run)),
        load_vae(str(run / "vae")),
        VRPOPipeline.from_pretrained(run).vae,
        load_pipeline(str(run), None, None, None).vae,
    ):
        assert vae.dtype == torch.float32
        assert all(torch.equal(weight.half(), expected[name]) for name, weight in vae.state_dict().items())
    assert VRPOPipeline.from_pretrained(run, torch_dtype=torch.float16).vae.dtype == torch.float16
    assert VRPOPipeline.from_pretrained(run, variant="fp16").vae is not None


def test_weights_with_the_names_of_older_versions_open(run):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    expected, state = load_file(run / "vae" / WEIGHTS), {}
    for name, weight in expected.items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        state[name] = weight
    assert state.keys() != expected.keys()
    save_file(state, run / "vae" / WEIGHTS, metadata={"format": "pt"})
    for vae in (load_vae(str(run)), VRPOPipeline.from_pretrained(run).vae):
        assert all(torch.equal(weight, expected[name]) for name, weight in vae.state_dict().items())


def test_plain_weights_come_first(run):
    tiny_vae("kl").half().save_pretrained(run / "vae", variant="fp16")
    expected = tiny_vae("kl").state_dict()
    for vae in (load_vae(str(run)), VRPOPipeline.from_pretrained(run).vae):
        assert all(torch.equal(weight, expected[name]) for name, weight in vae.state_dict().items())


def test_a_transformer_keeps_its_plain_weights(run):
    keep_variant(run / "vae", "fp16")
    tiny_model(in_channels=4).half().save_pretrained(run / "transformer", variant="fp16")
    with pytest.raises(ValueError, match="`vae` of .* has no plain weights; pass `variant`: fp16"):
        VRPOPipeline.from_pretrained(run)
    assert VRPOPipeline.from_pretrained(run, variant="fp16").vae is not None


def test_several_variants_are_named(run):
    keep_variant(run / "vae", "fp16", "bf16")
    with pytest.raises(ValueError, match="`vae` of .* has no plain weights; pass `variant`: bf16, fp16"):
        VRPOPipeline.from_pretrained(run)
    with pytest.raises(InputError, match="`vae` .* holds the variants bf16, fp16"):
        load_vae(str(run))


@pytest.mark.parametrize("subfolder", [None, "vae"])
@pytest.mark.parametrize(
    "names, variant",
    [
        (["diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (
            [
                "diffusion_pytorch_model.safetensors.index.fp16.json",
                "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            ],
            "fp16",
        ),
        (["diffusion_pytorch_model.fp16.bin"], "fp16"),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.bin"], None),
        ([], None),
    ],
)
def test_a_variant_on_the_hub_is_found_among_the_names_of_the_files(tmp_path, monkeypatch, subfolder, names, variant):
    prefix = f"{subfolder}/" if subfolder else ""
    there = [f"{prefix}{name}" for name in ("config.json", *names)] + ["unet/diffusion_pytorch_model.bf16.safetensors"]
    monkeypatch.setattr(autoencoder.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(autoencoder.HfApi, "list_repo_files", lambda api, name: there)
    assert autoencoder._variant("someone/an-autoencoder", subfolder, str(tmp_path)) == variant


def test_a_download_without_plain_weights_says_so(run, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "download", classmethod(lambda cls, name, **kwargs: str(run)))
    assert VRPOPipeline.download("someone/a-pipeline") == str(run)
    (run / "vae" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="`vae` of .* has no weights .* or pass `variant` if they have one"):
        VRPOPipeline.from_pretrained("someone/a-pipeline")
    assert VRPOPipeline.from_pretrained("someone/a-pipeline", vae=None).vae is None


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
        (lambda folder: change_weights(folder, lambda state: state.pop("decoder.conv_out.weight")), "conv_out.weight"),
        (lambda folder: change_weights(folder, lambda state: state["decoder.conv_out.bias"].fill_(torch.nan)), "NaN"),
        (lambda folder: change_weights(folder, lambda state: state["encoder.conv_in.bias"].fill_(torch.inf)), "NaN"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"version https://git-lfs"),
            "git-lfs",
        ),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]), "."),
    ],
)
def test_weights_that_are_not_whole_are_refused_when_opened(run, damage, message):
    damage(run / "vae")
    for name in (run, run / "vae"):
        with pytest.raises(InputError, match=message) as error:
            load_vae(str(name))
        assert error.value.field == "vae" and "\n" not in str(error.value)
    with pytest.raises((ValueError, OSError), match=message):
        VRPOPipeline.from_pretrained(run)
    with pytest.raises(InputError, match=message) as error:
        load_pipeline(str(run), None, None, None)
    assert str(error.value).startswith(f"PIPELINE {run} cannot be opened: ") and "\n" not in str(error.value)
    # The transformer can still be had.
    assert VRPOPipeline.from_pretrained(run, vae=None).vae is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scaling_factor": 0}, "`vae.config.scaling_factor` must be a positive number, not 0"),
        ({"scaling_factor": -0.18}, "`vae.config.scaling_factor` must be a positive number"),
        ({"scaling_factor": "0.18"}, "`vae.config.scaling_factor` must be a finite number"),
        ({"scaling_factor": float("nan")}, "`vae.config.scaling_factor` must be a finite number"),
        ({"shift_factor": float("inf")}, "`vae.config.shift_factor` must be a finite number"),
        ({"latents_mean": [0.0] * 4}, "both `latents_mean` and `latents_std`, or neither"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0]}, "`vae.config.latents_std` must be a list of 4 numbers"),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]},
            "`vae.config.latents_std` must be positive",
        ),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "both `shift_factor` and `latents_mean`"),
    ],
)
def test_a_scale_that_cannot_be_used_is_refused_when_a_pipeline_opens(run, changes, message):
    path = run / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for kind in (VRPOPipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(run, trust_remote_code=True)


def test_the_published_code_refuses_missing_weights_too(run):
    change_weights(run / "vae", lambda state: state.pop("decoder.conv_out.weight"))
    with pytest.raises(ValueError, match="`vae` lacks weights, among them decoder.conv_out.weight"):
        DiffusionPipeline.from_pretrained(run, trust_remote_code=True)
