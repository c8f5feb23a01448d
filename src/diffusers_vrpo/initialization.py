# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The transformer that a training starts with: fresh from a preset, or from a checkpoint, fitted to the data."""

import inspect
import json
import zlib
from pathlib import Path

import torch
from diffusers.utils import is_peft_available

from .conversion import convert_checkpoint, pipeline_index
from .errors import InputError, first_line
from .transformer_sit import SiTTransformer2DModel, sit_preset


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def transformer_config(preset: str | None, model_config: str | None) -> dict:
    """Constructor arguments of a fresh transformer, from `--preset` or the file of `--model_config`.

    Raises:
        InputError: for an unknown preset, a file that cannot be read, an argument that the model does not have.
    """
    if model_config is None:
        try:
            return sit_preset(preset or "SiT-B/2")
        except ValueError as error:
            raise InputError(f"--preset: {error}") from error
    try:
        config = json.loads(Path(model_config).read_text())
        if not isinstance(config, dict):
            raise ValueError("it must map argument names to values")
    except (OSError, ValueError) as error:
        raise InputError(f"--model_config {model_config} cannot be read as JSON: {error}") from error
    config = public_config(config)
    known = inspect.signature(SiTTransformer2DModel).parameters
    if unknown := [key for key in config if key not in known]:
        raise InputError(f"--model_config {model_config} has {unknown[0]!r}, which is none of {', '.join(known)}")
    return config


def load_pretrained(
    name_or_path: str, preset: str | None, cache_dir: str | None
) -> tuple[SiTTransformer2DModel, dict | None]:
    """The transformer of `--pretrained_model_name_or_path`, and its pipeline's class names (keys are strings) or None.

    Raises:
        InputError: when there is none, or it cannot be converted.
    """
    try:
        transformer = convert_checkpoint(name_or_path, preset=preset, cache_dir=cache_dir)
    except InputError as error:
        raise InputError(f"--pretrained_model_name_or_path {error}") from error
    return transformer, (pipeline_index(name_or_path, cache_dir) or {}).get("id2label")


def public_config(config: dict) -> dict:
    """Constructor arguments alone, without what diffusers adds (`_class_name`, ...)."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def choose_prediction(config: dict, prediction_type: str | None, learn_sigma: bool | None, pretrained: str | None):
    """Puts `--prediction_type` and `--learn_sigma` into a config, where they are given.

    Raises:
        InputError: when weights to start from were trained otherwise, or the velocity is to have a learned variance.
    """
    for name, value, default in (
        ("prediction_type", prediction_type, "velocity"),
        ("learn_sigma", learn_sigma, False),
    ):
        if value is not None and pretrained and config.get(name, default) != value:
            raise InputError(
                f"--{name} {value}: {pretrained} was trained with {config.get(name, default)}; leave it out"
            )
        if value is not None:
            config[name] = value
    if learn_sigma and config.get("prediction_type", "velocity") != "epsilon":
        raise InputError("--learn_sigma trains a diffusion's variance; it needs --prediction_type epsilon")


def fit_transformer(
    config: dict, pretrained: SiTTransformer2DModel | None, same_classes: bool = True
) -> tuple[SiTTransformer2DModel, list[str]]:
    """A transformer of `config`, with the weights of `pretrained` wherever they mean the same.

    The label table keeps its rows where the classes are the same, and the row for "no class" in any case; projectors are
    kept where block, width and kind are; everything else is copied.

    Returns:
        the model, and a sentence for the log about each part that starts anew.
    """
    model = SiTTransformer2DModel(**config)
    if pretrained is None:
        return model, []
    notes = []
    old, state = pretrained.state_dict(), model.state_dict()

    def projector_keys(c):
        return [list(c.alignment_layers), list(c.alignment_dims), c.projector_type, c.projector_dim]

    same_projectors = projector_keys(model.config) == projector_keys(pretrained.config)
    with torch.no_grad():
        for name, tensor in state.items():
            if name != "label_embedding.weight" and (same_projectors or not name.startswith("projectors.")):
                tensor.copy_(old[name])
        labels, old_labels = state["label_embedding.weight"], old["label_embedding.weight"]
        if same_classes:
            labels[: config["num_classes"]] = old_labels[: config["num_classes"]]
        if model.null_class_id is not None and pretrained.null_class_id is not None:
            labels[model.null_class_id] = old_labels[pretrained.null_class_id]
    if not same_classes:
        notes.append(
            f"the classes differ ({config['num_classes']} here, {pretrained.config.num_classes} there): the label table "
            "starts anew, but for the row of no class"
        )
    if model.config.alignment_layers and not same_projectors:
        notes.append("the projectors start anew")
    if model.grid_size != pretrained.grid_size:
        notes.append(f"the grid of tokens is {model.grid_size}, trained was {pretrained.grid_size}: new positions")
    return model, notes


def check_lora(lora_rank: int | None, pretrained: str | None):
    """Raises an InputError where `--lora_rank` cannot work."""
    if lora_rank is not None and not pretrained:
        raise InputError("--lora_rank adapts trained weights; it needs --pretrained_model_name_or_path")
    if lora_rank is not None and not is_peft_available():
        raise InputError("--lora_rank needs peft: pip install 'diffusers-vrpo[lora]'")


def add_lora(model: SiTTransformer2DModel, rank: int, train_labels: bool):
    """Freezes the model but for low-rank adapters (arXiv 2106.09685) of its blocks and the projectors.

    Args:
        rank: of the adapters on the attention and feed-forward layers; their scale is 1.
        train_labels: also train the label table, where it starts anew.
    """
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
    model.projectors.requires_grad_(True)
    model.label_embedding.requires_grad_(train_labels)


def frozen_checksum(model: torch.nn.Module) -> int:
    """CRC-32 of the weights that are not trained: adapters continue on the same ones only."""
    checksum = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            checksum = zlib.crc32(parameter.detach().cpu().contiguous().numpy(), checksum)
    return checksum


def build_error(args, error: Exception) -> InputError:
    """What the model's constructor had against the configuration, by the option that it came from."""
    option = f"--model_config {args.model_config}" if args.model_config else f"--preset {args.preset}"
    return InputError(f"{option}: {first_line(error)}")
