# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Which autoencoders are taken, and how their latents are scaled."""

import json
import re
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from diffusers_vrpo import VRPOConfig, VRPOPipeline, VRPOTrainer, reach
from diffusers_vrpo.commands import prepare as prepare_latents
from diffusers_vrpo.data.latent_cache import LatentCache
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.autoencoder import (
    SUPPORTED_CLASSES,
    check_vae,
    encode_images,
    latent_layout,
    load_vae,
    reconstruction_problem,
)
from diffusers_vrpo.pipelines import pipeline_vrpo
from support.models import tiny_vae
from support.paths import ROOT


def folder_with(tmp_path, **changes):
    """A folder with a small AutoencoderKL whose config.json has other values."""
    tiny_vae("kl").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(tmp_path)


@pytest.mark.parametrize("scale", [0, 0.0, -0.18215, float("nan"), float("inf"), "0.18215", True, [0.1]])
def test_a_scaling_factor_that_is_not_a_positive_number_is_refused(tmp_path, scale):
    with pytest.raises(
        InputError, match="`scaling_factor` in its config.json is .*must be a positive number"
    ) as error:
        load_vae(folder_with(tmp_path, scaling_factor=scale))
    assert error.value.field == "vae"


@pytest.mark.parametrize("shift", [float("nan"), float("inf"), "0.1"])
def test_a_shift_factor_that_is_not_finite_is_refused(tmp_path, shift):
    with pytest.raises(InputError, match="`shift_factor` in its config.json is .*must be a finite number"):
        load_vae(folder_with(tmp_path, shift_factor=shift))


AUTOENCODERS = sorted(
    name
    for name in dir(diffusers)
    if any(word in name for word in ("Autoencoder", "VAE", "VQModel")) and isinstance(getattr(diffusers, name), type)
)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_autoencoder_of_diffusers_is_supported_or_refused_by_name(name):
    kind = getattr(diffusers, name)
    vae = kind.__new__(kind)  # the class decides, so that weights are not needed
    torch.nn.Module.__init__(vae)
    vae._internal_dict = SimpleNamespace(scaling_factor=1.0)
    documented = (
        (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8").split("## Autoencoders")[1].split("\n## ")[0]
    )
    row = next(line for line in documented.splitlines() if re.search(rf"\b{name}\b", line))
    assert row.split("|")[2].split(",")[0].strip() == ("accepted" if name in SUPPORTED_CLASSES else "refused")
    if name in SUPPORTED_CLASSES:
        check_vae(vae, "folder")
        return pipeline_vrpo.check_vae(vae)
    refusal = f"is a {name}, whose latents or pixels need .* an AutoencoderKL, .* or VQModel"
    with pytest.raises(InputError, match=f"`vae` folder {refusal}") as error:
        check_vae(vae, "folder")
    assert error.value.field == "vae"
    with pytest.raises(ValueError, match=f"`vae` {refusal}"):
        pipeline_vrpo.check_vae(vae)


def test_the_published_pipeline_takes_the_same_classes():
    assert pipeline_vrpo.AUTOENCODERS == SUPPORTED_CLASSES


@pytest.mark.parametrize("kind", ["AutoencoderKLFlux2", "UNet2DModel", "NoSuchClass"])
@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_the_class_is_refused_before_weights_are_read(tmp_path, kind, subfolder):
    (tmp_path / subfolder).mkdir(exist_ok=True)
    (tmp_path / subfolder / "config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(InputError, match=f"`vae` .* is a {kind}, .*; give an AutoencoderKL, "):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"_class_name": 3}', '{"model_type": "vit"}'])
def test_a_config_without_a_class_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        InputError, match="`vae` .*(config.json does not name a class|not a valid JSON).*; give a folder"
    ):
        load_vae(str(tmp_path))


def test_the_configuration_is_refused_before_weights_are_read(tmp_path):
    folder = folder_with(tmp_path, scaling_factor=0)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="`scaling_factor` in its config.json is 0"):
        load_vae(folder)


@pytest.mark.parametrize("kind", ["asymmetric", "vq", "hunyuan"])
def test_other_supported_classes_encode_and_scale(tmp_path, kind):
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",)}
    if kind == "hunyuan":
        arguments = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32)}
        arguments |= {"layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 8, "scaling_factor": 0.5}
        vae = diffusers.AutoencoderKLHunyuanImage(**arguments)
    elif kind == "vq":
        up = {"up_block_types": ("UpDecoderBlock2D",), "num_vq_embeddings": 8}
        vae = diffusers.VQModel(**blocks, **up, norm_num_groups=4, scaling_factor=0.5)
    else:
        up = {"up_block_types": ("UpDecoderBlock2D",), "up_block_out_channels": (8,)}
        blocks["down_block_out_channels"] = blocks.pop("block_out_channels")
        vae = diffusers.AsymmetricAutoencoderKL(**blocks, **up, norm_num_groups=4, scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    vae, pixels = load_vae(str(tmp_path)), torch.rand(1, 3, 8, 8) * 2 - 1
    encoded = vae.encode(pixels)
    raw = encoded.latents if kind == "vq" else encoded.latent_dist.mean
    assert torch.equal(encode_images(vae, pixels), raw * 0.5)
    assert vae.decode(raw).sample.shape == pixels.shape
    assert latent_layout(vae, 8, 1) == (tuple(raw.shape[1:]), kind != "vq")


# Statistics of the channels, as in playground-v2.5

STATISTICS = {"latents_mean": [-1.5, 0.5, 0.0, 2.0], "latents_std": [8.0, 5.0, 4.0, 2.0], "shift_factor": None}


def column(name):
    return torch.tensor(STATISTICS[name]).view(1, 4, 1, 1)


def test_latents_are_normalised_by_the_statistics(tmp_path):
    vae, pixels, noise = load_vae(folder_with(tmp_path, **STATISTICS)), torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(1)
    posterior, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
    expected = (posterior.mean - column("latents_mean")) * scale / column("latents_std")
    torch.testing.assert_close(encode_images(vae, pixels), expected)
    drawn = expected + posterior.std * noise * scale / column("latents_std")
    torch.testing.assert_close(encode_images(vae, pixels, noise), drawn)


def test_the_pipeline_undoes_the_statistics(tmp_path):
    vae, latents = load_vae(folder_with(tmp_path, **STATISTICS)), torch.randn(2, 4, 4, 4)
    raw = latents * column("latents_std") / vae.config.scaling_factor + column("latents_mean")
    decoded = VRPOPipeline.decode_latents(SimpleNamespace(vae=vae), latents)
    torch.testing.assert_close(decoded, vae.decode(raw).sample)


def test_numbers_without_statistics_are_bit_equal():
    vae, pixels, latents = tiny_vae("kl").eval(), torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(encode_images(vae, pixels), (vae.encode(pixels).latent_dist.mean - 0.1) * 0.3)
        decoded = VRPOPipeline.decode_latents(SimpleNamespace(vae=vae), latents)
        assert torch.equal(decoded, vae.decode(latents / 0.3 + 0.1).sample)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents_std": None}, "must both be lists of 4 finite numbers"),
        ({"latents_mean": None}, "must both be lists of 4 finite numbers"),
        ({"latents_mean": [0.0]}, "must both be lists of 4 finite numbers"),
        ({"latents_mean": 0.5}, "must both be lists of 4 finite numbers"),
        ({"latents_std": [1.0, 1.0, 1.0, float("nan")]}, "must both be lists of 4 finite numbers"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "`latents_std` in its config.json has 0.0; it must be positive"),
        ({"shift_factor": 0.1}, "both `shift_factor` 0.1 and `latents_mean`"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        load_vae(folder_with(tmp_path, **STATISTICS | changes))
    assert error.value.field == "vae"


def prepared(folder, vae):
    """A latent cache of a few images."""
    images = folder / "images" / "a"
    images.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        PILImage.new("RGB", (8, 8), (90 * i, 40, 200)).save(images / f"{i}.png")
    argv = ["--train_data_dir", str(folder / "images"), "--vae", vae, "--resolution", "8", "--patch_size", "1"]
    argv += ["--output_dir", str(folder / "cache"), "--dataloader_num_workers", "0"]
    prepare_latents.prepare(prepare_latents.parse_args(argv))
    return LatentCache(folder / "cache")


def test_a_cache_is_normalised_and_records_the_statistics(tmp_path):
    vae = load_vae(folder_with(tmp_path / "vae", **STATISTICS))
    cache = prepared(tmp_path, str(tmp_path / "vae"))
    assert cache.config["latents_mean"] == STATISTICS["latents_mean"]
    assert cache.config["latents_std"] == STATISTICS["latents_std"]
    pixels = torch.from_numpy(np.stack([cache.pixels(row) for row in range(2)])).permute(0, 3, 1, 2) / 127.5 - 1
    mean, std = cache.read("latents", np.arange(2), np.zeros(2, dtype=bool)).float().chunk(2, dim=1)
    torch.testing.assert_close(mean, encode_images(vae, pixels), rtol=1e-3, atol=1e-4)
    expected = vae.encode(pixels).latent_dist.std * vae.config.scaling_factor / column("latents_std")
    torch.testing.assert_close(std, expected, rtol=1e-3, atol=1e-4)
    cache.check_vae(vae)
    with pytest.raises(InputError, match="was made with other `latents_mean` and `latents_std`"):
        cache.check_vae(tiny_vae("kl"))


def test_a_cache_without_the_statistics_is_refused(tmp_path):
    folder_with(tmp_path / "plain")
    cache = prepared(tmp_path, str(tmp_path / "plain"))
    assert not {"latents_mean", "latents_std"} & cache.config.keys()
    cache.check_vae(tiny_vae("kl"))
    cache.check_vae(None)
    vae = load_vae(folder_with(tmp_path / "vae", **STATISTICS))
    with pytest.raises(InputError, match="was made without `latents_mean` and `latents_std`"):
        cache.check_vae(vae)


# A Hub out of reach


@pytest.fixture
def asked(monkeypatch) -> list:
    """The addresses that are asked, of a Hub that is out of reach."""
    addresses = []
    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reach, "is_out_of_reach", lambda endpoint: addresses.append(endpoint) or True)
    return addresses


def test_a_hub_out_of_reach_is_one_sentence_and_asked_once(tmp_path, asked, caplog):
    with pytest.raises(InputError) as error:
        load_vae("someone/an-autoencoder", str(tmp_path))
    assert str(error.value) == (
        "`vae` someone/an-autoencoder: it is neither a folder here nor in the cache, and the Hub cannot be reached; "
        "go online or give a folder, or `none` to train on pixels"
    )
    assert error.value.field == "vae" and len(asked) == 1 and "Retrying" not in caplog.text


def cached(folder, subfolder, **options):
    """Puts a small autoencoder into a cache of the Hub, and returns its name."""
    repository, commit = folder / "models--someone--an-autoencoder", "0" * 40
    tiny_vae("kl").save_pretrained(repository / "snapshots" / commit / subfolder, **options)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return "someone/an-autoencoder"


@pytest.mark.parametrize("subfolder", ["", "vae"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_cached_autoencoder_loads_while_the_hub_is_out_of_reach(tmp_path, asked, subfolder, variant):
    name = cached(tmp_path, subfolder, variant=variant)
    assert load_vae(name, str(tmp_path)).config.scaling_factor == 0.3


# Reconstruction of one image


class Reconstruction(torch.nn.Module):
    """Gives its input back, changed by a function in the decoder."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, change):
        super().__init__()
        self.change = change

    def encode(self, pixels):
        return SimpleNamespace(latent=pixels)

    def decode(self, latents, return_dict):
        return (self.change(latents),)


PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
FLAT = np.full((8, 8, 3), 90, dtype=np.uint8)


@pytest.mark.parametrize("image", [PICTURE, FLAT])
@pytest.mark.parametrize("change", [lambda x: x, lambda x: 0.95 * x + 0.02])
def test_a_sound_reconstruction_is_not_mentioned(image, change):
    assert reconstruction_problem(Reconstruction(change), image) is None
    assert reconstruction_problem(None, image) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: -x, "has a mean squared error of 1.*mean colour has 0.3"),
        (lambda x: (x + 3) * 5, "has a mean squared error of"),
        (lambda x: x * float("nan"), "has a mean squared error of nan"),
        (lambda x: x @ x[..., :3, :], r"it cannot decode what it has encoded \(.*"),
        (lambda x: x[..., ::2], r"an image of \[3, 8, 8\] comes back as \[3, 8, 4\]"),
    ],
)
def test_an_absurd_reconstruction_is_described(change, message):
    assert re.search(message, reconstruction_problem(Reconstruction(change), PICTURE))


def test_prepare_warns_of_an_absurd_reconstruction(tmp_path, caplog):
    vae = tiny_vae("kl")
    torch.nn.init.constant_(vae.decoder.conv_out.bias, 5.0)
    vae.save_pretrained(tmp_path / "vae")
    prepared(tmp_path, str(tmp_path / "vae"))
    assert "--vae: decode(encode(image)) of one image has a mean squared error of" in caplog.text


def test_training_warns_of_an_absurd_reconstruction_and_refuses_other_statistics(tmp_path, caplog):
    cache = prepared(tmp_path, folder_with(tmp_path / "plain"))
    vae = tiny_vae("kl")
    torch.nn.init.constant_(vae.decoder.conv_out.bias, 5.0)
    vae.register_to_config(**STATISTICS)
    options = {"preset": "SiT-XS/2", "objective": "none", "resolution": 8, "report_to": "none"}
    args = VRPOConfig(output_dir=str(tmp_path / "run"), train_data_dir=str(tmp_path / "images"), **options)
    with VRPOTrainer(vae=vae, args=args):
        assert "`vae`: decode(encode(image)) of one image has a mean squared error of" in caplog.text
    folder_with(tmp_path / "plain", **STATISTICS)
    args = VRPOConfig(output_dir=str(tmp_path / "other"), latents_dir=str(cache.folder), **options)
    with pytest.raises(InputError, match="was made without `latents_mean`"):
        VRPOTrainer(args=args)
