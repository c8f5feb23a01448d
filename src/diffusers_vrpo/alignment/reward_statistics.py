# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Running statistics of the rewards, and the weights that follow from them: the only stateful piece of the loss.

Formulas: docs/method.md. Rewards are weighed by inverse variance (arXiv 2606.00583): raw weights `omega_k ~ 1/sigma_k^2`. The
loss uses unit gradients, which absorb one sigma, so the share of reward k is `s_k = omega_k sigma_k / sum_j omega_j
sigma_j`. The same rule on rewards in one unit, each divided by its sigma_k, has equal weights, and so equal shares.
"""

from collections.abc import Sequence

import torch

from ..errors import InputError
from .host_copy import DeviceSums


NUM_BINS = 10  # timestep bins of equal width
DECAY = 0.99  # of the rewards' variance, per optimizer step in which the bin has samples
GRADIENT_DECAY = 0.9999  # of the gradients' size
FLOOR_STEP = 1000  # tau never falls under its value at this step
MIN_SAMPLES = 32  # a bin with fewer has no variance worth using: equal shares
WEIGHTINGS = ("auto", "equal", "inverse_variance", "inverse_std", "raw")
# What `auto` gives to VRPO's own rewards: the best of the mixtures on both yardsticks (docs/results.md).
AUTO_SHARES = {"fidelity": 0.0, "semantic": 2.0, "structural": 1.0}


def parse_reward_weighting(text: str, names: Sequence[str]) -> str | tuple[float, ...]:
    """One of `WEIGHTINGS` but `auto`, or fixed shares, one per reward, made to sum to 1.

    Args:
        text: the name of a weighting, shares such as `"0,2,1"`, or `"auto"`: `AUTO_SHARES` of VRPO's own three rewards, and
            equal shares of any others.
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


def clip_shares(shares: torch.Tensor, low: float = 1 / 3, high: float = 3.0) -> torch.Tensor:
    """Shares `[..., K]` that sum to 1, each within [low, high] times the equal share 1/K.

    The shares inside the bounds keep their proportions: a reward that saturates (sigma -> 0) cannot take everything.
    """
    num_rewards = shares.shape[-1]
    low, high = low / num_rewards, min(high / num_rewards, 1.0)
    shares = shares.clamp_min(1e-12)
    # sum_k clamp(c s_k) grows with the factor c, linearly between those at which a share meets a bound.
    factors = torch.cat([low / shares, high / shares], dim=-1).sort(dim=-1).values
    sums = (factors.unsqueeze(-1) * shares.unsqueeze(-2)).clamp(low, high).sum(-1)
    i = ((sums <= 1).sum(-1, keepdim=True) - 1).clamp(0, 2 * num_rewards - 2)
    (c0, c1), (sum0, sum1) = ((x.gather(-1, i), x.gather(-1, i + 1)) for x in (factors, sums))
    factor = c0 + (c1 - c0) * (1 - sum0) / (sum1 - sum0).clamp_min(1e-30)
    return (factor * shares).clamp(low, high)


def shares_from_std(sigma: torch.Tensor, weighting: str) -> torch.Tensor:
    """`s_k ~ omega_k sigma_k` of the rewards' standard deviations `[..., K]`, before clipping; equal where all are 0.

    `equal` and `inverse_std` both give equal shares: `omega_k ~ 1/sigma_k` makes of a raw reward one in units of its
    standard deviation. `raw` weighs the raw rewards alike, so that the largest in its own unit leads.
    """
    if weighting == "equal":
        return torch.full_like(sigma, 1 / sigma.shape[-1])
    sigma = sigma / sigma.mean(-1, keepdim=True).clamp_min(1e-30)
    sigma = torch.where(sigma.sum(-1, keepdim=True) > 0, sigma, torch.ones_like(sigma)).clamp_min(1e-6)
    omega = {"inverse_variance": sigma**-2, "inverse_std": sigma**-1, "raw": torch.ones_like(sigma)}[weighting]
    return omega * sigma / (omega * sigma).sum(-1, keepdim=True)


class RewardStatistics:
    """Variance and gradient size of each reward, per aligned block and timestep bin.

    The variance is the one among the samples of a step, averaged over steps: the rewards' own rise over training does
    not count. Step k uses the statistics through step k-1. Sums of all micro-batches and processes enter once per optimizer step,
    so that neither the number of processes nor accumulation changes the result.

    The sums live on the device, everything else on the host (host_copy.py).

    Args:
        num_layers (`int`): L, aligned blocks (times encoders).
        num_rewards (`int`): K.
        weighting (`str` or `tuple[float, ...]`): as `parse_reward_weighting` returns it.
        device: of the rewards. All statistics are float64 (float32 on MPS): variances are small differences.
    """

    def __init__(self, num_layers: int, num_rewards: int, weighting: str | tuple[float, ...], device="cpu"):
        shape = (num_layers, num_rewards, NUM_BINS)
        self.step = 0
        # Of each projector: squares of gradients; the count; rewards, and their squares.
        self.sums = DeviceSums((num_layers, 1 + 3 * num_rewards, NUM_BINS), device)
        dtype = self.sums.dtype
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

    @property
    def pending(self) -> dict[str, torch.Tensor]:
        """The sums since the last update, by name, on the device."""
        return self._by_name(self.sums.sums)

    @staticmethod
    def _by_name(sums: torch.Tensor) -> dict[str, torch.Tensor]:
        num_rewards = sums.shape[1] // 3
        gradient_square, count, reward, square = sums.split([num_rewards, 1, num_rewards, num_rewards], dim=1)
        return {"count": count.squeeze(1), "reward": reward, "square": square, "gradient_square": gradient_square}

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
        """Whether a reward, by its number, ever has a share: only given shares can leave it without one."""
        return self.given_shares is None or self.given_shares[reward] > 0

    def tau(self) -> torch.Tensor:
        """`tau_k` `[L,K,bins]`: a tenth of the gradients' usual size, never below its value at step 1,000."""
        usual = self.state["gradient"] / self.state["gradient_mass"].clamp_min(1e-30)
        return torch.maximum(0.1 * usual, self.state["tau_floor"])

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares and tau of the current step, each float32 `[L,K,bins]`, on the host."""
        if self._tables is None:
            self._tables = self.shares().float(), self.tau().float()
        return self._tables

    def lookup(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares and tau for timesteps `t [B]`, each float32 `[L,B,K]`, on their device."""
        bins = self.bins(t)
        return tuple(table.to(t.device)[:, :, bins].mT for table in self.tables())

    @staticmethod
    def bins(t: torch.Tensor) -> torch.Tensor:
        """The timestep bin of each `t` in [0, 1]."""
        return (t * NUM_BINS).long().clamp(0, NUM_BINS - 1)

    def observe(
        self,
        layer: int,
        t: torch.Tensor,
        rewards: torch.Tensor,
        gradient_squares: torch.Tensor,
        bins: torch.Tensor | None = None,
    ):
        """Adds one micro-batch of a block.

        Args:
            t: timesteps `[B]`.
            rewards: their token means, `[B,K]`.
            gradient_squares: token means of squared gradient norms, `[B,K]`, or `[B,J]` of the last J rewards, if the others
                have no gradient.
            bins: `bins(t)`, if it is known.
        """
        values = torch.cat([rewards, gradient_squares], dim=1).detach()
        rows = reward_rows(values, rewards.shape[1], self.sums.dtype)
        bins = self.bins(t) if bins is None else bins
        self.sums.sums[layer, -rows.shape[1] :].index_add_(1, bins, rows.mT)

    def collect(self, all_reduce=None):
        """Starts the copy of the sums to the host, which `update` then need not wait for; `all_reduce(tensor)` adds up processes."""
        self.sums.collect(all_reduce)

    def update(self, all_reduce=None):
        """Updates the averages with the observations since the last call; `all_reduce(tensor)` sums over processes.

        It waits for the device, unless `collect` was called before.
        """
        if not self.sums.collected:
            self.collect(all_reduce)
        pending = self._by_name(self.sums.read(all_reduce))
        count = pending["count"][0]
        divisor = count.clamp_min(1)
        state = self.state
        rate = (1 - DECAY) * (count > 1).to(count.dtype)
        spread = (pending["square"] - pending["reward"].square() / divisor).clamp_min(0)
        state["spread"].lerp_(spread, rate)
        state["freedom"].lerp_(count - 1, rate)
        rate = (1 - GRADIENT_DECAY) * (count > 0).to(count.dtype)
        rms = (pending["gradient_square"] / divisor).sqrt()
        state["gradient"].lerp_(rms, rate)
        state["gradient_mass"].lerp_(torch.ones_like(rate), rate)
        state["count"] += count
        self._tables = None
        self.step += 1
        if self.step == FLOOR_STEP:
            state["tau_floor"].copy_(self.tau())

    def summary(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For the log: sigma_k, omega_k (summing to 1) and s_k, averaged over blocks and bins with samples, `[K]`.

        omega_k are the weights of the raw rewards that the shares amount to: `omega_k ~ s_k / sigma_k`.
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


def reward_rows(values: torch.Tensor, num_rewards: int, dtype: torch.dtype) -> torch.Tensor:
    """What `RewardStatistics` adds up of each sample: J squared gradients, 1, the K rewards, their squares; `[B, J + 1 + 2 K]`.

    Args:
        values: rewards and squared gradients, `[B, K + J]`. A sample in which one is not finite counts as none: a single one
            would permanently spoil its bin.
        num_rewards: K.
        dtype: of the result.
    """
    # NaN is not below infinity, and the largest of some numbers is NaN if one of them is.
    known = torch.linalg.vector_norm(values, ord=float("inf"), dim=1, keepdim=True) < float("inf")
    values = torch.where(known, values, 0).to(dtype)
    rewards, squares = values.tensor_split([num_rewards], dim=1)
    return torch.cat([squares, known.to(dtype), rewards, rewards.square()], dim=1)
