# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Sample many images from a pipeline into a folder, as PNG files or an .npz file for ADM's evaluator.

    python pipelines/sample.py outputs/digits --num_images 100 --output_dir samples
    accelerate launch --multi_gpu pipelines/sample.py sit-xl --num_images 50000 --output_dir samples --sampler sde \
        --num_inference_steps 250 --guidance_scale 1.8 --guidance_interval 0 0.7 --batch_size 128 --dtype bfloat16 \
        --compile --output_format npz

Image i is a function of (seed, i) and the options: the same files come from one process, several, or a run that was
stopped and given again. What is there is kept.
"""

import argparse
import inspect
import json
import logging
import math
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import PIL
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tqdm.auto import tqdm

from . import ddpm
from .arguments import HelpFormatter, OneLineErrorParser, as_id, check_ranges
from .conversion import pipeline_index
from .errors import InputError, first_line, hub_problem
from .initialization import public_config, weights_checksum
from .pipeline_vrpo import VRPOPipeline
from .processes import start_processes
from .random_streams import random_stream
from .sample_files import SampleFolder, cannot_write
from .scheduling_sit_sde import SiTSDEScheduler


logger = logging.getLogger("sample")

SAMPLERS = {
    "velocity": ("ode", "heun", "dpmsolver++", "unipc", "sde"),
    "epsilon": ("ddim", "ddpm", "dpmsolver++", "unipc"),
}
DTYPES = ("float32", "bfloat16", "float16")
# Streams of an image: other numbers than those of training's streams (latents.py).
START, STEPS, LABEL = 100, 101, 102


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn for image i


def start_noise(seed: int, index: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """The noise that image `index` starts from, float32 `[C,H,W]` on the CPU."""
    return torch.from_numpy(random_stream(seed, index, START).standard_normal(shape, dtype=np.float32))


def step_generator(seed: int, index: int) -> torch.Generator:
    """The generator, on the CPU, of the noise that the steps add to image `index`.

    torch's takes 32 bits of a seed: counting from a place that `seed` chooses, no two images of a run get the same.
    """
    first = int(random_stream(seed, 0, STEPS).integers(2**32))
    return torch.Generator().manual_seed((first + index) % 2**32)


def image_label(seed: int, index: int, labels: list[int], class_balance: str) -> int:
    """The class of image `index`: `labels` in turn (`"balanced"`), or one of them drawn (`"random"`)."""
    if class_balance == "balanced":
        return labels[index % len(labels)]
    return labels[random_stream(seed, index, LABEL).integers(len(labels))]


# ----------------------------------------------------------------------------------------------------------------------
# Pipeline and sampler


def load_pipeline(name_or_path: str, revision: str | None, variant: str | None, cache_dir: str | None) -> VRPOPipeline:
    """A saved `VRPOPipeline`.

    Raises:
        InputError: when there is none, or its files cannot be loaded.
    """
    is_path = name_or_path.startswith((".", "/", "~"))
    if not Path(name_or_path).is_dir() and (is_path or Path(name_or_path).exists()):
        raise InputError(f"PIPELINE {name_or_path} is not a folder; pipelines/convert.py makes one of a checkpoint")
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision} goes with a Hub name; PIPELINE {name_or_path} is a folder")
        index = pipeline_index(name_or_path)
        if index is None:
            raise InputError(
                f"PIPELINE {name_or_path} has no model_index.json, so it is no pipeline; give a run's output folder, or "
                "what pipelines/convert.py makes of a checkpoint"
            )
        found = index.get("transformer", [None, "no transformer"])[1]
        if found != "SiTTransformer2DModel":
            raise InputError(
                f"PIPELINE {name_or_path} holds {found}, not a SiTTransformer2DModel; pipelines/convert.py converts DiT"
            )
    try:
        return VRPOPipeline.from_pretrained(name_or_path, revision=revision, variant=variant, cache_dir=cache_dir)
    except Exception as error:  # diffusers raises many types; all mean that it cannot be opened
        problem = hub_problem(error, name_or_path) or first_line(error)
        raise InputError(f"PIPELINE {name_or_path} cannot be opened: {problem}") from error


def make_scheduler(sampler: str, config, own: dict):
    """The scheduler of a `--sampler` for a transformer of this config.

    Args:
        sampler: one of `SAMPLERS[config.prediction_type]`.
        own: the options of the pipeline's own scheduler; its shift or its betas are kept.
    """
    if config.prediction_type == "velocity":
        shift = own.get("shift", own.get("flow_shift", 1.0))
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        return {
            "ode": lambda: FlowMatchEulerDiscreteScheduler(shift=shift),
            "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=shift),
            "dpmsolver++": lambda: DPMSolverMultistepScheduler(**flow),
            "unipc": lambda: UniPCMultistepScheduler(**flow),
            "sde": SiTSDEScheduler,
        }[sampler]()
    betas = {name: ddpm.SCHEDULER_CONFIG[name] for name in ("num_train_timesteps", "beta_start", "beta_end")}
    betas = {name: own.get(name, value) for name, value in betas.items()}
    betas |= {"beta_schedule": own.get("beta_schedule", "linear"), "trained_betas": own.get("trained_betas")}
    return {
        "ddim": lambda: DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing"),
        # DiT's spacing, from 999 to 0.
        "ddpm": lambda: DDPMScheduler(
            **betas,
            clip_sample=False,
            timestep_spacing="linspace",
            variance_type="learned_range" if config.learn_sigma else "fixed_small",
        ),
        "dpmsolver++": lambda: DPMSolverMultistepScheduler(**betas),
        "unipc": lambda: UniPCMultistepScheduler(**betas),
    }[sampler]()


def set_sampler(pipeline: VRPOPipeline, sampler: str, name: str):
    """Puts the scheduler of `--sampler` into the pipeline; `"default"` leaves its own.

    Raises:
        InputError: for a sampler that does not go with what the model predicts.
    """
    config = pipeline.transformer.config
    if sampler == "default":
        return
    if sampler not in SAMPLERS[config.prediction_type]:
        what = {"velocity": "velocities", "epsilon": "noise"}[config.prediction_type]
        raise InputError(
            f"--sampler {sampler} does not go with PIPELINE {name}, which predicts {what}; use "
            f"{', '.join(SAMPLERS[config.prediction_type])} or default"
        )
    pipeline.scheduler = make_scheduler(sampler, config, pipeline.scheduler_options)


def check_steps(pipeline: VRPOPipeline, num_inference_steps: int, option: str = "--num_inference_steps"):
    """Sets the timesteps and takes one step of nothing: its noise must come from the image's generator.

    Raises:
        InputError: for a number of steps that the scheduler does not take, or noise that it draws without the seed.
    """
    name = type(pipeline.scheduler).__name__
    try:
        pipeline.prepare_times(num_inference_steps, "cpu")
    except ValueError as error:
        raise InputError(f"{option} {num_inference_steps}: {first_line(error)}") from error
    scheduler = pipeline.scheduler
    if isinstance(scheduler, DDIMScheduler):
        # Its step goes down by this (diffusers issue 12633), whatever the next of its timesteps is.
        stride = scheduler.config.num_train_timesteps // num_inference_steps
        if (scheduler.timesteps[:-1] - scheduler.timesteps[1:] != stride).any():
            raise InputError(
                f"{option} {num_inference_steps}: diffusers' DDIM needs a divisor of "
                f"{scheduler.config.num_train_timesteps} (and timestep_spacing 'trailing' or 'leading'), else its steps miss "
                "its timesteps; sample.py --sampler dpmsolver++ takes any number"
            )
    channels = pipeline.transformer.config.in_channels
    x, prediction = torch.zeros(1, channels, 2, 2), torch.zeros(1, channels * (1 + pipeline.learned_variance), 2, 2)
    state = torch.get_rng_state()
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    generator = {"generator": [torch.Generator().manual_seed(0)]} if takes_generator else {}
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(prediction, scheduler.timesteps[0], x, **generator)
    if not torch.equal(torch.get_rng_state(), state):
        raise InputError(f"the pipeline's {name} draws noise that no seed fixes; choose another scheduler")


def checksum(pipeline: VRPOPipeline) -> int:
    """CRC-32 of weights and configs of transformer and autoencoder."""
    value = 0
    for model in filter(None, (pipeline.transformer, pipeline.vae)):
        config = json.dumps(public_config(model.config), sort_keys=True, default=str)
        value = zlib.crc32(f"{weights_checksum(model.state_dict().values())} {config}".encode(), value)
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def sampling_arguments(pipeline: VRPOPipeline, args: argparse.Namespace) -> dict:
    """What the pipeline's call gets for every batch alike.

    Raises:
        InputError: for options that this pipeline does not take.
    """
    config = pipeline.transformer.config
    channels = config.in_channels if args.guidance_channels == "all" else args.guidance_channels
    channels = channels or config.guidance_channels or config.in_channels
    scale = args.guidance_scale
    if scale is None:
        scale = 1.5 if pipeline.transformer.null_class_id is not None else 1.0
    ignored = {
        "guidance_interval": args.guidance_interval != [0.0, 1.0],
        "guidance_channels": args.guidance_channels is not None,
    }
    if scale == 1 and any(ignored.values()):
        name = next(name for name, given in ignored.items() if given)
        value = getattr(args, name)
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        raise InputError(f"--{name} {value} does nothing with guidance scale 1, which is off; leave it out")
    arguments = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": scale,
        "guidance_interval": tuple(args.guidance_interval),
        "guidance_channels": channels,
    }
    if pipeline.vae is None and config.in_channels not in (1, 3):
        raise InputError(
            f"PIPELINE {args.pipeline} has no autoencoder for its {config.in_channels}-channel latents; pipelines/convert.py "
            "puts one in with --vae"
        )
    if pipeline.vae is None and args.vae_dtype != "float32":
        raise InputError(f"--vae_dtype {args.vae_dtype}: PIPELINE {args.pipeline} has no autoencoder; leave it out")
    try:
        pipeline.check_inputs(num_images_per_label=1, **arguments, output_type="pt", tensor_inputs=())
    except ValueError as error:
        raise InputError(f"PIPELINE {args.pipeline}: {error}") from error
    return arguments


@torch.no_grad()
def sample_batch(pipeline: VRPOPipeline, indices: range, labels: list[int], seed: int, arguments: dict) -> np.ndarray:
    """Images `indices` of a run, of these classes: uint8 `[B,H,W,3]`, grey ones with three equal channels.

    Args:
        arguments: of the pipeline's call: steps and guidance.

    Raises:
        InputError: when an image is not finite.
    """
    config = pipeline.transformer.config
    size = config.sample_size
    shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    latents = pipeline(
        labels,
        latents=torch.stack([start_noise(seed, i, shape) for i in indices]),
        generator=[step_generator(seed, i) for i in indices],
        output_type="latent",
        **arguments,
    ).images
    images, finite = decoded_images(pipeline, latents)
    if not finite.all():
        raise InputError(
            f"image {indices[finite.tolist().index(False)]} is not finite; are the weights sound, and would --dtype bfloat16 or "
            "float32 do?"
        )
    return images.permute(0, 2, 3, 1).cpu().contiguous().numpy()


@torch.no_grad()
def decoded_images(pipeline: VRPOPipeline, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of latents, uint8 `[B,3,H,W]`, grey ones with three equal channels; which of them are finite, bool `[B]`."""
    # The autoencoder has a dtype of its own, under training's autocast too.
    with torch.autocast(latents.device.type, enabled=False):
        pixels = pipeline.decode_latents(latents)
    finite = latents.isfinite().flatten(1).all(1) & pixels.isfinite().flatten(1).all(1)
    images = pipeline.image_processor.postprocess(pixels.nan_to_num(), output_type="pt")
    return (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1), finite


def sample(args: argparse.Namespace):
    """Writes the samples that the options describe, on all processes.

    Raises:
        InputError: for options that cannot work, or a folder with something else.
    """
    state = start_processes()
    with state.main_process_first():
        pipeline = load_pipeline(args.pipeline, args.revision, args.variant, args.cache_dir)
    set_sampler(pipeline, args.sampler, args.pipeline)
    arguments = sampling_arguments(pipeline, args)
    check_steps(pipeline, args.num_inference_steps)
    given = args.labels or list(range(pipeline.transformer.config.num_classes))
    try:
        classes = pipeline.get_label_ids([c if str(c).lower() in pipeline.labels else as_id(c) for c in given])
    except ValueError as error:
        raise InputError(f"--labels: {error}") from error

    # 1. The folder: one process looks, all hear what is missing or wrong.
    manifest = build_manifest(pipeline, args, arguments, classes, state)
    folder = SampleFolder(args.output_dir, manifest)
    outcome = [None, None, None]
    if state.is_main_process:
        try:
            outcome = [None, *folder.prepare(args.overwrite)]
        except InputError as error:
            outcome = [str(error), None, None]
    problem, missing, differences = broadcast_object_list(outcome)
    if problem:
        raise InputError(problem)
    if state.is_main_process:
        if differences:
            logger.warning(f"continuing with other versions, so bytes may differ: {'; '.join(differences)}")
        if 0 < len(missing) < folder.num_batches:
            logger.info(f"continuing: {len(missing)} of {folder.num_batches} batches are missing")

    # 2. The missing batches, each whole, the last one too: what they hold depends on the batch size alone.
    pipeline.to(state.device)
    for model, dtype in ((pipeline.transformer, args.dtype), (pipeline.vae, args.vae_dtype)):
        if model is not None and model.dtype != getattr(torch, dtype):
            model.to(getattr(torch, dtype))
    if args.compile:
        pipeline.transformer.compile_repeated_blocks(dynamic=False)
    pipeline.set_progress_bar_config(disable=True)
    own = missing[state.process_index :: state.num_processes]
    progress = tqdm(
        total=sum(len(folder.indices(batch)) for batch in own), unit="image", disable=not state.is_main_process
    )
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress:
            pending = []
            for batch in own:
                indices = range(batch * args.batch_size, (batch + 1) * args.batch_size)
                labels = [image_label(args.seed, i, classes, args.class_balance) for i in indices]
                images = sample_batch(pipeline, indices, labels, args.seed, arguments)
                # Files are written while the next batch is computed.
                for file in pending:
                    file.result()
                pending = folder.write(batch, images, pool)
                progress.update(len(folder.indices(batch)))
            for file in pending:
                file.result()
    except OSError as error:
        raise cannot_write(folder.folder, error) from error

    # 3. What all of them make together.
    state.wait_for_everyone()
    if state.is_main_process:
        folder.finish()
        logger.info(f"{args.num_images} images are in {args.output_dir}")
    state.wait_for_everyone()


def build_manifest(pipeline, args, arguments: dict, classes: list[int], state: PartialState) -> dict:
    """What the images depend on, with the label of each, as JSON."""
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type
    # Some kernels divide their sums by threads, and round accordingly.
    threads = f", {torch.get_num_threads()} thread(s)" if state.device.type == "cpu" else ""
    manifest = {
        "pipeline": args.pipeline,
        "pipeline_checksum": checksum(pipeline),
        "options": {
            "num_images": args.num_images,
            "label_ids": classes if args.labels else "all",
            "class_balance": args.class_balance,
            "seed": args.seed,
            "sampler": args.sampler,
            "scheduler": {"class": type(pipeline.scheduler).__name__, **pipeline.scheduler_options},
            **arguments,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "vae_dtype": args.vae_dtype if pipeline.vae is not None else None,
            "compile": args.compile,
            "output_format": args.output_format,
        },
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "accelerate": accelerate.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "device": device + threads,
        },
        "labels": [image_label(args.seed, i, classes, args.class_balance) for i in range(args.num_images)],
    }
    return json.loads(json.dumps(manifest, default=str))  # as it is read back: lists, not tuples


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def channels(text: str) -> int | str:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of channels nor `all`")
    return text if text == "all" else int(text)


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(
        prog=prog,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36, width=118),
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder or Hub name of a saved VRPOPipeline")
    g = parser.add_argument_group("what is sampled")
    g.add_argument("--num_images", type=int, required=True, help="images in all")
    g.add_argument("--labels", nargs="+", metavar="LABEL", help="class names or ids; all classes when not given")
    g.add_argument(
        "--class_balance",
        choices=["balanced", "random"],
        default="balanced",
        help="image i has the label i mod their number, or one drawn from them",
    )
    g.add_argument("--seed", type=int, default=0, help="of noise and drawn labels")
    g = parser.add_argument_group("how")
    names = list(dict.fromkeys(("default", *SAMPLERS["velocity"], *SAMPLERS["epsilon"])))
    g.add_argument(
        "--sampler",
        choices=names,
        default="default",
        help="the pipeline's own scheduler; ode (Euler), heun, sde for velocities; ddim, ddpm for noise; "
        "dpmsolver++, unipc for both",
    )
    g.add_argument("--num_inference_steps", type=int, default=50, help="of the sampler")
    g.add_argument("--guidance_scale", type=float, help="1 is off (default: 1.5; 1 for a model without a null class)")
    g.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.0, 1.0],
        help="guide where LOW <= t <= HIGH; t = 1 is noise",
    )
    g.add_argument(
        "--guidance_channels",
        type=channels,
        metavar="N",
        help="guide the first N channels (SiT, DiT: 3) or `all` (REPA); as the model's config says when not given",
    )
    g = parser.add_argument_group("computation")
    g.add_argument("--batch_size", type=int, default=32, help="images computed together by a process")
    g.add_argument("--dtype", choices=DTYPES, default="float32", help="of the transformer; latents are float32")
    g.add_argument("--vae_dtype", choices=DTYPES, default="float32", help="of the autoencoder")
    g.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    g = parser.add_argument_group("files")
    g.add_argument("--output_dir", required=True, metavar="DIR", help="new, empty, or of a run that was stopped")
    g.add_argument(
        "--output_format", choices=["png", "npz", "both"], default="png", help="000000.png ..., samples.npz (ADM's)"
    )
    g.add_argument("--overwrite", action="store_true", help="remove the samples in DIR first")
    g.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub repository")
    g.add_argument("--variant", metavar="NAME", help="of the weights' files, such as fp16")
    g.add_argument("--cache_dir", metavar="DIR", help="where downloads go")
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "sample.py") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    check_ranges(parser, args, "num_images num_inference_steps batch_size", "seed guidance_scale", "", "")
    if args.seed >= 2**63:
        parser.error(f"--seed {args.seed} must be below 2^63")
    low, high = args.guidance_interval
    if not 0 <= low <= high <= 1:
        parser.error(f"--guidance_interval {low} {high} must be LOW HIGH with 0 <= LOW <= HIGH <= 1 (t = 1 is noise)")
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        parser.error(f"--guidance_scale {args.guidance_scale} must be finite")
    if args.guidance_channels not in (None, "all") and args.guidance_channels < 1:
        parser.error(f"--guidance_channels {args.guidance_channels} must be at least 1, or `all`")
    return args


def main(argv: list[str] | None = None, prog: str = "sample.py"):
    """The command; `prog` is what its errors call it."""
    args = parse_args(argv, prog)
    try:
        sample(args)
    except InputError as error:
        sys.exit(f"{prog}: error: {error}")
