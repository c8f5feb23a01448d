# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Trains with two rewards that are defined here: one for projected tokens, and one for the image that a prediction implies.

    accelerate launch examples/custom_reward.py  # handwritten digits, without a download

    accelerate launch --mixed_precision bf16 examples/custom_reward.py --dataset_name ILSVRC/imagenet-1k \
        --model SiT-B/2 --vae stabilityai/sd-vae-ft-ema --encoder facebook/dinov2-base --resolution 256 \
        --train_batch_size 32 --learning_rate 1e-4 --max_train_steps 100000
"""

import argparse
from pathlib import Path

from diffusers_vrpo import VRPOConfig, VRPOTrainer, read_metrics


def contrast(action, mu, y, subset):
    """Rewards a token that is closer to its own patch embedding than to those of the image's other patches.

    The reward is the log-probability of the right patch, at temperature 0.1.

    Args:
        action: unit vectors, the projected tokens `[B,N,E]`, or `[G,B,N,E]` if a group of G actions is drawn per token.
        mu: the tokens around which the actions are drawn, `[B,N,E]`; not used here.
        y: the encoder's patch embeddings, unit vectors `[B,N,E]`.
        subset: indices `[B,M]` of M random tokens, for rewards that compare tokens; not used here.

    Returns:
        a number for each token, `[B,N]` or `[G,B,N]`; higher is better, in any unit.
    """
    similarity = action @ y.mT / 0.1
    return similarity.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1)


def edges(x0_hat, x0):
    """Rewards an estimated image whose edges (the differences of neighbouring pixels) match those of the clean image.

    Args:
        x0_hat: the estimated images `[B,3,H,W]`, roughly in [-1, 1] but not clamped.
        x0: the clean images, `[B,3,H,W]` in [-1, 1].

    Returns:
        a number for each image, `[B]`, which must not depend on the other images.
    """
    difference = x0_hat - x0
    rows, columns = difference.diff(dim=2), difference.diff(dim=3)
    return -rows.square().mean((1, 2, 3)) - columns.square().mean((1, 2, 3))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train SiT with rewards that are defined here.")
    parser.add_argument("--model", default="SiT-XS/2", help="a preset, or weights to start from")
    parser.add_argument("--vae", default="none", help="an autoencoder of diffusers; none for pixels")
    parser.add_argument("--encoder", default="embedded:digits", help="a vision model of transformers")
    parser.add_argument("--dataset_name", default="embedded:digits", help="a data set of the Hub, or a folder of one")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--resolution", type=int, default=8)
    parser.add_argument("--projector_dim", type=int, default=256)
    parser.add_argument(
        "--image_reward_share",
        type=float,
        default=0.3,
        help="norm of the image reward's gradient, relative to flow matching's",
    )
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=800)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--num_inference_steps", type=int, default=50, help="solver steps for the samples at the end")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/custom-reward")
    return parser.parse_args(argv)


def main(args):
    # Options of the trainer, which `vrpo train --help` explains. Functions are passed to the trainer itself.
    options = {name: value for name, value in vars(args).items() if name not in ("model", "vae", "encoder")}
    options |= {"logging_steps": max(1, args.max_train_steps // 10), "validation_steps": args.max_train_steps}
    options["image_reward_share"] = [args.image_reward_share]  # one for each image reward
    config = VRPOConfig(objective="vrpo", report_to="none", **options)

    # The scales of the rewards do not matter: token rewards have equal shares of the update by default, and the gradient of
    # an image reward has `image_reward_share` times the norm of flow matching's.
    with VRPOTrainer(
        model=args.model,
        encoders=args.encoder,
        vae=args.vae,
        rewards=["fidelity", "semantic", contrast],
        image_rewards=[edges],
        args=config,
    ) as trainer:
        trainer.train()
        trainer.save_model()
        is_main_process = trainer.accelerator.is_main_process

    # Rewards are logged by the functions' names.
    if is_main_process:
        rows = read_metrics(Path(args.output_dir, "metrics.jsonl"))
        for name in ("reward/contrast", "share/contrast", "reward/edges", "image_share/edges"):
            values = [row[name] for row in rows if row.get(name) is not None]
            print(f"{name}: {values[0]:.3f} at the start, {values[-1]:.3f} at the end")


if __name__ == "__main__":
    main(parse_args())
