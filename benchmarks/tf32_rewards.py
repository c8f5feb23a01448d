#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""What TF32 does to the structural reward, whose matrix products are the only ones of the rewards on tokens.

    python benchmarks/tf32_rewards.py

A GPU that computes in TF32 rounds the inputs of a float32 product to 10 bits of mantissa and adds up in float32. This does the same
on a CPU, and compares with float64: the reward, its tangent gradient at the mean action (the `expected` estimator), and the group-relative
advantages of sampled actions (`sampled`). The bfloat16 column, 7 bits, is what autocast would do. Errors are root mean squares over tokens,
relative to the root mean square of the exact value; `1 - cosine` is the mean of the gradients' over tokens.

Targets `y` share a part over all tokens of an image and over every eighth token, as features of images do, or are `random`. Tokens `mu` have
the given cosine to `y`, in a random direction.
"""

import argparse
import functools
import math
import sys

import torch

from diffusers_vrpo.alignment.policy import group_relative_advantages, sample_actions
from diffusers_vrpo.alignment.rewards import normalize, take_tokens, tangent


IMAGES, TOKENS, SUBSET, GROUP, SIGMA = 2, 256, 64, 8, 0.1


def exact(x: torch.Tensor) -> torch.Tensor:
    return x


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`x`, float32, rounded to so many bits of mantissa, to even where two are equally near."""
    integer, dropped = x.contiguous().view(torch.int32), 23 - bits
    half = (1 << (dropped - 1)) - 1 + ((integer >> dropped) & 1)
    return ((integer + half) & ~((1 << dropped) - 1)).view(torch.float32)


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def tokens(embed_dim: int, cosine: float, clustered: bool, generator: torch.Generator):
    """`mu`, `y` and the subset of the structural reward."""
    draw = functools.partial(torch.randn, generator=generator)
    y = draw(IMAGES, TOKENS, embed_dim)
    if clustered:
        y = y + draw(IMAGES, 1, embed_dim) + draw(IMAGES, 8, embed_dim)[:, torch.arange(TOKENS) % 8]
    y, across = unit(y), draw(IMAGES, TOKENS, embed_dim)
    across = unit(across - (across * y).sum(-1, keepdim=True) * y)
    subset = torch.stack([torch.randperm(TOKENS, generator=generator)[:SUBSET] for _ in range(IMAGES)])
    return unit(cosine * y + math.sqrt(1 - cosine**2) * across), y, subset


def differences(action, mu, y, subset, product_input):
    r = product_input
    return r(action) @ r(take_tokens(mu, subset)).mT - r(y) @ r(take_tokens(y, subset)).mT


def measure(mu, y, subset, actions, product_input) -> list[torch.Tensor]:
    """Reward, tangent gradient and advantages, with `product_input` applied to the inputs of every matrix product."""
    difference = differences(mu, mu, y, subset, product_input)
    gradient = -2 / SUBSET * (product_input(difference) @ product_input(take_tokens(mu, subset)))
    of_actions = -differences(actions, mu, y, subset, product_input).square().mean(-1)
    advantages = group_relative_advantages(of_actions, SIGMA, mu.shape[-1])
    return [-difference.square().mean(-1), tangent(mu, gradient), advantages]


def main(settings: argparse.Namespace):
    torch.set_num_threads(1)
    print(
        f"{'E':>5} {'cosine':>7} {'targets':>10} {'products':>9}{'reward':>10}{'gradient':>10}{'1 - cosine':>12}{'advantages':>12}"
    )
    for embed_dim in settings.embed_dims:
        for clustered in (True, False):
            for cosine in settings.cosines:
                generator = torch.Generator().manual_seed(0)
                mu, y, subset = tokens(embed_dim, cosine, clustered, generator)
                actions = normalize(sample_actions(mu, torch.randn(GROUP, *mu.shape, generator=generator), SIGMA))
                expected = measure(
                    *(x.double() if x.is_floating_point() else x for x in (mu, y, subset, actions)), exact
                )
                for name, product_input in (
                    ("float32", exact),
                    ("TF32", functools.partial(rounded, bits=10)),
                    ("bfloat16", functools.partial(rounded, bits=7)),
                ):
                    found = [x.double() for x in measure(mu, y, subset, actions, product_input)]
                    errors = [
                        ((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(found, expected)
                    ]
                    turned = 1 - torch.nn.functional.cosine_similarity(found[1], expected[1], dim=-1).mean().item()
                    print(
                        f"{embed_dim:>5} {cosine:>7} {'clustered' if clustered else 'random':>10} {name:>9}"
                        f"{errors[0]:>10.1e}{errors[1]:>10.1e}{turned:>12.0e}{errors[2]:>12.1e}"
                    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed_dims", type=int, nargs="+", default=[384, 768, 1024], help="default: 384 768 1024")
    parser.add_argument("--cosines", type=float, nargs="+", default=[0.0, 0.5, 0.9, 0.99], help="default: 0 .5 .9 .99")
    main(parser.parse_args(sys.argv[1:]))
