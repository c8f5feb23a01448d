# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The random draws of training examples, version 2: functions of (seed, index), with the right distributions."""

import tracemalloc

import numpy as np
import pytest

from diffusers_vrpo.data.samples import SampleStreams
from diffusers_vrpo.random_streams import (
    permutation_keys,
    permuted,
    random_normals,
    random_subsets,
    random_uniforms,
    random_words,
)


INDICES = [7, 8, 9, 3, 4, 100_000_000_000, 0]


@pytest.mark.parametrize("shape", [(4, 32, 32), (3, 5, 7), (1,), (130_001,)])
def test_noise_is_a_function_of_seed_and_index(shape):
    """Alone, in a batch, in another order, and at any place of the vector instructions, to the bit."""
    batch = random_normals(5, INDICES, 302, shape)
    assert batch.shape == (len(INDICES), *shape) and batch.dtype == np.float32 and batch.flags.c_contiguous
    for index, noise in zip(INDICES, batch):
        assert np.array_equal(random_normals(5, [index], 302, shape)[0], noise)
    assert np.array_equal(random_normals(5, INDICES[::-1], 302, shape), batch[::-1])
    for seed, stream in ((6, 302), (5, 303)):
        assert not np.array_equal(random_normals(seed, [7], stream, shape)[0], batch[0])


def test_words_are_those_of_the_generator():
    """Their values are fixed for good: a change would change runs."""
    words = random_words(5, [2**40, 2**40 + 1], 301, 5)
    generator = np.random.Philox(key=[5, 301], counter=[2 * 2**40, 0, 0, 0])
    assert words.shape == (2, 8) and np.array_equal(words.ravel(), generator.random_raw(16))
    assert random_uniforms(0, [0], 301, 1)[0, 0] == pytest.approx(0.4839476, abs=1e-7)
    assert random_normals(0, [0], 302, (2,))[0] == pytest.approx([0.66021, 0.16052], abs=1e-4)
    assert random_subsets(0, [0], 304, 4, 1000).tolist() == [[718, 573, 671, 557]]
    assert permuted(np.arange(6), 10**7, permutation_keys(0, 0, 300)).tolist() == [
        8818436,
        9357353,
        1250081,
        8116478,
        185844,
        4878999,
    ]


def test_normal_numbers_are_normal():
    noise = random_normals(1, list(range(2000)), 302, (500,)).astype(np.float64)
    number = noise.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean() - moment) < 4.5 * (variance / number) ** 0.5
    # Shares beyond thresholds, in both tails.
    for threshold, share in ((1, 0.158655), (3, 0.0013499), (4, 3.1671e-5)):
        for tail in (noise > threshold, noise < -threshold):
            assert abs(tail.sum() - share * number) < 4.5 * (share * number) ** 0.5
    assert np.abs(noise).max() < 6.7
    # Neighbours in a sample, the two numbers of a pair, and neighbouring samples are independent.
    for a, b in ((noise[:, 1:], noise[:, :-1]), (noise[:, :250], noise[:, 250:]), (noise[1:], noise[:-1])):
        for f in (lambda x: x, np.square):
            assert abs(np.corrcoef(f(a).ravel(), f(b).ravel())[0, 1]) < 4.5 / a.size**0.5


@pytest.mark.parametrize("total", [65, 100, 4096])
def test_subsets_are_uniform(total):
    subsets = random_subsets(2, list(range(4000)), 304, 64, total)
    assert subsets.shape == (4000, 64) and all(len(set(row)) == 64 for row in subsets.tolist())
    assert subsets.min() >= 0 and subsets.max() < total
    counts = np.bincount(subsets.ravel(), minlength=total)
    share = 64 / total
    chi_square = ((counts - 4000 * share) ** 2).sum() / (4000 * share * (1 - share))
    assert abs(chi_square - total) < 5 * (2 * total) ** 0.5
    # A pair of tokens is as frequent as any other.
    together = np.logical_and((subsets == 3).any(1), (subsets == 60).any(1)).mean()
    expected = share * 63 / (total - 1)
    assert abs(together - expected) < 5 * (expected / 4000) ** 0.5


def test_all_tokens_are_taken_where_they_are_few():
    assert random_subsets(0, [4, 9], 304, 16, 16).tolist() == [list(range(16))] * 2


def test_permutations_are_bijections():
    for total in [*range(1, 201), 1000, 4097, 65_536, 1_281_167]:
        order = permuted(np.arange(total), total, permutation_keys(3, 1, 300))
        assert np.array_equal(np.sort(order), np.arange(total)), total
    # A large one at a few places: no two numbers are the same, and none is outside.
    places = np.arange(0, 10**12, 10**7)
    order = permuted(places, 10**12, permutation_keys(3, 1, 300))
    assert len(np.unique(order)) == len(places) and order.min() >= 0 and order.max() < 10**12


@pytest.mark.parametrize("total", [2, 5, 24])
def test_permutations_are_uniform(total):
    """Over keys, each number is as often at each place as at any other, and so is each pair of numbers at two places."""
    tries = 1000
    orders = np.stack([permuted(np.arange(total), total, permutation_keys(0, i, 300)) for i in range(tries)])
    table = np.stack([np.bincount(column, minlength=total) for column in orders.T])
    chi_square = ((table - tries / total) ** 2).sum() / (tries / total)
    assert abs(chi_square - (total - 1) ** 2) < 5 * (2 * (total - 1) ** 2) ** 0.5 + 1
    ascending = (orders[:, 0] < orders[:, 1]).mean()
    assert abs(ascending - 0.5) < 5 * (0.25 / tries) ** 0.5
    fixed = (orders == np.arange(total)).sum(1).mean()
    assert abs(fixed - 1) < 5 / tries**0.5


def test_large_permutations_are_mixed():
    """Rows that follow each other, and the positions of an epoch, are not related to the numbers that they become."""
    total = 1_281_167
    order = permuted(np.arange(total), total, permutation_keys(0, 0, 300))
    other = permuted(np.arange(total), total, permutation_keys(0, 1, 300))
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / total**0.5
    assert abs(np.corrcoef(order, np.arange(total))[0, 1]) < 5 / total**0.5
    assert abs(np.corrcoef(order, other)[0, 1]) < 5 / total**0.5
    assert (order == other).sum() < 12 and (np.diff(order) == 1).sum() < 12
    # Sorted classes are mixed within the batches: of 1,000 classes, 256 rows have as many as independent ones would.
    classes = order[: 256 * 1000].reshape(1000, 256) * 1000 // total
    distinct = np.mean([len(np.unique(row)) for row in classes])
    assert abs(distinct - 1000 * (1 - (1 - 1 / 1000) ** 256)) < 1.5


def test_work_does_not_grow_with_rows_or_tokens():
    """Neither an order of all rows nor one of all tokens is made: allocations stay, whatever their number."""
    peaks = []
    for num_rows, num_tokens in ((1000, 1024), (10**9, 65_536)):
        samples = SampleStreams(num_rows, 0, (4, 8, 8), 10, sample_posterior=True, num_tokens=num_tokens)
        indices = list(range(num_rows // 2, num_rows // 2 + 64))
        tracemalloc.start()
        rows = samples.rows_of(indices)
        samples.drawn(indices, samples.uniforms(indices), rows % 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 4e6
