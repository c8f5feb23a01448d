# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from diffusers_vrpo.alignment.release import COSINE_DECAY, COSINE_STEPS
from diffusers_vrpo.alignment.reward_statistics import (
    DECAY,
    FLOOR_STEP,
    MIN_SAMPLES,
    NUM_BINS,
    WEIGHTINGS,
    bin_edges,
    clip_shares,
    parse_reward_weighting,
    shares_from_std,
    timestep_bins,
)
from diffusers_vrpo.errors import InputError
from support.statistics import FedGate, FedRewards


def test_the_bins_are_ten_of_equal_width():
    """They are those of `t * 10` rounded down, also at the numbers beside an edge, and the last one includes t = 1."""
    edges = torch.arange(0, NUM_BINS + 1) / NUM_BINS
    beside = [torch.nextafter(edges, torch.full_like(edges, end)) for end in (-1.0, 2.0)]
    t = torch.cat([edges, *beside, torch.rand(100_000)]).clamp(0, 1)
    assert torch.equal(timestep_bins(t), (t * NUM_BINS).long().clamp(max=NUM_BINS - 1))
    assert torch.equal(timestep_bins(t), timestep_bins(t, bin_edges()))


def feed(statistics, steps, scale=(1.0, 0.1), batch=64, seed=0, mean=(0.3, -0.1)):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        t = torch.rand(batch, generator=generator)
        rewards = torch.randn(batch, 2, generator=generator) * torch.tensor(scale) + torch.tensor(mean)
        statistics.observe(t, rewards, torch.full((batch, 2), 0.04))
        statistics.update()


def test_variance_is_that_of_the_samples_in_each_bin():
    statistics = FedRewards(1, 2, "inverse_variance")
    feed(statistics, 1000, batch=200)
    variance = statistics.variance()[0]
    torch.testing.assert_close(variance[0], torch.full((NUM_BINS,), 1.0, dtype=torch.float64), rtol=0.15, atol=0)
    torch.testing.assert_close(variance[1], torch.full((NUM_BINS,), 0.01, dtype=torch.float64), rtol=0.15, atol=0)


def test_averages_by_hand():
    statistics = FedRewards(1, 1, "equal")
    for rewards in ([1.0, 3.0], [10.0, 11.0, 12.0]):
        t = torch.full((len(rewards),), 0.05)
        statistics.observe(t, torch.tensor(rewards)[:, None], torch.full((len(rewards), 1), 4.0))
        statistics.update()
    # Spreads 2 and 2 with 1 and 2 degrees of freedom; the jump of the mean between the steps does not count.
    variance = (DECAY * 2 + 2) / (DECAY * 1 + 2)
    assert statistics.variance()[0, 0, 0].item() == pytest.approx(variance)
    assert statistics.variance()[0, 0, 1:].abs().max() == 0
    assert statistics.tau()[0, 0, 0].item() == pytest.approx(0.1 * 2.0)


def test_small_batches_give_the_same_variance():
    generator = torch.Generator().manual_seed(0)
    statistics = FedRewards(1, 1, "equal")
    for step in range(2000):
        # Rewards that rise far beyond their spread of 0.5.
        rewards = 0.01 * step + 0.5 * torch.randn(3, 1, generator=generator)
        statistics.observe(torch.full((3,), 0.5), rewards, torch.ones(3, 1))
        statistics.update()
    assert statistics.variance()[0, 0, 5].item() == pytest.approx(0.25, rel=0.25)


def test_shares_follow_the_weighting():
    sigma = torch.tensor([2.0, 1.0])
    # omega ~ 1/sigma^2, and s ~ omega sigma ~ 1/sigma.
    torch.testing.assert_close(shares_from_std(sigma, "inverse_variance"), torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(shares_from_std(sigma, "inverse_std"), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(shares_from_std(sigma, "raw"), torch.tensor([2 / 3, 1 / 3]))
    # The rule on rewards in one unit: both have variance 1.
    torch.testing.assert_close(shares_from_std(sigma, "equal"), shares_from_std(sigma / sigma, "inverse_variance"))
    assert shares_from_std(sigma.new_tensor([1e-9, 1.0, 5.0]), "equal").tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(shares_from_std(torch.zeros(2), "inverse_variance"), torch.tensor([0.5, 0.5]))


def test_inverse_variance_minimises_the_composites_variance():
    sigma = torch.tensor([0.3, 1.0, 2.0])
    shares = shares_from_std(sigma, "inverse_variance")
    omega = (shares / sigma) / (shares / sigma).sum()
    torch.testing.assert_close(omega, sigma**-2 / (sigma**-2).sum())
    best = (omega**2 * sigma**2).sum()
    random = torch.distributions.Dirichlet(torch.ones(3)).sample((2000,))
    assert ((random**2 * sigma**2).sum(-1) >= best).all()


@pytest.mark.parametrize("num_rewards", [2, 3, 5])
def test_clipped_shares_sum_to_one_and_keep_bounds_and_order(num_rewards):
    torch.manual_seed(0)
    shares = torch.distributions.Dirichlet(torch.full((num_rewards,), 0.3)).sample((5000,)).double()
    clipped = clip_shares(shares)
    torch.testing.assert_close(clipped.sum(-1), torch.ones(5000, dtype=torch.float64))
    assert clipped.min() >= 1 / 3 / num_rewards - 1e-9
    assert clipped.max() <= min(3 / num_rewards, 1) + 1e-9
    order = shares.argsort(-1)
    assert (clipped.gather(-1, order).diff(dim=-1) >= -1e-9).all()
    inside = torch.tensor([[0.4, 0.6]])
    torch.testing.assert_close(clip_shares(inside), inside)


def test_a_saturated_reward_does_not_take_everything():
    statistics = FedRewards(1, 2, "inverse_variance")
    feed(statistics, 50, scale=(1.0, 0.0))
    shares = statistics.shares()[0]
    torch.testing.assert_close(shares[1], torch.full((NUM_BINS,), 5 / 6, dtype=torch.float64))


def test_equal_shares_until_a_bin_is_known():
    statistics = FedRewards(1, 2, "inverse_variance")
    shares, tau = statistics.lookup(torch.tensor([0.1, 0.9]))
    assert shares.shape == (1, 2, 2) and torch.equal(shares, torch.full((1, 2, 2), 0.5))
    assert tau.abs().max() == 0
    t = torch.full((MIN_SAMPLES - 1,), 0.05)
    statistics.observe(t, torch.randn(len(t), 2) * torch.tensor([1.0, 0.5]), torch.ones(len(t), 2))
    statistics.update()
    assert torch.equal(statistics.lookup(torch.tensor([0.05]))[0], torch.full((1, 1, 2), 0.5))
    statistics.observe(t, torch.randn(len(t), 2) * torch.tensor([1.0, 0.5]), torch.ones(len(t), 2))
    statistics.update()
    assert not torch.equal(statistics.lookup(torch.tensor([0.05]))[0], torch.full((1, 1, 2), 0.5))


def test_lookup_gives_each_sample_its_bin_and_layer():
    statistics = FedRewards(2, 2, "inverse_variance")
    squares = torch.tensor([[1.0, 9.0]]).expand(4000, 2)
    rewards = [torch.randn(4000, 2) * torch.tensor(scale) for scale in ((1.0, 1.0), (1.0, 0.5))]
    statistics.observe(torch.full((4000,), 0.25), rewards[0], squares, rewards[1], squares)
    statistics.update()
    shares, tau = statistics.lookup(torch.tensor([0.25, 0.75]))
    assert shares.shape == tau.shape == (2, 2, 2)
    torch.testing.assert_close(shares[1, 0], torch.tensor([1 / 3, 2 / 3]), atol=0.02, rtol=0)
    torch.testing.assert_close(shares[:, 1], torch.full((2, 2), 0.5))
    torch.testing.assert_close(tau[0, 0], torch.tensor([0.1, 0.3]))


def test_tau_keeps_its_floor():
    statistics = FedRewards(1, 1, "equal")
    for step in range(FLOOR_STEP + 500):
        size = 1.0 if step < FLOOR_STEP else 0.0
        statistics.observe(torch.tensor([0.5]), torch.zeros(1, 1), torch.tensor([[size]]))
        statistics.update()
    assert statistics.tau()[0, 0, 5].item() == pytest.approx(0.1)
    usual = statistics.state["gradient"][0, 0, 5] / statistics.state["gradient_mass"][5]
    assert usual < 0.99


def test_micro_batches_and_processes_do_not_change_the_result():
    torch.manual_seed(0)
    whole = FedRewards(1, 2, "inverse_variance")
    ranks = [FedRewards(1, 2, "inverse_variance") for _ in range(2)]
    for _ in range(20):
        t, rewards, squares = torch.rand(32), torch.randn(32, 2), torch.rand(32, 2)
        whole.observe(t, rewards, squares)
        whole.update()
        for rank, statistics in enumerate(ranks):
            for micro in range(2):
                part = slice(rank * 16 + micro * 8, rank * 16 + micro * 8 + 8)
                statistics.observe(t[part], rewards[part], squares[part])
        sums = sum(s.sums.sums for s in ranks).clone()
        for statistics in ranks:
            statistics.update(lambda tensor, sums=sums: sums)
    for statistics in ranks:
        for name, tensor in whole.state.items():
            torch.testing.assert_close(statistics.state[name], tensor)


@pytest.mark.parametrize("kind", [lambda: FedRewards(1, 2, "equal"), lambda: FedGate(100)])
def test_sums_that_are_collected_before_the_optimizer_are_those_of_the_step(kind):
    """What is observed after the copy has begun belongs to the next step; sums of several processes need one reduction."""
    plain, collected = kind(), kind()
    t, values = torch.tensor([0.1, 0.12, 0.9]), torch.tensor([[0.3, 0.5], [0.2, 0.1], [0.4, 0.2]])

    def observe(statistics):
        statistics.observe(t, *((values, values) if isinstance(statistics, FedRewards) else values.mT))

    for statistics in (plain, collected):
        observe(statistics)
    collected.collect(lambda sums: 2 * sums)
    observe(collected)
    collected.update(lambda sums: 3 * sums)
    plain.update(lambda sums: 2 * sums)
    for name, tensor in plain.state.items():
        assert torch.equal(tensor, collected.state[name]), name
    collected.collect()
    with pytest.raises(ValueError, match="`collect` was called without `all_reduce`"):
        collected.update(lambda sums: sums)


def test_a_bin_with_a_sample_that_is_not_finite_rests_for_a_step():
    clean, spoilt = (FedRewards(1, 2, "inverse_variance") for _ in range(2))
    t, rewards, squares = torch.rand(400), torch.randn(400, 2), torch.rand(400, 2)
    t[:2] = torch.tensor([0.35, 0.55])
    rest = (timestep_bins(t) != 3) & (timestep_bins(t) != 5)
    clean.observe(t[rest], rewards[rest], squares[rest])
    rewards[0, 1], squares[1, 0] = float("nan"), float("inf")
    spoilt.observe(t, rewards, squares)
    for statistics in (clean, spoilt):
        statistics.update()
    for name, tensor in clean.state.items():
        torch.testing.assert_close(spoilt.state[name], tensor)


def test_state_round_trip_goes_on_bit_equal():
    a = FedRewards(1, 2, "inverse_variance")
    feed(a, 30)
    b = FedRewards(1, 2, "inverse_variance")
    b.load_state_dict({name: tensor.clone() for name, tensor in a.state_dict().items()})
    feed(a, 10, seed=1)
    feed(b, 10, seed=1)
    assert b.step == 40
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def test_summary_and_fixed_shares():
    statistics = FedRewards(1, 2, parse_reward_weighting("3,1", ("a", "b")))
    feed(statistics, 200)
    sigma, omega, shares = statistics.summary()
    assert shares.tolist() == pytest.approx([0.75, 0.25])
    assert sigma.tolist() == pytest.approx([1.0, 0.1], rel=0.2)
    assert omega.sum().item() == pytest.approx(1.0)
    assert (omega[0] / omega[1]).item() == pytest.approx(3 * sigma[1] / sigma[0])


def test_parse_reward_weighting():
    two = ("a", "b")
    # Shares by default are those of VRPO's own rewards; of others, nothing is known.
    assert parse_reward_weighting("auto", ("fidelity", "semantic", "structural")) == (0, 2 / 3, 1 / 3)
    assert parse_reward_weighting("auto", ("semantic", "structural")) == "equal"
    assert [parse_reward_weighting(name, two) for name in WEIGHTINGS] == ["equal", *WEIGHTINGS[1:]]
    assert parse_reward_weighting("1,0", two) == (1.0, 0.0)
    for wrong in ("inverse", "1", "1,2,3", "-1,2", "0,0", "nan,1"):
        with pytest.raises(InputError, match="`reward_weighting`"):
            parse_reward_weighting(wrong, two)


def feed_gate(gate, steps, mean, spread=0.1, batch=100, seed=0):
    """`mean` is the cosines' mean in each bin; every bin gets its samples in every step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        t = (torch.arange(batch) + 0.5) / batch
        noise = spread * torch.randn(batch, generator=generator)
        gate.observe(t, torch.tensor(mean).repeat_interleave(batch // NUM_BINS) + noise)
        gate.update()


def gate_of(max_train_steps: int) -> FedGate:
    """A gate that may close from the first step on."""
    return FedGate(max_train_steps, warmup=0)


CONFLICT_IN_THREE = [-0.1, -0.1, -0.1] + [0.1] * 7


def test_gate_averages_by_hand():
    gate = gate_of(1000)
    t = torch.tensor([0.05, 0.05, 0.95])
    gate.observe(t, torch.tensor([0.2, 0.4, -1.0]))
    gate.update()
    torch.testing.assert_close(gate.cosine()[[0, 5, 9]], torch.tensor([0.3, 0.0, -1.0], dtype=torch.float64))
    gate.observe(t[:2], torch.tensor([-0.1, -0.1]))
    gate.update()
    # (0.999 * 0.3 - 0.1) / (0.999 + 1) and the same of the squares 0.1 and 0.01.
    m, q = (COSINE_DECAY * 0.3 - 0.1) / (COSINE_DECAY + 1), (COSINE_DECAY * 0.1 + 0.01) / (COSINE_DECAY + 1)
    assert gate.cosine()[0].item() == pytest.approx(m)
    assert gate.upper_bound()[0] == float("inf")
    assert gate.state["count"].tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    # The bound, by hand: with as many steps as it takes to count, and with more than 1999.
    for count, steps in ((MIN_SAMPLES, MIN_SAMPLES), (5000, COSINE_STEPS)):
        gate.state["count"][0] = count
        for name, value in (("mean", m), ("square", q)):
            gate.state[name][0] = value * (1 - COSINE_DECAY**count)
        assert gate.upper_bound()[0].item() == pytest.approx(m + 1.645 * math.sqrt((q - m * m) / steps))


def test_ratio_averages_by_hand():
    gate = FedGate(1000, warmup=3)
    t = torch.tensor([0.05, 0.05, 0.95, 0.95])
    gate.observe(t, torch.full((4,), 0.1), torch.tensor([2.0, 4.0, float("inf"), 1.0]))
    gate.update()
    assert gate.ratio()[0].item() == pytest.approx(3) and gate.ratio()[1:].abs().max() == 0
    gate.observe(t[:1], torch.tensor([0.1]), torch.tensor([1.0]))
    gate.update()
    average = (COSINE_DECAY * 3 + 1) / (COSINE_DECAY + 1)
    assert gate.ratio()[0].item() == pytest.approx(average)
    found = gate.summary()
    assert found["gradient_ratio/0.0-0.1"] == pytest.approx(average) and "gradient_ratio/0.9-1.0" not in found
    # The averages of the ratio start again with those of the cosine, and a checkpoint without them goes on.
    old = {name: tensor.clone() for name, tensor in gate.state_dict().items() if not name.startswith("ratio")}
    again = FedGate(1000, warmup=3)
    again.load_state_dict(old)
    assert again.step == 2 and torch.equal(again.cosine(), gate.cosine()) and not again.ratio().any()
    gate.update()
    assert not gate.ratio().any()


def test_gate_leaves_out_zeros_and_bins_that_are_not_finite():
    clean, spoilt = gate_of(1000), gate_of(1000)
    cosine = torch.tensor([0.0, 0.3, -0.2, 0.0, float("nan"), 0.1, float("inf")])
    ratio = torch.tensor([0.0, 2.0, 4.0, 0.0, 1.0, 3.0, float("nan")])
    t = torch.tensor([0.15, 0.15, 0.15, 0.55, 0.75, 0.75, 0.95])
    clean.observe(t[1:3], cosine[1:3], ratio[1:3])
    # Where no cosine is known, the ratio may be.
    clean.observe(t[4:6], torch.zeros(2), ratio[4:6])
    spoilt.observe(t, cosine, ratio)
    for gate in (clean, spoilt):
        gate.update()
    assert clean.state["count"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert clean.state["ratio_count"].tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    for name, tensor in clean.state.items():
        assert torch.equal(spoilt.state[name], tensor), name


def test_gate_closes_exactly_the_conflicting_bins_within_the_window():
    gate = gate_of(2000)
    assert gate.window == 40
    first = MIN_SAMPLES + gate.window - 1  # the bound counts from the 32nd step on and is below 0 for 40
    feed_gate(gate, first - 1, CONFLICT_IN_THREE)
    assert torch.equal(gate.gates(), torch.ones(NUM_BINS, dtype=torch.float64))
    for behind in range(1, gate.window + 1):
        feed_gate(gate, 1, CONFLICT_IN_THREE, seed=behind)
        expected = torch.ones(NUM_BINS, dtype=torch.float64)
        expected[:3] = 1 - behind / gate.window
        torch.testing.assert_close(gate.gates(), expected, atol=1e-12, rtol=0)
    assert gate.lookup(torch.tensor([0.0, 0.15, 0.29, 0.31, 1.0])).tolist() == [0, 0, 0, 1, 1]
    assert gate.lookup(torch.tensor([0.0])).dtype == torch.float32
    gate.observe(torch.tensor([0.5]), torch.tensor([-1.0]))
    assert gate.cosine()[5] > 0  # what this step saw counts from the next on
    assert not gate.closed() and gate.steps_until_closed() == float("inf")


def test_gate_never_reopens_and_tells_when_it_will_have_closed():
    gate = gate_of(2000)
    feed_gate(gate, MIN_SAMPLES + gate.window + 10, [-0.1] * NUM_BINS)
    left = gate.steps_until_closed()
    assert 0 < left < gate.window
    previous = gate.gates()
    for step in range(left):
        assert not gate.closed()
        # The conflict is over, which changes nothing.
        feed_gate(gate, 1, [0.9] * NUM_BINS, seed=step)
        assert (gate.gates() < previous).all()
        previous = gate.gates()
    assert gate.closed() and gate.steps_until_closed() == 0 and previous.abs().max() == 0
    feed_gate(gate, 100, [0.9] * NUM_BINS)
    assert gate.closed()


def test_gate_wants_the_bound_below_zero_without_a_break():
    gate = gate_of(5000)
    feed_gate(gate, 131, [-0.01] * NUM_BINS, spread=0.0)
    assert gate.state["row"].unique().tolist() == [gate.window]
    gate = gate_of(5000)
    feed_gate(gate, 130, [-0.01] * NUM_BINS, spread=0.0)
    feed_gate(gate, 1, [2.0] * NUM_BINS, spread=0.0)
    feed_gate(gate, 50, [-0.001] * NUM_BINS, spread=0.0)
    assert gate.state["row"].abs().max() == 0 and (gate.gates() == 1).all()
    # A mean below 0 that is not certain leaves the gate open.
    gate = gate_of(2000)
    feed_gate(gate, 300, [-0.001] * NUM_BINS, spread=0.5)
    assert (gate.gates() == 1).all()


def test_bins_without_samples_do_not_keep_alignment_on():
    gate = gate_of(1000)
    assert not gate.closed()
    for _ in range(200):
        gate.observe(torch.tensor([0.25, 0.75]), torch.tensor([-0.5, -0.4]))
        gate.update()
    assert gate.closed()
    assert gate.gates().tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1]


def test_gate_state_round_trip_goes_on_bit_equal():
    a = gate_of(2000)
    feed_gate(a, 90, CONFLICT_IN_THREE)
    b = gate_of(2000)
    b.load_state_dict({name: tensor.clone() for name, tensor in a.state_dict().items()})
    assert 0 < a.gates()[0] < 1
    for gate in (a, b):
        feed_gate(gate, 10, [-0.2] * NUM_BINS, seed=1)
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    # A run that is made longer, or shorter, keeps its gates at most where they were.
    for steps in (300, 1111, 70000):
        b = gate_of(steps)
        b.load_state_dict(a.state_dict())
        assert torch.equal(b.state["closing"], b.state["closing"].round())
        assert (b.gates() <= a.gates()).all() and (b.gates() >= (a.gates() - 1 / b.window).clamp_min(0) - 1e-12).all()


def test_gate_does_not_depend_on_micro_batches_and_processes():
    generator = torch.Generator().manual_seed(0)
    whole, halves = gate_of(2000), [gate_of(2000) for _ in range(2)]
    for _ in range(100):
        t = torch.rand(64, generator=generator)
        cosine = 0.1 * torch.randn(64, generator=generator) + torch.where(t < 0.3, -0.1, 0.1)
        ratio = 10 * torch.rand(64, generator=generator)
        whole.observe(t, cosine, ratio)
        whole.update()
        for rank, gate in enumerate(halves):
            for micro in range(2):
                part = slice(rank * 32 + micro * 16, rank * 32 + micro * 16 + 16)
                gate.observe(t[part], cosine[part], ratio[part])
        sums = sum(gate.sums.sums for gate in halves).clone()
        for gate in halves:
            gate.update(lambda tensor, sums=sums: sums)
    assert 0 < whole.gates()[0] < 1
    for gate in halves:
        for name, tensor in whole.state.items():
            torch.testing.assert_close(gate.state[name], tensor, atol=1e-12, rtol=1e-12)


def test_the_conflict_of_a_fresh_model_closes_nothing():
    gate = FedGate(2000)
    assert gate.warmup == 200 and FedGate(400_000).warmup == 1000
    feed_gate(gate, 150, [-0.5] * NUM_BINS)
    assert gate.cosine().max() < -0.3  # measured and logged, but no evidence
    feed_gate(gate, 250, [0.01] * NUM_BINS, spread=0.01)
    assert (gate.gates() == 1).all() and (gate.cosine() > 0).all()
    # Nor does a resumed one forget where it is.
    again = FedGate(2000)
    again.load_state_dict(gate.state_dict())
    assert again.step == 400
    feed_gate(again, 1000, [-0.5] * NUM_BINS)
    assert again.closed()


def test_a_gate_that_does_not_act_measures_only():
    gate = FedGate(1000, acts=False, warmup=0)
    feed_gate(gate, 300, [-0.5] * NUM_BINS)
    assert (gate.gates() == 1).all() and not gate.closed()
    assert {name.split("/")[0] for name in gate.summary()} == {"cosine"}
    gate = gate_of(1000)
    feed_gate(gate, 300, CONFLICT_IN_THREE)
    names = set(gate.summary())
    # A closed bin has no alignment gradient left to compare.
    assert "gate/0.0-0.1" in names and "cosine/0.0-0.1" not in names and "cosine/0.9-1.0" in names
