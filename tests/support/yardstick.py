# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The yardstick's driver on digits."""

import importlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import yaml

from support.paths import ROOT


YARDSTICK = ROOT / "benchmarks" / "yardstick"
MODEL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
TIMING = {"reference_seconds": 0.2, "features_seconds": 0.4, "file": "timing-tiny.json", "arms": []}
TIMING["arms"] += [{"name": "repa", "flags": {"objective": "repa"}, "ratio": 1.0}]
TIMING["arms"] += [{"name": "none", "flags": {"objective": "none"}, "ratio": 0.5}]


@contextmanager
def yardstick_modules():
    """Gives the modules by name; they import one another as scripts of one folder do."""
    names = ["recipe", "subset", "training_run", "timing", "judge", "run", "table"]
    sys.path.insert(0, str(YARDSTICK))
    try:
        yield type("Modules", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(YARDSTICK))
        for name in names:
            sys.modules.pop(name, None)


def tiny_driver(folder: Path, yardstick):
    """Writes a recipe of two steps on three classes of digits; returns a function that runs the driver on it."""
    (folder / "model.json").write_text(json.dumps(MODEL))
    train = {"resolution": 8, "model_config": str(folder / "model.json"), "projector_dim": 16, "train_batch_size": 8}
    train |= {"learning_rate": 1e-3, "ema_decay": 0.5, "num_inference_steps": 2, "num_validation_images": 1}
    train |= {"logging_steps": 1, "dataloader_num_workers": 0, "mixed_precision": "no"}
    recipe = {
        "dataset": "digits",
        "classes": 3,
        "encoder": "digits",
        "judge": "digits",
        "judge_pixels": None,
        "reference": "repa",
    }
    recipe |= {"reference_steps": 2, "charge_features": False, "evaluations": 2, "curve_samples": 20}
    recipe |= {"final_samples": 24, "reference_images": 40, "probe_timestep": 0.3, "train": train}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    options = {"classes": 3, "encoder": "digits", "reference": "repa", "train": train}
    for name in ("tiny", "longer"):
        (folder / f"timing-{name}.json").write_text(json.dumps(TIMING | {"options": options}))
    places = [str(folder / "tiny.yaml"), "--work", str(folder / "work"), "--results", str(folder)]

    def run(*options):
        return yardstick.run.main([*places, "--workers", "0", *options])

    run.folder, run.places, run.values = folder, places, recipe
    return run
