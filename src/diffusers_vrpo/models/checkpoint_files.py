# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Reads the state dict of a checkpoint file, whatever it is wrapped in, without running code from the file."""

import argparse
import json
import logging
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..errors import InputError, first_line


logger = logging.getLogger(__name__)
# A weight that every official checkpoint has; a prefix of its name comes from a wrapper.
ANCHOR = "x_embedder.proj.weight"
# Names that DDP, torch.compile, activation checkpointing and FSDP insert anywhere in a weight's name.
WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged?|swa|shadow)(?![a-z])", re.IGNORECASE)
# The names under which weights that are not averaged are searched, in this order.
PLAIN_CONTAINERS = ("model", "model_state_dict", "state_dict", "module", "net")
# The first bytes of other files, what these files are, and what to do.
SIGNATURES = (
    (b"\x1f\x8b", "is compressed by gzip", "unpack it with gunzip (or tar) and give the file inside"),
    (b"BZh", "is compressed by bzip2", "unpack it and give the file inside"),
    (b"\xfd7zXZ\x00", "is compressed by xz", "unpack it and give the file inside"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", "unpack it and give the file inside"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive", "unpack it and give the file inside"),
    (b"Rar!", "is a RAR archive", "unpack it and give the file inside"),
    (b"\x89HDF", "is an HDF5 file", "give a PyTorch or safetensors file"),
    (b"GGUF", "is a GGUF file", "give a PyTorch or safetensors file"),
    (b"\x93NUMPY", "is a NumPy array", "give a PyTorch or safetensors file"),
    (b"PAR1", "is a Parquet file", "give a PyTorch or safetensors file"),
    (b"\x89PNG", "is an image", "give a PyTorch or safetensors file"),
    (b"\xff\xd8\xff", "is an image", "give a PyTorch or safetensors file"),
    (b"%PDF", "is a PDF", "give a PyTorch or safetensors file"),
)


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Reads the state dict of a checkpoint file, and the training arguments in it.

    The weights may be at the top level or nested under other names (`ema`, `model_state_dict`, Lightning's
    `state_dict`, ...). Averaged weights are preferred. Parts of names that wrappers have added (`module.`,
    `_orig_mod.`, `model.`, ...) are removed.

    Returns:
        floating-point tensors by official name, and the options of the training script (empty if the file has none).

    Raises:
        InputError: if the file is not a checkpoint, is truncated, cannot be read without running code from it, or has
            no weights or several sets of them.
    """
    content = load_content(path)
    training_args = content.get("args") if isinstance(content, dict) else None
    training_args = vars(training_args) if isinstance(training_args, argparse.Namespace) else training_args
    state = choose_weights(path, content)
    for name, tensor in state.items():
        check_tensor(path, name, tensor)
    return state, training_args if isinstance(training_args, dict) else {}


def load_content(path: str) -> object:
    """Loads a checkpoint file as it is: tensors and plain values in nested containers.

    The content of the file determines the format, not the ending of its name.

    Raises:
        InputError: if it is not a whole checkpoint file, or holds other objects.
    """
    try:
        kind = file_kind(Path(path))
    except OSError as error:
        raise InputError(None, f"{path} cannot be read ({error.strerror or first_line(error)})") from error
    try:
        if kind == "safetensors":
            return load_file(path)
        # The official training scripts put their parsed arguments, a plain namespace, next to the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            if kind == "zip" and not str(path).endswith(".safetensors"):  # torch would read this ending as safetensors
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise InputError(None, f"{path} is truncated; download or copy it again") from error
        found = re.search(r"(?:GLOBAL|class) (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise InputError(
            None,
            f"{path} holds objects other than tensors and plain values{what}, and loading them could run code; have its "
            "author save the state dict alone: torch.save(model.state_dict(), FILE)",
        ) from error
    except Exception as error:  # damaged bytes make the readers raise any type
        raise InputError(
            None,
            f"{path} cannot be read as a checkpoint, it may be truncated or damaged; download it again "
            f"({first_line(error)})",
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# What a file is


def file_kind(path: Path) -> str:
    """Returns `safetensors`, `zip` (which torch.save writes) or `pickle` (which it wrote before version 1.6).

    Raises:
        InputError: if the file is of another kind or truncated; the message says what it is and how to get the right one.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if (problem := other_file(path, head, size)) is not None:
        raise InputError(None, f"{path} {problem}")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= header <= 100_000_000:
        if (needed := safetensors_size(path, header)) is not None and size < needed:
            raise InputError(None, f"{path} is truncated: it has {size} of {needed} bytes; download or copy it again")
        return "safetensors"
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "pickle"
    raise InputError(
        None,
        f"{path} is neither a PyTorch nor a safetensors file, judging by its first bytes; give the checkpoint that the "
        "training wrote, or download it again",
    )


def other_file(path: Path, head: bytes, size: int) -> str | None:
    """Describes a file that is certainly not a checkpoint, and what to do; None for a file that may be one.

    Args:
        path: the file.
        head: its first 64 kB.
        size: its size in bytes.
    """
    if size == 0:
        return "is empty (0 bytes); download or copy it again"
    if head.startswith(b"version https://git-lfs"):
        real = re.search(rb"^size (\d+)", head, re.MULTILINE)
        of = f" of a file of {int(real[1]):,} bytes" if real else ""
        return f"is a Git LFS pointer{of}, not the file itself; run `git lfs pull` in its repository"
    if not head.strip(b"\x00"):
        return "begins with zeros only, like a download that did not finish; download it again"
    for signature, what, remedy in SIGNATURES:
        if head.startswith(signature):
            return f"{what}; {remedy}"
    if head.startswith(b"PK\x03\x04"):
        return other_zip(path)
    if head[257:262] == b"ustar" and tarfile.is_tarfile(path):
        return "is a tar archive; unpack it and give the file inside"
    text = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg")):
        return "is a web page, not a checkpoint; download the file itself, on the Hub by its /resolve/ address"
    return other_text(path, head)


def other_zip(path: Path) -> str | None:
    """The same as `other_file`, for a file that begins like a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "is a zip archive without an end, so it may be truncated; download it again"
    names = [entry.filename for entry in entries]
    if any(name.endswith(".npy") for name in names):
        return "holds NumPy arrays; give a PyTorch or safetensors file"
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return "is a zip archive without a PyTorch checkpoint; unpack it and give the file inside"
    if any("/code/" in name for name in names):
        return "is a TorchScript program, which would run code; save the state dict alone"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "is a compressed zip archive, which torch.save never writes; save the state dict with torch.save again"
    return None


def other_text(path: Path, head: bytes) -> str | None:
    """The same as `other_file`, for JSON and other text."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not only the last character, which the limit may have cut
            return None
        text = head[: error.start].decode("utf-8-sig")
    if any(ord(character) < 32 and character not in "\t\r\n\f" for character in text):
        return None
    if path.name.endswith(".index.json"):
        return "is the index of a checkpoint in shards; give the folder that it is in"
    if text.lstrip()[:1] in ("{", "["):
        return "is a JSON file, not a checkpoint; give the .pt or .safetensors file, or the folder of a model"
    return f"is a text file, not a checkpoint (it begins with {text[:30]!r}); download the checkpoint again"


def safetensors_size(path: Path, header: int) -> int | None:
    """The size in bytes that a safetensors file has according to its header; None if the header cannot be read.

    Args:
        path: the file.
        header: the length of the header in bytes.
    """
    with path.open("rb") as file:
        file.seek(8)
        content = file.read(header)
    if len(content) < header:
        return 8 + header + 1
    try:
        table = json.loads(content)
        return 8 + header + max((row["data_offsets"][1] for row in table.values() if "data_offsets" in row), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# The weights among the content


def containers(content: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yields each dictionary that holds tensors by name, up to four levels deep, with the names that lead to it."""
    if not isinstance(content, dict):
        return
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if tensors and all(isinstance(name, str) for name in tensors):
        yield path, {WRAPPERS.sub("", name): value for name, value in tensors.items()}
    if len(path) < 4:
        for name, value in content.items():
            yield from containers(value, (*path, str(name)))


def choose_weights(path: str, content: object) -> dict[str, torch.Tensor]:
    """Finds the weights of the transformer in the content of a file; averaged weights are preferred.

    Raises:
        InputError: if there are none, or several sets of the same rank.
    """
    found = {}
    largest, largest_path = None, ()
    for where, tensors in containers(content):
        if largest is None or len(tensors) > len(largest):
            largest, largest_path = tensors, where
        prefixes = sorted((n.removesuffix(ANCHOR) for n in tensors if f".{n}".endswith(f".{ANCHOR}")), key=len)
        # A weight belongs to the longest prefix of its name.
        parts: dict[str, dict] = {prefix: {} for prefix in prefixes}
        others = set()
        for name, tensor in tensors.items():
            owner = next((prefix for prefix in reversed(prefixes) if name.startswith(prefix)), None)
            if owner is None:
                others.add(name.split(".")[0])
            else:
                parts[owner][name.removeprefix(owner)] = tensor
        for prefix, part in parts.items():
            found[".".join([*where, prefix]).strip(".")] = part, others
    if largest is None:
        raise InputError(
            None, f"{path} has no state dict (tensors by name), neither flat nor under a name such as 'ema' or 'model'"
        )
    if not found:
        return without_counters(path, largest, ".".join(largest_path))

    def rank(label: str) -> tuple[bool, int]:
        first = label.split(".")[0]
        place = PLAIN_CONTAINERS.index(first) if first in PLAIN_CONTAINERS else len(PLAIN_CONTAINERS)
        return AVERAGED.search(label) is None, place if label else -1

    best = min(map(rank, found))
    labels = [label for label in found if rank(label) == best]
    if len(labels) > 1:
        raise InputError(
            None, f"{path} holds several models ({', '.join(map(repr, labels))}); save the state dict of one alone"
        )
    label = labels[0]
    state, others = found[label]
    if label:
        logger.info(f"{path}: the weights are read from {label!r}")
    empty = [str(name) for name in content if AVERAGED.search(str(name))] if isinstance(content, dict) else []
    empty = [name for name in empty if isinstance(content[name], dict | list | tuple)]
    if best[0] and empty:
        logger.warning(f"{path}: {empty[0]!r} holds no weights by name, so the weights that are read are not averaged")
    if others:
        logger.info(f"{path}: its other parts are not read ({', '.join(sorted(others)[:5])})")
    return without_counters(path, state, label)


def without_counters(path: str, state: dict[str, torch.Tensor], label: str) -> dict[str, torch.Tensor]:
    """Drops scalars such as AveragedModel's `n_averaged`, which are stored beside the weights.

    Raises:
        InputError: if there is nothing else.
    """
    kept = {name: tensor for name, tensor in state.items() if tensor.ndim > 0 or "." in name}
    if not kept:
        raise InputError(None, f"{path} has no state dict with weights{f' under {label!r}' if label else ''}")
    return kept


def check_tensor(path: str, name: str, tensor: torch.Tensor):
    """Raises InputError if a tensor cannot be a weight: it is not plain, not floating-point or not whole."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise InputError(None, f"{path}: {name} is not a plain tensor; save the state dict of the model on the CPU")
    if not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            None,
            f"{path}: {name} is of type {dtype}, and weights must be floating-point numbers; dequantize them first",
        )
    # A view can claim any size; its values would fill the memory when they are copied.
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise InputError(None, f"{path}: {name} {tuple(tensor.shape)} is larger than what the file holds for it")
