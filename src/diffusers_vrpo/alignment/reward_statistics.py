# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Running statistics of the rewards, and the weights that follow from them.

Formulas: docs/method.md. The paper weighs rewards by inverse variance (arXiv 2606.00583): raw weights `omega_k ~ 1/sigma_k^2`.
The loss uses unit gradients, which absorb one sigma, so the share of reward k is `s_k = omega_k sigma_k / sum_j omega_j
sigma_j`. Applied to rewards in a common unit, each divided by its sigma_k, the same rule gives equal weights and equal shares.
"""

from collections.abc import Sequence

import torch

from ..errors import InputError
from .host_copy import finite_bins


NUM_BINS = 10  # timestep bins of equal width
DECAY = 0.99  # of the rewards' variance, per optimizer step in which the bin has samples
GRADIENT_DECAY = 0.9999  # of the gradients' size
FLOOR_STEP = 1000  # tau never falls under its value at this step
MIN_SAMPLES = 32  # a bin with fewer has no variance worth using: equal shares
WEIGHTINGS = ("auto", "equal", "inverse_variance", "inverse_std", "raw")
# The shares of VRPO's own rewards with `auto`: the best of the mixtures on both yardsticks (docs/results.md).
AUTO_SHARES = {"fidelity": 0.0, "semantic": 2.0, "structural": 1.0}


def parse_reward_weighting(text: str, names: Sequence[str]) -> str | tuple[float, ...]:
    """Returns one of `WEIGHTINGS` other than `auto`, or fixed shares, one per reward, scaled to sum to 1.

    Args:
        text: the name of a weighting; shares such as `"0,2,1"`; or `"auto"`, which means `AUTO_SHARES` for VRPO's own three
            rewards, and equal shares for any others.
        names: of the rewards, in the order of the shares.

    Raises:
        InputError: if the text is neither.
    """
    num_rewards = len(names)
    if text == "auto":
        text = (
            ",".join(str(share) for share in AUTO_SHARES.values()) if tuple(names) == tuple(AUTO_SHARES) else "equal"
        )
    if text in WEIGHTINGS:
        return text
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != num_rewards or min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
        raise InputError(
            None,
            f"`reward_weighting` {text!r} is neither one of {', '.join(WEIGHTINGS)} nor {num_rewards} numbers >= 0 with "
            "a sum above 0, such as " + ",".join(["1"] * num_rewards),
        )
    return tuple(number / sum(numbers) for number in numbers)


def bin_edges(device=None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The timesteps between two bins, `[bins - 1]`."""
    return torch.arange(1, NUM_BINS, device=device, dtype=dtype) / NUM_BINS


def timestep_bins(t: torch.Tensor, edges: torch.Tensor | None = None) -> torch.Tensor:
    """The timestep bin of each `t` in [0, 1]; `edges` are `bin_edges`, if they are at hand."""
    return torch.bucketize(t, bin_edges(t.device, t.dtype) if edges is None else edges, right=True)


def clip_shares(shares: torch.Tensor, low: float = 1 / 3, high: float = 3.0) -> torch.Tensor:
    """Clips shares `[..., K]`, which still sum to 1, so that each is within [low, high] times the equal share 1/K.

    The shares inside the bounds keep their proportions. So a reward that saturates (sigma -> 0) cannot take everything.
    """
    num_rewards = shares.shape[-1]
    low, high = low / num_rewards, min(high / num_rewards, 1.0)
    shares = shares.clamp_min(1e-12)
    # sum_k clamp(c s_k) grows with the factor c, and it is linear between the factors at which a share meets a bound.
    factors = torch.cat([low / shares, high / shares], dim=-1).sort(dim=-1).values
    sums = (factors.unsqueeze(-1) * shares.unsqueeze(-2)).clamp(low, high).sum(-1)
    i = ((sums <= 1).sum(-1, keepdim=True) - 1).clamp(0, 2 * num_rewards - 2)
    (c0, c1), (sum0, sum1) = ((x.gather(-1, i), x.gather(-1, i + 1)) for x in (factors, sums))
    factor = c0 + (c1 - c0) * (1 - sum0) / (sum1 - sum0).clamp_min(1e-30)
    return (factor * shares).clamp(low, high)


def shares_from_std(sigma: torch.Tensor, weighting: str) -> torch.Tensor:
    """`s_k ~ omega_k sigma_k` of the rewards' standard deviations `[..., K]`, before clipping; equal where all are 0.

    `equal` and `inverse_std` both give equal shares: the weight `omega_k ~ 1/sigma_k` expresses a raw reward in units of its
    standard deviation. `raw` gives all raw rewards the same weight, so that the one with the largest numbers leads.
    """
    if weighting == "equal":
        return torch.full_like(sigma, 1 / sigma.shape[-1])
    sigma = sigma / sigma.mean(-1, keepdim=True).clamp_min(1e-30)
    sigma = torch.where(sigma.sum(-1, keepdim=True) > 0, sigma, torch.ones_like(sigma)).clamp_min(1e-6)
    omega = {"inverse_variance": sigma**-2, "inverse_std": sigma**-1, "raw": torch.ones_like(sigma)}[weighting]
    return omega * sigma / (omega * sigma).sum(-1, keepdim=True)


class RewardStatistics:
    """Variance and gradient size of each reward, per aligned block and timestep bin.

    The variance is that among the samples of a step, averaged over steps, so the rise of a reward over the training does not
    count. Step k uses the statistics through step k-1. Sums of all micro-batches and processes enter once per optimizer step,
    so that neither the number of processes nor accumulation changes the result.

    The sums come from the device (host_copy.py). Everything here is float64 on the host: variances are small differences.

    Args:
        num_layers (`int`): L, aligned blocks (times encoders).
        num_rewards (`int`): K.
        weighting (`str` or `tuple[float, ...]`): as `parse_reward_weighting` returns it.
        num_gradients (`int`, *optional*): J, how many of the rewards, the last ones, have a gradient; all when not given.
    """

    def __init__(
        self,
        num_layers: int,
        num_rewards: int,
        weighting: str | tuple[float, ...],
        num_gradients: int | None = None,
    ):
        shape, dtype = (num_layers, num_rewards, NUM_BINS), torch.float64
        self.step = 0
        self.num_rewards, self.num_gradients = num_rewards, num_rewards if num_gradients is None else num_gradients
        self.num_measures = num_layers * (self.num_rewards + self.num_gradients)
        self.given_shares = weighting if isinstance(weighting, tuple) else None
        self.weighting = torch.tensor(weighting, dtype=dtype) if isinstance(weighting, tuple) else weighting
        self.state = {
            "spread": torch.zeros(shape, dtype=dtype),  # squared deviations from the step's mean, summed
            "freedom": torch.zeros(NUM_BINS, dtype=dtype),  # samples less one, which the spread is divided by
            "count": torch.zeros(NUM_BINS, dtype=dtype),
            "gradient": torch.zeros(shape, dtype=dtype),
            "gradient_mass": torch.zeros(NUM_BINS, dtype=dtype),
            "tau_floor": torch.zeros(shape, dtype=dtype),
        }
        self._tables = None  # shares and tau of the current step, made on first use

    def variance(self) -> torch.Tensor:
        """`sigma_k^2` over samples of the token mean of each raw reward, `[L,K,bins]`."""
        return self.state["spread"] / self.state["freedom"].clamp_min(1e-30)

    def shares(self) -> torch.Tensor:
        """`s_k` `[L,K,bins]`, summing to 1 over k, each within [1/3, 3] of the equal share unless they are given."""
        sigma = self.variance().sqrt().movedim(1, -1)
        if isinstance(self.weighting, torch.Tensor):
            return self.weighting.expand_as(sigma).movedim(-1, 1)
        shares = clip_shares(shares_from_std(sigma, self.weighting))
        known = (self.state["count"] >= MIN_SAMPLES)[:, None]
        return torch.where(known, shares, 1 / shares.shape[-1]).movedim(-1, 1)

    def has_share(self, reward: int) -> bool:
        """Whether the reward with this number ever has a share; only given shares can leave it without one."""
        return self.given_shares is None or self.given_shares[reward] > 0

    def tau(self) -> torch.Tensor:
        """`tau_k` `[L,K,bins]`: a tenth of the usual size of the gradients, and never less than it was at step 1,000."""
        usual = self.state["gradient"] / self.state["gradient_mass"].clamp_min(1e-30)
        return torch.maximum(0.1 * usual, self.state["tau_floor"])

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares and tau of the current step, each float32 `[L,K,bins]`, on the host."""
        if self._tables is None:
            self._tables = self.shares().float(), self.tau().float()
        return self._tables

    def lookup(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares and tau for timesteps `t [B]`, each float32 `[L,B,K]`, on their device."""
        bins = timestep_bins(t)
        return tuple(table.to(t.device)[:, :, bins].mT for table in self.tables())

    def update(self, count: torch.Tensor, sums: torch.Tensor):
        """Updates the averages with the sums of an optimizer step. A bin in which one is not finite counts as without samples.

        Args:
            count: samples in each bin, `[bins]`.
            sums: for each projector in turn, sums over samples of the K rewards and of the J squared gradient norms, which are
                means over tokens; and the sums of the squares of these numbers, `[2, L (K+J), bins]`.
        """
        sums = finite_bins(torch.cat([count.expand(2, 1, -1), sums], dim=1))
        count, (measures, squares) = sums[0, 0], sums[:, 1:].unflatten(1, (len(self.state["spread"]), -1))
        reward, square = measures[:, : self.num_rewards], squares[:, : self.num_rewards]
        gradient_square = torch.zeros_like(self.state["gradient"])
        gradient_square[:, -self.num_gradients :] = measures[:, self.num_rewards :]
        divisor = count.clamp_min(1)
        state = self.state
        rate = (1 - DECAY) * (count > 1).to(count.dtype)
        spread = (square - reward.square() / divisor).clamp_min(0)
        state["spread"].lerp_(spread, rate)
        state["freedom"].lerp_(count - 1, rate)
        rate = (1 - GRADIENT_DECAY) * (count > 0).to(count.dtype)
        rms = (gradient_square / divisor).sqrt()
        state["gradient"].lerp_(rms, rate)
        state["gradient_mass"].lerp_(torch.ones_like(rate), rate)
        state["count"] += count
        self._tables = None
        self.step += 1
        if self.step == FLOOR_STEP:
            state["tau_floor"].copy_(self.tau())

    def summary(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For the log: sigma_k, omega_k (summing to 1) and s_k, averaged over blocks and bins with samples, `[K]`.

        The shares amount to the weights `omega_k ~ s_k / sigma_k` of the raw rewards.
        """
        weight = (self.state["count"] > 0).to(self.state["count"].dtype)
        weight = weight / weight.sum().clamp_min(1)
        shares = self.shares().mean(0) @ weight
        sigma = self.variance().sqrt().mean(0) @ weight
        omega = shares / sigma.clamp_min(1e-12)
        return sigma, omega / omega.sum(), shares

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**self.state, "step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]):
        self._tables = None
        self.step = int(state_dict["step"])
        for name, tensor in self.state.items():
            tensor.copy_(state_dict[name])
