# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Compute what a training run will need: parameters, memory, disk, FLOPs and hours. Nothing is downloaded or trained.

    vrpo plan --preset SiT-XL/2 --resolution 256 --vae stabilityai/sd-vae-ft-ema --encoder facebook/dinov2-base \
        --mixed_precision bf16 --train_batch_size 64 --num_images 500

The options are those of `vrpo train`, including --config. Memory is counted by running a step of the real model and
objective on tensors without content; docs/speed.md says what the count does not include.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from huggingface_hub import try_to_load_from_cache
from torch._subclasses.fake_tensor import FakeTensorMode

from ..alignment.attach import AlignedTransformer, alignment_layers
from ..alignment.encoders import encoder_without_weights
from ..alignment.start import scaffold_layer
from ..alignment.whitening import WhitenedEncoder, Whitening, without_whitening
from ..command_line import given_options, number_in, one_line_errors, training_parser
from ..config import NUM_IMAGES, In, VRPOConfig, is_embedded_dataset, options_of, whitened_dims
from ..data.latent_cache import array_layout
from ..data.sources import TrainingData, load_training_data
from ..errors import InputError, first_line
from ..models.autoencoder import ON_A_GPU, check_class, encode_images, encoding_in, latent_layout
from ..models.start import (
    Start,
    build_transformer,
    choose_prediction,
    load_start,
    public_config,
    transformer_config,
)
from ..models.transformer_sit import SIT_PRESETS, read_config
from ..models.vision import layers_of_encoders
from ..training.length import length_of_run
from ..training.memory import HALF, Timeline, encoding_timeline, training_timeline
from ..training.output_dir import writing_result
from ..training.recomputation import recompute
from ..training.setup import trainable_parameters
from ..training.throughput import counted_flops, peak_flops, recomputed_flops, step_flops


# The options that the short help shows.
COMMON = (
    *("config", "dataset_name", "latents_dir", "resolution", "preset", "pretrained_model_name_or_path", "vae"),
    *("objective", "encoder", "mixed_precision", "train_batch_size", "max_train_steps", "num_train_epochs"),
    *("num_images", "num_processes", "gpus", "json"),
)
# The name of a device, as `torch.cuda.get_device_name` returns it, and its memory in MiB, as nvidia-smi shows it.
GPUS = {
    "RTX-4090-24GB": ("NVIDIA GeForce RTX 4090", 24_564),
    "A100-40GB": ("NVIDIA A100-SXM4-40GB", 40_960),
    "A100-80GB": ("NVIDIA A100-SXM4-80GB", 81_920),
    "H100-80GB": ("NVIDIA H100 80GB HBM3", 81_559),
    "H200-141GB": ("NVIDIA H200", 143_771),
}
# Shapes of usual autoencoders, for machines that do not have their config.json.
STABLE_DIFFUSION = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
AUTOENCODERS = {
    "stabilityai/sd-vae-ft-ema": STABLE_DIFFUSION,
    "stabilityai/sd-vae-ft-mse": STABLE_DIFFUSION,
    "stabilityai/sdxl-vae": STABLE_DIFFUSION,
}
FLOAT32 = 4  # bytes of each weight, gradient, moment and averaged weight


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a training, without weights


def open_local_data(args: VRPOConfig) -> TrainingData | None:
    """The data of a training run if they are on this machine; None if they are not, or if no option names data.

    A latent cache that is not on this machine is planned with the latents of `vae` and with images for the encoders.
    """
    is_local = is_embedded_dataset(args.dataset_name) or Path(args.dataset_name or "").is_dir()
    if (
        (args.latents_dir and Path(args.latents_dir).is_dir())
        or args.train_data_dir
        or (args.dataset_name and is_local)
    ):
        return load_training_data(args)
    return None


def planned_start(args: VRPOConfig) -> Start:
    """The arguments of the transformer: from the preset, from `model_config`, or from a local folder of weights.

    Raises:
        InputError: if the size of the starting weights is not known without reading them.
    """
    name = args.pretrained_model_name_or_path
    if name is None or args.preset:
        config = transformer_config(args.preset, args.model_config)
    else:
        files = [Path(name, *part, "config.json") for part in ((), ("transformer",))]
        found = [file for file in files if file.is_file()]
        if not found:
            raise InputError(
                "preset",
                f"`preset` is missing, and the size of `pretrained_model_name_or_path` {name} is not known without reading it; "
                f"give its `preset`, too, such as {SIT_PRESETS[-3]}, or the folder that `vrpo convert` makes of it",
            )
        try:
            config = public_config(read_config(found[0]))
        except ValueError as error:
            raise InputError("pretrained_model_name_or_path", f"`pretrained_model_name_or_path`: {error}") from error
    choose_prediction(config, args.prediction_type, args.learn_sigma, name)
    config.setdefault("patch_size", 2)
    return Start(config)


def autoencoder_without_weights(name: str, cache_dir: str | None) -> torch.nn.Module:
    """Builds the autoencoder that `load_vae` would load, with random weights and without a download.

    Raises:
        InputError: if its shape is not known without a download.
    """
    for file in ("config.json", "vae/config.json"):
        found = Path(name, file) if Path(name).is_dir() else try_to_load_from_cache(name, file, cache_dir=cache_dir)
        if isinstance(found, str | Path) and Path(found).is_file():
            try:
                config = read_config(Path(found))
                check_class(str(config.get("_class_name")), name)
                return getattr(diffusers, config["_class_name"]).from_config(config).eval().requires_grad_(False)
            except (ValueError, TypeError) as error:
                raise InputError("vae", f"`vae` {name}: {first_line(error)}") from error
    if name not in AUTOENCODERS:
        raise InputError(
            "vae",
            f"the size of `vae` {name} is not known without a download; give its folder, or one of {', '.join(AUTOENCODERS)}",
        )
    return AutoencoderKL(**AUTOENCODERS[name]).eval().requires_grad_(False)


class FeaturesOfCache:
    """Stands for an encoder whose features are in a latent cache."""

    def __init__(self, cached):
        self.embed_dim, self.grid_size = cached.embed_dim, cached.grid_size

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), math.prod(self.grid_size), self.embed_dim)


def planned_encoders(args: VRPOConfig, data: TrainingData | None, grid_size: tuple[int, int]) -> list:
    """The encoders to align with, on fake tensors; called under `FakeTensorMode`."""
    if args.objective == "none":
        return []
    layers = layers_of_encoders(args.encoder, args.encoder_layer)
    dtype = HALF.get(args.mixed_precision, torch.float32)
    encoders = [FeaturesOfCache(cached) for cached in (data.features(args.encoder, layers, grid_size) if data else [])]
    if not encoders:
        shapes = zip(args.encoder, layers)
        encoders = [encoder_without_weights(name, grid_size, layer, dtype, args.cache_dir) for name, layer in shapes]
        for encoder in encoders:
            make_fake(encoder)
    dims = whitened_dims(args.target_norm)
    if dims is None:
        return encoders
    return [WhitenedEncoder(e, Whitening(torch.zeros(e.embed_dim), torch.zeros(e.embed_dim, dims))) for e in encoders]


def planned_model(
    args: VRPOConfig, start: Start, latent_shape: tuple[int, int, int], num_classes: int, encoders: list
) -> AlignedTransformer:
    """The aligned transformer of a run, with its adapters, on the meta device."""
    with torch.device("meta"):
        transformer, difference = build_transformer(args, start, latent_shape, num_classes, None)
        depth = len(transformer.transformer_blocks)
        layers = alignment_layers(args.layer_scope, depth) if encoders and args.objective != "repi" else []
        scaffolded = scaffold_layer(args, depth)
        aligned = AlignedTransformer(
            transformer, layers, encoders, args.projector, args.projector_dim, scaffold_layer=scaffolded
        )
        load_start(transformer, args, start, difference)
    return aligned.train()


def make_fake(module: torch.nn.Module):
    """Replaces a module's weights and buffers by fake tensors on the CPU; called under `FakeTensorMode`."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            blank = torch.empty(weight.shape, dtype=weight.dtype)
            setattr(part, name, torch.nn.Parameter(blank, requires_grad=weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# What is computed


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def size_of(module: torch.nn.Module) -> int:
    """The bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def disk_bytes(args: VRPOConfig, latent_shape: tuple, has_posterior: bool, encoders: list) -> tuple[int, int]:
    """The bytes of an image in a latent cache of `vrpo prepare`: of its latents, and of all encoders' features."""
    encoders = [without_whitening(encoder) for encoder in encoders]
    features = [{"grid": encoder.grid_size, "dim": encoder.embed_dim} for encoder in encoders]
    layout = array_layout(
        {
            "latent_shape": latent_shape,
            "kind": "moments" if has_posterior else "latents",
            "flip": args.random_flip,
            "images": "none",
            "features": features,
        }
    )
    sizes = {name: math.prod(row) * int(dtype[-1]) * copies for name, (dtype, row, copies) in layout.items()}
    return sizes["latents"], sum(size for name, size in sizes.items() if name.startswith("features"))


@dataclass
class CountedStep:
    """What a training step needs, counted on tensors without content.

    Attributes:
        aligned, vae: model and autoencoder, on fake tensors; `vae` is None for a model of pixels.
        latent_shape (`tuple`): channels, height and width.
        tokens (`int`): N, the number of tokens of an image.
        timelines (`dict[str, Timeline]`): memory of a micro-step without (`plain`) and with `gradient_checkpointing`, which
            recomputes whole blocks if the option is not given.
        encoding (`Timeline`, *optional*): memory of the autoencoder, if images are encoded in training.
        flops (`float`): FLOPs per image of training, with the encoders.
        recomputed (`float`): FLOPs per image that `gradient_checkpointing` recomputes in the backward pass.
        vae_flops (`float`): FLOPs per image of the autoencoder.
        disk (`tuple[int, int]`): bytes of an image's latents and of its features in a latent cache.
    """

    aligned: AlignedTransformer
    vae: torch.nn.Module | None
    latent_shape: tuple[int, int, int]
    tokens: int
    timelines: dict[str, Timeline]
    encoding: Timeline | None
    flops: float
    recomputed: float
    vae_flops: float
    disk: tuple[int, int]

    def peak(self, name: str, images: int) -> int:
        """The largest number of bytes that a micro-step holds, including the encoding of its images."""
        encoded = 0 if self.encoding is None else self.encoding.peak(min(images, ON_A_GPU))
        return max(self.timelines[name].peak(images), encoded)

    def most_images(self, name: str, memory: float) -> int:
        """The largest number of images in a micro-step that stays within `memory` bytes."""
        images = self.timelines[name].most_images(memory)
        if self.encoding is None or self.encoding.peak(min(images, ON_A_GPU)) <= memory:
            return images
        return min(images, self.encoding.most_images(memory))


def count_step(args: VRPOConfig, data: TrainingData | None, start: Start, num_classes: int) -> CountedStep:
    """Builds all parts of a training run without weights, and counts what a step needs."""
    vae_name = args.vae or (None if data is None else data.vae) or "none"
    from_images, patch_size = args.latents_dir is None, start.config["patch_size"]

    # Shapes first, on the meta device.
    with init_empty_weights():
        vae = None if vae_name == "none" else autoencoder_without_weights(vae_name, args.cache_dir)
    latent_shape, has_posterior = latent_layout(vae, args.resolution, patch_size)
    grid_size = tuple(side // patch_size for side in latent_shape[1:])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        encoders = planned_encoders(args, data, grid_size)
    aligned = planned_model(args, start, latent_shape, num_classes, encoders)

    # Then the work of a step.
    with fake:
        make_fake(aligned)
        with_pixels = from_images or not all(isinstance(without_whitening(e), FeaturesOfCache) for e in encoders)
        timelines = {"plain": training_timeline(args, aligned, latent_shape, with_pixels)}
        recompute(aligned.transformer, args.gradient_checkpointing or "full")
        timelines["gradient_checkpointing"] = training_timeline(args, aligned, latent_shape, with_pixels)
        flops = step_flops(aligned, tokens=math.prod(grid_size))[1]
        encoding, vae_flops = None, 0
        if vae is not None:
            make_fake(vae)
        if vae is not None and from_images:
            encoding = encoding_timeline(encoding_in(vae, args.vae_dtype), args.resolution)
            pixels = torch.zeros(1, 3, args.resolution, args.resolution)
            vae_flops = counted_flops(lambda: encode_images(vae, pixels))
    recomputed = recomputed_flops(aligned.transformer.config, args.gradient_checkpointing, math.prod(grid_size))
    disk = disk_bytes(args, latent_shape, has_posterior, encoders)
    tokens = math.prod(grid_size)
    return CountedStep(aligned, vae, latent_shape, tokens, timelines, encoding, flops, recomputed, vae_flops, disk)


def plan(
    args: VRPOConfig,
    num_images: int | None = None,
    num_processes: int = 1,
    gpus: list[str] | None = None,
    mfu: float = 0.4,
    memory_reserve: float = 0.1,
) -> dict:
    """Computes parameters, bytes, FLOPs and hours of a training run.

    Args:
        args: the options of the run. Data, autoencoder and encoders are read only if they are on this machine.
        num_images: the number of training images; by default that of the data, if they are on this machine.
        num_processes: the number of GPUs, each of which holds all weights (DDP).
        gpus: names of entries of `GPUS`; all by default.
        mfu: the share of a GPU's peak FLOP/s that training is assumed to reach, in (0, 1].
        memory_reserve: the share of a GPU's memory that is kept free for the CUDA context, workspaces and fragmentation.

    Returns:
        numbers by name, as `--json` writes them.

    Raises:
        InputError: if the size of a part cannot be known, or options contradict each other.
    """
    check_planned(args)
    data = open_local_data(args)
    num_images = num_images or (None if data is None else len(data))
    if args.num_train_epochs and num_images is None:
        raise InputError(
            "num_images", "`num_train_epochs` needs `num_images`, because the data are not on this machine"
        )
    start = planned_start(args)
    num_classes = start.config.get("num_classes", 1000) if data is None else data.num_classes
    step = count_step(args, data, start, num_classes)
    found = sizes(args, step, num_processes)

    # Memory. The timelines already include the gradients.
    held = sum(found["bytes"].values()) - found["bytes"]["gradients"]
    chosen = {name: GPUS[name] for name in gpus or GPUS}
    found["activations"] = {name: timeline.saved[1] for name, timeline in step.timelines.items()}
    found["peak_bytes"] = {name: held + step.peak(name, args.train_batch_size) for name in step.timelines}
    found["largest_batch"] = {}
    for gpu, (_, mib) in chosen.items():
        memory = (1 - memory_reserve) * mib * 2**20 - held
        found["largest_batch"][gpu] = {name: step.most_images(name, memory) for name in step.timelines}
    found["disk_bytes_per_image"] = dict(zip(("latents", "features"), step.disk))
    # A checkpoint has the trained weights, two moments, and the averaged weights.
    found["checkpoint_bytes"] = FLOAT32 * (3 * found["parameters"]["trained"] + found["parameters"]["average"])

    # Time, for all images that the steps process.
    global_batch_size = args.train_batch_size * num_processes * args.gradient_accumulation_steps
    steps = length_of_run(args, num_images, global_batch_size)
    images = steps * global_batch_size
    dtype, hours = HALF.get(args.mixed_precision, torch.float32), {}
    for gpu, (device, _) in chosen.items():
        seconds = (step.flops + step.recomputed) / peak_flops(device, dtype, args.allow_tf32 is not False)
        # In float32 the convolutions of the autoencoder are TF32 products by default.
        seconds += step.vae_flops / peak_flops(device, getattr(torch, args.vae_dtype), tf32=True)
        hours[gpu] = images * seconds / mfu / num_processes / 3600
    found["flops_per_image"] = {
        "training": step.flops,
        "recomputed": step.recomputed,
        "autoencoder": step.vae_flops,
    }
    found["run"] = {
        "max_train_steps": steps,
        "global_batch_size": global_batch_size,
        "images": images,
        "num_images": num_images,
        "epochs": None if num_images is None else images / args.policy_epochs / num_images,
        "hours": hours,
    }
    found["assumed"] = {"mfu": mfu, "memory_reserve": memory_reserve, "num_processes": num_processes}
    config = step.aligned.transformer.config
    found["model"] = {
        "tokens": step.tokens,
        "width": config.num_attention_heads * config.attention_head_dim,
        "blocks": config.num_layers,
        "latent_shape": list(step.latent_shape),
        "num_classes": num_classes,
    }
    return found


def check_planned(args: VRPOConfig):
    """Checks that the options name what a plan needs.

    Raises:
        InputError: if an option is missing.
    """
    here = args.latents_dir is not None and Path(args.latents_dir).is_dir()  # a cache names its autoencoder
    if args.vae is None and not here:
        raise InputError("vae", "give `vae`, such as stabilityai/sd-vae-ft-ema, or `vae` none to train on pixels")
    if args.lora_rank and not args.pretrained_model_name_or_path:
        raise InputError(
            "lora_rank",
            f"`lora_rank` {args.lora_rank} adapts trained weights and needs `pretrained_model_name_or_path`",
        )
    if args.objective != "none" and not args.encoder:
        raise InputError("encoder", f"`objective` {args.objective} needs `encoder`, such as facebook/dinov2-base")


def sizes(args: VRPOConfig, step: CountedStep, num_processes: int) -> dict:
    """The parameters of each part, and the bytes that are held in every step."""
    aligned, vae = step.aligned, step.vae
    trained = count(trainable_parameters(aligned))
    transformer, projectors = count(aligned.transformer.parameters()), count(aligned.projectors.parameters())
    scaffold = 0 if aligned.scaffold is None else count(aligned.scaffold.parameters())
    encoders = [without_whitening(encoder) for encoder in aligned.encoders]
    encoders = [encoder for encoder in encoders if isinstance(encoder, torch.nn.Module)]
    weights = transformer + projectors + scaffold
    return {
        "parameters": {
            "transformer": transformer,
            "projectors": projectors,
            "scaffold": scaffold,
            "trained": trained,
            "average": trained if args.use_ema else 0,
            "encoders": sum(count(encoder.parameters()) for encoder in encoders),
            "autoencoder": 0 if vae is None else count(vae.parameters()),
        },
        "bytes": {
            "weights": FLOAT32 * weights,
            # With DDP, gradients are views of its buckets, which exist all the time.
            "gradients": FLOAT32 * trained if num_processes == 1 else 0,
            "moments": 2 * FLOAT32 * trained,
            "average": FLOAT32 * trained if args.use_ema else 0,
            "gradient_buckets": FLOAT32 * trained if num_processes > 1 else 0,
            "reference_model": FLOAT32 * weights if args.kl_coeff else 0,
            "encoders": sum(size_of(encoder) for encoder in encoders),
            "autoencoder": 0 if vae is None else size_of(vae),
        },
    }


# ----------------------------------------------------------------------------------------------------------------------
# The table


def section(title: str, unit: str, values: dict[str, float], scale: float) -> list[str]:
    """The lines of a group of numbers; numbers that are 0 are omitted."""
    lines = [f"{title:<46}{unit:>12}"]
    lines += [f"  {name.replace('_', ' '):<44}{value / scale:>12,.2f}" for name, value in values.items() if value]
    return [*lines, ""]


def table(args: VRPOConfig, found: dict) -> str:
    """The plan as text."""
    model, run, assumed = found["model"], found["run"], found["assumed"]
    precision = args.mixed_precision if args.mixed_precision in HALF else "float32"
    images = run["num_images"] or 1000
    disk = {name: images * size for name, size in found["disk_bytes_per_image"].items()}
    epochs = "" if run["epochs"] is None else f" = {run['epochs']:,.1f} epochs of {images:,} images"
    lines = [
        f"{model['blocks']} blocks of width {model['width']}, {model['tokens']} tokens of latents "
        f"{'x'.join(map(str, model['latent_shape']))}, {model['num_classes']} classes; objective {args.objective}, {precision}",
        "",
        *section("parameters", "millions", found["parameters"], 1e6),
        *section("memory that each GPU always holds", "GiB", found["bytes"], 2**30),
        *section("saved for the backward pass, for each image", "MiB", found["activations"], 2**20),
        *section(f"peak with batch {args.train_batch_size} on each GPU", "GiB", found["peak_bytes"], 2**30),
        f"{'':<18}{'largest batch':>16}{'with checkpointing':>22}{'hours':>12}",
    ]
    for gpu, batches in found["largest_batch"].items():
        numbers = f"{batches['plain']:>16,}{batches['gradient_checkpointing']:>22,}{run['hours'][gpu]:>12.3g}"
        lines.append(f"  {gpu:<16}{numbers}")
    gpus = assumed["num_processes"]
    lines += [
        "",
        f"The largest batch leaves {assumed['memory_reserve']:.0%} of the memory free. Hours are for "
        f"{gpus} GPU{'s' * (gpus > 1)}, assuming",
        f"{assumed['mfu']:.0%} of the peak FLOP/s in {precision} (--mfu).",
        "",
        *section(f"disk, for {images:,} images", "GB", disk | {"a checkpoint": found["checkpoint_bytes"]}, 1e9),
        *section("a training step, for each image", "GFLOPs", found["flops_per_image"], 1e9),
        f"{run['max_train_steps']:,} steps of {run['global_batch_size']:,} images{epochs}: {run['images']:,} images seen",
    ]
    return "\n".join(lines)


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = training_parser(COMMON, prog=prog, description=__doc__)
    group = parser.add_argument_group("plan")
    missing = argparse.SUPPRESS
    group.add_argument(
        "--num_images",
        type=number_in(NUM_IMAGES),
        default=missing,
        help="number of training images; if not given, that of the data set if it is on this machine",
    )
    group.add_argument(
        "--num_processes",
        type=number_in(In(1, most=100_000)),
        default=missing,
        help="number of GPUs that train together, each with all weights (default: 1)",
    )
    group.add_argument(
        "--gpu",
        nargs="+",
        choices=[*GPUS],
        dest="gpus",
        default=missing,
        help="GPUs to show in the table; all if not given",
    )
    group.add_argument(
        "--mfu",
        type=number_in(In(0, exclusive=True, most=1), float),
        default=missing,
        help="share of the peak FLOP/s that training is assumed to reach (default: 0.4)",
    )
    group.add_argument(
        "--memory_reserve",
        type=number_in(In(0, 1), float),
        default=missing,
        help="share of a GPU's memory to keep free for the CUDA context, workspaces and fragmentation (default: 0.1)",
    )
    group.add_argument("--json", metavar="FILE", default=missing, help="also write all numbers to this file, as JSON")
    return parser


def main(argv: list[str] | None = None, prog: str = "vrpo plan"):
    """Runs the command; `prog` is its name in errors."""
    parser = build_parser(prog)
    given = given_options(parser, argv)
    file = given.pop("json", None)
    of_plan = {name: value for name, value in given.items() if name not in options_of(VRPOConfig)}
    with one_line_errors(parser):
        args = VRPOConfig(**{name: value for name, value in given.items() if name not in of_plan})
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise InputError("json", f"the folder of `json` {file} does not exist; create it, or choose another")
        found = plan(args, **of_plan)
        print(table(args, found))
        if file is not None:
            with writing_result("json", file):
                Path(file).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
