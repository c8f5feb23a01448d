# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The files that a finished training run leaves, written by hand."""

import json
from pathlib import Path

import yaml


def write_run(folder: Path, start: dict | None = None, **options):
    """Writes options, metrics and the record of the start; `options` change the first, `start` the last."""
    folder.mkdir(exist_ok=True)
    config = {"objective": "vrpo", "encoder": ["/data/models/dinov2"], "vae": "stabilityai/sd-vae-ft-ema", "seed": 3}
    config |= {"dataset_name": "ILSVRC/imagenet-1k", "resolution": 256, "learning_rate": 1e-4, "max_train_steps": 20}
    config |= {"output_dir": "/home/someone/run", "reward_weighting": "inverse_variance", "estimator": "expected"}
    (folder / "train_config.yaml").write_text(yaml.safe_dump(config | options))
    row = {"step": 20, "loss_fm": 0.5, "train_seconds": 7200.0, "train_flops": 1.5e18, "samples_seen": 5120}
    for name, value in (("fidelity", 0.25), ("semantic", 0.5)):
        row |= {f"reward/{name}": value, f"std/{name}": 0.1, f"weight/{name}": 0.3, f"share/{name}": value}
    # Validation adds a line of its own for its step.
    rows = [{"step": 10, "loss_fm": 1.0, "validation/fd_dinov2": 300.5}, row]
    rows += [{"step": 20, "validation/fd_dinov2": 120.25}, {"step": 22, "validation/fd_dinov2": float("nan")}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "lo')
    known = {"hardware": "NVIDIA H200", "num_processes": 8, "global_batch_size": 256, "parameters": 130_000_000}
    known |= {"mixed_precision": "bf16", "max_train_steps": 20, "adapters_suffice": False, "local": []}
    (folder / "starts.jsonl").write_text(json.dumps(known | (start or {})))
