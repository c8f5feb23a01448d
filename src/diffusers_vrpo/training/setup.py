# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Accelerate, the optimizer and the trainable parameters, as the options ask for."""

import logging
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from ..errors import InputError
from .distributed import check_distributed


def start_accelerator(args, output_dir: Path) -> Accelerator:
    """Accelerate, logging, threads and TF32 as the options want them.

    Raises:
        InputError: when a tracker is not installed, or the processes that were started are not connected.
    """
    trackers = [] if args.report_to == "none" else args.report_to.split(",")
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=trackers or None,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / args.logging_dir)),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except ValueError as error:
        raise InputError(
            "mixed_precision", f"`mixed_precision` {args.mixed_precision} `report_to` {args.report_to}: {error}"
        ) from error
    if missing := set(trackers) - {str(name) for name in accelerator.log_with} - {"all"}:
        raise InputError(
            "report_to",
            f"`report_to` {args.report_to}: {', '.join(missing)} is not installed; pip install it, or `none`",
        )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise InputError(
            None,
            f"{os.environ['WORLD_SIZE']} processes were started, but accelerate does not connect them; to train on several "
            "CPU processes set ACCELERATE_USE_CPU=true",
        )
    # A launcher's environment would count more than the option.
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    check_distributed(accelerator, bool(args.lora_rank))
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("httpx", "datasets", "PIL", "matplotlib", "filelock", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    one_thread = os.environ.get("OMP_NUM_THREADS", "1") == "1"
    if (
        accelerator.device.type == "cpu"
        and accelerator.num_processes == 1
        and one_thread
        and hasattr(os, "sched_getaffinity")
    ):
        # `accelerate launch` allows one thread, which suits a GPU; `taskset` limits what is used here.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def build_optimizer(args, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as the options want it; fused, which also lets it leave a step out without asking the host."""
    return torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What is trained, averaged and clipped: all parameters, or with adapters the few that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
