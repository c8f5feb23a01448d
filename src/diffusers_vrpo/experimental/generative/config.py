# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The options of the generative policy on the command line of the training script."""

import argparse

from .rewards import ENOUGH_FOR_FRECHET, FIDELITY_REWARDS


def add_generative_options(parser: argparse.ArgumentParser):
    """The options of the generative policy, of the training script."""
    g = parser.add_argument_group("generative policy (docs/generative.md)")
    g.add_argument(
        "--generative_policy_start_step", type=int, help="from this step on also follow rewards of generated images"
    )
    g.add_argument("--rollout_classes", type=int, default=32, help="classes P of a rollout")
    g.add_argument("--rollout_group_size", type=int, default=16, help="samples G of each class")
    g.add_argument("--rollout_steps", type=int, default=25, help="solver steps of a sample, unguided")
    g.add_argument("--rollout_every", type=int, default=2, help="optimizer steps from one rollout to the next")
    g.add_argument("--rollout_epochs", type=int, default=1, help="the first so many of these follow its rewards")
    g.add_argument("--mc_samples", type=int, default=4, help="noise levels behind the likelihood of a sample")
    g.add_argument("--generative_coeff", type=float, default=1.0, help="lambda of the rewards' loss")
    g.add_argument(
        "--max_gradient_ratio", type=float, default=0.5, help="its gradient is at most so long, in that of the rest"
    )
    g.add_argument("--rollout_clip_range", type=float, default=8e-3, help="of the ratio, when rollout_epochs > 1")
    g.add_argument(
        "--anchor_coeff",
        type=float,
        help="pull towards the model that drew the samples; without it 0, or 0.3 when rollout_epochs > 1",
    )
    g.add_argument("--generative_learning_rate", type=float, default=1e-5, help="from the start step on")
    g.add_argument("--reward_encoder", help="frozen transformers encoder that judges; the first --encoder without it")
    g.add_argument(
        "--reward_shallow_layer", type=int, help="its hidden state of the perceptual reward; a quarter deep"
    )
    g.add_argument(
        "--fidelity_reward",
        choices=FIDELITY_REWARDS,
        default="auto",
        help=f"influence on the Fréchet distance, or on the MMD; auto: the latter under {ENOUGH_FOR_FRECHET} images",
    )
    g.add_argument(
        "--reward_function",
        action="append",
        metavar="FILE.py:NAME",
        help="a reward of yours, `reward(images, features, labels)`; may be given several times",
    )
    g.add_argument(
        "--reward_weights", help="shares of fidelity, perceptual, semantic and yours, such as 2,1,1; equal without it"
    )
    g.add_argument("--reward_queue_size", type=int, default=10240, help="latest samples that stand for the model")
    g.add_argument(
        "--reward_reference",
        metavar="FILE.safetensors",
        help="where statistics of the training images are kept; in the output folder without it",
    )
    g.add_argument("--reward_reference_images", type=int, default=50_000, help="training images behind them at most")
    g.add_argument("--guard_every", type=int, default=25, help="rollouts from one look of the guards to the next")
    g.add_argument("--guard_samples", type=int, default=1024, help="samples of a look")
    g.add_argument("--guard_loss_rise", type=float, default=0.02, help="stop: rise of the flow-matching loss")
    g.add_argument("--guard_recall_fall", type=float, default=0.03, help="stop: fall of recall")
    g.add_argument(
        "--guard_distance_rise",
        type=float,
        default=0.02,
        help="stop: rise of the distance to training images in --fd_encoder while the reward rises",
    )


OPTIONS = [
    "rollout_classes",
    "rollout_group_size",
    "rollout_steps",
    "rollout_every",
    "rollout_epochs",
    "mc_samples",
    "generative_coeff",
    "max_gradient_ratio",
    "rollout_clip_range",
    "anchor_coeff",
    "generative_learning_rate",
    "reward_encoder",
    "reward_shallow_layer",
    "fidelity_reward",
    "reward_function",
    "reward_weights",
    "reward_queue_size",
    "reward_reference",
    "reward_reference_images",
    "guard_every",
    "guard_samples",
    "guard_loss_rise",
    "guard_recall_fall",
    "guard_distance_rise",
]
# What may change when a run is continued: files may have moved, looks do not change what is trained.
FREE = ("reward_encoder", "reward_function", "reward_reference", "guard_loss_rise", "guard_recall_fall")
FREE += ("guard_distance_rise",)


def check_generative(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends with a sentence about options of the generative policy that cannot work or would be ignored."""
    start = args.generative_policy_start_step
    if start is None:
        for name in OPTIONS:
            if getattr(args, name) != parser.get_default(name):
                parser.error(
                    f"--{name} {getattr(args, name)} goes with --generative_policy_start_step only; leave it out"
                )
        return
    if args.max_train_steps is not None and start >= args.max_train_steps:
        parser.error(
            f"--generative_policy_start_step {start} is never reached: --max_train_steps {args.max_train_steps} must be above it"
        )
    if args.guard_distance_rise != parser.get_default("guard_distance_rise") and args.fd_encoder is None:
        parser.error(
            f"--guard_distance_rise {args.guard_distance_rise} is of the distance in --fd_encoder; give that, or leave it out"
        )
    if args.rollout_epochs > args.rollout_every:
        parser.error(
            f"--rollout_epochs {args.rollout_epochs} must be at most --rollout_every {args.rollout_every}, after which the "
            "next rollout replaces the samples"
        )
    if args.rollout_epochs == 1 and args.rollout_clip_range != parser.get_default("rollout_clip_range"):
        parser.error(
            f"--rollout_clip_range {args.rollout_clip_range} acts with --rollout_epochs above 1 only; leave it out"
        )
    if args.rollout_epochs > 1:
        for name in ("generative_policy_start_step", "checkpointing_steps", "max_train_steps"):
            value = getattr(args, name)
            if name == "max_train_steps" and value is None and args.num_train_epochs is None:
                value = 400_000  # what the script takes then
            if value is not None and value % args.rollout_every:
                parser.error(
                    f"--{name} {value} must be a multiple of --rollout_every {args.rollout_every} when --rollout_epochs is "
                    "above 1: steps that share samples are saved whole"
                )
    for name, least, why in (
        ("rollout_group_size", 2, "advantages are relative to the group"),
        ("guard_samples", 4, "recall looks at a sample's third neighbour"),
        ("reward_queue_size", args.rollout_classes * args.rollout_group_size, "the queue holds a whole rollout"),
    ):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}: {why}")
    if args.reward_encoder == "inception":
        parser.error("--reward_encoder inception judges results (FID): a reward must not see it; take another")
    if args.reward_encoder is None and not args.encoder:
        parser.error(
            "--generative_policy_start_step needs --reward_encoder, a frozen encoder that judges samples, such as "
            "facebook/dinov2-base"
        )


GenerativeConfig = argparse.Namespace
