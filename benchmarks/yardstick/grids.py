#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Digit grids: train arms x seeds on images whose digits obey a rule, and count the samples that obey it.

    python benchmarks/yardstick/grids.py run --arms none repa-4-b3 vrpo-4-b3-equal --seeds 1 2 3 --workers 2
    python benchmarks/yardstick/grids.py time --arms none repa-4-b3 vrpo-4-b3-equal
    python benchmarks/yardstick/grids.py table
    python benchmarks/yardstick/grids.py picture --arms none repa-4-b3 vrpo-4-b3-equal --seeds 1

Runs that have a line in `results-grids.jsonl` are skipped, and a stopped run continues from its checkpoint. All arms of a
seed start from the same weights and see the same images and noise; all runs are judged on samples from the same noise.
`time` measures what a step of each arm costs, and `picture` shows samples of each arm. The arms are in grids.yaml, each with the
options of `VRPOConfig` in which it differs.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.state import AcceleratorState
from differences import difference, with_error
from diffusers.utils import make_image_grid
from gradient_scale import GradientScale
from grids_judge import grid_judge
from grids_model import GreyImages, GridEncoder
from PIL import Image as PILImage
from PIL import ImageDraw
from recipe import HERE, in_full, read_yaml
from run import Workers, append_result, commit, read_results, versions
from table import markdown
from training_run import LOG, ROOT

from diffusers_vrpo.assets.digit_grids import grid_images
from diffusers_vrpo.command_line import OneLineErrorParser, number_in
from diffusers_vrpo.config import EMBEDDED_GRIDS, In, VRPOConfig
from diffusers_vrpo.errors import InputError, TrainingInterrupted
from diffusers_vrpo.models.transformer_sit import SiTTransformer2DModel
from diffusers_vrpo.pipelines.sampling import start_noise
from diffusers_vrpo.trainer import VRPOTrainer
from diffusers_vrpo.training.callbacks import TrainerCallback
from diffusers_vrpo.training.checkpoints import list_checkpoints
from diffusers_vrpo.training.distributed import ema_weights, full_pipeline
from diffusers_vrpo.training.metrics import read_metrics
from diffusers_vrpo.training.throughput import hardware_name


NOISE_SEED = 1234  # the seed of the samples' noise, for all arms and seeds
SHOWN_SAMPLES = 12
COLUMNS = {
    "pairs": "pairs",
    "rule": "whole samples",
    "fd_joint": "FD of grids",
    "fd_cell": "FD of cells",
    "nn": "nearest digit",
    "entropy": "entropy",
}


@dataclass(frozen=True)
class Study:
    """A study, as read from a file such as grids.yaml.

    Attributes:
        steps: training steps of each run.
        evaluate_every: steps between two points of the curve, each of which is measured on `curve_samples` samples.
        final_samples: number of samples for the last judgement.
        solver_steps: Euler steps for a sample, which is drawn from the averaged weights.
        reference: the arm with which others are compared.
        model: arguments of the transformer.
        train: options of `VRPOConfig` that all arms share.
        arms: the other options of each arm, by its name.
    """

    name: str
    steps: int
    evaluate_every: int
    curve_samples: int
    final_samples: int
    solver_steps: int
    reference: str
    model: dict
    train: dict
    arms: dict[str, dict]


def load_study(path: Path) -> Study:
    """Reads a study.

    Raises:
        InputError: if the file is not a study.
    """
    values = {"name": path.stem} | read_yaml(path)
    known = {field.name for field in fields(Study)}
    if wrong := sorted(known ^ set(values)):
        raise InputError(None, f"{path}: {wrong[0]} is {'missing' if wrong[0] in known else 'unknown'}")
    return Study(**values)


def chosen_arms(study: Study, names: list[str] | None) -> dict[str, dict]:
    """The arms with these names, or all arms if `names` is None.

    Raises:
        InputError: if there is no arm of a name.
    """
    if unknown := [name for name in names or [] if name not in study.arms]:
        raise InputError(None, f"--arms {unknown[0]} is not one of {', '.join(study.arms)}")
    return {name: study.arms[name] for name in names or study.arms}


def run_hash(study: Study, arm: dict) -> str:
    """A hash of everything but the seed on which a result depends."""
    values = asdict(study)
    for name in ("name", "arms", "reference", "evaluate_every", "curve_samples"):
        del values[name]
    return f"{zlib.crc32(json.dumps([values, arm], sort_keys=True).encode()):08x}"


# ----------------------------------------------------------------------------------------------------------------------
# A run


def starting_weights(study: Study, seed: int, work: Path) -> Path:
    """The folder of the weights from which all arms of a seed start; they are drawn if the folder is missing.

    Otherwise the weights would depend on the arm, because a transformer is drawn together with its projectors.
    """
    model = study.model | {"sample_size": study.train["resolution"], "in_channels": 1, "num_classes": 1}
    model |= {"class_dropout_prob": study.train["label_dropout"]}
    folder = work / "starts" / f"{zlib.crc32(json.dumps(model, sort_keys=True).encode()):08x}-{seed}"
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = SiTTransformer2DModel(**model)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        transformer.save_pretrained(partial)
        with contextlib.suppress(OSError):  # another run may have written the same weights
            partial.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def make_trainer(study: Study, arm: dict, steps: int, seed: int, work: Path, output_dir: Path, callbacks=()):
    """Makes the trainer of a run, which resumes from any checkpoint in `output_dir`."""
    options = dict(in_full(arm))
    scale = options.pop("gradient_scale", None)
    aligned = options["objective"] != "none"
    every = {"checkpointing_steps": study.evaluate_every, "checkpoints_total_limit": 1, "validation_steps": 10**9}
    samples = {"num_validation_images": 1, "num_inference_steps": study.solver_steps, "guidance_scale": 1.0}
    args = VRPOConfig(
        **study.train | every | samples | options,
        output_dir=str(output_dir),
        overwrite_output_dir=True,  # a run that was killed before its first checkpoint begins again
        dataset_name=EMBEDDED_GRIDS,
        pretrained_model_name_or_path=str(starting_weights(study, seed, work)),
        max_train_steps=steps,
        seed=seed,
        report_to="none",
        dataloader_num_workers=0,
    )
    return VRPOTrainer(
        encoders=[GridEncoder()] if aligned else None,
        vae=GreyImages(),
        args=args,
        callbacks=[*callbacks, *([GradientScale(**scale)] if scale else [])],
    )


@torch.no_grad()
def draw(pipeline, count: int, solver_steps: int, oracle=None) -> torch.Tensor:
    """Draws samples `[count, 1, 16, 16]`, float32; sample i is the same for every `count`.

    Args:
        oracle: an aligned transformer whose scaffold sees the features of held-out grids while it draws.
    """
    pipeline.set_progress_bar_config(disable=True)
    if oracle is not None:
        held_out = torch.from_numpy(grid_images("validation"))[:, None].expand(-1, 3, -1, -1).float() / 127.5 - 1
    side = pipeline.transformer.config.sample_size
    parts = []
    for indices in torch.arange(count).split(250):
        noise = torch.stack([start_noise(NOISE_SEED, i, (1, side, side)) for i in indices.tolist()])
        options = {"num_inference_steps": solver_steps, "guidance_scale": 1.0, "output_type": "latent"}
        with contextlib.nullcontext() if oracle is None else oracle.oracle(held_out[indices]):
            parts.append(pipeline([0] * len(noise), latents=noise, **options).images)
    return torch.cat(parts).cpu()


def trainer_samples(trainer: VRPOTrainer, count: int, solver_steps: int) -> torch.Tensor:
    """Draws samples `[count, 1, 16, 16]` from the averaged weights.

    An arm whose scaffold phase lasts for the whole run is an oracle: it sees features of real grids while it draws.
    """
    oracle = trainer.aligned if trainer.args.scaffold_fraction == 1 else None
    with (
        ema_weights(trainer.ema, trainer.aligned),
        full_pipeline(trainer.accelerator, trainer.pipeline, None) as averaged,
    ):
        return draw(averaged, count, solver_steps, oracle)


def sample_sheet(samples: torch.Tensor) -> PILImage.Image:
    """Samples `[count, 1, 16, 16]` in [-1, 1] side by side, four times as large."""
    pixels = ((samples[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return make_image_grid([PILImage.fromarray(image).resize((64, 64), 0) for image in pixels], 1, len(pixels))


class Curve(TrainerCallback):
    """Judges a few samples at regular steps, and logs the result as `grids/...`; its time is not training time."""

    def __init__(self, study: Study):
        self.study = study

    def on_train_begin(self, trainer):
        rows = read_metrics(trainer.metrics_file.path)
        if trainer.step and not any(row["step"] == trainer.step and "grids/pairs" in row for row in rows):
            self.on_evaluate(trainer)  # in case the run was killed between the checkpoint and the judgement

    def on_evaluate(self, trainer):
        if trainer.step % self.study.evaluate_every == 0:
            found = grid_judge()(trainer_samples(trainer, self.study.curve_samples, self.study.solver_steps))
            trainer.log({f"grids/{name}": value for name, value in found.items()})


def train_and_judge(study: Study, name: str, seed: int, work: Path) -> dict:
    """Trains one run to its end and judges it.

    Returns:
        its line for the results.

    Raises:
        TrainingInterrupted: after a signal, once a checkpoint has been saved.
    """
    arm = study.arms[name]
    folder = run_folder(study, name, seed, work)
    with make_trainer(study, arm, study.steps, seed, work, folder / "run", [Curve(study)]) as trainer:
        trainer.train()
        samples = trainer_samples(trainer, study.final_samples, study.solver_steps)
        parameters = sum(parameter.numel() for parameter in trainer.transformer.parameters())
        trainer.end()
    sample_sheet(samples[:SHOWN_SAMPLES]).save(folder / "samples.png")
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    logged = [row for row in rows if "train_seconds" in row]
    curve = [
        {"step": row["step"]} | {key.removeprefix("grids/"): row[key] for key in row if key.startswith("grids/")}
        for row in rows
        if "grids/pairs" in row
    ]
    return {
        "study": study.name,
        "arm": name,
        "seed": seed,
        "recipe": run_hash(study, arm),
        "flags": arm,
        "steps": study.steps,
        **grid_judge()(samples),
        "curve": curve,
        "loss": logged[-1]["loss_fm"],
        "train_seconds": logged[-1]["train_seconds"],
        "parameters": parameters,
        "hardware": hardware_name(torch.device("cpu")),
        "versions": versions(),
        "commit": commit(),
    }


def run_folder(study: Study, name: str, seed: int, work: Path) -> Path:
    return work / "runs" / f"{name}-{run_hash(study, study.arms[name])}-{seed}"


def run_one(args: argparse.Namespace, study: Study):
    """`one`: a single run in this process."""
    torch.set_num_threads(args.threads)
    for name in chosen_arms(study, args.arms):
        for seed in args.seeds:
            try:
                line = train_and_judge(study, name, seed, args.work)
            except TrainingInterrupted as interrupted:
                sys.exit(128 + interrupted.signum)
            append_result(results_file(args, study), line)
            for checkpoint in list_checkpoints(run_folder(study, name, seed, args.work) / "run"):
                shutil.rmtree(checkpoint)
            numbers = ", ".join(f"{key} {line[key]:.3f}" for key in COLUMNS)
            print(f"{name}, seed {seed}: {numbers} ({line['train_seconds']:.0f} s)", flush=True)
            AcceleratorState._reset_state(reset_partial_state=True)


def run_all(args: argparse.Namespace, study: Study) -> int:
    """`run`: makes every run without a result, `--workers` at the same time; returns how many runs are still to be made."""
    jobs = missing_runs(args, study)
    print(f"{len(jobs)} of {len(chosen_arms(study, args.arms)) * len(args.seeds)} runs to do", flush=True)
    workers = Workers(args, SimpleNamespace(name=study.name))
    previous = {n: signal.signal(n, lambda *_: workers.stop()) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(job):
        name, seed = job
        folder = run_folder(study, name, seed, args.work)
        folder.mkdir(parents=True, exist_ok=True)
        places = ["--study", str(args.study), "--work", str(args.work), "--results", str(args.results)]
        own = ["one", "--arms", name, "--seeds", str(seed), "--threads", str(args.threads), *places]
        if workers.call([sys.executable, str(HERE / "grids.py"), *own], folder / LOG):
            print((folder / LOG).read_text(errors="replace").strip().splitlines()[-1], flush=True)

    try:
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(run, jobs))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    undone = len(missing_runs(args, study))
    print(f"{len(jobs) - undone} runs done, {undone} left; results in {results_file(args, study)}", flush=True)
    return undone


def missing_runs(args: argparse.Namespace, study: Study) -> list[tuple[str, int]]:
    """Arms and seeds without a result, all arms of a seed before the next seed."""
    done = {(line["recipe"], line["seed"]) for line in read_results(results_file(args, study))}
    arms = chosen_arms(study, args.arms)
    return [
        (name, seed) for seed in args.seeds for name, arm in arms.items() if (run_hash(study, arm), seed) not in done
    ]


def results_file(args: argparse.Namespace, study: Study) -> Path:
    return args.results / f"results-{study.name}.jsonl"


# ----------------------------------------------------------------------------------------------------------------------
# What a step costs


def timing_file(args: argparse.Namespace, study: Study) -> Path:
    return args.results / f"timing-{study.name}.json"


def time_arms(args: argparse.Namespace, study: Study):
    """`time`: measures the seconds of a step of each arm, relative to the reference in the same round, as medians over rounds."""
    torch.set_num_threads(args.threads)
    arms = chosen_arms(study, args.arms)
    arms = {study.reference: study.arms[study.reference]} | arms
    seconds = {name: [] for name in arms}
    for round_number in range(args.rounds):
        for name in random.Random(round_number).sample(sorted(arms), len(arms)):
            folder = args.work / "timing"
            shutil.rmtree(folder, ignore_errors=True)
            clock = StepClock()
            with make_trainer(
                study, arms[name] | {"logging_steps": 10**6}, 40, 0, args.work, folder, [clock]
            ) as trainer:
                trainer.train()
                trainer.end()
            seconds[name].append(statistics.median(np.diff(clock.times)[10:]))
            AcceleratorState._reset_state(reset_partial_state=True)
    shutil.rmtree(args.work / "timing", ignore_errors=True)
    base, file = seconds[study.reference], timing_file(args, study)
    known = json.loads(file.read_text()) if file.exists() else {}
    for name, values in seconds.items():
        ratios = [own / reference for own, reference in zip(values, base)]
        known[name] = {"ratio": statistics.median(ratios), "seconds": statistics.median(values), "rounds": args.rounds}
        print(
            f"{name}: {1000 * known[name]['seconds']:.1f} ms a step, {known[name]['ratio']:.3f} of {study.reference}'s"
        )
    file.write_text(json.dumps(known, indent=1) + "\n")


class StepClock(TrainerCallback):
    """Records the time after each step."""

    def __init__(self):
        self.times = []

    def on_step_end(self, trainer):
        self.times.append(time.perf_counter())


# ----------------------------------------------------------------------------------------------------------------------
# The table


def steps_to(line: dict, target: float) -> float | None:
    """The step at which a run's curve first reaches the share `target` of pairs, interpolated; None if it never does."""
    before = (0, 0.1)
    for point in line["curve"]:
        step, pairs = point["step"], point["pairs"]
        if pairs >= target:
            return before[0] + (step - before[0]) * (target - before[1]) / (pairs - before[1])
        before = step, pairs
    return None


def pairs_at(line: dict, step: float) -> float:
    """A run's share of pairs after `step` steps, interpolated between the points of its curve; beyond the last, that one's."""
    points = [(0, 0.1), *((point["step"], point["pairs"]) for point in line["curve"])]
    return float(np.interp(step, *zip(*points)))


def equal_compute(own: dict[int, dict], base: dict[int, dict], ratio: float, steps: int) -> str:
    """The paired difference in the share of pairs after equal time, that of the whole reference run, from the curves."""
    points = {seed: {"pairs": pairs_at(line, steps / ratio)} for seed, line in own.items()}
    return difference(points, {seed: {"pairs": pairs_at(line, steps)} for seed, line in base.items()}, "pairs")


def table(study: Study, lines: list[dict], timing: dict, reference: str, arms: dict[str, dict]) -> str:
    """A table of means over seeds with their standard errors, and of differences to the reference for each seed."""
    hashes = {name: run_hash(study, arm) for name, arm in arms.items()}
    runs = {name: {line["seed"]: line for line in lines if line["recipe"] == key} for name, key in hashes.items()}
    base = runs.get(reference, {})
    # The target is the last point of the reference's curve, which has as many samples as the points of other curves.
    target = statistics.mean(line["curve"][-1]["pairs"] for line in base.values()) if base else None
    head = ["arm", "seeds", "step", *COLUMNS.values()]
    head += [f"pairs against {reference}", f"FD of grids against {reference}"]
    head += [f"pairs in {reference}'s seconds, against it", f"steps to {reference}'s pairs"]
    rows = []
    for name, own in runs.items():
        if not own:
            continue
        row = [name, str(len(own)), f"{timing[name]['ratio']:.2f}" if name in timing else "–"]
        row += [with_error([line[key] for line in own.values()]) for key in COLUMNS]
        row += ["–" if name == reference else difference(own, base, key) for key in ("pairs", "fd_joint")]
        known = name in timing and reference in timing and name != reference and base
        ratio = timing[name]["ratio"] / timing[reference]["ratio"] if known else 1.0
        row.append(equal_compute(own, base, ratio, study.steps) if known else "–")
        reached = [steps_to(line, target) for line in own.values()] if target else [None]
        row.append(f"{statistics.mean(reached):.0f}" if None not in reached else "–")
        rows.append(row)
    return markdown(head, rows)


def print_table(args: argparse.Namespace, study: Study):
    """`table`: prints all results of the current study, or those of the given seeds."""
    lines = read_results(results_file(args, study))
    if args.seeds:
        lines = [line for line in lines if line["seed"] in args.seeds]
    arms = chosen_arms(study, args.arms)
    reference = args.reference or study.reference
    chosen_arms(study, [reference])
    if not any(line["recipe"] in {run_hash(study, arm) for arm in arms.values()} for line in lines):
        raise InputError(None, f"{results_file(args, study)} has no run of this study; `grids.py run` makes them")
    file = timing_file(args, study)
    print(table(study, lines, json.loads(file.read_text()) if file.exists() else {}, reference, arms))


def save_picture(args: argparse.Namespace, study: Study):
    """`picture`: draws the first samples of each arm and seed that has run, one row each, in `samples.png` of the work folder."""
    rows = []
    for name in chosen_arms(study, args.arms):
        for seed in args.seeds:
            file = run_folder(study, name, seed, args.work) / "samples.png"
            if file.exists():
                sheet = PILImage.open(file)
                row = PILImage.new("L", (SHOWN_SAMPLES * 72, 88), 255)
                for i in range(SHOWN_SAMPLES):
                    row.paste(sheet.crop((i * 64, 0, (i + 1) * 64, 64)), (i * 72, 16))
                ImageDraw.Draw(row).text((2, 2), f"{name}, seed {seed}", fill=0)
                rows.append(row)
    if not rows:
        raise InputError(None, f"{args.work} has samples of none of these arms and seeds; `grids.py run` makes them")
    make_image_grid(rows, len(rows), 1).save(args.work / "samples.png")
    print(args.work / "samples.png")


def main(argv: list[str] | None = None) -> int:
    parser = OneLineErrorParser(
        prog="grids.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "action", choices=("run", "one", "time", "table", "picture"), help="`one` runs in this process"
    )
    parser.add_argument("--arms", nargs="+", help="arms of the study to use (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="seeds to use (default: 1 2 3; for `table`, all that have run)"
    )
    parser.add_argument(
        "--workers", type=number_in(In(1)), default=1, help="number of runs at the same time (default: 1)"
    )
    parser.add_argument("--threads", type=number_in(In(1)), default=1, help="of each run (default: 1)")
    parser.add_argument("--rounds", type=number_in(In(1)), default=5, help="of `time` (default: 5)")
    parser.add_argument("--reference", help="arm with which `table` compares the others (default: the study's)")
    parser.add_argument("--study", type=Path, default=HERE / "grids.yaml", help="(default: grids.yaml)")
    parser.add_argument("--work", type=Path, help="folder of the runs (default: outputs/yardstick/STUDY)")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results and timing (default: this one)")
    args = parser.parse_args(argv)
    study = load_study(args.study)
    args.work = (args.work or ROOT / "outputs" / "yardstick" / study.name).resolve()
    if args.action != "table":
        args.seeds = args.seeds or [1, 2, 3]
    args.results, args.study = args.results.resolve(), args.study.resolve()
    actions = {"run": run_all, "one": run_one, "time": time_arms, "table": print_table, "picture": save_picture}
    return actions[args.action](args, study) or 0


if __name__ == "__main__":
    try:
        sys.exit(1 if main() else 0)
    except InputError as error:
        sys.exit(f"grids.py: error: {error}")
