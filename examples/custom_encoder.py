# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Aligns with an encoder that is not in transformers: a plain torch module, which is trained here to classify the images.

    accelerate launch examples/custom_encoder.py  # handwritten digits, without a download

    accelerate launch --mixed_precision bf16 examples/custom_encoder.py --dataset_name ILSVRC/imagenet-1k \
        --model SiT-B/2 --vae stabilityai/sd-vae-ft-ema --resolution 256 --encoder_patch_size 16 --encoder_dim 512 \
        --encoder_steps 50000 --encoder_weights patches.safetensors --train_batch_size 32 --learning_rate 1e-4

An encoder is any callable that maps images `[B,3,H,W]` in [-1, 1] to patch embeddings `[B,M,E]`, row by row of a square grid,
and has the attribute `embed_dim`, E. The grid may differ from the transformer's.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import load_dataset
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_vrpo import VRPOConfig, VRPOTrainer, load_digits_dataset


class PatchNetwork(nn.Module):
    """Embeds patches and their surroundings with convolutions."""

    def __init__(self, embed_dim: int, patch_size: int):
        super().__init__()
        self.embed_dim = embed_dim  # the trainer reads this
        self.layers = nn.Sequential(
            nn.Conv2d(3, embed_dim, patch_size, stride=patch_size),
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1),
        )

    def forward(self, images):
        return self.layers(images).flatten(2).mT


def train_encoder(encoder, dataset, args, device):
    """Trains the encoder to classify images by the mean of their embeddings."""
    classifier = nn.Linear(encoder.embed_dim, dataset.features[args.label_column].num_classes).to(device)
    parameters = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)

    def preprocess(examples):
        size = (args.resolution, args.resolution)
        images = [ImageOps.fit(image.convert("RGB"), size) for image in examples[args.image_column]]
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images]
        return {"pixel_values": pixels, "labels": examples[args.label_column]}

    data, batch_size = dataset.with_transform(preprocess), args.train_batch_size
    sampler = torch.utils.data.RandomSampler(data, num_samples=args.encoder_steps * batch_size)
    for batch in torch.utils.data.DataLoader(data, batch_size, sampler=sampler):
        images, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
        logits = classifier(encoder(images).mean(1))
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (logits.argmax(1) == labels).float().mean().item()
    print(f"the encoder classifies {right:.0%} of its last {len(labels)} images correctly")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train SiT, aligned with an encoder that is defined here.")
    parser.add_argument("--model", default="SiT-XS/2", help="a preset, or weights to start from")
    parser.add_argument("--vae", default="none", help="an autoencoder of diffusers; none for pixels")
    parser.add_argument("--encoder_patch_size", type=int, default=2)
    parser.add_argument("--encoder_dim", type=int, default=64)
    parser.add_argument("--encoder_steps", type=int, default=300)
    parser.add_argument("--encoder_weights", help="file with the encoder's weights; written after training if missing")
    parser.add_argument("--dataset_name", default="embedded:digits", help="a data set of the Hub, or a folder of one")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--resolution", type=int, default=8)
    parser.add_argument("--objective", choices=["repa", "vrpo"], default="vrpo")
    parser.add_argument("--projector_dim", type=int, default=256)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=800)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--num_inference_steps", type=int, default=50, help="solver steps for the samples at the end")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/custom-encoder")
    return parser.parse_args(argv)


def main(args):
    state = PartialState()
    set_seed(args.seed)

    # Data
    if args.dataset_name == "embedded:digits":
        dataset = load_digits_dataset()["train"]
    else:
        dataset = load_dataset(args.dataset_name, split="train")

    # Encoder: all processes train the same one, because they start from the same seed and see the same images
    encoder = PatchNetwork(args.encoder_dim, args.encoder_patch_size).to(state.device)
    if args.encoder_weights and Path(args.encoder_weights).exists():
        encoder.load_state_dict(load_file(args.encoder_weights))
    else:
        train_encoder(encoder, dataset, args, state.device)
        if args.encoder_weights and state.is_main_process:
            save_file(encoder.state_dict(), args.encoder_weights)
    encoder.requires_grad_(False).eval()

    # Training. A resumed run needs the same encoder, so keep its weights with --encoder_weights.
    names = ("image_column", "label_column", "resolution", "objective", "projector_dim", "train_batch_size")
    names += ("max_train_steps", "learning_rate", "ema_decay", "seed", "output_dir")
    names += ("num_inference_steps", "dataloader_num_workers")
    config = VRPOConfig(
        report_to="none",
        logging_steps=max(1, args.max_train_steps // 10),
        validation_steps=args.max_train_steps,
        **{name: getattr(args, name) for name in names},
    )
    with VRPOTrainer(args.model, encoder, args.vae, dataset, args=config) as trainer:
        trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    main(parse_args())
