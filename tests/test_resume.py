"""Runs that are killed, interrupted, divided otherwise, or meet NaN and full disks.

A process that has imported everything forks the trainers, so that a start costs no seconds: `trainers(...)`.
"""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from test_train_cli import (  # noqa: F401
    SCRIPT,
    TINY,
    assert_same_files,
    command,
    losses,
    no_network_environment,
    run,
    train_vrpo,
)

from diffusers_vrpo import SiTTransformer2DModel, training
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.interruption import OVERFLOWS_IN_A_ROW, SKIPPED_IN_A_ROW, Interruption, StepGuard, TrainingStopped
from diffusers_vrpo.latents import TrainingSamples
from diffusers_vrpo.sharding import check_distributed
from diffusers_vrpo.training import RunningMeans, find_checkpoint, find_damage, list_checkpoints, read_metrics
from diffusers_vrpo.transformer_sit import SiTTransformerBlock


# Reads JSON lines: what to start (then it prints the process id) or which process to wait for (its exit code).
FORK_SERVER = """
import faulthandler, importlib.util, json, os, resource, shutil, signal, sys, traceback
import sklearn.datasets, tensorboard  # noqa: what a run would import later
spec = importlib.util.spec_from_file_location("train_vrpo", sys.argv[1])
train_vrpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_vrpo)
from diffusers_vrpo import latents, training
from diffusers_vrpo.digits import digits_splits

digits_splits()  # made once, for all that are forked

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def nth_call(n, before, module, name):  # or every call, for 0
    original, calls = getattr(module, name), []
    def patched(*args, **kwargs):
        calls.append(0)
        if n in (0, len(calls)):
            before(*args, **kwargs)
        return original(*args, **kwargs)
    setattr(module, name, patched)

def half_a_file(tensors, path):
    with open(path, "wb") as file:
        file.write(b"half")
    die()

def half_deleted(path, ignore_errors=False):
    if path.name.endswith(".old") and path.exists():
        (path / "training_state.json").unlink()
        die()

def no_name(*paths):
    if len(paths) == 1 and paths[0].name.startswith(".checkpoint-"):
        die()

def nan_sample(index):
    original = latents.TrainingSamples.__getitems__
    def patched(self, indices):
        batch = original(self, indices)
        batch["noise"][batch["index"] == index] = float("nan")
        return batch
    latents.TrainingSamples.__getitems__ = patched

def fsdp(reshard):
    # accelerate has FSDP for GPUs only; on the CPU its parts work all the same.
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from diffusers_vrpo.sharding import check_distributed
    original = train_vrpo.start_accelerator
    def patched(args, output_dir):
        accelerator = original(args, output_dir)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=reshard, cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["SiTTransformerBlock"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
        check_distributed(accelerator, args.lora_rank)
        return accelerator
    train_vrpo.start_accelerator = patched

def deepspeed_zero2():
    # As with FSDP: accelerate starts DeepSpeed for accelerators only, which runs on the CPU all the same.
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Left by a configuration: the script's options count.
    os.environ |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "3.0"}
    import deepspeed.comm.torch
    from accelerate import DeepSpeedPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from diffusers_vrpo.sharding import check_distributed
    deepspeed.comm.torch.build_shm_op = lambda: None  # a faster way over shared memory, to be compiled
    original = train_vrpo.start_accelerator
    def patched(args, output_dir):
        accelerator = original(args, output_dir)
        plugin = accelerator.state.deepspeed_plugins = DeepSpeedPlugin(zero_stage=2)
        plugin.set_mixed_precision(args.mixed_precision or "no")
        plugin.select(_from_accelerator_state=True)
        PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.DEEPSPEED
        accelerator.deepspeed_engine_wrapped = None
        check_distributed(accelerator, args.lora_rank)
        return accelerator
    train_vrpo.start_accelerator = patched

HOOKS = {
    None: lambda: None,
    # Each kills itself on the way to a checkpoint.
    "half a file": lambda: nth_call(5, half_a_file, training, "save_file"),
    "no manifest": lambda: nth_call(2, lambda folder: die(), training, "write_manifest"),
    "no name": lambda: nth_call(0, no_name, training, "sync_to_disk"),
    "half deleted": lambda: nth_call(0, half_deleted, training.shutil, "rmtree"),
    "nan": lambda: nan_sample(60),
    "fsdp": lambda: fsdp(True),
    "zero2": lambda: fsdp(False),
    "fsdp nan": lambda: (fsdp(True), nan_sample(60)),
    "deepspeed": deepspeed_zero2,
    "deepspeed nan": lambda: (deepspeed_zero2(), nan_sample(60)),
    # From the second checkpoint on no file may be longer than 10 kB.
    "disk full": lambda: nth_call(2, lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, -1)),
                                  train_vrpo, "save_checkpoint"),
    "no room for the result": lambda: nth_call(1, lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, -1)),
                                               train_vrpo.VRPOPipeline, "save_pretrained"),
}

cores = [*getattr(os, "sched_getaffinity", lambda pid: [])(0)]
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            faulthandler.dump_traceback_later(150, exit=True)
            os.environ.update(order["environment"])
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {cores[int(os.environ.get("RANK", 0)) % len(cores)]})
            HOOKS[order["hook"]]()
            train_vrpo.main(train_vrpo.parse_args(order["options"]))
            code = 0
        except SystemExit as error:
            code = error.code
        except Exception as error:
            os.write(1, f"ended by {type(error).__name__}: {error}\\n".encode())
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


class Trainer:
    """A trainer of one or more processes, in the background."""

    def __init__(self, ask, log: Path, options: list[str], hook: str | None, processes: int):
        self.ask, self.log = ask, log
        environment = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        self.pids = []
        log.touch()
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            order = {"options": options, "environment": environment | ranks, "hook": hook, "log": str(log)}
            self.pids.append(ask(order))

    def wait(self) -> list[int]:
        return [self.ask({"wait": pid}) for pid in self.pids]

    def kill(self, signum=signal.SIGKILL, rank=0):
        os.kill(self.pids[rank], signum)

    def wait_for_step(self, output_dir: Path, step: int):
        """Until the run has logged this step."""
        for _ in range(6000):
            path = output_dir / "metrics.jsonl"
            if path.exists() and any(row["step"] >= step for row in read_metrics(path)):
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached: {self.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """Starts trainers: `trainers(options, hook=None, processes=1)`."""
    folder = tmp_path_factory.mktemp("fork_server")
    (folder / "server.py").write_text(FORK_SERVER)
    server = subprocess.Popen(
        [sys.executable, str(folder / "server.py"), str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**no_network_environment(), "OMP_NUM_THREADS": "1"},
    )

    def ask(order: dict) -> int:
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def start(options: list[str], hook: str | None = None, processes: int = 1) -> Trainer:
        return Trainer(ask, folder / f"{len(list(folder.iterdir()))}.txt", options, hook, processes)

    yield start
    server.stdin.close()
    server.wait()


def assert_same_end(a: Path, b: Path, step: int):
    """Weights, averages, optimizer, statistics, what is published, and every logged number but the speed."""
    weights = "diffusion_pytorch_model.safetensors"
    names = [f"transformer/{weights}", f"transformer_ema/{weights}"]
    names += ["reward_statistics.safetensors", "conflict_gate.safetensors", "running_means_0.safetensors"]
    checkpoints = a / f"checkpoint-{step}", b / f"checkpoint-{step}"
    assert_same_files(*checkpoints, names)
    assert_same_files(a, b, [f"transformer/{weights}"])
    left, right = (torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in checkpoints)
    assert left.keys() == right.keys() and left
    for key, state in left.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, right[key][name])
    left, right = (json.loads((path / "training_state.json").read_text()) for path in checkpoints)
    assert left.pop("train_seconds") > 0 and right.pop("train_seconds") > 0
    assert left == right
    left, right = (read_metrics(path / "metrics.jsonl") for path in (a, b))
    for row in left + right:
        for name in ("images_per_second", "tflops_per_device", "train_seconds", "skipped_steps"):
            row.pop(name, None)
    assert [str(row) for row in left] == [str(row) for row in right] and left[-1]["step"] == step  # NaN equals NaN


@pytest.fixture(autouse=True)
def one_core(trainers):
    """Each process has a core: threads that wait for one another are slow where cores are shared."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


# Killed and interrupted


@needs_fork
def test_killed_at_any_moment_the_end_is_bit_equal(command, trainers, tmp_path):  # noqa: F811
    # Logged every third step, saved every second: sums of half a log interval are part of a checkpoint.
    options = {"max_train_steps": 44, "checkpointing_steps": 2, "checkpoints_total_limit": 2, "logging_steps": 3}
    options |= {"lr_scheduler": "cosine", "lr_warmup_steps": 5, "train_batch_size": 32, "learning_rate": 1e-3}
    straight, killed = tmp_path / "run", tmp_path / "killed"
    assert trainers(command(**options)).wait() == [0]
    dice = random.Random(os.environ.get("KILL_SEED", "0"))
    again = command(**options, output_dir=killed)
    saved, folders = 0, []
    in_checkpoints = ["half a file", "no manifest", "no name", "half deleted"]
    plan = [*in_checkpoints, *[None] * 7]
    dice.shuffle(plan)
    for number, hook in enumerate(plan):
        trainer = trainers(again, hook=hook)
        if hook is None:
            # Now and then on the way to the first step, otherwise after some.
            if number % 4:
                trainer.wait_for_step(killed, min(saved + 3, 42))
            time.sleep(dice.uniform(0, 0.3))
            trainer.kill()
        codes = trainer.wait()
        assert codes == [-signal.SIGKILL], (hook, trainer.log.read_text()[-2000:])
        # Whatever happened, the newest checkpoint with a name is whole, and they only get newer.
        existing = list_checkpoints(killed)
        folders.append(sorted(path.name for path in killed.glob(".checkpoint-*")))
        if existing:
            assert find_damage(existing[-1]) is None
            assert int(existing[-1].name.split("-")[1]) >= saved
            saved = int(existing[-1].name.split("-")[1])
    assert 0 < saved < 44 and any(folders)
    assert trainers(again).wait() == [0]
    assert_same_end(straight, killed, 44)
    assert [path.name for path in list_checkpoints(killed)] == ["checkpoint-42", "checkpoint-44"]
    assert [path.name for path in killed.glob(".*")] == [".lock"]
    share = read_metrics(killed / "metrics.jsonl")[-1]["share/semantic"]
    assert share != pytest.approx(1 / 3)


@needs_fork
@pytest.mark.parametrize("signum, policy_epochs", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_the_end_is_bit_equal(command, trainers, tmp_path, signum, policy_epochs):  # noqa: F811
    options = {"max_train_steps": 14, "dataloader_num_workers": 1, "logging_steps": 2, "learning_rate": 1e-3}
    if policy_epochs > 1:
        options |= {"estimator": "sampled", "policy_epochs": policy_epochs, "logging_steps": 1}
    assert trainers(command(**options)).wait() == [0]
    again = command(**options, output_dir=tmp_path / "left")
    trainer = trainers(again)
    trainer.wait_for_step(tmp_path / "left", 4)
    trainer.kill(signum)
    assert trainer.wait() == [128 + signum]
    (checkpoint,) = list_checkpoints(tmp_path / "left")
    step = json.loads((checkpoint / "training_state.json").read_text())["step"]
    assert 4 <= step < 14 and step % policy_epochs == 0
    assert trainers(again).wait() == [0]
    assert_same_end(tmp_path / "run", tmp_path / "left", 14)


def test_signals_before_and_after_the_loop_act_as_always():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert signal.getsignal(signal.SIGINT) == before[1]
        interruption.listen()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by the launcher
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert interruption.signum == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_leaves_at_once():
    code = (
        "import os, signal, time\nfrom diffusers_vrpo.interruption import Interruption\n"
        "with Interruption() as i:\n    i.listen()\n    os.kill(os.getpid(), 2)\n    time.sleep(1.1)\n"
        "    os.kill(os.getpid(), 2)\n    time.sleep(5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=no_network_environment(), capture_output=True, text=True)
    assert done.returncode == 130 and "SIGINT: saving a checkpoint" in done.stderr


# However the batch is divided


@needs_fork
def test_three_divisions_give_the_same_trajectory(command, trainers, tmp_path):  # noqa: F811
    """1 process of 16, 2 of 8 (one of which gets a signal on the way), and 8 twice, over 50 steps."""
    options = {"max_train_steps": 50, "learning_rate": 1e-4, "checkpointing_steps": 10}
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


needs_sharding = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch shards on GPUs only")
needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
hooks_that_shard = [
    pytest.param("fsdp", marks=needs_sharding),
    pytest.param("zero2", marks=needs_sharding),
    pytest.param("deepspeed", marks=needs_deepspeed),
]


@needs_fork
@pytest.mark.parametrize("hook", hooks_that_shard)
def test_sharded_runs_train_save_and_resume_alike(command, trainers, tmp_path, hook):  # noqa: F811
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
    assert_same_files(tmp_path / "left", tmp_path / "sharded", files)
    drift = torch.tensor(losses(tmp_path / "run")) - torch.tensor(losses(tmp_path / "sharded"))
    assert drift.abs().max() <= 1e-5 and drift.mean().abs() <= 1e-6
    one, two = (load_file(tmp_path / folder / weights) for folder in ("run", "sharded"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3
    assert max((one[name] - two[name]).abs().max() for name in one if "projectors" not in name) < 1e-5
    config = json.loads((tmp_path / "sharded" / "transformer" / "config.json").read_text())
    assert config == json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())
    assert len(list((tmp_path / "sharded" / "samples").iterdir())) == 2


@needs_fork
@needs_deepspeed
def test_deepspeed_accumulates_clips_and_trains_adapters_in_bf16(command, trainers, tmp_path):  # noqa: F811
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
    message = r"ended by InputError: .* \(zero2_0_of_2.safetensors is not in it: it was not saved by as many processes"
    assert re.search(message, trainer.log.read_text())


@needs_deepspeed
def test_accelerate_opens_the_configuration_of_deepspeed(monkeypatch):
    path = str(SCRIPT.parent / "configs" / "accelerate" / "deepspeed_zero2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, str(SCRIPT)])
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
    path = str(SCRIPT.parent / "configs" / "accelerate" / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, str(SCRIPT)])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == 8 and arguments.mixed_precision == "bf16"
    assert arguments.multi_gpu == (name == "ddp") and arguments.use_fsdp == (name != "ddp")
    for variable, value in prepare_multi_gpu_env(arguments).items():
        if variable.startswith("FSDP"):
            monkeypatch.setenv(variable, value)
    if name != "ddp":
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward == (name == "fsdp2")
        plugin.set_auto_wrap_policy(SiTTransformer2DModel(**TINY, sample_size=8, in_channels=3, num_classes=10))
        assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {SiTTransformerBlock}


@pytest.mark.parametrize(
    "kind, version, lora, precision, message",
    [
        (DistributedType.MEGATRON_LM, 0, False, "bf16", "configured for MEGATRON_LM, .*fsdp2.yaml or ddp.yaml"),
        (DistributedType.FSDP, 1, False, "bf16", "configured for FSDP 1; set fsdp_version: 2"),
        (DistributedType.FSDP, 2, True, "bf16", "--lora_rank does not go with FSDP; take .*ddp.yaml"),
        (DistributedType.FSDP, 2, False, "fp16", "--mixed_precision fp16 does not go with FSDP; .* or bf16"),
    ],
)
def test_what_is_not_done_right_is_refused(kind, version, lora, precision, message):
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2, mixed_precision=precision)
    with pytest.raises(InputError, match=message):
        check_distributed(accelerator, lora)


@pytest.mark.parametrize(
    "config, precision, message",
    [
        ({"zero_optimization": {"stage": 3}}, "bf16", "zero_stage: 3; only stage 2 without offloading goes"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "bf16",
            "zero_stage: 2 with offloading; only stage 2 without",
        ),
        ({"zero_optimization": {"stage": 2}}, "fp16", "--mixed_precision fp16 does not go with DeepSpeed; take bf16"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "bf16", "has its own optimizer; leave that out"),
    ],
)
def test_what_deepspeed_is_not_taken_for(config, precision, message):
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=plugin, mixed_precision=precision
    )
    with pytest.raises(InputError, match=message):
        check_distributed(accelerator, False)


# Damaged checkpoints


@pytest.fixture
def two_checkpoints(command, tmp_path):  # noqa: F811
    run(command(checkpointing_steps=2))
    return tmp_path / "run"


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(command, two_checkpoints, caplog):  # noqa: F811
    folder, last = two_checkpoints, two_checkpoints / "checkpoint-4"
    before = losses(folder)
    optimizer = last / "optimizer.bin"
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 1
    optimizer.write_bytes(data)
    with pytest.raises(InputError, match="checkpoint-4 is damaged .optimizer.bin is not what was saved.; give"):
        run(command(resume_from_checkpoint="checkpoint-4"))
    # One checkpoint is kept, and it is the whole one until the next is complete.
    run(command(max_train_steps=3, checkpoints_total_limit=1))
    assert "checkpoint-4 is damaged (optimizer.bin is not what was saved): continuing from checkpoint-2" in caplog.text
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4.damaged"]
    run(command())
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert losses(folder) == before


def test_every_kind_of_damage_has_a_name(two_checkpoints):
    path = two_checkpoints / "checkpoint-4"
    assert find_damage(path) is None
    shutil.copytree(path, two_checkpoints / "copy")
    (two_checkpoints / "copy" / "transformer" / "config.json").unlink()
    assert find_damage(two_checkpoints / "copy") == "transformer/config.json is missing"
    (path / "manifest.json").write_text("{}")
    assert find_damage(path) == "manifest.json is not what was saved"
    (path / "manifest.json").unlink()
    assert find_damage(path) == "manifest.json is missing"
    os.truncate(two_checkpoints / "checkpoint-2" / "training_state.json", 7)
    with pytest.raises(InputError, match="no checkpoint in .* is whole .checkpoint-4: .*; checkpoint-2: .* 7 bytes"):
        find_checkpoint("latest", two_checkpoints)
    assert len(list_checkpoints(two_checkpoints)) == 2


def test_what_a_kill_left_is_tidied(two_checkpoints):
    last = two_checkpoints / "checkpoint-4"
    os.replace(last, two_checkpoints / ".checkpoint-4.tmp")  # complete, but for its name
    shutil.copytree(two_checkpoints / "checkpoint-2", two_checkpoints / ".checkpoint-6.tmp")
    (two_checkpoints / ".checkpoint-6.tmp" / "optimizer.bin").unlink()
    shutil.copytree(two_checkpoints / "checkpoint-2", two_checkpoints / ".checkpoint-1.old")
    assert find_checkpoint("latest", two_checkpoints) == last
    assert not list(two_checkpoints.glob(".checkpoint-*"))


# NaN and infinity


@pytest.fixture
def nan_sample(monkeypatch):
    """Sample 60 of the stream, in step 4 of 16 samples each, has NaN as noise."""
    original = TrainingSamples.__getitems__

    def patched(self, indices):
        batch = original(self, indices)
        batch["noise"][batch["index"] == 60] = math.nan
        return batch

    monkeypatch.setattr(TrainingSamples, "__getitems__", patched)


def test_a_loss_that_is_nan_stops_with_the_state_before_it(command, tmp_path, nan_sample, caplog):  # noqa: F811
    message = r"step 4 \(samples 48 to 63\): the loss is NaN or infinite; .*checkpoint-3 is .*--skip_nonfinite leaves"
    options = {"max_train_steps": 6, "gradient_accumulation_steps": 2, "train_batch_size": 8}
    for _ in range(2):  # the same command tries the step again
        with pytest.raises(TrainingStopped, match=message):
            run(command(**options))
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    run(command(**options | {"output_dir": tmp_path / "clean", "max_train_steps": 3}))
    assert_same_files(
        *(tmp_path / folder / "checkpoint-3" for folder in ("run", "clean")),
        ["transformer/diffusion_pytorch_model.safetensors", "transformer_ema/diffusion_pytorch_model.safetensors"],
    )
    # With the option it goes on, and to the same end as if it had been there from the start.
    for folder in ("run", "skipped"):
        run([*command(**options, output_dir=tmp_path / folder), "--skip_nonfinite"])
    assert "step 4 (samples 48 to 63): the loss is NaN or infinite; the step is skipped, 1 so far" in caplog.text
    assert_same_end(tmp_path / "run", tmp_path / "skipped", 6)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows[3:]] == [1, 1, 1]
    # The half of the batch without NaN has a loss; where none has, it is NaN.
    assert all(math.isfinite(row["loss_fm"]) for row in rows) and math.isnan(rows[3]["grad_norm"])
    weights = load_file(tmp_path / "run" / "checkpoint-6" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@needs_fork
@pytest.mark.parametrize(
    "hook",
    ["nan", pytest.param("fsdp nan", marks=needs_sharding), pytest.param("deepspeed nan", marks=needs_deepspeed)],
)
def test_nan_on_one_process_stops_both(command, trainers, tmp_path, hook):  # noqa: F811
    trainer = trainers(command(max_train_steps=6, train_batch_size=8), hook=hook, processes=2)
    assert trainer.wait() == [1, 1]
    message = "ended by TrainingStopped: step 4 (samples 48 to 63): the loss is NaN or infinite"
    assert trainer.log.read_text().count(message) == 2
    assert find_checkpoint("latest", tmp_path / "run").name == "checkpoint-3"
    options = [*command(max_train_steps=6, train_batch_size=8), "--skip_nonfinite"]
    assert trainers(options, hook=hook, processes=2).wait() == [0, 0]
    weights = load_file(tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


class Guarded:
    """A guard over one parameter, whose gradient and loss are given."""

    def __init__(self, skip_nonfinite: bool, scaler=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler
        self.parameter = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.AdamW([self.parameter], lr=0.1, fused=True)
        self.guard = StepGuard(accelerator, self.optimizer, Interruption(), skip_nonfinite)

    def step(self, loss: float, gradient: float) -> str | None:
        self.parameter.grad = torch.full((3,), gradient)
        self.guard.watch(torch.tensor(loss))
        self.guard.ask(self.parameter.grad.norm())
        self.optimizer.step()
        return self.guard.answer()


def test_a_step_that_is_not_finite_leaves_the_optimizer_as_it_was():
    guarded = Guarded(skip_nonfinite=True)
    assert guarded.step(1.0, 1.0) is None
    state = [tensor.clone() for tensor in (guarded.parameter, *guarded.optimizer.state[guarded.parameter].values())]
    assert guarded.step(1.0, math.inf) == "the gradient"
    assert guarded.step(math.inf, 1.0) == "the loss"
    after = (guarded.parameter, *guarded.optimizer.state[guarded.parameter].values())
    assert all(torch.equal(a, b) for a, b in zip(state, after))
    assert guarded.guard.skipped == 2 and not guarded.guard.must_stop()
    assert guarded.step(1.0, 1.0) is None and guarded.guard.skipped_in_a_row == 0
    assert not torch.equal(state[0], guarded.parameter)
    for _ in range(SKIPPED_IN_A_ROW):
        assert not guarded.guard.must_stop()
        guarded.step(math.nan, 1.0)
    assert guarded.guard.must_stop()
    assert "the 100th in a row" in str(guarded.guard.stop("step 9: the loss", Path("run"), 8))


def test_overflow_of_fp16_is_normal_until_it_is_not():
    guarded = Guarded(skip_nonfinite=False, scaler=object())
    for _ in range(OVERFLOWS_IN_A_ROW):
        assert guarded.step(1.0, math.inf) is None
    assert guarded.step(1.0, math.inf) == "the gradient"
    assert guarded.step(1.0, 1.0) is None and guarded.step(1.0, math.inf) is None
    assert guarded.step(math.nan, 1.0) == "the loss"


def test_means_leave_out_what_is_not_finite(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    means, accelerator = RunningMeans(), Accelerator(cpu=True)
    for a, b in ((1.0, math.nan), (math.inf, math.nan), (3.0, math.nan)):
        means.add(a=torch.tensor(a), b=torch.tensor(b))
    means.commit()
    means.add(a=torch.tensor(100.0), b=torch.tensor(1.0))  # of a step that does not end
    # Of two processes: each its own; with one process the sums of both.
    again = RunningMeans()
    again.load_state_dicts([means.state_dict(), means.state_dict(), {}], accelerator)
    again.add(a=torch.tensor(5.0))
    values = again.read(accelerator)
    assert values["a"] == (1 + 3 + 1 + 3 + 5) / 5 and math.isnan(values["b"])


# A full disk


@needs_fork
def test_a_full_disk_leaves_the_checkpoint_before(command, trainers, tmp_path):  # noqa: F811
    options = {"max_train_steps": 6, "checkpointing_steps": 2, "logging_steps": 6, "checkpoints_total_limit": 1}
    assert trainers(command(**options)).wait() == [0]
    full = command(**options, output_dir=tmp_path / "full")
    trainer = trainers(full, hook="disk full")
    assert trainer.wait() == [1]
    log = trainer.log.read_text()
    for step in (4, 6):
        assert f"full/checkpoint-{step} could not be saved (" in log
    assert "GB were free): " in log and "full/checkpoint-2 is whole, and the run can be continued from it" in log
    assert "ended by TrainingStopped: step 6 could not be saved; make room and run the same command again" in log
    assert [path.name for path in (tmp_path / "full").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert trainers(full).wait() == [0]
    assert_same_end(tmp_path / "run", tmp_path / "full", 6)


@needs_fork
def test_a_full_disk_at_the_start_and_at_the_end(command, trainers, tmp_path, monkeypatch):  # noqa: F811
    options = command(max_train_steps=2)
    again = "cannot be written .*; make room and run the same command again"
    with monkeypatch.context() as patch:
        patch.setattr(train_vrpo.yaml, "safe_dump", lambda *a: (tmp_path / "run" / "logs" / "a" / "b").write_text(""))
        with pytest.raises(TrainingStopped, match="train_config.yaml or metrics.jsonl in .*/run " + again):
            run(options)
    trainer = trainers(options, hook="no room for the result")
    assert trainer.wait() == [1]
    assert re.search("ended by TrainingStopped: the pipeline in .*/run " + again, trainer.log.read_text())
    assert trainers(options).wait() == [0]
    assert len(losses(tmp_path / "run")) == 2 and (tmp_path / "run" / "model_index.json").exists()


@needs_fork
def test_two_runs_do_not_share_a_folder(command, trainers, tmp_path):  # noqa: F811
    options = command(max_train_steps=10000, dataloader_num_workers=1)
    first = trainers(options)
    first.wait_for_step(tmp_path / "run", 1)
    second = trainers(options)
    assert second.wait() == [1]
    in_use = (
        f"run is in use by another run \\(process {first.pids[0]} on .*; wait for its end or choose another folder"
    )
    assert re.search(in_use, second.log.read_text())
    first.kill()
    assert first.wait() == [-signal.SIGKILL]
    # Its data loader's process may still be alive.
    (tmp_path / "run" / "metrics.jsonl").unlink()
    third = trainers(options)
    third.wait_for_step(tmp_path / "run", 1)
    third.kill(signal.SIGTERM)
    assert third.wait() == [143]


@pytest.mark.parametrize("where", ["save_file", "write_manifest", "sync_to_disk"])
def test_no_space_at_any_stage_of_saving(command, tmp_path, monkeypatch, caplog, where):  # noqa: F811
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(command(max_train_steps=2))
    with monkeypatch.context() as patch:
        original = getattr(training, where)
        # metrics.jsonl is written.
        patch.setattr(training, where, lambda *a: original(*a) if "metrics" in str(a[0]) else full())
        with pytest.raises(TrainingStopped, match="step 4 could not be saved"):
            run(command())
    assert "checkpoint-4 could not be saved (No space left on device; " in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    run(command())
    assert len(losses(tmp_path / "run")) == 4


def test_other_failures_while_saving_are_not_hidden(command, monkeypatch):  # noqa: F811
    def broken(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(training, "write_manifest", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(command(max_train_steps=1))
