# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""REPI (arXiv 2609.35292): a block that first attends to an encoder's features, and then learns to do without them.

In the scaffold phase the block takes its keys and values from the features of the clean image, through one linear map each.
In the internalisation phase, which follows, its own keys and values are pulled towards those of the maps. The maps are submodules of
`AlignedTransformer`; forward hooks on the block's `to_k` and `to_v` replace and record what these return.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .encoders import resample_tokens
from .gradient_fork import with_zero_gradient


def self_attention(block: nn.Module) -> nn.Module:
    """The module of a block that computes keys and values of its tokens with `to_k` and `to_v`.

    It is `attn1` or `attn` in diffusers; in other blocks the only child that has both.

    Raises:
        ValueError: if there is none, several, or one whose projections are fused.
    """

    def computes_both(module) -> bool:
        return all(isinstance(getattr(module, name, None), nn.Module) for name in ("to_k", "to_v"))

    children = dict(block.named_children())
    found = [children[name] for name in ("attn1", "attn") if computes_both(children.get(name))]
    found = found or [module for module in children.values() if computes_both(module)]
    if len(found) != 1:
        raise ValueError(
            f"a scaffold replaces what `to_k` and `to_v` of a block's self-attention return, and {type(block).__name__} has "
            f"{'several attentions with' if found else 'no attention with both of'} them; choose a block of another kind"
        )
    if getattr(found[0], "fused_projections", False):
        raise ValueError(
            "a scaffold replaces keys and values, which are fused with the queries; unfuse the projections"
        )
    return found[0]


def image_tokens(hidden_states: torch.Tensor, patch_size: int, grid_size: tuple[int, int] | None):
    """The number of image tokens of a transformer's input, and their rows and columns or None where they are not known.

    Args:
        hidden_states: a map `[B,C,H,W]`, or packed tokens `[B,N,C]`.
        patch_size: of the maps.
        grid_size: rows and columns of packed tokens, where they are known.
    """
    if hidden_states.ndim == 4:
        grid = (hidden_states.shape[2] // patch_size, hidden_states.shape[3] // patch_size)
        return grid[0] * grid[1], grid
    number = hidden_states.shape[1]
    return number, grid_size if grid_size and grid_size[0] * grid_size[1] == number else None


class Scaffold(nn.Module):
    """The maps from an encoder's features to the keys and values of a block: layer norm, then a linear layer each.

    The features of several encoders are normalised one by one and joined.

    Args:
        block: the block; its keys and values have the widths of its `to_k` and `to_v`.
        embed_dims: E of each encoder.
    """

    def __init__(self, block: nn.Module, embed_dims: list[int]):
        super().__init__()
        attention = self_attention(block)
        widths = [getattr(linear, "out_features", None) for linear in (attention.to_k, attention.to_v)]
        if None in widths:
            raise ValueError(f"`to_k` or `to_v` of {type(block).__name__} is not a linear layer; choose another block")
        self.keys, self.values = (nn.Linear(sum(embed_dims), width) for width in widths)
        self.draw_weights()

    def draw_weights(self):
        """Draws the weights like those of SiT and the projectors: Xavier, with biases of zero."""
        for linear in (self.keys, self.values):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes keys and values `[B,N,D]` from the features `[B,N,E]` of each encoder."""
        joined = torch.cat([F.layer_norm(f.float(), f.shape[-1:]) for f in features], dim=-1)
        joined = joined.to(self.keys.weight.dtype)
        return self.keys(joined), self.values(joined)


class ScaffoldStep:
    """What the scaffold does in one call of the aligned transformer.

    Args:
        features: of the clean images by each encoder, `[B,M,E]`.
        replaces (`bool`): whether the block takes its keys and values from the maps (the scaffold phase); otherwise its own
            are recorded, to be pulled towards those of the maps (internalisation).
    """

    def __init__(self, features: list[torch.Tensor], replaces: bool):
        self.features, self.replaces = features, replaces
        self.mapped: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values of the maps
        self.own: dict[int, torch.Tensor] = {}  # those of the block, if they are not replaced
        self.reached: set[int] = set()
        self.resting: list[nn.Module] = []  # layers of the block that the prediction does not depend on

    def begin(self, scaffold: Scaffold, hidden_states: torch.Tensor, patch_size: int, grid_size):
        """Computes the keys and values of the maps on the grid of the transformer's input."""
        number, grid = image_tokens(hidden_states, patch_size, grid_size)
        features = [f if f.shape[1] == number else resample_tokens(f, number, grid) for f in self.features]
        # A guided sampler calls the transformer with its batch several times over.
        repeats = max(1, len(hidden_states) // len(features[0]))
        features = [f.repeat(repeats, 1, 1) for f in features]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.replaces):
            self.mapped = scaffold(features)

    def end(self):
        """Checks that the block has asked for keys and values.

        Raises:
            RuntimeError: if it has not.
        """
        if len(self.reached) < 2:
            raise RuntimeError(
                "a scaffold replaces what `to_k` and `to_v` of a block return, and the block has not called them: its "
                "projections were fused or replaced (LoRA) after the scaffold was attached"
            )

    def take(self, index: int, layer: nn.Module, output: torch.Tensor) -> torch.Tensor | None:
        """Replaces or records the keys (0) or values (1) of the block, `[B,S,D]`; text tokens come before the N of the image.

        With gradient checkpointing it runs again in the backward pass, where nothing is recorded.

        Raises:
            ValueError: if the output does not consist of tokens, or has fewer of them than the transformer's input.
        """
        mapped = self.mapped[index]
        number, first_time = mapped.shape[1], index not in self.reached
        if output.ndim != 3 or output.shape[1] < number:
            raise ValueError(
                f"a scaffold has keys and values for {number} tokens, and its block has those of shape {tuple(output.shape)}; "
                "choose another block"
            )
        self.reached.add(index)
        if not self.replaces:
            if first_time:
                self.own[index] = output[:, -number:]
            return None
        mapped = mapped.to(output.dtype)
        if output.shape[1] > number:
            return torch.cat([output[:, :-number], mapped], dim=1)
        if first_time:
            self.resting.append(layer)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled():
            mapped = with_zero_gradient(mapped, *(p for p in layer.parameters() if p.requires_grad))
        return mapped

    def distance(self) -> torch.Tensor:
        """The mean squared errors of the block's keys and of its values against the maps', added up; 0 in the scaffold phase."""
        if self.replaces:
            return torch.zeros((), device=self.mapped[0].device)
        return sum((self.own[i].float() - self.mapped[i].float()).square().mean() for i in (0, 1))
