# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Whitened targets: an encoder's embeddings in K principal dimensions of a fixed sample, in which each has variance 1.

The directions in which patch embeddings vary most often say little about the image (position, a common offset), but they
dominate a cosine. Whitening was found to help most with weak encoders (RARE, arXiv 2609.34732).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..errors import InputError


TARGET_WHITENING = "target_whitening"  # the name of the statistics in checkpoints
SMALLEST_VARIANCE = 1e-10  # of the last dimension, relative to the first one's: less is rounding


@dataclass
class Whitening:
    """The map `x -> (x - mean) @ projection` of embeddings of width E to K whitened dimensions.

    Attributes:
        mean (`torch.Tensor`): `[E]`, float32.
        projection (`torch.Tensor`): `[E,K]`, float32: principal directions in the order of falling variance, each divided by
            the square root of its variance.
    """

    mean: torch.Tensor
    projection: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B,M,E]` as `[B,M,K]`, float32. It commutes with a linear resampling of the M tokens."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.projection

    def to(self, device) -> "Whitening":
        return Whitening(self.mean.to(device), self.projection.to(device))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean, "projection": self.projection}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]):
        self.mean.copy_(state_dict["mean"])
        self.projection.copy_(state_dict["projection"])


class WhitenedEncoder:
    """A frozen encoder whose embeddings are whitened; it takes the encoder's place in `AlignedTransformer`.

    Attributes:
        encoder: maps images to patch embeddings `[B,M,E]`.
        whitening ([`Whitening`]): its statistics, which an objective saves in checkpoints.
        embed_dim (`int`): K.
    """

    def __init__(self, encoder, whitening: Whitening):
        self.encoder, self.whitening = encoder, whitening
        self.embed_dim = whitening.projection.shape[1]

    @torch.no_grad()
    def __call__(self, images) -> torch.Tensor:
        return self.whitening(self.encoder(images))


def without_whitening(encoder):
    """The encoder itself, whose embeddings a scaffold takes: only the targets of the projectors are whitened."""
    return encoder.encoder if isinstance(encoder, WhitenedEncoder) else encoder


class Whitenings:
    """The statistics of several encoders as one object to save in a checkpoint."""

    def __init__(self, whitenings: list[Whitening]):
        self.whitenings = whitenings

    def state_dict(self) -> dict[str, torch.Tensor]:
        numbered = enumerate(whitening.state_dict() for whitening in self.whitenings)
        return {f"{i}.{name}": tensor.contiguous() for i, state in numbered for name, tensor in state.items()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]):
        for i, whitening in enumerate(self.whitenings):
            whitening.load_state_dict({name: state_dict[f"{i}.{name}"] for name in ("mean", "projection")})


def whitenings_from_state(state_dict: dict[str, torch.Tensor]) -> list[Whitening]:
    """The statistics of each encoder from a `state_dict` of [`Whitenings`]."""
    count = len(state_dict) // 2
    return [Whitening(state_dict[f"{i}.mean"], state_dict[f"{i}.projection"]) for i in range(count)]


@torch.no_grad()
def fit_whitening(batches: Iterable[torch.Tensor], num_dims: int, name: str = "") -> Whitening:
    """Computes mean and principal directions of embeddings over all tokens of all images, in float64.

    Args:
        batches: embeddings `[B,M,E]`.
        num_dims: K, from 1 to E.
        name: of the encoder, for errors.

    Raises:
        InputError: if the embeddings are not finite, or vary in fewer than K dimensions.
    """
    whose = f"the embeddings of `encoder` {name}" if name else "the encoder's embeddings"
    count, total, products, shift = 0, 0.0, 0.0, None
    for features in batches:
        tokens = features.flatten(0, -2).double()
        # Second moments are taken around a first estimate of the mean: those around 0 lose digits where the mean is far from 0.
        shift = tokens.mean(0) if shift is None else shift
        tokens = tokens - shift
        count, total, products = count + len(tokens), total + tokens.sum(0), products + tokens.mT @ tokens
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    if not covariance.isfinite().all():
        raise InputError("target_norm", f"`target_norm` whiten:{num_dims}: {whose} are not finite")
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0), directions.flip(1)
    rank = int((variances > SMALLEST_VARIANCE * variances[0].clamp_min(1e-30)).sum())
    if rank < num_dims:
        raise InputError(
            "target_norm",
            f"`target_norm` whiten:{num_dims}: {whose}, of {count} tokens, vary in {rank} dimensions only; "
            + (f"give at most whiten:{rank}" if rank > 1 else "give none"),
        )
    variances, directions = variances[:num_dims], directions[:, :num_dims]
    # The decomposition does not tell a direction from its opposite: take the one whose largest component is positive.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    projection = directions * largest.sign() / variances.sqrt()
    return Whitening((mean + shift).float(), projection.float())


def whiten_encoder(encoder: Callable, images: Iterable[torch.Tensor], num_dims: int) -> WhitenedEncoder:
    """Whitens an encoder with the statistics of some images, for a training loop of your own.

    Example:

    ```python
    from diffusers_vrpo import digits_pixels, load_encoder, whiten_encoder

    encoder = load_encoder("embedded:digits", grid_size=(4, 4))
    images, _ = digits_pixels("train")
    whitened = whiten_encoder(encoder, images[:512].split(128), num_dims=16)
    print(whitened(images[:2]).shape)  # [2, 16, 16]
    ```

    Args:
        encoder: maps images `[B,3,H,W]` in [-1, 1] to patch embeddings `[B,M,E]`, with an attribute `embed_dim`, E.
        images: batches of its input, about 1,000 images of the training data.
        num_dims: K; at most E.

    Raises:
        InputError: if K is larger than E, or the embeddings vary in fewer dimensions.
    """
    check_width(num_dims, encoder.embed_dim, type(encoder).__name__)
    return WhitenedEncoder(
        encoder, fit_whitening((encoder(batch) for batch in images), num_dims, type(encoder).__name__)
    )


def check_width(num_dims: int, embed_dim: int, name: str):
    """Checks that an encoder has as many dimensions as are wanted.

    Raises:
        InputError: if it has fewer.
    """
    if num_dims > embed_dim:
        raise InputError(
            "target_norm",
            f"`target_norm` whiten:{num_dims}: the embeddings of `encoder` {name} have {embed_dim} dimensions; give at most "
            f"whiten:{embed_dim}",
        )
