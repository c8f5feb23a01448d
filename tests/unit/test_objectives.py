# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Objectives by name: what each sets, that a given option wins, and that each trains any transformer."""

import dataclasses
import pickle
import re

import pytest
import torch

from diffusers_vrpo import VRPOConfig
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.alignment.objective import REPA, REPI, VRPO, NoAlignment, objective_from_config
from diffusers_vrpo.alignment.whitening import whiten_encoder
from diffusers_vrpo.command_line import parse_config, training_parser
from diffusers_vrpo.config import (
    OBJECTIVES,
    UNLESS_THE_OBJECTIVE_SETS_IT,
    AlignmentConfig,
    objective_in_full,
    options_of,
    options_without_effect,
    set_by_objective,
    settings_to_keep,
)
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.hub import card
from support.models import tiny_model
from support.official import tiny_dit
from support.paths import ROOT


OPTIONS = options_of(VRPOConfig)
OF_IREPA = {"projector": "conv", "spatial_norm": 0.6}
OF_RARE = {"target_norm": "whiten:128", "token_weighting": "residual", "release": "plateau"}


def values(config, names) -> dict:
    return {name: getattr(config, name) for name in names}


# Options


def test_the_table_names_options_that_may_be_missing():
    assert tuple(OBJECTIVES) == OPTIONS["objective"].choices and set(OBJECTIVES) == set(card.OBJECTIVES)
    for preset in OBJECTIVES.values():
        assert preset.keys() <= UNLESS_THE_OBJECTIVE_SETS_IT.keys()
    for name in UNLESS_THE_OBJECTIVE_SETS_IT:
        # The command line and other parsers then give nothing that was not given.
        assert OPTIONS[name].optional and OPTIONS[name].default is None
        assert "if not given" in OPTIONS[name].help or "if neither this nor" in OPTIONS[name].help


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_value_is_valid_and_the_docs_have_it(name):
    config = VRPOConfig(objective=name)
    assert values(config, UNLESS_THE_OBJECTIVE_SETS_IT) == set_by_objective(name)
    # Given options with the same values are nothing else.
    assert VRPOConfig(objective=name, **OBJECTIVES[name]) == config
    table = (ROOT / "docs" / "method.md").read_text().split("## Objectives by name")[1]
    (row,) = re.findall(rf"^\| `{name}` \|.*$", table, re.MULTILINE)
    for option, value in OBJECTIVES[name].items():
        assert f"`--{option} {value}`" in row
    assert len(re.findall("`--", row)) == len(OBJECTIVES[name])


def test_objectives_set_options_and_given_ones_win():
    assert values(VRPOConfig(objective="irepa"), OF_IREPA) == OF_IREPA
    assert values(VRPOConfig(objective="rare"), OF_RARE) == OF_RARE
    config = VRPOConfig(objective="irepa", projector="mlp")  # also with the value that others have
    assert config.projector == "mlp" and config.spatial_norm == 0.6
    config = VRPOConfig(objective="rare", token_weighting="uniform", release="none", alignment_coeff=2.0)
    assert values(config, OF_RARE) == OF_RARE | {"token_weighting": "uniform", "release": "none"}
    assert config.alignment_coeff == 2.0
    alone = AlignmentConfig(objective="irepa")
    assert values(alone, OF_IREPA) == OF_IREPA


def test_from_the_command_line_and_files(tmp_path, capsys):
    base = ["--dataset_name", "digits", "--vae", "none", "--encoder", "digits"]

    def parse(*argv):
        return parse_config(training_parser(prog="train_vrpo.py"), [*base, *argv])

    assert parse("--objective", "irepa") == VRPOConfig(
        objective="irepa", dataset_name="digits", vae="none", encoder=["digits"]
    )
    assert parse("--objective", "irepa", "--projector", "mlp").projector == "mlp"
    file = tmp_path / "options.yaml"
    file.write_text("objective: rare\nrelease: gate\n")
    found = parse("--config", str(file), "--target_norm", "whiten:16")
    assert values(found, OF_RARE) == {"target_norm": "whiten:16", "token_weighting": "residual", "release": "gate"}
    with pytest.raises(SystemExit):
        parse("--objective", "rare", "--conflict", "gate")
    assert "--conflict gate cannot be combined with --release plateau" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--objective", "irepa", "--reward_weighting", "equal")
    assert "--reward_weighting equal has no effect without --objective vrpo" in capsys.readouterr().err


def test_transformers_own_parser_applies_them():
    from transformers import HfArgumentParser

    (config,) = HfArgumentParser(VRPOConfig).parse_args_into_dataclasses(["--objective", "irepa"])
    assert values(config, OF_IREPA) == OF_IREPA


def test_what_is_recorded_is_what_was_resolved():
    config = VRPOConfig(objective="rare")
    recorded = config.to_dict()
    assert {name: recorded[name] for name in OF_RARE} == OF_RARE and VRPOConfig(**recorded) == config
    kept = settings_to_keep(config, AlignmentConfig)
    assert kept["target_norm"] == "whiten:128" and kept["token_weighting"] == "residual"
    assert pickle.loads(pickle.dumps(config)) == config
    assert (
        dataclasses.replace(VRPOConfig(objective="rare", token_weighting="uniform"), seed=3).token_weighting
        == "uniform"
    )


def test_the_log_has_it_in_one_line():
    assert objective_in_full(VRPOConfig(objective="irepa", alignment_coeff=1.5)) == (
        "objective irepa: alignment_coeff 1.5, timestep_weighting uniform, projector conv, spatial_norm 0.6, target_norm none, "
        "token_weighting uniform, release none, conflict none, layer_scope early"
    )
    assert "alignment_coeff 4.0" in objective_in_full(VRPOConfig())
    assert "release none, reward_weighting auto, conflict none" in objective_in_full(VRPOConfig())
    assert objective_in_full(VRPOConfig(objective="repi", alignment_stop_step=10**5)) == (
        "objective repi: release stop, scaffold_layer early, scaffold_fraction 0.05, scaffold_coeff 2.0"
    )
    assert "layer_scope early, scaffold_layer 3, scaffold_fraction 0.05" in objective_in_full(
        VRPOConfig(scaffold_layer=3)
    )


def test_options_without_an_effect_are_still_refused():
    with pytest.raises(
        InputError, match="`projector` conv has no effect without `objective` repa, irepa, rare or vrpo"
    ):
        VRPOConfig(objective="none", projector="conv")
    VRPOConfig(objective="none", projector="mlp")  # what it has anyway
    for name in ("none", "repi"):
        with pytest.raises(InputError, match="`alignment_coeff` 2.0 has no effect without `objective` repa, irepa"):
            VRPOConfig(objective=name, alignment_coeff=2.0)


def test_options_that_runs_share_are_named_where_they_do_nothing():
    assert options_without_effect(VRPOConfig()) == []
    shared = {"encoder": ["a", "b"], "encoder_layer": [-2], "projector_dim": 64}
    assert options_without_effect(VRPOConfig(objective="none", **shared)) == [
        "`objective` none trains without the `encoder` a, b",
        "`encoder_layer` -2 has no effect with `objective` none",
        "`projector_dim` 64 has no effect with `objective` none",
    ]
    for name, sentences in (
        ("repi", ["`projector_dim` 64 has no effect with `objective` repi"]),
        ("irepa", ["`projector_dim` 64 has no effect with `projector` conv"]),
        ("rare", []),
    ):
        assert options_without_effect(VRPOConfig(objective=name, **shared)) == sentences


# Training steps


class Parts:
    """The image itself, as 16 tokens of 12 numbers."""

    embed_dim = 12

    def __call__(self, images):
        return images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("model", ["SiT", "epsilon", "diffusers DiT"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_trains_every_kind_of_transformer(name, model):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = VRPOConfig(objective=name, **({"target_norm": "whiten:5"} if name == "rare" else {}))
    encoder = whiten_encoder(Parts(), [images], 5) if name == "rare" else Parts()
    if model == "diffusers DiT":
        transformer = tiny_dit(num_attention_heads=2, attention_head_dim=16, num_layers=2)
        transformer.train()
    else:
        transformer = tiny_model(**({"prediction_type": "epsilon"} if model == "epsilon" else {}))
    timestep = torch.tensor([0.1, 0.5, 0.9]) if model == "SiT" else torch.tensor([100, 500, 900])
    encoders = [] if name == "none" else [encoder]
    layers, scaffold_layer = ([], 1) if name == "repi" else ([1] if encoders else [], None)
    aligned = AlignedTransformer(transformer, layers, encoders, config.projector, 24, scaffold_layer=scaffold_layer)
    objective = objective_from_config(config, aligned, 20)
    expected = {"none": NoAlignment, "repi": REPI, "vrpo": VRPO}.get(name, REPA)
    assert type(objective) is expected
    for _ in range(2):  # with a scaffold, its phase is one step
        step = objective.begin(torch.tensor([0.1, 0.5, 0.9]), images)
        prediction, projections = aligned(
            hidden_states=torch.randn(3, 4, 8, 8),
            timestep=timestep,
            class_labels=torch.tensor([0, 1, 2]),
            fork=step.fork,
            align=step.active,
            scaffold=step.scaffold,
        )
        loss_fm = prediction.square().flatten(1).mean(1)
        loss = loss_fm.mean() + objective.alignment_coeff * objective(step, projections, images, loss_fm)
        if step.scaffold is not None:
            loss = loss + objective.scaffold_coeff * step.scaffold_distance()
        loss.backward()
        objective.observe(step)
        objective.update()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in aligned.parameters() if p.grad is not None)
    if aligned.scaffold is not None:
        assert step.scaffold_distance() > 0
    if aligned.layers:
        assert all(p.grad is not None and p.grad.any() for p in aligned.projectors.parameters())
        assert (objective.plateau is not None) == (name == "rare")
        assert objective.token_weighting == config.token_weighting and objective.spatial_norm == config.spatial_norm
