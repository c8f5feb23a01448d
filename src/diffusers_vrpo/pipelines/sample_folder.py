# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A folder of samples: a manifest, PNG files and an .npz file, written so that a stopped run continues where it stopped.

    manifest.json      pipeline and its checksum, options, versions, the label of every image, `complete`
    000000.png ...     8-bit RGB (`output_format` png and both)
    samples.npz        `arr_0` uint8 `[N,H,W,3]` and `arr_1` int64 `[N]`, the labels, as ADM writes them (npz and both)
    parts/000000.npy   the images of a batch, until `samples.npz` is complete (npz only)

Files are written atomically (under a temporary name, then renamed), so that a missing file is one that must still be
computed. The composition of batches is fixed: batch b has the images `b batch_size ... (b + 1) batch_size - 1`.
"""

import itertools
import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
from PIL import Image

from ..arrays import map_array
from ..errors import InputError, first_line
from ..files import irregular_problem, open_image, replacing, write_atomically
from ..schemas import SAMPLES, check, read_object


FORMAT = 1
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# How errors name a setting that differs, if not as an option.
NAMES = {
    "pipeline_checksum": "the weights or the config of PIPELINE",
    "scheduler": "the scheduler of PIPELINE",
    "label_ids": "--labels",
}


def cannot_write(folder: Path, error: OSError) -> InputError:
    """The error for a folder that cannot be written."""
    return InputError("output_dir", f"`output_dir` {folder} cannot be written ({error.strerror or error})")


class SampleFolder:
    """The files of one set of samples.

    Args:
        folder: the path of the folder.
        manifest: `{"pipeline", "pipeline_checksum", "options": {"num_images", "batch_size", "output_format", ...},
            "versions", "labels"}`, of JSON types. Checksum, options and versions must determine the images.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = Path(folder), manifest
        self.num_images = manifest["options"]["num_images"]
        self.batch_size = manifest["options"]["batch_size"]
        self.output_format = manifest["options"]["output_format"]
        self.num_batches = -(-self.num_images // self.batch_size)
        self.npz = self.folder / "samples.npz"

    def png(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def part(self, batch: int) -> Path:
        return self.folder / "parts" / f"{batch:06d}.npy"

    def indices(self, batch: int) -> range:
        """The indices of a batch's images that are kept; the last batch is computed with padding."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_images))

    # ------------------------------------------------------------------------------------------------------------------
    # Before

    def prepare(self, overwrite: bool = False) -> tuple[list[int], list[str]]:
        """Prepares the folder; a single process calls it while no other writes.

        Args:
            overwrite: remove samples that are already there.

        Returns:
            the batches with missing images, and descriptions of how the versions differ from those recorded in the
            folder.

        Raises:
            InputError: if the folder holds something else or other samples, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = self._read_manifest()
            if problem := irregular_problem(self.folder):
                raise InputError("output_dir", f"`output_dir` {self.folder}: {problem}")
            if found is not None and overwrite:
                remove_samples(self.folder)
                found = None
            if found is not None:
                self._refuse_another(found)
                if found["options"]["num_images"] < self.num_images:
                    self.npz.unlink(missing_ok=True)
            for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob("parts/.*.tmp")]:
                leftover.unlink()
            differences = []
            if found is not None:
                then, now = found["versions"], self.manifest["versions"]
                differences = [
                    f"{name} {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]
                ]
                self.manifest["versions"] = then
            if self.output_format == "npz":
                (self.folder / "parts").mkdir(exist_ok=True)
            missing = [batch for batch in range(self.num_batches) if not self._has(batch)]
            if found is None or missing or found["options"] != self.manifest["options"]:
                self._write_manifest(complete=False)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return missing, differences

    def _read_manifest(self) -> dict | None:
        path = self.folder / "manifest.json"
        if not os.path.lexists(path):
            if others := sorted(p.name for p in self.folder.iterdir() if not p.match(".*.tmp")):
                raise InputError(
                    "output_dir",
                    f"`output_dir` {self.folder} holds other files ({', '.join(others[:3])}) and no manifest.json of "
                    "samples; choose a new or empty folder",
                )
            return None
        try:
            manifest = read_object(path, {"format": int})
            if manifest["format"] == FORMAT and set(SAMPLES) - {"complete?"} <= set(manifest):
                return check(manifest, SAMPLES)
        except (OSError, ValueError) as error:
            raise InputError(
                "output_dir",
                f"`output_dir` {self.folder}: manifest.json is not a manifest of samples ({first_line(error)}); choose a new or "
                "empty folder",
            ) from error
        raise InputError(
            "output_dir",
            f"`output_dir` {self.folder}: manifest.json is not one that this version reads; choose a new or empty folder",
        )

    def _refuse_another(self, found: dict):
        """Raises InputError if the samples in the folder were made with other options; `num_images` may grow."""
        was = {"pipeline_checksum": found["pipeline_checksum"], **found["options"]}
        now = {"pipeline_checksum": self.manifest["pipeline_checksum"], **self.manifest["options"]}
        for name in [*now, *was]:
            grows = name == "num_images" and self.output_format != "npz" and was.get(name, 0) < now[name]
            if was.get(name) == now.get(name) or grows:
                continue
            what = f"{NAMES.get(name, f'--{name}')} was {was.get(name)} and is {now.get(name)}"
            if name in NAMES:
                what = f"{NAMES[name]} differed"
            raise InputError(
                "output_dir",
                f"`output_dir` {self.folder} holds samples made with other options: {what}; keep to that, choose another folder, "
                "or give `overwrite`",
            )

    def _write_manifest(self, complete: bool):
        manifest = {"format": FORMAT, "complete": complete, **self.manifest}
        labels = json.dumps(manifest.pop("labels"))
        text = json.dumps(manifest, indent=1)[:-2] + f',\n "labels": {labels}\n}}\n'
        write_atomically(self.folder / "manifest.json", text.encode())

    def _has(self, batch: int) -> bool:
        if self.output_format == "npz":
            return self.npz.exists() or is_whole_part(self.part(batch), len(self.indices(batch)))
        return all(is_whole_png(self.png(index)) for index in self.indices(batch))

    # ------------------------------------------------------------------------------------------------------------------
    # Images

    def write(self, batch: int, images: np.ndarray, pool: Executor) -> list[Future]:
        """Writes the missing files of a batch in the threads of a pool.

        Args:
            batch: the number of the batch.
            images: uint8 `[B,H,W,3]`, with the padding.
            pool: the threads.

        Returns:
            a future per file, whose `result()` raises OSError if the file could not be written.
        """
        indices = self.indices(batch)
        if self.output_format == "npz":
            return [pool.submit(write_array, self.part(batch), images[: len(indices)])]
        missing = [i for i in indices if not is_whole_png(self.png(i))]
        return [pool.submit(write_png, self.png(i), images[i - indices.start]) for i in missing]

    def read(self, batch: int) -> np.ndarray:
        """Reads the kept images of a batch, uint8 `[n,H,W,3]`."""
        if self.output_format == "npz":
            return map_array(self.part(batch))
        return np.stack([np.asarray(open_image(self.png(i)).convert("RGB")) for i in self.indices(batch)])

    def finish(self):
        """Writes `samples.npz` if requested and marks the manifest `complete`; a single process calls it at the end.

        Raises:
            InputError: if a file cannot be read or written.
        """
        try:
            if self.output_format != "png" and not self.npz.exists():
                write_npz(self.npz, map(self.read, range(self.num_batches)), self.num_images, self.manifest["labels"])
            for path in self.folder.glob("parts/[0-9]*.npy"):
                path.unlink()
            if (self.folder / "parts").is_dir():
                (self.folder / "parts").rmdir()
            self._write_manifest(complete=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error


def remove_samples(folder: Path):
    """Removes the files of a `SampleFolder`; the manifest is last, since it marks the folder as one of samples."""
    npz = folder / "samples.npz"
    for path in [*folder.glob("[0-9]*.png"), *folder.glob("parts/[0-9]*.npy"), npz]:
        if path == npz or path.stem.isdigit():
            path.unlink(missing_ok=True)
    (folder / "manifest.json").unlink()


def unfinished_samples(folder: Path) -> int | None:
    """The number of images that an unfinished folder of samples will have; None for any other folder."""
    try:
        manifest = read_object(folder / "manifest.json", {"complete": bool, "options": {"num_images": int}})
        return None if manifest["complete"] else manifest["options"]["num_images"]
    except (OSError, ValueError):  # no manifest, or another program's
        return None


def is_whole_png(path: Path) -> bool:
    """Whether the file exists and ends like a PNG, unlike a file that a power failure has truncated."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def is_whole_part(path: Path, count: int) -> bool:
    """Whether the file holds `count` images according to its header and size."""
    try:
        images = map_array(path)
    except (OSError, ValueError):
        return False
    return images.dtype == np.uint8 and images.ndim == 4 and len(images) == count


def write_png(path: Path, image: np.ndarray):
    with replacing(path, sync=False) as temporary:
        Image.fromarray(image).save(temporary, format="png")


def write_array(path: Path, array: np.ndarray):
    with replacing(path) as temporary, temporary.open("xb") as file:
        np.save(file, array)


def write_npz(path: Path, batches: Iterator[np.ndarray], num_images: int, labels: list[int]):
    """Writes an uncompressed `.npz` of samples like ADM's, with one batch, uint8 `[n,H,W,3]`, in memory at a time."""
    with (
        replacing(path) as temporary,
        temporary.open("xb") as raw,
        zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive,
    ):
        # The ZipInfo has no date, so that the same samples give the same bytes.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            first = next(batches)
            header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *first.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in itertools.chain([first], batches):
                file.write(np.ascontiguousarray(batch))
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, np.array(labels, dtype="<i8"))
