# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The end of alignment: at a given step, once the gate has closed in all timestep bins, or at a plateau of the distance."""

import math

import torch

from .host_copy import finite_bins
from .reward_statistics import MIN_SAMPLES, NUM_BINS, timestep_bins


RELEASES = ("none", "stop", "gate", "plateau")
COSINE_DECAY = 0.999  # of the cosine's averages, per optimizer step in which the bin has samples
COSINE_STEPS = 1999  # independent steps that such an average is worth: (1 + decay) / (1 - decay)


class ConflictGate:
    """Closes alignment in the timestep bins where its gradient has turned against flow matching's (docs/method.md).

    Per bin, m and q are averages of the cosine between the two gradients and of its square, both divided by
    `1 - decay^count` as Adam's, so that they are unbiased from the first step on. Where the upper bound
    `m + 1.645 sqrt((q - m^2) / min(count, 1999))` stays below 0 for `window` steps in a row, the gate falls from 1 to 0
    over as many steps, and never rises again. (HASTE, arXiv 2505.16792, stops alignment for the same reason.) The variance
    is that of single samples, although a step averages several; so with many samples per step the gate closes rather too late.

    Choices of ours: the bound of a bin counts once the bin had samples in `MIN_SAMPLES` steps. In a step without samples a bin
    keeps its bound and its count of steps in a row. A bin that never had samples keeps gate 1, but does not count for
    `closed`. The averages start again after the first 10 % of the training (1,000 steps at most), and before that nothing
    closes: the gradients of a fresh model oppose each other for a while and then no longer do.
    Step k uses the statistics through step k-1. The sums of a step (host_copy.py) enter once per optimizer step, as in
    `RewardStatistics`. Everything is float64 on the host.

    The ratio `||g_align|| / ||g_main||` of the two gradients is averaged in the same way, for the log only.

    Args:
        max_train_steps (`int`): the window is 2 % of it, at least 1.
        acts (`bool`): whether gates close; otherwise the cosines are only measured.
        warmup (`int`, *optional*): the number of steps after which the averages start again; as above when not given.
    """

    num_measures = 4

    def __init__(self, max_train_steps: int, acts: bool = True, warmup: int | None = None):
        self.window = max(1, round(0.02 * max_train_steps))
        self.warmup = min(1000, max_train_steps // 10) if warmup is None else warmup
        self.acts = acts
        self.step = 0
        # `row`: steps in a row in which the bound was below 0; `closing`: steps completed on the way from 1 to 0.
        names = ("mean", "square", "count", "row", "closing", "ratio", "ratio_count")
        self.state = {name: torch.zeros(NUM_BINS, dtype=torch.float64) for name in names}

    @staticmethod
    def measures(cosine_and_ratio: torch.Tensor) -> list[torch.Tensor]:
        """What `DeviceSums` adds up for `update`: cosine and ratio of each sample, `[2,B]`, and their signs.

        The square of a sign is 1, and 0 for a sample whose value is exactly zero because it has no gradient. So the squares
        of the signs count the samples.
        """
        return [cosine_and_ratio, cosine_and_ratio.sign()]

    def update(self, count: torch.Tensor, sums: torch.Tensor):
        """Moves averages and gates by the sums of an optimizer step.

        A bin in which a cosine is not finite has no cosine in this step, and likewise for the ratio.

        Args:
            count: samples in each bin, `[bins]`; not used, since zeros do not count.
            sums: of the `measures` and of their squares, `[2,4,bins]`.
        """
        (cosine, ratio, _, _), (square, _, count, ratio_count) = sums
        cosine, square, count = finite_bins(torch.stack([cosine, square, count]))
        ratio, ratio_count = finite_bins(torch.stack([ratio, ratio_count]))
        state = self.state
        has_ratio = (ratio_count > 0).to(ratio.dtype)
        state["ratio"].lerp_(ratio / ratio_count.clamp_min(1), (1 - COSINE_DECAY) * has_ratio)
        state["ratio_count"] += has_ratio
        populated = (count > 0).to(count.dtype)
        state["mean"].lerp_(cosine / count.clamp_min(1), (1 - COSINE_DECAY) * populated)
        state["square"].lerp_(square / count.clamp_min(1), (1 - COSINE_DECAY) * populated)
        state["count"] += populated
        self.step += 1
        if self.acts and self.step > self.warmup:
            state["row"].add_(1).mul_(self.upper_bound() < 0)
            state["closing"] += (state["row"] >= self.window) | (state["closing"] > 0)
            state["closing"].clamp_(max=self.window)
        elif self.step == self.warmup:
            for name in ("mean", "square", "count", "ratio", "ratio_count"):
                state[name].zero_()

    def ratio(self) -> torch.Tensor:
        """The average ratio of the gradients' norms, `[bins]`; 0 without samples."""
        return self.state["ratio"] / (1 - COSINE_DECAY ** self.state["ratio_count"]).clamp_min(1e-30)

    def cosine(self) -> torch.Tensor:
        """m, the average cosine of each bin, `[bins]`; 0 without samples."""
        return self.state["mean"] / (1 - COSINE_DECAY ** self.state["count"]).clamp_min(1e-30)

    def upper_bound(self) -> torch.Tensor:
        """95 % upper bound of the mean cosine of each bin, `[bins]`; infinite until it counts."""
        count, mean = self.state["count"], self.cosine()
        square = self.state["square"] / (1 - COSINE_DECAY**count).clamp_min(1e-30)
        error = ((square - mean.square()).clamp_min(0) / count.clamp(1, COSINE_STEPS)).sqrt()
        return torch.where(count >= MIN_SAMPLES, mean + 1.645 * error, float("inf"))

    def gates(self) -> torch.Tensor:
        """The gate of each bin, `[bins]`, in [0, 1]."""
        return 1 - self.state["closing"] / self.window

    def lookup(self, t: torch.Tensor) -> torch.Tensor:
        """The gate for timesteps `t [B]`, float32 `[B]`."""
        return self.gates().float().to(t.device)[timestep_bins(t)]

    def steps_until_closed(self) -> float:
        """Steps until the gate of every bin with samples is 0; infinite while one of them has not begun to close.

        The number is the same on every process. Call it at least once every `window` steps, and count down from the first
        finite result.
        """
        used, closing = self.state["count"] > 0, self.state["closing"]
        begun = (closing[used] > 0).all() & used.any()
        return self.window - int(closing[used].min()) if begun else float("inf")

    def summary(self) -> dict[str, float]:
        """For the log: cosine, ratio and gate of the bins that had samples, `cosine/0.0-0.1`, `gradient_ratio/0.0-0.1` and so on.

        A closed bin has no alignment gradient any more, so it has neither cosine nor ratio.
        """
        values = {}
        used, cosines, gates = (x.tolist() for x in (self.state["count"] > 0, self.cosine(), self.gates()))
        has_ratio, ratios = (self.state["ratio_count"] > 0).tolist(), self.ratio().tolist()
        for i in range(NUM_BINS):
            name = f"{i / NUM_BINS:.1f}-{(i + 1) / NUM_BINS:.1f}"
            if used[i] and gates[i] > 0:
                values[f"cosine/{name}"] = cosines[i]
            if has_ratio[i] and gates[i] > 0:
                values[f"gradient_ratio/{name}"] = ratios[i]
            if used[i] and self.acts:
                values[f"gate/{name}"] = gates[i]
        return values

    def closed(self) -> bool:
        """Whether alignment has ended in every bin that ever had samples."""
        return self.steps_until_closed() == 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        numbers = {"window": self.window, "step": self.step}
        return {**self.state, **{name: torch.tensor(x) for name, x in numbers.items()}}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]):
        self.step = int(state_dict["step"])
        for name, tensor in self.state.items():
            # Checkpoints of version 0.1 have no ratios, whose averages then begin here.
            if name in state_dict or not name.startswith("ratio"):
                tensor.copy_(state_dict[name])
        # A run that is extended has a longer window; the gates must not rise.
        self.state["closing"].mul_(self.window / int(state_dict["window"])).ceil_().clamp_(max=self.window)


class Release:
    """The first step without alignment: a given one, or the one at which every gate or the plateau will have closed.

    The step is known in advance and is the same on every process, so that no step has to wait for the device.

    Args:
        gate: the [`ConflictGate`] or [`Plateau`]; its `window` is the number of steps that it takes to close.
        stop_step (`int`, *optional*): the step from which on nothing is aligned in any case.
    """

    def __init__(self, gate: ConflictGate, stop_step: int | None = None):
        self.gate = gate
        self.stop_step = math.inf if stop_step is None else stop_step

    def active(self, step: int) -> bool:
        """Whether a step aligns. After the first step that does not, no later one does, on any process."""
        return step < self.stop_step

    def look_ahead(self, step: int):
        """Asks the gate when it will have closed everywhere; call it at least once per window of the gate."""
        if self.gate.acts:
            self.stop_step = min(self.stop_step, step + self.gate.steps_until_closed())

    def state(self) -> dict:
        """The state for a checkpoint, in JSON types."""
        return {"stop_step": None if math.isinf(self.stop_step) else self.stop_step, "gate_window": self.gate.window}

    def restore(self, state: dict) -> bool:
        """Restores the state of a checkpoint; returns False if it is from a run of another length and does not apply."""
        if state["gate_window"] != self.gate.window:
            return False
        self.stop_step = math.inf if state["stop_step"] is None else state["stop_step"]
        return True
