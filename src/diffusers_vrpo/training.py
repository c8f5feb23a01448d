# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What a training run keeps on disk: checkpoints that resume exactly, and its metrics."""

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import InputError, first_line


logger = get_logger(__name__)


def prepare_output_dir(output_dir: str) -> Path:
    """Makes the folder and proves that files can be written there.

    Raises:
        InputError: when they cannot.
    """
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"--output_dir {output_dir} cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    return path


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
        raise InputError(f"--mixed_precision {args.mixed_precision} --report_to {args.report_to}: {error}") from error
    if missing := set(trackers) - {str(name) for name in accelerator.log_with} - {"all"}:
        raise InputError(
            f"--report_to {args.report_to}: {', '.join(missing)} is not installed; pip install it, or `none`"
        )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise InputError(
            f"{os.environ['WORLD_SIZE']} processes were started, but accelerate does not connect them; to train on several "
            "CPU processes set ACCELERATE_USE_CPU=true"
        )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("httpx", "datasets", "PIL", "matplotlib", "filelock"):
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


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, the oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(resume_from_checkpoint: str, output_dir: str | Path) -> Path | None:
    """The folder that `--resume_from_checkpoint` means: `latest` (None where there is none), `none`, or a path.

    Raises:
        InputError: for a path that is not a checkpoint; for `none` where the output folder holds a run already.
    """
    existing = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        return existing[-1] if existing else None
    if resume_from_checkpoint == "none":
        if existing:
            raise InputError(
                f"--resume_from_checkpoint none would mix a new run with {existing[-1]}; choose another --output_dir, or "
                "`latest` to continue that run"
            )
        return None
    path = Path(resume_from_checkpoint)
    if not path.is_dir() and (Path(output_dir) / resume_from_checkpoint).is_dir():
        path = Path(output_dir) / resume_from_checkpoint
    if not (path / "training_state.json").is_file():
        known = f"; {output_dir} has {', '.join(p.name for p in existing)}" if existing else ""
        raise InputError(
            f"--resume_from_checkpoint {resume_from_checkpoint} is not a checkpoint of this script (no "
            f"training_state.json in it); give a checkpoint-N folder or `latest`{known}"
        )
    if path.resolve().parent == Path(output_dir).resolve() and path.name != existing[-1].name:
        raise InputError(
            f"--resume_from_checkpoint {resume_from_checkpoint} is older than {existing[-1]}; to branch off from it choose "
            "another --output_dir, to continue that run take `latest`"
        )
    return path


def read_training_state(checkpoint: Path, expected: dict) -> dict:
    """The JSON state of a checkpoint, after a check that it belongs to the same stream of samples.

    Args:
        expected: settings that must not have changed, by the name that the error shows.

    Raises:
        InputError: when one of them has.
    """
    try:
        state = json.loads((checkpoint / "training_state.json").read_text())
        settings = state["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is damaged (training_state.json: {error}); remove it to continue "
            "from the one before"
        ) from error
    for name, value in expected.items():
        if settings.get(name) != value:
            raise InputError(
                f"{name} is {value}, but {checkpoint} was trained with {settings.get(name)}; keep to that, or start a new "
                "run in another --output_dir"
            )
    return state


def load_checkpoint(accelerator: Accelerator, checkpoint: Path):
    """Loads what `save_checkpoint` saved: weights, averages, optimizer, statistics.

    Raises:
        InputError: when a part of it is missing or damaged.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is damaged ({first_line(error)}); remove it to continue from the one "
            "before"
        ) from error
    # Steps are saved whole. Micro-steps count from here, or another accumulation would cut across them.
    accelerator.step = 0


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, state: dict, limit: int | None = None):
    """Saves `checkpoint-{step}` on all processes. It gets its name only when it is complete.

    Args:
        state: what `read_training_state` gives back; JSON types only.
        limit: how many checkpoints to keep; the oldest go, after the new one is complete.
    """
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        (temporary / "training_state.json").write_text(json.dumps(state, indent=1))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in list_checkpoints(output_dir)[:-limit] if limit else []:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    logger.info(f"saved {final}")


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What is trained, averaged and clipped: all parameters, or with adapters the few that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def ema_weights(ema: EMAModel | None, model: torch.nn.Module):
    """Inside, the model has its averaged weights (its own where there is no average)."""
    if ema is None:
        yield
        return
    parameters = trainable_parameters(model)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def release_projectors(model: torch.nn.Module):
    """Takes the projectors' gradients away: once alignment is off they rest, with one process and with many."""
    for parameter in model.projectors.parameters():
        parameter.grad = None


def save_lora(model: torch.nn.Module, folder: Path):
    """Writes the adapters, and then merges them into the model's weights.

    `transformer.load_lora_adapter(folder, prefix=None, use_safetensors=True)` opens what it writes.
    """
    model.save_lora_adapter(folder)
    model.fuse_lora()
    model.unload_lora()


def register_model_hooks(accelerator: Accelerator, ema: EMAModel | None, tensors: dict):
    """Makes checkpoints hold the weights and their averages, and more tensors.

    Weights are in `transformer/` and `transformer_ema/`, which `from_pretrained` opens; where most are frozen, the trained
    ones alone are in `transformer.safetensors` and `transformer_ema.safetensors`.

    Args:
        tensors: objects with `state_dict` and `load_state_dict` of tensors, by name; each is saved as
            `{name}.safetensors`.
    """

    def trained(model):
        return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}

    def save(model, path):
        if all(parameter.requires_grad for parameter in model.parameters()):
            model.save_pretrained(path)
        else:
            save_file({name: tensor.contiguous() for name, tensor in trained(model).items()}, f"{path}.safetensors")

    def load(model, path):
        """The saved weights, in the order of the model's trained parameters."""
        if all(parameter.requires_grad for parameter in model.parameters()):
            saved = type(model).from_pretrained(path).state_dict()
        else:
            saved = load_file(f"{path}.safetensors")
        return [saved[name].to(accelerator.device) for name in trained(model)]

    def save_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(models[0])
            save(model, os.path.join(output_dir, "transformer"))
            if ema is not None:
                with ema_weights(ema, model):
                    save(model, os.path.join(output_dir, "transformer_ema"))
            for name, holder in tensors.items():
                save_file(holder.state_dict(), os.path.join(output_dir, f"{name}.safetensors"))
        # What is taken out here, accelerate does not save a second time.
        weights.clear()

    @torch.no_grad()
    def load_hook(models, input_dir):
        model = accelerator.unwrap_model(models.pop())
        torch._foreach_copy_(list(trained(model).values()), load(model, os.path.join(input_dir, "transformer")))
        if ema is not None:
            torch._foreach_copy_(ema.shadow_params, load(model, os.path.join(input_dir, "transformer_ema")))
        for name, holder in tensors.items():
            holder.load_state_dict(load_file(os.path.join(input_dir, f"{name}.safetensors")))

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


class RunningMeans:
    """Means of device scalars between two reads: adding never waits for the device, reading waits once."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, **values: torch.Tensor):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over what was added and over processes; starts anew."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        means = accelerator.reduce(means, reduction="mean").tolist()
        self.sums, self.counts = {}, {}
        return dict(zip(names, means))


class MetricsFile:
    """`metrics.jsonl`: one line per logged step. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)

    def write(self, step: int, values: dict[str, float]):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, without a last line that a crash cut short."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
