# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Command lines: errors of one line, help with defaults, options from YAML files."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import yaml


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return action.type.__name__.upper() if action.type else "TEXT"


def with_flags(error: BaseException | str, names: Iterable[str]) -> str:
    """A message of the library for the command line: each field in backticks becomes the flag of the same name.

    Args:
        names: the fields that have a flag, such as `vars(args)`.
    """
    known = set(names)
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1]}" if match[1] in known else match[0], str(error))


class OneLineErrorParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


# Of each of these one can be given: on the command line it takes the place of another one in a file.
ALTERNATIVES = (("dataset_name", "train_data_dir", "latents_dir"), ("max_train_steps", "num_train_epochs"))


def config_to_argv(parser: argparse.ArgumentParser, file: str, given: list[str]) -> list[str]:
    """The command line that a YAML file of options stands for, without those that the command line gives itself."""
    try:
        options = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {file} cannot be read: {str(error).splitlines()[0]}")
    if not isinstance(options, dict):
        parser.error(f"--config {file} must map option names to values, such as `seed: 0`")
    known = parser._option_string_actions
    argv, given = [], {part.split("=")[0] for part in given}
    for name, value in options.items():
        action = known.get(f"--{name}")
        if action is None or name in ("config", "help"):
            near = difflib.get_close_matches(f"--{name}", known, n=1)
            parser.error(
                f"--config {file}: unknown option {name!r}" + (f"; did you mean {near[0][2:]}?" if near else "")
            )
        same = next((names for names in ALTERNATIVES if name in names), (name, f"no-{name}"))
        if given & {f"--{each}" for each in same}:
            continue
        if value is False and action.choices and "no" in action.choices:
            value = "no"  # which YAML reads as false
        if isinstance(value, bool):
            if action.nargs != 0:
                parser.error(f"--config {file}: {name} takes a value, not {str(value).lower()}")
            argv += [f"--{name}"] if value else [f"--no-{name}"] if f"--no-{name}" in known else []
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv += [f"--{name}={value}"]
    return argv


def check_ranges(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    at_least_one: str,
    at_least_zero: str,
    positive: str,
    shares: str,
):
    """Ends with a sentence about the first number out of its range; each argument names options, with spaces between.

    Args:
        shares: those that lie in [0, 1).
    """
    for names, fits, wanted in (
        (at_least_one, lambda x: x >= 1, "must be at least 1"),
        (at_least_zero, lambda x: 0 <= x < math.inf, "must be at least 0"),
        (positive, lambda x: 0 < x < math.inf, "must be above 0"),
        (shares, lambda x: 0 <= x < 1, "must lie in [0, 1)"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name} {value} {wanted}")


def check_data(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends with a sentence where not exactly one data set is named, or `--streaming` does not go with it."""
    if [args.dataset_name, args.train_data_dir, args.latents_dir].count(None) != 2:
        parser.error(
            "give either --dataset_name or --train_data_dir or --latents_dir (or, for a first run, --config "
            "configs/digits.yaml)"
        )
    if not args.streaming:
        return
    for name, why in (
        ("latents_dir", "a latent cache is read from the disk as it is"),
        ("train_data_dir", "it reads parquet files; name a data set that has them with --dataset_name"),
        (
            "max_train_samples",
            "a subset would be spread over all row groups; take a --dataset_split such as validation",
        ),
    ):
        if getattr(args, name) is not None:
            parser.error(f"--streaming does not go with --{name} {getattr(args, name)}: {why}")
    if args.dataset_name == "digits" and not os.path.isdir("digits"):
        parser.error("--streaming does not go with --dataset_name digits, which is embedded; leave it out")


def add_policy_options(parser: argparse.ArgumentParser):
    """The options of `--objective vrpo`, of the training script."""
    g = parser.add_argument_group("policy (vrpo)")
    g.add_argument(
        "--reward_weighting",
        default="inverse_variance",
        help="inverse_variance, inverse_std, equal, or fixed shares of fidelity, semantic, structural such as 0.2,0.5,0.3",
    )
    g.add_argument(
        "--estimator",
        choices=["expected", "sampled"],
        default="expected",
        help="the update in closed form for small noise, or from drawn actions",
    )
    g.add_argument("--policy_noise", type=float, default=0.1, help="sigma of the policy")
    g.add_argument("--group_size", type=int, default=8, help="sampled: actions per token")
    g.add_argument("--policy_epochs", type=int, default=1, help="sampled: optimizer steps per draw")
    g.add_argument("--clip_range", type=float, default=0.2, help="sampled: of the ratio, when policy_epochs > 1")
    g.add_argument(
        "--kl_coeff", type=float, default=0.0, help="pull towards the starting weights; costs a forward pass"
    )


def check_policy(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends with a sentence about alignment options that do not go together and would be ignored."""
    sampled = ["group_size", "policy_epochs", "clip_range"]
    for needs, names in (
        (
            ("objective", None),
            ["timestep_weighting", "conflict", "spatial_norm", "projector", "alignment_stop_step", "layer_scope"],
        ),
        (("objective", "vrpo"), ["reward_weighting", "estimator", "policy_noise", "kl_coeff", *sampled]),
        (("estimator", "sampled"), sampled),
    ):
        option, wanted = needs
        fits = getattr(args, option) != "none" if wanted is None else getattr(args, option) == wanted
        for name in names:
            if not fits and getattr(args, name) != parser.get_default(name):
                wanted = wanted or "repa or vrpo"
                parser.error(f"--{name} {getattr(args, name)} goes with --{option} {wanted} only; leave it out")
    if args.clip_range != parser.get_default("clip_range") and args.policy_epochs == 1:
        parser.error(f"--clip_range {args.clip_range} acts with --policy_epochs above 1 only; leave it out")
    if args.policy_noise != parser.get_default("policy_noise") and args.estimator == "expected" and not args.kl_coeff:
        parser.error(
            f"--policy_noise {args.policy_noise} goes with --estimator sampled or --kl_coeff: the expected update is its "
            "limit for small noise"
        )
    if args.group_size < 2:
        parser.error(f"--group_size {args.group_size} must be at least 2: advantages are relative to the group")
    for name in ("checkpointing_steps", "max_train_steps"):
        value = getattr(args, name)
        if name == "max_train_steps" and value is None and args.num_train_epochs is None:
            value = 400_000  # what the script takes then
        if (value or 0) % args.policy_epochs:
            parser.error(
                f"--{name} {value} must be a multiple of --policy_epochs {args.policy_epochs}, whose steps "
                "share one draw"
            )
    encoders, layers = args.encoder or [], args.encoder_layer or []
    if len(layers) > 1 and len(layers) != len(encoders):
        parser.error(
            f"--encoder_layer has {len(layers)} numbers for {len(encoders)} encoders; give one, or one for each"
        )


def as_id(label: int | str) -> int | str:
    """A class id from the command line as a number; anything else as it is."""
    return int(label) if str(label).lstrip("-").isdigit() else label
