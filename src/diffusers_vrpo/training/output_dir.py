# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The output folder of a run: it can be written, and one run at a time writes into it."""

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
            "output_dir",
            f"`output_dir` {output_dir} cannot be written ({error.strerror or error}); choose another folder",
        ) from error
    return path


@contextlib.contextmanager
def locked(folder: Path):
    """Inside, no other run can be started in the folder; the lock ends with the process, however that ends.

    Only the main process takes it. File systems without locks are used without.

    Raises:
        InputError: when a run is going on there.
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
            # A POSIX lock: unlike flock's, the data loader's processes do not inherit it.
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
def written(what: str):
    """Inside, a file that cannot be written (a full disk) ends the run with a sentence.

    Raises:
        TrainingStopped: then.
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
    """The cause in words of an exception that is a failing disk's, as Python, safetensors and torch raise it."""
    if isinstance(error, CheckpointException):  # of sharded weights: what failed on which process
        return next(iter({unwritable(failure[0]) for failure in error.failures.values()}), None)
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    if isinstance(error, SafetensorError):
        found = re.search(r'I/O error: (.*) \(os error|IoError\(.*message: "(.*)"', str(error))
        return (found[1] or found[2]) if found else None
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
        return "a file could not be written in full"
    return None
