# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Random draws as a function of (seed, index, stream), whichever process makes them and whenever it does."""

import numpy as np


# The one table of stream numbers. A new purpose gets a new number, so that old runs stay reproducible.
# A training example, by its global index (an epoch, for the order of its rows).
ORDER, SAMPLE, NOISE, POSTERIOR, TOKENS, ACTIONS, ROW_GROUPS, ROWS_OF_GROUP = range(8)
# A generated sample, by its index.
START, STEPS, LABEL = range(100, 103)
# A rollout of the generative policy, and what its guards look at.
CLASSES, ROLLOUT_NOISE, DRAWS, LOOK_NOISE, LOOK_REAL = range(200, 205)


def random_stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """The counter-based generator (Philox) of (seed, index, stream); generators of different keys do not overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, index, 0]))
