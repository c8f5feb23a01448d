# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""One vector an image, of every family, against what transformers gives."""

import pytest
import torch
from transformers import AutoModel, CLIPModel

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_encoders import encoder_checksum, load_image_encoder, pooled_features, to_uint8
from support.encoders import transformers_output


# What the vector of each family is, from the output of its model.
VECTORS = {
    "dinov2": lambda output: output.last_hidden_state[:, 0],
    "dinov2-registers": lambda output: output.last_hidden_state[:, 0],
    "dinov3": lambda output: output.last_hidden_state[:, 0],
    "vit": lambda output: output.last_hidden_state[:, 0],
    "deit": lambda output: output.last_hidden_state[:, 0],
    "vit-mae": lambda output: output.last_hidden_state[:, 0],
    "beit": lambda output: output.pooler_output,
    "ijepa": lambda output: output.last_hidden_state.mean(1),
    "clip-vision": lambda output: output.pooler_output,
    "siglip": lambda output: output.pooler_output,
    "siglip2": lambda output: output.pooler_output,
    "resnet": lambda output: output.last_hidden_state.mean((2, 3)),
    "convnext": lambda output: output.pooler_output,
    "swin": lambda output: output.last_hidden_state.mean(1),
    "dinov3-convnext": lambda output: output.pooler_output,
}


def random_uint8(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("name", VECTORS)
def test_the_vector_is_that_of_the_family(encoder_checkpoint, name):
    encoder = load_image_encoder(str(encoder_checkpoint(name)))
    if name == "siglip2":  # any size does
        encoder.input_size = (64, 64)
    images = random_uint8(3, 3, *encoder.input_size)
    pixels = (images.float() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    vectors = encoder(images)["pool"]
    expected = VECTORS[name](transformers_output(encoder_checkpoint(name), name, pixels))
    assert vectors.shape == (3, encoder.dim) and vectors.dtype == torch.float32
    assert (vectors - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not vectors.requires_grad and not encoder.train().model.training


def test_clip_gives_its_projected_embedding(encoder_checkpoint):
    encoder = load_image_encoder(str(encoder_checkpoint("clip")))
    images = random_uint8(2, 3, 64, 64)
    with torch.no_grad():
        features = (
            CLIPModel.from_pretrained(encoder_checkpoint("clip")).eval().get_image_features(encoder.preprocess(images))
        )
    features = getattr(features, "pooler_output", features)
    assert encoder.kind == "the projected image embedding"
    assert torch.allclose(encoder(images)["pool"], features, atol=1e-6)


@pytest.mark.parametrize("name, prefix", [("dinov2", 1), ("dinov2-registers", 4), ("clip-vision", 1), ("siglip", 0)])
def test_mean_of_the_patch_tokens(encoder_checkpoint, name, prefix):
    encoder = load_image_encoder(str(encoder_checkpoint(name)), pooling="mean")
    images = random_uint8(2, 3, *encoder.input_size)
    tokens = transformers_output(encoder_checkpoint(name), name, encoder.preprocess(images)).last_hidden_state
    assert torch.allclose(encoder(images)["pool"], tokens[:, prefix:].mean(1), atol=1e-6)


def test_images_of_any_size_in_batches(encoder_checkpoint):
    """The size comes from the processor; batches change nothing beyond rounding."""
    folder = encoder_checkpoint("dinov2")
    encoder = load_image_encoder(str(folder))
    assert encoder.input_size == (56, 56)
    images = random_uint8(7, 3, 40, 90)
    vectors = pooled_features(encoder, images, batch_size=3)
    assert torch.allclose(vectors, pooled_features(encoder, [images]), atol=1e-5)
    # A smaller antialiased image of a flat one is flat, whatever the sizes.
    flat = torch.full((1, 3, 300, 200), 77, dtype=torch.uint8)
    assert torch.allclose(encoder.preprocess(flat), encoder.preprocess(flat[..., :56, :56]), atol=1e-5)
    with pytest.raises(ValueError, match="must be uint8, not torch.float32"):
        encoder(images.float())


def test_input_size_of_the_processor(encoder_checkpoint, tmp_path):
    AutoModel.from_pretrained(encoder_checkpoint("dinov2")).save_pretrained(tmp_path)
    config = tmp_path / "preprocessor_config.json"
    for text, size in (
        (
            '{"do_center_crop": true, "crop_size": {"height": 70, "width": 84}, "size": {"shortest_edge": 98}}',
            (70, 84),
        ),
        ('{"do_center_crop": false, "crop_size": 70, "size": {"shortest_edge": 98}}', (98, 98)),
        ('{"size": 70}', (70, 70)),
        ("{}", (56, 56)),
    ):
        config.write_text(text)
        assert load_image_encoder(str(tmp_path)).input_size == size


def test_checksum_and_wrong_encoders(encoder_checkpoint):
    first, second = (load_image_encoder(str(encoder_checkpoint("resnet"))) for _ in range(2))
    assert encoder_checksum(first) == encoder_checksum(second)
    next(buffer for name, buffer in second.named_buffers() if name.endswith("running_mean")).add_(1e-3)
    assert encoder_checksum(first) != encoder_checksum(second)
    with pytest.raises(InputError, match="the folder does not exist"):
        load_image_encoder("./nowhere")
    with pytest.raises(InputError, match="does not encode images"):
        load_image_encoder(str(encoder_checkpoint("bert")))


def test_to_uint8():
    """Rounds as saving does, and refuses what is not finite."""
    images = torch.tensor([-2.0, -1.0, -0.5, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 6)
    assert to_uint8(images).flatten().tolist() == [0, 0, 64, 128, 255, 255]
    with pytest.raises(InputError, match="1 of 2 images are not finite"):
        to_uint8(torch.tensor([[1.0], [torch.nan]]))
