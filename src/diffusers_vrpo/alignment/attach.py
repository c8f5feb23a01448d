# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Attaches alignment to a diffusers transformer: projectors on the image tokens of some of its blocks, and a scaffold.

Forward hooks on the blocks read the tokens and pass them through the fork (gradient_fork.py); other hooks pass the keys and
values of a block to the scaffold (scaffold.py). The transformer itself is not changed: a pipeline saves it and samples from
it without projectors and scaffold.

A limit: in transformers with a text stream (SD3, Flux) flow matching also reaches the lower blocks through the text tokens,
and in those with long skips (HunyuanDiT) through the skips. The fork sees, weighs and compares the gradient of the image tokens
behind the aligned block alone.
"""

import contextlib
import copy
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import InputError
from .gradient_fork import with_zero_gradient
from .image_tokens import (
    grid_of_input,
    hidden_width,
    image_token_places,
    image_tokens_index,
    put_back,
    take,
    transformer_blocks,
)
from .projectors import ConvProjector, make_projector, token_grid
from .scaffold import Scaffold, ScaffoldStep, self_attention
from .whitening import without_whitening


def alignment_layers(layer_scope: str, num_layers: int) -> list[int]:
    """The blocks, counted from 1, that `layer_scope` names: `early` (block 8 of 28), `mid`, `all`, or a list such as `4,8`.

    Raises:
        InputError: if `layer_scope` is another word, or the model does not have a block.
    """
    named = {
        "early": [math.ceil(num_layers * 2 / 7)],
        "mid": [max(1, num_layers // 2)],
        "all": list(range(1, num_layers + 1)),
    }
    if layer_scope in named:
        return named[layer_scope]
    try:
        layers = sorted({int(part) for part in layer_scope.split(",")})
    except ValueError:
        layers = []
    if not layers or layers[0] < 1 or layers[-1] > num_layers:
        raise InputError(
            "layer_scope",
            f"`layer_scope` {layer_scope!r} is neither early, mid, all nor a list such as 4,8 of blocks between 1 and "
            f"{num_layers}",
        )
    return layers


@dataclass
class _Call:
    """One call of the aligned transformer: its fork, the tokens that the hooks collect for the projectors, and its scaffold."""

    fork: Callable | None
    tokens: dict[int, list[torch.Tensor]] | None = field(default_factory=dict)
    scaffold: ScaffoldStep | None = None
    # Of the transformer's input: the number of image tokens, if known, and the arguments by name.
    number: int | None = None
    arguments: dict = field(default_factory=dict)


@dataclass
class _Attachment:
    """The state that the hooks on the transformer share. It is not a module, so that a copied transformer has its own.

    `next` describes the next call of the transformer and `current` the last one. It is None if the transformer is called
    directly, for example by a pipeline. `current` outlives the call, because with gradient checkpointing the blocks and
    their hooks run a second time during backward. `oracle` makes the scaffold of a direct call from the transformer's input.
    """

    deepest: int
    projectors_per_layer: int
    argument_names: list[str]
    image_tokens: str | Callable | None = None
    next: _Call | None = None
    current: _Call | None = None
    oracle: Callable[[torch.Tensor], ScaffoldStep] | None = None


class _StartCall:
    """Forward pre-hook of the transformer: makes the next call the current one."""

    def __init__(self, attachment: _Attachment):
        self.attachment = attachment

    def __call__(self, transformer, args, kwargs):
        attachment = self.attachment
        attachment.current, attachment.next = attachment.next, None
        if attachment.current is None and attachment.oracle is not None:
            attachment.current = _Call(None, None, attachment.oracle(first_input(args, kwargs)))
        if attachment.current is not None:
            attachment.current.number, _ = grid_of_input(transformer, first_input(args, kwargs), None)
            attachment.current.arguments = {**dict(zip(attachment.argument_names, args, strict=False)), **kwargs}


class _TakeTokens:
    """Forward hook of an aligned block: forks the image tokens into those for the next block and for the projectors."""

    def __init__(self, attachment: _Attachment, layer: int):
        self.attachment, self.layer = attachment, layer

    # The graph of a compiled block ends before the hook, which is not traced.
    @torch.compiler.disable
    def __call__(self, block, inputs, output):
        call = self.attachment.current
        if call is None or (call.fork is None and call.tokens is None):
            return None
        index = image_tokens_index(block, output)
        sequence = output if index is None else output[index]
        places = image_token_places(block, sequence, call.number, call.arguments, self.attachment.image_tokens)
        onward = to_project = take(sequence, places)
        if call.fork is not None:
            onward, to_project = call.fork(onward, self.layer == self.attachment.deepest)
            sequence = put_back(sequence, places, onward)
        # Autograd adds up gradients in the reverse order of the forward pass. A view for each projector, made here, keeps
        # the projectors' place in that order, though they run after the last block.
        views = [to_project.view_as(to_project) for _ in range(self.attachment.projectors_per_layer)]
        if call.tokens is not None:
            call.tokens[self.layer] = views
        return sequence if index is None else (*output[:index], sequence, *output[index + 1 :])


class _TakeKeysOrValues:
    """Forward hook of `to_k` (0) or `to_v` (1) of the scaffolded block."""

    def __init__(self, attachment: _Attachment, index: int):
        self.attachment, self.index = attachment, index

    def __call__(self, layer, inputs, output):
        call = self.attachment.current
        if call is None or call.scaffold is None:
            return None
        return call.scaffold.take(self.index, layer, output)


def first_input(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The noisy latents among the arguments of a transformer: `hidden_states`, or the first tensor."""
    given = [kwargs.get("hidden_states"), *args, *kwargs.values()]
    return next((x for x in given if isinstance(x, torch.Tensor)), None)


class AlignedTransformer(nn.Module):
    """A diffusers transformer with projectors on the tokens of some of its blocks, as alignment trains it.

    Train the wrapper (its parameters are the transformer's, the projectors' and the scaffold's, in this order), save and
    sample `aligned.transformer`.
    It works with gradient checkpointing, compiled blocks, autocast, DDP, and FSDP2 and DeepSpeed through accelerate. A
    backward pass with gradient checkpointing must follow its forward pass before the transformer is called again.

    Example:

    ```python
    import torch

    from diffusers_vrpo import REPA, AlignedTransformer, SiTTransformer2DModel, load_encoder, sit_preset

    transformer = SiTTransformer2DModel(sample_size=8, in_channels=3, num_classes=10, **sit_preset("SiT-XS/2"))
    encoder = load_encoder("embedded:digits", grid_size=(4, 4))
    aligned = AlignedTransformer(transformer, layers=[2], encoders=[encoder], projector_dim=64)
    objective = REPA(aligned, max_train_steps=1000)

    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    t, labels = torch.rand(2), torch.tensor([3, 7])
    mix = t.view(2, 1, 1, 1)
    step = objective.begin(t)
    x_t = (1 - mix) * images + mix * noise
    prediction, projections = aligned(x_t, t, labels, fork=step.fork, align=step.active)
    losses = (prediction - (noise - images)).square().flatten(1).mean(1)
    loss = losses.mean() + objective.alignment_coeff * objective(step, projections, images, losses)
    loss.backward()
    ```

    Args:
        transformer: SiT, DiT, PixArt, SD3, Flux, Sana or another one whose blocks return tokens (docs/models.md).
        layers (`list[int]`): the aligned blocks, counted from 1 through `transformer_blocks` and then
            `single_transformer_blocks`. An empty list trains without projectors.
        encoders (`list`): frozen encoders, with one projector per encoder and block: `PatchEncoder`s, or callables that map
            images to patch embeddings `[B,M,E]` and have an attribute `embed_dim`, E. They are not submodules.
        projector (`"mlp"` or `"conv"`): REPA's three linear layers, or iREPA's 3x3 convolution.
        projector_dim (`int`): hidden width of the `"mlp"`.
        hidden_dim (`int`, *optional*): D; by default `num_attention_heads * attention_head_dim` or `hidden_size` of the
            transformer's config.
        grid_size (`(int, int)`, *optional*): rows and columns of the image tokens; by default derived from the shape of each
            input, or the transformer's `grid_size`. It must be given for packed latents, as in Flux. It may be set between calls.
        blocks (`list[nn.Module]`, *optional*): the blocks that `layers` counts, if the transformer has other names for them.
        scaffold_layer (`int`, *optional*): the block, counted as `layers`, that gets keys and values from the encoders'
            features, as the objective's `scaffold_fraction` says (docs/method.md); none without it.
        image_tokens (*optional*): which tokens of an aligned block's sequence are the image's, if it also has text or
            registers: `"first"`, `"last"`, `"all"` (no others), or a function of the sequence `[B,L,D]` and a dictionary of the
            transformer's arguments, which returns a slice of L or an index `[B,N]`. By default it is known by the block's class.

    Raises:
        ValueError: if a layer or projector does not exist, an encoder has no `embed_dim`, the transformer's blocks or width
            are not known, or the scaffolded block has no `to_k` and `to_v`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        layers: Sequence[int] = (),
        encoders: Sequence = (),
        projector: str = "mlp",
        projector_dim: int = 2048,
        hidden_dim: int | None = None,
        grid_size: tuple[int, int] | None = None,
        blocks: list[nn.Module] | None = None,
        scaffold_layer: int | None = None,
        image_tokens: str | Callable | None = None,
    ):
        super().__init__()
        if not (image_tokens in (None, "first", "last", "all") or callable(image_tokens)):
            raise ValueError(f"`image_tokens` {image_tokens!r} must be first, last, all or a function")
        self.transformer = transformer
        for name, value in (("layers", layers), ("encoders", encoders)):
            if not isinstance(value, Iterable) or isinstance(value, str):
                raise ValueError(f"`{name}` must be a list, not {value!r:.80}")
        self.encoders = list(encoders)
        for encoder in self.encoders:
            if not isinstance(getattr(encoder, "embed_dim", None), numbers.Integral):
                raise ValueError(f"`encoders` has {encoder!r:.80}, which has no whole number `embed_dim`")
        self.embed_dims = [int(encoder.embed_dim) for encoder in self.encoders]
        self.layers = sorted(layers) if self.encoders else []
        self.projector, self.projector_dim = projector, projector_dim
        grid_size = grid_size or getattr(transformer, "grid_size", None)
        self.grid_size = tuple(grid_size) if grid_size else None
        self.last_grid: tuple[int, int] | None = None
        self.ended = False
        blocks = (blocks or transformer_blocks(transformer)) if self.layers or scaffold_layer is not None else []
        if self.layers and not 1 <= self.layers[0] <= self.layers[-1] <= len(blocks):
            raise ValueError(f"layers {self.layers} must lie in 1 ... {len(blocks)}, the transformer's blocks")
        if scaffold_layer is not None and not 1 <= scaffold_layer <= len(blocks):
            raise ValueError(
                f"scaffold_layer {scaffold_layer} must lie in 1 ... {len(blocks)}, the transformer's blocks"
            )
        if scaffold_layer is not None and not self.encoders:
            raise ValueError(f"scaffold_layer {scaffold_layer} needs `encoders`, whose features it uses")
        if self.layers and hidden_dim is None:
            hidden_dim = hidden_width(transformer)
        self.hidden_dim = hidden_dim

        # Ordered by block and then by encoder, like the projections.
        self.projectors = nn.ModuleList(
            make_projector(projector, hidden_dim, embed_dim, projector_dim)
            for _ in self.layers
            for embed_dim in self.embed_dims
        )
        for module in self.projectors.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        self._attachment = _Attachment(
            self.layers[-1] if self.layers else 0,
            len(self.embed_dims),
            list(inspect.signature(transformer.forward).parameters),
            image_tokens,
        )
        self._handles = [
            blocks[layer - 1].register_forward_hook(_TakeTokens(self._attachment, layer)) for layer in self.layers
        ]
        self._handles.append(transformer.register_forward_pre_hook(_StartCall(self._attachment), with_kwargs=True))

        self.scaffold_layer, self.scaffold = scaffold_layer, None
        # Of the last call with gradients: whether it aligned, and its scaffold.
        self._last: tuple[bool, ScaffoldStep | None] | None = None
        if scaffold_layer is not None:
            block = blocks[scaffold_layer - 1]
            self._scaffolded = [block]  # in a list, since it is a submodule of the transformer
            widths = [int(without_whitening(encoder).embed_dim) for encoder in self.encoders]
            self.scaffold, attention = Scaffold(block, widths), self_attention(block)
            for index, layer in enumerate((attention.to_k, attention.to_v)):
                self._handles.append(layer.register_forward_hook(_TakeKeysOrValues(self._attachment, index)))

    @property
    def _no_split_modules(self) -> list[str] | None:
        """The transformer's attribute, in which accelerate finds the modules that FSDP shards as one unit."""
        return getattr(self.transformer, "_no_split_modules", None)

    def forward(
        self, *args, fork: Callable | None = None, align: bool = True, scaffold: ScaffoldStep | None = None, **kwargs
    ) -> tuple:
        """Calls the transformer, and the projectors on the tokens of the aligned blocks.

        Args:
            args, kwargs: arguments of the transformer.
            fork: called as `f(tokens, deepest)` after every aligned block, `deepest` being true for the last of them; returns
                the tokens for the blocks above and those for the projectors. An objective's `begin` creates it.
            align (`bool`): whether to run the projectors; otherwise, and after `end`, there are no projections.
            scaffold (`ScaffoldStep`, *optional*): replaces or records the keys and values of the scaffolded block. An
                objective's `begin` creates it; it serves one call.

        Returns:
            the transformer's prediction; a tuple of projected tokens `[B,N,E]`, not normalised, one for each aligned block
            and encoder.
        """
        align = align and not self.ended and bool(self.layers)
        first = first_input(args, kwargs)
        if scaffold is not None:
            self._fill(scaffold, first)
        call = _Call(fork, {}, scaffold) if align else _Call(None, None, scaffold)
        self._attachment.next = call
        prediction = self.transformer(*args, **kwargs, return_dict=False)[0]
        if scaffold is not None:
            scaffold.end()
        if torch.is_grad_enabled():
            self._last = (align, scaffold)
            resting = self._resting_parameters()
            if resting and torch.distributed.is_available() and torch.distributed.is_initialized():
                # DDP waits for a gradient of every parameter.
                prediction = with_zero_gradient(prediction, *resting)
        if not align:
            return prediction, ()
        tokens, call.tokens = call.tokens, None
        _, self.last_grid = grid_of_input(self.transformer, first, self.grid_size)
        projections = []
        for number, projector in enumerate(self.projectors):
            layer, i = divmod(number, len(self.embed_dims))
            hidden_states = tokens[self.layers[layer]][i]
            if isinstance(projector, ConvProjector):
                num_tokens = hidden_states.shape[1]
                of_input = self.last_grid is not None and math.prod(self.last_grid) == num_tokens
                grid = token_grid(num_tokens, self.last_grid if of_input else self.grid_size, first)
                projections.append(projector(hidden_states, grid))
            else:
                projections.append(projector(hidden_states))
        return prediction, tuple(projections)

    def _fill(self, scaffold: ScaffoldStep, hidden_states: torch.Tensor):
        """Computes the keys and values of the maps for an input of the transformer."""
        # Compiled blocks share a graph, which does not see the hooks inside one of them: that block runs as it is.
        self._scaffolded[0]._compiled_call_impl = None
        patch_size = getattr(self.transformer.config, "patch_size", None) or 1
        scaffold.begin(self.scaffold, hidden_states, patch_size, self.grid_size)

    def _resting_parameters(self) -> list[nn.Parameter]:
        """The projectors' and the scaffold's parameters on which the loss of the last call does not depend."""
        if self._last is None:
            return []
        aligned, scaffold = self._last
        modules = [] if aligned else [self.projectors]
        if self.scaffold is not None and not (scaffold is not None and scaffold.replaces):
            modules.append(self.scaffold)
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def oracle(self, images: torch.Tensor | dict[str, torch.Tensor]) -> Iterator[None]:
        """Gives the scaffolded block keys and values from real images also where a pipeline calls the transformer.

            with aligned.oracle(images):
                pipeline(class_labels=labels, guidance_scale=1.0)

        It is a control for evaluations, which shows whether they react to better features at all: the model is told what to
        draw, so these images are not generated freely. It is meant for a scaffold phase that never ends (`scaffold_fraction` 1).

        Args:
            images: the encoders' input, as many as the pipeline draws.

        Raises:
            ValueError: without a scaffold or encoders.
        """
        if self.scaffold is None or not self.encoders:
            raise ValueError(
                "an oracle needs `scaffold_layer`, and encoders that have not been freed by the end of alignment"
            )
        with torch.no_grad():
            features = [without_whitening(encoder)(images) for encoder in self.encoders]

        def step(hidden_states: torch.Tensor) -> ScaffoldStep:
            made = ScaffoldStep(features, replaces=True)
            self._fill(made, hidden_states)
            return made

        self._attachment.oracle = step
        try:
            yield
        finally:
            self._attachment.oracle = self._attachment.current = None

    def end(self) -> None:
        """Ends alignment: frees the encoders and stops running the projectors in `forward`.

        The prediction then carries zero gradients for the projectors, which DDP needs; `clear_resting_gradients` removes
        them before the optimizer's step.
        """
        self.encoders, self.ended = [], True
        self._attachment.current = None

    def clear_resting_gradients(self) -> None:
        """Removes the zero gradients of the parameters that the last call did not train; called after backward.

        These are the projectors after the end of alignment, the scaffold's maps after the scaffold phase, and during it the
        scaffolded block's own layers for keys and values.
        """
        resting = self._resting_parameters()
        if self._last is not None and self._last[1] is not None:
            resting += [parameter for layer in self._last[1].resting for parameter in layer.parameters()]
        for parameter in resting:
            parameter.grad = None
        self._last = None

    def detach(self) -> nn.Module:
        """Removes the hooks from the transformer and returns it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.transformer

    def frozen_copy(self) -> "AlignedTransformer":
        """Returns a frozen copy in evaluation mode, without encoders."""
        encoders, self.encoders = self.encoders, []
        self._attachment.current = self._last = None
        try:
            return copy.deepcopy(self).eval().requires_grad_(False)
        finally:
            self.encoders = encoders

    # ------------------------------------------------------------------------------------------------------------------
    # Weights of the projectors

    def description(self) -> dict:
        """Describes the projectors: blocks, widths and kind, which other weights must match to be loaded."""
        return {
            "alignment_layers": list(self.layers),
            "alignment_dims": list(self.embed_dims),
            "projector_type": self.projector,
            "projector_dim": self.projector_dim,
        }

    @torch.no_grad()
    def load_projectors(self, description: dict, state: dict[str, torch.Tensor]) -> bool:
        """Loads the weights of projectors, if these have the same blocks, widths and kind.

        Args:
            description: as `description()` returns it.
            state: weights by names such as `"0.4.weight"` or `"projectors.0.4.weight"`.

        Returns:
            whether the weights were loaded.
        """
        own = self.description()
        if own["projector_type"] == "conv":  # which has no hidden width
            description = {**description, "projector_dim": own["projector_dim"]}
        if any(description.get(name) != value for name, value in own.items()):
            return False
        self.projectors.load_state_dict({name.removeprefix("projectors."): tensor for name, tensor in state.items()})
        return True
