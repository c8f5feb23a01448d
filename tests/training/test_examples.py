# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The programs in `examples/` run to their end at the smallest size, and README has the six lines of one of them."""

import importlib.util
import json
import re
import socket
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

from support.data import write_files
from support.paths import ROOT


MARK = "  # alignment"


def example(name: str):
    """The module of `examples/NAME.py`."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments):
    module = example(name)
    module.main(module.parse_args([str(argument) for argument in arguments]))


def source_lines(name: str) -> list[str]:
    return (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_listed(path):
    assert len(source_lines(path.name)) <= 200
    assert path.name in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


# Diffusers' own DiT


def test_readme_has_the_six_lines_of_the_example():
    marked = [line.strip().removesuffix(MARK) for line in source_lines("train_dit_alignment.py") if MARK in line]
    changed = [
        line.strip()
        for line in source_lines("train_dit_alignment.py")
        if "prediction, projections = " in line or "loss = mse.mean()" in line
    ]
    (block,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    added = [line[1:].strip() for line in block.splitlines() if line.startswith("+")]

    assert len(marked) == 6 and len(changed) == 2
    assert [line for line in added if line not in changed and "import" not in line] == marked
    assert [line for line in added if line in changed] == changed
    assert len(re.findall(r"^-", block, re.M)) == len(changed)


def test_dit_on_digits(tmp_path):
    size = ("--num_layers", 2, "--num_attention_heads", 1, "--train_batch_size", 4, "--num_inference_steps", 2)
    run("train_dit_alignment", *size, "--max_train_steps", 2, "--output_dir", tmp_path)
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert all(parameter.isfinite().all() for parameter in transformer.parameters())
    with Image.open(tmp_path / "samples.png") as samples:
        assert samples.size == (520, 208)


def test_dit_on_a_folder_of_parquet_files(tmp_path):
    size = ("--num_layers", 1, "--layer", 1, "--num_attention_heads", 1, "--patch_size", 4, "--num_inference_steps", 1)
    data = ("--dataset_name", write_files(tmp_path / "images", rows=16, files=1), "--resolution", 16, "--random_flip")
    steps = ("--max_train_steps", 2, "--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    run("train_dit_alignment", *size, *data, *steps, "--objective", "repa", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "samples.png").is_file()


# PixArt

PIXART = ("--num_layers", 2, "--num_inference_steps", 1)
TWO_STEPS = ("--train_batch_size", 4, "--max_train_steps", 2)


def test_text_to_image_with_names_of_classes(tmp_path):
    run("train_text_to_image_alignment", *PIXART, *TWO_STEPS, "--output_dir", tmp_path)
    assert PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer").config.num_layers == 2
    with Image.open(tmp_path / "samples.png") as samples:
        assert samples.size == (520, 208)


def test_text_to_image_with_captions_and_lora(tmp_path):
    data = ("--dataset_name", write_files(tmp_path / "images", rows=10, files=1), "--caption_column", "note")
    prompts = ("--validation_prompts", "row 1", "another row")
    options = ("--lora_rank", 2, "--objective", "repa", "--output_dir", tmp_path / "out")
    run("train_text_to_image_alignment", *PIXART, *TWO_STEPS, *data, *prompts, *options)
    state = load_file(tmp_path / "out" / "lora" / "adapter_model.safetensors")
    # The second halves of adapters are zero before the first step.
    first, second = (
        torch.stack(
            [
                tensor.abs().max()
                for name, tensor in state.items()
                if f"transformer_blocks.{block}." in name and "lora_B" in name
            ]
        )
        for block in (0, 1)
    )
    assert (first > 0).all() and (second > 0).all()
    assert not (tmp_path / "out" / "transformer").exists()


def sd3_example() -> ModuleType:
    """The example for PixArt with the changes of `examples/README.md` for SD3."""
    (block,) = re.findall(
        r"^```diff\n(.*?)^```", (ROOT / "examples" / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    source = (ROOT / "examples" / "train_text_to_image_alignment.py").read_text(encoding="utf-8")
    for change in block.split("\n\n"):
        removed, added = (
            "".join(line[1:] + "\n" for line in change.splitlines() if line.startswith(sign)) for sign in "-+"
        )
        assert source.count(removed) == 1, removed
        source = source.replace(removed, added)
    module = ModuleType("sd3")
    exec(compile(source, "the example for SD3", "exec"), module.__dict__)
    return module


def test_text_to_image_with_sd3(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    module = sd3_example()
    module.main(module.parse_args([str(value) for value in (*PIXART, *TWO_STEPS, "--output_dir", tmp_path)]))
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    assert all(parameter.isfinite().all() for parameter in transformer.parameters())


# Rewards and encoders of one's own


@pytest.fixture
def no_curves(monkeypatch):
    """Curves take most of a short run's time; those of the notebook are drawn."""
    monkeypatch.setattr("diffusers_vrpo.trainer.plot_metrics", lambda *arguments: None)


SHORT = ("--train_batch_size", 4, "--max_train_steps", 2, "--projector_dim", 16, "--num_inference_steps", 1)


@pytest.mark.slow
def test_custom_reward(tmp_path, capsys, no_curves):
    run("custom_reward", *SHORT, "--output_dir", tmp_path / "run")
    printed = re.findall(r"^(\S+): (\S+) at the start", capsys.readouterr().out, re.M)
    assert [name for name, _ in printed] == ["reward/contrast", "share/contrast", "reward/edges", "image_share/edges"]
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_contrast_is_a_reward_of_tokens_and_of_groups():
    contrast = example("custom_reward").contrast
    y = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    reward = contrast(torch.stack([y, -y]), y, y, None)
    assert reward.shape == (2, 2, 5)
    assert torch.allclose(reward[0], contrast(y, y, y, None)) and (reward[0] > reward[1]).all()


@pytest.mark.slow
def test_custom_encoder(tmp_path, no_curves):
    weights = tmp_path / "encoder.safetensors"
    encoder = ("--encoder_steps", 2, "--encoder_dim", 8, "--encoder_weights", weights)
    run("custom_encoder", *SHORT, *encoder, "--output_dir", tmp_path / "run")
    network = example("custom_encoder").PatchNetwork(8, patch_size=2)
    network.load_state_dict(load_file(weights))
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 16, network.embed_dim)
    assert (tmp_path / "run" / "model_index.json").is_file()


# The notebook


@pytest.mark.slow
def test_the_notebook_runs_without_a_network(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the notebook needs a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    notebook = json.loads((ROOT / "examples" / "digits.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    parameters = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert parameters == cells[:1]

    names = {"__name__": "notebook"}
    exec("".join(parameters[0]["source"]), names)
    names |= {"max_train_steps": 2, "num_samples": 20}
    for number, cell in enumerate(cells[1:], 1):
        source = "".join(cell["source"]).replace("num_inference_steps=25", "num_inference_steps=1")
        source = source.replace("train_batch_size=32", "train_batch_size=4")
        exec(compile(source, f"cell {number} of digits.ipynb", "exec"), names)
    assert names["images"][0].size == (8, 8)
    assert 0 < names["distances"]["training"] < names["distances"]["samples"]
