# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The guards, each alone; and on a ring of eight Gaussians what the rewards do with and without real data."""

import copy
import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusers_vrpo.evaluation.metrics import precision_recall
from diffusers_vrpo.experimental.generative.guards import GuardValues, Limits, tripped_guard
from diffusers_vrpo.experimental.generative.objective import (
    add_balanced,
    denoising_loss,
    gaussian_kernel,
    mmd_witness,
    sample_advantages,
    sample_policy_loss,
    stratified_times,
)
from diffusers_vrpo.models.flow import flow_matching_loss, forward_process, x0_estimate


FIRST = GuardValues(loss_fm=0.8, recall=0.6, reward=-0.5, start_reward=-0.5, distance=100.0, held_out=40.0, drift=0.0)
LIMITS = Limits()
# Beyond the default limits, each alone; and the limit that it is beyond.
LOSS = {"loss_fm": 0.8161}
RECALL = {"recall": 0.569}
HELD_OUT = {"held_out": 40.9, "reward": -0.4}


def later(**changes) -> GuardValues:
    return dataclasses.replace(FIRST, **{"drift": 0.3, **changes})


def test_nothing_trips_at_the_start_or_when_all_is_better():
    assert tripped_guard(FIRST, FIRST, LIMITS) is None
    better = later(loss_fm=0.7, recall=0.9, reward=0.2, distance=50.0, held_out=20.0)
    assert tripped_guard(FIRST, better, LIMITS) is None
    # The distance in the rewards' own features is no guard, nor is the drift.
    assert tripped_guard(FIRST, later(distance=500.0, drift=9.0, reward=1.0), LIMITS) is None


@pytest.mark.parametrize(
    "within, beyond, message",
    [
        ({"loss_fm": 0.8159}, LOSS, r"risen by 2\.0 % \(from 0\.8 to 0\.8161; `guard_loss_rise` 0\.02\)"),
        ({"recall": 0.571}, RECALL, r"recall has fallen from 0\.600 to 0\.569 \(`guard_recall_fall` 0\.03\)"),
        (
            {**HELD_OUT, "held_out": 40.7},
            HELD_OUT,
            r"risen by 2\.2 % \(from 40 to 40\.9\).*`guard_distance_rise` 0\.02",
        ),
    ],
)
def test_each_guard_trips_alone_beyond_its_limit(within, beyond, message):
    assert tripped_guard(FIRST, later(**within), LIMITS) is None
    assert re.search(message, tripped_guard(FIRST, later(**beyond), LIMITS))


@pytest.mark.parametrize(
    "field, beyond, option",
    [
        ("loss_rise", LOSS, "`guard_loss_rise` 0.01"),
        ("recall_fall", RECALL, "`guard_recall_fall` 0.01"),
        ("distance_rise", HELD_OUT, "`guard_distance_rise` 0.01"),
    ],
)
def test_each_limit_is_that_of_its_guard(field, beyond, option):
    assert option in tripped_guard(FIRST, later(**beyond), dataclasses.replace(LIMITS, **{field: 0.01}))
    assert tripped_guard(FIRST, later(**beyond), dataclasses.replace(LIMITS, **{field: 0.2})) is None
    others = dataclasses.replace(LIMITS, **{name: 0.5 for name in dataclasses.asdict(LIMITS) if name != field})
    assert tripped_guard(FIRST, later(**beyond), others) is not None


def test_the_held_out_distance_counts_only_while_the_reward_rises():
    assert tripped_guard(FIRST, later(held_out=80.0, reward=-0.5), LIMITS) is None
    assert tripped_guard(FIRST, later(held_out=80.0, reward=-0.6), LIMITS) is None
    # Against what the first look's samples are worth in today's rewards, not in those of then.
    assert tripped_guard(FIRST, later(held_out=80.0, reward=0.1, start_reward=0.2), LIMITS) is None
    assert tripped_guard(FIRST, later(held_out=80.0, reward=-0.6, start_reward=-0.7), LIMITS) is not None
    # Without an encoder that no reward sees.
    without = dataclasses.replace(FIRST, held_out=math.nan)
    assert tripped_guard(without, later(held_out=math.nan, reward=1.0), LIMITS) is None


@pytest.mark.parametrize("name", ["loss_fm", "recall", "reward", "start_reward", "distance", "held_out"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measurement_that_is_not_finite_trips(name, value):
    assert "is not finite" in tripped_guard(FIRST, later(**{name: value}), LIMITS)


def test_score_and_logged_values():
    assert FIRST.score == 40 and FIRST.values()["guard/held_out"] == 40
    without = dataclasses.replace(FIRST, held_out=math.nan)
    assert without.score == 100 and "guard/held_out" not in without.values()
    assert len(without.values()) == 6


# ----------------------------------------------------------------------------------------------------------------------
# Eight Gaussians on a ring, two classes of four; the features are the points themselves

VELOCITY = SimpleNamespace(prediction_type="velocity", time_direction="data_to_noise")
ANGLES = torch.arange(8) * math.pi / 4
MODES, STD = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.15
BANDWIDTH = 0.5
GROUPS, GROUP_SIZE, MC_SAMPLES, BATCH = 8, 32, 4, 256
LEARNING_RATE = 5e-4


class Velocity(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.classes = nn.Embedding(2, 16)
        layers = [nn.Linear(2 + 16 + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t, labels):
        waves = t[:, None] * math.pi * torch.arange(1, 5)
        return self.layers(torch.cat([x, self.classes(labels), t[:, None], waves.sin(), waves.cos()], 1))


def draw_real(count, generator):
    mode = torch.randint(8, (count,), generator=generator)
    return MODES[mode] + STD * torch.randn(count, 2, generator=generator), mode // 4


def fm_loss(net, x0, labels, t, noise):
    x_t, timestep, target, _ = forward_process(x0, noise, t, VELOCITY)
    return flow_matching_loss(net(x_t, timestep, labels), target).mean()


def batch_loss(net, generator):
    x0, labels = draw_real(BATCH, generator)
    t, noise = torch.rand(BATCH, generator=generator), torch.randn(BATCH, 2, generator=generator)
    return fm_loss(net, x0, labels, t, noise)


@torch.no_grad()
def draw(net, labels, generator, steps=16):
    x, times = torch.randn(len(labels), 2, generator=generator), torch.linspace(1, 0, steps + 1)
    for t, s in zip(times[:-1], times[1:]):
        x = x + (s - t) * net(x, t.expand(len(x)), labels)
    return x


REAL = draw_real(2048, torch.Generator().manual_seed(10))[0]


def squared_mmd(x):
    within, between, real = (gaussian_kernel(a, b, BANDWIDTH).mean() for a, b in ((x, x), (x, REAL), (REAL, REAL)))
    return (within - 2 * between + real).item()


@torch.no_grad()
def look(net) -> tuple[GuardValues, float]:
    """What the guards see, and the share of modes with at least a quarter of their due."""
    generator = torch.Generator().manual_seed(11)
    x0, labels = draw_real(4096, generator)
    loss = fm_loss(net, x0, labels, (torch.arange(4096) + 0.5) / 4096, torch.randn(4096, 2, generator=generator))
    x = draw(net, torch.arange(2048) % 2, generator)
    distances, mode = torch.cdist(x, MODES).min(1)
    found = torch.bincount(mode[distances < 4 * STD], minlength=8) >= 0.25 * len(x) / 8
    recall = precision_recall(REAL[:1024], x[:1024])[1]
    reward = mmd_witness(x, x, REAL, BANDWIDTH).mean().item()
    return GuardValues(loss.item(), recall, reward, reward, squared_mmd(x), math.nan, 0.0), found.float().mean().item()


@pytest.fixture(scope="module")
def pretrained():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, generator = Velocity(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(800):
        optimizer.zero_grad()
        batch_loss(net, generator).backward()
        optimizer.step()
    yield net
    torch.set_num_threads(threads)


def follow_rewards(net, real_data: bool, updates=200):
    """The generative policy's updates on a copy; the looks of the averaged net every 25 of them."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(3)
    average, queue = copy.deepcopy(net), torch.zeros(0, 2)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    labels = torch.arange(GROUPS).repeat_interleave(GROUP_SIZE) % 2
    many_labels = labels.repeat_interleave(MC_SAMPLES)
    real_std = mmd_witness(REAL, draw(net, labels, generator), REAL, BANDWIDTH).std()[None]
    for update in range(1, updates + 1):
        optimizer.zero_grad()
        if real_data:
            batch_loss(net, generator).backward()
        x = draw(average, labels, generator)
        queue = torch.cat([queue, x])[-2048:]
        rewards = mmd_witness(x, queue, REAL, BANDWIDTH)
        advantages = sample_advantages(rewards.view(GROUPS, GROUP_SIZE, 1), real_std, torch.ones(1))[0].flatten()
        times = stratified_times(torch.rand(GROUPS, MC_SAMPLES, generator=generator))
        noise = torch.randn(GROUPS, MC_SAMPLES, 2, generator=generator)
        times, noise = (values.repeat_interleave(GROUP_SIZE, 0).flatten(0, 1) for values in (times, noise))
        x_t, timestep, _, t = forward_process(x.repeat_interleave(MC_SAMPLES, 0), noise, times, VELOCITY)
        x0 = x0_estimate(net(x_t, timestep, many_labels), x_t, timestep, t, VELOCITY)
        loss = denoising_loss(x0.unflatten(0, (len(x), MC_SAMPLES)), x)[0]
        gradients = torch.autograd.grad(sample_policy_loss(loss, loss, advantages, 8e-3)[0].mean(), parameters)
        if real_data:
            add_balanced(parameters, gradients, 0.5)
        else:
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), parameters):
                a.lerp_(p, 0.1)
        if update % 25 == 0:
            yield look(average)


@pytest.mark.slow
def test_with_real_data_the_distance_falls_and_no_mode_is_lost(pretrained):
    first, modes = look(pretrained)
    looks = list(follow_rewards(pretrained, real_data=True))
    for now, now_modes in looks:
        assert tripped_guard(first, now, LIMITS) is None
        assert now_modes >= 0.95 * modes and now.recall >= 0.95 * first.recall
    # 0.82 of it is left; flow matching alone leaves 0.95, rewards with the wrong sign 1.3.
    assert sum(now.distance for now, _ in looks[3:]) / len(looks[3:]) < 0.89 * first.distance


@pytest.mark.slow
def test_without_real_data_a_guard_trips(pretrained):
    first, _ = look(pretrained)
    reasons = (tripped_guard(first, now, LIMITS) for now, _ in follow_rewards(pretrained, real_data=False))
    assert next(filter(None, reasons), None) is not None
