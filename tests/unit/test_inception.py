# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The FID network against an independent rendering: numpy for the resize and the pooling, a flat program for the rest."""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation import inception
from diffusers_vrpo.evaluation.image_encoders import load_image_encoder
from diffusers_vrpo.evaluation.inception import inception_from_state, load_inception, resize_bilinear


def tensorflow_resize(image: np.ndarray, side: int) -> np.ndarray:
    """`resize_bilinear` of TensorFlow 1 with align_corners=False, pixel by pixel; `[H, W]` to `[side, side]`."""
    height, width = image.shape
    result = np.empty((side, side), np.float32)
    for row in range(side):
        y = np.float32(row) * np.float32(height / side)
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for column in range(side):
            x = np.float32(column) * np.float32(width / side)
            left, right = int(x), min(int(x) + 1, width - 1)
            dx, dy = x - left, y - top
            upper = image[top, left] + (image[top, right] - image[top, left]) * dx
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            result[row, column] = upper + (lower - upper) * dy
    return result


@pytest.mark.parametrize("height, width", [(64, 64), (32, 100), (299, 299), (512, 300), (1, 2)])
def test_resize_is_tensorflows(height, width):
    image = torch.randint(0, 256, (height, width), generator=torch.Generator().manual_seed(1)).float()
    found = resize_bilinear(image[None, None])[0, 0].numpy()
    assert np.abs(found - tensorflow_resize(image.numpy(), 299)).max() < 1e-4
    if height == width == 299:
        assert np.array_equal(found, image.numpy())
    assert found[0, 0] == image[0, 0]  # corners, not centres


def padless_average(x):
    """3x3 mean over the neighbours that exist, from sums and counts."""
    ones = torch.ones(1, 1, *x.shape[2:])
    kernel = torch.ones(1, 1, 3, 3)
    total = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1)[:, 0].unflatten(0, x.shape[:2])
    return total / F.conv2d(ones, kernel, padding=1)


def flat_inception(state, images):
    """The graph as one program over the state dict: what leads where, with kernel, stride and padding of each."""

    def conv(x, name, stride=1, padding=0):
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, None, stride, padding)
        mean, var, scale, shift = (
            state[f"{name}.bn.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 0.001).sqrt() * scale + shift).clamp(min=0)

    def chain(x, block, *steps):
        for name, stride, padding in steps:
            x = conv(x, f"{block}.{name}", stride, padding)
        return x

    x = np.stack([[tensorflow_resize(channel, 299) for channel in image] for image in images.float().numpy()])
    x = (torch.from_numpy(x) - 128) / 128
    x = conv(x, "Conv2d_1a_3x3", 2)
    x = conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)
    x = F.max_pool2d(x, 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat(
            [
                chain(x, b, ("branch1x1", 1, 0)),
                chain(x, b, ("branch5x5_1", 1, 0), ("branch5x5_2", 1, 2)),
                chain(x, b, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1)),
                chain(padless_average(x), b, ("branch_pool", 1, 0)),
            ],
            1,
        )
    b = "Mixed_6a"
    double = chain(x, b, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 2, 0))
    x = torch.cat([chain(x, b, ("branch3x3", 2, 0)), double, F.max_pool2d(x, 3, 2)], 1)
    row, column = (0, 3), (3, 0)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = chain(x, b, ("branch7x7_1", 1, 0), ("branch7x7_2", 1, row), ("branch7x7_3", 1, column))
        steps = [(f"branch7x7dbl_{i + 1}", 1, (0, column, row, column, row)[i]) for i in range(5)]
        one = chain(x, b, ("branch1x1", 1, 0))
        if b == "Mixed_6d":
            spatial = one[:, :7]
        x = torch.cat([one, seven, chain(x, b, *steps), chain(padless_average(x), b, ("branch_pool", 1, 0))], 1)
    b = "Mixed_7a"
    steps = [("branch7x7x3_1", 1, 0), ("branch7x7x3_2", 1, row), ("branch7x7x3_3", 1, column), ("branch7x7x3_4", 2, 0)]
    three = chain(x, b, ("branch3x3_1", 1, 0), ("branch3x3_2", 2, 0))
    x = torch.cat([three, chain(x, b, *steps), F.max_pool2d(x, 3, 2)], 1)
    for b, pool in (("Mixed_7b", padless_average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        single = chain(x, b, ("branch3x3_1", 1, 0))
        double = chain(x, b, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1))
        parts = [chain(x, b, ("branch1x1", 1, 0))]
        parts += [chain(single, b, (f"branch3x3_2{p}", 1, padding)) for p, padding in (("a", (0, 1)), ("b", (1, 0)))]
        parts += [
            chain(double, b, (f"branch3x3dbl_3{p}", 1, padding)) for p, padding in (("a", (0, 1)), ("b", (1, 0)))
        ]
        x = torch.cat([*parts, chain(pool(x), b, ("branch_pool", 1, 0))], 1)
    pool = x.mean((2, 3))
    return pool, spatial, pool @ state["fc.weight"].T


def test_features_are_those_of_the_graph(inception_weights):
    images = torch.randint(0, 256, (1, 3, 40, 64), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    features = inception_from_state(inception_weights)(images)
    pool, spatial, logits = flat_inception(inception_weights, images)
    for name, expected, width in (("pool", pool, 2048), ("logits", logits, 1008)):
        assert features[name].shape == (1, width)
        assert (features[name] - expected).abs().max() < 1e-4 * expected.abs().max()
    # Row by row, channels last, as TensorFlow flattens them.
    assert features["spatial"].shape == (1, 2023)
    expected = np.stack([[spatial[0, c, y, x] for c in range(7)] for y in range(17) for x in range(17)]).flatten()
    assert np.abs(features["spatial"][0].numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(ValueError, match="must be uint8"):
        inception_from_state(inception_weights)(images.float())


def test_keys_are_those_of_the_published_weights(inception_weights):
    """Names and shapes of torch-fidelity 0.4.0's network, whose file this one takes."""
    assert len(inception_weights) == 566
    layout = "".join(f"{name}{list(value.shape)}" for name, value in sorted(inception_weights.items()))
    assert zlib.crc32(layout.encode()) == 119206547
    assert not inception_from_state(inception_weights).train().training


def test_wrong_weights_are_refused(inception_weights, tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(inception_weights, file)
    with pytest.raises(InputError, match="does not start with 6726825d"):
        load_inception(file)
    with pytest.raises(InputError, match="nowhere.pth: the file does not exist"):
        load_inception(tmp_path / "nowhere.pth")
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", inception._sha256(file)[:8])
    assert torch.equal(load_inception(file).fc.weight, inception_weights["fc.weight"])

    for changed, message in (
        ({"fc.weight": None}, "1 tensors are not those of the FID network, such as fc.weight"),
        ({"fc.weight": torch.zeros(1000, 2048)}, "such as fc.weight"),
        ({"other": torch.zeros(1)}, "such as other"),
        ({"fc.bias": torch.full((1008,), torch.nan)}, "not finite"),
        ({"AuxLogits.fc.weight": torch.zeros(1)}, None),
        ({"Mixed_5b.branch1x1.bn.num_batches_tracked": None}, None),
    ):
        state = {name: value for name, value in (inception_weights | changed).items() if value is not None}
        if message is None:
            inception_from_state(state)
        else:
            with pytest.raises(InputError, match=message):
                inception_from_state(state)
    save_file(inception_weights, tmp_path / "weights.safetensors")
    assert torch.equal(load_inception(tmp_path / "weights.safetensors").fc.weight, inception_weights["fc.weight"])
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read"):
        load_inception(tmp_path / "weights.safetensors")


def test_weights_come_from_the_cache_of_torch_hub(inception_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "WEIGHTS_URL", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(InputError, match=f"put it into {tmp_path}/checkpoints .or give it to `vrpo evaluate`"):
        load_inception()
    with pytest.raises(InputError, match="^`fd_encoder` inception: .* cannot be downloaded"):
        load_image_encoder("inception", option="fd_encoder")
    file = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(inception_weights, file)
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", inception._sha256(file)[:8])
    assert torch.equal(load_inception().fc.weight, inception_weights["fc.weight"])
