# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Sample many images from a pipeline into a folder, as PNG files or an .npz file for ADM's evaluator.

    vrpo sample outputs/digits --num_images 100 --output_dir samples
    vrpo sample --multi_gpu -- sit-xl --num_images 50000 --output_dir samples --sampler sde --num_inference_steps 250 \
        --guidance_scale 1.8 --guidance_interval 0 0.7 --batch_size 128 --dtype bfloat16 --compile --output_format npz

Image i depends only on the seed, on i and on the options, so one process, several processes, and a stopped command that is
run again all write the same files. Existing files are kept.
"""

# Neither torch nor diffusers is imported here, so that `vrpo sample --help` and errors of the command line appear at once.

import argparse

from ..command_line import OneLineErrorParser, number_in
from ..config import BATCH, DTYPES, GUIDANCE, NUM_SAMPLES, SEED, SOLVER_STEPS, In


# The options that the short help shows in addition to the required ones.
COMMON = ("labels", "seed", "sampler", "num_inference_steps", "guidance_scale", "batch_size", "dtype")
# The names in `SAMPLERS` of `pipelines/sampling.py`, for velocity and noise prediction.
SAMPLER_NAMES = ("default", "ode", "heun", "dpmsolver++", "unipc", "sde", "ddim", "ddpm")
CACHE_THRESHOLD = In(0, most=10, exclusive=True)


def channels(text: str) -> int | str:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of channels nor `all`")
    if text == "0":
        raise argparse.ArgumentTypeError("0 must be at least 1, or `all`")
    return text if text == "all" else int(text)


def add_sampling_options(parser: argparse.ArgumentParser, **num_images):
    """Adds PIPELINE and all options of sampling except those about files.

    Args:
        num_images: arguments of `add_argument` for --num_images, such as `default`.
    """
    parser.add_argument(
        "pipeline",
        metavar="PIPELINE",
        help="sample from this pipeline: the output folder of a run or of `vrpo convert`, or a name on the Hub",
    )
    g = parser.add_argument_group("what is sampled")
    g.add_argument("--num_images", type=number_in(NUM_SAMPLES), metavar="N", **num_images)
    g.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="sample these classes, by name or id; if not given, all classes that had images in training",
    )
    g.add_argument(
        "--class_balance",
        choices=["balanced", "random"],
        default="balanced",
        help="order of the labels: image by image in turn (balanced), or drawn at random (random)",
    )
    g.add_argument(
        "--seed",
        type=number_in(SEED),
        default=0,
        help="seed of the noise and of random labels; the same seed and options give the same images",
    )
    g = parser.add_argument_group("how")
    g.add_argument(
        "--sampler",
        choices=SAMPLER_NAMES,
        default="default",
        help="sample with this scheduler: the pipeline's own (default); ode (Euler), heun or sde for SiT, which predicts "
        "velocities; ddim or ddpm for DiT, which predicts noise; dpmsolver++ or unipc, which need fewer steps, for both",
    )
    g.add_argument(
        "--num_inference_steps",
        type=number_in(SOLVER_STEPS),
        default=50,
        help="number of solver steps, each of which evaluates the transformer once (twice with heun); published FIDs use 250",
    )
    g.add_argument(
        "--guidance_scale",
        type=number_in(GUIDANCE, float),
        help="strength of classifier-free guidance, which pushes images towards their class: 1 turns it off and takes half the "
        "time, 4 gives typical images of little variety (default: 1.5; 1 for a model with one class or without a null class)",
    )
    g.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.0, 1.0],
        help="lowest and highest noise level t at which guidance acts, between 0 (the image) and 1 (noise)",
    )
    g.add_argument(
        "--guidance_channels",
        type=channels,
        metavar="N",
        help="latent channels that guidance changes: the first N (3 for SiT and DiT) or `all` (for REPA); if not given, as the "
        "config of the model says",
    )
    g = parser.add_argument_group("computation")
    g.add_argument(
        "--batch_size",
        type=number_in(BATCH),
        default=32,
        help="compute this many images together on each process; raise it on a GPU until its memory is used",
    )
    g.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="compute the transformer in this precision; bfloat16 is several times as fast on a GPU",
    )
    g.add_argument("--vae_dtype", choices=DTYPES, default="float32", help="precision of the autoencoder")
    g.add_argument(
        "--allow_tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute float32 matrix products in TF32 on Ampere and later GPUs, as the official samplers of SiT and REPA do",
    )
    g.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    g.add_argument(
        "--first_block_cache",
        type=number_in(CACHE_THRESHOLD, float),
        metavar="THRESHOLD",
        help="reuse what the transformer blocks after the first added in the last full step, as long as the output of the first "
        "block has changed by less than this share since then, usually 0.05 to 0.2; this is faster but changes the images",
    )
    g.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub repository")
    g.add_argument("--variant", metavar="NAME", help="variant of the weights' files, such as fp16")


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__, common=(*COMMON, "output_format"))
    add_sampling_options(parser, required=True, help="sample this many images")
    g = parser.add_argument_group("files")
    g.add_argument(
        "--output_dir",
        required=True,
        metavar="DIR",
        help="write the images to this folder, which must be new, empty, or that of the same command before it was interrupted",
    )
    g.add_argument(
        "--output_format",
        choices=["png", "npz", "both"],
        default="png",
        help="write the images as 000000.png and so on (png), as samples.npz for ADM's evaluator (npz), or both",
    )
    g.add_argument("--overwrite", action="store_true", help="remove the samples in --output_dir first")
    g.add_argument("--cache_dir", metavar="DIR", help="folder for downloads; the Hub's own cache if not given")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends the process with a one-line message if options of `add_sampling_options` contradict each other."""
    low, high = args.guidance_interval
    if not 0 <= low <= high <= 1:
        parser.error(f"--guidance_interval {low} {high} must be LOW HIGH with 0 <= LOW <= HIGH <= 1 (t = 1 is noise)")
    if args.compile and args.first_block_cache is not None:
        parser.error(
            f"--first_block_cache {args.first_block_cache} cannot be combined with --compile, because its computation changes "
            "from step to step and torch would compile it again and again; remove one of the two"
        )


def parse_args(argv: list[str] | None = None, prog: str = "vrpo sample") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args
