# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Checkpoints: writes them atomically with a manifest, finds, checks and loads them."""

import contextlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Collection, Set
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import recurse_remove_peft_layers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..alignment.attach import AlignedTransformer
from ..config import (
    GenerativeConfig,
    VRPOConfig,
    alignment_end_of,
    changeable_options,
    end_of_alignment,
    options_of,
    settings_to_keep,
)
from ..errors import InputError, first_line
from ..files import default_permissions, find_irregular, sync_to_disk
from ..models.start import weights_checksum
from ..pipelines.pipeline_vrpo import VRPOPipeline
from ..random_streams import NEWEST_STREAMS, STREAM_VERSIONS
from ..schemas import MANIFEST as MANIFEST_SCHEMA
from ..schemas import TRAINING_STATE, read_object
from .distributed import copy_tensors, full_model, full_tensor, original_class, run_and_share_errors
from .metrics import RunningMeans
from .output_dir import check_inputs, claim_output_dir
from .setup import set_learning_rate, trainable_parameters


logger = get_logger(__name__)
# The behaviour of version 0.1 where there are options now, so that its runs are not continued with other values.
BEFORE_IT_WAS_AN_OPTION = {
    "token_weighting": "uniform",
    "target_norm": "none",
    "timestep_sampling": "uniform",
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target": None,
    "optimizer": "adamw",
    "optimizer_args": None,
    "random_streams": 1,
    "ema_every": 1,
    "vae_dtype": "float32",
    "jpeg_draft": False,
    "fp8": False,
}
SAMPLES_A_STEP = "the number of samples a step"  # recorded in checkpoints
OPTIONS_OF_A_STEP = ("train_batch_size", "gradient_accumulation_steps")
MANIFEST = "manifest.json"  # in a checkpoint: size and CRC-32 of every other file


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Lists the checkpoints of a run, in ascending order of their steps."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a `checkpoint-N`."""
    return int(checkpoint.name.split("-")[1])


def checksum(path: Path) -> int:
    """CRC-32 of a file, which is enough to detect torn writes and bit rot, and runs at 4 GB/s."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def write_manifest(folder: Path):
    """Writes the size and checksum of every file, as the last file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    table = {str(path.relative_to(folder).as_posix()): [path.stat().st_size, checksum(path)] for path in files}
    (folder / MANIFEST).write_text(json.dumps({"size and CRC-32": table}, indent=1))
    sync_to_disk(folder / MANIFEST)


def find_damage(checkpoint: Path) -> str | None:
    """Reads all files of a checkpoint and describes the first damage; None if every file is as it was saved."""
    name = MANIFEST
    try:
        table = read_object(checkpoint / MANIFEST, MANIFEST_SCHEMA)["size and CRC-32"]
        for name, (size, value) in table.items():
            if not is_within(name):
                return f"{MANIFEST} names {name}, which is outside of the checkpoint"
            if irregular := find_irregular(checkpoint / name):
                return f"{name} is {irregular[1]}"
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if checksum(checkpoint / name) != value:
                return f"{name} is not what was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not what was saved"
    # Files that the manifest does not list have not been checked yet; none of them may be a link or a pipe.
    if irregular := find_irregular(checkpoint):
        return f"{irregular[0].name} is {irregular[1]}"
    return None


def is_within(name: str) -> bool:
    """Whether a relative name in a manifest stays inside the checkpoint."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not PureWindowsPath(name).drive


def tidy_checkpoints(output_dir: str | Path):
    """Removes checkpoints that a killed process left half written or half deleted; completes one that only lacks its name."""
    for path in Path(output_dir).glob(".checkpoint-*.tmp"):
        final = path.with_name(path.name[1 : -len(".tmp")])
        if not final.exists() and find_damage(path) is None:
            os.replace(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in Path(output_dir).glob(".checkpoint-*.old"):
        shutil.rmtree(path, ignore_errors=True)
    for path in Path(output_dir).glob(".shared-*"):
        path.unlink(missing_ok=True)


def remove_checkpoint(checkpoint: Path):
    """Deletes a checkpoint. If the process is killed in the meantime, nothing remains that looks like a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def find_checkpoint(resume_from_checkpoint: str, output_dir: str | Path, overwrite: bool = False) -> Path | None:
    """Finds the folder for `resume_from_checkpoint`; returns None for a new run.

    `latest` is the newest intact checkpoint, or None if there are no checkpoints; newer damaged ones are reported and renamed
    to `checkpoint-N.damaged`. `hub` is `latest` after the download from the Hub. `none` is None. Anything else is a path,
    possibly relative to the output folder. The path of another folder's checkpoint means `latest`, too, once the output
    folder has checkpoints of that step or later ones: the run that began there continues. Only one process may call this.

    Args:
        overwrite: whether `none` ignores checkpoints of the output folder, because they will be removed.

    Raises:
        InputError: if the path is not a checkpoint, is damaged or is older than the newest one of the output folder, all
            checkpoints are damaged, or `none` is given and the output folder already holds a run.
    """
    tidy_checkpoints(output_dir)
    existing = list_checkpoints(output_dir)
    if resume_from_checkpoint in ("latest", "hub"):
        return newest_whole_checkpoint(existing)
    if resume_from_checkpoint == "none":
        if existing and not overwrite:
            raise InputError(
                "resume_from_checkpoint",
                f"`resume_from_checkpoint` none would mix a new run with {existing[-1]}; choose another `output_dir`, give "
                "`latest` to continue that run, or add `overwrite_output_dir` to remove it",
            )
        return None
    path = Path(resume_from_checkpoint)
    if not path.is_dir() and (Path(output_dir) / resume_from_checkpoint).is_dir():
        path = Path(output_dir) / resume_from_checkpoint
    if not ((path / "training_state.json").is_file() or (path / MANIFEST).is_file()):
        known = f"; {output_dir} has {', '.join(p.name for p in existing)}" if existing else ""
        raise InputError(
            "resume_from_checkpoint",
            f"`resume_from_checkpoint` {resume_from_checkpoint} is not a checkpoint of this trainer, because it has no "
            f"training_state.json; give a checkpoint-N folder or `latest`{known}",
        )
    own = path.resolve().parent == Path(output_dir).resolve()
    if existing and own and path.name != existing[-1].name:
        raise InputError(
            "resume_from_checkpoint",
            f"`resume_from_checkpoint` {resume_from_checkpoint} is older than {existing[-1]}; to branch off from it choose "
            "another `output_dir`, to continue that run give `latest`",
        )
    if damage := find_damage(path):
        raise InputError(
            "resume_from_checkpoint",
            f"`resume_from_checkpoint` {resume_from_checkpoint} is damaged ({damage}); give another, or `latest` for the "
            "newest undamaged one in `output_dir`",
        )
    if existing and not own and not overwrite and step_of(existing[-1]) >= read_training_state(path)["step"]:
        return newest_whole_checkpoint(existing)
    return path


def newest_whole_checkpoint(existing: list[Path]) -> Path | None:
    """Returns the last of `existing` whose files are as they were saved, and renames the damaged ones after it.

    Raises:
        InputError: if all checkpoints are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(existing):
        damage = find_damage(path)
        if damage is None:
            break
        damaged.append((path, damage))
    else:
        if existing:
            raise InputError(
                "output_dir",
                f"all checkpoints in {existing[0].parent} are damaged ({'; '.join(f'{p.name}: {d}' for p, d in damaged)}); "
                "restore one, remove them to start again, or choose another `output_dir`",
            )
        return None
    for bad, damage in damaged:
        aside = bad.with_name(f"{bad.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(bad, aside)
        # accelerate's logger cannot be used, because only one process gets here.
        logging.getLogger(__name__).warning(
            f"{bad} is damaged ({damage}) and was renamed to {aside.name}; continuing from {path.name}"
        )
    return path


def choose_checkpoint(accelerator: Accelerator, args: VRPOConfig, output_dir: Path) -> Path | None:
    """Calls `find_checkpoint` and `claim_output_dir` on the main process; returns the checkpoint on all processes.

    Raises:
        InputError: if these functions raise it, or the processes do not share the output folder.
    """
    found: list[str | None] = [None]
    mark = output_dir / broadcast_object_list([f".shared-{time.time_ns()}"])[0]

    def look():
        check_inputs(args, output_dir)
        checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir, args.overwrite_output_dir)
        claim_output_dir(args, output_dir, checkpoint)
        found[0] = None if checkpoint is None else str(checkpoint)
        mark.write_text("")

    def see():
        # A network file system may show a new file late.
        for _ in range(60):
            if mark.name in os.listdir(output_dir):
                return
            time.sleep(1)
        raise InputError(
            "output_dir",
            f"`output_dir` {output_dir} is not the same folder for all processes; give one on a file system that all "
            "machines share",
        )

    try:
        failure = run_and_share_errors(accelerator, look, where=accelerator.is_main_process) or run_and_share_errors(
            accelerator, see
        )
    finally:
        if accelerator.is_main_process:
            mark.unlink(missing_ok=True)
    if failure:
        raise InputError("output_dir", f"`output_dir` {output_dir} cannot be read or written: {failure}")
    return None if broadcast_object_list(found)[0] is None else Path(found[0])


def read_training_state(checkpoint: Path) -> dict:
    """Reads the JSON state of a checkpoint.

    Raises:
        InputError: if the state is damaged.
    """
    try:
        return read_object(checkpoint / "training_state.json", TRAINING_STATE)
    except (OSError, ValueError) as error:
        raise InputError(
            "resume_from_checkpoint",
            f"`resume_from_checkpoint` {checkpoint} is damaged (training_state.json: {first_line(error)}); remove it to "
            "continue from the checkpoint before it",
        ) from error


def check_settings(state: dict, expected: dict, checkpoint: Path, allowed: Set[str] = frozenset()) -> dict[str, list]:
    """Checks that the state of a checkpoint belongs to the same run.

    Args:
        state: the state, as `read_training_state` returns it.
        expected: settings that must not have changed, by name (`run_settings`). A setting that the checkpoint does not
            have, because an older version made it, is compared with the behaviour of that version, or not at all.
        checkpoint: the checkpoint, for the error message.
        allowed: names of options that may have changed.

    Returns:
        the settings that have changed, `{name: [before, now]}`.

    Raises:
        InputError: if another setting has changed.
    """
    changes = {}
    # Version 0.1 kept options under the names of their flags.
    settings = {name.removeprefix("--"): value for name, value in state["settings"].items()}
    if settings.get("reward_weighting") == "equal" and "reward_weightings" not in state:
        # Version 0.1 called `equal` what is called `raw` now.
        settings["reward_weighting"] = "raw"
        if expected.get("reward_weighting") == "equal":
            raise InputError(
                "reward_weighting",
                f"`reward_weighting` equal has another meaning since the version that saved {checkpoint}; what it meant is now "
                "called raw: give `reward_weighting` raw to continue the run",
            )
    for name, value in BEFORE_IT_WAS_AN_OPTION.items():
        settings.setdefault(name, value)
    if "conflict" in settings and "release" not in settings:
        stop_step = settings.get("alignment_stop_step")
        settings["release"] = end_of_alignment(settings["conflict"], None, stop_step)[1]
    for name, value in expected.items():
        if name not in settings or settings[name] == value:
            continue
        options = OPTIONS_OF_A_STEP if name == SAMPLES_A_STEP else (name,)
        if not allowed.isdisjoint(options):
            changes[name] = [settings[name], value]
            continue
        is_option = name in options_of(VRPOConfig)
        permit = f", give `allow_changed` {options[0]} to change it here" if options[0] in changeable_options() else ""
        raise InputError(
            name if is_option else None,
            f"{f'`{name}`' if is_option else name} is {value}, but {checkpoint} was trained with {settings[name]}; keep that "
            f"value{permit}, or start a new run in another `output_dir`",
        )
    return changes


def recorded_streams(state: dict) -> int:
    """The version of the random draws in the state of a checkpoint.

    Raises:
        InputError: if this version of the package does not know that version.
    """
    version = state["settings"].get("random_streams", BEFORE_IT_WAS_AN_OPTION["random_streams"])
    if version not in STREAM_VERSIONS:
        raise InputError(
            "resume_from_checkpoint",
            f"`resume_from_checkpoint`: the run uses version {version} of the random draws, and this version of the package "
            f"knows {', '.join(map(str, STREAM_VERSIONS))}; continue the run with the version of the package that began it",
        )
    return version


def take_changes(args: VRPOConfig, changes: dict[str, list], scheduler: torch.optim.lr_scheduler.LambdaLR):
    """Sets the changed values of options in the loaded optimizer and schedule.

    A learning rate that is not `learning_rate`, such as that of the generative policy once it has begun, does not change.

    Args:
        args: the options, with their new values.
        changes: the result of `check_settings`.
        scheduler: the schedule, with its optimizer.
    """
    before, now = changes.get("learning_rate", (None, None))
    scheduler.base_lrs = [now if rate == before else rate for rate in scheduler.base_lrs]
    for group, rate, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        set_learning_rate(group, rate * factor(scheduler.last_epoch))
        if not changes.keys().isdisjoint(("adam_beta1", "adam_beta2")):
            group["betas"] = (args.adam_beta1, args.adam_beta2)
        for name, entry in {"adam_weight_decay": "weight_decay", "adam_epsilon": "eps"}.items():
            if name in changes:
                group[entry] = changes[name][1]


def run_settings(
    config: VRPOConfig,
    data,
    aligned: AlignedTransformer,
    global_batch_size: int,
    mixed_precision: str,
    label_dropout: float,
) -> dict:
    """The settings that a resumed run must keep, by name: all options that are not marked free, and derived values.

    They do not include the data (`data_settings`) and the generative policy, which keeps its options from its start step on.

    Args:
        data (`TrainingData`): the data of the run.
        global_batch_size: examples per optimizer step on all processes.
        mixed_precision: the accelerator's value.
        label_dropout: share of samples without their class.
    """
    settings = {}
    for group in VRPOConfig.__bases__:
        if group is not GenerativeConfig:
            settings |= settings_to_keep(config, group)

    # Options marked `RESOLVED` are compared by the values that follow from them.
    transformer = aligned.transformer
    settings["mixed_precision"] = mixed_precision
    settings["vae"] = Path(config.vae or data.vae or "none").name
    settings["conflict"], settings["release"] = alignment_end_of(config)
    settings["label_dropout"] = label_dropout
    settings["allow_tf32"] = config.allow_tf32
    settings["random_streams"] = config.random_streams or NEWEST_STREAMS
    settings["streaming"] = config.streaming or None  # the form in which version 0.1 recorded it
    settings[SAMPLES_A_STEP] = global_batch_size  # the order of streamed images depends on it
    if config.lora_rank:
        # Adapters can continue only on the same weights.
        frozen = (parameter for parameter in transformer.parameters() if not parameter.requires_grad)
        settings["the checksum of the frozen weights"] = weights_checksum(frozen)
    for name, value in (transformer.config | aligned.description()).items():
        if not name.startswith("_"):
            settings[f"the model's {name}"] = list(value) if isinstance(value, tuple) else value
    return settings


def load_checkpoint(accelerator: Accelerator, checkpoint: Path):
    """Loads a checkpoint that `save_checkpoint` has saved: weights, averaged weights, optimizer and statistics.

    Raises:
        InputError: if a part of it is missing, does not fit, or was saved with other options.
    """

    def load():
        try:
            accelerator.load_state(str(checkpoint))
        except InputError:
            raise
        except (OSError, LookupError, EOFError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
            raise InputError(
                "resume_from_checkpoint",
                f"`resume_from_checkpoint` {checkpoint} cannot be loaded ({first_line(error)}); remove it to continue from "
                "the checkpoint before it",
            ) from error

    run_and_share_errors(accelerator, load)
    # Only whole steps are saved, so micro-steps are counted from 0, even if gradient accumulation has changed.
    accelerator.step = 0


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: dict, limit: int | None = None
) -> bool:
    """Saves `checkpoint-{step}` on all processes.

    The files are written to a temporary folder, which is renamed once all of them are on the disk, so that a failure does
    not affect earlier checkpoints. If they cannot be written, an error is logged.

    Args:
        state: the state that `read_training_state` will return; JSON types only.
        limit: the number of checkpoints to keep; the oldest are removed after the new one is complete. None or 0 keeps all.

    Returns:
        whether the checkpoint was saved, the same on all processes.
    """
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"

    def make():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def write():
        accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            (temporary / "training_state.json").write_text(json.dumps(state, indent=1))

    def flush():
        sync_to_disk(*temporary.rglob("*"))

    def publish():
        default_permissions(temporary)
        write_manifest(temporary)
        sync_to_disk(temporary)
        if final.exists():
            remove_checkpoint(final)
        os.replace(temporary, final)
        sync_to_disk(output_dir)

    is_main, is_local_main = accelerator.is_main_process, accelerator.is_local_main_process
    failure = (
        run_and_share_errors(accelerator, make, where=is_main)
        or run_and_share_errors(accelerator, write)
        # Each machine flushes the files that it has written.
        or run_and_share_errors(accelerator, flush, where=is_local_main)
        or run_and_share_errors(accelerator, publish, where=is_main)
    )
    if failure is None:
        if is_main:
            for old in list_checkpoints(output_dir)[:-limit] if limit else []:
                with contextlib.suppress(OSError):
                    remove_checkpoint(old)
            shutil.rmtree(output_dir / f"{final.name}.damaged", ignore_errors=True)
        logger.info(f"saved {final}")
    elif is_main:
        free = ""
        with contextlib.suppress(OSError):  # the folder may be gone
            free = f"; {shutil.disk_usage(output_dir).free / 1e9:.1f} GB were free"
        shutil.rmtree(temporary, ignore_errors=True)
        kept = list_checkpoints(output_dir)
        before = f"the run can be continued from {kept[-1]}" if kept else "there is no checkpoint before it"
        logger.error(f"{final} could not be saved ({failure}{free}); {before}")
    accelerator.wait_for_everyone()
    return failure is None


def save_lora(model: torch.nn.Module, folder: Path):
    """Writes the LoRA adapters of a model to a folder, and then merges them into the model's weights.

    `VRPOPipeline.load_lora_weights(folder)` loads the adapters, as does `transformer.load_lora_adapter` if the class has it.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers, config = get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
    VRPOPipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config)
    if isinstance(model, PeftAdapterMixin):
        model.fuse_lora()
        model.unload_lora()
        return
    # Some classes of diffusers do not have these methods.
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    recurse_remove_peft_layers(model)
    del model.peft_config


def register_model_hooks(
    accelerator: Accelerator,
    ema: EMAModel | None,
    tensors: dict,
    means: "RunningMeans",
    optional: Collection[str] = (),
):
    """Registers hooks with accelerate that save and load the weights, the averaged weights, and further tensors.

    The transformer's weights are in `transformer/` and `transformer_ema/`, which `from_pretrained` opens. The projectors' are
    in `projectors.safetensors` and `projectors_ema.safetensors`, and a scaffold's in `scaffold.safetensors` and
    `scaffold_ema.safetensors`. If only adapters of the transformer are trained, only their weights are saved, in
    `transformer.safetensors` and `transformer_ema.safetensors`. Checkpoints of version 0.1, which has the projectors among
    the transformer's weights, can also be loaded.

    Args:
        tensors: objects by name, the same on all processes, whose `state_dict` and `load_state_dict` handle tensors; each is
            saved as `{name}.safetensors`.
        means: the running means of each process, saved as `running_means_{process}.safetensors`.
        optional: names of `tensors` that a checkpoint may lack; these objects then keep their state.
    """

    def save_hook(models, weights, output_dir):
        aligned = accelerator.unwrap_model(models[0])
        for suffix, average in {"": None, "_ema": ema}.items():
            if suffix == "" or average is not None:
                save_aligned(accelerator, aligned, average, Path(output_dir), suffix)
        if accelerator.is_main_process:
            for name, holder in tensors.items():
                if state := holder.state_dict():
                    save_file(state, os.path.join(output_dir, f"{name}.safetensors"))
        name = f"running_means_{accelerator.process_index}.safetensors"
        save_file(means.state_dict(), os.path.join(output_dir, name))
        # accelerate does not save the models that are removed from its list here.
        weights.clear()

    @torch.no_grad()
    def load_hook(models, input_dir):
        # Sharded models are not in the list: accelerate has already loaded its own files for them.
        aligned = accelerator.unwrap_model(models.pop() if models else accelerator._models[0])
        copy_tensors(trainable_parameters(aligned), load_aligned(aligned, Path(input_dir), ""))
        if ema is not None:
            copy_tensors(ema.shadow_params, load_aligned(aligned, Path(input_dir), "_ema"))
        for name, holder in tensors.items():
            file = os.path.join(input_dir, f"{name}.safetensors")
            if name not in optional or os.path.exists(file):
                holder.load_state_dict(load_file(file))
        saved = list(Path(input_dir).glob("running_means_*.safetensors"))
        saved.sort(key=lambda path: int(path.stem.split("_")[-1]))
        means.load_state_dicts([load_file(path) for path in saved], accelerator)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def is_whole(transformer: torch.nn.Module) -> bool:
    """Whether all weights of a transformer are trained, instead of adapters only."""
    return all(parameter.requires_grad for parameter in transformer.parameters())


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name."""
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_aligned(
    accelerator: Accelerator, aligned: AlignedTransformer, average: EMAModel | None, folder: Path, suffix: str
):
    """Writes the weights of transformer, projectors and scaffold to files whose names end in `suffix`.

    All processes must call it.

    Args:
        average: averaged weights to write instead of the model's own.
    """
    with full_model(accelerator, aligned.transformer, average) as transformer:
        if accelerator.is_main_process and is_whole(aligned.transformer):
            transformer.save_pretrained(folder / f"transformer{suffix}")
        elif accelerator.is_main_process:
            weights = {name: tensor.contiguous() for name, tensor in trained(transformer).items()}
            save_file(weights, folder / f"transformer{suffix}.safetensors")
    # The averaged weights are in the order of the trained parameters: the transformer's, the projectors', the scaffold's.
    averages = [] if average is None else list(average.shadow_params)
    for name, part in reversed(attached_parts(aligned).items()):
        names = list(part.state_dict())
        weights = list(part.parameters())
        if average is not None:
            averages, weights = averages[: -len(names)], averages[-len(names) :]
        weights = [full_tensor(tensor.detach()).contiguous() for tensor in weights]
        if accelerator.is_main_process:
            metadata = {"description": json.dumps(aligned.description())}
            save_file(dict(zip(names, weights)), folder / f"{name}{suffix}.safetensors", metadata)


def attached_parts(aligned: AlignedTransformer) -> dict[str, torch.nn.Module]:
    """The modules trained together with the transformer, by the names of their files, in the order of the parameters."""
    parts = {"projectors": aligned.projectors, "scaffold": aligned.scaffold}
    return {name: part for name, part in parts.items() if part is not None and part.state_dict()}


def load_aligned(aligned: AlignedTransformer, folder: Path, suffix: str) -> list[torch.Tensor]:
    """Reads the weights that `save_aligned` or version 0.1 wrote, in the order of the trained parameters."""
    transformer = aligned.transformer
    if is_whole(transformer):
        path = folder / f"transformer{suffix}"
        saved = original_class(transformer).from_pretrained(path).state_dict()
    else:
        saved = load_file(folder / f"transformer{suffix}.safetensors")
    found = [saved[name] for name in trained(transformer)]
    for name, part in attached_parts(aligned).items():
        file = folder / f"{name}{suffix}.safetensors"
        if file.is_file() or name == "scaffold":
            weights = load_file(file)
        else:  # version 0.1
            for shard in (folder / f"transformer{suffix}").glob("*.safetensors"):
                saved |= load_file(shard)
            weights = {name.removeprefix("projectors."): tensor for name, tensor in saved.items()}
        found += [weights[name] for name in part.state_dict()]
    return found
