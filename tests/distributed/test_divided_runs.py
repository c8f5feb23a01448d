# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Runs of several processes: the same trajectory as one process has, with DDP, FSDP and DeepSpeed."""

import json
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from diffusers_vrpo import SiTTransformer2DModel
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.transformer_sit import SiTTransformerBlock
from diffusers_vrpo.training.checkpoints import find_checkpoint, list_checkpoints
from diffusers_vrpo.training.distributed import check_distributed
from diffusers_vrpo.training.metrics import read_metrics
from support.paths import TRAINING_SCRIPT
from support.training import TINY_DIGITS, assert_same_files, losses, projectors_of, run


pytestmark = pytest.mark.usefixtures("one_core")
needs_sharding = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch shards on GPUs only")


needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")


hooks_that_shard = [
    pytest.param("fsdp", marks=needs_sharding),
    pytest.param("zero2", marks=needs_sharding),
    pytest.param("deepspeed", marks=needs_deepspeed),
]


@pytest.mark.slow
def test_three_divisions_give_the_same_trajectory(command, trainers, tmp_path):
    """1 process of 16, 2 of 8 (one of which gets a signal on the way), and 8 twice, over 50 steps."""
    options = {"max_train_steps": 50, "learning_rate": 1e-4, "checkpointing_steps": 10}
    options |= {"alignment_coeff": 0.5, "reward_weighting": "inverse_variance", "conflict": "gate"}
    assert trainers(command(**options)).wait() == [0]
    divided = {"train_batch_size": 8, **options}
    assert trainers(command(**divided, gradient_accumulation_steps=2, output_dir=tmp_path / "twice")).wait() == [0]
    two = command(**divided, output_dir=tmp_path / "two")
    trainer = trainers(two, processes=2)
    trainer.wait_for_step(tmp_path / "two", 15)
    trainer.kill(signal.SIGTERM, rank=1)
    assert trainer.wait() == [143, 143]
    checkpoint = list_checkpoints(tmp_path / "two")[-1]
    # Every process has its own random state and sums in it.
    assert len(list(checkpoint.glob("random_states_*.pkl"))) == len(list(checkpoint.glob("running_means_*"))) == 2
    assert trainers(two, processes=2).wait() == [0, 0]

    reference = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # The weights adapt: bins have enough samples, and rewards vary unequally.
    assert reference[-1]["share/structural"] > 0.4 and reference[-1]["share/fidelity"] < 0.3
    for name in ("twice", "two"):
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 51))
        for key in ("loss_fm", "reward/semantic", "reward/structural"):
            drift = torch.tensor([row[key] for row in rows]) - torch.tensor([row[key] for row in reference])
            print(f"{name} {key}: max |drift| {drift.abs().max():.1e}, mean {drift.mean():.1e}")
            assert drift.abs().max() <= 1e-5 and drift.mean().abs() <= 1e-6


@pytest.mark.slow
def test_options_that_change_a_step_do_so_on_two_processes_too(command, trainers, tmp_path):
    """An average that moves every third step, recomputed blocks, another optimizer and other noise levels."""
    options = {
        "max_train_steps": 4,
        "ema_every": 3,
        "gradient_checkpointing": "mlp",
        "timestep_sampling": "logit_normal",
    }
    options |= {"optimizer": "SGD", "optimizer_args": '{"momentum": 0.9}'}
    run(command(**options))
    options |= {"train_batch_size": 8, "output_dir": tmp_path / "two"}
    trainer = trainers(command(**options), hook="tell DDP's options", processes=2)
    assert trainer.wait() == [0, 0]
    assert trainer.log.read_text().count("DDP: views True, buffers False") == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), abs=1e-5)
    for name in ("transformer", "transformer_ema"):
        file = f"checkpoint-4/{name}/diffusion_pytorch_model.safetensors"
        one, two = (load_file(tmp_path / folder / file) for folder in ("run", "two"))
        assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("hook", hooks_that_shard)
def test_sharded_runs_train_save_and_resume_alike(command, trainers, tmp_path, hook):
    """Two processes with parts: the losses of one process, a bit-equal resume, and the same folder in the end."""
    options = {"max_train_steps": 10, "learning_rate": 1e-4, "validation_steps": 5, "alignment_stop_step": 8}
    options["lr_warmup_steps"] = 20
    assert trainers(command(**options)).wait() == [0]
    options["train_batch_size"] = 8
    assert trainers(command(**options, output_dir=tmp_path / "sharded"), hook=hook, processes=2).wait() == [0, 0]
    left = command(**options, output_dir=tmp_path / "left")
    trainer = trainers(left, hook=hook, processes=2)
    trainer.wait_for_step(tmp_path / "left", 3)
    trainer.kill(signal.SIGTERM)
    assert trainer.wait() == [143, 143]
    assert 3 <= json.loads((list_checkpoints(tmp_path / "left")[-1] / "training_state.json").read_text())["step"] < 10
    assert trainers(left, hook=hook, processes=2).wait() == [0, 0]
    assert losses(tmp_path / "left") == losses(tmp_path / "sharded")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    files = [weights, f"checkpoint-10/{weights}", "checkpoint-10/conflict_gate.safetensors"]
    files += ["checkpoint-10/projectors.safetensors", "checkpoint-10/projectors_ema.safetensors"]
    assert_same_files(tmp_path / "left", tmp_path / "sharded", files)
    drift = torch.tensor(losses(tmp_path / "run")) - torch.tensor(losses(tmp_path / "sharded"))
    assert drift.abs().max() <= 1e-5 and drift.mean().abs() <= 1e-6
    one, two = (load_file(tmp_path / folder / weights) for folder in ("run", "sharded"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    one, two = (projectors_of(tmp_path / folder / "checkpoint-10")[1] for folder in ("run", "sharded"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3
    config = json.loads((tmp_path / "sharded" / "transformer" / "config.json").read_text())
    assert config == json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())
    assert len(list((tmp_path / "sharded" / "samples").iterdir())) == 2


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_accumulates_clips_and_trains_adapters_in_bf16(command, trainers, tmp_path):
    """What DDP does with the same samples, whose numbers are those of one process."""
    options = {"max_train_steps": 10, "learning_rate": 1e-2, "max_grad_norm": 0.01, "lr_warmup_steps": 5}
    run(command(**options, output_dir=tmp_path / "start"))
    start = tmp_path / "start" / "transformer"
    options |= {"model_config": None, "pretrained_model_name_or_path": start, "lora_rank": 2, "kl_coeff": 0.1}
    options |= {"train_batch_size": 4, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}
    assert trainers(command(**options), processes=2).wait() == [0, 0]
    parts = command(**options, output_dir=tmp_path / "parts")
    assert trainers(parts, hook="deepspeed", processes=2).wait() == [0, 0]
    one, two = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("run", "parts"))
    for name in ("loss_fm", "grad_norm", "weight/semantic", "kl"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], abs=1e-5)
    assert min(row["grad_norm"] for row in one) > 0.01  # else nothing was clipped
    weights = "lora/pytorch_lora_weights.safetensors"
    one, two = (load_file(tmp_path / folder / weights) for folder in ("run", "parts"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    # What DDP has saved is not in two parts.
    other = command(
        **options, output_dir=tmp_path / "other", resume_from_checkpoint=tmp_path / "run" / "checkpoint-10"
    )
    trainer = trainers(other, hook="deepspeed", processes=2)
    assert trainer.wait() == [1, 1]
    message = r"ended by InputError: .* \(it has no zero2_0_of_2.safetensors, because it was not saved by the same number of processes"
    assert re.search(message, trainer.log.read_text())


@needs_deepspeed
def test_accelerate_opens_the_configuration_of_deepspeed(monkeypatch):
    path = str(TRAINING_SCRIPT.parent / "configs" / "accelerate" / "deepspeed_zero2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, str(TRAINING_SCRIPT)])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == 8 and arguments.mixed_precision == "bf16" and arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ""  # which the launcher adds
    for variable, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        if variable.startswith("ACCELERATE"):
            monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_plugin=plugin,
        mixed_precision="bf16",
        device=torch.device("cpu"),
    )
    check_distributed(accelerator, False)
    with accelerator.autocast():
        assert torch.ones(1, 1).mm(torch.ones(1, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_zero2"])
def test_accelerate_opens_its_configurations(monkeypatch, name):
    path = str(TRAINING_SCRIPT.parent / "configs" / "accelerate" / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, str(TRAINING_SCRIPT)])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == 8 and arguments.mixed_precision == "bf16"
    assert arguments.multi_gpu == (name == "ddp") and arguments.use_fsdp == (name != "ddp")
    for variable, value in prepare_multi_gpu_env(arguments).items():
        if variable.startswith("FSDP"):
            monkeypatch.setenv(variable, value)
    if name != "ddp":
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward == (name == "fsdp2")
        plugin.set_auto_wrap_policy(SiTTransformer2DModel(**TINY_DIGITS, sample_size=8, in_channels=3, num_classes=10))
        assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {SiTTransformerBlock}


@pytest.mark.parametrize(
    "kind, version, lora, precision, message",
    [
        (DistributedType.MEGATRON_LM, 0, False, "bf16", "configured for MEGATRON_LM, .*fsdp2.yaml or ddp.yaml"),
        (DistributedType.FSDP, 1, False, "bf16", "configured for FSDP 1; set fsdp_version: 2"),
        (DistributedType.FSDP, 2, True, "bf16", "`lora_rank` cannot be combined with FSDP; use .*ddp.yaml"),
        (DistributedType.FSDP, 2, False, "fp16", "`mixed_precision` fp16 cannot be combined with FSDP; .* or bf16"),
    ],
)
def test_what_is_not_done_right_is_refused(kind, version, lora, precision, message):
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2, mixed_precision=precision)
    with pytest.raises(InputError, match=message):
        check_distributed(accelerator, lora)


@pytest.mark.parametrize(
    "config, precision, message",
    [
        ({"zero_optimization": {"stage": 3}}, "bf16", "zero_stage: 3; only stage 2 without offloading is supported"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "bf16",
            "zero_stage: 2 with offloading; only stage 2 without",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            "fp16",
            "`mixed_precision` fp16 cannot be combined with DeepSpeed; use bf16",
        ),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "bf16", "has its own optimizer; remove it"),
    ],
)
def test_what_deepspeed_is_not_taken_for(config, precision, message):
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=plugin, mixed_precision=precision
    )
    with pytest.raises(InputError, match=message):
        check_distributed(accelerator, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook",
    ["nan", pytest.param("fsdp nan", marks=needs_sharding), pytest.param("deepspeed nan", marks=needs_deepspeed)],
)
def test_nan_on_one_process_stops_both(command, trainers, tmp_path, hook):
    trainer = trainers(command(max_train_steps=6, train_batch_size=8), hook=hook, processes=2)
    assert trainer.wait() == [1, 1]
    message = "ended by TrainingStopped: step 4 (samples 48 to 63): the loss is NaN or infinite"
    assert trainer.log.read_text().count(message) == 2
    assert find_checkpoint("latest", tmp_path / "run").name == "checkpoint-3"
    options = [*command(max_train_steps=6, train_batch_size=8), "--skip_nonfinite"]
    assert trainers(options, hook=hook, processes=2).wait() == [0, 0]
    weights = load_file(tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
