# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Probes of hidden states, on the embedded digits and tiny models."""

import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.commands.probe import LabelledImages, block_features, main, pooled_blocks
from diffusers_vrpo.data.image_datasets import load_image_dataset
from diffusers_vrpo.data.image_decoding import decode_image, resize_and_crop
from support.models import inputs, tiny_model


def run(digits_pipeline, *options):
    arguments = [
        digits_pipeline,
        "--dataset_name",
        "digits",
        "--num_train",
        200,
        "--num_test",
        60,
        "--timesteps",
        0,
        0.9,
    ]
    return main([str(argument) for argument in (*arguments, "--dataloader_num_workers", 0, *options)])


def test_states_are_those_between_the_blocks():
    model = tiny_model()
    x, t, labels = inputs()
    with pooled_blocks(model) as states, torch.no_grad():
        model(x, t, labels)
        model(x, t, labels)  # the list holds the last pass only
    blocks = list(model.transformer_blocks)
    assert len(states) == len(blocks)
    for i, state in enumerate(states):
        # What a model of so many blocks gives to its last norm.
        model.transformer_blocks = torch.nn.ModuleList(blocks[: i + 1])
        seen = []
        handle = model.norm_out.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        with torch.no_grad():
            model(x, t, labels)
        handle.remove()
        assert torch.allclose(state, seen[0].mean(1), atol=1e-6)
    assert not blocks[0]._forward_hooks


@pytest.mark.parametrize("direction", ["data_to_noise", "noise_to_data"])
def test_features_are_of_noised_latents_without_a_class(direction):
    model = tiny_model(time_direction=direction)
    x0, _, _ = inputs(batch=5)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    features = block_features(model, x0, noise, 0.3, batch_size=2)
    time = torch.full((5,), 0.3 if direction == "data_to_noise" else 0.7)
    with pooled_blocks(model) as states, torch.no_grad():
        model(0.7 * x0 + 0.3 * noise, time, torch.full((5,), model.null_class_id))
    assert torch.allclose(features, torch.stack(states, dim=1), atol=1e-5)


def test_report(digits_pipeline, encoder_checkpoint, tmp_path):
    encoder = str(encoder_checkpoint("dinov2"))
    files = "--output_file", tmp_path / "probe.json", "--plot_file", tmp_path / "probe.png"
    report = run(digits_pipeline, "--encoder", encoder, "--cknna_k", 5, *files)
    assert json.loads((tmp_path / "probe.json").read_text()) == report
    assert Image.open(tmp_path / "probe.png").width > 500
    depth = len(VRPOPipeline.from_pretrained(digits_pipeline).transformer.transformer_blocks)
    for values in (report["accuracy"], report["cknna"][encoder], report["cka"][encoder]):
        assert len(values) == 2 and all(len(line) == depth for line in values)
    # Digits can be told apart in clean images (chance is 0.1), hardly under noise.
    assert min(report["accuracy"][0]) > 0.35 and max(report["accuracy"][1]) < 0.3
    assert report["cka"][encoder][0][0] > report["cka"][encoder][1][0]
    assert report["encoder_accuracy"][encoder] > 0.3


def test_images_pickle_for_workers_that_are_not_forked():
    data, _, _ = load_image_dataset("digits")
    images = LabelledImages(data, np.array([3, 1]), 8, "images", 0).images
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again[1], images[1]) and not torch.equal(again[1], images[0])


def test_training_and_test_images_differ(digits_pipeline, monkeypatch):
    """No image is in both; features and labels belong together."""
    from diffusers_vrpo.commands import probe as probing

    seen = []
    monkeypatch.setattr(probing, "linear_probe", lambda x, a, z, b, l2: seen.append((x, a, z, b)) or (0.0, 0.0))
    run(digits_pipeline, "--timesteps", "0")
    x, labels, z, test_labels = seen[0]
    assert x.shape[0] == len(labels) == 200 and z.shape[0] == len(test_labels) == 60
    assert torch.cdist(z, x).min() > 1e-2
    model = VRPOPipeline.from_pretrained(digits_pipeline).transformer
    data, _, _ = load_image_dataset("digits")
    pixels = [torch.from_numpy(resize_and_crop(decode_image(record["image"]), 8).copy()) for record in data]
    images = torch.stack(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    direct = block_features(model, images, torch.zeros_like(images), 0.0)[:, 0]
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    nearest = torch.cdist(torch.cat([x, z]), direct, **exact).min(1)
    assert nearest.values.max() < 1e-3
    assert torch.equal(torch.tensor(data["label"][:])[nearest.indices], torch.cat([labels, test_labels]))


def test_bad_input_ends_in_a_sentence(digits_pipeline, tmp_path, capsys):
    for options, message in (
        (["--num_train", 10**6], "need 1000060 images, but the split has"),
        (["--test_split", "validation", "--num_test", 10**6], "--num_test 1000000 is too high, because the split has"),
        (["--dataset_split", "nothing"], "--dataset_split 'nothing' is not in"),
        (["--test_split", "nothing"], "--test_split 'nothing' is not in"),
        (["--num_train", "1"], "--num_train 1 draws images of one class only"),
        (["--output_file", tmp_path / "no" / "x.json"], "does not exist; create it, or choose another"),
        (["--encoder", tmp_path / "nowhere"], "the folder does not exist"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(digits_pipeline, *options)
    with pytest.raises(SystemExit, match="PIPELINE .*nowhere is not a folder"):
        run(tmp_path / "nowhere")
    model = tiny_model(sample_size=(4, 8), in_channels=3, num_classes=10)
    VRPOPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "wide")
    with pytest.raises(SystemExit, match="images that are not square"):
        run(tmp_path / "wide")
    VRPOPipeline(tiny_model(in_channels=4), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "latents")
    with pytest.raises(SystemExit, match="has no autoencoder for its latents of 4 channels"):
        run(tmp_path / "latents")
    for options, message in (
        (["--timesteps", "1"], "--timesteps 1.0 must lie in"),
        (["--cknna_k", "1"], "--cknna_k 1 must be at least 2"),
        (["--cknna_k", "5"], "--cknna_k 5 has no effect without --encoder; remove it"),
        (["--pooling", "auto"], "--pooling auto has no effect without --encoder; remove it"),
        (
            ["--pooling", "auto", "--encoder", "inception"],
            "--pooling auto cannot be combined with --encoder inception",
        ),
        (["--encoder", "x", "--num_test", "10"], "--num_test 10 must be at least 11 for CKNNA with --cknna_k 10"),
    ):
        with pytest.raises(SystemExit):
            run(digits_pipeline, *options)
        assert message in capsys.readouterr().err
