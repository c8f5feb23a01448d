# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""FLOPs, peaks, the step's profile; no wait for the device in a step; the benchmark of the step."""

import importlib
import io
import json
import logging
import sys

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.config import SpeedConfig
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel, sit_preset
from diffusers_vrpo.training.distributed import lines_above_the_bar
from diffusers_vrpo.training.metrics import shown_values
from diffusers_vrpo.training.throughput import (
    ForeachEMA,
    StepProfile,
    encoder_flops,
    forward_flops,
    num_tokens,
    peak_flops,
    projector_flops,
    speed_up,
    step_flops,
    throughput_meter,
    throughput_metrics,
    training_flops,
)
from support.models import aligned_with
from support.paths import ROOT


BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def train_step():
    """benchmarks/train_step.py as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("train_step")
    finally:
        sys.path.remove(str(BENCHMARKS))


def tiny_settings(train_step, *options):
    arguments = "--preset SiT-XS/8 --encoder_size tiny --projector_dim 32 --batch_size 3 --device cpu --no-compile"
    return train_step.build_parser().parse_args([*arguments.split(), *options])


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs


def counted(function, *arguments, **options):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = function(*arguments, **options)
        if torch.is_grad_enabled():
            sum(tensor.sum() for tensor in (result[0], *result[1])).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "patch_size": 2},
        {"num_layers": 3, "num_attention_heads": 3, "attention_head_dim": 24, "patch_size": 4, "mlp_ratio": 3.0},
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "sample_size": (16, 8),
            "in_channels": 3,
            "prediction_type": "epsilon",
            "learn_sigma": True,
        },
    ],
)
@pytest.mark.parametrize("projector_type", ["mlp", "conv"])
def test_flops_are_what_torch_counts(config, projector_type):
    model = SiTTransformer2DModel(**config)
    aligned = aligned_with(model, (1,), (48, 20), projector_type, 40)
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs = (
        torch.randn(2, model.config.in_channels, height, width),
        torch.rand(2),
        torch.zeros(2, dtype=torch.long),
    )
    with torch.no_grad():
        forward = counted(model, *inputs, return_dict=False)
        both = counted(aligned, *inputs)
    assert 2 * forward_flops(model.config) == pytest.approx(forward, rel=0.01)
    projectors = projector_flops(aligned.hidden_dim, num_tokens(model.config), 1, [48, 20], projector_type, 40)
    assert 2 * projectors == pytest.approx(both - forward, rel=0.01)
    # A backward has two products for each one, but for the first layer's input.
    step = counted(aligned, *inputs)
    expected = training_flops(forward_flops(model.config) + projectors)
    assert step_flops(aligned) == (training_flops(forward_flops(model.config)), expected)
    assert 2 * expected == pytest.approx(step, rel=0.02)


def test_flops_of_the_papers_models():
    """DiT counts multiply-adds at 256 tokens: 6.06 (S/2), 23.01 (B/2), 80.71 (L/2), 118.64 (XL/2) billion."""
    for name, billions in (("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)):
        for kind in ("SiT", "DiT"):
            assert forward_flops(sit_preset(f"{kind}-{name}/2")) / 2e9 == pytest.approx(billions, rel=0.005)
    assert num_tokens(sit_preset("SiT-B/2")) == 256
    assert forward_flops(sit_preset("SiT-B/2"), tokens=1024) > 4 * forward_flops(sit_preset("SiT-B/2"))


def test_training_flops():
    assert training_flops(10) == 30
    assert training_flops(10, encoders=7) == 37
    assert training_flops(10, encoders=7, recompute=True) == 47
    assert training_flops(10, encoders=7, adapters=True) == 27


def test_encoder_and_step_flops(train_step):
    setup = train_step.Setup(tiny_settings(train_step), "SiT-XS/8")
    encoder = setup.encoder()
    dim, tokens = encoder.embed_dim, 16
    block = (tokens + 1) * 12 * dim**2 + 2 * (tokens + 1) ** 2 * dim
    assert encoder_flops(encoder) == pytest.approx(2 * (12 * block + tokens * 3 * 14**2 * dim), rel=0.01)
    model = train_step.build_plain(setup).aligned
    config = model.transformer.config
    projectors = projector_flops(model.hidden_dim, num_tokens(config), 1, [encoder.embed_dim], "mlp", 32)
    plain, aligned = step_flops(model)
    assert plain == 3 * forward_flops(config)
    assert aligned == plain + 3 * projectors + encoder_flops(encoder)
    assert step_flops(AlignedTransformer(model.transformer))[1] == plain
    model.encoders = [object()]  # features out of a cache
    assert step_flops(model)[1] == plain + 3 * projectors
    meter = throughput_meter((plain, aligned), setup.accelerator, peak_tflops=2.0)
    assert meter(50.0, False) == throughput_metrics(50.0, plain, 2e12)
    assert meter(50.0, True) == throughput_metrics(50.0, aligned, 2e12)
    assert list(throughput_meter((1, 2), setup.accelerator)(1.0, True)) == ["tflops_per_device"]
    model.transformer.patch_embed.requires_grad_(False)  # adapters
    assert step_flops(model)[0] == 2 * forward_flops(config)


def test_log_lines_stand_above_the_progress_bar(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    handler = logging.StreamHandler(output)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with tqdm(total=2, file=output), lines_above_the_bar():
        logging.getLogger("a").warning("a line")
    assert handler.stream is output
    before, after = output.getvalue().split("a line")
    assert before.endswith("\r") and after.startswith("\n")


def test_throughput_metrics():
    values = {"loss_fm": 0.51234, "images_per_second": 812.3, "tflops_per_device": 310.04, "mfu": 0.3133}
    assert shown_values(values) == {"loss": "0.5123", "images/s": "812", "TFLOP/s": "310", "MFU": "31.3%"}
    values = {"loss_fm": 0.5, "images_per_second": 7.0, "tflops_per_device": 0.01}
    assert shown_values(values) == {"loss": "0.5000", "images/s": "7.0"}
    # The reward that repeats the loss is in the metrics only.
    values |= {"reward/fidelity": -0.5, "reward/semantic": 0.25}
    assert shown_values(values) == {"loss": "0.5000", "semantic": "0.2500", "images/s": "7.0"}
    assert throughput_metrics(100.0, 2e12) == {"tflops_per_device": 200.0}
    assert throughput_metrics(100.0, 2e12, peak=400e12) == {"tflops_per_device": 200.0, "mfu": 0.5}
    assert throughput_metrics(100.0, 2e12, peak=400e12, num_processes=4)["mfu"] == 0.125


# ----------------------------------------------------------------------------------------------------------------------
# Peaks


@pytest.mark.parametrize(
    "name, dtype, tf32, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, True, 156),
        ("NVIDIA A100-PCIE-40GB", torch.float32, False, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4),
        ("NVIDIA H100 PCIe", torch.float16, False, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, False, 835),
        ("NVIDIA H200", torch.bfloat16, False, 989.4),
        ("NVIDIA H200 NVL", torch.bfloat16, False, 835),
        ("NVIDIA L40S", torch.bfloat16, False, 362),
        ("NVIDIA GeForce RTX 4090", torch.float16, False, 165.2),
        ("Tesla V100-SXM2-16GB", torch.float16, False, 125),
        ("Tesla V100-PCIE-32GB", torch.float16, False, 112),
        ("Tesla V100-SXM2-16GB", torch.float32, True, 15.7),
        ("Tesla T4", torch.float16, False, 65),
    ],
)
def test_known_peaks(name, dtype, tf32, tflops):
    assert peak_flops(name, dtype, tf32) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "device, dtype",
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.float16),
        ("NVIDIA GeForce RTX 4090 D", torch.float16),
        ("NVIDIA GeForce RTX 3090 Ti", torch.float16),
        ("NVIDIA A10G", torch.float16),
        ("Tesla V100-SXM2-16GB", torch.bfloat16),
        ("NVIDIA A100-SXM4-80GB", torch.float64),
        ("a GPU of next year", torch.bfloat16),
        (torch.device("cpu"), torch.float32),
    ],
)
def test_unknown_peaks_are_none(device, dtype):
    assert peak_flops(device, dtype) is None


# ----------------------------------------------------------------------------------------------------------------------
# Profile


def test_profile(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("diffusers_vrpo.training.throughput.time.perf_counter", lambda: now[0])
    tables = []
    profile = StepProfile(2, report=tables.append, warmup=1)
    for step in range(5):
        for _ in range(2):  # micro-steps
            now[0] += 100.0 if step == 0 else 1.0
            profile.mark("data")
            with profile("backward"):
                now[0] += 3.0
        now[0] += 2.0
        profile.step()
    assert profile.seconds == {"data": 2.0, "backward": 6.0, "logging, checkpoints": 2.0}
    assert len(tables) == 1 and "mean of 2 steps, 10000.0 ms each" in tables[0]
    assert "60.0 %" in tables[0] and "data" in tables[0]


@pytest.mark.parametrize("steps", [0, None])
def test_profile_off(steps, monkeypatch):
    monkeypatch.setattr(
        "diffusers_vrpo.training.throughput.time.perf_counter",
        lambda: pytest.fail("it asked for the time"),
    )
    profile = StepProfile(steps, report=lambda table: pytest.fail("it reported"))
    for _ in range(20):
        with profile("data"):
            pass
        profile.step()
    assert profile.marks == []


# ----------------------------------------------------------------------------------------------------------------------
# Waits


READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}
WAITING_OPS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "allclose",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}


class Waits:
    """Collects what would make the host wait if the tensors were on a GPU, by name.

    Two modes: reads from Python, some of which never reach the dispatcher (`tolist`), and operations inside torch.
    """

    def __init__(self):
        self.found = found = []

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                name = getattr(function, "__name__", "")
                if name in READS:
                    found.append(name)
                return function(*args, **(kwargs or {}))

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.overloadpacket.__name__
                # Reads from Python were counted there.
                if name in WAITING_OPS and not (found and found[-1] in READS and name == "_local_scalar_dense"):
                    found.append(name)
                if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                    indices = [index for index in args[1] if index is not None]
                    found.extend("mask" for index in indices if index.dtype in (torch.bool, torch.uint8))
                return function(*args, **(kwargs or {}))

        self.modes = (Functions(), Operations())

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self.found

    def __exit__(self, *exception):
        for mode in reversed(self.modes):
            mode.__exit__(*exception)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x.mean()),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.nn.utils.clip_grad_norm_([x], 1.0, error_if_nonfinite=True),
    ],
)
def test_waits_are_noticed(read):
    x = torch.arange(4.0).requires_grad_(False)
    x.grad = torch.ones(4)
    with Waits() as waits:
        read(x)
    assert waits


@pytest.mark.parametrize("objective", ["vrpo", "repa"])
def test_a_step_reads_nothing_but_the_guards_answer(train_step, objective, monkeypatch):
    """Encoder, forward, losses, backward, clipping, optimizer, average, statistics; the guard asks once, behind them.

    Before them the loader's list of damaged images is read, which is on the CPU.
    """
    setup = train_step.Setup(tiny_settings(train_step), "SiT-XS/8")
    arm = train_step.build_ours(setup, objective)
    for _ in range(2):  # what is made once
        arm.run(setup.next_batch(3))
    batch = setup.next_batch(3)
    with Waits() as waits:
        arm.run(batch)
    assert waits == ["tolist", "tolist"]
    monkeypatch.setattr(arm.guard, "answer", lambda: None)
    with Waits() as waits:
        arm.run(batch)
    assert waits == ["tolist"]
    # The plain step reads three numbers: the count can fail. (AdamW that is not fused reads its own counters.)
    plain = train_step.build_plain(setup, ("adamw",))
    with Waits() as waits:
        plain.run(batch)
    assert waits == ["item"] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_on_a_gpu_never_waits(train_step, dtype, monkeypatch):
    settings = tiny_settings(train_step, "--dtype", dtype)
    settings.device = "cuda"
    setup = train_step.Setup(settings, "SiT-XS/8")
    arm = train_step.build_ours(setup, "vrpo")
    for _ in range(2):
        arm.run(setup.next_batch(3))
    batch = setup.next_batch(3)
    monkeypatch.setattr(arm.guard, "answer", lambda: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        arm.run(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------------------------------------------------
# Switches


def test_the_average_in_one_pass_is_diffusers():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    options = {"decay": 0.9, "min_decay": 0.9}
    averages = [EMAModel(parameters, foreach=True, **options), ForeachEMA(parameters, **options)]
    for _ in range(5):
        for parameter in parameters:
            parameter.data += torch.randn_like(parameter)
        for average in averages:
            average.step(iter(parameters))
    for ours, theirs in zip(averages[1].shadow_params, averages[0].shadow_params):
        torch.testing.assert_close(ours, theirs)
    assert averages[1].optimization_step == 5 and averages[1].cur_decay_value == 0.9


def test_an_average_that_moves_every_few_steps():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 3))]
    for min_decay in (0.0, 0.9):  # with and without warm-up
        rare, always = (ForeachEMA(parameters, every, decay=0.9, min_decay=min_decay) for every in (3, 1))
        start = before = parameters[0].detach().clone()
        for step in range(1, 11):
            if step % 3 == 1:  # the weights stay in between: then both are the same average
                parameters[0].data += 1
            if step == 8:  # as a checkpoint and its continuation
                saved, rare = rare, ForeachEMA(parameters, 3, decay=0.9, min_decay=min_decay)
                rare.shadow_params, rare.optimization_step = saved.shadow_params, 7
            rare.step(parameters)
            always.step(parameters)
            if step in (1, 3, 6, 9):
                torch.testing.assert_close(rare.shadow_params[0], always.shadow_params[0])
            else:
                assert torch.equal(rare.shadow_params[0], before)
            before = rare.shadow_params[0].clone()
        assert rare.share_of_start(10) == pytest.approx(always.share_of_start(9))
        assert rare.share_of_start(2) == always.share_of_start(1) == 1
        parameters[0].data = start
    assert rare.cur_decay_value == pytest.approx(0.9**3)


def test_speed_up():
    model = SiTTransformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=16)
    names = list(model.state_dict())
    speed_up(model, [])
    assert all(block._compiled_call_impl is None for block in model.transformer_blocks)
    speed_up(model, [object()], compile=True, backend="_native_math")
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    assert list(model.state_dict()) == names
    with pytest.raises(InputError, match="`attention_backend` nonsense: "):
        speed_up(model, [], backend="nonsense")
    speed_up(model, [], backend="native")


def test_the_trainers_options(train_step):
    setup = train_step.Setup(tiny_settings(train_step), "SiT-XS/8")
    tables = []
    for options, compiled in (({}, False), ({"compile": True, "profile": 2, "peak_tflops": 3.0}, True)):
        model = SiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=16)
        args = SpeedConfig(**options)
        speed_up(model, [], args.compile, args.attention_backend)
        meter = throughput_meter(step_flops(AlignedTransformer(model)), setup.accelerator, args.peak_tflops)
        profile = StepProfile(args.profile, setup.accelerator.device, tables.append)
        assert (model.transformer_blocks[0]._compiled_call_impl is not None) == compiled
        assert ("mfu" in meter(10.0, False)) == compiled
        for _ in range(10):
            with profile("forward"):
                pass
            profile.step()
        assert len(tables) == compiled


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark


@pytest.mark.parametrize("improvements", [(), ("adamw", "ema", "loss", "sync")])
def test_the_plain_step_does_the_same_as_ours(train_step, improvements):
    """What is compared in time must be the same work: gradients, and with them all that follows."""
    setup = train_step.Setup(tiny_settings(train_step), "SiT-XS/8")
    ours, plain = train_step.build_ours(setup, "repa"), train_step.build_plain(setup, improvements)
    for _ in range(3):
        batch = setup.next_batch(3)
        ours.run(batch)
        plain.run(batch)
    log = {name: float(value) for name, value in plain.log.items()}
    assert log["loss"] > 0 and log["grad_norm"] > 0
    moments = ours.optimizer.optimizer.state
    for (name, a), b in zip(ours.aligned.named_parameters(), plain.aligned.parameters()):
        if name.endswith("to_k.bias"):
            continue  # softmax does not see it: its gradient is rounding
        # Adam's first moments are linear in the gradients; its steps are not, where those are all but zero.
        expected, found = moments[a]["exp_avg"], plain.optimizer.state[b]["exp_avg"]
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3 * expected.abs().max().item(), msg=name)
        assert (a - b).abs().max() < 5e-4
    for a, b in zip(ours.ema.shadow_params, plain.average):
        assert (a - b).abs().max() < 5e-4


def test_the_benchmark_reports(train_step, tmp_path, capsys):
    path = tmp_path / "report.json"
    report = train_step.main(tiny_settings(train_step, "--repeats", "2", "--warmup", "1", "--json", str(path)))
    assert json.loads(path.read_text())["ratios"] == report["ratios"]
    assert list(report["arms"]) == [
        "plain",
        "+ fused AdamW",
        "+ average in one pass",
        "+ loss without a loop",
        "+ no losses read",
        "plain, all",
        "repa",
        "vrpo",
    ]
    assert all(len(arm["seconds"]) == 2 for arm in report["arms"].values())
    assert all(r["low"] <= r["ratio"] <= r["high"] for r in report["ratios"])
    judged = {r["above"]: r["at_least"] for r in report["ratios"]}
    assert judged["vrpo"] == judged["repa"] == 1.0 and judged["+ fused AdamW"] is None
    assert "vrpo / plain" in capsys.readouterr().out


def test_the_sweep_reports(train_step, capsys):
    report = train_step.main(
        tiny_settings(train_step, "--repeats", "1", "--warmup", "1", "--peak_tflops", "1", "--sweep", "SiT-XS/8")
    )
    (row,) = report["rows"]
    assert row["preset"] == "SiT-XS/8" and row["batch_size"] == 3 and row["images_per_second"] > 0
    assert row["mfu"] == pytest.approx(row["tflops_per_device"]) and row["peak_memory_bytes"] is None
    assert "SiT-XS/8" in capsys.readouterr().out
