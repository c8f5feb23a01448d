# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The end of alignment at a plateau of the distance, and how it stands beside the gate and the stop."""

import math

import pytest
import torch

from diffusers_vrpo import VRPOConfig
from diffusers_vrpo.alignment.attach import AlignedTransformer
from diffusers_vrpo.alignment.objective import REPA, VRPO
from diffusers_vrpo.alignment.release import RELEASES
from diffusers_vrpo.config import alignment_end_of
from diffusers_vrpo.errors import InputError
from support.models import aligned_with, tiny_model
from support.statistics import FedPlateau


def feed(plateau: FedPlateau, distances):
    for distance in distances:
        plateau.observe(torch.full((4,), distance))
        plateau.update()


def test_averages_by_hand():
    plateau = FedPlateau(1000, 2)
    assert plateau.rates.tolist() == pytest.approx([0.1, 0.01])
    # Of two projectors; bins with a distance that is not finite do not count.
    plateau.observe(torch.tensor([0.4, 0.6, float("nan"), 0.1]), torch.tensor([0.3, 0.3, 0.3, float("inf")]))
    plateau.update()
    assert plateau.distances().tolist() == pytest.approx([0.4, 0.4])
    plateau.observe(torch.full((4,), 0.1), torch.full((4,), 0.3))
    plateau.update()
    expected = [((1 - rate) * 0.4 + 0.2) / (2 - rate) for rate in (0.1, 0.01)]
    assert plateau.distances().tolist() == pytest.approx(expected)
    # A step without samples changes nothing.
    plateau.update()
    assert plateau.distances().tolist() == pytest.approx(expected) and plateau.step == 3
    assert plateau.summary() == pytest.approx(
        {"alignment_distance": expected[0], "alignment_distance_slow": expected[1], "alignment_weight": 1.0}
    )


@pytest.mark.parametrize("steps, rates", [(400_000, (1e-3, 5e-5)), (10_000, (1e-2, 1e-3)), (1, (1.0, 1.0))])
def test_the_averages_of_short_runs_look_back_less_far(steps, rates):
    plateau = FedPlateau(steps)
    assert plateau.rates.tolist() == pytest.approx(list(rates))
    assert plateau.start == plateau.window == max(1, steps // 8)


def test_alignment_fades_by_a_cosine_once_the_distance_rests():
    plateau = FedPlateau(800)
    feed(plateau, [0.5] * 99)  # it rests from the beginning, which counts from an eighth on
    assert plateau.weight() == 1 and plateau.steps_until_closed() == float("inf")
    for behind in range(1, 101):
        feed(plateau, [0.5 if behind < 50 else 0.1])  # and it never opens again
        assert plateau.weight().item() == pytest.approx(0.5 * (1 + math.cos(math.pi * behind / 100)), abs=1e-6)
        assert plateau.steps_until_closed() == 100 - behind
    assert plateau.weight() == 0 and plateau.weight().dtype == torch.float32
    feed(plateau, [0.01] * 3)
    assert plateau.weight() == 0 and plateau.steps_until_closed() == 0


def test_alignment_lasts_while_the_distance_falls():
    plateau = FedPlateau(800)
    feed(plateau, [0.8 - 0.001 * step for step in range(600)])
    assert plateau.weight() == 1
    feed(plateau, [0.2] * 300)
    assert 0 < plateau.weight() < 1
    # A distance that rises is no reason to go on.
    plateau = FedPlateau(800)
    feed(plateau, [0.3 + 0.001 * step for step in range(101)])
    assert plateau.weight() < 1


def test_micro_batches_and_processes_do_not_change_it():
    generator = torch.Generator().manual_seed(0)
    whole, halves = FedPlateau(160), [FedPlateau(160) for _ in range(2)]
    for _ in range(30):
        distance = 0.4 + 0.1 * torch.rand(16, generator=generator)
        whole.observe(distance)
        whole.update()
        for rank, part in enumerate(halves):
            for micro in range(2):
                part.observe(distance[rank * 8 + micro * 4 : rank * 8 + micro * 4 + 4])
        sums = sum(part.sums.sums for part in halves).clone()
        for part in halves:
            part.update(lambda tensor, sums=sums: sums)
    assert 0 < whole.weight() < 1
    for part in halves:
        for name, tensor in whole.state.items():
            torch.testing.assert_close(part.state[name], tensor, atol=1e-12, rtol=1e-7)


def test_state_round_trip_goes_on_bit_equal():
    a, b = FedPlateau(80), FedPlateau(80)
    feed(a, [0.5] * 14)
    b.load_state_dict({name: tensor.clone() for name, tensor in a.state_dict().items()})
    assert 0 < a.weight() < 1
    for plateau in (a, b):
        feed(plateau, [0.4, 0.3])
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    for steps in (8, 100, 4000):
        b = FedPlateau(steps)
        b.load_state_dict(a.state_dict())
        assert b.weight() <= a.weight() + 1e-6


@pytest.mark.parametrize("objective_class", [REPA, VRPO])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_objective_ends_at_the_step_that_the_plateau_gives(objective_class, resumed):
    def start():
        return objective_class(aligned_with(tiny_model(), (1,), (12,)), 80, 0.5, release="plateau", conflict="none")

    objective, generator = start(), torch.Generator().manual_seed(0)
    y = torch.nn.functional.normalize(torch.randn(2, 16, 12, generator=generator), dim=-1)
    coefficients = []
    for number in range(40):
        if resumed and number == 15:
            saved = {name: holder.state_dict() for name, holder in objective.stateful().items()}
            state, objective = objective.release_state(), start()
            for name, holder in objective.stateful().items():
                holder.load_state_dict(saved[name])
            objective.resume(number, state)
        step = objective.begin(torch.tensor([0.2, 0.7]))
        if not step.active:
            break
        step.targets = [y]
        mu = -y + 0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        loss = objective(step, (mu.requires_grad_(),), None, torch.ones(2))
        loss.backward()
        if step.probe is not None:
            step.probe.grad = torch.zeros_like(step.probe)
        objective.observe(step)
        coefficients.append(step.logs["alignment_coeff"].item())
        objective.update()
    # The distance rests. Ten steps have passed when it is looked at first, and the tenth is the last at full weight.
    fade = [0.25 * (1 + math.cos(math.pi * behind / 10)) for behind in range(1, 10)]
    assert coefficients == pytest.approx([0.5] * 10 + fade, abs=1e-6)
    assert objective.aligned.ended and "alignment_distance" in objective.summary()


class Parts:
    """The image itself, as 16 tokens of 12 numbers."""

    embed_dim = 12

    def __call__(self, images):
        return images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("release", ["plateau", "gate"])
def test_what_ends_alignment_counts_after_the_scaffold_phase(release):
    """In the phase the block is told what the image shows: small distances, which would look like a plateau afterwards."""
    aligned = AlignedTransformer(tiny_model(), [1], [Parts()], projector_dim=24, scaffold_layer=1)
    objective = REPA(
        aligned, 160, release=release
    )  # a phase of 8 steps; the plateau counts from 20 on, the gate from 16
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (y,) = objective.targets(images)
    across = torch.nn.functional.normalize(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)), dim=-1)
    across = torch.nn.functional.normalize(across - (across * y).sum(-1, keepdim=True) * y, dim=-1)
    for number in range(40):
        step = objective.begin(torch.tensor([0.2, 0.7]), images)
        distance = 0.1 if number < 8 else 0.5 - 0.005 * number
        cosine = 1 - 2 * distance
        mu = cosine * y + math.sqrt(1 - cosine**2) * across
        objective(step, (mu.requires_grad_(),), None, torch.ones(2)).backward()
        if step.probe is not None:  # the gradients oppose each other in the phase, and no longer after it
            step.probe.grad = torch.full_like(step.probe, -0.9 if number < 8 else 0.5)
        objective.observe(step)
        objective.update()
        assert step.scaffold.replaces == (number < 8) and (number >= 8 or not objective.summary())
    assert step.logs["alignment_coeff"] == 0.5
    if release == "plateau":
        assert objective.plateau.step == 32 and objective.summary()["alignment_distance"] == pytest.approx(
            0.3, abs=0.02
        )
    else:
        assert objective.gate.step == 32 and objective.summary()["cosine/0.2-0.3"] == pytest.approx(0.5)


# What a user can ask for


@pytest.mark.parametrize(
    "options, conflict, release",
    [
        ({}, "none", "none"),
        ({"conflict": "gate"}, "gate", "gate"),
        ({"objective": "repa"}, "none", "none"),
        ({"objective": "repa", "alignment_stop_step": 5}, "none", "stop"),
        ({"alignment_stop_step": 5}, "none", "stop"),
        ({"conflict": "gate", "alignment_stop_step": 5}, "gate", "gate"),
        ({"conflict": "none"}, "none", "none"),
        ({"conflict": "none", "alignment_stop_step": 5}, "none", "stop"),
        ({"conflict": "project"}, "project", "none"),
        ({"objective": "repa", "conflict": "gate"}, "gate", "gate"),
        ({"release": "none"}, "none", "none"),
        ({"release": "stop", "alignment_stop_step": 5}, "none", "stop"),
        ({"objective": "repa", "release": "gate"}, "gate", "gate"),
        ({"objective": "repa", "release": "gate", "conflict": "gate"}, "gate", "gate"),
        ({"release": "plateau"}, "none", "plateau"),
        ({"release": "plateau", "conflict": "project"}, "project", "plateau"),
        ({"release": "plateau", "conflict": "none", "alignment_stop_step": 5}, "none", "plateau"),
    ],
)
def test_what_ends_alignment(options, conflict, release):
    config = VRPOConfig(**options)
    assert alignment_end_of(config) == (conflict, release)
    arguments = {name: value for name, value in options.items() if name != "objective"}
    made = {"repa": REPA, "vrpo": VRPO}[config.objective](aligned_with(tiny_model(), (1,), (12,)), 100, **arguments)
    assert made.conflict == conflict and made.gate.acts == (release == "gate")
    assert (made.plateau is not None) == (release == "plateau")
    assert made.release.stop_step == options.get("alignment_stop_step", math.inf)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"release": "none", "alignment_stop_step": 5},
            "`release` none cannot be combined with `alignment_stop_step` 5",
        ),
        ({"release": "stop"}, "`release` stop needs `alignment_stop_step`"),
        ({"release": "gate", "conflict": "none"}, "`conflict` none cannot be combined with `release` gate"),
        ({"release": "gate", "conflict": "project"}, "`conflict` project cannot be combined with `release` gate"),
        ({"release": "none", "conflict": "gate"}, "`conflict` gate cannot be combined with `release` none"),
        ({"release": "plateau", "conflict": "gate"}, "`conflict` gate cannot be combined with `release` plateau"),
        (
            {"release": "stop", "conflict": "gate", "alignment_stop_step": 5},
            "`conflict` gate cannot be combined with `release` stop",
        ),
        ({"objective": "none", "release": "plateau"}, "`release` plateau has no effect without `objective`"),
        ({"release": "sometimes"}, "`release` must be one of none, stop, gate, plateau"),
    ],
)
def test_ends_that_contradict_each_other(options, message):
    with pytest.raises(InputError, match=message):
        VRPOConfig(**options)


def test_python_classes_refuse_the_same():
    aligned = aligned_with(tiny_model(), (1,), (12,))
    with pytest.raises(InputError, match="`release` stop needs"):
        VRPO(aligned, 100, release="stop")
    with pytest.raises(ValueError, match="release 'sometimes' must be one of none, stop, gate, plateau"):
        REPA(aligned, 100, release="sometimes")
    assert RELEASES == ("none", "stop", "gate", "plateau")
