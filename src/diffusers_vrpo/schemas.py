# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Schemas of the JSON files of runs, caches, samples and pipelines, and functions that read and check such files."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from .files import read_regular


# A schema maps the entries of an object to a type, a tuple of alternative types, `[type]` for a list, or a nested
# schema. An entry whose name ends in `?` may be missing. A boolean does not count as a number.
NUMBER = (int, float)
MANIFEST = {"size and CRC-32": dict}
TRAINING_STATE = {
    "step": int,
    "samples_seen": int,
    "settings": dict,
    "lr_scheduler": dict,
    "alignment": (dict, type(None)),
    "callbacks?": [str],
    "reward_weightings?": [str],
    "length?": {
        "max_train_steps": int,
        "checkpointing_steps": int,
        "validation_steps": int,
        "early_grids": bool,
        "checkpoints_to_keep": int,
    },
    "skipped": int,
    "train_seconds": NUMBER,
    "train_flops": NUMBER,
}
METRICS_ROW = {"step": int}
TRACKERS = {"wandb": str}
START_FACTS = {
    "hardware?": (str, type(None)),
    "num_processes?": int,
    "global_batch_size?": int,
    "mixed_precision?": (str, type(None)),
    "parameters?": int,
    "projector_parameters?": int,
    "max_train_steps?": int,
    "prediction_type?": str,
    "adapters_suffice?": bool,
    "local?": [str],
    "torch?": str,
    "changed?": dict,
}
START = {"step": int} | START_FACTS
RECORDED_OPTIONS = {  # the options in train_config.yaml that a report computes with
    "seed?": int,
    "train_batch_size?": int,
    "gradient_accumulation_steps?": int,
    "policy_epochs?": int,
    "checkpointing_steps?": int,
}
SAMPLES = {
    "format": int,
    "complete?": bool,
    "options": {"num_images": int, "batch_size": int, "output_format": str},
    "pipeline_checksum": int,
    "versions": dict,
}
CACHE = {
    "format": int,
    "complete": bool,
    "config": {
        "count": int,
        "chunk_rows": int,
        "kind": str,
        "latent_shape": [int],
        "flip": bool,
        "images": str,
        "features": [{"encoder": str, "grid": [int], "dim": int}],
    },
    "about": {"vae": str, "num_classes": int, "class_names": (list, type(None))},
}
COMPLETE_CACHE = CACHE | {"corrupt_rows": [int], "checksums": [int]}
JOURNAL_ENTRY = {"chunk": int, "crc": int, "corrupt": [int]}


def mismatch(value, wanted, where: str = "") -> str | None:
    """Describes the first part of a JSON value that does not match a schema; None if all parts match.

    Args:
        value: the value, as `json.loads` returns it.
        wanted: the schema.
        where: the name of the value in the description, such as `alignment` in `alignment must be an object, not 3`.
    """
    name = where or "it"
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return f"{name} must be an object, not {shown(value)}"
        for key, kind in wanted.items():
            optional, key = key.endswith("?"), key.removesuffix("?")
            path = f"{where}.{key}" if where else key
            if key not in value:
                if not optional:
                    return f"{path} is missing"
            elif problem := mismatch(value[key], kind, path):
                return problem
        return None
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{name} must be a list, not {shown(value)}"
        return next(filter(None, (mismatch(item, wanted[0], f"{name}[{i}]") for i, item in enumerate(value))), None)
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds):
        words = {
            int: "a whole number",
            float: "a number",
            str: "text",
            bool: "true or false",
            dict: "an object",
            list: "a list",
        }
        listed = list(dict.fromkeys(words.get(kind, "null") for kind in kinds if not (kind is int and float in kinds)))
        return f"{name} must be {' or '.join(listed)}, not {shown(value)}"
    return None


def shown(value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check(value, wanted) -> dict:
    """Returns a JSON value if it matches a schema.

    Raises:
        ValueError: if it does not; the message names the part that differs.
    """
    if problem := mismatch(value, wanted):
        raise ValueError(problem)
    return value


def read_object(path: Path, wanted: dict) -> dict:
    """Reads a JSON file of a run, a cache or samples, and checks it against a schema.

    Raises:
        OSError: if it cannot be read, or is a link or a special file.
        ValueError: if it is not JSON or does not match the schema.
    """
    try:
        return check(json.loads(read_regular(path)), wanted)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_rows(path: Path, wanted: dict) -> tuple[list[dict], int]:
    """Reads the objects of a JSON-lines file that match a schema, and counts the other lines, such as a torn last one.

    Raises:
        OSError: if the file cannot be read, or is a link or a special file.
    """
    rows, damaged = [], 0
    for line in read_regular(path).splitlines():
        if not line.strip():
            continue
        try:
            rows.append(check(json.loads(line), wanted))
        except (ValueError, RecursionError):
            damaged += 1
    return rows, damaged


def merge_steps(rows: list[dict]) -> list[dict]:
    """Merges consecutive rows of a step, for which validation, which runs after the checkpoint, adds a second line."""
    merged: list[dict] = []
    for row in rows:
        if merged and merged[-1]["step"] == row["step"]:
            merged[-1] |= row
        else:
            merged.append(row)
    return merged


def check_model_index(index, error: Callable[[str], Exception]):
    """Checks the `model_index.json` of a pipeline: components as `[library, class]`, class names as `{id: name}`.

    Args:
        error: turns the description of a problem into the exception that is raised.
    """
    if not isinstance(index, dict):
        raise error(f"it must be an object, not {shown(index)}")
    for name in ("transformer", "scheduler", "vae"):
        value = index.get(name)
        pair = isinstance(value, list | tuple) and len(value) == 2
        if name in index and not (pair and all(isinstance(item, str | None) for item in value)):
            raise error(f"{name} must be [library, class], not {shown(value)}")
    if index.get("id2label") is not None and (problem := id2label_problem(index["id2label"])):
        raise error(f"id2label {problem}")
    if problem := mismatch(index.get("trained_labels") or [], [int], "trained_labels"):
        raise error(problem)


def argument_problem(config: dict, defaults: dict) -> str | None:
    """Describes the first constructor argument in a model's JSON file that has a wrong type; None if there is none.

    Args:
        config: the arguments by name.
        defaults: their default values, which tell the types; an argument whose default is None or a sequence is not
            checked.
    """
    for name, value in config.items():
        default = defaults.get(name)
        kind = NUMBER if isinstance(default, float) else type(default)
        if isinstance(default, bool | int | float | str) and (problem := mismatch(value, kind, name)):
            return problem
    return None


def id2label_problem(value) -> str | None:
    """Describes what is wrong with class names, which should be `{"0": "tench", ...}`; None if nothing is."""
    if not isinstance(value, dict):
        return f"must map class ids to names, not be {shown(value)}"
    for key, name in value.items():
        if not re.fullmatch(r"\d{1,9}", str(key)):
            return f"has the key {shown(key)}, which is not a class id"
        if not isinstance(name, str):
            return f"{key} must be text, not {shown(name)}"
    return None
