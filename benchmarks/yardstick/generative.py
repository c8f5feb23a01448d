#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Does the generative policy beat flow matching at equal wall time? Arms x seeds from one trained model.

    python benchmarks/yardstick/generative.py cpu --seeds 1 2 3 --workers 2
    python benchmarks/yardstick/generative.py cpu --table
    python benchmarks/yardstick/generative.py cpu-annealed --seeds 1 2 3 --workers 2

All arms of a comparison start from the averaged weights of the same base, which is trained once, before them. The budget is
the wall time of `budget_steps` steps of flow matching. An arm that follows rewards pays from it for its rollouts, likelihoods,
the statistics of the training images and the first measurement of the guards. Results are appended to
`results-generative-NAME.jsonl`; runs that already have a line there are skipped.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import judge
import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image as PILImage
from recipe import HERE, Recipe, load_recipe, read_yaml
from run import Workers, append_result, commit, read_results, versions
from subset import pack, packed, show_smaller
from timing import one_core
from training_run import (
    LOG,
    add_common_options,
    make_cache,
    make_moments,
    resolve_folders,
    train_argv,
    train_script,
)

from diffusers_vrpo.command_line import OneLineErrorParser, number_in
from diffusers_vrpo.config import In
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.files import write_atomically
from diffusers_vrpo.pipelines.pipeline_vrpo import VRPOPipeline
from diffusers_vrpo.pipelines.sampling import sample_batch
from diffusers_vrpo.reporting.runs import spread
from diffusers_vrpo.training.checkpoints import list_checkpoints
from diffusers_vrpo.training.metrics import read_metrics


COLUMNS = {
    "fd_train": "FD, held-out features",
    "fd_reward": "FD, the reward's features",
    "guided": "FD, held-out, best guidance",
    "coverage": "coverage",
    "recall": "recall",
    "sliced_wasserstein_train": "sliced Wasserstein",
}


@dataclass(frozen=True)
class Comparison:
    """A comparison, as read from `generative-NAME.yaml`, whose keys are the fields.

    Args:
        base: options of the training run from which all arms start, or `comparison` and `arm`, which name such a run.
    """

    name: str
    size: str
    base: dict
    base_seed: int
    budget_steps: int
    reward_pixels: int
    guidance_scales: list[float]
    guided_samples: int
    train: dict
    policy: dict
    arms: dict[str, dict]
    base_steps: int | None = None


def load_comparison(name: str) -> Comparison:
    """Reads a comparison by its name or its file.

    Raises:
        InputError: if the file is not a comparison.
    """
    path = Path(name) if name.endswith(".yaml") else HERE / f"generative-{name}.yaml"
    try:
        return Comparison(**{"name": path.stem.removeprefix("generative-")} | read_yaml(path))
    except TypeError as error:
        raise InputError(None, f"{path}: {error}") from error


def runs_folder(comparison: Comparison, work: Path) -> Path:
    """The folder of the runs of a comparison."""
    return work / f"generative-{comparison.name}"


def base_folder(comparison: Comparison, work: Path) -> Path:
    """The folder of the model from which all arms start."""
    if "comparison" not in comparison.base:
        return runs_folder(comparison, work) / "base"
    first = load_comparison(comparison.base["comparison"])
    return runs_folder(first, work) / run_name(comparison.base["arm"], first.budget_steps, comparison.base_seed)


def run_name(arm: str, steps: int, seed: int) -> str:
    return f"{arm}-{steps}-{seed}"


def arm_options(comparison: Comparison, arm: dict, reward_encoder: str) -> dict:
    """The options of `train_vrpo.py` for an arm, in addition to those of the size."""
    options = {"objective": "none"} | comparison.train
    if arm.get("policy"):
        options |= comparison.policy | {"reward_encoder": reward_encoder}
    return options | {name: value for name, value in arm.items() if name not in ("policy", "steps_of")}


def arm_argv(
    comparison: Comparison, recipe: Recipe, arm: dict, steps: int, seed: int, work: Path, folder: Path, more=None
) -> list[str]:
    """The command line of a run that starts from the base."""
    options = arm_options(comparison, arm, make_reward_encoder(comparison, recipe, work))
    start = {
        "pretrained_model_name_or_path": str(base_folder(comparison, work)),
        "preset": None,
        "model_config": None,
        "checkpointing_steps": 10**6,
    }
    # Training does not see the same samples as the base did in its first steps.
    return train_argv(
        recipe, options, {"steps": steps, "alignment_stop_step": None}, 100 + seed, work, folder, start | (more or {})
    )


def make_base(comparison: Comparison, recipe: Recipe, work: Path, workers: Workers) -> Path:
    """Trains the model from which all arms start, unless it is already trained, and returns its folder."""
    folder = base_folder(comparison, work)
    if "comparison" in comparison.base:
        first = load_comparison(comparison.base["comparison"])
        make_base(first, recipe, work, workers)
        train_arm(first, recipe, comparison.base["arm"], first.budget_steps, comparison.base_seed, work, workers)
    elif not (folder / "model_index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(make_moments(recipe, work), folder / "fd_reference.safetensors")
        plan = {"steps": comparison.base_steps, "alignment_stop_step": None}
        argv = train_argv(recipe, comparison.base, plan, comparison.base_seed, work, folder)
        workers.train(argv, folder / LOG)
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
    if not (folder / "model_index.json").exists():
        raise InputError(None, f"the base was not trained to its end; see {folder / LOG}")
    return folder


def train_arm(
    comparison: Comparison, recipe: Recipe, name: str, steps: int, seed: int, work: Path, workers: Workers
) -> bool:
    """Trains an arm from the base, unless that is done, and keeps only its pipeline; returns whether training was completed."""
    folder = runs_folder(comparison, work) / run_name(name, steps, seed)
    if (folder / "trained").exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(make_moments(recipe, work), folder / "fd_reference.safetensors")
    argv = arm_argv(comparison, recipe, comparison.arms[name], steps, seed, work, folder, {"num_fd_samples": 2})
    if not workers.train(argv, folder / LOG):
        return False
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / "trained").touch()
    return True


def make_reward_encoder(comparison: Comparison, recipe: Recipe, work: Path) -> str:
    """Makes a copy of the aligning encoder that sees images of `reward_pixels` pixels, and returns its folder."""
    if recipe.encoder == "digits":
        return recipe.encoder
    folder = work / "packed" / "reward"
    if not folder.exists():
        partial = folder.with_suffix(".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(packed(work / "packed", recipe.encoder), partial)
        show_smaller(partial / "preprocessor_config.json", comparison.reward_pixels)
        partial.replace(folder)
    return str(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Time


# Options whose values do not change the time of an update.
FREE = (
    "lr_scheduler",
    "learning_rate",
    "reward_weights",
    "generative_coeff",
    "max_gradient_ratio",
    "generative_learning_rate",
)


def cost_key(arm: dict) -> str:
    """The options on which the time of an arm's step depends, as text; equal for arms that cost the same."""
    return json.dumps({name: value for name, value in arm.items() if name not in FREE}, sort_keys=True)


def measure_times(comparison: Comparison, recipe: Recipe, work: Path, kinds: list[str], rounds: int) -> dict:
    """Measures the seconds of a step, and before the first step, of flow matching and of each kind of arm with a policy.

    They are the medians, over the rounds, of short runs in turn, in one process on the cores that it may use.

    Args:
        kinds: the `cost_key` of each kind.
    """
    plain = cost_key({})
    seen = {kind: {"step": [], "setup": []} for kind in [plain, *kinds]}
    few = {"fd_encoder": None, "num_fd_samples": None, "num_validation_images": 1}
    few |= {"validation_labels": ["0"], "num_inference_steps": 1}
    for _ in range(rounds):
        for kind, times in seen.items():
            arm, folder = json.loads(kind), work / "timing"
            shutil.rmtree(folder, ignore_errors=True)
            # Only whole rollouts count, and not the first, which includes one-time work.
            every = (comparison.policy | arm).get("rollout_every", 2) if arm else 4
            steps, start = 8 * every, time.perf_counter()
            AcceleratorState._reset_state(reset_partial_state=True)
            script = train_script()
            argv = arm_argv(comparison, recipe, arm, steps, 0, work, folder, few | {"logging_steps": every})
            script.main(script.parse_args(argv))
            whole = time.perf_counter() - start
            rows = [row["train_seconds"] for row in read_metrics(folder / "metrics.jsonl") if "train_seconds" in row]
            times["step"].append((rows[-1] - rows[0]) / (steps - every))
            times["setup"].append(whole - rows[-1])
    shutil.rmtree(work / "timing")
    times = {kind: {name: statistics.median(values) for name, values in each.items()} for kind, each in seen.items()}
    # The time that a run without a policy also needs is not charged to the policy.
    return {
        kind: {"step": each["step"], "setup": max(0.0, each["setup"] - times[plain]["setup"])}
        for kind, each in times.items()
    }


def plan_steps(comparison: Comparison, name: str, arm: dict, times: dict) -> tuple[int, float]:
    """The steps of an arm for the budget, or as many as the arm `steps_of` has, and its nominal seconds.

    Raises:
        InputError: if the budget does not suffice for one step.
    """
    if "steps_of" in arm:
        steps = plan_steps(comparison, arm["steps_of"], comparison.arms[arm["steps_of"]], times)[0]
        return steps, steps * times[cost_key({})]["step"]
    own = times[cost_key(arm)]
    budget = comparison.budget_steps * times[cost_key({})]["step"]
    steps = round((budget - own["setup"]) / own["step"])
    if steps < 1:
        raise InputError(
            None, f"budget_steps {comparison.budget_steps} does not pay for one step of {name}; take more"
        )
    return steps, own["setup"] + steps * own["step"]


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def run_job(job: dict, comparison: Comparison, recipe: Recipe, work: Path, results: Path, workers: Workers):
    """Trains one arm, judges it, and writes its line."""
    folder = runs_folder(comparison, work) / run_name(job["arm"], job["steps"], job["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    log, judged = folder / LOG, folder / "judged.json"
    if job["arm"] != "base" and not train_arm(
        comparison, recipe, job["arm"], job["steps"], job["seed"], work, workers
    ):
        return
    if not judged.exists():
        run = base_folder(comparison, work) if job["arm"] == "base" else folder
        argv = [comparison.size, "--run", str(run), "--seed", str(job["seed"]), "--work", str(work.parent)]
        argv += [
            "--reward_encoder",
            make_reward_encoder(comparison, recipe, work),
            "--guided_samples",
            str(comparison.guided_samples),
        ]
        argv += ["--guidance_scales", *map(str, comparison.guidance_scales)] if comparison.guidance_scales else []
        argv += ["--output", str(folder / "judged.tmp")]
        if not workers.args.workers:
            judge.main(argv)
        elif not workers.call([sys.executable, str(HERE / "judge.py"), *argv], log):
            return
        (folder / "judged.tmp").replace(judged)
    line = job | json.loads(judged.read_text()) | {"versions": versions(), "commit": commit()}
    if comparison.guidance_scales:
        line["guided"] = min(line["fd_guided"].values())
    if (folder / "metrics.jsonl").exists():
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train_seconds" in row]
        line |= {"train_seconds": rows[-1]["train_seconds"], "train_flops": rows[-1]["train_flops"]}
        kept = ("sample_reward/", "sample_reward_real/", "policy/gradient_ratio")
        line["rewards"] = [{k: v for k, v in row.items() if k.startswith(kept)} for row in (rows[0], rows[-1])]
    append_result(results, line)
    print(
        f"{job['arm']}, seed {job['seed']}: {job['steps']} steps, FD {line['fd_train']:.1f}, of the reward {line['fd_reward']:.1f}",
        flush=True,
    )


def table(lines: list[dict]) -> str:
    """A table of mean ± standard deviation over seeds, and of the held-out distance against `fm-annealed`, seed by seed."""
    arms = {}
    for line in lines:
        arms.setdefault(line["arm"], {})[line["seed"]] = line
    columns = {key: name for key, name in COLUMNS.items() if all(key in line for line in lines)}
    # The samples depend on the seed, but the loss of the base does not.
    base_loss = next((line.get("loss_train") for line in lines if line["arm"] == "base"), None)
    head = ["arm", "seeds", "steps", "seconds", *columns.values()]
    head += ["loss on training images, against the base", "against fm-annealed, seed by seed"]
    rows = [head, ["---"] * len(head)]
    for name, by_seed in arms.items():
        own = list(by_seed.values())
        row = [name, str(len(own)), f"{own[0]['steps']:,}", f"{own[0]['nominal_seconds']:.0f}"]
        for key in columns:
            values = [line[key] for line in own]
            digits = 1 if max(values) >= 10 else 3
            row.append(
                f"{np.mean(values):.{digits}f}" + (f" ± {spread(values):.{digits}f}" if len(values) > 1 else "")
            )
        rises = [100 * (line["loss_train"] / base_loss - 1) for line in own if base_loss and "loss_train" in line]
        row.append(f"{np.mean(rises):+.1f} %" if rises and name != "base" else "–")
        base = arms.get("fm-annealed", {})
        gaps = [line["fd_train"] - base[seed]["fd_train"] for seed, line in by_seed.items() if seed in base]
        both = name != "fm-annealed" and gaps
        row.append(f"{np.mean(gaps):+.1f}" + (f" ± {spread(gaps):.1f}" if len(gaps) > 1 else "") if both else "–")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def plot(lines: list[dict], file: Path):
    """Plots the distances of each arm, of each seed and on average, in features that no reward sees and in the reward's."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(line["arm"] for line in lines))
    panels = {key: COLUMNS[key] for key in ("fd_train", "fd_reward", "guided") if all(key in line for line in lines)}
    figure = Figure(figsize=(4.4 * len(panels), 0.5 * len(arms) + 1.4), layout="constrained")
    for axis, (key, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for place, arm in enumerate(arms):
            values = [line[key] for line in lines if line["arm"] == arm]
            axis.plot(values, [place] * len(values), "o", color="0.6", markersize=5)
            axis.plot(np.mean(values), place, "|", color="C0", markersize=18, markeredgewidth=2.5)
        axis.set_yticks(range(len(arms)), arms)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def grid(comparison: Comparison, work: Path, lines: list[dict], file: Path):
    """Draws two samples of each class and arm from the same noise, for the first seed and the middle guidance scale."""
    seed, rows = min(line["seed"] for line in lines), []
    scale = statistics.median_low(comparison.guidance_scales or [1.0])
    for line in lines:
        name = run_name(line["arm"], line["steps"], line["seed"])
        folder = base_folder(comparison, work) if line["arm"] == "base" else runs_folder(comparison, work) / name
        if line["seed"] != seed or not (folder / "model_index.json").exists():
            continue
        pipeline = VRPOPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        labels = 2 * pipeline.trained_labels
        options = {"num_inference_steps": 50, "guidance_scale": scale}
        images = sample_batch(pipeline, range(len(labels)), labels, 0, options)
        rows += [np.concatenate(half, axis=1) for half in np.split(images, 2)]
        print(f"{file.name}: rows {len(rows) - 1} and {len(rows)} are {line['arm']}")
    if rows:
        image = PILImage.fromarray(np.concatenate(rows))
        image.resize((2 * image.width, 2 * image.height), PILImage.Resampling.NEAREST).save(file)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineErrorParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="number of runs at the same time, each on a core of its own (default: 1); 0 runs one by one in this process",
    )
    parser.add_argument(
        "--threads", type=number_in(In(1)), default=None if torch.cuda.is_available() else 1, help="of each run"
    )
    parser.add_argument("--rounds", type=number_in(In(1)), default=3, help="rounds of the timing (default: 3)")
    parser.add_argument("--table", action="store_true", help="print the recorded results, and draw a plot and samples")
    args = parser.parse_args(argv)
    resolve_folders(args)
    if args.workers < 0:
        parser.error(f"--workers {args.workers} must be at least 0")
    comparison = load_comparison(args.size)
    recipe = load_recipe(comparison.size)
    results = args.results / f"results-generative-{comparison.name}.jsonl"
    if args.table:
        lines = read_results(results)
        if not lines:
            raise InputError(None, f"{results} has no run; the command without --table makes them")
        report = args.work / recipe.name / "report"
        report.mkdir(parents=True, exist_ok=True)
        plot(lines, report / f"generative-{comparison.name}.png")
        grid(comparison, args.work / recipe.name, lines, report / f"generative-{comparison.name}-samples.png")
        print(f"{table(lines)}\nplot and samples are in {report}")
        return 0
    if unknown := [name for name in args.arms or [] if name not in comparison.arms]:
        raise InputError(None, f"--arms {unknown[0]} is not one of {', '.join(comparison.arms)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    arms = {name: comparison.arms[name] for name in args.arms or comparison.arms}
    work = args.work / recipe.name
    pack(recipe, args.shared, work / "packed")
    make_cache(recipe, work)
    judge.make_references(recipe, work)
    make_moments(recipe, work)
    make_reward_encoder(comparison, recipe, work)
    workers = Workers(args, recipe)
    make_base(comparison, recipe, work, workers)
    timing = args.results / f"timing-generative-{comparison.name}.json"
    known = json.loads(timing.read_text()) if timing.exists() else {}
    missing = sorted({cost_key(arm) for arm in arms.values() if arm.get("policy")} - set(known))
    plain = cost_key({})
    if missing or not known:
        with one_core():
            found = measure_times(comparison, recipe, work, missing, args.rounds)
        # Ratios of times hold from one day to the next. The seconds of flow matching stay those of the first measurement.
        factor = known[plain]["step"] / found[plain]["step"] if known else 1.0
        found = {kind: {name: value * factor for name, value in each.items()} for kind, each in found.items()}
        known = found | known
        write_atomically(timing, (json.dumps(known, indent=1) + "\n").encode())
    done = {(line["arm"], line["seed"], line["steps"]) for line in read_results(results)}
    jobs = []
    for seed in args.seeds:
        for name, arm in arms.items():
            steps, seconds = plan_steps(comparison, name, arm, known)
            jobs.append({"arm": name, "seed": seed, "steps": steps, "nominal_seconds": seconds})
    jobs.insert(0, {"arm": "base", "seed": args.seeds[0], "steps": 0, "nominal_seconds": 0.0})
    jobs = [job for job in jobs if (job["arm"], job["seed"], job["steps"]) not in done]
    print(f"{len(jobs)} runs to do: {', '.join(sorted({job['arm'] for job in jobs}))}", flush=True)
    if args.workers:
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: run_job(job, comparison, recipe, work, results, workers), jobs))
    else:
        for job in jobs:
            run_job(job, comparison, recipe, work, results, workers)
    print(table(read_results(results)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"generative.py: error: {error}")
