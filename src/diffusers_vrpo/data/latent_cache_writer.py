# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Writes a latent cache chunk by chunk; a run that was killed continues where it stopped."""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import irregular_problem, write_atomically
from ..schemas import JOURNAL_ENTRY, read_rows
from .latent_cache import (
    FORMAT,
    array_layout,
    checksum_on_disk,
    chunk_rows,
    image_file,
    npy_header,
    num_chunks,
    read_meta,
)


# How errors name a setting that differs, if not by the name of an option.
SETTING_NAMES = {
    "kind": "the kind of latents (`sampled`)",
    "dataset_checksum": "the checksum of the data set",
    "vae_checksum": "the checksum of the weights of `vae`",
    "count": "the number of images",
    "latent_shape": "the shape of the latents",
    "features": "`encoder`, its layer, weights or token grid",
}


def create_arrays(folder: Path, config: dict) -> bool:
    """Creates the files of the arrays at full size, sparse if the file system supports that.

    A file of a wrong size keeps its content; the checksums tell which chunks are valid.

    Returns:
        whether any file was missing or incomplete.
    """
    changed = False
    for name, (dtype, row, copies) in array_layout(config).items():
        shape = (copies * config["count"], *row)
        header, path = npy_header(dtype, shape), folder / f"{name}.npy"
        size = len(header) + int(np.prod(shape)) * int(dtype[-1])
        if path.exists():
            with path.open("rb") as file:
                if path.stat().st_size == size and file.read(len(header)) == header:
                    continue
        changed = True
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(header)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    return changed


# ----------------------------------------------------------------------------------------------------------------------
# Writing


class CacheWriter:
    """Writes a cache chunk by chunk, with any number of processes; a run that was killed continues where it stopped.

    Args:
        folder: a new or empty folder, or one with a cache of the same `config`, complete or not.
        config: everything that the content depends on, as JSON values; `cache_config` returns it.
        about: further facts about the cache, as JSON values.
        state: `accelerate.PartialState`.
        verify: compare existing chunks with their checksums, and write damaged ones again.

    Attributes:
        complete (`bool`): whether the cache is complete.
        num_done (`int`): the number of chunks that were already written.
        chunks (`list[int]`): the chunks that this process has to write.

    Raises:
        InputError: if the folder holds other files, or the disk has too little space.
    """

    def __init__(self, folder: Path, config: dict, about: dict, state, verify: bool = False):
        self.folder = Path(folder)
        self.config = config
        self.about = about
        self.state = state
        if state.is_main_process:
            try:
                self._prepare_folder(verify)
            except OSError as error:
                raise cannot_write(self.folder, error) from error
        state.wait_for_everyone()
        self.complete = read_meta(self.folder, "output_dir")["complete"]
        done = self._read_journals()
        self.num_done = len(done)
        missing = [chunk for chunk in range(num_chunks(config)) if chunk not in done]
        self.chunks = [] if self.complete else missing[state.process_index :: state.num_processes]
        # No process may write into its journal before all processes have read all journals.
        state.wait_for_everyone()

    def _prepare_folder(self, verify: bool):
        self.folder.mkdir(parents=True, exist_ok=True)
        if problem := irregular_problem(self.folder):
            raise InputError("output_dir", f"`output_dir` {self.folder}: {problem}")
        done = {}
        if (self.folder / "meta.json").exists():
            meta = read_meta(self.folder, "output_dir")
            self._refuse_another(meta["config"])
            self.about = meta["about"]
            done = self._read_journals()
            if meta["complete"]:
                corrupt = {chunk: [] for chunk in range(num_chunks(self.config))}
                for row in meta["corrupt_rows"]:
                    corrupt[row // self.config["chunk_rows"]].append(row)
                done = {c: {"chunk": c, "crc": meta["checksums"][c], "corrupt": corrupt[c]} for c in corrupt}
        elif found := [path.name for path in self.folder.iterdir() if not path.match(".*.tmp")]:
            raise InputError(
                "output_dir",
                f"`output_dir` {self.folder} holds other files ({', '.join(sorted(found)[:3])}) and no latent cache; "
                "choose a new or empty folder",
            )
        else:
            meta = {"complete": False}
            needed = sum(
                copies * self.config["count"] * int(np.prod(row)) * int(dtype[-1])
                for dtype, row, copies in array_layout(self.config).values()
            )
            if needed > (free := shutil.disk_usage(self.folder).free):
                raise InputError(
                    "output_dir",
                    f"`output_dir` {self.folder} has {free / 1e9:.1f} GB of free space, but the arrays of the cache take "
                    f"{needed / 1e9:.1f} GB (and its images more); choose another disk",
                )
            self._write_meta(complete=False)
        if self.config["images"] != "none":
            (self.folder / "images").mkdir(exist_ok=True)
        for leftover in [*self.folder.glob(".*.tmp"), *self.folder.glob("images/.*.tmp")]:
            leftover.unlink()
        if (create_arrays(self.folder, self.config) or verify) and done:
            valid = {c: entry for c, entry in done.items() if self._on_disk(c) == entry["crc"]}
            if len(valid) < len(done):
                # Mark a complete cache as unfinished. The order of the two calls keeps the cache valid if the process
                # is killed in between.
                self._write_journal(valid.values())
                self._write_meta(complete=False)
                return
        if meta["complete"]:
            self._remove_journals()

    def _refuse_another(self, existing: dict):
        """Raises InputError if the cache in the folder was made with another `config`."""
        for name in [*self.config, *existing]:
            before, now = existing.get(name), self.config.get(name)
            if before != now:
                name = SETTING_NAMES.get(name, f"`{name}`")
                what = f"{name} differs" if isinstance(before or now, list) else f"{name} was {before} and is {now}"
                raise InputError(
                    "output_dir",
                    f"`output_dir` {self.folder} was prepared with other options: {what}; use the same options, or choose "
                    "another folder",
                )

    def _write_meta(self, **state):
        meta = {"format": FORMAT, **state, "about": self.about, "config": self.config}
        write_atomically(self.folder / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("journal-*.jsonl"))

    def _read_journals(self) -> dict[int, dict]:
        """Reads the entries of all journals by chunk, without an incomplete last line of a killed process."""
        done = {}
        for path in self._journals():
            for entry in read_rows(path, JOURNAL_ENTRY)[0]:
                done[entry["chunk"]] = entry
        return done

    def _write_journal(self, entries):
        """Replaces all journals by one with these entries."""
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_atomically(self.folder / "journal-0.jsonl", lines.encode())
        for path in self._journals():
            if path.name != "journal-0.jsonl":
                path.unlink()

    def _remove_journals(self):
        for path in self._journals():
            path.unlink()

    def _on_disk(self, chunk: int) -> int | None:
        return checksum_on_disk(self.folder, self.config, chunk)

    def write(
        self,
        chunk: int,
        arrays: dict[str, np.ndarray],
        images: list[bytes],
        corrupt_rows: list[int],
        expected: int | None = None,
    ) -> bool:
        """Writes a chunk, reads it back, and enters it into the journal.

        Args:
            arrays: `[copies, rows, ...]` by name, all but `image_offsets`.
            images: compressed images, one per row; empty for a cache without images.
            corrupt_rows: the rows of the chunk that could not be decoded.
            expected: the checksum that the chunk must have; by default, any.

        Returns:
            whether the chunk has that checksum; if not, it is not entered into the journal.

        Raises:
            InputError: if the chunk cannot be written, or does not read back as it was written.
        """
        rows, checksum = chunk_rows(self.config, chunk), 0
        if self.config["images"] != "none":
            ends = np.cumsum([len(image) for image in images], dtype=np.int64)
            arrays = {**arrays, "image_offsets": ends[None]}
        try:
            for name, (dtype, row, copies) in array_layout(self.config).items():
                data = np.ascontiguousarray(arrays[name], dtype=dtype)
                if data.shape != (copies, len(rows), *row):
                    raise ValueError(f"{name} {data.shape} is not of the shape {(copies, len(rows), *row)}")
                start = len(npy_header(dtype, (copies * self.config["count"], *row)))
                stride = int(np.prod(row)) * data.itemsize
                with (self.folder / f"{name}.npy").open("r+b") as file:
                    for copy in range(copies):
                        file.seek(start + (copy * self.config["count"] + rows.start) * stride)
                        file.write(data[copy])
                        checksum = zlib.crc32(data[copy], checksum)
                    file.flush()
                    os.fsync(file.fileno())
            if self.config["images"] != "none":
                joined = b"".join(images)
                write_atomically(image_file(self.folder, chunk), joined)
                checksum = zlib.crc32(joined, checksum)
            if self._on_disk(chunk) != checksum:
                raise OSError("the file does not read back as it was written")
            if expected is not None and checksum != expected:
                return False
            entry = json.dumps({"chunk": chunk, "crc": checksum, "corrupt": corrupt_rows})
            journal = self.folder / f"journal-{self.state.process_index}.jsonl"
            with journal.open("ab") as file:
                # Start on a new line, even after the incomplete line of a killed process.
                file.write(f"\n{entry}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            return True
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def finish(self):
        """Writes the final `meta.json` and removes the journals.

        Raises:
            InputError: if chunks are missing.
        """
        self.state.wait_for_everyone()
        if self.state.is_main_process and not self.complete:
            done, wanted = self._read_journals(), num_chunks(self.config)
            if sorted(done) != list(range(wanted)):
                raise InputError(
                    "output_dir",
                    f"`output_dir` {self.folder} has {len(done)} of {wanted} chunks; run the same command again",
                )
            corrupt = sorted(row for entry in done.values() for row in entry["corrupt"])
            checksums = [done[chunk]["crc"] for chunk in range(wanted)]
            self._write_meta(complete=True, corrupt_rows=corrupt, checksums=checksums)
            self._remove_journals()
        self.complete = True
        self.state.wait_for_everyone()


def cannot_write(folder: Path, error: OSError) -> InputError:
    """The error for a folder that cannot be written."""
    return InputError(
        "output_dir",
        f"`output_dir` {folder} cannot be written ({error.strerror or error}); fix that and run the same command again, "
        "it continues from there",
    )
