# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The alignment term of a training step: `NoAlignment`, `REPI`, `REPA` and `VRPO`, which share one interface.

    aligned = AlignedTransformer(transformer, layers=[8], encoders=[encoder])
    objective = VRPO(aligned, max_train_steps=400_000)
    ...
    step = objective.begin(t)
    prediction, projections = aligned(x_t, timestep, ..., fork=step.fork, align=step.active)
    loss = loss_fm.mean() + objective.alignment_coeff * objective(step, projections, images, loss_fm)
    loss.backward()
    objective.observe(step)
    optimizer.step()
    objective.update()

With a scaffold (REPI, alone or beside REPA and VRPO) three lines have more:

    aligned = AlignedTransformer(transformer, layers=[8], encoders=[encoder], scaffold_layer=8)
    step = objective.begin(t, images)
    prediction, projections = aligned(x_t, ..., fork=step.fork, align=step.active, scaffold=step.scaffold)
    loss = ... + objective.scaffold_coeff * step.scaffold_distance()

`begin` to `observe` belong to a micro-batch, `update` to an optimizer step. The objective counts both. Formulas:
docs/method.md. Statistics are updated on the host: `update` waits for the device, unless `collect` was called before
`optimizer.step()`, which starts the copy of their sums.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..config import REPA_LOSS, alignment_end_of, end_of_alignment
from ..errors import InputError
from ..models import ddpm
from ..models.flow import typical_flow_times
from .attach import AlignedTransformer
from .encoders import on_grid, spatial_normalize
from .gradient_fork import CONFLICTS, alignment_fork
from .host_copy import DeviceSums
from .plateau import Plateau
from .policy import (
    TIMESTEP_WEIGHTS,
    action_noise,
    expected_policy_loss,
    kl_penalty,
    repa_loss,
    sampled_policy_loss,
    timestep_weight,
    token_shares,
)
from .release import RELEASES, ConflictGate, Release
from .reward_statistics import NUM_BINS, RewardStatistics, bin_edges, parse_reward_weighting, timestep_bins
from .rewards import BUILT_IN, DEFAULT_REWARDS, FIDELITY, load_rewards, normalize
from .scaffold import ScaffoldStep
from .token_weights import TOKEN_WEIGHTINGS, residual_weights, target_distance
from .whitening import TARGET_WHITENING, WhitenedEncoder, Whitenings, without_whitening


logger = logging.getLogger(__name__)
SUBSET_SIZE = 64  # tokens of the structural reward's subset, or all where there are fewer


@dataclass
class AlignmentStep:
    """The state of an objective in a micro-batch.

    Attributes:
        t: flow time, `[B]`, 1 being noise.
        active: whether this micro-batch is aligned.
        fork: argument for the call of the aligned transformer; None if gradients are neither weighed nor measured.
        targets: the encoders' targets, if they are computed before the objective is called.
        features: the encoders' output, `[B,M,E]` each, if they have run for the scaffold.
        scaffold: argument for the call of the aligned transformer; None without one.
        logs: device scalars to log, by name; set by the call.
    """

    t: torch.Tensor
    active: bool
    fork: Callable | None = None
    number: int = 0  # of the micro-batch within its optimizer step
    targets: list[torch.Tensor] | None = None
    features: list[torch.Tensor] | None = None
    scaffold: ScaffoldStep | None = None
    logs: dict[str, torch.Tensor] = field(default_factory=dict)
    probe: torch.Tensor | None = None  # its gradient is the cosine between the two gradients, and their ratio
    bins: torch.Tensor | None = None  # of the timesteps
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # of the tables in these bins, `[rows,B]`
    measures: list[torch.Tensor] = field(default_factory=list)  # of the samples, for the statistics, `[rows,B]` each

    def scaffold_distance(self) -> torch.Tensor:
        """The distance of the block's keys and values to the scaffold's, a scalar; 0 in the scaffold phase or without one."""
        return torch.zeros((), device=self.t.device) if self.scaffold is None else self.scaffold.distance()


class NoAlignment:
    """Flow matching without an alignment term; it defines the interface of the objectives.

    Args:
        aligned: the transformer, usually without projectors.
    """

    reward_names: tuple[str, ...] = ()
    alignment_coeff = 0.0

    scaffold_steps: float = 0
    scaffold_coeff = 0.0
    compiled = False

    def __init__(self, aligned: AlignedTransformer | None = None):
        self.aligned = aligned
        self.step_number = 0

    def active(self, step_number: int) -> bool:
        """Whether this optimizer step, from 0, aligns."""
        return False

    def scaffolding(self, step_number: int) -> bool:
        """Whether the scaffolded block gets keys and values from the encoders' features in this optimizer step, from 0."""
        return step_number < self.scaffold_steps

    def begin(self, t: torch.Tensor, images: torch.Tensor | dict[str, torch.Tensor] | None = None) -> AlignmentStep:
        """Starts a micro-batch of flow times `t [B]`.

        Args:
            images: as for `targets`; needed with a scaffold, whose features the encoders compute here.
        """
        return AlignmentStep(t, active=False)

    def _set_scaffold(self, max_train_steps: int, fraction: float, coeff: float, stop_step: int | None):
        """Sets the length of the scaffold phase, if the aligned transformer has a scaffold.

        Raises:
            InputError: if alignment stops before the block has learned keys and values of its own.
        """
        if self.aligned.scaffold is None:
            return
        # At least one step. A phase as long as the training does not end if the training becomes longer.
        self.scaffold_steps = math.inf if fraction == 1 else max(1, round(fraction * max_train_steps))
        self.scaffold_coeff = coeff
        if stop_step is not None and stop_step <= self.scaffold_steps:
            phase = "never ends" if fraction == 1 else f"lasts {self.scaffold_steps} steps"
            raise InputError(
                "alignment_stop_step",
                f"`alignment_stop_step` {stop_step} must be above the end of the scaffold phase, which {phase} with "
                f"`scaffold_fraction` {fraction}: the block has no keys and values of its own before",
            )

    def _begin(self, t: torch.Tensor, images) -> AlignmentStep:
        """Starts a micro-batch that may be aligned or have a scaffold; the first one with neither ends the alignment."""
        if not isinstance(t, torch.Tensor) or t.ndim != 1 or not t.is_floating_point():
            what = f"{t.dtype} {list(t.shape)}" if isinstance(t, torch.Tensor) else f"a {type(t).__name__}"
            raise ValueError(f"`t` must be flow times in [0, 1], floating-point numbers [B], not {what}")
        active, scaffolding = self.active(self.step_number), self.scaffolding(self.step_number)
        if not active and not scaffolding:
            self._end()
            return AlignmentStep(t, active=False)
        step = AlignmentStep(t, active)
        if self.aligned.scaffold is not None:
            if images is None:
                raise ValueError(
                    "a scaffold needs the encoders' features before the forward pass; call `begin(t, images)`"
                )
            step.features = self.features(images)
            step.scaffold = ScaffoldStep(step.features, replaces=scaffolding)
        return step

    def _end(self):
        """Frees the encoders and other unneeded objects."""
        if not self.aligned.ended:
            self.aligned.end()
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                step = self.step_number
                logger.info(f"alignment has ended at step {step}; neither encoder nor projector runs from here on")

    @torch.no_grad()
    def features(self, images: torch.Tensor | dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The encoders' patch embeddings of `images` on their own grids and not whitened, `[B,M,E]` each."""
        return [without_whitening(encoder)(images) for encoder in self.aligned.encoders]

    def targets(self, images: torch.Tensor | dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The encoders' patch embeddings of `images`: an empty list."""
        return []

    def __call__(
        self,
        step: AlignmentStep,
        projections: tuple[torch.Tensor, ...],
        images: torch.Tensor | dict[str, torch.Tensor],
        loss_fm: torch.Tensor,
        *,
        subset: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        inputs: tuple | dict = (),
    ) -> torch.Tensor:
        """The alignment loss, which is 0."""
        return torch.zeros((), device=loss_fm.device)

    def observe(self, step: AlignmentStep) -> None:
        """Updates statistics after the backward pass of a micro-batch."""
        if self.aligned is not None:
            self.aligned.clear_resting_gradients()

    def compile(self) -> None:
        """Compiles the objective's computation; there is none to compile here."""

    def collect(self, all_reduce: Callable | None = None) -> None:
        """Starts the copy of what was observed to the host; called between the last `observe` and the optimizer's step.

        It may be omitted; `update` then waits for the device.

        Args:
            all_reduce: as of `update`, which then adds up nothing itself.
        """

    def update(self, all_reduce: Callable | None = None) -> None:
        """Updates statistics after an optimizer step."""
        self.step_number += 1

    def summary(self) -> dict[str, float]:
        """Statistics for the log."""
        return {}

    def stateful(self) -> dict:
        """The objects to save in a checkpoint, by file name; they have `state_dict` and `load_state_dict` of tensors."""
        return {}

    def release_state(self) -> dict:
        """The state of the end of alignment, and of the scaffold phase, for a checkpoint, in JSON types."""
        return {"stop_step": None, "gate_window": None, **self._scaffold_state()}

    def _scaffold_state(self) -> dict:
        ends = 0 < self.scaffold_steps < math.inf
        return {"scaffold_steps": self.scaffold_steps} if ends else {}

    def resume(self, step_number: int, release_state: dict | None = None) -> None:
        """Continues at an optimizer step, after `stateful()` was loaded.

        Args:
            release_state: what `release_state()` returned, if a checkpoint is continued. A run that has become longer keeps
                its scaffold phase.
        """
        self.step_number = step_number
        if release_state is not None and self.scaffold_steps:
            self.scaffold_steps = release_state.get("scaffold_steps", self.scaffold_steps)


class REPI(NoAlignment):
    """A scaffold without projectors (arXiv 2609.35292): one block learns to attend as to an encoder's features.

    Args:
        aligned (`AlignedTransformer`): has a scaffold and encoders.
        max_train_steps (`int`): optimizer steps of the training.
        scaffold_fraction (`float`): the part of them in which the block gets keys and values from the features; with 1 it
            always does (the oracle), and the transformer cannot be sampled without features.
        scaffold_coeff (`float`): weight of the distance to the scaffold's keys and values afterwards.
        alignment_stop_step (`int`, *optional*): the first step without that pull, and without the encoders.

    Raises:
        ValueError: if `aligned` has no scaffold.
        InputError: if the pull ends before the scaffold phase.

    Example:

    ```python
    from diffusers_vrpo import REPI, AlignedTransformer, SiTTransformer2DModel, load_encoder, sit_preset

    transformer = SiTTransformer2DModel(sample_size=8, in_channels=3, num_classes=10, **sit_preset("SiT-XS/2"))
    encoder = load_encoder("embedded:digits", grid_size=(4, 4))
    aligned = AlignedTransformer(transformer, encoders=[encoder], scaffold_layer=1)
    objective = REPI(aligned, max_train_steps=1000, scaffold_fraction=0.1)
    ```
    """

    def __init__(
        self,
        aligned: AlignedTransformer,
        max_train_steps: int,
        scaffold_fraction: float = 0.05,
        scaffold_coeff: float = 2.0,
        alignment_stop_step: int | None = None,
    ):
        super().__init__(aligned)
        if aligned.scaffold is None:
            raise ValueError("REPI needs an aligned transformer with `scaffold_layer`")
        self._set_scaffold(max_train_steps, scaffold_fraction, scaffold_coeff, alignment_stop_step)
        self.stop_step = math.inf if alignment_stop_step is None else alignment_stop_step

    def active(self, step_number: int) -> bool:
        """Whether encoders run in this optimizer step, from 0."""
        return step_number < self.stop_step

    def begin(self, t: torch.Tensor, images: torch.Tensor | dict[str, torch.Tensor] | None = None) -> AlignmentStep:
        return self._begin(t, images)


class REPA(NoAlignment):
    """REPA's cosine loss (arXiv 2410.06940) on every projection.

    Args:
        aligned (`AlignedTransformer`): has projectors and encoders.
        max_train_steps (`int`): optimizer steps of the training; the gate's window is 2 % of it.
        alignment_coeff (`float`): lambda, by which the loss is to be multiplied; with 0 nothing is aligned.
        alignment_stop_step (`int`, *optional*): the first step without alignment.
        timestep_weighting (`str`): `"uniform"`, or `"low_noise"`: w(t) = sigmoid(20 (0.7 - t)).
        spatial_norm (`float`): a in iREPA's `(f - a mean) / std` of the targets; 0 for none.
        conflict (`str`, *optional*): what to do where alignment turns against flow matching: `"none"`, `"gate"` (close the
            timestep bin permanently) or `"project"` (remove the opposing part); by default what `release` asks for.
        log_gradients (`bool`): measure cosine and ratio of the two gradients also where nothing depends on them.
        token_weighting (`str`): `"uniform"`, or `"residual"`: tokens far from their targets count more (token_weights.py).
        release (`str`, *optional*): what ends alignment: `"none"`, `"stop"` (`alignment_stop_step`), `"gate"` (the same as
            `conflict="gate"`), or `"plateau"`, once the distance to the targets has stopped falling (plateau.py); the last two at
            `alignment_stop_step` at the latest. By default what `conflict` and `alignment_stop_step` say.
        prediction_type (`str`, *optional*): `"velocity"`, whose flow times are uniform, or `"epsilon"`, whose flow times
            are those of DDPM's noise levels; by default that of the transformer's config, or `"velocity"`.
        device (*optional*): device of the statistics; by default the transformer's.
        scaffold_fraction, scaffold_coeff: as of `REPI`, if `aligned` has a scaffold.
        timestep_sampling, logit_mean, logit_std: how the times of the training are drawn (`models.flow.sample_time`), over which
            the mean of w(t) is 1.

    Raises:
        InputError: if `conflict`, `release` and `alignment_stop_step` contradict each other.

    Example:

    ```python
    from diffusers_vrpo import REPA, AlignedTransformer, SiTTransformer2DModel, load_encoder, sit_preset

    transformer = SiTTransformer2DModel(sample_size=8, in_channels=3, num_classes=10, **sit_preset("SiT-XS/2"))
    encoder = load_encoder("embedded:digits", grid_size=(4, 4))
    aligned = AlignedTransformer(transformer, layers=[2], encoders=[encoder])
    objective = REPA(aligned, max_train_steps=1000, alignment_coeff=0.5)
    ```
    """

    def __init__(
        self,
        aligned: AlignedTransformer,
        max_train_steps: int,
        alignment_coeff: float = 0.5,
        alignment_stop_step: int | None = None,
        timestep_weighting: str = "uniform",
        spatial_norm: float = 0.0,
        conflict: str | None = None,
        prediction_type: str | None = None,
        device: torch.device | None = None,
        log_gradients: bool = False,
        token_weighting: str = "uniform",
        release: str | None = None,
        scaffold_fraction: float = 0.05,
        scaffold_coeff: float = 2.0,
        timestep_sampling: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ):
        super().__init__(aligned)
        self._set_scaffold(max_train_steps, scaffold_fraction, scaffold_coeff, alignment_stop_step)
        conflict, release = end_of_alignment(conflict, release, alignment_stop_step)
        for name, value, choices in (
            ("prediction_type", prediction_type or "velocity", ("velocity", "epsilon")),
            ("conflict", conflict, CONFLICTS),
            ("release", release, RELEASES),
            ("timestep_weighting", timestep_weighting, TIMESTEP_WEIGHTS),
            ("token_weighting", token_weighting, TOKEN_WEIGHTINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r} must be one of {', '.join(choices)}")
        self.alignment_coeff, self.conflict = alignment_coeff, conflict
        self.timestep_weighting, self.spatial_norm = timestep_weighting, spatial_norm
        self.token_weighting = token_weighting
        self.reward_names = ("semantic",)
        self.device = device or next(aligned.parameters()).device
        # Kept without the encoders, which are freed when alignment ends.
        whitenings = [encoder.whitening for encoder in aligned.encoders if isinstance(encoder, WhitenedEncoder)]
        self.whitenings = Whitenings(whitenings) if whitenings else None
        self.forks = conflict != "none" or log_gradients
        self.gate = ConflictGate(max_train_steps, acts=conflict == "gate")
        self.plateau = Plateau(max_train_steps, len(aligned.projectors)) if release == "plateau" else None
        self.release = Release(self.plateau or self.gate, alignment_stop_step)
        self.bin_edges = bin_edges(self.device)
        self._set_statistics()
        config = getattr(aligned.transformer, "config", {})
        prediction_type = prediction_type or config.get("prediction_type", "velocity")
        self.mean_weight = self._mean_timestep_weight(prediction_type, timestep_sampling, logit_mean, logit_std)
        self._micro_steps = 0

    def _set_statistics(self, *of_rewards: RewardStatistics) -> None:
        """Sets what is updated after an aligned optimizer step, in the order of the samples' measures, and makes its sums."""
        of_release = [self.plateau] * (self.plateau is not None) + [self.gate] * self.forks
        self._all_statistics = [*of_rewards, *of_release]
        # The first measure is 1: it counts the samples.
        num_measures = 1 + sum(each.num_measures for each in self._all_statistics)
        self.sums = DeviceSums(num_measures, NUM_BINS, self.device) if self._all_statistics else None

    def _mean_timestep_weight(self, prediction_type: str, timestep_sampling: str, *logit: float) -> float:
        """`E[w]` over the flow times of the training, relative to the analytic one for uniform t."""
        if timestep_sampling != "uniform":
            t = typical_flow_times(prediction_type, timestep_sampling, *logit)
        elif prediction_type == "velocity":
            return 1.0
        else:
            t = ddpm.flow_time(torch.arange(ddpm.NUM_TIMESTEPS))
        return timestep_weight(t, self.timestep_weighting).mean().item()

    def active(self, step_number: int) -> bool:
        """Whether this optimizer step, from 0, aligns. After the first step that does not, no later one does, on any process."""
        return bool(self.aligned.layers) and self.alignment_coeff > 0 and self.release.active(step_number)

    def begin(self, t: torch.Tensor, images: torch.Tensor | dict[str, torch.Tensor] | None = None) -> AlignmentStep:
        """Starts a micro-batch of flow times `t [B]`. The first one that is not aligned ends the alignment.

        Args:
            images: as for `targets`; needed with a scaffold.
        """
        step = self._begin(t, images)
        if not step.active:
            return step
        step.number = self._micro_steps
        self._micro_steps += 1
        if self._all_statistics:
            step.bins = timestep_bins(t, self.bin_edges.to(t.dtype))
            # One copy to the device and one look-up for all tables.
            rows, table = self._joined_tables()
            step.values = dict(
                zip(rows, table.to(t.device, non_blocking=True)[:, step.bins].split(list(rows.values())))
            )
            step.measures.append(step.values["count"])
        if self.forks:
            step.probe = step.values["probe"].detach().requires_grad_()
            share = step.values["fidelity"][0] if "fidelity" in step.values else None
            step.fork = alignment_fork(share, step.probe, self.conflict, self.compiled)
        return step

    def _joined_tables(self) -> tuple[dict[str, int], torch.Tensor]:
        """The number of rows of each table, by name, and all tables in one, float32 `[rows,bins]`, on the host."""
        tables = self._tables()
        return {name: len(table) for name, table in tables.items()}, torch.cat(list(tables.values()))

    def _tables(self) -> dict[str, torch.Tensor]:
        """What the loss, the fork and the statistics look up by timestep, by name: float32 `[rows,bins]`, on the host."""
        # Two constants: on the device, each would take a kernel of its own.
        tables = {"count": torch.ones(1, NUM_BINS)}
        if self.forks:
            tables["probe"] = torch.zeros(2, NUM_BINS)
        if self.conflict == "gate":
            tables["gate"] = self.gate.gates().float().unsqueeze(0)
        return tables

    @torch.no_grad()
    def targets(
        self,
        images: torch.Tensor | dict[str, torch.Tensor],
        num_tokens: int | None = None,
        features: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """`y [B,N,E]` of each encoder: unit patch embeddings, float32.

        Args:
            images: the encoders' input: pixels `[B,3,H,W]` in [-1, 1], or a batch with cached features.
            num_tokens: N of the last call; by default the product of the aligned transformer's `grid_size`, if it is known.
                Embeddings on another grid are resampled to that of the last call, or to `grid_size`.
            features: what `features(images)` returned, if the encoders have run already.
        """
        grid_size = self.aligned.grid_size
        last_grid = self.aligned.last_grid
        if num_tokens is None and grid_size is not None:
            num_tokens = math.prod(grid_size)
        elif last_grid is not None and math.prod(last_grid) == num_tokens:
            grid_size = last_grid
        features = self.features(images) if features is None else features
        # Only these targets are whitened: the features may be a scaffold's, too. Both lists are empty once the end of
        # alignment has freed the encoders.
        features = [
            encoder.whitening(f) if isinstance(encoder, WhitenedEncoder) else f
            for encoder, f in zip(self.aligned.encoders, features, strict=True)
        ]
        if num_tokens is not None:
            grids = [getattr(encoder, "grid_size", None) for encoder in self.aligned.encoders]
            features = [on_grid(f, num_tokens, grid_size, grid) for f, grid in zip(features, grids, strict=True)]
        if self.spatial_norm > 0:
            features = [spatial_normalize(f, self.spatial_norm) for f in features]
        return [normalize(f) for f in features]

    def __call__(
        self,
        step: AlignmentStep,
        projections: tuple[torch.Tensor, ...],
        images: torch.Tensor | dict[str, torch.Tensor],
        loss_fm: torch.Tensor,
        *,
        subset: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        inputs: tuple | dict = (),
    ) -> torch.Tensor:
        """Computes the alignment loss `L_rep` without its coefficient, a scalar, and sets `step.logs`.

        Args:
            projections: the projections of the aligned transformer, `[B,N,E]` each.
            images: as for `targets`; not used if `step.targets` are set.
            loss_fm: `L_FM,i` of each sample, `[B]`; minus it is the fidelity reward.
            subset: tokens `[B,M]` of the structural reward; drawn here when not given.
            index: global sample indices `[B]` on the CPU, which the noise of sampled actions is a function of; drawn from
                torch's generator when not given.
            inputs: what the transformer was called with, as a tuple or a dictionary; needed with `kl_coeff`.
        """
        if not step.active:
            step.logs = {"alignment_coeff": torch.zeros((), device=loss_fm.device)} if self.aligned.projectors else {}
            return torch.zeros((), device=loss_fm.device)
        if loss_fm.shape != step.t.shape:
            raise ValueError(
                f"`loss_fm` must be the loss of each sample, {list(step.t.shape)}, not {list(loss_fm.shape)}"
            )
        targets = step.targets
        if targets is None:
            targets = self.targets(images, projections[0].shape[1], step.features)
        references = self._reference_projections(inputs)
        if subset is None and self.compiled:
            subset = self._draw_subset(projections[0])  # a compiled graph would draw other numbers
        weight = self._weight(step)
        total, step.logs, measures = self._losses(
            step, projections, targets, weight, loss_fm, (subset, index, references)
        )
        if weight is None:
            step.logs["alignment_coeff"] = total.new_full((), self.alignment_coeff)
        else:
            step.logs["alignment_coeff"] = self.alignment_coeff * weight.mean()
        step.measures += measures
        return total

    def _losses(
        self, step, projections, targets, weight, loss_fm, draws
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
        """The loss of all projectors, the values to log, and the samples' rewards and distances. `compile` compiles it."""
        terms, logs, rewards, distances = [], {}, [], []
        for i, projection in enumerate(projections):
            mu, y = normalize(projection), targets[i % len(targets)]
            if self.plateau is not None:
                distances.append(target_distance(mu.detach(), y).mean(-1).unsqueeze(0))
            loss = self._loss(step, i, mu, y, loss_fm, draws, logs, rewards)
            mean = (loss if weight is None else weight * loss).mean()
            terms.append(mean / len(projections) if len(projections) > 1 else mean)
        logs = {name: each[0] if len(each) == 1 else torch.stack(each).mean() for name, each in logs.items()}
        return sum(terms[1:], terms[0]), logs, rewards + distances

    def compile(self) -> None:
        """Compiles the loss, the backward pass of the fork and the sums over samples, each as one graph of fixed shapes.

        Call it before the first step. Numbers agree up to the rounding of float32.
        """
        if self._compiles_loss():
            self._losses = torch.compile(self._losses, fullgraph=True, dynamic=False)
        if self.sums is not None:
            self.sums.compile()
        self.compiled = True

    def _compiles_loss(self) -> bool:
        """Whether the loss is one graph."""
        return True

    def _weight(self, step: AlignmentStep) -> torch.Tensor | None:
        """The weight of the samples in the loss: w(t) and the gate, `[B]`, times that of the plateau, a scalar. None means 1."""
        weights = []
        if self.timestep_weighting != "uniform":
            weights.append(timestep_weight(step.t, self.timestep_weighting) / self.mean_weight)
        if self.conflict == "gate":
            weights.append(step.values["gate"][0])
        if self.plateau is not None:
            weights.append(self.plateau.weight().to(step.t.device, non_blocking=True))
        return math.prod(weights[1:], start=weights[0]) if weights else None

    def _reference_projections(self, inputs) -> tuple[torch.Tensor, ...] | None:
        return None

    def _draw_subset(self, projection: torch.Tensor) -> torch.Tensor | None:
        """The tokens of the structural reward, `[B,M]`; None without one."""
        return None

    def _loss(self, step, i, mu, y, loss_fm, draws, logs, rewards) -> torch.Tensor:
        """Computes the loss of one projector, `[B]`; `draws` are subset, indices and projections of the reference model.

        It adds to `logs`, and to `rewards` what the statistics need.
        """
        loss = repa_loss(mu, y)
        self._log(logs, **{"reward/semantic": -loss})
        weights = self._token_weights(mu, y)
        return loss if weights is None else repa_loss(mu, y, weights)

    def _token_weights(self, mu: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        """The weights of the tokens in the loss, `[B,N]`; None if they count alike."""
        return residual_weights(mu, y) if self.token_weighting == "residual" else None

    @staticmethod
    def _log(logs: dict, **values: torch.Tensor):
        """Collects the values of the projectors, whose mean is logged."""
        for name, value in values.items():
            value = value.detach()
            logs.setdefault(name, []).append(value.mean() if value.ndim else value)

    def observe(self, step: AlignmentStep) -> None:
        """Adds up the samples' measures; after backward, cosine and ratio of the two gradients are the gradient of the probe."""
        if step.active and self.sums is not None:
            of_gradients = [] if step.probe is None else ConflictGate.measures(step.probe.grad)
            self.sums.add(step.bins, step.measures + of_gradients)
        super().observe(step)

    def _release_counts(self) -> bool:
        """Whether the statistics that end alignment run in the current step.

        In the scaffold phase they would describe a model that is told what the image shows, so they begin after it.
        """
        return not self.scaffolding(self.step_number)

    def collect(self, all_reduce: Callable | None = None) -> None:
        if self.active(self.step_number) and self.sums is not None:
            self.sums.collect(all_reduce)

    def update(self, all_reduce: Callable | None = None) -> None:
        """Updates statistics after an optimizer step; `all_reduce(tensor)` sums over processes."""
        aligned, counts = self.active(self.step_number), self._release_counts()
        self.step_number += 1
        self._micro_steps = 0
        if aligned:
            self._update_statistics(all_reduce, counts)

    def _update_statistics(self, all_reduce, release_counts: bool):
        if self.sums is not None:
            sums = self.sums.read(all_reduce)
            parts = sums[:, 1:].split([each.num_measures for each in self._all_statistics], dim=1)
            for statistics, part in zip(self._all_statistics, parts, strict=True):
                if release_counts or isinstance(statistics, RewardStatistics):
                    statistics.update(sums[0, 0], part)
        if self.step_number % self.release.gate.window == 0:
            self.release.look_ahead(self.step_number)

    def summary(self) -> dict[str, float]:
        """Statistics for the log."""
        of_gradients = self.gate.summary() if self.forks else {}
        has_distances = self.plateau is not None and self.plateau.step > 0
        return of_gradients | (self.plateau.summary() if has_distances else {})

    def stateful(self) -> dict:
        whitenings = {} if self.whitenings is None else {TARGET_WHITENING: self.whitenings}
        plateau = {} if self.plateau is None else {"alignment_plateau": self.plateau}
        return {"conflict_gate": self.gate, **plateau, **whitenings}

    def release_state(self) -> dict:
        return self.release.state() | self._scaffold_state()

    def resume(self, step_number: int, release_state: dict | None = None) -> None:
        super().resume(step_number, release_state)
        if release_state is None or not self.release.restore(release_state):
            self.release.look_ahead(step_number)


class VRPO(REPA):
    """Group-relative rewards instead of REPA's loss: a policy on the projected tokens (docs/method.md).

    Args:
        aligned, max_train_steps, alignment_coeff, alignment_stop_step, timestep_weighting, spatial_norm, conflict,
            prediction_type, device, token_weighting, release: as of `REPA`.
        rewards (`list`): `"fidelity"`, first or not at all; `"semantic"`, `"structural"`; functions of (action, mu, y,
            subset), `TokenReward`s, or `"package.module:name"` of either.
        reward_weighting (`str`): `"auto"` (`"0,2,1"` for VRPO's own three rewards, `"equal"` for others),
            `"inverse_variance"`, `"equal"`, `"inverse_std"`, `"raw"`, or fixed shares with commas, one for each of `rewards`.
        estimator (`str`): `"expected"`, the limit of small noise in closed form, or `"sampled"` groups of actions.
        policy_noise (`float`): sigma of the actions.
        group_size (`int`): G, actions per token.
        policy_epochs (`int`): optimizer steps that share a draw of actions; they must see the same batch.
        clip_range (`float`): c of PPO's clipping.
        kl_coeff (`float`): weight of the divergence from the model at the start.
        seed (`int`): of the actions' noise.
        scaffold_fraction, scaffold_coeff: as of `REPI`, if `aligned` has a scaffold.
        timestep_sampling, logit_mean, logit_std: as of `REPA`.
        autocast: returns the autocast context for the reference model of `kl_coeff`.

    Raises:
        InputError: if rewards or their weighting are not valid, or options of the end of alignment contradict each other.

    Example:

    ```python
    from diffusers_vrpo import VRPO, AlignedTransformer, SiTTransformer2DModel, load_encoder, sit_preset

    transformer = SiTTransformer2DModel(sample_size=8, in_channels=3, num_classes=10, **sit_preset("SiT-XS/2"))
    encoder = load_encoder("embedded:digits", grid_size=(4, 4))
    aligned = AlignedTransformer(transformer, layers=[2], encoders=[encoder])
    objective = VRPO(aligned, max_train_steps=1000, reward_weighting="equal", release="gate")
    ```
    """

    def __init__(
        self,
        aligned: AlignedTransformer,
        max_train_steps: int,
        alignment_coeff: float = 4.0,
        alignment_stop_step: int | None = None,
        timestep_weighting: str = "uniform",
        spatial_norm: float = 0.0,
        conflict: str | None = None,
        prediction_type: str | None = None,
        device: torch.device | None = None,
        rewards: Sequence = DEFAULT_REWARDS,
        reward_weighting: str = "auto",
        estimator: str = "expected",
        policy_noise: float = 0.1,
        group_size: int = 8,
        policy_epochs: int = 1,
        clip_range: float = 0.2,
        kl_coeff: float = 0.0,
        seed: int = 0,
        autocast: Callable = contextlib.nullcontext,
        token_weighting: str = "uniform",
        release: str | None = None,
        scaffold_fraction: float = 0.05,
        scaffold_coeff: float = 2.0,
        timestep_sampling: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ):
        super().__init__(
            aligned,
            max_train_steps,
            alignment_coeff,
            alignment_stop_step,
            timestep_weighting,
            spatial_norm,
            conflict,
            prediction_type,
            device,
            token_weighting=token_weighting,
            release=release,
            scaffold_fraction=scaffold_fraction,
            scaffold_coeff=scaffold_coeff,
            timestep_sampling=timestep_sampling,
            logit_mean=logit_mean,
            logit_std=logit_std,
        )
        if estimator not in ("expected", "sampled"):
            raise ValueError(f"estimator {estimator!r} must be one of expected, sampled")
        self.fidelity, self.rewards = load_rewards(rewards)
        self.reward_names = (FIDELITY,) * self.fidelity + tuple(reward.name for reward in self.rewards)
        self.estimator = estimator
        self.policy_noise = policy_noise
        self.group_size = group_size
        self.policy_epochs = policy_epochs
        self.clip_range = clip_range
        self.kl_coeff = kl_coeff
        self.seed, self.autocast = seed, autocast
        self.forks = True  # fidelity has its share there, and the conflict is measured
        weighting = parse_reward_weighting(reward_weighting, self.reward_names)
        # One row per projector, ordered by block and then by encoder.
        self.statistics = RewardStatistics(
            len(aligned.projectors), len(self.reward_names), weighting, num_gradients=len(self.rewards)
        )
        self._set_statistics(self.statistics)
        if kl_coeff and aligned.scaffold is not None:
            raise ValueError("kl_coeff cannot be combined with a scaffold: the model at the start has none")
        self.reference = aligned.frozen_copy() if kl_coeff else None
        self.draws: dict[tuple[int, int], torch.Tensor] = {}

    def _end(self):
        super()._end()
        self.reference = None
        self.draws.clear()

    def _tables(self) -> dict[str, torch.Tensor]:
        shares, tau = self.statistics.tables()
        # The encoders of a block share its reward weights, as they share the fork.
        num_encoders = len(self.aligned.embed_dims)
        by_block = shares.unflatten(0, (-1, num_encoders)).mean(1)
        of_tokens = token_shares(by_block.mT.flatten(0, 1), self.fidelity).unflatten(0, (-1, NUM_BINS)).mT
        of_tokens = of_tokens.repeat_interleave(num_encoders, dim=0)
        tables = {"shares": of_tokens.flatten(0, 1), "tau": tau[:, self.fidelity :].flatten(0, 1)}
        if self.fidelity and self.statistics.has_share(0):
            tables["fidelity"] = by_block[-1, :1]  # the fork stands at the deepest aligned block
        return super()._tables() | tables

    def _reference_projections(self, inputs) -> tuple[torch.Tensor, ...] | None:
        if self.reference is None:
            return None
        if not inputs:
            raise ValueError("`kl_coeff` compares with the model at the start; call the objective with `inputs`")
        with torch.no_grad(), self.autocast():
            return (self.reference(**inputs) if isinstance(inputs, dict) else self.reference(*inputs))[1]

    def _draw_subset(self, projection: torch.Tensor) -> torch.Tensor:
        order = torch.rand(projection.shape[:2], device=projection.device).argsort(dim=1)
        return order[:, : min(SUBSET_SIZE, projection.shape[1])]

    def _compiles_loss(self) -> bool:
        # Sampled actions are drawn and kept in between, and rewards from outside may do anything.
        return self.estimator == "expected" and all(reward in BUILT_IN.values() for reward in self.rewards)

    def _loss(self, step, i, mu, y, loss_fm, draws, logs, rewards) -> torch.Tensor:
        subset, index, references = draws
        if subset is None:
            subset = self._draw_subset(mu)
        weights = self._token_weights(mu, y)
        rows = slice(i * len(self.rewards), (i + 1) * len(self.rewards))
        shares, tau = (step.values[name][rows].mT for name in ("shares", "tau"))
        if self.estimator == "expected":
            loss, values, squares = expected_policy_loss(mu, y, subset, shares, tau, self.rewards, weights)
        else:
            loss, values, squares = self._sampled_loss(step, i, mu, y, subset, shares, weights, index, logs)
        # Fidelity has neither a gradient at the tokens nor a tau.
        fidelity = [-loss_fm.detach().unsqueeze(1)] if self.fidelity else []
        measures = torch.cat([*fidelity, values, squares], dim=1).detach()
        rewards.append(measures.mT)
        means = measures[:, : len(self.reward_names)].mean(0)
        self._log(logs, **{f"reward/{name}": means[k] for k, name in enumerate(self.reward_names)})
        if references is not None:
            kl = kl_penalty(mu, normalize(references[i]), self.policy_noise)
            loss = loss + self.kl_coeff * kl
            self._log(logs, kl=kl)
        return loss

    def _sampled_loss(self, step, i, mu, y, subset, shares, weights, index, logs):
        # Steps that share a draw see the same batch, whose actions stay relative to the tokens that they were drawn around.
        if self.step_number % self.policy_epochs == 0:
            self.draws[i, step.number] = mu.detach()
        shape = (self.group_size, *mu.shape[1:])
        if index is None:
            xi = torch.randn(self.group_size, *mu.shape, device=mu.device)
        else:
            xi = action_noise(self.seed, index, i, shape, self.device)
        loss, rewards, squares, spread, clipped = sampled_policy_loss(
            mu,
            y,
            subset,
            xi,
            shares,
            rewards=self.rewards,
            noise_scale=self.policy_noise,
            mu_old=self.draws[i, step.number],
            clip_range=self.clip_range,
            token_weights=weights,
        )
        self._log(logs, **{f"spread/{reward.name}": spread[:, k] for k, reward in enumerate(self.rewards)})
        if self.policy_epochs > 1:
            self._log(logs, clip_fraction=clipped)
        return loss, rewards, squares

    def summary(self) -> dict[str, float]:
        values = super().summary()
        for name, numbers in zip(("std", "weight", "share"), self.statistics.summary()):
            values |= {f"{name}/{reward}": number for reward, number in zip(self.reward_names, numbers.tolist())}
        return values

    def stateful(self) -> dict:
        return {"reward_statistics": self.statistics, **super().stateful()}


def objective_from_config(
    config,
    aligned: AlignedTransformer,
    max_train_steps: int,
    rewards: Sequence = DEFAULT_REWARDS,
    autocast: Callable = contextlib.nullcontext,
    prediction_type: str | None = None,
    scaffold_steps: int | None = None,
) -> NoAlignment:
    """Builds the objective for the alignment and policy options.

    Args:
        config: `objective` (one of `OBJECTIVES` in config.py) and the options of the same names as the arguments of the
            classes.
        rewards: rewards of VRPO, including those that are Python objects.
        prediction_type: of the transformer, if its config does not say it.
        scaffold_steps: the length of the scaffold phase, instead of `scaffold_fraction`, of a run that keeps it.

    Raises:
        InputError: if `reward_weighting` or rewards are not valid.
    """
    if config.objective == "none":
        return NoAlignment(aligned)
    conflict, release = alignment_end_of(config)
    keeps = scaffold_steps is not None and scaffold_steps < max_train_steps
    shared = {
        "alignment_stop_step": config.alignment_stop_step,
        "scaffold_fraction": scaffold_steps / max_train_steps if keeps else config.scaffold_fraction,
        "scaffold_coeff": config.scaffold_coeff,
    }
    if config.objective == "repi":
        return REPI(aligned, max_train_steps, **shared)
    shared |= {
        "alignment_coeff": config.alignment_coeff,
        "timestep_weighting": config.timestep_weighting,
        "spatial_norm": config.spatial_norm,
        "token_weighting": config.token_weighting,
        "conflict": conflict,
        "release": release,
        "prediction_type": prediction_type,
        "timestep_sampling": config.timestep_sampling,
        "logit_mean": config.logit_mean,
        "logit_std": config.logit_std,
    }
    if config.objective in REPA_LOSS:
        return REPA(aligned, max_train_steps, **shared, log_gradients=config.log_gradients)
    return VRPO(
        aligned,
        max_train_steps,
        **shared,
        rewards=rewards,
        reward_weighting=config.reward_weighting,
        estimator=config.estimator,
        policy_noise=config.policy_noise,
        group_size=config.group_size,
        policy_epochs=config.policy_epochs,
        clip_range=config.clip_range,
        kl_coeff=config.kl_coeff,
        seed=config.seed,
        autocast=autocast,
    )
