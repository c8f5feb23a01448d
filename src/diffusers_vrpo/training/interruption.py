# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Ends a run early, after a signal or a loss that is not finite, at the same step on all processes."""

import os
import signal
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ..errors import TrainingStopped


SKIPPED_IN_A_ROW = 100  # consecutive steps that `skip_nonfinite` skips before the run stops
OVERFLOWS_IN_A_ROW = 40  # fp16: the scaler halves its scale at each overflow, so even a scale of 2^40 would fall to 1


class Interruption:
    """Records SIGTERM (a cluster's preemption) and SIGINT (Ctrl-C), so that the loop can stop at the end of a step.

    It acts only inside a `with` block. A second SIGINT stops the process immediately, unless it follows within a second,
    because terminal and launcher may both pass on the same Ctrl-C.

    Attributes:
        signum (`int`): the number of the first signal, or 0.
    """

    def __init__(self):
        self._previous: dict[int, object] = {}
        self.reset()

    def reset(self):
        """Forgets the signals so far, as before a training that continues after one."""
        self.signum = 0
        self._first_sigint: float | None = None

    def __enter__(self):
        if (
            threading.current_thread() is threading.main_thread()
        ):  # only the main thread can set handlers and receives signals
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _handle(self, signum, frame):
        if signum == signal.SIGINT:
            now = time.monotonic()
            if self._first_sigint is None:
                self._first_sigint = now
            elif now - self._first_sigint > 1:
                os._exit(128 + signum)
        if not self.signum:
            self.signum = signum
            # print() is not safe in a signal handler.
            os.write(2, f"\n{signal.Signals(signum).name}: saving a checkpoint after this step\n".encode())


def wait_before_exit(accelerator: Accelerator):
    """Sleeps before several processes exit, so that gloo's threads can finish.

    When the model is freed, torch (2.13) joins gloo's threads while it holds the interpreter's lock. Such a thread needs
    that lock to free the tensors of the last reduction, so the process would never exit. A sleeping thread does not hold
    the lock.
    """
    if accelerator.num_processes > 1:
        time.sleep(0.5)


class StepGuard:
    """Checks once per optimizer step, on all processes, for signals and for a loss or gradient that is not finite.

    The check is one all-reduce of three numbers after that of the gradients. A fused optimizer, such as AdamW, gets the
    result on the device as `found_inf`, and a step whose loss or gradient is not finite leaves weights, moments and step
    counts unchanged. The host reads the result only after it has launched the optimizer, so that the device is busy in the
    meantime, and the host is never more than one step ahead. With fp16 the scaler sets `found_inf`: an infinite gradient is
    normal there, unless there are more than `OVERFLOWS_IN_A_ROW` of them.

    Optimizers that are not fused cannot skip a step themselves. The host therefore reads the result before their step.

    In a micro-step, call `watch(loss)` before the backward pass. In an optimizer step, call `ask(grad_norm)`, then
    `optimizer.step()` if `may_step()`, then `answer()`.

    Attributes:
        signum (`int`): a signal that any process has received, or 0.
        skipped (`int`): the number of skipped steps.
    """

    def __init__(self, accelerator: Accelerator, optimizer, interruption: Interruption, skip_nonfinite: bool):
        self.accelerator = accelerator
        self.interruption = interruption
        self.skip_nonfinite = skip_nonfinite
        while hasattr(optimizer, "optimizer"):  # unwrap accelerate's and DeepSpeed's optimizers
            optimizer = optimizer.optimizer
        self.optimizer = optimizer
        # With this attribute, torch's fused optimizers tell the scaler of fp16 that they can skip a step.
        self.skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.signum = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._overflows = 0
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        on_gpu = accelerator.device.type == "cuda"
        self._host = torch.empty(3, pin_memory=True) if on_gpu else None
        self._event = torch.cuda.Event() if on_gpu else None

    def watch(self, loss: torch.Tensor):
        """Records whether the loss of a micro-step is finite; does not wait for the device."""
        self._bad_loss = self._bad_loss | ~loss.detach().isfinite()

    def ask(self, grad_norm: torch.Tensor):
        """Starts the check on all processes; called before the optimizer's step."""
        signum = torch.full_like(grad_norm, float(self.interruption.signum), dtype=torch.float32)
        self._flags = torch.stack([signum, self._bad_loss.float(), (~grad_norm.isfinite()).float()])
        self._bad_loss = torch.zeros_like(self._bad_loss)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(self._flags, torch.distributed.ReduceOp.MAX)
        if self.accelerator.scaler is None and self.skips_on_device:
            self.optimizer.found_inf = self._flags[1:].amax()
        if self._host is not None:
            self._host.copy_(self._flags, non_blocking=True)
            self._event.record()

    def may_step(self) -> bool:
        """Whether to call the optimizer's step: always if it can skip a step itself; otherwise this waits for the result."""
        if self.skips_on_device or self.accelerator.scaler is not None:
            return True
        return not any(self._read()[1:])

    def _read(self) -> list[float]:
        """The signal, and whether the loss and the gradient were not finite; waits for the device."""
        if self._host is not None:
            self._event.synchronize()
        return (self._flags if self._host is None else self._host).tolist()

    def answer(self) -> str | None:
        """Returns what was not finite, `"the loss"` or `"the gradient"`, or None; called after the optimizer's step.

        All processes return the same.
        """
        signum, bad_loss, bad_gradient = self._read()
        self.signum = int(signum)
        if self.accelerator.scaler is not None:
            self._overflows = self._overflows + 1 if bad_gradient else 0
            bad_gradient = self._overflows > OVERFLOWS_IN_A_ROW
        problem = "the loss" if bad_loss else "the gradient" if bad_gradient else None
        if problem is None:
            self.skipped_in_a_row = 0
        elif self.skip_nonfinite:
            self.skipped += 1
            self.skipped_in_a_row += 1
        return problem

    def must_stop(self) -> bool:
        """Whether a step that is not finite ends the run."""
        return not self.skip_nonfinite or self.skipped_in_a_row >= SKIPPED_IN_A_ROW

    def stop(self, where: str, output_dir: Path, saved_step: int) -> TrainingStopped:
        """Returns the error that ends the run; `saved_step` is the last step with a checkpoint, or 0 if there is none."""
        if self.skip_nonfinite:
            remedy = (
                f"{SKIPPED_IN_A_ROW} steps in a row were skipped, which does not help; try a lower `learning_rate`"
            )
        else:
            remedy = "repeating the command tries again from there, and `skip_nonfinite` skips such steps"
        saved = (
            f"{output_dir / f'checkpoint-{saved_step}'} is the newest checkpoint"
            if saved_step
            else "there is no checkpoint yet"
        )
        wait_before_exit(self.accelerator)
        return TrainingStopped(f"{where} is NaN or infinite; {saved}, and {remedy}")
