#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Train a class-conditional diffusion transformer (SiT, DiT) with representation alignment.

    accelerate launch train_vrpo.py --config configs/digits.yaml
    accelerate launch train_vrpo.py --preset SiT-B/2 --dataset_name ILSVRC/imagenet-1k --resolution 256 \
        --vae stabilityai/sd-vae-ft-ema --encoder facebook/dinov2-base --objective vrpo --output_dir sit-b-vrpo

`--objective none` is plain flow matching, `repa` adds REPA's cosine loss, `vrpo` replaces that loss by group-relative
rewards on the projected tokens. Running the same command again continues the run.
"""

import argparse
import math
import signal
import sys
import time
from pathlib import Path

import torch
import yaml
from accelerate.logging import get_logger
from diffusers.optimization import SchedulerType, get_scheduler
from tqdm.auto import tqdm

from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.alignment.gradient_fork import CONFLICTS
from diffusers_vrpo.alignment.objective import objective_from_config
from diffusers_vrpo.alignment.policy import TIMESTEP_WEIGHTS
from diffusers_vrpo.alignment.reward_statistics import parse_reward_weighting
from diffusers_vrpo.alignment.rewards import DEFAULT_REWARDS
from diffusers_vrpo.alignment.start import build_aligned_transformer
from diffusers_vrpo.command_line import (
    HelpFormatter,
    OneLineErrorParser,
    add_policy_options,
    check_data,
    check_policy,
    check_ranges,
    config_to_argv,
    with_flags,
)
from diffusers_vrpo.data.image_datasets import check_corrupt_rows, too_many_corrupt
from diffusers_vrpo.data.samples import StreamBatchSampler
from diffusers_vrpo.data.sources import check_data_settings, data_settings, load_training_data
from diffusers_vrpo.errors import InputError, TrainingStopped
from diffusers_vrpo.experimental.generative.callback import GenerativePolicy
from diffusers_vrpo.experimental.generative.config import add_generative_options, check_generative
from diffusers_vrpo.hub.background import HubPush, add_hub_options
from diffusers_vrpo.models.autoencoder import latent_shape, load_vae
from diffusers_vrpo.models.ddpm import variational_bound
from diffusers_vrpo.models.flow import flow_matching_loss, forward_process
from diffusers_vrpo.models.official_checkpoints import default_scheduler
from diffusers_vrpo.models.start import read_start
from diffusers_vrpo.models.vision import layers_of_encoders
from diffusers_vrpo.pipelines.pipeline_vrpo import VRPOPipeline
from diffusers_vrpo.reporting.curves import plot_metrics
from diffusers_vrpo.training.checkpoints import (
    choose_checkpoint,
    load_checkpoint,
    read_training_state,
    register_model_hooks,
    run_settings,
    save_checkpoint,
    save_lora,
)
from diffusers_vrpo.training.distributed import clip_grad_norm, prepare, whole_pipeline
from diffusers_vrpo.training.interruption import Interruption, StepGuard, settle
from diffusers_vrpo.training.metrics import MetricsFile, RunningMeans, log_values, write_start
from diffusers_vrpo.training.output_dir import locked, prepare_output_dir, written
from diffusers_vrpo.training.setup import build_optimizer, start_accelerator, trainable_parameters
from diffusers_vrpo.training.throughput import ForeachEMA, TrainingSpeed, add_speed_options
from diffusers_vrpo.training.validation import Validation


logger = get_logger("train_vrpo")


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


# The one that is left out takes rules that no option gives.
LR_SCHEDULERS = [s.value for s in SchedulerType if s.value != "piecewise_constant"]


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineErrorParser(
        prog="train_vrpo.py",
        allow_abbrev=False,
        description=__doc__,
        usage="accelerate launch train_vrpo.py [--config FILE.yaml] [options]",
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36, width=118),
    )
    flag = argparse.BooleanOptionalAction

    g = parser.add_argument_group("run")
    g.add_argument(
        "--config", metavar="FILE.yaml", help="read options from a YAML file; the command line overrides it"
    )
    g.add_argument("--output_dir", default="vrpo-model", help="checkpoints, metrics, samples and the final pipeline")
    g.add_argument("--cache_dir", help="where downloads go")
    g.add_argument("--seed", type=int, default=0, help="of the weights and of everything drawn for sample i")
    g.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="without it, accelerate's configuration")
    g.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs")
    g.add_argument(
        "--report_to", default="tensorboard", help="trackers with commas between (tensorboard, wandb, ...), or none"
    )
    g.add_argument("--logging_dir", default="logs", help="tracker files, inside the output folder")
    g.add_argument("--logging_steps", type=int, default=50, help="read and write the metrics every this many steps")
    g.add_argument(
        "--dataloader_num_workers", type=int, default=4, help="processes (threads with --streaming) that decode"
    )

    g = parser.add_argument_group("data")
    g.add_argument("--dataset_name", help="Hub name or folder of an image data set, or `digits` (embedded)")
    g.add_argument("--dataset_config_name", help="configuration of that data set")
    g.add_argument("--dataset_split", default="train", help="split to train on")
    g.add_argument("--train_data_dir", help="folder with one folder of images per class, instead of --dataset_name")
    g.add_argument(
        "--latents_dir",
        help="train from what `python -m diffusers_vrpo.data.samples prepare` wrote there, not from images",
    )
    g.add_argument(
        "--streaming", action="store_true", help="read the parquet files of --dataset_name in training, keep no copy"
    )
    g.add_argument("--image_column", default="image", help="column with the images")
    g.add_argument("--label_column", default="label", help="column with the integer class labels")
    g.add_argument("--max_train_samples", type=int, help="train on a random subset of this size")
    g.add_argument(
        "--allow_changed_data", action="store_true", help="continue a run on other images, labels or class names"
    )
    g.add_argument("--resolution", type=int, default=256, help="side of the training images in pixels")
    g.add_argument("--center_crop", action=flag, default=True, help="ADM's centre crop, or else a random one")
    g.add_argument("--random_flip", action=flag, default=False, help="mirror half of the images")

    g = parser.add_argument_group("model")
    g.add_argument("--preset", help="{SiT,DiT}-{XS,S,B,L,XL}/{1,2,4,8}; SiT-B/2 where nothing else says what to train")
    g.add_argument(
        "--model_config",
        metavar="FILE.json",
        help="the transformer's arguments; those that follow from the data and the objective are replaced",
    )
    g.add_argument(
        "--pretrained_model_name_or_path",
        metavar="NAME|FOLDER|FILE.pt",
        help="start from these weights: a pipeline or transformer, or an official checkpoint of SiT, REPA, iREPA or DiT",
    )
    g.add_argument(
        "--keep_labels", action="store_true", help="its classes are those of the data, however they are spelled"
    )
    g.add_argument("--lora_rank", type=int, help="train adapters of this rank and projectors, the rest stays as it is")
    g.add_argument(
        "--prediction_type",
        choices=["velocity", "epsilon"],
        help="velocity of a flow (SiT) or noise of a diffusion (DiT); without it, what preset or weights say",
    )
    g.add_argument("--learn_sigma", action=flag, help="epsilon: also train the variance, as DiT presets do")
    g.add_argument("--vae", help="diffusers autoencoder, Hub name or folder; `none` trains on pixels")
    g.add_argument(
        "--label_dropout",
        type=float,
        help="share of samples trained without their class; 0.1, or as the starting weights had it",
    )

    g = parser.add_argument_group("alignment")
    g.add_argument(
        "--objective", choices=["none", "repa", "vrpo"], default="vrpo", help="what to add to flow matching"
    )
    g.add_argument(
        "--encoder",
        nargs="+",
        action="extend",
        help="frozen transformers vision encoders, Hub names or folders, or `digits` (embedded); one projector each",
    )
    g.add_argument(
        "--encoder_layer",
        type=int,
        nargs="+",
        help="index in the hidden_states of each; by default the output, of conv nets the stage of stride 16",
    )
    g.add_argument("--layer_scope", default="early", help="blocks to align: early, mid, all, or a list such as 4,8")
    g.add_argument("--alignment_coeff", type=float, default=0.5, help="lambda, the coefficient of the alignment loss")
    g.add_argument("--alignment_stop_step", type=int, help="align no longer from this step on")
    g.add_argument(
        "--timestep_weighting",
        choices=TIMESTEP_WEIGHTS,
        default="uniform",
        help="w(t) of the alignment loss: 1, or sigmoid(20 (0.7 - t))",
    )
    g.add_argument("--projector", choices=["mlp", "conv"], default="mlp", help="REPA's three layers or iREPA's 3x3")
    g.add_argument("--projector_dim", type=int, default=2048, help="hidden width of the mlp projectors")
    g.add_argument(
        "--spatial_norm",
        type=float,
        default=0.0,
        help="a in (f - a mean)/std of the targets, 0 for none; iREPA has 0.6",
    )
    g.add_argument(
        "--conflict",
        choices=CONFLICTS,
        help="where alignment turns against flow matching: gate closes the timestep bin for good, project takes the "
        "opposing part out, none lets it be; gate for vrpo, none for repa",
    )

    add_policy_options(parser)
    g = parser.add_argument_group("optimization")
    g.add_argument("--train_batch_size", type=int, default=256, help="samples per process and micro-step")
    g.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per optimizer step")
    g.add_argument("--gradient_checkpointing", action="store_true", help="recompute blocks to save memory")
    g.add_argument(
        "--max_train_steps",
        type=int,
        help="optimizer steps; 400000 where neither this nor --num_train_epochs is given",
    )
    g.add_argument("--num_train_epochs", type=int, help="instead of --max_train_steps")
    g.add_argument("--learning_rate", type=float, default=1e-4, help="of AdamW, after the warm-up")
    g.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup", help="schedule")
    g.add_argument("--lr_warmup_steps", type=int, default=0, help="steps of linear warm-up")
    g.add_argument("--adam_beta1", type=float, default=0.9, help="decay of the gradient's mean")
    g.add_argument("--adam_beta2", type=float, default=0.999, help="decay of the gradient's square")
    g.add_argument("--adam_weight_decay", type=float, default=0.0, help="decoupled weight decay")
    g.add_argument("--adam_epsilon", type=float, default=1e-8, help="added to the root of the square")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    g.add_argument("--use_ema", action=flag, default=True, help="average the weights; samples and results use them")
    g.add_argument("--ema_decay", type=float, default=0.9999, help="of the averaged weights, per step")
    add_speed_options(parser)

    g = parser.add_argument_group("checkpoints and samples")
    g.add_argument("--checkpointing_steps", type=int, default=10000, help="save a checkpoint every this many steps")
    g.add_argument("--checkpoints_total_limit", type=int, help="keep only the newest checkpoints")
    g.add_argument(
        "--resume_from_checkpoint", default="latest", metavar="latest|none|hub|DIR", help="what to continue, if there"
    )
    g.add_argument(
        "--skip_nonfinite",
        action="store_true",
        help="leave a step out whose loss or gradient is NaN or infinite, and count it; without it the run stops there",
    )
    g.add_argument("--validation_steps", type=int, default=10000, help="draw a sample grid every this many steps")
    g.add_argument(
        "--validation_labels", nargs="+", help="class names or ids of the grid's columns; ten ids without it"
    )
    g.add_argument("--num_validation_images", type=int, default=4, help="rows of the grid: images per class")
    g.add_argument("--num_inference_steps", type=int, default=50, help="solver steps of grid and --fd_encoder")
    g.add_argument("--guidance_scale", type=float, default=1.5, help="classifier-free guidance of the grid")
    g.add_argument("--fd_encoder", help="log the Fréchet distance to training images in this encoder's features, too")
    g.add_argument("--num_fd_samples", type=int, help="unguided samples for it; 2048 when not given")
    add_generative_options(parser)
    add_hub_options(parser)
    return parser


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    argv = sys.argv[1:] if input_args is None else list(input_args)
    find_config = OneLineErrorParser(prog="train_vrpo.py", add_help=False, allow_abbrev=False)
    find_config.add_argument("--config")
    config = find_config.parse_known_args(argv)[0].config
    args = parser.parse_args((config_to_argv(parser, config, argv) if config else []) + argv)

    check_data(parser, args)
    if args.vae is None and args.latents_dir is None:
        parser.error("give --vae, such as stabilityai/sd-vae-ft-ema, or `--vae none` to train on pixels")
    if args.objective != "none" and args.encoder is None:
        parser.error(f"--objective {args.objective} needs --encoder, such as facebook/dinov2-base")
    if args.max_train_steps is not None and args.num_train_epochs is not None:
        parser.error("--max_train_steps and --num_train_epochs exclude each other; give one")
    check_ranges(
        parser,
        args,
        at_least_one="train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs max_train_samples "
        "logging_steps checkpointing_steps checkpoints_total_limit validation_steps num_validation_images "
        "num_inference_steps num_fd_samples projector_dim resolution lora_rank policy_epochs profile rollout_classes "
        "rollout_steps rollout_every rollout_epochs mc_samples reward_reference_images guard_every",
        at_least_zero="adam_weight_decay alignment_coeff alignment_stop_step spatial_norm lr_warmup_steps "
        "dataloader_num_workers kl_coeff generative_policy_start_step generative_coeff anchor_coeff guard_loss_rise "
        "guard_recall_fall guard_distance_rise",
        positive="learning_rate max_grad_norm adam_epsilon policy_noise clip_range peak_tflops rollout_clip_range "
        "max_gradient_ratio generative_learning_rate",
        shares="label_dropout ema_decay adam_beta1 adam_beta2",
    )
    check_policy(parser, args)
    check_generative(parser, args)
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} must lie in 0 ... 2^63 - 1")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        parser.error("--lr_scheduler constant has no warm-up; use constant_with_warmup, or --lr_warmup_steps 0")
    if args.model_config and (args.preset or args.pretrained_model_name_or_path):
        parser.error("--model_config excludes --preset and --pretrained_model_name_or_path; give one")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Training


def main(args: argparse.Namespace):
    """Trains, or goes on where the newest checkpoint of `--output_dir` ends.

    Raises:
        InputError: for options, data or checkpoints that cannot work.
        TrainingStopped: when the run cannot go on.
        SystemExit: 128 + the number of a signal (143, 130), after a checkpoint was saved.
    """
    output_dir = prepare_output_dir(args.output_dir)
    with Interruption() as interruption, locked(output_dir):
        train(args, output_dir, interruption)


def train(args: argparse.Namespace, output_dir: Path, interruption: Interruption):
    accelerator = start_accelerator(args, output_dir)
    device = accelerator.device

    # 1. Data, autoencoder, encoder: whatever cannot work fails here, before any long work.
    hub = HubPush(args, accelerator, output_dir, interruption)
    checkpoint = choose_checkpoint(accelerator, args.resume_from_checkpoint, output_dir)
    parse_reward_weighting(args.reward_weighting, len(DEFAULT_REWARDS))
    with accelerator.main_process_first():
        data = load_training_data(args)
    num_classes, id2label = data.num_classes, data.id2label
    data.give_up_when(lambda: interruption.signum > 0)  # in an outage, a signal ends the waiting
    if accelerator.is_main_process:
        data.check()
    vae_name = args.vae or data.vae
    vae = None if vae_name == "none" else load_vae(vae_name, args.cache_dir).to(device)
    start = read_start(args)
    patch_size = start.config["patch_size"]
    channels, height, width = latent_shape(vae, args.resolution, patch_size)
    grid_size = (height // patch_size, width // patch_size)
    aligns = args.objective != "none"
    layers = layers_of_encoders(args.encoder, args.encoder_layer)
    encoders = data.features(args.encoder, layers, grid_size) if aligns else []
    if aligns and not encoders:
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        encoder_dtype = torch.float32 if device.type == "cpu" else half
        for name, layer in zip(args.encoder, layers):
            encoders.append(load_encoder(name, grid_size, layer, encoder_dtype, device, args.cache_dir))
    elif args.encoder and not aligns:
        logger.info(f"--objective none trains without the encoder {', '.join(args.encoder)}")

    # 2. Model, EMA, optimizer. All processes start from the same weights, drawn from the seed.
    torch.manual_seed(args.seed)
    aligned = build_aligned_transformer(args, start, (channels, height, width), num_classes, id2label, encoders)
    transformer = aligned.transformer
    del start
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    aligned.to(device)
    speed = TrainingSpeed(args, aligned, accelerator, logger.info)
    optimizer = build_optimizer(args, trainable_parameters(aligned))
    global_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    max_train_steps = args.max_train_steps or 400_000
    if args.num_train_epochs:
        draws = math.ceil(args.num_train_epochs * len(data) / global_batch_size)
        shared = math.lcm(args.policy_epochs, args.rollout_every if args.rollout_epochs > 1 else 1)
        max_train_steps = math.ceil(draws * args.policy_epochs / shared) * shared
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )
    objective = objective_from_config(args, aligned, max_train_steps, autocast=accelerator.autocast)
    pipeline = VRPOPipeline(transformer, default_scheduler(transformer.config.prediction_type), vae, id2label)

    # FSDP replaces the weights: the averages are of the new ones.
    model, optimizer = prepare(accelerator, aligned, optimizer)
    ema = None
    if args.use_ema:
        # min_decay turns diffusers' warm-up off, which would reach 0.9999 at step 90,000 only.
        ema = ForeachEMA(trainable_parameters(model), decay=args.ema_decay, min_decay=args.ema_decay)
    validation = Validation(args, accelerator, pipeline, data, output_dir, interruption)
    length = (global_batch_size, max_train_steps)
    policy = GenerativePolicy(args, accelerator, pipeline, data, lr_scheduler, validation, *length)

    # 3. Where to start: the stream of samples goes on where the checkpoint's ended.
    states = objective.stateful()
    states |= {"generative_policy": policy} if policy.enabled else {}
    means = RunningMeans()
    register_model_hooks(accelerator, ema, states, means, optional=["generative_policy"])
    guard = StepGuard(accelerator, optimizer, interruption, args.skip_nonfinite)
    step, samples_seen, saved_step, seconds, flops = 0, 0, 0, 0.0, 0.0
    settings, of_data = run_settings(args, data, aligned, global_batch_size), data_settings(data)
    if checkpoint is not None:
        state = read_training_state(checkpoint, settings)
        check_data_settings(state["settings"], of_data, checkpoint, args.allow_changed_data)
        load_checkpoint(accelerator, checkpoint)
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        step, samples_seen, guard.skipped = state["step"], state["samples_seen"], state["skipped"]
        seconds, flops = state["train_seconds"], state["train_flops"]
        saved_step = step if checkpoint.parent.resolve() == output_dir.resolve() else None
        if ema is not None:
            ema.optimization_step = step
        policy.check_begun(step, checkpoint)
        logger.info(f"continuing from {checkpoint} at step {step}")
    samples = data.samples(
        seed=args.seed,
        resolution=args.resolution,
        latent_shape=(channels, height, width),
        null_class_id=pipeline.transformer.null_class_id,
        label_dropout=pipeline.transformer.config.class_dropout_prob,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        sample_posterior=vae is not None,
        num_tokens=math.prod(grid_size) if args.objective == "vrpo" else None,
        encoders=encoders,
        global_batch_size=global_batch_size,
    )
    del encoders  # the aligned transformer frees them when alignment ends
    batch_sampler = StreamBatchSampler(
        samples_seen,
        max(0, max_train_steps - step),
        args.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        args.gradient_accumulation_steps,
        repeats=args.policy_epochs,
    )
    dataloader = data.loader(samples, batch_sampler, args.dataloader_num_workers, device.type == "cuda")
    metrics_file = None
    if accelerator.is_main_process:
        given = {name: value for name, value in vars(args).items() if value is not None and name != "config"}
        given["vae"] = vae_name
        with written(f"train_config.yaml or metrics.jsonl in {output_dir}"):
            (output_dir / "train_config.yaml").write_text(yaml.safe_dump(given))
            metrics_file = MetricsFile(output_dir / "metrics.jsonl", step)
            write_start(output_dir, step, accelerator, aligned, global_batch_size, max_train_steps, given)
        # What a continued run logs a second time replaces what TensorBoard has.
        purge = {"tensorboard": {"purge_step": step + 1}} if step else {}
        accelerator.init_trackers("vrpo", {name: str(value) for name, value in vars(args).items()}, purge)
    parameters = sum(p.numel() for p in trainable_parameters(aligned))
    logger.info(
        f"{len(data)} images, {num_classes} classes; training {parameters / 1e6:.1f} M parameters, {math.prod(grid_size)} tokens; "
        f"{global_batch_size} samples a step on {accelerator.num_processes} process(es), steps {step} to {max_train_steps}"
    )

    # 4. The loop.
    model_config = pipeline.transformer.config
    learn_variance = model_config.learn_sigma and model_config.prediction_type == "epsilon"
    objective.resume(step, None if checkpoint is None else state["alignment"])
    corrupt_rows, num_corrupt = set(), 0
    progress = tqdm(
        total=max_train_steps, initial=step, disable=not accelerator.is_main_process, desc=args.objective, unit="step"
    )

    def save() -> bool:
        if accelerator.is_main_process:
            metrics_file.sync()
        state = {"step": step, "samples_seen": samples_seen, "skipped": guard.skipped}
        state |= {"settings": settings | of_data}
        state |= {"lr_scheduler": lr_scheduler.state_dict(), "alignment": objective.release_state()}
        state |= {"train_seconds": seconds, "train_flops": flops}
        return save_checkpoint(accelerator, output_dir, step, state, args.checkpoints_total_limit)

    validation.catch_up(step, ema, metrics_file)
    if reason := policy.look(step, ema, metrics_file):
        raise policy.stop(reason, step, saved_step)
    model.train()
    interruption.listen()
    logged_step, logged_seconds, clock = step, seconds, time.perf_counter()
    for batch in dataloader:
        speed.mark("data")
        corrupt_rows.update(batch.pop("corrupt_rows").tolist())
        if len(corrupt_rows) > 0.01 * len(data):
            raise too_many_corrupt(corrupt_rows, len(data))
        indices = batch.pop("index")
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} | {"index": indices}
        if "pixels" in batch:
            batch["pixels"] = batch["pixels"].float() / 127.5 - 1
        # What the encoders take: images, or their features out of the cache.
        images = batch.get("pixels", batch)

        with accelerator.accumulate(model):
            x0 = speed.mark("autoencoder", data.latents(vae, batch))
            x_t, timestep, target, t = forward_process(x0, batch["noise"], batch["timestep"], model_config)
            inputs = (x_t, timestep, batch["class_labels"])
            alignment = objective.begin(t)
            prediction, projections = model(
                *inputs, fork=alignment.fork, align=alignment.active, return_variance=learn_variance
            )
            loss_fm = flow_matching_loss(prediction[:, :channels], target)
            loss = speed.mark("forward", loss_fm.mean())
            means.add(loss_fm=loss)
            if learn_variance:
                loss_vb = variational_bound(*prediction.split(channels, dim=1), x0, x_t, timestep).mean()
                loss = loss + loss_vb
                means.add(loss_vb=loss_vb)
            if aligns:
                # REPA's cosine, or VRPO's reward-weighted policy; fidelity joins in at the fork.
                alignment.targets = speed.mark("encoder", objective.targets(images))
                draws = {"subset": batch.get("tokens"), "index": indices, "inputs": inputs}
                loss_rep = objective(alignment, projections, images, loss_fm, **draws)
                loss = loss + args.alignment_coeff * loss_rep
                means.add(**speed.mark("alignment loss", alignment.logs))

            guard.watch(loss)
            speed.mark("backward", accelerator.backward(loss))
            objective.observe(alignment)
            if accelerator.sync_gradients:
                if policy.active(step):  # rewards of generated images pull, too
                    means.add(**speed.mark("generative policy", policy.add_gradient(step, ema)))
                grad_norm = clip_grad_norm(accelerator, model, args.max_grad_norm)
                means.add(grad_norm=grad_norm)
                guard.ask(grad_norm)
            optimizer.step()
            speed.mark("optimizer", optimizer.zero_grad())

        if not accelerator.sync_gradients:
            continue
        if problem := guard.answer():
            # The optimizer has left the step out: weights, averages and statistics are as they were before it.
            where = f"step {step + 1} (samples {samples_seen} to {samples_seen + global_batch_size - 1}): {problem}"
            if guard.must_stop():
                if step != saved_step and step % args.policy_epochs == 0 and not policy.active(step) and save():
                    saved_step = step
                raise guard.stop(where, output_dir, saved_step)
            logger.warning(f"{where} is NaN or infinite; the step is skipped, {guard.skipped} so far")
        step += 1
        means.commit()
        flops += speed.flops_per_image[alignment.active] * global_batch_size + policy.flops(step - 1)
        samples_seen += global_batch_size if step % args.policy_epochs == 0 else 0
        lr_scheduler.step()
        if ema is not None:
            speed.mark("average", ema.step(trainable_parameters(aligned)))
        objective.update(accelerator.reduce if accelerator.num_processes > 1 else None)
        speed.mark("statistics", progress.update())
        whole = step % args.policy_epochs == 0 and not policy.unfinished(step)  # no draw is in use

        # 5. Now and then: metrics, a checkpoint, a grid of samples.
        last = step == max_train_steps
        if step % args.logging_steps == 0 or last:
            values = means.read(accelerator)
            num_corrupt = check_corrupt_rows(corrupt_rows, len(data), num_corrupt)
            if alignment.active:
                values |= objective.summary()
            seconds += time.perf_counter() - clock
            if args.skip_nonfinite:
                values["skipped_steps"] = guard.skipped
            values["learning_rate"] = lr_scheduler.get_last_lr()[0]
            values["images_per_second"] = (step - logged_step) * global_batch_size / (seconds - logged_seconds)
            values |= speed.metrics(values["images_per_second"], alignment.active)
            values |= {"samples_seen": samples_seen, "train_seconds": seconds, "train_flops": flops}
            logged_step, logged_seconds, clock = step, seconds, time.perf_counter()
            shown = {
                "loss": values["loss_fm"],
                **{name: values.get(f"reward/{name}") for name in objective.reward_names},
            }
            shown = {name: f"{value:.4f}" for name, value in shown.items() if value is not None}
            progress.set_postfix(shown | speed.shown(values))
            log_values(accelerator, values, step)
            if accelerator.is_main_process:
                metrics_file.write(step, values)
        if reason := policy.look(step, ema, metrics_file):
            raise policy.stop(reason, step, step if whole and save() else saved_step)
        seconds += time.perf_counter() - clock
        leaving = guard.signum and whole
        if step % args.checkpointing_steps == 0 or last or leaving:
            saved_step = step if save() else saved_step
            hub.push_checkpoint(pipeline, saved_step)
            if step != saved_step and (last or leaving):
                raise TrainingStopped(f"step {step} could not be saved; make room and run the same command again")
        if leaving:
            logger.info(f"{signal.Signals(guard.signum).name}: the same command continues from step {step}")
            settle(accelerator)
            accelerator.end_training()
            sys.exit(128 + guard.signum)
        if step % args.validation_steps == 0 and not last:
            validation(step, ema, metrics_file)
        speed.step()
        clock = time.perf_counter()
    progress.close()

    # 6. The result: a folder that `VRPOPipeline.from_pretrained` opens, with averaged weights.
    accelerator.wait_for_everyone()
    grid = validation(step, ema, metrics_file)
    with whole_pipeline(accelerator, pipeline, ema) as averaged, written(f"the pipeline in {output_dir}"):
        if accelerator.is_main_process:
            if args.lora_rank:
                save_lora(averaged.transformer, output_dir / "lora")
            averaged.save_pretrained(output_dir)
            grid.save(output_dir / "samples.png")
            plot_metrics(output_dir / "metrics.jsonl", output_dir / "training.png", f"objective {args.objective}")
            logger.info(f"wrote the pipeline, samples.png and training.png to {output_dir}")
    settle(accelerator)
    accelerator.end_training()
    hub.push_result()


if __name__ == "__main__":
    try:
        args = parse_args()
        main(args)
    except (InputError, TrainingStopped) as error:
        sys.exit(f"train_vrpo.py: error: {with_flags(error, vars(args))}")
