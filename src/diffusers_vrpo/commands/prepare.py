# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Encode a data set once, for `train_vrpo.py --latents_dir`; carry such a cache to the Hub and back.

    python -m diffusers_vrpo.latents prepare --dataset ILSVRC/imagenet-1k --vae stabilityai/sd-vae-ft-ema \
        --resolution 256 --flip --output_dir imagenet-256
    accelerate launch -m diffusers_vrpo.latents prepare ...          (many GPUs)
    python -m diffusers_vrpo.latents verify --latents_dir imagenet-256
    python -m diffusers_vrpo.latents export --latents_dir imagenet-256 --output_dir to-share --push_to_hub me/imagenet-256
    python -m diffusers_vrpo.latents import --dataset me/imagenet-256 --output_dir imagenet-256

A command that was stopped goes on when it is given again.
"""

import argparse
import io
import logging
import os
import sys
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Image, Value
from huggingface_hub import HfApi, snapshot_download
from PIL import Image as PILImage
from tqdm.auto import tqdm

from ..alignment.encoders import load_encoder
from ..command_line import HelpFormatter, OneLineErrorParser, check_ranges, with_flags
from ..data.image_datasets import check_images, first_readable, resize_and_crop, too_many_corrupt
from ..data.latent_cache import LatentCache, array_layout, chunk_rows, num_chunks, read_meta
from ..data.latent_cache_writer import CacheWriter
from ..data.samples import as_is
from ..data.sources import load_images
from ..errors import InputError, first_line, hub_problem
from ..files import write_atomically
from ..models.autoencoder import encode_moments, latent_shape, load_vae, scale_and_shift
from ..models.start import weights_checksum
from ..models.vision import layers_of_encoders
from ..random_streams import ORDER, POSTERIOR, random_stream
from ..training.distributed import start_processes


logger = logging.getLogger("latents")
# Images a step of the autoencoder and of the encoders. A fixed number: some kernels round differently in other batches.
BATCH_SIZE = 32
# Lossless WebP at its least effort is smaller than PNG and faster to write and to read (docs/data.md).
IMAGE_FORMATS = {
    "webp": {"format": "webp", "lossless": True, "method": 0, "quality": 0},
    "jpeg": {"format": "jpeg", "quality": 95, "subsampling": 0},
    "none": None,
}
ROWS_PER_GROUP = 256  # of a parquet file, whose binary columns hold at most 2 GB a group


# ----------------------------------------------------------------------------------------------------------------------
# Prepare


class ImageRows(torch.utils.data.Dataset):
    """The images of a data set by row, cropped to squares, `[B,3,R,R]` uint8, and compressed again."""

    def __init__(self, data, resolution: int, images: str):
        self.data, self.resolution, self.images = data, resolution, images

    def __getitems__(self, rows: list[int]) -> dict:
        records = self.data[rows]
        batch = {"pixels": [], "labels": [], "images": [], "corrupt_rows": []}
        for row, image, label in zip(rows, records["image"], records["label"]):
            image, label, tried = first_readable(self.data, row, {"image": image, "label": label})
            if image is None:
                raise too_many_corrupt(tried, len(self.data))
            pixels = resize_and_crop(image, self.resolution)
            if self.images != "none":
                buffer = io.BytesIO()
                PILImage.fromarray(pixels).save(buffer, **IMAGE_FORMATS[self.images])
                batch["images"].append(buffer.getvalue())
            batch["pixels"].append(pixels)
            batch["labels"].append(label)
            if tried:
                batch["corrupt_rows"].append(row)
        batch["pixels"] = torch.from_numpy(np.stack(batch["pixels"])).permute(0, 3, 1, 2).contiguous()
        return batch


class BatchEncoder:
    """Encodes batches of images as the arrays of a cache have them.

    Args:
        vae: on the device; None keeps the pixels, in [-1, 1].
        encoders: frozen, for `features-0` and so on.
        config: of the cache.
        device: that all of them are on.
    """

    def __init__(self, vae, encoders: list, config: dict, device: torch.device):
        self.vae, self.encoders, self.config, self.device = vae, encoders, config, device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, rows: list[int]) -> dict[str, torch.Tensor]:
        """Float16 tensors `[copies, B, ...]` on the device, for uint8 `pixels [B,3,R,R]` of the rows."""
        images = pixels.to(self.device, non_blocking=True).float() / 127.5 - 1
        copies = [images, images.flip(-1)] if self.config["flip"] else [images]
        arrays = {"latents": [self._latents(images, rows, copy) for copy, images in enumerate(copies)]}
        for i, encoder in enumerate(self.encoders):
            arrays[f"features-{i}"] = [encoder(images) for images in copies]
        return {name: torch.stack(parts).half() for name, parts in arrays.items()}

    def _latents(self, images: torch.Tensor, rows: list[int], copy: int) -> torch.Tensor:
        if self.vae is None:
            return images
        mean, std = encode_moments(self.vae, images)
        scale, shift = scale_and_shift(self.vae)
        if self.config["kind"] == "sampled":
            keys = [copy * self.config["count"] + row for row in rows]
            streams = (random_stream(self.config["seed"], key, POSTERIOR) for key in keys)
            noise = np.stack([stream.standard_normal(mean.shape[1:], dtype=np.float32) for stream in streams])
            mean = mean + std * torch.from_numpy(noise).to(mean)
        mean = (mean - shift) * scale
        return torch.cat([mean, std * scale], dim=1) if self.config["kind"] == "moments" else mean


def prepare(args: argparse.Namespace):
    """Writes the cache that the options describe, on all processes.

    Raises:
        InputError: for options that cannot work, a folder with another cache, or damaged data.
    """
    state = start_processes()
    if args.images == "none" and not args.encoder:
        logger.info("--images none: the cache will do for --objective none only")
    with state.main_process_first():
        data, id2label, num_classes = load_images(args)
    if state.is_main_process:
        check_images(data)
    vae = None if args.vae == "none" else load_vae(args.vae, args.cache_dir).to(state.device)
    if vae is not None and args.vae_dtype != "float32":
        vae.to(getattr(torch, args.vae_dtype))
    shape = latent_shape(vae, args.resolution, args.patch_size)
    grid_size = (shape[1] // args.patch_size, shape[2] // args.patch_size)
    layers = layers_of_encoders(args.encoder, args.encoder_layer)
    encoders = [
        load_encoder(name, grid_size, layer, torch.float32, state.device, args.cache_dir)
        for name, layer in zip(args.encoder or [], layers)
    ]
    config = cache_config(args, data, vae, shape, encoders, layers)
    about = {
        "vae": os.path.abspath(args.vae) if os.path.isdir(args.vae) else args.vae,
        "dataset": args.dataset_name or args.train_data_dir,
        "split": args.dataset_split,
        "num_classes": num_classes,
        "class_names": [id2label[i] for i in range(num_classes)] if id2label else None,
    }
    writer = CacheWriter(args.output_dir, config, about, state, args.verify)
    if writer.complete:
        logger.info(f"{args.output_dir} is complete already: {len(data)} images")
        return
    if writer.num_done:
        logger.info(f"continuing: {writer.num_done} of {num_chunks(config)} chunks are there")
    write_chunks(writer, data, BatchEncoder(vae, encoders, config, state.device), args.dataloader_num_workers)
    writer.finish()
    logger.info(f"wrote {len(data)} images to {args.output_dir}; train with --latents_dir {args.output_dir}")


def cache_config(args, data, vae, shape, encoders: list, layers: list) -> dict:
    """All that the content of a cache depends on, as JSON."""
    has_posterior = vae is not None and has_moments(vae)
    if args.sampled and not has_posterior:
        what = "keeps pixels" if vae is None else f"is a {type(vae).__name__}, which has no posterior"
        raise InputError("sampled", f"`sampled`: {args.vae} {what}; leave it out")
    scale, shift = (1.0, 0.0) if vae is None else scale_and_shift(vae)
    kind = "sampled" if args.sampled else "moments" if has_posterior else "latents"
    return {
        "count": len(data),
        "dataset_checksum": dataset_checksum(data),
        "resolution": args.resolution,
        "crop": "center",
        "vae_checksum": None if vae is None else weights_checksum(vae.parameters()),
        "vae_dtype": args.vae_dtype,
        "scaling_factor": scale,
        "shift_factor": shift,
        "kind": kind,
        "seed": args.seed if args.sampled else None,
        "latent_shape": list(shape),
        "flip": args.flip,
        "images": args.images,
        "features": [
            {
                "encoder": Path(name).name,
                "layer": layer,
                "layer_used": encoder.layer,
                "grid": list(encoder.grid_size),
                "dim": encoder.embed_dim,
                "checksum": weights_checksum(encoder.parameters()),
            }
            for name, layer, encoder in zip(args.encoder or [], layers, encoders)
        ],
        "chunk_rows": args.chunk_rows,
    }


def has_moments(vae) -> bool:
    return encode_moments(vae, torch.zeros(1, 3, 128, 128, device=vae.device))[1] is not None


def dataset_checksum(data, sample: int = 256) -> int:
    """CRC-32 of all labels and of a fixed random sample of the encoded images, wherever the files lie."""
    checksum = zlib.crc32(np.asarray(data["label"][:], dtype=np.int64).tobytes())
    for row in random_stream(0, 0, ORDER).permutation(len(data))[:sample].tolist():
        image = data[row]["image"]
        if image["bytes"] is None:
            try:
                image = {"bytes": Path(image["path"]).read_bytes()}
            except OSError:
                image = {"bytes": b""}
        checksum = zlib.crc32(image["bytes"], checksum)
    return checksum


def write_chunks(writer: CacheWriter, data, encode: BatchEncoder, num_workers: int):
    """Decodes (in other processes), encodes (here) and writes (in a thread) the chunks of this process."""
    config = writer.config
    batches = []  # never across chunks, so that the content does not depend on who encodes what
    for chunk in writer.chunks:
        rows = list(chunk_rows(config, chunk))
        batches += [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    dataloader = torch.utils.data.DataLoader(
        ImageRows(data, config["resolution"], config["images"]),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=as_is,
        pin_memory=encode.device.type == "cuda",
    )
    many, rank = writer.state.num_processes > 1, writer.state.process_index
    progress = tqdm(
        total=sum(map(len, batches)),
        desc=f"process {rank} of {writer.state.num_processes}" if many else "encoding",
        unit="image",
        disable=not writer.state.is_main_process,
    )
    loaded, num_corrupt = iter(dataloader), 0
    with ThreadPoolExecutor(1) as thread, progress:
        pending = deque()
        for chunk in writer.chunks:
            rows, parts, labels, images, corrupt = list(chunk_rows(config, chunk)), [], [], [], []
            for start in range(0, len(rows), BATCH_SIZE):
                batch = next(loaded)
                parts.append(encode(batch["pixels"], rows[start : start + BATCH_SIZE]))
                labels += batch["labels"]
                images += batch["images"]
                corrupt += batch["corrupt_rows"]
                progress.update(len(batch["labels"]))
            arrays = {name: torch.cat([part[name] for part in parts], dim=1).cpu().numpy() for name in parts[0]}
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise InputError(
                        None,
                        f"{name} of rows {rows[0]} to {rows[-1]} are not finite in float16; is the model sound, and does it "
                        "need `vae_dtype` float32?",
                    )
            num_corrupt += len(corrupt)
            if num_corrupt > 0.01 * config["count"]:
                raise too_many_corrupt(corrupt, config["count"])
            arrays["labels"] = np.array(labels, dtype=np.int64)[None]
            pending.append(thread.submit(writer.write, chunk, arrays, images, corrupt))
            # Not more in memory than one chunk in the making and two on their way to the disk.
            while len(pending) > 2 or (pending and pending[0].done()):
                pending.popleft().result()
        for write in pending:
            write.result()


# ----------------------------------------------------------------------------------------------------------------------
# Export and import


def parquet_features(cache: LatentCache) -> Features:
    """The columns of an export: arrays as their raw little-endian bytes, images as images."""
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
    """Rows of a cache as an arrow table."""
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


def export(args: argparse.Namespace):
    """Writes a cache as parquet files of `binary` columns, which `datasets.load_dataset` opens, with its `meta.json`.

    Raises:
        InputError: when there is no such cache, it is damaged, or the Hub refuses.
    """
    cache, folder = LatentCache(args.latents_dir), Path(args.output_dir)
    if damaged := cache.damaged_chunks():
        raise damage(args.latents_dir, cache, damaged)
    meta = (cache.folder / "meta.json").read_bytes()
    if folder.exists() and any(folder.iterdir()):
        known = folder / "meta.json"
        if not known.is_file() or known.read_bytes() != meta:
            raise InputError("output_dir", f"`output_dir` {folder} holds something else; choose a new or empty folder")
    # By the first rows: shards of about 500 MB.
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
                    temporary = path.with_name(f".{path.name}.tmp")
                    with pq.ParquetWriter(temporary, probe.schema, compression="none") as file:
                        for first in rows[::ROWS_PER_GROUP]:
                            file.write_table(export_table(cache, first, min(first + ROWS_PER_GROUP, rows.stop)))
                    os.replace(temporary, path)
                progress.update(len(rows))
        (folder / "README.md").write_text(dataset_card(cache))
    except OSError as error:
        raise InputError(
            "output_dir", f"`output_dir` {folder} cannot be written ({error.strerror or error})"
        ) from error
    logger.info(f"wrote {files} parquet files to {folder}")
    if args.push_to_hub:
        try:
            repo = HfApi().create_repo(args.push_to_hub, repo_type="dataset", private=args.private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repo.repo_id, repo_type="dataset", folder_path=folder, ignore_patterns=["**/.*"]
            )
        except Exception as error:  # the Hub's errors, the network's, a name that is none
            problem = hub_problem(error, f"datasets/{args.push_to_hub}") or first_line(error)
            raise InputError("push_to_hub", f"`push_to_hub` {args.push_to_hub}: {problem}") from error
        logger.info(f"pushed to {repo}")


def dataset_card(cache: LatentCache) -> str:
    config, about = cache.config, cache.about
    vae = Path(about["vae"]).name if os.path.isabs(about["vae"]) else about["vae"]
    kind = {"moments": "mean and standard deviation of the latents", "sampled": "one drawn latent"}
    shape = list(array_layout(config)["latents"][1])
    features = "".join(
        f"- `features_{i}`: {f['encoder']}, {f['grid']}, {f['dim']}\n" for i, f in enumerate(config["features"])
    )
    return (
        "---\ntags:\n- latents\n- diffusers-vrpo\n---\n\n"
        f"# Latents of {about['dataset']} ({about['split']})\n\n"
        f"{config['count']} images, centre crop to {config['resolution']}x{config['resolution']}, encoded by `{vae}`.\n\n"
        f"- `latents`: {kind.get(config['kind'], 'latents')}, raw little-endian float16 {shape}, already "
        f"`(latents - {config['shift_factor']}) * {config['scaling_factor']}`; `_flipped` is of the mirrored image\n"
        f"{features}\n"
        "    python -m diffusers_vrpo.latents import --dataset THIS_REPOSITORY --output_dir latents\n"
        "    accelerate launch train_vrpo.py --latents_dir latents ...\n"
    )


def import_(args: argparse.Namespace):
    """Makes a cache of what `export` wrote, from a folder or the Hub; equal to the exported one bit for bit.

    Raises:
        InputError: when it is no export, or not whole.
    """
    state = start_processes()
    if state.num_processes > 1:
        raise InputError(None, "import runs in one process; start it without a launcher")
    source = Path(args.dataset)
    if not source.is_dir():
        try:
            patterns = ["meta.json", "data/*.parquet"]
            source = snapshot_download(
                args.dataset, repo_type="dataset", allow_patterns=patterns, cache_dir=args.cache_dir
            )
        except Exception as error:  # the Hub's errors, the network's, a name that is none
            problem = hub_problem(error, f"datasets/{args.dataset}") or first_line(error)
            raise InputError("dataset", f"`dataset` {args.dataset}: {problem}") from error
    source = Path(source)
    meta = read_meta(source, "--dataset")
    config = meta["config"]
    writer = CacheWriter(args.output_dir, config, meta["about"], state)
    if writer.complete:
        logger.info(f"{args.output_dir} is complete already")
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
                    f"`dataset` {args.dataset} ends after {of_chunk.start + len(records)} images of {config['count']}",
                )
            if chunk in wanted:
                corrupt = sorted(corrupt_rows.intersection(of_chunk))
                write_imported(writer, chunk, records, corrupt, meta["checksums"][chunk], args.dataset)
            progress.update(len(records))
    writer.finish()
    logger.info(f"wrote {config['count']} images to {args.output_dir}")


def exported_rows(folder: Path):
    """The rows of all parquet files of an export in order, as dicts.

    Raises:
        InputError: when a file cannot be read.
    """
    for path in sorted(folder.glob("data/train-*.parquet")):
        try:
            for batch in pq.ParquetFile(path).iter_batches(ROWS_PER_GROUP):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError("dataset", f"`dataset` {folder}: {path.name} is damaged ({first_line(error)})") from error


def write_imported(writer: CacheWriter, chunk: int, records: list[dict], corrupt: list[int], checksum: int, name: str):
    """Writes the exported rows of a chunk, if they are those that the checksum was made of."""
    arrays = {"labels": np.array([record["label"] for record in records], dtype=np.int64)[None]}
    try:
        for array, (dtype, row, copies) in array_layout(writer.config).items():
            if row:
                columns = [array.replace("-", "_") + ("_flipped" if copy else "") for copy in range(copies)]
                values = b"".join(record[column] for column in columns for record in records)
                arrays[array] = np.frombuffer(values, dtype=dtype).reshape(copies, len(records), *row)
        images = [] if writer.config["images"] == "none" else [record["image"]["bytes"] for record in records]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "dataset", f"`dataset` {name} has not the columns of an export ({first_line(error)})"
        ) from error
    if not writer.write(chunk, arrays, images, corrupt, checksum):
        raise InputError(
            "dataset",
            f"`dataset` {name} is damaged: rows {chunk_rows(writer.config, chunk).start} and later differ from their "
            "checksum; export or download it anew",
        )


def verify(args: argparse.Namespace):
    """Compares all files of a cache with its checksums.

    Raises:
        InputError: where they differ.
    """
    cache = LatentCache(args.latents_dir)
    if damaged := cache.damaged_chunks(lambda chunks: tqdm(chunks, desc="verifying", unit="chunk")):
        raise damage(args.latents_dir, cache, damaged)
    logger.info(
        f"{args.latents_dir}: {len(cache)} images, {num_chunks(cache.config)} chunks, all as they were written"
    )


def damage(folder: str, cache: LatentCache, chunks: list[int]) -> InputError:
    rows = chunk_rows(cache.config, chunks[0])
    return InputError(
        "latents_dir",
        f"`latents_dir` {folder} is damaged: {len(chunks)} of {num_chunks(cache.config)} chunks differ from their checksum "
        f"(first: rows {rows[0]} to {rows[-1]}); the command that prepared it mends it with `verify`",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser(prog: str) -> argparse.ArgumentParser:
    def formatter(prog):
        return HelpFormatter(prog, max_help_position=36, width=118)

    parser = OneLineErrorParser(prog=prog, allow_abbrev=False, description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prepare,verify,export,import}")

    def command(name, help, run):
        made = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            formatter_class=formatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    p = command("prepare", "encode a data set into a folder for train_vrpo.py --latents_dir", prepare)
    g = p.add_argument_group("data")
    g.add_argument(
        "--dataset_name", "--dataset", help="Hub name or folder of an image data set, or `digits` (embedded)"
    )
    g.add_argument("--dataset_config_name", help="configuration of that data set")
    g.add_argument("--dataset_split", default="train", help="split to encode")
    g.add_argument("--train_data_dir", help="folder with one folder of images per class, instead of --dataset_name")
    g.add_argument("--image_column", default="image", help="column with the images")
    g.add_argument("--label_column", default="label", help="column with the integer class labels")
    g.add_argument("--max_train_samples", type=int, help="a random subset of this size")
    g.add_argument("--cache_dir", help="where downloads go")
    g.add_argument("--resolution", type=int, default=256, help="side of ADM's centre crop in pixels")
    g = p.add_argument_group("what is kept")
    g.add_argument("--vae", required=True, help="diffusers autoencoder, Hub name or folder; `none` keeps pixels")
    g.add_argument(
        "--vae_dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of its computation; float32 gives what training from images gives",
    )
    g.add_argument(
        "--sampled", action="store_true", help="one drawn latent an image, half the size of mean and deviation"
    )
    g.add_argument("--seed", type=int, default=0, help="of --sampled")
    g.add_argument("--flip", action="store_true", help="also every image mirrored, for --random_flip")
    g.add_argument(
        "--images",
        choices=list(IMAGE_FORMATS),
        default="webp",
        help="the cropped images beside the latents, for encoders: webp is lossless, jpeg (quality 95) half as large",
    )
    g.add_argument(
        "--encoder", nargs="+", help="also features of these transformers encoders (large); then --images none will do"
    )
    g.add_argument("--encoder_layer", type=int, nargs="+", help="index in the hidden_states of each")
    g.add_argument("--patch_size", type=int, default=2, help="of the model to be trained: the token grid of features")
    g = p.add_argument_group("work")
    g.add_argument("--output_dir", required=True, help="folder of the cache")
    g.add_argument(
        "--dataloader_num_workers", type=int, default=4, help="processes that decode, for each that encodes"
    )
    g.add_argument("--chunk_rows", type=int, default=1024, help="images that a kill can cost, and of one checksum")
    g.add_argument(
        "--verify", action="store_true", help="check what is there by its checksums; do what is damaged again"
    )

    p = command("verify", "compare a cache with its checksums", verify)
    p.add_argument("--latents_dir", required=True, help="folder of the cache")

    p = command("export", "write a cache as parquet files for the Hub", export)
    p.add_argument("--latents_dir", required=True, help="folder of the cache")
    p.add_argument("--output_dir", required=True, help="folder of the export")
    p.add_argument("--push_to_hub", metavar="REPO", help="also upload it as this dataset repository")
    p.add_argument("--private", action="store_true", help="make that repository a private one")

    p = command("import", "make a cache of an export", import_)
    p.add_argument("--dataset", required=True, help="folder or Hub name of the export")
    p.add_argument("--output_dir", required=True, help="folder of the cache")
    p.add_argument("--cache_dir", help="where downloads go")
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "vrpo") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.command != "prepare":
        return args
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give either --dataset_name or --train_data_dir")
    if args.vae == "none" and not args.encoder:
        parser.error("--vae none: a cache of pixels is for encoder features; give --encoder, or train from the images")
    if args.vae == "none" and args.vae_dtype != "float32":
        parser.error(f"--vae_dtype {args.vae_dtype} is of an autoencoder; leave it out with --vae none")
    if args.encoder_layer and not args.encoder:
        parser.error("--encoder_layer goes with --encoder only; leave it out")
    if args.seed and not args.sampled:
        parser.error("--seed goes with --sampled only; leave it out")
    if args.encoder_layer and len(args.encoder_layer) not in (1, len(args.encoder)):
        parser.error(
            f"--encoder_layer has {len(args.encoder_layer)} numbers for {len(args.encoder)} encoders; give one, or "
            "one for each"
        )
    at_least_one = "resolution max_train_samples patch_size chunk_rows"
    check_ranges(parser, args, at_least_one, "dataloader_num_workers seed", "", "")
    return args


def main(argv: list[str] | None = None, prog: str = "vrpo"):
    """The command; `prog` is what its errors call it."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    args = parse_args(argv, prog)
    try:
        args.run(args)
    except InputError as error:
        sys.exit(f"{prog} {args.command}: error: {with_flags(error, vars(args))}")
