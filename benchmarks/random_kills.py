#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Kill tiny runs of thirteen kinds at random moments, resume each to its end, and compare it with an undisturbed run.

    python benchmarks/random_kills.py                  # 130 kills, a few minutes on two cores
    python benchmarks/random_kills.py --kills 10 --only streaming two-processes

A run is killed by SIGKILL at a moment drawn uniformly over the time that an undisturbed run takes: while it starts, trains,
saves, resumes, or writes its result. The same command then resumes it, and may be killed again. At the end the last
checkpoint (weights, averages, optimizer, statistics), the pipeline, and every logged number except the speed must be equal bit
by bit. The processes are forked from one that has imported everything, as in the tests, so that they start at once.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from diffusers_vrpo.assets.digits import digits_splits
from diffusers_vrpo.training.checkpoints import find_damage, list_checkpoints
from diffusers_vrpo.training.metrics import read_metrics
from support.trainers import fork_server
from support.training import options_in


STEPS = 24
COMMON = {"max_train_steps": STEPS, "checkpointing_steps": 4, "checkpoints_total_limit": 2, "logging_steps": 3}
COMMON |= {"lr_scheduler": "cosine", "lr_warmup_steps": 5, "learning_rate": 1e-3, "validation_steps": 8}
NONE = {"objective": "none", "encoder": None, "projector_dim": None}
GENERATIVE = {
    "generative_policy_start_step": 4,
    "rollout_classes": 2,
    "rollout_group_size": 4,
    "rollout_steps": 2,
    "mc_samples": 2,
    "reward_queue_size": 64,
    "reward_reference_images": 200,
    "guard_every": 8,
    "guard_samples": 32,
    "guard_loss_rise": 1e9,
    "guard_recall_fall": 1e9,
}
KINDS = {
    "none": NONE,
    "repa": {"objective": "repa"},
    "vrpo expected": {},
    "vrpo sampled": {"estimator": "sampled", "policy_epochs": 2},
    "cache": {"dataset_name": None, "vae": None, "latents_dir": "cache", "objective": "repa"},
    "streaming": {"dataset_name": "parquet", "streaming": True},
    "lora": {"model_config": None, "pretrained_model_name_or_path": "base", "lora_rank": 2},
    "two processes": {"train_batch_size": 8},
    "generative": GENERATIVE,
    "bf16": {"mixed_precision": "bf16"},
    "rare": {"objective": "rare", "target_norm": "whiten:16"},
    "scaffold": {"scaffold_layer": 1, "scaffold_fraction": 0.4},
    "image rewards": {"image_rewards": "perceptual"},
}
TIMED = ("images_per_second", "tflops_per_device", "train_seconds", "mfu")


def write_inputs(folder: Path, start, command):
    """Writes the inputs of some kinds: a latent cache, parquet files with several row groups, and a model to adapt."""
    prepare = [
        "--dataset",
        "digits",
        "--vae",
        "none",
        "--encoder",
        "digits",
        "--resolution",
        "8",
        "--dataloader_num_workers",
        "0",
    ]
    prepare += ["--output_dir", str(folder / "cache")]
    start(prepare, program="diffusers_vrpo.commands.prepare").finish()
    start(command(**NONE, max_train_steps=1, output_dir=folder / "base")).finish()
    images = digits_splits()["train"].select(range(200))
    names = sorted(set(map(str, images["label"])))
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    (folder / "parquet").mkdir()
    columns = {"image": images["image"], "label": images["label"]}
    Dataset.from_dict(columns, features=features).to_parquet(folder / "parquet" / "train.parquet", batch_size=16)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint and of the result, by file and name."""
    checkpoint = list_checkpoints(folder)[-1]
    found = {}
    for path in [
        *checkpoint.rglob("*.safetensors"),
        *folder.glob("transformer/*.safetensors"),
        *folder.glob("lora/*"),
    ]:
        found |= {f"{path.relative_to(folder)} {name}": tensor for name, tensor in load_file(path).items()}
    for key, state in torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"].items():
        found |= {f"optimizer {key} {name}": torch.as_tensor(tensor) for name, tensor in state.items()}
    return found


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same bits. NaN equals NaN, because it marks values that have not been measured yet."""
    alike = left.dtype == right.dtype and left.shape == right.shape
    return (
        alike
        and left.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        == right.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )


def difference(straight: Path, killed: Path) -> str | None:
    """The first difference between two finished runs; None if they are equal bit by bit."""
    left, right = tensors(straight), tensors(killed)
    if left.keys() != right.keys():
        return f"files or tensors differ: {sorted(left.keys() ^ right.keys())[:3]}"
    if different := [name for name in left if not same(left[name], right[name])]:
        return f"{different[0]} differs, and {len(different) - 1} more"
    states = [json.loads((list_checkpoints(f)[-1] / "training_state.json").read_text()) for f in (straight, killed)]
    rows = [read_metrics(f / "metrics.jsonl") for f in (straight, killed)]
    for each in (*states, *rows[0], *rows[1]):
        for name in TIMED:
            each.pop(name, None)
    if states[0] != states[1]:
        return "training_state.json differs"
    return None if str(rows[0]) == str(rows[1]) else "metrics.jsonl differs"


def kill_runs(kind: str, options, folder: Path, start, dice: random.Random, kills: int) -> dict:
    """Kills runs of a kind this many times, and compares each with an undisturbed one.

    Returns:
        the numbers of `kills`, finished `runs` and `equal` ones, the seconds of an undisturbed run, and `problems`.
    """
    processes = 2 if kind == "two processes" else 1
    begun = time.perf_counter()
    start(options(output_dir=folder / "straight"), processes=processes).finish()
    seconds = time.perf_counter() - begun
    result = {"kills": 0, "runs": 0, "equal": 0, "seconds": seconds, "problems": []}
    while result["kills"] < kills or result["runs"] == 0:
        killed = folder / f"killed-{result['runs']}"
        while True:
            trainer = start(options(output_dir=killed), processes=processes)
            if result["kills"] < kills:
                time.sleep(dice.uniform(0, seconds))
                # A launcher ends the processes of a run when one of them dies.
                for rank in sorted(range(processes), key=lambda _: dice.random()):
                    trainer.kill(signal.SIGKILL, rank)
            codes = trainer.wait()
            if -signal.SIGKILL in codes:
                result["kills"] += 1
                existing = list_checkpoints(killed) if killed.exists() else []
                if existing and (damage := find_damage(existing[-1])):
                    result["problems"].append(f"{existing[-1].name}: {damage}")
            elif any(codes):
                result["problems"].append(trainer.log.read_text().strip().splitlines()[-1][-300:])
                break
            else:
                break
        result["runs"] += 1
        if not any(codes):
            problem = difference(folder / "straight", killed)
            result["equal"] += problem is None
            result["problems"] += [problem] if problem else []
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=130, help="kills in total, divided among the kinds (default: 130)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the moments at which runs are killed (default: 0)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", help=f"kinds out of {', '.join(KINDS)} (spaces or dashes)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table to this file, as JSON")
    args = parser.parse_args()
    kinds = [kind.replace("-", " ") for kind in args.only] if args.only else list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--only {unknown[0]} is not one of {', '.join(KINDS)}")
    dice, results = random.Random(args.seed), {}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary, fork_server(Path(temporary)) as start:
        folder = Path(temporary)
        command = options_in(folder)
        write_inputs(folder, start, command)
        print(f"{'kind':16}{'kills':>6}{'runs':>6}{'equal':>7}{'s a run':>9}")
        for number, kind in enumerate(kinds):
            changes = {name: folder / v if v in ("cache", "parquet", "base") else v for name, v in KINDS[kind].items()}
            flags = [f"--{name}" for name, value in changes.items() if value is True]
            changes = COMMON | {name: value for name, value in changes.items() if value is not True}
            share = args.kills // len(kinds) + (number < args.kills % len(kinds))

            def options(changes=changes, flags=flags, **more):
                return command(**changes, **more) + flags

            (folder / "runs" / kind).mkdir(parents=True)
            results[kind] = row = kill_runs(kind, options, folder / "runs" / kind, start, dice, share)
            print(f"{kind:16}{row['kills']:6}{row['runs']:6}{row['equal']:7}{row['seconds']:9.1f}", flush=True)
            for problem in row["problems"]:
                print(f"    {problem}", flush=True)
    total = {name: sum(row[name] for row in results.values()) for name in ("kills", "runs", "equal")}
    print(f"{'all':16}{total['kills']:6}{total['runs']:6}{total['equal']:7}")
    if args.json:
        Path(args.json).write_text(json.dumps({"seed": args.seed, "total": total, "kinds": results}, indent=1) + "\n")
    return int(total["equal"] < total["runs"] or any(row["problems"] for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
