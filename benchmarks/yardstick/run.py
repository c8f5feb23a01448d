#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Does VRPO beat REPA at equal compute? Train arms x seeds of a size, judge them, and append one line per run to the results.

    python benchmarks/yardstick/run.py cpu --arms none repa vrpo --seeds 1 2 3 --workers 2
    python benchmarks/yardstick/table.py cpu

Arms without a time in `timing-SIZE.json` are timed first, as `timing.py` does. Runs that are in `results-SIZE.jsonl` are
skipped; a run that was stopped (Ctrl-C, SIGTERM, `--time_limit_s`) continues when the same command is given again. README.md
explains what equal compute means.
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import judge
import numpy as np
import torch
import train_arm
from accelerate.state import AcceleratorState
from recipe import (
    HERE,
    Recipe,
    aligned_flags,
    choose_arms,
    equal_compute,
    load_recipe,
    recipe_hash,
    starts_from_base,
    step_ratio,
)
from subset import pack
from timing import build_parser as build_timing_parser
from timing import read_timing, time_arms
from training_run import (
    ARM_SCRIPT,
    LOG,
    ROOT,
    add_common_options,
    make_cache,
    make_moments,
    resolve_folders,
    train_argv,
)

from diffusers_vrpo.command_line import OneLineErrorParser, number_in
from diffusers_vrpo.config import In
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.training.checkpoints import list_checkpoints
from diffusers_vrpo.training.metrics import read_metrics


GRACE = 60  # seconds that a stopped run has to save a checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# Results


def read_results(path: Path) -> list[dict]:
    """Reads the lines of a results file, and skips an incomplete line, which a killed process may have left."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def append_result(path: Path, line: dict):
    """Appends a whole line, even after a line that was cut short and while other processes append theirs."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        whole = not end or file.read(1) == b"\n"
        file.write(b"" if whole else b"\n")
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def commit() -> str:
    """The commit of the checkout, with a + if files differ from it; `unknown` outside a checkout."""
    try:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        found = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+" if changed else "")


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def result_line(job: dict, recipe: Recipe, folder: Path) -> dict:
    """The line of a finished and judged run for the results file."""
    rows = read_metrics(folder / "metrics.jsonl")
    metric = next(name for row in rows for name in row if name.startswith("validation/fd_"))
    last = [row for row in rows if "train_seconds" in row][-1]
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    at, flops = zip((0, 0.0), *((row["step"], row["train_flops"]) for row in rows if "train_flops" in row))
    curve = [[row["step"], row[metric]] for row in rows if metric in row]
    return {
        "size": recipe.name,
        "arm": job["arm"],
        "seed": job["seed"],
        "recipe": job["hash"],
        "flags": job["flags"],
        "steps": job["plan"]["steps"],
        "alignment_stop_step": job["plan"]["alignment_stop_step"],
        "nominal_seconds": job["plan"]["nominal_seconds"],
        "train_seconds": last["train_seconds"],
        "train_flops": last["train_flops"],
        "metric": metric,
        "curve": curve,
        "curve_flops": [float(np.interp(step, at, flops)) for step, _ in curve],
        **json.loads((folder / "judged.json").read_text()),
        "parameters": starts[-1]["parameters"],
        "hardware": sorted({start["hardware"] for start in starts}),
        "versions": versions(),
        "commit": commit(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def plan_jobs(recipe: Recipe, arms: dict[str, dict], seeds: list[int], timing: dict, done: list[dict]) -> list[dict]:
    """Plans the runs that are not in `done`, all arms of a seed before the next seed.

    Raises:
        InputError: if an arm was not timed.
    """
    known = {(line["recipe"], line["seed"]) for line in done}
    jobs = []
    for seed in seeds:
        for name, arm in arms.items():
            plan = equal_compute(recipe, arm, name, timing)
            key = recipe_hash(recipe, arm, plan)
            job = {"arm": name, "seed": seed, "hash": key, "flags": aligned_flags(arm), "plan": plan}
            if (key, seed) not in known:
                jobs.append(job)
    return jobs


def share_cores(workers: int, threads: int | None) -> list[list[int]]:
    """The cores of each worker, as lists; empty lists, which mean all cores, if threads are not limited."""
    if not threads or not hasattr(os, "sched_getaffinity"):
        return [[]] * workers
    cores = sorted(os.sched_getaffinity(0))
    return [[cores[(i * threads + j) % len(cores)] for j in range(threads)] for i in range(workers)]


def untimed(args: argparse.Namespace, recipe: Recipe, arms: dict[str, dict]) -> list[str]:
    """The arms that are not timed yet, including `none`, as which an arm continues that stops aligning, and a base runs."""
    known, plain = read_timing(recipe, args.results), {"none": {"objective": "none"}}
    needed = arms | (plain if recipe.base or any("stop" in arm for arm in arms.values()) else {})
    return [name for name, arm in needed.items() if step_ratio(arm, known) is None]


def measure_missing(args: argparse.Namespace, recipe: Recipe, arms: dict[str, dict]):
    """Times the arms that are not timed yet."""
    if missing := untimed(args, recipe, arms):
        places = ["--shared", str(args.shared), "--work", str(args.work), "--results", str(args.results)]
        time_arms(build_timing_parser().parse_args([args.size, *places]), recipe, missing)


class Workers:
    """Runs jobs at the same time, each in processes of its own, until they are done or the time is over."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe):
        self.args, self.recipe, self.work = args, recipe, args.work / recipe.name
        self.processes: set[subprocess.Popen] = set()
        # train_vrpo.py takes all cores that it may use, so each run gets cores of its own.
        self.cores = queue.SimpleQueue()
        for cores in share_cores(args.workers, args.threads):
            self.cores.put(cores)
        self.lock, self.stopping = threading.Lock(), threading.Event()

    def train(self, argv: list[str], log: Path) -> bool:
        """Runs train_arm.py in a process of its own or, with `--workers 0`, in this one; returns whether it was completed."""
        if self.args.workers:
            return self.call([sys.executable, str(ARM_SCRIPT), *argv], log)
        if self.stopping.is_set():
            return False
        AcceleratorState._reset_state(reset_partial_state=True)
        train_arm.main(argv)
        return True

    def judge(self, folder: Path, seed: int, output: Path, log: Path) -> bool:
        """Runs judge.py in the same way; returns whether it was completed."""
        argv = [self.args.size, "--run", str(folder), "--seed", str(seed), "--work", str(self.args.work)]
        argv += ["--output", str(output)]
        if self.args.workers:
            return self.call([sys.executable, str(HERE / "judge.py"), *argv], log)
        judge.main(argv)
        return True

    def stop(self):
        """Lets every run save a checkpoint and stop, and starts no other run."""
        self.stopping.set()
        with self.lock:
            for process in self.processes:
                process.terminate()

    def call(self, command: list[str], log: Path) -> bool:
        """Runs a command; returns whether it succeeded, which is False, too, if all runs are being stopped."""
        cores = self.cores.get()
        try:
            return self.call_on(cores, command, log)
        finally:
            self.cores.put(cores)

    def call_on(self, cores: list[int], command: list[str], log: Path) -> bool:
        threads = {"OMP_NUM_THREADS": str(self.args.threads)} if self.args.threads else {}
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with log.open("ab") as file:
            with self.lock:
                if self.stopping.is_set():
                    return False
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                if cores:  # this is after the interpreter has started and before torch starts its threads
                    os.sched_setaffinity(process.pid, cores)
                self.processes.add(process)
            code = process.wait()
        with self.lock:
            self.processes.discard(process)
        if code and not self.stopping.is_set():
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            print(
                f"{log.parent.name}: exit status {code}: {''.join(tail)[-300:]} (see {log})",
                file=sys.stderr,
                flush=True,
            )
        return code == 0

    def run(self, job: dict) -> bool:
        """Trains, judges and records a run; returns whether it was completed."""
        folder = self.work / "runs" / f"{job['arm']}-{job['hash']}-{job['seed']}"
        folder.mkdir(parents=True, exist_ok=True)
        log, trained, judged = folder / LOG, folder / "trained", folder / "judged.json"
        if not trained.exists():
            moments = make_moments(self.recipe, self.work)
            shutil.copyfile(moments, folder / moments.name)
            fork = {}
            if starts_from_base(self.recipe, job["flags"]):
                fork["fork_from"] = str(base_checkpoint(self.recipe, self.work))
            argv = train_argv(self.recipe, job["flags"], job["plan"], job["seed"], self.work, folder, fork)
            if not self.train(argv, log):
                return False
            trained.touch()
        if not judged.exists():
            partial = folder / "judged.tmp"
            if not self.judge(folder, job["seed"], partial, log):
                return False
            partial.replace(judged)
        line = result_line(job, self.recipe, folder)
        append_result(self.args.results / f"results-{self.recipe.name}.jsonl", line)
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        print(
            f"{job['arm']}, seed {job['seed']}: {line['steps']} steps, {line['train_seconds']:.0f} s, Fréchet distance "
            f"{line['fd_train']:.1f} (training images), {line['fd_validation']:.1f} (validation)",
            flush=True,
        )
        return True


def base_checkpoint(recipe: Recipe, work: Path) -> Path:
    """The checkpoint from which all arms of a recipe with a base continue."""
    return work / "base" / f"checkpoint-{recipe.base['steps']}"


def make_base(recipe: Recipe, work: Path, workers: Workers):
    """Trains the base from which all arms continue, without alignment, unless it is already trained.

    Raises:
        InputError: if training was not completed, for which its log has the reason.
    """
    folder, wanted = work / "base", base_checkpoint(recipe, work)
    if wanted.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(make_moments(recipe, work), folder / "fd_reference.safetensors")
    plan = {"steps": recipe.base["steps"], "alignment_stop_step": None}
    argv = train_argv(recipe, {"objective": "none"}, plan, recipe.base["seed"], work, folder)
    if not workers.train(argv, folder / LOG) or not wanted.exists():
        raise InputError(None, f"the base was not trained to its end; see {folder / LOG}, and run this again")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineErrorParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="number of runs at the same time, each in its own process (default: 1); 0 runs one by one in this process",
    )
    parser.add_argument(
        "--threads",
        type=number_in(In(1)),
        help="CPU threads of each run (default: 1 without a GPU, torch's default with one)",
    )
    parser.add_argument(
        "--time_limit_s",
        type=number_in(In(1), float),
        help="stop all runs, with a checkpoint, after this many seconds",
    )
    parser.add_argument(
        "--prepare_only",
        action="store_true",
        help="only pack data and encoders into a folder, to copy it to another machine",
    )
    parser.add_argument("--dry_run", action="store_true", help="only show what would be trained, and for how long")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the number of runs that are still to be made."""
    start = time.monotonic()
    parser = build_parser()
    args = parser.parse_args(argv)
    resolve_folders(args)
    if args.workers < 0:
        parser.error(f"--workers {args.workers} must be at least 0")
    if args.time_limit_s is not None and args.time_limit_s <= GRACE:
        parser.error(f"--time_limit_s {args.time_limit_s:g} must be above {GRACE}, which runs get to save")
    if args.threads is None and not torch.cuda.is_available():
        args.threads = 1
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = load_recipe(args.size)
    arms = choose_arms(args.arms, recipe)
    work, results = args.work / recipe.name, args.results / f"results-{recipe.name}.jsonl"
    if args.prepare_only:
        pack(recipe, args.shared, work / "packed")
        print(f"packed {recipe.name} in {work / 'packed'}")
        return 0
    if args.dry_run:
        for name in (missing := untimed(args, recipe, arms)):
            print(f"{name}: to be timed first")
        arms = {
            name: arm
            for name, arm in arms.items()
            if not {name, "none" if recipe.base or "stop" in arm else name} & set(missing)
        }
    else:
        measure_missing(args, recipe, arms)
    timing = read_timing(recipe, args.results)
    jobs = plan_jobs(recipe, arms, args.seeds, timing, read_results(results))
    print(f"{len(jobs)} of {len(arms) * len(args.seeds)} runs to do", flush=True)
    for job in jobs if args.dry_run else []:
        plan = job["plan"]
        stop = f", aligned until {plan['alignment_stop_step']}" if plan["alignment_stop_step"] else ""
        print(f"{job['arm']}, seed {job['seed']}: {plan['steps']} steps, {plan['nominal_seconds'][-1][1]:.0f} s{stop}")
    if args.dry_run or not jobs:
        return len(jobs)
    pack(recipe, args.shared, work / "packed")
    make_cache(recipe, work)
    judge.make_references(recipe, work)
    make_moments(recipe, work)

    workers = Workers(args, recipe)

    def leave(number, _):
        workers.stop()
        if not args.workers:  # while a run trains, its own handler, which saves a checkpoint, replaces this one
            sys.exit(128 + number)

    def time_is_over():
        workers.stop()
        if not args.workers:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    left = args.time_limit_s - GRACE - (time.monotonic() - start) if args.time_limit_s else threading.TIMEOUT_MAX
    clock = threading.Timer(max(0, left), time_is_over)
    clock.daemon = True
    clock.start()
    try:
        if recipe.base is not None:
            make_base(recipe, work, workers)
        if args.workers:
            with ThreadPoolExecutor(args.workers) as pool:
                list(pool.map(workers.run, jobs))
        else:
            with contextlib.suppress(SystemExit):  # after a signal
                list(map(workers.run, jobs))
    finally:
        clock.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    undone = len(plan_jobs(recipe, arms, args.seeds, timing, read_results(results)))
    print(f"{len(jobs) - undone} runs done, {undone} left; results in {results}", flush=True)
    return undone


if __name__ == "__main__":
    try:
        sys.exit(1 if main() else 0)
    except InputError as error:
        sys.exit(f"run.py: error: {error}")
