# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The generative policy in a training run: rollouts, rewards, the gradient that is added to flow matching's, and guards.

The order in an optimizer step is: backward pass of the real batch, `add_gradient`, clipping, optimizer, averaged weights,
`check_guards`. Formulas: objective.py and docs/generative.md.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...config import GenerativeConfig, last_part, settings_to_keep
from ...errors import InputError, TrainingStopped
from ...evaluation.feature_statistics import (
    FeatureSet,
    collect_features,
    describe,
    gather_rows,
    known_statistics,
    shared_statistics,
)
from ...evaluation.image_encoders import default_batch_size, image_features, load_image_encoder
from ...evaluation.metrics import frechet_distance, mean_and_covariance, precision_recall
from ...files import default_permissions
from ...models.autoencoder import encode_images
from ...models.flow import flow_matching_loss, forward_process, x0_estimate
from ...pipelines.sampling import check_steps, decoded_images
from ...random_streams import CLASSES, DRAWS, LOOK_NOISE, LOOK_REAL, ROLLOUT_NOISE, random_stream
from ...training.callbacks import TrainerCallback
from ...training.distributed import ema_weights, full_pipeline, run_and_share_errors
from ...training.interruption import wait_before_exit
from ...training.output_dir import check_writable, writing
from ...training.setup import set_learning_rate, trainable_parameters
from ...training.throughput import forward_flops
from .guards import GuardValues, Limits, tripped_guard
from .objective import (
    add_balanced,
    denoising_loss,
    sample_advantages,
    sample_policy_loss,
    stratified_times,
    update_cost,
)
from .rewards import (
    ENOUGH_FOR_FRECHET,
    REAL_VALUES,
    REWARDS,
    SampleRewards,
    load_reward_functions,
    parse_reward_weights,
    reference_statistics,
)


logger = get_logger(__name__)
REAL_IMAGES = 256  # training images on which the guards measure the flow-matching loss


# ----------------------------------------------------------------------------------------------------------------------
# The policy


class GenerativePolicy(TrainerCallback):
    """Trains on rewards for generated images, in addition to the loss on real ones, from a given step on.

    This is a callback of the trainer. Classes, noise and timesteps of rollout r depend on (seed, r) only, so that a rollout
    is the same for any number of processes, each of which has whole groups. A checkpoint has the statistics, the queue of
    features and the first measurement of the guards.

    Args:
        args (`GenerativeConfig`): the options of the policy.
        rewards (`list`): rewards for generated images in addition to the built-in ones: functions `reward(images, features,
            labels) -> [B]` (rewards.py), or their names as `"package.module:name"` or `"FILE.py:NAME"`.

    Raises:
        InputError: if `generative_policy_start_step` is not given or a reward cannot be loaded; when training starts, if the
            options cannot work with the trainer.
    """

    state_name = "generative_policy"

    def __init__(self, args: GenerativeConfig, rewards: Sequence[Callable | str] = ()):
        if args.generative_policy_start_step is None:
            raise InputError(
                "generative_policy_start_step",
                "`generative_policy_start_step` is missing; give the step from which the policy follows rewards",
            )
        self.args, self.start = args, args.generative_policy_start_step
        self.functions = load_reward_functions([*(args.reward_function or []), *rewards])

    def on_init_end(self, trainer):
        args = self.args = trainer.args  # these also have the names of the trainer's other arguments
        accelerator, data = trainer.accelerator, trainer.data
        self.accelerator = accelerator
        self.pipeline = trainer.pipeline
        self.output_dir = trainer.output_dir
        self.transformer, self.device = self.pipeline.transformer, accelerator.device
        self.validation = trainer.validation
        weights = parse_reward_weights(args.reward_weights, [*REWARDS, *self.functions])
        self._check(data, trainer.max_train_steps)
        self.limits = Limits(args.guard_loss_rise, args.guard_recall_fall, args.guard_distance_rise)
        self.anchor_coeff = (
            (0.3 if args.rollout_epochs > 1 else 0.0) if args.anchor_coeff is None else args.anchor_coeff
        )
        size = self.transformer.config.sample_size
        self.shape = (self.transformer.config.in_channels, *((size, size) if isinstance(size, int) else size))

        # 1. The reward encoder, and its features of training images.
        name = args.reward_encoder or args.encoder[0]
        with accelerator.main_process_first():
            self.encoder = load_image_encoder(
                name, device=self.device, cache_dir=args.cache_dir, option="reward_encoder"
            )
        self.encoder.take_shallow(args.reward_shallow_layer)
        functions = self.functions
        rows = data.fixed_rows(args.reward_reference_images)
        if data.random_access:  # other data are already in random order, group by group
            rows = random_stream(0, 1, LOOK_REAL).permutation(rows)
        reference = self._reference(data, rows, name)
        kind = args.fidelity_reward
        if kind == "auto":
            kind = "frechet" if len(rows) >= ENOUGH_FOR_FRECHET else "mmd"
        self.rewards = SampleRewards(reference, args.reward_queue_size, kind, functions, self.device)
        self.weights = torch.tensor(weights, dtype=torch.float64, device=self.rewards.device)
        # User-defined rewards need images, including real ones.
        self.real_images = None
        some, labels = self._real(data, rows[: REAL_VALUES if functions else REAL_IMAGES])
        if functions:
            self.real_images = some.to(self.device)
        self.real_x0 = self._latents(some[:REAL_IMAGES])
        self.real_labels = labels[:REAL_IMAGES].to(self.device)
        data.release()

        # 2. The cost of an update, in forward passes of the transformer per sample.
        evaluations = len(self._schedule())
        forward = forward_flops(self.transformer.config)
        blank = torch.zeros(1, 3, *self.encoder.input_size, dtype=torch.uint8, device=self.device)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.encoder(blank)
        own = update_cost(
            evaluations,
            counter.get_total_flops() / forward,
            args.mc_samples,
            0,
            self.anchor_coeff > 0,
            args.rollout_epochs,
        )
        self.num_samples = args.rollout_classes * args.rollout_group_size
        self.update_flops = own * self.num_samples * forward
        real = 3 * args.rollout_every * trainer.global_batch_size / self.num_samples
        logger.info(
            f"an update of the generative policy has {self.num_samples} samples, each of which costs {own + real:.1f} forward "
            f"passes ({evaluations} rollout, {counter.get_total_flops() / forward:.1f} encoder, "
            f"{3 * args.mc_samples * args.rollout_epochs + args.mc_samples * (self.anchor_coeff > 0)} likelihood, {real:.1f} real "
            f"images); the rewards are {', '.join(f'{n} {w:.2f}' for n, w in zip(self.rewards.names, weights))} ({kind})"
        )
        if self.validation.fd_encoder is None or last_part(args.fd_encoder) == last_part(name):
            logger.warning(
                f"no guard measures features that the rewards do not see; give an `fd_encoder` of another family than {name}"
            )

        # 3. State. Likelihood ratios near 1 need full precision; with one epoch all ratios are 1.
        self.likelihood_precision = accelerator.autocast if args.rollout_epochs == 1 else contextlib.nullcontext
        self.first: GuardValues | None = None
        self.best_score = math.inf
        self.best_step = -1
        self.checked_step = -1
        self.start_values: dict[str, torch.Tensor] = {}
        self.rollout: dict[str, torch.Tensor] = {}

    def _check(self, data, max_train_steps: int):
        args, accelerator = self.args, self.accelerator
        if self.start >= max_train_steps:
            raise InputError(
                "generative_policy_start_step",
                f"`generative_policy_start_step` {self.start} is never reached, because the run has {max_train_steps} steps; "
                "give a lower one",
            )
        steps = max_train_steps - self.start
        warm = (1 + max_train_steps) / (10 + max_train_steps) if args.ema_warmup else 1.0
        if args.use_ema and (1 - min(args.ema_decay, warm)) * steps < 3:
            logger.warning(
                f"`ema_decay` {args.ema_decay} is too high for the {steps} steps with rewards: the averaged weights, which are "
                f"sampled, guarded and kept, hardly change in them; give a value of about {max(0.0, 1 - 10 / steps):.4g}"
            )
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise InputError(
                "generative_policy_start_step",
                "`generative_policy_start_step` cannot be combined with FSDP and DeepSpeed; use configs/accelerate/ddp.yaml",
            )
        if accelerator.mixed_precision == "fp16":
            raise InputError(
                "generative_policy_start_step",
                "`generative_policy_start_step` cannot be combined with `mixed_precision` fp16; use bf16 or no",
            )
        if args.rollout_classes % accelerator.num_processes:
            raise InputError(
                "rollout_classes",
                f"`rollout_classes` {args.rollout_classes} must be a multiple of {accelerator.num_processes}, the number of "
                "processes, each of which has whole groups",
            )
        if data.num_classes < 2:
            raise InputError(
                "generative_policy_start_step",
                "`generative_policy_start_step` rewards images that look like their class, and the data have one class; give "
                "data of several classes",
            )
        if not data.has_images:
            raise InputError(
                "generative_policy_start_step",
                f"`generative_policy_start_step` needs images to compare with, and `latents_dir` {args.latents_dir} has none; "
                "prepare it again with `images` webp",
            )
        if self.pipeline.vae is None and self.transformer.config.in_channels != 3:
            raise InputError(
                "generative_policy_start_step",
                "`generative_policy_start_step` judges images, and the latents cannot be decoded without a `vae`; give one",
            )
        check_steps(self.pipeline, args.rollout_steps, "rollout_steps")

    # ------------------------------------------------------------------------------------------------------------------
    # Training images

    def _real(self, data, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads images, uint8 `[B,3,R,R]`, and labels `[B]` of the rows, whose order they have."""
        order = np.argsort(rows, kind="stable")
        images, labels = data.examples(rows[order], self.args.resolution)
        back = np.argsort(order, kind="stable")
        return torch.from_numpy(images[back]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[back])

    def _latents(self, images: torch.Tensor) -> torch.Tensor:
        return encode_images(self.pipeline.vae, images.to(self.device).float() / 127.5 - 1)

    def _reference(self, data, rows: np.ndarray, name: str) -> dict[str, torch.Tensor]:
        """Reads the statistics of the training images from their file, or computes them on all processes and writes it."""
        args, accelerator = self.args, self.accelerator
        file = Path(args.reward_reference or self.output_dir / "reward_reference.safetensors")
        first, labels = self._real(data, rows[:16])
        images = {"count": len(rows), "of": len(data), "size": list(first.shape[2:]), "labels": labels.tolist()}
        images |= {"checksum": zlib.crc32(first.numpy(), zlib.crc32(rows.tobytes()))}
        num_classes = images["classes"] = self.transformer.config.num_classes
        description = describe(images, name, self.encoder, len(rows)) | {"shallow_layer": self.encoder.shallow_layer}
        if args.reward_reference and not file.exists():
            check_writable("reward_reference", "`reward_reference`", file)
        known = known_statistics(file, description) if accelerator.is_main_process else None
        if broadcast_object_list([known is None and file.exists()])[0] and args.reward_reference:
            raise InputError(
                "reward_reference",
                f"`reward_reference` {file} has statistics of other images, another encoder or another "
                "`reward_reference_images`; give another file, which will then be written",
            )

        def compute() -> FeatureSet | None:
            logger.info(f"computing statistics of {len(rows)} training images for the rewards, to be kept in {file}")
            size = args.train_batch_size
            batches = [np.arange(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]
            places, labels = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, 1)]

            def real_images():
                for batch in batches[accelerator.process_index :: accelerator.num_processes]:
                    images, classes = self._real(data, rows[batch])
                    places.append(torch.from_numpy(batch))
                    labels.append(classes[:, None].float())  # exact up to 16 million
                    yield places[-1], images

            _, features = collect_features(
                self.encoder,
                real_images(),
                accelerator,
                moments_of=(),
                rows_of=("pool", "shallow"),
                num_rows=len(rows),
            )
            every_label = gather_rows(torch.cat(labels), torch.cat(places), len(rows), accelerator)
            found = []

            def make():
                classes = every_label.squeeze(1).long()
                tensors = reference_statistics(features, classes, num_classes)
                found.append(FeatureSet.from_tensors(len(rows), tensors))

            run_and_share_errors(accelerator, make, where=accelerator.is_main_process)
            return found[0] if found else None

        device = torch.device("cpu") if self.device.type == "mps" else self.device
        reference = shared_statistics(file, description, compute, accelerator).tensors()
        return {name: tensor.to(device) for name, tensor in reference.items()}

    # ------------------------------------------------------------------------------------------------------------------
    # Samples

    def _schedule(self) -> list[float]:
        return self.pipeline.prepare_times(self.args.rollout_steps, self.device)[1]

    @contextlib.contextmanager
    def _averaged(self, ema, precision=None):
        """Prepares the transformer for sampling inside the `with` block: averaged weights, evaluation mode, no gradients."""
        training = self.transformer.training
        self.transformer.eval()
        try:
            with torch.no_grad(), ema_weights(ema, self.transformer), (precision or self.accelerator.autocast)():
                yield
        finally:
            self.transformer.train(training)

    def _encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features `pool` and `shallow` of images, `[B,D]` each."""
        return image_features(self.encoder, images)

    def _draw(self, labels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Draws samples, inside `_averaged`; returns latents, images and features, which are NaN if a sample is not finite."""
        self.pipeline.set_progress_bar_config(disable=True)
        latents, images = [], []
        options = {"num_inference_steps": self.args.rollout_steps, "guidance_scale": 1.0, "output_type": "latent"}
        size, finite = self.args.train_batch_size, []
        for classes, start in zip(labels.split(size), noise.split(size)):
            latents.append(self.pipeline(classes.tolist(), latents=start, **options).images)
            decoded, sound = decoded_images(self.pipeline, latents[-1])
            images.append(decoded)
            finite.append(sound)
        images, finite = torch.cat(images), torch.cat(finite)
        features = {n: f.masked_fill(~finite[:, None], math.nan) for n, f in self._encode(images).items()}
        return torch.cat(latents), images, features

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gathers the rows of all processes in order."""
        return self.accelerator.gather(tensor.contiguous()) if self.accelerator.num_processes > 1 else tensor

    def _predict_x0(self, x, labels, times, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimates `x [B,...]` from M noisy versions of it, and measures the loss of these predictions.

        Args:
            times: `[B,M]`, in [0, 1).
            noise: `[B,M,...]`.

        Returns:
            the estimates, float32 `[B,M,...]`, and the mean loss of their predictions `[B]`.
        """
        config, (count, many) = self.transformer.config, times.shape
        x_t, timestep, target, t = forward_process(
            x.repeat_interleave(many, 0), noise.flatten(0, 1), times.flatten(), config
        )
        prediction = self.transformer(x_t, timestep, labels.repeat_interleave(many), return_dict=False)[0]
        x0 = x0_estimate(prediction, x_t, timestep, t, config)
        return x0.unflatten(0, (count, many)), flow_matching_loss(prediction, target).view(count, many).mean(1)

    # ------------------------------------------------------------------------------------------------------------------
    # Updates

    def active(self, step: int) -> bool:
        """Whether the step with index `step` follows rewards."""
        return step >= self.start and (step - self.start) % self.args.rollout_every < self.args.rollout_epochs

    def can_save(self, step: int, begun: bool = False) -> bool:
        """Whether no rollout is in use, because checkpoints do not contain rollouts."""
        return not self.active(step) or (not begun and (step - self.start) % self.args.rollout_every == 0)

    def flops(self, step: int) -> float:
        """The FLOPs that rewards add to the step with index `step`."""
        return self.update_flops / self.args.rollout_epochs if self.active(step) else 0.0

    def on_train_begin(self, trainer):
        """Checks that a checkpoint fits, and measures the model that the policy starts from.

        Raises:
            InputError: if the checkpoint is of a run without the policy, and of a step after its start.
            TrainingStopped: if a guard trips.
        """
        if trainer.step > self.start and self.first is None:
            raise InputError(
                "generative_policy_start_step",
                f"`generative_policy_start_step` {self.start} is before step {trainer.step}, from which the run continues; "
                f"give {trainer.step} or more",
            )
        self.on_step_end(trainer)

    def before_optimizer_step(self, trainer):
        """Adds the gradient of the rewards if this step follows rewards."""
        if self.active(trainer.step):
            with trainer.profile("generative policy"):
                trainer.metrics.add(**self.add_gradient(trainer.step, trainer.ema))

    def on_step_end(self, trainer):
        """Checks the guards if they are due.

        Raises:
            TrainingStopped: if a guard trips; a checkpoint is saved first, if possible.
        """
        if reason := self.check_guards(trainer):
            if trainer.step != trainer.saved_step and trainer.can_save():
                trainer.save_checkpoint()
            raise self.stop(reason, trainer.step, trainer.saved_step)

    def add_gradient(self, step: int, ema) -> dict[str, torch.Tensor]:
        """Adds the gradient of the rewards to the parameters' gradients, clipped to `max_gradient_ratio` times their norm.

        Args:
            step: the index of the step.
            ema: the averaged weights, from which samples are drawn.

        Returns:
            values for the log, by name.

        Raises:
            TrainingStopped: if a sample is not finite.
        """
        args, logs = self.args, {}
        epoch = (step - self.start) % args.rollout_every
        if epoch == 0:
            logs |= self._roll_out(step, ema)
        gradients, values = self._gradient(epoch)
        ratio = add_balanced(trainable_parameters(self.transformer), gradients, args.max_gradient_ratio)
        if epoch == args.rollout_epochs - 1:
            self.rollout = {}
        return logs | values | {"policy/gradient_ratio": ratio}

    def _roll_out(self, step: int, ema) -> dict[str, torch.Tensor]:
        """Draws samples and computes their advantages; each process keeps its own groups. Returns values for the log."""
        args, rank, processes = self.args, self.accelerator.process_index, self.accelerator.num_processes
        classes, size, number = (
            args.rollout_classes,
            args.rollout_group_size,
            (step - self.start) // args.rollout_every,
        )
        own = range(rank * classes // processes, (rank + 1) * classes // processes)
        known = self.rewards.reference["class_ids"].cpu().numpy()
        stream = random_stream(args.seed, number, CLASSES)
        drawn = np.concatenate([stream.permutation(known) for _ in range(-(-classes // len(known)))])[:classes]
        first = number * classes  # index of this rollout's first group, counted over the run
        noise = [
            random_stream(args.seed, (first + group) * size + i, ROLLOUT_NOISE).standard_normal(self.shape, np.float32)
            for group in own
            for i in range(size)
        ]
        offsets, draws = [], []
        for group in own:
            stream = random_stream(args.seed, first + group, DRAWS)
            offsets.append(stream.random(args.mc_samples).astype(np.float32))
            draws.append(stream.standard_normal((args.mc_samples, *self.shape), np.float32))
        labels = torch.from_numpy(drawn[own.start : own.stop]).repeat_interleave(size).to(self.device)
        times = stratified_times(torch.from_numpy(np.stack(offsets))).repeat_interleave(size, 0).to(self.device)
        # The noise is shared within a group, so that its samples are compared under the same noise.
        shared = torch.from_numpy(np.stack(draws)).to(self.device)

        with self._averaged(ema):
            x, images, features = self._draw(labels, torch.from_numpy(np.stack(noise)).to(self.device))
        anchors = []
        if self.anchor_coeff:
            with self._averaged(ema, self.likelihood_precision):
                for part in self._parts(len(x)):
                    anchors.append(self._predict_x0(x[part], labels[part], times[part], self._noise(shared, part))[0])
        everyone = {name: self._gather(values) for name, values in features.items()}
        if not all(values.isfinite().all() for values in everyone.values()):
            wait_before_exit(self.accelerator)
            raise TrainingStopped(
                f"step {step + 1}: a sample of the rollout is not finite; try a lower `generative_learning_rate`, or another "
                "`generative_policy_start_step`"
            )
        self.rewards.push(everyone, self.real_images)
        found = []
        run_and_share_errors(self.accelerator, lambda: found.append(self.rewards(images, features, labels)))
        rewards = self._gather(found[0])
        advantages, shares, zero_spread = sample_advantages(
            rewards.unflatten(0, (classes, size)), self.rewards.real_std, self.weights
        )
        mine = slice(own.start * size, own.stop * size)
        self.rollout = {
            "x": x,
            "labels": labels,
            "times": times,
            "noise": shared,
            "advantages": advantages.flatten()[mine].to(self.device),
        }
        if anchors:
            self.rollout["anchor"] = torch.cat(anchors)
        logs = {"policy/zero_spread": zero_spread}
        for k, name in enumerate(self.rewards.names):
            logs[f"sample_reward/{name}"] = rewards[:, k].mean()
            logs[f"sample_reward_real/{name}"] = self.rewards.real_mean[k]
            logs[f"sample_share/{name}"] = shares[k]
        return {name: value.float().to(self.device) for name, value in logs.items()}

    def _parts(self, count: int) -> list[slice]:
        """Splits samples into parts whose noisy versions are at most as many as the examples in a training batch."""
        size = max(1, self.args.train_batch_size // self.args.mc_samples)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _noise(self, shared: torch.Tensor, part: slice) -> torch.Tensor:
        """Selects the noise of the samples `part` from the noise of their groups, `[B,M,...]`."""
        return shared[torch.arange(part.start, part.stop, device=shared.device) // self.args.rollout_group_size]

    def _gradient(self, epoch: int) -> tuple[list[torch.Tensor | None], dict[str, torch.Tensor]]:
        """Computes the gradient of the rewards' loss over all processes' samples, and values for the log."""
        args, rollout = self.args, self.rollout
        parameters = trainable_parameters(self.transformer)
        gradients: list[torch.Tensor | None] = [None] * len(parameters)
        count, ratios, clips = len(rollout["x"]), [], []
        olds, scales = [], []
        for part in self._parts(count):
            x = rollout["x"][part]
            with self.likelihood_precision():
                x0 = self._predict_x0(
                    x, rollout["labels"][part], rollout["times"][part], self._noise(rollout["noise"], part)
                )[0]
            denoising, scale = denoising_loss(x0, x, rollout["scale"][part] if epoch else None)
            old = rollout["old"][part] if epoch else denoising.detach()
            loss, ratio, clipped = sample_policy_loss(
                denoising, old, rollout["advantages"][part], args.rollout_clip_range
            )
            total = args.generative_coeff * loss.sum() / count
            if self.anchor_coeff:
                distance = (x0 - rollout["anchor"][part]).square().flatten(1).mean(1)
                total = total + self.anchor_coeff * distance.sum() / count
            for i, gradient in enumerate(torch.autograd.grad(total, parameters, allow_unused=True)):
                if gradient is not None:
                    gradients[i] = gradient if gradients[i] is None else gradients[i].add_(gradient)
            ratios.append(ratio)
            clips.append(clipped)
            olds.append(old)
            scales.append(scale)
        if epoch == 0:
            rollout |= {"old": torch.cat(olds), "scale": torch.cat(scales)}
        if self.accelerator.num_processes > 1:
            for gradient in filter(lambda g: g is not None, gradients):
                torch.distributed.all_reduce(gradient)
                gradient /= self.accelerator.num_processes
        return gradients, {
            "policy/ratio": torch.cat(ratios).mean(),
            "policy/clip_fraction": torch.cat(clips).mean(),
        }

    # ------------------------------------------------------------------------------------------------------------------
    # Guards

    def check_guards(self, trainer) -> str | None:
        """Checks whether the model has become worse, before the first update and after every `guard_every` rollouts.

        Returns:
            why the policy must stop, or None.
        """
        step, ema = trainer.step, trainer.ema
        if step < self.start or step == self.checked_step:
            return None
        rollouts, between = divmod(step - self.start, self.args.rollout_every)
        if between or rollouts % self.args.guard_every:
            return None
        if step == self.start:
            self._set_learning_rate(trainer.lr_scheduler)
        now = self._measure(ema)
        reason = tripped_guard(self.first, now, self.limits)
        outcome = broadcast_object_list([reason, now.score])
        if self.accelerator.is_main_process:
            trainer.log(now.values())
        if step == self.start or outcome[0] is not None:  # the first and the last grid, from the same noise
            with full_pipeline(self.accelerator, self.pipeline, ema) as averaged:
                if self.accelerator.is_main_process:
                    self.validation.draw(step, averaged)
        if outcome[0] is None and outcome[1] < self.best_score:
            self.best_score, self.best_step = outcome[1], step
            self._save_best(ema)
        if outcome[0] is None:  # otherwise a repeated command would continue here without a check
            self.checked_step = step
        return outcome[0]

    def _set_learning_rate(self, scheduler):
        rate = self.args.generative_learning_rate
        scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
        for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas):
            set_learning_rate(group, rate * factor(scheduler.last_epoch))

    def _measure(self, ema) -> GuardValues:
        """Measures the averaged model; later measurements are compared with the first one."""
        args, rank, processes = self.args, self.accelerator.process_index, self.accelerator.num_processes
        count = -(-args.guard_samples // processes)
        known = self.rewards.reference["class_ids"]
        indices = [min(i, args.guard_samples - 1) for i in range(rank * count, (rank + 1) * count)]
        noise = [random_stream(args.seed, i, LOOK_NOISE).standard_normal(self.shape, np.float32) for i in indices]
        labels = known[torch.tensor(indices, device=known.device) * len(known) // args.guard_samples].to(self.device)
        with self._averaged(ema):
            _, images, features = self._draw(labels, torch.from_numpy(np.stack(noise)).to(self.device))
            loss_fm, x0 = self._real_loss()
        features = {name: self._gather(values)[: args.guard_samples] for name, values in features.items()}
        finite = all(values.isfinite().all() for values in features.values())
        if self.first is None:
            self.start_values = {**features, "x0": x0}
            # The samples are also the first in the queue, so that the first rollout has a distribution to compare with.
            if finite:
                self.rewards.push(features, self.real_images)
        held_out, own = math.nan, [math.nan] * 4
        if self.validation.fd_encoder is not None:
            parts = images.split(default_batch_size(self.device))
            judged = self._gather(torch.cat([self.validation.fd_encoder(part)["pool"] for part in parts]))
            if finite:
                moments = mean_and_covariance(judged[: args.guard_samples].to(self.rewards.device))
                held_out = frechet_distance(*self.validation.reference, *moments)
        if finite:
            own = self._own_values(
                features, self._gather(images)[: args.guard_samples], self._gather(labels)[: args.guard_samples]
            )
        recall, reward, start_reward, distance = own
        drift = (x0 - self.start_values["x0"]).square().mean().item()
        now = GuardValues(loss_fm, recall, reward, start_reward, distance, held_out, drift)
        self.first = self.first or now
        return now

    def _own_values(self, features, images, labels) -> list[float]:
        """Recall, reward, reward of the first measurement's samples, and distance, in the reward encoder's features."""
        reference = self.rewards.reference
        real = reference["pool"][: self.args.guard_samples]
        recall = precision_recall(real, features["pool"].to(real))[1]
        moments = mean_and_covariance(features["pool"].to(real))
        distance = frechet_distance(reference["pool.mean"], reference["pool.covariance"], *moments)
        now = self.rewards(images, features, labels)
        # User-defined rewards do not depend on the queue, so they are kept; the others need no images and are computed again.
        if "rewards" not in self.start_values:
            self.start_values["rewards"] = now
        then = self.start_values["rewards"].clone()
        for k, name in enumerate(self.rewards.names[:3]):
            start_features = {n: self.start_values[n] for n in ("pool", "shallow")}
            then[:, k] = self.rewards.rewards[name](None, start_features, labels)
        # In the units of the advantages, with 0 at the mean of real images.
        scale = torch.cat([now, then]).std(0, correction=0) + 0.1 * self.rewards.real_std
        means = torch.stack([now.mean(0), then.mean(0)])
        means = ((means - self.rewards.real_mean) / scale.clamp_min(1e-12)) @ self.weights
        return [recall, *means.tolist(), distance]

    def _real_loss(self) -> tuple[float, torch.Tensor]:
        """The flow-matching loss on fixed real images, noise and timesteps, and the estimates of these images."""
        x0, count = self.real_x0, len(self.real_x0)
        streams = (random_stream(0, i, LOOK_REAL) for i in range(count))
        noise = torch.from_numpy(np.stack([s.standard_normal(self.shape, np.float32) for s in streams])).to(x0)
        times = (torch.arange(count, device=x0.device, dtype=torch.float32) + 0.5) / count
        losses, estimates = [], []
        for part in self._parts(count):
            estimate, loss = self._predict_x0(x0[part], self.real_labels[part], times[part, None], noise[part, None])
            losses.append(loss)
            estimates.append(estimate.squeeze(1))
        return torch.cat(losses).mean().item(), torch.cat(estimates)

    def _save_best(self, ema):
        """Saves the averaged model as a pipeline in the folder `best`, atomically."""
        final, partial = self.output_dir / "best", self.output_dir / ".best.tmp"
        with full_pipeline(self.accelerator, self.pipeline, ema) as averaged, writing(f"the pipeline in {final}"):
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)  # a killed process may have left it
                if self.args.lora_rank:  # adapters are merged in a copy, because training continues with them
                    averaged = copy.copy(averaged)
                    averaged.transformer = copy.deepcopy(averaged.transformer)
                    averaged.transformer.fuse_lora()
                    averaged.transformer.unload_lora()
                averaged.save_pretrained(partial)
                default_permissions(partial)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)

    def stop(self, reason: str, step: int, saved_step: int | None) -> TrainingStopped:
        """Returns the error that ends a run of which a guard has tripped."""
        saved = f"checkpoint-{saved_step} has this step, and " if saved_step == step else ""
        wait_before_exit(self.accelerator)
        stopped = f"step {step}: {reason}; the generative policy has been stopped"
        if self.best_step < 0:
            return TrainingStopped(
                f"{stopped} before its first update, because it needs a model that already draws images"
            )
        return TrainingStopped(
            f"{stopped}. In {self.output_dir}, {saved}best has the averaged pipeline of step {self.best_step}; start from it with "
            "`pretrained_model_name_or_path`, and make fewer updates or give a lower `generative_coeff`"
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def settings(self) -> dict:
        """The settings that must not change once a run follows rewards."""
        values = settings_to_keep(self.args, GenerativeConfig)
        # Files may have moved, so only their names are compared.
        values["reward_encoder"] = last_part(self.args.reward_encoder or self.args.encoder[0])
        values["fd_encoder"] = last_part(self.args.fd_encoder or "none")
        values["reward_function"] = self.rewards.names[len(REWARDS) :]
        return values

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The settings and the progress of the policy; empty before the policy begins."""
        if self.first is None:
            return {}
        state = {
            "begun": torch.tensor(True),
            "settings": torch.frombuffer(bytearray(json.dumps(self.settings()).encode()), dtype=torch.uint8),
            "first": torch.tensor(list(vars(self.first).values()), dtype=torch.float64),
            "best": torch.tensor([self.best_score, self.best_step, self.checked_step], dtype=torch.float64),
        }
        state |= {f"start.{name}": value.contiguous() for name, value in self.start_values.items()}
        return state | {f"rewards.{name}": value for name, value in self.rewards.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]):
        """Loads the state.

        Raises:
            InputError: if the policy began with other options.
        """
        if not bool(state_dict["begun"]):
            return
        settings = json.loads(bytes(state_dict["settings"].tolist()).decode())
        for name, value in self.settings().items():
            if settings.get(name) != value:
                raise InputError(
                    name,
                    f"`{name}` is {value}, but the generative policy of this run began with {settings.get(name)}; keep that "
                    "value, or start a new run in another `output_dir`",
                )
        self.first = GuardValues(*state_dict["first"].tolist())
        self.best_score, best_step, checked_step = state_dict["best"].tolist()
        self.best_step, self.checked_step = int(best_step), int(checked_step)
        for name, value in state_dict.items():
            if name.startswith("start."):
                device = self.rewards.device if name == "start.rewards" else self.device
                self.start_values[name.removeprefix("start.")] = value.to(device)
        self.rewards.load_state_dict(
            {n.removeprefix("rewards."): v for n, v in state_dict.items() if n.startswith("rewards.")}
        )
