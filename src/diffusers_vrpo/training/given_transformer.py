# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Checks and prepares a transformer that is passed to the trainer as an object, before any long work begins."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin

from ..alignment.attach import AlignedTransformer, alignment_layers
from ..alignment.image_tokens import hidden_width, transformer_blocks
from ..alignment.start import scaffold_layer
from ..config import VRPOConfig
from ..data.sources import TrainingData
from ..errors import InputError, first_line
from ..models.start import LORA_TARGETS, check_lora_rank, check_peft, lora_layers
from ..pipelines.adapters import ModelAdapter, TransformerAlone, adapter_for
from .callbacks import TrainerCallback
from .throughput import counted_flops


# Options that describe the package's own transformers or their starting weights.
OF_OWN_MODELS = (
    "preset",
    "model_config",
    "pretrained_model_name_or_path",
    "keep_labels",
    "prediction_type",
    "learn_sigma",
    "qk_norm",
)


def check_transformer(
    args: VRPOConfig, transformer, adapter: ModelAdapter | None, callbacks: Iterable[TrainerCallback]
) -> ModelAdapter:
    """Checks that the trainer can train a given transformer with these options, and returns its adapter, prepared.

    Args:
        transformer: the trainer's argument.
        adapter: the trainer's argument; by default the package's for that class.

    Raises:
        InputError: if the trainer cannot train it.
    """
    if not isinstance(transformer, ModelMixin):
        raise InputError(
            "transformer",
            f"`transformer` is a {type(transformer).__name__}; give a model of diffusers (a ModelMixin), which can be saved "
            "and loaded",
        )
    for name in OF_OWN_MODELS:
        if getattr(args, name) not in (None, False):
            raise InputError(
                name,
                f"`{name}` {getattr(args, name)} cannot be combined with `transformer`, which already is the model; remove one",
            )
    if any(callback.state_name == "generative_policy" for callback in callbacks):
        raise InputError(
            "callbacks",
            f"`callbacks`: the generative policy samples with VRPOPipeline and cannot train the {type(transformer).__name__} "
            "given as `transformer`; give a preset or checkpoint as `model` instead",
        )
    if frozen := [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]:
        raise InputError(
            "transformer",
            f"`transformer` has frozen parameters such as {frozen[0]}; call requires_grad_(True) on it, because the trainer "
            "trains all of them, or freezes them itself for `lora_rank`",
        )
    check_peft(args.lora_rank)
    if adapter is not None and not isinstance(adapter, ModelAdapter):
        raise InputError("adapter", f"`adapter` is a {type(adapter).__name__}; give an object of a ModelAdapter class")
    adapter = adapter or adapter_for(transformer)
    adapter.prepare(transformer)
    if adapter.prediction_type not in ("velocity", "epsilon"):
        raise InputError(
            "adapter", f"`adapter` has prediction_type {adapter.prediction_type!r}; it must be velocity or epsilon"
        )
    if adapter.null_class_id is None and args.label_dropout:
        raise InputError(
            "label_dropout",
            f"`label_dropout` {args.label_dropout} has no effect, because the adapter {type(adapter).__name__} has no "
            "`null_class_id`; remove it",
        )
    return adapter


def check_pipeline(args: VRPOConfig, adapter: ModelAdapter, pipeline):
    """Checks that no option needs a pipeline if the adapter does not have one.

    Raises:
        InputError: if an option does.
    """
    if not isinstance(pipeline, TransformerAlone):
        return
    for name in ("push_to_hub", "fd_encoder", "validation_labels"):
        if getattr(args, name):
            raise InputError(
                name, f"`{name}` needs a pipeline, which the adapter {type(adapter).__name__} does not have; remove it"
            )


def align_transformer(
    args: VRPOConfig,
    accelerator: Accelerator,
    transformer: ModelMixin,
    adapter: ModelAdapter,
    data: TrainingData,
    latent_shape: tuple[int, int, int],
    grid_size: tuple[int, int],
    encoders: list,
) -> AlignedTransformer:
    """Attaches projectors, scaffold and LoRA adapters, as the options say, to a given transformer, which keeps its weights.

    All processes get the weights of the first one. Projectors, scaffold and adapters are drawn from torch's generator.

    Args:
        encoders: the encoders to align with, each with the width of its embeddings as `embed_dim`.
        latent_shape: channels, height and width of the training input.
        grid_size: rows and columns of the transformer's tokens.

    Raises:
        InputError: if the transformer does not fit the data or the options.
    """
    name = type(transformer).__name__
    if adapter.num_classes not in (None, data.num_classes):
        raise InputError(
            "transformer",
            f"`transformer` has {adapter.num_classes} classes, and the data have {data.num_classes}; build it for that number",
        )
    channels, size = transformer.config.get("in_channels"), transformer.config.get("sample_size")
    if channels not in (None, latent_shape[0]):
        raise InputError(
            "vae",
            f"`vae` gives {latent_shape[0]} channels, but the {name} given as `transformer` takes {channels}; give another "
            "autoencoder",
        )
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and tuple(sides) != latent_shape[1:]:
        raise InputError(
            "resolution",
            f"`resolution` {args.resolution} gives inputs of {latent_shape[1]} x {latent_shape[2]}, but the {name} given as "
            f"`transformer` has the sample_size {size}; give the resolution that fits it",
        )
    if accelerator.num_processes > 1:
        transformer.to(accelerator.device)
        for tensor in transformer.state_dict().values():
            broadcast(tensor)
    try:
        depth = len(transformer_blocks(transformer))
        projected = encoders and args.objective != "repi"
        aligned = AlignedTransformer(
            transformer,
            alignment_layers(args.layer_scope, depth) if projected else [],
            encoders,
            args.projector,
            args.projector_dim,
            grid_size=grid_size,
            scaffold_layer=scaffold_layer(args, depth),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError("transformer", f"`transformer`: {first_line(error)}") from error
    if aligned.scaffold is not None:
        aligned.scaffold.draw_weights()
    if args.lora_rank:
        add_lora(transformer, args)
    if args.compile and not getattr(transformer, "_repeated_blocks", None):
        raise InputError(
            "compile", f"`compile` needs a transformer with `_repeated_blocks`, and {name} has none; remove it"
        )
    return aligned


def add_lora(transformer: ModelMixin, args: VRPOConfig):
    """Freezes a given transformer and adds LoRA adapters of rank `lora_rank` to the layers of `lora_target`.

    By default these are the attention and feed-forward layers of the transformer's blocks.

    Raises:
        InputError: if the rank is too high, a target names no linear layer, or the attention layers have other names.
    """
    name = type(transformer).__name__
    try:
        width = hidden_width(transformer)
    except ValueError as error:
        raise InputError("lora_rank", f"`lora_rank`: {first_line(error)}") from error
    check_lora_rank(args.lora_rank, name, width)
    targets = lora_layers(transformer, args.lora_target) if args.lora_target else usual_lora_layers(transformer)

    from peft import LoraConfig, inject_adapter_in_model

    alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
    config = LoraConfig(r=args.lora_rank, lora_alpha=alpha, lora_dropout=args.lora_dropout, target_modules=targets)
    transformer.requires_grad_(False)
    if isinstance(transformer, PeftAdapterMixin):
        transformer.add_adapter(config)
    else:  # as diffusers' DiT and PixArt
        inject_adapter_in_model(config, transformer)


def usual_lora_layers(transformer: ModelMixin) -> list[str]:
    """The names of the attention and feed-forward layers in the blocks of a given transformer.

    Raises:
        InputError: if its attention layers have other names.
    """
    blocks = set(transformer_blocks(transformer))
    targets = [
        f"{block_name}.{layer_name}"
        for block_name, block in transformer.named_modules()
        if block in blocks
        for layer_name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and f".{layer_name}".endswith(tuple(f".{kind}" for kind in LORA_TARGETS))
    ]
    if not any(target.endswith(".to_q") for target in targets):
        raise InputError(
            "lora_rank",
            f"`lora_rank`: the blocks of {type(transformer).__name__} have no attention layers called to_q, to_k and to_v, to "
            "which adapters are added by default; name other layers with `lora_target`, or remove `lora_rank`",
        )
    return targets


def try_call(
    args: VRPOConfig,
    transformer: ModelMixin,
    adapter: ModelAdapter,
    latent_shape: tuple[int, int, int],
    device: torch.device,
) -> int:
    """Calls the adapter with one blank example, and returns the FLOPs of the transformer's forward pass.

    Raises:
        InputError: if the adapter fails, or its prediction does not have the shape of the target.
    """
    x = torch.zeros(1, *latent_shape, device=device)
    labels = torch.zeros(1, dtype=torch.long, device=device)
    timestep = labels if adapter.prediction_type == "epsilon" else torch.zeros(1, device=device)
    batch = {"class_labels": labels, "noise": x, "timestep": torch.zeros(1, device=device)}
    batch["pixels"] = torch.zeros(1, 3, args.resolution, args.resolution, device=device)
    shapes = []

    def model(*arguments, **named) -> torch.Tensor:
        return transformer(*arguments, **named, return_dict=False)[0]

    def call():
        prediction = adapter.call(model, x, timestep, batch)
        shapes.append(tuple(prediction.shape) if isinstance(prediction, torch.Tensor) else type(prediction).__name__)

    training = transformer.training
    transformer.eval()
    try:
        flops = counted_flops(call)
    except Exception as error:  # whatever user-defined code raises
        raise InputError(
            "adapter",
            f"`adapter`: {type(adapter).__name__}.call fails with a {type(transformer).__name__} "
            f"({type(error).__name__}: {first_line(error)})",
        ) from error
    finally:
        transformer.train(training)
    channels = latent_shape[0] * (1 + adapter.learns_variance)
    if shapes[0] != (wanted := (1, channels, *latent_shape[1:])):
        raise InputError(
            "adapter",
            f"`adapter`: {type(adapter).__name__}.call returns {shapes[0]} for an input of {tuple(x.shape)}; it must be "
            f"{wanted}",
        )
    return flops


def keep_first_block(accelerator: Accelerator, transformer: torch.nn.Module):
    """With FSDP2, lets every process keep the whole first block between forward and backward pass.

    Some transformers call a layer of their first block again after the last one, as diffusers' DiT does to embed the
    timestep. FSDP would then have only a part of that layer's weights.
    """
    first = transformer_blocks(transformer)[0]
    if accelerator.distributed_type == DistributedType.FSDP and hasattr(first, "set_reshard_after_forward"):
        first.set_reshard_after_forward(False)
