# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Distributed training: connecting processes, FSDP and DeepSpeed, sharded models, and errors shared by all processes."""

import contextlib
import copy
import logging
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TextIO
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    convert_outputs_to_fp32,
    gather_object,
)
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from tqdm.auto import tqdm

from ..errors import InputError
from .interruption import wait_before_exit
from .output_dir import unwritable


def start_processes() -> PartialState:
    """Connects the launched processes, and sets up the log: the first process logs everything, the others only warnings.

    Raises:
        InputError: if accelerate does not connect the processes.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    # The slowest process can take long.
    several = {"timeout": timedelta(hours=12)} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    state = PartialState(cpu=on_cpu, **several)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise InputError(
            None,
            f"{os.environ['WORLD_SIZE']} processes were started, but accelerate does not connect them; for several CPU "
            "processes set ACCELERATE_USE_CPU=true",
        )
    level = logging.INFO if state.is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=level)
    for noisy in ("httpx", "datasets", "PIL", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    plain_lines(state.num_processes)
    return state


def use_tf32(device: torch.device, allowed: bool):
    """Allows or forbids TF32 for the float32 matrix products of a GPU; convolutions use it by torch's default anyway."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = allowed


def plain_lines(num_processes: int):
    """Removes from the log, once it is set up, what libraries add to it and is of no use to users."""
    # accelerate logs every file of a checkpoint under its temporary name.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    # The root's handler also prints the lines of the Hub's library, which would otherwise appear twice.
    logging.getLogger("huggingface_hub").handlers.clear()
    if num_processes == 1:
        for handler in logging.root.handlers:
            handler.addFilter(without_rank)


def without_rank(record: logging.LogRecord) -> bool:
    """A filter that keeps every line, but removes accelerate's mark of the process from it."""
    if isinstance(record.msg, str):
        record.msg = record.msg.removeprefix("[RANK 0] ")
    return True


class AboveTheBar:
    """A stream that writes above the progress bars of tqdm; `stream`, which it replaces, would write into them."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str):
        tqdm.write(text, file=self.stream, end="")

    def flush(self):
        self.stream.flush()


@contextlib.contextmanager
def lines_above_the_bar():
    """Inside the `with` block, writes log lines to the console above the progress bar."""
    consoles = [each for each in logging.root.handlers if getattr(each, "stream", None) in (sys.stderr, sys.stdout)]
    streams = [handler.setStream(AboveTheBar(handler.stream)) for handler in consoles]
    try:
        yield
    finally:
        for handler, stream in zip(consoles, streams):
            handler.setStream(stream)


def check_distributed(accelerator: Accelerator, lora: bool):
    """Checks and prepares accelerate's configuration for several devices.

    Args:
        lora: whether only LoRA adapters are trained.

    Raises:
        InputError: if the trainer does not support the configuration.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise InputError(
            None,
            f"accelerate is configured for {kind.value}, which this trainer does not support; use "
            "configs/accelerate/fsdp2.yaml or ddp.yaml",
        )
    if kind == DistributedType.DEEPSPEED:
        check_deepspeed(accelerator)
    if kind != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise InputError(
            None, "accelerate is configured for FSDP 1; set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does"
        )
    if lora or accelerator.mixed_precision == "fp16":
        option, value = ("lora_rank", "") if lora else ("mixed_precision", " fp16")
        raise InputError(
            option,
            f"`{option}`{value} cannot be combined with FSDP; use configs/accelerate/ddp.yaml{'' if lora else ', or bf16'}",
        )
    # FSDP would cast the inputs, and t needs more digits than bfloat16 has. Autocast is used instead, as everywhere else.
    accelerator.state.fsdp_plugin.mixed_precision_policy = None


def check_deepspeed(accelerator: Accelerator):
    """Prepares DeepSpeed's ZeRO-2.

    Raises:
        InputError: if DeepSpeed is configured for something else, or has its own optimizer or schedule.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    offloads = any(
        (zero.get(f"offload_{part}") or {}).get("device", "none") != "none" for part in ("optimizer", "param")
    )
    if zero.get("stage") != 2 or offloads:
        raise InputError(
            None,
            f"DeepSpeed is configured for zero_stage: {zero.get('stage')}{' with offloading' * offloads}; only stage 2 "
            "without offloading is supported, as in configs/accelerate/deepspeed_zero2.yaml; fsdp2.yaml saves more memory",
        )
    if accelerator.mixed_precision == "fp16":
        raise InputError(
            "mixed_precision",
            "`mixed_precision` fp16 cannot be combined with DeepSpeed; use bf16, or configs/accelerate/ddp.yaml",
        )
    if given := {"optimizer", "scheduler"} & config.keys():
        raise InputError(
            "learning_rate",
            f"the DeepSpeed configuration has its own {' and '.join(sorted(given))}; remove it: `learning_rate`, "
            "`lr_scheduler`, `adam_beta1`, ... set them",
        )
    if accelerator.mixed_precision == "bf16":
        # accelerate's own autocast has no effect here.
        accelerator.autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16)


def prepare(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Calls `accelerator.prepare`, and returns model and optimizer. A sharded model changes class and weights in place."""
    autocasts = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if autocasts and accelerator.mixed_precision == "bf16":
        # For all other kinds of distributed training, accelerate does this.
        model.forward = convert_outputs_to_fp32(torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(accelerator, model, optimizer)
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.NO):
        accelerator.ddp_handler = ddp_options(model)
    with warnings.catch_warnings():
        # Newer versions of torch have another name for it, which older ones and accelerate do not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return accelerator.prepare(model, optimizer)


def ddp_options(model: torch.nn.Module) -> DistributedDataParallelKwargs:
    """How DDP treats gradients and buffers.

    Gradients are views of the buckets that are summed, which saves a copy of all of them. Buffers, such as position tables,
    are the same on all processes from the beginning and are not sent in every forward pass, unless a normalisation layer
    changes its buffers in training. The graph is not static, because projectors and a scaffold take part in some steps only.
    """
    norms = (module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._NormBase))
    changes = any(norm.track_running_stats for norm in norms)
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=changes)


def prepare_deepspeed(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Returns DeepSpeed's engine and its optimizer, changed so that the trainer's loop can call them.

    accelerate would let the engine step within `accelerator.backward`, before the gradients can be checked. Here `backward`
    accumulates the gradients, `clip_grad_norm` clips them, and `optimizer.step` updates the weights: an AdamW, which
    StepGuard can tell to skip a step, updates this process's part of them, and an all-gather follows.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    accumulation = accelerator.gradient_accumulation_steps
    # The trainer's options override accelerate's file. DeepSpeed uses the batch size only in its progress lines.
    config |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": accelerator.num_processes * accumulation}
    config |= {"gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0}
    config["zero_optimization"].setdefault("reduce_bucket_size", 50_000_000)  # 0.2 GB; DeepSpeed's default takes 2 GB
    # Weights are float32, with autocast, as everywhere else: DeepSpeed's bf16 keeps no float32 weights to average.
    precision, config["bf16"] = config.get("bf16"), {"enabled": False}
    engine, optimizer = accelerator.prepare(model, optimizer)
    config["bf16"] = precision

    def backward(loss: torch.Tensor, sync_gradients: bool):
        engine.set_gradient_accumulation_boundary(sync_gradients)
        engine.backward(loss)

    accelerator.deepspeed_engine_wrapped.backward = backward
    # The engine's own step does nothing between two accumulation boundaries.
    optimizer.step = engine.step
    # DeepSpeed's own files are not used, because reading them can run code.
    engine.save_checkpoint = lambda folder, name: save_partition(accelerator, engine, folder)
    engine.load_checkpoint = lambda folder, name: load_partition(accelerator, engine, folder)
    return engine, optimizer


def clip_grad_norm(accelerator: Accelerator, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Calls `accelerator.clip_grad_norm_`, or its equivalent if each process has only a part of the gradients."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return full_tensor(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    gradients = [part for group in model.optimizer.averaged_gradients.values() for part in group]
    square = torch.nn.utils.get_total_norm(gradients).square()
    torch.distributed.all_reduce(square)
    torch._foreach_mul_(gradients, (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0))
    return square.sqrt()


def partition_path(accelerator: Accelerator, folder: str) -> str:
    return os.path.join(folder, f"zero2_{accelerator.process_index}_of_{accelerator.num_processes}.safetensors")


def save_partition(accelerator: Accelerator, engine, folder: str):
    """Writes this process's part of the weights and of Adam's moments."""
    weights = engine.optimizer.single_partition_of_fp32_groups
    tensors = {f"{i}.weights": part.detach() for i, part in enumerate(weights)}
    for i, state in engine.basic_optimizer.state_dict()["state"].items():
        tensors |= {f"{i}.{name}": tensor for name, tensor in state.items()}
    rates = [group["lr"] for group in engine.basic_optimizer.param_groups]
    save_file(
        tensors | {"learning rates": torch.tensor(rates, dtype=torch.float64)}, partition_path(accelerator, folder)
    )


@torch.no_grad()
def load_partition(accelerator: Accelerator, engine, folder: str):
    """Reads what `save_partition` wrote; the model's whole weights are loaded elsewhere.

    Raises:
        ValueError: if the checkpoint was saved by another number of processes or without DeepSpeed.
    """
    path = partition_path(accelerator, folder)
    if not os.path.exists(path):
        raise ValueError(
            f"it has no {os.path.basename(path)}, because it was not saved by the same number of processes with DeepSpeed"
        )
    tensors, state = load_file(path), {}
    # The new scheduler has set the learning rates to those of step 0, and sets them again only after the next step.
    rates = tensors.pop("learning rates").tolist()
    for i, part in enumerate(engine.optimizer.single_partition_of_fp32_groups):
        part.copy_(tensors.pop(f"{i}.weights"))
    for key, tensor in tensors.items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = tensor
    engine.basic_optimizer.load_state_dict(engine.basic_optimizer.state_dict() | {"state": state})
    for group, rate in zip(engine.basic_optimizer.param_groups, rates):
        group["lr"] = rate


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole of a tensor that may be sharded. All processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(model: torch.nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@torch.no_grad()
def copy_tensors(targets: list[torch.Tensor], sources: list[torch.Tensor]):
    """Copies `sources`, which are whole and the same on every process, into `targets`, which may be sharded."""
    if any(hasattr(target, "full_tensor") for target in targets):
        from torch.distributed.tensor import distribute_tensor

        for target, source in zip(targets, sources):
            source = source.to(target.device, target.dtype)
            target.copy_(distribute_tensor(source, target.device_mesh, target.placements))
    else:
        torch._foreach_copy_(targets, [s.to(t.device) for s, t in zip(sources, targets)])


def original_class(model: torch.nn.Module) -> type:
    """The class that a model had before FSDP2 replaced it by a subclass."""
    return next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))


_copies: WeakKeyDictionary = WeakKeyDictionary()


@torch.no_grad()
def full_copy(model: torch.nn.Module, weights: list[torch.Tensor], here: bool) -> torch.nn.Module | None:
    """Copies a sharded model to the CPU, with all its weights.

    All processes must call it, because the weights are gathered.

    Args:
        weights: the weights of the copy, in the order of `model.parameters()`; they may be sharded.
        here: whether this process gets the copy; the others get None.
    """
    if here and model not in _copies:
        _copies[model] = original_class(model).from_config(model.config).eval()
    names = [name for name, _ in model.named_parameters()]
    for name, tensor in zip(names, weights):
        tensor = full_tensor(tensor.detach())
        if here:
            _copies[model].get_parameter(name).copy_(tensor)
    return _copies[model] if here else None


@contextlib.contextmanager
def ema_weights(ema: EMAModel | None, model: torch.nn.Module):
    """Gives the model its averaged weights inside the `with` block; if `ema` is None, it keeps its own."""
    if ema is None:
        yield
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The storages are swapped, because diffusers' `store` and `restore` copy all weights to the host and back.
    own = [parameter.data for parameter in parameters]
    for parameter, average in zip(parameters, ema.shadow_params):
        parameter.data = average.data
    try:
        yield
    finally:
        for parameter, weights in zip(parameters, own):
            parameter.data = weights


@contextlib.contextmanager
def full_model(accelerator: Accelerator, model: torch.nn.Module, ema: EMAModel | None, everywhere: bool = False):
    """Yields the model with its averaged weights, not sharded, on the main process; None on the others.

    All processes must enter the block. Sharded weights are gathered, tensor by tensor, into a copy on the CPU.

    Args:
        ema: the averaged weights; None for the model's own weights.
        everywhere: whether every process gets the model.
    """
    here = everywhere or accelerator.is_main_process
    if is_sharded(model):
        yield full_copy(model, list(model.parameters()) if ema is None else ema.shadow_params, here)
    elif here:
        with ema_weights(ema, model):
            yield model
    else:
        yield None


@contextlib.contextmanager
def full_pipeline(accelerator: Accelerator, pipeline, ema: EMAModel | None, everywhere: bool = False):
    """Yields a pipeline in evaluation mode on the processes where `full_model` yields a model; None on the others."""
    transformer = pipeline.transformer
    training = transformer.training
    transformer.eval()
    try:
        with full_model(accelerator, transformer, ema, everywhere) as model:
            if model is None:
                yield None
            elif model is transformer:
                yield pipeline
            else:
                other = copy.copy(pipeline)
                other.transformer = model.to(accelerator.device)
                try:
                    yield other
                finally:
                    model.to("cpu")
    finally:
        transformer.train(training)


def run_and_share_errors(accelerator: Accelerator, action: Callable, *arguments, where: bool = True) -> str | None:
    """Calls `action` on the processes where `where` is true, and tells all processes if it failed on any of them.

    A process that fails therefore never leaves the others waiting for it. All processes must call this.

    Returns:
        why a file could not be read or written, the same on all processes; None if nothing failed.

    Raises:
        InputError: if `action` raised one, on every process.
        RuntimeError: if `action` raised anything else that is not about a file, on the processes where it did not fail; the
            failing process raises its own exception.
    """
    own, outcome = None, []
    try:
        if where:
            action(*arguments)
    except (Exception, CheckpointException) as error:  # the other processes must learn of every error
        own, reason = error, unwritable(error)
        field = (error.field,) if isinstance(error, InputError) else ()
        outcome = [(reason is not None, field, reason or str(error))]
    outcomes = gather_object(outcome)
    for is_file, field, text in outcomes:
        if not is_file:
            wait_before_exit(accelerator)
            raise own or (InputError(*field, text) if field else RuntimeError(f"another process failed: {text}"))
    return outcomes[0][2] if outcomes else None
