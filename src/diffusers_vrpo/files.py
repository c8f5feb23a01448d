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
