# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The output folder of a run: checks its contents and that it can be written, and locks it for one run at a time."""

import contextlib
import errno
import fnmatch
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

import yaml
from accelerate.utils import get_int_from_env
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from ..config import VRPOConfig, is_embedded_digits
from ..errors import InputError, TrainingStopped, first_line
from ..files import irregular_problem, open_regular
from ..schemas import METRICS_ROW, START, read_rows


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# What training writes into its folder, apart from its checkpoints and the trackers' files in `logging_dir`.
RECORDS = ("train_config.yaml", "metrics.jsonl", "starts.jsonl", "trackers.json")
RESULTS = (
    "model_index.json",
    "*.py",  # the pipeline's code, in a folder with a model_index.json
    "transformer/*",
    "scheduler/*",
    "vae/*",
    "lora/*",
    "best/*",
    "best/*/*",
    "samples.png",
    "training.png",
)
COMPONENTS = ("transformer", "scheduler", "vae")
AIDS = ("samples/step-*.png", "fd_reference.safetensors", "reward_reference.safetensors", "samples", "best")
CHECKPOINT_FOLDERS = ("checkpoint-*", ".checkpoint-*", ".best.tmp", ".hub")
INPUTS = (
    "pretrained_model_name_or_path",
    "vae",
    "encoder",
    "reward_encoder",
    "image_reward_encoder",
    "reward_vae",
    "fd_encoder",
    "dataset_name",
    "train_data_dir",
    "latents_dir",
    "model_config",
)


def prepare_output_dir(output_dir: str) -> Path:
    """Creates the folder of a run and checks that files can be written in it.

    Raises:
        InputError: if no file can be written, or the folder has a link or special file under a name that training uses.
    """
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if problem := irregular_problem(path, filter(is_ours, sorted(os.listdir(path)))):
            raise InputError("output_dir", f"`output_dir` {output_dir}: {problem}")
        probe = path / f".write-test-{os.getpid()}"
        probe.unlink(missing_ok=True)
        probe.open("x").close()
        probe.unlink()
    except OSError as error:
        raise InputError(
            "output_dir",
            f"`output_dir` {output_dir} cannot be written ({error.strerror or error}); choose another folder",
        ) from error
    return path


def is_ours(name: str) -> bool:
    """Whether training reads or writes a file or folder of this name at the top of its output folder."""
    patterns = [pattern.split("/")[0] for pattern in (*RECORDS, *RESULTS, *AIDS, *CHECKPOINT_FOLDERS)]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*patterns, ".lock", ".*.tmp", ".shared-*"))


def check_inputs(args: VRPOConfig, folder: Path):
    """Checks that a run does not overwrite or remove what it reads.

    Raises:
        InputError: if weights or data are the output folder itself, a part of the pipeline in it, or with
            `overwrite_output_dir` something in it that would be removed.
    """
    place = folder.resolve()
    for name in INPUTS:
        value = getattr(args, name)
        for item in value if isinstance(value, list) else [value]:
            if not item or is_embedded_digits(item) or not Path(item).expanduser().exists():
                continue
            source = Path(item).expanduser().resolve()
            inside = source.is_relative_to(place) and source != place
            removed = inside and args.overwrite_output_dir and is_ours(source.relative_to(place).parts[0])
            result = inside and source.relative_to(place).parts[0] in ("transformer", "vae", "model_index.json")
            if source == place or removed or result:
                raise InputError(
                    "output_dir",
                    f"`output_dir` {args.output_dir} would overwrite `{name}` {item}, which the run starts from; choose another "
                    "folder",
                )


def claim_output_dir(args: VRPOConfig, folder: Path, checkpoint: Path | None):
    """Checks that a run may begin in a folder, and removes what an earlier one left there if `overwrite_output_dir` is set.

    A run may begin if it continues from a checkpoint of the folder, or if the run in the folder ended before its first
    checkpoint. Otherwise the folder must hold nothing but the trackers' folder, hidden files, log files and the files that
    `config` or `model_config` name. Only one process may call this.

    Args:
        checkpoint: the checkpoint to continue from, or None.

    Raises:
        InputError: if files of an earlier run would be lost.
    """
    if checkpoint is not None and checkpoint.resolve().parent == folder.resolve():
        return
    if args.overwrite_output_dir:
        remove_run(folder)
        return
    allowed = {*Path(args.logging_dir).parts[:1]}
    for file in (args.config, args.model_config):
        if file and Path(file).expanduser().resolve().parent == folder.resolve():
            allowed.add(Path(file).name)
    found = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    found = [name for name in found if name not in allowed and Path(name).suffix not in (".log", ".out", ".err")]
    results = [name for name in ("model_index.json", "lora", *COMPONENTS) if name in found]
    if (folder / "samples").is_dir():
        found += [f"samples/{path.name}" for path in (folder / "samples").iterdir() if not path.match("step-*.png")]
    if not found or (
        not results
        and all(is_ours(n) and Path(n).suffix != ".py" for n in found)
        and ended_before_first_checkpoint(folder)
    ):
        return
    shown = results or sorted(found)
    raise InputError(
        "output_dir",
        f"`output_dir` {args.output_dir} holds {', '.join(shown[:3])}{' and more' if len(shown) > 3 else ''}, but no checkpoint "
        "from which this run can continue; choose another folder, or give `overwrite_output_dir` to remove what training has "
        "written there",
    )


def ended_before_first_checkpoint(folder: Path) -> bool:
    """Whether the run in a folder ended before it could save a checkpoint, so that starting again loses nothing."""
    try:
        steps = yaml.safe_load((folder / "train_config.yaml").read_text())["checkpointing_steps"]
        files = [folder / name for name in ("starts.jsonl", "metrics.jsonl")]
        starts, rows = (
            [row["step"] for row in (read_rows(path, wanted)[0] if path.exists() else [])]
            for path, wanted in zip(files, (START, METRICS_ROW))
        )
        first = min(starts, default=0)
        return max([*starts, first]) == first and max(rows, default=0) <= (first // steps + 1) * steps
    except FileNotFoundError:
        return not (folder / "metrics.jsonl").exists()
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError, yaml.YAMLError):
        return False


def remove_run(folder: Path):
    """Removes the checkpoints, records and results of training from a folder, and keeps all other files.

    Raises:
        InputError: before anything is removed, if a `checkpoint-N` has neither a manifest nor a `training_state.json`.
    """
    checkpoints = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+(\.damaged)?", path.name)
    ]
    for path in checkpoints:
        if not ((path / "manifest.json").is_file() or (path / "training_state.json").is_file()):
            raise InputError(
                "output_dir",
                f"`output_dir` {folder} holds {path.name}, which training has not written and `overwrite_output_dir` therefore "
                "does not remove; choose another folder",
            )
    for path in checkpoints:
        shutil.rmtree(path)
    is_pipeline = (folder / "model_index.json").is_file()
    for pattern in (*RECORDS, *RESULTS, *AIDS):
        for path in folder.glob(pattern):
            if path.is_file() and (pattern != "*.py" or is_pipeline):
                path.unlink()
    for name in ("transformer", "scheduler", "vae", "lora", "samples", *(f"best/{p}" for p in COMPONENTS), "best"):
        with contextlib.suppress(OSError):  # the folder is missing, or it holds other files
            (folder / name).rmdir()


@contextlib.contextmanager
def locked(folder: Path):
    """Keeps other runs out of a folder inside the `with` block, or until the process ends, however it ends.

    Only the main process takes the lock. On a file system without locks, the folder is not locked.

    `filelock` is not used because data-loader processes inherit its flock: if the trainer is killed, one of them could keep
    the lock. A POSIX lock belongs to a single process.

    Raises:
        InputError: if another run is using the folder.
    """
    rank = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0)
    try:
        can_lock = fcntl is not None and rank == 0
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        file = os.fdopen(open_regular(folder / ".lock", flags), "a+") if can_lock else None
    except OSError:
        file = None
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise InputError(
                "output_dir",
                f"`output_dir` {folder} is in use by another run ({file.read().strip() or 'unknown'}); wait for its end or "
                "choose another folder",
            ) from error
        except OSError:
            pass
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def check_writable(option: str | None, name: str, target: str | Path):
    """Checks that a file or folder can be created in the nearest folder above it that exists, without creating it.

    Args:
        option: the option that names `target`, or None.
        name: how the error names the option, such as `"`output_dir`"`.
        target: the file or folder.

    Raises:
        InputError: if the file or folder cannot be created.
    """
    path = Path(target)
    try:
        path = path.resolve()
        while not path.exists():
            path = path.parent
        with tempfile.NamedTemporaryFile(dir=path if path.is_dir() or path != Path(target).resolve() else path.parent):
            pass
    except (OSError, RuntimeError) as error:  # a RuntimeError is a loop of links
        reason = getattr(error, "strerror", None) or error
        raise InputError(option, f"{name} {target} cannot be written ({reason}); choose another place") from error


@contextlib.contextmanager
def writing_result(option: str, target: str | Path):
    """Turns a failure to write the result of a command inside the `with` block, such as a full disk, into an InputError.

    Args:
        option: the option that names the file or folder `target`.

    Raises:
        InputError: if the block raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            option,
            f"`{option}` {target} cannot be written ({error.strerror or error}); make room or choose another place",
        ) from error


@contextlib.contextmanager
def writing(what: str):
    """Turns a failure to write `what` inside the `with` block, such as a full disk, into an error that says what to do.

    Raises:
        TrainingStopped: if a file cannot be written.
    """
    try:
        yield
    except Exception as error:
        if (reason := unwritable(error)) is None:
            raise
        raise TrainingStopped(
            f"{what} cannot be written ({reason}); {remedy(reason)} and repeat the command, which continues from the newest "
            "checkpoint"
        ) from error


def remedy(reason: str) -> str:
    """What to do about a file that could not be written; `reason` is the system's error message."""
    if any(os.strerror(code) in reason for code in (errno.ENOENT, errno.ENOTCONN, errno.ESTALE)):
        return "the folder has disappeared: put it back or mount it again"
    if any(os.strerror(code) in reason for code in (errno.EROFS, errno.EACCES)):
        return "make the folder writable"
    return "make room"


def not_saved(folder: Path, step: int) -> TrainingStopped:
    """Returns the error that ends a run whose checkpoint could not be saved."""
    if not folder.is_dir():
        problem = errno.ENOENT
    elif not os.access(folder, os.W_OK):
        problem = errno.EROFS
    else:
        problem = errno.ENOSPC
    what = remedy(os.strerror(problem))
    return TrainingStopped(f"the checkpoint of step {step} could not be saved; {what} and repeat the command")


def unwritable(error: BaseException) -> str | None:
    """Describes why a file could not be read or written; None if the exception has another cause.

    Args:
        error: an exception of Python, safetensors or torch, such as they raise if a disk fails or is full.
    """
    if isinstance(error, CheckpointException):  # of sharded weights; it has the errors of each process
        return next(iter({unwritable(failure[0]) for failure in error.failures.values()}), None)
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    if isinstance(error, SafetensorError):
        found = re.search(r'I/O error: (.*) \(os error|IoError\(.*message: "(.*)"', str(error))
        return (found[1] or found[2]) if found else None
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
        return "a file could not be written in full"
    return None
