# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Measures the speed of training relative to the hardware's peak, and sets the options that make it faster.

FLOPs follow the usual convention: a multiply-add counts as two, and only matrix products and convolutions count. The
recomputation of gradient checkpointing takes time but does not count as work.
"""

import contextlib
import inspect
import math
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..alignment.attach import AlignedTransformer
from ..alignment.encoders import PatchEncoder
from ..alignment.whitening import WhitenedEncoder
from ..config import recomputed_part
from ..errors import InputError, first_line
from ..models.transformer_sit import SiTTransformer2DModel


# ----------------------------------------------------------------------------------------------------------------------
# Work


MODEL_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SiTTransformer2DModel).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}


def num_tokens(config: dict) -> int:
    """N, the number of tokens of an image, for a transformer's config; missing entries have their defaults."""
    config = MODEL_DEFAULTS | dict(config)
    size, patch = config["sample_size"], config["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return (height // patch) * (width // patch)


def forward_flops(config: dict, tokens: int | None = None) -> int:
    """FLOPs of one image through the transformer, without projectors.

    Args:
        config: the config of a `SiTTransformer2DModel`, or `sit_preset(...)`.
        tokens: N; by default that of the config's `sample_size`.
    """
    config = MODEL_DEFAULTS | dict(config)
    tokens = tokens or num_tokens(config)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    pixels = config["patch_size"] ** 2 * config["in_channels"]
    block = sum(block_products(config, tokens).values())
    embedding = tokens * pixels * dim + 256 * dim + dim**2
    output = tokens * dim * pixels * (2 if config["learn_sigma"] else 1) + 2 * dim**2
    return 2 * (embedding + config["num_layers"] * block + output)


def block_products(config: dict, tokens: int) -> dict[str, int]:
    """Multiply-adds of one image through the parts of a block, for a config with all arguments."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    return {
        "attention": tokens * 4 * dim**2
        + 2 * tokens**2 * dim,  # the maps to q, k, v and out; scores and weighted values
        "mlp": tokens * 2 * dim * int(dim * config["mlp_ratio"]),
        "modulation": 6 * dim**2,  # once per image
    }


def recomputed_flops(config: dict, gradient_checkpointing: bool | str, tokens: int | None = None) -> int:
    """FLOPs per image that the backward pass recomputes with this value of the option `gradient_checkpointing`."""
    if not gradient_checkpointing:
        return 0
    config = MODEL_DEFAULTS | dict(config)
    part, every = recomputed_part(gradient_checkpointing)
    products = block_products(config, tokens or num_tokens(config))
    return 2 * (config["num_layers"] // every) * products.get(part, sum(products.values()))


def projector_flops(
    hidden_dim: int,
    tokens: int,
    num_layers: int,
    embed_dims: list[int],
    projector: str = "mlp",
    projector_dim: int = 2048,
) -> int:
    """FLOPs of one image through all alignment projectors.

    Args:
        hidden_dim: D, the width of the tokens.
        tokens: N.
        num_layers: the number of aligned blocks.
        embed_dims: widths of the encoders' embeddings.
        projector, projector_dim: arguments of `AlignedTransformer`.
    """
    if projector == "conv":
        one = sum(9 * hidden_dim * out for out in embed_dims)
    else:
        one = sum(hidden_dim * projector_dim + projector_dim**2 + projector_dim * out for out in embed_dims)
    return 2 * tokens * num_layers * one


def counted_flops(function: Callable[[], object]) -> int:
    """FLOPs of one call of `function`, counted while it runs without gradients."""
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def encoder_flops(encoder) -> int:
    """FLOPs of one image through a frozen `PatchEncoder`, counted while it encodes a blank one; 0 for other encoders."""
    if isinstance(encoder, WhitenedEncoder):
        encoder = encoder.encoder
    if not isinstance(encoder, PatchEncoder):
        return 0
    image = torch.zeros(1, 3, *encoder.input_size, device=encoder.mean.device)
    return counted_flops(lambda: encoder(image))


def training_flops(forward: float, encoders: float = 0.0, recompute: bool = False, adapters: bool = False) -> float:
    """FLOPs of one image in a training step.

    They are three times those of the forward pass, because the backward pass has two products for each one.

    Args:
        forward: forward FLOPs of the trained modules.
        encoders: forward FLOPs of the modules that have no backward pass.
        recompute: whether to count the second forward pass of gradient checkpointing, too, which MFU does not include.
        adapters: whether only small adapters are trained, so that there are no products for the gradients of the weights.
    """
    return (3 + recompute - adapters) * forward + encoders


def step_flops(
    aligned: AlignedTransformer, forward: int | None = None, tokens: int | None = None
) -> tuple[float, float]:
    """FLOPs of one image in a training step: without alignment, and with projectors, scaffold and encoders.

    The autoencoder, the losses and the optimizer are not included. Call this before anything is compiled.

    Args:
        aligned: the transformer with its projectors and encoders.
        forward: FLOPs of one image through the transformer; by default those of a `SiTTransformer2DModel`.
        tokens: N; by default that of a `SiTTransformer2DModel`.
    """
    config = aligned.transformer.config
    tokens = tokens or num_tokens(config)
    adapters = not all(parameter.requires_grad for parameter in aligned.transformer.parameters())
    plain = training_flops(forward or forward_flops(config), adapters=adapters)
    if not aligned.layers and aligned.scaffold is None:
        return plain, plain
    trained = 0
    if aligned.layers:
        trained = projector_flops(
            aligned.hidden_dim,
            tokens,
            len(aligned.layers),
            aligned.embed_dims,
            aligned.projector,
            aligned.projector_dim,
        )
    encoders = sum(encoder_flops(encoder) for encoder in aligned.encoders)
    if aligned.scaffold is not None:
        # After the scaffold phase its maps have no backward pass.
        encoders += 2 * tokens * sum(p.numel() for p in aligned.scaffold.parameters() if p.ndim == 2)
    return plain, plain + training_flops(trained, encoders)


def throughput_metrics(
    images_per_second: float, flops_per_image: float, peak: float | None = None, num_processes: int = 1
) -> dict[str, float]:
    """Metrics for the log: the TFLOP/s of one device, and their share of its peak (MFU) if `peak`, in FLOP/s, is given."""
    flops = images_per_second * flops_per_image / num_processes
    return {"tflops_per_device": flops / 1e12} | ({"mfu": flops / peak} if peak else {})


def throughput_meter(
    flops: tuple[float, float], accelerator: Accelerator, peak_tflops: float | None = None
) -> Callable[[float, bool], dict[str, float]]:
    """Returns `meter(images_per_second, aligning)`, which computes the `throughput_metrics` of a run.

    Args:
        flops: the result of `step_flops`.
        peak_tflops: peak of one device in TFLOP/s; by default looked up by its name.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}.get(accelerator.mixed_precision)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    peak = 1e12 * peak_tflops if peak_tflops else peak_flops(accelerator.device, dtype, tf32)

    def meter(images_per_second: float, aligning: bool) -> dict[str, float]:
        return throughput_metrics(images_per_second, flops[aligning], peak, accelerator.num_processes)

    return meter


# ----------------------------------------------------------------------------------------------------------------------
# Peaks


# Dense TFLOP/s with float32 accumulation from the manufacturers' data sheets, whose figures with sparsity are halved here:
# half precision (both bf16 and fp16), TF32, float32 without tensor cores. The first pattern found in the device's name counts.
PEAK_TFLOPS = (
    (r"\bB200\b", 2250, 1125, 75),
    (r"\bGH200\b", 989.4, 494.7, 66.9),
    (r"\bH200 NVL\b", 835, 417.5, 60),
    (r"\bH200\b", 989.4, 494.7, 66.9),
    (r"\bH100 PCIe\b", 756, 378, 51.2),
    (r"\bH100 NVL\b", 835, 417.5, 60),
    (r"\bH100\b", 989.4, 494.7, 66.9),
    (r"\bA100\b", 312, 156, 19.5),
    (r"\bA40\b", 149.7, 74.8, 37.4),
    (r"\bA30\b", 165, 82, 10.3),
    (r"\bA10\b", 125, 62.5, 31.2),
    (r"\bL40S\b", 362, 183, 91.6),
    (r"\bRTX 6000 Ada\b", 364.2, 182.1, 91.1),
    (r"\bRTX A6000\b", 154.8, 77.4, 38.7),
    (r"\bRTX 5090(?! D| Lap)", 209.5, 104.8, 104.8),
    (r"\bRTX 4090(?! D| Lap)", 165.2, 82.6, 82.6),
    (r"\bRTX 3090\b(?! Ti)", 71, 35.6, 35.6),
    (r"\bV100S", 130, None, 16.4),
    (r"\bV100-PCIE", 112, None, 14),
    (r"\bV100", 125, None, 15.7),
    (r"\bT4\b", 65, None, 8.1),
    (r"\bMI300X\b", 1307.4, 653.7, 163.4),
)


def peak_flops(device: torch.device | str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Peak dense FLOP/s of a device for matrix products, or None if it is not known.

    Args:
        device: a `torch.device`, or a name as `torch.cuda.get_device_name` returns it. A CPU's peak is not known.
        dtype: the dtype of the products: `torch.bfloat16`, `torch.float16` or `torch.float32`.
        tf32: whether float32 products may run as TF32.
    """
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    found = [row[1:] for row in PEAK_TFLOPS if re.search(row[0], device, re.IGNORECASE)]
    if not found:
        return None
    half, tensor_float, single = found[0]
    if dtype == torch.bfloat16 and tensor_float is None:
        return None  # tensor cores older than Ampere support neither bf16 nor TF32
    if dtype == torch.float32:
        return 1e12 * (tensor_float if tf32 and tensor_float else single)
    return 1e12 * half if dtype in (torch.bfloat16, torch.float16) else None


def hardware_name(device: torch.device) -> str:
    """The name of a GPU, or of a CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


# ----------------------------------------------------------------------------------------------------------------------
# Where the time goes


class StepProfile:
    """Times the parts of some training steps, and reports them once as a table. If it is off, a part costs one comparison.

    `with profile(name):` times a part, including the time since the previous part. `step()` ends a step. On a GPU the marks
    are events in its stream, for which nothing waits; work that overlaps with the GPU's, such as a fast loader, therefore
    takes no time in the table.

    Args:
        steps (`int`, *optional*): steps to time; 0 or None turns it off.
        device: the device that runs the work.
        report: called once with the table, a string.
        warmup (`int`): untimed steps at the start, at least 1.
    """

    def __init__(
        self,
        steps: int | None,
        device: torch.device | str = "cpu",
        report: Callable[[str], None] = print,
        warmup: int = 5,
    ):
        self.steps = steps or 0
        self.warmup = max(1, warmup)
        self.report = report
        self.cuda = torch.device(device).type == "cuda"
        self.active = self.steps > 0
        self.count, self.marks = 0, []
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        """Times the `with` block as the part `name` of a step."""
        yield
        self.mark(name)

    def mark(self, name: str):
        """Attributes the time since the previous mark to `name`."""
        if self.active:
            if self.cuda:
                stamp = torch.cuda.Event(enable_timing=True)
                stamp.record()
            else:
                stamp = time.perf_counter()
            self.marks.append((name, stamp))

    def step(self):
        """Ends a step, and attributes the time since its last mark to logging and checkpoints."""
        if not self.active:
            return
        self.mark("logging, checkpoints")
        self.count += 1
        if self.count == self.warmup:
            self.marks = self.marks[-1:]
        elif self.count == self.warmup + self.steps:
            self.active = False
            self.seconds = self._read()
            self.report(self.table())

    def _read(self) -> dict[str, float]:
        """Seconds per step of each part, in order of first appearance."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:]):
            passed = before.elapsed_time(after) / 1000 if self.cuda else after - before
            seconds[name] = seconds.get(name, 0.0) + passed / self.steps
        return seconds

    def table(self) -> str:
        """Formats the parts of a step with their milliseconds and shares."""
        total = sum(self.seconds.values())
        lines = [f"mean of {self.steps} steps, {total * 1000:.1f} ms each"]
        for name, seconds in self.seconds.items():
            lines.append(f"  {name:<22}{seconds * 1000:>10.2f} ms{100 * seconds / total:>7.1f} %")
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Switches


def speed_up(
    transformer: SiTTransformer2DModel,
    encoders: list,
    compile: bool = False,
    backend: str | None = None,
    compile_mode: str = "default",
):
    """Sets the attention backend, and compiles the encoders and, in place, the repeated blocks, which share one graph.

    The encoders' preparation of pixels is a graph of its own and always in the default mode, because it has few operations
    and its result must outlive the next call.

    The names of weights do not change. Call this before the first forward pass.

    Raises:
        InputError: if diffusers does not support the backend on this machine.
    """
    if backend is not None:
        try:
            transformer.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise InputError("attention_backend", f"`attention_backend` {backend}: {first_line(error)}") from error
    if compile:
        transformer.compile_repeated_blocks(mode=compile_mode)
        for encoder in encoders:
            if isinstance(encoder, PatchEncoder):  # cached features need no compilation
                encoder.model.compile(mode=compile_mode)
                encoder.preprocess = torch.compile(encoder.preprocess)


class CopyStream:
    """Copies batches to a device; to a GPU on a separate stream, while the GPU still computes the previous step.

    The work that uses a batch waits for its copy, and the batch's memory is reused only after that work.

    Args:
        device: the device to which batches are copied.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a batch on the device; the host does not wait for copies from pinned memory."""
        if self.stream is None:
            return {name: tensor.to(self.device) for name, tensor in batch.items()}
        with torch.cuda.stream(self.stream):
            copied = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in copied.values():
            tensor.record_stream(current)
        return copied


class ForeachEMA(EMAModel):
    """diffusers' averaged weights, updated in one pass without the temporary copy of all weights that its own step makes.

    The first step copies the weights. After n further steps the decay is `min(decay, (1 + n) / (10 + n))`. If `min_decay`
    equals `decay`, there is no warm-up, and the decay is `decay` from the second step on.

    With `every` above 1 the average is updated in the first step and in those whose number is a multiple of `every`, by the
    product of the decays of all steps since the last update. If the weights did not change in between, the average would be
    the same.

    Args:
        every (`int`): steps between two updates.
    """

    def __init__(self, parameters, every: int = 1, **kwargs):
        super().__init__(parameters, **kwargs)
        self.every = every

    def share_of_start(self, step: int) -> float:
        """The share of the weights after the first step in the average after `step` steps: the product of all decays."""
        share, step = 1.0, step - step % self.every
        for number in range(2, step + 1):
            decay = self.get_decay(number)
            share *= decay
            if decay == self.decay:  # it does not change any more
                return share * decay ** (step - number)
        return share

    @torch.no_grad()
    def step(self, parameters):
        self.optimization_step = step = self.optimization_step + 1
        if step > 1 and step % self.every:
            return
        # The first step copies the weights, whatever `every` is.
        since = min(step, max(1, step - self.every) + 1)
        self.cur_decay_value = math.prod(self.get_decay(number) for number in range(since, step + 1))
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)
