# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Ridge read-outs of encoder layers from blocks, and the command that compares all pairs."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from tqdm.auto import tqdm

from diffusers_vrpo.alignment.encoders import features_of_layers, load_encoder
from diffusers_vrpo.commands import layers
from diffusers_vrpo.commands.layers import batches, format_layers, main, tokens_at
from diffusers_vrpo.evaluation.readouts import BlockReadouts, gaps, recommend
from support.models import digits_model, inputs, tiny_model


def draw(seed, images=24, levels=2):
    """Tokens `[levels, blocks, B, N, D]` and features: the second block has the first layer's, each with noise and positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    fixed = torch.Generator().manual_seed(9)
    positions, mixing = 50 * torch.randn(6, 5, generator=fixed), torch.randn(8, 5, generator=fixed)
    tokens = normal(levels, 2, images, 6, 8) + 30 * torch.randn(levels, 1, 1, 6, 8, generator=fixed)
    features = torch.cat([tokens[0, 1] @ mixing[:, :3] / 3, normal(images, 6, 2)], -1) + positions
    tokens[1, 1] = tokens[0, 1] + normal(images, 6, 8) + 7
    return tokens, features


def test_read_outs_are_those_of_one_least_squares_problem():
    """Batches of images, levels and positions with means of their own, and the error on others, against an explicit solution."""
    readouts = BlockReadouts(2, 2, [3, 2])
    (tokens, features), (other_tokens, other_features) = draw(0), draw(1)
    for part in torch.arange(24).split(7):
        for level in (0, 1):
            readouts.add(level, list(tokens[level][:, part]), features[part])
    readouts.fit(0.01)
    for part in torch.arange(24).split(7):
        for level in (0, 1):
            readouts.score(level, list(other_tokens[level][:, part]), other_features[part])
    found = readouts.recoverability()

    y_mean = features.mean(0)
    y, other_y = (features - y_mean).double(), (other_features - y_mean).double()
    for block in (0, 1):
        x_mean = tokens[:, block].mean(1, keepdim=True)
        x, other_x = ((t[:, block] - x_mean).double() for t in (tokens, other_tokens))
        flat, target = x.flatten(0, 2), torch.cat([y, y]).flatten(0, 1)
        scale = flat.square().mean(0).sqrt()
        z = flat / scale
        weights = torch.linalg.solve(z.T @ z / len(z) + 0.01 * torch.eye(8), z.T @ target / len(z)) / scale.unsqueeze(
            1
        )
        for level in (0, 1):
            left = (other_y - other_x[level] @ weights).square()
            for layer, columns in enumerate((slice(0, 3), slice(3, 5))):
                expected = 1 - left[..., columns].sum() / other_y[..., columns].square().sum()
                assert found[block, level, layer] == pytest.approx(expected.item(), abs=1e-3)
    assert found[1, 0, 0] > 0.5 > 0.2 > found[0, 0, 0] and found[:, :, 1].max() < 0.2


def test_the_recommendation():
    """The pair that is half way to a later block; never one behind the best block, and none without a gap."""
    one = torch.tensor([[0.1, 0.7], [0.3, 0.8], [0.6, 0.6]])
    found, gap = gaps(torch.stack([one, one], dim=1))
    torch.testing.assert_close(gap, torch.tensor([[0.5, 0.1], [0.3, 0.0], [0.0, 0.2]]))
    assert recommend(found, gap) == (1, 0) and recommend(found, gap, least=0.4) == (0, 0)
    assert recommend(found[:, :1].flip(0), gap[:, :1].flip(0)) is None  # it only falls
    # What is below 0 counts as 0.
    assert gaps(torch.tensor([[[-1.0]], [[0.5]]]))[1].tolist() == [[0.5], [0.0]]


@pytest.mark.parametrize("name, count", [("dinov2", 4), ("convnext", 3), ("swin", 3)])
def test_features_of_all_layers(encoder_checkpoint, name, count):
    """The map of every hidden state, on the grid; one of them is what the encoder itself returns."""
    folder = encoder_checkpoint(name)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = load_encoder(folder, (4, 4))
    found = features_of_layers(encoder, images)
    assert len(found) >= count and all(f.shape[:2] == (2, 16) for f in found.values())
    torch.testing.assert_close(found[encoder.layer], encoder(images))
    other = next(index for index in found if index not in (None, encoder.layer))
    encoder.layer = other
    torch.testing.assert_close(found[other], encoder(images))


def test_tokens_are_of_noised_latents_without_a_class():
    model = tiny_model()
    x0, _, _ = inputs()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    found, seen = tokens_at(model, x0, noise, 0.3), []
    model.transformer_blocks[1].register_forward_hook(lambda block, args, output: seen.append(output))
    with torch.no_grad():
        model(0.7 * x0 + 0.3 * noise, torch.full((2,), 0.3), torch.full((2,), 5))
    torch.testing.assert_close(found[1], seen[0])
    assert len(found) == 3


OPTIONS = (
    "--dataset_name embedded:digits --encoder embedded:digits --num_train 96 --num_test 32 --dataloader_num_workers 0"
)


def test_the_command(digits_pipeline, tmp_path, capsys):
    file = tmp_path / "layers.json"
    options = [*OPTIONS.split(), "--timesteps", "0.1", "0.7"]
    report = main([str(digits_pipeline), *options, "--output_file", str(file)])
    assert json.loads(file.read_text()) == report
    blocks, layers = len(report["gap"]), len(report["encoder_layers"])
    assert report["encoder_layers"] == [1, 2, 3, 4, "output"] and (blocks, layers) == (3, len(report["gap"][0]))
    found = torch.tensor(report["recoverability_by_timestep"])
    assert found.shape == (2, blocks, layers) and (found <= 1).all() and found[0].mean() > found[1].mean() > 0
    assert (torch.tensor(report["gap"]) >= 0).all()
    printed = capsys.readouterr().out
    assert format_layers(report) in printed
    pair = {"block": 2, "encoder_layer": 1}
    assert "align block 2 with layer 1: recoverability" in format_layers(report | {"recommendation": pair})
    assert "heuristic" in format_layers(report | {"recommendation": pair | {"encoder_layer": None}})
    assert "no pair is suggested" in format_layers(report | {"recommendation": None})
    again = main([str(digits_pipeline), *options, "--encoder_layer", "-1", "0", "1"])
    assert again["encoder_layers"] == [4, 0, 1]
    assert again["recoverability"][0][2] == pytest.approx(report["recoverability"][0][0], abs=1e-5)


def test_a_checkpoint_and_its_run(tmp_path, capsys):
    """The newest checkpoint of a run that has no pipeline yet, with the autoencoder of its record."""
    run = tmp_path / "run"
    for step in (2, 10):
        digits_model().save_pretrained(run / f"checkpoint-{step}" / "transformer_ema")
    options = [*OPTIONS.split(), "--timesteps", "0.5"]
    with pytest.raises(SystemExit) as ended:
        main([str(run), *options])
    assert "give --vae" in str(ended.value.code) + capsys.readouterr().err
    (run / "train_config.yaml").write_text("vae: none\n")
    ours = main([str(run), *options])
    assert ours["recoverability"] == main([str(run / "checkpoint-10"), *options])["recoverability"]
    capsys.readouterr()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--encoder_layer", "99"], "--encoder_layer 99 is not a layer with tokens; give one of 0, 1"),
        (["--num_train", "100000"], "--num_train 100000 and --num_test 32 need 100032 images"),
    ],
)
def test_what_cannot_work(digits_pipeline, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main([str(digits_pipeline), *OPTIONS.split(), *options])
    assert message in str(ended.value.code) + capsys.readouterr().err


def test_the_progress_bar_reaches_its_end(monkeypatch):
    class Images(list):
        name = "training images"

    bars = []

    def bar(*arguments, **options):
        bars.append(tqdm(*arguments, file=io.StringIO(), **options))
        return bars[0]

    monkeypatch.setattr(layers, "tqdm", bar)
    images = Images(torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(5))
    found = list(batches(SimpleNamespace(images=images), 2, 0))
    assert [rows for rows, _ in found] == [[0, 1], [2, 3], [4]] and bars[0].n == bars[0].total == 3
    assert torch.equal(found[2][1], torch.full((1, 3, 2, 2), 4 / 127.5 - 1))
