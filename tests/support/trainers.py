# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Programs in the background, most of them trainers, to be killed, interrupted or divided among processes.

A process that has imported everything forks them, so that a start costs no seconds.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusers_vrpo.training.metrics import read_metrics
from support.paths import TRAINING_SCRIPT
from support.processes import no_network_environment
from support.training import assert_same_files


# Reads JSON lines: what to start (then it prints the process id) or which process to wait for (its exit code).
FORK_SERVER = """
import faulthandler, importlib.util, json, os, resource, runpy, shutil, signal, sys, traceback
import sklearn.datasets, tensorboard  # noqa: what a run would import later
spec = importlib.util.spec_from_file_location("train_vrpo", sys.argv[1])
train_vrpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_vrpo)
from diffusers_vrpo.data import samples as latents
from diffusers_vrpo import trainer as trainer_module
from diffusers_vrpo.training import checkpoints as training
from diffusers_vrpo.assets.digits import digits_splits

digits_splits()  # made once, for all that are forked

def no_curves(metrics_file, output_file, title=""):
    # Curves take most of a short run's time; those of the trainer in a test's own process are drawn.
    from PIL import Image
    Image.new("L", (1, 1)).save(output_file)

trainer_module.plot_metrics = no_curves

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
    original = latents.TrainingSamples.__getitem__
    def patched(self, indices):
        batch = original(self, indices)
        batch["noise"][batch["index"] == index] = float("nan")
        return batch
    latents.TrainingSamples.__getitem__ = patched

def tell_ddp():
    import torch
    ddp = torch.nn.parallel.DistributedDataParallel
    original = ddp.__init__
    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        print(f"DDP: views {self.gradient_as_bucket_view}, buffers {self.broadcast_buffers}", flush=True)
    ddp.__init__ = patched

def fsdp(reshard, block="SiTTransformerBlock"):
    # accelerate has FSDP for GPUs only; on the CPU its parts work all the same.
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from diffusers_vrpo.training.distributed import check_distributed
    original = trainer_module.start_accelerator
    def patched(args, output_dir):
        accelerator = original(args, output_dir)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=reshard, cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[block],
            state_dict_type="SHARDED_STATE_DICT",
        )
        PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
        check_distributed(accelerator, args.lora_rank)
        return accelerator
    trainer_module.start_accelerator = patched

def deepspeed_zero2():
    # As with FSDP: accelerate starts DeepSpeed for accelerators only, which runs on the CPU all the same.
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Left by a configuration: the script's options count.
    os.environ |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "3.0"}
    import deepspeed.comm.torch
    from accelerate import DeepSpeedPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from diffusers_vrpo.training.distributed import check_distributed
    deepspeed.comm.torch.build_shm_op = lambda: None  # a faster way over shared memory, to be compiled
    original = trainer_module.start_accelerator
    def patched(args, output_dir):
        accelerator = original(args, output_dir)
        plugin = accelerator.state.deepspeed_plugins = DeepSpeedPlugin(zero_stage=2)
        plugin.set_mixed_precision(args.mixed_precision or "no")
        plugin.select(_from_accelerator_state=True)
        PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.DEEPSPEED
        accelerator.deepspeed_engine_wrapped = None
        check_distributed(accelerator, args.lora_rank)
        return accelerator
    trainer_module.start_accelerator = patched

HOOKS = {
    None: lambda: None,
    "no room at all": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, -1)),
    # Each kills itself on the way to a checkpoint.
    "half a file": lambda: nth_call(5, half_a_file, training, "save_file"),
    "no manifest": lambda: nth_call(2, lambda folder: die(), training, "write_manifest"),
    "no name": lambda: nth_call(0, no_name, training, "sync_to_disk"),
    "half deleted": lambda: nth_call(0, half_deleted, training.shutil, "rmtree"),
    "tell DDP's options": tell_ddp,
    "nan": lambda: nan_sample(60),
    "fsdp": lambda: fsdp(True),
    "fsdp of a DiT": lambda: fsdp(True, "BasicTransformerBlock"),
    "zero2": lambda: fsdp(False),
    "fsdp nan": lambda: (fsdp(True), nan_sample(60)),
    "deepspeed": deepspeed_zero2,
    "deepspeed nan": lambda: (deepspeed_zero2(), nan_sample(60)),
    # From the second checkpoint on no file may be longer than 10 kB.
    "disk full": lambda: nth_call(2, lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, -1)),
                                  trainer_module, "save_checkpoint"),
    "no room for the result": lambda: nth_call(1, lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, -1)),
                                               trainer_module.VRPOPipeline, "save_pretrained"),
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
            os.chdir(order["folder"] or ".")
            HOOKS[order["hook"]]()
            if order["program"] is None:
                train_vrpo.main(train_vrpo.parse_args(order["options"]))
            else:
                start = runpy.run_path if order["program"].endswith(".py") else runpy.run_module
                sys.argv = [order["program"], *order["options"]]
                start(order["program"], run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):
                os.write(1, code.encode() + b"\\n")
                code = 1
        except Exception as error:
            os.write(1, f"ended by {type(error).__name__}: {error}\\n".encode())
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
"""


class Trainer:
    """A trainer, or another program, of one or more processes in the background."""

    def __init__(self, ask, log: Path, options: list[str], hook: str | None, processes: int, **places: str | None):
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
            self.pids.append(ask(order | places))

    def wait(self) -> list[int]:
        return [self.ask({"wait": pid}) for pid in self.pids]

    def finish(self) -> str:
        """What the processes wrote, once all have ended well."""
        codes, text = self.wait(), self.log.read_text()
        assert not any(codes), text[-3000:]
        return text

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


@contextmanager
def fork_server(logs: Path) -> Iterator[Callable[..., Trainer]]:
    """Gives `start(options, hook=None, processes=1, program=None, folder=None)`, which forks a process with all imports done.

    The forked processes train, or run `program`: the path of a script, or a module's name. Several find each other as a
    launcher's would. `folder` becomes their working directory.
    """
    (logs / "server.py").write_text(FORK_SERVER)
    server = subprocess.Popen(
        [sys.executable, str(logs / "server.py"), str(TRAINING_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**no_network_environment(), "OMP_NUM_THREADS": "1"},
    )

    def ask(order: dict) -> int:
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def start(
        options: list[str],
        hook: str | None = None,
        processes: int = 1,
        program: str | None = None,
        folder: Path | None = None,
    ) -> Trainer:
        log = logs / f"{len(list(logs.iterdir()))}.txt"
        places = {"program": program, "folder": str(folder) if folder else None}
        return Trainer(ask, log, [str(option) for option in options], hook, processes, **places)

    yield start
    server.stdin.close()
    server.wait()


def assert_same_end(a: Path, b: Path, step: int):
    """Weights, averages, optimizer, statistics, what is published, and every logged number but the speed."""
    weights = "diffusion_pytorch_model.safetensors"
    names = [f"transformer/{weights}", f"transformer_ema/{weights}"]
    names += [
        name
        for name in ("projectors.safetensors", "projectors_ema.safetensors")
        if (a / f"checkpoint-{step}" / name).exists()
    ]
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
    for state in (left, right):
        assert state.pop("train_seconds") > 0
        state["length"].pop("checkpointing_steps")  # a continued run may be given another interval
    assert left == right
    left, right = (read_metrics(path / "metrics.jsonl") for path in (a, b))
    for row in left + right:
        for name in ("images_per_second", "tflops_per_device", "train_seconds", "skipped_steps"):
            row.pop(name, None)
    assert [str(row) for row in left] == [str(row) for row in right] and left[-1]["step"] == step  # NaN equals NaN
