# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Trains diffusers' `DiTTransformer2DModel` on images with classes, aligned with a vision encoder by REPA or VRPO.

    accelerate launch examples/train_dit_alignment.py  # handwritten digits, without a download

    accelerate launch --mixed_precision bf16 examples/train_dit_alignment.py --dataset_name ILSVRC/imagenet-1k \
        --pretrained_model_name_or_path facebook/DiT-XL-2-256 --encoder facebook/dinov2-base --layer 8 \
        --projector_dim 2048 --resolution 256 --learning_rate 1e-4 --random_flip

This is a plain training loop with accelerate. The six lines that end in `# alignment` attach the encoder. Two other lines
differ from a loop without alignment: the model also returns the projected tokens, and the loss has a second term.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid, numpy_to_pil
from PIL import ImageOps
from tqdm.auto import tqdm

from diffusers_vrpo import REPA, VRPO, AlignedTransformer, load_digits_dataset, load_encoder


OBJECTIVES = {"repa": REPA, "vrpo": VRPO}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train diffusers' DiT, aligned with a vision encoder.")
    parser.add_argument("--pretrained_model_name_or_path", help="a pipeline with a DiT and its autoencoder")
    parser.add_argument("--vae", help="an autoencoder of diffusers; if not given, a new model is trained on pixels")
    parser.add_argument("--num_layers", type=int, default=4, help="number of blocks of a new model")
    parser.add_argument("--num_attention_heads", type=int, default=4, help="heads of a new model, of 32 channels each")
    parser.add_argument("--patch_size", type=int, default=2, help="patch size of a new model")
    parser.add_argument("--encoder", default="embedded:digits", help="a vision model of transformers")
    parser.add_argument("--objective", choices=OBJECTIVES, default="vrpo")
    parser.add_argument("--layer", type=int, default=2, help="block to align, counted from 1")
    parser.add_argument("--projector_dim", type=int, default=256, help="hidden width of the projector")
    parser.add_argument("--dataset_name", default="embedded:digits", help="a data set of the Hub, or a folder of one")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--resolution", type=int, default=8)
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=50)
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/dit-alignment")
    return parser.parse_args(argv)


@torch.no_grad()
def sample(transformer, vae, scheduler, labels, shape, args):
    """Draws an image for each of `labels`; returns a list of PIL images."""
    device, no_class = transformer.device, transformer.config.num_embeds_ada_norm
    latents = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    both = torch.tensor([*labels, *[no_class] * len(labels)], device=device)
    scheduler.set_timesteps(args.num_inference_steps)
    for timestep in scheduler.timesteps:
        prediction = transformer(latents.repeat(2, 1, 1, 1), timestep.expand(len(both)).to(device), both).sample
        of_class, of_none = prediction[:, : shape[0]].chunk(2)
        latents = scheduler.step(of_none + args.guidance_scale * (of_class - of_none), timestep, latents).prev_sample
    images = latents if vae is None else vae.decode(latents / vae.config.scaling_factor).sample
    return numpy_to_pil((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy())


def main(args):
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    device = accelerator.device
    set_seed(args.seed, device_specific=True)  # other noise on each process; DDP sends the first one's weights to all

    # Data
    if args.dataset_name == "embedded:digits":
        dataset = load_digits_dataset()["train"]
    else:
        dataset = load_dataset(args.dataset_name, split="train")
    num_classes = dataset.features[args.label_column].num_classes

    def preprocess(examples):
        size = (args.resolution, args.resolution)
        images = [ImageOps.fit(image.convert("RGB"), size) for image in examples[args.image_column]]
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images]
        if args.random_flip:
            pixels = [image.flip(2) if torch.rand(()) < 0.5 else image for image in pixels]
        return {"pixel_values": pixels, "labels": examples[args.label_column]}

    data, workers = dataset.with_transform(preprocess), args.dataloader_num_workers
    dataloader = torch.utils.data.DataLoader(
        data, args.train_batch_size, shuffle=True, drop_last=True, num_workers=workers
    )

    # Models
    source, vae = args.pretrained_model_name_or_path, None
    if args.vae or source:
        vae = AutoencoderKL.from_pretrained(args.vae or source, subfolder=None if args.vae else "vae")
        vae.requires_grad_(False).to(device)
    channels = 3 if vae is None else vae.config.latent_channels
    side = args.resolution if vae is None else args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    if source:
        transformer = DiTTransformer2DModel.from_pretrained(source, subfolder="transformer")
        noise_scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler", clip_sample=False)
    else:
        transformer = DiTTransformer2DModel(
            num_attention_heads=args.num_attention_heads,
            attention_head_dim=32,
            in_channels=channels,
            num_layers=args.num_layers,
            sample_size=side,
            patch_size=args.patch_size,
            num_embeds_ada_norm=num_classes,
        )
        # This schedule keeps more of the signal in small images. Sampling clips the estimated image to the range of pixels.
        noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=vae is None)
    transformer.to(device).train()
    # Guidance needs predictions without a class, which the last row of the class embeddings stands for. By default each block
    # would drop the class independently, so that hardly any sample would be without it in all blocks.
    no_class = transformer.config.num_embeds_ada_norm
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0

    Objective = OBJECTIVES[args.objective]
    # Rows and columns of the transformer's tokens, to which the encoder's embeddings are resampled
    grid = (side // transformer.config.patch_size,) * 2
    encoder = load_encoder(args.encoder, grid).to(device)  # alignment
    model = AlignedTransformer(transformer, [args.layer], [encoder], projector_dim=args.projector_dim)  # alignment
    objective = Objective(model, args.max_train_steps, prediction_type="epsilon")  # alignment

    # Optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0)
    lr_scheduler = get_scheduler("cosine", optimizer, None, args.lr_warmup_steps, args.max_train_steps)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)

    # Training
    progress = tqdm(total=args.max_train_steps, disable=not accelerator.is_local_main_process)
    global_step = 0
    while global_step < args.max_train_steps:
        for batch in dataloader:
            with accelerator.accumulate(model):
                images, latents = batch["pixel_values"], batch["pixel_values"]
                if vae is not None:
                    with torch.no_grad():
                        latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
                labels = torch.where(torch.rand(len(latents), device=device) < 0.1, no_class, batch["labels"])
                noise = torch.randn_like(latents)
                timesteps = torch.randint(1000, (len(latents),), device=device)
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)

                # Alignment measures time as flow matching does, by the share of noise, 1 / (1 + sqrt(signal-to-noise ratio)).
                step = objective.begin(1 / (1 + compute_snr(noise_scheduler, timesteps).sqrt()))  # alignment
                prediction, projections = model(noisy, timesteps, labels, fork=step.fork, align=step.active)

                # A pretrained DiT has further channels for the variance, which are not trained here.
                mse = (prediction[:, :channels].float() - noise).square().flatten(1).mean(1)
                loss = mse.mean() + objective.alignment_coeff * objective(step, projections, images, mse)
                accelerator.backward(loss)
                objective.observe(step)  # alignment
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                lr_scheduler.step()
                objective.update(accelerator.reduce)  # alignment
                progress.update()
                global_step += 1
                if global_step % 20 == 0:
                    logs = {name: f"{value.item():.3f}" for name, value in step.logs.items()}
                    progress.set_postfix({"mse": f"{mse.mean().item():.3f}", **logs})
            if global_step == args.max_train_steps:
                break

    # Saving: the transformer without projectors
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        transformer.eval().save_pretrained(output_dir / "transformer")
        noise_scheduler.save_pretrained(output_dir / "scheduler")
        labels = [number % num_classes for number in range(40)]
        images = sample(transformer, vae, noise_scheduler, labels, (channels, side, side), args)
        # Tiny images are enlarged to be visible.
        images = [ImageOps.scale(image, max(1, 48 // image.width)) for image in images]
        images = [ImageOps.expand(image, border=2, fill="gray") for image in images]
        make_image_grid(images, rows=4, cols=10).save(output_dir / "samples.png")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
