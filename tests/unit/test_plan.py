# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""`vrpo plan`: what is counted on fake tensors is what real ones need, and what a formula of the block says."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.commands import plan as command
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel, sit_preset
from diffusers_vrpo.training.memory import LiveBytes, training_timeline


GIB = 2**30
TINY = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}


class BlankEncoder(SimpleNamespace):
    """An encoder of blank features, at no cost but theirs."""

    def __call__(self, images):
        return torch.zeros(len(images), 16, self.embed_dim)


def plain(config: dict, **options) -> tuple[VRPOConfig, AlignedTransformer]:
    return VRPOConfig(objective="none", **options), AlignedTransformer(SiTTransformer2DModel(**config).train())


def saved_by_autograd(aligned: AlignedTransformer, images: int) -> int:
    """The bytes of the tensors that a forward pass in bfloat16 saves for the backward pass, each storage once."""
    weights = {parameter.untyped_storage()._cdata for parameter in aligned.parameters()}
    storages = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    x, t, labels = torch.zeros(images, 4, 32, 32), torch.zeros(images), torch.zeros(images, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        prediction, _ = aligned(hidden_states=x, timestep=t, class_labels=labels)
    assert prediction.requires_grad
    return sum(storages.values())


def block_formula(config: dict, tokens: int) -> int:
    """The bytes that the blocks save for an image in bfloat16.

    Of each token, in units of the width: float32 input and output of two norms (16); in bfloat16 their outputs as the input
    of q, k and v, and of the feed-forward (4); q, k, v and the attention's result (8); what two gates multiply (4); and
    the feed-forward before and after its activation (16). Besides, the attention's log-sum-exp.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return config["num_layers"] * tokens * (48 * width + 4 * config["num_attention_heads"])


@pytest.mark.parametrize(
    "preset",
    ["SiT-S/2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SiT-B/2", "SiT-XL/2"))],
)
def test_activations_are_those_of_a_formula_and_of_autograd(preset):
    with FakeTensorMode(allow_non_fake_inputs=True):
        args, aligned = plain(sit_preset(preset), mixed_precision="bf16")
        timeline = training_timeline(args, aligned, (4, 32, 32), with_pixels=False)
        saved = saved_by_autograd(aligned, 3) - saved_by_autograd(aligned, 2)
    assert timeline.saved[1] == pytest.approx(block_formula(sit_preset(preset), 256), rel=0.05)
    assert timeline.saved[1] == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize(
    "checkpointed, options",
    [(False, {}), (True, {"mixed_precision": "bf16"}), (True, {"gradient_accumulation_steps": 2})],
)
def test_fake_tensors_need_what_real_ones_do(options, checkpointed):
    args = VRPOConfig(objective="vrpo", encoder=["blank"], resolution=8, **options)

    def timeline():
        transformer = SiTTransformer2DModel(**TINY).train()
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        aligned = AlignedTransformer(transformer, [1], [BlankEncoder(embed_dim=24)], projector_dim=32)
        return training_timeline(args, aligned, (4, 8, 8), with_pixels=True)

    real = timeline()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert timeline() == real
    assert real.peak(8) > real.saved[0] + 8 * real.saved[1]


def test_the_largest_batch_is_the_largest():
    args, aligned = plain(TINY, resolution=8)
    timeline = training_timeline(args, aligned, (4, 8, 8), with_pixels=False)
    for memory in (10**5, 10**6, 10**7):
        images = timeline.most_images(memory)
        assert timeline.peak(images + 1) > memory >= (timeline.peak(images) if images else 0)


def test_what_is_freed_does_not_count():
    with LiveBytes() as live:
        x = torch.zeros(100)
        y = x + 1
        del y
        z = x.view(10, 10)
    assert live.bytes == 400 and live.timeline == [400, 800] and z.shape == (10, 10)


def run(capsys, *options) -> str:
    command.main([str(option) for option in options])
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_command(capsys, tmp_path):
    common = ["--preset", "SiT-XS/2", "--dataset_name", "embedded:digits", "--resolution", 8, "--vae", "none"]
    common += ["--encoder", "embedded:digits", "--train_batch_size", 64, "--max_train_steps", 1400]
    text = run(capsys, *common, "--json", tmp_path / "plan.json", "--gpu", "H200-141GB", "--mfu", 0.5)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert "1,400 steps of 64 images = 62.4 epochs of 1,437 images: 89,600 images seen" in text
    assert found["run"]["epochs"] == pytest.approx(1400 * 64 / 1437) and [*found["run"]["hours"]] == ["H200-141GB"]
    transformer = SiTTransformer2DModel(**sit_preset("SiT-XS/2"), sample_size=8, in_channels=3, num_classes=10)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert found["parameters"]["transformer"] == parameters
    assert found["bytes"]["moments"] == 8 * found["parameters"]["trained"] > 8 * parameters
    # Hours are FLOPs over the peak that is assumed, in float32 that of TF32.
    flops = found["flops_per_image"]["training"] * 1400 * 64
    assert found["run"]["hours"]["H200-141GB"] == pytest.approx(flops / (494.7e12 * 0.5) / 3600)
    checkpointed = found["largest_batch"]["H200-141GB"]["gradient_checkpointing"]
    assert checkpointed > found["largest_batch"]["H200-141GB"]["plain"] > 1000

    # Adapters train a small part, with latents of a known autoencoder and weights that are not there.
    lora = ["--preset", "SiT-XS/2", "--vae", "stabilityai/sd-vae-ft-ema", "--objective", "none", "--num_images", 500]
    lora += ["--pretrained_model_name_or_path", "SiT.pt", "--lora_rank", 4, "--mixed_precision", "bf16"]
    run(capsys, *lora, "--json", tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["model"]["latent_shape"] == [4, 32, 32] and found["parameters"]["autoencoder"] == 83_653_863
    assert found["parameters"]["trained"] < found["parameters"]["transformer"] / 5
    assert found["disk_bytes_per_image"] == {"latents": 2 * 4 * 32 * 32 * 2, "features": 0}


@pytest.mark.parametrize(
    "options, message",
    [
        ("--objective none", "give --vae, such as stabilityai/sd-vae-ft-ema, or --vae none to train on pixels"),
        ("--vae none", "--objective vrpo needs --encoder, such as facebook/dinov2-base"),
        (
            "--vae org/vae --objective none",
            "the size of --vae org/vae is not known without a download; give its folder",
        ),
        ("--vae none --encoder org/vit", "--encoder org/vit: its shape is not known without a download"),
        (
            "--vae none --objective none --pretrained_model_name_or_path SiT.pt",
            "--preset is missing, and the size of --pretrained",
        ),
        ("--vae none --objective none --lora_rank 4", "--lora_rank 4 adapts trained weights and needs --pretrained"),
        ("--vae none --objective none --resolution 16 --num_train_epochs 3", "--num_train_epochs needs --num_images"),
    ],
)
def test_what_cannot_be_known(options, message):
    preset = "" if "pretrained" in options else "--preset SiT-XS/2 "
    with pytest.raises(SystemExit) as end:
        command.main((preset + options).split())
    assert message in str(end.value)
