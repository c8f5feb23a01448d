# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Features of image sets, their moments, and the files that keep the statistics of a reference.

`vrpo evaluate`, the validation of a training run and the rewards of generated images share one file format: float64
`{vector}.mean [D]` and `{vector}.covariance [D, D]`, float32 features `pool [n, D]` of images, and further tensors. The
metadata hold `count`, the number of images behind the moments, and `description`, which is JSON of everything that the
statistics depend on.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..config import last_part
from ..errors import InputError, first_line
from ..files import default_permissions, replacing
from ..random_streams import ORDER, random_stream
from .image_encoders import default_batch_size, encoder_checksum, image_features
from .image_sets import ImageSet, npz_keys, read_npz
from .inception import FIDInception
from .metrics import RunningMoments


logger = logging.getLogger("evaluate")
GATHERED_ROWS = 4096  # features gathered from all processes at a time
SHARING_SECONDS = 60  # how long a network file system may take to show a new file


@dataclass
class FeatureSet:
    """Statistics and features of a set of images in an encoder, on the CPU.

    Attributes:
        count: the number of images behind the moments.
        moments: mean `[D]` and covariance `[D, D]`, float64, by vector: `pool`, `spatial` (Inception's) and `shallow`.
        pool: float32 features `[n, D]` of the images, or of `max_features` of them; None if only moments are known.
        logits: float32 `[n, 1008]` of Inception; None for a reference.
        others: further tensors of a file, by name.
    """

    count: int
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
    pool: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to write to a file, by name, without `logits`."""
        tensors = dict(self.others)
        if self.pool is not None:
            tensors["pool"] = self.pool
        for name, (mean, covariance) in self.moments.items():
            tensors |= {f"{name}.mean": mean, f"{name}.covariance": covariance}
        return tensors

    @classmethod
    def from_tensors(cls, count: int, tensors: dict[str, torch.Tensor]) -> "FeatureSet":
        """The inverse of `tensors`.

        Raises:
            KeyError: if a covariance is missing.
        """
        others, names = dict(tensors), [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
        moments = {name: (others.pop(f"{name}.mean"), others.pop(f"{name}.covariance")) for name in names}
        return cls(count, moments, others.pop("pool", None), others=others)


# ----------------------------------------------------------------------------------------------------------------------
# Features


def collect_features(
    encoder: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor | None, torch.Tensor | None]],
    state,
    moments_of: tuple[str, ...] = ("pool",),
    rows_of: tuple[str, ...] = (),
    num_rows: int = 0,
    batch_size: int | None = None,
    inspect: Callable[[torch.Tensor, dict[str, torch.Tensor]], None] | None = None,
) -> tuple[dict[str, RunningMoments], dict[str, torch.Tensor]]:
    """Computes the moments of the features of the images on all processes, and collects the features of some images.

    Args:
        encoder: returns vectors `[B, D]` by name for uint8 images.
        batches: the batches of this process: the row of each image among `num_rows` (int64 `[B]`, -1 for none; None without
            `rows_of`), and the images, uint8 `[B, 3, H, W]`, or None if they are not finite.
        state: `PartialState`, or an `Accelerator`.
        moments_of: the vectors whose moments are computed.
        rows_of: the vectors whose features are kept.
        num_rows: the number of features to keep.
        batch_size: images per batch of the encoder; `default_batch_size` by default.
        inspect: called with each batch's images and features, for instance to check them.

    Returns:
        on each process the moments by name, which are NaN if images were None; and on the main process the features
        by name, float32 `[num_rows, D]` on the CPU.
    """
    device = next(encoder.parameters()).device
    moments_device = "cpu" if device.type == "mps" else device  # MPS has no float64
    dims = vector_dims(encoder) if rows_of or moments_of else {}
    moments = {name: RunningMoments(dims[name], moments_device) for name in moments_of}
    places, rows = [torch.zeros(0, dtype=torch.long)], {name: [torch.zeros(0, dims[name])] for name in rows_of}
    for place, images in batches:
        if images is None:
            features = {name: torch.full((1, dim), torch.nan, device=device) for name, dim in dims.items()}
        else:
            images = images.to(device, non_blocking=True)
            features = image_features(encoder, images, batch_size)
        if inspect is not None:
            inspect(images, features)
        for name in moments_of:
            moments[name].update(features[name])
        if rows_of:
            kept = place >= 0
            places.append(place[kept])
            for name in rows_of:
                rows[name].append(features[name].cpu()[kept])
    moments = {name: merge_moments(part, state) for name, part in moments.items()}
    gathered = {
        name: gather_rows(torch.cat(parts), torch.cat(places), num_rows, state) for name, parts in rows.items()
    }
    return moments, gathered if state.is_main_process else {}


@torch.no_grad()
def vector_dims(encoder: torch.nn.Module) -> dict[str, int]:
    """The length of each vector of an encoder, by its name."""
    device = next(encoder.parameters()).device
    blank = torch.zeros(1, 3, *input_size(encoder), dtype=torch.uint8, device=device)
    return {name: vector.shape[1] for name, vector in encoder(blank).items()}


def input_size(encoder: torch.nn.Module) -> tuple[int, int]:
    """Height and width in pixels that an encoder resizes images to."""
    return tuple(getattr(encoder, "input_size", (299, 299)))


class Batches(torch.utils.data.Dataset):
    """Batches `[B, 3, H, W]`; returns the message of an error, since a worker process would garble the exception."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, rows: list[int]) -> torch.Tensor | str:
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
    """Computes the features of all images on all processes; returns them on the main process, else None.

    The batches do not depend on the number of processes.

    Args:
        batch_size: images per batch; `default_batch_size` by default.
        num_workers: the number of processes that decode images.
        max_features: the features of at most this many images are kept, a fixed random subset; moments are of all
            images.
        keep_logits: also keep the logits, if the encoder is Inception.

    Raises:
        InputError: if an image cannot be decoded, features are not finite, or all images are equal or of one colour.
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
        batch_size=None,  # `Batches` returns whole batches
        sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    progress = tqdm(total=len(images), desc=images.name[-40:], unit="image", disable=not state.is_main_process)
    flat, current = 0, []

    def loaded():
        for batch, pixels in zip(batches, loader):
            if isinstance(pixels, str):
                raise InputError(None, pixels)
            current[:] = batch
            yield torch.from_numpy(place[batch]), pixels
            progress.update(min(len(batch) * state.num_processes, len(images) - progress.n))

    def inspect(pixels, features):
        nonlocal flat
        flat += (pixels.flatten(1).amin(1) == pixels.flatten(1).amax(1)).sum().item()
        if not all(values.isfinite().all() for values in features.values()):
            raise InputError(
                None, f"{images.name}: the encoder's features of images {current[0]} to {current[-1]} are not finite"
            )

    is_inception = isinstance(encoder, FIDInception)
    with progress:
        moments, gathered = collect_features(
            encoder,
            loaded(),
            state,
            moments_of=("pool", "spatial") if is_inception else ("pool",),
            rows_of=("pool", "logits") if keep_logits and is_inception else ("pool",),
            num_rows=len(kept),
            batch_size=batch_size,
            inspect=inspect,
        )
    flat = sum(gather_object([flat]))
    if not state.is_main_process:
        return None
    check_variety(images, flat, moments["pool"])
    moments = {name: (m.mean.cpu(), m.covariance.cpu()) for name, m in moments.items()}
    return FeatureSet(len(images), moments, gathered["pool"], gathered.get("logits"))


def check_variety(images: ImageSet, flat: int, moments: RunningMoments):
    """Warns if some images are of one colour.

    Args:
        flat: the number of images of one colour.
        moments: the moments of the images' features.

    Raises:
        InputError: if all images are of one colour, or all are equal.
    """
    if flat == len(images):
        raise InputError(None, f"{images.name}: all {flat} images are of one colour; did the decoder give NaN?")
    if flat:
        logger.warning(f"{images.name}: {flat} of {len(images)} images are of one colour")
    if moments.count > 1 and moments.scatter.trace() <= 1e-10 * moments.count * moments.mean.square().sum():
        raise InputError(
            None, f"{images.name}: the features of all {moments.count} images are equal; is it one image?"
        )


def merge_moments(moments: RunningMoments, state) -> RunningMoments:
    """Merges the moments of all processes; every process gets the result."""
    if state.num_processes == 1:
        return moments
    counts = gather_object([moments.count])
    means, scatters = gather(moments.mean[None]), gather(moments.scatter[None])
    merged = RunningMoments(len(moments.mean), moments.mean.device)
    for count, mean, scatter in zip(counts, means, scatters):
        part = RunningMoments(len(mean), mean.device)
        part.count = count
        part.mean = mean
        part.scatter = scatter
        merged.merge(part)
    return merged


def gather_rows(rows: torch.Tensor, places: torch.Tensor, total: int, state) -> torch.Tensor | None:
    """Gathers rows `[n, D]` of all processes into `[total, D]` on the CPU of the main process; others get None."""
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
# Files


def describe(images: dict, name: str, encoder, max_features: int) -> dict:
    """Describes everything that the statistics of images depend on, as JSON.

    Args:
        images: facts that identify the images; `size` is their height and width.
        name, encoder: the name of the encoder, and the encoder.
        max_features: how many features are kept at most.
    """
    return {
        "images": images,
        "encoder": last_part(name),
        "encoder_checksum": encoder_checksum(encoder),
        "vector": getattr(encoder, "kind", "pool_3"),
        "input_size": list(input_size(encoder)),
        "max_features": max_features,
        "format": 1,
    }


def save_statistics(features: FeatureSet, description: dict, file: Path):
    """Writes statistics as safetensors, atomically.

    Raises:
        InputError: if the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in features.tensors().items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file(tensors, temporary, {"description": json.dumps(description), "count": str(features.count)})
            default_permissions(temporary)
    except (OSError, SafetensorError) as error:
        raise InputError(None, f"{file} cannot be written ({first_line(error)})") from error


def read_statistics(file: Path) -> tuple[FeatureSet, dict]:
    """Reads what `save_statistics` wrote: the statistics and their description.

    Raises:
        InputError: if `save_statistics` did not write the file, or the file is damaged.
    """
    try:
        with safe_open(file, "pt") as saved:
            metadata = saved.metadata() or {}
            tensors = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118
        description = json.loads(metadata["description"])
        if not isinstance(description, dict) or not isinstance(description.get("images", {}), dict):
            raise ValueError("its description is another program's")
        return FeatureSet.from_tensors(int(metadata["count"]), tensors), description
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise InputError(None, f"{file} is not a statistics file of this program ({first_line(error)})") from error


def known_statistics(file: Path, wanted: dict) -> FeatureSet | None:
    """Reads the statistics in a file; returns None if the file is missing or damaged, or has another description."""
    if not file.is_file():
        return None
    try:
        features, found = read_statistics(file)
    except InputError as error:
        logger.warning(f"{error}; computing them again")
        return None
    if found != wanted:
        logger.warning(f"{file} holds the statistics of other images or another encoder; computing them again")
        return None
    logger.info(f"the statistics of the reference are read from {file}")
    return features


def shared_statistics(
    file: Path, wanted: dict, compute: Callable[[], FeatureSet | None], state, on_every_process: bool = True
) -> FeatureSet | None:
    """Reads statistics from a file, or else computes them on all processes and writes the file.

    Args:
        file: the file.
        wanted: the description that the statistics must have.
        compute: called by all processes; returns the statistics on the main process.
        on_every_process: return the statistics on all processes, which must share the file. Otherwise only the main process
            gets them, and a file that cannot be written is only a warning.

    Raises:
        InputError: if the file cannot be written or not all processes see it; and whatever `compute` raises.
    """
    features = known_statistics(file, wanted) if state.is_main_process else None
    # The main process decides for all, since the others may see a new file late.
    if not gather_object([features is not None])[0]:
        features, problem = compute(), None
        if state.is_main_process:
            try:
                save_statistics(features, wanted, file)
                logger.info(f"statistics of the reference are kept in {file}")
            except InputError as error:
                problem = str(error)
        problem = gather_object([problem])[0]
        if problem and on_every_process:
            raise InputError(None, problem)
        if problem:
            logger.warning(
                f"{problem}; the statistics of the reference are not kept (`reference_cache` can name another folder)"
            )
    if not on_every_process or state.num_processes == 1:
        return features
    end = time.monotonic() + SHARING_SECONDS
    while not state.is_main_process and (features := known_statistics(file, wanted)) is None:
        if time.monotonic() > end:
            raise InputError(None, f"{file} is not the same file for all processes; they must share its folder")
        time.sleep(1)
    return features


# ----------------------------------------------------------------------------------------------------------------------
# The reference of a metric


def given_statistics(file: Path, wanted: dict) -> FeatureSet:
    """Reads the statistics in a file, which must be of the encoder and the image size in the description `wanted`.

    Raises:
        InputError: if the encoder, its weights, its vector or the size differ, or the file cannot be read.
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
    """Reads the means and covariances in one of ADM's reference batches (pytorch-fid's `.npz` have only `mu` and `sigma`).

    Raises:
        InputError: if they are not of the Inception network's features.
    """
    moments, keys = {}, npz_keys(f"`reference` {source}", source)
    for name, mean, covariance, dim in (("pool", "mu", "sigma", 2048), ("spatial", "mu_s", "sigma_s", 2023)):
        if {mean, covariance} <= keys:
            moments[name] = tuple(
                read_moment(source, key, shape) for key, shape in ((mean, (dim,)), (covariance, (dim, dim)))
            )
    return moments


def read_moment(source: str, key: str, wanted: tuple[int, ...]) -> torch.Tensor:
    """Reads a mean or covariance of Inception's features from an `.npz`, as float64.

    Raises:
        InputError: if it has another shape or type, or is not finite.
    """

    def check(dtype: np.dtype, shape: tuple[int, ...]):
        if dtype.kind != "f" or shape != wanted:
            raise InputError(
                "reference",
                f"`reference` {source}: {key} is not of {wanted[0]} Inception features: it must be floating-point numbers of the "
                f"shape {list(wanted)}, not {dtype} {list(shape)}",
            )

    values = np.array(read_npz(f"`reference` {source}", source, key, check), dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("reference", f"`reference` {source}: {key} has values that are not finite")
    return torch.from_numpy(values)


def statistics_folder() -> Path:
    """The folder in which statistics of references are kept: `diffusers-vrpo/statistics` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusers-vrpo" / "statistics"


def reference_features(
    source: str | Path | None,
    images: ImageSet | None,
    size: tuple[int, int],
    given: dict[str, tuple[torch.Tensor, torch.Tensor]],
    metrics: list[str],
    name: str,
    encoder,
    state,
    max_features: int = 50_000,
    batch_size: int | None = None,
    num_workers: int = 0,
    cache_folder: str | Path | None = None,
    save_to: str | Path | None = None,
) -> FeatureSet | None:
    """Loads the features of a reference from its file or the cache of earlier runs, or computes and caches them.

    Returns them on the main process, else None.

    Args:
        source: the reference; a `.safetensors` is a file of statistics.
        images: the images of the reference; None if it holds statistics only.
        size: height and width of the samples.
        given: the moments in the reference's `.npz`, by name, which replace computed ones.
        metrics: the metrics that need the reference.
        name, encoder: the name of the encoder, and the encoder.
        max_features, batch_size, num_workers: as for `measure`.
        cache_folder: folder for statistics; `statistics_folder()` by default.
        save_to: another file to write the statistics to.

    Raises:
        InputError: as `given_statistics`, `measure` and `save_statistics` raise it.
    """
    given = given if isinstance(encoder, FIDInception) else {}
    has_file = str(source).endswith(".safetensors")
    enough = all({"fid": "pool", "sfid": "spatial"}.get(metric) in given for metric in metrics)
    if (images is None and not has_file) or (enough and save_to is None):
        return FeatureSet(0, dict(given))
    fingerprint = {"size": list(size)} if images is None else images.fingerprint()
    wanted = describe(fingerprint, name, encoder, max_features)
    if images is None:
        features = given_statistics(Path(source), wanted) if state.is_main_process else None
    else:
        key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
        file = Path(cache_folder or statistics_folder()).expanduser() / f"{key}.safetensors"

        def compute():
            return measure(images, encoder, state, batch_size, num_workers, max_features)

        features = shared_statistics(file, wanted, compute, state, on_every_process=False)
    if features is not None:
        features.moments |= given
        if save_to is not None:
            save_statistics(features, wanted, Path(save_to))
    return features
