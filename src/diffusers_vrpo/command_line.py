# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Command lines: parsers with one-line errors, flags from the fields of `config.py`, and options from YAML files.

transformers' `HfArgumentParser` is not used: it spells the negation of a switch `--no_x` instead of `--no-x`, takes the
word after a switch as its value, replaces a list if a flag is given twice, and takes eight seconds to import.
"""

import argparse
import contextlib
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml
from huggingface_hub.constants import HF_HOME

from .config import (
    In,
    Option,
    Repeated,
    Switch,
    VRPOConfig,
    alternatives,
    check_complete,
    expanded,
    names_code,
    options_of,
)
from .errors import InputError, TrainingStopped
from .files import packaged


# The options of training that `--help` shows. `--help-all` shows the others, too.
COMMON = (
    "config",
    "output_dir",
    "seed",
    "mixed_precision",
    "dataset_name",
    "train_data_dir",
    "latents_dir",
    "resolution",
    "preset",
    "pretrained_model_name_or_path",
    "vae",
    "objective",
    "encoder",
    "train_batch_size",
    "max_train_steps",
    "num_train_epochs",
    "learning_rate",
    "validation_steps",
    "checkpointing_steps",
    "push_to_hub",
)

# Warnings of other libraries that users can or need do nothing about: diffusers passes that argument with every file that
# it downloads, and a few more workers than processors do no harm.
HARMLESS_WARNINGS = (
    "The `local_dir_use_symlinks` argument is deprecated",
    "This DataLoader will create .* worker processes in total",
)

# Options whose values may name code to run, and functions that tell whether a value does.
CODE_OPTIONS: dict[str, Callable[[str], bool]] = {
    "encoder": names_code,
    "image_rewards": lambda value: ":" in value,
    "reward_function": lambda value: ":" in value,
}

# ----------------------------------------------------------------------------------------------------------------------
# Parsers


def sentence(text: str) -> str:
    """A help text with a capital letter at the beginning and a full stop at the end, before any `(default: ...)`."""
    body, mark, default = text.partition(" (default: ")
    body = body[:1].upper() + body[1:]
    return body + ("" if body.endswith(".") else ".") + mark + default


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help in sentences, with default values except None and False."""

    def __init__(self, prog: str, max_help_position: int = 36, width: int = 118):
        super().__init__(prog, max_help_position=max_help_position, width=width)

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return sentence(action.help)
        text = sentence(super()._get_help_string(action))
        if isinstance(action.default, list):
            text = text.replace("%(default)s", " ".join(map(str, action.default)))
        return text

    def _get_default_metavar_for_optional(self, action):
        return action.type.__name__.upper() if action.type else "TEXT"


def in_usage(action: argparse.Action) -> str:
    """A positional argument or a required option in the form that the usage shows."""
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.nargs in ("*", "+"):
        name += " ..."
    if action.option_strings:
        return f"{action.option_strings[0]} {name}"
    return f"[{name}]" if action.nargs in ("?", "*") else name


class WholeHelp(argparse._HelpAction):
    """`--help-all`: prints all options and ends the process."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(whole=True), end="")
        parser.exit()


class OneLineErrorParser(argparse.ArgumentParser):
    """A parser without abbreviated flags, whose errors are one line that names the flag.

    Args:
        common (`Sequence[str]`): names of the options that `--help` shows in addition to the required ones; a further flag,
            `--help-all`, then shows all options. If empty, `--help` shows all.
    """

    def __init__(
        self,
        *args,
        formatter_class=HelpFormatter,
        allow_abbrev: bool = False,
        common: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(*args, formatter_class=formatter_class, allow_abbrev=allow_abbrev, **kwargs)
        self.common = tuple(common)
        if self.common:
            self.add_argument("--help-all", action=WholeHelp, help="show all options and exit")

    def format_help(self, whole: bool = False) -> str:
        """Formats the help as argparse does, but only with the common options.

        Args:
            whole: whether to show all options, of each group the common ones first.
        """
        whole = whole or not self.common

        def is_common(action) -> bool:
            needed = action.required or not action.option_strings
            return needed or action.dest in self.common or isinstance(action, argparse._HelpAction)

        formatter = self._get_formatter()
        needed = [action for action in self._actions if action.required or not action.option_strings]
        needed.sort(key=lambda action: bool(action.option_strings))
        usage = " ".join([self.prog, *map(in_usage, needed), "[options]"])
        formatter.add_usage(self.usage or usage.replace("%", "%%"), [], [])
        formatter.add_text(self.description)
        positionals, helps, *groups = self._action_groups
        for group in (positionals, *groups, helps):
            actions = sorted(group._group_actions, key=lambda action: not is_common(action))
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments([action for action in actions if whole or is_common(action)])
            formatter.end_section()
        if not whole:
            number = sum(bool(action.option_strings) for action in self._actions) - 2  # without --help and --help-all
            formatter.add_text(
                f"These are the options that most calls need; `{self.prog} --help-all` shows all {number}."
            )
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_known_args(self, args=None, namespace=None):
        """Parses as argparse does, and replaces each `~` that the shell has left, as in `--output_dir=~/x`."""
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            if isinstance(value, (str, Path, list)):
                setattr(namespace, name, expanded(value))
        return namespace, rest

    def error(self, message: str | Exception):
        # argparse writes "argument --batch_size: 0 must be at least 1"; the message reads "--batch_size 0 must ...".
        text = re.sub(r"^argument (--\w+): (?=\S+ must )", r"\1 ", with_flags(message, flags_of(self)))
        self.exit(2, f"{self.prog}: error: {text}\n")


class SwitchAction(argparse.Action):
    """A flag that may stand alone, be negated by `--no-`, or be followed by a value."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs):
        negated = [f"--no-{text[2:]}" for text in option_strings]
        super().__init__([*option_strings, *negated], dest, nargs="?", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        negated = option_string.startswith("--no-")
        if negated and values is not None:
            parser.error(f"{option_string} takes no value, but is followed by {values}")
        setattr(namespace, self.dest, False if negated else True if values is None else values)


def number_in(limits: In, kind: type = int) -> Callable[[str], float]:
    """Returns a function for argparse's `type=` that parses an `int` or `float` and checks its limits."""

    def parse(text: str):
        value = kind(text)
        if value not in limits:
            raise argparse.ArgumentTypeError(f"{value} must {limits}")
        return value

    parse.__name__ = kind.__name__
    return parse


def as_id(label: int | str) -> int | str:
    """Converts a class id from the command line to a number; returns anything else unchanged."""
    return int(label) if str(label).removeprefix("-").isdecimal() else label


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Maps the fields of a parser to their flags."""
    return {
        action.dest: action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
        for action in parser._actions
    }


def with_flags(error: BaseException | str, flags: dict[str, str]) -> str:
    """Converts a message of the library for the command line by replacing each field in backticks by its flag.

    Args:
        flags: the result of `flags_of`.
    """
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), str(error))


# What the extras of pyproject.toml install, by the name that Python imports.
EXTRAS = {
    "train": ("transformers", "datasets", "pyarrow", "matplotlib", "sklearn", "tensorboard"),
    "lora": ("peft",),
    "deepspeed": ("deepspeed",),
    "app": ("gradio",),
}


@contextlib.contextmanager
def missing_extras(prog: str):
    """Ends the process with a one-line message that says what to install, if a package of an extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                name = {"sklearn": "scikit-learn"}.get(package, package)
                sys.exit(
                    f"{prog}: error: {name} is needed but not installed; run: pip install 'diffusers-vrpo[{extra}]'"
                )
        raise


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser):
    """Ends the process with a one-line message after an InputError or TrainingStopped, or if an extra is missing."""
    try:
        with missing_extras(parser.prog), warnings.catch_warnings():
            for message in HARMLESS_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    except (InputError, TrainingStopped) as error:
        sys.exit(f"{parser.prog}: error: {with_flags(error, flags_of(parser))}")


def is_configured() -> bool:
    """Whether `accelerate config` has been run, whose answers `accelerate launch` then takes."""
    return any((Path(HF_HOME) / "accelerate" / f"default_config.{ending}").is_file() for ending in ("yaml", "json"))


# ----------------------------------------------------------------------------------------------------------------------
# Flags from fields


def add_option(group, option: Option, *spellings: str, suppress: bool = False, **changes):
    """Adds the flag of an option to a parser or to one of its groups.

    Args:
        spellings: further spellings, such as `"--dataset"`.
        suppress: whether an absent flag sets no value; the help shows the default anyway.
        changes: arguments of `add_argument` that override those of the option, such as `help`.
    """
    limits = option.marked(In)
    value: dict = {"metavar": option.metavar, "choices": option.choices}
    if option.kind is bool:
        value = {"action": argparse.BooleanOptionalAction}
    elif option.marked(Switch):
        value["action"] = SwitchAction
    elif option.kind is not str:
        value["type"] = number_in(limits[0], option.kind) if limits else option.kind
    if option.many:
        value |= {"action": "append"} if option.marked(Repeated) else {"action": "extend", "nargs": "+"}
    shown = suppress and option.default is not None and option.default is not False
    help = sentence(changes.pop("help", option.help)) + (f" (default: {option.default})" if shown else "")
    default = argparse.SUPPRESS if suppress else option.default
    action = group.add_argument(f"--{option.name}", *spellings, **{"default": default} | value | changes)
    action.help = help.replace("%", "%%")  # not earlier, since BooleanOptionalAction adds to it


def add_options(group, config: type, names: Iterable[str], spellings: Sequence[str] = (), **changes):
    """Adds the flags of some options of a configuration class to a parser or to one of its groups, with `add_option`.

    Args:
        names: names of the options.
        spellings, changes: as for `add_option`, the same for all of these options.
    """
    options = options_of(config)
    for name in names:
        add_option(group, options[name], *spellings, **changes)


def training_parser(common: Sequence[str] = COMMON, **arguments) -> argparse.ArgumentParser:
    """Creates a parser of all options of `VRPOConfig`, for `parse_config`. It returns only the options that are given.

    Args:
        common: names of the options that the short help shows.
        arguments: arguments of `argparse.ArgumentParser`, such as `prog`.
    """
    parser = OneLineErrorParser(common=common, **arguments)
    for config in VRPOConfig.__bases__:
        group = parser.add_argument_group(config._argument_group_name)
        add_options(group, config, options_of(config), suppress=True)
    return parser


def parse_config(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> VRPOConfig:
    """Parses a command line, which overrides the options of the YAML file that its `--config` names.

    If an option is wrong or a required one is missing, the process ends with a one-line message.

    Args:
        parser: the result of `training_parser`.
        argv: the command line; by default that of the process.
    """
    try:
        config = VRPOConfig(**given_options(parser, argv))
        check_complete(config)
    except InputError as error:
        parser.error(error)
    return config


def given_options(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """The options, by name, of a command line and of the file that its `--config` names; the command line takes precedence.

    Args:
        parser: the result of `training_parser`, possibly with flags of another command added.
        argv: the command line; by default that of the process.
    """
    given = vars(parser.parse_args(argv))
    if "config" in given:
        of_file = vars(parser.parse_args(file_to_argv(parser, given["config"])))
        # An option on the command line replaces its alternatives in the file.
        for names in alternatives(VRPOConfig):
            if not given.keys().isdisjoint(names):
                of_file = {name: value for name, value in of_file.items() if name not in names}
        given = of_file | given
        # A file may have come with other people's weights, and must not decide which code runs.
        for name, is_code in CODE_OPTIONS.items():
            values = of_file.get(name) or []
            code = [value for value in values if is_code(value)]
            if code and given[name] is values:
                parser.error(
                    f"--config {given['config']}: {name} {code[0]} names code to run, which a file must not do; give it on the "
                    f"command line as --{name}"
                )
    return given


def recipes() -> dict[str, Path]:
    """The files of training options in the package, by name, such as `digits`."""
    files = [path for path in packaged("configs").rglob("*.yaml") if path.parent.name != "accelerate"]
    return {path.stem: path for path in sorted(files)}


def recipe_or_file(name: str) -> Path:
    """The file of training options that `--config` names.

    Raises:
        OSError: if there is neither such a file nor a recipe of that name.
    """
    path, known = Path(name), recipes()
    if not path.is_file() and name in known:  # a folder may have the name of a recipe
        return known[name]
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise OSError("it is not a file")
    if not path.exists():
        raise OSError(f"there is no such file, and the recipes are {', '.join(known)}")
    return path


def file_to_argv(parser: argparse.ArgumentParser, file: str) -> list[str]:
    """Converts a YAML file of training options, or a recipe, to a command line; `parser` reports errors."""
    try:
        values = yaml.safe_load(recipe_or_file(file).read_text()) or {}
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"--config {file} cannot be read: {str(error).splitlines()[0]}")
    if not isinstance(values, dict):
        parser.error(f"--config {file} must map option names to values, such as `seed: 0`")
    options, argv = options_of(VRPOConfig), []
    for name, value in values.items():
        if name not in options or name == "config":
            near = difflib.get_close_matches(str(name), options, n=1)
            parser.error(f"--config {file}: unknown option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        option = options[name]
        if value is False and "no" in (option.choices or ()):
            value = "no"  # YAML reads it as false
        if value is None:
            continue
        is_switch = option.kind is bool or (isinstance(value, bool) and option.marked(Switch))
        if isinstance(value, bool) != bool(is_switch):
            wanted = "is true or false" if option.kind is bool else "takes a value"
            parser.error(f"--config {file}: {name} {wanted}, not {str(value).lower()}")
        if isinstance(value, dict) or (isinstance(value, list) and not option.many):
            parser.error(f"--config {file}: {name} takes one value, not {value}")
        if isinstance(value, list) and any(isinstance(item, dict | list) or item is None for item in value):
            parser.error(f"--config {file}: {name} takes a list of values, not {value}")
        if is_switch:
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and not option.marked(Repeated):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv += [f"--{name}={item}" for item in (value if isinstance(value, list) else [value])]
    return argv
