# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Sets up accelerate, the optimizer and the trainable parameters, and checks the trainer's arguments."""

import dataclasses
import inspect
import json
import logging
import numbers
import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from ..alignment.image_rewards import ImageReward
from ..alignment.rewards import TokenReward
from ..config import ADAMW, OptimizationConfig, VRPOConfig, check_image_rewards, optimizer_arguments
from ..errors import InputError, first_line
from ..models.transformer_sit import SIT_PRESETS
from .callbacks import TrainerCallback
from .distributed import check_distributed, plain_lines


def start_accelerator(args: VRPOConfig, output_dir: Path) -> Accelerator:
    """Sets up accelerate, logging and the number of CPU threads according to the options.

    Raises:
        InputError: if a tracker is not installed, the started processes are not connected, or the way in which accelerate
            distributes them cannot be combined with the options.
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
        name = "report_to" if "logging capability" in str(error) else "mixed_precision"
        raise InputError(name, f"`{name}` {getattr(args, name)}: {error}") from error
    if missing := set(trackers) - {str(name) for name in accelerator.log_with} - {"all"}:
        raise InputError(
            "report_to",
            f"`report_to` {args.report_to} needs {', '.join(missing)}, which is not installed; pip install it, or give none",
        )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise InputError(
            None,
            f"{os.environ['WORLD_SIZE']} processes were started, but accelerate does not connect them; to train on several "
            "CPU processes set ACCELERATE_USE_CPU=true",
        )
    # The launcher's environment would override the option.
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    check_distributed(accelerator, bool(args.lora_rank))
    if args.optimizer != "adamw" and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError(
            "optimizer",
            f"`optimizer` {args.optimizer} cannot be combined with {accelerator.distributed_type.value}, which works with adamw "
            "only; use adamw or configs/accelerate/ddp.yaml",
        )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("httpx", "datasets", "PIL", "matplotlib", "filelock", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    plain_lines(accelerator.num_processes)
    one_thread = os.environ.get("OMP_NUM_THREADS", "1") == "1"
    if (
        accelerator.device.type == "cpu"
        and accelerator.num_processes == 1
        and one_thread
        and hasattr(os, "sched_getaffinity")
    ):
        # `accelerate launch` allows one thread, which suits a GPU. A CPU run uses all cores that it may, as `taskset` says.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return accelerator


def with_tf32(args: VRPOConfig, saved_state: dict | None) -> VRPOConfig:
    """The options with `allow_tf32` set: as given, or else as in the checkpoint, or else on."""
    if args.allow_tf32 is not None:
        return args
    saved = {} if saved_state is None else saved_state["settings"]
    allowed = saved.get("allow_tf32", saved.get("--allow_tf32", True))  # version 0.1 kept the names of flags
    return dataclasses.replace(args, allow_tf32=allowed)


def build_optimizer(args: OptimizationConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Builds the optimizer that `optimizer` names. AdamW is the fused one, which can skip a step without the host.

    Args:
        args: options of the optimization.
        parameters: the parameters to train.

    Raises:
        InputError: if the name is unknown, the optimizer cannot train a transformer, or `optimizer_args` do not fit it.
    """
    kind = optimizer_class(args.optimizer)
    of_options = {"lr": args.learning_rate}
    if args.optimizer in ADAMW.values:
        betas = (args.adam_beta1, args.adam_beta2)
        of_options |= {"betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    if args.optimizer == "adamw":
        of_options["fused"] = True
    given, known = optimizer_arguments(args), inspect.signature(kind).parameters
    for name in given:
        if name in of_options or name not in known or name == "params":
            free = [name for name in known if name not in ("params", *of_options)]
            raise InputError(
                "optimizer_args",
                f"`optimizer_args` has {name!r}, which it cannot set for {args.optimizer}; the arguments that it can set are "
                f"{', '.join(free)}",
            )
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return kind(parameters, **of_options, **given)
    except Exception as error:  # each class checks its arguments in its own way
        raise InputError(
            "optimizer_args" if given else "optimizer",
            f"`optimizer` {args.optimizer} refuses {json.dumps(of_options | given)}: {first_line(error)}",
        ) from error


TORCHAO = "torchao:"  # before the name of a class of torchao.optim
# Classes of torch.optim that cannot train a transformer here, and why.
UNSUITABLE_OPTIMIZERS = {
    "LBFGS": "it computes the loss several times in a step",
    "SparseAdam": "it works with sparse gradients only",
    "Muon": "it updates matrices only, and the transformer also has vectors and convolutions",
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of the optimizer that the option `optimizer` names; case does not matter.

    Raises:
        InputError: if the name is unknown, its library is not installed, or the optimizer cannot train a transformer.
    """
    if name.lower().startswith(TORCHAO):
        return torchao_class(name)
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except Exception as error:  # besides ImportError, what its libraries raise on a machine without a GPU
            raise InputError(
                "optimizer",
                f"`optimizer` adamw8bit needs bitsandbytes, which cannot be imported ({first_line(error)}); pip install "
                "bitsandbytes, or give adamw",
            ) from error
        return AdamW8bit
    classes = optimizer_classes(torch.optim)
    found = next((key for key in classes if key.lower() == name.lower()), None)
    if found is None or found in UNSUITABLE_OPTIMIZERS:
        usable = ", ".join(
            ["adamw8bit", "torchao:AdamW8bit", *(key for key in classes if key not in UNSUITABLE_OPTIMIZERS)]
        )
        reason = f": {UNSUITABLE_OPTIMIZERS[found]}" if found else " is not known"
        raise InputError("optimizer", f"`optimizer` {name}{reason}; give one of {usable}")
    return classes[found]


def torchao_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of torchao.optim whose name follows `torchao:`.

    Raises:
        InputError: if torchao is not installed, or has no such optimizer.
    """
    try:
        import torchao.optim
    except Exception as error:  # besides ImportError, what its libraries raise with another version of torch
        raise InputError(
            "optimizer",
            f"`optimizer` {name} needs torchao, which cannot be imported ({first_line(error)}); pip install torchao, or give "
            "adamw",
        ) from error
    classes = optimizer_classes(torchao.optim)
    found = next((key for key in classes if key.lower() == name.lower().removeprefix(TORCHAO)), None)
    if found is None:
        usable = ", ".join(f"torchao:{key}" for key in classes)
        raise InputError("optimizer", f"`optimizer` {name} is not in torchao.optim; give one of {usable}")
    return classes[found]


def optimizer_classes(module: ModuleType) -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizer classes of a module, by name."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def set_learning_rate(group: dict, rate: float):
    """Sets the learning rate of a parameter group. Optimizers that are compiled, such as torchao's, keep it in a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def schedule_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict:
    """The state of a learning rate schedule, with the rates as numbers even if the optimizer keeps them in tensors."""
    state = scheduler.state_dict()
    return state | {name: [float(rate) for rate in state[name]] for name in ("base_lrs", "_last_lr")}


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are trained, averaged and clipped, that is, those that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ----------------------------------------------------------------------------------------------------------------------
# The trainer's arguments


def as_list(value) -> list | None:
    """Converts a single value to a list of it, and a tuple to a list; None stays None."""
    return value if value is None else list(value) if isinstance(value, list | tuple) else [value]


def name_of(component) -> str:
    """The name by which a run records a component: a path, a Hub name, or the name of a reward, function or class."""
    if isinstance(component, str | Path):
        return str(component)
    if isinstance(component, TokenReward | ImageReward):
        return component.name
    return getattr(component, "__name__", type(component).__name__)


def with_given(args: VRPOConfig, model, encoders, vae, image_rewards: list | None = None) -> VRPOConfig:
    """Returns the options with the names of the trainer's other arguments, so that they are recorded and checked on resume.

    Raises:
        InputError: if an argument has a type that the trainer does not accept.
    """
    if not isinstance(args, VRPOConfig):
        raise InputError("args", f"`args` must be a VRPOConfig, not a {type(args).__name__}")
    given = {}
    if model is not None:
        if not isinstance(model, str | Path):
            raise InputError(
                "model",
                f"`model` is a {type(model).__name__}; give a preset, a folder or a Hub name, or a model of diffusers as "
                "`transformer`",
            )
        is_preset = str(model).lower() in {preset.lower() for preset in SIT_PRESETS}
        given["preset" if is_preset else "pretrained_model_name_or_path"] = str(model)
    if encoders is not None:
        for encoder in as_list(encoders):
            check_encoder(encoder)
        given["encoder"] = [name_of(encoder) for encoder in as_list(encoders)]
    if vae is not None:
        if not isinstance(vae, str | Path | torch.nn.Module):
            raise InputError(
                "vae",
                f"`vae` is a {type(vae).__name__}; give a folder, a Hub name, a diffusers autoencoder, or `none`",
            )
        given["vae"] = name_of(vae)
    if image_rewards is not None:
        given["image_rewards"] = [name_of(reward) for reward in as_list(image_rewards)]
    return dataclasses.replace(args, **given)


def check_encoder(encoder):
    """Checks that an encoder is a name, or a callable that has the width of its embeddings as `embed_dim`.

    Raises:
        InputError: if it is neither.
    """
    if isinstance(encoder, str | Path):
        return
    width = getattr(encoder, "embed_dim", None)
    if not callable(encoder) or not isinstance(width, numbers.Integral) or width < 1:
        raise InputError(
            "encoders",
            f"`encoders` has {encoder!r:.80}; each must be a folder or a Hub name such as facebook/dinov2-base, or a callable "
            "that maps images to patch embeddings and has their width as `embed_dim`",
        )


def as_callbacks(callbacks) -> list[TrainerCallback]:
    """Returns the trainer's callbacks as a list; a single callback may be given without one.

    Raises:
        InputError: if one of them is not a TrainerCallback.
    """
    callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            raise InputError("callbacks", f"`callbacks` has {callback!r:.80}; each must be a TrainerCallback")
    return callbacks


def check_given(args: VRPOConfig, train_dataset, rewards: list | None, callbacks: list[TrainerCallback]):
    """Checks that no argument of the trainer is missing or would be ignored.

    Raises:
        InputError: for the first such argument.
    """
    named = (args.dataset_name, args.train_data_dir, args.latents_dir)
    if train_dataset is None and not any(named):
        raise InputError(
            "train_dataset",
            "`train_dataset` is missing; give a `datasets.Dataset` with images and labels, or name data in `args` "
            "(`dataset_name`, `train_data_dir` or `latents_dir`)",
        )
    if train_dataset is not None and any(named):
        name = next(name for name in named if name)
        raise InputError(
            "train_dataset", f"`train_dataset` is given, but `args` also names the data {name}; remove one of the two"
        )
    if args.objective != "none" and not args.encoder:
        raise InputError(
            "encoders",
            f"`encoders` are missing, and `objective` {args.objective} aligns with them; give one such as "
            "facebook/dinov2-base, or `objective` none",
        )
    if rewards is not None and not isinstance(rewards, list | tuple):
        raise InputError("rewards", f"`rewards` must be a list of names and functions, not {rewards!r:.80}")
    check_image_rewards(args)
    build_optimizer(args, [torch.nn.Parameter(torch.zeros(2, 2))])
    if rewards is not None and args.objective != "vrpo":
        raise InputError("rewards", f"`rewards` cannot be combined with `objective` {args.objective}, only with vrpo")
    start = args.generative_policy_start_step
    if start is not None and not any(callback.state_name == "generative_policy" for callback in callbacks):
        raise InputError(
            "generative_policy_start_step",
            f"`generative_policy_start_step` {start} needs the callback "
            "`diffusers_vrpo.experimental.generative.callback.GenerativePolicy(args)`",
        )
