# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What the golden records hold, and how it is run: shared by `record.py`, which writes them, and `test_golden.py`.

Only what users call is called here: the command lines, the files of output folders, and `VRPOPipeline`. Nothing may be
imported from inside the package, so that the records outlive any change of its modules.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent
FOLDERS = GOLDEN / "folders"
SCRIPT = ROOT / "train_vrpo.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_train_script():
    """The module of `train_vrpo.py`, which is a script and not part of the package."""
    spec = importlib.util.spec_from_file_location("train_vrpo_for_golden_records", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_vrpo = load_train_script()


def vrpo(argv: list[str]):
    """Runs the command `vrpo`, found as an installer finds it: by its entry in pyproject.toml."""
    entry = re.search(r'^vrpo = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return getattr(importlib.import_module(entry[1]), entry[2])(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that do not depend on where they are computed


@contextlib.contextmanager
def one_core():
    """Inside, PyTorch computes with one thread, whatever asks for more, and the process stays on one core."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        with mock.patch.object(torch, "set_num_threads", lambda number: None):
            yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def processor() -> str:
    """The processor's name as Linux gives it, or an empty text elsewhere."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else ""


def conditions() -> dict:
    """What has to be the same for two runs of the same code to give the same bits."""
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "threads": 1,
    }


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves, as numbers


# Times and what follows from them differ from run to run.
TIMED = re.compile(r"seconds|per_second|tflops|mfu|memory")


def read_metrics(folder: Path) -> dict[str, list]:
    """The numbers of a `metrics.jsonl` by name: one for each step, None where a step has none, without times."""
    steps: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps.setdefault(row["step"], {}).update(row)
    names = sorted({name for row in steps.values() for name in row if not TIMED.search(name)})
    return {name: [row.get(name) for row in steps.values()] for name in names}


def digests(file: Path) -> dict[str, list]:
    """CRC-32 of the float32 bytes, sum and L2 norm in float64, and size of each tensor; projectors are left out."""
    table = {}
    for name, tensor in sorted(load_file(file).items()):
        if name.startswith("projector"):
            continue
        values = np.ascontiguousarray(tensor.float().numpy())
        wide = values.astype(np.float64)
        table[name] = [zlib.crc32(values.tobytes()), float(wide.sum()), math.sqrt(float((wide**2).sum())), wide.size]
    return table


def read_run(folder: Path, step: int) -> dict:
    """Metrics of a run, and the digests of its pipeline, of its last checkpoint's weights and of their average.

    Where adapters are trained, the checkpoint has them alone, and `lora/` has their average. Without averages the part is
    left out.
    """
    assert (folder / "model_index.json").is_file()
    files = {"pipeline": folder / "transformer" / WEIGHTS}
    for part, name in (("weights", "transformer"), ("average", "transformer_ema")):
        whole = folder / f"checkpoint-{step}" / name / WEIGHTS
        files[part] = whole if whole.is_file() else folder / f"checkpoint-{step}" / f"{name}.safetensors"
    files |= {f"lora/{file.name}": file for file in sorted(folder.glob("lora/*.safetensors"))}
    tensors = {part: digests(file) for part, file in files.items() if part != "average" or file.is_file()}
    return {"metrics": read_metrics(folder), "tensors": tensors}


# ----------------------------------------------------------------------------------------------------------------------
# Files that rows need, made from seeds


def fill_from_seed(model: torch.nn.Module, seed: int):
    """Draws matrices, filters and biases of a model in the order of their names; scales stay as its class starts them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


def make_vae(folder: Path) -> Path:
    """An autoencoder of 8 x 8 pixels to 4 x 4 latents of 4 channels."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3,
        shift_factor=0.1,
    )
    fill_from_seed(vae, 1)
    vae.save_pretrained(folder / "vae")
    return folder / "vae"


def make_encoder(folder: Path) -> Path:
    """A small DINOv2 of another width than that of the digits."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4
    )
    encoder = Dinov2Model(config)
    fill_from_seed(encoder, 2)
    encoder.save_pretrained(folder / "encoder")
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder / "encoder"


def make_parquet(folder: Path) -> Path:
    """Two parquet files of 200 noisy images of 8 x 8 pixels in 10 classes, with 16 rows in a row group."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    generator = np.random.default_rng(3)
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {i}" for i in range(10)])})
    (folder / "data").mkdir()
    for number in range(2):
        columns = {"image": [], "label": []}
        for row in range(100):
            noise = generator.integers(0, 64, (8, 8, 3)) + 19 * (row % 10)
            buffer = io.BytesIO()
            PILImage.fromarray(noise.astype(np.uint8)).save(buffer, "png")
            columns["image"].append({"bytes": buffer.getvalue(), "path": None})
            columns["label"].append(row % 10)
        path = folder / "data" / f"train-{number:05d}-of-00002.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=16)
    return folder


def make_image_folder(folder: Path) -> Path:
    """Two classes of 40 noisy PNG files of 12 x 10 pixels."""
    from PIL import Image

    generator = np.random.default_rng(4)
    for label, name in enumerate(("ant", "bee")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(40):
            noise = generator.integers(0, 128, (12, 10, 3)) + 127 * label
            Image.fromarray(noise.astype(np.uint8)).save(folder / "images" / name / f"{number:02d}.png")
    return folder / "images"


def make_cache(folder: Path, features: bool) -> Path:
    """Digits as `vrpo prepare` encodes them, with the features of their encoder or with the images."""
    argv = ["prepare", "--dataset_name", "digits", "--vae", str(make_vae(folder)), "--resolution", "8", "--flip"]
    argv += ["--encoder", "digits", "--patch_size", "1", "--images", "none"] if features else []
    vrpo([*argv, "--output_dir", str(folder / "latents"), "--dataloader_num_workers", "0"])
    return folder / "latents"


# ----------------------------------------------------------------------------------------------------------------------
# The rows of runs.json


MODEL = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
# `adam_epsilon`: gradients that are zero but for rounding (of the keys' biases) move nothing, on any machine.
OPTIONS = {
    "output_dir": "run",
    "dataset_name": "digits",
    "resolution": 8,
    "vae": "none",
    "model_config": "model.json",
    "objective": "vrpo",
    "encoder": "digits",
    "projector_dim": 32,
    "train_batch_size": 16,
    "max_train_steps": 20,
    "learning_rate": 2e-3,
    "lr_warmup_steps": 5,
    "adam_epsilon": 1e-5,
    "ema_decay": 0.9,
    "ema_warmup": False,  # version 0.1 had none
    "seed": 7,
    "random_streams": 1,  # version 0.1 had no other
    "logging_steps": 1,
    "num_inference_steps": 2,
    "num_validation_images": 1,
    "dataloader_num_workers": 0,
    "report_to": "none",
}
NO_ALIGNMENT = {"objective": "none", "encoder": None}
# What VRPO's defaults were in version 0.1.
VRPO = {"alignment_coeff": 0.5, "reward_weighting": "inverse_variance", "conflict": "gate"}
SAMPLED = {"estimator": "sampled", "group_size": 4}
LATENTS = {"dataset_name": None, "vae": None, "random_flip": True}
# Two classes of four samples in every second step from the tenth on, and limits that nothing reaches.
GENERATIVE = {
    "generative_policy_start_step": 10,
    "rollout_classes": 2,
    "rollout_group_size": 4,
    "rollout_steps": 2,
    "mc_samples": 2,
    "generative_learning_rate": 1e-3,
    "reward_queue_size": 64,
    "reward_reference_images": 200,
    "guard_every": 2,
    "guard_samples": 32,
    "guard_loss_rise": 1e9,
    "guard_recall_fall": 1e9,
}


def row(model: dict | None = None, make: Callable[[Path], dict] | None = None, processes: int = 1, **options) -> dict:
    """A run of 20 steps, unless said otherwise: what it changes in the model and the options, and what it needs in its folder.

    Args:
        make: writes files into the folder and gives the options that name them.
        processes: above 1 they are launched, each with its share of the batch.
    """
    options = (VRPO | options) if options.get("objective", "vrpo") == "vrpo" else options
    return {"model": MODEL | (model or {}), "make": make, "processes": processes, "options": OPTIONS | options}


ROWS = {
    "none": row(**NO_ALIGNMENT),
    "repa": row(objective="repa"),
    "repa-project": row(objective="repa", conflict="project"),
    "vrpo": row(),
    "vrpo-sampled": row(**SAMPLED),
    "vrpo-sampled-two-epochs": row(**SAMPLED, policy_epochs=2, clip_range=0.05),
    "vrpo-kl": row(kl_coeff=0.01),
    "vrpo-equal-weights": row(reward_weighting="raw", random_flip=True, label_dropout=0.3),
    "vrpo-project": row(conflict="project"),
    "two-blocks-two-encoders": row(
        model={"num_layers": 3},
        layer_scope="1,3",
        make=lambda folder: {"encoder": ["digits", make_encoder(folder)]},
    ),
    "two-blocks-two-encoders-project": row(
        model={"num_layers": 3},
        layer_scope="1,3",
        conflict="project",
        make=lambda folder: {"encoder": ["digits", make_encoder(folder)]},
    ),
    "lora": row(model_config=None, pretrained_model_name_or_path=FOLDERS / "pipeline", lora_rank=2),
    "dit": row(model={"prediction_type": "epsilon", "learn_sigma": True}),
    "dit-none": row(model={"prediction_type": "epsilon", "learn_sigma": True}, **NO_ALIGNMENT),
    "cache": row(
        model={"patch_size": 1}, **LATENTS, make=lambda folder: {"latents_dir": make_cache(folder, features=False)}
    ),
    "cache-with-features": row(
        model={"patch_size": 1}, **LATENTS, make=lambda folder: {"latents_dir": make_cache(folder, features=True)}
    ),
    "streaming": row(streaming=True, random_flip=True, make=lambda folder: {"dataset_name": make_parquet(folder)}),
    "image-folder": row(
        dataset_name=None,
        random_flip=True,
        center_crop=False,
        max_train_samples=60,
        make=lambda folder: {"train_data_dir": make_image_folder(folder)},
    ),
    "accumulation": row(train_batch_size=8, gradient_accumulation_steps=2),
    "conv-projector": row(projector="conv", spatial_norm=0.6),
    "low-noise": row(timestep_weighting="low_noise"),
    "alignment-stop": row(alignment_stop_step=10),
    # Alignment turns against a noise predictor: all bins of the gate close, and it ends.
    "gate": row(
        model={"prediction_type": "epsilon"}, train_batch_size=64, max_train_steps=54, logging_steps=3, seed=1
    ),
    "no-average": row(use_ema=False),
    "generative": row(**GENERATIVE),
    "generative-two-epochs": row(**GENERATIVE, rollout_epochs=2, rollout_clip_range=1e-4),
    "two-processes": row(train_batch_size=8, processes=2),
    "two-processes-repa-stop": row(objective="repa", alignment_stop_step=10, train_batch_size=8, processes=2),
}


def to_argv(options: dict) -> list[str]:
    """Options as a command line; None removes an option, True and False are switches, a list has several values."""
    argv = []
    for name, value in options.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return argv


def train(argv: list[str], folder: Path):
    """Trains in this process, with `folder` as the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        # No curves are drawn: they would take most of a short run's time.
        with one_core(), mock.patch("diffusers_vrpo.trainer.plot_metrics"):
            AcceleratorState._reset_state(reset_partial_state=True)
            train_vrpo.main(train_vrpo.parse_args(argv))
    finally:
        os.chdir(before)


def launch(argv: list[str], folder: Path, processes: int):
    """Trains in processes of its own, with one thread each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *launcher, str(SCRIPT), *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def run_row(name: str, folder: Path, launch: Callable = launch) -> dict:
    """Runs a row in an empty folder and reads what it leaves; `launch` starts the rows of several processes."""
    wanted = ROWS[name]
    (folder / "model.json").write_text(json.dumps(wanted["model"]))
    options = wanted["options"] | {"cache_dir": folder / "downloads"}
    with one_core():
        options |= wanted["make"](folder) if wanted["make"] else {}
    if wanted["processes"] > 1:
        launch(to_argv(options), folder, wanted["processes"])
    else:
        train(to_argv(options), folder)
    return read_run(folder / "run", options["max_train_steps"])


# ----------------------------------------------------------------------------------------------------------------------
# Folders of version 0.1


# The version of the random draws follows from the run.
RESUMED = (
    OPTIONS | VRPO | {"projector_dim": 16, "layer_scope": "1,2", "checkpointing_steps": 10, "random_streams": None}
)
SAMPLED_LABELS = [0, 3, 5, 9]


def sample(folder: Path) -> np.ndarray:
    """Four images of a saved pipeline from a fixed generator, `[4, 8, 8, 3]` in [0, 1]."""
    from diffusers_vrpo import VRPOPipeline

    pipeline = VRPOPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with one_core():
        return pipeline(SAMPLED_LABELS, num_inference_steps=4, output_type="np", generator=generator).images


# ----------------------------------------------------------------------------------------------------------------------
# Command lines


# The least that each command takes. Nothing is read: the folders need not exist.
COMMANDS = {
    "train": ["--dataset_name", "digits", "--vae", "none", "--encoder", "digits"],
    "prepare": ["--dataset_name", "digits", "--vae", "vae", "--output_dir", "latents"],
    "latents verify": ["--latents_dir", "latents"],
    "latents export": ["--latents_dir", "latents", "--output_dir", "export"],
    "latents import": ["--dataset", "export", "--output_dir", "latents"],
    "sample": ["model", "--num_images", "8", "--output_dir", "samples"],
    "evaluate": ["samples", "--reference", "reference"],
    "probe": ["model", "--dataset_name", "digits"],
    "layers": ["model", "--dataset_name", "digits", "--encoder", "digits"],
    "convert": ["checkpoint.pt", "converted"],
    "report": ["run"],
    "push": ["model"],
}


class Parsed(BaseException):
    """Ends a command when its options are parsed; neither an error nor an exit, so that nothing catches it."""


def parse_command(name: str, argv: list[str]) -> tuple[argparse.ArgumentParser, dict | None]:
    """The parser that a command uses for its own options, and what it makes of `argv` (None where it stops for help)."""
    parsers, depth, original = [], [0], argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, *arguments, **more):
        parsers.append(self)
        depth[0] += 1
        try:
            namespace, rest = original(self, *arguments, **more)
        finally:
            depth[0] -= 1
        # A command with sub-commands parses twice; the training script first looks for --config and goes on.
        if depth[0] == 0 and name != "train":
            raise Parsed(vars(namespace))
        return namespace, rest

    patched = mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    with patched, contextlib.redirect_stdout(io.StringIO()):
        try:
            if name == "train":
                parsed = vars(train_vrpo.parse_args(argv))
                return parsers[-1], parsed
            vrpo([*name.split(), *argv])
        except Parsed as parsed:
            return parsers[-1], parsed.args[0]
        except SystemExit as exit:
            assert exit.code in (0, None), f"{name} {argv} ended with {exit.code}"
            return parsers[-1], None
    raise AssertionError(f"`vrpo {name}` ran without parsing its options")


def plain_values(parsed: dict) -> dict:
    """Parsed options as JSON keeps them, paths and enumerations as their text; functions that a parser attaches are dropped."""
    values = {name: value for name, value in sorted(parsed.items()) if not callable(value)}
    return json.loads(json.dumps(values, default=lambda value: value.value if isinstance(value, Enum) else str(value)))


def describe_command(name: str) -> dict:
    """Options of a command (names, default, choices, nargs, whether they are required) and the values of a short call."""
    parser, _ = parse_command(name, ["--help"])
    options = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        # Several spellings are one option: `--dataset_name` and `--dataset`, `--use_ema` and `--no-use_ema`.
        options[action.option_strings[0] if action.option_strings else action.dest] = {
            "spellings": list(action.option_strings),
            "default": "SUPPRESS" if action.default is argparse.SUPPRESS else action.default,
            "choices": None if action.choices is None else [str(choice) for choice in action.choices],
            "nargs": action.nargs,
            "required": action.required,
        }
    _, parsed = parse_command(name, COMMANDS[name])
    return json.loads(json.dumps({"options": options, "argv": COMMANDS[name], "parsed": plain_values(parsed)}))


def recipe_names() -> list[str]:
    """Every YAML file of training options in configs/, relative to the root; those of accelerate are not."""
    found = (path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
    return sorted(path.as_posix() for path in found if "accelerate" not in path.parts)


def parse_recipe(name: str) -> dict:
    """The values of all training options with this recipe."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return plain_values(vars(train_vrpo.parse_args(["--config", name])))
    finally:
        os.chdir(before)
