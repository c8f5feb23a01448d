# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Random draws as a function of (seed, index, stream), independent of the process and the time."""

import numpy as np


# The one table of stream numbers. A new purpose gets a new number, so that old runs stay reproducible.
# Streams of training examples, by global index (for the order of the rows: by epoch).
ORDER, SAMPLE, NOISE, POSTERIOR, TOKENS, ACTIONS, ROW_GROUPS, ROWS_OF_GROUP = range(8)
# Streams of generated samples, by index.
START, STEPS, LABEL = range(100, 103)
# Streams of the rollouts and the guards of the generative policy.
CLASSES, ROLLOUT_NOISE, DRAWS, LOOK_NOISE, LOOK_REAL = range(200, 205)


def random_stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """The counter-based generator (Philox) of (seed, index, stream); generators of different keys do not overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, index, 0]))
