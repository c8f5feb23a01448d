# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Command lines: errors of one line, help with defaults, options from YAML files."""

import argparse
import difflib
from pathlib import Path

import yaml


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return action.type.__name__.upper() if action.type else "TEXT"


class OneLineErrorParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def config_to_argv(parser: argparse.ArgumentParser, file: str) -> list[str]:
    """The command line that a YAML file of options stands for."""
    try:
        options = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {file} cannot be read: {str(error).splitlines()[0]}")
    if not isinstance(options, dict):
        parser.error(f"--config {file} must map option names to values, such as `seed: 0`")
    known = parser._option_string_actions
    argv = []
    for name, value in options.items():
        action = known.get(f"--{name}")
        if action is None or name in ("config", "help"):
            near = difflib.get_close_matches(f"--{name}", known, n=1)
            parser.error(
                f"--config {file}: unknown option {name!r}" + (f"; did you mean {near[0][2:]}?" if near else "")
            )
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


def as_id(label: int | str) -> int | str:
    """A class id from the command line as a number; anything else as it is."""
    return int(label) if str(label).lstrip("-").isdigit() else label
