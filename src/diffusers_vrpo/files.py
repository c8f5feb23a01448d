# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes):
    """The file is the old one or the new one, whole, whenever the process or the machine stops."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name itself
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
