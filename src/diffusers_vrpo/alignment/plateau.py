# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The end of alignment where the distance to the targets has stopped falling (docs/method.md).

Of the quantities that were compared with the benefit of alignment, this distance follows it best; the cosine between the
gradients does not (RARE, arXiv 2609.34732).
"""

import math

import torch

from .host_copy import finite_bins


FAST_RATE, SLOW_RATE = 1e-3, 5e-5  # of the averages, 1 - 0.999 and 1 - 0.99995, in long runs
FAST_SHARE, SLOW_SHARE = 0.01, 0.1  # of the training that the averages look back on at most, in short runs
SMALLEST_FALL = 0.02  # of the fast average below the slow one, relative to that


class Plateau:
    """Fades out alignment once the distance to the targets has stopped falling.

    `eta = mean (1 - <mu, y>) / 2` over all tokens, samples and projectors of a step has a fast and a slow average, both divided
    by their mass, so that they are unbiased from the first step on. After an eighth of the training, and when `(slow - fast) /
    slow` is below 2 %, the weight of alignment follows a cosine from 1 to 0 over another eighth, and never rises again.

    The averages move by 0.001 and 0.00005 a step, but look back on a hundredth and a tenth of the training at most. As in
    [`ConflictGate`], step k uses the statistics through step k-1, whose sums enter once per optimizer step.

    Args:
        max_train_steps (`int`): optimizer steps of the training.
        num_projectors (`int`): each of them has a distance.
    """

    acts = True

    def __init__(self, max_train_steps: int, num_projectors: int = 1):
        self.num_measures = num_projectors
        self.start = self.window = max(1, max_train_steps // 8)
        rates = [
            min(1.0, max(rate, 1 / (share * max_train_steps)))
            for rate, share in ((FAST_RATE, FAST_SHARE), (SLOW_RATE, SLOW_SHARE))
        ]
        self.rates = torch.tensor(rates, dtype=torch.float64)
        self.step = 0
        # The averages, fast and slow, and their masses; steps completed on the way from 1 to 0.
        shapes = {"average": (2,), "mass": (2,), "closing": ()}
        self.state = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def update(self, count: torch.Tensor, sums: torch.Tensor):
        """Moves averages and weight by the sums of an optimizer step. Bins in which a distance is not finite do not count.

        Args:
            count: samples in each bin, `[bins]`.
            sums: of the token mean of eta, and of its square, for each projector, `[2, projectors, bins]`.
        """
        counts, distances = finite_bins(torch.stack([count.expand_as(sums[0]), sums[0]])).sum((1, 2))
        rates = self.rates * (counts > 0)
        self.state["average"].lerp_((distances / counts.clamp_min(1)).expand(2), rates)
        self.state["mass"].lerp_(torch.ones_like(rates), rates)
        self.step += 1
        if self.step >= self.start:
            fast, slow = self.distances()
            closes = (slow - fast < SMALLEST_FALL * slow) | (self.state["closing"] > 0)
            self.state["closing"].add_(closes).clamp_(max=self.window)

    def distances(self) -> torch.Tensor:
        """The fast and the slow average of eta, `[2]`; 0 without samples."""
        return self.state["average"] / self.state["mass"].clamp_min(1e-30)

    def weight(self) -> torch.Tensor:
        """The weight of alignment, from 1 to 0, a float32 scalar on the host."""
        return (0.5 * (1 + torch.cos(self.state["closing"] * (math.pi / self.window)))).float()

    def steps_until_closed(self) -> float:
        """Steps until the weight is 0; infinite while the way there has not begun."""
        closing = int(self.state["closing"])
        return self.window - closing if closing > 0 else float("inf")

    def summary(self) -> dict[str, float]:
        """For the log: both averages and the weight."""
        fast, slow = self.distances().tolist()
        return {"alignment_distance": fast, "alignment_distance_slow": slow, "alignment_weight": self.weight().item()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        numbers = {"window": self.window, "step": self.step}
        return {**self.state, **{name: torch.tensor(x) for name, x in numbers.items()}}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]):
        self.step = int(state_dict["step"])
        for name, tensor in self.state.items():
            tensor.copy_(state_dict[name])
        # A run of another length fades over another time; the weight must not rise.
        self.state["closing"].mul_(self.window / int(state_dict["window"])).ceil_().clamp_(max=self.window)
