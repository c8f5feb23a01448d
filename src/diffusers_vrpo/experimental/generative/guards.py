# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Guards that stop the optimization of rewards when the model gets worse by other measures (docs/generative.md)."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class GuardValues:
    """Measurements of the averaged model at one step, always on the same images, noise and labels.

    Attributes:
        loss_fm: flow-matching loss on training images.
        recall: share of training images within the samples' manifold in the reward encoder's features, in [0, 1].
        reward: weighted mean of the current rewards of the samples.
        start_reward: weighted mean of the current rewards of the samples of the first measurement.
        distance: Fréchet distance of the samples in the reward encoder's features.
        held_out: Fréchet distance in the features of an encoder that no reward uses; NaN without such an encoder.
        drift: `mean (x0_hat - x0_hat of the first measurement)^2` on the training images.
    """

    loss_fm: float
    recall: float
    reward: float
    start_reward: float
    distance: float
    held_out: float
    drift: float

    @property
    def score(self) -> float:
        """The distance by which the best model is chosen: `held_out`, or `distance` if there is none; lower is better."""
        return self.distance if math.isnan(self.held_out) else self.held_out

    def values(self) -> dict[str, float]:
        """The measured values by their names in the log, without NaN."""
        return {f"guard/{name}": value for name, value in asdict(self).items() if not math.isnan(value)}


@dataclass(frozen=True)
class Limits:
    """The limits of the guards, relative to the first measurement.

    Attributes:
        loss_rise: largest rise of the flow-matching loss, as a share of its first value.
        recall_fall: largest fall of recall, absolute.
        distance_rise: largest rise of the held-out distance, as a share of its first value; it counts only if the reward has
            risen, too.
    """

    loss_rise: float = 0.02
    recall_fall: float = 0.03
    distance_rise: float = 0.02


def tripped_guard(first: GuardValues, now: GuardValues, limits: Limits) -> str | None:
    """Why the policy must stop, as the beginning of a sentence; None if no limit is exceeded.

    Args:
        first: the first measurement.
        now: the current one.
    """
    measured = [now.loss_fm, now.recall, now.reward, now.start_reward, now.distance]
    if not math.isnan(first.held_out):
        measured.append(now.held_out)
    if not all(map(math.isfinite, measured)):
        return "a measurement of the guards is not finite"
    if now.loss_fm > first.loss_fm * (1 + limits.loss_rise):
        return (
            f"the flow-matching loss on training images has risen by {100 * (now.loss_fm / first.loss_fm - 1):.1f} % "
            f"(from {first.loss_fm:.4g} to {now.loss_fm:.4g}; `guard_loss_rise` {limits.loss_rise:g})"
        )
    if now.recall < first.recall - limits.recall_fall:
        return f"recall has fallen from {first.recall:.3f} to {now.recall:.3f} (`guard_recall_fall` {limits.recall_fall:g})"
    if now.held_out > first.held_out * (1 + limits.distance_rise) and now.reward > now.start_reward:
        return (
            f"the distance to training images in features that no reward sees has risen by "
            f"{100 * (now.held_out / first.held_out - 1):.1f} % (from {first.held_out:.4g} to {now.held_out:.4g}) while the "
            f"reward has risen, too (`guard_distance_rise` {limits.distance_rise:g})"
        )
    return None
