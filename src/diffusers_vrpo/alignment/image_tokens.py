# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The positions of the image tokens in the output of a block of a diffusers transformer.

A block returns the image tokens alone, or a tuple of image and text tokens, or one sequence of both. diffusers has a register of
the tuples. What it lacks, and the sequences, are listed here by the names of the blocks' classes.
"""

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn


# In the order of the forward pass.
BLOCK_LISTS = ("transformer_blocks", "joint_transformer_blocks", "single_transformer_blocks", "blocks", "layers")

# The index of the image tokens in a block's output where diffusers' register does not have it, or has that of the text (Bria).
IMAGE_OUTPUTS = {"BriaTransformerBlock": 1, "CogView3PlusTransformerBlock": 0}

# Blocks that return one sequence, with the text and registers before the image.
TEXT_FIRST = ("AuraFlowSingleTransformerBlock", "ChromaSingleTransformerBlock", "Flux2SingleTransformerBlock")
# The same, but each caption is followed by the image and then by padding.
TEXT_FIRST_WITHOUT_PADDING = ("Lumina2TransformerBlock",)
# One sequence in an order that the arguments of the transformer (lists of images, position ids) do not tell by themselves.
ORDER_UNKNOWN = ("OmniGenBlock", "ZImageTransformerBlock")


def transformer_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers transformer in the order of the forward pass; Flux has single after double blocks.

    Raises:
        ValueError: if the module has no list of `BLOCK_LISTS`.
    """
    lists = [getattr(transformer, name, None) for name in BLOCK_LISTS]
    blocks = [block for blocks in lists if isinstance(blocks, nn.ModuleList) for block in blocks]
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no {' or '.join(BLOCK_LISTS)}; give `blocks`")
    return blocks


def hidden_width(transformer: nn.Module) -> int:
    """D, the width of a transformer's tokens, from its config.

    Raises:
        ValueError: if the config does not have it.
    """
    config = getattr(transformer, "config", {})
    heads, head_dim, hidden_size = (
        config.get(name) for name in ("num_attention_heads", "attention_head_dim", "hidden_size")
    )
    if isinstance(heads, int) and isinstance(head_dim, int):
        return heads * head_dim
    if isinstance(hidden_size, int):
        return hidden_size
    raise ValueError(f"the width of {type(transformer).__name__}'s tokens is not known; give `hidden_dim`")


def image_tokens_index(block: nn.Module, output: torch.Tensor | tuple) -> int | None:
    """The index of the image tokens in a block's output; None if the output is one tensor.

    diffusers has a register of this index (a private one, which a test pins). For a block that is in neither register nor
    `IMAGE_OUTPUTS`, the image tokens are assumed to be last.
    """
    if isinstance(output, torch.Tensor):
        return None
    # FSDP2 gives a sharded block a class of its own, which derives from the block's.
    for kind in type(block).__mro__:
        if kind.__name__ in IMAGE_OUTPUTS:
            return IMAGE_OUTPUTS[kind.__name__]
        try:
            index = TransformerBlockRegistry.get(kind).return_hidden_states_index
        except ValueError:
            continue
        return len(output) - 1 if index is None else index
    return len(output) - 1


def grid_of_input(
    transformer: nn.Module, hidden_states: torch.Tensor | None, grid_size: tuple[int, int] | None
) -> tuple[int | None, tuple[int, int] | None]:
    """The number of image tokens of a transformer's input, and their rows and columns; None where they are not known.

    Args:
        hidden_states: maps `[B,C,H,W]`, whose patches are the tokens if the transformer's config has a `patch_size`, or packed
            tokens `[B,N,C]`.
        grid_size: rows and columns of packed tokens.
    """
    patch_size = getattr(getattr(transformer, "config", None), "patch_size", None)
    if hidden_states is not None and hidden_states.ndim == 4 and isinstance(patch_size, int):
        grid = (hidden_states.shape[2] // patch_size, hidden_states.shape[3] // patch_size)
        return grid[0] * grid[1], grid
    if hidden_states is not None and hidden_states.ndim == 3:
        number = hidden_states.shape[1]
        return number, grid_size if grid_size and grid_size[0] * grid_size[1] == number else None
    return None, None


def image_token_places(
    block: nn.Module, tokens: torch.Tensor, number: int | None, arguments: dict, where=None
) -> slice | torch.Tensor | None:
    """The positions of the image tokens in a sequence `[B,L,D]`: a slice, an index `[B,N]`, or None if it has nothing else.

    Args:
        number (`int`, *optional*): N, as many as the transformer's input has; without it the whole sequence is taken.
        arguments (`dict`): what the transformer was called with.
        where: as `image_tokens` of `AlignedTransformer`.

    Raises:
        ValueError: if the sequence has another number of tokens, and the image's place among them is not known.
    """
    if callable(where):
        return where(tokens, arguments)
    length, kinds = tokens.shape[1], {kind.__name__ for kind in type(block).__mro__}
    mixed = kinds & {*TEXT_FIRST, *TEXT_FIRST_WITHOUT_PADDING, *ORDER_UNKNOWN}
    if where == "all" or number == length or where is None and number is None and not mixed:
        return None
    if number is not None and number < length:
        if where == "last" or where is None and kinds & set(TEXT_FIRST):
            return slice(length - number, length)
        if where == "first":
            return slice(0, number)
        mask = arguments.get("encoder_attention_mask")
        if kinds & set(TEXT_FIRST_WITHOUT_PADDING) and mask is not None:
            return mask.long().sum(1, keepdim=True) + torch.arange(number, device=tokens.device)
    raise ValueError(
        f"{type(block).__name__} returns {length} tokens, and the transformer's input has {'an unknown number' if number is None else number} "
        "of them; give `image_tokens`: first, last, all, or a function that says where the image's tokens are"
    )


def take(tokens: torch.Tensor, places: slice | torch.Tensor | None) -> torch.Tensor:
    """The image tokens `[B,N,D]` of a sequence `[B,L,D]`."""
    if places is None:
        return tokens
    if isinstance(places, slice):
        return tokens[:, places]
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def put_back(tokens: torch.Tensor, places: slice | torch.Tensor | None, image: torch.Tensor) -> torch.Tensor:
    """The sequence `[B,L,D]` with other image tokens `[B,N,D]`; the rest, text and registers, stays."""
    if places is None:
        return image
    if isinstance(places, slice):
        start, stop, _ = places.indices(tokens.shape[1])
        return torch.cat([tokens[:, :start], image, tokens[:, stop:]], dim=1)
    return tokens.scatter(1, places[..., None].expand(-1, -1, tokens.shape[2]), image)
