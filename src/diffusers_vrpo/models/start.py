# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The transformer that a training starts with: fresh from a preset, or from a checkpoint, fitted to the data."""

import inspect
import json
import logging
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import is_peft_available

from ..errors import InputError, first_line
from .official_checkpoints import convert_checkpoint, pipeline_index
from .transformer_sit import SiTTransformer2DModel, sit_preset


logger = logging.getLogger(__name__)
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def alignment_layers(layer_scope: str, num_layers: int) -> list[int]:
    """The blocks, counted from 1, that `layer_scope` means: `early` (8 of 28), `mid`, `all`, or a list as `4,8`.

    Raises:
        InputError: for another word or a block that the model does not have.
    """
    named = {
        "early": [math.ceil(num_layers * 2 / 7)],
        "mid": [max(1, num_layers // 2)],
        "all": list(range(1, num_layers + 1)),
    }
    if layer_scope in named:
        return named[layer_scope]
    try:
        layers = sorted({int(part) for part in layer_scope.split(",")})
    except ValueError:
        layers = []
    if not layers or layers[0] < 1 or layers[-1] > num_layers:
        raise InputError(
            "layer_scope",
            f"`layer_scope` {layer_scope!r} is neither early, mid, all nor a list such as 4,8 of blocks between 1 and "
            f"{num_layers}",
        )
    return layers


def transformer_config(preset: str | None, model_config: str | None) -> dict:
    """Constructor arguments of a fresh transformer, from `preset` or the file of `model_config`.

    Raises:
        InputError: for an unknown preset, a file that cannot be read, an argument that the model does not have.
    """
    if model_config is None:
        try:
            return sit_preset(preset or "SiT-B/2")
        except ValueError as error:
            raise InputError("preset", f"`preset`: {error}") from error
    try:
        config = json.loads(Path(model_config).read_text())
        if not isinstance(config, dict):
            raise ValueError("it must map argument names to values")
    except (OSError, ValueError) as error:
        raise InputError("model_config", f"`model_config` {model_config} cannot be read as JSON: {error}") from error
    config = public_config(config)
    known = inspect.signature(SiTTransformer2DModel).parameters
    if unknown := [key for key in config if key not in known]:
        raise InputError(
            "model_config", f"`model_config` {model_config} has {unknown[0]!r}, which is none of {', '.join(known)}"
        )
    return config


@dataclass
class Start:
    """What a training starts from: constructor arguments, and with `pretrained_model_name_or_path` weights."""

    config: dict
    source: SiTTransformer2DModel | None = None
    labels: dict | None = None  # class names of the pipeline that the weights are from; keys are strings
    on_hub: bool = (
        False  # the weights are from a pipeline on the Hub that `VRPOPipeline.from_pretrained` opens as they are
    )


def read_start(args) -> Start:
    """The start that `preset`, `model_config`, `pretrained_model_name_or_path` and `prediction_type` mean.

    Raises:
        InputError: when there is none, or options contradict it.
    """
    name = args.pretrained_model_name_or_path
    if args.lora_rank is not None and not name:
        raise InputError("lora_rank", "`lora_rank` adapts trained weights; it needs `pretrained_model_name_or_path`")
    if args.lora_rank is not None and not is_peft_available():
        raise InputError("lora_rank", "`lora_rank` needs peft: pip install 'diffusers-vrpo[lora]'")
    if name is None:
        start = Start(transformer_config(args.preset, args.model_config))
    else:
        try:
            source = convert_checkpoint(name, preset=args.preset, cache_dir=args.cache_dir)
        except InputError as error:
            raise InputError("pretrained_model_name_or_path", f"`pretrained_model_name_or_path` {error}") from error
        index = pipeline_index(name, args.cache_dir) or {}
        ours = index.get("transformer", [None, None])[1] == "SiTTransformer2DModel"
        on_hub = ours and not Path(name).exists()
        start = Start(public_config(source.config), source, index.get("id2label"), on_hub)
    choose_prediction(start.config, args.prediction_type, args.learn_sigma, name)
    patch_size = start.config.setdefault("patch_size", 2)
    if not isinstance(patch_size, int) or patch_size < 1:
        raise InputError(
            "model_config",
            f"`model_config` {args.model_config}: patch_size must be a whole number above 0, not {patch_size}",
        )
    return start


def build_transformer(
    args, start: Start, latent_shape: tuple, num_classes: int, id2label: dict | None, alignment_dims: list[int]
) -> SiTTransformer2DModel:
    """The transformer to train, fitted to the data and the encoders, with adapters if `lora_rank` asks for them.

    Its `adapters_suffice` says whether the adapters alone, on the base from the Hub, are the whole result.

    Args:
        latent_shape: channels, height and width.
        alignment_dims: widths of the encoders' patch embeddings; none trains without projectors.

    Raises:
        InputError: when weights and data do not fit, or the configuration makes no model.
    """
    config, source, name = dict(start.config), start.source, args.pretrained_model_name_or_path
    channels, height, width = latent_shape
    if source is not None and channels != config["in_channels"]:
        raise InputError(
            "vae", f"`vae` {args.vae} gives {channels} channels, but {name} takes {config['in_channels']}"
        )
    same_classes = source is not None and config["num_classes"] == num_classes
    difference = f"{num_classes} here, {start.config.get('num_classes')} there"
    if same_classes and start.labels and id2label and not args.keep_labels:
        for key, label in id2label.items():
            old = str(start.labels.get(str(key)))
            if old.strip().lower() != label.strip().lower():
                same_classes, difference = False, f"{key} is {label!r} here, {old!r} there; `keep_labels` keeps it"
                break
    if args.keep_labels and not same_classes:
        raise InputError(
            "keep_labels",
            f"`keep_labels`: {name or 'a fresh model'} does not have the {num_classes} classes of the data",
        )
    if source is not None and source.null_class_id is not None:
        config["null_class_id"] = source.null_class_id if same_classes else num_classes
    label_dropout = args.label_dropout if args.label_dropout is not None else config.get("class_dropout_prob", 0.1)
    config |= {"sample_size": height if height == width else (height, width), "in_channels": channels}
    config |= {"num_classes": num_classes, "class_dropout_prob": label_dropout}
    config |= {"alignment_layers": [], "alignment_dims": alignment_dims}
    if alignment_dims:
        config["alignment_layers"] = alignment_layers(args.layer_scope, config.get("num_layers", 12))
        config |= {"projector_type": args.projector, "projector_dim": args.projector_dim}
    try:
        model, notes = fit_transformer(config, source, same_classes)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        option = f"`model_config` {args.model_config}" if args.model_config else f"`preset` {args.preset}"
        raise InputError(
            "model_config" if args.model_config else "preset", f"{name or option}: {first_line(error)}"
        ) from error
    if source is not None and not same_classes:
        notes.append(f"the classes differ ({difference}): the label table starts anew, but for the row of no class")
    if source is not None:
        notes.append(f"predicts {model.config.prediction_type}, time {model.config.time_direction}")
    for note in notes:
        logger.info(f"{name}: {note}")
    if args.lora_rank:
        add_lora(model, args.lora_rank, train_labels=not same_classes)
    # Where labels, the row of no class and positions are the base's, and others can have that.
    same_null_class = source is not None and model.null_class_id == source.null_class_id
    same_positions = source is not None and model.grid_size == source.grid_size
    model.adapters_suffice = bool(
        args.lora_rank and start.on_hub and same_classes and same_null_class and same_positions
    )
    return model


def public_config(config: dict) -> dict:
    """Constructor arguments alone, without what diffusers adds (`_class_name`, ...)."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def choose_prediction(config: dict, prediction_type: str | None, learn_sigma: bool | None, pretrained: str | None):
    """Puts `prediction_type` and `learn_sigma` into a config, where they are given.

    Raises:
        InputError: when weights to start from were trained otherwise, or the velocity is to have a learned variance.
    """
    for name, value, default in (
        ("prediction_type", prediction_type, "velocity"),
        ("learn_sigma", learn_sigma, False),
    ):
        if value is not None and pretrained and config.get(name, default) != value:
            asked = f"`{name}`" + ("" if value is True else " off" if value is False else f" {value}")
            raise InputError(
                name, f"{asked}: {pretrained} was trained with {name} {config.get(name, default)}; leave it out"
            )
        if value is not None:
            config[name] = value
    if prediction_type == "velocity" and not pretrained:
        config["learn_sigma"] = False  # a DiT preset's variance has no loss here
    if learn_sigma and config.get("prediction_type", "velocity") != "epsilon":
        raise InputError(
            "learn_sigma", "`learn_sigma` trains a diffusion's variance; it needs `prediction_type` epsilon"
        )


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
        elif model.null_class_id is not None:
            notes.append("its label table had no row for no class: a new one starts for `label_dropout`")
    if model.config.alignment_layers and not same_projectors:
        notes.append("the projectors start anew")
    if model.grid_size != pretrained.grid_size:
        notes.append(f"the grid of tokens is {model.grid_size}, trained was {pretrained.grid_size}: new positions")
    return model, notes


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


def weights_checksum(parameters: Iterable[torch.Tensor]) -> int:
    """CRC-32 of weights, as float32."""
    checksum = 0
    for parameter in parameters:
        checksum = zlib.crc32(parameter.detach().float().cpu().contiguous().numpy(), checksum)
    return checksum
