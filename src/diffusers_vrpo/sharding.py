# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Weights that are spread over processes (accelerate's FSDP2): who may train so, and whole models out of the parts."""

import contextlib
import copy
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from diffusers.training_utils import EMAModel

from .errors import InputError


def check_distributed(accelerator: Accelerator, lora: bool):
    """Prepares accelerate's way to train on many devices.

    Raises:
        InputError: for one that this trainer does not do right.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise InputError(
            f"accelerate is configured for {kind.value}, which averages, guards and checkpoints of this script do not "
            "know; take configs/accelerate/fsdp2_zero2.yaml, which shards gradients and optimizer as ZeRO-2 does, or "
            "ddp.yaml"
        )
    if kind != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise InputError(
            "accelerate is configured for FSDP 1; set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does"
        )
    if lora or accelerator.mixed_precision == "fp16":
        option = "--lora_rank" if lora else "--mixed_precision fp16"
        raise InputError(
            f"{option} does not go with FSDP; take configs/accelerate/ddp.yaml{'' if lora else ', or bf16'}"
        )
    # Autocast, as everywhere else, instead of a cast of the inputs: t has more digits than bfloat16.
    accelerator.state.fsdp_plugin.mixed_precision_policy = None


def prepare(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """`accelerator.prepare`; the model's class and weights change in place where they are sharded."""
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision == "bf16":
        # accelerate does so for all but FSDP2.
        model.forward = convert_outputs_to_fp32(torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward))
    return accelerator.prepare(model, optimizer)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as if it were not sharded. For all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(model: torch.nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@torch.no_grad()
def fill(targets: list[torch.Tensor], sources: list[torch.Tensor]):
    """Copies whole tensors, the same on every process, into perhaps sharded ones."""
    if any(hasattr(target, "full_tensor") for target in targets):
        from torch.distributed.tensor import distribute_tensor

        for target, source in zip(targets, sources):
            source = source.to(target.device, target.dtype)
            target.copy_(distribute_tensor(source, target.device_mesh, target.placements))
    else:
        torch._foreach_copy_(targets, [s.to(t.device) for s, t in zip(sources, targets)])


def original_class(model: torch.nn.Module) -> type:
    """The class of a model before FSDP2 put its own in front."""
    return next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))


_copies: WeakKeyDictionary = WeakKeyDictionary()


@torch.no_grad()
def whole_copy(
    accelerator: Accelerator, model: torch.nn.Module, weights: list[torch.Tensor]
) -> torch.nn.Module | None:
    """A model on the CPU of the main process with the gathered `weights`, those of `model.parameters()`; else None."""
    if accelerator.is_main_process and model not in _copies:
        _copies[model] = original_class(model).from_config(model.config).eval()
    names = [name for name, _ in model.named_parameters()]
    for name, tensor in zip(names, weights):
        tensor = whole(tensor.detach())
        if accelerator.is_main_process:
            _copies[model].get_parameter(name).copy_(tensor)
    return _copies.get(model)


@contextlib.contextmanager
def ema_weights(ema: EMAModel | None, model: torch.nn.Module):
    """Inside, the model has its averaged weights (its own where there is no average)."""
    if ema is None:
        yield
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


@contextlib.contextmanager
def whole_model(accelerator: Accelerator, model: torch.nn.Module, ema: EMAModel | None):
    """Inside, on the main process, the model with averaged weights (its own for None) in one piece; elsewhere None.

    All processes take part. Sharded weights are gathered, tensor by tensor, into a copy on the CPU.
    """
    if is_sharded(model):
        yield whole_copy(accelerator, model, list(model.parameters()) if ema is None else ema.shadow_params)
    elif accelerator.is_main_process:
        with ema_weights(ema, model):
            yield model
    else:
        yield None


@contextlib.contextmanager
def whole_pipeline(accelerator: Accelerator, pipeline, ema: EMAModel | None):
    """As `whole_model`, a pipeline to sample from: its transformer is in evaluation mode, on the device."""
    transformer = pipeline.transformer
    training = transformer.training
    transformer.eval()
    with whole_model(accelerator, transformer, ema) as model:
        if model is None or model is transformer:
            yield pipeline if model is transformer else None
        else:
            other = copy.copy(pipeline)
            other.transformer = model.to(accelerator.device)
            yield other
            model.to("cpu")
    transformer.train(training)
