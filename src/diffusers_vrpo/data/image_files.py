# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Lists the image files below a folder and counts the other files. Needs neither `datasets` nor pyarrow."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


# The endings of image files that Pillow reads by itself; training and evaluation share them.
IMAGE_SUFFIXES = frozenset(
    (
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".webp",
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
    )
    + (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpc", ".jpf", ".j2c", ".qoi", ".tga", ".ico", ".icns")
    + (".pcx", ".dds", ".sgi", ".psd", ".xbm", ".xpm")
)
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".rar", ".7z")


@dataclass
class Listing:
    """The image files below a folder, and other files found there.

    Attributes:
        images: paths relative to the folder, with slashes, in the order of their names.
        others: the endings of files that are not images, and how often each occurs.
        hidden: the number of files and folders whose names begin with a dot, and of `__MACOSX` folders.
        broken: the number of links that lead nowhere, back into a folder above, or to something that is not a file.
        archives: the names of archives.
    """

    images: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    hidden: int = 0
    broken: int = 0
    archives: list[str] = field(default_factory=list)

    def left_out(self) -> list[str]:
        """Describes the files that are not used."""
        parts = []
        if self.others:
            endings = ", ".join(f"{count} {ending}" for ending, count in self.others.most_common(5))
            more = f", {len(self.others) - 5} more endings" if len(self.others) > 5 else ""
            parts.append(f"{counted(self.others.total(), 'file')} of other kinds ({endings}{more})")
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        if self.broken:
            parts.append(f"{counted(self.broken, 'link')} to no file")
        return parts


def list_images(folder: str | Path) -> Listing:
    """Lists the image files below a folder; links to files and folders are followed.

    The listing of a folder tells the kind of each entry, so that only links need a system call of their own: a data set
    may have a million files.

    Raises:
        OSError: if a folder cannot be read.
    """
    folder, listing = os.fspath(folder), Listing()
    pending = [("", (os.path.realpath(folder),))]
    while pending:
        place, above = pending.pop()
        with os.scandir(os.path.join(folder, place)) as entries:
            for entry in entries:
                name = f"{place}{entry.name}"
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    listing.hidden += 1
                elif entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else None
                    if real in above:  # a link to a folder above would never end
                        listing.broken += 1
                    else:
                        inside = real or os.path.join(above[-1], entry.name)
                        pending.append((f"{name}/", (*above, inside)))
                elif not entry.is_file():
                    listing.broken += 1
                else:
                    add_file(listing, name)
    listing.images.sort()
    return listing


def add_file(listing: Listing, name: str):
    """Adds a file to a listing; its ending tells its kind."""
    ending = os.path.splitext(name)[1].lower()
    if ending in IMAGE_SUFFIXES:
        listing.images.append(name)
        return
    if name.lower().endswith(ARCHIVE_SUFFIXES):
        listing.archives.append(name)
    listing.others[ending or "without an ending"] += 1


def counted(count: int, noun: str) -> str:
    """A number and what it counts, such as "1 image" or "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def reason_without_images(folder: str, listing: Listing) -> str:
    """Explains why a folder has no images, and what to do."""
    if listing.archives:
        first = listing.archives[0]
        stem = next(first[: -len(ending)] for ending in ARCHIVE_SUFFIXES if first.lower().endswith(ending))
        command = f"unzip -q {first} -d {stem}" if first.endswith(".zip") else f"tar -xf {first} -C {stem}"
        return (
            f"it holds {counted(len(listing.archives), 'archive')} ({first}) and no images; unpack each into a folder of the "
            f"same name (mkdir -p {stem} && {command}), so that there is one folder of images for each class"
        )
    if listing.others[".parquet"]:
        return "it holds parquet files and no images; give the folder as `dataset_name`"
    if os.path.isfile(os.path.join(folder, "latents.npy")):
        return "it holds encoded images; give the folder as `latents_dir`"
    if os.path.isfile(os.path.join(folder, "model_index.json")):
        return "it holds a model and no images; give the folder of the images"
    if listing.others[".arrow"]:
        return (
            "it holds a data set saved with save_to_disk and no images; write it with Dataset.to_parquet and give that as "
            "`dataset_name`"
        )
    if listing.others or listing.hidden or listing.broken:
        return (
            f"it has no images; found are {'; '.join(listing.left_out())}. Image files end in .png, .jpg, .webp, .tif and "
            "others; convert these, or give the folder above the class folders"
        )
    return "the folder is empty; give one with a folder of images for each class"
