# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Features of image sets, their moments, and the files that keep the statistics of a reference."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..data.samples import as_is
from ..errors import InputError, first_line
from ..random_streams import ORDER, random_stream
from .image_encoders import default_batch_size, encoder_checksum
from .image_sets import ImageSet, npz_keys, read_npz
from .inception import FIDInception
from .metrics import RunningMoments


logger = logging.getLogger("evaluate")
GATHERED_ROWS = 4096  # features that travel between processes at a time


@dataclass
class FeatureSet:
    """What is known of a set of images in an encoder's eyes; all on the CPU.

    Attributes:
        count: images that the moments are of.
        moments: mean `[D]` and covariance `[D, D]`, float64, under `pool` and (of Inception) `spatial`.
        pool: float32 features `[n, D]` of the images, or of `max_features` of them; None where only moments are known.
        logits: float32 `[n, 1008]` of Inception; None for a reference.
    """

    count: int
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
    pool: torch.Tensor | None = None
    logits: torch.Tensor | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Features


class Batches(torch.utils.data.Dataset):
    """Whole batches `[B, 3, H, W]`; what is wrong with an image comes as a sentence, which a worker would garble."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitems__(self, rows: list[int]) -> torch.Tensor | str:
        try:
            return torch.stack([self.images[row] for row in rows])
        except InputError as error:
            return str(error)


def measure(
    images: ImageSet,
    encoder: torch.nn.Module,
    state: PartialState,
    batch_size: int | None = None,
    num_workers: int = 0,
    max_features: int = 50_000,
    keep_logits: bool = False,
) -> FeatureSet | None:
    """The features of all images, computed on all processes; the main one gets them, the others None.

    Batches are the same however many processes there are.

    Raises:
        InputError: for an image that cannot be decoded, features that are not finite, images that are all alike.
    """
    device = next(encoder.parameters()).device
    batch_size = batch_size or default_batch_size(device)
    kept = np.arange(len(images))
    if len(images) > max_features:
        kept = np.sort(random_stream(0, 0, ORDER).permutation(len(images))[:max_features])
    place = np.full(len(images), -1)
    place[kept] = np.arange(len(kept))
    rows = range(len(images))
    batches = [list(rows[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    batches = batches[state.process_index :: state.num_processes]
    loader = torch.utils.data.DataLoader(
        Batches(images),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=as_is,
        pin_memory=device.type == "cuda",
    )
    on_cpu = device.type == "mps"  # which has no float64
    names = ["pool", "spatial"] if isinstance(encoder, FIDInception) else ["pool"]
    moments, places, vectors, flat = {}, [], {"pool": [], "logits": []}, 0
    progress = tqdm(total=len(images), desc=images.name[-40:], unit="image", disable=not state.is_main_process)
    with progress:
        for batch, pixels in zip(batches, loader):
            if isinstance(pixels, str):
                raise InputError(None, pixels)
            pixels = pixels.to(device, non_blocking=True)
            flat += (pixels.flatten(1).amin(1) == pixels.flatten(1).amax(1)).sum().item()
            features = encoder(pixels)
            if not all(values.isfinite().all() for values in features.values()):
                raise InputError(
                    None, f"{images.name}: the encoder's features of images {batch[0]} to {batch[-1]} are not finite"
                )
            for name in names:
                if name not in moments:
                    moments[name] = RunningMoments(features[name].shape[1], "cpu" if on_cpu else device)
                moments[name].update(features[name])
            chosen = torch.from_numpy(place[batch])
            places.append(chosen[chosen >= 0])
            for name, parts in vectors.items():
                if name == "pool" or (keep_logits and name in features):
                    parts.append(features[name].cpu()[chosen >= 0])
            progress.update(min(len(batch) * state.num_processes, len(images) - progress.n))

    dims = [{name: len(m.mean) for name, m in moments.items()} | {"logits": encoder_classes(encoder)}]
    dims = next(dims for dims in gather_object(dims) if "pool" in dims)  # a process may have no images
    flat = sum(gather_object([flat]))
    moments = {name: merge_moments(moments.get(name), dims[name], state) for name in names}
    places = torch.cat([torch.zeros(0, dtype=torch.long), *places])
    gathered = {}
    for name in ("pool", "logits") if keep_logits and dims["logits"] else ("pool",):
        part = torch.cat([torch.zeros(0, dims[name]), *vectors[name]])
        gathered[name] = gather_rows(part, places, len(kept), state)
    if not state.is_main_process:
        return None
    check_variety(images, flat, moments["pool"])
    moments = {name: (m.mean.cpu(), m.covariance.cpu()) for name, m in moments.items()}
    return FeatureSet(len(images), moments, gathered["pool"], gathered.get("logits"))


def encoder_classes(encoder) -> int:
    """How many logits an encoder gives."""
    return encoder.fc.out_features if isinstance(encoder, FIDInception) else 0


def check_variety(images: ImageSet, flat: int, moments: RunningMoments):
    """Warns of images of one colour.

    Raises:
        InputError: when all are, or all images are the same one.
    """
    if flat == len(images):
        raise InputError(None, f"{images.name}: all {flat} images are of one colour; did the decoder give NaN?")
    if flat:
        logger.warning(f"{images.name}: {flat} of {len(images)} images are of one colour")
    if moments.count > 1 and moments.scatter.trace() <= 1e-10 * moments.count * moments.mean.square().sum():
        raise InputError(
            None, f"{images.name}: the features of all {moments.count} images are equal; is it one image?"
        )


def merge_moments(moments: RunningMoments | None, dim: int, state: PartialState) -> RunningMoments:
    """Those of all processes, on each; None is one that has seen nothing."""
    moments = moments or RunningMoments(dim, state.device)
    if state.num_processes == 1:
        return moments
    counts = gather_object([moments.count])
    means, scatters = gather(moments.mean[None]), gather(moments.scatter[None])
    merged = RunningMoments(dim, moments.mean.device)
    for count, mean, scatter in zip(counts, means, scatters):
        part = RunningMoments(dim, mean.device)
        part.count, part.mean, part.scatter = count, mean, scatter
        merged.merge(part)
    return merged


def gather_rows(rows: torch.Tensor, places: torch.Tensor, total: int, state: PartialState) -> torch.Tensor | None:
    """Puts rows `[n, D]` of all processes to their places among `total`, on the main process's CPU; None elsewhere."""
    result = torch.empty(total, rows.shape[1]) if state.is_main_process else None
    longest = max(gather_object([len(rows)]))
    step = max(1, min(longest, GATHERED_ROWS))
    for start in range(0, longest, step):
        part, at = rows[start : start + step], places[start : start + step]
        missing = step - len(part) if state.num_processes > 1 else 0
        part = gather(F.pad(part, (0, 0, 0, missing)).to(state.device)).cpu()
        at = gather(F.pad(at, (0, missing), value=-1).to(state.device)).cpu()
        if state.is_main_process:
            result[at[at >= 0]] = part[at >= 0]
    return result


# ----------------------------------------------------------------------------------------------------------------------
# The reference


def describe(images: dict, name: str, encoder, max_features: int) -> dict:
    """All that the statistics of a reference depend on, as JSON; `images` is a set's fingerprint."""
    return {
        "images": images,
        "encoder": Path(name).name,
        "encoder_checksum": encoder_checksum(encoder),
        "vector": getattr(encoder, "kind", "pool_3"),
        "input_size": list(getattr(encoder, "input_size", (299, 299))),
        "max_features": max_features,
        "format": 1,
    }


def save_statistics(features: FeatureSet, description: dict, file: Path):
    """Writes a reference's statistics as safetensors, whole or not at all.

    Raises:
        InputError: when the file cannot be written.
    """
    tensors = {"pool": features.pool} if features.pool is not None else {}
    for name, (mean, covariance) in features.moments.items():
        tensors |= {f"{name}.mean": mean.contiguous(), f"{name}.covariance": covariance.contiguous()}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {"description": json.dumps(description), "count": str(features.count)})
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise InputError(None, f"{file} cannot be written ({first_line(error)})") from error


def read_statistics(file: Path) -> tuple[FeatureSet, dict]:
    """What `save_statistics` wrote, and the description.

    Raises:
        InputError: when it is no such file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata() or {}
            values = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        moments = {
            name: (values[f"{name}.mean"], values[f"{name}.covariance"])
            for name in ("pool", "spatial")
            if f"{name}.mean" in values
        }
        return FeatureSet(int(metadata["count"]), moments, values.get("pool")), json.loads(metadata["description"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(None, f"{file} is no statistics file of this program ({first_line(error)})") from error


def given_statistics(file: Path, wanted: dict) -> FeatureSet:
    """The statistics in a file, if they are of this encoder and image size.

    Raises:
        InputError: when they are not.
    """
    features, found = read_statistics(file)
    for key, meaning in (
        ("encoder_checksum", "another encoder or other weights"),
        ("vector", "another vector of the encoder"),
        ("input_size", "another input size of the encoder"),
    ):
        if found.get(key) != wanted[key]:
            raise InputError(
                "reference",
                f"`reference` {file} is of {meaning} ({found.get('encoder')}, {found.get(key)}; here "
                f"{wanted['encoder']}, {wanted[key]}); give the images instead",
            )
    size = found.get("images", {}).get("size")
    if size != wanted["images"]["size"]:
        raise InputError(
            "reference", f"`reference` {file} is of images of {size}, SAMPLES are {wanted['images']['size']}"
        )
    return features


def batch_moments(source: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and covariance that one of ADM's reference batches carries (pytorch-fid's `.npz` have the former two).

    Raises:
        InputError: when they are not of the Inception network's features.
    """
    moments, keys = {}, npz_keys(f"`reference` {source}", source)
    for name, mean, covariance, dim in (("pool", "mu", "sigma", 2048), ("spatial", "mu_s", "sigma_s", 2023)):
        if {mean, covariance} <= keys:
            pair = [read_npz(f"`reference` {source}", source, key) for key in (mean, covariance)]
            if [array.shape for array in pair] != [(dim,), (dim, dim)]:
                raise InputError(
                    "reference", f"`reference` {source}: {mean} and {covariance} are not of {dim} Inception features"
                )
            moments[name] = tuple(torch.from_numpy(np.array(array, dtype=np.float64)) for array in pair)
    return moments


def statistics_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusers-vrpo" / "statistics"


def reference_features(
    args, images: ImageSet | None, size: tuple[int, int], given: dict, metrics: list[str], name: str, encoder, state
) -> FeatureSet | None:
    """The reference's features: from its file, from the cache of earlier runs, or computed and then kept.

    Args:
        images: of the reference; None where it is a file of statistics.
        size: height and width of the samples.
        given: moments that the reference's `.npz` carries, by name; those of images go before computed ones.
        metrics: that need it.

    Raises:
        InputError: as `given_statistics` and `measure`.
    """
    given = given if isinstance(encoder, FIDInception) else {}
    enough = all({"fid": "pool", "sfid": "spatial"}.get(metric) in given for metric in metrics)
    if (images is None and not args.reference.endswith(".safetensors")) or (enough and not args.save_reference):
        return FeatureSet(0, dict(given))
    fingerprint = {"size": list(size)} if images is None else images.fingerprint()
    wanted = describe(fingerprint, name, encoder, args.max_features)
    if images is None:
        features = given_statistics(Path(args.reference), wanted) if state.is_main_process else None
    else:
        key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
        file = Path(args.reference_cache or statistics_folder()).expanduser() / f"{key}.safetensors"
        features = cached_statistics(file, wanted) if state.is_main_process else None
        # All do what the main process found: another may see a file late.
        if not gather_object([features is not None])[0]:
            features = measure(images, encoder, state, args.batch_size, args.dataloader_num_workers, args.max_features)
            if state.is_main_process:
                keep_statistics(features, wanted, file)
    if features is not None:
        features.moments |= given
        if args.save_reference:
            save_statistics(features, wanted, Path(args.save_reference))
    return features


def keep_statistics(features: FeatureSet, wanted: dict, file: Path):
    """Puts statistics into the cache; where that fails, the work is not lost with it."""
    try:
        save_statistics(features, wanted, file)
    except InputError as error:
        logger.warning(
            f"{error}; the statistics of the reference are not kept (`reference_cache` names another folder)"
        )
    else:
        logger.info(f"statistics of the reference are kept in {file}")


def cached_statistics(file: Path, wanted: dict) -> FeatureSet | None:
    """The statistics in a file of the cache, None where there are none or they are damaged."""
    if not file.is_file():
        return None
    try:
        features, found = read_statistics(file)
    except InputError as error:
        logger.warning(f"{error}; computing them again")
        return None
    if found != wanted:
        logger.warning(f"{file} is of something else than its name says; computing its statistics again")
        return None
    logger.info(f"statistics of the reference are those of {file}")
    return features
