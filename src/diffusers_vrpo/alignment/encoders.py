# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Frozen vision encoders of transformers as teachers: images -> patch embeddings `[B, N, E]` on the token grid.

ViTs return their patch tokens (without class and register tokens), conv nets and pyramids the feature map of one stage.
"""

import inspect
import logging
import math
import numbers
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from ..config import is_embedded_digits, names_code
from ..errors import InputError, hub_problem
from ..reach import offline_if_out_of_reach


logger = logging.getLogger(__name__)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ("antialias", "repa")
# The default for a conv net is its deepest stage with at most the stride of the usual ViT patch.
DEFAULT_STRIDE = 16
# At this input side, every stage of a conv net still has several rows and columns, so that its stride can be measured.
PROBE_SIDE = 256
REMEDY = "give the folder or the Hub name of a ViT or conv net, such as facebook/dinov2-base"
# Shapes of usual encoders, for `encoder_without_weights`; patches of 14 pixels, trained on images of 518.
DINOV2_SHAPES = {
    "facebook/dinov2-small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "facebook/dinov2-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "facebook/dinov2-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "facebook/dinov2-giant": {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
}


class PatchEncoder(nn.Module):
    """A frozen vision model that returns patch embeddings; `load_encoder` loads it.

    It stays in evaluation mode even under `train()`, has no gradients, and computes in its own dtype under any autocast.

    Attributes:
        embed_dim (`int`): E, the channels of an embedding.
        grid_size (`tuple[int, int]`): rows and columns of the token grid, N = rows * columns.
        input_size (`tuple[int, int]`): height and width in pixels that images are resized to.
        layer (`int`, *optional*): index in the model's hidden states; `None` is the output of a ViT.
    """

    def __init__(
        self,
        model: nn.Module,
        embed_dim: int,
        grid_size: tuple[int, int],
        input_size: tuple[int, int],
        layer: int | None,
        pixel_format: tuple,
        resize: str = "antialias",
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        # On a CPU nets with grouped convolutions are faster in this layout and with few images at a time (docs/speed.md).
        self.images_at_a_time = None
        if model.device.type == "cpu" and any(
            isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules()
        ):
            self.model, self.images_at_a_time = model.to(memory_format=torch.channels_last), 8
        self.state_modules = None  # found when hidden states are first asked for
        self.embed_dim = embed_dim
        self.grid_size = grid_size
        self.input_size = input_size
        self.layer = layer
        self.antialias = resize == "antialias"
        mean, std, self.flip_channels = pixel_format
        self.register_buffer("mean", torch.tensor(mean, device=model.device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device=model.device).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "PatchEncoder":
        """Keeps evaluation mode: a teacher's dropout and batch statistics must not follow the student's `train()`."""
        return super().train(False)

    def preprocess(
        self, images: torch.Tensor, size: tuple[int, int] | None = None, clamp: bool = True
    ) -> torch.Tensor:
        """Converts images `[B, 3, H, W]` in [-1, 1] to the model's normalised pixels `[B, 3, *size]`, float32.

        Args:
            size (`tuple[int, int]`, *optional*): height and width; by default `input_size`.
            clamp (`bool`): whether to clamp what is outside of [-1, 1], which has no gradient there.

        Raises:
            ValueError: if `images` are something else, such as latents.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"`images` must be pixels [B, 3, H, W], not {list(images.shape)}; latents have to be decoded"
            )
        size = size or self.input_size
        pixels = (images.float() + 1) / 2
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=self.antialias)
        if self.antialias and clamp:  # REPA keeps the overshoot of the bicubic kernel
            pixels = pixels.clamp(0, 1)
        if self.flip_channels:
            pixels = pixels.flip(1)
        return (pixels - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Computes patch embeddings `[B, N, E]`, float32, not normalised, in row-major order of the grid.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): RGB in [-1, 1], any size and float dtype.
        """
        # no_grad, not inference_mode: the embeddings take part in the autograd graph of the loss.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            parts = self._parts(self.preprocess(images))
            features = torch.cat([_feature_map(self.model, part, self.layer).float() for part in parts])
            if tuple(features.shape[2:]) != self.grid_size:
                # Antialiasing has no effect when the map is enlarged.
                features = F.interpolate(features, self.grid_size, mode="bilinear", antialias=True)
            return features.flatten(2).transpose(1, 2).contiguous()

    def hidden_maps(
        self, images: torch.Tensor, layers: list[int | None], size: tuple[int, int] | None = None
    ) -> list[torch.Tensor]:
        """Computes maps `[B, E, rows, columns]` of hidden states, float32, with gradients to the images.

        Pixels are not clamped, so that images that leave [-1, 1] have a gradient, too. The weights have none. The pass ends
        with the deepest layer, where the modules that make the hidden states are known.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): RGB, about [-1, 1], any size.
            layers (`Sequence[int | None]`): indices in the model's hidden states; `None` is its output.
            size (`tuple[int, int]`, *optional*): height and width that images are resized to; by default `input_size`.

        Returns:
            a list of maps in the order of `layers`.
        """
        with torch.autocast(images.device.type, enabled=False):
            if self.state_modules is None:
                self.state_modules = [
                    _modules_of_states(self.model, self.input_size)
                ]  # the list hides them from torch
            modules = [self.state_modules[0].get(layer) for layer in layers]
            parts = self._parts(self.preprocess(images, size, clamp=False))
            maps = [
                _feature_maps(self.model, part, layers)
                if None in modules
                else _reached_maps(self.model, part, modules)
                for part in parts
            ]
            return [torch.cat(of_layer).float() for of_layer in zip(*maps)]

    def _parts(self, pixels):
        """Divides pixels into as many images as the model takes at a time, in its memory layout."""
        if self.images_at_a_time:
            return pixels.contiguous(memory_format=torch.channels_last).split(self.images_at_a_time)
        return [pixels]


def load_encoder(
    name_or_path: str | Path,
    grid_size: tuple[int, int],
    layer: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    cache_dir: str | None = None,
    resize: str = "antialias",
) -> PatchEncoder:
    """Loads a transformers vision model as a frozen `PatchEncoder`, and tests it on a blank image.

    The input side is the grid side times the patch size (DINOv2/14 sees 224 pixels for 16 tokens, as in REPA), or
    times the stride of a conv net's stage. A model that takes its native size only (SAM, a ViT that cannot interpolate its
    position table) gets that, and its map is interpolated to the grid.

    Example:

    ```python
    import torch

    from diffusers_vrpo import load_encoder

    encoder = load_encoder("embedded:digits", grid_size=(4, 4))  # or "facebook/dinov2-base", grid_size=(16, 16)
    embeddings = encoder(torch.rand(2, 3, 8, 8) * 2 - 1)  # [2, 16, encoder.embed_dim]
    ```

    Args:
        name_or_path (`str` or `Path`): a checkpoint folder (the network is then not touched), a name on the Hub, or
            `"embedded:digits"` for the encoder that comes with the package.
        grid_size (`tuple[int, int]`): rows and columns of tokens.
        layer (`int`, *optional*): index in the model's `hidden_states`. By default a ViT's output (after its final
            layer norm; CLIP has none), and a conv net's deepest hidden state with a stride of at most 16.
        dtype (`torch.dtype`): of the weights and the computation.
        resize (`"antialias"` or `"repa"`): bicubic with antialiasing, as image processors do, or without, as REPA.

    Raises:
        InputError: if the name, checkpoint or layer does not provide patch embeddings.
        ValueError: if `resize` is unknown, or `grid_size` something else.
    """
    if resize not in RESIZE_MODES:
        raise ValueError(f"resize must be one of {', '.join(RESIZE_MODES)}, not {resize!r}")
    sides = tuple(grid_size) if isinstance(grid_size, Iterable) else (grid_size,)
    if len(sides) != 2 or not all(isinstance(side, numbers.Integral) and side >= 1 for side in sides):
        raise ValueError(f"grid_size must be two whole numbers above 0, rows and columns, not {grid_size!r}")
    grid_size, prefix = sides, f"`encoder` {name_or_path}: "
    source, local = _locate(name_or_path)
    import_module("transformers")  # not below, where all errors are taken as the checkpoint's
    try:
        with offline_if_out_of_reach(source):
            model, missing = _load_model(source, dtype, cache_dir, local)
            pixel_format = _pixel_format(source, cache_dir, local)
    except InputError:
        raise
    except Exception as error:  # transformers raises many types; all mean that this checkpoint cannot be loaded
        raise InputError("encoder", prefix + _explain(error, source)) from error

    model = model.to(device).requires_grad_(False).eval()
    try:
        layer, input_size, features = _plan(model, name_or_path, grid_size, layer)
    except InputError:
        raise
    except Exception as error:  # an error on one blank image would also occur in training
        reason = f"{type(model).__name__} does not return patch embeddings of an image ({_first_sentence(error)})"
        raise InputError("encoder", f"{prefix}{reason}; {REMEDY}") from error
    if missing and not features.isfinite().all():
        raise InputError(
            "encoder", f"{prefix}the checkpoint lacks {missing} of {type(model).__name__}'s weights; {REMEDY}"
        )
    if not features.isfinite().all():
        raise InputError(
            "encoder", f"{prefix}the embeddings are not finite in {dtype}; give a sound checkpoint or another dtype"
        )
    return PatchEncoder(model, features.shape[1], grid_size, input_size, layer, pixel_format, resize)


def encoder_without_weights(
    name_or_path: str,
    grid_size: tuple[int, int],
    layer: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> PatchEncoder:
    """Builds the encoder that `load_encoder` would load on the meta device, without weights and without a download.

    Args:
        name_or_path (`str`): a folder, a name that the Hub's cache holds, or one of `DINOV2_SHAPES`.
        grid_size, layer, dtype, cache_dir: as for `load_encoder`.

    Raises:
        InputError: if the shape is not known without a download, or the model does not provide patch embeddings.
    """
    from transformers import AutoModel, Dinov2Config, PreTrainedModel

    source, _ = _locate(name_or_path)
    try:
        config = _image_config(source, cache_dir=cache_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if source not in DINOV2_SHAPES:
            raise InputError(
                "encoder",
                f"`encoder` {name_or_path}: its shape is not known without a download; give its folder, or one of "
                f"{', '.join(DINOV2_SHAPES)}",
            ) from error
        config = Dinov2Config(image_size=518, patch_size=14, **DINOV2_SHAPES[source])

    # Drawing weights may read numbers, which tensors on this device do not have.
    with patch.object(PreTrainedModel, "init_weights"), torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype).requires_grad_(False).eval()
    layer, input_size, features = _plan(model, name_or_path, grid_size, layer)
    pixel_format = (IMAGENET_MEAN, IMAGENET_STD, False)
    return PatchEncoder(model, features.shape[1], grid_size, input_size, layer, pixel_format)


def features_of_layers(encoder: PatchEncoder, images) -> dict[int | None, torch.Tensor]:
    """Patch embeddings `[B, N, E]` of all hidden states that are token maps, by their index; a ViT's output has None.

    Args:
        encoder: whose own layer determines the input size.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): as for the encoder.
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        pixels = encoder.preprocess(images)
        output = _apply(encoder.model, pixels, hidden_states=True)
        states = dict(enumerate(_states(output)))
        pyramid = any(state.ndim == 4 for state in states.values())
        if not pyramid:
            states[None] = output.last_hidden_state
        features = {}
        for index, state in states.items():
            if not pyramid:
                state = _token_map(state, encoder.model.config, pixels.shape[2:])
            elif state.ndim == 3 or state.shape[2] != state.shape[3] or 1 == state.shape[2] < max(encoder.grid_size):
                continue  # tokens among maps, channels last, or pooled
            state = state.float()
            if tuple(state.shape[2:]) != encoder.grid_size:
                state = F.interpolate(state, encoder.grid_size, mode="bilinear", antialias=True)
            features[index] = state.flatten(2).transpose(1, 2).contiguous()
        return features


def spatial_normalize(features, strength=0.6):
    """iREPA's normalisation over tokens, `(f - strength * mean_N f) / (std_N f + 1e-6)`; the identity when N = 1.

    Args:
        features (`torch.Tensor` of shape `(batch, tokens, channels)`): float32 patch embeddings. Their standard
            deviation is the unbiased one.
    """
    if features.shape[1] == 1:
        return features
    std, mean = torch.std_mean(features, dim=1, keepdim=True)
    return (features - strength * mean) / (std + 1e-6)


def resample_tokens(features, num_tokens, grid_size=None, source_grid=None):
    """Patch embeddings `[B,M,E]` on another grid, `[B,num_tokens,E]`, bilinearly with antialiasing.

    Args:
        features (`torch.Tensor` of shape `(batch, M, channels)`): row by row of a grid.
        grid_size (`tuple[int, int]`, *optional*): rows and columns wanted; a square when not given.
        source_grid (`tuple[int, int]`, *optional*): rows and columns of the features; a square when not given.

    Raises:
        ValueError: if one of the grids is neither given nor square.
    """

    def grid_of(number, given):
        side = math.isqrt(number)
        return tuple(given) if given and given[0] * given[1] == number else (side, side)

    source, wanted = grid_of(features.shape[1], source_grid), grid_of(num_tokens, grid_size)
    if math.prod(source) != features.shape[1] or math.prod(wanted) != num_tokens:
        raise ValueError(
            f"an encoder gives {features.shape[1]} tokens and the transformer has {num_tokens}; only square grids are resampled "
            "unless the encoder and `AlignedTransformer` have a `grid_size`"
        )
    maps = features.mT.unflatten(2, source)
    return F.interpolate(maps.float(), wanted, mode="bilinear", antialias=True).flatten(2).mT.contiguous()


def on_grid(features, num_tokens, grid_size=None, source_grid=None):
    """Patch embeddings on the grid wanted; resampled unless they are on it. The arguments are those of `resample_tokens`.

    As many tokens in other rows and columns are another grid, where both are known.
    """
    if features.shape[1] == num_tokens:
        grids = [tuple(grid) for grid in (grid_size, source_grid) if grid and math.prod(grid) == num_tokens]
        if len(set(grids)) < 2:
            return features
    return resample_tokens(features, num_tokens, grid_size, source_grid)


# Loading


def _locate(name_or_path, option="encoder"):
    """Resolves a name to a folder or Hub name, and returns whether it is a folder."""
    if not isinstance(name_or_path, str | Path):
        raise InputError(option, f"`{option}` {name_or_path!r} is not a name; {REMEDY}")
    if names_code(str(name_or_path)):
        raise InputError(
            option,
            f"`{option}` {name_or_path} names code to run, which only `encoder` of training may do, given on the command line or in "
            f"Python; {REMEDY}",
        )
    path = Path(name_or_path).expanduser()
    if is_embedded_digits(name_or_path):
        from ..assets.digits import DIGITS_ENCODER  # here, because it imports datasets

        path = DIGITS_ENCODER
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                option, f"`{option}` {name_or_path}: the folder has no config.json of transformers; {REMEDY}"
            )
        return str(path), True
    is_name = isinstance(name_or_path, str) and not name_or_path.startswith((".", "~")) and name_or_path.count("/") < 2
    if not is_name or path.is_absolute() or path.exists():
        raise InputError(option, f"`{option}` {name_or_path}: the folder does not exist; {REMEDY}")
    return name_or_path, False


@contextmanager
def _quiet_transformers(local: bool):
    """Silences the report of a checkpoint's unused weights (classifier, text tower); missing ones are checked here.

    Args:
        local: whether the checkpoint is in a folder; the progress bar, which is useful for downloads, is hidden then.
    """
    from transformers import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    hides = local and transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if hides:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if hides:
            transformers_logging.enable_progress_bar()


def _image_config(source, **where):
    """Reads the configuration of a checkpoint; of CLIP, SigLIP and similar models, that of the image tower.

    Raises:
        InputError: if the model does not take images.
    """
    # Here, as below, so that other encoders and the metrics of Inception do without transformers.
    from transformers import MODEL_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(source, **where)
    tower = getattr(config, "vision_config", None)
    config = tower if type(tower) in MODEL_MAPPING else config
    model_class = MODEL_MAPPING.get(type(config), None)
    if getattr(model_class, "main_input_name", None) != "pixel_values":
        raise InputError(
            "encoder", f"`encoder` {source}: a {config.model_type} model does not encode images; {REMEDY}"
        )
    return config


def _load_model(source, dtype, cache_dir, local):
    """Loads the image model of a checkpoint; returns it and the number of missing weights, which are NaN."""
    from transformers import AutoModel

    # Code from a repository is never run. This is explicit, because transformers would ask on the terminal.
    where = {"cache_dir": cache_dir, "local_files_only": local, "trust_remote_code": False}
    config = _image_config(source, **where)
    with _quiet_transformers(local):
        model, info = AutoModel.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True, **where)
    if config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
    # transformers draws missing weights at random. Here they become NaN, which shows in the embeddings, unless the embeddings do
    # not depend on these weights (those of a pooler, for example).
    state = model.state_dict()
    missing = [key for key in info["missing_keys"] if key in state and state[key].is_floating_point()]
    for key in missing:
        state[key].fill_(math.nan)
    return model, len(missing)


def _pixel_format(source, cache_dir, local):
    """Reads mean and std (three floats each, for pixels in [0, 1]) and whether the channels are BGR.

    Read from the processor's configuration, since building the processor may need torchvision.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(source, cache_dir=cache_dir, local_files_only=local)
    except OSError as error:
        if error.__cause__ is not None:  # not just absent
            raise
        config = {}
    flip = config.get("do_flip_channel_order", False)
    mean, std = config.get("image_mean"), config.get("image_std")
    if not config.get("do_normalize", not flip):  # models with flipped channels take plain pixels
        mean, std = 0.0, 1.0
    elif mean is None or std is None:
        logger.warning("the encoder %s comes without image mean and std; ImageNet's are used", source)
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    mean, std = ([value] * 3 if isinstance(value, (int, float)) else value for value in (mean, std))
    # Processors compute (255 * rescale_factor * x - offset - mean) / std; EfficientNet's may divide by std twice.
    scale = 255 * (config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1)
    offset = 1 if config.get("rescale_offset", False) else 0
    power = 2 if config.get("include_top", False) else 1
    return [(offset + m) / scale for m in mean], [s**power / scale for s in std], flip


def _explain(error, source):
    """Explains why a checkpoint could not be loaded, and what to do."""
    if problem := hub_problem(error, source):
        return problem
    if "trust_remote_code" in str(error):
        return f"it needs code of its own repository, which is not run; {REMEDY}"
    return f"transformers cannot load it ({_first_sentence(error)}); {REMEDY}"


def _first_sentence(error):
    """The start of an exception's message, to stand in a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0][:200].rstrip(" .:") if lines else type(error).__name__


# The output of a model and its input size


def _plan(model, name, grid_size, layer):
    """Chooses the layer (`None`: a ViT's output) and the input size; also returns the map of a blank image."""
    native = _native_size(model.config)
    states = _blank_states(model, native)
    if not states:
        raise InputError("encoder", f"`encoder` {name}: {type(model).__name__} returns pooled vectors only; {REMEDY}")
    if layer is not None and not -len(states) <= layer < len(states):
        raise InputError(
            "encoder_layer",
            f"`encoder_layer` {layer}: {name} has hidden states 0 to {len(states) - 1}; choose one of them",
        )

    is_pyramid = not all(_in_rows(state, model.config, native) for state in states)
    if is_pyramid and any(state.ndim == 4 for state in states):
        layer, stride = _choose_stage(model, name, grid_size, layer, native)
        unit = (stride, stride)
    else:
        unit = _pair(model.config.patch_size)
    size = (grid_size[0] * unit[0], grid_size[1] * unit[1])
    try:
        features = _blank_map(model, size, layer)
    except (RuntimeError, ValueError) as error:  # no position table, or too little extent, for this size
        logger.info(
            "the encoder does not take %dx%d pixels (%s); it gets %dx%d", *size, _first_sentence(error), *native
        )
        size, features = native, _blank_map(model, native, layer)
    if tuple(features.shape[2:]) == (1, 1) != grid_size:
        raise ValueError("one vector per image instead of one per token")
    return layer, size, features


def _choose_stage(model, name, grid_size, layer, native):
    """Chooses the conv stage; returns its index and its stride, measured on an image."""
    side = PROBE_SIDE
    try:
        states = _blank_states(model, (side, side))
    except (RuntimeError, ValueError):  # it takes its own size only
        side, states = native[0], _blank_states(model, native)
    strides = {
        # A power of two: padding, or none, makes the ratio of sides miss it slightly.
        index: 2 ** round(math.log2(side / state.shape[2]))
        for index, state in enumerate(states)
        # Not [B, H, W, C], and not pooled unless a single token is asked for.
        if state.ndim == 4 and state.shape[2] == state.shape[3] and (state.shape[2] > 1 or grid_size == (1, 1))
    }
    if not strides:
        raise InputError(
            "encoder", f"`encoder` {name}: {type(model).__name__} gives no map of channels, rows, columns; {REMEDY}"
        )
    if layer is None:
        layer = max((i for i in strides if strides[i] <= DEFAULT_STRIDE), default=min(strides))
    if layer % len(states) not in strides:
        usable = ", ".join(map(str, strides))
        raise InputError(
            "encoder_layer", f"`encoder_layer` {layer}: {name} gives no rows and columns there; choose one of {usable}"
        )
    return layer % len(states), strides[layer % len(states)]


def _feature_map(model, pixels, layer):
    """Computes the map `[B, E, rows, columns]` of a hidden state, or of the output, for pixels `[B, 3, H, W]`."""
    output = _apply(model, pixels, hidden_states=layer is not None)
    features = output.last_hidden_state if layer is None else _states(output)[layer]
    if _in_rows(features, model.config, pixels.shape[2:]):
        return features.permute(0, 3, 1, 2)
    return _token_map(features, model.config, pixels.shape[2:]) if features.ndim == 3 else features


def _feature_maps(model, pixels, layers):
    """Computes `_feature_map` of several hidden states in one pass."""
    # Not the compiled call, which frees what a second gradient from the same pass needs.
    output = _apply(model, pixels, any(layer is not None for layer in layers), call=model.forward)
    states = [output.last_hidden_state if layer is None else _states(output)[layer] for layer in layers]
    return _as_maps(states, model, pixels)


def _as_maps(states, model, pixels):
    return [_token_map(s, model.config, pixels.shape[2:]) if s.ndim == 3 else s for s in states]


class _Reached(Exception):
    """Ends a forward pass when all hidden states that are wanted are there."""


def _first_output(output):
    return output[0] if isinstance(output, tuple) and output else output


def _modules_of_states(model, size):
    """Finds the modules that make the hidden states, `{index: module}`; each of them is called once in a pass."""
    calls = []
    handles = [
        module.register_forward_hook(lambda module, args, output: calls.append((module, _first_output(output))))
        for module in model.modules()
        if module is not model
    ]
    try:
        states = _blank_states(model, size)
    finally:
        for handle in handles:
            handle.remove()
    called = [module for module, _ in calls]
    found = {}
    for index, state in enumerate(states):
        makers = [module for module, output in calls if output is state and called.count(module) == 1]
        if makers:
            found[index] = makers[0]
    return found


def _reached_maps(model, pixels, modules):
    """Computes the maps of the hidden states that some modules make, without what comes after them."""
    states = {}

    def keep(module, args, output):
        states[module] = _first_output(output)
        if len(states) == len(set(modules)):
            raise _Reached

    handles = [module.register_forward_hook(keep) for module in set(modules)]
    try:
        # Not the compiled call, in which hooks do not run.
        _apply(model, pixels, hidden_states=False, call=model.forward)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return _as_maps([states[module] for module in modules], model, pixels)


@torch.no_grad()
def map_sizes(encoder, size=None):
    """Lists the rows and columns of each hidden state of a `PatchEncoder`; `None` for those that are not maps.

    Args:
        size (`tuple[int, int]`, *optional*): height and width of the images; by default the encoder's `input_size`.

    Raises:
        RuntimeError, ValueError: if the model does not take images of that size.
    """
    size, found = size or encoder.input_size, []
    for state in _blank_states(encoder.model, size):
        found.append(None)
        with suppress(ValueError):  # tokens that are not those of the patches
            state = _token_map(state, encoder.model.config, size) if state.ndim == 3 else state
            # Some models give [B, rows, columns, E], others vectors.
            if state.ndim == 4 and state.shape[2] * size[1] == state.shape[3] * size[0]:
                found[-1] = tuple(state.shape[2:])
    return found


def default_layer(encoder):
    """The hidden state that `load_encoder` takes without `layer`: `None`, a ViT's output, or the stage of a conv net."""
    return _plan(encoder.model, "", encoder.grid_size, None)[0]


@torch.no_grad()
def _blank_map(model, size, layer):
    return _feature_map(model, torch.zeros(1, 3, *size, device=model.device), layer)


@torch.no_grad()
def _blank_states(model, size):
    return _states(_apply(model, torch.zeros(1, 3, *size, device=model.device), hidden_states=True))


def _apply(model, pixels, hidden_states, call=None):
    config, size, call = model.config, tuple(pixels.shape[2:]), call or model
    pixels = pixels.to(model.dtype)
    arguments = {"output_hidden_states": True} if hidden_states else {}
    if config.model_type == "siglip2_vision_model":
        return call(*_flat_patches(pixels, config.patch_size), **arguments)
    if size != _native_size(config) and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        arguments["interpolate_pos_encoding"] = True
    if config.model_type == "vit_mae":
        # ViTMAE sorts its tokens by this noise, which is random by default.
        patch = _pair(config.patch_size)
        order = torch.arange((size[0] // patch[0]) * (size[1] // patch[1]), device=pixels.device)
        arguments["noise"] = order.expand(len(pixels), -1)
    return call(pixels, **arguments)


def _flat_patches(pixels, patch):
    """SigLIP2's input: patches `[B, N, patch * patch * 3]`, their mask `[B, N]` and the grid `[B, 2]`."""
    rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
    patches = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 3, 5, 1)
    patches = patches.flatten(3).flatten(1, 2)
    mask = torch.ones(patches.shape[:2], device=pixels.device, dtype=torch.long)
    return patches, mask, torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), -1)


def _states(output):
    """The hidden states (as maps for a pyramid of tokens such as Swin), else only the output, else an empty list."""
    states = getattr(output, "reshaped_hidden_states", None) or getattr(output, "hidden_states", None)
    last = getattr(output, "last_hidden_state", None)
    return states or (() if last is None else (last,))


def _in_rows(features, config, size):
    """Whether features are the tokens of a ViT that keeps them in rows and columns, `[B, rows, columns, E]`, as SAM does."""
    patch, width = getattr(config, "patch_size", None), getattr(config, "hidden_size", None)
    if features.ndim != 4 or patch is None:
        return False
    rows, columns = size[0] // _pair(patch)[0], size[1] // _pair(patch)[1]
    return tuple(features.shape[1:]) == (rows, columns, width)


def _token_map(tokens, config, size):
    """Reshapes the patch tokens of `[B, prefix + N, E]` to a map `[B, E, rows, columns]`.

    Raises:
        ValueError: if the tokens are not a known prefix followed by one token per patch.
    """
    patch = _pair(config.patch_size)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    prefix = tokens.shape[1] - rows * columns
    # The config's registers and a class token; else none (SigLIP, I-JEPA), one, two (DeiT) or a number of Pixio's.
    registers = getattr(config, "num_register_tokens", None)
    known = (0, 1, 2, getattr(config, "n_cls_tokens", 1)) if registers is None else (1 + registers,)
    if prefix not in known:
        raise ValueError(f"{tokens.shape[1]} tokens for {rows}x{columns} patches")
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))


def _native_size(config):
    """The native height and width of a model; 16 patches or 224 pixels if its config does not say."""
    return _pair(getattr(config, "image_size", None) or 16 * _pair(getattr(config, "patch_size", 14))[0])


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)
