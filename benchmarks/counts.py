#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Count what a training step does, without a GPU: launches, bytes, FLOPs, saved activations, syncs and graph breaks.

    python benchmarks/counts.py
    python benchmarks/counts.py --presets SiT-S/2 --batch_size 32 --objectives repa vrpo --json counts.json
    python benchmarks/counts.py --image_memory

A step of the real model, objective, optimizer and averaged weights runs on tensors that have shapes but no content. Every
operation that would run a kernel is counted. Views and allocations are not counted, and an operation on a list of tensors has as
many launches as torch's kernels need for it. Its bytes are those of its inputs and outputs, each counted once. The encoder's
features are given, as in objective_overhead.py; a step includes neither autoencoder, encoder nor loader.

Parts: `forward` is the forward pass of the transformer and its projectors; `loss` is the work of the objective between that and
the backward pass, and of its fork in the backward pass; `images` is the work of image rewards; `backward` is the rest of the
backward pass; `optimizer` is clipping and fused AdamW; `average` is the EMA; `statistics` are those of the objective and of the
log. REPI is counted after its scaffold phase. The objective's computations on the host, from numbers that one copy brings there,
launch nothing and are counted separately.

`vrpo-perceptual` is VRPO with the perceptual reward: DINOv2-B compares, at 224 pixels, the images that AutoencoderTiny decodes for
seven samples in ten (those with t <= 0.7), as many at a time as on a GPU by default. Its activations are freed before the backward
pass, so they are not among the saved ones.

The roofline is the least time on a GPU: an operation takes its FLOPs over the peak or its bytes over the bandwidth, whichever is
longer. `eager` is the sum over all operations. `compiled` treats each run of operations between two matrix products or attentions
as one kernel, which reads once what was made before it, and writes only what is used after it. A compiler that fuses all it can
and recomputes nothing would reach that. Launches, and everything that does not overlap, take further time.

Two tables need a C++ compiler or some seconds each. Graph breaks are counted in the graphs that `--compile` makes (a block, the
loss, the backward pass of the fork, the sums of the statistics), and in the whole model with its fork, as if it were compiled at once.
Kernels are those that Inductor generates on a CPU for the loss and the statistics, as C++ functions and as loop nests in them. The
number of a GPU's kernels lies in between: a GPU fuses no less, but nests of different shapes that share a function on a CPU are
separate kernels there.
"""

import argparse
import collections
import contextlib
import functools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from diffusers_vrpo.alignment import gradient_fork
from diffusers_vrpo.alignment.attach import AlignedTransformer, alignment_layers
from diffusers_vrpo.alignment.encoders import DINOV2_SHAPES, IMAGENET_MEAN, IMAGENET_STD, PatchEncoder
from diffusers_vrpo.alignment.host_copy import add_moments
from diffusers_vrpo.alignment.image_rewards import VELOCITY, ImageRewards, images_at_a_time
from diffusers_vrpo.alignment.objective import objective_from_config
from diffusers_vrpo.alignment.start import scaffold_layer
from diffusers_vrpo.alignment.whitening import WhitenedEncoder, Whitening
from diffusers_vrpo.config import VRPOConfig, whitened_dims
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel, sit_preset
from diffusers_vrpo.training.interruption import StepGuard
from diffusers_vrpo.training.memory import LiveBytes, blank_batch, micro_step, timeline_of, training_timeline
from diffusers_vrpo.training.metrics import RunningMeans
from diffusers_vrpo.training.setup import build_optimizer, trainable_parameters
from diffusers_vrpo.training.throughput import ForeachEMA, peak_flops


OBJECTIVES = ("none", "repa", "vrpo", "irepa", "rare", "repi", "vrpo-perceptual")
PRESETS = ("SiT-S/2", "SiT-B/2", "SiT-XL/2")
PARTS = ("forward", "loss", "images", "backward", "optimizer", "average", "statistics")
MAX_TRAIN_STEPS = 400_000
EMBED_DIM = 768
# The name whose dense bf16 peak throughput.py knows, and the bandwidth in the maker's data sheet, bytes a second.
GPUS = {"H100": ("NVIDIA H100 80GB HBM3", 3.35e12), "H200": ("NVIDIA H200", 4.8e12)}

aten = torch.ops.aten
NO_KERNEL = {
    *(aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.scalar_tensor),
    *(aten.detach, aten.detach_, aten.alias, aten.lift_fresh, aten._unsafe_view, aten._reshape_alias, aten.sym_size),
}
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
# What is in their first argument is not read, or is overwritten.
WRITE_ONLY = {aten.zero_, aten.fill_, aten.copy_, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros}
# They read as much of their first argument as they return.
READ_IN_PART = {aten.gather, aten.index, aten.index_select, aten.embedding}
ATTENTION = {aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_fused_attention_overrideable}
ATTENTION_BACKWARD = {aten._scaled_dot_product_flash_attention_for_cpu_backward}
# Kernels of torch on lists of tensors take so many chunks of so many numbers, and so many tensors, in a launch.
CHUNKS_OF_A_LAUNCH, NUMBERS_OF_A_CHUNK, TENSORS_OF_A_LAUNCH = 320, 65_536, 36


# ----------------------------------------------------------------------------------------------------------------------
# Counting


class Operation(SimpleNamespace):
    """One call: `part`, `name`, `launches`, `read` and `written` bytes, `flops`, and the numbers of its storages."""

    @property
    def bytes(self) -> int:
        return self.read + self.written


class StepCounter(LiveBytes):
    """Inside the `with` block, records the operations; `part(name)` is a context that names the part to which they belong."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.syncs: collections.Counter = collections.Counter()
        self.current = "forward"
        self._numbers: dict[int, int] = {}  # of storages, in the order of their making

    @contextlib.contextmanager
    def part(self, name: str):
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function.overloadpacket
        if packet in WAITS:
            self.syncs[self.current] += 1
            if packet is aten._local_scalar_dense:  # which has no value to return
                return 1.0 if args[0].dtype.is_floating_point else 1
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function.namespace == "aten" and not function.is_view and packet not in NO_KERNEL:
            self._record(function, packet, args, kwargs, result)
        return result

    def _record(self, function, packet, args, kwargs, result):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if function._schema.is_mutable and not outputs:  # operations on lists return nothing
            outputs = [x for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
        written = sum(map(size_of, outputs))
        unread = packet in WRITE_ONLY or kwargs.get("beta") == 0  # a product that is added to nothing
        read = inputs[1:] if unread else inputs
        read = sum(
            min(size_of(x), written) if i == 0 and packet in READ_IN_PART else size_of(x) for i, x in enumerate(read)
        )
        name = packet.__name__
        of_lists = name.startswith(("_foreach", "_fused"))
        launches = launches_of(args[0]) if of_lists else 1
        self.operations.append(
            Operation(
                part=self.current,
                name=name,
                launches=launches,
                read=read,
                written=written,
                flops=flops_of(packet, args, kwargs, result),
                inputs={self._number(x): size_of(x) for x in inputs},
                outputs={self._number(x): size_of(x) for x in outputs},
                fuses=not of_lists and name not in ("convolution_backward", "embedding_dense_backward"),
            )
        )

    def _number(self, tensor: torch.Tensor) -> int:
        """A unique number for the tensor's storage, because addresses of freed storages are used again."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:  # made outside
            return -key
        return self._numbers.setdefault(key, len(self._numbers) + 1 + self._freed)

    _freed = 0

    def _watch(self, storage):
        key = storage._cdata
        if key not in self._storages and key in self._numbers:
            del self._numbers[key]
            self._freed += 1
        super()._watch(storage)


def size_of(tensor: torch.Tensor) -> int:
    """The bytes that a tensor's elements take in memory; expanded elements count once."""
    shape = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride or size == 0)
    return math.prod(shape) * tensor.element_size()


def launches_of(tensors) -> int:
    """The number of launches that a kernel needs for a list of tensors."""
    chunks = sum(math.ceil(tensor.numel() / NUMBERS_OF_A_CHUNK) for tensor in tensors)
    return max(math.ceil(chunks / CHUNKS_OF_A_LAUNCH), math.ceil(len(tensors) / TENSORS_OF_A_LAUNCH))


def flops_of(packet, args, kwargs, result) -> int:
    if packet in ATTENTION:
        query, key, value = args[:3]
        return sdpa_flop_count(query.shape, key.shape, value.shape)
    if packet in ATTENTION_BACKWARD:
        gradient, query, key, value = args[:4]
        return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
    count = flop_registry.get(packet)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


# ----------------------------------------------------------------------------------------------------------------------
# A step


class GivenFeatures:
    """An encoder whose features come with the batch and cost only their memory."""

    def __init__(self, embed_dim: int, num_tokens: int):
        self.embed_dim, self.shape = embed_dim, (num_tokens, embed_dim)
        self.features: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # Made before a step is counted, by a first call.
        if self.features is None or len(self.features) != len(images):
            self.features = torch.zeros(len(images), *self.shape)
        return self.features


def build(objective: str, preset: str, depth: int | None = None, latent_size: int = 32, **options):
    """Builds the options of a run and its aligned transformer; inside `FakeTensorMode` with fake tensors, else with real ones.

    Args:
        depth: number of blocks, instead of the preset's.
    """
    objective = objective.removesuffix("-perceptual")
    encoder = None if objective == "none" else ["given"]
    options = {"mixed_precision": "bf16", "max_train_steps": MAX_TRAIN_STEPS} | options
    args = VRPOConfig(objective=objective, encoder=encoder, resolution=8 * latent_size, **options)
    config = sit_preset(preset) | {"sample_size": latent_size} | ({"num_layers": depth} if depth else {})
    encoders = []
    if encoder:
        encoders = [GivenFeatures(EMBED_DIM, (latent_size // config["patch_size"]) ** 2)]
        if dims := whitened_dims(args.target_norm):
            encoders = [WhitenedEncoder(encoders[0], Whitening(torch.zeros(EMBED_DIM), torch.zeros(EMBED_DIM, dims)))]
    layers = alignment_layers(args.layer_scope, config["num_layers"]) if encoders and objective != "repi" else []
    transformer = SiTTransformer2DModel(**config)
    scaffold = scaffold_layer(args, config["num_layers"])
    aligned = AlignedTransformer(
        transformer, layers, encoders, args.projector, args.projector_dim, scaffold_layer=scaffold
    )
    return args, aligned.train()


def perceptual(config, latent_size: int, vae: torch.nn.Module | None = None) -> ImageRewards:
    """The perceptual reward of images that `vae` (AutoencoderTiny) decodes, in the features of a DINOv2-B with patches of 14 pixels."""
    from diffusers import AutoencoderTiny
    from transformers import AutoModel, Dinov2Config, PreTrainedModel

    side = latent_size // config.patch_size
    with mock.patch.object(PreTrainedModel, "init_weights"):  # it reads numbers, which fake tensors do not have
        dinov2 = Dinov2Config(image_size=518, patch_size=14, **DINOV2_SHAPES["facebook/dinov2-base"])
        model = AutoModel.from_config(dinov2, dtype=torch.bfloat16).eval()
    pixel_format = (IMAGENET_MEAN, IMAGENET_STD, False)
    encoder = PatchEncoder(model, EMBED_DIM, (side, side), (14 * side, 14 * side), None, pixel_format)
    vae = (AutoencoderTiny() if vae is None else vae).eval().requires_grad_(False)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    batch_size = images_at_a_time(vae, 8 * latent_size, "cuda")
    return ImageRewards(["perceptual"], encoder, config=VELOCITY, vae=vae, batch_size=batch_size, autocast=autocast)


def image_memory(name: str, latent_size: int) -> tuple[int, int]:
    """How many images a GPU decodes and rewards at a time, and the bytes that it needs for them.

    Args:
        name: `"AutoencoderTiny"`, or `"AutoencoderKL"` with the blocks of Stable Diffusion's autoencoder.
    """
    from diffusers import AutoencoderKL

    blocks = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = AutoencoderKL(**blocks) if name == "AutoencoderKL" else None
        rewards = perceptual(SimpleNamespace(patch_size=2), latent_size, vae)
        at_a_time, rewards.batch_size = rewards.batch_size, sys.maxsize

        def work(images: int, live: LiveBytes) -> int:
            latents = torch.zeros(images, 4, latent_size, latent_size)
            rewards.values_and_gradients(latents, latents, latents, torch.full((images,), 0.5), None)
            return 0

        work(1, LiveBytes())  # a first pass looks for the modules of the hidden states
        return at_a_time, timeline_of(work).peak(at_a_time)


def count_step(objective: str, preset: str, batch_size: int, depth: int | None = None, latent_size: int = 32) -> dict:
    """Counts a training step.

    Returns:
        for each part, `launches`, `read`, `written` and `flops` of the batch, `syncs`, and under `fused` the launches and bytes
        if everything is fused that can be; for the whole step, also `saved` (bytes of the activations of an image), operations
        on the `host`, and the seconds of the roofline, `eager` and `compiled`, for each of `GPUS`.
    """
    shape = (4, latent_size, latent_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        args, aligned = build(objective, preset, depth, latent_size)
        saved = training_timeline(args, aligned, shape, with_pixels=False).saved[1]
        for parameter in aligned.parameters():
            parameter.grad = None
        image_rewards = perceptual(aligned.transformer.config, latent_size) if "perceptual" in objective else None
        step = TrainingStep(args, aligned, blank_batch(args, aligned, shape, False, batch_size), image_rewards)
        counter = StepCounter()
        step.take(counter)
    on_device = [o for o in counter.operations if o.part != "host"]
    by_part = {name: totals([o for o in counter.operations if o.part == name]) for name in PARTS}
    for name, part in by_part.items():
        part["syncs"] = counter.syncs[name]
        part["fused"] = fused_counts(on_device, name)
    return {
        "parts": by_part,
        "step": totals(on_device) | {"syncs": sum(counter.syncs.values()), "saved": saved},
        "host": len(counter.operations) - len(on_device),
        "fused": fused_counts(on_device),
        "roofline": {gpu: roofline(on_device, *GPUS[gpu]) for gpu in GPUS},
    }


class TrainingStep:
    """The parts of `VRPOTrainer.train_step`, on a given batch."""

    def __init__(
        self,
        args: VRPOConfig,
        aligned: AlignedTransformer,
        batch: dict[str, torch.Tensor],
        image_rewards: ImageRewards | None = None,
    ):
        self.args, self.aligned, self.batch, self.image_rewards = args, aligned, batch, image_rewards
        self.prediction = None
        self.objective = objective_from_config(args, aligned, MAX_TRAIN_STEPS, prediction_type="velocity")
        if args.objective == "repi":
            self.objective.step_number = MAX_TRAIN_STEPS // 2
        self.parameters = list(trainable_parameters(aligned))
        self.optimizer = build_optimizer(args, self.parameters)
        self.average = ForeachEMA(self.parameters, decay=args.ema_decay)
        self.metrics = RunningMeans()
        # The first step is unlike the others: it makes the moments.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.parameters)
        for encoder in aligned.encoders:
            encoder(batch["pixels"])
        process = SimpleNamespace(device=torch.device("cpu"), num_processes=1, scaler=None)
        self.guard = StepGuard(process, self.optimizer, SimpleNamespace(signum=0), False)

    def take(self, counter: StepCounter):
        args, objective = self.args, self.objective
        names = {"objective": "loss", "forward": "forward"}
        mix_gradients, begin = gradient_fork.mix_gradients, objective.begin
        tables = getattr(objective, "_joined_tables", None)

        def counted_mix(*arguments):
            with counter.part("loss"):
                return mix_gradients(*arguments)

        def counted_tables():
            with counter.part("host"):
                return tables()

        def counted_begin(*arguments):
            step = begin(*arguments)
            if step.fork is not None:
                step.fork = counting(counter, step.fork)
            return step

        # The backward pass of the loss ends where the gradient of a projection, or of the prediction, is complete.
        def forward(*arguments, **named):
            prediction, projections = AlignedTransformer.forward(self.aligned, *arguments, **named)
            ends = projections or (prediction,)
            ends[-1].register_hook(lambda _: setattr(counter, "current", "backward"))
            self.prediction = prediction
            return prediction, projections

        with (
            counter,
            mock.patch.object(gradient_fork, "mix_gradients", counted_mix),
            mock.patch.object(objective, "begin", counted_begin),
            mock.patch.object(objective, "_joined_tables", counted_tables, create=True),
            mock.patch.object(self.aligned, "forward", forward),
        ):
            loss, step = micro_step(args, self.aligned, objective, self.batch, lambda name: counter.part(names[name]))
            if self.image_rewards is not None:
                with counter.part("images"):
                    loss = loss + self._reward_images()
            with counter.part("statistics"):
                self.metrics.add(loss_fm=loss)
                if step.logs:
                    self.metrics.add(**step.logs)
                self.guard.watch(loss)
            with counter.part("loss"):
                loss.backward()
            with counter.part("statistics"):
                objective.observe(step)
                objective.collect()
            with counter.part("optimizer"):
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm, foreach=True)
                self.guard.ask(norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            with counter.part("average"):
                self.average.step(self.parameters)
            with counter.part("statistics"):
                self.metrics.add(grad_norm=norm)
            with counter.part("host"):
                objective.update()
            if self.image_rewards is not None:
                with counter.part("statistics"):
                    self.metrics.add(**self.image_rewards.logs)
                    self.image_rewards.update()
            counter.syncs["optimizer"] += 1  # the guard's answer, which is read here

    def _reward_images(self) -> torch.Tensor:
        x0, noise, t = (self.batch[name] for name in ("x0", "noise", "timestep"))
        rows = torch.arange(round(self.image_rewards.max_t * len(x0)))
        return self.image_rewards(self.prediction.float(), noise - x0, x0, x0 + noise, t, rows=rows)


def counting(counter: StepCounter, fork):
    def counted(*arguments):
        with counter.part("loss"):
            return fork(*arguments)

    return counted


# ----------------------------------------------------------------------------------------------------------------------
# Totals


def totals(operations: list[Operation]) -> dict[str, int]:
    return {name: sum(getattr(o, name) for o in operations) for name in ("launches", "read", "written", "flops")}


def fused_counts(operations: list[Operation], part: str | None = None) -> dict[str, int]:
    """Launches and bytes of a part, or of all, if every run of operations between two matrix products is one kernel."""
    runs = [run for run in fused_runs(operations) if part in (None, run["part"])]
    return {"launches": sum(run["launches"] for run in runs), "bytes": sum(run["bytes"] for run in runs)}


def fused_runs(operations: list[Operation]) -> list[dict]:
    """The kernels of a compiler that fuses all it can, in order, with their launches, bytes and FLOPs.

    Products, attentions and operations on lists are kernels by themselves. The operations between two of them are one kernel,
    which reads storages made before it once, and writes those of its own storages that a later operation reads or that exist at
    the end of the step.
    """
    last_use = {}
    for position, operation in enumerate(operations):
        for number in operation.inputs:
            last_use[number] = position
    runs, start = [], 0
    while start < len(operations):
        end = start + 1
        if alone(operations[start]):
            operation = operations[start]
            run = {"launches": operation.launches, "bytes": operation.bytes, "flops": operation.flops}
        else:
            while (
                end < len(operations) and not alone(operations[end]) and operations[end].part == operations[start].part
            ):
                end += 1
            made, read = {}, {}
            for operation in operations[start:end]:
                read |= {number: size for number, size in operation.inputs.items() if number not in made}
                made |= operation.outputs
            kept = sum(size for number, size in made.items() if last_use.get(number, len(operations)) >= end)
            run = {"launches": 1, "bytes": sum(read.values()) + kept, "flops": 0}
        runs.append(run | {"part": operations[start].part})
        start = end
    return runs


def alone(operation: Operation) -> bool:
    return operation.flops > 0 or not operation.fuses


def roofline(operations: list[Operation], device: str, bandwidth: float) -> dict[str, float]:
    """The least seconds of a step, with operations as they are (`eager`) and fused (`compiled`)."""
    peak = peak_flops(device, torch.bfloat16)

    def seconds(kernels):
        return sum(max(flops / peak, size / bandwidth) for flops, size in kernels)

    return {
        "eager": seconds((o.flops, o.bytes) for o in operations),
        "compiled": seconds((run["flops"], run["bytes"]) for run in fused_runs(operations)),
        "products": sum(o.flops for o in operations) / peak,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Graph breaks


def small_step(objective: str):
    """Builds a small model with real tensors: the options, the aligned transformer, its objective and a batch."""
    args, aligned = build(objective, "SiT-S/2", depth=2, mixed_precision="no", projector_dim=32)
    batch = blank_batch(args, aligned, (4, 32, 32), False, 4)
    batch["x0"] = torch.randn_like(batch["x0"])
    return args, aligned, objective_from_config(args, aligned, MAX_TRAIN_STEPS, prediction_type="velocity"), batch


def count_breaks(objective: str) -> dict[str, int]:
    """Counts the breaks in the graphs that `--compile` makes, and in the whole model with its fork, for a small real model."""
    args, aligned, made, batch = small_step(objective)
    step = made.begin(batch["timestep"], batch["pixels"])
    found = {}

    def count(name: str, function, *inputs):
        torch._dynamo.reset()
        found[name] = torch._dynamo.explain(function)(*inputs).graph_break_count

    def model(x, t, labels):
        return aligned(x, t, labels, fork=step.fork, align=step.active, scaffold=step.scaffold)

    inputs = (batch["x0"] + batch["noise"], batch["timestep"], batch["class_labels"])
    prediction, projections = model(*inputs)
    tokens, width = torch.randn(4, 256, 384), torch.randn(4, 384)
    count("block", aligned.transformer.transformer_blocks[0], tokens, width)
    if projections:
        projections = [p.detach().requires_grad_() for p in projections]
        targets = made.targets(batch["pixels"])
        loss_fm = (prediction.detach() - batch["noise"]).square().flatten(1).mean(1)
        draws = (batch.get("tokens"), None, None)
        count("loss", made._losses, step, projections, targets, made._weight(step), loss_fm, draws)
    if step.fork is not None:
        count("fork", gradient_fork.mix_gradients, tokens, tokens, None)
    if step.bins is not None:
        sums = made.sums.sums
        count("sums", add_moments, sums, step.bins, [torch.randn(sums.shape[1], 4)])
    if step.scaffold is None:
        count("the whole model at once", model, *inputs)
    return found


def count_kernels(objective: str) -> dict[str, int]:
    """Counts the kernels that Inductor generates on a CPU for the compiled loss, its backward pass, the fork and the gate.

    `kernels` is the number of fused nodes of its scheduler, including products, and `bytes` is what these read and write.
    """
    from torch._inductor import compile_fx, config, metrics
    from torch._inductor.utils import run_and_get_code

    args, aligned, made, batch = small_step(objective)
    torch._dynamo.reset()
    metrics.reset()
    gradient_fork.compiled_mix_gradients.cache_clear()
    made.compile()

    def step():
        loss, state = micro_step(args, aligned, made, batch)
        loss.backward()
        made.observe(state)

    # The metrics of a graph are computed only if their log is on and the graph does not come from a cache.
    with config.patch(force_disable_caches=True), mock.patch.object(compile_fx, "inductor_metrics_log"):
        _, codes = run_and_get_code(step)
    found = {"graphs": len(codes), "functions": 0, "loop nests": 0, "products": 0}
    for code in codes:
        found["functions"] += len(re.findall(r"^cpp_fused\w* = async_compile", code, re.MULTILINE))
        found["loop nests"] += len(re.findall(r"^    \{$", code, re.MULTILINE))
        found["products"] += len(re.findall(r"extern_kernels\.\w*mm\(", code))
    kernels = [
        node for node, _ in metrics.nodes_num_elem if not node.is_template() and type(node).__name__[:3] != "Nop"
    ]
    return found | {"kernels": len(kernels), "bytes": metrics.num_bytes_accessed}


# ----------------------------------------------------------------------------------------------------------------------
# Report


def print_counts(preset: str, by_objective: dict, batch_size: int):
    print(f"\n{preset}, batch {batch_size}, bf16 autocast")
    print(f"{'launches':<16}" + "".join(f"{part:>12}" for part in (*PARTS, "step")) + f"{'syncs':>8}")
    for name, found in by_objective.items():
        numbers = [found["parts"][part]["launches"] for part in PARTS] + [found["step"]["launches"]]
        print(f"{name:<16}" + "".join(f"{n:>12,}" for n in numbers) + f"{found['step']['syncs']:>8}")
    print(f"{'GB':<16}" + "".join(f"{part:>12}" for part in (*PARTS, "step")))
    for name, found in by_objective.items():
        parts = [found["parts"][part] for part in PARTS] + [found["step"]]
        print(f"{name:<16}" + "".join(f"{(p['read'] + p['written']) / 1e9:>12.2f}" for p in parts))
    print(
        f"{'':<16}{'TFLOP':>12}{'saved MiB':>12}{'fused GB':>12}{'fused':>12}"
        + "".join(f"{gpu + ' ' + kind:>16}" for gpu in GPUS for kind in ("eager", "compiled"))
    )
    for name, found in by_objective.items():
        step, fused = found["step"], found["fused"]
        times = [found["roofline"][gpu][kind] * 1000 for gpu in GPUS for kind in ("eager", "compiled")]
        print(
            f"{name:<16}{step['flops'] / 1e12:>12.2f}{step['saved'] / 2**20:>12.1f}{fused['bytes'] / 1e9:>12.2f}"
            f"{fused['launches']:>12,}" + "".join(f"{ms:>13.1f} ms" for ms in times)
        )
    print(f"{'the loss':<16}{'launches':>12}{'fused':>12}{'GB':>12}{'fused GB':>12}{'on the host':>12}")
    for name, found in by_objective.items():
        loss = found["parts"]["loss"]
        fused, size = loss["fused"], loss["read"] + loss["written"]
        print(
            f"{name:<16}{loss['launches']:>12,}{fused['launches']:>12,}{size / 1e9:>12.2f}{fused['bytes'] / 1e9:>12.2f}"
            f"{found['host']:>12,}"
        )


def print_operations(objective: str, preset: str, batch_size: int, part: str):
    """Prints the operations of a part, those with the most bytes first."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        args, aligned = build(objective, preset)
        step = TrainingStep(args, aligned, blank_batch(args, aligned, (4, 32, 32), False, batch_size))
        counter = StepCounter()
        step.take(counter)
    rows = collections.defaultdict(lambda: [0, 0])
    for operation in counter.operations:
        if operation.part == part:
            rows[operation.name][0] += operation.launches
            rows[operation.name][1] += operation.bytes
    for name, (launches, size) in sorted(rows.items(), key=lambda row: -row[1][1]):
        print(f"{name:<48}{launches:>8,}{size / 1e9:>12.3f} GB")


def print_image_memory():
    for name in ("AutoencoderTiny", "AutoencoderKL"):
        for pixels in (256, 512):
            images, size = image_memory(name, pixels // 8)
            print(f"perceptual reward, {name}, {pixels} pixels: {images} images at a time, {size / 2**30:.1f} GiB")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help=f"default: {' '.join(PRESETS)}")
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES,
        default=list(OBJECTIVES),
        help="objectives to count (default: all)",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images in a batch (default: 256)")
    parser.add_argument("--no-breaks", dest="breaks", action="store_false", help="do not count graph breaks")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="also compile the loss of repa and vrpo with Inductor, and count kernels",
    )
    parser.add_argument("--operations", choices=PARTS, help="list the operations of this part instead")
    parser.add_argument(
        "--image_memory", action="store_true", help="print the memory of the perceptual reward on a GPU instead"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser


def main(settings: argparse.Namespace):
    torch.set_num_threads(1)
    if settings.operations:
        for preset in settings.presets:
            for name in settings.objectives:
                print(f"{preset}, {name}, {settings.operations}")
                print_operations(name, preset, settings.batch_size, settings.operations)
        return
    if settings.image_memory:
        print_image_memory()
        return
    counts = {}
    for preset in settings.presets:
        counts[preset] = {name: count_step(name, preset, settings.batch_size) for name in settings.objectives}
        print_counts(preset, counts[preset], settings.batch_size)
    for gpu, (name, bandwidth) in GPUS.items():
        print(f"{gpu}: {peak_flops(name, torch.bfloat16) / 1e12:.1f} TFLOP/s in bf16, {bandwidth / 1e12:.2f} TB/s")
    breaks, kernels = {}, {}
    if settings.breaks:
        breaks = {name: count_breaks(name) for name in settings.objectives if name != "vrpo-perceptual"}
        for name, found in breaks.items():
            print(f"graph breaks, {name}: " + ", ".join(f"{part} {number}" for part, number in found.items()))
    if settings.kernels:
        kernels = {name: count_kernels(name) for name in settings.objectives if name in ("repa", "vrpo")}
        for name, found in kernels.items():
            print(f"compiled loss, {name}: " + ", ".join(f"{number} {part}" for part, number in found.items()))
    if settings.json:
        report = {"batch_size": settings.batch_size, "torch": torch.__version__, "counts": counts}
        report |= {"breaks": breaks, "kernels": kernels}
        settings.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(build_parser().parse_args(sys.argv[1:]))
