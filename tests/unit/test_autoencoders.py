# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Which autoencoders are taken, and how their latents are scaled."""

import json
import re
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image as PILImage

from diffusers_vrpo import VRPOConfig, VRPOPipeline, VRPOTrainer
from diffusers_vrpo.commands import prepare as prepare_latents
from diffusers_vrpo.data.latent_cache import LatentCache
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.autoencoder import (
    SUPPORTED_CLASSES,
    check_vae,
    encode_images,
    load_vae,
    reconstruction_problem,
)
from support.models import tiny_vae


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


AUTOENCODERS = sorted(name for name in dir(diffusers) if name.startswith(("Autoencoder", "Asymmetric", "VQModel")))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_autoencoder_of_diffusers_is_supported_or_refused_by_name(name):
    kind = getattr(diffusers, name)
    vae = kind.__new__(kind)  # the class decides, so that weights are not needed
    torch.nn.Module.__init__(vae)
    vae._internal_dict = SimpleNamespace(scaling_factor=1.0)
    if name in SUPPORTED_CLASSES:
        return check_vae(vae, "folder")
    with pytest.raises(InputError, match=f"`vae` folder is a {name}, .*give an AutoencoderKL, .* or VQModel") as error:
        check_vae(vae, "folder")
    assert error.value.field == "vae"


@pytest.mark.parametrize("kind", ["asymmetric", "vq"])
def test_other_supported_classes_encode_and_scale(tmp_path, kind):
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",)}
    if kind == "vq":
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


def unreachable(*args, **kwargs):
    raise ConnectionError("no route to host")


def test_a_hub_out_of_reach_is_one_sentence_and_asked_once(tmp_path, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: calls.append(args) or unreachable())
    with pytest.raises(InputError) as error:
        load_vae("someone/an-autoencoder", str(tmp_path))
    assert str(error.value) == (
        "`vae` someone/an-autoencoder: it is neither a folder here nor in the cache, and the Hub cannot be reached; "
        "go online or give a folder, or `none` to train on pixels"
    )
    assert error.value.field == "vae" and len(calls) == 1 and "Retrying" not in caplog.text


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_cached_autoencoder_loads_while_the_hub_is_out_of_reach(tmp_path, monkeypatch, subfolder):
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    repository, commit = tmp_path / "models--someone--an-autoencoder", "0" * 40
    tiny_vae("kl").save_pretrained(repository / "snapshots" / commit / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load_vae("someone/an-autoencoder", str(tmp_path)).config.scaling_factor == 0.3


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
