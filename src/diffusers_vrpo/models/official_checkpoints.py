# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Converts checkpoints of the SiT, REPA, iREPA and DiT repositories and of diffusers' DiT to our format and back.

Keys are renamed, and qkv is split or joined. Without a change of convention, values stay the same, so that a round
trip from our format to an official one and back is exact. Differences between the repositories (direction of time,
prediction, timestep frequencies) are recorded in the config.
"""

import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import InputError, first_line, hub_problem
from ..files import default_permissions, replacing
from ..reach import offline_if_out_of_reach
from ..schemas import check_model_index
from . import ddpm
from .checkpoint_files import read_checkpoint
from .transformer_sit import (
    RMS_NORM,
    SIT_SIZES,
    SiTTransformer2DModel,
    check_headers,
    check_sizes,
    choose_variant,
    saved_variants,
    sit_preset,
)


logger = logging.getLogger(__name__)
FORMATS = ("auto", "sit", "repa", "irepa", "dit", "diffusers-dit")
LAYOUTS = ("repa", "sit", "dit")

# Official module names and ours. Names in blocks follow `blocks.N.` there and `transformer_blocks.N.` here.
TOP_NAMES = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embedding.linear_1",
    "t_embedder.mlp.2": "time_embedding.linear_2",
    "y_embedder.embedding_table": "label_embedding",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "modulation_out",
}
BLOCK_NAMES = {
    "attn.proj": "attn.to_out.0",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "modulation",
}
# The same for diffusers' DiT. Its embedders are read from block 0, since they must be equal in all blocks.
DIFFUSERS_TOP_NAMES = {
    "pos_embed.proj": "patch_embed",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "time_embedding.linear_1",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "time_embedding.linear_2",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "label_embedding",
    "proj_out_1": "modulation_out",
    "proj_out_2": "proj_out",
}
DIFFUSERS_BLOCK_NAMES = {
    "norm1.linear": "modulation",
    "attn1.to_q": "attn.to_q",
    "attn1.to_k": "attn.to_k",
    "attn1.to_v": "attn.to_v",
    "attn1.to_out.0": "attn.to_out.0",
    "ff.net.0.proj": "ff.net.0.proj",
    "ff.net.2": "ff.net.2",
}


@dataclass
class SavedProjectors:
    """Alignment projectors that were saved with a transformer.

    Attributes:
        description: `alignment_layers` (blocks, counted from 1), `alignment_dims` (widths of the encoders),
            `projector_type` (`"mlp"` or `"conv"`) and `projector_dim` (hidden width of an MLP).
        state: their weights, by names such as `"projectors.0.4.weight"`, numbered by block and then by encoder.
    """

    description: dict
    state: dict[str, torch.Tensor]


# ----------------------------------------------------------------------------------------------------------------------
# To ours


def convert_checkpoint(path: str, **options) -> SiTTransformer2DModel:
    """Calls `convert_with_projectors` and returns only the transformer."""
    return convert_with_projectors(path, **options)[0]


def convert_with_projectors(
    path: str,
    *,
    preset: str | None = None,
    num_attention_heads: int | None = None,
    format: str = "auto",
    num_classes: int | None = None,
    alignment_layer: int | None = None,
    cache_dir: str | None = None,
) -> tuple[SiTTransformer2DModel, SavedProjectors | None]:
    """Loads a transformer from any supported checkpoint, in float32 on the CPU, and the projectors saved with it.

    Args:
        path: an official `.pt` (or `.safetensors` with the same keys) of SiT, REPA, iREPA or DiT, whose averaged weights are
            used if it has them (`checkpoint_files.read_checkpoint`); or a folder or Hub name of a pipeline or transformer,
            ours or diffusers' `DiTTransformer2DModel`.
        preset: a name such as `"SiT-XL/2"`, which distinguishes SiT from DiT and is checked against the weights.
        num_attention_heads: the only size that the weights do not show; not needed for the depths and widths of the
            papers, nor with qk-norm.
        format: one of `FORMATS`. SiT's and DiT's files have the same keys: `"auto"` tells them apart by the training
            arguments in the file, the preset or a word in the file's name, and otherwise assumes SiT.
        num_classes: needed for a label table without a row for the null class (label dropout 0), unless the training
            arguments in the file give it; by default, the number of rows minus one.
        alignment_layer: the block, counted from 1, that feeds REPA's projectors, if the file does not record it.
        cache_dir: folder for downloads.

    Raises:
        InputError: if a key is missing or unknown or has another shape (the first are listed), a weight is NaN, infinite or
            an integer, the file is not a checkpoint or holds more than tensors and plain values, the blocks of a
            diffusers DiT have different embedders, or an argument contradicts the checkpoint or does not apply to it.
    """
    if format not in FORMATS:
        raise InputError("format", f"`format` {format!r} must be one of {', '.join(FORMATS)}")
    hints = {
        "preset": preset,
        "num_attention_heads": num_attention_heads,
        "num_classes": num_classes,
        "alignment_layer": alignment_layer,
    }
    for name, value in hints.items():
        if isinstance(value, int) and value < 1:
            raise InputError(name, f"`{name}` {value} must be at least 1")
    if not Path(path).is_file():
        if str(path).endswith((".pt", ".pth", ".ckpt", ".safetensors")):
            raise InputError(None, f"{path} is not a file")
        if given := [name for name, value in hints.items() if value is not None]:
            raise InputError(given[0], f"`{given[0]}` {hints[given[0]]}: {path} has a complete config.json; remove it")
        with offline_if_out_of_reach(path):
            return _from_folder_or_hub(path, format, cache_dir)
    state, training_args = read_checkpoint(path)
    if format in ("auto", "diffusers-dit"):
        if format == "diffusers-dit" or "pos_embed.proj.weight" in state:
            raise InputError(
                None, f"{path}: a diffusers DiT is converted from its folder, which also has the config.json"
            )
        format, why = detect_format(state, preset, training_args, Path(path).name)
        logger.info(f"{path}: taken as {format} by {why}")
    if preset and format in ("sit", "dit") and not preset.lower().startswith(format):
        raise InputError("preset", f"`preset` {preset} contradicts `format` {format}")
    try:
        return _from_official(
            path, state, training_args, preset, num_attention_heads, format, num_classes, alignment_layer
        )
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        # A file with the right names may still hold unexpected content.
        raise InputError(
            None, f"{path} is damaged, or not a SiT, REPA or DiT checkpoint: {first_line(error)}"
        ) from error


def detect_format(state: dict, preset: str | None, training_args: dict, file_name: str) -> tuple[str, str]:
    """Returns `sit`, `repa`, `irepa` or `dit`, and the evidence: keys or, as SiT and DiT share these, other signs."""
    if any(name.startswith("projectors.") and ".projection_layer." in name for name in state):
        return "irepa", "its projectors"
    if any(name.startswith(("projectors.", "decoder_blocks.")) for name in state):
        return "repa", "its keys"
    if "enc_type" in training_args:
        return "repa", "its training arguments"
    for sign, what in (
        (str(training_args.get("model") or ""), "its training arguments"),
        (preset or "", "the preset"),
    ):
        if match := re.match("sit|dit", sign.lower()):
            return match[0], what
    if match := re.search(r"(?:^|[-_. ])(repa|dit|sit)(?=[-_. ])", file_name.lower()):
        return match[1], "its name"
    logger.warning(
        f"{file_name}: its keys are those of SiT, DiT and REPA without projectors, and nothing else tells which it is; SiT is "
        "assumed, so convert it with `format` if it is another one"
    )
    return "sit", "default"


def official_name(name: str) -> tuple[str, int | None]:
    """The official key of one of our parameters, and its index within `qkv` if it is q, k or v."""
    module, kind = name.rsplit(".", 1)
    for official, ours in TOP_NAMES.items():
        if module == ours:
            return f"{official}.{kind}", None
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        number, inside = match.groups()
        if match := re.fullmatch(r"attn\.to_([qkv])", inside):
            return f"blocks.{number}.attn.qkv.{kind}", "qkv".index(match[1])
        official = {ours: official for official, ours in BLOCK_NAMES.items()}[inside]
        return f"blocks.{number}.{official}.{kind}", None
    return name, None  # projectors


def _from_official(path, state, training_args, preset, num_attention_heads, format, num_classes, alignment_layer):
    state = dict(state)
    # In early REPA files, the blocks after the aligned one are `decoder_blocks`, numbered from 0 again.
    encoder_depth = len(_numbers(state, "blocks"))
    if any(name.startswith("decoder_blocks.") for name in state):
        alignment_layer = alignment_layer or encoder_depth
        state = {
            re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + encoder_depth}", name): value
            for name, value in state.items()
        }
    # iREPA wraps both kinds of projectors in `projection_layer`; its MLP is the same as REPA's.
    state = {re.sub(r"^(projectors\.\d+)\.projection_layer\.(\d)", r"\1.\2", name): x for name, x in state.items()}

    # 1. Sizes, from the shapes of the weights.
    needed = ["x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "pos_embed"]
    needed += ["blocks.0.mlp.fc1.weight"]
    if missing := [name for name in needed if name not in state]:
        raise InputError(None, f"{path} is not a SiT, REPA or DiT checkpoint: {', '.join(missing)} not in it")
    if state["x_embedder.proj.weight"].ndim != 4 or state["pos_embed"].ndim != 3:
        raise InputError(
            None, f"{path} is not a SiT, REPA or DiT checkpoint: its patch or position embedding has another shape"
        )
    dim, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    depth = len(_numbers(state, "blocks"))
    if absent := set(range(depth)) - _numbers(state, "blocks"):
        raise InputError(None, f"{path} has {depth} blocks, but none with the number {min(absent)}; it is not whole")
    side = math.isqrt(state["pos_embed"].shape[1])
    rows = state["final_layer.linear.weight"].shape[0]
    label_rows = state["y_embedder.embedding_table.weight"].shape[0]
    qk_norm = state.get("blocks.0.attn.q_norm.weight")
    heads = _attention_heads(path, dim, depth, patch, preset, num_attention_heads, qk_norm)
    no_dropout = 0 in (training_args.get("cfg_prob"), training_args.get("class_dropout_prob"))
    num_classes = num_classes or training_args.get("num_classes") or label_rows - (0 if no_dropout else 1)
    if num_classes < 1 or label_rows - num_classes not in (0, 1):
        raise InputError(None, f"{path} has {label_rows} rows of labels, which do not fit `num_classes` {num_classes}")
    config = {
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_ratio": _mlp_ratio(state["blocks.0.mlp.fc1.weight"].shape[0], dim),
        "num_classes": num_classes,
        "class_dropout_prob": 0.1 if label_rows > num_classes else 0.0,
        "learn_sigma": rows == 2 * patch**2 * channels,
        "qk_norm": qk_norm is not None,
    }

    # 2. Conventions of the repository.
    for option, supported in (("path_type", ["linear"]), ("prediction", ["velocity", "v"])):
        value = training_args.get(option)
        if format != "dit" and isinstance(value, str) and value.lower() not in supported:
            raise InputError(
                None, f"{path} was trained with {option} {value!r}; only linear paths and velocities are read"
            )
    if format == "sit":
        config["time_direction"] = "noise_to_data"
    elif format == "dit":
        config["prediction_type"] = "epsilon"
    if format in ("sit", "dit") and channels > 3:
        config["guidance_channels"] = 3

    # 3. Projectors.
    projectors = None
    if format in ("repa", "irepa") and _numbers(state, "projectors"):
        description = _projector_config(path, state, depth, training_args, alignment_layer)
        projectors = SavedProjectors(description, {})
        if not 1 <= description["alignment_layers"][0] <= depth:
            layer = description["alignment_layers"][0]
            raise InputError("alignment_layer", f"`alignment_layer` {layer}: {path} has the blocks 1 to {depth}")
    elif alignment_layer is not None:
        raise InputError(
            "alignment_layer", f"`alignment_layer` {alignment_layer}: {path} has no projectors; remove it"
        )

    # 4. Every key of the file is used once.
    try:
        with init_empty_weights():
            model = SiTTransformer2DModel(**config)
    except ValueError as error:
        raise InputError(None, f"{path}: {first_line(error)}") from error
    converted, used = {}, {"pos_embed"}
    wrong = []
    for name, parameter in model.state_dict().items():
        official, third = official_name(name)
        used.add(official)
        value = state.get(official)
        if value is None:
            continue
        if third is not None and value.shape[0] % 3 == 0:
            value = value.chunk(3)[third]
        if value.shape != parameter.shape:
            expected = tuple(parameter.shape)
            if third is not None:
                expected = (3 * expected[0], *expected[1:])
            wrong.append(f"{official} {tuple(state[official].shape)} instead of {expected}")
        converted[name] = value.float().clone(memory_format=torch.contiguous_format)
    for name, shape in _projector_shapes(projectors, dim).items():
        used.add(name)
        if name in state:
            if state[name].shape != shape:
                wrong.append(f"{name} {tuple(state[name].shape)} instead of {shape}")
            projectors.state[name] = state[name].float().clone(memory_format=torch.contiguous_format)
    _check_keys(path, missing=used - state.keys(), unknown=state.keys() - used, wrong=list(dict.fromkeys(wrong)))
    _check_finite(path, converted if projectors is None else converted | projectors.state)
    table, stored = model.pos_embed, state["pos_embed"]
    if stored.shape != table.shape or not torch.allclose(stored.float(), table.to(stored.dtype).float(), atol=1e-5):
        raise InputError(None, f"{path}: its pos_embed is not SiT's sine-cosine table of {side} x {side} patches")
    model.load_state_dict(converted, assign=True)
    return model.eval(), projectors


def _mlp_ratio(inner_dim: int, dim: int) -> float:
    """A ratio for which the model's `int(dim * mlp_ratio)` is exactly `inner_dim`, despite rounding."""
    return inner_dim / dim if int(dim * (inner_dim / dim)) == inner_dim else (inner_dim + 0.5) / dim


def _numbers(state: dict, group: str) -> set[int]:
    """The numbers N in keys that begin with `group.N.`."""
    return {int(match[1]) for name in state if (match := re.match(rf"{group}\.(\d+)\.", name))}


def _attention_heads(path, dim, depth, patch, preset, num_attention_heads, qk_norm) -> int:
    sizes = {(s["num_layers"], s["num_attention_heads"] * s["attention_head_dim"]): s for s in SIT_SIZES.values()}
    found = sizes.get((depth, dim), {}).get("num_attention_heads")
    if qk_norm is not None:
        found = dim // qk_norm.shape[0]
    if preset is not None:
        try:
            config = sit_preset(preset)
        except ValueError as error:
            raise InputError("preset", f"`preset`: {error}") from error
        size = (
            config["num_layers"],
            config["num_attention_heads"] * config["attention_head_dim"],
            config["patch_size"],
        )
        if size != (depth, dim, patch):
            raise InputError(
                "preset",
                f"`preset` {preset} has depth, width and patch size {size}, but {path} has {(depth, dim, patch)}",
            )
    heads = num_attention_heads or found
    if heads is None:
        raise InputError(
            None,
            f"{path} has depth {depth} and width {dim}, which is not a known size: give `num_attention_heads` to `vrpo convert`",
        )
    if dim % heads:
        raise InputError(
            "num_attention_heads", f"`num_attention_heads` {heads} does not divide the width {dim} of {path}"
        )
    if found not in (None, heads):
        problem = f"`num_attention_heads` {heads}: a model of this depth and width has {found} heads"
        if preset is not None or qk_norm is not None:
            raise InputError(None, f"{problem}; remove it")
        logger.warning(f"{problem}; using the given number")
    return heads


def _projector_config(path, state: dict, depth: int, training_args: dict, alignment_layer: int | None) -> dict:
    numbers = sorted(_numbers(state, "projectors"))
    if alignment_layer is None:
        # The REPA paper uses block 8 for L and XL and 4 for B; except for L, this is our `early` layer.
        alignment_layer = training_args.get("encoder_depth") or (8 if depth >= 24 else math.ceil(depth * 2 / 7))
        if "encoder_depth" not in training_args:
            logger.info(f"{path}: block {alignment_layer} is assumed to feed the projectors (the file does not say)")
    conv = "projectors.0.projection_layer.weight" in state
    last = "projection_layer" if conv else "4"
    config = {"alignment_layers": [alignment_layer], "projector_type": "conv" if conv else "mlp"}
    dims = [state.get(f"projectors.{i}.{last}.weight") for i in numbers]
    if any(weight is None for weight in dims):
        raise InputError(
            None, f"{path}: its projectors are neither REPA's nor iREPA's (no projectors.*.{last}.weight)"
        )
    config["alignment_dims"] = [weight.shape[0] for weight in dims]
    config["projector_dim"] = 2048 if conv else state["projectors.0.4.weight"].shape[1]
    return config


def _projector_shapes(projectors: SavedProjectors | None, dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of projectors, for tokens of width `dim`."""
    if projectors is None:
        return {}
    description, shapes = projectors.description, {}
    hidden = description["projector_dim"]
    widths = list(description["alignment_dims"]) * len(description["alignment_layers"])
    for i, width in enumerate(widths):
        if description["projector_type"] == "conv":
            parts = {"projection_layer": (width, dim, 3, 3)}
        else:
            parts = {"0": (hidden, dim), "2": (hidden, hidden), "4": (width, hidden)}
        for part, shape in parts.items():
            shapes |= {f"projectors.{i}.{part}.weight": shape, f"projectors.{i}.{part}.bias": shape[:1]}
    return shapes


def _some(names) -> str:
    """Lists the first names in order, and says how many more there are."""
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _check_finite(path, state: dict[str, torch.Tensor]):
    """Raises InputError if a weight is NaN or infinite, because training diverged or the file is damaged."""
    if wrong := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise InputError(
            None,
            f"{path} has values that are NaN or infinite in {len(wrong)} of its weights ({_some(wrong)}); use a checkpoint "
            "from before its training diverged",
        )


def _check_keys(path, missing, unknown, wrong):
    problems = [
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise InputError(None, f"{path} does not have the keys of its format; {'; '.join(problems)}")


# ----------------------------------------------------------------------------------------------------------------------
# Folders and Hub names


def find_transformer(name_or_path: str, cache_dir: str | None = None) -> tuple[dict, str | None]:
    """Finds the transformer in a folder or Hub repository of a pipeline, a transformer or a training checkpoint.

    In a training checkpoint, it is the transformer with the averaged weights.

    Returns:
        its config, and the subfolder that it is in, or None for the folder itself.

    Raises:
        InputError: if there is no transformer.
    """
    problem = None
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1  # not a name on the Hub
    if is_path and not Path(name_or_path).is_dir():
        raise InputError(None, f"{name_or_path} is neither a folder nor a file")
    if (Path(name_or_path) / "transformer.safetensors").is_file():
        raise InputError(
            None, f"{name_or_path} holds adapters only; give the run's output folder, which holds the whole pipeline"
        )
    subfolders: list[str | None] = ["transformer", None]
    if Path(name_or_path).is_dir():
        # diffusers would find a transformer's own config.json under any subfolder, but not its weights in shards.
        subfolders = ["transformer_ema", "transformer", None]
        there = [name for name in subfolders if (Path(name_or_path) / (name or "") / "config.json").is_file()]
        subfolders = there
        problem = None if there else "the folder has no config.json of a transformer"
    for subfolder in subfolders:
        try:
            config = SiTTransformer2DModel.load_config(name_or_path, subfolder=subfolder, cache_dir=cache_dir)
            if not isinstance(config, dict):
                raise ValueError(f"its config.json must hold a JSON object, not a {type(config).__name__}")
        except RecursionError:
            problem = problem or "its config.json is nested too deeply"
            continue
        except Exception as error:  # diffusers raises many types; all mean that it is not a transformer
            if found := hub_problem(error, name_or_path):
                problem = found
                break  # another request would take time and fail, too
            problem = problem or first_line(error)
            continue
        class_name = config.get("_class_name")
        # The class of diffusers' DiT had this name when the published weights were saved.
        if class_name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
            class_name = "DiTTransformer2DModel"
        if class_name in ("SiTTransformer2DModel", "DiTTransformer2DModel"):
            return {**config, "_class_name": class_name}, subfolder
        problem = f"it holds a {class_name}" if class_name else problem
    raise InputError(
        None,
        f"{name_or_path}: {problem}; give a folder or Hub name with a SiTTransformer2DModel or DiTTransformer2DModel, or an "
        "official .pt file",
    )


def pipeline_index(name_or_path: str, cache_dir: str | None = None) -> dict | None:
    """Reads the `model_index.json` of a pipeline, which lists its components and class names; None for anything else.

    Raises:
        InputError: if the file holds values of other types.
    """
    if Path(name_or_path).is_file():
        return None

    def wrong(problem: str) -> InputError:
        return InputError(None, f"{name_or_path}: model_index.json is not that of a pipeline: {problem}")

    try:
        with offline_if_out_of_reach(name_or_path):
            index = DiffusionPipeline.load_config(name_or_path, cache_dir=cache_dir)
    except OSError:
        return None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:  # JSON of another kind, such as a list
        raise wrong(first_line(error)) from error
    check_model_index(index, wrong)
    return index


def read_projectors(path: str, config: dict, subfolder: str | None, cache_dir: str | None) -> SavedProjectors | None:
    """Reads the projectors of a training checkpoint, or of a pipeline or transformer of version 0.1.

    Args:
        config, subfolder: as `find_transformer` returns them.
    """
    averaged = subfolder == "transformer_ema"
    file = Path(path) / ("projectors_ema.safetensors" if averaged else "projectors.safetensors")
    if file.is_file():
        return read_projector_file(file)
    if not config.get("alignment_layers"):
        return None
    folder = Path(path) / (subfolder or "")
    if not Path(path).is_dir():
        name = "/".join(filter(None, (subfolder, "diffusion_pytorch_model.safetensors")))
        try:
            folder = Path(hf_hub_download(path, name, cache_dir=cache_dir)).parent
        except Exception as error:  # shards or another format; the transformer itself has been loaded
            logger.info(f"{path}: its projectors are not read ({first_line(error)})")
            return None
    elif not folder.is_dir():  # diffusers finds a transformer's own folder under any subfolder
        folder = Path(path)
    state = {}
    for part in sorted(folder.glob("*.safetensors")):
        with safe_open(part, "pt") as weights:
            names = [name for name in weights.keys() if name.startswith("projectors.")]  # noqa: SIM118
            state |= {name: weights.get_tensor(name) for name in names}
    defaults = {"alignment_layers": [], "alignment_dims": [], "projector_type": "mlp", "projector_dim": 2048}
    description = {name: config.get(name, default) for name, default in defaults.items()}
    return SavedProjectors(description, {name: tensor.float() for name, tensor in state.items()}) if state else None


def read_projector_file(file: Path) -> SavedProjectors:
    """Reads the projectors of a training checkpoint from a file whose metadata describe them.

    Raises:
        InputError: if the file is damaged.
    """
    try:
        with safe_open(file, "pt") as weights:
            description = json.loads((weights.metadata() or {}).get("description", "{}"))
        if not isinstance(description, dict):
            raise ValueError("its description is not a JSON object")
        return SavedProjectors(description, load_file(file))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(None, f"{file} cannot be read ({first_line(error)})") from error


def _from_folder_or_hub(
    path: str, format: str, cache_dir: str | None
) -> tuple[SiTTransformer2DModel, SavedProjectors | None]:
    config, subfolder = find_transformer(path, cache_dir)
    ours = config["_class_name"] == "SiTTransformer2DModel"
    if format not in ("auto", "diffusers-dit") or (format == "diffusers-dit" and ours):
        raise InputError(
            "format", f"`format` {format} cannot be combined with {path}, which holds a {config['_class_name']}"
        )
    try:
        if ours:
            return _open_ours(path, config, subfolder, cache_dir)
        return _open_diffusers_dit(path, config, subfolder, cache_dir), None
    except InputError:
        raise
    except Exception as error:  # diffusers raises many types; all mean that it cannot be opened
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(None, f"{path}: the weights cannot be loaded: {hub_problem(error, path) or line}") from error


def _open_ours(path: str, config: dict, subfolder: str | None, cache_dir: str | None):
    model = SiTTransformer2DModel.from_pretrained(path, subfolder=subfolder, cache_dir=cache_dir)
    if not Path(path).is_dir():  # `from_pretrained` checks headers only in folders
        check_headers(_folder_of(path, subfolder, cache_dir), model)
    return model.eval(), read_projectors(path, config, subfolder, cache_dir)


def _open_diffusers_dit(path: str, config: dict, subfolder: str | None, cache_dir: str | None):
    """Opens diffusers' DiT, with the same checks as `SiTTransformer2DModel.from_pretrained`, and converts it."""
    names = ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim")
    given = {name: config[name] for name in names if config.get(name) is not None}
    check_sizes(**given, num_classes=config.get("num_embeds_ada_norm", 1000))
    variant = None
    if Path(path).is_dir():
        folder = _folder_of(path, subfolder, cache_dir)
        variant = choose_variant(saved_variants(os.listdir(folder)), folder)
        with init_empty_weights():
            check_headers(folder, DiTTransformer2DModel.from_config(config), variant)
    arguments = {"subfolder": subfolder, "cache_dir": cache_dir, "variant": variant}
    model, info = DiTTransformer2DModel.from_pretrained(
        path, **arguments, output_loading_info=True, low_cpu_mem_usage=False
    )
    _check_keys(path, missing=set(info["missing_keys"]), unknown=set(info["unexpected_keys"]), wrong=[])
    check_headers(_folder_of(path, subfolder, cache_dir), model, variant)
    _check_finite(path, model.state_dict())
    return _from_diffusers_dit(path, model).eval()


def _folder_of(path: str, subfolder: str | None, cache_dir: str | None) -> Path:
    """The folder with a transformer's files: a local one, or that in the Hub's cache after a download."""
    if Path(path).is_dir():
        return Path(path) / (subfolder or "")
    config = try_to_load_from_cache(path, "/".join(filter(None, (subfolder, "config.json"))), cache_dir=cache_dir)
    return Path(config).parent if isinstance(config, str) else Path(path)


def _from_diffusers_dit(path: str, dit: DiTTransformer2DModel) -> SiTTransformer2DModel:
    old = dit.config
    for name, supported in (
        ("norm_type", "ada_norm_zero"),
        ("activation_fn", "gelu-approximate"),
        ("norm_elementwise_affine", False),
        ("attention_bias", True),
    ):
        if old[name] != supported:
            raise InputError(None, f"{path}: {name} is {old[name]!r}; only DiT's own {supported!r} can be converted")
    state = dit.state_dict()
    # Each block has a copy of the embedders. One shared copy can replace them only if they are equal.
    for name, value in state.items():
        first = re.sub(r"^transformer_blocks\.\d+", "transformer_blocks.0", name)
        if ".norm1.emb." in name and not torch.equal(value, state[first]):
            raise InputError(
                None,
                f"{path}: {name} differs from block 0's: training has separated the blocks' timestep and class embedders, "
                "and a model with one shared embedder cannot hold them",
            )
    out_channels = old.out_channels or old.in_channels
    model = SiTTransformer2DModel(
        sample_size=old.sample_size,
        patch_size=old.patch_size,
        in_channels=old.in_channels,
        num_layers=old.num_layers,
        num_attention_heads=old.num_attention_heads,
        attention_head_dim=old.attention_head_dim,
        num_classes=old.num_embeds_ada_norm,
        prediction_type="epsilon",
        learn_sigma=out_channels == 2 * old.in_channels,
        downscale_freq_shift=1.0,
        norm2_eps=old.norm_eps,
    )
    converted = {}
    for name in model.state_dict():
        module, kind = name.rsplit(".", 1)
        if match := re.fullmatch(r"(transformer_blocks\.\d+)\.(.+)", module):
            theirs = {ours: theirs for theirs, ours in DIFFUSERS_BLOCK_NAMES.items()}[match[2]]
            converted[name] = state[f"{match[1]}.{theirs}.{kind}"]
        else:
            theirs = {ours: theirs for theirs, ours in DIFFUSERS_TOP_NAMES.items()}[module]
            converted[name] = state[f"{theirs}.{kind}"]
    model.load_state_dict(converted)
    return model


def default_scheduler(prediction_type: str):
    """The default scheduler of a pipeline: Euler on SiT's grid, or DDIM on the DDPM schedule."""
    if prediction_type == "velocity":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(**ddpm.SCHEDULER_CONFIG, timestep_spacing="trailing")


# ----------------------------------------------------------------------------------------------------------------------
# Back to the official layout


def flip_time(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts weights to the opposite direction of time: `v'(x, t) = -v(x, 1 - t)`.

    The sign is absorbed by the last layer. With frequencies f, `cos f(1-t) = cos f cos ft + sin f sin ft` and
    `sin f(1-t) = sin f cos ft - cos f sin ft`, so the flip is a linear map of the timestep's features, which is absorbed
    by the first layer that reads them. The conversion is exact up to rounding.

    Args:
        state: weights by the names in our models. `time_embedding.linear_1.weight [D, 256]`, `proj_out.weight` and
            `proj_out.bias` are changed, all others are kept.

    Returns:
        a new dictionary of weights.
    """
    state = dict(state)
    weight = state["time_embedding.linear_1.weight"].double()
    half = weight.shape[1] // 2
    f = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=weight.device) / half)
    cosine, sine = weight.split(half, dim=1)
    flipped = torch.cat([cosine * f.cos() + sine * f.sin(), cosine * f.sin() - sine * f.cos()], dim=1)
    state["time_embedding.linear_1.weight"] = flipped.float()
    for kind in ("weight", "bias"):
        state[f"proj_out.{kind}"] = -state[f"proj_out.{kind}"]
    return state


def export_checkpoint(
    model: SiTTransformer2DModel, layout: str, projectors: SavedProjectors | None = None
) -> dict[str, torch.Tensor]:
    """Builds a state dict that the model of the SiT, REPA or DiT repository loads with `strict=True`.

    The official model must be constructed with the same sizes. For `sit` and `dit`, its `learn_sigma` must be that of
    our config. For `repa`, its `z_dims` and `projector_dim` must match the projectors (`z_dims=[]` without projectors;
    projectors with a convolution need iREPA's code). A model whose time runs the other way is converted by
    `flip_time`, so that it samples the same images there. `repa` keeps the projectors of a single aligned block and
    drops variance channels; `sit` and `dit` drop projectors.

    Args:
        model: a transformer of any convention.
        layout: one of `LAYOUTS`.
        projectors: the projectors that were saved with the model, if any.

    Returns:
        float32 tensors on the CPU, by official key.

    Raises:
        InputError: if the official model cannot compute what this one does.
    """
    config = model.config
    if layout not in LAYOUTS:
        raise InputError("to", f"`to` {layout!r} must be one of {', '.join(LAYOUTS)}")
    if (layout == "dit") != (config.prediction_type == "epsilon"):
        fits = "dit" if config.prediction_type == "epsilon" else "sit or repa"
        raise InputError("to", f"`to` {layout}: this model predicts {config.prediction_type}; use `to` {fits}")
    if config.downscale_freq_shift != 0 or config.norm2_eps != 1e-6:
        raise InputError(
            "to",
            f"`to` {layout}: this model has the timestep frequencies or the norm of diffusers' DiT (downscale_freq_shift "
            f"{config.downscale_freq_shift:g}, norm2_eps {config.norm2_eps:g}), which the official code cannot compute",
        )
    if model.grid_size[0] != model.grid_size[1]:
        raise InputError("to", f"`to` {layout}: the official models are square, this one has {config.sample_size}")
    if config.qk_norm == RMS_NORM:
        raise InputError(
            "to",
            f"`to` {layout}: this model has an RMSNorm on queries and keys, which the official code cannot compute",
        )
    if config.qk_norm and layout != "repa":
        raise InputError("to", f"`to` {layout}: this model has qk-norm, which only REPA's code has; use `to` repa")
    if model.null_class_id not in (None, config.num_classes):
        raise InputError(
            "to",
            f"`to` {layout}: the null class is {model.null_class_id}, the official code has it at {config.num_classes}",
        )
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    if layout != "dit" and config.time_direction != {"sit": "noise_to_data", "repa": "data_to_noise"}[layout]:
        state = flip_time(state)
    if layout == "repa" and config.learn_sigma:
        for kind in ("weight", "bias"):
            # Rows are ordered by patch row, patch column and channel, where the variance follows the velocity.
            tensor = state[f"proj_out.{kind}"].unflatten(0, (-1, 2 * config.in_channels))
            state[f"proj_out.{kind}"] = tensor[:, : config.in_channels].flatten(0, 1)
    if projectors is not None and layout == "repa" and len(projectors.description["alignment_layers"]) == 1:
        state |= {name: tensor.float().cpu() for name, tensor in projectors.state.items()}
    elif projectors is not None:
        logger.warning(f"`to` {layout}: the {len(projectors.state)} tensors of the projectors are not written")
    elif layout == "repa":
        logger.warning(
            "`to` repa: there are no projectors; REPA's model loads the file with z_dims=[], and `vrpo convert` reads it "
            "with `format` repa"
        )

    official = {"pos_embed": model.pos_embed.detach().float().cpu()}
    thirds: dict[str, list] = {}
    for name, tensor in state.items():
        key, third = official_name(name)
        if third is None:
            official[key] = tensor.clone()
        else:
            thirds.setdefault(key, [None] * 3)[third] = tensor
    official |= {key: torch.cat(parts) for key, parts in thirds.items()}
    return official


def save_official(state: dict[str, torch.Tensor], file: Path):
    """Writes a state dict atomically, as safetensors if the file ends in `.safetensors`, else with `torch.save`.

    Raises:
        InputError: if the file cannot be written, for example on a full disk; no part of it is left then.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            if file.suffix == ".safetensors":
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
                default_permissions(temporary)
            else:
                torch.save(state, temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            None, f"{file} cannot be written: {first_line(error)}; make room or choose another place"
        ) from error
