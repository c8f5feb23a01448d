# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The embedded data set and encoder: scikit-learn's handwritten digits, and a small DINOv2 encoder trained on them.

With `--dataset_name digits --encoder digits`, the whole trainer runs on real images without any download.
`python -m diffusers_vrpo.assets.digits` trains the encoder again.
"""

import argparse
import copy
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image


DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS_ENCODER = Path(__file__).parent / "digits_encoder"


def load_digits_dataset() -> DatasetDict:
    """Loads scikit-learn's handwritten digits: grey images of 8x8 pixels with their labels.

    The split `"train"` has 1,437 images, and `"validation"` has the 360 that are held out, which is every fifth image.

    Example:

    ```python
    from diffusers_vrpo import load_digits_dataset

    digits = load_digits_dataset()
    print(len(digits["train"]), digits["validation"][0]["label"])
    ```

    Raises:
        ModuleNotFoundError: if scikit-learn, which contains the images, is not installed.
    """
    return DatasetDict({name: copy.copy(split) for name, split in digits_splits().items()})


@cache
def digits_splits() -> dict[str, Dataset]:
    """Both splits, made once per process."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        text = "the embedded digits need scikit-learn: pip install 'diffusers-vrpo[train]'"
        raise ModuleNotFoundError(text, name="sklearn") from error
    from PIL import Image as PILImage

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=DIGIT_NAMES)})
    held_out = np.arange(len(images)) % 5 == 0
    splits = {}
    for split, rows in (("train", ~held_out), ("validation", held_out)):
        columns = {
            "image": [PILImage.fromarray(image) for image in images[rows]],
            "label": digits.target[rows].tolist(),
        }
        splits[split] = Dataset.from_dict(columns, features=features)
    return splits


def digits_pixels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the digits of a split, `"train"` or `"validation"`, in the form that the digits encoder expects.

    Returns:
        the images, float32 `[N, 3, 8, 8]` in [-1, 1], and the labels, int64 `[N]`.
    """
    rows = load_digits_dataset()[split]
    grey = torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]])).float()
    return (grey / 127.5 - 1)[:, None].expand(-1, 3, -1, -1).contiguous(), torch.tensor(rows["label"])


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Randomly rotates (15 degrees), scales (10 %) and shifts (1 pixel) images `[B, 3, H, W]`, and adds noise."""
    batch = len(pixels)
    angle = (torch.rand(batch) * 2 - 1) * math.radians(15)
    scale = 1 + (torch.rand(batch) * 2 - 1) * 0.1
    shift = (torch.rand(batch, 2, 1) * 2 - 1) * (2 / pixels.shape[-1])
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.cat([torch.stack([cos, -sin, sin, cos], 1).reshape(batch, 2, 2), shift], dim=2)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels + 1, grid, align_corners=False) - 1  # so the padding is -1, the background
    return (moved + 0.1 * torch.randn(batch, 1, *pixels.shape[2:])).clamp(-1, 1)


def make_digits_encoder(output_dir: str | Path, steps: int = 2400, batch_size: int = 64, seed: int = 0):
    """Trains a `Dinov2Model` on the training split alone and saves it with its `preprocessor_config.json`.

    The loss is the sum of the cross-entropies of the class predicted from the CLS token and from the mean patch token,
    and four times the squared error of each patch's pixels predicted from its token. In every second image, up to 3/4
    of the patches are masked.
    """
    from transformers import Dinov2Config, Dinov2Model

    pixels, labels = digits_pixels("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"image_size": 8, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        encoder = Dinov2Model(Dinov2Config(**shape)).train()
        heads = torch.nn.ModuleList([torch.nn.Linear(64, 10), torch.nn.Linear(64, 10), torch.nn.Linear(64, 4)])
        parameters = [*encoder.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            rows = torch.randint(len(pixels), (batch_size,))
            images = augment(pixels[rows])
            ratio = torch.rand(batch_size, 1) * 0.75 * (torch.arange(batch_size)[:, None] % 2)
            masked = torch.rand(batch_size, 16) < ratio
            tokens = encoder(images, bool_masked_pos=masked).last_hidden_state
            patches = F.unfold(images[:, :1], kernel_size=2, stride=2).transpose(1, 2)
            # Without label smoothing, the patch tokens of an image become much more similar to each other.
            loss = F.cross_entropy(heads[0](tokens[:, 0]), labels[rows], label_smoothing=0.1)
            loss = loss + F.cross_entropy(heads[1](tokens[:, 1:].mean(1)), labels[rows], label_smoothing=0.1)
            loss = loss + 4 * F.mse_loss(heads[2](tokens[:, 1:]), patches)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    encoder.eval().save_pretrained(output_dir)
    preprocessor = {"image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_center_crop": False}
    preprocessor |= {"do_resize": True, "size": {"shortest_edge": 8}, "resample": 3}
    preprocessor |= {"do_rescale": True, "rescale_factor": 1 / 255}
    preprocessor |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    Path(output_dir, "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return encoder


@torch.no_grad()
def measure_digits_encoder(encoder) -> tuple[float, float]:
    """Measures an encoder: how well it separates the classes, and how similar the patch tokens of an image are.

    Returns:
        the accuracy, in [0, 1], of a linear probe on the mean patch token, fitted on the training split and measured
        on the validation split; and the mean cosine between two different patch tokens of a validation image.
    """
    from sklearn.linear_model import LogisticRegression

    (train, train_labels), (held_out, held_out_labels) = digits_pixels("train"), digits_pixels("validation")
    train_tokens, tokens = (encoder(pixels).last_hidden_state[:, 1:] for pixels in (train, held_out))
    probe = LogisticRegression(max_iter=5000).fit(train_tokens.mean(1).numpy(), train_labels.numpy())
    directions = F.normalize(tokens, dim=-1)
    cosines = (directions @ directions.transpose(1, 2))[:, ~torch.eye(tokens.shape[1], dtype=torch.bool)]
    return probe.score(tokens.mean(1).numpy(), held_out_labels.numpy()), cosines.mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the small DINOv2 encoder of the embedded digits.")
    parser.add_argument("--output_dir", default=DIGITS_ENCODER, help="folder of the weights (default: the package's)")
    torch.set_num_threads(1)  # makes the weights reproducible bit for bit
    accuracy, cosine = measure_digits_encoder(make_digits_encoder(parser.parse_args().output_dir))
    print(f"linear probe accuracy {accuracy:.4f}, mean cosine between patch tokens {cosine:.3f}")
