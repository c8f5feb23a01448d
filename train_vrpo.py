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
import sys

from accelerate.logging import get_logger
from diffusers.optimization import SchedulerType

from diffusers_vrpo.alignment.gradient_fork import CONFLICTS
from diffusers_vrpo.alignment.policy import TIMESTEP_WEIGHTS
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
from diffusers_vrpo.config import VRPOConfig
from diffusers_vrpo.errors import InputError, TrainingInterrupted, TrainingStopped
from diffusers_vrpo.experimental.generative.config import add_generative_options, check_generative
from diffusers_vrpo.hub.background import add_hub_options
from diffusers_vrpo.trainer import VRPOTrainer
from diffusers_vrpo.training.throughput import add_speed_options


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
        help="train from what `vrpo prepare` wrote there, not from images",
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


def main(args: VRPOConfig):
    """Trains, or continues where the newest checkpoint of `output_dir` ends.

    Raises:
        InputError: for options, data or checkpoints that cannot work.
        TrainingStopped: when the run cannot go on.
        SystemExit: 128 + the number of a signal (143, 130), after a checkpoint was saved.
    """
    callbacks = []
    if args.generative_policy_start_step is not None:
        from diffusers_vrpo.experimental.generative.callback import GenerativePolicy

        callbacks.append(GenerativePolicy(args))

    with VRPOTrainer(args=args, callbacks=callbacks) as trainer:
        try:
            trainer.train()
        except TrainingInterrupted as interrupted:
            sys.exit(128 + interrupted.signum)
        trainer.save_model()
        if args.push_to_hub:
            trainer.push_to_hub()


if __name__ == "__main__":
    try:
        args = parse_args()
        main(args)
    except (InputError, TrainingStopped) as error:
        sys.exit(f"train_vrpo.py: error: {with_flags(error, vars(args))}")
