# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The judge without a network: single statistics by hand, and the order of damaged images."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_vrpo.data.image_datasets import decode_image, load_image_dataset


@pytest.fixture(scope="module")
def module(yardstick):
    import image_statistics

    return image_statistics


def blur(images: torch.Tensor, std: float) -> torch.Tensor:
    places = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-places.square() / (2 * std**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.mT, groups=3).round().to(torch.uint8)


def noisy(images: torch.Tensor, std: float) -> torch.Tensor:
    noise = std * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def shuffled(images: torch.Tensor, side: int) -> torch.Tensor:
    """Each image's patches of this side in another order."""
    generator, count = torch.Generator().manual_seed(4), images.shape[-1] // side
    patches = F.unfold(images.float(), side, stride=side).mT
    orders = [torch.randperm(count**2, generator=generator) for _ in images]
    patches = torch.stack([image[order] for image, order in zip(patches, orders)])
    return F.fold(patches.mT, images.shape[-1], side, stride=side).to(torch.uint8)


def tinted(images: torch.Tensor, shift: int) -> torch.Tensor:
    return (images.int() + torch.tensor([shift, 0, -shift]).view(3, 1, 1)).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    """Images with large shapes of random colours on a horizon, uint8 `[800, 3, 32, 32]`."""
    random, rows = np.random.RandomState(0), np.arange(32)
    images = []
    for _ in range(800):
        image = np.where(rows[:, None, None] < random.randint(8, 24), *random.randint(0, 256, (2, 3))) + np.zeros(
            (32, 32, 1)
        )
        x, y, radius = random.randint(8, 24, 3)
        image[(rows[:, None] - y) ** 2 + (rows - x) ** 2 < (radius / 2) ** 2] = random.randint(0, 256, 3)
        images.append(image + random.randn(32, 32, 1) * 6)
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return images.round().clamp(0, 255).to(torch.uint8).contiguous()


def test_statistics_by_hand(module):
    # A ramp from left to right: gradients of 1/255 a pixel, of orientation 0 everywhere but where the edge is repeated.
    ramp = (torch.arange(32.0) * 4).expand(1, 3, 32, 32)
    hog = module.oriented_gradients(ramp.double() / 255).reshape(8, 4, 4)
    assert hog[1:].abs().max() < 1e-12
    inner = 4 / 255
    assert hog[0, 1, 1].item() == pytest.approx(inner / math.sqrt(inner**2 + 0.01**2), rel=0.1)
    turned = module.oriented_gradients(ramp.mT.double() / 255).reshape(8, 4, 4)
    assert torch.allclose(turned[4], hog[0].T) and turned[:4].abs().max() < 1e-12
    # Half way between two orientations, a vote is divided.
    slanted = (torch.arange(32.0)[:, None] * math.sin(math.pi / 16) + torch.arange(32.0) * math.cos(math.pi / 16)) / 64
    both = module.oriented_gradients(slanted.double().expand(1, 3, -1, -1)).reshape(8, 4, 4)[:, 1, 1]
    assert both[0].item() == pytest.approx(both[1].item()) and both[2:].abs().max() < 1e-6

    red = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    red[:, 0] = 1
    colour = module.colours(red).reshape(6, 2, 2)
    wanted = torch.tensor([0.299, -0.168736, 0.5, 0, 0, 0], dtype=torch.float64)  # JPEG's Y, Cb, Cr
    assert torch.allclose(colour, wanted.view(6, 1, 1).expand(6, 2, 2), atol=1e-5)

    # One wave of the cosine transform with u + v = 3 and energy 8 * 8 / 4.
    places = (torch.arange(8.0, dtype=torch.float64) + 0.5) * math.pi / 8
    wave = torch.cos(places)[:, None] * torch.cos(2 * places)
    dct = module.frequencies(wave.repeat(2, 2).expand(1, 3, 16, 16)).reshape(14, 2, 2).square()
    assert dct[2, 0, 0].item() == pytest.approx(16 / 4) and torch.cat([dct[:2], dct[3:]]).abs().max() < 1e-12


def check_order(module, images: torch.Tensor):
    """The second half of the images, damaged ever more, is ever farther from the first half; undamaged it is near."""
    first, second = images[::2], images[1::2]
    reference = module.image_statistics(first)

    def distance(images):
        return module.statistics_distances(images, reference, reference)

    assert all(abs(value) < 1e-6 for value in distance(first).values())
    near = distance(second)
    damages = {
        "blur": [blur(second, std) for std in (0.5, 1.0, 2.0)],
        "noise": [noisy(second, std) for std in (8, 16, 32)],
        "patches": [shuffled(second, side) for side in (16, 8, 4)],
        "tint": [tinted(second, shift) for shift in (20, 40, 80)],
    }
    for name, steps in damages.items():
        values = [distance(step) for step in steps]
        assert near["plain"] < values[0]["plain"] < values[1]["plain"] < values[2]["plain"], name
        group = {"blur": "dct", "noise": "dct", "patches": "hog", "tint": "colour"}[name]
        assert values[-1][group] > 3 * near[group], name
    assert distance(second[:, :, :, :1].expand(-1, -1, -1, 32))["plain"] > 10 * near["plain"]


def test_damaged_scenes_are_farther(module, scenes):
    check_order(module, scenes)


def test_damaged_photographs_are_farther(module, shared):
    data, _, _ = load_image_dataset(str(shared / "data" / "tiny-imagenet-100"), split="validation")
    rows = np.linspace(0, len(data) - 1, 800).astype(int)
    images = torch.from_numpy(np.stack([np.asarray(decode_image(data[int(row)]["image"])) for row in rows]))
    images = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), 2).round().to(torch.uint8)
    assert images.shape[2:] == (32, 32)
    check_order(module, images)
