# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Reads the size of a yardstick from a YAML file, and its arms, and plans the steps of each arm for the same wall time."""

import dataclasses
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffusers_vrpo.errors import InputError, first_line


HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """One size of the yardstick, as read from its YAML file.

    Attributes:
        dataset, encoder, judge: folders inside the shared folder, or `digits`; the judge is an encoder that no reward and no
            target uses.
        judge_pixels: side of the images that the judge sees; null is the judge's own size. A packed judge keeps its value,
            so a change needs a new folder.
        classes: number of classes, spread evenly over those of the data set.
        train: options of `train_vrpo.py` that all arms share.
        reference: the arm whose training sets the budget.
        reference_steps: steps of the reference. The budget is the time that they take, plus that of the encoder's features
            if `charge_features`.
        charge_features: whether each aligned arm pays for computing the features in one pass over the data.
        evaluations: number of points of the curve, the last one at the end; each is measured on `curve_samples` samples.
        final_samples: number of samples for the last judgement, which also measures recall, coverage and sliced Wasserstein.
        reference_images: number of training images for recall, coverage, sliced Wasserstein and the probe.
        probe_timestep: t of the linear probe; 1 is noise.
        base: `steps` and `seed` of one unaligned training run from which all arms continue, if they do; its time is charged
            to all of them.
    """

    name: str
    dataset: str
    classes: int
    encoder: str
    judge: str
    judge_pixels: int | None
    train: dict
    reference: str
    reference_steps: int
    charge_features: bool
    evaluations: int
    curve_samples: int
    final_samples: int
    reference_images: int
    probe_timestep: float
    base: dict | None = None


def read_yaml(path: Path) -> dict:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(None, f"{path} cannot be read ({first_line(error)}); give a file such as cpu.yaml") from error
    if not isinstance(found, dict):
        raise InputError(None, f"{path} must map names to values")
    return found


def load_recipe(name: str) -> Recipe:
    """Reads a size by its name (`cpu`, `gpu`) or its file.

    Raises:
        InputError: if the file is not a recipe.
    """
    path = Path(name) if name.endswith(".yaml") else HERE / f"{name}.yaml"
    values = {"name": path.stem} | read_yaml(path)
    known = {field.name for field in dataclasses.fields(Recipe)}
    if wrong := sorted((known - {"base"}) ^ (set(values) - {"base"})):
        raise InputError(None, f"{path}: {wrong[0]} is {'missing' if wrong[0] in known else 'unknown'}")
    if values.get("base") is not None and set(values["base"]) != {"steps", "seed"}:
        raise InputError(None, f"{path}: base must have steps and seed, and nothing else")
    return Recipe(**values)


def load_arms(path: Path = HERE / "arms.yaml") -> dict[str, dict]:
    """Reads the options of each arm by its name.

    They are options of `train_vrpo.py`, `stop` (the share of the budget after which alignment stops), and `from_base`, with
    which false trains the arm from scratch, for the time of the recipe's base and the arm together.
    """
    return read_yaml(path)


def choose_arms(wanted: list[str] | None, recipe: Recipe) -> dict[str, dict]:
    """The arms with the names in `wanted`, or all arms if it is None.

    Raises:
        InputError: if there is no arm of a name.
    """
    arms = load_arms()
    if unknown := [name for name in wanted or [] if name not in arms]:
        raise InputError(None, f"--arms {unknown[0]} is not one of {', '.join(arms)}")
    if recipe.reference not in arms:
        raise InputError(None, f"{recipe.name}: reference {recipe.reference} is not one of {', '.join(arms)}")
    return {name: arms[name] for name in wanted or arms}


# The options that an arm with `objective: vrpo` has unless it names others; they are the defaults of version 0.1.
VRPO_ARM = {"alignment_coeff": 0.5, "reward_weighting": "inverse_variance"}


def in_full(arm: dict) -> dict:
    """The options of an arm, including those that all VRPO arms have unless they name others."""
    if arm["objective"] != "vrpo":
        return arm
    gate = {} if {"release", "conflict"} & set(arm) else {"conflict": "gate"}
    return VRPO_ARM | gate | arm


def aligned_flags(arm: dict) -> dict:
    """The options of an arm while it aligns."""
    return {name: value for name, value in arm.items() if name != "stop"}


def starts_from_base(recipe: Recipe, arm: dict) -> bool:
    """Whether an arm continues the recipe's base."""
    return recipe.base is not None and arm.get("from_base", True)


# Options whose values do not change the time of a step.
FREE = ("alignment_coeff", "reward_weighting", "timestep_weighting", "gradient_scale", "from_base")


def cost_flags(arm: dict) -> dict:
    """The options on which the time of a step depends while the arm aligns."""
    return {name: value for name, value in aligned_flags(arm).items() if name not in FREE}


def step_ratio(arm: dict, timing: dict) -> float | None:
    """The time of a step of an arm, in steps of the reference; None if it was not measured."""
    return next((timed["ratio"] for timed in timing["arms"] if timed["flags"] == cost_flags(arm)), None)


def equal_compute(recipe: Recipe, arm: dict, name: str, timing: dict) -> dict:
    """Plans the steps of an arm that take as long as the reference's, and the step at which it stops aligning.

    With r the time of a step and F that of the features, both in steps of the reference, and the budget B = N (+ F):
    N_arm = (B - F [if aligned]) / r_arm. With a stop after the share f of that time, it is
    f (B - F) / r_arm + (1 - f) (B - F) / r_none.

    The time of a base is the same for all arms and comes before that. An arm that does not start from the base has as much
    time for steps of its own.

    Args:
        timing: the times of the size, as `timing.py` writes them.

    Returns:
        `steps`, `alignment_stop_step` (or None), and `nominal_seconds`, the `(step, seconds)` points of a piecewise linear
        cost.

    Raises:
        InputError: if the arm was not timed.
    """
    ratio, plain = step_ratio(arm, timing), step_ratio({"objective": "none"}, timing)
    for each, found in ((name, ratio), ("none", plain if "stop" in arm or recipe.base else 1.0)):
        if found is None:
            raise InputError(
                None, f"arm {each} has no time in {timing['file']}; run `timing.py {recipe.name} --arms {each}`"
            )
    second = timing["reference_seconds"]
    features = timing["features_seconds"] / second if recipe.charge_features else 0.0
    spent = features if arm["objective"] != "none" else 0.0
    budget = recipe.reference_steps + features - spent
    base = recipe.base["steps"] * plain if recipe.base is not None else 0.0
    if starts_from_base(recipe, arm):
        spent += base
    else:
        budget += base
    share = arm.get("stop", 1.0)
    aligned = round(share * budget / ratio)
    after = round((1 - share) * budget / plain) if "stop" in arm else 0
    points = [(0, spent * second), (aligned, (spent + aligned * ratio) * second)]
    if after:
        points.append((aligned + after, points[-1][1] + after * plain * second))
    return {
        "steps": aligned + after,
        "alignment_stop_step": aligned if "stop" in arm else None,
        "nominal_seconds": points,
    }


def recorded_options(recipe: Recipe) -> dict:
    """The options `train` as results and times record them; records from before the EMA warm-up existed do not name it."""
    return {name: value for name, value in recipe.train.items() if (name, value) != ("ema_warmup", False)}


def recipe_hash(recipe: Recipe, arm: dict, plan: dict) -> str:
    """A hash of everything but the seed on which a result depends; only equal recipes have equal hashes."""
    values = dataclasses.asdict(recipe)
    for name in ("reference", "reference_steps", "charge_features"):  # the plan has the values that follow from these
        del values[name]
    if recipe.base is None:
        del values["base"]
    values["train"] = recorded_options(recipe)
    parts = [values, aligned_flags(arm), plan["steps"], plan["alignment_stop_step"]]
    return f"{zlib.crc32(json.dumps(parts, sort_keys=True).encode()):08x}"
