# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A fork that weighs the gradients of flow matching and alignment per example, in one backward pass.

The fidelity reward is minus the example's own flow-matching loss, whose gradient reaches the aligned block anyway. The fork
sits after that block, sees both gradients, and gives fidelity its share of the reward gradient. It also measures how much
the two conflict, and how long one is relative to the other. The fidelity reward comes from arXiv 2606.00583; the formulas are
ours (docs/method.md).
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F


CONFLICTS = ("none", "gate", "project")


def _per_sample(x: torch.Tensor, ndim: int) -> torch.Tensor:
    return x.reshape(-1, *[1] * (ndim - 1))


def mix_gradients(
    g_main: torch.Tensor, g_align: torch.Tensor, fidelity_share: torch.Tensor | None, conflict: str = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradient that the fork passes on: `g_main + (1 - s_f) g_align + s_f (||g_align|| / max(||g_main||, 1e-12)) g_main`.

    Norms are over `[N,D]` of each example, in float32. If both gradients carry a common factor (loss scaling, accumulation),
    the result carries it, too.

    Args:
        g_main, g_align: gradients of the flow-matching and of the alignment loss, `[B,N,D]`, any floating dtype.
        fidelity_share: `s_f` in [0, 1], `[B]`; None for 0, where the result is the sum of the two.
        conflict: with `"project"`, `g_align` first loses its component against `g_main`, in the samples where their cosine
            is negative (PCGrad, arXiv 2001.06782, applied to one of the two gradients); `"none"` and `"gate"` keep it.

    Returns:
        the gradient `[B,N,D]` in the dtype of `g_main`; and, float32 `[2,B]`, the cosine of the two gradients as they came in and
        their ratio `||g_align|| / ||g_main||`, which are 0 where one gradient is exactly zero.
    """
    main, align, ndim = g_main.float(), g_align.float(), g_main.ndim
    norm_main, norm_align = (torch.linalg.vector_norm(g.flatten(1), dim=1) for g in (main, align))
    product = (main * align).flatten(1).sum(1)
    table = torch.stack([norm_main, product, norm_align])
    # One division after the other: the product of two small norms would underflow. Dividing by infinity instead of a norm
    # of zero makes both measures zero.
    divisor_main, divisor_align = F.threshold(table[::2], 0.0, float("inf"))
    measures = table[1:] / divisor_main
    measures[0].div_(divisor_align)
    if conflict == "project":
        against = measures[0].clamp(max=0) * norm_align / norm_main.clamp_min(1e-12)
        align = align - _per_sample(against, ndim) * main
    if fidelity_share is None:
        return (main + align).to(g_main.dtype), measures
    if conflict == "project":
        norm_align = torch.linalg.vector_norm(align.flatten(1), dim=1)
    share = fidelity_share.float()
    gain = 1 + share * norm_align / norm_main.clamp_min(1e-12)
    mixed = _per_sample(gain, ndim) * main + _per_sample(1 - share, ndim) * align
    return mixed.to(g_main.dtype), measures


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(hidden_states, fidelity_share, probe, conflict, compiled):
        if not torch.compiler.is_compiling():
            return hidden_states.view_as(hidden_states), hidden_states.view_as(hidden_states)
        # The outputs must be neither views nor equal copies. Where a compiled graph ends here, AOT autograd rebuilds views from
        # their base, so that this backward is skipped, and Inductor makes one tensor of equal copies, so that their gradients
        # add up. The probe is zero.
        zeros = _per_sample(probe.sum(0), hidden_states.ndim).to(hidden_states.dtype)
        return hidden_states.clone(), hidden_states + zeros

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, fidelity_share, probe, ctx.conflict, ctx.compiled = inputs
        ctx.save_for_backward(*[] if fidelity_share is None else [fidelity_share])
        ctx.probe_dtype = probe.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_main, g_align):
        # An unused branch has a gradient of zeros.
        fidelity_share = next(iter(ctx.saved_tensors), None)
        mix = compiled_mix_gradients() if ctx.compiled else mix_gradients
        mixed, measures = mix(g_main, g_align, fidelity_share, ctx.conflict)
        return mixed, None, measures.to(ctx.probe_dtype), None, None


@functools.cache
def compiled_mix_gradients() -> Callable:
    """`mix_gradients` as one compiled graph, for tensors of one shape."""
    return torch.compile(mix_gradients, fullgraph=True, dynamic=False)


def fork(
    hidden_states: torch.Tensor,
    fidelity_share: torch.Tensor | None,
    probe: torch.Tensor,
    conflict: str = "none",
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies `hidden_states` for the rest of the transformer and for the projector; backward calls `mix_gradients`.

    The measures of the two gradients are returned as the gradient of `probe`, a zero input. So backward has no side effects and
    works with checkpointing and compilation. Only the blocks below the fork see the mixed gradient; the blocks above and the
    projector get their own gradients unchanged. The alignment loss must not reach the blocks below in any other way.

    Args:
        hidden_states: `[B,N,D]`.
        fidelity_share: `s_f` in [0, 1], `[B]`; it gets no gradient. None is 0.
        probe: `measuring_probe(B)`. After backward `probe.grad[0]` is the cosine per sample and `probe.grad[1]` the ratio
            `||g_align|| / ||g_main||`, both 0 where one gradient is exactly zero, not finite where one is not (half
            precision that overflowed).
        conflict: `"none"`, `"gate"` (the same as `"none"` here, since the gate acts through the loss) or `"project"`.
        compiled: whether the backward pass runs a compiled `mix_gradients`.

    Returns:
        h_main and h_align, both equal to `hidden_states`. Either may stay unused; its gradient then counts as zero.
    """
    if conflict not in CONFLICTS:
        raise ValueError(f"conflict {conflict!r} must be one of {', '.join(CONFLICTS)}")
    return _Fork.apply(hidden_states, fidelity_share, probe, conflict, compiled)


def measuring_probe(batch_size: int, device=None) -> torch.Tensor:
    """Creates the `probe` of `fork`: zeros `[2,B]`, float32, whose gradient will be the fork's measures."""
    return torch.zeros(2, batch_size, device=device, requires_grad=True)


def scale_gradient(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns `x [B, ...]` unchanged; its gradient is multiplied by `scale [B]`."""
    return x.detach() + _per_sample(scale, x.ndim).to(x.dtype) * (x - x.detach())


def alignment_fork(
    fidelity_share: torch.Tensor | None, probe: torch.Tensor, conflict: str = "none", compiled: bool = False
) -> Callable:
    """Creates the `fork` argument of `AlignedTransformer.forward`: it calls `fork` at the deepest aligned block.

    At shallower blocks the flow-matching gradient already contains alignment gradients, so there only the gradient of the
    projector branch is scaled, by `1 - s_f`. The arguments are those of `fork`.
    """

    def split(hidden_states: torch.Tensor, deepest: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if deepest:
            return fork(hidden_states, fidelity_share, probe, conflict, compiled)
        if fidelity_share is None:
            return hidden_states, hidden_states
        return hidden_states, scale_gradient(hidden_states, 1 - fidelity_share)

    return split


class _WithZeroGradient(torch.autograd.Function):
    """Returns the first tensor unchanged and gives the others a gradient of zero in the backward pass."""

    @staticmethod
    def forward(ctx, x, *resting):
        ctx.save_for_backward(*resting)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def with_zero_gradient(x: torch.Tensor, *resting: torch.Tensor) -> torch.Tensor:
    """Returns `x` unchanged; in its backward pass the other tensors get a gradient of zero, which DDP waits for."""
    return _WithZeroGradient.apply(x, *resting)
