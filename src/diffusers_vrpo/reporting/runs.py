# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Compares training runs: reads their logs, groups them into arms, and computes the numbers that compare arms."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from ..config import Resume, VRPOConfig, has_effect, names_marked, options_of
from ..errors import InputError, first_line
from ..files import read_regular
from ..markup import printable
from ..schemas import METRICS_ROW, RECORDED_OPTIONS, START, mismatch, read_rows


# The seed, and options about folders, logging and saving, which affect neither the method nor its evaluation.
HOUSEKEEPING = {"seed"} | names_marked(Resume.MACHINE, Resume.WATCHED)
# Options on which the evaluation depends: the metrics of runs that differ in one of these cannot be compared.
JUDGED_ON = (
    "dataset_name dataset_config_name dataset_split train_data_dir latents_dir max_train_samples resolution vae "
    "num_inference_steps guidance_scale fd_encoder num_fd_samples"
)
COSTS = {"steps": "steps", "seconds": "training time", "flops": "FLOPs"}


# ----------------------------------------------------------------------------------------------------------------------
# Reading runs


def merge_rows(rows: list[dict]) -> list[dict]:
    """Merges the rows of each step. If steps go back, the run was resumed there, and the rows that it replaced are dropped."""
    merged: list[dict] = []
    for row in rows:
        if merged and row["step"] < merged[-1]["step"]:
            while merged and merged[-1]["step"] >= row["step"]:
                merged.pop()
        if merged and merged[-1]["step"] == row["step"]:
            merged[-1] = merged[-1] | row
        else:
            merged.append(row)
    return merged


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Run:
    """A training run, read from its output folder.

    Attributes:
        options: the options in `train_config.yaml`, without unset ones.
        rows: the rows of `metrics.jsonl`, one per step.
        seed: the seed of the run.
        last_step: the last logged step.
        starts: the starts in `starts.jsonl` that were followed by steps.
        costs: cumulative `steps`, `seconds` and `flops`, each as arrays `(at steps, values)`; None if unknown.

    Raises:
        InputError: if the folder is not the output folder of a run, or the run has not logged anything yet.
    """

    def __init__(self, folder: str | Path, warn: Callable[[str], None]):
        self.folder = Path(folder)
        files = [self.folder / name for name in ("train_config.yaml", "metrics.jsonl")]
        if missing := [path.name for path in files if not path.is_file()]:
            raise InputError(
                None,
                f"{folder} is not the output folder of a run, because it has no {' and no '.join(missing)}; give an "
                "`output_dir` of `vrpo train`",
            )
        try:
            self.options = yaml.safe_load(read_regular(files[0]))
            rows, damaged = read_rows(files[1], METRICS_ROW)
            starts = self.folder / "starts.jsonl"
            self.starts = read_rows(starts, START)[0] if os.path.lexists(starts) else []
        except (OSError, RecursionError, yaml.YAMLError) as error:
            raise InputError(None, f"{folder} cannot be read ({first_line(error)}); give another run") from error
        if not isinstance(self.options, dict):
            raise InputError(None, f"{files[0]} is not what `vrpo train` wrote (it has no options); give another run")
        if problem := mismatch(self.options, RECORDED_OPTIONS):
            raise InputError(None, f"{files[0]} is not what `vrpo train` wrote ({problem}); give another run")
        if damaged:
            warn(f"{files[1]}: {damaged} damaged line(s) skipped")
        self.rows = merge_rows(rows)
        if not self.rows:
            raise InputError(None, f"{files[1]} has no metrics yet; let the run reach its first `logging_steps`")
        self.seed = self.options.get("seed", 0)
        self.last_step = self.rows[-1]["step"]
        self.starts = [start for start in self.starts if start["step"] < self.last_step]
        self.costs = self._costs(warn)

    def _costs(self, warn) -> dict:
        def column(name):
            return [(row["step"], row[name]) for row in self.rows if is_number(row.get(name))]

        costs = {"steps": [(self.last_step, self.last_step)]}
        costs |= {"seconds": column("train_seconds"), "flops": column("train_flops")}
        if not costs["seconds"] and (batch := self.global_batch_size()):
            # Older logs do not have these columns. The seconds then follow from the images per second of each interval.
            seconds = flops = before = 0.0
            processes = batch / (self.options.get("train_batch_size", batch) * self.accumulation())
            for row in self.rows:
                if is_number(speed := row.get("images_per_second")) and speed > 0:
                    interval = (row["step"] - before) * batch / speed
                    seconds, before = seconds + interval, row["step"]
                    costs["seconds"].append((row["step"], seconds))
                    if is_number(tflops := row.get("tflops_per_device")):
                        flops += 1e12 * tflops * processes * interval
                        costs["flops"].append((row["step"], flops))
            if costs["seconds"]:
                warn(
                    f"{self.folder}: its metrics lack train_seconds; training time and FLOPs follow from images_per_second"
                )
        for name in ("seconds", "flops"):
            if not costs[name]:
                warn(f"{self.folder}: its metrics lack the {COSTS[name]}, which the report therefore omits")
        return {
            name: tuple(np.array([(0, 0), *points], float).T) if points else None for name, points in costs.items()
        }

    def accumulation(self) -> int:
        return self.options.get("gradient_accumulation_steps", 1)

    def global_batch_size(self) -> int | None:
        """Training examples per optimizer step, or None if they were not logged."""
        if self.starts and is_number(self.starts[-1].get("global_batch_size")):
            return self.starts[-1]["global_batch_size"]
        seen = [
            row["samples_seen"] / row["step"]
            for row in self.rows
            if row["step"] and is_number(row.get("samples_seen"))
        ]
        return round(max(seen) * self.options.get("policy_epochs", 1)) if seen else None

    def cost(self, name: str, steps) -> np.ndarray:
        """Cumulative cost at `steps`, interpolated linearly between logged steps and extrapolated beyond the last."""
        at, values = self.costs[name]
        steps = np.asarray(steps, float)
        slope = (values[-1] - values[-2]) / (at[-1] - at[-2]) if at[-1] > at[-2] else 0.0
        return np.interp(steps, at, values) + slope * np.maximum(0, steps - at[-1])

    def is_affected_by(self, name: str) -> bool:
        """Whether an option, or another fact that `method` returns, has an effect in this run."""
        options = options_of(VRPOConfig)
        if name not in options:
            return True
        values = {each.name: self.options.get(each.name, each.default) for each in options.values()}
        config: Any = SimpleNamespace(**values)  # not a VRPOConfig, which would refuse options of other versions
        return has_effect(config, options[name])

    def scalars(self) -> list[str]:
        """The names of the logged numbers, in the order of the log."""
        return list(dict.fromkeys(k for row in self.rows for k, v in row.items() if k != "step" and is_number(v)))

    def evaluate(self, key: str, warn: Callable[[str], None]):
        """Sets `steps` and `values`, arrays `[E]`: the steps at which `key` is finite, and its values."""
        if broken := [row["step"] for row in self.rows if key in row and not is_number(row[key])]:
            warn(
                f"{self.folder}: {key} is not a finite number at step {', '.join(map(str, broken[:5]))}, which is skipped"
            )
        found = [(row["step"], row[key]) for row in self.rows if is_number(row.get(key))]
        self.steps, self.values = np.array(found, float).T

    def model_facts(self) -> dict:
        """Parameters, precision and hardware, if they were recorded."""
        facts = {
            name: self.starts[-1].get(name) if self.starts else None for name in ("parameters", "projector_parameters")
        }
        facts["precision"] = " / ".join(dict.fromkeys(str(start.get("mixed_precision")) for start in self.starts))
        many = ((start.get("num_processes", 1), start.get("hardware", "?")) for start in self.starts)
        facts["hardware"] = " / ".join(dict.fromkeys(f"{n} x {name}" if n > 1 else str(name) for n, name in many))
        return facts


def choose_metric(runs: list[Run], metric: str) -> str:
    """Finds the column for `metric`: the one of that name, or the first whose last part begins with it or that contains it.

    A column that all runs have is preferred.

    Raises:
        InputError: if a run does not have it; the message lists the columns.
    """
    if not metric.strip():
        raise InputError("metric", "`metric` is empty; give the name of a column, such as fd")
    known = [run.scalars() for run in runs]
    every = list(dict.fromkeys(key for keys in known for key in keys))
    matches = [key for key in every if key == metric]
    matches = matches or [key for key in every if key.split("/")[-1].startswith(metric)]
    matches = matches or [key for key in every if metric in key]
    if not matches:
        why = ""
        if metric == "fd":  # the default
            why = ", which were trained without --fd_encoder; give `metric` loss_fm or another column"
        raise InputError("metric", f"`metric` {metric} is not in these runs{why}; they have {', '.join(every)}")
    for key in matches:
        if all(key in keys for keys in known):
            return key
    run = next(run for run, keys in zip(runs, known) if matches[0] not in keys)
    raise InputError(
        "metric",
        f"`metric` {metric}: {run.folder} has no {matches[0]}, which other runs have; remove that run, or give one of "
        f"{', '.join(key for key in every if all(key in keys for keys in known))}",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Arms


def method(run: Run) -> dict[str, str]:
    """The options of training and evaluation as text, including the global batch size."""

    def text(value) -> str:
        return "+".join(map(text, value)) if isinstance(value, list) else printable(value)

    # A switch that is off counts like a switch that an older version did not have. Names that are not options are not
    # shown: somebody may have written a token into the file.
    known = options_of(VRPOConfig)
    chosen = {name: value for name, value in run.options.items() if name in known and value is not False}
    options = {name: text(value) for name, value in chosen.items() if name not in HOUSEKEEPING}
    batch = run.global_batch_size()
    return options | ({"global batch size": str(batch)} if batch else {})


def differences(methods: list[dict[str, str]]) -> list[str]:
    """The options that differ within `methods`, `objective` first."""
    names = sorted({name for each in methods for name in each}, key=lambda name: (name != "objective", name))
    return [name for name in names if len({each.get(name) for each in methods}) > 1]


def derive_arms(runs: list[Run]) -> dict[str, list[Run]]:
    """Groups runs by `method`, and names each group by options that differ, such as `repa` or `repa alignment_coeff=0.5`."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(method(run).items())), []).append(run)
    methods = [dict(key) for key in groups]
    telling: list[str] = []

    def told(names) -> int:
        return len({tuple(each.get(name) for name in names) for each in methods})

    for name in differences(methods):
        if told([*telling, name]) > told(telling):
            telling.append(name)

    def label(each: dict, shorten) -> str:
        def part(name: str) -> str:
            value = shorten(each.get(name, "unset"))
            return value if name in ("objective", "preset") else f"{name}={value}"

        enough = [k for k in range(1, len(telling) + 1) if sum(same(each, other, k) for other in methods) == 1]
        return " ".join(map(part, telling[: min(enough, default=0)])) or each.get("objective", "run")

    def same(one: dict, other: dict, k: int) -> bool:
        return all(one.get(name) == other.get(name) for name in telling[:k])

    # Shorten names such as facebook/dinov2-base to their last part if the arms stay distinct.
    labels = [label(each, lambda value: re.sub(r"[^+]*/(?=.)", "", value)) for each in methods]
    if len(set(labels)) < len(labels):
        labels = [label(each, str) for each in methods]
    return dict(zip(labels, groups.values()))


def group_runs(folders: list[str], arms: list[str], warn: Callable[[str], None]) -> dict[str, list[Run]]:
    """Returns the named arms, then the arms derived from the options of the other runs.

    Args:
        folders: folders of runs to group by their options.
        arms: named groups of runs, each as `NAME=DIR,DIR,...`.

    Raises:
        InputError: if a folder is given twice, names clash, or no run is given.
    """
    named: dict[str, list[str]] = {}
    for text in arms:
        name, _, listed = text.partition("=")
        named_folders = [folder for folder in listed.split(",") if folder]
        if not name or not named_folders:
            raise InputError("arms", f"`arms` {text} must be NAME=DIR or NAME=DIR,DIR,...")
        if name in named:
            raise InputError("arms", f"`arms` names {name} twice; give all its folders at once, separated by commas")
        named[name] = named_folders
    given = [*(folder for listed in named.values() for folder in listed), *folders]
    if not given:
        raise InputError("arms", "no run is given; give the folders of one or more runs, or `arms` NAME=DIR,DIR")
    places = [Path(folder).resolve() for folder in given]
    for folder, place in zip(given, places):
        if places.count(place) > 1:
            raise InputError(None, f"{folder} is given twice; give each run once")
    groups = {name: [Run(folder, warn) for folder in listed] for name, listed in named.items()}
    derived = derive_arms([Run(folder, warn) for folder in folders]) if folders else {}
    if clash := set(groups) & set(derived):
        raise InputError("arms", f"`arms` {clash.pop()} is also the name of other runs; choose another name")
    return groups | derived


def check_comparable(arms: dict[str, list[Run]], warn: Callable[[str], None]):
    """Warns about differences that make a comparison unfair."""
    runs = [run for group in arms.values() for run in group]
    methods = [method(run) for run in runs]
    # Options of the evaluation that JUDGED_ON does not list have this prefix.
    for name in (n for n in differences(methods) if n in JUDGED_ON.split() or n.startswith("validation_")):
        values = list(dict.fromkeys(each.get(name, "not set") for each in methods))
        warn(
            f"the runs differ in {name} ({', '.join(values)}), on which the metric depends, so it may not be comparable"
        )
    for name, group in arms.items():
        if within := differences([method(run) for run in group]):
            warn(f"runs of arm {name} differ in more than the seed ({', '.join(within)}) and are averaged anyway")
        seeds = [run.seed for run in group]
        if len(set(seeds)) < len(seeds):
            warn(f"arm {name} has the same seed more than once, so its spread is not one over seeds")
    if len(arms) > 1 and (few := [f"{name}: {len(group)}" for name, group in arms.items() if len(group) < 3]):
        warn(f"there are fewer than three seeds ({'; '.join(few)}), so a spread is unknown or a rough guess")
    hardware = {run.model_facts()["hardware"] for run in runs} - {""}
    if len(hardware) > 1:
        warn(
            f"the runs were trained on different hardware ({'; '.join(sorted(hardware))}), so their times do not compare"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def spread(values) -> float | None:
    """Standard deviation over seeds, with the divisor n - 1; None for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def mean_curve(group: list[Run], costs: list[str]) -> dict:
    """Mean and standard deviation over the runs, and their mean costs, at the steps that all runs have evaluated."""
    shared = sorted(set.intersection(*(set(run.steps) for run in group)))
    values = np.array([[run.values[np.searchsorted(run.steps, step)] for step in shared] for run in group])
    curve = {"steps": [int(step) for step in shared], "mean": values.mean(0).tolist(), "std": None}
    if len(group) > 1:
        curve["std"] = values.std(0, ddof=1).tolist()
    for name in costs:
        curve[name] = np.mean([run.cost(name, shared) for run in group], 0).tolist()
    return curve | {"steps": [int(step) for step in shared]}  # integers, even if `costs` has made them floats


def first_crossing(steps, values, target: float, higher_is_better: bool) -> tuple[float, bool, bool] | None:
    """Finds where a curve first reaches `target`, interpolating linearly between evaluations.

    Returns:
        the step; whether that is the first evaluation, so that the true crossing is at or before it; and whether a later
        evaluation is worse than `target` again. None if the curve never reaches it.
    """
    sign = 1.0 if higher_is_better else -1.0
    ahead = sign * (np.asarray(values, float) - target)
    good = ahead >= 0
    if not good.any():
        return None
    k = int(good.argmax())
    worse_again = bool((~good[k:]).any())
    if k == 0:
        return float(steps[0]), True, worse_again
    share = ahead[k - 1] / (ahead[k - 1] - ahead[k])
    return float(steps[k - 1] + share * (steps[k] - steps[k - 1])), False, worse_again


def describe_arm(name: str, group: list[Run], costs: list[str], higher_is_better: bool, warn) -> dict:
    """Computes the numbers of one arm that do not depend on other arms."""
    curve = mean_curve(group, costs)
    if curve["steps"]:
        last = curve["steps"][-1]
        values = [float(run.values[np.searchsorted(run.steps, last)]) for run in group]
        best = int(np.argmax(curve["mean"]) if higher_is_better else np.argmin(curve["mean"]))
        best = {"value": curve["mean"][best], "step": curve["steps"][best]}
        if any(run.steps[-1] > last for run in group):
            warn(
                f"runs of arm {name} were evaluated at different steps; its mean ends at step {last}, the last that all have"
            )
    else:
        last, best, values = None, None, [float(run.values[-1]) for run in group]
        warn(f"runs of arm {name} share no evaluated step; each is drawn alone, and their last values are averaged")
    final = {"step": last, "mean": float(np.mean(values)), "std": spread(values), "values": values}
    for cost in costs:
        spent = [float(run.cost(cost, run.steps[-1] if last is None else last)) for run in group]
        final[cost] = {"mean": float(np.mean(spent)), "std": spread(spent)}
    facts = [run.model_facts() for run in group]
    return {
        "name": name,
        "n": len(group),
        "seeds": [run.seed for run in group],
        "curve": curve,
        "final": final,
        "best": best,
        **{key: sorted({fact[key] for fact in facts} - {None, ""}) for key in facts[0]},
        "runs": [
            {"folder": str(run.folder), "seed": run.seed, "values": run.values.tolist()}
            | {cost: run.cost(cost, run.steps).tolist() for cost in costs}
            | {"steps": [int(step) for step in run.steps]}
            for run in group
        ],
    }


def difference(arm: dict, base: dict) -> dict | None:
    """The difference to the baseline's mean at the last common step, as a value and in pooled standard deviations.

    None if the arms share no step; `pooled_std` and `in_std` are None if neither arm has several seeds.
    """
    shared = sorted(set(arm["curve"]["steps"]) & set(base["curve"]["steps"]))
    if not shared:
        return None
    places = [each["curve"]["steps"].index(shared[-1]) for each in (arm, base)]
    a, b = (each["curve"]["mean"][place] for each, place in zip((arm, base), places))
    freedom = arm["n"] + base["n"] - 2
    pooled = None
    if freedom:
        squares = [(e["n"] - 1) * e["curve"]["std"][p] ** 2 for e, p in zip((arm, base), places) if e["n"] > 1]
        pooled = math.sqrt(sum(squares) / freedom)
    return {"step": shared[-1], "value": a - b, "pooled_std": pooled, "in_std": (a - b) / pooled if pooled else None}


def speed_ups(
    arms: dict[str, list[Run]],
    described: dict[str, dict],
    baseline: str | None,
    target: float | None,
    costs: list[str],
    higher_is_better: bool,
) -> dict | None:
    """Computes the cost of each arm until it first reaches `target`, by default the baseline's last mean.

    Costs are also given as shares of a reference: the cost of the baseline's whole run or, for a given target, its cost
    until its own mean first reaches it. `share` is the mean over seeds if all of them reach the target;
    `share_of_mean_curve` is the share of the mean curve. `factor_first_to_first` is the cost until the baseline's mean
    first reaches the target, divided by that of this arm's mean. The baseline is also in the list, as a control.
    """
    if baseline is None and target is None:
        return None
    base = described.get(baseline)
    given, reference, own = target is not None, None, None

    def mean_cost(name: str, cost: str, step: float) -> float:
        return float(np.mean([run.cost(cost, step) for run in arms[name]]))

    if base:
        target = base["final"]["mean"] if target is None else target
        own = first_crossing(base["curve"]["steps"], base["curve"]["mean"], target, higher_is_better)
        if not given:
            reference = {cost: base["final"][cost]["mean"] for cost in costs}
        elif own:
            reference = {cost: mean_cost(baseline, cost, own[0]) for cost in costs}
        if reference and not all(reference.values()):
            reference = None  # an evaluation before training costs nothing, so shares are undefined
    result = {"target": target, "baseline": baseline, "given": given, "reference": reference, "arms": []}
    for name, group in arms.items():
        curve = described[name]["curve"]
        seeds = [first_crossing(run.steps, run.values, target, higher_is_better) for run in group]
        mean = first_crossing(curve["steps"], curve["mean"], target, higher_is_better)
        found = [crossing for crossing in (*seeds, mean) if crossing]
        record = {"arm": name, "n": len(group), "reached": sum(crossing is not None for crossing in seeds)}
        record["at_first_evaluation"] = any(crossing[1] for crossing in found)
        record["worse_again"] = any(crossing[2] for crossing in found)
        for cost in costs:
            spent = [float(run.cost(cost, c[0])) if c else None for run, c in zip(group, seeds)]
            of_mean = mean_cost(name, cost, mean[0]) if mean else None
            of_all = reference[cost] if reference else None
            shares = [each / of_all for each in spent if each is not None and of_all]
            whole = len(shares) == len(group)
            record[cost] = {
                "seeds": spent,
                "mean_curve": of_mean,
                "share": float(np.mean(shares)) if whole else None,
                "share_std": spread(shares) if whole else None,
                "share_of_mean_curve": of_mean / of_all if mean and of_all else None,
                "factor_first_to_first": mean_cost(baseline, cost, own[0]) / of_mean if own and of_mean else None,
            }
        result["arms"].append(record)
    return result


def compare(
    arms: dict[str, list[Run]],
    metric: str,
    higher_is_better: bool,
    baseline: str | None,
    target: float | None,
    warn: Callable[[str], None],
) -> dict:
    """Computes all numbers of the report, as JSON types: of each arm, against the baseline, and the options that differ."""
    runs = [run for group in arms.values() for run in group]
    for run in runs:
        run.evaluate(metric, warn)
    check_comparable(arms, warn)
    costs = [name for name in COSTS if all(run.costs[name] is not None for run in runs)]
    described = {name: describe_arm(name, group, costs, higher_is_better, warn) for name, group in arms.items()}
    ends = {name: arm["final"]["step"] for name, arm in described.items()}
    if len(set(ends.values())) > 1:
        warn(f"the arms end at different steps ({', '.join(f'{name} {step}' for name, step in ends.items())})")
    for name, arm in described.items():
        arm["difference"] = difference(arm, described[baseline]) if baseline not in (None, name) else None
    speed_up = speed_ups(arms, described, baseline, target, costs, higher_is_better)
    if speed_up and baseline and not speed_up["given"]:
        share = next(each for each in speed_up["arms"] if each["arm"] == baseline)["steps"]["share_of_mean_curve"]
        if share is not None and share < 0.999:
            warn(
                f"{baseline} itself first reaches its last value after {100 * share:.0f} % of its steps, so shares of its whole "
                "run favour the other arms; the columns 'first to first' do not"
            )
    firsts = [group[0] for group in arms.values()]
    methods = [method(run) for run in firsts]
    telling = [name for name in differences(methods) if any(run.is_affected_by(name) for run in firsts)]
    return {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "baseline": baseline,
        "costs": costs,
        "arms": list(described.values()),
        "speed_up": speed_up,
        "options": {name: [each.get(name) for each in methods] for name in telling},
    }
