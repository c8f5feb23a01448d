# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The output folder of a run: checks that it can be written, and locks it for one run at a time."""

import contextlib
import os
import re
import socket
from pathlib import Path

from accelerate.utils import get_int_from_env
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import InputError, TrainingStopped, first_line


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def prepare_output_dir(output_dir: str) -> Path:
    """Creates the folder of a run and checks that files can be written in it.

    Raises:
        InputError: if they cannot.
    """
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            "output_dir",
            f"`output_dir` {output_dir} cannot be written ({error.strerror or error}); choose another folder",
        ) from error
    return path


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
        file = (folder / ".lock").open("a+") if fcntl is not None and rank == 0 else None
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
            f"{what} cannot be written ({reason}); make room and run the same command again: it continues from the newest "
            "checkpoint"
        ) from error


def unwritable(error: BaseException) -> str | None:
    """Describes why a file could not be read or written; None for an exception of another kind.

    Args:
        error: as Python, safetensors or torch raise it for a disk that fails or is full.
    """
    if isinstance(error, CheckpointException):  # from sharded weights: the errors by process
        return next(iter({unwritable(failure[0]) for failure in error.failures.values()}), None)
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    if isinstance(error, SafetensorError):
        found = re.search(r'I/O error: (.*) \(os error|IoError\(.*message: "(.*)"', str(error))
        return (found[1] or found[2]) if found else None
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
        return "a file could not be written in full"
    return None
