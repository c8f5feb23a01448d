# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""SiT (arXiv 2401.08740) and DiT (arXiv 2212.09748), one architecture, as a diffusers model.

The model consists of patches, adaLN-zero blocks, and a timestep and a label embedder that all blocks share. The config
tells how checkpoints of the two differ: the prediction and the direction of time. This file imports only torch,
diffusers and safetensors, so that it can be published together with the weights.
"""

import difflib
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from safetensors import SafetensorError, safe_open
from torch import nn


# Sizes of the SiT and DiT papers; XS is ours, for small data sets and tests.
SIT_SIZES = {
    "XS": {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32},
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
SIT_PATCH_SIZES = (1, 2, 4, 8)
# Arguments of version 0.1, whose config.json files contain them, for projectors that were part of the model.
REMOVED_ARGUMENTS = ("alignment_layers", "alignment_dims", "projector_type", "projector_dim")
# The names of the presets, `{SiT,DiT}-{XS,S,B,L,XL}/{1,2,4,8}`, for `sit_preset` and `VRPOTrainer(model=...)`.
SIT_PRESETS = tuple(f"{kind}-{size}/{p}" for kind in ("SiT", "DiT") for size in SIT_SIZES for p in SIT_PATCH_SIZES)
# The largest sizes, far above those of any published model, so that a wrong config.json is refused before a model is
# built.
LARGEST = {
    "sample_size": 65_536,
    "patch_size": 256,
    "in_channels": 4096,
    "num_layers": 1000,
    "num_attention_heads": 1024,
    "attention_head_dim": 4096,
    "num_classes": 10_000_000,
    "null_class_id": 10_000_000,
}
LARGEST_MLP_RATIO = 64
LARGEST_MODEL = 20e9  # parameters: 80 GB in float32
LARGEST_POSITIONS = 2**28  # numbers in the position table: 2 GB while it is computed

WEIGHTS = "diffusion_pytorch_model"
RMS_NORM = "rms_norm"  # a value of `qk_norm`


def check_sizes(
    sample_size: int | tuple[int, int] = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    num_layers: int = 12,
    num_attention_heads: int = 12,
    attention_head_dim: int = 64,
    mlp_ratio: float = 4.0,
    num_classes: int = 1000,
    null_class_id: int | None = None,
    **others,
) -> int:
    """Checks the sizes in the constructor arguments of a `SiTTransformer2DModel`, without building anything.

    Returns:
        the number of the model's parameters, without a few vectors.

    Raises:
        ValueError: if a size is not within the bounds of `LARGEST` or `LARGEST_MLP_RATIO`, or the model would be
            larger than `LARGEST_MODEL` or its position table larger than `LARGEST_POSITIONS`.
    """
    sides = tuple(sample_size) if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
    if len(sides) != 2:
        raise ValueError(f"sample_size {sample_size} must be a whole number, or a height and a width")
    sizes = {
        "sample_size": sides[0],
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": attention_head_dim,
        "num_classes": num_classes,
    }
    checked = [*sizes.items(), ("sample_size", sides[1])]
    if null_class_id is not None:
        checked.append(("null_class_id", null_class_id))
    for name, value in checked:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST[name]:
            raise ValueError(f"{name} {value!r} must be a whole number from 1 to {LARGEST[name]}")
    is_number = isinstance(mlp_ratio, int | float) and not isinstance(mlp_ratio, bool)
    if not is_number or not 0 < mlp_ratio <= LARGEST_MLP_RATIO:
        raise ValueError(f"mlp_ratio {mlp_ratio!r} must be a number above 0, up to {LARGEST_MLP_RATIO}")
    dim = num_attention_heads * attention_head_dim
    tokens = (sides[0] // patch_size) * (sides[1] // patch_size)
    if tokens * dim > LARGEST_POSITIONS:
        raise ValueError(
            f"sample_size {sample_size} with patch_size {patch_size} has {tokens} tokens of width {dim}: too many"
        )
    patch = patch_size**2 * in_channels
    rows = num_classes + 1 if null_class_id is None else null_class_id + 1
    # Attention has 4 D^2, the feed-forward 2 r D^2, the modulation 6 D^2.
    parameters = int(num_layers * (10 + 2 * mlp_ratio) * dim**2 + dim * (3 * patch + rows + 3 * dim + 256))
    if parameters > LARGEST_MODEL:
        raise ValueError(
            f"num_layers {num_layers} of width {dim} with {rows} labels make {parameters / 1e9:.0f} billion parameters, "
            f"above the bound of {LARGEST_MODEL / 1e9:.0f} billion"
        )
    return parameters


def read_config(file: Path) -> dict:
    """Reads a config.json.

    Raises:
        ValueError: if it does not hold a JSON object.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file} is not valid JSON: {reason}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(config).__name__}")
    return config


def saved_variants(names: Iterable[str]) -> set[str | None]:
    """The variants of the weights, such as `fp16`, among a folder's file names; None stands for plain weights."""
    variants = set()
    for name in names:
        found = re.fullmatch(rf"{WEIGHTS}(?:\.([\w-]+))?\.(?:safetensors|bin)", name)
        found = found or re.fullmatch(rf"{WEIGHTS}\.(?:safetensors|bin)\.index(?:\.([\w-]+))?\.json", name)
        if found and "-of-" not in name:
            variants.add(found[1])
    return variants


def choose_variant(variants: set[str | None], folder: Path | str) -> str | None:
    """The only variant of the weights in a folder; None if it holds plain ones, or no weights at all.

    Raises:
        ValueError: if it holds several variants and no plain weights.
    """
    if None in variants or not variants:
        return None
    if len(variants) > 1:
        raise ValueError(f"{folder} holds the variants {', '.join(sorted(variants))}; choose one with `variant`")
    return next(iter(variants))


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of the weights in a folder: a single one, or those that an index names; none for `.bin`.

    Raises:
        ValueError: if the index cannot be read.
    """
    suffix = f".{variant}" if variant else ""
    index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(names) if os.path.basename(name) == name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{index.name} does not name the files of the weights; save or download it again"
            ) from error
        if len(files) < len(names):
            raise ValueError(f"{index.name} names files outside its folder")
        if absent := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{absent[0]}, which {index.name} names, is not there; copy or download it")
        return files
    file = folder / f"{WEIGHTS}{suffix}.safetensors"
    return [file] if file.is_file() else []


def check_headers(folder: Path, model: nn.Module, variant: str | None = None):
    """Compares the headers of the safetensors files in a folder with a model: names, shapes and types of its weights.

    Args:
        folder: the folder of the model's config.json. Without safetensors files, nothing is compared.
        model: the model, whose weights may be on the meta device.
        variant: the variant of the files.

    Raises:
        ValueError: if a weight is missing, unknown, of another shape or not floating-point, or a file is not a
            safetensors file.
    """
    found = {}
    for file in weight_files(folder, variant):
        with file.open("rb") as content:
            if content.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{file.name} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
                )
        try:
            with safe_open(file, "pt") as header:
                for name in header.keys():  # noqa: SIM118
                    tensor = header.get_slice(name)
                    found[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file.name} is not a whole safetensors file; download or copy it again ({str(error)[:100]})"
            ) from error
    if not found:
        return
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = model._keys_to_ignore_on_load_unexpected or []
    unknown = [name for name in found if name not in expected and not any(re.search(p, name) for p in ignored)]
    shapes = [
        f"{name} {found[name][0]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name][0] != shape
    ]
    types = [
        f"{name} {kind}"
        for name, (_, kind) in found.items()
        if name in expected and kind[0] not in "FB" or kind == "BOOL"
    ]
    refuse_weights(
        {
            "missing": expected.keys() - found.keys(),
            "unknown": unknown,
            "of another shape than in config.json": shapes,
            "not of floating point": types,
        }
    )


def refuse_weights(problems: dict[str, Iterable[str]]):
    """Raises ValueError if there are names of weights under any heading, such as `missing`; a few of them are listed."""
    parts = []
    for heading, names in problems.items():
        if names := sorted(names):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{len(names)} {heading}: {', '.join(names[:3])}{more}")
    if parts:
        raise ValueError(f"the weights cannot be used, {'; '.join(parts)}")


def not_finite(model: nn.Module) -> list[str]:
    """The names of the weights that hold NaN or infinite values."""
    return [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all()
    ]


def sit_preset(name: str) -> dict:
    """The constructor arguments of a preset such as `"SiT-B/2"` or `"DiT-XL/2"` (kind, size, slash, patch size).

    SiT predicts the velocity; DiT predicts the noise at integer timesteps, with a learned variance.

    Raises:
        ValueError: if the name is unknown; the message lists the nearest presets.
    """
    if not isinstance(name, str):
        raise ValueError(f"a preset is a name such as 'SiT-B/2', not {name!r}")
    by_lower_case = {preset.lower(): preset for preset in SIT_PRESETS}
    preset = by_lower_case.get(name.lower())
    if preset is None:
        near = difflib.get_close_matches(name.lower(), by_lower_case, n=3) or by_lower_case
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(by_lower_case[n] for n in near)}")
    kind, size, patch = preset.replace("-", "/").split("/")
    config = {**SIT_SIZES[size], "patch_size": int(patch)}
    return config if kind == "SiT" else config | {"prediction_type": "epsilon", "learn_sigma": True}


@dataclass
class SiTTransformer2DModelOutput(BaseOutput):
    """The output of [`SiTTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): the predicted velocity or noise; with
            `return_variance`, it is followed by the same number of variance channels.
    """

    sample: torch.Tensor


class SiTAttnProcessor:
    """Self-attention through diffusers' attention backends (`model.set_attention_backend`)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        # Autocast would cast the input for each of the three layers, and keep all three copies for the backward pass.
        device = hidden_states.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](hidden_states.flatten(2, 3).to(query.dtype))


class QKRMSNorm(nn.RMSNorm):
    """RMSNorm of queries or keys, computed in the dtype of its weight, which is float32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_qk_norm(kind: bool | str, dim_head: int) -> nn.Module | None:
    """Makes the norm of queries or keys of width `dim_head` for a value of the model's `qk_norm`; None for False."""
    if kind == RMS_NORM:
        return QKRMSNorm(dim_head, eps=1e-6)
    return nn.LayerNorm(dim_head) if kind else None


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention, with optional norms of queries and keys."""

    _default_processor_cls = SiTAttnProcessor
    _available_processors = [SiTAttnProcessor]

    def __init__(self, dim: int, heads: int, dim_head: int, qk_norm: bool | str = False):
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.head_dim = dim_head
        self.use_bias = True
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim)])
        self.norm_q = make_qk_norm(qk_norm, dim_head)
        self.norm_k = make_qk_norm(qk_norm, dim_head)
        self.set_processor(self._default_processor_cls())

    def set_processor(self, processor):
        """Sets the function `processor(attention, hidden_states)` that computes the attention.

        Raises:
            ValueError: if it is not callable, or is one that diffusers has for its own attention layers.
        """
        if not callable(processor) or type(processor).__module__ == "diffusers.models.attention_processor":
            raise ValueError(
                f"`processor` {type(processor).__name__} is not for this attention; use a SiTAttnProcessor or a subclass of it "
                "(`set_attention_backend` chooses the kernel)"
            )
        super().set_processor(processor)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns `x (1 + scale) + shift` for tokens `x [B, N, D]`, and `shift` and `scale` `[B, D]`.

    The sum is written into the memory of the product, which nothing else needs.
    """
    return (x * (1 + scale.unsqueeze(1))).add_(shift.unsqueeze(1))


def add_residual(hidden_states: torch.Tensor, gated: torch.Tensor) -> torch.Tensor:
    """Returns `hidden_states + gated`, written into the memory of `gated` unless their dtypes differ (under autocast)."""
    return gated.add_(hidden_states) if gated.dtype == hidden_states.dtype else hidden_states + gated


class SiTTransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each shifted, scaled and gated by the conditioning (adaLN-zero).

    With `recomputed = "attention"` or `"mlp"`, the activations of that part, its norm and gate included, are not kept,
    and the backward pass computes them a second time.
    """

    recomputed: str | None = None

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_ratio: float, qk_norm: bool | str, norm2_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SiTAttention(dim, heads, dim_head, qk_norm)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm2_eps)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(conditioning).chunk(6, dim=1)
        gated = self._run("attention", hidden_states, shift1, scale1, gate1)
        hidden_states = add_residual(hidden_states, gated)
        return add_residual(hidden_states, self._run("mlp", hidden_states, shift2, scale2, gate2))

    def _run(self, name: str, *inputs: torch.Tensor) -> torch.Tensor:
        part = self._attend if name == "attention" else self._feed_forward
        if self.recomputed == name and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def _attend(self, hidden_states, shift, scale, gate) -> torch.Tensor:
        return gate.unsqueeze(1) * self.attn(modulate(self.norm1(hidden_states), shift, scale))

    def _feed_forward(self, hidden_states, shift, scale, gate) -> torch.Tensor:
        return gate.unsqueeze(1) * self.ff(modulate(self.norm2(hidden_states), shift, scale))


class SiTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Class-conditional transformer that predicts the velocity of a flow (SiT) or the noise of a diffusion (DiT).

    Inputs and outputs follow the convention of the checkpoint, which the config describes:
    - `prediction_type="velocity"`: timesteps are t in [0, 1], and the output is `dx_t/dt` along the straight path
      between data x0 and noise. With `time_direction="data_to_noise"`, t = 1 is noise and the velocity is `noise - x0`
      (REPA, and models that this package trains); with `"noise_to_data"`, t = 0 is noise and the velocity is
      `x0 - noise` (SiT).
    - `prediction_type="epsilon"`: timesteps are the integers 0 ... 999 of the linear DDPM schedule, and the output is
      the noise (DiT).

    Example:

    ```python
    import torch

    from diffusers_vrpo import SiTTransformer2DModel, sit_preset

    model = SiTTransformer2DModel(sample_size=8, in_channels=3, num_classes=10, **sit_preset("SiT-XS/2"))
    x_t, t, labels = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([3, 7])
    velocity = model(x_t, t, labels).sample  # [2, 3, 8, 8]
    ```

    Args:
        sample_size (`int` or `(int, int)`): height and width of the latents (or pixels) that the model is trained on.
            Other sizes work, too: the position table is stretched over them.
        patch_size (`int`): side of a patch; there are N = (height / patch_size) * (width / patch_size) tokens.
        in_channels (`int`): channels of the latents (4 for SD-VAE, 3 for pixels).
        num_layers, num_attention_heads, attention_head_dim (`int`): depth and width; D = heads * head_dim.
        mlp_ratio (`float`): hidden width of the feed-forward over D.
        num_classes (`int`): K; labels are 0 ... K-1.
        null_class_id (`int`, *optional*): the label that stands for no class, at least K; K by default.
        class_dropout_prob (`float`): the share of labels that training replaces by the null class. With 0 and no
            `null_class_id`, the model does not have a null class and cannot be guided.
        prediction_type (`str`): `"velocity"` or `"epsilon"`.
        time_direction (`str`): `"data_to_noise"` or `"noise_to_data"`; only the former with `"epsilon"`.
        learn_sigma (`bool`): the last layer also has variance channels; they are removed from the output unless requested.
        guidance_channels (`int`, *optional*): how many channels, the first ones, the official sampler guides (3 of 4
            for SiT and DiT); all by default.
        qk_norm (`bool` or `str`): norm of the queries and keys of each head: False for none, True for LayerNorm (REPA's
            code), `"rms_norm"` for RMSNorm (Stable Diffusion 3, LightningDiT).
        downscale_freq_shift (`float`): the timestep's frequencies are `10000 ** (-i / (128 - downscale_freq_shift))`;
            0 in the official code, 1 in diffusers' DiT.
        norm2_eps (`float`): epsilon of the norm before the feed-forward; 1e-6 in the official code, 1e-5 in diffusers'
            DiT.

    Raises:
        ValueError: if an argument is not valid, or two of them cannot be combined.
    """

    # Written into config.json, so that `AutoModel.from_pretrained` finds the code next to the weights.
    _auto_class = "AutoModel"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTTransformerBlock"]
    _repeated_blocks = ["SiTTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embedding", "label_embedding", "norm", "proj_out"]
    # Version 0.1 saved alignment projectors with the model.
    _keys_to_ignore_on_load_unexpected = [r"^projectors?\."]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class_id: int | None = None,
        class_dropout_prob: float = 0.1,
        prediction_type: str = "velocity",
        time_direction: str = "data_to_noise",
        learn_sigma: bool = False,
        guidance_channels: int | None = None,
        qk_norm: bool | str = False,
        downscale_freq_shift: float = 0.0,
        norm2_eps: float = 1e-6,
    ):
        super().__init__()
        check_sizes(
            sample_size,
            patch_size,
            in_channels,
            num_layers,
            num_attention_heads,
            attention_head_dim,
            mlp_ratio,
            num_classes,
            null_class_id,
        )
        dim = num_attention_heads * attention_head_dim
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"sample_size {height}x{width} is not divisible by patch_size {patch_size}")
        if dim % 4:
            raise ValueError(f"num_attention_heads * attention_head_dim = {dim} must be divisible by 4")
        for name, value, choices in (
            ("prediction_type", prediction_type, ("velocity", "epsilon")),
            ("time_direction", time_direction, ("data_to_noise", "noise_to_data")),
            ("qk_norm", qk_norm, (False, True, RMS_NORM)),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r} must be one of {', '.join(map(str, choices))}")
        if prediction_type == "epsilon" and time_direction != "data_to_noise":
            raise ValueError(f"time_direction {time_direction!r} cannot be combined with prediction_type 'epsilon'")
        self.null_class_id = null_class_id
        if null_class_id is None and class_dropout_prob > 0:
            self.null_class_id = num_classes
        if self.null_class_id is not None and self.null_class_id < num_classes:
            raise ValueError(f"null_class_id {null_class_id} is one of the {num_classes} classes; use {num_classes}")
        self.grid_size = (height // patch_size, width // patch_size)

        self.patch_embed = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.register_buffer("pos_embed", self._position_table(*self.grid_size), persistent=False)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=downscale_freq_shift)
        self.time_embedding = TimestepEmbedding(256, dim)
        num_labels = num_classes if self.null_class_id is None else self.null_class_id + 1
        self.label_embedding = nn.Embedding(num_labels, dim)
        self.transformer_blocks = nn.ModuleList(
            SiTTransformerBlock(dim, num_attention_heads, attention_head_dim, mlp_ratio, qk_norm, norm2_eps)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self, others: Iterable[nn.Module] = ()) -> None:
        """Initialises the weights as SiT does.

        Linear layers are Xavier uniform, embedders are N(0, 0.02), and the modulation and output layers are zero, so
        that every block begins as the identity.

        Args:
            others: modules that are trained together with this one. Their linear layers are drawn right after this
                model's.
        """
        for module in itertools.chain(self.modules(), *(other.modules() for other in others)):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.patch_embed.weight.shape[0], -1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        for linear in [block.modulation for block in self.transformer_blocks] + [self.modulation_out, self.proj_out]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "SiTTransformer2DModel":
        """Opens a saved model as diffusers does, but refuses one whose weights are incomplete or wrong.

        A folder with a single variant of the weights, such as `fp16`, is opened without `variant`.

        Raises:
            ValueError: if a weight is missing, unknown, of another shape, an integer, NaN or infinite.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        # Quantized weights have other types and shapes than the model, and FlashPack files another format.
        plain = not (kwargs.get("quantization_config") or kwargs.get("use_flashpack"))
        if plain and (folder / cls.config_name).is_file():
            config = read_config(folder / cls.config_name)
            plain = not config.get("quantization_config")
            if kwargs.get("variant") is None:
                kwargs["variant"] = choose_variant(saved_variants(os.listdir(folder)), folder)
            if plain and not kwargs.get("ignore_mismatched_sizes"):
                with torch.device("meta"):
                    check_headers(folder, cls.from_config(config), kwargs["variant"])
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if plain:
            # Weights that an index lists but no file holds stay on the meta device, and so do those offloaded to the
            # disk.
            whole = kwargs.get("device_map") is None
            absent = {name for name, tensor in model.named_parameters() if whole and tensor.is_meta}
            refuse_weights(
                {
                    "missing": absent | set(info["missing_keys"]),
                    "unknown": info["unexpected_keys"],
                    "NaN or infinite": not_finite(model),
                }
            )
        return (model, info) if wants_info else model

    # Pipelines read the signature of this method, and pass only the arguments that it has.
    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        # safetensors writes files that only their owner can read; config.json has the permissions that the umask
        # grants.
        for file in folder.glob(f"{WEIGHTS}*.safetensors"):
            file.chmod((folder / self.config_name).stat().st_mode & 0o777)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """Overrides diffusers' method to avoid its warnings about `auto_map` and the projector arguments of version 0.1."""
        unused = (*REMOVED_ARGUMENTS, "auto_map")
        config_dict = {name: value for name, value in config_dict.items() if name not in unused}
        return super().extract_init_dict(config_dict, **kwargs)

    def enable_cache(self, config: object) -> None:
        """Enables caching at inference (`FirstBlockCacheConfig`, ...); tells diffusers' hooks what a block returns."""
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(SiTTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    def _position_table(self, rows: int, columns: int) -> torch.Tensor:
        """Fixed sine-cosine positions `(1, rows * columns, D)`, stretched over the extent of the trained grid."""
        y = torch.arange(rows, dtype=torch.float64) * (self.grid_size[0] / rows)
        x = torch.arange(columns, dtype=torch.float64) * (self.grid_size[1] / columns)
        # Column first, as in the official tables.
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"))
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        return get_2d_sincos_pos_embed_from_grid(dim, grid, output_type="pt").float().unsqueeze(0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_variance: bool = False,
        return_dict: bool = True,
    ) -> SiTTransformer2DModelOutput | tuple:
        """Predicts the velocity, or the noise.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): noisy latents x_t.
            timestep (`torch.Tensor` of shape `(batch,)` or `()`): in the checkpoint's convention: t in [0, 1], float32,
                or an integer timestep (see the class).
            class_labels (`torch.LongTensor` of shape `(batch,)`): 0 ... K-1, or `null_class_id` for no class.
            return_variance (`bool`): keep the variance channels of a model with `learn_sigma`.
            return_dict (`bool`): return a [`SiTTransformer2DModelOutput`] instead of a tuple.

        Returns:
            the prediction, of the shape of `hidden_states`, or with twice as many channels with `return_variance`.

        Raises:
            ValueError: if height or width is not a multiple of the patch size.
        """
        patch = self.config.patch_size
        if hidden_states.shape[-2] % patch or hidden_states.shape[-1] % patch:
            raise ValueError(
                f"hidden_states of {hidden_states.shape[-2]}x{hidden_states.shape[-1]} are not divisible by the patch "
                f"size {patch}"
            )
        batch_size, _, height, width = hidden_states.shape
        rows, columns = height // patch, width // patch
        pos_embed = self.pos_embed
        if (rows, columns) != self.grid_size:
            pos_embed = self._position_table(rows, columns).to(hidden_states.device)

        # 1. Patches and conditioning. The timestep's sinusoids are computed in float32, whatever the weights' dtype
        # is. Under autocast, the tokens between the blocks stay in the weights' float32, as in the official code.
        weight_dtype = self.patch_embed.weight.dtype
        hidden_states = self.patch_embed(hidden_states).flatten(2).transpose(1, 2).to(weight_dtype)
        # Tokens are contiguous: Inductor's CPU backward gives wrong gradients for strided tokens (torch 2.13), and
        # with one layout all blocks share a compiled graph.
        hidden_states = (hidden_states + pos_embed.to(weight_dtype)).contiguous()
        timestep = timestep.expand(batch_size)
        frequencies = self.time_proj(timestep).to(self.label_embedding.weight.dtype)
        conditioning = F.silu(self.time_embedding(frequencies) + self.label_embedding(class_labels))

        # 2. Blocks.
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)

        # 3. Output: tokens back to an image.
        shift, scale = self.modulation_out(conditioning).chunk(2, dim=1)
        hidden_states = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))
        hidden_states = hidden_states.reshape(batch_size, rows, columns, patch, patch, -1)
        sample = hidden_states.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, -1, height, width)
        if not return_variance:
            sample = sample[:, : self.config.in_channels]

        if not return_dict:
            return (sample,)
        return SiTTransformer2DModelOutput(sample=sample)
