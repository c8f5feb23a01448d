# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The transformer that a run starts with: a new one from a preset, or one from a checkpoint, adapted to the data."""

import contextlib
import inspect
import json
import logging
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.utils import is_peft_available

from ..errors import InputError, first_line
from ..reach import offline_if_out_of_reach
from ..schemas import argument_problem
from .official_checkpoints import SavedProjectors, convert_with_projectors, pipeline_index
from .transformer_sit import REMOVED_ARGUMENTS, RMS_NORM, SiTTransformer2DModel, check_sizes, sit_preset


logger = logging.getLogger(__name__)
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def transformer_config(preset: str | None, model_config: str | None) -> dict:
    """Constructor arguments of a new transformer, from `preset` (SiT-B/2 by default) or the file `model_config`.

    Raises:
        InputError: if the preset or an argument is unknown, or the file cannot be read.
    """
    if model_config is None:
        try:
            return sit_preset(preset or "SiT-B/2")
        except ValueError as error:
            raise InputError("preset", f"`preset`: {error}") from error
    try:
        if Path(model_config).exists() and not Path(model_config).is_file():  # reading a pipe would block
            raise OSError("it is not a file")
        config = json.loads(Path(model_config).read_text())
        if not isinstance(config, dict):
            raise ValueError("it must map argument names to values")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("model_config", f"`model_config` {model_config} cannot be read as JSON: {error}") from error
    config = {name: value for name, value in public_config(config).items() if name not in REMOVED_ARGUMENTS}
    known = inspect.signature(SiTTransformer2DModel).parameters
    if unknown := [key for key in config if key not in known]:
        raise InputError(
            "model_config", f"`model_config` {model_config} has {unknown[0]!r}, which is not one of {', '.join(known)}"
        )
    # `qk_norm` is a truth value or a name, which the constructor checks.
    defaults = {name: known[name].default for name in config if name != "qk_norm"}
    if problem := argument_problem(config, defaults):
        raise InputError("model_config", f"`model_config` {model_config}: {problem}")
    try:
        check_sizes(**config)
    except ValueError as error:
        raise InputError("model_config", f"`model_config` {model_config}: {error}") from error
    return config


@dataclass
class Start:
    """The start of a run: constructor arguments, and what was read from `pretrained_model_name_or_path`."""

    config: dict
    source: SiTTransformer2DModel | None = None
    projectors: SavedProjectors | None = None  # the projectors saved with these weights
    labels: dict | None = None  # class names of the pipeline that the weights are from; keys are strings
    trained_labels: list[int] | None = None  # the ids of its classes that had images, if some classes had none
    on_hub: bool = (
        False  # the weights are from a pipeline on the Hub that `VRPOPipeline.from_pretrained` opens as they are
    )


def read_start(args) -> Start:
    """Reads the start that the options `preset`, `model_config`, `pretrained_model_name_or_path` and so on describe.

    Raises:
        InputError: if weights do not exist, or options contradict them or each other.
    """
    name = args.pretrained_model_name_or_path
    if args.lora_rank is not None and not name:
        raise InputError("lora_rank", "`lora_rank` adapts trained weights; it needs `pretrained_model_name_or_path`")
    check_peft(args.lora_rank)
    if name is None:
        start = Start(transformer_config(args.preset, args.model_config))
    else:
        with offline_if_out_of_reach(name):
            try:
                source, projectors = convert_with_projectors(name, preset=args.preset, cache_dir=args.cache_dir)
            except InputError as error:
                raise InputError(
                    "pretrained_model_name_or_path", f"`pretrained_model_name_or_path` {error}"
                ) from error
            width = source.config.num_attention_heads * source.config.attention_head_dim
            check_lora_rank(args.lora_rank, name, width)
            index = pipeline_index(name, args.cache_dir) or {}
        ours = index.get("transformer", [None, None])[1] == "SiTTransformer2DModel"
        on_hub = ours and not Path(name).exists()
        labels, trained_labels = index.get("id2label"), index.get("trained_labels")
        start = Start(public_config(source.config), source, projectors, labels, trained_labels, on_hub)
    choose_prediction(start.config, args.prediction_type, args.learn_sigma, name)
    if args.qk_norm:
        choose_qk_norm(start.config, name, args.model_config)
    patch_size = start.config.setdefault("patch_size", 2)
    if not isinstance(patch_size, int) or patch_size < 1:
        raise InputError(
            "model_config",
            f"`model_config` {args.model_config}: patch_size must be a whole number above 0, not {patch_size}",
        )
    return start


def check_peft(rank: int | None):
    """Checks that peft is installed if a rank is given.

    Raises:
        InputError: if it is not.
    """
    if rank is not None and not is_peft_available():
        raise InputError("lora_rank", "`lora_rank` needs peft: pip install 'diffusers-vrpo[lora]'")


def check_lora_rank(rank: int | None, name: str, width: int):
    """Checks that the rank of the adapters is possible for the layers that they adapt.

    Args:
        rank: the rank; None without adapters.
        name: the name of the starting weights.
        width: the width of their transformer.

    Raises:
        InputError: if the rank is above the width.
    """
    if rank is not None and rank > width:
        raise InputError(
            "lora_rank",
            f"`lora_rank` {rank} must be at most {width}, the width of the layers of {name}; usual ranks are 4 to 128",
        )


def build_transformer(
    args, start: Start, latent_shape: tuple, num_classes: int, id2label: dict | None, draw: bool = True
) -> tuple[SiTTransformer2DModel, str | None]:
    """Builds the transformer to train, adapted to the data; `load_start` then loads the starting weights.

    Args:
        args: the options of the run.
        start: as `read_start` returns it.
        latent_shape: channels, height and width.
        num_classes: the number of classes of the data.
        id2label: their names, if they have any.
        draw: draw its weights from torch's generator; otherwise the caller must initialise them.

    Returns:
        the transformer; and a description of the difference between the classes of the starting weights and those of
        the data, or None if they are the same.

    Raises:
        InputError: if the weights do not match the data, or the configuration is not valid for the model.
    """
    config, source, name = dict(start.config), start.source, args.pretrained_model_name_or_path
    channels, height, width = latent_shape
    if source is not None and channels != config["in_channels"]:
        raise InputError(
            "vae", f"`vae` {args.vae} gives {channels} channels, but {name} takes {config['in_channels']}"
        )
    difference = None
    if source is None or config["num_classes"] != num_classes:
        difference = f"{num_classes} here, {start.config.get('num_classes')} there"
    elif start.labels and id2label and not args.keep_labels:
        for key, label in id2label.items():
            old = str(start.labels.get(str(key)))
            if old.strip().lower() != label.strip().lower():
                difference = f"{key} is {label!r} here, {old!r} there; `keep_labels` keeps it"
                break
    if source is not None and config["num_classes"] == num_classes:
        check_class_order(start.labels, id2label, args.keep_labels, name)
    if args.keep_labels and difference:
        raise InputError(
            "keep_labels",
            f"`keep_labels`: {name or 'a fresh model'} does not have the {num_classes} classes of the data",
        )
    if source is not None and source.null_class_id is not None:
        config["null_class_id"] = num_classes if difference else source.null_class_id
    label_dropout = args.label_dropout if args.label_dropout is not None else config.get("class_dropout_prob", 0.1)
    config |= {"sample_size": height if height == width else (height, width), "in_channels": channels}
    config |= {"num_classes": num_classes, "class_dropout_prob": label_dropout}
    try:
        with contextlib.nullcontext() if draw else init_empty_weights():
            transformer = SiTTransformer2DModel(**config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        option = f"`model_config` {args.model_config}" if args.model_config else f"`preset` {args.preset}"
        raise InputError(
            "model_config" if args.model_config else "preset", f"{name or option}: {first_line(error)}"
        ) from error
    if not draw:
        transformer._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    return transformer, difference


def check_class_order(labels: dict | None, id2label: dict | None, keep_labels: bool, name: str):
    """Checks that rows of the label table are not kept for other classes.

    Args:
        labels: the class names of the starting weights, if they have any; keys are strings.
        id2label: the class names of the data, if they have any.
        keep_labels: whether rows are kept although the names differ.
        name: the name of the starting weights.

    Raises:
        InputError: if the data have the same classes in another order.
    """
    if not id2label:
        return
    ours = [id2label[label].strip().lower() for label in range(len(id2label))]
    if labels:
        theirs = [str(labels.get(str(label))).strip().lower() for label in range(len(ours))]
        permuted = keep_labels and theirs != ours and sorted(theirs) == sorted(ours)
    else:
        # The classes of weights without names are numbers, and so are those of folders that are called 0, 1, 2, ...
        theirs = [str(label) for label in range(len(ours))]
        numbers = [str(int(text)) if text.isascii() and text.isdigit() else text for text in ours]
        permuted = numbers != theirs and sorted(numbers) == sorted(theirs)
    if permuted:
        label = next(label for label in range(len(ours)) if ours[label] != theirs[label])
        raise InputError(
            "pretrained_model_name_or_path",
            f"`pretrained_model_name_or_path` {name} has the classes of the data in another order (class {label} is "
            f"{id2label[label]!r} here, {theirs[label]!r} there), so its class embeddings would be those of "
            "other classes; order the classes of the data as in the weights",
        )


def load_start(transformer: SiTTransformer2DModel, args, start: Start, difference: str | None):
    """Loads the starting weights into a transformer of `build_transformer`, and adds its adapters.

    It sets two attributes of the transformer: `adapters_suffice`, whether the adapters together with the base on the
    Hub are the whole result; and `learned_labels`, the ids of the classes whose rows of the label table come from the
    starting weights and had images there.

    Args:
        difference: the difference between the classes, as `build_transformer` returns it.

    Raises:
        InputError: if the weights do not fit the transformer.
    """
    source, name = start.source, args.pretrained_model_name_or_path
    if source is not None:
        try:
            notes = fit_transformer(transformer, source, difference is None)
        except (ValueError, RuntimeError) as error:
            raise InputError("pretrained_model_name_or_path", f"{name}: {first_line(error)}") from error
        if difference:
            notes.append(
                f"the classes differ ({difference}): their embeddings start from new random weights, except the null class's"
            )
        config = transformer.config
        notes.append(f"prediction_type {config.prediction_type}, time_direction {config.time_direction}")
        for note in notes:
            logger.info(f"{name}: {note}")
    if args.lora_rank:
        settings = (args.lora_alpha, args.lora_dropout, args.lora_target)
        add_lora(transformer, args.lora_rank, difference is not None, *settings)
    keeps_rows = source is not None and difference is None
    transformer.learned_labels = []
    if keeps_rows:
        all_labels = range(source.config.num_classes)
        known = all_labels if start.trained_labels is None else start.trained_labels
        transformer.learned_labels = [label for label in all_labels if label in known]
    # The adapters suffice if labels, the null class and positions are those of the base, and the base is on the Hub.
    same_null_class = source is not None and transformer.null_class_id == source.null_class_id
    same_positions = source is not None and transformer.grid_size == source.grid_size
    transformer.adapters_suffice = bool(
        args.lora_rank and start.on_hub and keeps_rows and same_null_class and same_positions
    )


def public_config(config: dict) -> dict:
    """The constructor arguments in a config, without the entries that diffusers adds (`_class_name`, `auto_map`, ...)."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "auto_map"}


def choose_prediction(config: dict, prediction_type: str | None, learn_sigma: bool | None, pretrained: str | None):
    """Writes `prediction_type` and `learn_sigma` into a config, if they are given.

    Raises:
        InputError: if they contradict the starting weights, or `learn_sigma` is combined with velocities.
    """
    for name, value, default in (
        ("prediction_type", prediction_type, "velocity"),
        ("learn_sigma", learn_sigma, False),
    ):
        if value is not None and pretrained and config.get(name, default) != value:
            asked = f"`{name}`" + ("" if value is True else " off" if value is False else f" {value}")
            raise InputError(
                name, f"{asked}: {pretrained} was trained with {name} {config.get(name, default)}; remove it"
            )
        if value is not None:
            config[name] = value
    if prediction_type == "velocity" and not pretrained:
        config["learn_sigma"] = False  # velocities have no loss for the variance of a DiT preset
    if learn_sigma and config.get("prediction_type", "velocity") != "epsilon":
        raise InputError(
            "learn_sigma", "`learn_sigma` trains a diffusion's variance; it needs `prediction_type` epsilon"
        )


def choose_qk_norm(config: dict, pretrained: str | None, model_config: str | None):
    """Writes the RMSNorm of queries and keys into a config.

    Raises:
        InputError: if the starting weights were trained without it, or the file of arguments has another `qk_norm`.
    """
    found = config.get("qk_norm", RMS_NORM)
    if pretrained and found != RMS_NORM:
        norm = "LayerNorm on" if found else "a norm of"
        without = "with a" if found else "without"
        raise InputError(
            "qk_norm", f"`qk_norm`: {pretrained} was trained {without} {norm} queries and keys; remove it"
        )
    if found != RMS_NORM:
        raise InputError(
            "qk_norm",
            f"`qk_norm` cannot be combined with qk_norm {json.dumps(found)} in `model_config` {model_config}",
        )
    config["qk_norm"] = RMS_NORM


def fit_transformer(
    transformer: SiTTransformer2DModel, pretrained: SiTTransformer2DModel, same_classes: bool = True
) -> list[str]:
    """Copies the weights of `pretrained` that have the same meaning.

    The rows of the label table are copied if the classes are the same, the row of the null class always; all other
    weights are copied, too.

    Returns:
        a sentence for the log about each part that is not from `pretrained`.
    """
    notes = []
    old, state = pretrained.state_dict(), transformer.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name != "label_embedding.weight":
                tensor.copy_(old[name])
        labels, old_labels = state["label_embedding.weight"], old["label_embedding.weight"]
        if same_classes:
            num_classes = transformer.config.num_classes
            labels[:num_classes] = old_labels[:num_classes]
        if transformer.null_class_id is not None and pretrained.null_class_id is not None:
            labels[transformer.null_class_id] = old_labels[pretrained.null_class_id]
        elif transformer.null_class_id is not None:
            notes.append("it had no null class: one with new random weights is added for `label_dropout`")
    if transformer.grid_size != pretrained.grid_size:
        notes.append(
            f"the grid of tokens is {transformer.grid_size} instead of {pretrained.grid_size}, with new positions"
        )
    return notes


def add_lora(
    model: SiTTransformer2DModel,
    rank: int,
    train_labels: bool,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: list[str] | None = None,
):
    """Freezes the model and adds low-rank adapters (arXiv 2106.09685) to its layers.

    Args:
        rank: rank of the adapters.
        train_labels: also train the label table, because it is new.
        alpha: the adapters' output is multiplied by `alpha / rank`; by default, by 1.
        dropout: the probability that an input of an adapter is set to 0 in training.
        targets: the linear layers to adapt, as for `lora_layers`; by default, those of attention and feed-forward.

    Raises:
        InputError: if a target is not the name of a linear layer.
    """
    from peft import LoraConfig

    model.requires_grad_(False)
    layers = LORA_TARGETS if targets is None else lora_layers(model, targets)
    scale = rank if alpha is None else alpha
    model.add_adapter(LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=layers))
    model.label_embedding.requires_grad_(train_labels)


def lora_layers(model: torch.nn.Module, targets: list[str]) -> list[str]:
    """Returns the names of the linear layers that `lora_target` selects, in the form that peft expects.

    Args:
        targets: ends of names such as `to_q` or `ff.net.2`, and regular expressions for whole names such as
            `transformer_blocks\\.[0-5]\\.attn\\..*`.

    Raises:
        InputError: if one of them does not select a linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = []
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in linear):
            layers.append(target)
            continue
        try:
            found = [name for name in linear if re.fullmatch(target, name)]
        except re.error:
            found = []
        if not found:
            ends = sorted({re.sub(r"^\w+\.\d+\.(attn\.)?", "", name) for name in linear})
            raise InputError(
                "lora_target",
                f"`lora_target` {target} names no linear layer; give names out of {', '.join(ends)}, or a regular expression of "
                f"whole names such as {'.*' + ends[0]}",
            )
        layers += found
    return list(dict.fromkeys(layers))


def cast_weights(model: torch.nn.Module, dtype: str):
    """Converts a model of diffusers to a dtype, such as `"bfloat16"`, if it has another.

    The `to` of diffusers' models warns each time of modules to keep in float32, even though these models have none.
    """
    if model.dtype != getattr(torch, dtype):
        torch.nn.Module.to(model, getattr(torch, dtype))


def weights_checksum(parameters: Iterable[torch.Tensor]) -> int:
    """CRC-32 of weights, as float32."""
    checksum = 0
    for parameter in parameters:
        checksum = zlib.crc32(parameter.detach().float().cpu().contiguous().numpy(), checksum)
    return checksum
