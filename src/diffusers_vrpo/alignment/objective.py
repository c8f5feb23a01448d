# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The alignment term of a training step: which loss, with which weights, and until when.

`L = L_FM + lambda L_rep`. This file puts together what the others compute: targets of the frozen encoders, REPA's loss or
the policy's on every projector, timestep weight and gate, the fork that gives fidelity its share. Formulas:
docs/method.md.
"""

import contextlib
import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..models import ddpm
from .encoders import spatial_normalize
from .gradient_fork import alignment_fork
from .policy import (
    REWARDS,
    action_noise,
    expected_policy_loss,
    kl_penalty,
    normalize,
    repa_loss,
    sampled_policy_loss,
    timestep_weight,
    token_shares,
)
from .release import ConflictGate
from .reward_statistics import RewardStatistics, parse_reward_weighting


def conflict_mode(args) -> str:
    """`conflict`, or its default: the gate belongs to VRPO; REPA is REPA unless it is asked for."""
    return args.conflict or ("gate" if args.objective == "vrpo" else "none")


class Alignment:
    """REPA's or VRPO's loss on the projections of a transformer, and everything it remembers from step to step.

    A micro-batch goes `fork(t)`, model, `loss(...)`, backward, `observe()`; an optimizer step ends with `update(...)`.

    Args:
        args: the alignment options of `train_vrpo.py`.
        transformer: its projectors, in the order of its projections; with `kl_coeff` a copy of it is the reference.
        encoders: frozen, one for each entry of the transformer's `alignment_dims`; none trains without alignment.
        max_train_steps: the gate's window is 2 % of it.
        device: where the statistics live.
        autocast: makes the context that the transformer computes in, for the reference.

    Raises:
        InputError: for a `reward_weighting` that is none.
    """

    def __init__(
        self,
        args,
        transformer: torch.nn.Module,
        encoders: list,
        max_train_steps: int,
        device: torch.device,
        autocast: Callable = contextlib.nullcontext,
    ):
        self.args, self.encoders, self.device, self.autocast = args, encoders, device, autocast
        self.vrpo = args.objective == "vrpo"
        self.conflict = conflict_mode(args)
        self.forks = self.vrpo or self.conflict != "none"
        weighting = parse_reward_weighting(args.reward_weighting, len(REWARDS))
        # A row for every projector: aligned blocks, and the encoders within each.
        self.statistics = RewardStatistics(len(transformer.projectors), len(REWARDS), weighting, device)
        self.gate = ConflictGate(max_train_steps, device, acts=self.conflict == "gate")
        self.stop_step = math.inf if args.alignment_stop_step is None else args.alignment_stop_step
        self.mean_weight = self._mean_timestep_weight(transformer.config.prediction_type)
        self.reference = copy.deepcopy(transformer).eval().requires_grad_(False) if args.kl_coeff else None
        self.draws: dict[tuple[int, int], torch.Tensor] = {}

    def _mean_timestep_weight(self, prediction_type: str) -> float:
        """`E[w]` in units of the analytic one, which is over uniform t; those of a diffusion are not uniform."""
        if prediction_type == "velocity":
            return 1.0
        t = ddpm.flow_time(torch.arange(ddpm.NUM_TIMESTEPS))
        return timestep_weight(t, self.args.timestep_weighting).mean().item()

    def active(self, step: int) -> bool:
        """Whether this step aligns. Once it does not, none after it does, on no process."""
        return bool(self.encoders) and self.args.alignment_coeff > 0 and step < self.stop_step

    def end(self):
        """Frees what is needed no longer, once `active` has said no."""
        self.encoders, self.reference = [], None
        self.draws.clear()

    def look_ahead(self, step: int):
        """Learns from the gate when it will have closed everywhere; once in its window is often enough."""
        if self.conflict == "gate":
            self.stop_step = min(self.stop_step, step + self.gate.steps_until_closed())

    def fork(self, t: torch.Tensor):
        """The transformer's `alignment_fork` for a batch of timesteps `t [B]`; None where nothing is to be weighed."""
        if not self.forks:
            return None
        shares, self.tau = self.statistics.lookup(t)
        # The encoders of a block share its weights, as they share the fork.
        by_block = shares.unflatten(0, (-1, len(self.encoders))).mean(1)
        self.shares = by_block.repeat_interleave(len(self.encoders), dim=0)
        # The fork stands at the deepest aligned block.
        s_f = by_block[-1, :, 0] if self.vrpo else torch.zeros_like(t)
        self.t, self.probe = t, torch.zeros_like(t, requires_grad=True)
        return alignment_fork(s_f, self.probe, self.conflict)

    @torch.no_grad()
    def targets(self, images: torch.Tensor) -> list[torch.Tensor]:
        """`y [B,N,E]` of each encoder: unit patch embeddings, float32, of `images [B,3,H,W]` in [-1, 1]."""
        features = [encoder(images) for encoder in self.encoders]
        if self.args.spatial_norm > 0:
            features = [spatial_normalize(f, self.args.spatial_norm) for f in features]
        return [normalize(f) for f in features]

    def loss(
        self,
        projections: tuple[torch.Tensor, ...],
        targets: list[torch.Tensor],
        t: torch.Tensor,
        loss_fm: torch.Tensor,
        batch: dict,
        step: int,
        micro_step: int,
        reference_inputs: tuple = (),
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`L_rep` without its coefficient, a scalar, and what to log.

        Args:
            projections: of the transformer, `[B,N,E]` each.
            targets: as `targets` gives them.
            t: flow time, `[B]`.
            loss_fm: `L_FM,i` of each sample, `[B]`; minus it is the fidelity reward.
            batch: `tokens [B,M]` of the structural reward; `index [B]` (on the CPU) for the noise of the actions.
            step, micro_step: optimizer step, and micro-batch within it.
            reference_inputs: what the transformer was called with, for the reference of `kl_coeff`.
        """
        args, logs = self.args, {}
        weight = timestep_weight(t, args.timestep_weighting) / self.mean_weight
        if self.conflict == "gate":
            weight = weight * self.gate.lookup(t)
        if self.reference is not None:
            with torch.no_grad(), self.autocast():
                references = self.reference(*reference_inputs, return_projections=True).projections
        total = 0.0
        for i, projection in enumerate(projections):
            mu, y = normalize(projection), targets[i % len(self.encoders)]
            if not self.vrpo:
                loss_i = repa_loss(mu, y)
                self._log(logs, **{"reward/semantic": -loss_i})
            else:
                if args.estimator == "expected":
                    loss_i, rewards, squares = expected_policy_loss(
                        mu, y, batch["tokens"], token_shares(self.shares[i]), self.tau[i, :, 1:]
                    )
                else:
                    loss_i, rewards, squares = self._sampled_loss(i, mu, y, batch, step, micro_step, logs)
                rewards = torch.cat([-loss_fm.detach().unsqueeze(1), rewards], dim=1)
                # Fidelity has no gradient at the tokens, and no tau.
                self.statistics.observe(i, t, rewards, F.pad(squares, (1, 0)))
                self._log(logs, **{f"reward/{name}": rewards[:, k] for k, name in enumerate(REWARDS)})
                if self.reference is not None:
                    kl = kl_penalty(mu, normalize(references[i]), args.policy_noise)
                    loss_i = loss_i + args.kl_coeff * kl
                    self._log(logs, kl=kl)
            total = total + (weight * loss_i).mean() / len(projections)
        logs["alignment_coeff"] = [args.alignment_coeff * weight.mean()]
        return total, {name: torch.stack(values).mean() for name, values in logs.items()}

    def _sampled_loss(self, i, mu, y, batch, step, micro_step, logs):
        # Steps that share a draw see the same batch: its actions stay relative to the tokens they were drawn around.
        if step % self.args.policy_epochs == 0:
            self.draws[i, micro_step] = mu.detach()
        xi = action_noise(self.args.seed, batch["index"], i, (self.args.group_size, *mu.shape[1:]), self.device)
        loss_i, rewards, squares, spread, clipped = sampled_policy_loss(
            mu,
            y,
            batch["tokens"],
            xi,
            token_shares(self.shares[i]),
            noise_scale=self.args.policy_noise,
            mu_old=self.draws[i, micro_step],
            clip_range=self.args.clip_range,
        )
        self._log(logs, **{f"spread/{name}": spread[:, k] for k, name in enumerate(REWARDS[1:])})
        if self.args.policy_epochs > 1:
            self._log(logs, clip_fraction=clipped)
        return loss_i, rewards, squares

    @staticmethod
    def _log(logs: dict, **values: torch.Tensor):
        """Collects the values of the projectors, whose mean is logged."""
        for name, value in values.items():
            logs.setdefault(name, []).append(value.detach().mean())

    def observe(self):
        """After backward: the cosine between the two gradients, which the probe's gradient is."""
        if self.forks:
            self.gate.observe(self.t, self.probe.grad)

    def update(self, step: int, all_reduce=None):
        """After optimizer step number `step`; `all_reduce(tensor)` sums over processes."""
        if self.vrpo:
            self.statistics.update(all_reduce)
        if self.forks:
            self.gate.update(all_reduce)
            if step % self.gate.window == 0:
                self.look_ahead(step)

    def summary(self) -> dict[str, float]:
        """Statistics for the log; waits for the device."""
        values = self.gate.summary() if self.forks else {}
        if self.vrpo:
            for name, numbers in zip(("std", "weight", "share"), self.statistics.summary()):
                values |= {f"{name}/{reward}": number for reward, number in zip(REWARDS, numbers.tolist())}
        return values
