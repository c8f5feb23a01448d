# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Which autoencoders are taken, and how their latents are scaled."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.autoencoder import SUPPORTED_CLASSES, check_vae, encode_images, load_vae
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
