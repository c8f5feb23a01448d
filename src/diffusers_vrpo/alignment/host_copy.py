# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Sums over the samples of a step, which the device collects, and their way to the host.

Statistics of rewards and gradients are a few hundred numbers. Computing them takes dozens of small operations per step: on a GPU
each would be a kernel that takes longer to launch than to run. So they are computed on the host. The device only adds up the
measures of the samples, and the sums of all statistics travel together.
"""

from collections.abc import Callable, Sequence

import torch


class DeviceSums:
    """Sums of the measures of samples, and of their squares, per timestep bin; the host reads and resets them once per step.

    `collect` starts the copy to the host and does not wait for it; `read` waits, which costs nothing if the host has waited for
    the device since. Without `collect`, `read` does both.

    Args:
        num_measures: how many numbers a sample has.
        num_bins: how many timestep bins there are.
        device: where the sums are added up, in float64 (float32 on MPS).

    Attributes:
        sums (`torch.Tensor`): `[2, measures, bins]`: the sums of the measures, and those of their squares.
        collected (`bool`): whether the copy has begun.
    """

    def __init__(self, num_measures: int, num_bins: int, device="cpu"):
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, num_measures, num_bins, device=device, dtype=dtype)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(self.sums.shape, dtype=dtype, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._add = add_moments
        self.collected = self._reduced = False

    @torch.no_grad()
    def add(self, bins: torch.Tensor, measures: Sequence[torch.Tensor]) -> None:
        """Adds the samples of a micro-batch.

        Args:
            bins: the timestep bin of each sample, `[B]`.
            measures: tensors of one dtype, `[rows,B]` each, with as many rows as there are measures.
        """
        self._add(self.sums, bins, measures)

    def compile(self) -> None:
        """Compiles what `add` does."""
        self._add = torch.compile(add_moments, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def collect(self, all_reduce: Callable | None = None) -> None:
        """Starts the copy of the sums, added up over processes by `all_reduce(tensor)`, and resets them."""
        sums = self.sums if all_reduce is None else all_reduce(self.sums)
        self._reduced = all_reduce is not None
        self._host.copy_(sums, non_blocking=self._copied is not None)
        if self._copied is not None:
            self._copied.record()
        self.sums.zero_()
        self.collected = True

    def read(self, all_reduce: Callable | None = None) -> torch.Tensor:
        """Returns the sums since the last call, on the host and in float64. They are valid until the next call of `collect`.

        Args:
            all_reduce: as for `collect`.

        Raises:
            ValueError: if `all_reduce` is given here, and was not given to `collect`.
        """
        if not self.collected:
            self.collect(all_reduce)
        elif all_reduce is not None and not self._reduced:
            raise ValueError("`collect` was called without `all_reduce`: the processes' statistics would differ")
        if self._copied is not None:
            self._copied.synchronize()
        self.collected = False
        return self._host.double()


def add_moments(sums: torch.Tensor, bins: torch.Tensor, measures: Sequence[torch.Tensor]) -> None:
    """Adds `measures` and their squares to `sums [2, measures, bins]`."""
    values = torch.cat(list(measures)).to(sums.dtype)
    sums.flatten(0, 1).index_add_(1, bins, torch.cat([values, values.square()]))


def finite_bins(sums: torch.Tensor) -> torch.Tensor:
    """`sums [..., bins]` with zeros in the bins where one of them is not finite.

    A bin without samples changes nothing, while a single number that is not finite would permanently spoil an average.
    """
    return torch.where(sums.flatten(0, -2).isfinite().all(0), sums, 0)
