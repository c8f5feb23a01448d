# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.

import numpy as np


def random_stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """The counter-based generator (Philox) of (seed, index, purpose); streams of different keys do not overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, index, 0]))
