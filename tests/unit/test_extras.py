# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Which commands run without the extras of pyproject.toml, and what the others say."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.command_line import EXTRAS
from diffusers_vrpo.models.official_checkpoints import default_scheduler
from support.models import tiny_model
from support.paths import ROOT
from support.processes import no_network_environment


# Runs commands one after another where the packages of all extras, and what only they bring, cannot be imported.
WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys({hidden}))
from diffusers_vrpo.cli import main
for line in {lines}:
    try:
        main(line.split())
        print("ran", line)
    except SystemExit as end:
        print("ended", line, "|", end.code)
"""
RUN = [
    "convert model model.pt --to sit",
    "convert model.pt converted --num_attention_heads 2 --format sit",
    "sample converted --num_images 8 --num_inference_steps 1 --output_dir samples",
    "evaluate samples --reference images --inception_weights inception.safetensors --metrics fid "
    "--dataloader_num_workers 0 --reference_cache cache --output_file fid.json",
]
REFUSED = {
    "evaluate samples --reference images --encoder some/model --metrics fid": ("transformers", "train"),
    "evaluate samples --reference images --plot_file a.png": ("matplotlib", "train"),
    "evaluate samples --reference some/data": ("datasets", "train"),
    "report run": ("matplotlib", "train"),
    "train --config digits": ("datasets", "train"),
    "app model": ("gradio", "app"),
}


def test_the_table_is_that_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    for extra, packages in EXTRAS.items():
        listed = re.search(rf"^{extra} = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)[1]
        names = {re.match(r"[\w-]+", entry)[0] for entry in re.findall(r'"(.*?)"', listed)}
        # Tables of `datasets` are pyarrow's; the Hub's own libraries bring the other two.
        assert names - {"pyyaml", "tqdm"} == {name.replace("sklearn", "scikit-learn") for name in packages} - {
            "pyarrow"
        }


@pytest.mark.slow
def test_what_runs_without_extras(inception_weights, tmp_path):
    model = tiny_model(in_channels=3, num_attention_heads=2)
    VRPOPipeline(model, default_scheduler("velocity"), None).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    save_file(inception_weights, tmp_path / "inception.safetensors")
    hidden = [package for packages in EXTRAS.values() for package in packages] + ["scipy", "pandas"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS.format(hidden=hidden, lines=[*RUN, *REFUSED])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=no_network_environment(),
    )
    lines = done.stdout.splitlines()
    assert [f"ran {line}" for line in RUN] == [line for line in lines if line.startswith("ran")], done.stderr[-3000:]
    for line, (package, extra) in REFUSED.items():
        name = line.split()[0]
        assert (
            f"ended {line} | vrpo {name}: error: {package} is needed but not installed; run: "
            f"pip install 'diffusers-vrpo[{extra}]'"
        ) in lines
