# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Class-conditional sampling from flow-matching (SiT) and noise-predicting (DiT) transformers.

This file imports torch, numpy and diffusers only, so that it can be published beside the weights.
"""

import difflib
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchHeunDiscreteScheduler
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

# The schedulers for each kind of prediction, for error messages.
VELOCITY_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SiTSDEScheduler, or DPMSolverMultistepScheduler "
    "or UniPCMultistepScheduler with use_flow_sigmas=True and prediction_type='flow_prediction'"
)
NOISE_SCHEDULERS = (
    "DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler with prediction_type='epsilon' and no flow sigmas"
)


def guide(prediction: torch.Tensor, guidance_scale: float, channels: int) -> torch.Tensor:
    """Applies classifier-free guidance to the first `channels`: `null + w (class - null)`; the others keep the class's.

    Args:
        prediction: `[2B, C, H, W]`, for the classes and then for the null class.
        guidance_scale: w.
        channels: the number of guided channels, 1 ... C.

    Returns:
        `[B, C, H, W]`.
    """
    of_class, of_null = prediction.chunk(2)
    guided = of_null + guidance_scale * (of_class - of_null)
    return torch.cat([guided[:, :channels], of_class[:, channels:]], dim=1)


# The mixin works for any pipeline whose adapters are all on its `transformer`, despite its name.
class VRPOPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """Samples images of given classes by an ODE or SDE solver, with classifier-free guidance.

    The transformer's config names its conventions. For the schedulers and in all arguments here, t = 1 is noise and
    the velocity is `noise - x0`. `load_lora_weights`, `fuse_lora`, `set_adapters` and the like are diffusers' (with peft).
    `save_pretrained` and `push_to_hub` add the code of pipeline and transformer, so that
    `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` opens the result where this package is not installed.

    Args:
        transformer ([`SiTTransformer2DModel`]): predicts velocities (SiT, either direction of time) or noise (DiT).
        scheduler: one that takes the prediction. For velocities [`FlowMatchEulerDiscreteScheduler`] and
            [`FlowMatchHeunDiscreteScheduler`] (ODE), [`SiTSDEScheduler`] (SDE), or a multistep solver with
            `use_flow_sigmas=True, prediction_type="flow_prediction"`. For noise [`DDPMScheduler`] (the only one that
            uses a learned variance), [`DDIMScheduler`], [`DPMSolverMultistepScheduler`] and others with
            `prediction_type="epsilon"`, with the betas of the training, and `clip_sample=False` for latents.
        vae (a diffusers autoencoder, *optional*): decodes latents; without it the transformer works on pixels.
        id2label (`dict[int, str]`, *optional*): class names; commas separate synonyms, as in ImageNet's names.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer, scheduler, vae=None, id2label=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        # JSON has string keys only: store strings, so that a round trip changes nothing.
        id2label = {str(key): name for key, name in (id2label or {}).items()}
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(do_resize=False)
        num_classes = transformer.config.num_classes if transformer is not None else math.inf
        if wrong := [key for key in id2label if not 0 <= int(key) < num_classes]:
            raise ValueError(f"`id2label` names class {wrong[0]}, but the transformer has ids 0 ... {num_classes - 1}")

        # Whole names first, then names without case, then the synonyms: "Cardigan" and "cardigan" are two classes.
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

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes `model_index.json`, and beside it the code that it names: this file and those of the components.

        Raises:
            ValueError: if `push_to_hub` is set: only a whole pipeline can be published.
        """
        if push_to_hub:
            raise ValueError("`save_config` cannot publish: use `pipeline.push_to_hub`, which takes the weights along")
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
        for path, source in sources.items():
            code = Path(source).read_bytes()
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(code)
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file, **options):
        """Reads the index; classes from files beside the weights become the package's own if that is installed."""
        index = super()._dict_from_json_file(json_file, **options)
        if PACKAGE is None:
            return index
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        for name, value in index.items():
            if isinstance(value, list) and len(value) == 2 and value[1] in COMPONENT_FILES:
                index[name] = [PACKAGE, value[1]]
        return index

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
        if not isinstance(class_labels, list | tuple):
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
            elif isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label < num_classes:
                ids.append(int(label))
            else:
                raise ValueError(
                    f"`class_labels`: {label!r} is not a class; this model has {num_classes}, ids 0 ... {num_classes - 1}"
                )
        return ids

    @property
    def scheduler_options(self) -> dict:
        """The scheduler's own options, without unused ones in its config from a scheduler that it was created from."""
        own = inspect.signature(type(self.scheduler)).parameters
        return {key: value for key, value in self.scheduler.config.items() if key in own}

    @property
    def learned_variance(self) -> bool:
        """Whether the scheduler uses the transformer's learned variance."""
        return self.scheduler_options.get("variance_type") in ("learned", "learned_range")

    def check_scheduler(self):
        """Raises ValueError if the scheduler cannot be combined with what the transformer predicts."""
        name, options, config = type(self.scheduler).__name__, self.scheduler_options, self.transformer.config
        kind, flow_sigmas = options.get("prediction_type"), options.get("use_flow_sigmas", False)
        is_flow = hasattr(self.scheduler, "scale_noise") or (kind == "flow_prediction" and flow_sigmas)
        is_epsilon = hasattr(self.scheduler, "alphas_cumprod") and kind == "epsilon" and not flow_sigmas
        if config.prediction_type == "velocity" and not is_flow:
            raise ValueError(
                f"`scheduler`: the transformer predicts velocities, which this {name} does not take; use "
                f"{VELOCITY_SCHEDULERS}"
            )
        if config.prediction_type == "epsilon" and not is_epsilon:
            raise ValueError(
                f"`scheduler`: the transformer predicts noise, which this {name} does not take; use {NOISE_SCHEDULERS}"
            )
        # Clipping is for pixels; latents are not limited to [-1, 1].
        clips = [key for key in ("clip_sample", "thresholding") if options.get(key)]
        if clips and (self.vae is not None or config.in_channels > 3):
            raise ValueError(f"`scheduler`: {clips[0]}=True cuts latents off; build this {name} with {clips[0]}=False")
        # Other schedulers than DDPM that have the option cut the prediction to three channels.
        is_ddpm = isinstance(self.scheduler, DDPMScheduler)
        if self.learned_variance and not (is_ddpm and config.learn_sigma):
            raise ValueError(
                f"`scheduler`: variance_type={options['variance_type']!r} needs a DDPMScheduler and a transformer "
                f"with learn_sigma; build this {name} with variance_type={'fixed_small' if is_ddpm else None!r}"
            )

    def check_inputs(
        self,
        num_images_per_label,
        num_inference_steps,
        guidance_scale,
        guidance_interval,
        guidance_channels,
        output_type,
        tensor_inputs,
    ):
        self.check_scheduler()
        if num_images_per_label < 1:
            raise ValueError(f"`num_images_per_label` must be at least 1, not {num_images_per_label}")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, not {num_inference_steps}")
        low, high = guidance_interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                f"`guidance_interval` must be (low, high) with 0 <= low <= high <= 1, not {guidance_interval}"
            )
        if guidance_scale != 1.0 and self.transformer.null_class_id is None:
            raise ValueError(
                f"`guidance_scale` {guidance_scale} needs a null class, which this transformer does not have; pass "
                "guidance_scale=1"
            )
        in_channels = self.transformer.config.in_channels
        if not (isinstance(guidance_channels, int) and 1 <= guidance_channels <= in_channels):
            raise ValueError(f"`guidance_channels` must be in 1 ... {in_channels}, not {guidance_channels!r}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', not {output_type!r}")
        if self.vae is None and in_channels not in (1, 3) and output_type != "latent":
            raise ValueError(
                f"`output_type` {output_type!r} needs the autoencoder of these {in_channels}-channel latents; set "
                "`pipeline.vae`, or pass output_type='latent'"
            )
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` can name {self._callback_tensor_inputs}, not {unknown}"
            )

    def prepare_latents(self, batch_size, generator, device, latents=None) -> torch.Tensor:
        """Draws float32 noise of the transformer's sample size, or checks the shape of the given latents."""
        config = self.transformer.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {batch_size} images are asked for")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.ndim != 4 or tuple(latents.shape[:2]) != shape[:2]:
            raise ValueError(f"`latents` have shape {tuple(latents.shape)}; {shape} is expected (other sides may do)")
        return latents.to(device=device, dtype=torch.float32)

    def prepare_times(self, num_inference_steps, device) -> tuple[torch.Tensor, list[float]]:
        """Sets the scheduler's timesteps; returns the times for `predict`, and the flow time of each on the host.

        `FlowMatch...` schedulers get SiT's grid t = 1, 1 - 1/n, ..., 1/n, and then 0; the others have their own.
        """
        scheduler = self.scheduler
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if takes_sigmas and hasattr(scheduler, "scale_noise"):
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            # Heun does not accept a grid, and its own ends at 1/1000. It has two evaluations per step, at both ends; the
            # last step is Euler's.
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
            # The flow times of the same noise levels.
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
    ) -> torch.Tensor:
        """Computes the input of the scheduler's `step`: the guided velocity `noise - x0`, or noise (and learned variance).

        Args:
            latents: scaled for the model, `[B, C, H, W]`.
            time: the flow time t, 1 being noise, or the timestep for a model that predicts noise; `[]`.
            labels: class ids, `[B]`.
            guidance_scale, guidance_channels: as in `__call__`.

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
        # Guided and unguided batches differ in size: a cache must not reuse one for the other.
        with self.transformer.cache_context("guided" if is_guided else "unguided"):
            prediction = self.transformer(
                latents.to(self.transformer.dtype),
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
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

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
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            class_labels: class ids (`0 ... num_classes - 1`) or names, a single one or a list.
            num_images_per_label (`int`): images of each label, next to each other in the output.
            num_inference_steps (`int`): solver steps.
            guidance_scale (`float`): w of `v_null + w (v_class - v_null)`; 1 turns guidance off.
            guidance_interval (`(float, float)`): guidance acts where `low <= t <= high`, t = 1 being noise; outside it
                the unconditional half is not computed (arXiv 2404.07724). A step of two evaluations (Heun) uses the t
                that it starts from; a DDPM timestep uses the t of the same noise level.
            guidance_channels (`int`, *optional*): the number of first channels that are guided, 1 ... channels; by
                default that of the transformer's config, or all.
            generator (`torch.Generator` or a list, one per image): draws the starting noise and the noise of the steps,
                which makes images reproducible.
            latents (`torch.Tensor` of shape `(images, channels, height, width)`): the noise to start from, of standard
                deviation 1.
            output_type (`str`): `"pil"`, `"np"` `[B,H,W,3]` in [0, 1], `"pt"` `[B,3,H,W]` in [0, 1], or `"latent"`.
            return_dict (`bool`): an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end: called as `f(pipeline, step, timestep, {"latents": ...})` after every step (of Heun,
                every half); if it returns `"latents"`, these replace the current ones.
            callback_on_step_end_tensor_inputs: the tensors passed to the callback.

        Raises:
            ValueError: if an argument is wrong, or the scheduler cannot be combined with the transformer.
        """
        config = self.transformer.config
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
        )
        ids = self.get_label_ids(class_labels)
        self._guidance_scale = guidance_scale
        device = self._execution_device

        # 1. Labels, times and noise.
        labels = torch.tensor(ids, device=device).repeat_interleave(num_images_per_label)
        times, flow_times = self.prepare_times(num_inference_steps, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(len(labels), generator, device, latents)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

        # 2. The host decides once per step whether to guide, with a tolerance for rounding at the ends of the interval.
        low, high = guidance_interval
        step_starts = [flow_times[i - i % self.scheduler.order] for i in range(len(timesteps))]
        scales = [guidance_scale if low - 1e-6 <= t <= high + 1e-6 else 1.0 for t in step_starts]

        # 3. Denoise. Latents stay float32 for any dtype of the transformer: rounding errors of the steps would add up.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_arguments = {"generator": generator} if takes_generator else {}
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, timestep in enumerate(timesteps):
                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(latents, timestep)
                prediction = self.predict(model_input, times[i], labels, scales[i], guidance_channels)
                latents = self.scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = callback_on_step_end(self, i, timestep, tensors).pop("latents", latents)
                progress_bar.update()

        # 4. Latents to images.
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents to float32 pixels in about [-1, 1]; undoes the autoencoder's scaling and shift."""
        if self.vae is None:
            return latents
        scale = getattr(self.vae.config, "scaling_factor", None) or 1.0
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = (latents / scale + shift).to(self.vae.dtype)
        # 16 at a time: decoding takes far more memory than denoising.
        return torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in latents.split(16)])
