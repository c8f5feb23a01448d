# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Class-conditional sampling from flow-matching (SiT) and noise-predicting (DiT) transformers.

This file imports torch, numpy and diffusers only, so that it can be published beside the weights.
"""

import difflib
import functools
import importlib
import inspect
import json
import math
import numbers
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchHeunDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin  # `loaders` has it with transformers only
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)
# Files with the code of the components that diffusers does not have; a published pipeline has them beside the weights.
COMPONENT_FILES = {"SiTTransformer2DModel": "transformer_sit", "SiTSDEScheduler": "scheduling_sit_sde"}
# The package that this file is part of; a published copy of the file works without it.
PACKAGE = "diffusers_vrpo" if __name__.startswith("diffusers_vrpo.") else None

# The autoencoders of diffusers whose latents are normalised by a scale and shift, or by statistics, in the config.
AUTOENCODERS = (
    "AutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "AutoencoderKLHunyuanImage",
    "AsymmetricAutoencoderKL",
    "VQModel",
)

# The schedulers for each kind of prediction, for error messages.
VELOCITY_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SiTSDEScheduler, or DPMSolverMultistepScheduler "
    "or UniPCMultistepScheduler with use_flow_sigmas=True and prediction_type='flow_prediction'"
)
NOISE_SCHEDULERS = (
    "DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler with prediction_type='epsilon' and no flow sigmas"
)


def guide(prediction: torch.Tensor, guidance_scale: float, channels: int) -> torch.Tensor:
    """Applies classifier-free guidance, `null + w (class - null)`, to the first `channels`; others are the class's.

    Args:
        prediction: `[2B, C, H, W]`, the predictions for the classes, followed by those for the null class.
        guidance_scale: w.
        channels: the number of guided channels, 1 ... C.

    Returns:
        `[B, C, H, W]`.
    """
    of_class, of_null = prediction.chunk(2)
    guided = of_null + guidance_scale * (of_class - of_null)
    if channels == guided.shape[1]:
        return guided
    return torch.cat([guided[:, :channels], of_class[:, channels:]], dim=1)


# Words in the names of diffusers' schedulers that accept a prediction of the right kind but sample wrongly from it:
# they go from data to noise, or are made for distilled models or video models.
OTHER_SCHEDULERS = ("Inverse", "LCM", "TCD", "CogVideoX", "Helios", "MiniMax", "UnCLIP")


@functools.cache
def own_options(scheduler: type) -> frozenset[str]:
    """The names of a scheduler's options; cached, since every step needs them and reading a signature is slow."""
    return frozenset(inspect.signature(scheduler).parameters)


def is_integer(value) -> bool:
    """Whether a value is a Python or numpy integer, but not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_number(name: str, value) -> float:
    """Returns a number after checking that it is real and finite; it may be a tensor or an array with one element.

    Raises:
        ValueError: if it is something else; the message contains the argument's `name`.
    """
    if isinstance(value, torch.Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    try:
        is_finite = math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        is_finite = False
    if not is_finite or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a finite number, not {value!r}")
    return value


def replaced_latents(returned, latents: torch.Tensor) -> torch.Tensor:
    """The latents that a callback returned, or `latents` if it returned none.

    Raises:
        ValueError: if it returned something other than a dict or None, or latents of another shape.
    """
    if returned is None:
        return latents
    if not isinstance(returned, dict):
        raise ValueError(
            f"`callback_on_step_end` returned a {type(returned).__name__}; it must return a dict such as "
            '{"latents": latents}, or None'
        )
    replaced = returned.get("latents", latents)
    if not isinstance(replaced, torch.Tensor) or replaced.shape != latents.shape:
        what = tuple(replaced.shape) if isinstance(replaced, torch.Tensor) else type(replaced).__name__
        raise ValueError(
            f"`callback_on_step_end` returned latents that are {what}; a tensor of shape {tuple(latents.shape)} is expected"
        )
    return replaced.to(latents)


def check_vae(vae):
    """Checks that an autoencoder can decode latents as this pipeline scales them.

    Of classes from outside diffusers, only the configuration and the weights are checked.

    Raises:
        ValueError: if it is a class of diffusers that is not in `AUTOENCODERS`, its configuration has a scale, shift or
            statistics that cannot be used, or weights are missing, NaN or infinite.
    """
    kind, config = type(vae).__name__, getattr(vae, "config", None)
    if type(vae).__module__.startswith("diffusers.") and kind not in AUTOENCODERS:
        raise ValueError(
            f"`vae` is a {kind}, whose latents or pixels need special treatment; use an {', '.join(AUTOENCODERS[:-1])} "
            f"or {AUTOENCODERS[-1]}"
        )
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    scale, shift, mean, std = (getattr(config, name, None) for name in names)
    if scale is not None and as_number("vae.config.scaling_factor", scale) <= 0:
        raise ValueError(f"`vae.config.scaling_factor` must be a positive number, not {scale!r}")
    if shift is not None:
        as_number("vae.config.shift_factor", shift)
    if (mean is None) != (std is None):
        raise ValueError("`vae.config` must have both `latents_mean` and `latents_std`, or neither")
    if mean is not None:
        channels = getattr(config, "latent_channels", None)
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            if not isinstance(values, list | tuple) or len(values) != channels:
                raise ValueError(f"`vae.config.{name}` must be a list of {channels} numbers, not {values!r}")
            of_channels = [as_number(f"vae.config.{name}", value) for value in values]
            if name == "latents_std" and min(of_channels) <= 0:
                raise ValueError(f"`vae.config.latents_std` must be positive, unlike {values!r}")
        if shift:
            raise ValueError("`vae.config` has both `shift_factor` and `latents_mean`, and only one can be subtracted")
    # diffusers leaves weights that a file lacks on the meta device; weights that it offloads with hooks are there,
    # too.
    is_offloaded = any(hasattr(module, "_hf_hook") for module in vae.modules())
    for name, weight in vae.named_parameters():
        if weight.is_meta and not is_offloaded:
            raise ValueError(f"`vae` lacks weights, among them {name}; download or copy its files again")
        if weight.is_floating_point() and not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f"`vae` has NaN or infinite weights, among them {name}; download or copy its files again")


def saved_variants(folder: Path) -> set[str]:
    """The variants of the weights in a model's folder, such as `fp16`; an empty name stands for plain weights."""
    endings = r"(?:\.safetensors|\.bin)"
    pattern = rf"diffusion_pytorch_model(?:\.([\w-]+))?{endings}|diffusion_pytorch_model{endings}\.index(?:\.([\w-]+))?\.json"
    found = [re.fullmatch(pattern, path.name) for path in folder.iterdir() if "-of-" not in path.name]
    return {match[1] or match[2] or "" for match in found if match}


# The mixin works for any pipeline whose adapters are all on its `transformer`, despite its name.
class VRPOPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """Samples images of given classes with an ODE or SDE solver and classifier-free guidance.

    The transformer's config describes its conventions. For the schedulers and in all arguments of this class, t = 1 is
    noise and the velocity is `noise - x0`. `load_lora_weights`, `fuse_lora`, `set_adapters` and similar methods are
    those of diffusers and need peft. `save_pretrained` and `push_to_hub` add the code of the pipeline and its
    components, so that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` opens the result where this
    package is not installed.

    Args:
        transformer ([`SiTTransformer2DModel`]): predicts velocities (SiT, either direction of time) or noise (DiT).
        scheduler: a scheduler that accepts the prediction. For velocities: [`FlowMatchEulerDiscreteScheduler`] and
            [`FlowMatchHeunDiscreteScheduler`] (ODE), [`SiTSDEScheduler`] (SDE), or a multistep solver with
            `use_flow_sigmas=True, prediction_type="flow_prediction"`. For noise: [`DDPMScheduler`] (the only one that
            uses a learned variance), [`DDIMScheduler`], [`DPMSolverMultistepScheduler`] and others with
            `prediction_type="epsilon"`, with the betas used in training, and `clip_sample=False` for latents.
        vae (a diffusers autoencoder, *optional*): decodes latents; without it, the transformer works on pixels.
        id2label (`dict[int, str]`, *optional*): class names; commas separate synonyms, as in ImageNet's names.
        trained_labels (`list[int]`, *optional*): the ids of the classes that had images in training; by default, all.
            A warning is logged when other classes are sampled. The config stores the list only if it lacks a class.

    Raises:
        ValueError: if the transformer is of another class, the autoencoder cannot be used (`check_vae`), or class
            names or ids are not valid.

    Example:

    ```python
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline, sit_preset

    transformer = SiTTransformer2DModel(sample_size=8, in_channels=3, num_classes=10, **sit_preset("SiT-XS/2"))
    pipeline = VRPOPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    generator = torch.Generator().manual_seed(0)
    images = pipeline(class_labels=[3, 7], guidance_scale=1.5, num_inference_steps=2, generator=generator).images
    assert images[0].size == (8, 8)
    ```
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        trained_labels: list[int] | None = None,
    ):
        super().__init__()
        if transformer is not None and "num_classes" not in getattr(transformer, "config", {}):
            raise ValueError(
                f"`transformer` must be a SiTTransformer2DModel, not a {type(transformer).__name__}; `vrpo convert` makes one "
                "from the weights of SiT, REPA and DiT"
            )
        if isinstance(vae, torch.nn.Module):
            check_vae(vae)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._current_timestep = None
        self._current_flow_time = None

        # JSON has only string keys: store strings, so that a round trip changes nothing.
        if not isinstance(id2label, dict | None):
            raise ValueError(f"`id2label` must be a dict from class ids to names, not a {type(id2label).__name__}")
        id2label = {str(key): name for key, name in (id2label or {}).items()}
        for key, name in id2label.items():
            if not key.lstrip("-").isdecimal() or not isinstance(name, str):
                raise ValueError(f"`id2label` must have ids as keys and names as values, unlike {key!r}: {name!r}")
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(do_resize=False)
        num_classes = transformer.config.num_classes if transformer is not None else math.inf
        if wrong := [key for key in id2label if not 0 <= int(key) < num_classes]:
            raise ValueError(f"`id2label` names class {wrong[0]}, but the transformer has ids 0 ... {num_classes - 1}")
        if trained_labels is not None:
            self._record_trained_labels(trained_labels, num_classes)
        self._warned_labels: set[int] = set()
        self._warned_guidance = False

        # Exact names come first, then names without case, then synonyms: "Cardigan" and "cardigan" are two classes.
        self.labels: dict[str, list[int]] = {}
        for spellings in (
            lambda name: [name],
            lambda name: [name.lower()],
            lambda name: [part.strip().lower() for part in name.split(",")],
        ):
            found: dict[str, list[int]] = {}
            for key, name in id2label.items():
                for spelling in dict.fromkeys(spellings(name)):
                    found.setdefault(spelling, []).append(int(key))
            self.labels = {**found, **self.labels}

    def _record_trained_labels(self, trained_labels: list[int], num_classes: int | float):
        """Stores the trained classes in the config, unless these are all classes."""
        is_list = isinstance(trained_labels, list | tuple) and all(is_integer(label) for label in trained_labels)
        if not is_list or not trained_labels:
            raise ValueError(f"`trained_labels` must be a list of class ids, not {trained_labels!r}")
        trained_labels = sorted({int(label) for label in trained_labels})
        if not 0 <= trained_labels[0] <= trained_labels[-1] < num_classes:
            raise ValueError(
                f"`trained_labels` has ids {trained_labels[0]} ... {trained_labels[-1]}, but the transformer has ids "
                f"0 ... {num_classes - 1}"
            )
        if len(trained_labels) < num_classes:
            self.register_to_config(trained_labels=trained_labels)

    @property
    def trained_labels(self) -> list[int]:
        """The ids of the classes that had images in training: those to sample by default."""
        known = self.config.get("trained_labels")
        return list(range(self.transformer.config.num_classes)) if known is None else list(known)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "VRPOPipeline":
        """Opens a saved pipeline as diffusers does.

        `variant` is not needed for a folder in which the autoencoder has a single variant.

        Raises:
            ValueError: if the autoencoder has no weights, or `check_vae` refuses it.
        """
        folder = Path(pretrained_model_name_or_path)
        is_plain = kwargs.get("variant") is None and not kwargs.get("use_flashpack")
        if folder.is_dir() and is_plain and "vae" not in kwargs:
            variants = cls._vae_variants(folder)
            others = saved_variants(folder / "transformer") if (folder / "transformer").is_dir() else set()
            # A transformer that also has plain weights would be opened in that variant, too.
            if len(variants) == 1 and variants != {""} and not ("" in others and variants & others):
                kwargs["variant"] = variants.pop()
            elif variants and "" not in variants:
                raise ValueError(
                    f"`vae` of {folder} has no plain weights; pass `variant`: {', '.join(sorted(variants))}"
                )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs) -> str:
        """Downloads a pipeline as diffusers does. Raises ValueError if its autoencoder has no weights."""
        folder = super().download(pretrained_model_name, **kwargs)
        if "vae" not in kwargs and not kwargs.get("use_flashpack"):
            cls._vae_variants(Path(folder))
        return folder

    @staticmethod
    def _vae_variants(folder: Path) -> set[str]:
        """The variants of a saved pipeline's autoencoder; empty if it has none."""
        if not (folder / "vae" / "config.json").is_file():
            return set()
        if not (variants := saved_variants(folder / "vae")):
            raise ValueError(
                f"`vae` of {folder} has no weights (diffusion_pytorch_model.safetensors); copy or download them, or pass "
                "`variant` if they have one, such as 'fp16'"
            )
        return variants

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "VRPOPipeline":
        """Makes a pipeline of this class from the components of another pipeline, which keeps them, too.

        Args:
            pipeline: a pipeline whose transformer is a `SiTTransformer2DModel`. From any other pipeline, such as
                diffusers' [`DiTPipeline`], the scheduler and the autoencoder are used, and `transformer` must be
                given.
            kwargs: components to use instead, `id2label`, and the options of [`DiffusionPipeline.from_pipe`] (`dtype`,
                float32 by default, `custom_pipeline`).

        Raises:
            ValueError: if neither `pipeline` nor `kwargs` has a transformer that this class can sample from.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"`pipeline` must be a pipeline of diffusers, not a {type(pipeline).__name__}")
        # diffusers compares classes with the type hints exactly, and would refuse a subclass and all autoencoders but
        # one.
        components = {name: pipeline.components.get(name) for name in ("transformer", "vae")}
        kwargs = {**components, **kwargs}
        transformer = kwargs["transformer"]
        # Sampling needs `cache_context` and `null_class_id`, which a compiled or wrapped model also has.
        if not hasattr(transformer, "null_class_id"):
            raise ValueError(
                f"`transformer` of this {type(pipeline).__name__} is a {type(transformer).__name__}, which VRPOPipeline "
                "cannot sample from; pass transformer=SiTTransformer2DModel(...) (`vrpo convert` makes one from a DiT)"
            )
        return super().from_pipe(pipeline, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves the pipeline as diffusers does, with the code of pipeline and transformer.

        Raises:
            ValueError: if the transformer has adapters, whose layers would be in the files, so that nothing could open them.
        """
        if self.transformer is not None and any(
            ".base_layer." in name for name, _ in self.transformer.named_parameters()
        ):
            raise ValueError(
                "`save_pretrained`: the transformer has LoRA adapters; call `fuse_lora()` and then `unload_lora_weights()` to "
                "merge them, `unload_lora_weights()` alone to remove them, or save them with `save_lora_weights`"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` and, beside it, the code that it refers to: this file and those of the components.

        Raises:
            ValueError: if `push_to_hub` is set, since only a whole pipeline can be published.
        """
        if push_to_hub:
            raise ValueError(
                "`save_config` cannot publish: use `pipeline.push_to_hub`, which also uploads the weights"
            )
        super().save_config(save_directory)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        sources = {}
        if type(self).__name__ == "VRPOPipeline":
            index["_class_name"] = ["pipeline_vrpo", "VRPOPipeline"]
            sources["pipeline_vrpo.py"] = __file__
        for name, value in index.items():
            library, class_name = value if isinstance(value, list) and len(value) == 2 else (None, None)
            component = getattr(sys.modules.get(library), class_name, None) if class_name in COMPONENT_FILES else None
            if component is not None:
                index[name] = [COMPONENT_FILES[class_name], class_name]
                sources[f"{name}/{COMPONENT_FILES[class_name]}.py"] = inspect.getsourcefile(component)
        # AutoModel reads this entry in any folder of a pipeline, so it must not be there if the pipeline has other
        # models.
        if self.vae is None and "SiTTransformer2DModel" in index["transformer"]:
            index["auto_map"] = {"AutoModel": ".".join(index["transformer"])}
        for path, source in sources.items():
            code = Path(source).read_bytes()
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(code)
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file, **options):
        """Reads the index, and replaces classes from files beside the weights by the package's, if it is installed."""
        try:
            index = super()._dict_from_json_file(json_file, **options)
        except RecursionError as error:
            raise ValueError(f"{json_file} is nested too deeply") from error
        if not isinstance(index, dict):
            raise ValueError(f"{json_file} must hold a JSON object, not a {type(index).__name__}")
        if PACKAGE is None:
            return index
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        for name, value in index.items():
            if isinstance(value, list) and len(value) == 2 and value[1] in COMPONENT_FILES:
                index[name] = [PACKAGE, value[1]]
        return index

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """Overrides diffusers' method to avoid its warning about `auto_map`, which is for AutoModel."""
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)

    def _upload_folder(self, working_dir, repo_id, token=None, commit_message=None, create_pr=False, subfolder=None):
        """Adds our model card to an upload of `push_to_hub`; an existing card is kept, since diffusers would repeat its tags."""
        try:
            hub = importlib.import_module("diffusers_vrpo.hub.publish")
        except ImportError:
            return super()._upload_folder(working_dir, repo_id, token, commit_message, create_pr, subfolder)
        return hub.push_folder(
            working_dir,
            repo_id,
            token=token,
            commit_message=commit_message or "Upload VRPOPipeline",
            create_pr=create_pr,
            subfolder=subfolder,
            replace_variants=False,
        )

    def get_label_ids(self, class_labels: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """Returns the class ids for ids or names (case does not matter; a string is one name).

        Raises:
            ValueError: if an id is out of range, a name is unknown (the message lists the nearest ones), or two classes
                share a name.
        """
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.reshape(-1).tolist()
        if not isinstance(class_labels, list | tuple | range):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError("`class_labels` is empty: give at least one class id or name")
        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                found = self.labels.get(label.strip(), self.labels.get(label.strip().lower()))
                if not self.labels:
                    raise ValueError(
                        f"`class_labels`: this pipeline has no class names; use ids 0 ... {num_classes - 1}"
                    )
                if found is None:
                    near = difflib.get_close_matches(label.strip().lower(), self.labels, n=3, cutoff=0.5)
                    hint = (
                        f"did you mean {', '.join(map(repr, near))}?" if near else "`pipeline.labels` lists them all"
                    )
                    raise ValueError(f"`class_labels`: no class is named {label!r}; {hint}")
                if len(found) > 1:
                    raise ValueError(f"`class_labels`: {label!r} names the classes {found}; give one of these ids")
                ids.append(found[0])
            elif is_integer(label) and 0 <= label < num_classes:
                ids.append(int(label))
            else:
                raise ValueError(
                    f"`class_labels`: {label!r} is not a class; this model has {num_classes}, ids 0 ... {num_classes - 1}"
                )
        return ids

    def warn_untrained(self, ids: list[int]) -> None:
        """Warns of classes that had no images in training, once for each class."""
        untrained = sorted(set(ids).difference(self.trained_labels, self._warned_labels))
        self._warned_labels.update(untrained)
        if untrained:
            names = [self.config.id2label.get(str(label)) for label in untrained[:10]]
            listed = [str(label) + (f" ({name!r})" if name else "") for label, name in zip(untrained, names)]
            logger.warning(
                f"`class_labels`: {len(untrained)} of these classes had no images in training, so their samples are "
                f"meaningless: {', '.join(listed)}{', ...' if len(untrained) > 10 else ''}; `pipeline.trained_labels` "
                "lists the others"
            )

    def warn_one_class(self, guidance_scale: float) -> None:
        """Warns once if a model of one class is guided."""
        if self.transformer.config.num_classes == 1 and guidance_scale != 1 and not self._warned_guidance:
            self._warned_guidance = True
            logger.warning(
                f"`guidance_scale` {guidance_scale}: this model has one class, and learned the null class from the same images, "
                "so guidance only doubles the work, unless the model started from weights with more classes; pass "
                "guidance_scale=1"
            )

    @property
    def scheduler_options(self) -> dict:
        """The options of the scheduler's class, without unused ones that its config has from another scheduler."""
        own = own_options(type(self.scheduler))
        return {key: value for key, value in self.scheduler.config.items() if key in own}

    @property
    def learned_variance(self) -> bool:
        """Whether the scheduler uses the transformer's learned variance."""
        return self.scheduler_options.get("variance_type") in ("learned", "learned_range")

    def check_scheduler(self) -> None:
        """Raises ValueError if the scheduler cannot be combined with what the transformer predicts."""
        config, name = self.transformer.config, type(self.scheduler).__name__
        takers = VELOCITY_SCHEDULERS if config.prediction_type == "velocity" else NOISE_SCHEDULERS
        if not isinstance(self.scheduler, SchedulerMixin):
            raise ValueError(f"`scheduler` must be a scheduler of diffusers, not a {name}; use {takers}")
        options = self.scheduler_options
        kind, flow_sigmas = options.get("prediction_type"), options.get("use_flow_sigmas", False)
        is_flow = hasattr(self.scheduler, "scale_noise") or (kind == "flow_prediction" and flow_sigmas)
        is_epsilon = hasattr(self.scheduler, "alphas_cumprod") and kind == "epsilon" and not flow_sigmas
        if config.prediction_type == "velocity" and not is_flow:
            raise ValueError(
                f"`scheduler`: the transformer predicts velocities, which this {name} does not take; use {takers}"
            )
        if config.prediction_type == "epsilon" and not is_epsilon:
            raise ValueError(
                f"`scheduler`: the transformer predicts noise, which this {name} does not take; use {takers}"
            )
        if any(word in name for word in OTHER_SCHEDULERS):
            raise ValueError(
                f"`scheduler`: a {name} is for inversion, for distilled models or for models of video; use {takers}"
            )
        # Both change what time means, and diffusers' pipelines for them pass further arguments.
        changed = [key for key in ("use_dynamic_shifting", "invert_sigmas") if options.get(key)]
        if changed:
            hint = " and shift=..." if changed[0] == "use_dynamic_shifting" else ""
            raise ValueError(
                f"`scheduler`: {changed[0]}=True is for other models; build this {name} with {changed[0]}=False{hint}"
            )
        # Clipping is for pixels; latents are not limited to [-1, 1].
        clips = [key for key in ("clip_sample", "thresholding") if options.get(key)]
        if clips and (self.vae is not None or config.in_channels > 3):
            raise ValueError(f"`scheduler`: {clips[0]}=True cuts latents off; build this {name} with {clips[0]}=False")
        # Schedulers other than DDPM that have this option cut the prediction to three channels.
        is_ddpm = isinstance(self.scheduler, DDPMScheduler)
        if self.learned_variance and not (is_ddpm and config.learn_sigma):
            raise ValueError(
                f"`scheduler`: variance_type={options['variance_type']!r} needs a DDPMScheduler and a transformer "
                f"with learn_sigma; build this {name} with variance_type={'fixed_small' if is_ddpm else None!r}"
            )

    def check_guidance(self, guidance_scale: float) -> float:
        """Checks a guidance scale, and returns it as a Python number.

        Raises:
            ValueError: if it is not a number of at least 0, or the transformer cannot be guided.
        """
        scale = as_number("guidance_scale", guidance_scale)
        if scale < 0:
            raise ValueError(
                f"`guidance_scale` must be at least 0, not {scale}: 1 turns guidance off, more follows the class more closely"
            )
        if scale != 1.0 and self.transformer.null_class_id is None:
            raise ValueError(
                f"`guidance_scale` {scale} needs a null class, which this transformer does not have; pass guidance_scale=1"
            )
        return scale

    def check_inputs(
        self,
        num_images_per_label,
        num_inference_steps,
        guidance_scale,
        guidance_interval,
        guidance_channels,
        output_type,
        tensor_inputs,
        callback=None,
    ) -> None:
        self.check_scheduler()
        counts = {"num_images_per_label": num_images_per_label, "num_inference_steps": num_inference_steps}
        for name, value in counts.items():
            if not is_integer(value) or value < 1:
                raise ValueError(f"`{name}` must be an integer and at least 1, not {value!r}")
        if (
            not isinstance(guidance_interval, tuple | list | np.ndarray)
            or len(guidance_interval) != 2
            or not all(isinstance(bound, numbers.Real) for bound in guidance_interval)
            or not 0.0 <= guidance_interval[0] <= guidance_interval[1] <= 1.0
        ):
            raise ValueError(
                f"`guidance_interval` must be (low, high) with 0 <= low <= high <= 1, not {guidance_interval!r}"
            )
        self.check_guidance(guidance_scale)
        in_channels = self.transformer.config.in_channels
        if not (is_integer(guidance_channels) and 1 <= guidance_channels <= in_channels):
            raise ValueError(f"`guidance_channels` must be in 1 ... {in_channels}, not {guidance_channels!r}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', not {output_type!r}")
        if self.vae is None and in_channels not in (1, 3) and output_type != "latent":
            raise ValueError(
                f"`output_type` {output_type!r} needs the autoencoder of these {in_channels}-channel latents; set "
                "`pipeline.vae`, or pass output_type='latent'"
            )
        if callback is not None and not callable(callback):
            raise ValueError(
                f"`callback_on_step_end` must be a function of (pipeline, step, timestep, tensors), not {callback!r}; "
                "diffusers' MultiPipelineCallbacks combines several"
            )
        if not isinstance(tensor_inputs, list | tuple):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a list of names, not {tensor_inputs!r}; it can name "
                f"{self._callback_tensor_inputs}"
            )
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` can name {self._callback_tensor_inputs}, not {unknown}"
            )

    def get_latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Returns height and width of the latents of images of a size in pixels; a side of None is that of training.

        Raises:
            ValueError: if a side is not a multiple of the pixels that a patch covers.
        """
        size, patch = self.transformer.config.sample_size, self.transformer.config.patch_size
        trained = (size, size) if isinstance(size, int) else tuple(size)
        if height is None and width is None:
            return trained
        # Configs of autoencoders give the enlargement in different ways, or not at all; the size of the output shows
        # it.
        blank = torch.zeros(1, self.transformer.config.in_channels, *trained, device=self._execution_device)
        with torch.no_grad():
            factor = self.decode_latents(blank).shape[-1] // trained[-1]
        unit = factor * patch
        sides = []
        for name, value, latent_side in (("height", height, trained[0]), ("width", width, trained[1])):
            if value is None:
                value = latent_side * factor
            if not is_integer(value) or value < 1 or value % unit:
                below = int(value) // unit * unit if is_integer(value) and value > 0 else 0
                near = " or ".join(str(side) for side in (below, below + unit) if side > 0)
                raise ValueError(
                    f"`{name}` must be a multiple of {unit} pixels (what a patch covers), not {value!r}; {near} would do, and "
                    f"{latent_side * factor} is what the model was trained on"
                )
            sides.append(int(value) // factor)
        return tuple(sides)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device | str,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """Draws float32 noise for images of `height` x `width` pixels, by default those of training, or checks `latents`.

        Raises:
            ValueError: if generators or latents are of a wrong type, number or shape, or latents are not finite.
        """
        config = self.transformer.config
        shape = (batch_size, config.in_channels, *self.get_latent_size(height, width))
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(
                f"`generator` must be a torch.Generator or a list of them, not {generator!r}; a seed goes in as "
                "torch.Generator().manual_seed(seed)"
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {batch_size} images are requested")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            what = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f"`latents` must be a tensor of floating-point numbers, not {what}")
        asked = height is not None or width is not None
        if latents.ndim != 4 or tuple(latents.shape[:2]) != shape[:2] or (asked and tuple(latents.shape) != shape):
            others = "" if asked else " (other sides are possible)"
            raise ValueError(f"`latents` have shape {tuple(latents.shape)}; {shape} is expected{others}")
        if latents.shape[2] % config.patch_size or latents.shape[3] % config.patch_size:
            raise ValueError(
                f"`latents` have shape {tuple(latents.shape)}; the last two must be multiples of the patch size "
                f"{config.patch_size}"
            )
        if not latents.isfinite().all():
            raise ValueError("`latents` have values that are not finite")
        return latents.to(device=device, dtype=torch.float32)

    def get_grid(self, timesteps: list[float] | None = None, sigmas: list[float] | None = None) -> dict:
        """Checks a user-defined schedule, and returns it as the argument of the scheduler's `set_timesteps`.

        Args:
            timesteps, sigmas: as in `__call__`.

        Returns:
            `{"sigmas": array}` or `{"timesteps": list}`; empty if neither is given.

        Raises:
            ValueError: if it is not a falling sequence in the range of the scheduler, or the scheduler does not accept
                one.
        """
        if timesteps is None and sigmas is None:
            return {}
        if timesteps is not None and sigmas is not None:
            raise ValueError("`timesteps` and `sigmas` cannot be combined; give one of them")
        name, given = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
        scheduler, is_velocity = self.scheduler, self.transformer.config.prediction_type == "velocity"
        kind, last = type(scheduler).__name__, scheduler.config.num_train_timesteps
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        # A flow's timesteps are its sigmas in other units.
        is_heun = isinstance(scheduler, FlowMatchHeunDiscreteScheduler)
        if not (is_heun or ("sigmas" in accepted if is_velocity else name in accepted)):
            takers = (
                "FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler and UniPCMultistepScheduler take one"
                if is_velocity
                else "DDPMScheduler and DPMSolverMultistepScheduler take `timesteps`, EulerDiscreteScheduler both"
            )
            raise ValueError(f"`{name}`: this {kind} has a schedule of its own; pass `num_inference_steps` ({takers})")

        given = given.tolist() if isinstance(given, torch.Tensor | np.ndarray) else given
        if not isinstance(given, list | tuple | range) or len(given) == 0:
            raise ValueError(f"`{name}` must be a list of falling numbers, not {given!r}")
        values = [as_number(name, value) for value in given]
        if any(after >= before for before, after in zip(values, values[1:])):
            raise ValueError(f"`{name}` must fall from noise to data without repetition, unlike {given!r}")
        if is_velocity:
            top = 1 if name == "sigmas" else last
            if not 0 < values[-1] <= values[0] <= top:
                raise ValueError(
                    f"`{name}` must lie above 0 and up to {top} for a flow, unlike {given!r}; the last step goes on to 0 by itself"
                )
            return {"sigmas": np.array(values) / top}
        if name == "sigmas":
            if values[-1] <= 0:
                raise ValueError(f"`sigmas` must lie above 0, unlike {given!r}; the last step goes on to 0 by itself")
            return {"sigmas": np.array(values)}
        if not all(float(value).is_integer() and 0 <= value < last for value in values):
            raise ValueError(f"`timesteps` must be integers of 0 ... {last - 1} for this {kind}, unlike {given!r}")
        return {"timesteps": [int(value) for value in values]}

    def prepare_times(
        self,
        num_inference_steps: int,
        device: torch.device | str,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> tuple[torch.Tensor, list[float]]:
        """Sets the scheduler's timesteps; returns the times for `predict`, and the flow time of each on the host.

        Unless `timesteps` or `sigmas` are given, `FlowMatch...` schedulers get SiT's grid t = 1, 1 - 1/n, ..., 1/n,
        and then 0; the others use their own grid.

        Raises:
            ValueError: if the scheduler does not accept these steps.
        """
        scheduler = self.scheduler
        grid = self.get_grid(timesteps, sigmas)
        sigmas = grid.get("sigmas", np.linspace(1.0, 1 / num_inference_steps, num_inference_steps))
        is_flow_match = hasattr(scheduler, "scale_noise")
        if not grid and is_flow_match and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            grid = {"sigmas": sigmas}
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            scheduler.set_timesteps(len(sigmas), device=device)
        elif grid:
            scheduler.set_timesteps(**grid, device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            # Heun does not accept a grid, and its own ends at 1/1000. It has two evaluations per step, one at each
            # end; the last step is an Euler step.
            shift = scheduler.config.shift
            sigmas = torch.from_numpy(shift * sigmas / (1 + (shift - 1) * sigmas)).float().to(device)
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
            scheduler.timesteps = sigmas * scheduler.config.num_train_timesteps
            scheduler.sigmas = torch.cat([sigmas, torch.zeros_like(sigmas[:1])])
        if hasattr(scheduler, "set_begin_index"):
            # A lookup by timestep would be ambiguous if two timesteps round to the same integer.
            scheduler.set_begin_index(0)

        timesteps = scheduler.timesteps
        if isinstance(scheduler, DDIMScheduler):
            stride = scheduler.config.num_train_timesteps // num_inference_steps
            if (timesteps[:-1] - timesteps[1:] != stride).any():
                logger.warning(
                    f"`num_inference_steps` {num_inference_steps}: diffusers' DDIM goes down by {stride} a step and so misses "
                    f"its timesteps; a divisor of {scheduler.config.num_train_timesteps} is exact"
                )
        if self.transformer.config.prediction_type == "epsilon":
            alpha_bar = scheduler.alphas_cumprod.cpu().double().numpy()
            alpha_bar = np.interp(timesteps.cpu().double().numpy(), np.arange(len(alpha_bar)), alpha_bar)
            # The flow times with the same noise levels.
            flow_times = np.sqrt(1 - alpha_bar) / (np.sqrt(alpha_bar) + np.sqrt(1 - alpha_bar))
            return timesteps, flow_times.tolist()
        # The multistep solvers round timesteps, but not sigmas.
        sigmas = scheduler.sigmas[: len(timesteps)]
        return sigmas.to(device), sigmas.tolist()

    def predict(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        labels: torch.Tensor,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Computes the input of the scheduler's `step`: the guided velocity `noise - x0`, or noise (and learned variance).

        Args:
            latents: latents in the scale that the model expects, `[B, C, H, W]`.
            time: the flow time t, where 1 is noise, or the timestep for a model that predicts noise; `[]`.
            labels: class ids, `[B]`.
            guidance_scale, guidance_channels: as in `__call__`.
            dtype: the dtype of the transformer. By default it is looked up, which is slow, as diffusers inspects all
                modules.

        Returns:
            float32 `[B, C, H, W]`, or `[B, 2C, H, W]` with the variance.
        """
        config = self.transformer.config
        flipped = config.time_direction == "noise_to_data"
        is_guided = guidance_scale != 1.0
        if is_guided:
            latents = torch.cat([latents, latents])
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.null_class_id)])
        arguments = {"return_variance": True} if self.learned_variance else {}
        # Guided and unguided batches differ in size, so a cache must not use one for the other.
        with self.transformer.cache_context("guided" if is_guided else "unguided"):
            prediction = self.transformer(
                latents.to(self.transformer.dtype if dtype is None else dtype),
                1 - time if flipped else time,
                labels,
                return_dict=False,
                **arguments,
            )[0].float()
        if is_guided:
            prediction = guide(prediction, guidance_scale, guidance_channels or config.in_channels)
        return -prediction if flipped else prediction

    @property
    def guidance_scale(self) -> float:
        """The scale of guidance; a callback changes it for the following steps with `pipeline._guidance_scale = ...`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of evaluations: one per step, or with Heun two per step but one in the last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the sampling with `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The scheduler's timestep of the current step, which callbacks also receive; None outside a call."""
        return self._current_timestep

    @property
    def current_flow_time(self) -> float | None:
        """The t of the current step in the units of `guidance_interval`, where 1 is noise; None outside a call."""
        return self._current_flow_time

    def enable_vae_slicing(self) -> None:
        """Decodes images one by one, which takes less memory. Raises ValueError if the autoencoder cannot do it."""
        self._switch_vae("slicing", "enable")

    def disable_vae_slicing(self) -> None:
        """Undoes `enable_vae_slicing`."""
        self._switch_vae("slicing", "disable")

    def enable_vae_tiling(self) -> None:
        """Decodes large images in overlapping tiles. Raises ValueError if the autoencoder cannot do it."""
        self._switch_vae("tiling", "enable")

    def disable_vae_tiling(self) -> None:
        """Undoes `enable_vae_tiling`."""
        self._switch_vae("tiling", "disable")

    def _switch_vae(self, what: str, switch: str):
        if self.vae is None:
            raise ValueError(f"`{switch}_vae_{what}`: this pipeline works on pixels and has no autoencoder")
        if not hasattr(self.vae, f"use_{what}"):
            raise ValueError(f"`{switch}_vae_{what}`: a {type(self.vae).__name__} has no {what}")
        getattr(self.vae, f"{switch}_{what}")()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_prompt: int | None = None,
        height: int | None = None,
        width: int | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples images.

        Args:
            class_labels: class ids (`0 ... num_classes - 1`) or names, a single one or a list.
            num_images_per_label (`int`): the number of images of each label, which are adjacent in the output.
            num_inference_steps (`int`): the number of solver steps; without effect if `timesteps` or `sigmas` are
                given.
            guidance_scale (`float`): w in `v_null + w (v_class - v_null)`, at least 0; 1 turns guidance off, and 0
                samples the null class.
            guidance_interval (`(float, float)`): guidance acts where `low <= t <= high`; t = 1 is noise. Elsewhere,
                the unconditional half is not computed (arXiv 2404.07724). A step with two evaluations (Heun) uses the
                t at its start; a DDPM timestep uses the t with the same noise level.
            guidance_channels (`int`, *optional*): how many channels are guided, the first ones; by default, the number
                in the transformer's config, or else all.
            generator (`torch.Generator` or a list, one per image): draws the starting noise and the noise of the steps,
                which makes images reproducible.
            latents (`torch.Tensor` of shape `(images, channels, height, width)`): the noise to start from, of standard
                deviation 1. The sides may be any multiples of the patch size.
            output_type (`str`): `"pil"`, `"np"` `[B,H,W,3]` in [0, 1], `"pt"` `[B,3,H,W]` in [0, 1], or `"latent"`.
            return_dict (`bool`): return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end: called as `f(pipeline, step, timestep, {"latents": ...})` after every step (with
                Heun, after every half); if it returns `"latents"`, these replace the current ones. `timestep` is the
                scheduler's (1000 t for a flow); `pipeline.current_flow_time` is the t of `guidance_interval`.
                `pipeline._interrupt = True` stops the sampling, and the current latents become the images;
                `pipeline._guidance_scale = w` sets the scale of the following steps.
            callback_on_step_end_tensor_inputs: the names of the tensors passed to the callback.
            num_images_per_prompt (`int`, *optional*): another name of `num_images_per_label`.
            height, width (`int`, *optional*): the size of the images in pixels, multiples of the pixels that a patch
                covers; by default, that of training. For other sizes, which the model has not seen, the position
                embeddings are stretched.
            timesteps (`list`, *optional*): the scheduler's timesteps to step through, falling. For a flow, these are
                1000 t, which has the same effect as t in `sigmas`.
            sigmas (`list`, *optional*): the values of t to step through, falling and in (0, 1]; a final 0 is added.
                The scheduler's shift applies to them. For EulerDiscreteScheduler, they are ratios of noise to signal.

        Returns:
            an [`ImagePipelineOutput`] with `images` (a list of PIL images, an array or a tensor, as `output_type`
            says), or a tuple of these images.

        Raises:
            ValueError: if an argument is wrong, or the scheduler cannot be combined with the transformer.
        """
        if self.transformer is None:
            raise ValueError("`transformer` is missing: this pipeline was opened or made with transformer=None")
        config = self.transformer.config
        if num_images_per_prompt is not None:
            if num_images_per_label not in (1, num_images_per_prompt):
                raise ValueError(
                    f"`num_images_per_prompt` {num_images_per_prompt} is another name of `num_images_per_label`, which is "
                    f"{num_images_per_label}; give one of them"
                )
            num_images_per_label = num_images_per_prompt
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if isinstance(generator, tuple):
            generator = list(generator)
        if guidance_channels is None:
            guidance_channels = config.in_channels if config.guidance_channels is None else config.guidance_channels
        self.check_inputs(
            num_images_per_label,
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            guidance_channels,
            output_type,
            callback_on_step_end_tensor_inputs,
            callback_on_step_end,
        )
        ids = self.get_label_ids(class_labels)
        self.warn_untrained(ids)
        self.warn_one_class(guidance_scale)
        num_images_per_label = int(num_images_per_label)
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device

        # 1. Labels, times and noise.
        labels = torch.tensor(ids, device=device).repeat_interleave(num_images_per_label)
        times, flow_times = self.prepare_times(num_inference_steps, device, timesteps, sigmas)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(len(labels), generator, device, latents, height, width)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

        # 2. The host decides once per step whether to guide, with a tolerance for rounding at the ends of the interval.
        low, high = guidance_interval
        step_starts = [flow_times[i - i % self.scheduler.order] for i in range(len(timesteps))]
        is_inside = [low - 1e-6 <= t <= high + 1e-6 for t in step_starts]

        # 3. Denoise. Latents stay float32 for any dtype of the transformer, since rounding errors of the steps add up.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_arguments = {"generator": generator} if takes_generator else {}
        dtype = self.transformer.dtype
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, timestep in enumerate(timesteps):
                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(latents, timestep)
                self._current_timestep, self._current_flow_time = timestep, flow_times[i]
                # A callback may have changed the scale.
                scale = self.check_guidance(self._guidance_scale) if is_inside[i] else 1.0
                prediction = self.predict(model_input, times[i], labels, scale, guidance_channels, dtype)
                latents = self.scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = replaced_latents(callback_on_step_end(self, i, timestep, tensors), latents)
                progress_bar.update()
                if self._interrupt:
                    break
        self._current_timestep = self._current_flow_time = None

        # 4. Latents to images.
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Undoes the autoencoder's scaling and shift, and decodes latents to float32 pixels in about [-1, 1]."""
        if self.vae is None:
            return latents
        scale = getattr(self.vae.config, "scaling_factor", None) or 1.0
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        mean, std = getattr(self.vae.config, "latents_mean", None), getattr(self.vae.config, "latents_std", None)
        if mean is not None and std is not None:
            shift, std = (torch.tensor(values).view(-1, 1, 1).to(latents) for values in (mean, std))
            scale = scale / std
        latents = (latents / scale + shift).to(self.vae.dtype)
        # Decode 16 images at a time, since decoding takes far more memory than denoising.
        return torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in latents.split(16)])
