# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Whitened targets: the statistics, and where they come from in each kind of training data."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image as PILImage
from safetensors.torch import save_file

from diffusers_vrpo import VRPOConfig
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.alignment.encoders import load_encoder, resample_tokens
from diffusers_vrpo.alignment.objective import REPA
from diffusers_vrpo.alignment.whitening import Whitening, Whitenings, fit_whitening, whiten_encoder
from diffusers_vrpo.config import whitened_dims
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.latent_cache import CachedEncoder
from diffusers_vrpo.data.sources import as_training_data, load_training_data
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.targets import target_encoders
from support.data import write_files
from support.models import tiny_model


def features(images=20, tokens=9, dim=6, seed=0):
    """Correlated embeddings with a large mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(images, tokens, dim, generator=generator) @ mix + 100 * torch.rand(dim, generator=generator)


@pytest.mark.parametrize("num_dims", [2, 4, 6])
def test_the_sample_has_mean_0_and_variance_1_in_its_principal_dimensions(num_dims):
    x = features()
    whitening = fit_whitening(x.split(7), num_dims)
    z = whitening(x).flatten(0, 1).double()
    assert whitening(x).shape == (20, 9, num_dims) and whitening(x).dtype == torch.float32
    torch.testing.assert_close(z.mean(0), torch.zeros(num_dims).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.mT @ z / len(z), torch.eye(num_dims).double(), atol=1e-3, rtol=0)
    # The dimensions are those of the singular values, the largest first.
    centred = x.flatten(0, 1).double() - x.flatten(0, 1).double().mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    expected = (centred @ directions.mT / singular * len(z) ** 0.5)[:, :num_dims]
    sign = (expected * z).sum(0).sign()
    torch.testing.assert_close(z, expected * sign, atol=1e-3, rtol=0)


def test_the_statistics_do_not_depend_on_how_the_sample_is_divided():
    x = features()
    first, *others = [fit_whitening(x.split(size), 3) for size in (20, 7, 1)]
    for other in others:
        torch.testing.assert_close(other.mean, first.mean)
        torch.testing.assert_close(other.projection, first.projection, atol=1e-5, rtol=1e-4)
    again = fit_whitening(x.split(20), 3)
    assert torch.equal(again.projection, first.projection) and torch.equal(again.mean, first.mean)


def test_whitening_commutes_with_resampling():
    x = features(images=2, tokens=16)
    whitening = fit_whitening([x], 4)
    torch.testing.assert_close(
        whitening(resample_tokens(x, 4)), resample_tokens(whitening(x), 4), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("case", ["fewer", "constant", "one token", "nan"])
def test_features_that_cannot_be_whitened(case):
    x = features()
    x = {
        "fewer": x[..., :2] @ torch.ones(2, 6),
        "constant": torch.ones(3, 4, 6),
        "one token": x[:1, :1],
        "nan": x.fill_(float("nan")),
    }[case]
    with pytest.raises(InputError, match="`target_norm` whiten:4: .*(vary in [01] dimensions only|not finite)"):
        fit_whitening([x], 4)
    with pytest.raises(InputError, match="whiten:4: the embeddings of `encoder` digits"):
        fit_whitening([x], 4, "digits")


def test_state_round_trip_and_names():
    a, b = (Whitenings([fit_whitening([features(seed=s + i)], 3) for i in range(2)]) for s in (0, 5))
    state = a.state_dict()
    assert set(state) == {"0.mean", "0.projection", "1.mean", "1.projection"}
    b.load_state_dict(state)
    assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in state.items())


def test_option():
    assert whitened_dims("none") is None and whitened_dims("whiten:128") == 128
    for wrong in ("whiten", "whiten:", "whiten:0", "whiten:1", "whiten:-3", "whiten:1.5", "whiten:²", "pca:4", "128"):
        with pytest.raises(InputError, match="`target_norm` .* is neither none nor whiten:K"):
            VRPOConfig(target_norm=wrong)
    with pytest.raises(InputError, match="`target_norm` whiten:8 has no effect without `objective`"):
        VRPOConfig(objective="none", target_norm="whiten:8")


# In the objective


class Channels:
    """The image itself, as 16 tokens of 12 numbers."""

    embed_dim = 12

    def __call__(self, images):
        return images[:, :, :8, :8].unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("spatial_norm", [0.0, 0.6])
def test_targets_are_whitened_then_spatially_normalised_then_unit(spatial_norm):
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = whiten_encoder(Channels(), images.split(16), 5)
    aligned = AlignedTransformer(tiny_model(), [1], [encoder])
    assert aligned.embed_dims == [5]
    objective = REPA(aligned, 100, spatial_norm=spatial_norm)
    (y,) = objective.targets(images[:3], 16)
    z = encoder.whitening(Channels()(images[:3]))
    if spatial_norm:
        z = (z - 0.6 * z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(y, z / z.norm(dim=-1, keepdim=True))
    assert set(objective.stateful()) == {"conflict_gate", "target_whitening"}
    with pytest.raises(InputError, match="`target_norm` whiten:13: .* Channels have 12 dimensions; give at most"):
        whiten_encoder(Channels(), images.split(16), 13)


def test_a_scaffold_sees_what_is_not_whitened():
    """Targets of the projectors are whitened; keys and values come from the encoder's own embeddings."""
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = whiten_encoder(Channels(), images.split(16), 5)
    aligned = AlignedTransformer(tiny_model(), [1], [encoder, Channels()], projector_dim=16, scaffold_layer=2)
    assert aligned.embed_dims == [5, 12] and aligned.scaffold.keys.in_features == 24
    objective = REPA(aligned, 100, token_weighting="residual", release="plateau")
    step = objective.begin(torch.tensor([0.2, 0.7]), images[:2])
    assert all(torch.equal(f, Channels()(images[:2])) for f in step.scaffold.features)
    for features in (None, step.features):
        y, plain = objective.targets(images[:2], features=features)
        torch.testing.assert_close(y, F.normalize(encoder(images[:2]), dim=-1))
        torch.testing.assert_close(plain, F.normalize(Channels()(images[:2]), dim=-1))
    seen = []
    aligned.scaffold.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": step.t, "class_labels": torch.tensor([0, 1])}
    with torch.no_grad(), aligned.oracle(images[:2]):
        aligned.transformer(**inputs)
    assert torch.equal(seen[0], Channels()(images[:2]))


# In a run


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def png_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def config(**options):
    return VRPOConfig(**{"encoder": ["digits"], "resolution": 8, "target_norm": "whiten:6"} | options)


def test_every_kind_of_data_gives_the_statistics_of_its_images(accelerator):
    encoder = load_encoder("digits", (4, 4))
    data = as_training_data(load_image_dataset("digits")[0], "image", "label")
    (found,) = target_encoders(config(), accelerator, data, [encoder], None)
    rows = data.fixed_rows(1024)
    assert len(rows) == 1024
    images = torch.from_numpy(data.examples(rows, 8)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = fit_whitening([encoder(images)], 6)
    torch.testing.assert_close(found.whitening.mean, expected.mean)
    torch.testing.assert_close(found.whitening.projection, expected.projection, atol=1e-4, rtol=1e-3)

    # Features alone, as a latent cache without images has them.
    embeddings = encoder(images)
    features = {"features-2": lambda part: embeddings[np.searchsorted(rows, part)]}
    cache = SimpleNamespace(
        has_images=False,
        fixed_rows=data.fixed_rows,
        read=lambda name, part: features[name](part),
        release=lambda: None,
    )
    (cached,) = target_encoders(config(), accelerator, cache, [CachedEncoder(0, 2, 64)], None)
    torch.testing.assert_close(cached.whitening.projection, found.whitening.projection, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="`target_norm` whiten:6 needs images or cached features"):
        target_encoders(config(), accelerator, cache, [encoder], None)


def test_streamed_images(tmp_path, accelerator):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    folder = write_files(tmp_path / "data", rows=40, images=[png_of(image) for image in pixels])
    streamed = load_training_data(config(dataset_name=folder, streaming=True))
    (found,) = target_encoders(config(), accelerator, streamed, [load_encoder("digits", (4, 4))], None)
    everything = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = fit_whitening([load_encoder("digits", (4, 4))(everything)], 6)
    torch.testing.assert_close(found.whitening.projection, expected.projection, atol=1e-3, rtol=1e-2)


def test_what_a_run_refuses_and_what_it_reads_from_its_checkpoint(tmp_path, accelerator):
    encoder = load_encoder("digits", (4, 4))
    assert target_encoders(config(target_norm="none"), accelerator, None, [encoder], None) == [encoder]
    with pytest.raises(InputError, match="whiten:65: .* `encoder` digits have 64 dimensions; give at most whiten:64"):
        target_encoders(config(target_norm="whiten:65"), accelerator, None, [encoder], None)
    with pytest.raises(InputError, match="`target_norm` is whiten:6, but .* was trained with none"):
        target_encoders(config(), accelerator, None, [encoder], tmp_path)
    saved = Whitening(torch.rand(64), torch.rand(64, 6))
    save_file(Whitenings([saved]).state_dict(), tmp_path / "target_whitening.safetensors")
    (found,) = target_encoders(config(), accelerator, None, [encoder], tmp_path)
    assert torch.equal(found.whitening.projection, saved.projection) and found.embed_dim == 6
