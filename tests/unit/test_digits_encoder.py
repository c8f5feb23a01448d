# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import json
import socket

import pytest
import torch
from transformers import AutoModel

from diffusers_vrpo.assets.digits import DIGITS_ENCODER, digits_pixels, make_digits_encoder, measure_digits_encoder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the digits encoder must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_embedded_encoder_is_small_and_complete():
    assert (DIGITS_ENCODER / "model.safetensors").stat().st_size < 1_000_000
    model, info = AutoModel.from_pretrained(DIGITS_ENCODER, output_loading_info=True)
    assert not any(info.values())
    tokens = model(digits_pixels("validation")[0][:3]).last_hidden_state
    assert tokens.shape == (3, 17, 64) and tokens.isfinite().all()
    assert model.embeddings.mask_token.abs().max() > 0


def test_the_embedded_encoder_knows_digits_and_places():
    accuracy, cosine = measure_digits_encoder(AutoModel.from_pretrained(DIGITS_ENCODER))
    assert accuracy >= 0.95
    assert cosine < 0.8


def test_pixels_match_the_preprocessor():
    config = json.loads((DIGITS_ENCODER / "preprocessor_config.json").read_text())
    pixels, labels = digits_pixels("train")
    assert pixels.shape == (1437, 3, 8, 8) and labels.shape == (1437,)
    darkest, brightest = ((grey * config["rescale_factor"] - 0.5) / 0.5 for grey in (0, 255))
    assert (pixels.min().item(), pixels.max().item()) == pytest.approx((darkest, brightest))
    assert config["image_mean"] == config["image_std"] == [0.5, 0.5, 0.5]


def test_making_an_encoder_repeats_and_leaves_the_global_seed_alone(tmp_path):
    state = torch.get_rng_state()
    made = make_digits_encoder(tmp_path / "one", steps=3, batch_size=8)
    assert torch.equal(torch.get_rng_state(), state)
    make_digits_encoder(tmp_path / "two", steps=3, batch_size=8)
    opened = [AutoModel.from_pretrained(tmp_path / name) for name in ("one", "two")]
    for a, b, c in zip(made.parameters(), *(model.parameters() for model in opened)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(b, c)
    preprocessors = [folder / "preprocessor_config.json" for folder in (tmp_path / "one", DIGITS_ENCODER)]
    assert preprocessors[0].read_text() == preprocessors[1].read_text()
