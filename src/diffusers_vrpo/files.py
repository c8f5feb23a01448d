# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes):
    """Writes a file atomically: after a crash it holds either the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the folder holds the new name
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def sync_to_disk(*paths: Path):
    """Waits until files and folders are on the disk."""
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def default_permissions(*paths: Path):
    """Gives files of weights the permissions that the umask grants; safetensors writes them for their owner alone.

    Args:
        paths: files, or folders whose `.safetensors` files are meant.
    """
    umask = os.umask(0o077)  # it can only be read by setting it; other threads write private files meanwhile
    os.umask(umask)
    for path in paths:
        for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
            file.chmod(0o666 & ~umask)
