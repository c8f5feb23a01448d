# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Sums that the device collects over the micro-batches of a step, and their way to the host.

Statistics of rewards and gradients are a few hundred numbers. What is computed of them once per step are dozens of small
operations: on a GPU each would be a kernel that takes longer to launch than to run. So they are computed on the host, and only
the sums over samples stay on the device.
"""

from collections.abc import Callable

import torch


class DeviceSums:
    """A tensor of sums on a device, which the host reads and resets once per optimizer step.

    `collect` starts the copy to the host and does not wait for it; `read` waits, which costs nothing if the host has waited for
    the device since. Without `collect`, `read` does both.

    Args:
        shape: of the sums.
        device: where they are added up, in float64 (float32 on MPS).

    Attributes:
        sums (`torch.Tensor`): to be added to in place.
        dtype (`torch.dtype`): of the sums.
        collected (`bool`): whether the copy has begun.
    """

    def __init__(self, shape: tuple[int, ...], device="cpu"):
        device = torch.device(device)
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(shape, device=device, dtype=self.dtype)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(shape, dtype=self.dtype, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self.collected = False

    @torch.no_grad()
    def collect(self, all_reduce: Callable | None = None) -> None:
        """Starts the copy of the sums, added up over processes by `all_reduce(tensor)`, and resets them."""
        sums = self.sums if all_reduce is None else all_reduce(self.sums)
        self._host.copy_(sums.view_as(self._host), non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self.sums.zero_()
        self.collected = True

    def read(self, all_reduce: Callable | None = None) -> torch.Tensor:
        """The sums since the last call, on the host, until the next call of `collect`; arguments as of `collect`."""
        if not self.collected:
            self.collect(all_reduce)
        if self._copied is not None:
            self._copied.synchronize()
        self.collected = False
        return self._host


def finite(values: torch.Tensor) -> torch.Tensor:
    """Where `values` are finite: as `isfinite`, with two kernels instead of four."""
    return values.abs() < float("inf")
