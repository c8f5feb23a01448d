# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Reading and writing files safely: written files are complete or absent, and links and special files are refused."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path


# The most pixels that an image may have to be decoded. Even a small file can claim more; decoding it would take
# minutes and gigabytes.
LARGEST_IMAGE = 2**27


def open_regular(path: Path, flags: int) -> int:
    """Opens a regular file as `os.open` does and returns its descriptor. It does not follow links or wait for pipes.

    Raises:
        OSError: if the file cannot be opened, or is a link, a pipe, a device or a folder.
    """
    extra = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link to another file", str(path))
    descriptor = os.open(path, flags | extra, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def read_regular(path: Path) -> str:
    """Reads the text of a regular file; bytes that are not UTF-8 become U+FFFD.

    Raises:
        OSError: if it cannot be read, or is a link, a pipe, a device or a folder.
    """
    with os.fdopen(open_regular(Path(path), os.O_RDONLY), "rb") as file:
        return file.read().decode("utf-8", errors="replace")


def open_image(source):
    """Opens an image, given as a path or a binary file, as `PIL.Image.open` does, which does not decode it yet.

    Raises:
        ValueError: if it has more than `LARGEST_IMAGE` pixels.
        OSError: if it cannot be read or is not an image.
    """
    from PIL import Image

    try:
        image = Image.open(source)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    if image.width * image.height > LARGEST_IMAGE:
        image.close()
        raise ValueError(f"{image.width}x{image.height} are more than {LARGEST_IMAGE} pixels")
    return image


def find_irregular(path: Path) -> tuple[Path, str] | None:
    """Finds the first link or special file: `path` itself or anything below it.

    Returns:
        its path and a description of it, or None if there is none.
    """
    waiting = [path]
    while waiting:
        path = waiting.pop()
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(mode):
            return path, f"a link to {os.readlink(path)}"
        if stat.S_ISDIR(mode):
            waiting += sorted(path.iterdir(), reverse=True)
        elif not stat.S_ISREG(mode):
            return path, "a pipe or device"
    return None


def irregular_problem(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """Describes the first link or special file in a folder of results, for an error message; None if there is none.

    Args:
        names: the names of the files and folders in it to check; all by default.
    """
    folder = folder.resolve()  # it may be a link itself, which leads to where the user wants the results
    for path in [folder] if names is None else [folder / name for name in names]:
        if found := find_irregular(path):
            return (
                f"{found[0].relative_to(folder)} is {found[1]}, which this program does not follow; remove it, or choose "
                "a new or empty folder"
            )
    return None


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path; after the `with` block, the file written there replaces `path` atomically.

    If the block or the disk fails, `path` is unchanged and the temporary file is removed.

    Args:
        sync: wait until the file is on the disk, so that a power failure cannot leave an empty file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # writing would follow a link with this name
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync and os.name == "posix":  # the new name is part of the folder's data
        sync_to_disk(path.parent)


def write_atomically(path: Path, data: bytes):
    """Writes a file atomically: after a crash it holds either the old or the new content."""
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(data)


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
    """Gives weight files the permissions of the umask, since safetensors makes them readable by their owner only.

    Args:
        paths: files, or folders, whose `.safetensors` files get the permissions.
    """
    umask = os.umask(0o077)  # the umask can only be read by setting it; this one keeps files of other threads private
    os.umask(umask)
    for path in paths:
        for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
            file.chmod(0o666 & ~umask)


def packaged(name: str) -> Path:
    """The path of something, such as `configs`, that is inside the package in a wheel and at the top in a checkout."""
    inside = Path(__file__).with_name(name)
    return inside if inside.exists() else Path(__file__).parents[2] / name
