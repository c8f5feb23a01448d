#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Run the official code of REPA and SiT in turn with this package's, with the same sizes, batches and weights.

    python benchmarks/official.py --repa REPA --sit SiT --threads 1 --clock cpu
    python benchmarks/official.py --repa REPA --what training --batch_size 4 --threads 1 --clock cpu
    python benchmarks/official.py --repa REPA --what training --operators --threads 1 --clock cpu --repeats 3
    python benchmarks/official.py --repa REPA --sit SiT --device cuda --json official.json

REPA and SiT are folders with clones of the two repositories (sihyun-yu/REPA and willisma/SiT on GitHub), of which this
repository contains nothing. REPA's model needs timm, and SiT's samplers need torchdiffeq. torchvision, which timm imports but a
step does not use, is replaced by placeholders if it cannot be imported.

Training: REPA's step is the body of the training loop in its `train.py`, compiled from the file as it stands (posterior,
label dropout, its loss, backward, clipping, AdamW, its average, and the losses that it reads), without the statements that
save, draw samples and end the loop. Ours is `VRPOTrainer.train_step` with `--objective repa` and `vrpo`. On both sides the
encoder's features are given as random unit vectors, because an encoder would cost both the same and hide the difference. The
three models start from the same weights.

Sampling: REPA's `euler_sampler` (Euler and Heun) and `euler_maruyama_sampler`, and SiT's `transport` samplers, are compared with
`VRPOPipeline` up to the latents, guided at every step. Ratios are of the time per row that the network evaluates, which is
counted on both sides: SiT's SDE evaluates the network twice per step, and its Heun once more at the end. REPA's model runs its
projectors when it samples; `repa, no projectors` is the same code built without them, which is the stricter comparison. Samples
of equal solvers from equal noise are compared, and their largest difference is printed.

On a CPU, arms take turns within a round, in a new order in each round. Ratios are medians over rounds of the ratio within a
round, and intervals are 95 % bootstrap intervals over rounds. `--operators` then runs each arm again and prints the processor time
of every operator, which shows how much of a step are matrix products. On a GPU (`--device cuda`) every arm runs alone, so that its
memory can be measured: training of all presets, eager and with compiled blocks on both sides, in bfloat16 autocast, with images/s,
MFU and peak memory; sampling with TF32, and ours also in bfloat16 with compiled blocks, in 50 and 250 steps. A batch that does not
fit is halved.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import random
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
from accelerate import Accelerator
from objective_overhead import (
    MIXED_PRECISION,
    NUM_CLASSES,
    GivenTargets,
    build_trainer,
    draw_batch,
    hardware_name,
    median_ratio,
    train_step,
)
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline, sit_preset
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.official_checkpoints import SavedProjectors, default_scheduler, export_checkpoint
from diffusers_vrpo.pipelines.sampling import set_sampler, step_generator
from diffusers_vrpo.training.throughput import peak_flops


GPU_PRESETS = ("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2")
SAMPLERS = {"euler": "ode", "heun": "heun", "sde": "sde"}  # and their names in `vrpo sample`
LATENT_SCALE = 0.18215
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
AT_MOST = {"training": 0.9, "sampling": 0.95}  # largest accepted ratio of our time to the official one


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repa", type=Path, metavar="PATH", help="a clone of REPA's repository")
    parser.add_argument("--sit", type=Path, metavar="PATH", help="a clone of SiT's repository")
    parser.add_argument(
        "--what", nargs="+", choices=AT_MOST, default=list(AT_MOST), help="what to measure (default: both)"
    )
    parser.add_argument(
        "--presets", nargs="+", help="sizes of the model (default: SiT-S/2 on the CPU, S, B, L and XL on a GPU)"
    )
    parser.add_argument("--latent_size", type=int, default=32, help="side of the four-channel latents (default: 32)")
    parser.add_argument("--embed_dim", type=int, default=768, help="width of the encoder's features (default: 768)")
    parser.add_argument(
        "--projector_dim", type=int, default=2048, help="hidden width of the projectors (default: 2048)"
    )
    parser.add_argument(
        "--batch_size", type=int, help="images in a training batch (default: 256 on a GPU, 2 on the CPU)"
    )
    parser.add_argument(
        "--sampling_batch_size", type=int, help="images that are sampled together (default: 64 on a GPU, 1 on the CPU)"
    )
    parser.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="samplers to measure (default: all)"
    )
    parser.add_argument(
        "--num_inference_steps", type=int, nargs="+", help="solver steps (default: 50 and 250 on a GPU, 10 on the CPU)"
    )
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="guidance scale (default: 1.5)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds or steps that count (default: 9)")
    parser.add_argument(
        "--warmup", type=int, default=1, help="rounds or steps before those that count, at least 1 (default: 1)"
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="device to measure (default: cuda if a GPU is available, otherwise cpu)",
    )
    parser.add_argument(
        "--peak_tflops", type=float, help="peak TFLOP/s of the device, for MFU; looked up for known GPUs"
    )
    parser.add_argument(
        "--threads", type=int, help="CPU threads; 1 gives steadier times on a busy machine (default: torch's)"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="measure wall time or, with cpu, processor time of the process (default: wall)",
    )
    parser.add_argument(
        "--operators", action="store_true", help="also print the processor time of each operator, on a CPU"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and the order of the arms")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the numbers, with all times, to this file"
    )
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# The official code


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes a package that is not installed importable, with modules whose attributes do nothing."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] == self.package:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__version__ = "0.0.0"
        module.__getattr__ = lambda name: _placeholder(name)
        return module

    def exec_module(self, module):
        """Does nothing, because `create_module` has made everything."""


def _placeholder(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)


def replace_if_missing(package: str):
    """Lets `import package` succeed if the package is not installed or cannot be imported."""
    try:
        importlib.import_module(package)
    except Exception:  # an installed one may fail in many ways, such as against another torch
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.meta_path.insert(0, Placeholders(package))


@contextlib.contextmanager
def importing_from(folder: Path):
    """Imports modules from a repository's folder inside the block; afterwards their names (`models`, `utils`) are free again."""
    sys.path.insert(0, str(folder))
    before = set(sys.modules)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            # A folder without `__init__.py`, such as REPA's `models`, has paths and no file.
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
            if any(place and Path(place).resolve().is_relative_to(folder.resolve()) for place in places):
                del sys.modules[name]


def load_official(folder: Path, option: str, names: Iterable[str]) -> list[types.ModuleType]:
    """Imports modules of a repository.

    Raises:
        InputError: if the folder does not have them, or a package that they import is not installed.
    """
    replace_if_missing("torchvision")
    with importing_from(folder):
        try:
            return [importlib.import_module(name) for name in names]
        except ImportError as error:
            raise InputError(
                option,
                f"`{option}` {folder}: {error}; it must be a clone of the repository, with what its code imports",
            ) from error


def training_step(folder: Path, names: dict) -> Callable[[tuple], None]:
    """Compiles the body of the loop over the data loader in `train.py` to a function of a batch of the loader.

    Args:
        folder: the folder of REPA's repository.
        names: the local variables of `main` that the body uses, such as `model` and `optimizer`.

    Raises:
        InputError: if the file has no such loop.
    """
    tree = ast.parse((folder / "train.py").read_text(encoding="utf-8"))
    main = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"), None)
    loops = [
        node
        for node in (ast.walk(main) if main else ())
        if isinstance(node, ast.For) and "dataloader" in ast.unparse(node.iter)
    ]
    if len(loops) != 1:
        raise InputError("repa", f"`repa` {folder}: train.py has no single loop over its data loader in `main`")

    # Imports may fail for packages that the step does not use, such as wandb. `main` itself is not run.
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node is not main]
    namespace: dict = {}
    with importing_from(folder):
        for node in imports:
            with contextlib.suppress(ImportError):
                exec(compile(ast.Module([node], []), "train.py", "exec"), namespace)
    exec(compile(ast.Module(functions, []), "train.py", "exec"), namespace)
    namespace |= names

    # A `break` ends the run; outside its loop it would not compile.
    body = [node for node in loops[0].body if not any(isinstance(part, ast.Break) for part in ast.walk(node))]
    code = compile(ast.Module(body, []), "train.py", "exec")
    targets = [part.id for part in loops[0].target.elts]

    def step(batch: tuple):
        namespace.update(zip(targets, batch, strict=True))
        exec(code, namespace)

    step.namespace = namespace
    return step


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_ours(settings, preset: str, objective: str, compiled: bool) -> SimpleNamespace:
    """Builds our trainer. Layers that are initialised with zeros get random weights, so that the whole network has an effect."""
    shapes = SimpleNamespace(
        preset=preset,
        projector_dim=settings.projector_dim,
        latent_size=settings.latent_size,
        seed=settings.seed,
        dtype=settings.dtype,
    )
    trainer = build_trainer(objective, shapes, GivenTargets(settings.embed_dim), compiled)
    return SimpleNamespace(
        trainer=trainer,
        run=lambda batch: train_step(trainer, batch),
        flops=trainer.flops_per_image[True],
        close=trainer.accelerator.free_memory,
    )


def official_model(settings, repa: types.ModuleType, preset: str, **options) -> torch.nn.Module:
    """Builds REPA's model in a preset's size; its projectors follow block 8 unless `encoder_depth` says otherwise."""
    size = sit_preset(preset)
    dim = size["num_attention_heads"] * size["attention_head_dim"]
    options.setdefault("encoder_depth", min(8, size["num_layers"]))
    return repa.SiT(
        input_size=settings.latent_size,
        patch_size=size["patch_size"],
        hidden_size=dim,
        decoder_hidden_size=dim,
        depth=size["num_layers"],
        num_heads=size["num_attention_heads"],
        num_classes=NUM_CLASSES,
        use_cfg=True,
        projector_dim=settings.projector_dim,
        fused_attn=True,
        qk_norm=False,
        **options,
    )


def build_official(settings, preset: str, compiled: bool) -> SimpleNamespace:
    """Builds REPA's model with the weights from which ours starts, and its step."""
    sit, loss = load_official(settings.repa, "repa", ["models.sit", "loss"])
    ours = build_ours(settings, preset, "repa", False)
    aligned = ours.trainer.aligned
    state = {f"projectors.{name}": tensor for name, tensor in aligned.projectors.state_dict().items()}
    weights = export_checkpoint(aligned.transformer, "repa", SavedProjectors(aligned.description(), state))
    flops, layer, config = ours.flops, aligned.layers[0], ours.trainer.args
    ours.close()

    accelerator = Accelerator(mixed_precision=MIXED_PRECISION[settings.dtype], cpu=settings.device == "cpu")
    model = official_model(settings, sit, preset, z_dims=[settings.embed_dim], encoder_depth=layer)
    model.load_state_dict(weights)
    model.to(accelerator.device).train()
    average = deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    if compiled:
        for block in model.blocks:
            block.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    never = 10**9
    step = training_step(
        settings.repa,
        {
            "args": SimpleNamespace(
                num_classes=NUM_CLASSES,
                cfg_prob=0.1,
                legacy=False,  # its first version drops labels twice, in the loop and in the model
                proj_coeff=config.alignment_coeff,
                max_grad_norm=config.max_grad_norm,
                checkpointing_steps=never,
                sampling_steps=never,
                max_train_steps=never,
            ),
            "accelerator": accelerator,
            "device": accelerator.device,
            "model": model,
            "ema": average,
            "optimizer": optimizer,
            "loss_fn": loss.SILoss(accelerator=accelerator),
            # The batch has the features instead of images, and this encoder returns them unchanged.
            "encoders": [SimpleNamespace(forward_features=lambda features: features)],
            "encoder_types": ["given"],
            "architectures": ["given"],
            "latents_scale": torch.full((1, 4, 1, 1), LATENT_SCALE, device=accelerator.device),
            "latents_bias": torch.zeros(1, 4, 1, 1, device=accelerator.device),
            "global_step": 1,  # at step 1 it draws samples
            "progress_bar": tqdm(disable=True),
        },
    )

    def run(batch: dict):
        moments = torch.cat([batch["x0"] / LATENT_SCALE, torch.zeros_like(batch["x0"])], dim=1).unsqueeze(1)
        step((batch["targets"], moments, batch["class_labels"]))

    return SimpleNamespace(model=model, run=run, step=step, flops=flops, close=accelerator.free_memory)


def arm_builders(settings, preset: str, compiled: bool) -> dict[str, Callable]:
    return {
        "official repa": lambda: build_official(settings, preset, compiled),
        "ours, repa": lambda: build_ours(settings, preset, "repa", compiled),
        "ours, vrpo": lambda: build_ours(settings, preset, "vrpo", compiled),
    }


def batches(settings, preset: str, batch_size: int):
    """Yields batches on the device, the same for all arms of a round."""
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = (settings.latent_size // sit_preset(preset)["patch_size"]) ** 2
    shapes = SimpleNamespace(latent_size=settings.latent_size, embed_dim=settings.embed_dim)
    while True:
        yield draw_batch(shapes, batch_size, tokens, generator, settings.device)


def compare_training(settings, preset: str) -> dict:
    """On a CPU, measures the seconds of a step of each arm in each round."""
    arms = {name: build() for name, build in arm_builders(settings, preset, False).items()}
    calls = {name: arm.run for name, arm in arms.items()}
    seconds = take_turns(settings, calls, batches(settings, preset, settings.batch_size))
    below = "official repa"
    pairs = [("ours, repa", below, AT_MOST["training"]), ("ours, vrpo", below, AT_MOST["training"])]
    return {
        "part": f"training, {preset}, batch {settings.batch_size}, {settings.dtype}",
        "seconds": seconds,
        "ratios": [ratio(seconds, *pair) for pair in [*pairs, ("ours, vrpo", "ours, repa", None)]],
        "operators": time_operators(settings, calls, batches(settings, preset, settings.batch_size)),
    }


def sweep_training(settings, preset: str, compiled: bool) -> list[dict]:
    """On a GPU, measures images/s, MFU and peak memory of each arm, which runs alone."""
    rows = []
    for name, build in arm_builders(settings, preset, compiled).items():
        row, batch_size = None, settings.batch_size
        while row is None:
            try:
                row = measure_arm(settings, build, preset, batch_size)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
            release_memory()
            batch_size //= 2
        rows.append({"preset": preset, "compiled": compiled, "arm": name, **row})
    return rows


def measure_arm(settings, build: Callable, preset: str, batch_size: int) -> dict:
    arm, source = build(), batches(settings, preset, batch_size)
    given = [next(source) for _ in range(2)]
    for i in range(max(2, settings.warmup)):
        arm.run(given[i % 2])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for i in range(settings.repeats):
        arm.run(given[i % 2])
    torch.cuda.synchronize()
    images = batch_size * settings.repeats / (time.perf_counter() - start)
    peak = 1e12 * settings.peak_tflops if settings.peak_tflops else peak_flops(torch.device("cuda"), torch.bfloat16)
    found = {
        "batch_size": batch_size,
        "images_per_second": images,
        "mfu": images * arm.flops / peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }
    arm.close()
    return found


def release_memory():
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


class CountedRows:
    """Counts the rows that a network evaluates."""

    def __init__(self, model: torch.nn.Module):
        self.rows = 0
        self.forward = model.forward
        model.forward = self

    def __call__(self, x, *args, **kwargs):
        self.rows += len(x)
        return self.forward(x, *args, **kwargs)


def build_transformer(settings, preset: str, **config) -> SiTTransformer2DModel:
    """Builds our model with random weights for the layers that SiT initialises with zeros."""
    torch.manual_seed(settings.seed)
    model = SiTTransformer2DModel(
        **sit_preset(preset), sample_size=settings.latent_size, num_classes=NUM_CLASSES, **config
    )
    for linear in [block.modulation for block in model.transformer_blocks] + [model.modulation_out, model.proj_out]:
        torch.nn.init.normal_(linear.weight, std=0.02)
    return model.eval()


def build_pipeline(settings, transformer, sampler: str, compiled: bool = False) -> SimpleNamespace:
    """Builds our pipeline with a sampler, as a function of latents and labels."""
    pipeline = VRPOPipeline(transformer, default_scheduler("velocity"))
    set_sampler(pipeline, SAMPLERS[sampler], "ours")
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        transformer.compile_repeated_blocks(dynamic=False)
    counted = CountedRows(transformer)

    def run(given, steps: int):
        latents, labels = given
        return pipeline(
            labels,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            latents=latents,
            generator=[step_generator(settings.seed, i) for i in range(len(latents))],
            output_type="latent",
        ).images

    return SimpleNamespace(run=run, counted=counted)


def build_repa_sampler(settings, preset: str, sampler: str, z_dims: list[int], transformer) -> SimpleNamespace:
    """Builds REPA's sampler with the same weights, and with random projectors if the model has any."""
    sit, samplers = load_official(settings.repa, "repa", ["models.sit", "samplers"])
    model = official_model(settings, sit, preset, z_dims=z_dims)
    model.load_state_dict(export_checkpoint(transformer, "repa"), strict=not z_dims)
    model.to(settings.device).eval()
    sample = samplers.euler_maruyama_sampler if sampler == "sde" else samplers.euler_sampler
    counted = CountedRows(model)

    def run(given, steps: int):
        latents, labels = given
        scale = settings.guidance_scale
        with torch.no_grad():
            return sample(model, latents, labels, num_steps=steps, heun=sampler == "heun", cfg_scale=scale).float()

    return SimpleNamespace(run=run, counted=counted)


def build_sit_sampler(settings, preset: str, sampler: str, transformer) -> SimpleNamespace:
    """Builds SiT's sampler with the same weights."""
    models, transport = load_official(settings.sit, "sit", ["models", "transport"])
    size = sit_preset(preset)
    model = models.SiT(
        input_size=settings.latent_size,
        patch_size=size["patch_size"],
        hidden_size=size["num_attention_heads"] * size["attention_head_dim"],
        depth=size["num_layers"],
        num_heads=size["num_attention_heads"],
        num_classes=NUM_CLASSES,
        learn_sigma=True,
    )
    model.load_state_dict(export_checkpoint(transformer, "sit"))
    model.to(settings.device).eval()
    samplers = transport.Sampler(transport.create_transport())
    counted = CountedRows(model)

    def run(given, steps: int):
        latents, labels = given
        null = torch.full_like(labels, NUM_CLASSES)
        options = {"y": torch.cat([labels, null]), "cfg_scale": settings.guidance_scale}
        if sampler == "sde":
            # SiT's SDE sampler evaluates the network twice per step.
            solve = samplers.sample_sde(sampling_method="Euler", num_steps=max(2, steps // 2))
        else:
            method = {"euler": "euler", "heun": "heun2"}[sampler]
            solve = samplers.sample_ode(sampling_method=method, num_steps=steps + 1)
        with torch.no_grad():
            return solve(torch.cat([latents, latents]), model.forward_with_cfg, **options)[-1].chunk(2)[0]

    return SimpleNamespace(run=run, counted=counted)


def sampling_builders(settings, preset: str, sampler: str) -> dict[str, Callable]:
    """The functions that build each arm, by name; arms of the same repository share their weights."""

    def ours(compiled: bool = False, dtype: torch.dtype = torch.float32, **config):
        transformer = build_transformer(settings, preset, **config).to(settings.device)
        if dtype != torch.float32:
            transformer.to(dtype)
        return build_pipeline(settings, transformer, sampler, compiled)

    builders, sit_config = {}, {"learn_sigma": True, "time_direction": "noise_to_data", "guidance_channels": 3}
    half = {"compiled": True, "dtype": torch.bfloat16}
    if settings.repa:

        def repa(z_dims):
            return build_repa_sampler(settings, preset, sampler, z_dims, build_transformer(settings, preset))

        builders["repa"] = lambda: repa([settings.embed_dim])
        builders["repa, no projectors"] = lambda: repa([])
        builders["ours"] = ours
        if settings.device == "cuda":
            builders["ours, bfloat16, compiled"] = lambda: ours(**half)
    if settings.sit:
        builders["sit"] = lambda: build_sit_sampler(
            settings, preset, sampler, build_transformer(settings, preset, **sit_config)
        )
        builders["ours, as SiT"] = lambda: ours(**sit_config)
        if settings.device == "cuda":
            builders["ours, as SiT, bfloat16, compiled"] = lambda: ours(**half, **sit_config)
    return builders


def noise_batches(settings):
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.sampling_batch_size, 4, settings.latent_size, settings.latent_size)
    labels = torch.arange(settings.sampling_batch_size, device=settings.device) % NUM_CLASSES
    while True:
        yield torch.randn(shape, generator=generator).to(settings.device), labels


def compare_sampling(settings, preset: str, sampler: str, steps: int) -> dict:
    """On a CPU, measures the seconds per evaluated row of each arm in each round, and the differences between samples."""
    arms = {name: build() for name, build in sampling_builders(settings, preset, sampler).items()}
    given = next(noise_batches(settings))
    samples = {name: arm.run(given, steps) for name, arm in arms.items()}
    rows = {name: arm.counted.rows for name, arm in arms.items()}
    calls = {name: lambda batch, arm=arm: arm.run(batch, steps) for name, arm in arms.items()}
    seconds = take_turns(settings, calls, noise_batches(settings))
    per_row = {name: [time / rows[name] for time in times] for name, times in seconds.items()}

    pairs = [("ours", "repa"), ("ours", "repa, no projectors"), ("ours, as SiT", "sit")]
    pairs = [pair for pair in pairs if pair[1] in arms]
    # Noise of the SDE is drawn differently, and SiT's Heun has one more evaluation in its last step.
    equal = [(a, b) for a, b in pairs if sampler == "euler" or (sampler == "heun" and b != "sit")]
    return {
        "part": f"sampling, {preset}, {sampler}, {steps} steps, batch {settings.sampling_batch_size}",
        "rows": rows,
        "seconds": per_row,
        "ratios": [ratio(per_row, a, b, AT_MOST["sampling"]) for a, b in pairs],
        "largest_difference": {f"{a} - {b}": (samples[a] - samples[b]).abs().max().item() for a, b in equal},
        "operators": time_operators(settings, calls, noise_batches(settings)),
    }


def sweep_sampling(settings, preset: str, sampler: str, steps: int) -> list[dict]:
    """On a GPU, measures images/s and peak memory of each arm, which runs alone."""
    rows = []
    for name, build in sampling_builders(settings, preset, sampler).items():
        arm, source = build(), noise_batches(settings)
        arm.run(next(source), min(steps, 4))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        arm.counted.rows, repeats = 0, min(3, settings.repeats)
        start = time.perf_counter()
        for _ in range(repeats):
            arm.run(next(source), steps)
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        row = {
            "images_per_second": repeats * settings.sampling_batch_size / elapsed,
            "rows_per_second": arm.counted.rows / elapsed,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        }
        rows.append({"preset": preset, "sampler": sampler, "steps": steps, "arm": name, **row})
        del arm
        release_memory()
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Times and report


def take_turns(settings, calls: dict[str, Callable], source) -> dict[str, list[float]]:
    """Measures the seconds of each call on the same input, one number for every round that counts."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[settings.clock]
    order, warmup = random.Random(settings.seed), max(1, settings.warmup)
    seconds = {name: [] for name in calls}
    for round_number in range(warmup + settings.repeats):
        given = next(source)
        for name in order.sample(list(calls), len(calls)):
            start = clock()
            calls[name](given)
            if round_number >= warmup:
                seconds[name].append(clock() - start)
    return seconds


class OperatorTimes(TorchDispatchMode):
    """Adds up the processor time of each operator by its name; what Python and autograd do in between is not in it."""

    def __init__(self):
        super().__init__()
        self.seconds = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        start = time.process_time()
        result = operator(*args, **(kwargs or {}))
        self.seconds[operator.overloadpacket.__name__] += time.process_time() - start
        return result


def time_operators(settings, calls: dict[str, Callable], source) -> dict[str, dict[str, float]]:
    """Seconds of each operator in a call of each arm, medians over rounds; empty unless `--operators` asks for it."""
    found = {name: [] for name in calls}
    for _ in range(settings.repeats if settings.operators else 0):
        given = next(source)
        for name, call in calls.items():
            with OperatorTimes() as times:
                call(given)
            found[name].append(times.seconds)
    return {
        name: {operator: float(np.median([times[operator] for times in rounds])) for operator in set().union(*rounds)}
        for name, rounds in found.items()
        if rounds
    }


def ratio(seconds: dict, above: str, below: str, at_most: float | None) -> dict:
    value, low, high = median_ratio(seconds[above], seconds[below])
    return {"above": above, "below": below, "ratio": value, "low": low, "high": high, "at_most": at_most}


def print_comparison(part: dict):
    unit = "s/row" if "rows" in part else "s/step"
    print(f"\n{part['part']}\n{'arm':<24}{unit:>10}{'evaluated rows':>16}")
    for name, times in part["seconds"].items():
        print(f"{name:<24}{np.median(times):>10.4f}{part.get('rows', {}).get(name, ''):>16}")
    print(f"{'ratio of times':<40}{'value':>9}{'95 % interval':>18}{'target':>13}")
    for r in part["ratios"]:
        target = "" if r["at_most"] is None else f"{'<=' if r['ratio'] <= r['at_most'] else 'NOT <='} {r['at_most']}"
        bounds = f"{r['low']:.3f} - {r['high']:.3f}"
        print(f"{r['above'] + ' / ' + r['below']:<40}{r['ratio']:>9.3f}{bounds:>18}{target:>13}")
    for pair, difference in part.get("largest_difference", {}).items():
        print(f"largest difference of samples, {pair}: {difference:.2g}")
    if part["operators"]:
        print_operators(part["operators"])


def print_operators(arms: dict[str, dict[str, float]]):
    """Prints the operators that take a hundredth of an arm's time or more, the rest together, and the products' share."""
    totals = {name: sum(times.values()) for name, times in arms.items()}
    names = sorted(
        {o for times in arms.values() for o in times}, key=lambda o: -max(t.get(o, 0) for t in arms.values())
    )
    shown = [o for o in names if any(arms[name].get(o, 0) >= totals[name] / 100 for name in arms)]
    rows = {o: [times.get(o, 0) for times in arms.values()] for o in shown}
    rows["others"] = [totals[name] - sum(arms[name].get(o, 0) for o in shown) for name in arms]
    rows["all"] = list(totals.values())
    rows["matrix products"] = [sum(times.get(o, 0) for o in PRODUCTS) for times in arms.values()]
    print(f"{'ms of processor time by operator':<60}" + "".join(f"{name:>21}" for name in arms))
    for label, seconds in rows.items():
        print(f"{label:<60}" + "".join(f"{1e3 * value:>21.1f}" for value in seconds))
    shares = [
        f"{products / total:>21.3f}" for products, total in zip(rows["matrix products"], rows["all"], strict=True)
    ]
    print(f"{'their share':<60}" + "".join(shares))


def print_rows(rows: list[dict]):
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("\n" + " | ".join(names))
    for row in rows:
        values = (row.get(name) for name in names)
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))


def check(settings):
    """Fills in the defaults that depend on the device.

    Raises:
        InputError: if options are missing or contradict each other.
    """
    if not (settings.repa or settings.sit):
        raise InputError(None, "give --repa or --sit, a clone of the repository, which this one does not contain")
    if not settings.repa and settings.what == ["training"]:
        raise InputError("repa", "--what training needs --repa, whose training step it runs")
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = settings.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("device", "--device cuda: torch finds no GPU here")
    if cuda and settings.operators:
        raise InputError("operators", "--operators measures processor time; torch.profiler shows what a GPU does")
    if cuda and settings.clock == "cpu":
        raise InputError(None, "--clock cpu does not see what a GPU does; use wall")
    settings.dtype = "bfloat16" if cuda else "float32"
    settings.presets = settings.presets or list(GPU_PRESETS if cuda else GPU_PRESETS[:1])
    settings.batch_size = settings.batch_size or (256 if cuda else 2)
    settings.sampling_batch_size = settings.sampling_batch_size or (64 if cuda else 1)
    settings.num_inference_steps = settings.num_inference_steps or ([50, 250] if cuda else [10])


def main(settings: argparse.Namespace) -> dict:
    check(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    logging.disable(logging.WARNING)  # that REPA's weights are exported without projectors is meant
    cuda = settings.device == "cuda"
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    Accelerator(mixed_precision=MIXED_PRECISION[settings.dtype], cpu=not cuda)
    report = {
        "hardware": hardware_name(torch.device(settings.device)),
        "torch": torch.__version__,
        "settings": {name: value for name, value in vars(settings).items() if name != "json"},
        "comparisons": [],
        "rows": [],
    }
    print(f"{report['hardware']}, torch {report['torch']}, {settings.clock} clock, {settings.repeats} rounds")
    trains, samples = (name in settings.what for name in AT_MOST)
    for preset in settings.presets:
        if trains and settings.repa and cuda:
            for compiled in (False, True):
                add(report, "rows", sweep_training(settings, preset, compiled))
        elif trains and settings.repa:
            add(report, "comparisons", [compare_training(settings, preset)])
        for steps in settings.num_inference_steps if samples else ():
            for sampler in settings.samplers:
                if cuda:
                    add(report, "rows", sweep_sampling(settings, preset, sampler, steps))
                else:
                    add(report, "comparisons", [compare_sampling(settings, preset, sampler, steps)])
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return report


def add(report: dict, kind: str, found: list[dict]):
    """Adds results to the report and prints them at once, because a run takes long."""
    report[kind] += found
    if kind == "rows":
        print_rows(found)
    else:
        for part in found:
            print_comparison(part)
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except InputError as error:
        sys.exit(f"official.py: error: {error}")
