# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Options of speed: precision of the autoencoder, TF32, 8-bit layers, modes of compilation, and DDP's options."""

import contextlib
import sys
import warnings
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL

from diffusers_vrpo.alignment.objective import VRPO
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.autoencoder import (
    check_precision,
    encode_images,
    encode_moments,
    encoding_in,
    images_at_a_time,
)
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel
from diffusers_vrpo.training.distributed import ddp_options, prepare
from diffusers_vrpo.training.fp8 import to_fp8, use_fp8
from diffusers_vrpo.training.setup import with_tf32
from diffusers_vrpo.training.throughput import CopyStream, speed_up
from support.models import aligned_with, tiny_model


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).eval().requires_grad_(False)


def test_the_precision_of_the_encoding(vae):
    pixels, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 2, 8, 8)
    exact = encode_images(vae, pixels, noise)
    assert encoding_in(None, "bfloat16") is None and encoding_in(vae, "float32") is vae
    half = encoding_in(vae, "bfloat16")
    with torch.autocast("cpu", torch.float16):  # of other work around it
        found = encode_images(half, pixels, noise)
    assert found.dtype == torch.float32 and 0 < (found - exact).std() < 0.02 * exact.std()
    # The weights, which are saved with the pipeline, stay as they are.
    assert half.dtype == vae.dtype == torch.float32 and half.config is vae.config
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    check_precision(vae, "bfloat16", image)
    vae.encoder.conv_in.weight *= 1e6  # beyond what float16 can hold
    vae.encoder.conv_in.bias += 1e6
    with pytest.raises(
        InputError, match="`vae_dtype` float16: the latents of an image differ from those of float32 by nan"
    ):
        check_precision(vae, "float16", image)


def test_the_layout_of_the_pixels_changes_nothing(vae):
    """On a GPU the autoencoder gets them channels last."""
    pixels = torch.rand(2, 3, 8, 8)
    for a, b in zip(encode_moments(vae, pixels), encode_moments(vae, pixels.to(memory_format=torch.channels_last))):
        torch.testing.assert_close(a, b)


def test_a_cpu_encodes_few_large_images_at_a_time():
    """Blocks of memory above 32 MB would be filled with zeros by the system for every layer."""
    sizes = []

    def encode(pixels):
        sizes.append(len(pixels))
        return SimpleNamespace(latents=pixels[..., ::8, ::8])

    vae = SimpleNamespace(encode=encode, dtype=torch.float32)
    pixels = torch.rand(5, 3, 128, 128)
    assert torch.equal(encode_moments(vae, pixels)[0], pixels[..., ::8, ::8])
    encode_moments(vae, torch.zeros(33, 3, 32, 32))
    encode_moments(vae, torch.zeros(2, 3, 256, 256))
    assert sizes == [2, 2, 1, 32, 1, 1, 1]
    assert images_at_a_time(torch.empty(256, 3, 256, 256, device="meta")) == 32  # of any other device


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"vae_dtype": "bfloat16", "latents_dir": "cache"},
            "`vae_dtype` bfloat16 has no effect with `latents_dir` cache",
        ),
        ({"vae_dtype": "float16", "vae": "none"}, "`vae_dtype` float16 has no effect with `vae` none"),
        ({"vae_dtype": "int8"}, "`vae_dtype` must be one of float32, bfloat16, float16"),
        ({"compile_mode": "reduce-overhead"}, "`compile_mode` reduce-overhead has no effect without `compile`"),
        (
            {"compile_mode": "fast", "compile": True},
            "`compile_mode` must be one of default, max-autotune-no-cudagraphs, red",
        ),
        ({"fp8": True, "mixed_precision": "fp16"}, "`fp8` needs `mixed_precision` bf16, not fp16"),
        ({"fp8": True, "lora_rank": 4}, "`fp8` cannot be combined with `lora_rank` 4"),
        ({"ema_every": 4, "use_ema": False}, "`ema_every` 4 has no effect without `use_ema`"),
        (
            {"ema_every": 11, "max_train_steps": 10},
            "`ema_every` 11 would never update the averaged weights, because `max_train_steps` is 10",
        ),
        ({"ema_every": 0}, "`ema_every` 0 must be at least 1"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(InputError, match=message):
        VRPOConfig(**options)


def test_tf32_is_on_unless_a_run_began_without():
    assert with_tf32(VRPOConfig(), None).allow_tf32 is True
    assert with_tf32(VRPOConfig(allow_tf32=False), None).allow_tf32 is False
    for name in ("allow_tf32", "--allow_tf32"):  # version 0.1 kept the names of flags
        before = {"settings": {name: False}}
        assert with_tf32(VRPOConfig(), before).allow_tf32 is False
        assert (
            with_tf32(VRPOConfig(allow_tf32=True), before).allow_tf32 is True
        )  # which is then refused, as any change
    assert with_tf32(VRPOConfig(), {"settings": {}}).allow_tf32 is True


def test_modes_of_compilation_reach_the_blocks():
    asked = []
    transformer = SimpleNamespace(compile_repeated_blocks=lambda **options: asked.append(options))
    speed_up(transformer, [], compile=True, compile_mode="max-autotune-no-cudagraphs")
    speed_up(transformer, [], compile=False, compile_mode="default")
    assert asked == [{"mode": "max-autotune-no-cudagraphs"}]


def test_batches_are_copied_beside_the_work(monkeypatch):
    """Stand-ins for a GPU's streams and for a batch's tensor, which record their calls."""
    asked, on = [], ["work"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

    class Tensor:
        def to(self, device, non_blocking=False):
            asked.append(f"copy to {device} on {on[-1]}, {'asynchronous' if non_blocking else 'waiting'}")
            return self

        def record_stream(self, stream):
            asked.append(f"in use by {stream.name}")

    @contextlib.contextmanager
    def stream(side):
        on.append(side.name)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(on[-1]))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    CopyStream(torch.device("cuda"))({"noise": Tensor()})
    assert asked == ["copy to cuda on copies, asynchronous", "work waits for copies", "in use by work"]
    monkeypatch.undo()
    batch = {"noise": torch.ones(2)}
    assert CopyStream(torch.device("cpu"))(batch)["noise"] is batch["noise"]


def test_layers_in_8_bits(monkeypatch):
    """torchao is asked for attention and feed-forward of the blocks, and for nothing else."""
    model = SiTTransformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=16)
    names = {}

    def convert(module, module_filter_fn):
        linear = {name: each for name, each in module.named_modules() if isinstance(each, torch.nn.Linear)}
        names.update({name: module_filter_fn(each, name) for name, each in linear.items()})

    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    float8 = ModuleType("torchao.float8")
    float8.convert_to_float8_training = convert
    monkeypatch.setitem(sys.modules, "torchao.float8", float8)
    to_fp8(model)
    layers = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
    chosen = {name for name, meant in names.items() if meant}
    assert chosen == {f"transformer_blocks.{i}.{layer}" for i in (0, 1) for layer in layers}
    assert {"proj_out", "modulation_out", "time_embedding.linear_1", "transformer_blocks.0.modulation"} <= names.keys()
    narrow = SiTTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8)
    names.clear()
    to_fp8(narrow)
    assert not any(names.values())  # sides that are not multiples of 16

    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(InputError, match="`fp8` needs torchao, which cannot be imported .*; pip install torchao"):
        to_fp8(model)
    for device, kind, precision, rows, message in (
        ("cpu", "NO", "bf16", 64, "`fp8` needs an Ada, Hopper or later GPU, and this is "),
        ("cuda", "FSDP", "bf16", 64, "`fp8` cannot be combined with FSDP"),
        ("cuda", "NO", "no", 64, "`fp8` needs `mixed_precision` bf16, not no"),
        ("cuda", "NO", "bf16", 60, "`fp8` needs a multiple of 16 tokens in a micro-step, not 60"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        accelerator = SimpleNamespace(
            device=torch.device(device), distributed_type=DistributedType[kind], mixed_precision=precision
        )
        with pytest.raises(InputError, match=message):
            use_fp8(accelerator, model, rows)


def test_statistics_travel_in_one_message():
    objective = VRPO(aligned_with(tiny_model(), [1, 3]), 100, release="plateau")
    objective.sums.sums += 1
    messages = []

    def all_reduce(tensor):
        messages.append(tensor)
        return 2 * tensor  # as of two processes that have seen the same

    objective.collect(all_reduce)
    # A count, three rewards and two gradients of each projector, its distance, and four numbers of the two gradients.
    assert [message.shape for message in messages] == [(2, 1 + 2 * 5 + 2 + 4, 10)]
    assert objective.sums.read(all_reduce).unique().tolist() == [2] and not objective.sums.sums.any()
    objective.release.stop_step = 0  # after the end of alignment nothing is sent
    objective.collect(all_reduce)
    assert len(messages) == 1


def test_what_ddp_is_told():
    model = SiTTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8)
    options = ddp_options(model)
    assert options.gradient_as_bucket_view and not options.broadcast_buffers and not options.static_graph
    # A norm that keeps statistics of its own in training needs those of the first process everywhere.
    assert ddp_options(torch.nn.Sequential(model, torch.nn.BatchNorm2d(3))).broadcast_buffers


def test_the_old_name_of_ddps_option_is_not_warned_of():
    def wrap(*parts):
        warnings.warn(
            "`broadcast_buffers` is deprecated. Use `forward_sync_buffers` instead.", FutureWarning, stacklevel=2
        )
        return parts

    processes = {"distributed_type": DistributedType.MULTI_CPU, "mixed_precision": "no"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(SimpleNamespace(prepare=wrap, **processes), torch.nn.Linear(2, 2), None)[1] is None
