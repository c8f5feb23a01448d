# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Random draws as a function of (seed, index, stream), independent of the process and the time.

The draws for training examples have a version, which a run keeps from its first to its last step. Version 1 makes a
generator for each example and purpose, and draws whole permutations. Version 2 reads the words of a whole batch at
once, and its work does not grow with the number of rows or tokens.
"""

import math

import numpy as np


STREAM_VERSIONS = (1, 2)
NEWEST_STREAMS = 2

# The one table of stream numbers. A new purpose gets a new number, so that old runs stay reproducible.
# Streams of training examples, indexed by the global example index (the order of the rows: by the epoch).
ORDER, SAMPLE, NOISE, POSTERIOR, TOKENS, ACTIONS, ROW_GROUPS, ROWS_OF_GROUP = range(8)
# Streams of generated samples, indexed by the number of the sample.
START, STEPS, LABEL = range(100, 103)
# Streams of the rollouts and the guards of the generative policy.
CLASSES, ROLLOUT_NOISE, DRAWS, LOOK_NOISE, LOOK_REAL = range(200, 205)
# Streams of training examples in version 2, indexed by the global example index (the keys of the order: by the epoch).
ORDER_KEYS_2, SAMPLE_2, NOISE_2, POSTERIOR_2, TOKENS_2 = range(300, 305)

# Philox generates four words for each value of its counter.
WORDS_OF_A_BLOCK = 4
# Pairs of normal numbers that are computed together, so that they stay in the processor's cache.
PAIRS_AT_ONCE = 2**15
ROUNDS_OF_A_PERMUTATION = 8


def random_stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """The counter-based generator (Philox) for (seed, index, stream); those of different triples do not overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, index, 0]))


# ----------------------------------------------------------------------------------------------------------------------
# Version 2: many indices at once


def random_words(seed: int, indices: list[int], stream: int, count: int) -> np.ndarray:
    """Uniform 64-bit words for each index, uint64 `[B, W]`, where W is `count` rounded up to a multiple of 4.

    The words of index i start at the counter `i W / 4`, so that consecutive indices, as in a batch, take a single
    read.
    """
    blocks = -(-count // WORDS_OF_A_BLOCK)
    words = np.empty((len(indices), blocks * WORDS_OF_A_BLOCK), dtype=np.uint64)
    start = 0
    for end in range(1, len(indices) + 1):
        if end < len(indices) and indices[end] == indices[end - 1] + 1:
            continue
        generator = np.random.Philox(key=[seed, stream], counter=indices[start] * blocks)
        words[start:end] = generator.random_raw((end - start) * words.shape[1]).reshape(end - start, -1)
        start = end
    return words


def random_uniforms(seed: int, indices: list[int], stream: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for each index, float64 `[B, count]`."""
    return (random_words(seed, indices, stream, count)[:, :count] >> 11) * 2.0**-53


def random_normals(seed: int, indices: list[int], stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers for each index, float32 `[B, *shape]`, by the Box-Muller transform.

    Their absolute values are below 6.7. The numbers of an index do not depend on the other indices. The last bit may
    differ between processors for which NumPy has different code for `log`, `cos` and `sin`.
    """
    count = math.prod(shape)
    words = random_words(seed, indices, stream, -(-count // 2))
    pairs = words.shape[1]
    # The first half of an index's words gives the radii of its pairs, the second half the angles.
    halves = words.view("<i4").reshape(len(indices), 2, pairs)
    normals = np.empty((len(indices), 2, pairs), dtype=np.float32)
    step = max(1, PAIRS_AT_ONCE // pairs)
    for start in range(0, len(indices), step):
        part, out = halves[start : start + step], normals[start : start + step]
        # sqrt(-2 log((w + 1/2) / 2**31)) of the 31 bits w; float32 may round the largest quotient to just above 1.
        radius = (part[:, 0] & 0x7FFFFFFF).astype(np.float32)
        radius += 0.5
        np.log(radius, out=radius)
        np.subtract(np.float32(31 * math.log(2)), radius, out=radius)
        np.maximum(radius, 0, out=radius)
        radius *= 2
        np.sqrt(radius, out=radius)
        angle = part[:, 1].astype(np.float32)
        angle *= np.float32(math.pi / 2**31)
        np.cos(angle, out=out[:, 0])
        np.sin(angle, out=out[:, 1])
        out *= radius[:, None]
    return np.ascontiguousarray(normals.reshape(len(indices), -1)[:, :count]).reshape(len(indices), *shape)


def random_subsets(seed: int, indices: list[int], stream: int, size: int, total: int) -> np.ndarray:
    """A random subset of `range(total)` for each index, int64 `[B, size]`, by Floyd's method; all numbers if `size` is `total`.

    Every subset is as likely as any other; the order within one is not random. The work does not depend on `total`.
    """
    if size == total:
        return np.broadcast_to(np.arange(total), (len(indices), total)).copy()
    newest = np.arange(total - size, total)
    candidates = (random_uniforms(seed, indices, stream, size) * (newest + 1)).astype(np.int64).tolist()
    subsets = []
    for row in candidates:
        chosen: dict[int, None] = {}
        for last, candidate in zip(newest.tolist(), row):
            chosen[last if candidate in chosen else candidate] = None
        subsets.append(list(chosen))
    return np.array(subsets, dtype=np.int64)


def permutation_keys(seed: int, index: int, stream: int) -> np.ndarray:
    """The keys of `permuted` for (seed, index, stream), uint64 `[8]`."""
    return random_words(seed, [index], stream, ROUNDS_OF_A_PERMUTATION)[0]


def permuted(positions: np.ndarray, total: int, keys: np.ndarray) -> np.ndarray:
    """The numbers at some positions of a random permutation of `range(total)`, int64 `[B]`; the rest is not computed.

    A generalised Feistel network (Black and Rogaway 2002) permutes the numbers below `a b` as pairs of numbers below a
    and b, where a is the square root of `total` and b is `total / a`, both rounded up. A result that is not below
    `total` is permuted again until it is.

    Args:
        positions: int64 `[B]`, below `total`.
        keys: the keys of the permutation, from `permutation_keys`.
    """
    lefts = math.isqrt(total - 1) + 1
    rights = -(-total // lefts)
    a, b = np.uint64(lefts), np.uint64(rights)
    numbers = positions.astype(np.uint64)
    outside = np.arange(len(numbers))
    while len(outside):
        left, right = np.divmod(numbers[outside], b)
        for first, second in zip(keys[::2], keys[1::2]):
            left = (left + scrambled(right, first) % a) % a
            right = (right + scrambled(left, second) % b) % b
        numbers[outside] = left * b + right
        outside = outside[numbers[outside] >= total]
    return numbers.astype(np.int64)


def scrambled(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of 64-bit numbers and a key: the finaliser of SplitMix64 (Steele, Lea and Flood 2014); uint64 `[B]`."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
