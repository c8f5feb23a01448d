# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_vrpo import SIT_PRESETS, SiTTransformer2DModel, sit_preset
from diffusers_vrpo.alignment.policy import repa_loss
from diffusers_vrpo.alignment.rewards import normalize
from diffusers_vrpo.models.flow import flow_matching_loss, forward_process
from support.models import TINY, aligned_with, inputs, load_golden, tiny_model


@pytest.mark.parametrize("name", ["repa_c10", "repa_c1000", "sit_learn_sigma"])
@torch.no_grad()
def test_matches_the_official_code(shared, name):
    aligned, golden = load_golden(shared, name)
    model = aligned.transformer
    sample, projections = aligned(golden["x_t"], golden["t"], golden["labels"])
    torch.testing.assert_close(sample, golden["velocity"], atol=1e-5, rtol=0)
    assert len(projections) == ("projected" in golden)
    if "projected" in golden:
        torch.testing.assert_close(projections[0], golden["projected"], atol=1e-5, rtol=0)
        loss = repa_loss(normalize(projections[0]), normalize(golden["target_features"]))
        torch.testing.assert_close(loss.mean(), golden["repa_loss"][0], atol=1e-5, rtol=0)
    if "denoising_loss" in golden:
        target = forward_process(golden["x0"], golden["noise"], golden["t"], model.config)[2]
        loss = flow_matching_loss(sample, target)
        torch.testing.assert_close(loss, golden["denoising_loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "preset, millions",
    [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675), ("sit-b/4", 130), ("DiT-XL/2", 675)],
)
def test_presets_have_the_papers_sizes(preset, millions):
    with torch.device("meta"):
        model = SiTTransformer2DModel(**sit_preset(preset))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=1)


@pytest.mark.slow
def test_every_preset_builds_and_an_unknown_one_names_the_nearest():
    for preset in SIT_PRESETS:
        with torch.device("meta"):
            SiTTransformer2DModel(**sit_preset(preset))
    with pytest.raises(ValueError, match="'SiT-B/3'.*SiT-B/"):
        sit_preset("SiT-B/3")


def test_a_fresh_model_is_adaln_zero():
    model = SiTTransformer2DModel(**TINY)
    assert torch.equal(model(*inputs()).sample, torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_patch_sizes_and_pixel_space(patch_size):
    model = tiny_model(patch_size=patch_size, in_channels=3)
    sample, projections = aligned_with(model)(*inputs(channels=3))
    assert sample.shape == model(*inputs(channels=3)).sample.shape == (2, 3, 8, 8)
    assert projections[0].shape == (2, (8 // patch_size) ** 2, 12)


def test_patches_return_to_their_place():
    # With the blocks cut off and projections that copy, what comes out of the patches must be the image.
    model = tiny_model(num_layers=1, num_attention_heads=1, attention_head_dim=16)
    torch.nn.init.zeros_(model.transformer_blocks[0].modulation.weight)
    torch.nn.init.zeros_(model.transformer_blocks[0].modulation.bias)
    torch.nn.init.zeros_(model.modulation_out.weight)
    torch.nn.init.zeros_(model.modulation_out.bias)
    model.norm_out = torch.nn.Identity()
    model.pos_embed.zero_()
    with torch.no_grad():
        model.patch_embed.weight.copy_(torch.eye(16).reshape(16, 4, 2, 2))
        model.patch_embed.bias.zero_()
        # The last layer's rows are ordered (row, column, channel), the convolution's (channel, row, column).
        order = torch.arange(16).reshape(4, 2, 2).permute(1, 2, 0).flatten()
        model.proj_out.weight.copy_(torch.eye(16)[order])
        model.proj_out.bias.zero_()
    x, t, labels = inputs()
    torch.testing.assert_close(model(x, t, labels).sample, x)


def test_non_square_and_other_sizes():
    model = tiny_model(sample_size=(4, 8))
    assert model.pos_embed.shape == (1, 8, 32)
    assert model(*inputs(height=4, width=8)).sample.shape == (2, 4, 4, 8)
    # A grid twice as fine has the trained positions at every second place.
    fine = model._position_table(4, 8).reshape(4, 8, 32)
    torch.testing.assert_close(fine[::2, ::2], model.pos_embed.reshape(2, 4, 32))
    assert model(*inputs(height=8, width=16)).sample.shape == (2, 4, 8, 16)
    with pytest.raises(ValueError, match="patch size 2"):
        model(*inputs(height=5, width=8))


def test_null_class_and_label_table():
    model = tiny_model()
    assert model.null_class_id == 5 and model.label_embedding.num_embeddings == 6
    assert tiny_model(num_classes=3, null_class_id=9).label_embedding.num_embeddings == 10
    with pytest.raises(ValueError, match="null_class_id 2 is one of the 3 classes"):
        tiny_model(num_classes=3, null_class_id=2)


def test_bad_arguments():
    with pytest.raises(ValueError, match="patch_size 3"):
        SiTTransformer2DModel(**{**TINY, "patch_size": 3})


def test_save_and_load_round_trip(tmp_path):
    model = tiny_model(qk_norm=True)
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(model(*inputs()).sample, loaded(*inputs()).sample)


def test_opening_draws_no_weights_and_copies_none(tmp_path, monkeypatch):
    """Weights in the type of the file are its pages."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    drawn, initialize = [], SiTTransformer2DModel.initialize_weights

    def watched(self, *others):
        drawn.extend(parameter.device.type for parameter in self.parameters())
        return initialize(self, *others)

    monkeypatch.setattr(SiTTransformer2DModel, "initialize_weights", watched)
    before = torch.get_rng_state()
    model = SiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert set(drawn) == {"meta"} and torch.equal(torch.get_rng_state(), before)
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    ranges = [line.split()[0].split("-") for line in lines if line.endswith("diffusion_pytorch_model.safetensors")]
    ranges = [(int(first, 16), int(last, 16)) for first, last in ranges]
    for parameter in model.parameters() if lines else ():
        assert any(first <= parameter.data_ptr() < last for first, last in ranges)


def test_folders_of_version_0_1_open_in_silence(tmp_path, caplog, capsys):
    """They have projectors among the weights, and arguments that describe them in the config."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    save_file({**load_file(weights), "projectors.0.0.weight": torch.ones(24, 32)}, weights, {"format": "pt"})
    old = {"alignment_layers": [2], "alignment_dims": [12], "projector_type": "mlp", "projector_dim": 24}
    config.write_text(json.dumps(json.loads(config.read_text()) | old))
    capsys.readouterr()
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert not caplog.records and not capsys.readouterr().err
    assert not set(old) & set(loaded.config)
    assert torch.equal(model(*inputs()).sample, loaded(*inputs()).sample)
    assert not set(old) & set(SiTTransformer2DModel.from_config(dict(loaded.config) | old).config)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients, forwards = [], []
    for checkpointing in (False, True):
        model = tiny_model().train()
        forwards.append([])
        model.transformer_blocks[0].ff.register_forward_hook(lambda *_: forwards[-1].append(1))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs()).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert [len(calls) for calls in forwards] == [1, 2]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_close(dtype):
    model, (x, t, labels) = tiny_model(), inputs()
    exact = model(x, t, labels).sample
    half = model.to(dtype)(x.to(dtype), t, labels).sample
    assert half.dtype == dtype
    assert (half.float() - exact).square().mean().sqrt() < 2e-2 * exact.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["repa_c10", "repa_c1000", "sit_learn_sigma"])
@torch.no_grad()
def test_half_precision_is_close_on_official_weights(shared, name, dtype):
    aligned, golden = load_golden(shared, name)
    half = aligned.transformer.to(dtype)(golden["x_t"].to(dtype), golden["t"], golden["labels"]).sample.float()
    exact = golden["velocity"]
    assert (half - exact).square().mean().sqrt() <= 2e-2 * exact.square().mean().sqrt()


@torch.no_grad()
def test_autocast_keeps_the_residual_stream_in_float32():
    model, dtypes = tiny_model(num_layers=12), []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    exact = model(*inputs()).sample
    dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(*inputs()).sample
    assert set(dtypes) == {torch.float32}
    assert (half.float() - exact).square().mean().sqrt() < 1e-2 * exact.square().mean().sqrt()
    # At another size than the trained one too, and in pure half precision.
    model.to(torch.bfloat16)
    x, t, labels = inputs(height=16, width=8)
    assert model(x.bfloat16(), t, labels).sample.dtype == torch.bfloat16
