# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Every command of docs/your_images.md, in its order, with small models, images and lengths in the place of the page's."""

import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from diffusers_vrpo import VRPOPipeline, cli
from support.models import tiny_vae
from support.official import official_state, saved
from support.paths import ROOT
from support.training import run


PAGE = (ROOT / "docs" / "your_images.md").read_text(encoding="utf-8")
SMALLER = {
    "--preset": "SiT-XS/2",
    "--resolution": "16",
    "--train_batch_size": "2",
    "--lora_rank": "2",
    "--num_images": "2",
}
STEPS = {"4000": "2", "6000": "3", "20000": "2"}
QUICK = {
    "train": "--num_inference_steps 1 --num_validation_images 1 --report_to none --dataloader_num_workers 0",
    "prepare": "--dataloader_num_workers 0",
    "sample": "--num_inference_steps 1",
}


def commands() -> list[list[str]]:
    """The commands of the page's bash blocks, as a shell splits them."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


def smaller(argv: list[str], places: dict[str, str]) -> list[str]:
    """A command with small values, and with local folders in the place of names."""
    argv = [places.get(word, word) for word in argv]
    for number, word in enumerate(argv[:-1]):
        if word == "--max_train_steps":
            argv[number + 1] = STEPS[argv[number + 1]]
        elif word in SMALLER:
            argv[number + 1] = SMALLER[word]
    return argv


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch, encoder_checkpoint, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("teapot", "kettle"):
        (tmp_path / "my-images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my-images" / name / f"{number}.png")
    tiny_vae("kl").save_pretrained(tmp_path / "vae")
    # With qk-norm the number of heads shows in the file.
    saved(tmp_path, official_state(qk_norm=8), "SiT-XL-2-256x256.pt")
    places = {"stabilityai/sd-vae-ft-ema": "vae", "facebook/dinov2-base": str(encoder_checkpoint("dinov2"))}

    for program, command, *argv in commands():
        assert program == "vrpo"
        argv = [*smaller(argv, places), *QUICK.get(command, "").split()]
        if command == "train":
            run(argv)
        else:
            cli.main([command, *argv])
    text = capsys.readouterr().out
    assert text.count("epochs of 6 images") == 2 and "RTX-4090-24GB" in text
    for folder in ("my-sit-xl", "my-sit-s"):
        assert VRPOPipeline.from_pretrained(tmp_path / folder).labels.keys() == {"kettle", "teapot"}
    starts = (tmp_path / "my-sit-xl" / "starts.jsonl").read_text().splitlines()
    assert json.loads(starts[-1])["changed"] == {"learning_rate": [1e-4, 3e-5]}
    assert len(list((tmp_path / "samples").glob("**/*.png"))) == 2
