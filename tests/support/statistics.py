# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Statistics of alignment with sums of their own, as an objective would feed them."""

import torch

from diffusers_vrpo.alignment.host_copy import DeviceSums
from diffusers_vrpo.alignment.plateau import Plateau
from diffusers_vrpo.alignment.release import ConflictGate
from diffusers_vrpo.alignment.reward_statistics import NUM_BINS, RewardStatistics, timestep_bins


class Fed:
    """Statistics and their sums: `observe` adds a micro-batch, `update` takes an optimizer step; all else is the statistics'."""

    def __init__(self, statistics):
        self.statistics = statistics
        self.sums = DeviceSums(1 + statistics.num_measures, NUM_BINS)

    def __getattr__(self, name: str):
        return getattr(self.statistics, name)

    def _add(self, t: torch.Tensor, *measures: torch.Tensor):
        self.sums.add(timestep_bins(t), [torch.ones(1, len(t)), *(each.float() for each in measures)])

    def collect(self, all_reduce=None):
        self.sums.collect(all_reduce)

    def update(self, all_reduce=None):
        sums = self.sums.read(all_reduce)
        self.statistics.update(sums[0, 0], sums[:, 1:])


class FedRewards(Fed):
    def __init__(self, *arguments):
        super().__init__(RewardStatistics(*arguments))

    def observe(self, t, *rewards_and_squares):
        """Rewards and squared gradients of each layer in turn, `[B,K]`."""
        self._add(t, torch.cat(rewards_and_squares, dim=1).mT)


class FedGate(Fed):
    def __init__(self, *arguments, **named):
        super().__init__(ConflictGate(*arguments, **named))

    def observe(self, t, cosine, ratio=None):
        self._add(
            t, *self.statistics.measures(torch.stack([cosine, torch.zeros_like(cosine) if ratio is None else ratio]))
        )


class FedPlateau(Fed):
    def __init__(self, *arguments):
        super().__init__(Plateau(*arguments))

    def observe(self, *distances):
        """Of each projector, `[B]`, at timesteps of all bins in turn."""
        t = torch.arange(len(distances[0])) % NUM_BINS / NUM_BINS + 0.05
        self._add(t, torch.stack(distances))
