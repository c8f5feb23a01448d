# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The values that numeric options take: every option has a finite range, and what lies outside is refused by name."""

import math

import pytest

from diffusers_vrpo.command_line import parse_config, training_parser
from diffusers_vrpo.config import In, VRPOConfig, checked_value, options_of
from diffusers_vrpo.errors import InputError
from support.paths import ROOT


NUMBERS = {name: option for name, option in options_of(VRPOConfig).items() if option.kind in (int, float)}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_training_have_a_finite_range(name):
    option = NUMBERS[name]
    (limits,) = option.marked(In)
    assert math.isfinite(limits.low) and math.isfinite(min(limits.high, limits.most))
    wrong = [-(10**30), 10**30] if option.kind is int else [math.nan, math.inf, -math.inf, -1e30, 1e30]
    for value in wrong:
        with pytest.raises(InputError) as refused:
            checked_value(option, [value] if option.many else value)
        assert f"`{name}` {value} must " in str(refused.value) and refused.value.field == name


@pytest.mark.parametrize(
    "name, largest",
    [
        ("train_batch_size", 65536),
        ("dataloader_num_workers", 256),
        ("rollout_classes", 65536),
        ("resolution", 8192),
        ("num_inference_steps", 10000),
        ("lora_rank", 10000),
        ("guidance_scale", 1000.0),
        ("learning_rate", 10.0),
    ],
)
def test_largest_values(name, largest):
    option = NUMBERS[name]
    assert checked_value(option, largest) == largest
    with pytest.raises(InputError, match=f"`{name}` {largest + 1} must .* at most {largest:.0f}$"):
        checked_value(option, largest + 1)


def test_a_flag_out_of_range_is_one_sentence(capsys):
    for argv in (["--guidance_scale", "nan"], ["--guidance_scale", "-1"], ["--train_batch_size", "1000000000"]):
        with pytest.raises(SystemExit):
            training_parser().parse_args(argv)
        error = capsys.readouterr().err
        assert f"{argv[0]} " in error and " must be at least " in error and error.count("\n") == 1


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_lie_in_the_ranges(file):
    parse_config(training_parser(), ["--config", str(file), "--output_dir", "run"])
