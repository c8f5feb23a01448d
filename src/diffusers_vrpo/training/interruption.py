# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""What may end a run early: a signal, a loss that is not finite. All processes learn of it at the same step."""

import os
import signal
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ..errors import TrainingStopped


SKIPPED_IN_A_ROW = 100  # steps that `skip_nonfinite` leaves out, one after another, before the run stops all the same
OVERFLOWS_IN_A_ROW = 40  # fp16: the scaler halves its scale at each overflow; from 2^40 it would be at 1


class Interruption:
    """SIGTERM (a cluster's preemption) and SIGINT (Ctrl-C) as a wish, which the loop grants at the end of a step.

    Only inside a `with` block; outside of it signals act as always. A second SIGINT leaves at once; within a
    second it does not count, since terminal and launcher may both pass on the same Ctrl-C.
    """

    def __init__(self):
        self.signum = 0
        self._previous: dict[int, object] = {}
        self._first_sigint = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other thread may, nor gets any
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
            # Not print(), which a handler must not enter twice.
            os.write(2, f"\n{signal.Signals(signum).name}: saving a checkpoint after this step\n".encode())


def wait_before_exit(accelerator: Accelerator):
    """Before several processes end, well or not.

    When its model goes, torch (2.13) joins gloo's threads and holds the interpreter's lock meanwhile, which such a thread
    wants in order to free the tensors of the last reduction: the process would never end. Asleep we do not hold it.
    """
    if accelerator.num_processes > 1:
        time.sleep(0.5)


class StepGuard:
    """Asks once per optimizer step, on all processes: did anyone get a signal, is a loss or the gradient not finite?

    The question is one all-reduce of three numbers behind the gradients', and the optimizer gets the answer on the
    device (`found_inf` of the fused AdamW): a step whose loss or gradient is not finite leaves weights, moments and
    step counts as they were. The host reads the answer after it has launched the optimizer, so that the device has
    work left while the host wakes up; it is never more than one step ahead. fp16 has its own `found_inf`, the scaler's:
    there an infinite gradient is normal, unless there are `OVERFLOWS_IN_A_ROW`.

    A micro-step goes `watch(loss)`, backward; an optimizer step `ask(grad_norm)`, `optimizer.step()`, `answer()`.

    Attributes:
        signum (`int`): a signal that some process got, or 0.
        skipped (`int`): steps left out so far.
    """

    def __init__(self, accelerator: Accelerator, optimizer, interruption: Interruption, skip_nonfinite: bool):
        self.accelerator, self.interruption, self.skip_nonfinite = accelerator, interruption, skip_nonfinite
        while hasattr(optimizer, "optimizer"):  # within accelerate's wrapper and DeepSpeed's
            optimizer = optimizer.optimizer
        self.optimizer = optimizer
        self.signum, self.skipped, self.skipped_in_a_row, self._overflows = 0, 0, 0, 0
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        on_gpu = accelerator.device.type == "cuda"
        self._host = torch.empty(3, pin_memory=True) if on_gpu else None
        self._event = torch.cuda.Event() if on_gpu else None

    def watch(self, loss: torch.Tensor):
        """Remembers whether the loss of a micro-step is not finite; does not wait for the device."""
        self._bad_loss = self._bad_loss | ~loss.detach().isfinite()

    def ask(self, grad_norm: torch.Tensor):
        """Before the optimizer's step: puts the question to all processes."""
        signum = torch.full_like(grad_norm, float(self.interruption.signum), dtype=torch.float32)
        self._flags = torch.stack([signum, self._bad_loss.float(), (~grad_norm.isfinite()).float()])
        self._bad_loss = torch.zeros_like(self._bad_loss)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(self._flags, torch.distributed.ReduceOp.MAX)
        if self.accelerator.scaler is None:
            self.optimizer.found_inf = self._flags[1:].amax()
        if self._host is not None:
            self._host.copy_(self._flags, non_blocking=True)
            self._event.record()

    def answer(self) -> str | None:
        """After the optimizer's step: what was not finite, the same on every process, or None."""
        if self._host is not None:
            self._event.synchronize()
        signum, bad_loss, bad_gradient = (self._flags if self._host is None else self._host).tolist()
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
        """The error that ends the run; `saved_step` is the last step that has a checkpoint, 0 for none."""
        if self.skip_nonfinite:
            remedy = f"it is the {SKIPPED_IN_A_ROW}th in a row, which skipping does not mend"
        else:
            remedy = "the same command tries it again, `skip_nonfinite` leaves such steps out"
        saved = (
            f"{output_dir / f'checkpoint-{saved_step}'} is the newest checkpoint"
            if saved_step
            else "no step before it has one"
        )
        wait_before_exit(self.accelerator)
        return TrainingStopped(f"{where} is NaN or infinite; {saved}, and {remedy}")
