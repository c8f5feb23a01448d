# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Linear layers that multiply in 8 bits, by torchao."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..alignment.image_tokens import transformer_blocks
from ..errors import InputError, first_line
from ..models.start import LORA_TARGETS
from .throughput import hardware_name


MULTIPLE = 16  # 8-bit products need matrices whose sides are multiples of this


def use_fp8(accelerator: Accelerator, transformer: torch.nn.Module, rows: int):
    """Replaces the linear layers of attention and feed-forward in the transformer's blocks by torchao's, in place.

    Their weights stay in float32 under the same names. Embeddings, modulation, the last layer, layers whose sides are not
    multiples of 16, and all projectors stay as they are.

    Args:
        rows: samples times tokens of a micro-step, which the backward pass sums over in 8 bits.

    Raises:
        InputError: if torchao is not installed, the device has no 8-bit products, the mixed precision is not bf16, the weights
            are sharded, or `rows` is not a multiple of 16.
    """
    kind, device = accelerator.distributed_type, accelerator.device
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError("fp8", f"`fp8` cannot be combined with {kind.value}; use configs/accelerate/ddp.yaml")
    if accelerator.mixed_precision != "bf16":
        raise InputError("fp8", f"`fp8` needs `mixed_precision` bf16, not {accelerator.mixed_precision}")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(
            "fp8", f"`fp8` needs an Ada, Hopper or later GPU, and this is {hardware_name(device)}; remove it"
        )
    if rows % MULTIPLE:
        raise InputError(
            "fp8",
            f"`fp8` needs a multiple of {MULTIPLE} tokens in a micro-step, not {rows}; give another `train_batch_size`",
        )
    to_fp8(transformer)


def to_fp8(transformer: torch.nn.Module):
    """`use_fp8` without the checks of the device.

    Raises:
        InputError: if torchao is not installed.
    """
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise InputError(
            "fp8",
            f"`fp8` needs torchao, which cannot be imported ({first_line(error)}); pip install torchao, or remove it",
        ) from error
    blocks = set(transformer_blocks(transformer))
    prefixes = tuple(f"{name}." for name, module in transformer.named_modules() if module in blocks)
    ends = tuple(f".{name}" for name in LORA_TARGETS)

    def is_meant(module: torch.nn.Module, name: str) -> bool:
        sides = (module.in_features, module.out_features)
        return name.startswith(prefixes) and name.endswith(ends) and all(side % MULTIPLE == 0 for side in sides)

    convert_to_float8_training(transformer, module_filter_fn=is_meant)
