# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The trainer: flow matching with or without representation alignment (REPA, REPI, VRPO), on one or more processes.

`compute_loss` is the method on one screen. `train_step` turns it into an optimizer step, and `train` repeats that until
the run is done. What happens around the steps (validation, publishing, the generative policy) is done by callbacks.
"""

import contextlib
import copy
import dataclasses
import math
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import yaml
from accelerate.logging import get_logger
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from .alignment.custom_encoders import load_custom_encoder
from .alignment.encoders import PatchEncoder, load_encoder
from .alignment.image_rewards import ImageRewards, image_rewards_from_config
from .alignment.objective import NoAlignment, objective_from_config
from .alignment.reward_statistics import WEIGHTINGS
from .alignment.rewards import DEFAULT_REWARDS
from .alignment.start import build_aligned_transformer
from .config import (
    VRPOConfig,
    allowed_changes,
    check_image_rewards_begin,
    check_scaffold_ends,
    data_settings_to_keep,
    names_code,
    objective_in_full,
    options_without_effect,
)
from .data.image_datasets import check_corrupt_rows, too_many_corrupt
from .data.image_source import ImageDataset, ImageSource
from .data.latent_cache import LatentCache
from .data.samples import StreamBatchSampler
from .data.sources import (
    TrainingData,
    as_training_data,
    check_data_settings,
    classes_notice,
    classes_to_sample,
    data_settings,
    load_training_data,
)
from .errors import InputError, TrainingInterrupted
from .files import default_permissions, write_atomically
from .hub.background import HubPublisher
from .hub.publish import push_folder
from .models.autoencoder import (
    check_precision,
    check_vae,
    encoding_in,
    latent_shape,
    load_vae,
    reconstruction_problem,
)
from .models.ddpm import variational_bound
from .models.flow import flow_matching_loss, flow_time, forward_process, sample_time, typical_flow_times
from .models.start import read_start
from .models.vision import layers_of_encoders
from .pipelines import VRPOPipeline
from .pipelines.adapters import ModelAdapter, ModelCall, SiTAdapter, TransformerAlone
from .reporting.curves import plot_metrics
from .training.callbacks import TrainerCallback, check_states, stateful
from .training.checkpoints import (
    OPTIONS_OF_A_STEP,
    check_settings,
    choose_checkpoint,
    load_checkpoint,
    read_training_state,
    recorded_streams,
    register_model_hooks,
    run_settings,
    save_checkpoint,
    save_lora,
    take_changes,
)
from .training.distributed import clip_grad_norm, full_pipeline, lines_above_the_bar, prepare, use_tf32
from .training.fp8 import use_fp8
from .training.given_transformer import (
    align_transformer,
    check_pipeline,
    check_transformer,
    keep_first_block,
    try_call,
)
from .training.interruption import Interruption, StepGuard, wait_before_exit
from .training.length import (
    SpeedNotice,
    check_length,
    num_epochs,
    passes_notice,
    recorded_length,
    resolve_length,
)
from .training.metrics import (
    MetricsFile,
    RunningMeans,
    Stopwatch,
    shown_values,
    write_start,
)
from .training.output_dir import locked, not_saved, prepare_output_dir, writing
from .training.recomputation import recompute
from .training.setup import (
    as_callbacks,
    as_list,
    build_optimizer,
    check_given,
    schedule_state,
    start_accelerator,
    trainable_parameters,
    with_given,
    with_tf32,
)
from .training.targets import target_encoders
from .training.throughput import CopyStream, ForeachEMA, StepProfile, speed_up, step_flops, throughput_meter
from .training.trackers import end_trackers, log_values, start_trackers
from .training.validation import AdapterValidation, Validation


logger = get_logger(__name__)


class VRPOTrainer:
    """Trains a class-conditional diffusion transformer (SiT, DiT, or one of diffusers) with representation alignment.

    `train` continues from the newest checkpoint in `args.output_dir`, unless `args.resume_from_checkpoint` says otherwise.
    Arguments that are not given are taken from `args`; `vrpo train` calls `VRPOTrainer(args=args)`.

    Example:

    ```python
    from diffusers_vrpo import VRPOConfig, VRPOPipeline, VRPOTrainer

    args = VRPOConfig(output_dir="digits-vrpo", dataset_name="embedded:digits", resolution=8, projector_dim=256,
                      train_batch_size=64, max_train_steps=1400, learning_rate=1e-3, ema_decay=0.995)
    with VRPOTrainer(model="SiT-XS/2", encoders="embedded:digits", vae="none", args=args) as trainer:
        trainer.train()
        trainer.save_model()
    VRPOPipeline.from_pretrained("digits-vrpo")("three").images[0].save("three.png")
    ```

    Args:
        model (`str`, *optional*): a preset such as `"SiT-B/2"`, or weights to start from: a pipeline or transformer (Hub
            name or folder), or an official checkpoint of SiT, REPA, iREPA or DiT.
        encoders (`str`, callable or a list of them, *optional*): frozen vision encoders to align with: Hub names or folders
            of `transformers` models, or callables that map images `[B,3,H,W]` in [-1, 1] to patch embeddings `[B,M,E]`
            and have an attribute `embed_dim`, E. Each gets a projector.
        vae (`str` or a diffusers autoencoder, *optional*): encodes the images; `"none"` trains on pixels.
        train_dataset (`datasets.Dataset` or `TrainingData`, *optional*): images and class labels.
        rewards (`list`, *optional*): the token rewards of `objective="vrpo"`: any of `"fidelity"`, `"semantic"` and
            `"structural"` (all three by default), and rewards of your own, which are callables
            `reward(action, mu, y, subset) -> [B,N]` or names `"package.module:name"` of such.
        image_rewards (`list`, *optional*): rewards for the images that predictions imply, with any objective: `"perceptual"`,
            `"image_semantic"`, and rewards of your own, which are callables `reward(x0_hat, x0) -> [B]` or names
            `"package.module:name"` of such; those of `args` by default.
        transformer (`diffusers.ModelMixin`, *optional*): the transformer to train, with its weights, instead of `model`.
        adapter ([`ModelAdapter`], *optional*): how to call, sample and save that transformer; diffusers'
            `DiTTransformer2DModel` needs none.
        args (`VRPOConfig`, *optional*): all options; `VRPOConfig()` by default.
        callbacks (`list[TrainerCallback]`): callbacks of your own, called after the trainer's.

    Attributes:
        step (`int`): the number of completed optimizer steps.
        pipeline ([`VRPOPipeline`], or that of the adapter): a pipeline with the weights in training; `save_model` saves one
            with the averaged weights.
        transformer: the model in training, without projectors.
        model: the transformer with its projectors, wrapped by accelerate; training calls it.

    Raises:
        InputError: if options, data or checkpoints cannot work, before any long work begins.
    """

    # Attributes that methods of the constructor set.
    pipeline: DiffusionPipeline | TransformerAlone
    transformer: torch.nn.Module
    model: torch.nn.Module
    objective: NoAlignment
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: str | None = None,
        encoders: str | Callable | Sequence[str | Callable] | None = None,
        vae: str | torch.nn.Module | None = None,
        train_dataset: Dataset | TrainingData | None = None,
        rewards: list | None = None,
        args: VRPOConfig | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        image_rewards: list | None = None,
        transformer: torch.nn.Module | None = None,
        adapter: ModelAdapter | None = None,
    ):
        self.args = args = with_given(args or VRPOConfig(), model, encoders, vae, image_rewards)
        check_given(args, train_dataset, rewards, callbacks := as_callbacks(callbacks))
        if transformer is None and adapter is not None:
            raise InputError("adapter", "`adapter` has no effect without `transformer`; remove it")
        self.adapter: ModelAdapter = SiTAdapter()
        if transformer is not None:
            self.adapter = check_transformer(args, transformer, adapter, callbacks)
        self.output_dir = prepare_output_dir(args.output_dir)
        self.interruption = Interruption()
        self.begun = False  # whether `train` has been called

        # Counters of the run; a checkpoint replaces most of them.
        self.step = 0
        self.samples_seen = 0
        self.flops = 0.0
        self.stopwatch = Stopwatch()
        self.metrics = RunningMeans()
        self.metrics_file: MetricsFile | None = None  # of the main process
        self.saved_step = 0
        self.logged_step = 0
        self.logged_seconds = 0.0
        # Options that `allow_changed` lets differ from the checkpoint: [before, now].
        self.changes: dict[str, list] = {}
        self.corrupt_rows: set[int] = set()
        self.num_corrupt = 0

        with contextlib.ExitStack() as resources:
            resources.enter_context(locked(self.output_dir))
            self.accelerator = start_accelerator(args, self.output_dir)
            self.all_reduce = self.accelerator.reduce if self.accelerator.num_processes > 1 else None
            self.to_device = CopyStream(self.accelerator.device)
            self.profile = StepProfile(args.profile, self.accelerator.device, logger.info)

            # What cannot work fails here: the Hub, the checkpoint to continue from, data, autoencoder, encoders.
            publisher = []
            if args.push_to_hub:
                publisher = [HubPublisher(args, self.accelerator, self.output_dir, self.interruption)]
            self.checkpoint = choose_checkpoint(self.accelerator, args, self.output_dir)
            self.saved_state = None if self.checkpoint is None else read_training_state(self.checkpoint)
            self.args = args = with_tf32(args, self.saved_state)
            use_tf32(self.accelerator.device, args.allow_tf32)
            self.data = self._open_data(train_dataset)
            self.vae = self._open_vae(vae)
            self.encoding_vae = encoding_in(self.vae, args.vae_dtype)
            if isinstance(self.data, LatentCache):
                self.data.check_vae(self.vae)
            self._build_model(encoders, rewards, image_rewards, transformer)
            self._check_reconstruction()
            self.validation = self._make_validation()
            validation = [] if self.validation is None else [self.validation]
            self.callbacks = [*publisher, SpeedNotice(), *validation, *callbacks]
            self._call("on_init_end")
            self._register_state()
            self._resources = resources.pop_all()

    def __enter__(self) -> "VRPOTrainer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Unlocks the output folder for other runs, as the end of the process also does."""
        self._resources.close()

    # ------------------------------------------------------------------------------------------------------------------
    # The method

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Computes the loss of a micro-batch, `L = L_FM + lambda L_rep` (docs/method.md), a scalar.

        Models that learn the variance of their diffusion also have its variational bound as a loss, and image rewards add a
        term of their own.

        Args:
            batch: tensors on the device: `pixels [B,3,R,R]` in [-1, 1] or the entries of a latent cache, `class_labels [B]`,
                the drawn `noise` and `timestep`, and further inputs of the objective.
        """
        channels, learns_variance = self.latent_shape[0], self.adapter.learns_variance

        # Clean latents, and their noisy versions. In flow time t, 1 is noise.
        with self.profile("autoencoder"):
            x0 = self.data.latents(self.encoding_vae, batch)
        x_t, timestep, target, t = forward_process(x0, batch["noise"], batch["timestep"], self.adapter)

        # One forward pass returns the prediction and the projected tokens of the aligned blocks. A scaffold needs the
        # encoders' features before that pass.
        images = batch.get("pixels", batch)  # a cache may have the encoders' features instead of pixels
        self.alignment = alignment = self.objective.begin(t, images)
        if alignment.scaffold is not None:
            self.profile.mark("encoder")
        with self.profile("forward"):
            parts = {"fork": alignment.fork, "align": alignment.active, "scaffold": alignment.scaffold}
            model = ModelCall(self.model, self.transformer, **parts)
            prediction = self.adapter.call(model, x_t, timestep, batch)
            loss_fm = flow_matching_loss(prediction[:, :channels], target)
            loss = loss_fm.mean()
            self.metrics.add(loss_fm=loss)

        # The variance channels of a diffusion are trained by its variational bound.
        if learns_variance:
            loss_vb = variational_bound(*prediction.split(channels, dim=1), x0, x_t, timestep).mean()
            loss = loss + loss_vb
            self.metrics.add(loss_vb=loss_vb)

        # REPA's cosine, or VRPO's rewards for the projected tokens; the fork adds the fidelity reward in the backward pass.
        if self.aligned.layers:
            with self.profile("encoder"):
                alignment.targets = self.objective.targets(images, features=alignment.features)
            with self.profile("alignment loss"):
                draws = {"subset": batch.get("tokens"), "index": batch["index"]}
                if self.args.kl_coeff:
                    draws["inputs"] = model.inputs
                loss_rep = self.objective(alignment, model.projections, images, loss_fm, **draws)
            loss = loss + self.args.alignment_coeff * loss_rep
            self.metrics.add(**alignment.logs)

        # REPI: after the scaffold phase, the block's own keys and values are pulled to those from the encoders' features.
        if alignment.scaffold is not None:
            distance = alignment.scaffold_distance()
            loss = loss + self.args.scaffold_coeff * distance
            self.metrics.add(scaffold_distance=distance)

        # Rewards for the image that the prediction implies.
        if self.image_rewards.active():
            with self.profile("image rewards"):
                states = (prediction[:, :channels], target, x0, x_t, t, timestep)
                loss = loss + self.image_rewards(*states, rows=batch.get("rewarded"), index=batch["index"])
            self.metrics.add(**self.image_rewards.logs)
        return loss

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def train(self) -> None:
        """Trains until step `max_train_steps`, starting from the checkpoint of `args.resume_from_checkpoint` if it exists.

        A second call continues where the first one has ended, for instance after Ctrl-C.

        Raises:
            InputError: if that checkpoint has other options or data than this run.
            TrainingStopped: if the run cannot continue.
            TrainingInterrupted: after SIGTERM or SIGINT, once a checkpoint has been saved.
        """
        self.interruption.reset()
        if not self.begun:
            self._resume()
            self.begun = True
        self._record_start()
        batches = self._batches()
        self._call("on_train_begin")
        self.model.train()
        with self.interruption, self._progress_bar() as self.progress, lines_above_the_bar():
            self.stopwatch.start()
            while self.step < self.max_train_steps:
                self.train_step(batches)
                self.log_if_due()
                self._call("on_step_end")
                self.stopwatch.stop()
                if self.step == self.max_train_steps:
                    logger.info(self._what_follows())
                self.save_if_due()
                self._call("on_evaluate")
                self.profile.step()
                self.stopwatch.start()
            self.stopwatch.stop()
            self.accelerator.wait_for_everyone()
            self._call("on_train_end")

    def train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """Takes one optimizer step on the next `gradient_accumulation_steps` of `batches`.

        Raises:
            TrainingStopped: if the loss or the gradient is not finite, unless `skip_nonfinite` skips such steps.
        """
        accelerator, args = self.accelerator, self.args
        for _ in range(args.gradient_accumulation_steps):
            if args.compile_mode == "reduce-overhead":  # the outputs of the last micro-step may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            batch = self._next_batch(batches)
            with accelerator.accumulate(self.model):
                loss = self.compute_loss(batch)
                self.guard.watch(loss)
                with self.profile("backward"):
                    accelerator.backward(loss)
                self.objective.observe(self.alignment)
                if accelerator.sync_gradients:
                    # The guard, whose answer is read later, also waits for this copy to the host.
                    self.objective.collect(self.all_reduce)
                    self._call("before_optimizer_step")
                    grad_norm = clip_grad_norm(accelerator, self.model, args.max_grad_norm)
                    self.metrics.add(grad_norm=grad_norm)
                    self.guard.ask(grad_norm)
                # Both do nothing while gradients are accumulated.
                with self.profile("optimizer"):
                    if not accelerator.sync_gradients or self.guard.may_step():
                        self.optimizer.step()
                    self.optimizer.zero_grad()

        # A step with a loss or gradient that is not finite has changed neither weights nor moments.
        if problem := self.guard.answer():
            self._skip_or_stop(problem)
        self.flops += self._flops_of_step()
        self.step += 1
        self.metrics.commit()
        self.samples_seen += self.global_batch_size if self.step % args.policy_epochs == 0 else 0
        self.lr_scheduler.step()
        if self.aligned.ended:
            self.encoders = []  # frees the encoders, unless an image reward uses one
        if self.ema is not None:
            with self.profile("average"):
                self.ema.step(trainable_parameters(self.aligned))
        with self.profile("statistics"):
            self.objective.update(self.all_reduce)
            self.image_rewards.update(self.all_reduce)
            self.progress.update()

    def log_if_due(self) -> None:
        """Reads the metrics and logs them, every `logging_steps` steps and after the last step."""
        args = self.args
        if self.step % args.logging_steps and self.step < self.max_train_steps:
            return
        values = self.metrics.read(self.accelerator)
        self.num_corrupt = check_corrupt_rows(self.corrupt_rows, len(self.data), self.num_corrupt)
        if self.alignment.active:
            values |= self.objective.summary()
        if args.skip_nonfinite:
            values["skipped_steps"] = self.guard.skipped
        values["learning_rate"] = float(self.lr_scheduler.get_last_lr()[0])
        seconds = self.stopwatch.seconds()
        images = (self.step - self.logged_step) * self.global_batch_size
        values["images_per_second"] = images / (seconds - self.logged_seconds)
        values |= self.throughput(values["images_per_second"], self.alignment.active)
        values |= {"samples_seen": self.samples_seen, "train_seconds": seconds, "train_flops": self.flops}
        self.logged_step, self.logged_seconds = self.step, seconds
        self.progress.set_postfix(shown_values(values))
        self.log(values)
        self._call("on_log", values)

    def log(self, values: dict[str, float]) -> None:
        """Logs metrics of the current step to `metrics.jsonl` and the trackers."""
        log_values(self.accelerator, values, self.step)

    def save_if_due(self) -> None:
        """Saves a checkpoint every `checkpointing_steps` steps, after the last step, and after a signal.

        Raises:
            TrainingStopped: if the checkpoint of the last step or after a signal cannot be saved, or any checkpoint with
                `stop_on_failed_checkpoint`.
            TrainingInterrupted: after a signal, once the checkpoint is saved.
        """
        last = self.step == self.max_train_steps
        leaving = self.guard.signum and self.can_save()
        if self.step % self.length.checkpointing_steps == 0 or last or leaving:
            self.save_checkpoint()
            if self.saved_step != self.step and (last or leaving or self.args.stop_on_failed_checkpoint):
                raise not_saved(self.output_dir, self.step)
        if leaving:
            name = signal.Signals(self.guard.signum).name
            logger.info(f"stopped by {name}; repeating the command continues from step {self.step}")
            self.end()
            raise TrainingInterrupted(self.guard.signum, self.step)

    def can_save(self, begun: bool = False) -> bool:
        """Whether a run can resume from a checkpoint of this step, that is, no sampled actions or rollouts are in use.

        Args:
            begun: whether the next step has begun and failed, as for [`TrainerCallback.can_save`].
        """
        whole = self.step % self.args.policy_epochs == 0
        return whole and all(callback.can_save(self.step, begun) for callback in self.callbacks)

    def save_checkpoint(self) -> bool:
        """Saves `checkpoint-{step}`; all processes must call this. Returns whether the checkpoint could be written."""
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "skipped": self.guard.skipped,
            "settings": self.settings,
            "lr_scheduler": schedule_state(self.lr_scheduler),
            "alignment": self.objective.release_state(),
            "length": dataclasses.asdict(self.length),
            # Without `raw` the state is of version 0.1, which called it `equal`.
            "reward_weightings": list(WEIGHTINGS),
            "callbacks": [name for name, callback in stateful(self.callbacks).items() if callback.state_dict()],
            "train_seconds": self.stopwatch.seconds(),
            "train_flops": self.flops,
        }
        if self.metrics_file is not None:
            self.metrics_file.sync()
        limit = self.args.checkpoints_total_limit
        limit = self.length.checkpoints_to_keep if limit is None else limit
        saved = save_checkpoint(self.accelerator, self.output_dir, self.step, state, limit)
        if saved:
            self.saved_step = self.step
            self._call("on_save", self.output_dir / f"checkpoint-{self.step}")
        return saved

    # ------------------------------------------------------------------------------------------------------------------
    # The result

    def save_model(self) -> None:
        """Writes the result to the output folder: a pipeline with the averaged weights, a grid of samples, and curves.

        `VRPOPipeline.from_pretrained(args.output_dir)` loads it. If a [`ModelAdapter`] has made another pipeline, its class
        loads it; if the adapter has made none, the averaged transformer is in `transformer/`. LoRA adapters are also saved
        separately, in `lora/`.

        Raises:
            InputError: if `train` has not been called, so that there is no result yet.
            TrainingStopped: if a file cannot be written.
        """
        args, output_dir = self.args, self.output_dir
        if not self.begun:
            raise InputError(
                None,
                f"there is nothing to save in {output_dir} yet: call `train()` first, which also loads the newest checkpoint "
                "of a run that has ended",
            )
        share = 0.0 if self.ema is None else self.ema.share_of_start(self.step)
        if share > 0.01:
            logger.warning(
                f"the averaged weights of step {self.step} still contain {share:.0%} of the weights that the run started with"
            )
        if self.objective.scaffolding(self.step - 1):
            logger.warning(
                f"the scaffold phase has not ended at step {self.step} (`scaffold_fraction` {args.scaffold_fraction}): samples of "
                f"the pipeline are noise, because block {self.aligned.scaffold_layer} gets no encoder features in sampling"
            )
        with (
            self.interruption,
            full_pipeline(self.accelerator, self.pipeline, self.ema) as averaged,
            writing(f"the pipeline in {output_dir}"),
        ):
            if self.accelerator.is_main_process:
                if args.lora_rank:  # the trainer keeps the adapters, and can go on
                    averaged = copy.copy(averaged)
                    averaged.transformer = copy.deepcopy(averaged.transformer)
                    save_lora(averaged.transformer, output_dir / "lora")
                averaged.save_pretrained(output_dir)
                parts = (output_dir / name for name in ("transformer", "vae", "lora"))
                default_permissions(*(part for part in parts if part.is_dir()))
                drawn = self.validation is not None and self.validation.grid is not None
                if drawn:
                    self.validation.grid.save(output_dir / "samples.png")
                plot_metrics(output_dir / "metrics.jsonl", output_dir / "training.png", f"objective {args.objective}")
                what = "transformer" if self.validation is None else "pipeline"
                logger.info(f"wrote the {what}{', samples.png' if drawn else ''} and training.png to {output_dir}")
                if isinstance(self.pipeline, VRPOPipeline):
                    logger.info(f"to sample from it: vrpo sample {output_dir} --num_images 100 --output_dir samples")
        self.end()

    def push_to_hub(self) -> None:
        """Publishes the output folder, with a model card, as `args.hub_model_id`; by default under the folder's name."""
        publisher = next((callback for callback in self.callbacks if isinstance(callback, HubPublisher)), None)
        if publisher is not None:
            with self.interruption:
                publisher.push_result()
        elif self.accelerator.is_main_process:
            args = self.args
            repo_id = args.hub_model_id or self.output_dir.resolve().name
            push_folder(self.output_dir, repo_id, private=args.hub_private_repo or None, license=args.hub_license)

    def end(self) -> None:
        """Waits until all processes may exit, and ends the trackers."""
        wait_before_exit(self.accelerator)
        end_trackers(self.accelerator)
        self.accelerator.end_training()

    # ------------------------------------------------------------------------------------------------------------------
    # Setting up

    def _open_data(self, train_dataset) -> TrainingData:
        args, accelerator = self.args, self.accelerator
        with accelerator.main_process_first():
            if train_dataset is None:
                data = load_training_data(args)
            else:
                data = as_training_data(train_dataset, args.image_column, args.label_column)
                if args.jpeg_draft and not isinstance(data, ImageSource):
                    raise InputError(
                        "jpeg_draft",
                        f"`jpeg_draft` has no effect with a {type(data).__name__}, which decodes no images; remove it",
                    )
                if args.jpeg_draft:
                    data.jpeg_draft = True
        # While a server does not answer, a signal ends the waiting.
        data.give_up_when(lambda: self.interruption.signum > 0)
        if accelerator.is_main_process:
            data.check()
        if notice := classes_notice(data):
            logger.log(*notice)
        return data

    def _open_vae(self, vae) -> torch.nn.Module | None:
        if isinstance(vae, torch.nn.Module):
            check_vae(vae, type(vae).__name__)
            return vae.to(self.accelerator.device).eval().requires_grad_(False)
        name = self.args.vae or self.data.vae or "none"
        return None if name == "none" else load_vae(name, self.args.cache_dir).to(self.accelerator.device)

    def _check_reconstruction(self):
        """Warns if the autoencoder cannot reconstruct an image; streams, which would fetch it from a server, are not checked.

        Raises:
            InputError: if the autoencoder cannot encode the image in `vae_dtype`.
        """
        data = self.data
        in_half = self.args.vae_dtype != "float32"
        if self.vae is None or not isinstance(data, ImageDataset) or not (in_half or self.accelerator.is_main_process):
            return
        image = data.examples(data.fixed_rows(1), self.args.resolution)[0][0]
        if in_half:
            check_precision(self.vae, self.args.vae_dtype, image)
        if not self.accelerator.is_main_process:
            return
        if problem := reconstruction_problem(self.vae, image):
            logger.warning(f"`vae`: {problem}")

    def _load_encoders(self, encoders: list | None, grid_size: tuple[int, int]) -> list:
        """Returns the encoders to align with: the given ones, stand-ins that read cached features, or loaded ones."""
        args, accelerator = self.args, self.accelerator
        if args.objective == "none":
            return []
        if encoders is None or all(isinstance(encoder, str | Path) for encoder in encoders):
            layers = layers_of_encoders(args.encoder, args.encoder_layer)
            if cached := self.data.features(args.encoder, layers, grid_size):
                return cached
            encoders = args.encoder
        else:
            layers = layers_of_encoders(encoders, args.encoder_layer)
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        dtype = torch.float32 if accelerator.device.type == "cpu" else half
        loaded = []
        for encoder, layer in zip(encoders, layers):
            if isinstance(encoder, str | Path) and names_code(str(encoder)):
                encoder = load_custom_encoder(str(encoder), grid_size, layer, args.resolution, accelerator.device)
            elif isinstance(encoder, str | Path):
                encoder = load_encoder(encoder, grid_size, layer, dtype, accelerator.device, args.cache_dir)
            loaded.append(encoder)
        return loaded

    def _load_image_rewards(self, rewards: list | None, encoders: list) -> ImageRewards:
        """Builds the image rewards, and counts the FLOPs that they cost per sample on average."""
        args, accelerator = self.args, self.accelerator
        # An entry of `self.encoders` may only read cached features; then the encoder has to be loaded.
        loaded = [encoder for encoder in self.encoders[:1] if isinstance(encoder, PatchEncoder)]
        on_gpu = accelerator.device.type != "cpu"
        # Autoencoders may overflow in float16, so with fp16 they decode in float32.
        half = on_gpu and accelerator.mixed_precision == "bf16"
        with accelerator.main_process_first():
            image_rewards = image_rewards_from_config(
                args,
                self.adapter,
                loaded or encoders,
                self.vae,
                self.latent_shape,
                self.grid_size,
                accelerator.device,
                rewards,
                accelerator.autocast if half else contextlib.nullcontext,
                torch.bfloat16 if half else torch.float32,
            )
        self.image_reward_flops = 0.0
        if image_rewards.rewards:
            times = None
            if args.timestep_sampling != "uniform":
                logit = (args.timestep_sampling, args.logit_mean, args.logit_std)
                times = typical_flow_times(self.adapter.prediction_type, *logit)
            self.image_reward_flops = image_rewards.flops_per_sample(self.latent_shape, times)
        return image_rewards

    def _make_validation(self) -> Validation | None:
        """Returns what draws samples in training; None if there is only a transformer and no pipeline."""
        parts = (self.args, self.accelerator, self.pipeline, self.data, self.output_dir, self.interruption)
        if isinstance(self.pipeline, TransformerAlone):
            return None
        if isinstance(self.pipeline, VRPOPipeline):
            return Validation(*parts)
        return AdapterValidation(*parts, self.adapter)

    def _build_model(self, encoders, rewards, image_rewards, given: torch.nn.Module | None):
        """Builds transformer, projectors, pipeline, optimizer, averaged weights and objective, prepared for all processes.

        Args:
            given: a transformer to train; None builds one from the options.
        """
        args, accelerator, data = self.args, self.accelerator, self.data
        start = read_start(args) if given is None else None
        patch_size = start.config["patch_size"] if given is None else self.adapter.patch_size(given)
        self.latent_shape = latent_shape(self.vae, args.resolution, patch_size)
        self.grid_size = tuple(side // patch_size for side in self.latent_shape[1:])
        self.encoders = self._load_encoders(as_list(encoders), self.grid_size)

        targets = target_encoders(args, accelerator, data, self.encoders, self.checkpoint)

        # All processes start from the same weights, drawn from the seed.
        torch.manual_seed(args.seed)
        if given is None:
            self.aligned = build_aligned_transformer(
                args, start, self.latent_shape, data.num_classes, data.id2label, targets
            )
            self.adapter.prepare(self.aligned.transformer)
        else:
            self.aligned = align_transformer(
                args, accelerator, given, self.adapter, data, self.latent_shape, self.grid_size, targets
            )
        self.transformer = transformer = self.aligned.transformer
        # A given transformer without a null class drops no labels.
        label_dropout = self.adapter.label_dropout if args.label_dropout is None else args.label_dropout
        self.label_dropout = 0.0 if self.adapter.null_class_id is None else label_dropout
        recompute(transformer, args.gradient_checkpointing)
        self.aligned.to(accelerator.device)

        # FLOPs are counted before anything is compiled.
        self.image_rewards = self._load_image_rewards(as_list(image_rewards), as_list(encoders) or args.encoder or [])
        forward = None
        if given is not None:
            forward = try_call(args, transformer, self.adapter, self.latent_shape, accelerator.device)
        self.flops_per_image = step_flops(self.aligned, forward, math.prod(self.grid_size))
        self.throughput = throughput_meter(self.flops_per_image, accelerator, args.peak_tflops)
        if args.fp8:
            use_fp8(accelerator, transformer, args.train_batch_size * math.prod(self.grid_size))
        speed_up(transformer, self.encoders, args.compile, args.attention_backend, args.compile_mode)

        self.global_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        recorded = None if self.saved_state is None else recorded_length(self.saved_state)
        self.length = resolve_length(args, len(data), self.global_batch_size, recorded)
        self.max_train_steps = self.length.max_train_steps
        check_image_rewards_begin(args, self.max_train_steps)
        check_scaffold_ends(args, self.max_train_steps)
        optimizer = build_optimizer(args, trainable_parameters(self.aligned))
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
        )
        # An optimizer may keep its learning rates in tensors, rounded to float32; the scheduler uses the exact value.
        self.lr_scheduler.base_lrs = [args.learning_rate for _ in self.lr_scheduler.base_lrs]
        self.objective = objective_from_config(
            args,
            self.aligned,
            self.max_train_steps,
            rewards=rewards or DEFAULT_REWARDS,
            autocast=accelerator.autocast,
            prediction_type=self.adapter.prediction_type,
            scaffold_steps=((self.saved_state or {}).get("alignment") or {}).get("scaffold_steps"),
        )
        if args.compile:
            self.objective.compile()
        # Rewards of both kinds are logged by name, so the names must differ.
        if both := sorted({*self.objective.reward_names} & {*self.image_rewards.names}):
            raise InputError(
                "image_rewards",
                f"`image_rewards` {both[0]} has the same name as a token reward; rename one of them",
            )
        # Classes without images here still count as trained if the starting weights have learned them.
        trained = sorted({*classes_to_sample(data), *getattr(transformer, "learned_labels", [])})
        pipeline = self.adapter.pipeline(transformer, self.vae, data.id2label, trained)
        self.pipeline = TransformerAlone(transformer) if pipeline is None else pipeline
        check_pipeline(args, self.adapter, self.pipeline)

        # FSDP replaces the parameters, so the averaged weights are made from the prepared model.
        self.model, self.optimizer = prepare(accelerator, self.aligned, optimizer)
        if given is not None:
            keep_first_block(accelerator, self.transformer)
        self.ema = None
        if args.use_ema:
            self.ema = ForeachEMA(trainable_parameters(self.aligned), args.ema_every, decay=args.ema_decay)

    def _register_state(self):
        """Registers the contents of checkpoints, and the settings that a resumed run must keep."""
        self.guard = StepGuard(self.accelerator, self.optimizer, self.interruption, self.args.skip_nonfinite)
        precision = self.accelerator.mixed_precision
        self.settings = run_settings(
            self.args, self.data, self.aligned, self.global_batch_size, precision, self.label_dropout
        )
        if self.args.random_streams is None and self.saved_state is not None:
            self.settings["random_streams"] = recorded_streams(self.saved_state)
        if not isinstance(self.adapter, SiTAdapter):  # a SiT has these in its config
            self.settings["the model's class"] = type(self.transformer).__name__
            for name in ("prediction_type", "time_direction", "learns_variance", "null_class_id"):
                self.settings[f"the adapter's {name}"] = getattr(self.adapter, name)
        if self.objective.reward_names:
            self.settings["the rewards"] = list(self.objective.reward_names)
        # States that a checkpoint of another version may lack.
        optional = stateful(self.callbacks) | (
            {"image_rewards": self.image_rewards} if self.image_rewards.rewards else {}
        )
        register_model_hooks(
            self.accelerator,
            self.ema,
            self.objective.stateful() | optional,
            self.metrics,
            optional=list(optional),
        )

    def _resume(self):
        """Loads the checkpoint to continue from, if there is one."""
        of_data = data_settings_to_keep(self.args) | data_settings(self.data)
        if self.checkpoint is not None:
            state = self.saved_state
            allowed = allowed_changes(self.args) | set(() if self.args.streaming else OPTIONS_OF_A_STEP)
            self.changes = check_settings(state, self.settings, self.checkpoint, allowed)
            check_length(self.checkpoint, state["step"], self.max_train_steps)
            check_data_settings(state["settings"], of_data, self.checkpoint, self.args.allow_changed_data)
            check_states(self.checkpoint, state.get("callbacks"), self.callbacks)
            load_checkpoint(self.accelerator, self.checkpoint)
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            if self.changes:
                take_changes(self.args, self.changes, self.lr_scheduler)
                changed = (f"{name} {before} -> {now}" for name, (before, now) in self.changes.items())
                logger.info(f"options changed from step {state['step']} on: {', '.join(changed)}")
            self.step = state["step"]
            self.samples_seen = state["samples_seen"]
            self.flops = state["train_flops"]
            self.guard.skipped = state["skipped"]
            self.stopwatch = Stopwatch(state["train_seconds"])
            self.logged_step, self.logged_seconds = self.step, state["train_seconds"]
            # A checkpoint in another folder is not copied, so this folder has none of this step yet.
            own = self.checkpoint.parent.resolve() == self.output_dir.resolve()
            self.saved_step = self.step if own else 0
            if self.ema is not None:
                self.ema.optimization_step = self.step
            logger.info(f"continuing from {self.checkpoint} at step {self.step}")
        self.objective.resume(self.step, None if self.checkpoint is None else state["alignment"])
        self.image_rewards.resume(self.step)
        self.settings |= of_data
        if self.ema is not None:
            self._begin_average(
                self.args.ema_warmup if self.checkpoint is None else state["settings"].get("ema_warmup")
            )

    def _begin_average(self, warmup: bool | None):
        """Sets the warm-up of the averaged weights, and warns if the starting weights will remain a large part of them.

        Args:
            warmup: whether the run began with a warm-up; None for a checkpoint of a version that had none.
        """
        ema, warmup = self.ema, bool(warmup)
        self.settings["ema_warmup"] = warmup
        ema.min_decay = 0.0 if warmup else ema.decay
        if warmup != self.args.ema_warmup:
            logger.info(f"the averaged weights continue {'with' if warmup else 'without'} warm-up, as the run began")
        share = ema.share_of_start(self.max_train_steps)
        if share > 0.01:
            logger.warning(
                f"`ema_decay` {ema.decay} is high for a run of {self.max_train_steps} steps: its averaged weights, which are "
                f"sampled and published, will still contain {share:.0%} of the starting weights; a lower `ema_decay` reduces this"
            )

    def _record_start(self):
        """Records the options and the start of the run, and opens metrics and trackers."""
        args, accelerator = self.args, self.accelerator
        if accelerator.is_main_process:
            given = args.to_dict() | {"vae": args.vae or self.data.vae or "none"}
            given |= {name: getattr(self.length, name) for name in ("checkpointing_steps", "validation_steps")}
            if not args.num_train_epochs:
                given["max_train_steps"] = self.max_train_steps
            with writing(f"train_config.yaml or metrics.jsonl in {self.output_dir}"):
                write_atomically(self.output_dir / "train_config.yaml", yaml.safe_dump(given).encode())
                self.metrics_file = MetricsFile(self.output_dir / "metrics.jsonl", self.step)
                write_start(
                    self.output_dir,
                    self.step,
                    accelerator,
                    self.aligned,
                    self.global_batch_size,
                    self.max_train_steps,
                    given,
                    self.adapter.prediction_type,
                    self.changes,
                )
            start_trackers(accelerator, self.metrics_file, args, self.output_dir, self.step)
        if args.objective != "none":
            logger.info(objective_in_full(args))
        for sentence in options_without_effect(args):
            logger.info(sentence)
        steps, needed = self.max_train_steps - self.step, args.profile + self.profile.warmup if args.profile else 0
        if steps < needed:
            logger.warning(
                f"`profile` {args.profile}: there will be no table, which comes after {needed} steps, of which {self.profile.warmup} are "
                f"not measured; the run has {steps} left"
            )
        parameters = sum(parameter.numel() for parameter in trainable_parameters(self.aligned))
        count, num_classes = accelerator.num_processes, self.data.num_classes
        processes = f"{count} process{'es' * (count > 1)}"
        logger.info(
            f"{len(self.data)} images, {num_classes} class{'es' * (num_classes > 1)}; training {parameters / 1e6:.1f} M "
            f"parameters, {math.prod(self.grid_size)} tokens; steps {self.step} to {self.max_train_steps}"
        )
        logger.info(
            f"a step has {self.global_batch_size} samples: `train_batch_size` {args.train_batch_size} x {processes} x "
            f"`gradient_accumulation_steps` {args.gradient_accumulation_steps}; a checkpoint every "
            f"{self.length.checkpointing_steps} steps, samples every {self.length.validation_steps}"
        )
        if notice := passes_notice(num_epochs(self), len(self.data)):
            logger.warning(notice)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the micro-batches of this process, starting after the last example of the checkpoint."""
        args, accelerator = self.args, self.accelerator
        samples = self.data.samples(
            seed=args.seed,
            resolution=args.resolution,
            latent_shape=self.latent_shape,
            null_class_id=self.adapter.null_class_id,
            label_dropout=self.label_dropout,
            center_crop=args.center_crop,
            random_flip=args.random_flip,
            sample_posterior=self.vae is not None,
            num_tokens=math.prod(self.grid_size) if args.objective == "vrpo" else None,
            encoders=self.encoders,
            global_batch_size=self.global_batch_size,
            stream_version=self.settings["random_streams"],
        )
        sampler = StreamBatchSampler(
            self.samples_seen,
            max(0, self.max_train_steps - self.step),
            args.train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            args.gradient_accumulation_steps,
            repeats=args.policy_epochs,
        )
        pin_memory = accelerator.device.type == "cuda"
        with warnings.catch_warnings():
            # It is harmless, and the default number of workers is above the two cores of many small machines.
            warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes in total")
            loader = self.data.loader(samples, sampler, args.dataloader_num_workers, pin_memory)
            # A new iterator draws a number from torch's generator, whose state must be that of an uninterrupted run.
            with torch.random.fork_rng(devices=[], enabled=self.step > 0):
                return iter(loader)

    def _next_batch(self, batches: Iterator) -> dict[str, torch.Tensor]:
        """Moves the next micro-batch to the device, with pixels in [-1, 1]; example indices stay on the CPU."""
        with self.profile("data"):
            batch = next(batches)
        self.corrupt_rows.update(batch.pop("corrupt_rows").tolist())
        if len(self.corrupt_rows) > 0.01 * len(self.data):
            raise too_many_corrupt(self.corrupt_rows, len(self.data))
        index = batch.pop("index")
        times = (self.args.timestep_sampling, self.args.logit_mean, self.args.logit_std)
        batch["timestep"] = sample_time(batch["timestep"], *times)
        if self.image_rewards.active():
            # The rows are chosen on the CPU, so that nothing waits for the device.
            batch["rewarded"] = self.image_rewards.rows(flow_time(batch["timestep"], self.adapter), index)
        batch = self.to_device(batch)
        if "pixels" in batch:
            batch["pixels"] = batch["pixels"].float() / 127.5 - 1
        return batch | {"index": index}

    def _skip_or_stop(self, problem: str):
        """Handles a step whose loss or gradient was not finite: skips it or stops the run.

        Raises:
            TrainingStopped: unless such steps are skipped.
        """
        first = self.samples_seen
        last = first + self.global_batch_size - 1
        where = f"step {self.step + 1} (samples {first} to {last}): {problem}"
        if self.guard.must_stop():
            if self.step != self.saved_step and self.can_save(begun=True):
                self.save_checkpoint()
            raise self.guard.stop(where, self.output_dir, self.saved_step)
        logger.warning(f"{where} is NaN or infinite; the step is skipped ({self.guard.skipped} skipped so far)")

    def _flops_of_step(self) -> float:
        own = self.flops_per_image[self.alignment.active] + self.image_rewards.active() * self.image_reward_flops
        return own * self.global_batch_size + sum(callback.flops(self.step) for callback in self.callbacks)

    def _what_follows(self) -> str:
        """Returns a sentence for the log that says what remains to be done after the last step."""
        parts = ["a checkpoint", *["samples"] * (self.validation is not None)]
        parts.append("the transformer" if self.validation is None else "the pipeline")
        hub = ", which is then published" if self.args.push_to_hub else ""
        minutes = self.stopwatch.seconds() / 60
        return (
            f"all {self.step} steps are done, in {minutes:.1f} minutes of training; {', '.join(parts[:-1])} and {parts[-1]} follow, "
            f"in {self.output_dir}{hub}"
        )

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.max_train_steps,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            desc="training",
            unit="step",
        )

    def _call(self, hook: str, *arguments):
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)
