# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Exports latent caches as parquet files, uploads these to the Hub, and imports them."""

import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value
from huggingface_hub import HfApi, snapshot_download
from tqdm.auto import tqdm

from ..errors import InputError, first_line, hub_problem
from ..files import irregular_problem, replacing, write_atomically
from ..markup import code, shown
from ..reach import offline_if_out_of_reach
from .latent_cache import LatentCache, array_layout, chunk_rows, num_chunks, read_meta
from .latent_cache_writer import CacheWriter, cannot_write


logger = logging.getLogger("latents")
ROWS_PER_GROUP = 256  # rows per row group of a parquet file; a binary column holds at most 2 GB per group


# ----------------------------------------------------------------------------------------------------------------------
# Export


def parquet_features(cache: LatentCache) -> Features:
    """The columns of an export: rows of arrays as raw little-endian bytes, images as images."""
    columns = {}
    for name, (_, row, copies) in array_layout(cache.config).items():
        if row:  # not the labels and offsets
            for copy in range(copies):
                columns[name.replace("-", "_") + ("_flipped" if copy else "")] = Value("binary")
    if cache.config["images"] != "none":
        columns["image"] = Image(decode=False)
    names = cache.about["class_names"]
    return Features({**columns, "label": ClassLabel(names=names) if names else Value("int64")})


def export_table(cache: LatentCache, first: int, last: int) -> pa.Table:
    """The rows `first` to `last - 1` of a cache as an arrow table."""
    columns = {}
    for name, (_, row, copies) in array_layout(cache.config).items():
        for copy in range(copies if row else 0):
            start = copy * len(cache)
            values = [values.tobytes() for values in cache.arrays[name][start + first : start + last]]
            columns[name.replace("-", "_") + ("_flipped" if copy else "")] = values
    if cache.config["images"] != "none":
        columns["image"] = [{"bytes": cache.image_bytes(row), "path": None} for row in range(first, last)]
    columns["label"] = cache["label"][first:last]
    return pa.table(columns, schema=parquet_features(cache).arrow_schema)


def export_cache(latents_dir: str | Path, output_dir: str | Path):
    """Writes a cache and its `meta.json` as parquet files with `binary` columns, which `datasets.load_dataset` opens.

    An export that was interrupted continues with the first missing file.

    Args:
        latents_dir: the folder of the cache.
        output_dir: a new or empty folder, or one with an unfinished export of the same cache.

    Raises:
        InputError: if the cache is missing or damaged, or the folder cannot be written.
    """
    cache, folder = LatentCache(latents_dir), Path(output_dir)
    check_export_folder(folder, cache)
    if damaged := cache.damaged_chunks():
        raise damage(latents_dir, cache, damaged)
    meta = (cache.folder / "meta.json").read_bytes()
    # Shards of about 500 MB, estimated from the first rows.
    probe = export_table(cache, 0, min(len(cache), 64))
    rows_per_file = max(1, int(500e6 / (probe.nbytes / len(probe))) // ROWS_PER_GROUP) * ROWS_PER_GROUP
    files = -(-len(cache) // rows_per_file)
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "meta.json", meta)
        with tqdm(total=len(cache), desc="exporting", unit="image") as progress:
            for i in range(files):
                path = folder / "data" / f"train-{i:05d}-of-{files:05d}.parquet"
                rows = range(i * rows_per_file, min((i + 1) * rows_per_file, len(cache)))
                if not path.exists():
                    with (
                        replacing(path) as temporary,
                        pq.ParquetWriter(temporary, probe.schema, compression="none") as file,
                    ):
                        for first in rows[::ROWS_PER_GROUP]:
                            file.write_table(export_table(cache, first, min(first + ROWS_PER_GROUP, rows.stop)))
                progress.update(len(rows))
        write_atomically(folder / "README.md", dataset_card(cache).encode())
    except OSError as error:
        raise cannot_write(folder, error) from error
    logger.info(f"wrote {files} parquet files to {folder}")


def check_export_folder(folder: Path, cache: LatentCache):
    """Creates a folder, or checks that it is empty or holds an export of the same cache, finished or not.

    Raises:
        InputError: if it holds something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            return
        known = folder / "meta.json"
        if not known.is_file() or known.read_bytes() != (cache.folder / "meta.json").read_bytes():
            raise InputError("output_dir", f"`output_dir` {folder} holds something else; choose a new or empty folder")
        if problem := irregular_problem(folder):
            raise InputError("output_dir", f"`output_dir` {folder}: {problem}")
    except OSError as error:
        raise cannot_write(folder, error) from error


def push_export(folder: str | Path, repository: str, private: bool = False):
    """Uploads an export as a dataset repository.

    Args:
        folder: the folder of the export.
        repository: the Hub name of the repository, which is created if it does not exist.
        private: whether the repository is private.

    Raises:
        InputError: if the Hub refuses or cannot be reached, or `private` is set and the repository is public.
    """
    folder = Path(folder)
    try:
        api = HfApi()
        repo = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        if private and not api.repo_info(repo.repo_id, repo_type="dataset").private:
            raise InputError(
                "push_to_hub",
                f"`push_to_hub` {repository} already exists and is public; make it private on its page, or give another name",
            )
        api.upload_folder(repo_id=repo.repo_id, repo_type="dataset", folder_path=folder, ignore_patterns=["**/.*"])
    except InputError:
        raise
    except Exception as error:  # errors of the Hub or the network, or a malformed name
        problem = hub_problem(error, f"datasets/{repository}") or first_line(error)
        raise InputError("push_to_hub", f"`push_to_hub` {repository}: {problem}") from error
    logger.info(f"pushed to {repo}")


def dataset_card(cache: LatentCache) -> str:
    """The README of an export."""
    config, about = cache.config, cache.about
    # Only the last part of the path of a local folder is shown.
    vae, dataset = (Path(name).name if os.path.isabs(name) else name for name in (about["vae"], about["dataset"]))
    kind = {"moments": "mean and standard deviation of the latents", "sampled": "one drawn latent"}
    shape = list(array_layout(config)["latents"][1])
    features = "".join(
        f"- `features_{i}`: {shown(f['encoder'])}, {f['grid']}, {f['dim']}\n" for i, f in enumerate(config["features"])
    )
    formula = f"(latents - {config['shift_factor']}) * {config['scaling_factor']}"
    if "latents_mean" in config:
        formula = f"(latents - {config['latents_mean']}) * {config['scaling_factor']} / {config['latents_std']}"
    return (
        "---\ntags:\n- latents\n- diffusers-vrpo\n---\n\n"
        f"# Latents of {shown(dataset)} ({shown(about['split'])})\n\n"
        f"{config['count']} images, centre crop to {config['resolution']}x{config['resolution']}, encoded by {code(vae)}.\n\n"
        f"- `latents`: {kind.get(config['kind'], 'latents')}, raw little-endian float16 {shape}, already transformed by "
        f"`{formula}`; columns that end in `_flipped` are of the mirrored images\n"
        f"{features}\n"
        "    vrpo latents import --dataset THIS_REPOSITORY --output_dir latents\n"
        "    vrpo train --latents_dir latents ...\n"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Import


def import_cache(dataset: str | Path, output_dir: str | Path, state, cache_dir: str | None = None):
    """Rebuilds a cache, bit for bit, from an export of `export_cache` in a folder or on the Hub.

    Args:
        dataset: folder or Hub name of the export.
        output_dir: folder of the cache.
        state: an `accelerate.PartialState` with one process.
        cache_dir: the folder for downloads; by default, the Hub's cache.

    Raises:
        InputError: if it is not a complete export.
    """
    source = Path(dataset)
    if not source.is_dir():
        try:
            patterns = ["meta.json", "data/*.parquet"]
            with offline_if_out_of_reach(dataset):
                source = snapshot_download(dataset, repo_type="dataset", allow_patterns=patterns, cache_dir=cache_dir)
        except Exception as error:  # errors of the Hub or the network, or a malformed name
            problem = hub_problem(error, f"datasets/{dataset}") or first_line(error)
            raise InputError("dataset", f"`dataset` {dataset}: {problem}") from error
    source = Path(source)
    meta = read_meta(source, "dataset")
    config = meta["config"]
    writer = CacheWriter(output_dir, config, meta["about"], state)
    if writer.complete:
        logger.info(f"{output_dir} is complete already")
        return
    rows = exported_rows(source)
    wanted = set(writer.chunks)
    corrupt_rows = set(meta["corrupt_rows"])
    with tqdm(total=config["count"], desc="importing", unit="image") as progress:
        for chunk in range(num_chunks(config)):
            of_chunk = chunk_rows(config, chunk)
            records = [record for _, record in zip(of_chunk, rows)]
            if len(records) < len(of_chunk):
                raise InputError(
                    "dataset",
                    f"`dataset` {dataset} ends after {of_chunk.start + len(records)} images of {config['count']}",
                )
            if chunk in wanted:
                corrupt = sorted(corrupt_rows.intersection(of_chunk))
                write_imported(writer, chunk, records, corrupt, meta["checksums"][chunk], dataset)
            progress.update(len(records))
    writer.finish()
    logger.info(f"wrote {config['count']} images to {output_dir}")


def exported_rows(folder: Path):
    """Yields the rows of all parquet files of an export in order, as dicts.

    Raises:
        InputError: if a file cannot be read.
    """
    for path in sorted(folder.glob("data/train-*.parquet")):
        try:
            if not path.is_file():  # opening a pipe would block
                raise OSError("it is not a file")
            for batch in pq.ParquetFile(path).iter_batches(ROWS_PER_GROUP):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError("dataset", f"`dataset` {folder}: {path.name} is damaged ({first_line(error)})") from error


def write_imported(writer: CacheWriter, chunk: int, records: list[dict], corrupt: list[int], checksum: int, name: str):
    """Writes the exported rows of a chunk.

    Raises:
        InputError: if the rows lack a column or do not match the checksum.
    """
    try:
        arrays = {"labels": np.array([record["label"] for record in records], dtype=np.int64)[None]}
        for array, (dtype, row, copies) in array_layout(writer.config).items():
            if row:
                columns = [array.replace("-", "_") + ("_flipped" if copy else "") for copy in range(copies)]
                values = b"".join(record[column] for column in columns for record in records)
                arrays[array] = np.frombuffer(values, dtype=dtype).reshape(copies, len(records), *row)
        images = [] if writer.config["images"] == "none" else [record["image"]["bytes"] for record in records]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "dataset", f"`dataset` {name} does not have the columns of an export ({first_line(error)})"
        ) from error
    if not writer.write(chunk, arrays, images, corrupt, checksum):
        raise InputError(
            "dataset",
            f"`dataset` {name} is damaged: rows {chunk_rows(writer.config, chunk).start} and later differ from their "
            "checksum; export or download it again",
        )


def damage(folder: str | Path, cache: LatentCache, chunks: list[int]) -> InputError:
    """The error for a cache of which some chunks differ from their checksums."""
    rows = chunk_rows(cache.config, chunks[0])
    return InputError(
        "latents_dir",
        f"`latents_dir` {folder} is damaged: {len(chunks)} of {num_chunks(cache.config)} chunks differ from their checksum "
        f"(first: rows {rows[0]} to {rows[-1]}); the command that prepared it mends it with `verify`",
    )
