# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import http.server
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffusers_vrpo.alignment.encoders import load_encoder, spatial_normalize
from diffusers_vrpo.assets import digits
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.throughput import speed_up
from support.encoders import ALL, CONVS, DUALS, VISION, VITS, transformers_output


def random_images(*size, batch=2, seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", [*VITS, *DUALS])
def test_vit_gives_the_patch_tokens_of_the_model(encoder_checkpoint, name):
    folder, prefix = encoder_checkpoint(name), ALL[name][2]
    encoder = load_encoder(folder, (4, 4))
    images = random_images(50, 70)
    features = encoder(images)
    assert features.shape == (2, 16, encoder.embed_dim) and encoder.embed_dim == 32
    assert features.dtype == torch.float32 and features.is_contiguous()
    assert encoder.input_size == (4 * (14 if name == "dinov2" else 16),) * 2
    output = transformers_output(folder, name, encoder.preprocess(images))
    torch.testing.assert_close(features, output.last_hidden_state[:, prefix:])


@pytest.mark.parametrize("name", VITS)
def test_layer_of_a_vit(encoder_checkpoint, name):
    folder, prefix = encoder_checkpoint(name), ALL[name][2]
    encoder = load_encoder(folder, (4, 4), layer=1)
    images = random_images(64, 64)
    output = transformers_output(folder, name, encoder.preprocess(images), output_hidden_states=True)
    torch.testing.assert_close(encoder(images), output.hidden_states[1][:, prefix:])
    assert (load_encoder(folder, (4, 4), layer=-2)(images) == encoder(images)).all()


@pytest.mark.parametrize("name", CONVS)
def test_conv_net_gives_the_map_of_a_stage(encoder_checkpoint, name):
    folder, default = encoder_checkpoint(name), CONVS[name][2]
    encoder = load_encoder(folder, (4, 6))
    assert encoder.layer == default and encoder.input_size == (64, 96)
    images = random_images(64, 96)
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder).eval()(encoder.preprocess(images), output_hidden_states=True)
    states = output.reshaped_hidden_states if name == "swin" else output.hidden_states
    assert encoder.embed_dim == states[default].shape[1]
    torch.testing.assert_close(encoder(images), states[default].flatten(2).mT)


def test_conv_net_on_a_cpu_takes_few_images_at_a_time(encoder_checkpoint):
    encoder = load_encoder(encoder_checkpoint("efficientnet"), (4, 4))
    assert encoder.images_at_a_time == 8
    images = random_images(64, 64).repeat(5, 1, 1, 1) * torch.linspace(0.1, 1, 10).view(-1, 1, 1, 1)
    singly = torch.cat([encoder(image[None]) for image in images])
    sizes = []
    encoder.model.register_forward_pre_hook(
        lambda _, args: sizes.append((len(args[0]), args[0].is_contiguous(memory_format=torch.channels_last)))
    )
    torch.testing.assert_close(encoder(images), singly)
    assert sizes == [(8, True), (2, True)]
    assert load_encoder(encoder_checkpoint("dinov2"), (4, 4)).images_at_a_time is None


@pytest.mark.parametrize(
    "name", ["dinov2", "dinov2-registers", "dinov3", "vit", "vit-mae", "ijepa", "clip", "siglip2"]
)
@pytest.mark.parametrize("row, column", [(0, 0), (1, 3), (2, 4)])
def test_tokens_are_in_the_order_of_rows(encoder_checkpoint, name, row, column):
    encoder = load_encoder(encoder_checkpoint(name), (3, 5))  # not square and not native: positions are interpolated
    images = random_images(*encoder.input_size)
    patch = encoder.input_size[0] // 3
    altered = images.clone()
    altered[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] *= -1
    change = (encoder(altered) - encoder(images)).norm(dim=-1)
    assert (change.argmax(dim=1) == row * 5 + column).all()


def test_map_is_in_the_order_of_rows(encoder_checkpoint):
    encoder = load_encoder(encoder_checkpoint("convnext"), (3, 5))
    images = random_images(*encoder.input_size)
    altered = images.clone()
    altered[:, :, 16:32, 48:64] += 5  # the kernels overlap: a change that outweighs the neighbours' share of it
    change = (encoder(altered) - encoder(images)).norm(dim=-1)
    assert (change.argmax(dim=1) == 1 * 5 + 3).all()


def test_mae_neither_masks_nor_shuffles(encoder_checkpoint):
    encoder = load_encoder(encoder_checkpoint("vit-mae"), (4, 4))
    images = random_images(64, 64)
    first = encoder(images)
    torch.manual_seed(5)
    assert first.shape == (2, 16, 32) and (encoder(images) == first).all()


def test_real_encoder_gives_its_stage_of_stride_16(shared):
    folder = shared / "encoders" / "efficientnet-lite0"
    encoder = load_encoder(folder, (16, 16))
    assert (encoder.layer, encoder.embed_dim, encoder.input_size) == (11, 112, (256, 256))
    assert load_encoder(folder, (4, 4), layer=-6).layer == 11
    images = random_images(256, 256)
    altered = images.clone()
    altered[:, :, 32:48, 80:96] = 1
    change = (encoder(altered) - encoder(images)).norm(dim=-1)
    assert change.shape == (2, 256) and (change.argmax(dim=1) == 2 * 16 + 5).all()


def test_map_of_another_size_is_interpolated(encoder_checkpoint):
    # 4 tokens of stride 4 are too few pixels for the deeper stages: the model gets its native 224 pixels.
    encoder = load_encoder(encoder_checkpoint("convnext"), (4, 4), layer=1)
    assert encoder.input_size == (224, 224)
    images = random_images(224, 224)
    with torch.no_grad():
        output = encoder.model(encoder.preprocess(images), output_hidden_states=True)
    shrunk = F.interpolate(output.hidden_states[1], (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(encoder(images), shrunk.flatten(2).mT)


class FixedViTConfig(ViTConfig):
    model_type = "vrpo-test-fixed-vit"


class FixedViT(ViTModel):
    config_class = FixedViTConfig

    def forward(self, pixel_values, output_hidden_states=False):
        return super().forward(pixel_values, output_hidden_states=output_hidden_states)


def test_vit_without_position_interpolation_gets_its_native_size(tmp_path):
    AutoConfig.register("vrpo-test-fixed-vit", FixedViTConfig, exist_ok=True)
    AutoModel.register(FixedViTConfig, FixedViT, exist_ok=True)
    FixedViT(FixedViTConfig(**VISION)).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, (3, 5))
    assert encoder.input_size == (64, 64)
    images = random_images(64, 64)
    tokens = load_encoder(tmp_path, (4, 4))(images)
    maps = F.interpolate(tokens.mT.unflatten(2, (4, 4)), (3, 5), mode="bilinear", antialias=True)
    torch.testing.assert_close(encoder(images), maps.flatten(2).mT)


SAM = {**VISION, "output_channels": 24, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64}


@pytest.fixture
def sam_checkpoint(tmp_path, request):
    """A tiny SAM, whole or its image tower alone, which takes 64 x 64 pixels only."""
    torch.manual_seed(0)
    tower = SamVisionConfig(**SAM)
    decoder = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": 24,
        "iou_head_hidden_dim": 24,
    }
    prompts = {"hidden_size": 24, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    whole = SamConfig(vision_config=tower, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    model = SamModel(whole) if request.param == "whole" else SamVisionModel(tower)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("sam_checkpoint", ["whole", "tower"], indirect=True)
@pytest.mark.parametrize("layer, width", [(None, 24), (1, 32), (-1, 32)])
def test_sam_gets_its_own_size(sam_checkpoint, layer, width):
    encoder = load_encoder(sam_checkpoint, (3, 5), layer=layer)
    assert encoder.input_size == (64, 64) and encoder.embed_dim == width and encoder.layer == layer
    images = random_images(48, 32)
    with torch.no_grad():
        output = encoder.model(encoder.preprocess(images), output_hidden_states=True)
    maps = output.last_hidden_state if layer is None else output.hidden_states[layer].permute(0, 3, 1, 2)
    assert maps.shape == (2, width, 4, 4)
    maps = F.interpolate(maps, (3, 5), mode="bilinear", antialias=True)
    torch.testing.assert_close(encoder(images), maps.flatten(2).mT)


class FixedResNetConfig(ResNetConfig):
    model_type = "vrpo-test-fixed-resnet"


class FixedResNet(ResNetModel):
    config_class = FixedResNetConfig

    def forward(self, pixel_values, output_hidden_states=False):
        if pixel_values.shape[-1] != self.config.image_size:
            raise ValueError("another size")
        return super().forward(pixel_values, output_hidden_states=output_hidden_states)


def test_a_conv_net_of_one_size_is_probed_at_it(tmp_path):
    AutoConfig.register("vrpo-test-fixed-resnet", FixedResNetConfig, exist_ok=True)
    AutoModel.register(FixedResNetConfig, FixedResNet, exist_ok=True)
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    FixedResNet(FixedResNetConfig(image_size=96, **stages)).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, (4, 4))
    assert (
        encoder.input_size == (96, 96) and encoder.layer == 3 and encoder(random_images(64, 64)).shape == (2, 16, 24)
    )


def test_dinov2_sees_224_pixels_for_256_tokens(encoder_checkpoint):
    assert load_encoder(encoder_checkpoint("dinov2"), (16, 16)).input_size == (224, 224)


# Preprocessing


def real_image(shared):
    import pyarrow.parquet as parquet

    table = parquet.read_table(next((shared / "data" / "imagenet-1k-one-per-class" / "data").glob("*.parquet")))
    return Image.open(io.BytesIO(table["image"][0].as_py()["bytes"])).convert("RGB")


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def test_preprocessing_is_that_of_the_pil_processor(shared):
    folder = shared / "encoders" / "efficientnet-lite0"
    image = real_image(shared)
    processed = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    encoder = load_encoder(folder, (14, 14))
    difference = (encoder.preprocess(as_tensor(image)) - processed).abs() * encoder.std * 255
    assert difference.mean() < 0.5 and difference.max() < 3


@pytest.mark.parametrize(
    "processor",
    [
        {"rescale_offset": False, "include_top": False},
        {"rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False},
        {"include_top": True},
        {"do_normalize": False, "include_top": False},
    ],
)
def test_processor_options_are_followed(encoder_checkpoint, tmp_path, processor):
    folder = shutil.copytree(encoder_checkpoint("efficientnet"), tmp_path / "model")
    processor |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_resize": False}
    processor["image_processor_type"] = "EfficientNetImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    pixels = load_encoder(folder, (4, 4)).preprocess(as_tensor(image))
    torch.testing.assert_close(pixels, expected.float(), atol=1e-5, rtol=1e-5)


def test_flipped_channels(encoder_checkpoint, tmp_path):
    folder = shutil.copytree(encoder_checkpoint("resnet"), tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"do_flip_channel_order": true}')
    images = random_images(64, 64)
    torch.testing.assert_close(load_encoder(folder, (4, 4)).preprocess(images), (images.flip(1) + 1) / 2)


def test_without_a_processor_imagenet_statistics_are_used_with_a_warning(encoder_checkpoint, tmp_path, caplog):
    folder = shutil.copytree(encoder_checkpoint("vit"), tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING, "diffusers_vrpo"):
        encoder = load_encoder(folder, (4, 4))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "ImageNet" in caplog.text
    assert encoder.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert encoder.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_resize_clamps_overshoot_and_repa_does_not(encoder_checkpoint):
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    images = random_images(128, 128).sign()
    encoder = load_encoder(encoder_checkpoint("vit"), (4, 4))
    pixels = encoder.preprocess(images) * std + mean
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    repa = load_encoder(encoder_checkpoint("vit"), (4, 4), resize="repa").preprocess(images)
    expected = F.interpolate(((images + 1) / 2 - mean) / std, (64, 64), mode="bicubic")
    torch.testing.assert_close(repa, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="resize must be one of antialias, repa"):
        load_encoder(encoder_checkpoint("vit"), (4, 4), resize="lanczos")


# Frozen


def test_outer_autocast_changes_nothing(encoder_checkpoint):
    encoder = load_encoder(encoder_checkpoint("dinov2"), (4, 4))
    images = random_images(60, 60)
    plain = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder(images)
    assert inside.dtype == torch.float32 and (inside == plain).all()


def test_dtype_is_that_of_the_computation(encoder_checkpoint):
    images = random_images(60, 60)
    plain = load_encoder(encoder_checkpoint("dinov2"), (4, 4))(images)
    encoder = load_encoder(encoder_checkpoint("dinov2"), (4, 4), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    features = encoder(images.bfloat16())
    assert features.dtype == torch.float32 and not (features == plain).all()
    assert F.cosine_similarity(features, plain, dim=-1).min() > 0.999


@pytest.mark.parametrize("name", ["dinov2", "vit"])
def test_compiled_with_its_preprocessing(encoder_checkpoint, monkeypatch, name):
    """Each is one graph with the same numbers; what makes kernels of the graphs is not tested here."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile(function, backend="aot_eager", fullgraph=True)
    )
    encoder = load_encoder(encoder_checkpoint(name), (4, 4))
    images = random_images(60, 60)
    plain, pixels = encoder(images), encoder.preprocess(images)
    transformer = SimpleNamespace(compile_repeated_blocks=lambda **options: None)
    speed_up(transformer, [encoder], compile=True)
    assert "preprocess" in vars(encoder) and encoder.model._compiled_call_impl is not None
    torch.testing.assert_close(encoder.preprocess(images), pixels)
    torch.testing.assert_close(encoder(images), plain, atol=1e-5, rtol=1e-5)


def test_it_stays_frozen_inside_a_model_that_trains(encoder_checkpoint):
    encoder = load_encoder(encoder_checkpoint("resnet"), (4, 4))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    student = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(encoder.embed_dim, 4)}).train()
    features = student["encoder"](random_images(64, 64))
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not features.requires_grad and not features.is_inference()
    student["head"](features).sum().backward()
    assert student["head"].weight.grad.abs().sum() > 0
    assert all((value == before[key]).all() for key, value in encoder.state_dict().items())
    assert not {"mean", "std"} & set(before)


# What cannot work


def refusal(name, grid_size=(4, 4), **arguments):
    with pytest.raises(InputError) as info:
        load_encoder(name, grid_size, **arguments)
    message = str(info.value)
    assert "\n" not in message and ". " not in message, "one sentence"
    assert "; " in message, "a remedy"
    return message


def test_text_model_is_refused(encoder_checkpoint):
    message = refusal(encoder_checkpoint("bert"))
    assert message.startswith(f"`encoder` {encoder_checkpoint('bert')}: a bert model does not encode images; give ")


def test_layer_out_of_range_is_refused(encoder_checkpoint):
    for layer in (3, -4):
        message = refusal(encoder_checkpoint("vit"), layer=layer)
        assert (
            message
            == f"`encoder_layer` {layer}: {encoder_checkpoint('vit')} has hidden states 0 to 2; choose one of them"
        )


def test_stage_without_extent_is_refused(encoder_checkpoint):
    message = refusal(encoder_checkpoint("deep-resnet"), layer=-1)
    assert "`encoder_layer` -1: " in message and message.endswith("choose one of 0, 1, 2, 3, 4, 5, 6")
    assert load_encoder(encoder_checkpoint("deep-resnet"), (1, 1), layer=-1)(random_images(64, 64)).shape == (2, 1, 8)


def test_unknown_extra_tokens_are_refused(encoder_checkpoint):
    message = refusal(encoder_checkpoint("yolos"))  # detection tokens after the patches
    assert "YolosModel does not return patch embeddings" in message and "117 tokens for 4x4 patches" in message


class PooledConfig(PretrainedConfig):
    model_type = "vrpo-test-pooled"


class PooledModel(PreTrainedModel):
    config_class = PooledConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(3, 8)
        self.post_init()

    def forward(self, pixel_values, output_hidden_states=False):
        return BaseModelOutputWithPooling(pooler_output=self.linear(pixel_values.mean((2, 3))))


def test_model_with_pooled_vectors_only_is_refused(tmp_path):
    AutoConfig.register("vrpo-test-pooled", PooledConfig, exist_ok=True)
    AutoModel.register(PooledConfig, PooledModel, exist_ok=True)
    PooledModel(PooledConfig()).save_pretrained(tmp_path)
    assert "PooledModel returns pooled vectors only" in refusal(tmp_path)


def test_missing_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/none-such", "a/b/c"):
        assert refusal(name).startswith(f"`encoder` {name}: the folder does not exist; give ")


def test_folders_without_a_checkpoint_are_refused(tmp_path, encoder_checkpoint):
    assert "the folder has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "transformers cannot load it (Unrecognized model" in refusal(tmp_path)
    shutil.copy(encoder_checkpoint("vit") / "config.json", tmp_path)
    assert "transformers cannot load it" in refusal(tmp_path)  # no weights
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    assert "transformers cannot load it" in refusal(tmp_path)


def test_weights_that_the_embeddings_need_must_be_there(encoder_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(encoder_checkpoint("vit"), tmp_path / "model")
    # Copies: loaded tensors are views of the file that is overwritten here.
    weights = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    pooler = {key for key in weights if "pooler" in key}
    assert pooler
    save_file({key: weights[key] for key in weights if key not in pooler}, folder / "model.safetensors")
    images = random_images(64, 64)
    expected = load_encoder(encoder_checkpoint("vit"), (4, 4))(images)
    assert (load_encoder(folder, (4, 4))(images) == expected).all()
    needed = next(key for key in weights if "patch_embeddings" in key and key.endswith("weight"))
    save_file({key: weights[key] for key in weights if key != needed}, folder / "model.safetensors")
    assert "the checkpoint lacks 1 of ViTModel's weights" in refusal(folder)


def test_code_of_a_repository_is_never_run(encoder_checkpoint, tmp_path):
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    assert "needs code of its own repository, which is not run" in refusal(tmp_path)


def test_local_folder_never_touches_the_network(encoder_checkpoint, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    load_encoder(str(encoder_checkpoint("clip")), (4, 4))


def test_offline_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("facebook/dinov2-base", cache_dir=tmp_path)
    assert message.startswith("`encoder` facebook/dinov2-base: it is neither a folder here nor in the cache")


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Serves the files of `tiny/vit` from `folder`; `gated/model` is gated, and there is nothing else."""

    def do_GET(self):
        files = "/tiny/vit/resolve/main/"
        file = self.folder / self.path.removeprefix(files)
        if self.path.startswith(files) and file.is_file():
            body = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            status, code = (404, "EntryNotFound") if "/tiny/vit" in self.path else (401, "RepoNotFound")
            status, code = (403, "GatedRepo") if "/gated/model" in self.path else (status, code)
            body = b""
            self.send_response(status)
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_names_on_the_hub(encoder_checkpoint, tmp_path):
    script = """
from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.throughput import speed_up
for name in ("gated/model", "no/such-model", "tiny/vit"):
    try:
        encoder = load_encoder(name, (4, 4))
        print(encoder.embed_dim, encoder.mean[0, 0].item())
    except InputError as error:
        print(error)
"""
    handler = type("Handler", (FakeHub,), {"folder": encoder_checkpoint("vit")})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    gated, unknown, found = done.stdout.strip().splitlines()
    assert gated == (
        "`encoder` gated/model: it is gated; accept its terms at https://huggingface.co/gated/model and run "
        "`hf auth login` (or set HF_TOKEN)"
    )
    assert unknown.startswith("`encoder` no/such-model: it is neither a folder here nor known to the Hub")
    assert found == "32 0.5"


def test_digits_is_the_embedded_encoder_unless_there_is_such_a_folder(encoder_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "DIGITS_ENCODER", encoder_checkpoint("vit"))
    assert type(load_encoder("digits", (4, 4)).model).__name__ == "ViTModel"
    shutil.copytree(encoder_checkpoint("dinov2"), tmp_path / "digits")
    assert type(load_encoder("digits", (4, 4)).model).__name__ == "Dinov2Model"


# Spatial normalisation


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_spatial_normalize_follows_its_formula(strength):
    features = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
    expected = (features - strength * features.mean(1, keepdim=True)) / (features.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(spatial_normalize(features, strength), expected)


def test_spatial_normalize_of_one_token_is_the_identity():
    features = torch.randn(2, 1, 5)
    assert (spatial_normalize(features) == features).all()
    assert spatial_normalize(torch.ones(2, 4, 5)).isfinite().all()
