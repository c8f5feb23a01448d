# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Trains or adapts a PixArt transformer on images with captions, aligned with a vision encoder by REPA or VRPO.

    accelerate launch examples/train_text_to_image_alignment.py  # handwritten digits, without a download

    accelerate launch --mixed_precision bf16 examples/train_text_to_image_alignment.py \
        --pretrained_model_name_or_path PixArt-alpha/PixArt-XL-2-512x512 --resolution 512 --lora_rank 16 \
        --dataset_name lambdalabs/naruto-blip-captions --caption_column text \
        --encoder facebook/dinov2-base --layer 8 --projector_dim 2048 --learning_rate 1e-4 --train_batch_size 8

Without `--caption_column` the captions are the names of the classes. Without `--pretrained_model_name_or_path` a small new
transformer is trained on pixels, with text features of a small T5 with random weights, which suffice to tell captions apart.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, PixArtTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid, numpy_to_pil
from peft import LoraConfig, get_peft_model
from PIL import ImageOps
from tqdm.auto import tqdm
from transformers import AutoTokenizer, ByT5Tokenizer, T5Config, T5EncoderModel

from diffusers_vrpo import REPA, VRPO, AlignedTransformer, load_digits_dataset, load_encoder


OBJECTIVES = {"repa": REPA, "vrpo": VRPO}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train PixArt on captions, aligned with a vision encoder.")
    parser.add_argument("--pretrained_model_name_or_path", help="a PixArt pipeline of 256 or 512 pixels")
    parser.add_argument("--lora_rank", type=int, default=0, help="0 trains all weights of the transformer")
    parser.add_argument("--num_layers", type=int, default=4, help="number of blocks of a new model")
    parser.add_argument("--encoder", default="embedded:digits", help="a vision model of transformers")
    parser.add_argument("--objective", choices=OBJECTIVES, default="vrpo")
    parser.add_argument("--layer", type=int, default=2, help="block to align, counted from 1")
    parser.add_argument("--projector_dim", type=int, default=256, help="hidden width of the projector")
    parser.add_argument("--dataset_name", default="embedded:digits", help="a data set of the Hub, or a folder of one")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="label", help="captions, or classes whose names are the captions")
    parser.add_argument("--resolution", type=int, default=8)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--validation_prompts", nargs="*", help="captions to sample at the end; by default, the first")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/text-to-image-alignment")
    return parser.parse_args(argv)


@torch.no_grad()
def sample(transformer, vae, scheduler, text, shape, args):
    """Draws an image for each caption; `text` is the result of `encode` for the captions and as many empty ones."""
    device, batch_size = transformer.device, len(text["encoder_hidden_states"])
    latents = torch.randn(batch_size // 2, *shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    scheduler.set_timesteps(args.num_inference_steps)
    for timestep in scheduler.timesteps.to(device):
        prediction = transformer(latents.repeat(2, 1, 1, 1), timestep=timestep.expand(batch_size), **text).sample
        of_text, of_none = prediction[:, : shape[0]].chunk(2)
        latents = scheduler.step(of_none + args.guidance_scale * (of_text - of_none), timestep, latents).prev_sample
    images = latents if vae is None else vae.decode(latents / vae.config.scaling_factor).sample
    return numpy_to_pil((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy())


def main(args):
    accelerator = Accelerator()
    device, source = accelerator.device, args.pretrained_model_name_or_path
    set_seed(args.seed, device_specific=True)  # other noise on each process; DDP sends the first one's weights to all

    # Frozen models, and the transformer
    vae, channels = None, 3  # without an autoencoder the model is trained on pixels
    side = args.resolution
    if source:
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
        text_encoder = T5EncoderModel.from_pretrained(source, subfolder="text_encoder")
        vae = AutoencoderKL.from_pretrained(source, subfolder="vae").requires_grad_(False).to(device)
        channels, side = vae.config.latent_channels, side // 2 ** (len(vae.config.block_out_channels) - 1)
        transformer = PixArtTransformer2DModel.from_pretrained(source, subfolder="transformer")
        noise_scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler", clip_sample=False)
    else:
        tokenizer = ByT5Tokenizer()  # its tokens are bytes, so there is no vocabulary to download
        text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=64, d_ff=128, num_layers=1))
        transformer = PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=channels,
            out_channels=channels,
            num_layers=args.num_layers,
            cross_attention_dim=128,
            sample_size=side,
            caption_channels=text_encoder.config.d_model,
            use_additional_conditions=False,
        )
        # This schedule keeps more of the signal in small images. Sampling clips the estimated image to the range of pixels.
        noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    text_encoder.requires_grad_(False).eval().to(device)
    transformer.to(device).train()
    adapters = None
    if args.lora_rank:  # get_peft_model puts the adapters into the transformer itself, and freezes the rest
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        adapters = get_peft_model(transformer, LoraConfig(r=args.lora_rank, target_modules=layers))

    # Alignment
    Objective = OBJECTIVES[args.objective]
    grid = (side // transformer.config.patch_size,) * 2
    encoder = load_encoder(args.encoder, grid).to(device)
    model = AlignedTransformer(transformer, [args.layer], [encoder], projector_dim=args.projector_dim)
    objective = Objective(model, args.max_train_steps, prediction_type="epsilon")

    # Data
    is_digits = args.dataset_name == "embedded:digits"
    dataset = load_digits_dataset()["train"] if is_digits else load_dataset(args.dataset_name, split="train")
    names = getattr(dataset.features[args.caption_column], "names", None)

    def preprocess(examples):
        size = (args.resolution, args.resolution)
        images = [ImageOps.fit(image.convert("RGB"), size) for image in examples[args.image_column]]
        captions = [names[value] if names else value for value in examples[args.caption_column]]
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images]
        return {"pixel_values": pixels, "captions": captions}

    @torch.no_grad()
    def encode(captions):
        tokens = tokenizer(captions, max_length=120, padding=True, truncation=True, return_tensors="pt").to(device)
        features = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        text = {"encoder_hidden_states": features, "encoder_attention_mask": tokens.attention_mask}
        # Only PixArt's models of 1024 pixels are conditioned on the size of the image.
        return {**text, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    data = dataset.with_transform(preprocess)
    count = args.max_train_steps * args.train_batch_size * accelerator.num_processes
    sampler = torch.utils.data.RandomSampler(data, num_samples=count)
    dataloader = torch.utils.data.DataLoader(data, args.train_batch_size, sampler=sampler)

    # Optimizer: for the adapters or the transformer, and for the projectors
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0)
    lr_scheduler = get_scheduler("cosine", optimizer, None, 50, args.max_train_steps)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)

    # Training
    progress = tqdm(dataloader, disable=not accelerator.is_local_main_process)
    for global_step, batch in enumerate(progress, start=1):
        images, latents = batch["pixel_values"], batch["pixel_values"]
        if vae is not None:
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        # One caption in ten is empty, as classifier-free guidance requires.
        text = encode([caption if torch.rand(()) > 0.1 else "" for caption in batch["captions"]])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(latents),), device=device)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)

        # Alignment measures time as flow matching does, by the share of noise, 1 / (1 + sqrt(signal-to-noise ratio)).
        step = objective.begin(1 / (1 + compute_snr(noise_scheduler, timesteps).sqrt()))
        prediction, projections = model(noisy, timestep=timesteps, **text, fork=step.fork, align=step.active)

        # A pretrained PixArt has further channels for the variance, which are not trained here.
        mse = (prediction[:, :channels].float() - noise).square().flatten(1).mean(1)
        loss = mse.mean() + objective.alignment_coeff * objective(step, projections, images, mse)
        accelerator.backward(loss)
        objective.observe(step)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        objective.update(accelerator.reduce)

        if global_step % 20 == 0:
            logs = {name: f"{value.item():.3f}" for name, value in step.logs.items()}
            progress.set_postfix({"mse": f"{mse.mean().item():.3f}", **logs})

    # Saving: the adapters, or the transformer without projectors
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        part = "transformer" if adapters is None else "lora"
        (adapters or transformer).save_pretrained(output_dir / part)
        prompts = args.validation_prompts or (names or [data[row]["captions"] for row in range(10)])[:10]
        text = encode([*prompts * 4, *[""] * len(prompts) * 4])
        images = sample(transformer.eval(), vae, noise_scheduler, text, (channels, side, side), args)
        # Tiny images are enlarged to be visible.
        images = [ImageOps.scale(image, max(1, 48 // image.width)) for image in images]
        images = [ImageOps.expand(image, border=2, fill="gray") for image in images]
        make_image_grid(images, rows=4, cols=len(prompts)).save(output_dir / "samples.png")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
