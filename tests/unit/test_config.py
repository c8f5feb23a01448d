# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The options of training as fields: their ranges, from Python and from the command line; files; what a resume keeps."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import yaml

from diffusers_vrpo.command_line import (
    OneLineErrorParser,
    add_options,
    file_to_argv,
    given_options,
    parse_config,
    training_parser,
)
from diffusers_vrpo.config import (
    DataConfig,
    GenerativeConfig,
    HubConfig,
    In,
    Needs,
    OneOf,
    Options,
    Resume,
    VRPOConfig,
    check_complete,
    data_settings_to_keep,
    has_effect,
    is_default,
    names_marked,
    options_of,
    settings_to_keep,
)
from diffusers_vrpo.config import (
    option as config_option,
)
from diffusers_vrpo.errors import InputError
from support.paths import ROOT


OPTIONS = options_of(VRPOConfig)
RANGES = [(option, limits) for option in OPTIONS.values() for limits in option.marked(In)]
RECIPES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "accelerate" not in path.parts]
# The least that a run from the command line names.
COMPLETE = ["--dataset_name", "digits", "--vae", "none", "--encoder", "digits"]


def parse(*argv: str, complete: bool = True) -> VRPOConfig:
    return parse_config(training_parser(prog="train_vrpo.py"), [*(COMPLETE if complete else []), *argv])


def refused(capsys, *argv: str, complete: bool = True) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as end:
        parse(*argv, complete=complete)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("train_vrpo.py: error: ") and error.count("\n") == 1
    assert "`" not in error or "such as `" in error
    return error


# Fields


def test_every_field_is_an_option_of_one_group():
    names = [field.name for group in VRPOConfig.__bases__ for field in dataclasses.fields(group)]
    assert sorted(names) == sorted(set(names)) == sorted(field.name for field in dataclasses.fields(VRPOConfig))
    assert list(OPTIONS) == names and set(vars(VRPOConfig())) == set(names)


def test_every_option_is_explained_in_its_own_words():
    helps = {option.name: option.help for option in OPTIONS.values()}
    assert all(len(text) > 10 and not text.endswith(".") for text in helps.values())
    assert len(set(helps.values())) == len(helps)
    assert all(group.__doc__ and group._argument_group_name for group in VRPOConfig.__bases__)


def test_marks_name_options():
    for option in OPTIONS.values():
        for need in option.marked(Needs):
            assert need.name in OPTIONS
            choices = OPTIONS[need.name].choices  # None if any text will do
            assert choices is None or all(value in choices for value in need.values)
        # At most one mark of each other kind: a second one would be ignored.
        assert all(len(option.marked(kind)) <= 1 for kind in (In, OneOf, Resume))


def test_every_number_has_a_range():
    # Those with a list of choices have it instead.
    numbers = {option.name for option in OPTIONS.values() if option.kind in (int, float) and option.choices is None}
    assert numbers == {option.name for option, _ in RANGES}


def test_choices_are_those_of_the_code():
    from diffusers.optimization import SchedulerType

    from diffusers_vrpo.alignment.gradient_fork import CONFLICTS
    from diffusers_vrpo.alignment.policy import TIMESTEP_WEIGHTS
    from diffusers_vrpo.alignment.release import RELEASES
    from diffusers_vrpo.alignment.reward_statistics import WEIGHTINGS
    from diffusers_vrpo.alignment.token_weights import TOKEN_WEIGHTINGS
    from diffusers_vrpo.experimental.generative.rewards import ENOUGH_FOR_FRECHET, FIDELITY_REWARDS

    # The other one takes rules that no option gives.
    assert {*OPTIONS["lr_scheduler"].choices, "piecewise_constant"} == {each.value for each in SchedulerType}
    assert OPTIONS["conflict"].choices == tuple(CONFLICTS)
    assert OPTIONS["release"].choices == tuple(RELEASES)
    assert OPTIONS["token_weighting"].choices == tuple(TOKEN_WEIGHTINGS)
    assert all(name in OPTIONS["reward_weighting"].help for name in WEIGHTINGS)
    assert OPTIONS["timestep_weighting"].choices == tuple(TIMESTEP_WEIGHTS)
    assert OPTIONS["fidelity_reward"].choices == tuple(FIDELITY_REWARDS)
    assert str(ENOUGH_FOR_FRECHET) in OPTIONS["fidelity_reward"].help


# Values


def outside(option, limits: In) -> list:
    """Numbers just out of the range of an option."""
    step = 1 if option.kind is int else 1e-6
    below = [] if limits.low == float("-inf") else [limits.low if limits.exclusive else limits.low - step]
    above = [limits.high] if limits.high < limits.most else [limits.most + step]
    return below + above + ([float("nan"), float("inf")] if option.kind is float else [])


@pytest.mark.parametrize("option, limits", RANGES, ids=[option.name for option, _ in RANGES])
def test_ranges(capsys, option, limits):
    assert option.default is None or option.default in limits
    for value in outside(option, limits):
        with pytest.raises(InputError, match=f"^`{option.name}` .* must ") as error:
            VRPOConfig(**{option.name: [value] if option.many else value})
        assert error.value.field == option.name
        assert f"error: --{option.name} {option.kind(value)} must {limits}" in refused(
            capsys, f"--{option.name}={value}"
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": "1"}, "`seed` must be a whole number, not '1'"),
        ({"seed": True}, "`seed` must be a whole number, not True"),
        ({"seed": 1.0}, "`seed` must be a whole number, not 1.0"),
        ({"learning_rate": "1e-4"}, "`learning_rate` must be a number"),
        ({"use_ema": 1}, "`use_ema` must be True or False, not 1"),
        ({"output_dir": None}, "`output_dir` cannot be None; its default is vrpo-model"),
        ({"output_dir": 3}, "`output_dir` must be text"),
        ({"encoder": "digits"}, "`encoder` must be a list, not 'digits'"),
        ({"encoder_layer": [1.5]}, "`encoder_layer` must be a whole number, not 1.5"),
        ({"objective": "grpo"}, "`objective` must be one of none, repa, irepa, rare, repi, vrpo, not 'grpo'"),
    ],
)
def test_values_of_the_wrong_kind(options, message):
    with pytest.raises(InputError, match=message) as error:
        VRPOConfig(**options)
    assert error.value.field == next(iter(options))


def test_paths_and_tuples_are_taken():
    config = VRPOConfig(output_dir=Path("a/b"), encoder=("digits", Path("c")), learning_rate=1)
    assert config.output_dir == "a/b" and config.encoder == ["digits", "c"]
    assert yaml.safe_load(yaml.safe_dump(config.to_dict()))["encoder"] == ["digits", "c"]


# Options that contradict each other: the field is named from Python, the flag on the command line


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"dataset_name": "digits", "latents_dir": "c"},
            "give either `dataset_name` or `train_data_dir` or `latents_dir`",
        ),
        ({"max_train_steps": 4, "num_train_epochs": 1}, "give either `max_train_steps` or `num_train_epochs`"),
        ({"streaming": True, "max_train_samples": 5}, "`streaming` cannot be combined with `max_train_samples` 5"),
        ({"model_config": "a.json", "preset": "SiT-B/2"}, "`model_config` cannot be combined with `preset`"),
        ({"encoder": ["a"], "encoder_layer": [1, 2]}, "`encoder_layer` has 2 numbers for 1 encoders"),
        (
            {"objective": "none", "projector": "conv"},
            "`projector` conv has no effect without `objective` repa, irepa, rare or vrpo",
        ),
        ({"policy_noise": 0.2}, "`policy_noise` 0.2 has no effect without `estimator` sampled or `kl_coeff`"),
        ({"group_size": 4}, "`group_size` 4 has no effect without `estimator` sampled"),
        (
            {"estimator": "sampled", "clip_range": 0.1},
            "`clip_range` 0.1 has no effect without `policy_epochs` above 1",
        ),
        (
            {"estimator": "sampled", "policy_epochs": 3, "checkpointing_steps": 10000},
            "`checkpointing_steps` 10000 must be a multiple of `policy_epochs` 3",
        ),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "`lr_scheduler` constant has no warm-up"),
        ({"num_fd_samples": 9}, "`num_fd_samples` 9 has no effect without `fd_encoder`"),
        ({"mc_samples": 2}, "`mc_samples` 2 has no effect without `generative_policy_start_step`"),
        (
            {"generative_policy_start_step": 4, "max_train_steps": 4},
            "`generative_policy_start_step` 4 is never reached; it must be below `max_train_steps` 4",
        ),
        ({"hub_private_repo": True}, "`hub_private_repo` has no effect without `push_to_hub`"),
        ({"hub_model_id": "a/b"}, "`hub_model_id` a/b has no effect without `push_to_hub`"),
        (
            {"resume_from_checkpoint": "hub"},
            "`resume_from_checkpoint` hub .* needs `push_to_hub` and `push_training_state`",
        ),
    ],
)
def test_contradictions(capsys, options, message):
    with pytest.raises(InputError, match=message) as error:
        VRPOConfig(**options)
    assert error.value.field in OPTIONS and f"`{error.value.field}`" in str(error.value)
    argv = to_argv({"dataset_name": "digits"} | options)
    shown = refused(capsys, *argv, complete=False)
    assert str(error.value).replace("`", "--").split("--")[1] in shown
    assert f"--{error.value.field}" in shown


def test_a_start_step_of_zero_counts():
    assert VRPOConfig(generative_policy_start_step=0, mc_samples=2).mc_samples == 2


def test_python_need_not_name_what_it_gives_as_objects(capsys):
    VRPOConfig(objective="vrpo")
    for options, name in (
        ({}, "dataset_name"),
        ({"dataset_name": "digits"}, "vae"),
        ({"dataset_name": "digits", "vae": "none"}, "encoder"),
    ):
        with pytest.raises(InputError) as error:
            check_complete(VRPOConfig(**options))
        assert error.value.field == name
        assert f"--{name}" in refused(capsys, *to_argv(options), complete=False)
    check_complete(VRPOConfig(latents_dir="cache", objective="none"))


# Command lines and files


def to_argv(options: dict) -> list[str]:
    """The flags of options, as a user would write them."""
    argv = []
    for name, value in options.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif name == "reward_function":
            argv += [part for item in value for part in (f"--{name}", item)]
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={value}")
    return argv


# Another value than the default for every option, in sets of options that agree with each other.
ALIGNED = {
    "objective": "vrpo",
    "encoder": ["digits", "b"],
    "encoder_layer": [-1, 2],
    "layer_scope": "1,2",
    "estimator": "sampled",
    "policy_epochs": 2,
    "group_size": 3,
    "clip_range": 0.5,
    "policy_noise": 0.3,
    "mixed_precision": "no",
    "learn_sigma": False,
    "center_crop": False,
    "random_flip": True,
    "validation_labels": ["a", "3"],
    "adam_epsilon": 1e-12,
    "guidance_scale": 1e-3,
    "seed": 2**62,
    "num_train_epochs": 3,
    "push_to_hub": True,
    "hub_private_repo": True,
}
REWARDED = {
    "objective": "none",
    "generative_policy_start_step": 0,
    "reward_encoder": "digits",
    "reward_function": ["a.py:b", "c.py:d"],
    "reward_weights": "1,2,3,4,5",
    "fd_encoder": "digits",
    "guard_distance_rise": 0.5,
    "train_data_dir": "images",
    "dataset_name": None,
}


@pytest.mark.parametrize("options", [{}, ALIGNED, REWARDED], ids=["defaults", "aligned", "rewarded"])
def test_round_trip(tmp_path, options):
    config = VRPOConfig(**{"dataset_name": "digits", "vae": "none", "encoder": ["digits"], **options})
    assert parse(*to_argv(config.to_dict()), complete=False) == config
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    code = [f"--reward_function={name}" for name in config.reward_function or []]  # which a file may not name
    of_file = parse("--config", str(file), *code, complete=False)
    assert dataclasses.replace(of_file, config=None) == config and of_file.config == str(file)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes(file):
    config = parse("--config", str(file), complete=False)
    given = yaml.safe_load(file.read_text())
    for name, value in given.items():
        found = getattr(config, name)
        assert found == ([value] if isinstance(found, list) and not isinstance(value, list) else value)
    assert {name for name in OPTIONS if not is_default(config, name)} <= {*given, "config"}


def test_the_command_line_overrides_a_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("streaming: true\nencoder: [a, b]\nlearning_rate: 1e-3\ntrain_data_dir: images\nvae: none\n")
    config = parse("--config", str(file), "--no-streaming", "--encoder", "c", "--encoder", "d", complete=False)
    assert (config.streaming, config.encoder, config.learning_rate) == (False, ["c", "d"], 1e-3)
    # One of several alternatives takes the place of another one in the file.
    config = parse("--config", str(file), "--latents_dir", "cache", "--no-streaming", complete=False)
    assert (config.latents_dir, config.train_data_dir) == ("cache", None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate: 1", "unknown option 'lerning_rate'; did you mean learning_rate?"),
        ("7: 1", "unknown option 7"),
        ("use_ema: 3", "use_ema is true or false, not 3"),
        ("seed: true", "seed takes a value, not true"),
        ("layer_scope: [4, 8]", "layer_scope takes one value, not [4, 8]"),
        ("seed: {a: 1}", "seed takes one value"),
        ("encoder: [digits, {a: 1}]", "encoder takes a list of values"),
        ("encoder: [digits, null]", "encoder takes a list of values"),
        ("seed: a", "--seed: invalid int value: 'a'"),
        ("seed: -1", "--seed -1 must lie in [0, 9223372036854775808)"),
        ("- 1", "must map option names to values"),
        ("a: b: c", "cannot be read"),
    ],
)
def test_files_that_are_wrong(capsys, tmp_path, text, message):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_pipe_is_no_file_of_options(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path / "pipe"))
    assert "cannot be read: it is not a file" in capsys.readouterr().err


def test_values_of_a_file_as_a_command_line(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("mixed_precision: no\nuse_ema: false\nreward_function: [a.py:b, c.py:d]\nvae:\n")
    argv = file_to_argv(training_parser(), str(file))
    assert argv == ["--mixed_precision=no", "--no-use_ema", "--reward_function=a.py:b", "--reward_function=c.py:d"]


def test_code_that_the_command_line_names_replaces_that_of_a_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("image_rewards: [package.module:one]\nreward_function: [a.py:b]\n")
    argv = ["--config", str(file), "--image_rewards", "package.module:one", "--reward_function", "c.py:d"]
    given = given_options(training_parser(), argv)
    assert (given["image_rewards"], given["reward_function"]) == (["package.module:one"], ["c.py:d"])


# What a resumed run must keep


def kept(config: VRPOConfig) -> dict:
    groups = [group for group in VRPOConfig.__bases__ if group is not GenerativeConfig]
    return {name: value for group in groups for name, value in settings_to_keep(config, group).items()}


def test_what_a_resumed_run_keeps():
    settings = kept(VRPOConfig())
    # What version 0.1 kept, and what it let change in silence.
    assert {"seed", "objective", "resolution", "learning_rate", "ema_decay", "encoder", "layer_scope"} <= set(settings)
    assert {"lora_rank", "keep_labels"} <= set(settings)
    data = set(data_settings_to_keep(VRPOConfig()))
    assert data == {
        "dataset_name",
        "dataset_config_name",
        "dataset_split",
        "image_column",
        "label_column",
        "max_train_samples",
    }
    # Every option is kept, marked, or without effect in a run of the defaults.
    marked = {name for name, option in OPTIONS.items() if option.resume not in (None, Resume.NAME)}
    without_effect = {name for name, option in OPTIONS.items() if not has_effect(VRPOConfig(), option)}
    assert {"lora_alpha", "logit_std", "policy_epochs"} <= without_effect
    assert set(settings) | set(options_of(GenerativeConfig)) | marked | without_effect == set(OPTIONS)
    assert not set(settings) & without_effect
    assert {"lora_alpha", "logit_std"} <= set(kept(VRPOConfig(lora_rank=4, timestep_sampling="logit_normal")))
    assert not set(settings) & marked
    free = names_marked(Resume.FREE, Resume.WATCHED, Resume.MACHINE)
    assert {"train_batch_size", "max_train_steps", "checkpointing_steps", "compile", "output_dir"} <= free
    assert set(options_of(HubConfig)) <= names_marked(Resume.MACHINE)


def test_folders_may_have_moved():
    here = VRPOConfig(encoder=["/a/dino"], pretrained_model_name_or_path="/a/sit", dataset_name="/a/images")
    there = VRPOConfig(encoder=["/b/dino"], pretrained_model_name_or_path="sit", dataset_name="/b/images")
    assert kept(here) == kept(there) and data_settings_to_keep(here) == data_settings_to_keep(there)
    other = dataclasses.replace(there, encoder=["/b/clip"])
    assert kept(other)["encoder"] == ["clip"]
    assert kept(VRPOConfig())["pretrained_model_name_or_path"] == "none" and kept(VRPOConfig())["encoder"] == []


def test_resolved_options_are_compared_by_what_they_became():
    """A mark `RESOLVED` is a promise that `run_settings`, the data or the generative policy keeps."""
    compared = {
        "mixed_precision",
        "vae",
        "conflict",
        "release",
        "label_dropout",
        "random_streams",
        "streaming",
        "allow_tf32",
    }  # by their names, in `run_settings`
    of_model = {
        "preset",
        "model_config",
        "prediction_type",
        "learn_sigma",
        "qk_norm",
        "projector_dim",
    }  # by the model's arguments
    of_data = {"train_data_dir", "latents_dir"}  # by the content of the data
    of_policy = {"reward_encoder", "reward_function"}  # in the state of the generative policy
    assert names_marked(Resume.RESOLVED) == compared | of_model | of_data | of_policy


# A narrow configuration is enough where a function takes one


def test_groups_stand_alone():
    data = DataConfig(dataset_name="digits", resolution=8)
    assert data.to_dict()["resolution"] == 8 and not hasattr(data, "seed")
    with pytest.raises(InputError, match="`resolution` 0 must be at least 1"):
        DataConfig(resolution=0)


def test_an_option_is_one_field(capsys):
    @dataclasses.dataclass(kw_only=True)
    class MineConfig(Options):
        shift: Annotated[float, In(0, exclusive=True)] = config_option(1.0, "shift of the noise levels")

    parser = OneLineErrorParser(prog="mine")
    add_options(parser, MineConfig, options_of(MineConfig))
    assert vars(parser.parse_args(["--shift", "2.5"])) == {"shift": 2.5}
    assert "Shift of the noise levels. (default: 1.0)" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--shift", "0"])
    assert "mine: error: --shift 0.0 must be above 0" in capsys.readouterr().err
    with pytest.raises(InputError, match="`shift` 0.0 must be above 0"):
        MineConfig(shift=0.0)
    assert settings_to_keep(MineConfig(shift=3.0), MineConfig) == {"shift": 3.0}


def test_options_are_light():
    code = (
        "import sys, diffusers_vrpo.config, diffusers_vrpo.command_line as c; c.training_parser().format_help();"
        "print([name for name in ('torch', 'transformers', 'diffusers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_trl_users_can_parse_it_as_they_know():
    """`HfArgumentParser` reads the same class: the fields hold nothing that it does not understand."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(VRPOConfig)
    (config,) = parser.parse_args_into_dataclasses(["--learning_rate", "0.1", "--encoder", "a", "b", "--no_use_ema"])
    assert (config.learning_rate, config.encoder, config.use_ema) == (0.1, ["a", "b"], False)
